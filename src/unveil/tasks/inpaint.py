"""Repainting pictures: files and a mask in, files out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unveil.checkpoint import FromRun, load_model, pick_device
from unveil.data import BadPicture, Source, check_pixels, open_source
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import NAMED_MASKS, Sampler, masked_view, named_holes, predict, repaint
from unveil.report import contact_sheet, save_clip, save_png


@dataclass(frozen=True, kw_only=True)
class Inpaint(FromRun):
    """Repaint parts of pictures by conditional diffusion. Pixels outside the mask are kept exactly as they are.

    A picture of another size than the model's is shrunk or enlarged to the model's for painting, and only the repainted
    part is scaled back into it.

    Example: unveil inpaint --run runs/photos --images holiday.jpg --mask hole.png --out painted
    """

    images: str
    """A picture, a folder of pictures, a parquet file, tar shards, or `digits:test`."""
    out: Path
    """Directory for the results."""
    mask: str = "random:0.75"
    """What to repaint: random:SHARE of the patches, center:SHARE of the area, tube:SHARE of the places in every frame, or
    a picture of the same size that is white where it is to be repainted."""
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
            values = torch.from_numpy(np.array(image.convert("L")))
    except FileNotFoundError:
        raise ValueError(
            f"--mask {path!r} is neither random:SHARE, center:SHARE, tube:SHARE, nor a file that exists. "
            "Give one of these, as in random:0.75."
        ) from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"--mask {path!r} cannot be read as a picture ({error}).") from None
    if 0 < values.max() < 128:
        raise ValueError(
            f"--mask {path!r} has no white: its brightest value is {values.max()} of 255. White is repainted."
        )
    return values >= 128


def _resize(clip: Tensor, height: int, width: int) -> Tensor:
    """(C, T, H, W) in [0, 1] to another height and width."""
    frames = clip.transpose(0, 1)
    frames = F.interpolate(frames, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return frames.clamp(0, 1).transpose(0, 1)


def _precision(values: Tensor) -> Callable[[Tensor], Tensor]:
    """The function that brings values in [0, 1] to a picture's own precision, so that it loses nothing: uint8, 16 bits (in
    int32, because torch computes little in uint16), or float32."""
    if values.dtype == torch.uint8:
        return lambda clip: (clip * 255).round().to(torch.uint8)
    steps = values * 65535
    if torch.allclose(steps, steps.round(), rtol=0, atol=0.01):  # float32 holds 16 bits to 0.004 of a step
        return lambda clip: (clip * 65535).round().to(torch.int32)
    return torch.Tensor.float


def _shown(view: Tensor) -> Tensor:
    """Any precision as values in [0, 1]."""
    return view.float() / {torch.uint8: 255, torch.int32: 65535}.get(view.dtype, 1)


def _shrink_around(clip: Tensor, hole: Tensor, height: int, width: int) -> Tensor:
    """`_resize`, but from the pixels outside the hole (T, H, W) alone: what lies under a mask must not bleed out of it."""
    known = (~hole).to(clip.dtype)[None].expand_as(clip)

    def resized(values: Tensor) -> Tensor:
        frames = F.interpolate(
            values.transpose(0, 1), (height, width), mode="bicubic", antialias=True, align_corners=False
        )
        return frames.transpose(0, 1)

    weight = resized(known)
    # where little is known, the pixel lies in the hole and is painted anyway
    return torch.where(weight > 0.4, resized(clip * known) / weight.clamp(min=0.4), 0.5).clamp(0, 1)


def _stem(where: str, taken: set[str]) -> str:
    """The name of a picture's files: its own without the extension, unless another picture has that one already."""
    plain = Path(where).with_suffix("").as_posix().replace("/", "_").replace(" ", "_")
    stem, number = plain, 2
    while stem in taken:
        stem, number = f"{plain}_{number}", number + 1
    taken.add(stem)
    return stem


def _hole_of(
    options: Inpaint, model: MaskedDiffusionAutoencoder, mask: Tensor | None, index: int, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """The hole at the model's size (1, T, H, W) and at the picture's (T, H, W); mask is the user's own, (H, W)."""
    sizes = model.recipe.clip
    T, H, W = shape
    if mask is None:
        ours = named_holes(sizes, options.mask, [index], options.seed)
        return ours, F.interpolate(ours.float(), (H, W), mode="nearest")[0].bool()
    theirs = mask.expand(T, H, W)
    # any painted pixel of the picture must be painted at the model's size too
    small = F.adaptive_max_pool2d(mask[None].float(), (sizes.height, sizes.width)).bool()
    return small.expand(1, T, -1, -1), theirs


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
        try:
            picture = source.read(index)
        except BadPicture as bad:
            notices.append(f"Skipped {bad.where}: {bad.reason}.")
            continue
        if picture.note is not None:
            notices.append(f"{source.where(index)}: {picture.note}.")
        values = picture.values.transpose(0, 1)  # (C, T, H, W)
        stored, clip = _precision(values), _shown(values)
        original = values if values.dtype == torch.uint8 else stored(values)
        if mask is not None and mask.shape != clip.shape[2:]:
            mismatch = (
                f"The mask {options.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, but the picture "
                f"{source.where(index)} is {clip.shape[3]} x {clip.shape[2]}. Make them the same size."
            )
            if len(source) == 1:
                raise ValueError(mismatch)
            notices.append(f"Skipped: {mismatch}")
            continue
        small_hole, hole = _hole_of(options, model, mask, index, clip.shape[1:])
        if not hole.any():
            notices.append(f"{source.where(index)}: the mask hides nothing, so the picture is returned as it is.")
        same = clip.shape[2:] == (sizes.height, sizes.width)
        small = (clip if same else _shrink_around(clip, hole, sizes.height, sizes.width))[None].to(device)
        small_hole = small_hole.to(device)
        painted = repaint(
            model,
            small,
            small_hole,
            num_steps=options.num_steps,
            sampler=options.sampler,
            num_samples=num_samples,
            seed=options.seed,
            indices=[index],
        )[0].cpu()
        mean = predict(model, small, small_hole, seed=options.seed)[0].cpu()
        stem = _stem(source.where(index), stems)
        views = {"masked": stored(masked_view(clip[None], hole[None])[0])}
        for label, made in [("prediction", mean), *((f"sample{s + 1}", painted[s]) for s in range(num_samples))]:
            full = made if same else _resize(made, *clip.shape[2:])
            views[label] = torch.where(hole, stored(full), original)
        files = {}
        for label, view in views.items():
            path = options.out / f"{stem}_{label}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            files[label] = str(save_clip(path, view))
        if on_progress is not None:
            on_progress(index + 1, min(len(source), options.limit))
        pictures.append({"picture": source.where(index), "files": files})
        for label, view in {"picture": original, **views}.items():
            row = _shown(view)
            rows.setdefault(label, []).append(row if same else _resize(row, sizes.height, sizes.width))
    if not pictures:
        raise ValueError(f"No picture of {options.images} could be repainted. {' '.join(notices)}")
    captions = {
        "prediction": "prediction in one step: the mean of what could be there",
        "masked": f"masked ({options.mask})",
    }
    sheet = options.out / "sheet.png"
    save_png(sheet, contact_sheet([(captions.get(label, label), clips) for label, clips in rows.items()]))
    return {"out": str(options.out), "sheet": str(sheet), "pictures": pictures, "notices": notices}
