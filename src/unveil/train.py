"""The training loop: one optimiser, running averages, saves to resume from."""

import dataclasses
import datetime
import inspect
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unveil import __version__
from unveil.checkpoint import BEST, LAST, WEIGHTS, About, read_header, write_atomically
from unveil.config import Training
from unveil.data import BadPicture, Batch, Order, Samples, batches
from unveil.optim import adam_state, running_average
from unveil.pretraining_job import PretrainingJob
from unveil.recipe import Recipe, to_dict
from unveil.report import save_png
from unveil.rundir import CONFIG, OUTCOME, PROBLEMS, SHEET, Metrics, Run, check_same_run, interruptible, last_loss, lock
from unveil.saves import SAVES, Saves
from unveil.sources import digest_of
from unveil.spread import Spread
from unveil.training_report import write_training_report
from unveil.trouble import BUNDLES, MAX_RESTARTS, PATIENCE, Health, Step, gradient_norm, guard, write_bundle

SHEET_SAMPLES = 8
OLD_STATE = "state.pt"  # of Unveil 0.1
RECORD_SECONDS = 1.0  # between two looks at the device
REPORT_SECONDS = 30.0  # between two makings of a run's page, which take about one
OTHER_DRAWS = 1_000_000  # what a run that went back adds to its epochs and steps where they name draws


@dataclass
class Progress:
    """What is told after each step; `loss` and `images_per_second` are over the steps since the last record.

    setup: what a step is, in words.
    """

    setup: str
    step: int
    num_steps: int
    images_seen: int
    loss: float | None
    images_per_second: float


class NotFinite(Exception):
    """The weights, or several gradients in a row, are no numbers: what happened since the last save is not to be kept."""


class Job(Protocol):
    """What a `Trainer` trains: a model and its optimiser, what a step computes, and what is written."""

    @property
    def training(self) -> Training: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def objective(self) -> nn.Module:
        """forward(clips, draws) -> loss, logs."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def uses_all(self) -> bool:
        """Whether every parameter has a gradient in every step, whatever the clips."""
        ...

    def inputs(self, batch: Batch, epoch: int, places: Sequence[int]) -> tuple[Tensor, Any]:
        """Clips, and what a step draws for them, with a method `to(device)`; places are theirs in the epoch's order."""
        ...

    def lr_at(self, step: int, num_steps: int, warmup_steps: int) -> float:
        """The learning rate of a step, which each of the optimiser's groups scales by its "lr_scale"."""
        ...

    def randomness(self, step: int, piece: int) -> AbstractContextManager[Any]:
        """Around a piece of a step, for what draws from torch's global generator inside the model."""
        ...

    def save(self, path: Path, weights: dict[str, Tensor], about: About) -> None: ...

    def sheet(self, model: nn.Module, clips: Tensor) -> Image.Image:
        """What the model sees in some clips, for people."""
        ...

    def evaluates(self, epoch: int) -> bool:
        """Whether `evaluate` is wanted after this many epochs."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Numbers of the model in use, "score" among them, which is the better the higher."""
        ...


