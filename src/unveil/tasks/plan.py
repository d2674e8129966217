"""What a pre-training will take, before it is started."""

import dataclasses
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unveil.checkpoint import WEIGHTS, pick_device
from unveil.cost import masked_step
from unveil.data import Order, decoded_bytes
from unveil.hardware import memory_of, peak_of
from unveil.masking import draw_mask
from unveil.measuring import (
    Activations,
    activations,
    file_sizes,
    gathered_bytes,
    outline,
    read_some,
    save_size,
    static_memory,
    time_steps,
)
from unveil.planning import FEW_STEPS
from unveil.pretraining import PretrainingOptions, pretraining_of, recipe_of
from unveil.pretraining_job import PretrainingJob
from unveil.recipe import Recipe
from unveil.trainer import Trainer

USUAL_MFU = 0.4
MANY_EPOCHS = 1_000  # in which a run that asks nearest neighbours at all has asked them
MEMORY_SHARE = 0.9  # of what there is; the rest is for the system, and for what is allocated in odd pieces


@dataclass(frozen=True, kw_only=True)
class Plan(PretrainingOptions):
    """Say what a pre-training will take: model, steps, learning rate, hours, memory and disk. Nothing is trained or written.

    Takes the words of pretrain, so that the same line can follow it. A few steps are run here, and some pictures read, to
    measure their time.

    Example: unveil plan --data photos/ --size Micro/8 --image-size 64 --epochs 100 --hours 2
    """

    out: Path = Path("runs/plan")
    """Directory that the run is to have. It is not made; its disk is looked at."""
    num_devices: int = 1
    """Devices that share each batch: time, and clips on each, are divided by their number without loss, which is not
    measured."""
    hours: float | None = None
    """A budget: how many epochs fit into it is told."""
    peak_tflops: float | None = None
    """What one device can do, in 10^12 floating-point operations a second, by its datasheet (dense bf16). Hours are then by
    arithmetic, nothing is timed, and the device need not be here."""
    mfu: float | None = None
    """Share of --peak-tflops that is reached; large models on good GPUs reach 0.3 to 0.5, small ones far less. Default 0.4."""
    memory_gib: float | None = None
    """Memory of one device in GiB. Default: what the device here has; of one that is not here, none is assumed."""
    measure_seconds: float = 10.0
    """About how long steps are timed."""


def check(options: Plan) -> None:
    """Refuse what only this command is told.

    Raises:
        ValueError: names the option.
    """
    if options.num_devices < 1:
        raise ValueError(f"--num-devices {options.num_devices}: use 1 or more.")
    for name in ("hours", "peak_tflops", "memory_gib", "measure_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: use a number above 0.")
    if options.mfu is not None and options.peak_tflops is None:
        raise ValueError(f"--mfu {options.mfu:g} is a share of --peak-tflops, which is not given. Give both.")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu {options.mfu:g}: use a share of the peak, above 0 and at most 1.")


def training_command(command: str, out: Path) -> str:
    """The line that follows a plan's: pretrain's, without what only plan is told. It stands in every weights file.

    Another program's line, which called `plan` from Python, stays as it is.
    """
    if shlex.split(command)[1:2] != ["plan"]:
        return command
    own = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Plan)}
    own -= {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(PretrainingOptions)}
    program, _, *rest = shlex.split(command)
    words = [program, "pretrain"]
    given = iter(rest)
    for word in given:
        if word in own:
            next(given, None)  # its value
        elif word.partition("=")[0] not in own:
            words.append(word)
    if not any(word.partition("=")[0] == "--out" for word in words):
        words += ["--out", str(out)]
    return shlex.join(words)


def absent_device(asked: str | None) -> str | None:
    """The device that was asked for, if it is of a known kind and not here; None if it can be used.

    Raises:
        ValueError: there is no such kind of device.
    """
    try:
        pick_device(asked)
    except ValueError:
        try:
            known = torch.device(asked or "cpu").type not in ("cpu", "meta")
        except RuntimeError:
            known = False
        if not known:
            raise
        return asked
    return None


