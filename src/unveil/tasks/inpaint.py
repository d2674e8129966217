"""Repainting pictures: files and masks in, files out."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from unveil.checkpoint import FromRun, load_model, pick_device, write_atomically
from unveil.data import BadPicture, Source, check_pixels, open_source
from unveil.holes import NAMED_HOLES, masked_view, parse_named
from unveil.mask_files import MaskFolder, MaskPicture, open_masks
from unveil.model import MaskedDiffusionAutoencoder
from unveil.originals import Original, read_original, save_pixels, stem_of
from unveil.painting import FAR_APART, Painted, named_hole, paint, resize, resize_hole
from unveil.pipeline import SMOOTH_SHARE, Sampler, check_can_paint
from unveil.report import contact_sheet, heat, save_png, to_image

CHAIN_SIDE, CHAIN_FRAMES = 320, 60  # of an animation, at most
MUCH = 0.6  # of a picture; who hides more has perhaps taken white for what is kept


@dataclass(frozen=True, kw_only=True)
class Inpaint(FromRun):
    """Repaint parts of pictures by conditional diffusion. Pixels outside the mask are kept exactly as they are, with 16 bits
    and transparency too.

    With a mask of your own, and irregular:, a picture may have any size: the model looks at windows around the holes, at the
    picture's own scale where that shows the hole and its surroundings. A hole that is larger than it can see is painted
    from its edge inwards. For random:, center:, block: and tube:, whose patches are the model's, all of the picture is
    brought to the model's size.

    Example: unveil inpaint --run runs/photos --images holiday.jpg --mask hole.png --out painted
    """

    images: str
    """A picture, a folder of pictures, a parquet file, tar shards, or `digits:test`."""
    out: Path
    """Directory for the results."""
    mask: str = "random:0.75"
    """What to repaint: random:SHARE of the patches, center:SHARE of the area, block:SHARE of it anywhere, irregular:SHARE of
    the pixels as strokes, tube:SHARE of the places in every frame; a picture of the same size that is white where it is to
    be repainted; or a folder of those. Masks of a folder that have names of pictures belong to these; otherwise they are
    taken in turn, and stretched."""
    each_mask: bool = False
    """Repaint every picture with every mask of the folder, in place of one."""
    keep_white: bool = False
    """White in mask pictures is what is kept, and black is repainted."""
    feather: int = 0
    """Blend so many pixels around each hole into what is painted. 0 keeps all of them as they are."""
    context: float = 0.5
    """How much around a hole the model is to see on each side, in units of the hole's longer side."""
    max_scale: float = 4.0
    """How far at most a part of the picture is shrunk so that one window shows it; what needs more is painted by several."""
    smooth_share: float = SMOOTH_SHARE
    """Patches of which a hole takes at most this share are filled smoothly from around it, not painted, as the model paints
    whole patches only. 0 paints all."""
    num_samples: int = 4
    """Different answers for each picture."""
    num_steps: int = 20
    """Sampling steps, at most the schedule's 1000."""
    sampler: Sampler | None = None
    """dpmpp, of second order and deterministic from its first noise; ddim, the same of first order; or ddpm, ancestral.
    Default: dpmpp, but ddpm for models that see noise everywhere (dit, umd), which then take each step ten times."""
    animate: bool = False
    """Also write how the first sample of each picture comes about, step by step, as an animated .gif."""
    limit: int = 16
    """At most this many pictures, from the first on."""
    seed: int = 0
    """Draws random masks and the noise."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def _in_sheet(view: Tensor, side: int) -> Tensor:
    """A picture in the contact sheet, whose longer side is `side` at most."""
    scale = side / max(view.shape[-2:])
    return view if scale >= 1 else resize(view, *(max(1, round(length * scale)) for length in view.shape[-2:]))


class _Chain:
    """The pictures of an animation; every second one is dropped when they get too many."""

    def __init__(self) -> None:
        self._frames: list[Image.Image] = []
        self._seen, self._stride = 0, 1

    def add(self, picture: Callable[[], Tensor]) -> None:
        if self._seen % self._stride == 0:
            self._frames.append(to_image(_in_sheet(picture(), CHAIN_SIDE)))
        if len(self._frames) > CHAIN_FRAMES:
            self._frames, self._stride = self._frames[::2], 2 * self._stride
        self._seen += 1

    def save(self, path: Path, first: Tensor, last: Tensor) -> str:
        """Between two clips that are seen for longer."""
        ends = [to_image(_in_sheet(clip, CHAIN_SIDE)) for clip in (first, last)]
        frames = [ends[0], *self._frames, ends[1]]
        durations = [800, *[100] * len(self._frames), 2000]

        def write(part: Path) -> None:
            frames[0].save(
                part, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, disposal=1
            )

        write_atomically(path, write)
        return str(path)


class _Job:
    """One run of the command: a model, and the masks for its pictures."""

    def __init__(self, options: Inpaint, source: Source, model: MaskedDiffusionAutoencoder) -> None:
        self.options, self.source, self.model = options, source, model
        self.masks: MaskPicture | MaskFolder | None = None
        if options.mask.partition(":")[0] in NAMED_HOLES:
            if parse_named(options.mask)[1] == 1 and "generate" not in model.can:
                raise ValueError(
                    f"--mask {options.mask} hides everything, but this {model.recipe.name} needs some of the picture to go by."
                )
        else:
            self.masks = open_masks(options.mask, None if options.each_mask else source, options.keep_white)
        folder = isinstance(self.masks, MaskFolder)
        if options.each_mask and not folder:
            raise ValueError(f"--each-mask goes with a folder of masks, but --mask is {options.mask!r}.")
        if options.keep_white and self.masks is None:
            raise ValueError(f"--keep-white is about mask pictures, but --mask is {options.mask!r}.")
        self.num_pictures = min(len(source), options.limit)
        self.num_masks = len(self.masks) if options.each_mask and isinstance(self.masks, MaskFolder) else 1

    def read(self, index: int) -> Original:
        """A sample as its file holds it; one that is made and not decoded as it is made."""
        data = self.source.encoded(index)
        if data is not None:
            return read_original(data, self.source.where(index))
        return Original(self.source.read(index).values.permute(0, 2, 3, 1).numpy())

    def hole(self, index: int, number: int, shape: tuple[int, int, int]) -> tuple[str, Tensor, Tensor | None]:
        """The name of a mask of a picture of this shape, its hole (T, H, W), and `paint`'s seen.

        Raises:
            ValueError: they do not fit.
        """
        options, masks, where = self.options, self.masks, self.source.where(index)
        if masks is None:
            return options.mask, *named_hole(self.model.recipe.clip, options.mask, index, options.seed, shape)
        mask = masks
        if isinstance(masks, MaskFolder):
            mask = masks.read(number if options.each_mask else masks.number_for(index, where))
        assert isinstance(mask, MaskPicture)
        hole = mask.hole[None]
        if hole.shape[1:] != shape[1:]:
            if not mask.fits:
                raise ValueError(
                    f"The mask {mask.name} is {hole.shape[2]} x {hole.shape[1]} pixels, but the picture "
                    f"{where} is {shape[2]} x {shape[1]}. Make them the same size."
                )
            hole = resize_hole(hole, *shape[1:])
        if hole.all() and "generate" not in self.model.can:
            raise ValueError(f"The mask {mask.name} hides all of {where}, and nothing is left to go by.")
        return mask.name, hole.expand(shape), None

    def paint(
        self, index: int, clip: Tensor, hole: Tensor, seen: Tensor | None, num_samples: int, chain: _Chain | None
    ) -> Painted:
        options = self.options
        return paint(
            self.model,
            clip,
            hole,
            num_steps=options.num_steps,
            sampler=options.sampler,
            num_samples=num_samples,
            seed=options.seed,
            index=index,
            seen=seen,
            smooth_share=options.smooth_share,
            context=options.context,
            max_scale=options.max_scale,
            feather=options.feather,
            on_step=None if chain is None else lambda t, picture: chain.add(picture),
        )


def _opened(options: Inpaint) -> _Job:
    model, _ = load_model(options.run, pick_device(options.device))
    sizes = model.recipe.clip
    check_pixels(options.images, sizes)
    name = options.images.partition(":")[0]
    exact = (sizes.height, sizes.width) if name in ("moving-digits",) else (None, None)
    source: Source = open_source(options.images, sizes.channels, sizes.frames, *exact)
    for name, number in (("limit", options.limit), ("num-samples", options.num_samples)):
        if number < 1:
            raise ValueError(f"--{name} {number}: ask for at least one.")
    if not 0 <= options.smooth_share <= 1:
        raise ValueError(f"--smooth-share {options.smooth_share}: give a share of a patch, from 0 to 1.")
    check_can_paint(model)
    if model.schedule is not None:
        model.schedule.times(options.num_steps)  # which refuses impossible ones
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file. Name a directory for the results.")
    for what, given in (("pictures", options.images), ("masks", options.mask)):
        folder = Path(given).expanduser().resolve()
        if folder.is_dir() and folder in (options.out.resolve(), *options.out.resolve().parents):
            raise ValueError(
                f"--out {options.out} lies in the folder of {what}, and would be read as one of them. Choose another."
            )
    job = _Job(options, source, model)
    for given in (Path(options.images).expanduser(), Path(options.mask).expanduser()):
        inside = given.is_file() and given.resolve().parent == options.out.resolve()
        if inside and re.search(r"^sheet\.png$|_(masked|prediction|disagreement|chain|sample\d+)\.\w+$", given.name):
            raise ValueError(
                f"{given} lies in --out {options.out} with a name as results have, and might be overwritten. Choose another."
            )
    options.out.mkdir(parents=True, exist_ok=True)
    return job


def _saved(
    out: Path, stem: str, original: Original, clip: Tensor, hole: Tensor, painted: Painted, chain: _Chain | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Write one picture's files; what is to be seen of them, and their paths, by what they are."""
    views = {"masked": masked_view(clip[None], hole[None])[0], "prediction": painted.prediction}
    views |= {f"sample{s + 1}": sample for s, sample in enumerate(painted.samples)}
    files = {}
    for label, view in views.items():
        where = (hole, None) if label == "masked" else (painted.hole, painted.weights)
        files[label] = str(original.painted(view, *where).save(out / f"{stem}_{label}.png"))
    if len(painted.samples) > 1:
        apart = heat(painted.disagreement(), FAR_APART)
        views["disagreement"] = apart
        path = out / f"{stem}_disagreement.png"
        files["disagreement"] = str(save_pixels(path, (apart * 255).byte().permute(1, 2, 3, 0).numpy()))
    if chain is not None:
        files["chain"] = chain.save(out / f"{stem}_chain.gif", views["masked"], painted.samples[0])
    return views, files


