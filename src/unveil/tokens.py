"""Clips as tokens, and where each token stands.

Shape letters, used everywhere: B batch, C channels, T H W clip, N all tokens, V visible, M hidden, P values per token,
D width, R class tokens, K classes. Tokens are ordered by (time, row, column); the values of one token by
(time, row, column, channel), as in MAE.
"""

import math

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def patchify(clip: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Cut a clip into tokens.

    Args:
        clip: (B, C, T, H, W), each side a multiple of its patch.

    Returns:
        (B, N, P) with P = tubelet_size * patch_size * patch_size * C.
    """
    B, C, T, H, W = clip.shape
    p, u = patch_size, tubelet_size
    assert not (T % u or H % p or W % p), (clip.shape, p, u)
    x = clip.reshape(B, C, T // u, u, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, -1, u * p * p * C)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Put tokens back together: (B, N, P) to (B, C, T, H, W). The exact inverse of `patchify`."""
    B, N, P = tokens.shape
    t, h, w = grid
    p, u = patch_size, tubelet_size
    assert (t * h * w, P % (u * p * p)) == (N, 0), (tokens.shape, grid, p, u)
    x = tokens.reshape(B, t, h, w, u, p, p, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, -1, t * u, h * p, w * p)


def patch_statistics(x0: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each token's values, (B, N, 1) each, as MAE's normalised target has them.

    The variance is the unbiased one, plus 1e-6      He et al. 2022, arXiv 2111.06377, official code
    """
    return x0.mean(-1, keepdim=True), (x0.var(-1, keepdim=True) + 1e-6).sqrt()


def patch_norm(x0: Tensor) -> Tensor:
    """Each token by its own mean and standard deviation; same shape."""
    mean, std = patch_statistics(x0)
    return (x0 - mean) / std


def _sincos(embed_dim: int, positions: Tensor) -> Tensor:
    """[sin | cos] of positions at embed_dim / 2 frequencies from 1 down to about 1/10000; (len, embed_dim), float64."""
    half = embed_dim // 2
    omega = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(positions.double(), omega)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions(embed_dim: int, grid: Grid) -> Tensor:
    """Fixed positions of full width: pos(t, h, w) = pos2d(h, w) + pos1d(t) - pos1d(0).

    pos2d is MAE's table: the first half of the width encodes the column and the second the row. With one frame the
    time term is exactly zero, so the table is MAE's bit for bit.
    # Differs from the usual 3-D table (3/4 of the width for space, 1/4 for time); because that one does not become
    # MAE's at T = 1.

    Returns:
        (N, D) float32, made in float64 and cast once.
    """
    t, h, w = grid
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    space = torch.cat([_sincos(embed_dim // 2, columns.flatten()), _sincos(embed_dim // 2, rows.flatten())], dim=1)
    time = _sincos(embed_dim, torch.arange(t))
    return (space[None] + (time - time[:1])[:, None]).reshape(t * h * w, embed_dim).float()


def rotary_angles(head_dim: int, grid: Grid, theta: float = 100.0) -> Tensor:
    """By how much rotary attention turns each value of a head at each token, (N, head_dim) float64.

    Pairs of values are dealt in turn to the axes that have more than one place (time, row, column), so that a picture
    spends half on rows and half on columns. Values j and j + head_dim / 2 are a pair and have the same angle.
    Our choice: theta = 100, as the axes of a picture have tens of places and not thousands.
    """
    axes = [(axis, size) for axis, size in enumerate(grid) if size > 1] or [(2, 1)]
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid)).reshape(-1, 3)
    half = head_dim // 2
    angles = torch.zeros(len(places), half, dtype=torch.float64)
    for j in range(half):
        axis, _ = axes[j % len(axes)]
        angles[:, j] = places[:, axis] * theta ** -(j // len(axes) / math.ceil(half / len(axes)))
    return torch.cat([angles, angles], dim=1)
