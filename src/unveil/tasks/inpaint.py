"""Repainting pictures: files and a mask in, files out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unveil.checkpoint import FromRun, load_model, pick_device
from unveil.config import Clip
from unveil.data import BadPicture, Source, check_pixels, open_source
from unveil.originals import Original, hole_of, read_original, save_pixels
from unveil.painting import paint, resize
from unveil.pipeline import NAMED_MASKS, Sampler, masked_view, named_holes
from unveil.report import contact_sheet, save_png


@dataclass(frozen=True, kw_only=True)
class Inpaint(FromRun):
    """Repaint parts of pictures by conditional diffusion. Pixels outside the mask are kept exactly as they are, with 16 bits
    and transparency too.

    With a mask of your own a picture may have any size: the model looks at windows around the holes, at the picture's own scale
    where that shows the hole and its surroundings. A hole that is larger than it can see is painted from its edge inwards. For
    random:, center: and tube:, whose patches are the model's, all of the picture is brought to the model's size.

    Example: unveil inpaint --run runs/photos --images holiday.jpg --mask hole.png --out painted
    """

    images: str
    """A picture, a folder of pictures, a parquet file, tar shards, or `digits:test`."""
    out: Path
    """Directory for the results."""
    mask: str = "random:0.75"
    """What to repaint: random:SHARE of the patches, center:SHARE of the area, tube:SHARE of the places in every frame, or
    a picture of the same size that is white where it is to be repainted."""
    context: float = 0.5
    """How much around a hole the model is to see on each side, in units of the hole's longer side."""
    max_scale: float = 2.0
    """How far at most a part of the picture is shrunk so that one window shows it; what needs more is painted by several."""
    num_samples: int = 4
    """Different answers for each picture."""
    num_steps: int = 50
    """Sampling steps, at most the schedule's 1000."""
    sampler: Sampler = "ddpm"
    """ddpm, ancestral; ddim, deterministic from its first noise; or dpmpp, the same of second order."""
    limit: int = 16
    """At most this many pictures, from the first on."""
    seed: int = 0
    """Draws random masks and the noise."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def _read_mask(path: str) -> Tensor:
    """A mask picture as (H, W) bool; at least half white is True."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(hole_of(image, f"--mask {path!r}"))
    except FileNotFoundError:
        raise ValueError(
            f"--mask {path!r} is neither random:SHARE, center:SHARE, tube:SHARE, nor a file that exists. "
            "Give one of these, as in random:0.75."
        ) from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"--mask {path!r} cannot be read as a picture ({error}).") from None


def _in_sheet(view: Tensor, side: int) -> Tensor:
    """A picture in the contact sheet, whose longer side is `side` at most."""
    scale = side / max(view.shape[-2:])
    return view if scale >= 1 else resize(view, *(max(1, round(length * scale)) for length in view.shape[-2:]))


def _heat(apart: Tensor) -> Tensor:
    """Deviations (T, H, W) as colours (3, T, H, W): black is 0, and the brightest 0.3 of the range and more."""
    from matplotlib import colormaps  # heavy

    colours = colormaps["inferno"]((apart / 0.3).clamp(0, 1).numpy())[..., :3]
    return torch.from_numpy(colours).permute(3, 0, 1, 2).float()


def _stem(where: str, taken: set[str]) -> str:
    """The name of a picture's files: its own without the extension, unless another picture has that one already."""
    plain = Path(where).with_suffix("").as_posix().replace("/", "_").replace(" ", "_")
    stem, number = plain, 2
    while stem in taken:
        stem, number = f"{plain}_{number}", number + 1
    taken.add(stem)
    return stem


def _hole_of(options: Inpaint, clip: Clip, mask: Tensor | None, index: int, shape: tuple[int, int, int]) -> Tensor:
    """The hole (T, H, W) of a picture of this shape; mask is the user's own, (H, W)."""
    if mask is not None:
        return mask.expand(shape)
    ours = named_holes(clip, options.mask, [index], options.seed).float()
    return F.interpolate(ours, shape[1:], mode="nearest")[0].bool()


