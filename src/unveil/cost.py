"""What a masked step costs by arithmetic: multiply-adds of every matrix product, counted from the recipe alone."""

from dataclasses import dataclass

import torch

from unveil.config import Recipe
from unveil.masking import draw_mask

FREQUENCY_DIM = 256


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one clip's forward pass by stage. A training step costs about three forward passes."""

    embed: int
    encoder: int
    decoder: int

    @property
    def forward(self) -> int:
        return self.embed + self.encoder + self.decoder

    @property
    def train_flops(self) -> int:
        """Floating-point operations of one clip in a training step: 2 for a multiply-add, backward twice the forward."""
        return 6 * self.forward


def _mlp(length: int, width: int) -> int:
    return 2 * length * width * 4 * width


def _self_attention(length: int, width: int) -> int:
    return 4 * length * width**2 + 2 * length**2 * width


def masked_step(recipe: Recipe) -> Cost:
    """Multiply-adds of the forward pass of one clip of a training step; norms, softmax and GELU are not counted."""
    branch = recipe.branch
    mask = draw_mask(branch.masking, [torch.Generator()], recipe.clip.grid, branch.mask_ratio)
    V, M, P = mask.visible.shape[1], mask.hidden.shape[1], recipe.clip.token_dim
    e, d = recipe.encoder, recipe.decoder

    def time_embedding(width: int) -> int:
        return FREQUENCY_DIM * width + width**2

    embed = V * P * e.embed_dim
    encoder = e.depth * (_self_attention(V + 1, e.embed_dim) + _mlp(V + 1, e.embed_dim))
    if d is None:
        return Cost(embed + time_embedding(e.embed_dim), encoder, V * e.embed_dim * P)
    D = d.embed_dim
    decoder = M * D * P  # the head
    if recipe.branch.noise_on == "hidden":
        embed += M * P * D + time_embedding(D)
    if d.kind == "joint":
        # the head reads hidden tokens only, the blocks run on all of them
        L = V + 1 + M
        decoder += (V + 1) * e.embed_dim * D + d.depth * (_self_attention(L, D) + _mlp(L, D))
    else:
        cross = 2 * M * D**2 + 2 * (V + 1) * e.embed_dim * D + 2 * M * (V + 1) * D
        inner = _self_attention(M, D) if d.kind == "cross_self" else 0
        decoder += d.depth * (cross + inner + _mlp(M, D))
    return Cost(embed, encoder, decoder)
