"""The training loop: one optimiser, running averages, saves to resume from."""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unveil import __version__
from unveil.checkpoint import LAST, WEIGHTS, About, save_weights, write_atomically
from unveil.data import Batch, Order, Samples, batches
from unveil.losses import Draws, Objective, draw
from unveil.masking import draw_mask
from unveil.model import MaskedDiffusionAutoencoder
from unveil.optim import lr_factor, optimizer_for, running_average
from unveil.recipe import Recipe, to_dict
from unveil.report import save_png
from unveil.rundir import CONFIG, PROBLEMS, SHEET, STATE, Metrics, Run, check_same_run, interruptible, last_loss, lock
from unveil.sheet import what_it_sees

SHEET_SAMPLES = 8


@dataclass
class Progress:
    """What is told after each step; `loss` and `images_per_second` are over the steps since the last record."""

    step: int
    num_steps: int
    images_seen: int
    loss: float
    images_per_second: float


class Trainer:
    """State of a run between steps: everything that a resumed run needs to go on exactly as it would have."""

    def __init__(self, recipe: Recipe, samples: Samples, run: Run, initial: Mapping[str, Tensor] | None = None) -> None:
        self.recipe, self.samples, self.run = recipe, samples, run
        training = recipe.training
        self._check_branches(min(training.batch_size, len(samples)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = MaskedDiffusionAutoencoder(recipe)
        if initial is not None:
            self.model.load_state_dict({**self.model.state_dict(), **initial})
        self.model.to(run.device)
        self.averages = nn.ModuleList(running_average(self.model, decay) for decay in training.ema_decays)
        self.objective = Objective(self.model)
        self.optimizer = optimizer_for(self.model, training)
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

    def _check_branches(self, batch_size: int) -> None:
        """Refuse a mask that rounds to nothing or everything, and a batch too small to give every branch a clip."""
        for branch in self.recipe.branches:
            clip = self.recipe.clip
            mask = draw_mask(branch.masking, [torch.Generator()], clip.grid, branch.mask_ratio)
            hidden, total = mask.hidden.shape[1], clip.num_tokens
            if (hidden == 0) != (branch.mask_ratio == 0) or (hidden == total) != (branch.mask_ratio == 1):
                raise ValueError(
                    f"mask_ratio={branch.mask_ratio:g} of {total} tokens hides {hidden}. Use another ratio, or smaller "
                    "patches."
                )
            if branch.share * batch_size < 1:
                needed = math.ceil(1 / branch.share)
                raise ValueError(
                    f"A batch of {batch_size} leaves the branch of share={branch.share:g} with noise on {branch.noise_on} "
                    f"without a clip in some steps. Use a batch of at least {needed}, and at least as many samples."
                )

    @property
    def best(self) -> MaskedDiffusionAutoencoder:
        """The weights for use: the first running average, or the model as trained if there is none."""
        model = self.averages[0].module if len(self.averages) else self.model
        assert isinstance(model, MaskedDiffusionAutoencoder)
        return model

    def draws(self, batch: Batch) -> Draws:
        """What the current step draws for a batch."""
        assert isinstance(self.order, Order)
        epoch, indices = self.step // self.steps_per_epoch, batch.indices.tolist()
        return draw(
            self.recipe,
            self.model.schedule,
            self.run.seed,
            epoch,
            indices,
            places=self.order.places(epoch)[batch.indices].tolist(),
            labels=batch.labels,
        )

    def epochs(self) -> Iterator[Batch]:
        """Batches from the current step to the end, the order of each epoch fixed by the seed."""
        assert isinstance(self.order, Order)
        for epoch in range(self.step // self.steps_per_epoch, self.recipe.training.epochs):
            self.order.epoch = epoch
            self.order.first_batch = self.step - epoch * self.steps_per_epoch
            yield from self.loader

    def lr(self) -> float:
        """The learning rate of the current step."""
        return self.recipe.training.lr * lr_factor(
            self.step, self.num_steps, self.warmup_steps, self.recipe.training.lr_schedule
        )

    def save(self) -> None:
        """Write the state to resume from, weights and averages, the contact sheet, and what was wrong with the data.

        The first average is the file for use; the others, and the weights as trained, lie beside it.
        """
        out, run = self.run.out, self.run
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
        }
        about = About(
            step=self.step,
            images_seen=self.images_seen,
            ema_decay=None,
            data=run.data,
            classes=run.classes,
            command=run.command,
            num_steps=self.num_steps,
        )
        decays = self.recipe.training.ema_decays
        save_weights(out / (LAST if decays else WEIGHTS), self.recipe, self.model.state_dict(), about)
        for i, (decay, average) in enumerate(zip(decays, self.averages, strict=True)):
            name = WEIGHTS if i == 0 else f"ema-{decay:g}.safetensors"
            weights = average.module.state_dict()  # type: ignore[union-attr]
            save_weights(out / name, self.recipe, weights, dataclasses.replace(about, ema_decay=decay))
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
        save_png(self.run.out / SHEET, what_it_sees(self.best.eval(), self.sheet_clips))

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
    config = {
        "recipe": to_dict(recipe),
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
        trainer = Trainer(recipe, samples, run, initial)
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
    run, recipe = trainer.run, trainer.recipe
    device = torch.device(run.device)
    objective: Any = trainer.objective
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
            drawn = trainer.draws(batch).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                value, _ = objective(batch.clips.to(device, non_blocking=True), drawn)
            trainer.optimizer.zero_grad(set_to_none=True)
            value.backward()
            if recipe.training.grad_clip is not None:
                nn.utils.clip_grad_norm_(trainer.model.parameters(), recipe.training.grad_clip)
            for group in trainer.optimizer.param_groups:
                group["lr"] = trainer.lr()
            trainer.optimizer.step()
            for average in trainer.averages:
                average.update_parameters(trainer.model)  # type: ignore[operator]
            losses.append(value.detach())
            images += len(batch.clips)
            trainer.images_seen += len(batch.clips)
        trainer.step += 1
        now = time.perf_counter()
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
    }
