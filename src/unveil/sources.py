"""Where samples come from: folders of pictures, tables of paths, parquet files, and digits that need no download.

Tensors here are (T, C, H, W): frames first, as pictures are decoded. `unveil.data` turns them into clips.
"""

import difflib
import glob
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from unveil import draws
from unveil.config import nearest
from unveil.decoding import BadPicture, Picture, Skipped, decode, decode_array, extensions, fill_channels, frames_first
from unveil.tables import PATH, is_table, read_table

BUILTINS = tuple(name + split for name in ("digits", "moving-digits") for split in ("", ":train", ":test"))


class Source(Protocol):
    """Samples by number.

    name: what the user wrote. classes: None if there are no labels. skipped: what opening found unusable.
    """

    name: str
    classes: tuple[str, ...] | None
    skipped: list[Skipped]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Picture:
        """The decoded sample; raises BadPicture."""
        ...

    def label(self, index: int) -> int | None: ...

    def where(self, index: int) -> str:
        """What to call a sample in a message: a path below the folder, or 'row 17'."""
        ...


# Decoding


class Folder:
    """Pictures below a folder, in the order of their paths, or one picture file.

    If every picture lies in a sub-folder, the name of the first-level folder is its class.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Sequence[str],
        skipped: list[Skipped],
        channels: int,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        self.name = name
        self.root = root
        self.paths = tuple(paths)
        self.skipped = skipped
        self.channels, self.height, self.width = channels, height, width
        self.classes: tuple[str, ...] | None = None
        if all("/" in path for path in self.paths):
            self.classes = tuple(sorted({path.split("/")[0] for path in self.paths}))
            self._label_of = {folder: label for label, folder in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Picture:
        where = self.where(index)
        try:
            with open(self.root / where, "rb") as stream:
                if where.lower().endswith(".npy"):
                    return decode_array(stream, where, self.channels)
                return decode(stream, where, self.channels, self.height, self.width)
        except FileNotFoundError as error:
            raise BadPicture(where, "vanished since the folder was opened") from error
        except OSError as error:
            raise BadPicture(where, f"cannot be opened ({error.strerror or error})") from error

    def label(self, index: int) -> int | None:
        return self._label_of[self.paths[index].split("/")[0]] if self.classes else None

    def where(self, index: int) -> str:
        return self.paths[index]


class Listed(Folder):
    """Pictures that a table lists, in its order, by paths below the table's folder or absolute ones.

    If it has a column `label`, its distinct values are the classes: whole numbers in their order, or names in the alphabet's.
    columns: of the table, for labels of other kinds.
    """

    def __init__(
        self, name: str, path: Path, channels: int, height: int | None = None, width: int | None = None
    ) -> None:
        self.columns = read_table(path).columns
        paths = [str(value) for value in self.columns[PATH]]
        missing = [i for i, value in enumerate(paths) if not (path.parent / value).is_file()]
        if missing:
            raise ValueError(
                f"{name!r} lists {len(missing)} of {len(paths)} files that do not exist, the first in row {missing[0] + 1}: "
                f"{paths[missing[0]]!r}. Paths are below {path.parent}, or absolute. Correct them, or remove the rows."
            )
        super().__init__(name, path.parent, paths, [], channels, height, width)
        self.classes = None
        self._labels = [_label(value) for value in self.columns.get("label", [])]
        if any(label is not None for label in self._labels):
            self.classes = tuple(sorted({label for label in self._labels if label is not None}, key=_by_number))
            self._label_of = {label: i for i, label in enumerate(self.classes)}

    def label(self, index: int) -> int | None:
        label = self._labels[index] if self.classes else None
        return None if label is None else self._label_of[label]


def _label(value: Any) -> str | None:
    """A class as a table has it; None for an empty cell."""
    return None if value is None or str(value) == "" else str(value)


def _by_number(label: str) -> tuple[int, float, str]:
    """Whole numbers first, in their order, then words."""
    return (0, int(label), "") if label.removeprefix("-").isdecimal() else (1, 0, label)


class Chosen:
    """Some samples of a source, in a given order."""

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self.source, self.rows = source, tuple(rows)
        self.name, self.classes, self.skipped = source.name, source.classes, source.skipped

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Picture:
        return self.source.read(self.rows[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.rows[index])

    def where(self, index: int) -> str:
        return self.source.where(self.rows[index])


def _walk(root: Path) -> tuple[list[str], list[Skipped]]:
    """All files below a folder, relative, sorted, without hidden ones; and what could not be entered.

    Linked folders are followed, each folder is read once: first as what it is, and as a link if it lies elsewhere.
    """
    files: list[str] = []
    skipped: list[Skipped] = []
    folders, links, seen = [root], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        below = folder.relative_to(root).as_posix()
        real = os.path.realpath(folder)
        if real in seen:
            skipped.append(Skipped(below, "a link to a folder that is read already"))
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            skipped.append(Skipped(below, f"cannot be entered ({error.strerror or error})"))
            continue
        for entry in entries:
            path = folder / entry.name
            where = path.relative_to(root).as_posix()
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.is_file():
                files.append(where)
            else:  # opening a pipe would wait for ever
                skipped.append(Skipped(where, "a broken link" if entry.is_symlink() else "not a file"))
    return sorted(files, key=lambda path: path.split("/")), skipped


def _sort_out(root: Path, files: Sequence[str]) -> tuple[list[str], list[Skipped]]:
    """Which files may be pictures, and why the others are not."""
    pictures, skipped = [], []
    for path in files:
        extension = os.path.splitext(path)[1].lower()
        if extension not in extensions():
            skipped.append(Skipped(path, f"not a picture ({extension or 'no extension'})"))
        elif os.path.getsize(root / path) == 0:
            skipped.append(Skipped(path, "empty file (0 bytes)"))
        else:
            pictures.append(path)
    return pictures, skipped


def _open_folder(data: str, root: Path, channels: int, height: int | None, width: int | None) -> "Folder | Parquet":
    files, skipped = _walk(root)
    pictures, not_pictures = _sort_out(root, files)
    if pictures:
        return Folder(data, root, pictures, skipped + not_pictures, channels, height, width)
    shards = [path for path in files if path.lower().endswith(".parquet")]
    if shards:
        groups = sorted({re.sub(r"[-_.]?\d+(-of-\d+)?$", "", path[: -len(".parquet")]) for path in shards})
        if len(groups) > 1:  # a train and a test set in one folder must not be mixed by accident
            raise ValueError(
                f"{data!r} holds {len(groups)} different sets of parquet files ({', '.join(groups[:5])}). "
                f"Name one, for example '{root / groups[0]}*.parquet'."
            )
        others = [bad for bad in not_pictures if bad.where not in shards]
        return Parquet(data, [root / path for path in shards], skipped + others, channels, height, width)
    found = f"{len(files)} files, none of which is a picture" if files else "no files"
    raise ValueError(f"{data!r} holds {found}. Name a folder with pictures (.png, .jpg, ...), or a .parquet file.")


# Parquet


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """The label names that Hugging Face datasets writes into a parquet file's schema."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return None


