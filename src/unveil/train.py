"""The training loop: one optimiser, one running average, saves to resume from."""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unveil import __version__
from unveil.checkpoint import WEIGHTS, About, save_weights, write_atomically
from unveil.config import Recipe, to_dict
from unveil.data import Batch, Order, Samples, batches
from unveil.losses import Objective, draw
from unveil.masking import draw_mask, scatter
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import masked_view, pixels_of, predict, repaint
from unveil.report import contact_sheet, save_png
from unveil.rundir import CONFIG, PROBLEMS, SHEET, STATE, Metrics, check_same_run, interruptible, last_loss, lock
from unveil.tokens import patch_statistics

Precision = Literal["fp32", "bf16"]
ADAM_BETAS = (0.9, 0.95)  # MAE, main_pretrain.py
WEIGHT_DECAY = 0.05  # MAE, main_pretrain.py; not on biases, norms and the class token
SHEET_STEPS = 20
SHEET_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a recipe is run here, beside what is trained. Data and seed make the result; precision, device and compile move
    its last digits.

    save_minutes: time between saves; one more is made at the end and when the run is interrupted.
    """

    data: str
    out: Path
    seed: int = 0
    workers: int = 0
    device: str = "cpu"
    precision: Precision = "fp32"
    compile: bool = False
    save_minutes: float = 2.0
    command: str = ""


@dataclass
class Progress:
    """What is told after each step; `loss` and `images_per_second` are over the steps since the last record."""

    step: int
    num_steps: int
    images_seen: int
    loss: float
    images_per_second: float


def optimizer_for(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW; no weight decay on one-dimensional parameters, class and mask tokens, as MAE has it."""
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim <= 1 or name.endswith("_token") else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=ADAM_BETAS, fused=True)


