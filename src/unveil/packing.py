"""Shards as they are made: one picture checked and shrunk to a file, and many as one tar archive with its index."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from unveil.checkpoint import replacing, write_atomically
from unveil.decoding import (
    NPY,
    Away,
    BadPicture,
    Skipped,
    deep_values,
    has_alpha,
    is_deep,
    load_array,
    open_image,
    over_white,
    telling,
)
from unveil.shards import INDEX
from unveil.sources import Source, as_text

Format = Literal["jpeg", "png", "webp"]
Outcome = Literal["copied", "rewritten", "compressed", "shrunk"]

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_LONGEST = {"JPEG": 65_535, "PNG": 2**31 - 1, "WEBP": 16_383}  # pixels of a side
# Of a file that is small enough already, what can stay as it is because every reader of tar shards knows it.
_COPIED_MODES = {"JPEG": ("L", "RGB"), "PNG": ("L", "LA", "RGB", "RGBA"), "WEBP": ("RGB", "RGBA")}
_WHOLE = {"uint8": 255, "uint16": 65_535}  # what 1 is in an array of whole numbers


@dataclass(frozen=True, kw_only=True)
class Form:
    """What pictures become.

    side: pixels of the short side; those of smaller ones stay. quality: of JPEG and WebP, 1 to 100.
    """

    side: int
    format: Format
    quality: int


@dataclass(frozen=True)
class Packed:
    """A picture as a file.

    extension: its type, jpg, png, webp or npy. outcome: whether it is the same file, another of the same values, one of the
    same size that was compressed with loss, or a smaller picture. note: what had to be converted, for people. mean, square:
    of the channels' values in [0, 1] and of their squares, (C,): RGB, or those of an array.
    """

    extension: str
    data: bytes
    outcome: Outcome
    note: str | None
    mean: np.ndarray
    square: np.ndarray


def pack(data: bytes, where: str, form: Form) -> Packed:
    """Decode a picture, so that it is known to be whole, and make the file of it that is kept.

    A picture that is small enough, upright and of the wanted format is kept byte for byte. Grey of more than eight bits stays
    so, as PNG, or .npy of floats; transparency stays as PNG or WebP; arrays stay arrays.

    Args:
        data: a picture file or a .npy array. where: what to call it in a message.

    Raises:
        BadPicture: damaged, truncated, no picture, above Pillow's limit of pixels, or too long for the format.
    """
    if data.startswith(NPY):
        return _pack_array(data, where, form.side)
    with telling(where):
        return _pack_picture(data, where, form)


def _pack_picture(data: bytes, where: str, form: Form) -> Packed:
    image, notes = open_image(io.BytesIO(data))
    stored, frames, before = image.format, getattr(image, "n_frames", 1), image.size
    image.draft(None, (2 * form.side, 2 * form.side))  # JPEG at 1/2, 1/4 or 1/8, at least twice what is wanted
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9)
    ImageOps.exif_transpose(image, in_place=True)
    mode, small = image.mode, min(before) <= form.side

    if is_deep(image):
        values = deep_values(image, where)
        if mode != "F":
            values = (values * 65_535).round().astype(np.uint16)
        shrunk = _shrink(values, form.side)
        outcome: Outcome = "rewritten" if small else "shrunk"
        if mode == "F":
            return _packed("npy", _npy(shrunk), outcome, notes, *_moments(shrunk, 3))
        return _packed("png", _png(shrunk), outcome, notes, *_moments(shrunk, 3))

    if mode not in ("1", "L", "LA", "RGB", "RGBA"):
        notes.append(f"{'palette' if mode == 'P' else mode} converted to RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not has_alpha(image):
            image = image.convert("L" if mode == "LA" else "RGB")
    else:
        image = image.convert("L" if mode in ("1", "L") else "RGB")
    kept = "PNG" if image.mode == "RGBA" and form.format == "jpeg" else form.format.upper()

    if small and upright and frames == 1 and stored == kept and mode in _COPIED_MODES[kept]:
        seen = [note for note in notes if not note.startswith("16-bit")]  # which a copy keeps
        return _packed(_EXTENSIONS[kept], data, "copied", seen, *_picture_moments(image))
    if not small:
        image = _shrink_picture(image, form.side)
    if max(image.size) > _LONGEST[kept]:
        raise BadPicture(
            where, f"{before[0]} x {before[1]} pixels are too long for {kept}; cut it up, or use --format png"
        )
    stream = io.BytesIO()
    if kept == "PNG":
        image.save(stream, "PNG")
    else:
        image.save(stream, kept, quality=form.quality)
    outcome = "shrunk" if not small else "rewritten" if kept == "PNG" else "compressed"
    return _packed(_EXTENSIONS[kept], stream.getvalue(), outcome, notes, *_picture_moments(image))


def _packed(
    extension: str, data: bytes, outcome: Outcome, notes: list[str], mean: np.ndarray, square: np.ndarray
) -> Packed:
    return Packed(extension, data, outcome, "; ".join(notes) or None, mean, square)


def _size(width: int, height: int, side: int) -> tuple[int, int]:
    """Of a picture whose short side becomes `side`; of a smaller one its own."""
    scale = min(1.0, side / min(width, height))
    return (round(width * scale), round(height * scale))


def _shrink_picture(image: Image.Image, side: int) -> Image.Image:
    """With the short side of so many pixels; bicubic over all pixels that a new one covers."""
    size = _size(*image.size, side)
    if image.mode != "RGBA":
        return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image.resize(size, Image.Resampling.BICUBIC)  # by premultiplied colours, as Pillow does for this mode


def _shrink(values: np.ndarray, side: int) -> np.ndarray:
    """The same of an array, (H, W) or (H, W, C), of its own dtype."""
    height, width = values.shape[:2]
    if min(height, width) <= side:
        return values
    channels_first = torch.from_numpy(values.astype(np.float32)).reshape(height, width, -1).permute(2, 0, 1)[None]
    size = _size(width, height, side)[::-1]
    small = torch.nn.functional.interpolate(channels_first, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    small = small.clamp(0, _WHOLE.get(values.dtype.name, 1))  # bicubic overshoots at edges
    small = small.round() if values.dtype.name in _WHOLE else small
    return small.numpy().astype(values.dtype).reshape(*size, *values.shape[2:])


def _pack_array(data: bytes, where: str, side: int) -> Packed:
    values = load_array(io.BytesIO(data), where)
    shrunk = _shrink(values, side)
    if shrunk is values:
        return _packed("npy", data, "copied", [], *_moments(values))
    return _packed("npy", _npy(shrunk), "shrunk", [], *_moments(shrunk))


def _npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()


def _png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def _moments(values: np.ndarray, repeated: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of each channel of an array, in [0, 1]; of one channel, as often as it will be repeated."""
    scaled = values.reshape(values.shape[0] * values.shape[1], -1).astype(np.float64)
    scaled /= _WHOLE.get(values.dtype.name, 1)
    return scaled.mean(0).repeat(repeated), (scaled**2).mean(0).repeat(repeated)


