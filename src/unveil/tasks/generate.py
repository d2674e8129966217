"""Making pictures from noise: a model and perhaps classes in, files out."""

import csv
import datetime
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from unveil import pipeline
from unveil.checkpoint import load_model, pick_device, write_atomically
from unveil.config import nearest
from unveil.model import Guidance, MaskedDiffusionAutoencoder
from unveil.pipeline import Sampler
from unveil.report import contact_sheet, save_clip, save_png
from unveil.sampling import GuidanceKind, guidance
from unveil.schedule import DiscreteSchedule

LINES, FRAMES = 10, 10  # of a sheet, and side by side in one of its lines
WAIT = datetime.timedelta(hours=2)  # for the slowest process; one that dies is noticed at once


MAX_SAMPLES, MAX_FIRST = 10**7, 10**12
CLAIM = ".generating"  # lies in the directory while a run writes there


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make pictures or clips from noise, of any class or without.

    Picture i depends on the seed and on i alone, whatever the batch size and the number of processes: under `torchrun` each
    process makes its share of the pictures. Write `torchrun --nproc-per-node 8 -m -- unveil.cli generate --run ...`: without
    the two dashes torchrun takes --run for an option of its own.

    Example: unveil generate --run runs/photos-by-class --out made --classes cat,dog --num-steps 100 --guidance-scale 1.5
    """

    run: Path
    """A run directory or a weights file."""
    out: Path
    """Directory for the results: a new or an empty one."""
    classes: str | None = None
    """Names, or numbers from 0 on, separated by commas, as in 3,cat: the pictures take turns. What is both is a name.
    `all` is every class, the default of a model with classes; `none` is no class."""
    num_samples: int = 64
    """How many to make."""
    num_steps: int = 50
    """Sampling steps, at most the schedule's 1000, or any number on a flow."""
    sampler: Sampler = "ddim"
    """ddim, deterministic from its first noise unless --eta is given; ddpm, ancestral; dpmpp, DPM-Solver++ of second
    order."""
    eta: float = 0.0
    """Fresh noise at each step of ddim: 0 for none, 1 for as much as ddpm's."""
    times: Literal["even", "strided"] = "even"
    """Which times are visited: even ones, or UMD's published grid, a stride from the last one down and then 1. UMD's own
    sampler is --num-steps 125 --times strided --eta 1."""
    guidance_scale: float = 1.0
    """How far to go beyond the class's prediction, away from that of no class. 1 is as trained, 0 ignores the class."""
    guidance: GuidanceKind = "constant"
    """constant: the same at every time. interval: inside --guidance-interval only. power_cosine: rising towards the clean
    end, MDTv2's."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """For interval: from where to where to guide, as shares of the time; 0 is clean, 1 is noise."""
    guidance_power: float = 4.0
    """For power_cosine: the larger, the later guidance sets in."""
    predict: Literal["x0", "eps"] | None = None
    """By which of the model's predictions to sample, x0 or eps. Default: the first that it has for noise, eps for umd."""
    seed: int = 0
    """Draws the noise."""
    first: int = 0
    """Number of the first sample: to add to 64 samples, make more of them from --first 64 on, in another directory."""
    batch_size: int = 64
    """Samples at once; no effect on the result."""
    files: bool = True
    """Write each sample as NUMBER.png, animated if it is a clip, and the classes as labels.csv."""
    grid: bool = True
    """Write grid.png, up to 100 samples side by side, by class."""
    npz: bool = False
    """Write samples.npz with all samples as arr_0, uint8 (N, H, W, C), and the classes as arr_1: what the evaluation
    scripts of OpenAI's guided-diffusion read."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one; under torchrun, one for each process."""


@dataclass(frozen=True)
class Plan:
    """What is made, settled before anything is written.

    labels: (num_samples,) or None. names: what the classes are called. times: falling, the last 0.
    """

    labels: Tensor | None
    names: tuple[str, ...]
    times: list[float]
    guidance: Guidance | None


def chosen_classes(text: str, num_classes: int, names: Sequence[str]) -> list[int]:
    """The classes that a user's words mean, in their order.

    Raises:
        ValueError: a word is neither a name nor a number of a class.
    """
    if text == "all":
        return list(range(num_classes))
    found = []
    for word in (part.strip() for part in text.split(",")):
        if word in names:  # first, because folders may be called 10, 2, 3
            found.append(names.index(word))
            continue
        try:
            number = int(word)
        except ValueError:
            hint = nearest(word, names) if names else "It knows no names."
            if len(names) > 20 and not hint.startswith("Did you mean"):
                hint = "`unveil info --json` lists their names."
            raise ValueError(
                f"--classes {text!r}: {word!r} is no class of this model. Its classes have the numbers 0 to "
                f"{num_classes - 1}. {hint}"
            ) from None
        if not 0 <= number < num_classes:
            raise ValueError(f"--classes {text!r}: {number} is no class of this model. Use 0 to {num_classes - 1}.")
        found.append(number)
    return found


