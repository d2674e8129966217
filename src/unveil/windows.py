"""Where a model of one size looks in a picture of any size: regions around the holes of a mask, and windows in a region.

Heights and widths are pixels; a hole is a (H, W) bool array, True where it is to be painted.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

MOST_ADDED = (
    2**20
)  # pixels by which a picture smaller than the model may be enlarged, but no less than so many windows and
FEW_WINDOWS, MANY_WINDOWS = 4, 256  # no more: of a small model they are the time, as pixels are the memory

_Square = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """A part of a picture that is painted before the next: rows top to bottom, columns left to right, ends excluded.

    height, width: the size at which it is painted, at least the model's in both; the model's if one window sees it all.
    """

    top: int
    left: int
    bottom: int
    right: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.right)


def _parts(hole: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """The parts of a hole that lie a cell, a quarter of a window, or more apart: cells' labels, a cell's side, and how many."""
    cell = max(1, min(size) // 4)
    H, W = hole.shape
    padded = np.pad(hole, ((0, -H % cell), (0, -W % cell)))
    coarse = padded.reshape(padded.shape[0] // cell, cell, -1, cell).any((1, 3))
    labels, number = ndimage.label(coarse, structure=np.ones((3, 3)))  # type: ignore[misc]
    return labels, cell, number


def num_parts(hole: np.ndarray, size: tuple[int, int]) -> int:
    """How many parts of a hole (H, W) `regions` looks at one by one, for a model of this height and width."""
    return _parts(hole, size)[2]


def _boxes(hole: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes around a hole's parts: (n, 5), top, left, bottom, right and the longer side."""
    labels, cell, _ = _parts(hole, size)
    boxes = []
    parts: list[tuple[slice, slice]] = ndimage.find_objects(labels)  # type: ignore[assignment]
    for rows, columns in parts:
        top, left = rows.start * cell, columns.start * cell
        inside = hole[top : rows.stop * cell, left : columns.stop * cell]
        y, x = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        y0, y1, x0, x1 = y[0], y[-1] + 1, x[0], x[-1] + 1
        boxes.append((top + y0, left + x0, top + y1, left + x1, max(y1 - y0, x1 - x0)))
    return np.array(boxes, dtype=np.int64).reshape(-1, 5)


