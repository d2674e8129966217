"""The training loop: one optimiser, running averages, saves to resume from."""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from unveil import __version__
from unveil.checkpoint import BEST, LAST, WEIGHTS, About, write_atomically
from unveil.config import Training
from unveil.data import Batch, Order, Samples, batches
from unveil.optim import running_average
from unveil.pretraining_job import PretrainingJob
from unveil.recipe import Recipe, to_dict
from unveil.report import save_png
from unveil.rundir import CONFIG, PROBLEMS, SHEET, STATE, Metrics, Run, check_same_run, interruptible, last_loss, lock

SHEET_SAMPLES = 8


@dataclass
class Progress:
    """What is told after each step; `loss` and `images_per_second` are over the steps since the last record."""

    step: int
    num_steps: int
    images_seen: int
    loss: float
    images_per_second: float


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

    def __init__(self, job: Job, samples: Samples, run: Run) -> None:
        self.job, self.samples, self.run = job, samples, run
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
        self.sheet_clips: Tensor | None = None
        self.best: dict[str, float] | None = None

    @property
    def in_use(self) -> nn.Module:
        """The weights for use: the first running average, or the model as trained if there is none."""
        model = self.averages[0].module if len(self.averages) else self.model
        assert isinstance(model, nn.Module)
        return model

    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Clips, and what the current step draws for them."""
        assert isinstance(self.order, Order)
        epoch = self.step // self.steps_per_epoch
        return self.job.inputs(batch, epoch, self.order.places(epoch)[batch.indices].tolist())

    def epochs(self) -> Iterator[Batch]:
        """Batches from the current step to the end, the order of each epoch fixed by the seed."""
        assert isinstance(self.order, Order)
        for epoch in range(self.step // self.steps_per_epoch, self.job.training.epochs):
            self.order.epoch = epoch
            self.order.first_batch = self.step - epoch * self.steps_per_epoch
            yield from self.loader

    def lr(self) -> float:
        """The learning rate of the current step."""
        return self.job.lr_at(self.step, self.num_steps, self.warmup_steps)

    def evaluate(self) -> dict[str, float]:
        """The job's numbers after an epoch, now; the weights of the best epoch so far are kept beside the last ones."""
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

    def save(self) -> None:
        """Write the state to resume from, weights and averages, the contact sheet, and what was wrong with the data.

        The first average is the file for use; the others, and the weights as trained, lie beside it.
        """
        out = self.run.out
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError(
                f"The weights became infinite or no numbers by step {self.step}. What {out} holds is from before that; start "
                "again in a new directory with a smaller --blr."
            )
        state = {
            "model": self.model.state_dict(),
            "averages": self.averages.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "images_seen": self.images_seen,
            "problems": self.problems,
            "notes": self.notes,
            "best": self.best,
        }
        about = self.about(average=False)
        decays = self.job.training.ema_decays
        self.job.save(out / (LAST if decays else WEIGHTS), self.model.state_dict(), about)
        for i, (decay, average) in enumerate(zip(decays, self.averages, strict=True)):
            name = WEIGHTS if i == 0 else f"ema-{decay:g}.safetensors"
            weights = average.module.state_dict()  # type: ignore[union-attr]
            self.job.save(out / name, weights, dataclasses.replace(about, ema_decay=decay))
        source = self.samples.source
        problems = [{"where": where, "used": False, "what": reason} for where, reason in sorted(self.problems.items())]
        problems += [{"where": source.where(i), "used": True, "what": note} for i, note in sorted(self.notes.items())]
        lines = [json.dumps(problem) + "\n" for problem in problems]
        write_atomically(out / PROBLEMS, lambda part: part.write_text("".join(lines), encoding="utf-8"))
        write_atomically(out / STATE, lambda part: torch.save(state, part))
        self.paint_sheet()

    def paint_sheet(self) -> None:
        if self.sheet_clips is None:
            return
        save_png(self.run.out / SHEET, self.job.sheet(self.in_use.eval(), self.sheet_clips))

    def load(self) -> bool:
        """Take up the last save of this directory, if there is one."""
        path = self.run.out / STATE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self.run.device, weights_only=True)
            for name in ("model", "averages", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.images_seen = state["step"], state["images_seen"]
            self.best = state.get("best")  # a run that an older version began has none
            self.problems |= state["problems"]
            self.notes |= state["notes"]
        except Exception as error:  # torch raises whatever a damaged or foreign file leads it to
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}): it is damaged or of another run. Remove it to start over."
            ) from None
        return True

    def note(self, batch: Batch) -> None:
        for problem in batch.problems:
            self.problems.setdefault(problem.where, problem.reason)
        self.notes.update(batch.notes)
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
    return run_job(lambda: PretrainingJob(recipe, samples, run, initial), to_dict(recipe), samples, run, on_progress)


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
    with lock(run.out), interruptible() as interrupted:
        trainer = Trainer(make(), samples, run)
        resumed = trainer.load()
        if not resumed:
            write_atomically(run.out / CONFIG, lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))
        metrics = Metrics(run.out, trainer.step)
        try:
            outcome = _loop(trainer, metrics, interrupted, on_progress)
        finally:
            metrics.close()
    return {"out": str(run.out), "resumed": resumed, **outcome}


