"""Masks: counts, kinds, gather and scatter, pixel masks, rows with unequal counts."""

import pytest
import torch
from small import generator

from unveil.masking import (
    Mask,
    center_tokens,
    draw_mask,
    gather,
    group_rows,
    mask_from_scores,
    random_mask,
    scatter,
    tokens_touched,
    tube_mask,
)


def generators(*seeds: int) -> list[torch.Generator]:
    return [generator(seed) for seed in seeds]


def assert_partition(mask: Mask, num_tokens: int) -> None:
    """Each row holds every token once."""
    rows = torch.cat([mask.visible, mask.hidden], dim=1).sort(dim=1).values
    assert torch.equal(rows, torch.arange(num_tokens).expand(len(rows), -1))


def test_gather_undoes_scatter() -> None:
    tokens, values = torch.randn(2, 9, 5, generator=generator()), torch.randn(2, 4, 5, generator=generator(1))
    mask = random_mask(generators(0, 1), (1, 3, 3), 0.5)
    hidden = mask.hidden[:, :4]
    written = scatter(tokens, hidden, values)
    assert torch.equal(gather(written, hidden), values)
    assert torch.equal(gather(written, mask.visible), gather(tokens, mask.visible))
    assert torch.equal(scatter(tokens, hidden, gather(tokens, hidden)), tokens)
    assert torch.equal(gather(tokens, mask.visible)[1, 2], tokens[1, mask.visible[1, 2]])


def test_scatter_leaves_its_argument_alone() -> None:
    tokens = torch.zeros(1, 3, 2)
    scatter(tokens, torch.tensor([[1]]), torch.ones(1, 1, 2))
    assert torch.equal(tokens, torch.zeros(1, 3, 2))


@pytest.mark.parametrize(
    "grid, ratio, hidden",
    [
        ((1, 14, 14), 0.75, 147),
        ((8, 14, 14), 0.9, 1412),
        ((1, 3, 3), 0.75, 7),
        ((1, 7, 7), 0.75, 37),
        ((1, 4, 4), 1, 16),
        ((1, 16, 16), 0.75, 192),  # UMD's clean branch, its noisy one, and MaskDiT: 64, 160 and 128 stay
        ((1, 16, 16), 0.375, 96),
        ((1, 16, 16), 0.5, 128),
        ((1, 16, 16), 0.0, 0),
    ],
)
def test_random_mask_counts_as_mae(grid: tuple[int, int, int], ratio: float, hidden: int) -> None:
    """int(N * (1 - ratio)) tokens stay visible."""
    mask = random_mask(generators(0, 1, 2), grid, ratio)
    num_tokens = grid[0] * grid[1] * grid[2]
    assert mask.hidden.shape == (3, hidden)
    assert mask.visible.shape == (3, int(num_tokens * (1 - ratio)))
    assert_partition(mask, num_tokens)


def test_mask_from_scores_keeps_the_lowest() -> None:
    mask = mask_from_scores(torch.tensor([[0.4, 0.1, 0.9, 0.2]]), 0.5)
    assert mask.visible.tolist() == [[1, 3]]
    assert mask.hidden.tolist() == [[0, 2]]


@pytest.mark.parametrize("masking", ["random", "tube"])
def test_a_row_depends_on_its_generator_alone(masking: str) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    together = draw_mask(masking, generators(3, 4, 5), (2, 4, 4), 0.75)
    alone = draw_mask(masking, generators(4), (2, 4, 4), 0.75)
    assert torch.equal(together.hidden[1:2], alone.hidden)
    assert torch.equal(together.visible[1:2], alone.visible)
    assert not torch.equal(together.hidden[0], together.hidden[1])
    assert torch.equal(torch.get_rng_state(), state)  # nothing came from the global seed


def test_random_mask_hides_every_token_equally_often() -> None:
    mask = random_mask(generators(*range(2000)), (1, 4, 4), 0.75)
    share = torch.bincount(mask.hidden.flatten(), minlength=16) / 2000
    # five standard deviations of a binomial share
    torch.testing.assert_close(share, torch.full((16,), 0.75), rtol=0, atol=5 * (0.75 * 0.25 / 2000) ** 0.5)