def _picture_moments(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of red, green and blue, in [0, 1], transparency over white."""
    if image.mode == "RGBA":
        image = over_white(image).convert("RGB")
    counts = np.array(image.histogram(), np.float64).reshape(-1, 256)
    counts = counts.repeat(3 // len(counts), axis=0) / (image.width * image.height)
    values = np.arange(256) / 255
    return counts @ values, counts @ values**2


# Shards


def sidecar(shard: Path) -> Path:
    """The file that says of a shard that it is finished, and what is in it."""
    return shard.with_suffix(".json")


def finished_shard(shard: Path) -> dict[str, Any] | None:
    """What `write_shard` said of a shard; None if it was not made, or not wholly."""
    try:
        about = json.loads(sidecar(shard).read_text(encoding="utf-8"))
        whole = not about["samples"] or (shard.stat().st_size == about["bytes"] and shard.with_suffix(".npy").is_file())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if whole else None


def _bytes_of(source: Source, index: int) -> bytes:
    """A sample as a file: its own, or its values without loss."""
    data = source.encoded(index)
    if data is not None:
        return data
    values = source.read(index).values[0].permute(1, 2, 0).numpy()
    values = values[:, :, 0] if values.shape[2] == 1 else values
    return _png(values) if values.dtype == np.uint8 else _npy(values)


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(
        data
    )  # its time, owner and mode stay those of every other, so that the same pictures give the same bytes
    tar.addfile(about, io.BytesIO(data))


def write_shard(
    shard: Path, source: Source, indices: Sequence[int], first: int, form: Form, told: Callable[[], None]
) -> None:
    """Make one shard, its index, and last the file that says that it is finished.

    Args:
        indices: the source's samples in it, in this order.
        first: the number of the first of them, which is its key; those that cannot be used leave theirs out.
        told: called after each sample; what it raises ends the work, and nothing is left of the shard.

    Raises:
        ValueError: the source is out of reach.
    """
    rows: list[tuple[int, int, int, int]] = []
    skipped: list[Skipped] = []
    notes: list[tuple[str, str]] = []
    outcomes: Counter[str] = Counter()
    moments: dict[int, list[Any]] = {}
    with replacing(shard) as part:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, index in enumerate(indices, start=first):
                where, label = as_text(source.where(index)), source.label(index)
                try:
                    packed = pack(_bytes_of(source, index), where, form)
                except Away as away:
                    raise ValueError(
                        f"{source.name!r} cannot be read any more ({away}): has it moved? Finished shards are kept; the same "
                        "command goes on from there once it is back."
                    ) from None
                except BadPicture as bad:
                    skipped.append(Skipped(where, bad.reason))
                    told()
                    continue
                begin = tar.offset + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
                rows.append((begin, len(packed.data), -1 if label is None else label, number))
                _member(tar, f"{number:09}.{packed.extension}", packed.data)
                about: dict[str, Any] = {"path": where}
                if source.classes:
                    # -1 is what others write for none; every sample must have the same members for Hugging Face datasets.
                    _member(tar, f"{number:09}.cls", str(-1 if label is None else label).encode())
                    about["label"] = None if label is None else as_text(source.classes[label])
                _member(tar, f"{number:09}.json", json.dumps(about).encode())
                outcomes[packed.outcome] += 1
                if packed.note:
                    notes.append((where, packed.note))
                sums = moments.setdefault(len(packed.mean), [0, np.zeros(1), np.zeros(1)])
                sums[:] = sums[0] + 1, sums[1] + packed.mean, sums[2] + packed.square
                told()
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = part.stat().st_size
    if rows:
        with replacing(shard.with_suffix(".npy")) as part, part.open("wb") as file:
            np.save(file, np.array(rows, INDEX), allow_pickle=False)
    else:
        shard.unlink()  # readers trip over an archive without a member
    said = {
        "name": shard.name,
        "samples": len(rows),
        "bytes": size,
        "sha256": digest,
        "outcomes": dict(outcomes),
        "skipped": [[bad.where, bad.reason] for bad in skipped],
        "notes": notes,
        "moments": {channels: [count, list(a), list(b)] for channels, (count, a, b) in moments.items()},
    }
    write_atomically(sidecar(shard), lambda part: part.write_text(json.dumps(said) + "\n", encoding="utf-8"))
