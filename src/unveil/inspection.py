"""What every sample of a source is: read once, in parallel, through the same path as training reads it."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unveil import draws
from unveil.decoding import BadPicture, Header, header_of
from unveil.sources import Source, as_text

AT_ONCE = 8  # samples that a worker hands over together


@dataclass(frozen=True, slots=True)  # there may be millions
class Look:
    """One sample's pixels.

    header: what its file says; None if there is no file behind it. height, width: upright, in pixels. encoded_bytes: of the
    file, 0 without one; decoded_bytes: as training holds them.
    file_digest, pixel_digest: equal for equal files, and for equal pixels; the first is None without a file.
    mean, square: over the pixels of each channel, of values in [0, 1] and of their squares, float64.
    low, high: the smallest and largest value of all channels, in [0, 1]. grey: whether all colours are grey.
    note: what was converted to read it.
    """

    header: Header | None
    height: int
    width: int
    encoded_bytes: int
    decoded_bytes: int
    file_digest: bytes | None
    pixel_digest: bytes
    mean: tuple[float, ...]
    square: tuple[float, ...]
    low: float
    high: float
    constant: bool
    grey: bool
    note: str | None


@dataclass(frozen=True, slots=True)  # there may be millions
class Inspected:
    """A sample of a source: what it is, or why it cannot be used."""

    index: int
    where: str
    look: Look | None
    problem: str | None


def _moments(values: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean, and mean of squares, of each channel in [0, 1]; (T, C, H, W), exact for uint8 but for the division."""
    channels = values.transpose(0, 1).flatten(1).numpy()  # (C, T * H * W)
    if channels.dtype == np.uint8:
        counts = np.stack([np.bincount(channel, minlength=256) for channel in channels]) / channels.shape[1]  # (C, 256)
        levels = np.arange(256) / 255
        return tuple((counts @ levels).tolist()), tuple((counts @ levels**2).tolist())
    wide = channels.astype(np.float64)
    return tuple(wide.mean(1).tolist()), tuple((wide**2).mean(1).tolist())


def look_at(source: Source, index: int) -> Look:
    """Read and decode one sample.

    Raises:
        BadPicture: it cannot be used, for the reason that training would skip it for.
    """
    picture, encoded = source.read(index), source.encoded(index)
    values = picture.values
    array = values.numpy()
    mean, square = _moments(values)
    scale = 255 if array.dtype == np.uint8 else 1
    flat = array.min((0, 2, 3)), array.max((0, 2, 3))  # of each channel
    return Look(
        header=None if encoded is None else header_of(io.BytesIO(encoded), source.where(index)),
        height=values.shape[2],
        width=values.shape[3],
        encoded_bytes=len(encoded or b""),
        decoded_bytes=values.nbytes,
        file_digest=None if encoded is None else hashlib.blake2b(encoded, digest_size=16).digest(),
        pixel_digest=hashlib.blake2b(
            f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes(), digest_size=16
        ).digest(),
        mean=mean,
        square=square,
        low=float(flat[0].min()) / scale,
        high=float(flat[1].max()) / scale,
        constant=bool((flat[0] == flat[1]).all()),
        grey=values.shape[1] == 3 and bool((array[:, 0] == array[:, 1]).all() and (array[:, 1] == array[:, 2]).all()),
        note=picture.note,
    )


class _Looks(Dataset[Inspected]):
    """Some samples of a source by their place among those that are looked at."""

    def __init__(self, source: Source, rows: list[int]) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Inspected:
        index = self.rows[place]
        try:
            return Inspected(index, as_text(self.source.where(index)), look_at(self.source, index), None)
        except BadPicture as bad:
            return Inspected(index, as_text(bad.where), None, bad.reason)


def spread_rows(number: int, limit: int | None) -> list[int]:
    """All rows, or `limit` of them at equal distances, so that no class of a sorted folder is left out by its place."""
    if limit is None or limit >= number:
        return list(range(number))
    return [i * number // limit for i in range(limit)]


def inspect(source: Source, rows: list[int], num_workers: int) -> Iterator[Inspected]:
    """Look at these samples of a source, in their order, by so many processes; 0 for this one."""
    loader: DataLoader[Any] = DataLoader(
        _Looks(source, rows),
        batch_size=AT_ONCE,
        num_workers=num_workers,
        collate_fn=list,
        generator=draws.generator(0, "workers"),  # which would otherwise move the global one
    )
    for several in loader:
        yield from several
