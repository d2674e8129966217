"""One picture from its bytes: what Pillow or numpy can read, as (T, C, H, W) with the channels that are wanted.

What had to be converted is noted; what cannot be used is a `BadPicture` with its reason.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# EPS starts Ghostscript on what may be anybody's file; the others are stubs that Pillow recognises but cannot decode.
_REFUSED_FORMATS = ("EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF")
NPY = b"\x93NUMPY"  # what a .npy file begins with


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


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its picture before it is decoded.

    format: as Pillow calls it, JPEG, PNG, ..., or NPY. mode: Pillow's, L for grey, RGB, P for a palette, ...; of an array its
    number of channels. bits: of one value. height, width: as stored. frames: more than 1 in a film. turned: whether EXIF says
    that it lies on its side or is mirrored.
    """

    format: str
    mode: str
    bits: int
    height: int
    width: int
    frames: int = 1
    turned: bool = False

    @property
    def grey(self) -> bool:
        return self.mode in ("1", "L", "LA", "I", "F") or self.mode.startswith("I;")


class BadPicture(ValueError):
    """One sample cannot be decoded; the others may be fine."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Away(BadPicture):
    """One sample cannot be read because everything that it lies among is out of reach; it may come back."""


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    usual = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # tried first, because every other one costs time
    return (*usual, *(name for name in Image.ID if name not in usual + _REFUSED_FORMATS))


@functools.cache
def extensions() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(ext for ext, name in known.items() if name in _formats()) | {".npy"}


def fill_channels(gray: np.ndarray, channels: int) -> np.ndarray:
    """(H, W) in [0, 1] or uint8 -> (H, W, C), repeated; a fourth channel is opaque."""
    values = np.repeat(gray[:, :, None], channels, axis=2)
    if channels == 4:
        values[:, :, 3] = 255 if gray.dtype == np.uint8 else 1
    return values


def frames_first(values: np.ndarray) -> Tensor:
    """(H, W, C) -> (1, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]


def _check_unit_range(values: np.ndarray, where: str) -> None:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # written so that NaN is refused too
        raise BadPicture(where, f"float values from {low:.4g} to {high:.4g}; they must be between 0 and 1")


def stored_white(image: Image.Image) -> int | None:
    """The value of white in the file of a picture that is not decoded yet, if it is above 255; 0 if channels have different
    ones. None of other pictures. Pillow brings what is not `is_deep` down to 255."""
    if not image.tile:  # type: ignore[attr-defined]
        return None
    codec, _, _, stored = image.tile[0]  # type: ignore[attr-defined]
    stored = stored if isinstance(stored, tuple) else (stored,)
    if codec == "SGI16" or (stored and isinstance(stored[0], str) and ";16" in stored[0]):
        return 65535
    white = None
    if image.format == "PPM" and len(stored) == 2:
        white = stored[1]
    elif image.format == "JPEG2000":
        whites = {2**bits - 1 for bits in _jpeg2000_bits(image)}
        white = whites.pop() if len(whites) == 1 else 0 if max(whites, default=0) > 255 else None
    return white if white == 0 or (white is not None and white > 255) else None


def _jpeg2000_bits(image: Image.Image) -> list[int]:
    """Of each channel, as the first segment of the codestream says, which Pillow reads of grey pictures alone."""
    stream = image.fp  # type: ignore[attr-defined]
    before = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(before)
    start = data.find(b"\xff\x4f\xff\x51")  # SOC and SIZ, whose fields are in ISO/IEC 15444-1, A.5.1
    if start < 0:
        return []
    num_channels = int.from_bytes(data[start + 40 : start + 42], "big")
    return [(size & 0x7F) + 1 for size in data[start + 42 : start + 42 + 3 * num_channels : 3]]


_BITS = {"1": 1, "I": 32, "F": 32}  # of Pillow's modes; 8 in the others, unless 16 are stored
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


