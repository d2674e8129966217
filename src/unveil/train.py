"""The training loop: steps, what is told of them, saves, and what several processes do together."""

import contextlib
import dataclasses
import inspect
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unveil import __version__
from unveil.checkpoint import write_atomically
from unveil.compiling import compile_blocks
from unveil.data import Samples
from unveil.pretraining_job import PretrainingJob
from unveil.recipe import Recipe, to_dict
from unveil.rundir import CONFIG, OUTCOME, Metrics, Run, check_same_run, interruptible, last_loss, lock
from unveil.sources import digest_of
from unveil.spread import Spread
from unveil.trainer import Job, NotFinite, Trainer
from unveil.trouble import PATIENCE, Health, gradient_norm, guard

RECORD_SECONDS = 1.0  # between two looks at the device


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
        "processes": spread.world,
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
        if not resumed:
            trainer.save_start()
        if first:
            trainer.saves.put_aside()
        if resumed and not spread.gather(first and trainer.has_weights(), None)[0]:
            trainer.save(final=trainer.step == trainer.num_steps)
        metrics = Metrics(run.out, trainer.step, run.wandb, config) if first else None
        if first and not _said_finished(run.out):
            (run.out / OUTCOME).unlink(missing_ok=True)  # of the call before
        try:
            outcome = _loop(trainer, metrics, interrupted, on_progress if first else None)
        except RuntimeError as error:
            if spread.is_alone(error):
                raise ValueError(
                    f"Another process of this run has ended ({str(error).splitlines()[0]}). The last save in {run.out} is "
                    "whole, and the same command goes on from there."
                ) from None
            raise
        except (ValueError, OSError) as error:
            if first:
                ended = {"out": str(run.out), "finished": False, "interrupted": None, "error": str(error)}
                with contextlib.suppress(OSError):  # the disk may be full
                    write_atomically(
                        run.out / OUTCOME, lambda part: part.write_text(json.dumps(ended, indent=2) + "\n")
                    )
            raise
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
    """The objective of a job as this process computes it, with the others if there are some."""
    share = Share(trainer.job.objective)
    if trainer.spread.world == 1 or trainer.in_shards:
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
    eager = compile_blocks(trainer.model, run.device, run.precision == "bf16") if run.compile else None
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
    compiled = f"; not compiled, as this machine cannot: {eager}" if eager else ""
    if run.compile and eager is None:
        compiled = "; the blocks are compiled in the first step, which takes a while"
    over = f" over {spread.world} processes" if spread.world > 1 else ""
    begun = f"going on from step {first_step:,} of {trainer.num_steps:,}; " if first_step else ""
    whole = ", all of the data" if training.batch_size == len(trainer.samples) else ""
    setup = (
        f"{begun}{training.epochs:,} epochs of {trainer.steps_per_epoch:,} steps; batches of {training.batch_size:,}{over}"
        f"{whole}; learning rate {training.base_lr:g} x {training.batch_size} / 256 = {training.lr:.3g}"
        f"{compiled}"
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
                pieces = trainer.pieces(batch)
                for number, piece in enumerate(pieces):
                    clips, drawn = trainer.inputs(piece)
                    # Gradients of processes are averaged, and those of clips are to be.
                    weight = spread.world * len(clips) / readable if piece.indices[0] >= 0 else 0.0
                    with (
                        job.randomness(trainer.named(trainer.step), spread.rank * run.accumulate + number),
                        torch.autocast(
                            device.type,
                            torch.bfloat16,
                            enabled=run.precision == "bf16",
                            cache_enabled=not trainer.in_shards,  # it would keep a copy of every weight that is gathered
                        ),
                        _apart(share, number + 1 < len(pieces)),
                    ):
                        part = share(clips, drawn, weight)
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
                numbers = trainer.evaluate()
                if numbers is not None:
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