def lr_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """An average of the weights whose decay grows to its full value over the first steps: min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(averages: Any, currents: Any, num_averaged: Tensor | int) -> None:
        n = float(num_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current, weight)

    return AveragedModel(model, multi_avg_fn=update)


def what_it_sees(model: MaskedDiffusionAutoencoder, clips: Tensor, seed: int = 0) -> Any:
    """The contact sheet of a model: the truth, what is left of it, and what the model makes of the rest."""
    recipe = model.recipe
    branch, sizes = recipe.branch, recipe.clip
    if "generate" in model.can:
        holes = torch.ones(len(clips), *clips.shape[2:], dtype=torch.bool, device=clips.device)
        made = repaint(model, clips, holes, num_steps=SHEET_STEPS, sampler="ddim", seed=seed)[:, 0]
        return contact_sheet([("data", list(clips)), (f"generated from nothing, {SHEET_STEPS} DDIM steps", list(made))])
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(clips))]
    mask = draw_mask(branch.masking, generators, sizes.grid, branch.mask_ratio).to(clips.device)
    holes = pixels_of(mask.flags(), sizes.grid, sizes.patch_size, sizes.tubelet_size)
    rows = [
        ("truth", list(clips)),
        (f"what the encoder sees ({branch.mask_ratio:.0%} hidden)", list(masked_view(clips, holes))),
    ]
    if branch.patch_norm:
        with torch.inference_mode():
            x0 = model.tokens(clips)
            prediction = model(x0.gather(1, mask.visible[..., None].expand(-1, -1, x0.shape[-1])), mask).float()
            mean, std = patch_statistics(x0.gather(1, mask.hidden[..., None].expand_as(prediction)))
            painted = model.pixels(scatter(x0, mask.hidden, prediction * std + mean))
        rows.append(
            ("prediction, with each patch's true brightness and contrast (target is normalised)", list(painted))
        )
    elif model.schedule is None:
        rows.append(("prediction", list(predict(model, clips, holes, seed=seed))))
    else:
        rows.append((f"prediction at t = {model.schedule.num_steps} (one step)", list(predict(model, clips, holes))))
        samples = repaint(model, clips, holes, num_steps=SHEET_STEPS, seed=seed, num_samples=2)
        for i in range(2):
            rows.append((f"sample {i + 1}, {SHEET_STEPS} DDPM steps", list(samples[:, i])))
    return contact_sheet(rows)


class Trainer:
    """State of a run between steps: everything that a resumed run needs to go on exactly as it would have."""

    def __init__(self, recipe: Recipe, samples: Samples, run: Run) -> None:
        self.recipe, self.samples, self.run = recipe, samples, run
        training, branch = recipe.training, recipe.branch
        mask = draw_mask(branch.masking, [torch.Generator()], recipe.clip.grid, branch.mask_ratio)
        hidden, total = mask.hidden.shape[1], recipe.clip.num_tokens
        if (hidden == 0) != (branch.mask_ratio == 0) or (hidden == total) != (branch.mask_ratio == 1):
            raise ValueError(
                f"mask_ratio={branch.mask_ratio:g} of {total} tokens hides {hidden}. Use another ratio, or smaller patches."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = MaskedDiffusionAutoencoder(recipe).to(run.device)
        self.average = running_average(self.model, training.ema_decay)
        self.objective = Objective(self.model)
        self.optimizer = optimizer_for(self.model, training.lr)
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

    def epochs(self) -> Iterator[Batch]:
        """Batches from the current step to the end, the order of each epoch fixed by the seed."""
        assert isinstance(self.order, Order)
        for epoch in range(self.step // self.steps_per_epoch, self.recipe.training.epochs):
            self.order.epoch = epoch
            self.order.first_batch = self.step - epoch * self.steps_per_epoch
            yield from self.loader

    def lr(self) -> float:
        """The learning rate of the current step."""
        return self.recipe.training.lr * lr_factor(self.step, self.num_steps, self.warmup_steps)

    def save(self) -> None:
        """Write the state to resume from, the averaged weights, the contact sheet, and what was wrong with the data."""
        out, run = self.run.out, self.run
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError(
                f"The weights became infinite or no numbers by step {self.step}. What {out} holds is from before that; start "
                "again in a new directory with a smaller --blr."
            )
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "images_seen": self.images_seen,
            "problems": self.problems,
            "notes": self.notes,
        }
        about = About(step=self.step, images_seen=self.images_seen, ema=True, data=run.data, command=run.command)
        save_weights(out / WEIGHTS, self.recipe, self.average.module.state_dict(), about)
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
        model = self.average.module.eval()
        save_png(self.run.out / SHEET, what_it_sees(model, self.sheet_clips))  # type: ignore[arg-type]

    def load(self) -> bool:
        """Take up the last save of this directory, if there is one."""
        path = self.run.out / STATE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self.run.device, weights_only=True)
            for name in ("model", "average", "optimizer"):
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


def train(recipe: Recipe, samples: Samples, run: Run, on_progress: Any = None) -> dict[str, Any]:
    """Pre-train, or go on with the run that run.out holds.

    Args:
        samples: of the recipe's clip, with its training section for augmentation.
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
        "run": {k: str(v) for k, v in dataclasses.asdict(run).items()},
        "version": __version__,
    }
    check_same_run(run.out, config)  # before the lock, whose file would litter somebody's directory
    with lock(run.out), interruptible() as interrupted:
        trainer = Trainer(recipe, samples, run)
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
    objective: Any = torch.compile(trainer.objective) if run.compile else trainer.objective
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
            epoch = trainer.step // trainer.steps_per_epoch
            drawn = draw(recipe, trainer.model.schedule, run.seed, epoch, batch.indices.tolist()).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                value, _ = objective(batch.clips.to(device, non_blocking=True), drawn)
            trainer.optimizer.zero_grad(set_to_none=True)
            value.backward()
            for group in trainer.optimizer.param_groups:
                group["lr"] = trainer.lr()
            trainer.optimizer.step()
            trainer.average.update_parameters(trainer.model)
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
        if unreadable >= trainer.steps_per_epoch and trainer.images_seen:
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
