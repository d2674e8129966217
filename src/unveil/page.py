"""What the web page does, without the page: repainting, generating and neighbours, told of while they go on."""

import base64
import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unveil.checkpoint import WEIGHTS, About, load_model
from unveil.data import BadPicture, Samples, chosen_batches, source_for, to_clips
from unveil.features import encoder_features, extract
from unveil.model import MaskedDiffusionAutoencoder
from unveil.originals import Original, save_pixels
from unveil.painting import FAR_APART, Painted, named_hole, paint
from unveil.pipeline import check_can_generate, default_sampler, generate
from unveil.report import heat, to_image
from unveil.sampling import guidance
from unveil.sources import as_text
from unveil.transforms import fit
from unveil.windows import num_parts

SIDE = 1024  # pixels of the longer side of what is shown
WATCHED = 512  # of what is shown at every step
SMALL = 256  # what is shorter is shown enlarged, pixel by pixel
MAX_STEPS, MAX_SAMPLES, MAX_MADE = 250, 8, 16
MOST_PIXELS = (
    60e6  # of a picture's samples and its prediction together: 0.7 GB of colours, and as much again to work with
)
MAX_PARTS = 20_000  # of a mask: so many are put together to regions in a few seconds, in which nobody asks for the time
BETWEEN = 0.15  # seconds at least from one view to the next


class Stopped(Exception):
    """The one who asked for it does not want it any more."""


@dataclass(frozen=True)
class Run:
    """A model that the page offers.

    name: of its folder or file, never a path.
    """

    name: str
    model: MaskedDiffusionAutoencoder
    about: About

    @property
    def side(self) -> str:
        clip = self.model.recipe.clip
        return f"{clip.height} px" if clip.height == clip.width else f"{clip.width} x {clip.height} px"

    def describe(self) -> str:
        """One sentence on what it is."""
        recipe, about = self.model.recipe, self.about
        data = re.split(r"[/\\]", about.data.rstrip("/\\"))[-1]  # of a path, what is no secret
        abilities = {"repaint": "repaints", "generate": "generates"}
        can = " and ".join(word for ability, word in abilities.items() if ability in self.model.can)
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"A {recipe.name} {recipe.size} of {self.side} and {parameters / 1e6:.1f} million parameters, trained on {data} "
            f"({about.images_seen:,} pictures seen). It {can or 'only represents'}."
        )


def open_runs(paths: Sequence[str], device: str) -> list[Run]:
    """Load the models that a page is to offer, each with a name of its own.

    Args:
        paths: run directories, weights files, or names on the hub.

    Raises:
        ValueError: one cannot be loaded, or is a model of clips.
    """
    runs: list[Run] = []
    for path in paths:
        model, about = load_model(path, device)
        if model.recipe.clip.frames > 1:
            raise ValueError(
                f"--run {path} is a model of clips, and the page shows pictures. Use `unveil inpaint` for it."
            )
        file = Path(path)
        plain = (file.resolve().parent.name if file.name == WEIGHTS else file.stem) or "model"
        taken = {run.name for run in runs}
        names = [plain, *(f"{plain} {number}" for number in range(2, len(paths) + 1))]
        runs.append(Run(next(name for name in names if name not in taken), model, about))
    return runs


@dataclass(frozen=True)
class View:
    """How far something is. picture: what there is to see by now, if anything."""

    text: str
    picture: Image.Image | None = None


Tell = Callable[[View], None]


@dataclass
class _Latest:
    """The last of what a worker told; what its reader was too slow for is left out."""

    view: View | None = None
    result: Any = None
    error: BaseException | None = None
    ended: bool = False
    news: threading.Condition = field(default_factory=threading.Condition)