def _span(low: int, high: int, length: int, end: int) -> tuple[int, int]:
    """`length` pixels around low to high, moved inside 0 to `end`."""
    start = min(max((low + high - length) // 2, 0), end - length)
    return start, start + length


class _View:
    """How much of a picture one window can show, and how much a hole with its surroundings needs."""

    def __init__(self, shape: tuple[int, int], size: tuple[int, int], context: float, max_scale: float) -> None:
        self.shape, self.size, self.context = shape, size, context
        fits = min(shape[0] / size[0], shape[1] / size[1])  # a window of this scale lies inside the picture
        self.least, self.most = min(1.0, fits), min(max(max_scale, 1.0), fits)

    def needs(self, boxes: np.ndarray) -> np.ndarray:
        """The scale, in picture pixels for each of the window's, at which one window shows a box and its surroundings."""
        sides = boxes[..., 2:4] - boxes[..., :2] + 2 * self.context * boxes[..., 4:]
        return (np.minimum(sides, self.shape) / self.size).max(-1)

    def region(self, box: np.ndarray) -> Region:
        needs = float(self.needs(box))
        scale = min(max(needs, self.least), self.most)
        lengths = [min(round(ours * scale), whole) for ours, whole in zip(self.size, self.shape, strict=True)]
        height, width = self.size
        if (
            needs > self.most
        ):  # several windows, of which those at the hole's edge see no more than half a window beside it
            margins = [min(self.context * box[4], ours * scale / 2) for ours in self.size]
            sides = [round(side + 2 * margin) for side, margin in zip(box[2:4] - box[:2], margins, strict=True)]
            lengths = [
                min(max(side, least), whole) for side, least, whole in zip(sides, lengths, self.shape, strict=True)
            ]
            height, width = (
                max(ours, math.ceil(length / scale)) for ours, length in zip(self.size, lengths, strict=True)
            )
        top, bottom = _span(int(box[0]), int(box[2]), lengths[0], self.shape[0])
        left, right = _span(int(box[1]), int(box[3]), lengths[1], self.shape[1])
        return Region(top, left, bottom, right, height, width)


class _Reaches:
    """Boxes, and which of them may be one region with another, found without asking all.

    Two of them may only if the box around both is no longer than the longer reach of the two. So each is filed by its top left
    corner in squares that are no shorter than its reach, on a plane with those that reach about as far.
    """

    def __init__(self, view: _View, boxes: np.ndarray) -> None:
        self.view = view
        self.edges = boxes * np.array([-1.0, -1.0, 1.0, 1.0, 1.0])  # of which those around two boxes are the maximum
        self.needs = np.maximum(view.needs(boxes), view.least)
        self.alive = np.ones(len(boxes), dtype=bool)
        self.planes: dict[int, dict[_Square, set[int]]] = {}
        self.places = [(0, (0, 0))] * len(boxes)
        for i in range(len(boxes)):
            self._file(i)

    @property
    def boxes(self) -> np.ndarray:
        """Those that are left, (n, 5), as they were given."""
        return (np.abs(self.edges[self.alive])).astype(np.int64)

    def _length(self, level: int) -> _Square:
        """The height and width of a plane's squares: what its boxes reach, and a little against rounding."""
        far = self.view.least * 2 ** (level + 1)
        (height, width), (H, W) = self.view.size, self.view.shape
        return min(math.ceil(height * far), H) + 1, min(math.ceil(width * far), W) + 1

    def _file(self, i: int) -> None:
        level = int(math.log2(float(self.needs[i]) / self.view.least))
        height, width = self._length(level)
        square = int(-self.edges[i, 0]) // height, int(-self.edges[i, 1]) // width
        self.places[i] = level, square
        self.planes.setdefault(level, {}).setdefault(square, set()).add(i)

    def _take(self, i: int) -> None:
        level, square = self.places[i]
        self.planes[level][square].remove(i)
        if not self.planes[level][square]:
            del self.planes[level][square]

    def _near(self, i: int) -> list[int]:
        """The numbers of boxes that may fit to one, in their order."""
        found: list[int] = []
        top, left = int(-self.edges[i, 0]), int(-self.edges[i, 1])
        height, width = self._length(self.places[i][0])
        for level, plane in self.planes.items():
            h, w = self._length(level)
            far_y, far_x = max(h, height), max(w, width)
            rows = range((top - far_y) // h, (top + far_y) // h + 1)
            columns = range((left - far_x) // w, (left + far_x) // w + 1)
            if len(rows) * len(columns) < len(plane):
                squares = [plane[s] for s in itertools.product(rows, columns) if s in plane]
            else:
                squares = [held for (y, x), held in plane.items() if y in rows and x in columns]
            for held in squares:
                found.extend(held)
        found.remove(i)
        found.sort()
        return found

    def fitting(self, i: int) -> list[int]:
        """The numbers of boxes that one window shows together with this one, in their order."""
        near = np.array(self._near(i), dtype=np.int64)
        both = np.maximum(self.edges[near], self.edges[i])
        sides = both[:, 2:4] + both[:, :2] + 2 * self.view.context * both[:, 4:]
        needs = (np.minimum(sides, self.view.shape) / self.view.size).max(1)
        return near[needs <= np.maximum(self.needs[near], self.needs[i])].tolist()

    def join(self, i: int, j: int) -> bool:
        """Add box j to box i; whether that made box i another."""
        both = np.maximum(self.edges[i], self.edges[j])
        self._take(j)
        self.alive[j] = False
        if (both == self.edges[i]).all():
            return False
        self._take(i)
        self.edges[i] = both
        self.needs[i] = max(float(self.view.needs(np.abs(both))), self.view.least)
        self._file(i)
        return True


def _joined(view: _View, boxes: np.ndarray) -> np.ndarray:
    """Boxes, each joined with the first that one window shows together with it, until there is none."""
    reaches = _Reaches(view, boxes)
    for i in range(len(boxes)):
        other = bool(reaches.alive[i])
        while other:  # what two are together may fit to some that neither did
            other = False
            for j in reaches.fitting(i):
                if other := reaches.join(i, j):
                    break
    return reaches.boxes


def regions(hole: np.ndarray, size: tuple[int, int], context: float = 0.5, max_scale: float = 4.0) -> list[Region]:
    """The parts of a picture to paint one after another, so that each hole is seen with its surroundings.

    A region is cut out at the picture's own scale where a window of the model's size shows the hole with its surroundings, or
    shrunk up to `max_scale` times if it must be; one that needs more is painted by several windows (`Windows`). A picture
    smaller than the model's size is enlarged. Holes that one window shows together are one region.

    Args:
        hole: (H, W) bool.
        size: the model's height and width.
        context: surroundings on each side, in units of the hole's longer side.
        max_scale: at least 1.

    Raises:
        ValueError: the picture is so thin that its holes would be painted many times larger than they are.
    """
    view = _View(hole.shape, size, context, max_scale)
    found = [view.region(box) for box in _joined(view, _boxes(hole, size))]
    if view.least < 1:
        _check_enlarged(found, hole.shape, size)
    return found


def _check_enlarged(found: list[Region], shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Refuse regions that would be many pixels, though the picture has few: its size does not tell what it costs."""
    painted = sum(region.height * region.width for region in found)
    own = sum((region.bottom - region.top) * (region.right - region.left) for region in found)
    window = size[0] * size[1]
    most = min(max(MOST_ADDED, FEW_WINDOWS * window), MANY_WINDOWS * window)
    if painted - own > most:
        raise ValueError(
            f"The picture has {shape[1]:,} x {shape[0]:,} pixels and the model sees {size[1]} x {size[0]}, so the picture is "
            f"enlarged, and around its holes it would have {painted:,} pixels; at most {most:,} may be added. Hide less of it, "
            "or crop it to a part that is less thin."
        )


def _starts(length: int, window: int) -> np.ndarray:
    """Where windows begin: every half window, and the last at the end."""
    return np.append(np.arange(0, length - window, max(1, window // 2)), length - window)


def _counts(flags: np.ndarray, tops: np.ndarray, lefts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How many flags each window holds, (tops, lefts)."""
    height, width = size
    flags = flags.view(np.uint8)  # bytes are added many times faster than bools
    bands = np.stack([flags[top : top + height].sum(0, dtype=np.uint16) for top in tops])  # no window has 65,536 rows
    sums = np.pad(bands.cumsum(1, dtype=np.int64), ((0, 0), (1, 0)))
    return sums[:, lefts + width] - sums[:, lefts]


def _touching(starts: np.ndarray, begin: int, window: int) -> slice:
    """Which windows share something with the one at `begin`."""
    return slice(*np.searchsorted(starts, (begin - window + 1, begin + window)).tolist())


class Windows:
    """The windows of a region in which its hole is painted, one after another; each is taken for painted when the next is
    asked for.

    It is always one that touches what is left of the hole, and of those, the one that sees most beside it. So a hole that is
    larger than a window is filled from its edge inwards.

    Args:
        hole: (H, W) bool.
        size: the model's height and width; the hole's are no less.
    """

    def __init__(self, hole: np.ndarray, size: tuple[int, int]) -> None:
        self._left, self._size = hole.copy(), size
        self._tops, self._lefts = (_starts(length, ours) for length, ours in zip(hole.shape, size, strict=True))
        self._counts = _counts(hole, self._tops, self._lefts, size)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        height, width = self._size
        while self._counts.any():
            touching = np.where(self._counts == 0, height * width + 1, self._counts)
            i, j = divmod(int(touching.argmin()), touching.shape[1])
            top, left = int(self._tops[i]), int(self._lefts[j])
            yield slice(top, top + height), slice(left, left + width)
            self._left[top : top + height, left : left + width] = False
            rows, columns = _touching(self._tops, top, height), _touching(self._lefts, left, width)
            tops, lefts = self._tops[rows], self._lefts[columns]
            part = self._left[tops[0] : tops[-1] + height, lefts[0] : lefts[-1] + width]
            self._counts[rows, columns] = _counts(part, tops - tops[0], lefts - lefts[0], self._size)