def _tokens(recipe: Recipe) -> list[dict[str, Any]]:
    """How many tokens each branch sees and hides."""
    masks = [draw_mask(b.masking, [torch.Generator()], recipe.clip.grid, b.mask_ratio) for b in recipe.branches]
    return [
        {"share": branch.share, "visible": mask.visible.shape[1], "hidden": mask.hidden.shape[1]}
        for branch, mask in zip(recipe.branches, masks, strict=True)
    ]


def _parameters(model: torch.nn.Module) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _pieces_that_fit(fixed: int, kept: Activations, clips: int, limit: float) -> int | None:
    """The fewest pieces of a batch that fit into a memory beside what is fixed; None if not even one clip does."""
    room = limit - fixed - kept.fixed
    if room < kept.per_clip:
        return None
    return math.ceil(clips / min(clips, room // max(1, kept.per_clip)))


def _hours(
    step: float, data: dict[str, float], per_epoch: int, epochs: int, workers: int
) -> tuple[float, float, float]:
    """Hours of a run, and seconds of its first epoch and of another; data: seconds a batch by one process."""

    def epoch(seconds: float) -> float:
        return per_epoch * (max(step, seconds / workers) if workers else step + seconds)

    first, other = epoch(data["first"]), epoch(data["again"])
    return (first + (epochs - 1) * other) / 3600, first, other


def _room(out: Path) -> int:
    """Free bytes on the disk that a directory is on, or will be."""
    there = out.resolve()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def plan(options: Plan, on_progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run `unveil plan`; on_progress is told what is being measured.

    Returns:
        "recipe", "size", "clip", "tokens", "parameters"; "data"; "training", the numbers of the run; "arithmetic"; "reading";
        "time"; "memory" and "disk", in bytes; "budget", if --hours is given; "advice", sentences. A number that is not known
        is None.

    Raises:
        ValueError: an option cannot be, as for pretrain, or no sample can be read.
    """
    check(options)

    def tell(what: str) -> None:
        if on_progress is not None:
            on_progress(what)

    absent = absent_device(options.device)
    here = options
    if absent is not None:
        here = dataclasses.replace(options, device="cpu", precision=options.precision or "bf16")
    asked = pretraining_of(here)
    asked = asked._replace(run=dataclasses.replace(asked.run, command=training_command(asked.run.command, options.out)))
    recipe, samples, run = asked.recipe, asked.samples, asked.run
    wanted = options.batch_size or (recipe if options.init else recipe_of(here)).training.batch_size
    sketch = outline(asked)
    order, training, clip = sketch.order, recipe.training, recipe.clip
    assert isinstance(order, Order)
    batch, per_epoch, num_steps = min(training.batch_size, len(samples)), sketch.steps_per_epoch, sketch.num_steps
    on_each = math.ceil(batch / options.num_devices)
    piece = math.ceil(on_each / run.accumulate)
    images = num_steps * batch
    cost = masked_step(recipe)
    static = static_memory(sketch)
    fixed = sum(static.values())  # of a process that has all of it, as this one
    gathered = 0
    if options.fsdp and options.num_devices > 1:
        gathered = gathered_bytes(sketch)
        static = {name: math.ceil(nbytes / options.num_devices) for name, nbytes in static.items()}
    parameters = _parameters(sketch.model)
    files, save = file_sizes(sketch, recipe, images), save_size(sketch)

    tell("reading some pictures")
    reading = read_some(samples, order, options.measure_seconds / 5)
    cached = decoded_bytes(samples.source) if samples.cache else 0
    limit = memory_of(run.device) if absent is None else None
    if options.memory_gib is not None:
        limit = int(options.memory_gib * 2**30)
    able = MEMORY_SHARE * memory_of(run.device)
    kept: Activations | None = None
    evaluated = bool(samples.source.classes)  # by nearest neighbours, if the run is long enough for that
    timed: dict[str, Any] | None = None
    if fixed < able:
        tell("counting what a step keeps in memory")
        least = math.ceil(1 / min(branch.share for branch in recipe.branches))
        trainer = Trainer(
            PretrainingJob(recipe, samples, run), samples, dataclasses.replace(run, workers=0)
        )  # --init moves no time
        some = {*range(1, min(training.epochs, MANY_EPOCHS) + 1), training.epochs}
        evaluated = any(trainer.job.evaluates(epoch) for epoch in some)
        kept = activations(trainer, reading.samples, least)
        most = int((able - fixed - kept.fixed) // max(1, kept.per_clip))
        if absent is None and options.peak_tflops is None and most >= least:
            tell(f"timing steps for about {options.measure_seconds:g} seconds")
            timed = time_steps(trainer, reading.samples, order, most, options.measure_seconds)
        del trainer

    step: float | None = None
    mfu = options.mfu or USUAL_MFU
    if options.peak_tflops is not None:
        made = cost.train_flops * (4 / 3 if run.gradient_checkpointing else 1)  # a backward pass is two forward ones
        step = made * batch / (options.peak_tflops * 1e12 * mfu * options.num_devices)
    elif timed is not None:
        updating = timed["update_seconds"]
        step = updating + (timed["step_seconds"] - updating) / options.num_devices
    data_seconds = {"first": reading.first * on_each, "again": reading.again * on_each}
    hours = epoch_seconds = None
    if step is not None:
        hours, first, other = _hours(step, data_seconds, per_epoch, training.epochs, run.workers)
        epoch_seconds = {"first": first, "other": other}
    peak = None
    if run.device.startswith("cuda") and absent is None:
        known = peak_of(torch.cuda.get_device_name(run.device))
        peak = None if known is None else getattr(known, run.precision)
    reached = None if timed is None else cost.train_flops * batch / timed["step_seconds"] / 1e12
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "size": recipe.size,
        "clip": [clip.channels, clip.frames, clip.height, clip.width],
        "tokens": {"number": clip.num_tokens, "values": clip.token_dim, "branches": _tokens(recipe)},
        "parameters": parameters,
        "data": {
            "name": options.data,
            "samples": len(samples),
            "skipped": len(samples.source.skipped),
            "decoded_bytes": decoded_bytes(samples.source),
            "in_memory": samples.cache,
        },
        "training": {
            "batch_size": batch,
            "accumulate": run.accumulate,
            "gradient_checkpointing": run.gradient_checkpointing,
            "num_devices": options.num_devices,
            "clips_at_once": piece,
            "base_lr": training.base_lr,
            "lr": training.lr,
            "epochs": training.epochs,
            "steps_per_epoch": per_epoch,
            "num_steps": num_steps,
            "warmup_steps": sketch.warmup_steps,
            "images_seen": images,
            "device": absent or run.device,
            "precision": run.precision,
        },
        "arithmetic": {
            "multiply_adds_per_clip": cost.forward,
            "train_flops_per_clip": cost.train_flops,
            "tflops": cost.train_flops * images / 1e12,
        },
        "reading": {
            "pictures": reading.tried,
            "first_per_second": 1 / reading.first,
            "again_per_second": 1 / reading.again,
            "workers": run.workers,
        },
        "time": {
            "measured": timed,
            "by": "arithmetic" if options.peak_tflops else "measurement" if timed else None,
            "step_seconds": step,
            "hours": hours,
            "epoch_seconds": epoch_seconds,
            "reached_tflops": reached,
            "peak_tflops": options.peak_tflops or peak,
            "mfu": mfu if options.peak_tflops else None if reached is None or peak is None else reached / peak,
        },
        "memory": {
            **static,
            "activations": None if kept is None else kept.of(piece),
            "activations_fixed": None if kept is None else kept.fixed,
            "activations_per_clip": None if kept is None else kept.per_clip,
            "gathered": gathered,
            "pictures": cached,
            "limit": limit,
        },
        "disk": {
            "files": files,
            "best": files[WEIGHTS] if evaluated else 0,
            "save": save,
            "keep": run.keep,
            "free": _room(options.out),
        },
        "budget": None,
    }
    if options.hours is not None and epoch_seconds is not None:
        rest = options.hours * 3600 - epoch_seconds["first"]
        epochs = 0 if rest < 0 else 1 + int(rest / epoch_seconds["other"])
        result["budget"] = {"hours": options.hours, "epochs": epochs, "num_steps": epochs * per_epoch}
    result["advice"] = _advice(result, options, kept, wanted, absent)
    return result


def _advice(
    result: dict[str, Any], options: Plan, kept: Activations | None, wanted: int, absent: str | None
) -> list[str]:
    """What to know before it is started."""
    lines = []
    training, memory, clock, disk = result["training"], result["memory"], result["time"], result["disk"]
    on_each = math.ceil(training["batch_size"] / options.num_devices)  # who reads its own share, too
    steps, per_epoch, samples = training["num_steps"], training["steps_per_epoch"], result["data"]["samples"]
    on_cpu = training["device"] == "cpu"
    if steps < FEW_STEPS:
        lines.append(
            f"{steps:,} steps are few: expect little but colours. Give --epochs {math.ceil(FEW_STEPS / per_epoch)} or more, or "
            "a smaller --batch-size."
        )
    if wanted > samples:
        lines.append(
            f"A batch of {wanted:,} is larger than the data; it is {training['batch_size']:,}, and the rate with it."
        )
    if kept is not None and memory["limit"] is not None:
        fixed = sum(memory[name] for name in ("weights", "gradients", "optimizer", "averages", "gathered"))
        fixed += memory["pictures"] if on_cpu else 0
        limit = MEMORY_SHARE * memory["limit"]
        if fixed + memory["activations"] > limit:
            pieces = _pieces_that_fit(fixed, kept, on_each, limit)
            less = "" if options.gradient_checkpointing else ", or --gradient-checkpointing"
            shards = ", or --fsdp" if options.num_devices > 1 and not options.fsdp else ""
            lines.append(
                "A step does not fit into the memory. "
                + (
                    f"Give --accumulate {pieces}{less}, or a smaller --batch-size."
                    if pieces
                    else f"Not even one picture at once does: give a smaller --size{less}{shards}."
                )
            )
    elif kept is None:
        lines.append(
            "Weights and optimiser alone do not fit into the memory here, so nothing was run: steps were not timed, and "
            "activations not counted."
        )
    # one save more than are kept is there for a moment, and a file with the one that takes its place
    most = sum(disk["files"].values()) + disk["best"] + max(disk["files"].values()) + (disk["keep"] + 1) * disk["save"]
    if most > disk["free"]:
        lines.append(f"The disk of {options.out} is too small for it. Make room, give another --out, or --keep 1.")
    if clock["step_seconds"] is not None:
        reading = result["reading"]
        rate = reading["again_per_second"]
        needed = on_each / clock["step_seconds"]
        if reading["workers"] and needed > rate * reading["workers"]:
            more = math.ceil(needed / rate)
            lines.append(
                f"Reading is slower than computing: --workers {more} would keep up"
                + (", if there are as many cores" if more > reading["workers"] else "")
                + ". `unveil prepare` makes pictures that are read faster."
            )
        elif not reading["workers"] and needed > rate:
            lines.append(f"Reading takes longer than computing: try --workers {math.ceil(needed / rate)}.")
    budget = result["budget"]
    if budget is not None and budget["epochs"] == 0:
        lines.append(
            f"Not one epoch fits into {options.hours:g} hours. Give a smaller --size or --image-size, or fewer pictures."
        )
    elif budget is not None and budget["num_steps"] < FEW_STEPS:
        lines.append(
            f"{budget['num_steps']:,} steps in {options.hours:g} hours are few. Give a smaller --size, --image-size or "
            "--batch-size."
        )
    if options.hours is not None and budget is None:
        lines.append("How many epochs fit into --hours is not known, as no step was timed.")
    if absent is not None:
        stated = "" if options.peak_tflops else " Give --peak-tflops and --mfu to have hours by arithmetic."
        lines.append(f"There is no {absent} here: its steps are not timed, and activations are those of a CPU.{stated}")
    if options.num_devices > 1:
        lines.append(f"{options.num_devices} devices are counted as sharing without loss; that is not measured.")
    if options.compile and clock["by"] == "measurement":
        lines.append("Steps were timed without --compile, which makes them faster on most GPUs.")
    return lines