class Parquet:
    """Rows of parquet files: `image`, encoded bytes or a struct of bytes and path, and perhaps an integer `label`.

    The encoded bytes stay in memory; a row is decoded when it is read. A label that is null or negative is none.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        skipped: list[Skipped],
        channels: int,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        if channels not in (1, 3, 4):
            raise ValueError(
                f"{name!r} holds encoded pictures, which cannot fill {channels} channels. Use 1, 3 or 4, or .npy."
            )
        self.name = name
        self.skipped = skipped
        self.channels, self.height, self.width = channels, height, width
        self._images: list[Any] = []  # one chunked array of bytes for each file
        self._starts = [0]
        self._names = [path.name for path in paths]
        self._labels: list[int] | None = []
        names = None
        for path in paths:
            images, labels, metadata = self._open(path)
            self._images.append(images)
            self._starts.append(self._starts[-1] + len(images))
            if labels is None or self._labels is None:
                self._labels = None
            else:
                self._labels += [-1 if label is None or label < 0 else label for label in labels]
            names = names or _class_names(metadata)
        if not len(self):
            raise ValueError(f"{name!r} has no rows. Name a parquet file that has some.")
        self.classes: tuple[str, ...] | None = None
        if self._labels and max(self._labels) >= 0:
            highest = max(self._labels)
            if highest >= 1_000_000:
                raise ValueError(f"{name!r} has a label {highest}; labels number the classes from 0. Number them anew.")
            self.classes = names or tuple(str(label) for label in range(highest + 1))
            if highest >= len(self.classes):
                raise ValueError(
                    f"{name!r} has a label {highest} but its schema names {len(self.classes)} classes. Write it anew."
                )

    @staticmethod
    def _open(path: Path) -> tuple[Any, list[int | None] | None, dict[bytes, bytes] | None]:
        try:
            import pyarrow as pa
            import pyarrow.compute as pc
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ValueError(
                f"{path.name} is a parquet file, which needs pyarrow. Install it: pip install pyarrow"
            ) from error
        try:
            schema = pq.read_schema(path)
            columns = [name for name in ("image", "label") if name in schema.names]
            table = pq.ParquetFile(path).read(columns=columns) if columns else None
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet ({error}). Write or download it again.") from error
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        if table is None or "image" not in columns:
            raise ValueError(
                f"{path} has no column 'image', only {found or 'no columns'}. Rename the one with pictures."
            )
        images = table.column("image")
        if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
            images = pc.call_function(
                "struct_field", [images], pc.StructFieldOptions([images.type.get_field_index("bytes")])
            )
        if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
            raise ValueError(
                f"{path} has an 'image' of type {images.type}. It must be binary, or a struct with 'bytes'."
            )
        labels = None
        if "label" in columns:
            if not pa.types.is_integer(table.column("label").type):
                raise ValueError(f"{path} has a 'label' that is not an integer (columns: {found}). Number the classes.")
            labels = table.column("label").to_pylist()
        return images, labels, schema.metadata

    def __len__(self) -> int:
        return self._starts[-1]

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def read(self, index: int) -> Picture:
        file = self._file(index)
        encoded = self._images[file][index - self._starts[file]].as_py()
        if not encoded:
            raise BadPicture(self.where(index), "no bytes in this row (0 bytes, or a path only)")
        return decode(io.BytesIO(encoded), self.where(index), self.channels, self.height, self.width)

    def label(self, index: int) -> int | None:
        return self._labels[index] if self._labels and self._labels[index] >= 0 else None

    def where(self, index: int) -> str:
        file = self._file(index)
        row = f"row {index - self._starts[file]}"
        return row if len(self._names) == 1 else f"{self._names[file]} {row}"


# Digits, which come with scikit-learn


def _load_digits(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, (N, 8, 8) uint8, and their labels (N,); the split is 80/20, stratified, and fixed."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError(f"{name!r} comes with scikit-learn. Install it: pip install scikit-learn") from error
    flat, labels = load_digits(return_X_y=True)
    images = np.round(np.asarray(flat).reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    labels = np.asarray(labels)
    if split == "all":
        return images, labels
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=labels)
    rows = np.sort(train if split == "train" else test)
    return images[rows], labels[rows]


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, 0 to 16 stretched to 0 to 255."""

    def __init__(self, name: str, split: str, channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"{name!r} is grey, which cannot fill {channels} channels. Use channels=1 or 3.")
        self.name = name
        self.channels = channels
        self.skipped: list[Skipped] = []
        self.classes: tuple[str, ...] | None = tuple("0123456789")
        self._images, self._labels = _load_digits(name, split)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Picture:
        return Picture(frames_first(fill_channels(self._images[index], self.channels)))

    def label(self, index: int) -> int | None:
        return int(self._labels[index])

    def where(self, index: int) -> str:
        return f"row {index}"