def inpaint(options: Inpaint, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil inpaint`; on_progress is told the pictures done and their number, each with every mask.

    Returns:
        "pictures": for each one its name, its mask's, and the files written; "sheet": all of them side by side; "notices".

    Raises:
        ValueError: no picture can be read, the mask does not fit, or the model cannot paint it.
    """
    job = _opened(options)
    model, source = job.model, job.source
    sizes = model.recipe.clip
    notices = [f"Skipped {s.where}: {s.reason}." for s in source.skipped]
    pictures: list[dict[str, Any]] = []
    rows: dict[str, list[Tensor]] = {}
    stems: set[str] = set()
    num_samples = options.num_samples
    if model.schedule is None and num_samples > 1:
        notices.append(f"A {model.recipe.name} has one prediction for a hole, so one sample is painted, in one step.")
        num_samples = 1
    alone = len(source) * job.num_masks == 1
    for index, number in _pairs(job, on_progress):
        where = source.where(index)
        try:
            original = job.read(index)
            clip = original.seen(sizes.channels)
        except BadPicture as bad:
            notices.append(f"Skipped {bad.where}: {bad.reason}.")
            continue
        except ValueError as error:
            notices.append(f"Skipped {where}: {error}")
            continue
        try:
            mask, hole, seen = job.hole(index, number, (clip.shape[1], clip.shape[2], clip.shape[3]))
        except ValueError as error:
            if alone:
                raise
            notices.append(f"Skipped: {error}")
            continue
        notices += [f"{where}: {note}." for note in original.notes]
        share = hole.float().mean().item()
        if share == 0:
            notices.append(f"{where}: the mask hides nothing, so the picture is returned as it is.")
        elif share > MUCH and job.masks is not None and not options.keep_white:
            notices.append(
                f"{where}: the mask hides {share:.0%}. White is repainted; if yours is white where the picture is to be kept, "
                "add --keep-white."
            )
        chain = _Chain() if options.animate else None
        try:
            painted = job.paint(index, clip, hole, seen, num_samples, chain)
        except ValueError as error:
            if alone:
                raise
            notices.append(f"Skipped {where}: {error}")
            continue
        if share and num_samples > 1 and not painted.disagreement().any():
            notices.append(
                f"{where}: the mask takes at most {options.smooth_share:.0%} of the model's patches, so it was filled "
                "smoothly, and the samples are alike. --smooth-share 0 has it painted."
            )
        name = Path(where).with_suffix("").as_posix()
        stem = stem_of(f"{name}_{mask}.png" if options.each_mask else where, stems)
        views, files = _saved(options.out, stem, original, clip, hole, painted, chain)
        pictures.append({"picture": where, "mask": mask, "files": files})
        for label, view in {"picture": clip, **views}.items():
            rows.setdefault(label, []).append(_in_sheet(view, max(96, sizes.height, sizes.width)))
    if not pictures:
        raise ValueError(f"No picture of {options.images} could be repainted. {' '.join(notices)}")
    captions = {
        "prediction": "prediction in one step: the mean of what could be there",
        "masked": f"masked ({options.mask})",
        "disagreement": "how far the samples lie apart, from black to yellow",
    }
    sheet = options.out / "sheet.png"
    save_png(sheet, contact_sheet([(captions.get(label, label), clips) for label, clips in rows.items()]))
    return {"out": str(options.out), "sheet": str(sheet), "pictures": pictures, "notices": notices}


def _pairs(job: _Job, on_progress: Callable[[int, int], None] | None) -> Iterator[tuple[int, int]]:
    """Every picture's index with every mask's number."""
    total = job.num_pictures * job.num_masks
    for done in range(total):
        yield divmod(done, job.num_masks)
        if on_progress is not None:
            on_progress(done + 1, total)
