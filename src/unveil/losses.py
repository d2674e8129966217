"""From a batch of clips to a loss: draw, corrupt, predict, score each token, and only then reduce."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unveil import draws
from unveil.config import Recipe
from unveil.corruption import Corrupted, corrupt
from unveil.masking import Mask, draw_mask
from unveil.model import MaskedDiffusionAutoencoder
from unveil.schedule import DiscreteSchedule
from unveil.tokens import patch_norm


@dataclass(frozen=True)
class Draws:
    """Everything random in one training step: the mask, and with noise t (B,) and noise (B, M or V, P)."""

    mask: Mask
    t: Tensor | None
    noise: Tensor | None

    def to(self, device: torch.device | str) -> "Draws":
        t, noise = (None if x is None else x.to(device, non_blocking=True) for x in (self.t, self.noise))
        return Draws(self.mask.to(device), t, noise)


def draw(recipe: Recipe, schedule: DiscreteSchedule | None, seed: int, epoch: int, indices: Sequence[int]) -> Draws:
    """Draws for the samples with these indices. Each depends on (seed, epoch, index) alone, not on the batch."""
    branch, clip = recipe.branch, recipe.clip
    mask = draw_mask(
        branch.masking, [draws.generator(seed, epoch, i, "mask") for i in indices], clip.grid, branch.mask_ratio
    )
    if schedule is None:
        return Draws(mask, None, None)
    carriers = (mask.hidden if branch.noise_on == "hidden" else mask.visible).shape[1]
    t = torch.cat([schedule.sample_t(1, draws.generator(seed, epoch, i, "t")) for i in indices])
    noise = torch.empty(len(indices), carriers, clip.token_dim)
    for row, i in zip(noise, indices, strict=True):
        torch.randn(row.shape, generator=draws.generator(seed, epoch, i, "noise"), out=row)
    return Draws(mask, t, noise)


def target_of(recipe: Recipe, corrupted: Corrupted) -> Tensor:
    """What the scored tokens are compared with, (B, S, P)."""
    if recipe.branch.target == "eps":
        assert corrupted.eps is not None
        return corrupted.eps
    return patch_norm(corrupted.x0) if recipe.branch.patch_norm else corrupted.x0


class Objective(nn.Module):
    """One module whose forward is the whole training step up to the loss, so that it can be wrapped and compiled."""

    def __init__(self, model: MaskedDiffusionAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Score a batch of clips, (B, C, T, H, W) in [0, 1].

        Returns:
            loss: mean over clips, a scalar. It equals sum(token loss) / number of scored tokens, as in MAE.
            per_token: mean squared error of each scored token in normalised values, (B, S), detached.
        """
        model, branch = self.model, self.model.recipe.branch
        c = corrupt(model.tokens(clip), draws.mask, branch.noise_on, draws.t, model.schedule, draws.noise)
        prediction = model(c.x_enc, draws.mask, c.x_dec, draws.t).float()
        per_token = (prediction - target_of(model.recipe, c)).square().mean(-1)
        return per_token.mean(), per_token.detach()