def _check_numbers(options: Generate) -> None:
    for name in ("num_samples", "batch_size"):
        if not 1 <= getattr(options, name) <= MAX_SAMPLES:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: use 1 to {MAX_SAMPLES}.")
    if not 0 <= options.first <= MAX_FIRST:
        raise ValueError(f"--first {options.first}: samples are numbered from 0 to {MAX_FIRST}.")
    if not 0 <= options.eta <= 1:
        raise ValueError(f"--eta {options.eta}: it runs from 0 (deterministic) to 1 (as ddpm). Use a value between.")
    if options.eta and options.sampler != "ddim":
        raise ValueError(
            f"--eta {options.eta} belongs to ddim; {options.sampler} has its noise fixed. Drop it, or use --sampler ddim."
        )
    if options.guidance_scale == 1 and options.guidance != "constant":
        raise ValueError(f"--guidance {options.guidance} with --guidance-scale 1 guides nowhere. Give another scale.")
    for name, kind in (("guidance_interval", "interval"), ("guidance_power", "power_cosine")):
        if getattr(options, name) != getattr(Generate, name) and options.guidance != kind:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to --guidance {kind}, but it is {options.guidance}. Drop one of the two."
            )


def _check_kept(options: Generate, model: MaskedDiffusionAutoencoder) -> None:
    """Refuse a directory that holds something, and files that cannot hold the samples or are not wanted at all."""
    if not (options.files or options.grid or options.npz):
        raise ValueError("--no-files and --no-grid without --npz: nothing would be kept. Leave one of them out.")
    frames = model.recipe.clip.frames
    if options.npz and frames > 1:
        raise ValueError(f"--npz holds pictures, but this model makes clips of {frames} frames. Leave it out.")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file. Name a directory for the results.")
    inside = sorted(path.name for path in options.out.iterdir()) if options.out.exists() else []
    if inside:
        raise ValueError(f"--out {options.out} is not empty ({inside[0]!r}). Name a new directory, or empty this one.")


def _claim(out: Path) -> None:
    """Make the directory this run's own, though another should have found it empty at the same moment."""
    try:
        (out / CLAIM).touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(f"--out {out} is in use by another run. Wait for it, or name a new directory.") from None


def plan(options: Generate, model: MaskedDiffusionAutoencoder, names: Sequence[str]) -> Plan:
    """Settle what is made, and refuse what cannot be.

    Raises:
        ValueError: an option is out of its range or does not go with another, or the model cannot do it.
    """
    recipe, num_classes = model.recipe, model.recipe.condition.num_classes
    _check_numbers(options)
    guided = options.guidance_scale != 1
    labels = None
    if num_classes and options.classes != "none":
        classes = torch.tensor(
            chosen_classes("all" if options.classes is None else options.classes, num_classes, names)
        )
        # by a sample's own number, so that later samples go on with the turns
        labels = classes[(options.first + torch.arange(options.num_samples)) % len(classes)]
    asked = labels
    if not num_classes and options.classes not in (None, "none"):
        asked = torch.zeros(1, dtype=torch.int64)  # any class, to be refused
    pipeline.check_can_generate(model, asked, guided)
    assert model.schedule is not None
    if options.predict not in (None, *recipe.samplers_heads):
        raise ValueError(
            f"--predict {options.predict}, but this {recipe.name} predicts {' and '.join(recipe.samplers_heads)} for noise. "
            "Use that, or leave it out."
        )
    if options.times == "even":
        times = model.schedule.times(options.num_steps)
    elif isinstance(model.schedule, DiscreteSchedule):
        times = model.schedule.strided_times(options.num_steps)
    else:
        raise ValueError(
            f"--times strided is a grid of whole times, but this {recipe.name} is a flow over real ones. Use --times even."
        )
    scale = None
    if guided:
        end = model.schedule.end
        interval, power = options.guidance_interval, options.guidance_power
        scale = guidance(options.guidance, options.guidance_scale, end, interval, power)
    _check_kept(options, model)
    return Plan(labels, tuple(names), list(times), scale)


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if names else str(label)


