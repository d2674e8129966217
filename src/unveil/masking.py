"""Which tokens are visible and which hidden, as two index tensors; class tokens are not in the index space."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from unveil.tokens import Grid


@dataclass(frozen=True)
class Mask:
    """visible (B, V) and hidden (B, M) token indices; together each row holds every token once."""

    visible: Tensor
    hidden: Tensor

    def to(self, device: torch.device | str) -> "Mask":
        return Mask(self.visible.to(device, non_blocking=True), self.hidden.to(device, non_blocking=True))

    def flags(self) -> Tensor:
        """The same as (B, N) bool, True = hidden."""
        num_tokens = self.visible.shape[1] + self.hidden.shape[1]
        flags = torch.zeros(len(self.hidden), num_tokens, dtype=torch.bool, device=self.hidden.device)
        return flags.scatter(1, self.hidden, True)


def gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """Pick tokens by index: (B, N, P) and (B, M) to (B, M, P); of (B * K, M), K rows for each of the tokens'."""
    B, _, P = tokens.shape
    rows = indices.reshape(B, -1, 1).expand(-1, -1, P)
    return tokens.gather(1, rows).reshape(*indices.shape, P)


def scatter(tokens: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """A copy of tokens (B, N, P) with values (B, M, P) written at indices (B, M)."""
    return tokens.scatter(1, indices[..., None].expand_as(values), values)


def mask_from_scores(scores: Tensor, mask_ratio: float) -> Mask:
    """Keep the tokens with the lowest scores, (B, N); int(N * (1 - mask_ratio)) of them, as MAE counts."""
    num_visible = int(scores.shape[1] * (1 - mask_ratio))
    order = scores.argsort(dim=1)
    return Mask(order[:, :num_visible], order[:, num_visible:])


def random_mask(generators: Iterable[torch.Generator], grid: Grid, mask_ratio: float) -> Mask:
    """Uniformly random over space and time; one row for each generator."""
    t, h, w = grid
    return mask_from_scores(torch.stack([torch.rand(t * h * w, generator=g) for g in generators]), mask_ratio)


def tube_mask(generators: Iterable[torch.Generator], grid: Grid, mask_ratio: float) -> Mask:
    """Random in space, the same places hidden in every frame; one row for each generator."""
    t, h, w = grid
    place = mask_from_scores(torch.stack([torch.rand(h * w, generator=g) for g in generators]), mask_ratio)
    frames = torch.arange(t)[:, None] * (h * w)
    visible, hidden = ((p[:, None] + frames).flatten(1) for p in (place.visible, place.hidden))
    return Mask(visible, hidden)


def center_tokens(grid: Grid, mask_ratio: float) -> Tensor:
    """The centre block that hides about mask_ratio of the area in every frame, as (N,) bool, True = hidden.

    Both sides take the same share of the grid and are centred on it exactly; at mask_ratio 0.25 of a 16x16 grid this
    is the paper's 8x8 block.

    Raises:
        ValueError: the grid is too coarse for that share.
    """
    t, h, w = grid

    def span(size: int) -> slice:
        # the same parity as the grid, so that the block can be centred exactly
        length = size - 2 * round((size - size * mask_ratio**0.5) / 2)
        start = (size - length) // 2
        return slice(start, start + length)

    block = torch.zeros(t, h, w, dtype=torch.bool)
    block[:, span(h), span(w)] = True
    if block.any() != (mask_ratio > 0) or block.all() != (mask_ratio == 1):
        raise ValueError(
            f"A centre block of {mask_ratio:.0%} on a grid of {h} x {w} tokens would hide {'all' if block.any() else 'none'} "
            "of them, for it grows on both sides at once. Use another share, or smaller patches."
        )
    return block.flatten()


def draw_mask(masking: str, generators: Iterable[torch.Generator], grid: Grid, mask_ratio: float) -> Mask:
    """One row of the named masking for each generator, drawn from that generator alone."""
    if masking == "random":
        return random_mask(generators, grid, mask_ratio)
    if masking == "tube":
        return tube_mask(generators, grid, mask_ratio)
    assert masking == "center", masking
    hidden = center_tokens(grid, mask_ratio).expand(sum(1 for _ in generators), -1)
    ((_, mask),) = group_rows(hidden)
    return mask


def num_decoded(num_hidden: int, share: float) -> int:
    """How many of a clip's hidden tokens are decoded, if only a share of them is."""
    return max(1, round(num_hidden * share))


def tokens_touched(pixels: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Which tokens a pixel mask hides: a token is hidden if any of its pixels is.

    Args:
        pixels: (B, T, H, W) bool, True = to be painted.

    Returns:
        (B, N) bool, True = hidden.
    """
    B, T, H, W = pixels.shape
    p, u = patch_size, tubelet_size
    blocks = pixels.reshape(B, T // u, u, H // p, p, W // p, p)
    return blocks.any(6).any(4).any(2).flatten(1)


def group_rows(hidden: Tensor) -> list[tuple[Tensor, Mask]]:
    """Sort rows with unequal numbers of hidden tokens into batches of equal ones, instead of padding.

    Args:
        hidden: (B, N) bool, True = hidden.

    Returns:
        (rows, mask) for each count that occurs: rows (b,) index into the batch, and their mask of b rows.
    """
    counts = hidden.sum(1)
    order = hidden.to(torch.int8).argsort(dim=1, stable=True)  # visible first, each part in grid order
    groups = []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().flatten()
        num_visible = hidden.shape[1] - count
        groups.append((rows, Mask(order[rows, :num_visible], order[rows, num_visible:])))
    return groups
