"""What a run is between two steps: its model, optimiser, averages and counts, written, taken up, and shown."""

import contextlib
import copy
import dataclasses
import datetime
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from unveil.checkpoint import BEST, LAST, WEIGHTS, About, read_header, write_atomically
from unveil.config import Training
from unveil.data import BadPicture, Batch, Order, Samples, batches
from unveil.layers import blocks_of
from unveil.optim import adam_state, running_average
from unveil.report import save_png
from unveil.rundir import PROBLEMS, SHEET, Run
from unveil.saves import SAVES, Saves
from unveil.sharding import kept, local, shard
from unveil.spread import Spread
from unveil.training_report import write_training_report
from unveil.trouble import BUNDLES, MAX_BUNDLES, MAX_RESTARTS, Step, bundle_name, write_bundle

SHEET_SAMPLES = 8
OLD_STATE = "state.pt"  # of Unveil 0.1
REPORT_SECONDS = 30.0  # between two makings of a run's page and sheet, which take about one
OTHER_DRAWS = 1_000_000  # what a run that went back adds to its epochs and steps where they name draws


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

    def optimizer(self) -> torch.optim.Optimizer:
        """A new one, for the model's parameters as they are now: on their device, and perhaps in shards."""
        ...

    @property
    def uses_all(self) -> bool:
        """Whether every parameter has a gradient in every step, whatever the clips."""
        ...

    def inputs(self, batch: Batch, epoch: int, places: Sequence[int], everything: bool = False) -> tuple[Tensor, Any]:
        """Clips, and what a step draws for them, on the run's device; places are theirs in the epoch's order.

        everything: whether every module has to be called, by a clip that counts nothing if need be.
        """
        ...

    def lr_at(self, step: int, num_steps: int, warmup_steps: int) -> float:
        """The learning rate of a step, which each of the optimiser's groups scales by its "lr_scale"."""
        ...

    def randomness(self, step: int, piece: int) -> AbstractContextManager[Any]:
        """Around a piece of a step, of all processes' pieces, for what draws from torch's global generator in the model."""
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
        self.model = job.model
        self.in_shards = run.fsdp and self.spread.world > 1
        if not self.in_shards:
            self.model.to(run.device)
        self.averages = nn.ModuleList(running_average(self.model, decay) for decay in training.ema_decays)
        self.put_together: nn.Module | None = None  # what a model in shards is looked at as, by the first process
        if self.in_shards:
            if not self.spread.rank:
                self.put_together = copy.deepcopy(self.model)
            for model in (self.model, *(average.module for average in self.averages)):
                assert isinstance(model, nn.Module)
                shard(model, run.device)
        for block in blocks_of(self.model):
            block.recompute = run.gradient_checkpointing
        self.optimizer = job.optimizer()
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
        self.saves = Saves(run.out, run.keep, self.spread if self.in_shards else None)
        self.last_report = time.perf_counter()

    @property
    def in_use(self) -> nn.Module:
        """The weights for use: the first running average, or the model as trained if there is none."""
        model = self.averages[0].module if len(self.averages) else self.model
        assert isinstance(model, nn.Module)
        return model

    @contextlib.contextmanager
    def shown(self, weights: dict[str, Tensor] | None = None) -> Iterator[nn.Module | None]:
        """The model for use, to be looked at by the first process; the others have None.

        Shards are put together for it by all of them, on the CPU but while it is looked at; weights: they have been already.
        """
        if not self.in_shards:
            yield None if self.spread.rank else self.in_use.eval()
        else:
            if weights is None:
                weights = kept(self.in_use, keep=self.put_together is not None)
            if self.put_together is None:
                yield None
            else:
                self.put_together.load_state_dict(weights)
                yield self.put_together.to(self.run.device).eval()
                self.put_together.to("cpu")
        self.model.train()

    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Clips, and what the current step draws for them, on the run's device."""
        epoch = self.named(self.step // self.steps_per_epoch)
        return self.job.inputs(batch, epoch, batch.places.tolist(), everything=self.in_shards)

    def pieces(self, batch: Batch) -> list[Batch]:
        """What a step computes one after another: all parts of a batch, and clips that count nothing where others wait."""
        pieces = batch.pieces(self.run.accumulate)
        # Shards come together in every piece, so all processes make as many.
        needed = self.run.accumulate if self.in_shards else 1
        return pieces + [self.stand_in()] * (needed - len(pieces))

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
        """A clip that counts nothing, whose number is -1: for a process that has none while others do."""
        clip = self.samples.clip
        values = torch.zeros(1, clip.frames, clip.channels, clip.height, clip.width)
        zero = torch.zeros(1, dtype=torch.int64)
        return Batch(zero - 1, zero, values, zero - 1, [], [])

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

    def evaluate(self) -> dict[str, float] | None:
        """The job's numbers after an epoch, now; the weights of the best epoch so far are kept beside the last ones.

        All processes call it. The first one does it for all, and the others have None.
        """
        with self.shown() as model:
            if model is None:
                return None
            numbers = self.job.evaluate(model)
            if self.best is None or numbers["score"] > self.best["score"]:
                self.best = {**numbers, "step": self.step}
                self.job.save(self.run.out / BEST, model.state_dict(), self.about(average=True))
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
        """Raises NotFinite if the weights are no numbers, which finite gradients of a rate that is too high can lead to.

        All processes call it, each for its part.
        """
        bad = not all(local(parameter).isfinite().all() for parameter in self.model.parameters())
        if self.spread.sum(bad)[0]:
            raise NotFinite("The weights became infinite or no numbers")

    def save(self, final: bool) -> None:
        """Begin to write what a resumed run goes on from, the weights for use, and what shows how it goes.

        The first average is the file for use; the others, and the weights as trained, lie beside it. `saves.wait` says when
        it is all on the disk.

        Args:
            final: whether the run ends or is interrupted here; page and sheet are not made at every one of many quick saves.

        Raises:
            NotFinite: the weights are no numbers, so nothing was written.
        """
        out = self.run.out
        self.check_weights()
        due = final or time.perf_counter() - self.last_report > REPORT_SECONDS
        told = self.spread.gather((self.problems, self.notes, due), None)
        for problems, notes, _ in told:
            self.problems |= problems
            self.notes |= notes
        due = told[0][-1]  # by the first process's clock
        if self.spread.rank and not self.in_shards:
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
        first = not self.spread.rank
        about = self.about(average=False)
        decays = self.job.training.ema_decays
        files = [(out / (LAST if decays else WEIGHTS), kept(self.model, first), about)]
        for i, (decay, average) in enumerate(zip(decays, self.averages, strict=True)):
            name = WEIGHTS if i == 0 else f"ema-{decay:g}.safetensors"
            weights = kept(average.module, first)  # type: ignore[arg-type]
            files.append((out / name, weights, dataclasses.replace(about, ema_decay=decay)))
        sheet = None
        if due:
            with self.shown(files[1 if decays else 0][1]) as model:
                sheet = None if model is None else self.paint_sheet(model)

        shown = self.facts(final) if due else None
        self.last_report = time.perf_counter() if due else self.last_report

        def then() -> None:
            for path, weights, said in files:
                self.job.save(path, weights, said)
            if shown is not None:
                write_training_report(out, shown, sheet)

        self.saves.write(self.step, self.restarts, self.state(), facts, then)
        if not first:
            return
        source = self.samples.source
        problems = [{"where": where, "used": False, "what": reason} for where, reason in sorted(self.problems.items())]
        problems += [{"where": source.where(i), "used": True, "what": note} for i, note in sorted(self.notes.items())]
        lines = [json.dumps(problem) + "\n" for problem in problems]
        write_atomically(out / PROBLEMS, lambda part: part.write_text("".join(lines), encoding="utf-8"))

    def save_start(self) -> None:
        """Write what a run that goes wrong before its first save goes back to; so a disk that is full is met at once."""
        if self.spread.rank and not self.in_shards:
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

    def paint_sheet(self, model: nn.Module) -> Image.Image | None:
        if self.sheet_clips is None:
            return None
        sheet = self.job.sheet(model, self.sheet_clips)
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
        """Count a step that was skipped, and keep its batch if it is one of the first few."""
        self.skipped.append(step.number)
        if len(self.skipped) > MAX_BUNDLES:
            return
        weights = kept(self.model, not self.spread.rank)
        if not self.spread.rank:  # it may be a step that was made before, by other processes or with other draws
            shutil.rmtree(self.run.out / BUNDLES / bundle_name(step), ignore_errors=True)
        self.spread.wait()
        about = dataclasses.replace(self.about(average=False), step=step.number)
        write_bundle(
            self.run.out,
            step,
            self.spread.rank,
            self.samples,
            lambda path: self.job.save(path, weights, about),
            {"seed": self.run.seed, "precision": self.run.precision, "device": self.run.device},
        )

    def note(self, batch: Batch) -> None:
        for problem in batch.problems:
            self.problems.setdefault(problem.where, problem.reason)
        self.notes.update(batch.notes)
        if batch.values is not None:
            self.read_before = int(batch.indices[-1])
            if self.problems:  # what was unreadable while its disk was away is no problem any more
                for index in batch.indices.tolist():
                    self.problems.pop(self.samples.source.where(index), None)
        if self.sheet_clips is None and batch.values is not None:
            some = batch.part(0, max(2, SHEET_SAMPLES // batch.values.shape[1]))
            self.sheet_clips = some.clips(self.run.device)
