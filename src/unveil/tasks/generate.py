"""Making pictures from noise: a model and perhaps classes in, files out."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unveil import gallery, pipeline
from unveil.checkpoint import FromRun, load_model
from unveil.config import nearest
from unveil.model import Guidance, MaskedDiffusionAutoencoder
from unveil.pipeline import Sampler
from unveil.sampling import GuidanceKind, guidance
from unveil.schedule import DiscreteSchedule
from unveil.spread import Spread

MAX_SAMPLES, MAX_FIRST, MAX_SCALE = 10**7, 10**12, 1000.0


@dataclass(frozen=True, kw_only=True)
class Generate(gallery.Files, FromRun):
    """Make pictures or clips from noise, of any class or without.

    Picture i depends on the seed and on i alone, whatever the batch size and the number of processes: under `torchrun` each
    process makes its share of the pictures. Write `torchrun --nproc-per-node 8 -m -- unveil.cli generate --run ...`: without
    the two dashes torchrun takes --run for an option of its own.

    Example: unveil generate --run runs/photos-by-class --out made --classes cat,dog --num-steps 100 --guidance-scale 1.5
    """

    classes: str | None = None
    """Names, or numbers from 0 on, separated by commas, as in 3,cat: the pictures take turns. `all` is every class, the
    default of a model with classes; `none` is no class. What could be several of these is a name."""
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
    batch_size: int = 64
    """Samples at once; no effect on the result."""
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
    if text in names:  # whole, because a folder's name may have a comma, or be "all"
        return [names.index(text)]
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
    if not 0 <= options.guidance_scale <= MAX_SCALE:
        raise ValueError(
            f"--guidance-scale {options.guidance_scale:g}: use 0 to {MAX_SCALE:g}; 1 is no guidance, and more than "
            "10 is rarely of use."
        )
    if options.num_steps < 1:
        raise ValueError(f"--num-steps {options.num_steps}: sampling takes at least one step. Use 1 or more.")
    if options.guidance_scale == 1 and options.guidance != "constant":
        raise ValueError(f"--guidance {options.guidance} with --guidance-scale 1 guides nowhere. Give another scale.")
    for name, kind in (("guidance_interval", "interval"), ("guidance_power", "power_cosine")):
        if getattr(options, name) != getattr(Generate, name) and options.guidance != kind:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to --guidance {kind}, but it is {options.guidance}. Drop one of the two."
            )


def plan(options: Generate, model: MaskedDiffusionAutoencoder, names: Sequence[str]) -> Plan:
    """Settle what is made, and refuse what cannot be.

    Raises:
        ValueError: an option is out of its range or does not go with another, or the model cannot do it.
    """
    recipe, num_classes = model.recipe, model.recipe.condition.num_classes
    _check_numbers(options)
    guided = options.guidance_scale != 1
    labels = None
    if num_classes and (options.classes != "none" or "none" in names):
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
    end = int(model.schedule.end)
    if options.times == "even":
        if isinstance(model.schedule, DiscreteSchedule) and options.num_steps > end:
            raise ValueError(f"--num-steps {options.num_steps}: this {recipe.name} has {end} times. Use 1 to {end}.")
        times = model.schedule.times(options.num_steps)
    elif isinstance(model.schedule, DiscreteSchedule):
        if end % options.num_steps:
            near = [n for n in range(1, end + 1) if end % n == 0]
            near.sort(key=lambda n: abs(n - options.num_steps))
            raise ValueError(
                f"--num-steps {options.num_steps} --times strided: the stride must divide {end}. Use {near[0]} or {near[1]} "
                "steps, or --times even."
            )
        times = model.schedule.strided_times(options.num_steps)
    else:
        raise ValueError(
            f"--times strided is a grid of whole times, but this {recipe.name} is a flow over real ones. Use --times even."
        )
    scale = None
    if guided:
        interval, power = options.guidance_interval, options.guidance_power
        if not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"--guidance-interval {interval[0]:g} {interval[1]:g}: it is a part of the time, from 0 (clean) to 1 "
                "(noise), and the first number is the lower one."
            )
        if not 0 < power <= MAX_SCALE:
            raise ValueError(f"--guidance-power {power:g}: use a number above 0, to {MAX_SCALE:g}; MDTv2 has 4.")
        scale = guidance(options.guidance, options.guidance_scale, model.schedule.end, interval, power)
    gallery.check(options, recipe.clip)
    return Plan(labels, tuple(names), list(times), scale)


def _notices(model: MaskedDiffusionAutoencoder) -> list[str]:
    """What a user should know about the samples of this model."""
    recipe, notices = model.recipe, []
    noisy = recipe.branch_on("visible")
    if noisy is not None and noisy.mask_ratio:
        notices.append(
            f"This {recipe.name} was trained with {noisy.mask_ratio:.1%} of every noisy picture hidden and now makes whole "
            "ones, so do not expect its best: `unveil finetune-generator` trains on whole pictures."
        )
    if not recipe.clip.bounded:
        notices.append(
            "These are latents, not pictures: decode them by the autoencoder that the model was trained with (for DiT's "
            "published weights, Stable Diffusion's, after dividing by its scale, 0.18215)."
        )
    return notices


def _make(
    options: Generate,
    model: MaskedDiffusionAutoencoder,
    planned: Plan,
    numbers: Sequence[int],
    made: gallery.Made,
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
        classes = {gallery.class_name(label, planned.names): counts[label] for label in sorted(counts)}
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
        "notices", sentences; "processes", "seconds" and "samples_per_second". In a process other than the first of several,
        "rank" alone.

    Raises:
        ValueError: the model cannot do it, an option is out of its range, or the directory is not empty. All of it is found
            before anything is written.
    """
    spread = Spread()
    device = spread.device(options.device)
    model, about = load_model(options.run, device)
    names = about.classes if len(about.classes) == model.recipe.condition.num_classes else ()
    planned = plan(options, model, names)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    clip = model.recipe.clip
    mine = range(spread.rank, options.num_samples, spread.world)
    files: dict[str, Any] = {}

    def show(done: int) -> None:
        if on_progress is not None and spread.rank == 0:
            on_progress(min(done * spread.world, options.num_samples), options.num_samples)

    with spread:
        made, problem, claimed = gallery.Made(options, clip, spread.rank), None, False
        try:
            try:
                if spread.rank == 0:
                    gallery.claim(options.out)
                    claimed = True
            except (ValueError, OSError) as error:
                problem = str(error)
            spread.gather(None, problem)  # nobody writes into a directory that is another's
            try:
                _make(options, model, planned, mine, made, show)
            except torch.OutOfMemoryError:
                problem = (
                    f"--batch-size {options.batch_size} does not fit into the memory of {device}. Use a smaller one."
                )
            except (ValueError, OSError) as error:
                problem = str(error)
            everyone = spread.gather(made.for_grid, problem)
            seconds = time.perf_counter() - begin
            try:
                if spread.rank == 0:
                    files = gallery.write_rest(
                        options, clip, options.num_samples, planned.labels, planned.names, everyone
                    )
            except OSError as error:
                problem = str(error)
            spread.gather(None, problem)  # only then are the parts read, and may go
        finally:
            made.part.unlink(missing_ok=True)
            if claimed:
                (options.out / gallery.CLAIM).unlink(missing_ok=True)
    if spread.rank:
        return {"rank": spread.rank}
    return {
        "out": str(options.out),
        **_told(options, planned),
        "files": files,
        "notices": _notices(model),
        "processes": spread.world,
        "seconds": seconds,
        "samples_per_second": options.num_samples / seconds,
    }
