"""Where samples come from: folders of pictures, tables of paths, parquet files, tar shards, and digits that need no download.

Tensors here are (T, C, H, W): frames first, as pictures are decoded. `unveil.data` turns them into clips.
"""

import difflib
import glob
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from unveil.config import nearest
from unveil.decoding import Away, BadPicture, Picture, Skipped, decode, decode_array, extensions
from unveil.digits import Digits, MovingDigits
from unveil.parquet import Parquet
from unveil.reading import Patience, is_away, system_error
from unveil.shards import Shards, open_foreign, open_prepared, read_manifest
from unveil.tables import PATH, is_table, read_table

BUILTINS = tuple(name + split for name in ("digits", "moving-digits") for split in ("", ":train", ":test"))

T = TypeVar("T")


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

    def encoded(self, index: int) -> bytes | None:
        """The file that a sample is decoded from; None if it is made and not decoded. Raises BadPicture."""
        ...

    def label(self, index: int) -> int | None: ...

    def where(self, index: int) -> str:
        """What to call a sample in a message: a path below the folder, or 'row 17'."""
        ...


def as_text(where: str) -> str:
    """A path as text that every file can hold; bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(where).decode("utf-8", "backslashreplace")


class Folder:
    """Pictures below a folder, in the order of their paths, or one picture file.

    If every picture lies in a sub-folder, the name of the first-level folder is its class. empty_classes: such folders
    without a picture.
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
        self._patience = Patience()
        self.classes: tuple[str, ...] | None = None
        self.empty_classes: tuple[str, ...] = ()
        if all("/" in path for path in self.paths):
            folders = sorted({path.split("/")[0] for path in self.paths})
            self.classes = tuple(as_text(folder) for folder in folders)
            self._label_of = {folder: label for label, folder in enumerate(folders)}
            there = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
            self.empty_classes = tuple(as_text(name) for name in there if name not in self._label_of)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Picture:
        def use(stream: BinaryIO, where: str) -> Picture:
            if where.lower().endswith(".npy"):
                return decode_array(stream, where, self.channels)
            return decode(stream, where, self.channels, self.height, self.width)

        return self._read(index, use)

    def encoded(self, index: int) -> bytes:
        return self._read(index, lambda stream, where: stream.read())

    def _read(self, index: int, use: Callable[[BinaryIO, str], T]) -> T:
        """What `use` makes of a sample's file; raises BadPicture."""
        where = self.where(index)

        def once() -> T:
            with open(self.root / where, "rb") as stream:
                return use(stream, where)

        try:
            return self._patience.read(once, self.root)
        except (OSError, BadPicture) as error:
            system = system_error(error)
            if system is None:
                raise
            kind = Away if is_away(self.root) else BadPicture
            if isinstance(system, FileNotFoundError):
                raise kind(where, "vanished since the folder was opened") from system
            raise kind(where, f"cannot be read ({system.strerror or system})") from system

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
        self.classes, self.empty_classes = None, ()
        self._labels = [self._label_at(row) for row in range(len(self.columns.get("label", [])))]
        if any(label is not None for label in self._labels):
            self.classes = tuple(sorted({label for label in self._labels if label is not None}, key=_by_number))
            self._label_of = {label: i for i, label in enumerate(self.classes)}

    def _label_at(self, row: int) -> str | None:
        value = self.columns["label"][row]
        try:
            return cell_text(value) or None
        except TypeError:
            raise ValueError(
                f"{self.name!r} has {value!r} in its column 'label', row {row + 1}; a class is text or a number."
            ) from None

    def label(self, index: int) -> int | None:
        label = self._labels[index] if self.classes else None
        return None if label is None else self._label_of[label]


def cell_text(value: Any) -> str:
    """A cell of a table as text: "" for an empty one, and 3 for the 3.0 that a column of whole numbers with gaps holds.

    Raises:
        TypeError: it is neither text nor number.
    """
    if value is None or value != value:  # not a number: a gap, too
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


def _by_number(label: str) -> tuple[int, float, str]:
    """Whole numbers first, in their order, then words; 1 and 01 are different words."""
    whole = label.removeprefix("-").isdecimal()
    return (0, int(label), label) if whole else (1, 0, label)


