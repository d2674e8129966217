"""Where a model of one size looks in a picture of any size: regions around the holes of a mask, and windows in a region.

Heights and widths are pixels; a hole is a (H, W) bool array, True where it is to be painted.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage


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


def _boxes(hole: np.ndarray, cell: int) -> np.ndarray:
    """Boxes around parts of a hole that lie a cell or more apart: (n, 5), top, left, bottom, right and the longer side."""
    H, W = hole.shape
    padded = np.pad(hole, ((0, -H % cell), (0, -W % cell)))
    coarse = padded.reshape(padded.shape[0] // cell, cell, -1, cell).any((1, 3))
    labels: np.ndarray = ndimage.label(coarse, structure=np.ones((3, 3)))[0]  # type: ignore[index]
    boxes = []
    parts: list[tuple[slice, slice]] = ndimage.find_objects(labels)  # type: ignore[assignment]
    for rows, columns in parts:
        top, left = rows.start * cell, columns.start * cell
        inside = hole[top : rows.stop * cell, left : columns.stop * cell]
        y, x = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        y0, y1, x0, x1 = y[0], y[-1] + 1, x[0], x[-1] + 1
        boxes.append((top + y0, left + x0, top + y1, left + x1, max(y1 - y0, x1 - x0)))
    return np.array(boxes, dtype=np.int64).reshape(-1, 5)


def _together(boxes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The box around each of some and another; its side is the longer one of the two, as each hole has its own surroundings."""
    return np.concatenate(
        [np.minimum(boxes[..., :2], other[..., :2]), np.maximum(boxes[..., 2:], other[..., 2:])], axis=-1
    )


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


def regions(hole: np.ndarray, size: tuple[int, int], context: float = 0.5, max_scale: float = 4.0) -> list[Region]:
    """The parts of a picture to paint one after another, so that each hole is seen with its surroundings.

    A region is cut out at the picture's own scale where a window of the model's size shows the hole with its surroundings, or
    shrunk up to `max_scale` times if it must be; one that needs more is painted by several windows (`next_window`). A picture
    smaller than the model's size is enlarged. Holes that one window shows together are one region.

    Args:
        hole: (H, W) bool.
        size: the model's height and width.
        context: surroundings on each side, in units of the hole's longer side.
        max_scale: at least 1.
    """
    view = _View(hole.shape, size, context, max_scale)
    boxes = _boxes(hole, max(1, min(size) // 4))
    i = 0
    while i < len(boxes):
        both = _together(boxes, boxes[i])
        apart = np.maximum(np.maximum(view.needs(boxes), view.needs(boxes[i])), view.least)
        fits = view.needs(both) <= np.maximum(apart, min(1.0, view.most))
        fits[i] = False
        if fits.any():  # what they are together may fit to others that one of them did not, so it is asked again
            j = int(fits.argmax())
            boxes[i] = both[j]
            boxes = np.delete(boxes, j, axis=0)
            i -= j < i
        else:
            i += 1
    return [view.region(box) for box in boxes]


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin: every half window, and the last at the end."""
    return sorted({*range(0, length - window, max(1, window // 2)), length - window})


def _counts(flags: np.ndarray, tops: list[int], lefts: list[int], size: tuple[int, int]) -> np.ndarray:
    """How many flags each window holds, (tops, lefts)."""
    sums = np.pad(flags.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    rows = sums[np.add(tops, size[0])] - sums[tops]
    return rows[:, np.add(lefts, size[1])] - rows[:, lefts]


def next_window(hole: np.ndarray, size: tuple[int, int]) -> tuple[slice, slice] | None:
    """Of the windows of a region that touch what is left of its hole, that which sees most beside it; None if none is left.

    Painted one by one, a hole that is larger than a window is filled from its edge inwards.
    """
    tops, lefts = (_starts(length, ours) for length, ours in zip(hole.shape, size, strict=True))
    left = _counts(hole, tops, lefts, size)
    if not left.any():
        return None
    i, j = np.unravel_index(np.where(left == 0, size[0] * size[1] + 1, left).argmin(), left.shape)
    return slice(tops[i], tops[i] + size[0]), slice(lefts[j], lefts[j] + size[1])