def grid_rows(
    pictures: Sequence[Tensor], labels: Sequence[int] | None, names: Sequence[str], first: int, line: int
) -> list[tuple[str, list[Tensor]]]:
    """Rows of a contact sheet: by class if these are few, else in order under the classes' names.

    Args:
        pictures: (C, T, H, W) each, in [0, 1], no more than a sheet holds.
        labels: of each, or None.
        first: number of the first one.
        line: how many go side by side.
    """
    rows = []
    present = sorted(set(labels)) if labels is not None else []
    if 0 < len(present) <= LINES:
        for label in present:
            assert labels is not None
            mine = [picture for picture, its in zip(pictures, labels, strict=True) if its == label]
            mine = mine[: LINES // len(present) * line]
            for i in range(0, len(mine), line):
                rows.append((_name(label, names) if i == 0 else "", mine[i : i + line]))
        return rows
    for i in range(0, len(pictures), line):
        some = list(pictures[i : i + line])
        caption = f"{first + i} to {first + i + len(some) - 1}"
        if labels is not None:
            caption = ", ".join(_name(label, names)[:16] for label in labels[i : i + line])
        rows.append((caption, some))
    return rows


class _Spread:
    """Which of several processes this one is: those of torchrun, or one alone.

    Used as a context it joins them, and leaves at the end.
    """

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.world > 1 else 0

    def device(self, asked: str | None) -> str:
        """The device that was asked for; if that is any GPU, this process's own."""
        if self.world > 1 and asked in (None, "cuda") and torch.cuda.is_available():
            asked = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return pick_device(asked)

    def __enter__(self) -> "_Spread":
        if self.world > 1:  # gloo on GPUs too: only finished pictures are exchanged
            dist.init_process_group("gloo", timeout=WAIT)
            dist.barrier()  # nobody writes before everybody has looked at the directory
        return self

    def __exit__(self, *error: object) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def gather(self, mine: Any, problem: str | None) -> list[Any]:
        """What every process has made, by rank; if one of them had a problem, all raise it.

        Raises:
            ValueError: the problem of the first process that had one.
        """
        everyone: list[Any] = [(mine, problem)]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, (mine, problem))
        for _, theirs in everyone:
            if theirs is not None:
                raise ValueError(theirs)
        return [made for made, _ in everyone]


def _picture_name(number: int, channels: int) -> str:
    return f"{number:05d}" + (".png" if channels in (1, 3, 4) else ".npy")


class _Made:
    """What a process keeps of the samples that it has made, as their files are written."""

    def __init__(self, options: Generate, rank: int, line: int) -> None:
        self.options = options
        self.room = LINES * line if options.grid else 0
        self.part = options.out / f".samples-{rank}.npy"
        self.for_grid: dict[int, Tensor] = {}
        self.arrays: list[np.ndarray] = []

    def add(self, numbers: Sequence[int], clips: Tensor) -> None:
        """Take (B, C, T, H, W) in [0, 1] whose place in this call is given."""
        values = (clips.cpu() * 255).round().to(torch.uint8)
        for number, value in zip(numbers, values, strict=True):
            if self.options.files:
                save_clip(self.options.out / f"{self.options.first + number:05d}.png", value)
            if number < self.room:
                self.for_grid[number] = value
        if self.options.npz:
            self.arrays.append(values[:, :, 0].permute(0, 2, 3, 1).numpy())

    def write_part(self) -> None:
        if self.arrays:
            np.save(self.part, np.concatenate(self.arrays))


def _make(
    options: Generate,
    model: MaskedDiffusionAutoencoder,
    planned: Plan,
    numbers: Sequence[int],
    made: _Made,
    on_progress: Callable[[int], None],
) -> None:
    for start in range(0, len(numbers), options.batch_size):
        some = numbers[start : start + options.batch_size]
        clips = pipeline.generate(
            model,
            [options.first + number for number in some],
            None if planned.labels is None else planned.labels[list(some)],
            num_steps=options.num_steps,
            sampler=options.sampler,
            eta=options.eta,
            guidance=planned.guidance,
            predict=options.predict,
            times=planned.times,
            seed=options.seed,
        )
        made.add(some, clips)
        on_progress(start + len(some))
    made.write_part()


def _write_npz(path: Path, parts: Sequence[Path], num_samples: int, labels: Tensor | None) -> None:
    """One file of the parts that every process has left, sample i in the part i % len(parts)."""
    arrays = None
    for rank, part in enumerate(parts):
        if part.exists():  # more processes than samples leave fewer parts
            theirs = np.load(part)
            arrays = np.empty((num_samples, *theirs.shape[1:]), theirs.dtype) if arrays is None else arrays
            arrays[rank :: len(parts)] = theirs
    assert arrays is not None
    columns: dict[str, Any] = {"arr_0": arrays} | ({} if labels is None else {"arr_1": labels.numpy()})

    def write(part: Path) -> None:
        with part.open("wb") as stream:  # given a name, numpy would add an extension to it
            np.savez(stream, **columns)

    write_atomically(path, write)


