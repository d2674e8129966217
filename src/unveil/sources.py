"""Where samples come from: folders of pictures, parquet files, and digits that need no download.

Tensors here are (T, C, H, W): frames first, as pictures are decoded. `unveil.data` turns them into clips.
"""

import difflib
import functools
import glob
import io
import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unveil import draws
from unveil.config import nearest

BUILTINS = tuple(name + split for name in ("digits", "moving-digits") for split in ("", ":train", ":test"))

# EPS starts Ghostscript on what may be anybody's file; the others are stubs that Pillow recognises but cannot decode.
_REFUSED_FORMATS = ("EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF")


@dataclass(frozen=True)
class Picture:
    """One decoded sample.

    values: (T, C, H, W), uint8, or float32 in [0, 1] for 16-bit and float sources.
    note: what had to be converted on the way, for people; None if nothing.
    """

    values: Tensor
    note: str | None = None


@dataclass(frozen=True)
class Skipped:
    """Something that cannot be used, and why."""

    where: str
    reason: str


class BadPicture(ValueError):
    """One sample cannot be decoded; the others may be fine."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


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


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    usual = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # tried first, because every other one costs time
    return (*usual, *(name for name in Image.ID if name not in usual + _REFUSED_FORMATS))


@functools.cache
def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(ext for ext, name in known.items() if name in _formats()) | {".npy"}


def _fill_channels(gray: np.ndarray, channels: int) -> np.ndarray:
    """(H, W) in [0, 1] or uint8 -> (H, W, C), repeated; a fourth channel is opaque."""
    values = np.repeat(gray[:, :, None], channels, axis=2)
    if channels == 4:
        values[:, :, 3] = 255 if gray.dtype == np.uint8 else 1
    return values


def _frames_first(values: np.ndarray) -> Tensor:
    """(H, W, C) -> (1, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]


def _check_unit_range(values: np.ndarray, where: str) -> None:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # written so that NaN is refused too
        raise BadPicture(where, f"float values from {low:.4g} to {high:.4g}; they must be between 0 and 1")


def decode(stream: BinaryIO, where: str, channels: int, height: int | None = None, width: int | None = None) -> Picture:
    """Decode a picture file with Pillow: upright, its first frame, with the channels that are wanted.

    Args:
        stream: the encoded bytes.
        where: what to call it in a message.
        channels: 1 (luma), 3 (RGB, transparency over white) or 4 (RGBA).
        height, width: the size wanted in the end, if known: a JPEG that is far larger is decoded at 1/2, 1/4 or 1/8.

    Returns:
        (1, C, H, W), uint8, or float32 in [0, 1] for 16-bit grey and float pictures.

    Raises:
        BadPicture: damaged, truncated, not a picture, or above Pillow's limit of pixels.
    """
    if channels not in (1, 3, 4):
        raise BadPicture(
            where, f"a picture file cannot fill {channels} channels; use .npy arrays of (H, W, {channels})"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(stream, where, channels, height, width)
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise BadPicture(where, f"above Pillow's limit of {limit:.3g} megapixels; shrink it first") from error
    except UnidentifiedImageError as error:
        raise BadPicture(where, "not a picture that Pillow can read") from error
    except Exception as error:  # Pillow's plugins raise nearly every type on a damaged file
        raise BadPicture(where, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _decode(stream: BinaryIO, where: str, channels: int, height: int | None, width: int | None) -> Picture:
    image: Image.Image = Image.open(stream, formats=_formats())
    notes = []
    if height is not None and width is not None:
        # Random crops keep a fifth of the area or more (Training.crop_scale), so this many pixels keep them sharp.
        # The longer side for both, because the picture may still be turned upright.
        side = int(max(height, width) / 0.2**0.5) + 1
        image.draft(None, (side, side))  # does something for JPEG only
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1:
        notes.append(f"first of {num_frames} frames used")
    # Pillow's tile says how pixels are stored; sixteen bits of colour become eight without a word.
    stored = image.tile[0][3] if image.tile else None  # type: ignore[attr-defined]
    stored = stored[0] if isinstance(stored, tuple) and stored else stored
    if isinstance(stored, str) and ";16" in stored and not image.mode.startswith("I"):
        notes.append("16-bit colour read as 8-bit")

    ImageOps.exif_transpose(image, in_place=True)  # in place, for otherwise it copies every picture
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        values = np.array(image)
        if mode == "F":
            _check_unit_range(values, where)
            notes.append("float")
        else:
            low, high = int(values.min()), int(values.max())
            if low < 0 or high > 65535:
                raise BadPicture(where, f"integers from {low} to {high}; 8-bit and 16-bit pictures can be read")
            values = values.astype(np.float32) / 65535
            notes.append("16-bit")
        values = _fill_channels(values.astype(np.float32, copy=False), channels)
        return Picture(_frames_first(values), "; ".join(notes))

    if mode not in ("1", "L", "LA", "RGB", "RGBA"):
        notes.append(f"{'palette' if mode == 'P' else mode} converted to RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4 and image.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency put over white")
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            image = white
    elif mode not in ("1", "L"):
        image = image.convert("RGB")
    if mode in ("1", "L", "LA") and channels != 1:
        notes.append("grey repeated")
    elif mode not in ("1", "L", "LA") and channels == 1:
        notes.append("colour converted to grey")
    if image.mode != "RGBA" and channels == 4:
        notes.append("opaque alpha added")
    wanted = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    values = np.array(image if image.mode == wanted else image.convert(wanted))
    values = values[:, :, None] if channels == 1 else values
    return Picture(_frames_first(values), "; ".join(notes) or None)


def decode_array(stream: BinaryIO, where: str, channels: int) -> Picture:
    """Decode a .npy array of (H, W, C), or (H, W) for one channel; uint8, uint16, or float32 in [0, 1].

    Raises:
        BadPicture: another shape or dtype, values out of range, or a damaged file.
    """
    try:
        values = np.load(stream, allow_pickle=False)
    except Exception as error:  # a damaged header raises nearly every type
        raise BadPicture(where, f"not a .npy array ({type(error).__name__}: {error})") from error
    if not isinstance(values, np.ndarray):
        raise BadPicture(where, "an archive of arrays; save one array with numpy.save")
    shape = values.shape
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or not values.size:
        raise BadPicture(where, f"an array of shape {shape}; it must be (height, width, {channels})")
    if values.shape[2] != channels:
        raise BadPicture(where, f"an array of {values.shape[2]} channels where {channels} are wanted")
    if values.dtype.name == "uint16":
        return Picture(_frames_first(values.astype(np.float32) / 65535), "16-bit")
    if values.dtype.name == "float32":
        _check_unit_range(values, where)
        return Picture(_frames_first(values.astype(np.float32)))
    if values.dtype.name != "uint8":
        raise BadPicture(where, f"an array of {values.dtype}; use uint8, uint16, or float32 between 0 and 1")
    return Picture(_frames_first(values))


# Folders


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
        if extension not in _extensions():
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
        return Picture(_frames_first(_fill_channels(self._images[index], self.channels)))

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
            folder of pictures; a picture; a .parquet file, a folder of such files or a pattern like `train-*.parquet`.
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
    if path.suffix.lower() == ".parquet":
        return Parquet(data, [path], [], channels, height, width)
    pictures, skipped = _sort_out(path.parent, [path.name]) if path.is_file() else ([], [Skipped(data, "not a file")])
    if not pictures:
        raise ValueError(f"{data!r} is no data: {skipped[0].reason}. Name a folder, a picture or a .parquet file.")
    return Folder(data, path.parent, pictures, [], channels, height, width)