class Work:
    """Something that runs beside its reader, until it is done, stopped, or out of time.

    A model is asked at each of its steps, so nothing goes on for longer than one.
    """

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raise if it shall not go on."""
        if self._stop.is_set():
            raise Stopped
        if time.monotonic() > self._until:
            raise ValueError(
                f"This took longer than the {self.max_seconds:g} s that the page gives. Ask for fewer steps or samples, or a "
                "smaller hole."
            )

    def run(self, do: Callable[[Tell], Any], *models: torch.nn.Module) -> Iterator[Any]:
        """Yield what `do` tells, and at last what it returns.

        Raises:
            Stopped, or what `do` raises.
        """
        self._until = time.monotonic() + self.max_seconds
        latest = _Latest()

        def tell(view: View) -> None:
            self.check()
            with latest.news:
                latest.view = view
                latest.news.notify()

        def work() -> None:
            hooks = [
                child.register_forward_pre_hook(lambda *_: self.check())
                for model in models
                for child in model.children()
            ]
            try:
                latest.result = do(tell)
            except BaseException as error:
                latest.error = error
            finally:
                for hook in hooks:
                    hook.remove()
                with latest.news:
                    latest.ended = True
                    latest.news.notify()

        thread = threading.Thread(target=work, name="unveil-work", daemon=True)
        thread.start()
        try:
            while True:
                with latest.news:
                    latest.news.wait_for(lambda: latest.view is not None or latest.ended)
                    view, latest.view = latest.view, None
                if view is not None:
                    yield view
                    continue
                if latest.error is not None:
                    raise latest.error
                yield latest.result
                return
        finally:  # its reader may have left
            self.stop()
            thread.join()


def shown(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """A picture for the screen: not larger than `side`, and what is tiny enlarged without blur."""
    longer = max(picture.size)
    if longer > side:
        size = [max(1, round(length * side / longer)) for length in picture.size]
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    scale = SMALL // longer
    if scale < 2:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def seen(original: Original) -> Image.Image:
    """A picture as people see it, over white.

    Raises:
        ValueError: it has channels that nobody sees.
    """
    colours = original.pixels.shape[-1] - original.has_alpha
    if colours not in (1, 3):
        raise ValueError(
            f"The picture has {colours} channels, and the page shows grey and colours. Use `unveil inpaint`."
        )
    pixels = original.pixels[0]
    if original.top != 255:
        pixels = np.rint(pixels.astype(np.float32) * (255 / original.top)).astype(np.uint8)
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    if not original.has_alpha:
        return image.convert("RGB")
    over = Image.new("RGB", image.size, "white")
    over.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return over


def data_url(picture: Image.Image) -> str:
    """A picture as text that a page shows by itself: PNG if it is small, otherwise JPEG."""
    stream = io.BytesIO()
    small = picture.width * picture.height <= 512 * 512
    picture.save(stream, "PNG") if small else picture.convert("RGB").save(stream, "JPEG", quality=90)
    return f"data:image/{'png' if small else 'jpeg'};base64," + base64.b64encode(stream.getvalue()).decode()


@dataclass(frozen=True, kw_only=True)
class Repainting:
    """What is asked for on the page's first tab. hole: (H, W) bool, or a mask by name, as random:0.75."""

    original: Original
    hole: Tensor | str
    num_samples: int = 4
    num_steps: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Picture:
    """One of several that came out: what to call it, how it looks on a screen, and where it is kept whole, if it is."""

    name: str
    view: Image.Image
    file: Path | None = None


@dataclass(frozen=True)
class Repainted:
    """disagreement: how far the samples lie apart, if there are several."""

    pictures: list[Picture]
    disagreement: Picture | None
    seconds: float
    text: str


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = low - 1
    if not low <= number <= high:
        raise ValueError(f"{name}: {value!r} was given; use a whole number from {low} to {high}.")
    return number


def _stem(name: str) -> str:
    """A user's file name as the beginning of others."""
    return re.sub(r"[^\w-]+", "_", Path(name).stem)[:40].strip("_") or "picture"


