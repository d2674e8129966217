"""Sets of whole pictures as bytes, one after another, for measures of what was generated: any source, or an .npz of samples."""

import contextlib
import hashlib
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from unveil.decoding import BadPicture, Skipped
from unveil.sources import Chosen, Folder, Source, open_source
from unveil.transforms import fit

SAMPLES = "arr_0"  # of an .npz, as guided-diffusion's scripts and `unveil generate --npz` call it


class PictureSet(Protocol):
    """Pictures by number.

    name: what the user wrote. skipped: what could not be read, so far.
    """

    name: str
    skipped: list[Skipped]

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(number, (3, H, W) uint8) of those that can be read."""
        ...

    def by_class(self) -> bool:
        """Whether they come one class after another, as far as there are labels."""
        ...

    def digest(self) -> str:
        """Of the files' contents: equal for equal pictures in the same order."""
        ...


@dataclass
class FromSource:
    """Of a folder, parquet file, shards or any other source; grey is repeated, transparency put over white."""

    source: Source
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        self.skipped.clear()
        for i in range(len(self.source)):
            try:
                values = self.source.read(i).values[0]
            except BadPicture as bad:
                self.skipped.append(Skipped(bad.where, bad.reason))
                continue
            yield i, values if values.dtype == torch.uint8 else (values * 255).round().to(torch.uint8)

    def by_class(self) -> bool:
        labels = [label for i in range(len(self)) if (label := self.source.label(i)) is not None]
        return len(set(labels)) > 1 and all(a <= b for a, b in itertools.pairwise(labels))

    def digest(self) -> str:
        digest = hashlib.sha256()
        for i in range(len(self.source)):
            try:
                content = self.source.encoded(i)
                content = self.source.read(i).values.numpy().tobytes() if content is None else content
            except BadPicture:
                content = b""
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


@dataclass
class FromNpz:
    """The array of samples in an .npz, uint8 (N, H, W, C), read piece by piece: fifty thousand may not fit the memory."""

    path: Path
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = str(self.path)
        with self._opened() as stream:
            self.shape = self._header(stream)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{SAMPLES}.npy") as stream:
                yield stream
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{self.path} is damaged ({error}). Write or fetch it again.") from None

    def by_class(self) -> bool:
        return False

    def _header(self, stream: IO[bytes]) -> tuple[int, ...]:
        """The array's shape; the stream then stands at its values."""
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            shape, by_columns, kind = readers[np.lib.format.read_magic(stream)](stream)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{self.path} has an array {SAMPLES} that cannot be read ({error}). Make it again."
            ) from None
        if kind != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or by_columns or 0 in shape:
            raise ValueError(
                f"{self.path} holds {SAMPLES} as {kind} of {shape}; pictures are uint8 of (number, height, width, 3 or 1)."
            )
        return shape

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        size = int(np.prod(self.shape[1:]))
        with self._opened() as stream:
            self._header(stream)
            for i in range(len(self)):
                content = stream.read(size)
                if len(content) < size:
                    raise EOFError(f"it ends in picture {i} of {len(self)}")
                picture = np.frombuffer(content, np.uint8).reshape(self.shape[1:]).transpose(2, 0, 1)
                yield i, torch.from_numpy(picture.copy()).expand(3, -1, -1)

    def digest(self) -> str:
        digest = hashlib.sha256(repr(self.shape).encode())
        with self._opened() as stream:
            self._header(stream)
            while piece := stream.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()


@dataclass
class Fitted:
    """Pictures of a set brought to one size, as a model's loader brings them: antialiased bicubic, and the centre.

    resized: how many had another size, so far.
    """

    pictures: PictureSet
    height: int
    width: int
    resized: int = 0

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        self.resized = 0
        for i, picture in self.pictures:
            self.resized += tuple(picture.shape[1:]) != (self.height, self.width)
            yield i, fit(picture[None], self.height, self.width)[0]


def is_npz(data: str) -> bool:
    path = Path(data).expanduser()
    return path.suffix.lower() == ".npz" and path.is_file()


def arrays_of(path: Path) -> set[str]:
    """The names of what is in an .npz.

    Raises:
        ValueError: it is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile:
        raise ValueError(f"{path} cannot be read as an .npz file. Write or fetch it again.") from None


def open_pictures(data: str) -> PictureSet:
    """What the user named: a source as for `open_source`, or an .npz of samples.

    Of a folder that `unveil generate` wrote, the contact sheet grid.png is left out.

    Raises:
        ValueError: there is no such data, or nothing usable in it.
    """
    if is_npz(data):
        path = Path(data).expanduser()
        if SAMPLES not in (names := arrays_of(path)):
            raise ValueError(f"{path} holds no pictures ({SAMPLES}), only {', '.join(sorted(names)) or 'nothing'}.")
        return FromNpz(path)
    source = open_source(data, channels=3)
    if isinstance(source, Folder) and "grid.png" in source.paths:
        rows = [i for i, path in enumerate(source.paths) if path != "grid.png"]
        if rows and all(re.fullmatch(r"\d{5,}\.png", source.paths[i]) for i in rows):
            return FromSource(Chosen(source, rows))
    return FromSource(source)