def header_of(stream: BinaryIO, where: str) -> Header:
    """What a picture file or a .npy file says of itself.

    Raises:
        BadPicture: it says nothing that can be understood.
    """
    try:
        is_array = stream.read(len(NPY)) == NPY  # not by its name: in a shard it has none
        stream.seek(0)
        if is_array:
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, kind = readers[np.lib.format.read_magic(stream)](stream)
            channels = shape[2] if len(shape) == 3 else 1
            return Header("NPY", f"{channels} channel{'s' * (channels != 1)}", 8 * kind.itemsize, shape[0], shape[1])
        with Image.open(stream, formats=_formats()) as image:
            is_16 = ";16" in image.mode or stored_white(image) is not None
            bits = 16 if is_16 else _BITS.get(image.mode, 8)
            turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
            frames = getattr(image, "n_frames", 1)
            return Header(image.format or "", image.mode, bits, image.height, image.width, frames, turned)
    except Exception as error:  # Pillow's plugins raise nearly every type on a damaged file
        raise BadPicture(where, f"has no header that can be read ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def telling(where: str) -> Iterator[None]:
    """Around what Pillow does with a picture: whatever it raises is raised as a BadPicture with its reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise BadPicture(where, f"above Pillow's limit of {limit:.3g} megapixels; shrink it first") from error
    except UnidentifiedImageError as error:
        raise BadPicture(where, "not a picture that Pillow can read") from error
    except Exception as error:  # Pillow's plugins raise nearly every type on a damaged file
        raise BadPicture(where, f"cannot be decoded ({type(error).__name__}: {error})") from error


def open_image(stream: BinaryIO) -> tuple[Image.Image, list[str]]:
    """A picture file, not yet decoded, and what of it will not be seen; to be called inside `telling`."""
    image: Image.Image = Image.open(stream, formats=_formats())
    notes = []
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1:
        notes.append(f"first of {num_frames} frames used")
    # Sixteen bits of colour become eight without a word.
    if stored_white(image) is not None and not is_deep(image):
        notes.append("16-bit colour read as 8-bit")
    return image, notes


def is_deep(image: Image.Image) -> bool:
    """Whether its one channel has more than eight bits."""
    return image.mode.startswith("I") or image.mode == "F"


def deep_values(image: Image.Image, where: str) -> np.ndarray:
    """A picture of one deep channel, (H, W), float32 in [0, 1]; 65535 of sixteen bits is 1.

    Raises:
        BadPicture: values out of that range.
    """
    values = np.array(image)
    if image.mode == "F":
        _check_unit_range(values, where)
        return values.astype(np.float32, copy=False)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BadPicture(where, f"integers from {low} to {high}; 8-bit and 16-bit pictures can be read")
    return values.astype(np.float32) / 65535


def over_white(image: Image.Image) -> Image.Image:
    """An RGBA picture without its transparency, still RGBA."""
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white


def has_alpha(image: Image.Image) -> bool:
    """Whether some pixel of an RGBA picture is not opaque."""
    return image.getchannel("A").getextrema() != (255, 255)


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
    with telling(where):
        return _decode(stream, where, channels, height, width)


def _decode(stream: BinaryIO, where: str, channels: int, height: int | None, width: int | None) -> Picture:
    image, notes = open_image(stream)
    if height is not None and width is not None:
        # Random crops keep a fifth of the area or more (Training.crop_scale), so this many pixels keep them sharp.
        # The longer side for both, because the picture may still be turned upright.
        side = int(max(height, width) / 0.2**0.5) + 1
        image.draft(None, (side, side))  # does something for JPEG only

    ImageOps.exif_transpose(image, in_place=True)  # in place, for otherwise it copies every picture
    mode = image.mode
    if is_deep(image):
        notes.append("float" if mode == "F" else "16-bit")
        values = fill_channels(deep_values(image, where), channels)
        return Picture(frames_first(values), "; ".join(notes))

    if mode not in ("1", "L", "LA", "RGB", "RGBA"):
        notes.append(f"{'palette' if mode == 'P' else mode} converted to RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4 and has_alpha(image):
            notes.append("transparency put over white")
            image = over_white(image)
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
    return Picture(frames_first(values), "; ".join(notes) or None)


def load_array(stream: BinaryIO, where: str) -> np.ndarray:
    """A .npy array as it is: (H, W) or (H, W, C) of uint8, uint16, or float32 in [0, 1].

    Raises:
        BadPicture: another shape or dtype, values out of range, or a damaged file.
    """
    try:
        values = np.load(stream, allow_pickle=False)
    except Exception as error:  # a damaged header raises nearly every type
        raise BadPicture(where, f"not a .npy array ({type(error).__name__}: {error})") from error
    if not isinstance(values, np.ndarray):
        raise BadPicture(where, "an archive of arrays; save one array with numpy.save")
    if values.ndim not in (2, 3) or not values.size:
        raise BadPicture(where, f"an array of shape {values.shape}; it must be (height, width, channels)")
    if values.dtype.name == "float32":
        _check_unit_range(values, where)
    elif values.dtype.name not in ("uint8", "uint16"):
        raise BadPicture(where, f"an array of {values.dtype}; use uint8, uint16, or float32 between 0 and 1")
    return values


def decode_array(stream: BinaryIO, where: str, channels: int) -> Picture:
    """Decode a .npy array of (H, W, C), or (H, W) for one channel; uint8, uint16, or float32 in [0, 1].

    Raises:
        BadPicture: another shape or dtype, values out of range, or a damaged file.
    """
    values = load_array(stream, where)
    values = values[:, :, None] if values.ndim == 2 else values
    if values.shape[2] != channels:
        raise BadPicture(where, f"an array of {values.shape[2]} channels where {channels} are wanted")
    if values.dtype.name == "uint16":
        return Picture(frames_first(values.astype(np.float32) / 65535), "16-bit")
    return Picture(frames_first(values.astype(values.dtype.newbyteorder("="))))


def decode_bytes(
    data: bytes, where: str, channels: int, height: int | None = None, width: int | None = None
) -> Picture:
    """`decode` or `decode_array`, by what the bytes are."""
    stream = io.BytesIO(data)
    if data.startswith(NPY):
        return decode_array(stream, where, channels)
    return decode(stream, where, channels, height, width)