def _loop(trainer: Trainer, metrics: Metrics, interrupted: list[int], on_progress: Any) -> dict[str, Any]:
    run, job = trainer.run, trainer.job
    device = torch.device(run.device)
    objective: Any = job.objective
    if run.compile:
        torch._dynamo.reset()  # it counts the graphs of earlier runs in this process, and at eight falls back to eager
        objective = torch.compile(objective)
    trainer.model.train()
    begin = last_save = last_record = last_told = time.perf_counter()
    waiting = 0.0
    losses: list[Tensor] = []
    images = 0
    loss = last_loss(run.out)
    first_step = trainer.step
    unreadable = 0  # batches in a row without a readable clip

    def record() -> None:
        nonlocal losses, images, waiting, last_record, loss
        now = time.perf_counter()
        loss = torch.stack(losses).mean().item()  # waits for the device
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss became {loss} at step {trainer.step}. What {run.out} holds is from before that; start again in a "
                "new directory with a smaller --blr."
            )
        metrics.write(
            {
                "step": trainer.step,
                "images_seen": trainer.images_seen,
                "loss": loss,
                "lr": trainer.lr(),
                "images_per_second": images / (now - last_record),
                "data_wait": waiting / (now - last_record),
            }
        )
        if on_progress is not None:
            speed = images / (now - last_record)
            on_progress(Progress(trainer.step, trainer.num_steps, trainer.images_seen, loss, speed))
        losses, images, waiting, last_record = [], 0, 0.0, now

    asked = time.perf_counter()
    for batch in trainer.epochs():
        waiting += time.perf_counter() - asked
        trainer.note(batch)
        unreadable = 0 if batch.clips is not None else unreadable + 1
        if batch.clips is not None:
            trainer.optimizer.zero_grad(set_to_none=True)
            value = torch.zeros((), device=device)
            for number, piece in enumerate(batch.pieces(run.accumulate)):
                clips, drawn = trainer.inputs(piece)
                drawn = drawn.to(device)
                with (
                    job.randomness(trainer.step, number),
                    torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"),
                ):
                    part, _ = objective(clips.to(device, non_blocking=True), drawn)
                part = part * (len(clips) / len(batch.clips))
                part.backward()
                value += part.detach()
            if job.training.grad_clip is not None:
                nn.utils.clip_grad_norm_(trainer.model.parameters(), job.training.grad_clip)
            for group in trainer.optimizer.param_groups:
                group["lr"] = trainer.lr() * group.get("lr_scale", 1.0)
            trainer.optimizer.step()
            for average in trainer.averages:
                average.update_parameters(trainer.model)  # type: ignore[operator]
            losses.append(value)
            images += len(batch.clips)
            trainer.images_seen += len(batch.clips)
        trainer.step += 1
        epoch, rest = divmod(trainer.step, trainer.steps_per_epoch)
        if rest == 0 and trainer.images_seen and job.evaluates(epoch):
            if losses:
                record()  # first, because it refuses a loss that is no number
                last_told = time.perf_counter()
            begun = time.perf_counter()
            numbers = trainer.evaluate()
            metrics.write({"step": trainer.step, **{f"test/{name}": value for name, value in numbers.items()}})
            last_record += time.perf_counter() - begun  # which is not the training's time
        now = time.perf_counter()  # an interruption may have come while it was evaluated
        last = trainer.step == trainer.num_steps
        saving = last or interrupted or now - last_save > 60 * run.save_minutes
        if losses and (saving or now - last_told > 1.0):
            record()  # before a save, because it refuses a loss that is no number
            last_told = now
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
            trainer.save()
            trainer.model.train()
            last_save = time.perf_counter()
        if interrupted:
            break
        asked = time.perf_counter()
    return {
        "finished": trainer.step == trainer.num_steps,
        "steps_now": trainer.step - first_step,
        "step": trainer.step,
        "num_steps": trainer.num_steps,
        "images_seen": trainer.images_seen,
        "loss": loss,
        "seconds": time.perf_counter() - begin,
        "skipped": len(trainer.problems),
        "converted": dict(Counter(trainer.notes.values())),
        **({} if trainer.best is None else {"best": trainer.best}),
    }