def _write_rest(
    options: Generate, channels: int, planned: Plan, made: list[dict[int, Tensor]], line: int
) -> dict[str, Any]:
    """The files about all samples, once; returns where they lie."""
    labels = None if planned.labels is None else planned.labels.tolist()
    files: dict[str, Any] = {"samples": options.num_samples if options.files else 0}
    if options.files and labels is not None:
        path = options.out / "labels.csv"

        def write(part: Path) -> None:
            with part.open("w", encoding="utf-8", newline="") as stream:
                lines = csv.writer(stream, lineterminator="\n")
                lines.writerow(["file", "label", "class"])
                for i, label in enumerate(labels):
                    name = _picture_name(options.first + i, channels)
                    lines.writerow([name, label, _name(label, planned.names)])

        write_atomically(path, write)
        files["labels"] = str(path)
    if options.grid:
        pictures = {number: value for theirs in made for number, value in theirs.items()}
        shown = [pictures[number].float() / 255 for number in sorted(pictures)]
        theirs = None if labels is None else labels[: len(shown)]
        rows = grid_rows(shown, theirs, planned.names, options.first, line)
        path = options.out / "grid.png"
        save_png(path, contact_sheet(rows))
        files["grid"] = str(path)
    if options.npz:
        path = options.out / "samples.npz"
        parts = [options.out / f".samples-{rank}.npy" for rank in range(len(made))]
        _write_npz(path, parts, options.num_samples, planned.labels)
        files["npz"] = str(path)
    return files


def _told(options: Generate, planned: Plan) -> dict[str, Any]:
    """What was asked for, in the words of the result."""
    visited = planned.times[:-1]
    scales = [1.0 if planned.guidance is None else planned.guidance(t) for t in visited]
    guided = None
    if planned.guidance is not None:
        guided = {"kind": options.guidance, "scale": options.guidance_scale}
        if options.guidance == "interval":
            guided["interval"] = list(options.guidance_interval)
        if options.guidance == "power_cosine":
            guided["power"] = options.guidance_power
    classes = None
    if planned.labels is not None:
        counts = Counter(planned.labels.tolist())
        classes = {_name(label, planned.names): counts[label] for label in sorted(counts)}
    return {
        "num_samples": options.num_samples,
        "first": options.first,
        "seed": options.seed,
        "classes": classes,
        "sampler": options.sampler,
        "eta": options.eta,
        "steps": len(visited),
        # with and without the class, unless one of the two is not needed
        "network_evaluations": sum(1 if scale in (0, 1) else 2 for scale in scales),
        "guidance": guided,
    }


def generate(options: Generate, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil generate`; on_progress is told the samples done and their number.

    Returns:
        "out"; "num_samples", "first", "seed"; "classes", how many of each, or None; "sampler", "eta", "steps",
        "network_evaluations" for one sample, "guidance"; "files": how many samples have one, and where the others lie;
        "processes", "seconds" and "samples_per_second". In a process other than the first of several, "rank" alone.

    Raises:
        ValueError: the model cannot do it, an option is out of its range, or the directory is not empty. All of it is found
            before anything is written.
    """
    spread = _Spread()
    device = spread.device(options.device)
    model, about = load_model(options.run, device)
    names = about.classes if len(about.classes) == model.recipe.condition.num_classes else ()
    planned = plan(options, model, names)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    clip = model.recipe.clip
    line = max(1, FRAMES // clip.frames)
    mine = range(spread.rank, options.num_samples, spread.world)
    files: dict[str, Any] = {}

    def show(done: int) -> None:
        if on_progress is not None and spread.rank == 0:
            on_progress(min(done * spread.world, options.num_samples), options.num_samples)

    with spread:
        made, problem, claimed = _Made(options, spread.rank, line), None, False
        try:
            try:
                if spread.rank == 0:
                    _claim(options.out)
                    claimed = True
                _make(options, model, planned, mine, made, show)
            except (ValueError, OSError) as error:
                problem = str(error)
            everyone = spread.gather(made.for_grid, problem)
            seconds = time.perf_counter() - begin
            try:
                if spread.rank == 0:
                    files = _write_rest(options, clip.channels, planned, everyone, line)
            except OSError as error:
                problem = str(error)
            spread.gather(None, problem)  # only then are the parts read, and may go
        finally:
            made.part.unlink(missing_ok=True)
            if claimed:
                (options.out / CLAIM).unlink(missing_ok=True)
    if spread.rank:
        return {"rank": spread.rank}
    return {
        "out": str(options.out),
        **_told(options, planned),
        "files": files,
        "processes": spread.world,
        "seconds": seconds,
        "samples_per_second": options.num_samples / seconds,
    }
