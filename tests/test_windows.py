"""Where a model looks in a picture of any size: every hole is seen, with as much around it as there is room for."""

import time

import numpy as np
import pytest
from scipy import ndimage

from unveil import windows
from unveil.windows import MOST_ADDED, Region, Windows, num_parts, regions


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
    for window in Windows(hole, (64, 64)):
        shares.append(float(1 - left[window].mean()))
        assert left[window].any()
        left[window] = False
        steps += 1
    assert not left.any()
    assert min(shares) >= 0.25
    assert steps <= 40


# Beside the same said in the simplest way, which asks all of all


def simple_regions(hole: np.ndarray, size: tuple[int, int], context: float) -> list[list[int]]:
    """Boxes of the holes that are one region each: top, left, bottom, right, longer side of a hole."""
    cell = min(size) // 4
    H, W = hole.shape
    coarse = np.array([[hole[y : y + cell, x : x + cell].any() for x in range(0, W, cell)] for y in range(0, H, cell)])
    boxes = []
    for rows, columns in ndimage.find_objects(ndimage.label(coarse, np.ones((3, 3)))[0]):  # type: ignore[index, misc]
        top, left = rows.start * cell, columns.start * cell
        y, x = np.nonzero(hole[top : rows.stop * cell, left : columns.stop * cell])
        box = [top + min(y), left + min(x), top + max(y) + 1, left + max(x) + 1]
        boxes.append([*map(int, box), int(max(box[2] - box[0], box[3] - box[1]))])

    def needs(box: list[int]) -> float:
        sides = (box[2] - box[0], box[3] - box[1])
        return max(min(s + 2 * context * box[4], w) / o for s, w, o in zip(sides, hole.shape, size, strict=True))

    def together(a: list[int], b: list[int]) -> list[int]:
        return [*map(min, a[:2], b[:2]), *map(max, a[2:], b[2:])]

    least = min(1.0, H / size[0], W / size[1])
    i = 0
    while i < len(boxes):
        for j, other in enumerate(boxes):
            both = together(boxes[i], other)
            if j != i and needs(both) <= max(needs(boxes[i]), needs(other), least):
                boxes[i] = both
                del boxes[j]
                i -= j < i
                break
        else:
            i += 1
    return boxes


def scattered(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    hole = rng.random(rng.integers(20, 160, 2)) < 10 ** -rng.uniform(1.5, 3)
    for _ in range(rng.integers(0, 8)):
        y, x = (rng.integers(0, length) for length in hole.shape)
        hole[y : y + rng.integers(1, 50), x : x + 2] = True
        hole[y : y + 1, x : x + rng.integers(1, 50)] = True
    return hole


@pytest.mark.parametrize("seed", range(30))
def test_holes_are_joined_as_if_each_were_asked(seed: int) -> None:
    hole, size = scattered(seed), [(8, 8), (16, 8), (64, 64)][seed % 3]
    context = [0.5, 0.0, 2.0, 0.5][seed % 4]
    boxes = simple_regions(hole, size, context)
    view = windows._View(hole.shape, size, context, 4.0)
    assert regions(hole, size, context) == [view.region(np.array(box)) for box in boxes]


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_those_of_a_new_count_each_time(seed: int) -> None:
    hole, size = scattered(seed), [(8, 8), (16, 8), (20, 20)][seed % 3]
    left, given = hole.copy(), iter(Windows(hole, size))
    while True:
        window, count = None, size[0] * size[1] + 1
        for top in sorted({*range(0, hole.shape[0] - size[0], size[0] // 2), hole.shape[0] - size[0]}):
            for begin in sorted({*range(0, hole.shape[1] - size[1], size[1] // 2), hole.shape[1] - size[1]}):
                view = slice(top, top + size[0]), slice(begin, begin + size[1])
                if 0 < (found := int(left[view].sum())) < count:
                    window, count = view, found
        assert next(given, None) == window
        if window is None:
            break
        left[window] = False
    assert hole.any()  # the windows are counted in a copy


def test_ten_thousand_holes_take_no_time() -> None:
    hole = np.zeros((4000, 4000), dtype=bool)
    hole[::40, ::40] = True
    begin = time.monotonic()
    assert num_parts(hole, (64, 64)) == 10_000
    assert len(regions(hole, (64, 64))) == 2500
    assert time.monotonic() - begin < 8  # under a second where nothing else runs; 18 if each is asked for each
    full = np.ones((1000, 1000), dtype=bool)
    begin = time.monotonic()
    assert sum(1 for _ in Windows(full, (64, 64))) == 961
    assert time.monotonic() - begin < 3  # 6 if each window is counted anew


# Pictures smaller than the model


@pytest.mark.parametrize("shape", [(16, 16), (9, 7), (1, 1), (1, 200), (200, 1), (63, 4000)])
def test_a_small_picture_is_enlarged(shape: tuple[int, int]) -> None:
    (region,) = regions(np.ones(shape, dtype=bool), (64, 64))
    assert region.height >= 64
    assert region.width >= 64
    (single,) = regions(np.ones((9, 7), dtype=bool), (1536, 1536))  # whose one window has more than the million
    assert single.height * single.width > MOST_ADDED


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (1, 500), (8, 24_000)])
def test_a_thin_picture_is_not_enlarged_without_end(shape: tuple[int, int]) -> None:
    hole = np.ones(shape, dtype=bool)
    with pytest.raises(ValueError, match=r"and the model sees 64 x 64, so the picture is enlarged, .* crop it"):
        regions(hole, (64, 64))
    hole[:, 10:], hole[10:] = False, False
    assert regions(hole, (64, 64))[0].height * regions(hole, (64, 64))[0].width < MOST_ADDED / 10
    hole[:, ::10], hole[::10] = True, True  # many small regions take as long as a large one
    with pytest.raises(ValueError, match="Hide less of it"):
        regions(hole, (64, 64))


def test_a_picture_that_is_not_enlarged_may_be_thin() -> None:
    (region,) = regions(np.ones((64, 40_000), dtype=bool), (64, 64))
    assert (region.height, region.width) == (64, 40_000)
