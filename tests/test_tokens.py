"""Tokens: cutting and joining, patch norm, positions."""

import numpy as np
import pytest
import torch
from small import generator
from torch.testing import assert_close

from unveil.tokens import patch_norm, patch_statistics, patchify, rotary_angles, sincos_positions, unpatchify

SHAPES = [  # channels, frames, height, width, patch, tubelet
    (3, 1, 32, 32, 8, 1),
    (1, 1, 28, 28, 7, 1),
    (3, 4, 8, 24, 4, 2),
    (2, 6, 12, 4, 4, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_unpatchify_undoes_patchify(shape: tuple[int, ...]) -> None:
    C, T, H, W, p, u = shape
    clip = torch.randn(2, C, T, H, W, generator=generator())
    tokens = patchify(clip, p, u)
    assert tokens.shape == (2, T // u * (H // p) * (W // p), u * p * p * C)
    assert torch.equal(unpatchify(tokens, (T // u, H // p, W // p), p, u), clip)


@pytest.mark.parametrize("shape", SHAPES)
def test_patchify_orders_tokens_and_their_values(shape: tuple[int, ...]) -> None:
    """Tokens by (time, row, column), values by (time, row, column, channel): cut out one by one, by hand."""
    C, T, H, W, p, u = shape
    clip = torch.randn(1, C, T, H, W, generator=generator())
    expected = [
        clip[0, :, t : t + u, y : y + p, x : x + p].permute(1, 2, 3, 0).flatten()
        for t in range(0, T, u)
        for y in range(0, H, p)
        for x in range(0, W, p)
    ]
    assert torch.equal(patchify(clip, p, u)[0], torch.stack(expected))


def test_noise_commutes_with_patchify() -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 8, 16, generator=generator()).unbind()
    assert torch.equal(patchify(0.6 * x0 + 0.8 * eps, 4, 2), 0.6 * patchify(x0, 4, 2) + 0.8 * patchify(eps, 4, 2))


def test_patch_norm_is_unbiased_variance_plus_1e6() -> None:
    x0 = torch.randn(2, 5, 12, dtype=torch.float64, generator=generator()) * 3 + 1
    x0[0, 0] = 0.25  # a flat patch: only the 1e-6 keeps it finite
    values = x0.numpy()
    expected = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True, ddof=1) + 1e-6)
    assert_close(patch_norm(x0), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)
    mean, std = patch_statistics(x0)
    assert_close(patch_norm(x0) * std + mean, x0, rtol=1e-10, atol=1e-10)


def mae_table(embed_dim: int, rows: int, columns: int) -> np.ndarray:
    """MAE's 2-D table from its description, in float64: half of the width for the column, then half for the row."""

    def one_axis(positions: np.ndarray) -> np.ndarray:
        quarter = embed_dim // 4
        omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / (embed_dim / 4))
        angles = np.einsum("n,d->nd", positions.astype(np.float64), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    x, y = np.meshgrid(np.arange(columns), np.arange(rows))  # x is the column
    return np.concatenate([one_axis(x.reshape(-1)), one_axis(y.reshape(-1))], axis=1)


@pytest.mark.parametrize("embed_dim, rows, columns", [(768, 14, 14), (512, 16, 16), (32, 3, 7), (16, 7, 2), (4, 1, 5)])
def test_positions_of_one_frame_are_maes(embed_dim: int, rows: int, columns: int) -> None:
    expected = torch.from_numpy(mae_table(embed_dim, rows, columns).astype(np.float32))
    assert torch.equal(sincos_positions(embed_dim, (1, rows, columns)), expected)


def test_positions_of_a_clip_add_up() -> None:
    """pos(t, h, w) - pos(0, h, w) is the same at every place, and zero at t = 0."""
    clip = sincos_positions(32, (5, 3, 4)).reshape(5, 12, 32)
    assert torch.equal(clip[0], sincos_positions(32, (1, 3, 4)))
    time = (clip - clip[:1]).double()
    assert_close(time, time[:, :1].expand_as(time), rtol=0, atol=1e-6)
    omega = 1 / 10000 ** (torch.arange(16, dtype=torch.float64) / 16)
    angles = torch.arange(5)[:, None] * omega
    expected = torch.cat([angles.sin(), angles.cos() - 1], dim=1)
    assert_close(time[:, 0], expected, rtol=0, atol=1e-6)


def test_every_place_of_a_clip_is_told_apart() -> None:
    table = sincos_positions(32, (4, 5, 6)).double()
    distances = torch.cdist(table, table) + torch.eye(len(table)) * 10
    assert distances.min() > 0.1


@pytest.mark.parametrize(
    "head_dim, grid",
    [(64, (1, 16, 16)), (8, (1, 4, 4)), (8, (2, 4, 4)), (12, (3, 2, 5)), (4, (1, 1, 6)), (4, (1, 1, 1))],
)
def test_rotary_angles_by_hand(head_dim: int, grid: tuple[int, int, int]) -> None:
    """Pair j turns by the place along axis j mod A, of the A with more than one place, times 100 ** -(j // A / pairs of it)."""
    angles = rotary_angles(head_dim, grid)
    assert angles.shape == (grid[0] * grid[1] * grid[2], head_dim)
    assert angles.dtype == torch.float64
    axes = [axis for axis in range(3) if grid[axis] > 1] or [2]
    half = head_dim // 2
    each = -(-half // len(axes))
    expected = [
        [place[axes[pair % len(axes)]] / 100 ** (pair // len(axes) / each) for pair in [*range(half), *range(half)]]
        for place in np.ndindex(*grid)
    ]
    assert_close(angles, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    if grid[0] == 1 and len(axes) == 2:  # a picture: half of the pairs for rows and half for columns
        moves_by_row = (angles.reshape(*grid, -1)[0, 1, 0, :half] != 0).sum()
        assert moves_by_row == half // 2


def test_time_is_rotated_alike_at_every_place() -> None:
    """And the first frame of a clip not at all."""
    clip = rotary_angles(12, (3, 4, 5)).reshape(3, 20, 12)
    time = clip - clip[:1]
    assert torch.equal(time, time[:, :1].expand_as(time))
    assert (time[1:] != 0).any()
    assert (clip[0, 0] == 0).all()


def test_no_two_places_are_rotated_alike() -> None:
    for grid in ((1, 16, 16), (8, 16, 16)):
        angles = rotary_angles(64, grid)
        table = torch.cat([angles.cos(), angles.sin()], dim=1)
        distances = torch.cdist(table, table) + torch.eye(len(table)) * 10
        assert distances.min() > 0.1