class Chosen:
    """Some samples of a source, in a given order."""

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self.source, self.rows = source, tuple(rows)
        self.name, self.classes, self.skipped = source.name, source.classes, source.skipped

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Picture:
        return self.source.read(self.rows[index])

    def encoded(self, index: int) -> bytes | None:
        return self.source.encoded(self.rows[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.rows[index])

    def where(self, index: int) -> str:
        return self.source.where(self.rows[index])


def check_classes(source: Source) -> None:
    """Refuse class folders without a picture: what is learned would lack a class that somebody expects.

    Raises:
        ValueError: names the first.
    """
    empty: tuple[str, ...] = source.empty_classes if isinstance(source, Folder) else ()
    if len(empty) > 0:
        others = f", and so have {len(empty) - 1} others" if len(empty) > 1 else ""
        raise ValueError(
            f"{source.name} has a folder {empty[0]!r} without a picture that can be used{others}. Add some, or remove it."
        )


def files_of(source: Source) -> list[str]:
    """What each sample is read from, the same text for the same file however its path is spelt; rows by their number."""
    if isinstance(source, Chosen):
        names = files_of(source.source)
        return [names[row] for row in source.rows]
    if not isinstance(source, Folder):
        name = os.path.realpath(source.root) if isinstance(source, Shards) else source.name
        return [f"{name}/{source.where(i)}" for i in range(len(source))]
    real: dict[str, str] = {}  # of folders, which are fewer than files
    names = []
    for i in range(len(source)):
        folder, name = os.path.split(os.path.join(source.root, source.where(i)))
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        path = os.path.join(real[folder], name)
        names.append(os.path.realpath(path) if os.path.islink(path) else path)
    return names


def digest_of(source: Source) -> str:
    """What tells these samples from others: names, labels, and how long the files are; of shards, of these alone."""
    digest = hashlib.sha256()

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return -1

    if isinstance(source, Shards):
        for path in source.paths:
            digest.update(repr((path, size(source.root / path))).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]
    for i in range(len(source)):
        length = size(source.root / source.where(i)) if isinstance(source, Folder) else 0
        digest.update(repr((source.where(i), source.label(i), length)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def trained_on_too(source: Source, test: Source) -> int:
    """How many of the test samples are also trained on, as far as files and rows tell."""
    there = set(files_of(source))
    return sum(name in there for name in files_of(test))


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


def _one_set(data: str, root: Path, files: Sequence[str], extension: str, kind: str) -> list[Path]:
    """The files of a folder that end so.

    Raises:
        ValueError: they are of several sets, as of a train and a test set, which must not be mixed by accident.
    """
    shards = [path for path in files if path.lower().endswith(extension)]
    groups = sorted({re.sub(r"[-_.]?\d+(-of-\d+)?$", "", path[: -len(extension)]) for path in shards})
    if len(groups) > 1:
        raise ValueError(
            f"{data!r} holds {len(groups)} different sets of {kind} files ({', '.join(groups[:5])}). "
            f"Name one, for example '{root / groups[0]}*{extension}'."
        )
    return [root / path for path in shards]


def _open_folder(
    data: str, root: Path, channels: int, height: int | None, width: int | None
) -> "Folder | Parquet | Shards":
    manifest = read_manifest(root)
    if manifest is not None:
        return open_prepared(data, root, manifest, channels, height, width)
    files, skipped = _walk(root)
    pictures, not_pictures = _sort_out(root, files)
    if pictures:
        return Folder(data, root, pictures, skipped + not_pictures, channels, height, width)
    for extension, kind in ((".parquet", "parquet"), (".tar", "tar")):
        shards = _one_set(data, root, files, extension, kind)
        if shards:
            others = [bad for bad in not_pictures if not bad.where.lower().endswith(extension)]
            open_them = Parquet if extension == ".parquet" else open_foreign
            return open_them(data, shards, skipped + others, channels, height, width)
    found = f"{len(files)} files, none of which is a picture" if files else "no files"
    raise ValueError(
        f"{data!r} holds {found}. Name a folder with pictures (.png, .jpg, ...), or a .parquet or .tar file."
    )


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
        hint = "Name a folder, a picture, a .parquet or .tar file that exists, or a built-in set. " + nearest(
            data, BUILTINS
        )
    return ValueError(f"There is no data at {data!r}. {hint}")


def open_source(
    data: str, channels: int, frames: int = 1, height: int | None = None, width: int | None = None
) -> Source:
    """Open what the user named.

    Args:
        data: `digits` or `moving-digits`, perhaps with `:train` or `:test` (a folder of that name is `./digits`); a
            folder of pictures; a picture; a .csv or .parquet with a column `path`; a .parquet file of pictures or a .tar
            of them, a folder of such files or a pattern like `train-*.tar`; a folder that `unveil prepare` made.
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
        raise ValueError(
            f"{data!r} was given to a model of clips of {frames} frames, and clips can be read of moving-digits alone so far. "
            "Use that, or a model of pictures (frames=1)."
        )
    if data in BUILTINS:
        return Digits(data, split or "all", channels)
    if pattern:
        shards = [Path(shard) for shard in sorted(glob.glob(str(path), recursive=True))]
        if not shards:
            raise ValueError(f"No file matches {data!r}. Check the pattern; it must match .parquet or .tar files.")
        endings = {shard.suffix.lower() for shard in shards}
        if endings == {".tar"}:
            return open_foreign(data, shards, [], channels, height, width)
        other = [shard for shard in shards if shard.suffix.lower() != ".parquet"]
        if other:
            raise ValueError(
                f"{data!r} matches {str(other[0])!r}, which is not a .parquet file; a pattern matches these, or .tar files, "
                "and no others. Name the folder instead."
            )
        return Parquet(data, shards, [], channels, height, width)
    if path.is_dir():
        return _open_folder(data, path, channels, height, width)
    if path.is_file() and is_table(path):
        return Listed(data, path, channels, height, width)
    if path.suffix.lower() == ".parquet":
        return Parquet(data, [path], [], channels, height, width)
    if path.suffix.lower() == ".tar":
        return open_foreign(data, [path], [], channels, height, width)
    pictures, skipped = _sort_out(path.parent, [path.name]) if path.is_file() else ([], [Skipped(data, "not a file")])
    if not pictures:
        raise ValueError(
            f"{data!r} is no data: {skipped[0].reason}. Name a folder, a picture, a .parquet or a .tar file."
        )
    return Folder(data, path.parent, pictures, [], channels, height, width)