def test_tube_mask_hides_the_same_places_in_every_frame() -> None:
    mask = tube_mask(generators(0, 1), (4, 5, 6), 0.9)
    assert_partition(mask, 120)
    hidden = torch.zeros(2, 120, dtype=torch.bool).scatter(1, mask.hidden, True).reshape(2, 4, 30)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    # int(30 * (1 - 0.9)) is 2 and not 3, in MAE's code too: 1 - 0.9 is a little less than 0.1
    assert hidden.sum((1, 2)).tolist() == [4 * 28, 4 * 28]
    assert not torch.equal(hidden[0], hidden[1])


def test_random_mask_is_no_tube() -> None:
    mask = random_mask(generators(0), (4, 5, 6), 0.5)
    hidden = torch.zeros(1, 120, dtype=torch.bool).scatter(1, mask.hidden, True).reshape(4, 30)
    assert not torch.equal(hidden, hidden[:1].expand_as(hidden))


def test_center_is_the_papers_block() -> None:
    """Pixels 64 to 191 of 256 in patches of 16: rows and columns 4 to 11."""
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:12, 4:12] = True
    assert torch.equal(center_tokens((1, 16, 16), 0.25), expected.flatten())


@pytest.mark.parametrize("grid", [(1, 14, 14), (1, 7, 7), (2, 6, 10), (1, 5, 8)])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.6])
def test_center_is_centred_and_of_about_the_right_size(grid: tuple[int, int, int], ratio: float) -> None:
    block = center_tokens(grid, ratio).reshape(grid)
    assert torch.equal(block, block.flip(1))
    assert torch.equal(block, block.flip(2))
    assert torch.equal(block, block[:1].expand_as(block))
    rows, columns = block[0].any(1).sum().item(), block[0].any(0).sum().item()
    assert block[0].sum() == rows * columns  # a filled rectangle
    assert abs(rows - grid[1] * ratio**0.5) <= 1
    assert abs(columns - grid[2] * ratio**0.5) <= 1


@pytest.mark.parametrize("grid", [(1, 16, 16), (2, 14, 14), (1, 7, 7), (1, 5, 8), (3, 11, 13)])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.6, 1.0])
def test_center_mask_hides_exactly_its_block(grid: tuple[int, int, int], ratio: float) -> None:
    mask = draw_mask("center", generators(0, 1), grid, ratio)
    assert_partition(mask, grid[0] * grid[1] * grid[2])
    hidden = torch.zeros(2, grid[0] * grid[1] * grid[2], dtype=torch.bool).scatter(1, mask.hidden, True)
    assert torch.equal(hidden, center_tokens(grid, ratio).expand(2, -1))


@pytest.mark.parametrize("grid, ratio, word", [((1, 7, 7), 0.75, "all"), ((1, 2, 2), 0.1, "none")])
def test_a_center_on_too_coarse_a_grid_refuses(grid: tuple[int, int, int], ratio: float, word: str) -> None:
    with pytest.raises(ValueError, match=f"would hide {word} of them"):
        center_tokens(grid, ratio)


def test_one_pixel_hides_its_token() -> None:
    pixels = torch.zeros(2, 4, 8, 12, dtype=torch.bool)
    pixels[0, 3, 7, 4] = True  # second tubelet, second row, second column
    touched = tokens_touched(pixels, 4, 2)
    assert touched.shape == (2, 2 * 2 * 3)
    assert touched.nonzero().tolist() == [[0, 1 * 6 + 1 * 3 + 1]]


def test_group_rows_keeps_rows_and_order() -> None:
    hidden = torch.rand(7, 10, generator=generator()) < torch.tensor([0, 0.5, 1, 0.2, 0.5, 0.2, 0.9])[:, None]
    hidden[4] = hidden[1].flip(0)
    groups = group_rows(hidden)
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(7))
    counts = [mask.hidden.shape[1] for _, mask in groups]
    assert len(set(counts)) == len(counts)
    for rows, mask in groups:
        for row, visible, masked in zip(rows, mask.visible, mask.hidden, strict=True):
            assert torch.equal(visible, (~hidden[row]).nonzero().flatten())
            assert torch.equal(masked, hidden[row].nonzero().flatten())


@pytest.mark.parametrize("masking, ratio", [("random", 0.75), ("random", 0.0), ("random", 1.0), ("center", 0.25)])
def test_flags_say_what_is_hidden(masking: str, ratio: float) -> None:
    mask = draw_mask(masking, generators(0, 1, 2), (1, 8, 8), ratio)
    flags = mask.flags()
    assert flags.shape == (3, 64)
    assert flags.dtype == torch.bool
    for row, hidden, visible in zip(flags, mask.hidden, mask.visible, strict=True):
        assert row[hidden].all()
        assert not row[visible].any()
