"""Repainting: clips and a mask in, clips out, for the command line, the contact sheet and every evaluation."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from unveil import draws
from unveil.config import Clip, check_choice, nearest
from unveil.masking import draw_mask, gather, group_rows, scatter, tokens_touched
from unveil.model import MaskedDiffusionAutoencoder
from unveil.sampling import ddim, ddpm
from unveil.tokens import Grid, patchify

Sampler = Literal["ddpm", "ddim"]


class RowNoise:
    """Standard normal noise of (B, ...) in which row i of sample s depends on (seed, indices[i], s) alone, not on the batch."""

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        self._seed, self._indices = seed, indices
        self.begin(0)

    def begin(self, sample: int) -> None:
        """Start the streams of another sample."""
        self._generators = [draws.generator(self._seed, i, sample, "sample") for i in self._indices]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in self._generators]).to(x)


def _check_can_paint(model: MaskedDiffusionAutoencoder, hidden: Tensor) -> None:
    """Refuse what the model was not trained for; hidden is (B, N)."""
    name, branch = model.recipe.name, model.recipe.branch
    if branch.patch_norm:
        raise ValueError(
            f"This {name} predicts patch-normalised values, whose brightness and contrast are unknown, so it cannot paint. "
            "Pre-train mae_raw or diffmae to repaint."
        )
    whole, untouched = hidden.all(1), ~hidden.any(1)
    if whole.any() and "generate" not in model.can:
        raise ValueError(
            f"The mask hides everything, but this {name} was trained with {branch.mask_ratio:.0%} hidden and needs some of "
            "the picture to go by. Leave at least one whole patch visible."
        )
    if "repaint" not in model.can and not (whole | untouched).all():
        raise ValueError(
            f"This {name} was trained with mask_ratio={branch.mask_ratio:g}: it makes whole pictures and cannot go by a "
            "visible part. Hide everything, or use a model whose mask ratio lies between 0 and 1."
        )


@torch.inference_mode()
def repaint(
    model: MaskedDiffusionAutoencoder,
    clips: Tensor,
    holes: Tensor,
    *,
    num_steps: int,
    sampler: Sampler = "ddpm",
    num_samples: int = 1,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    reimpose_known: bool = True,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Fill the holes of clips by conditional diffusion. The encoder runs once for each clip.

    With num_steps=1 and "ddim" it is the single prediction at t = T, the mean of what could be there. A model without
    noise (MAE) has only that one prediction.

    Args:
        clips: (B, C, T, H, W) in [0, 1]. What lies under a hole is never read.
        holes: (B, T, H, W) bool, True = repaint. A token is hidden if any of its pixels is.
        num_samples: different answers for each hole.
        seed, indices: noise of clip i and sample s depends on (seed, indices[i], s) alone; indices are 0, 1, ... if not given.
        reimpose_known: tell the sampler the known pixels inside hidden tokens at every step.
        on_step: called with (t, predictions of the group's hidden tokens) at each step.

    Returns:
        (B, num_samples, C, T, H, W); pixels outside the holes equal the input bit for bit.

    Raises:
        ValueError: the mask does not fit the clips, or asks for what the model was not trained to do.
    """
    sizes = model.recipe.clip
    check_choice("repaint", "sampler", sampler, Sampler)
    if holes.shape != (len(clips), *clips.shape[2:]) or holes.dtype != torch.bool:
        raise ValueError(
            f"The mask is {tuple(holes.shape)} of {holes.dtype} for clips of {tuple(clips.shape)}; give "
            f"{(len(clips), *clips.shape[2:])} of torch.bool, True where the picture is to be repainted."
        )
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; ask for at least 1.")
    hole_values = patchify(holes[:, None].expand(-1, sizes.channels, -1, -1, -1), sizes.patch_size, sizes.tubelet_size)
    # what is under a hole must not matter, not even through a hidden token's own values
    x0 = model.tokens(clips).masked_fill(hole_values, 0.0)
    hidden = tokens_touched(holes, sizes.patch_size, sizes.tubelet_size)
    _check_can_paint(model, hidden)
    times = model.schedule.times(num_steps) if model.schedule else []
    result = clips[:, None].repeat(1, num_samples, 1, 1, 1, 1)
    for rows, mask in group_rows(hidden.cpu()):
        if mask.hidden.shape[1] == 0:
            continue
        rows, mask = rows.to(clips.device), mask.to(clips.device)
        known = ~gather(hole_values[rows], mask.hidden)
        known = known if reimpose_known and known.any() else None
        noise = RowNoise(seed, [i if indices is None else indices[i] for i in rows.tolist()])
        denoise = model.denoiser(x0[rows], mask, known, noise)
        step = None if on_step is None else lambda t, x_t, x0: on_step(t, x0)
        for sample in range(num_samples):
            noise.begin(sample)
            start = noise(gather(x0[rows], mask.hidden))
            if model.schedule is None:
                painted = denoise(start, 0)
            elif sampler == "ddpm":
                painted = ddpm(denoise, start, model.schedule, times, noise, step)
            else:
                painted = ddim(denoise, start, model.schedule, times, step)
            pixels = model.pixels(scatter(x0[rows], mask.hidden, painted)).clamp(0, 1)
            result[rows, sample] = torch.where(holes[rows][:, None], pixels, clips[rows])
    return result


NAMED_MASKS = {"random": 0.75, "center": 0.25, "tube": 0.75}


def named_holes(clip: Clip, mask: str, indices: Sequence[int], seed: int) -> Tensor:
    """The holes that a word and a share name, for the clips with these indices, as pixels (B, T, H, W).

    Args:
        mask: random:SHARE of the tokens, center:SHARE of the area, or tube:SHARE of the places in every frame; without a
            share, the usual one. The holes of a clip depend on (seed, its index) alone.

    Raises:
        ValueError: the word is unknown, or the share is no number from 0 to 1.
    """
    name, _, share = mask.partition(":")
    if name not in NAMED_MASKS:
        raise ValueError(
            f"The mask {mask!r} is unknown: name one with its share, as random:0.75. {nearest(name, NAMED_MASKS)}"
        )
    try:
        value = float(share) if share else NAMED_MASKS[name]
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"The mask {mask!r} needs a share from 0 to 1, as in {name}:{NAMED_MASKS[name]}.")
    drawn = draw_mask(name, [draws.generator(seed, i, "evaluation mask") for i in indices], clip.grid, value)
    return pixels_of(drawn.flags(), clip.grid, clip.patch_size, clip.tubelet_size)


def predict(model: MaskedDiffusionAutoencoder, clips: Tensor, holes: Tensor, *, seed: int = 0) -> Tensor:
    """The single prediction at t = T, (B, C, T, H, W): a mean, so blurry, and the best in decibels."""
    return repaint(model, clips, holes, num_steps=1, sampler="ddim", seed=seed)[:, 0]


def masked_view(clips: Tensor, holes: Tensor, gray: float = 0.5) -> Tensor:
    """The clips with gray where they are hidden, for people to see."""
    return torch.where(holes[:, None], torch.full_like(clips, gray), clips)


def pixels_of(hidden: Tensor, grid: Grid, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Hidden tokens (B, N) bool as the pixel mask (B, T, H, W) that they cover."""
    blocks = hidden.reshape(len(hidden), *grid)
    for dim, size in ((1, tubelet_size), (2, patch_size), (3, patch_size)):
        blocks = blocks.repeat_interleave(size, dim)
    return blocks