class Trainer:
    """State of a run between steps: everything that a resumed run needs to go on exactly as it would have."""

    def __init__(self, job: Job, samples: Samples, run: Run, spread: Spread | None = None) -> None:
        self.job, self.samples, self.run = job, samples, run
        self.spread = spread or Spread()
        training = job.training
        self.model, self.optimizer = job.model, job.optimizer
        self.averages = nn.ModuleList(running_average(self.model, decay) for decay in training.ema_decays)
        self.loader = batches(
            samples,
            training.batch_size,
            epoch=0,
            seed=run.seed,
            shuffle=True,
            drop_last=True,
            num_workers=run.workers,
            pin_memory=run.device.startswith("cuda"),
            rank=self.spread.rank,
            world=self.spread.world,
        )
        self.order = self.loader.batch_sampler
        assert isinstance(self.order, Order)
        self.steps_per_epoch = len(self.order)
        self.num_steps = training.epochs * self.steps_per_epoch
        self.warmup_steps = min(round(training.warmup_epochs * self.steps_per_epoch), self.num_steps // 2)
        self.step = 0
        self.images_seen = 0
        self.problems: dict[str, str] = {s.where: s.reason for s in samples.source.skipped}
        self.notes: dict[int, str] = {}
        self.read_before: int | None = None  # a sample that could be read
        self.sheet_clips: Tensor | None = None
        self.best: dict[str, float] | None = None
        self.restarts = 0
        self.skipped: list[int] = []
        self.saves = Saves(run.out, run.keep)
        self.last_report = time.perf_counter()

    @property
    def in_use(self) -> nn.Module:
        """The weights for use: the first running average, or the model as trained if there is none."""
        model = self.averages[0].module if len(self.averages) else self.model
        assert isinstance(model, nn.Module)
        return model

    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Clips, and what the current step draws for them."""
        assert batch.clips is not None
        epoch = self.named(self.step // self.steps_per_epoch)
        return self.job.inputs(batch, epoch, batch.places.tolist())

    def named(self, number: int) -> int:
        """The number of an epoch or a step, where it names draws: others than before after the run went back."""
        return number + OTHER_DRAWS * self.restarts

    def epochs(self) -> Iterator[Batch]:
        """Batches from the current step to the end, the order of each epoch fixed by the seed."""
        assert isinstance(self.order, Order)
        for epoch in range(self.step // self.steps_per_epoch, self.job.training.epochs):
            self.order.epoch = self.named(epoch)
            self.order.first_batch = self.step - epoch * self.steps_per_epoch
            yield from self.loader

    def stand_in(self) -> Batch:
        """A clip that counts nothing, for a process whose part of a batch cannot be read while that of others can."""
        clip = self.samples.clip
        clips = torch.zeros(1, clip.channels, clip.frames, clip.height, clip.width)
        zero = torch.zeros(1, dtype=torch.int64)
        return Batch(zero, zero, clips, zero - 1, [], [])

    def is_lost(self) -> bool:
        """Whether not even what was read before can be read now."""
        if self.read_before is None:
            return False
        try:
            self.samples.source.read(self.read_before)
        except BadPicture:
            return True
        return False

    def lr(self) -> float:
        """The learning rate of the current step."""
        return self.job.lr_at(self.step, self.num_steps, self.warmup_steps)

    def evaluate(self) -> dict[str, float]:
        """The job's numbers after an epoch, now; the weights of the best epoch so far are kept beside the last ones.

        The first process of several does it for all.
        """
        numbers = self.job.evaluate(self.in_use.eval())
        self.model.train()
        if self.best is None or numbers["score"] > self.best["score"]:
            self.best = {**numbers, "step": self.step}
            self.job.save(self.run.out / BEST, self.in_use.state_dict(), self.about(average=True))
        return numbers

    def about(self, average: bool) -> About:
        """What a weights file of now says of itself; average: whether it holds the weights for use."""
        decays = self.job.training.ema_decays
        return About(
            step=self.step,
            images_seen=self.images_seen,
            ema_decay=decays[0] if average and decays else None,
            data=self.run.data,
            classes=self.run.classes,
            command=self.run.command,
            num_steps=self.num_steps,
        )

    def state(self) -> dict[str, Any]:
        """Every tensor that a resumed run needs, by name, so that any number of processes can take up its part."""
        return {
            "model": self.model.state_dict(),
            "averages": self.averages.state_dict(),
            "optimizer": {
                name: dict(self.optimizer.state[parameter])
                for name, parameter in self.model.named_parameters()
                if parameter in self.optimizer.state  # not before its first gradient
            },
        }

    def check_weights(self) -> None:
        """Raises NotFinite if the weights are no numbers, which finite gradients of a rate that is too high can lead to."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise NotFinite("The weights became infinite or no numbers")

    def save(self, final: bool) -> None:
        """Begin to write what a resumed run goes on from, the weights for use, and what shows how it goes.

        The first average is the file for use; the others, and the weights as trained, lie beside it. `saves.wait` says when
        it is all on the disk.

        Args:
            final: whether the run ends or is interrupted here; its page is not made at every one of many quick saves.

        Raises:
            NotFinite: the weights are no numbers, so nothing was written.
        """
        out = self.run.out
        self.check_weights()
        for problems, notes in self.spread.gather((self.problems, self.notes), None):
            self.problems |= problems
            self.notes |= notes
        if self.spread.rank:
            return
        facts = {
            "step": self.step,
            "images_seen": self.images_seen,
            "restarts": self.restarts,
            "skipped": self.skipped,
            "optimizer": [name for name, p in self.model.named_parameters() if p in self.optimizer.state],
            "best": self.best,
            "problems": self.problems,
            "notes": self.notes,
        }
        sheet = self.paint_sheet()
        about = self.about(average=False)
        decays = self.job.training.ema_decays
        files = [(out / (LAST if decays else WEIGHTS), _kept(self.model), about)]
        for i, (decay, average) in enumerate(zip(decays, self.averages, strict=True)):
            name = WEIGHTS if i == 0 else f"ema-{decay:g}.safetensors"
            kept = _kept(average.module)  # type: ignore[arg-type]
            files.append((out / name, kept, dataclasses.replace(about, ema_decay=decay)))

        shown = self.facts(final) if final or time.perf_counter() - self.last_report > REPORT_SECONDS else None
        self.last_report = time.perf_counter() if shown else self.last_report

        def then() -> None:
            for path, weights, said in files:
                self.job.save(path, weights, said)
            if shown is not None:
                write_training_report(out, shown, sheet)

        self.saves.write(self.step, self.restarts, self.state(), facts, then)
        source = self.samples.source
        problems = [{"where": where, "used": False, "what": reason} for where, reason in sorted(self.problems.items())]
        problems += [{"where": source.where(i), "used": True, "what": note} for i, note in sorted(self.notes.items())]
        lines = [json.dumps(problem) + "\n" for problem in problems]
        write_atomically(out / PROBLEMS, lambda part: part.write_text("".join(lines), encoding="utf-8"))

    def save_start(self) -> None:
        """Write what a run that goes wrong before its first save goes back to; so a disk that is full is met at once."""
        if self.spread.rank:
            return
        facts = {"step": 0, "images_seen": 0, "restarts": 0, "skipped": [], "optimizer": [], "best": None}
        self.saves.write(0, 0, self.state(), {**facts, "problems": {}, "notes": {}}, lambda: None)
        self.saves.wait()

    def facts(self, final: bool) -> dict[str, Any]:
        """What the run's page says first; final: whether the run ends or is interrupted here."""
        state = "finished" if self.step == self.num_steps else "interrupted" if final else "training"
        epoch = min(self.step // self.steps_per_epoch + 1, self.job.training.epochs)
        return {
            "state": state,
            "this page was made": datetime.datetime.now().isoformat(" ", "seconds"),
            "step": f"{self.step:,} of {self.num_steps:,}, in epoch {epoch:,} of {self.job.training.epochs:,}",
            "batch": f"{self.job.training.batch_size:,}",
            "images seen": f"{self.images_seen:,}",
            "skipped steps, whose gradient was no number": len(self.skipped),
            "went back to a save": self.restarts,
            "files that could not be used": len(self.problems),
        }

    def paint_sheet(self) -> Image.Image | None:
        if self.sheet_clips is None:
            return None
        sheet = self.job.sheet(self.in_use.eval(), self.sheet_clips)
        self.model.train()
        save_png(self.run.out / SHEET, sheet)
        return sheet

    def load(self) -> bool:
        """Take up the newest whole save of this directory, if there is one.

        Raises:
            ValueError: no save is whole, or it is of another run or version.
        """
        out = self.run.out
        # One process looks for all: the others read what it found, whatever their disk tells them.
        found, problem = None, None
        if not self.spread.rank:
            self.saves.clear()
            try:
                found = self.saves.newest()
            except ValueError as error:
                problem = str(error)
        found = self.spread.gather(found, problem)[0]
        if found is None:
            if (out / WEIGHTS).exists() and not (out / OLD_STATE).exists():
                raise ValueError(
                    f"{out} holds weights, but nothing to go on from ({SAVES}/ is missing or empty), and starting over would "
                    f"overwrite them. Choose another directory, and start from them by --init {out}."
                )
            if (out / OLD_STATE).exists():
                raise ValueError(
                    f"{out} holds a run of an older version ({OLD_STATE}), which this one cannot go on with. Its weights can "
                    f"be used: `unveil pretrain --init {out}` starts from them in another directory."
                )
            return False
        path, facts = found
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        strange = next((name for name in facts["optimizer"] if name not in parameters), None)
        if strange is not None:
            raise ValueError(
                f"{path} is of another run or version: this one has no {strange!r}. Remove it to start over."
            )
        for name in facts["optimizer"]:
            self.optimizer.state[parameters[name]] = adam_state(parameters[name])
        self.saves.read(path, self.state())  # in place
        self.step, self.images_seen, self.best = facts["step"], facts["images_seen"], facts["best"]
        self.restarts, self.skipped = facts["restarts"], facts["skipped"]
        self.problems |= facts["problems"]
        self.notes |= {int(index): note for index, note in facts["notes"].items()}
        return True

    def has_weights(self) -> bool:
        """Whether the file for use is that of the save that was taken up: a process may have been killed in between."""
        if not self.step:
            return True  # there is none before the first step
        try:
            return read_header(self.run.out / WEIGHTS)[1].step == self.step
        except ValueError:
            return False

    def go_back(self, why: str) -> None:
        """To the last save, and on from there with other draws.

        Raises:
            ValueError: it went back before, as often as makes sense.
        """
        restarts, skipped = self.restarts + 1, self.skipped
        if restarts > MAX_RESTARTS:
            raise ValueError(
                f"{why} by step {self.step}, after the run went back {MAX_RESTARTS} times and tried other draws. The last save "
                f"in {self.run.out} is from before that; start again in a new directory with a smaller --blr, or --precision "
                f"fp32. The batches that did it lie in {self.run.out / BUNDLES}: `unveil replay` looks into them."
            )
        self.saves.wait()
        self.spread.wait()
        self.optimizer.zero_grad(set_to_none=True)
        self.load()
        self.spread.wait()
        if not self.spread.rank:
            self.saves.put_aside()
        self.restarts, self.skipped = restarts, skipped

    def named_step(self, batch: Batch) -> Step:
        """The step under way, as something to find again."""
        epoch = self.named(self.step // self.steps_per_epoch)
        keys = zip(batch.places.tolist(), batch.indices.tolist(), strict=True)
        return Step(self.step, [(epoch, place, index) for place, index in keys])

    def skip(self, step: Step) -> None:
        """Count a step that was skipped, and keep its batch."""
        self.skipped.append(step.number)
        about = dataclasses.replace(self.about(average=False), step=step.number)
        write_bundle(
            self.run.out,
            step,
            self.spread.rank,
            self.samples,
            lambda path: self.job.save(path, _kept(self.model), about),
            {"seed": self.run.seed, "precision": self.run.precision},
        )

    def note(self, batch: Batch) -> None:
        for problem in batch.problems:
            self.problems.setdefault(problem.where, problem.reason)
        self.notes.update(batch.notes)
        if batch.clips is not None:
            self.read_before = int(batch.indices[-1])
            if self.problems:  # what was unreadable while its disk was away is no problem any more
                for index in batch.indices.tolist():
                    self.problems.pop(self.samples.source.where(index), None)
        if self.sheet_clips is None and batch.clips is not None:
            self.sheet_clips = batch.clips[: max(2, SHEET_SAMPLES // batch.clips.shape[2])].to(self.run.device)


def train(
    recipe: Recipe,
    samples: Samples,
    run: Run,
    on_progress: Any = None,
    initial: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Pre-train, or go on with the run that run.out holds.

    Args:
        samples: of the recipe's clip, with its training section for augmentation.
        initial: tensors to start from in place of the drawn ones, by name; not all need be given.
        on_progress: called with a `Progress` about once a second, and at every save.

    Returns:
        The run's outcome: steps, images_seen, loss (mean over the last record), seconds of this call, where it lies,
        skipped (number of unusable files), converted (number of pictures for each conversion), and finished.

    Raises:
        ValueError: the directory holds another run or is in use, no sample is readable, or the loss is no number.
    """
    return run_job(
        lambda: PretrainingJob(recipe, samples, run, initial),
        to_dict(recipe),
        samples,
        run,
        on_progress,
        digest=digest_of(samples.source),
    )


def run_job(
    make: Callable[[], Job],
    recipe: dict[str, Any],
    samples: Samples,
    run: Run,
    on_progress: Any = None,
    **compared: Any,
) -> dict[str, Any]:
    """Train a job, or go on with it: `train` for any job.

    Args:
        make: called once the directory is known to be free.
        recipe, compared: what the run is compared by, with its data, seed and start.
    """
    on_gpus = run.device.startswith("cuda")
    spread = Spread("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    if spread.world > 1 and on_gpus:
        torch.cuda.set_device(run.device)
    config = {
        "recipe": recipe,
        **compared,
        "data": run.data,
        "seed": run.seed,
        "num_samples": len(samples),
        "start": run.start,
        "classes": list(run.classes),
        "run": {k: str(v) for k, v in dataclasses.asdict(run).items()},
        "version": __version__,
    }
    check_same_run(run.out, config)  # before the lock, whose file would litter somebody's directory
    first = spread.rank == 0
    with spread, lock(run.out) if first else nullcontext(), interruptible(first) as interrupted:
        trainer = Trainer(make(), samples, run, spread)
        resumed = trainer.load()
        spread.wait()  # until everybody has read it
        if not resumed and first:
            write_atomically(run.out / CONFIG, lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))
            trainer.save_start()
        if first:
            trainer.saves.put_aside()
        if resumed and not trainer.has_weights():
            trainer.save(final=trainer.step == trainer.num_steps)
        metrics = Metrics(run.out, trainer.step, run.wandb, config) if first else None
        try:
            outcome = _loop(trainer, metrics, interrupted, on_progress if first else None)
        finally:
            if metrics is not None:
                metrics.close()
            trainer.saves.close()
        outcome = {"out": str(run.out), "resumed": resumed, **outcome}
        if first and (outcome["steps_now"] or not _said_finished(run.out)):  # scripts ask whether to start it again
            write_atomically(run.out / OUTCOME, lambda part: part.write_text(json.dumps(outcome, indent=2) + "\n"))
    return outcome if first else {"rank": spread.rank}


def _said_finished(out: Path) -> bool:
    """Whether outcome.json says so; a process may have been killed before it could write it."""
    try:
        return json.loads((out / OUTCOME).read_text(encoding="utf-8"))["finished"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Share(nn.Module):
    """An objective whose loss is weighted: the part of a batch's loss that a process, or a piece of its batch, has."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, clips: Tensor, drawn: Any, weight: float) -> Tensor:
        loss, _ = self.objective(clips, drawn)
        return loss * weight


def _shared(trainer: Trainer) -> nn.Module:
    """The objective of a job as this process computes it: compiled if asked for, and with the others if there are some."""
    objective: Any = trainer.job.objective
    if trainer.run.compile:
        torch._dynamo.reset()  # it counts the graphs of earlier runs in this process, and at eight falls back to eager
        objective = torch.compile(objective)
    share = Share(objective)
    if trainer.spread.world == 1:
        return share
    device = torch.device(trainer.run.device)
    # Buffers never change. torch calls this by another name from 2.15 on, and warns of the old one.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    unsynced: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        share,
        device_ids=None if device.type == "cpu" else [device],
        **unsynced,
        gradient_as_bucket_view=True,
        find_unused_parameters=not trainer.job.uses_all,
    )


def _loop(trainer: Trainer, metrics: Metrics | None, interrupted: list[int], on_progress: Any) -> dict[str, Any]:
    run, job = trainer.run, trainer.job
    device = torch.device(run.device)
    spread = trainer.spread
    share = _shared(trainer)
    trainer.model.train()
    begin = last_save = last_record = last_told = time.perf_counter()
    waiting = 0.0
    health = Health()
    images = 0
    loss = last_loss(run.out)
    first_step = trainer.step
    unreadable = 0  # batches in a row without a readable clip
    stopped = False
    training = job.training
    over = f" over {spread.world} processes" if spread.world > 1 else ""
    begun = f"going on from step {first_step:,} of {trainer.num_steps:,}; " if first_step else ""
    whole = ", all of the data" if training.batch_size == len(trainer.samples) else ""
    setup = (
        f"{begun}{training.epochs:,} epochs of {trainer.steps_per_epoch:,} steps; batches of {training.batch_size:,}{over}"
        f"{whole}; learning rate {training.base_lr:g} x {training.batch_size} / 256 = {training.lr:.3g}"
    )

    def write(numbers: dict[str, float]) -> None:
        if metrics is not None:
            metrics.write(numbers)

    def record() -> None:
        nonlocal images, waiting, last_record, loss
        now = time.perf_counter()
        mean, norm, skipped = health.look()
        loss = loss if mean is None else mean
        for step in skipped:
            trainer.skip(step)
        numbers = {} if mean is None else {"loss": mean, "gradient_norm": norm}
        write(
            {
                "step": trainer.step,
                "images_seen": trainer.images_seen,
                **numbers,
                "lr": trainer.lr(),
                "images_per_second": images / (now - last_record),
                "data_wait": waiting / (now - last_record),
                "skipped_steps": len(trainer.skipped),
            }
        )
        if on_progress is not None:
            speed = images / (now - last_record)
            on_progress(Progress(setup, trainer.step, trainer.num_steps, trainer.images_seen, loss, speed))
        images, waiting, last_record = 0, 0.0, now
        if health.in_a_row >= PATIENCE:
            raise NotFinite(f"The loss or its gradient was no number in {health.in_a_row} steps in a row")

    def step_on() -> None:
        """To the end of the run, or of the step in which it is interrupted."""
        nonlocal waiting, images, last_save, last_record, last_told, unreadable, stopped
        asked = time.perf_counter()
        for batch in trainer.epochs():
            waiting += time.perf_counter() - asked
            trainer.note(batch)
            now = time.perf_counter()
            # What all processes must do at the same steps, though each has a clock, a part of the data and signals of its own.
            readable, stopping, telling, saving = spread.sum(
                len(batch.indices),
                len(interrupted),
                spread.rank == 0 and now - last_told > RECORD_SECONDS,
                spread.rank == 0 and now - last_save > 60 * run.save_minutes,
            )
            unreadable = 0 if readable else unreadable + 1
            if unreadable and trainer.is_lost():
                raise ValueError(
                    f"{run.data!r} cannot be read any more, not even what could be read before: has it moved? The last save in "
                    f"{run.out} is kept, and the same command goes on from there once the data is back."
                )
            if readable:
                trainer.optimizer.zero_grad(set_to_none=True)
                value = torch.zeros((), device=device)
                pieces = batch.pieces(run.accumulate) or [trainer.stand_in()]
                for number, piece in enumerate(pieces):
                    clips, drawn = trainer.inputs(piece)
                    drawn = drawn.to(device)
                    # Gradients of processes are averaged, and those of clips are to be.
                    weight = spread.world * len(clips) / readable if batch.clips is not None else 0.0
                    with (
                        job.randomness(trainer.named(trainer.step), number),
                        torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"),
                        _apart(share, number + 1 < len(pieces)),
                    ):
                        part = share(clips.to(device, non_blocking=True), drawn, weight)
                        part.backward()
                    value += part.detach() / spread.world
                if spread.world > 1:
                    dist.all_reduce(value)
                norm = gradient_norm(trainer.model, job.training.grad_clip)
                health.note(trainer.named_step(batch), value, norm, guard(trainer.optimizer, value, norm))
                for group in trainer.optimizer.param_groups:
                    group["lr"] = trainer.lr() * group.get("lr_scale", 1.0)
                trainer.optimizer.step()
                for average in trainer.averages:
                    average.update_parameters(trainer.model)  # type: ignore[operator]
                images += readable
                trainer.images_seen += readable
            trainer.step += 1
            epoch, rest = divmod(trainer.step, trainer.steps_per_epoch)
            if rest == 0 and trainer.images_seen and job.evaluates(epoch):
                if len(health):
                    record()  # first, because it goes back if steps were skipped
                    last_told = time.perf_counter()
                begun = time.perf_counter()
                trainer.check_weights()  # by every process, though one evaluates
                trainer.saves.wait()  # no process is forked, for the test data, in the middle of a write
                if spread.rank == 0:
                    numbers = trainer.evaluate()
                    write({"step": trainer.step, **{f"test/{name}": value for name, value in numbers.items()}})
                last_record += time.perf_counter() - begun  # which is not the training's time
            last = trainer.step == trainer.num_steps
            if spread.world == 1:  # one alone need not wait for the next step to learn of it
                stopping = len(interrupted)
            saving = saving or last or stopping
            if len(health) and (saving or telling):
                record()  # before a save, because it goes back if steps were skipped
                last_told = time.perf_counter()
            if unreadable >= 2 * trainer.steps_per_epoch - 1 and trainer.images_seen:  # a whole epoch lies within these
                raise ValueError(
                    f"A whole epoch of {run.data!r} could not be read, though it could before: has it moved? The last save in "
                    f"{run.out} is kept, and the same command goes on from there once the data is back."
                )
            if saving:
                if trainer.images_seen == 0:
                    raise ValueError(
                        f"None of the {len(trainer.samples)} samples of {run.data!r} can be read; the first problem: "
                        f"{': '.join(next(iter(trainer.problems.items()), ('', 'none')))}."
                    )
                trainer.save(final=bool(last or stopping))
                last_save = time.perf_counter()
            if stopping:
                stopped = True
                break
            asked = time.perf_counter()
        trainer.saves.wait()
        spread.wait()  # or a launcher sees a process end well, and ends the one that still writes

    while True:
        try:
            step_on()
            break
        except NotFinite as why:
            trainer.go_back(str(why))
            trainer.model.train()
            if metrics is not None:
                metrics.go_back(trainer.step)
            health, images, waiting, last_record = Health(), 0, 0.0, time.perf_counter()
    return {
        "finished": trainer.step == trainer.num_steps,
        # The signal may have reached another process.
        "interrupted": signal.Signals(interrupted[0] if interrupted else signal.SIGTERM).name if stopped else None,
        "steps_now": trainer.step - first_step,
        "step": trainer.step,
        "num_steps": trainer.num_steps,
        "images_seen": trainer.images_seen,
        "loss": loss,
        "seconds": time.perf_counter() - begin,
        "skipped": len(trainer.problems),
        "skipped_steps": len(trainer.skipped),
        "went_back": trainer.restarts,
        "damaged_saves": trainer.saves.damaged,
        "converted": dict(Counter(trainer.notes.values())),
        **({} if trainer.best is None else {"best": trainer.best}),
    }


def _apart(share: nn.Module, apart: bool) -> AbstractContextManager[Any]:
    """Around a piece whose gradient the other processes need not know yet."""
    return share.no_sync() if apart and isinstance(share, DistributedDataParallel) else nullcontext()


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors as they are now."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
