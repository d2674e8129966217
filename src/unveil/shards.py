"""Samples in tar archives: shards that `unveil prepare` made, and foreign ones in webdataset's layout.

Members of one sample lie side by side and share a key: 000000123.jpg, 000000123.cls, 000000123.json.
"""

import contextlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unveil.decoding import Away, BadPicture, Picture, Skipped, decode_bytes, extensions
from unveil.reading import Patience, is_away

FORMAT = "unveil-shards-1"
MANIFEST, PLAN = "manifest.json", "prepare.json"  # of a prepared folder, and of one that is not finished
# Of one sample, 20 bytes: where its picture lies in its shard, its class or -1, and the number that is its key; of a foreign
# one, which of its shard's keys.
INDEX = np.dtype([("offset", "<i8"), ("size", "<u4"), ("label", "<i4"), ("number", "<u4")])
MAX_OPEN = 128  # shards at a time; systems let a process open some 1,000 files
MAX_LABEL = 1_000_000


class Shards:
    """Samples of tar archives, each read at its place.

    Held in memory are 20 bytes for each sample, and of foreign ones the key. Files are opened when a process first reads of
    them, and a sample is read without moving a position that another process might share.

    starts: the number of the first sample of each shard, and behind the last one that of all samples.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Sequence[str],
        index: np.ndarray,
        counts: Sequence[int],
        keys: Sequence[np.ndarray] | None,
        classes: tuple[str, ...] | None,
        skipped: list[Skipped],
        channels: int,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """
        Args:
            paths: of the shards, below root.
            index: the samples of all shards, of INDEX.
            counts: how many each shard has.
            keys: of each shard's samples, bytes; None if numbers of nine digits are their keys.
        """
        self.name, self.root, self.paths = name, root, tuple(paths)
        self.starts = np.cumsum([0, *counts])
        self.classes, self.skipped = classes, skipped
        self.channels, self.height, self.width = channels, height, width
        self._index, self._keys = index, keys
        self._patience = Patience()
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors by shard, the last one used at the end

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors mean nothing to another process

    def __del__(self) -> None:
        for shard in list(getattr(self, "_open", ())):
            self._close(shard)

    def _close(self, shard: int) -> None:
        with contextlib.suppress(OSError):
            os.close(self._open.pop(shard))

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._close(next(iter(self._open)))
            self._open[shard] = os.open(self.root / self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        """So many bytes from there, or fewer if the file ends before."""
        try:
            file = self._descriptor(shard)
            data = os.pread(file, size, offset)
            while 0 < len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
                data += more
        except OSError:
            if shard in self._open:  # what was opened before a disk went away may not come back with it
                self._close(shard)
            raise
        return data

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def encoded(self, index: int) -> bytes:
        """The file of a sample; raises BadPicture."""
        shard = self._shard(index)
        offset, size = int(self._index["offset"][index]), int(self._index["size"][index])
        try:
            data = self._patience.read(lambda: self._read_at(shard, offset, size), self.root)
        except OSError as error:
            kind = Away if is_away(self.root) else BadPicture
            reason = f"its shard cannot be read ({error.strerror or error})"
            raise kind(self.where(index), reason) from error
        if len(data) < size:
            raise BadPicture(self.where(index), f"its shard is cut: it ends {size - len(data)} bytes too early for it")
        if not size:
            raise BadPicture(self.where(index), "empty file (0 bytes)")
        return data

    def read(self, index: int) -> Picture:
        return decode_bytes(self.encoded(index), self.where(index), self.channels, self.height, self.width)

    def label(self, index: int) -> int | None:
        label = int(self._index["label"][index])
        return label if self.classes is not None and label >= 0 else None

    def where(self, index: int) -> str:
        shard, number = self._shard(index), int(self._index["number"][index])
        key = f"{number:09}" if self._keys is None else os.fsdecode(bytes(self._keys[shard][number]))
        return f"{self.paths[shard]}/{key}"


# Prepared ones


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `unveil prepare` says of a folder; None if it is another program's, or none.

    Raises:
        ValueError: it was not finished, or is of another version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(written, str) and written.startswith("unveil-shards-"):
        if written != FORMAT:
            raise ValueError(f"{folder} was made as {written}; this version reads {FORMAT}. Prepare it again.")
        return manifest
    if (folder / PLAN).is_file():
        raise ValueError(
            f"{folder} is not finished: `unveil prepare` was interrupted there. The same command goes on where it stopped."
        )
    return None


def open_prepared(
    name: str,
    root: Path,
    manifest: dict[str, Any],
    channels: int,
    height: int | None = None,
    width: int | None = None,
) -> Shards:
    """The shards that a manifest lists.

    Raises:
        ValueError: one of them or its index is missing or damaged.
    """
    try:
        names = [str(shard["name"]) for shard in manifest["shards"]]
        counts = [int(shard["samples"]) for shard in manifest["shards"]]
        lengths = [int(shard["bytes"]) for shard in manifest["shards"]]
        classes = manifest["classes"] and tuple(str(label) for label in manifest["classes"])
        index = np.empty(
            sum(counts), INDEX
        )  # filled in place: in pieces first, a billion samples took 40 GB and not 20
    except MemoryError:
        raise ValueError(
            f"{name!r} has {sum(counts):,} samples, whose index of {INDEX.itemsize} bytes each does not fit into the memory. "
            "Use a larger machine, or fewer shards."
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{root / MANIFEST} is damaged ({error!r}). Prepare the pictures again.") from None
    missing = [shard for shard in names if Path(shard).name != shard or not (root / shard).is_file()]
    if missing or not names:
        raise ValueError(
            f"{name!r} lacks {len(missing)} of its {len(names)} shards, the first is {missing[0] if missing else ''!r}. "
            "Copy it again, or prepare the pictures again."
        )
    longer = [s for s, length in zip(names, lengths, strict=True) if (root / s).stat().st_size > length]
    if longer:  # a shorter one is cut, and what is left of it can be read
        raise ValueError(
            f"{root / longer[0]} is longer than {MANIFEST} says, so it is another file. Copy {name!r} again."
        )
    first = 0
    for shard, count in zip(names, counts, strict=True):
        path = (root / shard).with_suffix(".npy")
        try:
            part = np.load(path, allow_pickle=False)
        except Exception as error:  # a damaged file raises nearly every type
            raise ValueError(f"{path} cannot be read ({error}). Copy {name!r} again.") from None
        if part.dtype != INDEX or part.shape != (count,):
            raise ValueError(f"{path} is no index of the {count} samples of its shard. Copy {name!r} again.")
        if classes and count and int(part["label"].max()) >= len(classes):
            raise ValueError(
                f"{path} has a class {int(part['label'].max())}, and {MANIFEST} names {len(classes)}. Copy it again."
            )
        index[first : first + count] = part
        first += count
    return Shards(name, root, names, index, counts, None, classes or None, [], channels, height, width)


# Foreign ones


@dataclass
class _Found:
    """The members of one key that are looked for."""

    pictures: list[tuple[int, int]]
    label: int | None = None


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    """What a .cls file holds; None if it does not reach its end or is no number of a class."""
    file = tar.extractfile(member) if member.size <= 64 else None
    try:
        text = b"" if file is None else file.read()
    except tarfile.ReadError:
        return None
    if not text.strip().removeprefix(b"-").isdigit():
        raise ValueError(f"{member.name} holds {text[:20]!r}, and a class is a whole number: number the classes from 0")
    label = int(text)
    if label >= MAX_LABEL:
        raise ValueError(f"{member.name} holds a class {label}, and classes are numbered from 0: number them anew")
    return max(label, -1)


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """What an archive holds, in its order, without keeping it.

    Raises:
        tarfile.ReadError: it is none, or is cut; what lies before the cut has come by then.
    """
    with tarfile.open(path, "r:", errorlevel=1) as tar:
        while (member := tar.next()) is not None:
            yield tar, member
            tar.members = []  # type: ignore[attr-defined]  # it would keep a million of them
        tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
        end = tar.fileobj.read(tarfile.BLOCKSIZE)  # type: ignore[union-attr]
        # A damaged header ends an archive without a word.
        if end.strip(b"\0") or not end:
            raise tarfile.ReadError("no end of the archive where one should be")


def _scan(path: Path, shard: str) -> tuple[np.ndarray, np.ndarray, bool, list[Skipped]]:
    """The samples of a foreign shard with their keys, whether one has a label, and what cannot be used."""
    found: dict[bytes, _Found] = {}
    skipped = []
    try:
        for tar, member in _members(path):
            folder, _, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            key = os.fsencode(f"{folder}/{stem}" if folder else stem)
            # One dot alone: 1.seg.png is no picture to look at, but something that belongs to one.
            if f".{extension.lower()}" in extensions():
                if member.size > np.iinfo(INDEX["size"]).max or member.issparse():
                    skipped.append(Skipped(f"{shard}/{member.name}", "above 4 GB, or with holes"))
                    continue
                found.setdefault(key, _Found([])).pictures.append((member.offset_data, member.size))
            elif extension == "cls":
                found.setdefault(key, _Found([])).label = _label(tar, member)
    except tarfile.ReadError as error:
        if not found:
            raise ValueError(
                f"{path} cannot be read as a tar archive ({error}); one that is compressed must be unpacked"
            ) from None
        skipped.append(Skipped(shard, f"cut or damaged after {len(found)} samples; those behind are lost ({error})"))
    keys, rows = [], []
    for key, members in found.items():
        if len(members.pictures) > 1:
            raise ValueError(f"{path} has {len(members.pictures)} pictures of the key {os.fsdecode(key)!r}; keep one")
        for offset, size in members.pictures:
            rows.append((offset, size, -1 if members.label is None else members.label, len(keys)))
            keys.append(key)
    labelled = any(row[2] >= 0 for row in rows)
    return np.array(rows, INDEX), np.array(keys, np.bytes_), labelled, skipped


def open_foreign(
    name: str,
    paths: Sequence[Path],
    skipped: list[Skipped],
    channels: int,
    height: int | None = None,
    width: int | None = None,
) -> Shards:
    """Tar archives in webdataset's layout: a picture, and perhaps its class as a number in .cls, for each key.

    Their headers are read now, so that of a million samples this takes minutes; those of prepared shards are not.

    Raises:
        ValueError: an archive cannot be read, or holds no picture or two for one key, or a class that is no number.
    """
    root = Path(os.path.commonpath([path.parent for path in paths]))
    shards, parts, keys = [], [], []
    labelled = False
    for path in paths:
        shard = path.relative_to(root).as_posix()
        try:
            part, names, has_labels, bad = _scan(path, shard)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}.") from None
        skipped = skipped + bad
        labelled |= has_labels
        if len(part):
            shards.append(shard)
            parts.append(part)
            keys.append(names)
    if not parts:
        raise ValueError(f"{name!r} holds no picture. A shard has members such as 000123.jpg and 000123.cls.")
    highest = max(int(part["label"].max()) for part in parts)
    classes = tuple(str(label) for label in range(highest + 1)) if labelled else None
    counts = [len(part) for part in parts]
    return Shards(name, root, shards, np.concatenate(parts), counts, keys, classes, skipped, channels, height, width)
