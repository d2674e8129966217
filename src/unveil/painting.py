"""Painting the holes of a picture or clip of any size with a model of one size."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from unveil import draws
from unveil.config import Clip
from unveil.holes import named_holes, parse_named, strokes
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import SMOOTH_SHARE, Sampler, Step, default_sampler, predict, repaint
from unveil.windows import Region, Windows, regions

FAR_APART = 0.3  # a disagreement, in units of the range, that is shown as the brightest

OnStep = Callable[[float, Callable[[], Tensor]], None]


@dataclass(frozen=True)
class Painted:
    """samples: (S, C, T, H, W). prediction: (C, T, H, W), what one step from the visible pixels gives, a mean. hole: (T, H, W),
    where these differ from the input; larger than the mask if it was feathered, and then weights, (T, H, W), says how much of
    what was painted is shown.

    Values in [0, 1]; pixels outside the hole equal the input.
    """

    samples: Tensor
    prediction: Tensor
    hole: Tensor
    weights: Tensor | None = None

    def disagreement(self) -> Tensor:
        """How far the samples lie apart: their standard deviation as a mean over channels, (T, H, W); 0 of one sample."""
        apart = torch.zeros(self.hole.shape)
        if len(self.samples) > 1 and self.hole.any():
            apart[self.hole] = self.samples[:, :, self.hole].std(0).mean(0)
        return apart


def _bicubic(values: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) to another height and width."""
    flat = values.reshape(-1, 1, *values.shape[-2:])
    resized = F.interpolate(flat, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.reshape(*values.shape[:-2], height, width)


def resize(clips: Tensor, height: int, width: int) -> Tensor:
    """(..., T, H, W) in [0, 1] to another height and width."""
    return _bicubic(clips, height, width).clamp(0, 1)


def resize_hole(hole: Tensor, height: int, width: int) -> Tensor:
    """(T, H, W) bool to another height and width: where it shrinks, any pixel of a hole makes one."""
    H, W = hole.shape[1:]
    smaller = F.adaptive_max_pool2d(hole.float(), (min(H, height), min(W, width)))
    return F.interpolate(smaller[None], (height, width), mode="nearest-exact")[0].bool()


def shrink_around(clips: Tensor, hole: Tensor, height: int, width: int) -> Tensor:
    """`resize`, but from the pixels outside the hole (T, H, W) alone: what lies under a mask must not bleed out of it."""
    known = (~hole).to(clips.dtype)
    weight = _bicubic(known, height, width)
    # where little is known, the pixel lies in the hole and is painted anyway
    return torch.where(weight > 0.4, _bicubic(clips * known, height, width) / weight.clamp(min=0.4), 0.5).clamp(0, 1)


def named_hole(
    clip: Clip, mask: str, index: int, seed: int, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """A hole by name, (T, H, W), of a picture of any size; and if its patches are those of a model of clips like `clip`, the
    hole at that size, for `paint`'s seen.

    Raises:
        ValueError: as `unveil.holes.parse_named`.
    """
    name, share = parse_named(mask)
    if name == "irregular":  # of the picture's own pixels
        return strokes(*shape[1:], share, draws.generator(seed, index, "evaluation mask")).expand(shape), None
    ours = named_holes(clip, mask, [index], seed)
    return F.interpolate(ours.float(), shape[1:], mode="nearest")[0].bool(), ours[0]


def feather_weights(hole: Tensor, width: int) -> Tensor:
    """How much of what is painted is shown, (T, H, W) in [0, 1]: all of it in the hole, and less and less up to `width` pixels
    outside."""
    if width == 0 or not hole.any():
        return hole.float()
    far: Any = [torch.from_numpy(ndimage.distance_transform_edt(~frame)) for frame in hole.numpy()]
    # a frame without a hole is far from any
    near = [(1 - d / (width + 1)).clamp(min=0) if frame.any() else d * 0 for d, frame in zip(far, hole, strict=True)]
    return torch.stack(near).float()


class _Canvas:
    """Several versions of one picture, of which the last is the prediction's, and what of them is not painted yet."""

    def __init__(self, clip: Tensor, hole: Tensor, num_samples: int) -> None:
        self.clips = torch.where(hole, 0.5, clip)[None].repeat(num_samples + 1, 1, 1, 1, 1)
        self.hole = hole.clone()

    def take(self, region: Region) -> tuple[Tensor, Tensor]:
        """A region at the size at which it is painted, (S + 1, C, T, h, w), and its hole (T, h, w)."""
        clips = self.clips[..., region.rows, region.columns]
        hole = self.hole[:, region.rows, region.columns]
        size = region.height, region.width
        if clips.shape[-2:] == size:
            return clips.clone(), hole.clone()
        return shrink_around(clips, hole, *size), resize_hole(hole, *size)

    def put(self, region: Region, painted: Tensor) -> None:
        """Fill the region's hole."""
        self.clips[..., region.rows, region.columns] = self.shown(region, painted)
        self.hole[:, region.rows, region.columns] = False

    def is_known(self, region: Region) -> bool:
        """Whether some pixel of the region is."""
        return not bool(self.hole[:, region.rows, region.columns].all())

    def watched(self, region: Region, clips: Tensor, view: tuple[Any, ...], on_step: OnStep) -> OnStep:
        """What tells of the first sample of a window of a region as `on_step` wants to be told of the whole picture."""

        def picture(made: Tensor) -> Tensor:
            first = clips[:1].clone()
            first[0][view] = made
            whole = self.clips[0].clone()
            whole[..., region.rows, region.columns] = self.shown(region, first)[0]
            return whole

        return lambda t, made: on_step(t, lambda: picture(made()))

    def shown(self, region: Region, painted: Tensor) -> Tensor:
        """The region as it would be with its hole filled."""
        before = self.clips[: len(painted), ..., region.rows, region.columns]
        if painted.shape != before.shape:
            painted = resize(painted, *before.shape[-2:])
        return torch.where(self.hole[:, region.rows, region.columns], painted, before)


@dataclass(frozen=True)
class _Brush:
    """Paints one window after another, each with noise of its own."""

    model: MaskedDiffusionAutoencoder
    num_steps: int
    sampler: Sampler
    smooth_share: float
    seed: int
    index: int
    numbers: "itertools.count[int]" = dataclasses.field(default_factory=itertools.count)

    def paint(self, clips: Tensor, hole: Tensor, on_made: OnStep | None) -> Tensor:
        """Fill one window.

        Args:
            clips: samples and, last, the prediction, (S + 1, C, T, h, w) of the model's size.
            hole: (T, h, w).
            on_made: as `paint`'s on_step, for the window of the first sample, (C, T, h, w).
        """

        def watch(step: Step) -> None:
            if on_made is not None and int(step.samples[0]) == int(step.rows[0]) == 0:
                on_made(step.t, lambda: step.clips()[0].cpu())  # the first sample is the first row

        number = next(self.numbers)
        seed = draws.key(self.seed, "window", self.index, number) if number else self.seed
        device = self.model.mean.device
        clips, holes = clips.to(device), hole.to(device)[None]
        samples, last = clips[:-1], clips[-1:]
        together = bool(
            (samples == samples[:1]).all()
        )  # nothing in sight is painted yet, so one pass of the encoder does
        seen = samples[:1] if together else samples
        painted = repaint(
            self.model,
            seen,
            holes.expand(len(seen), -1, -1, -1),
            num_steps=self.num_steps,
            sampler=self.sampler,
            num_samples=len(samples) if together else 1,
            smooth_share=self.smooth_share,
            seed=seed,
            indices=[self.index] if together else range(len(samples)),
            on_step=None if on_made is None else watch,
        )
        mean = predict(self.model, last, holes, smooth_share=self.smooth_share, seed=seed, indices=[self.index])
        return torch.cat([painted.flatten(0, 1), mean]).cpu()


def paint(
    model: MaskedDiffusionAutoencoder,
    clip: Tensor,
    hole: Tensor,
    *,
    num_steps: int,
    sampler: Sampler | None = None,
    num_samples: int = 1,
    seed: int = 0,
    index: int = 0,
    seen: Tensor | None = None,
    smooth_share: float = SMOOTH_SHARE,
    context: float = 0.5,
    max_scale: float = 4.0,
    feather: int = 0,
    on_step: OnStep | None = None,
) -> Painted:
    """Paint the holes of a picture of any size.

    Args:
        clip: (C, T, H, W) in [0, 1]; T is the model's. What lies under the hole is never read.
        hole: (T, H, W) bool, True = repaint.
        sampler: `unveil.pipeline.default_sampler`'s if none is given.
        num_samples: different answers.
        seed, index: the noise depends on (seed, index, sample) and, after the first window, the window's number alone.
        seen: bring all of the picture to the model's size, whatever its shape, in place of windows around the holes, and hide
            this there, (T, h, w).
        smooth_share: as of `unveil.pipeline.repaint`.
        context, max_scale: as in `unveil.windows.regions`.
        feather: paint so many pixels around the hole too, and blend them into the picture, more and more of it further out.
        on_step: called at each step of the first sample with the time, and a function that gives the picture (C, T, H, W) as it
            would be with the hole filled by what the model then takes it for; grey where it was not painted yet.

    Returns:
        On the CPU.

    Raises:
        ValueError: as `unveil.pipeline.repaint`, and `unveil.windows.regions`.
    """
    if not (context >= 0 and max_scale >= 1):
        raise ValueError(f"context={context:g} must be at least 0, and max_scale={max_scale:g} at least 1.")
    if feather < 0:
        raise ValueError(f"feather={feather} pixels around the hole cannot be blended. Give 0 or more.")
    known = not hole.all()
    weights = feather_weights(hole, feather)
    hole = weights > 0
    sizes = model.recipe.clip
    size = sizes.height, sizes.width
    H, W = clip.shape[-2:]
    if seen is not None:
        parts = [Region(0, 0, H, W, *size)] if hole.any() else []
    else:
        parts = regions(hole.any(0).numpy(), size, context, max_scale)
    canvas = _Canvas(clip, hole, num_samples)
    brush = _Brush(model, num_steps, sampler or default_sampler(model), smooth_share, seed, index)
    for region in parts:
        clips, left = canvas.take(region)
        if seen is not None and feather == 0:  # what brings the hole to this size again may add pixels at its edges
            left = seen.clone()
        if left.all() and canvas.is_known(region):  # what is known is too fine to be seen from afar
            height, width = region.bottom - region.top, region.right - region.left
            region = dataclasses.replace(region, height=max(size[0], height), width=max(size[1], width))
            clips, left = canvas.take(region)
        for window in Windows(left.any(0).numpy(), size):
            if known and left[(..., *window)].all() and "generate" not in model.can:
                raise ValueError(
                    f"With context={context:g} and feather={feather} the model would see nothing but the hole. Give more "
                    "context, or feather less."
                )
            view = (..., *window)
            on_made = None if on_step is None else canvas.watched(region, clips, view, on_step)
            clips[view] = brush.paint(clips[view], left[view], on_made)
            left[view] = False
        canvas.put(region, clips)
    shown = canvas.clips
    if feather:
        shown = torch.where(weights < 1, torch.lerp(clip, shown, weights), shown)
    return Painted(shown[:-1], shown[-1], hole, weights if feather else None)