def repaint(run: Run, asked: Repainting, name: str, folder: Path, tell: Tell) -> Repainted:
    """Paint, tell of each step of the first sample, and write what comes out at the picture's own size and depth.

    The picture, the mask and the seed make the same samples as `unveil inpaint` does.

    Args:
        name: of the user's file.
        folder: for the files.

    Raises:
        ValueError: a number is out of range, or the model cannot do it.
    """
    model, original = run.model, asked.original
    num_steps = _whole_number("Steps", asked.num_steps, 1, MAX_STEPS)
    num_samples = _whole_number("Samples", asked.num_samples, 1, MAX_SAMPLES)
    seed = _whole_number("Seed", asked.seed, 0, 2**31 - 1)
    notes = [f"{note[0].upper()}{note[1:]}." for note in original.notes]
    if model.schedule is None and num_samples > 1:
        notes.append(f"A {model.recipe.name} has one prediction, so there is one sample.")
        num_samples = 1
    T, H, W = original.pixels.shape[:3]
    if (num_samples + 1) * H * W > MOST_PIXELS:
        most = int(MOST_PIXELS / (H * W)) - 1
        raise ValueError(
            f"{num_samples} samples of {W:,} x {H:,} pixels need more memory than the page gives. "
            + (f"Ask for {most} or fewer, or make the picture smaller." if most > 0 else "Make the picture smaller.")
        )
    seen = None
    if isinstance(asked.hole, str):
        hole, seen = named_hole(model.recipe.clip, asked.hole, 0, seed, (T, H, W))
    elif asked.hole.shape == (H, W):
        hole = asked.hole[None]
    else:
        raise ValueError(
            f"The mask has {asked.hole.shape[1]:,} x {asked.hole.shape[0]:,} pixels and the picture {W:,} x {H:,}. "
            "Give one of the same size."
        )
    if not hole.any():
        raise ValueError("The mask hides nothing. Draw over what is to be repainted; in a mask's file that is white.")
    clip_size = model.recipe.clip.height, model.recipe.clip.width
    if seen is None and (parts := num_parts(hole.any(0).numpy(), clip_size)) > MAX_PARTS:
        raise ValueError(
            f"The mask has {parts:,} parts that lie apart, and the page takes {MAX_PARTS:,}. Hide what is between them too, or "
            "use `unveil inpaint`."
        )
    begin = time.perf_counter()
    clip = original.seen(model.recipe.clip.channels)
    sampler = default_sampler(model)
    resampled = sampler == "ddpm" and model.schedule is not None
    painted = paint(
        model,
        clip,
        hole.expand(T, -1, -1),
        num_steps=num_steps,
        num_samples=num_samples,
        seed=seed,
        sampler=sampler,
        seen=seen,
        on_step=_Steps(num_steps, float(model.schedule.end) if resampled and model.schedule else None, tell),
    )
    if num_samples > 1 and not painted.disagreement().any():
        notes.append(
            "The hole takes so little of the model's patches that it was filled smoothly: the samples are alike."
        )
    tell(View("Writing the pictures"))
    pictures, apart = _written(original, hole.expand(T, -1, -1), painted, folder, _stem(name))
    seconds = time.perf_counter() - begin
    many = f"{num_samples} sample{'s' * (num_samples > 1)} of {W:,} x {H:,} pixels in {seconds:.1f} s"
    how = "one prediction" if model.schedule is None else f"{num_steps} steps"
    return Repainted(pictures, apart, seconds, " ".join([f"{many}, {how}, seed {seed}.", *notes]))


class _Steps:
    """`paint`'s on_step, told in words, and with a picture as often as one can look."""

    def __init__(self, num_steps: int, resampled_from: float | None, tell: Tell) -> None:
        """resampled_from: the schedule's end, of a sampler that goes back and forth."""
        self.num_steps, self.resampled_from, self.tell = num_steps, resampled_from, tell
        self.step, self.window, self.last_t = 0, 1, float("inf")
        self.shown = 0.0

    def __call__(self, t: float, picture_of: Callable[[], Tensor]) -> None:
        if t >= self.last_t:
            self.window, self.step = self.window + 1, 0
        self.step, self.last_t = self.step + 1, t
        where = f", part {self.window} of the hole" if self.window > 1 else ""
        text = f"Step {self.step} of {self.num_steps}{where}"
        if self.resampled_from is not None:
            text = f"{1 - t / self.resampled_from:.0%} of the way from noise, every step ten times"
        begin = time.monotonic()
        # A large picture takes a while to look at, so it is looked at more rarely.
        if self.step in (1, self.num_steps) or begin > self.shown:
            self.tell(View(text, watched(picture_of())))
            took = time.monotonic() - begin
            self.shown = begin + max(BETWEEN, 4 * took)
        else:
            self.tell(View(text))