def _read(source: Source, index: int) -> Original:
    """A sample as its file holds it; one that is made and not decoded as it is made."""
    data = source.encoded(index)
    if data is not None:
        return read_original(data, source.where(index))
    return Original(source.read(index).values.permute(0, 2, 3, 1).numpy())


def inpaint(options: Inpaint, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil inpaint`; on_progress is told the pictures done and their number.

    Returns:
        "pictures": for each one its name and the files written; "sheet": all of them side by side; "notices".

    Raises:
        ValueError: no picture can be read, the mask does not fit, or the model cannot paint it.
    """
    device = pick_device(options.device)
    model, _ = load_model(options.run, device)
    sizes = model.recipe.clip
    check_pixels(options.images, sizes)
    name = options.images.partition(":")[0]
    exact = (sizes.height, sizes.width) if name in ("moving-digits",) else (None, None)
    source: Source = open_source(options.images, sizes.channels, sizes.frames, *exact)
    if options.limit < 1:
        raise ValueError(f"--limit {options.limit}: ask for at least one picture.")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file. Name a directory for the results.")
    folder = Path(options.images).expanduser().resolve()
    if folder.is_dir() and folder in (options.out.resolve(), *options.out.resolve().parents):
        raise ValueError(
            f"--out {options.out} lies in the folder of pictures, and would be read as one of them. Choose another."
        )
    mask = None if options.mask.partition(":")[0] in NAMED_MASKS else _read_mask(options.mask)
    notices = [f"Skipped {s.where}: {s.reason}." for s in source.skipped]
    pictures: list[dict[str, Any]] = []
    rows: dict[str, list[Tensor]] = {}
    stems: set[str] = set()
    num_samples = options.num_samples
    if model.schedule is None and num_samples > 1:
        notices.append(f"A {model.recipe.name} has one prediction for a hole, so one sample is painted, in one step.")
        num_samples = 1
    for index in range(min(len(source), options.limit)):
        where = source.where(index)
        try:
            original = _read(source, index)
            clip = original.seen(sizes.channels)
        except BadPicture as bad:
            notices.append(f"Skipped {bad.where}: {bad.reason}.")
            continue
        except ValueError as error:
            notices.append(f"Skipped {where}: {error}")
            continue
        notices += [f"{where}: {note}." for note in original.notes]
        shape = clip.shape[1], clip.shape[2], clip.shape[3]
        if mask is not None and mask.shape != clip.shape[2:]:
            mismatch = (
                f"The mask {options.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, but the picture "
                f"{where} is {clip.shape[3]} x {clip.shape[2]}. Make them the same size."
            )
            if len(source) == 1:
                raise ValueError(mismatch)
            notices.append(f"Skipped: {mismatch}")
            continue
        hole = _hole_of(options, sizes, mask, index, shape)
        if not hole.any():
            notices.append(f"{where}: the mask hides nothing, so the picture is returned as it is.")
        painted = paint(
            model,
            clip,
            hole,
            num_steps=options.num_steps,
            sampler=options.sampler,
            num_samples=num_samples,
            seed=options.seed,
            index=index,
            whole=mask is None,
            context=options.context,
            max_scale=options.max_scale,
        )
        views = {"masked": masked_view(clip[None], hole[None])[0], "prediction": painted.prediction}
        views |= {f"sample{s + 1}": sample for s, sample in enumerate(painted.samples)}
        stem = _stem(where, stems)
        files = {
            label: str(original.painted(view, hole).save(options.out / f"{stem}_{label}.png"))
            for label, view in views.items()
        }
        if num_samples > 1:
            apart = _heat(painted.disagreement())
            views["disagreement"] = apart
            path = options.out / f"{stem}_disagreement.png"
            files["disagreement"] = str(save_pixels(path, (apart * 255).byte().permute(1, 2, 3, 0).numpy()))
        if on_progress is not None:
            on_progress(index + 1, min(len(source), options.limit))
        pictures.append({"picture": where, "files": files})
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
