"""Holes by name, and masks from files: what is white is repainted, and which mask belongs to which picture."""

import pytest
import torch
from scipy import ndimage
from small import build, generator, small

from unveil.holes import named_holes, parse_named, strokes
from unveil.painting import feather_weights, paint
from unveil.pipeline import default_sampler

CLIP = small().clip  # 16 x 16 pixels in patches of 4


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [(64, 64), (30, 200), (1500, 900)])
def test_strokes_cover_a_share_and_are_connected(size: tuple[int, int], share: float) -> None:
    """No dust: every part is a stroke, which is at least as wide as a thirtieth of the shorter side."""
    hole = strokes(*size, share, generator(3))
    assert hole.shape == size
    assert share <= hole.float().mean() <= share + 0.09
    _, parts = ndimage.label(hole.numpy())
    assert parts <= 40
    assert torch.equal(hole, strokes(*size, share, generator(3)))
    assert not torch.equal(hole, strokes(*size, share, generator(4)))


@pytest.mark.parametrize("name", ["random", "center", "block", "irregular", "tube"])
def test_named_holes_depend_on_the_seed_and_the_index_alone(name: str) -> None:
    holes = named_holes(CLIP, f"{name}:0.25", [0, 1, 2, 3, 4, 5], seed=0)
    assert holes.shape == (6, 1, 16, 16)
    assert torch.equal(named_holes(CLIP, f"{name}:0.25", [4], seed=0), holes[4:5])
    if name != "center":
        assert len({hole.numpy().tobytes() for hole in holes}) > 1
        assert not torch.equal(named_holes(CLIP, f"{name}:0.25", range(6), seed=1), holes)
    for share in (0, 1):
        assert (named_holes(CLIP, f"{name}:{share}", [0], seed=0) == bool(share)).all()


def test_a_block_is_one_rectangle_of_patches_anywhere() -> None:
    holes = named_holes(CLIP, "block:0.25", range(60), seed=0)
    patches = holes.reshape(60, 4, 4, 4, 4)
    assert (patches.any(4).any(2) == patches.all(4).all(2)).all()
    corners = set()
    for hole in patches[:, :, 0, :, 0]:
        rows, columns = hole.nonzero().T
        assert len(rows) == 4
        assert rows.max() - rows.min() == columns.max() - columns.min() == 1
        corners.add((int(rows.min()), int(columns.min())))
    assert len(corners) == 9


@pytest.mark.parametrize("text, message", [("wave:0.5", "The mask 'wave:0.5' is unknown"), ("block:2", "from 0 to 1"),
                                           ("irregular:nan", "from 0 to 1"), ("center:a", "from 0 to 1")])  # fmt: skip
def test_wrong_words_refuse(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_named(text)


def test_feather_weights_fall_with_the_distance() -> None:
    hole = torch.zeros(2, 9, 9, dtype=torch.bool)
    hole[0, 4, 4] = True
    weights = feather_weights(hole, 3)
    assert torch.allclose(weights[0, 4], torch.tensor([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]))
    assert weights[0, 0, 0] == 0
    assert not weights[1].any()  # a frame without a hole stays as it is
    assert torch.equal(feather_weights(hole, 0), hole.float())


def test_feathering_blends_around_the_hole_and_keeps_what_is_further_out() -> None:
    model, clip = build(small()), torch.rand(3, 1, 16, 16, generator=generator())
    hole = torch.zeros(1, 16, 16, dtype=torch.bool)
    hole[:, 6:10, 6:10] = True
    plain = paint(model, clip, hole, num_steps=2)
    soft = paint(model, clip, hole, num_steps=2, feather=2)
    ring = soft.hole & ~hole
    assert torch.equal(plain.hole, hole)
    assert ring.sum() == 48
    assert torch.equal(soft.samples[0][:, ~soft.hole], clip[:, ~soft.hole])
    assert (soft.samples[0][:, ring] != clip[:, ring]).any()
    hard = paint(model, clip, soft.hole, num_steps=2).samples[0]
    weights = feather_weights(hole, 2)
    assert torch.allclose(soft.samples[0], weights * hard + (1 - weights) * clip, atol=1e-6)
    with pytest.raises(ValueError, match="feather=-1"):
        paint(model, clip, hole, num_steps=2, feather=-1)


def test_models_that_see_noise_everywhere_are_resampled() -> None:
    assert default_sampler(build(small())) == "dpmpp"
    assert default_sampler(build(small("dit"))) == "ddpm"