class MovingDigits(Digits):
    """Clips of one or two digits that move at constant speed and bounce off the walls; the first digit is the label.

    One clip for each digit of the split, made when it is read, from its number alone. A digit is a third of the frame.
    """

    def __init__(self, name: str, split: str, channels: int, frames: int, height: int = 24, width: int = 24) -> None:
        super().__init__(name, split, channels)
        if min(height, width) < 10:
            raise ValueError(f"{name!r} needs room to move, but was given {height}x{width} pixels. Use at least 10x10.")
        self.split, self.frames, self.height, self.width = split, frames, height, width

    def read(self, index: int) -> Picture:
        generator = draws.generator(0, "moving-digits", self.split, index)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        digits = [index] + [draw(0, len(self) - 1)] * draw(0, 1)
        scale = max(1, min(self.height, self.width) // 24)
        clip = np.zeros((self.frames, self.height, self.width), dtype=np.uint8)  # (T, H, W)
        time = np.arange(self.frames)
        for digit in digits:
            image = self._images[digit].repeat(scale, axis=0).repeat(scale, axis=1)
            corners = []
            for side in (self.height, self.width):
                room = side - len(image)
                start, speed = draw(0, room), scale * draw(1, 2) * (2 * draw(0, 1) - 1)
                corners.append(room - np.abs((start + speed * time) % (2 * room) - room))  # there and back again
            for frame, top, left in zip(clip, *corners, strict=True):
                part = frame[top : top + len(image), left : left + len(image)]
                np.maximum(part, image, out=part)
        return Picture(torch.from_numpy(clip)[:, None].repeat(1, self.channels, 1, 1))


# Opening


def _missing(data: str) -> ValueError:
    """The error for a path that does not exist, with what was probably meant."""
    path = Path(data)
    while path.parent != path and not path.parent.is_dir():
        path = path.parent
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close and not difflib.get_close_matches(data, BUILTINS, n=1):
        hint = f"Did you mean {str(path.parent / close[0])!r}?"
    else:
        hint = "Name a folder, a picture or a .parquet file that exists, or a built-in set. " + nearest(data, BUILTINS)
    return ValueError(f"There is no data at {data!r}. {hint}")


def open_source(
    data: str, channels: int, frames: int = 1, height: int | None = None, width: int | None = None
) -> Source:
    """Open what the user named.

    Args:
        data: `digits` or `moving-digits`, perhaps with `:train` or `:test` (a folder of that name is `./digits`); a
            folder of pictures; a picture; a .csv or .parquet with a column `path`; a .parquet file of pictures, a folder of
            such files or a pattern like `train-*.parquet`.
        channels: what pictures are converted to: 1, 3 or 4; other numbers only with .npy arrays.
        frames: frames of a clip; only moving-digits has more than 1.
        height, width: the size of moving-digits (24 x 24 if not given), and what large JPEGs need at least.

    Raises:
        ValueError: there is no such data, or nothing usable in it, or it has no clips.
    """
    if channels < 1 or frames < 1:
        raise ValueError(f"channels={channels} and frames={frames} were given; both must be at least 1.")
    base, _, split = data.partition(":")
    if data in BUILTINS and base == "moving-digits":
        return MovingDigits(data, split or "all", channels, frames, height or 24, width or 24)
    path = Path(data).expanduser()
    pattern = not path.exists() and any(mark in data for mark in "*?[")
    if data not in BUILTINS and not pattern and not path.exists():
        raise _missing(data)
    if frames > 1:
        raise ValueError(f"{data!r} has pictures, not clips of {frames} frames. Use moving-digits, or frames=1.")
    if data in BUILTINS:
        return Digits(data, split or "all", channels)
    if pattern:
        shards = sorted(glob.glob(str(path), recursive=True))
        if not shards:
            raise ValueError(f"No file matches {data!r}. Check the pattern; it must match .parquet files.")
        other = [shard for shard in shards if not shard.lower().endswith(".parquet")]
        if other:
            raise ValueError(f"{data!r} matches {other[0]!r}, which is not a .parquet file. Name the folder instead.")
        return Parquet(data, [Path(shard) for shard in shards], [], channels, height, width)
    if path.is_dir():
        return _open_folder(data, path, channels, height, width)
    if path.is_file() and is_table(path):
        return Listed(data, path, channels, height, width)
    if path.suffix.lower() == ".parquet":
        return Parquet(data, [path], [], channels, height, width)
    pictures, skipped = _sort_out(path.parent, [path.name]) if path.is_file() else ([], [Skipped(data, "not a file")])
    if not pictures:
        raise ValueError(f"{data!r} is no data: {skipped[0].reason}. Name a folder, a picture or a .parquet file.")
    return Folder(data, path.parent, pictures, [], channels, height, width)
