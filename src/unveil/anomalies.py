"""Where a picture is not what its surroundings let expect: an ensemble of masks, and of answers to each."""

from dataclasses import dataclass

import torch
from scipy import ndimage
from torch import Tensor

from unveil import draws
from unveil.config import Clip
from unveil.holes import pixels_of
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import default_sampler, predict, repaint

# A deviation of the samples, in units of the range, below which they are all as sure. On damaged digits a larger one is
# better, on photos with parts of others a smaller one (results/README.md).
FLOOR = 0.2


def ensemble_holes(clip: Clip, num_masks: int, mask_ratio: float, seed: int) -> Tensor:
    """Masks (K, T, H, W) that hide every token equally often, but for one time, at random otherwise.

    Raises:
        ValueError: there are too few of them to hide every token.
    """
    hidden = round(mask_ratio * clip.num_tokens) if 0 < mask_ratio < 1 else 0  # which refuses nan, too
    if not 0 < hidden < clip.num_tokens or num_masks * hidden < clip.num_tokens:
        raise ValueError(
            f"{num_masks} masks of {mask_ratio:.0%} do not hide each of {clip.num_tokens} patches once while others are seen. "
            "Use more masks, or a share nearer to the model's own."
        )
    order = torch.randperm(clip.num_tokens, generator=draws.generator(seed, "ensemble"))
    flags = torch.zeros(num_masks, clip.num_tokens, dtype=torch.bool)
    for k in range(num_masks):  # a window that goes round the shuffled tokens
        flags[k, order[(torch.arange(hidden) + k * clip.num_tokens // num_masks) % clip.num_tokens]] = True
    return pixels_of(flags, clip.grid, clip.patch_size, clip.tubelet_size)


@torch.inference_mode()
def surprise(
    model: MaskedDiffusionAutoencoder,
    clip: Tensor,
    holes: Tensor,
    *,
    num_samples: int,
    num_steps: int,
    seed: int = 0,
) -> Tensor:
    """How far each pixel lies from what is painted there, in deviations between the samples, squared, as a mean over masks.

    A place that the samples disagree about may look like many things, and is no anomaly because it looks like one of them. With
    one sample, or a model that has one answer, it is the squared error of the prediction in units of FLOOR.

    Args:
        clip: (C, T, H, W) of the model's size, in [0, 1].
        holes: (K, T, H, W), which hide every pixel at least once.

    Returns:
        (T, H, W), at least 0, smoothed over half a patch.
    """
    sizes = model.recipe.clip
    clips = clip[None].expand(len(holes), -1, -1, -1, -1).to(model.mean.device)
    holes = holes.to(clips.device)
    variance = torch.zeros(())
    if num_samples == 1 or model.schedule is None:
        painted = predict(model, clips, holes, seed=seed)
    else:
        samples = repaint(
            model, clips, holes, num_steps=num_steps, sampler=default_sampler(model), num_samples=num_samples, seed=seed
        )
        painted, variance = samples.mean(1), samples.var(1).mean(1)
    apart = (clips - painted).square().mean(1) / (variance + FLOOR**2)
    # what is visible is as it was, and adds nothing
    apart = (apart.sum(0) / holes.sum(0)).cpu().numpy()
    return torch.stack([torch.from_numpy(ndimage.gaussian_filter(frame, sizes.patch_size / 2)) for frame in apart])


@dataclass(frozen=True)
class Usual:
    """What normal pictures show at each place: mean and deviation of their surprise, (T, H, W)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, maps: Tensor) -> "Usual":
        """From maps of normal pictures, (n, T, H, W), n at least 2."""
        std = maps.std(0)
        return cls(maps.mean(0), std + std.mean() / 2 + 1e-6)  # a place that never varied is no reason for alarm

    def excess(self, surprise: Tensor) -> Tensor:
        """A map in deviations above what is usual there."""
        return (surprise - self.mean) / self.std


def picture_score(surprise: Tensor) -> float:
    """One number of a map: the mean of its highest hundredth, at least one pixel of each frame."""
    highest = surprise.flatten(1).topk(max(1, surprise[0].numel() // 100), dim=1).values
    return highest.mean().item()
