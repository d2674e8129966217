"""Where a model looks in a picture of any size: every hole is seen, with as much around it as there is room for."""

import numpy as np
import pytest

from unveil.windows import Region, next_window, regions


def holes(seed: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A random mask of a picture of any shape, and a model's size."""
    rng = np.random.default_rng(seed)
    hole = np.zeros(rng.integers(3, 300, 2), dtype=bool)
    for _ in range(rng.integers(1, 6)):
        y, x = (rng.integers(0, length) for length in hole.shape)
        hole[y : y + rng.integers(1, 80), x : x + rng.integers(1, 80)] = True
    size = (int(rng.choice([8, 16, 64])), int(rng.choice([8, 16, 64]))) if seed % 2 else (32, 32)
    return hole, size


@pytest.mark.parametrize("seed", range(60))
def test_every_hole_lies_in_a_region_that_is_inside_the_picture(seed: int) -> None:
    hole, size = holes(seed)
    left, most = hole.copy(), 2.0 if seed % 3 else 4.0
    for region in regions(hole, size, max_scale=most):
        assert 0 <= region.top < region.bottom <= hole.shape[0]
        assert 0 <= region.left < region.right <= hole.shape[1]
        assert (region.height, region.width) >= size
        scales = (region.bottom - region.top) / region.height, (region.right - region.left) / region.width
        assert max(scales) <= most + 0.3 * most / min(size)  # sides are whole pixels
        inside = hole[region.rows, region.columns]
        assert inside.any()
        left[region.rows, region.columns] = False
    assert not left.any()


def one(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    hole = np.zeros((height, width), dtype=bool)
    hole[box[0] : box[2], box[1] : box[3]] = True
    return hole


@pytest.mark.parametrize(
    "hole, wanted",
    [
        # small: at the picture's own scale, in the middle of a window
        (one(500, 500, (240, 240, 260, 260)), Region(218, 218, 282, 282, 64, 64)),
        # at the edge: moved inside
        (one(500, 500, (0, 480, 20, 500)), Region(0, 436, 64, 500, 64, 64)),
        # 40 + 2 x 20 of surroundings are 80 pixels, which one window shows shrunk
        (one(500, 500, (200, 200, 240, 240)), Region(180, 180, 260, 260, 64, 64)),
        # too large for one window at half the scale
        (one(500, 500, (100, 100, 300, 300)), Region(36, 36, 364, 364, 164, 164)),
        # a picture smaller than the model's is enlarged
        (one(32, 48, (10, 10, 12, 12)), Region(0, 0, 32, 32, 64, 64)),
        # one of the model's size is seen as it is
        (one(64, 64, (0, 0, 40, 64)), Region(0, 0, 64, 64, 64, 64)),
    ],
)
def test_a_region_shows_the_hole_with_its_surroundings(hole: np.ndarray, wanted: Region) -> None:
    assert regions(hole, (64, 64), max_scale=2) == [wanted]


def test_a_hole_is_shrunk_four_times_at_most() -> None:
    (shown,) = regions(one(500, 500, (200, 200, 300, 320)), (64, 64))
    assert (shown.bottom - shown.top, shown.height) == (240, 64)
    (large,) = regions(one(900, 900, (200, 200, 500, 500)), (64, 64))
    assert (large.bottom - large.top, large.height) == (556, 139)


def test_holes_that_one_window_shows_are_one_region() -> None:
    near = one(500, 500, (100, 100, 104, 104)) | one(500, 500, (130, 130, 134, 134))
    assert len(regions(near, (64, 64))) == 1
    far = one(500, 500, (100, 100, 104, 104)) | one(500, 500, (300, 300, 304, 304))
    assert len(regions(far, (64, 64))) == 2
    assert regions(np.zeros((500, 500), dtype=bool), (64, 64)) == []


def test_a_large_hole_is_filled_from_its_edge_inwards() -> None:
    """Each window sees something that is known, and nothing is left."""
    hole = one(200, 240, (30, 30, 170, 210))
    left, steps = hole.copy(), 0
    shares = []
    while (window := next_window(left, (64, 64))) is not None:
        shares.append(float(1 - left[window].mean()))
        assert left[window].any()
        left[window] = False
        steps += 1
    assert not left.any()
    assert min(shares) >= 0.25
    assert steps <= 40
