"""What a masked step costs by arithmetic: multiply-adds of every matrix product, counted from the recipe alone."""

from dataclasses import dataclass

import torch

from unveil.config import Branch, Condition, Network
from unveil.layers import FREQUENCY_DIM, swiglu_dim
from unveil.masking import draw_mask, num_decoded
from unveil.recipe import Recipe


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


def _blocks(depth: int, length: int, width: int, network: Network, told: Condition, cond_dim: int) -> int:
    """Multiply-adds of plain blocks over this many tokens, with what the condition adds to each."""
    adaln = 6 * cond_dim * width if told.time == "adaln" else 0
    length += told.time == "token"
    hidden = swiglu_dim(width) if network.mlp == "swiglu" else 4 * width
    mlp = (3 if network.mlp == "swiglu" else 2) * length * width * hidden
    return depth * (_self_attention(length, width) + mlp + adaln)


def _self_attention(length: int, width: int) -> int:
    return 4 * length * width**2 + 2 * length**2 * width


def _condition(told: Condition, width: int, labelled: bool) -> int:
    """Of one clip's time and class; a class goes through a trunk of its own only if the trunk is wide."""
    if told.time == "none":
        return 0
    if told.trunk == "plain":
        return FREQUENCY_DIM * width + width**2
    return (2 if labelled else 1) * 4 * width**2


def _encoder(recipe: Recipe, num_tokens: int) -> int:
    """Multiply-adds of the encoder's blocks over this many tokens and its own."""
    e, told = recipe.encoder, recipe.condition
    length, in_encoder = e.num_class_tokens + num_tokens, told if recipe.time_in_encoder else Condition()
    joined = told.label_tokens if told.num_classes else 0
    before = told.label_tokens_from - 1 if joined else 0
    return _blocks(before, length, e.embed_dim, recipe.network, in_encoder, e.embed_dim) + _blocks(
        e.depth - before, length + joined, e.embed_dim, recipe.network, in_encoder, e.embed_dim
    )


def encode_cost(recipe: Recipe) -> Cost:
    """Of one whole clip through the encoder, as for features and recognition."""
    N, P, e, told = recipe.clip.num_tokens, recipe.clip.token_dim, recipe.encoder, recipe.condition
    condition = _condition(told, e.embed_dim, told.num_classes > 0) if recipe.time_in_encoder else 0
    return Cost(N * P * e.embed_dim + condition, _encoder(recipe, N), 0)


def branch_cost(recipe: Recipe, branch: Branch) -> Cost:
    """Of one clip of one branch."""
    mask = draw_mask(branch.masking, [torch.Generator()], recipe.clip.grid, branch.mask_ratio)
    V, M, P = mask.visible.shape[1], mask.hidden.shape[1], recipe.clip.token_dim
    e, d, network, told = recipe.encoder, recipe.decoder, recipe.network, recipe.condition
    R = e.num_class_tokens
    cond_dim = e.embed_dim if recipe.time_in_encoder or d is None else d.embed_dim
    adaln = told.time == "adaln"
    labelled = told.num_classes > 0
    embed = V * P * e.embed_dim + branch.num_draws * _condition(told, cond_dim, labelled)
    encoder = _encoder(recipe, V)
    scored = sum({"visible": V, "hidden": M}[where] for where in {term.on for term in branch.terms})
    D = d.embed_dim if d else e.embed_dim
    head = len(recipe.heads) * scored * D * P
    if adaln:  # its modulation is made anew for visible and for hidden tokens
        head += len({term.on for term in branch.terms}) * 2 * cond_dim * D
    if d is None:
        return Cost(embed, encoder, head)
    decoder = head
    draws = branch.num_draws
    if branch.decode_share < 1:
        decoder, M = decoder * num_decoded(M, branch.decode_share) // M, num_decoded(M, branch.decode_share)
    decoder *= draws
    if branch.noise_on == "hidden":
        embed += draws * M * P * D
    if d.kind == "joint":
        if e.embed_dim != D:
            decoder += (R + V) * e.embed_dim * D + (2 * cond_dim * e.embed_dim if adaln else 0)
        summary = R if d.summary == "tokens" else 1
        decoder += draws * _blocks(d.depth, summary + V + M, D, network, told, cond_dim)
    else:
        cross = 2 * M * D**2 + 2 * M * (R + V) * D
        inner = _self_attention(M, D) if d.kind == "cross_self" else 0
        keys_values = 2 * (R + V) * e.embed_dim * D  # once for all draws
        decoder += d.depth * (keys_values + draws * (cross + inner + 8 * M * D**2))
    return Cost(embed, encoder, decoder)


def masked_step(recipe: Recipe) -> Cost:
    """Multiply-adds of the forward pass of one clip of a training step, the mean over branches by their shares.

    Norms, softmax and activations are not counted.
    """
    costs = [(branch.share, branch_cost(recipe, branch)) for branch in recipe.branches]
    return Cost(
        *(
            round(sum(share * getattr(cost, stage) for share, cost in costs))
            for stage in ("embed", "encoder", "decoder")
        )
    )