def watched(clip: Tensor) -> Image.Image:
    """A clip (C, T, H, W) as it is shown while it is made."""
    stride = max(1, max(clip.shape[-2:]) // WATCHED)  # every pixel of a large one would take longer than a step
    return shown(to_image(clip[:, :1, ::stride, ::stride]), WATCHED)


def _written(
    original: Original, hole: Tensor, painted: Painted, folder: Path, stem: str
) -> tuple[list[Picture], Picture | None]:
    """Samples, the prediction, and how far the samples lie apart."""
    views = {f"sample{i + 1}": sample for i, sample in enumerate(painted.samples)}
    views["prediction"] = painted.prediction
    pictures = []
    for label, clip in views.items():
        made = original.painted(clip, hole)
        file = made.save(folder / f"{stem}_{label}.png")
        pictures.append(Picture(label.replace("sample", "sample "), shown(seen(made)), file))
    if len(painted.samples) == 1:
        return pictures, None
    colours = (heat(painted.disagreement(), FAR_APART)[:, 0] * 255).byte().permute(1, 2, 0).numpy()
    file = save_pixels(folder / f"{stem}_disagreement.png", colours[None])
    return pictures, Picture("disagreement", shown(Image.fromarray(colours)), file)


def why_not_generate(run: Run, runs: list[Run]) -> str | None:
    """A sentence on why a model cannot generate, and what can; None if it can."""
    try:
        check_can_generate(run.model, None, False)
    except ValueError:
        others = [other.name for other in runs if other is not run and why_not_generate(other, []) is None]
        if others:
            return f"{run.name} only repaints. Choose {' or '.join(others)} above to generate."
        return (
            f"{run.name} only repaints. To generate, train a model by `unveil pretrain --recipe umd --data photos/ --out "
            "runs/umd` and `unveil finetune-generator --run runs/umd --data photos/ --out runs/umd-by-class`, and start the "
            "page with `--run runs/umd-by-class`."
        )
    return None


def class_names(run: Run) -> list[str]:
    """What a model's classes are called; empty if it has none."""
    number = run.model.recipe.condition.num_classes
    return [run.about.classes[i] if i < len(run.about.classes) else f"class {i}" for i in range(number)]


@dataclass(frozen=True, kw_only=True)
class Generating:
    """What is asked for on the second tab. label: a class by name, or None for none."""

    label: str | None = None
    number: int = 4
    num_steps: int = 20
    guidance_scale: float = 1.5
    seed: int = 0


def make(run: Run, asked: Generating, folder: Path, tell: Tell) -> tuple[list[Picture], str]:
    """Generate, and tell of each step.

    Returns:
        The pictures and a sentence on them.

    Raises:
        ValueError: a number is out of range, or the model cannot do it.
    """
    model, names = run.model, class_names(run)
    num_steps = _whole_number("Steps", asked.num_steps, 1, MAX_STEPS)
    number = _whole_number("Pictures", asked.number, 1, MAX_MADE)
    seed = _whole_number("Seed", asked.seed, 0, 2**31 - 1)
    if asked.label is not None and asked.label not in names:
        raise ValueError(f"{run.name} has no class of that name. Choose one of its {len(names)}.")
    if not 0 <= asked.guidance_scale <= 20:
        raise ValueError(f"Guidance: {asked.guidance_scale:g} was given; use 0 to 20, where 1 is none.")
    labels = None if asked.label is None else torch.full((number,), names.index(asked.label))
    guided = labels is not None and asked.guidance_scale != 1
    check_can_generate(model, labels, guided)
    assert model.schedule is not None
    begin, step, next_view = time.perf_counter(), 0, 0.0

    def on_step(t: float, tokens: Tensor) -> None:
        nonlocal step, next_view
        step += 1
        text = f"Step {step} of {num_steps}"
        if step < num_steps and time.monotonic() < next_view:
            tell(View(text))
            return
        tell(View(text, side_by_side([to_image(clip) for clip in model.clips(tokens)])))
        next_view = time.monotonic() + BETWEEN

    clips = generate(
        model,
        range(number),
        labels,
        num_steps=num_steps,
        sampler="dpmpp",
        guidance=guidance("constant", asked.guidance_scale, model.schedule.end) if guided else None,
        seed=seed,
        on_step=on_step,
    ).cpu()
    stem = _stem(asked.label or run.name)
    pictures = []
    for i, clip in enumerate(clips):
        image = to_image(clip)
        file = save_pixels(folder / f"{stem}_{i + 1}.png", np.array(image)[None])
        pictures.append(Picture(f"{asked.label or 'picture'} {i + 1}", shown(image), file))
    seconds = time.perf_counter() - begin
    many = f"{number} picture{'s' * (number > 1)}"
    return pictures, f"{many} of {run.side} in {seconds:.1f} s, {num_steps} steps, seed {seed}."


def side_by_side(images: list[Image.Image], columns: int = 4) -> Image.Image:
    """Pictures of one size in rows, enlarged if they are small."""
    images = [shown(image, WATCHED // 2) for image in images]
    width, height = images[0].size
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * (width + 4) - 4, -(-len(images) // columns) * (height + 4) - 4), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + 4), i // columns * (height + 4)))
    return shown(sheet)


@dataclass(frozen=True)
class Neighbour:
    """One of a folder's pictures. similarity: the cosine of the features, at most 1."""

    name: str
    label: str | None
    similarity: float
    view: Image.Image


@dataclass(frozen=True)
class _Known:
    """What is known of the data by one model. indices: of the samples (n,). features: of length 1, (n, D)."""

    samples: Samples
    indices: Tensor
    features: Tensor


class Neighbours:
    """A folder's pictures by their features, computed once for each model, when they are first asked for.

    Args:
        data: as `--data`.
        limit: at most so many pictures, from all over the data.
    """

    def __init__(self, data: str, limit: int, device: str) -> None:
        self.data, self.limit, self.device = data, limit, device
        self._known: dict[str, _Known] = {}

    def find(self, run: Run, original: Original, k: int, tell: Tell) -> list[Neighbour]:
        """The k nearest by cosine, nearest first.

        Raises:
            ValueError: the data cannot be read, or the picture cannot be seen by this model.
        """
        k = _whole_number("Neighbours", k, 1, 48)
        if run.name not in self._known:
            self._known[run.name] = self._look(run, tell)
        known, clip = self._known[run.name], run.model.recipe.clip
        values = fit(original.seen(clip.channels).transpose(0, 1).contiguous(), clip.height, clip.width)
        features = encoder_features(run.model)(to_clips(values[None], self.device), torch.zeros(1, dtype=torch.int64))
        similarity = known.features @ F.normalize(features.float().cpu(), dim=1)[0]
        best = similarity.topk(min(k, len(similarity)))
        source = known.samples.source
        found = []
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            index = int(known.indices[place])
            try:
                picture = source.read(index).values
            except BadPicture:  # it was there before
                continue
            label = source.label(index)
            named = None if label is None or label < 0 or not source.classes else as_text(source.classes[label])
            name = as_text(source.where(index)).rsplit("/", 1)[-1]
            view = shown(to_image(to_clips(picture[None, :1])[0]), SMALL)
            found.append(Neighbour(name, named, value, view))
        return found

    def known(self, run: Run) -> int:
        """How many pictures are searched; 0 before the first time."""
        return len(self._known[run.name].indices) if run.name in self._known else 0

    def _look(self, run: Run, tell: Tell) -> _Known:
        clip = run.model.recipe.clip
        tell(View("Opening the pictures"))
        source = source_for(self.data, clip)
        samples = Samples(source, clip, seed=0, training=None)
        chosen = torch.linspace(0, len(samples) - 1, min(self.limit, len(samples))).round().long().tolist()
        loader = chosen_batches(samples, chosen, 64, 0, 0)
        done = 0

        def on_batch(number: int) -> None:
            nonlocal done
            tell(View(f"Looking at the pictures for the first time: {done:,} of {len(chosen):,}"))
            done += number

        (features,), _, indices = extract(loader, encoder_features(run.model), device=self.device, on_batch=on_batch)
        return _Known(samples, indices, F.normalize(features, dim=1))
