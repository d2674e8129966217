"""Pictures as their files hold them, so that what is not painted can be written again as it was.

Pillow reads nearly everything, but 16 bits of each colour as 8; those need OpenCV (`pip install "unveil[deep]"`).
"""

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unveil.checkpoint import write_atomically
from unveil.decoding import NPY, BadPicture, deep_values, is_deep, load_array, open_image, stored_white, telling

STEM_BYTES = 200  # of the 255 that a file's name may have
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's "L"
_TURNS = {  # EXIF's orientation: what brings (H, W, C) upright
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@dataclass(frozen=True)
class Original:
    """A picture or clip.

    pixels: (T, H, W, C): uint8, uint16, or float32 in [0, 1].
    has_alpha: whether the last of the channels says how opaque a pixel is; otherwise all are colours.
    profile: its ICC colour profile.
    notes: what of the file is not as it was, for people.
    """

    pixels: np.ndarray
    has_alpha: bool = False
    profile: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def top(self) -> int:
        """The value of white."""
        return {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(self.pixels.dtype, 1)

    def seen(self, channels: int) -> Tensor:
        """As a model of so many channels sees it: (channels, T, H, W), float32 in [0, 1]; for 1 or 3 of them over white.

        Raises:
            ValueError: it has other channels.
        """
        values = self.pixels.astype(np.float32) / self.top
        colours, opaque = (values[..., :-1], values[..., -1:]) if self.has_alpha else (values, None)
        if colours.shape[-1] == channels and opaque is None:
            found = values
        elif channels == 4 and colours.shape[-1] in (1, 3):
            colours = np.repeat(colours, 3, -1) if colours.shape[-1] == 1 else colours
            found = np.concatenate([colours, np.ones_like(colours[..., :1]) if opaque is None else opaque], -1)
        elif channels in (1, 3) and colours.shape[-1] in (1, 3):
            if opaque is not None:
                colours = colours * opaque + (1 - opaque)
            found = _as_colours(colours, channels)
        else:
            raise ValueError(
                f"The picture has {self.pixels.shape[-1]} channels, which a model of {channels} channels cannot see."
            )
        return torch.from_numpy(np.ascontiguousarray(found.transpose(3, 0, 1, 2)))

    def painted(self, values: Tensor, hole: Tensor, weights: Tensor | None = None) -> "Original":
        """With new pixels in a hole, and all others as they are.

        Args:
            values: (C, T, H, W) in [0, 1], of a model of C channels; without alpha, what is painted is opaque.
            hole: (T, H, W) bool.
            weights: how much of each value is painted, and not of what the model saw, (T, H, W) in [0, 1] and above 0 in the
                hole. Colours and transparency that it did not see are blended in by these. None: all of it.
        """
        new = values.permute(1, 2, 3, 0).float().numpy()
        channels, num_colours = new.shape[-1], self.pixels.shape[-1] - self.has_alpha
        opaque = np.ones_like(new[..., :1])
        if new.shape[-1] == 4 and num_colours in (1, 3):
            new, opaque = new[..., :3], new[..., 3:]
        if new.shape[-1] != num_colours:
            new = _as_colours(new, num_colours)
        if weights is not None and channels != 4 and (self.has_alpha or channels != num_colours):
            new, opaque = self._blended(new, channels, weights.numpy()[..., None])
        if self.has_alpha:
            new = np.concatenate([new, opaque], -1)
        if self.top > 1:
            new = np.rint(np.clip(new, 0, 1) * self.top)
        pixels = np.where(hole.numpy()[..., None], new.astype(self.pixels.dtype), self.pixels)
        return dataclasses.replace(self, pixels=pixels)

    def _blended(self, new: np.ndarray, channels: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a model of 1 or 3 channels painted, with what it did not see of the picture: colours, and how opaque.

        Args:
            new: by weights from what the model saw to what it painted, (T, H, W, colours), over white.
            weights: (T, H, W, 1).
        """
        values = self.pixels.astype(np.float32) / self.top
        own, opaque = (values[..., :-1], values[..., -1:]) if self.has_alpha else (values, np.ones_like(weights))
        over_white = own * opaque + (1 - opaque)
        unseen = over_white - _as_colours(_as_colours(over_white, channels), own.shape[-1])
        new = new + (1 - weights) * unseen
        opaque = 1 - (1 - weights) * (1 - opaque)
        # Off white again; outside the hole nothing may be there, and nothing is taken.
        return np.clip((new - (1 - opaque)) / np.where(opaque > 0, opaque, 1), 0, 1), opaque

    def to_pillow(self) -> Image.Image:
        """One frame of 8 bits, or of one colour of 16 bits, as a Pillow picture.

        Raises:
            ValueError: Pillow holds no such picture.
        """
        pixels = self.pixels[0]
        if len(self.pixels) > 1 or pixels.shape[-1] > 4 or (self.top != 255 and pixels.shape[-1] > 1):
            raise ValueError(
                f"A picture of {self.pixels.shape} {self.pixels.dtype} (frames, height, width, channels) is none of Pillow's. "
                'Ask for output_type="np" or "pt".'
            )
        return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)

    def save(self, path: Path) -> Path:
        """Write it without losing a bit, as `save_pixels` does, and return where."""
        return save_pixels(path, self.pixels, self.has_alpha, self.profile)


def stem_of(where: str, taken: set[str]) -> str:
    """The name of the files made of a picture: its own without the extension, or numbered if another one took that already; cut
    off where no file system would have it with what is added."""
    plain = Path(where).with_suffix("").as_posix().replace("/", "_").replace(" ", "_")
    plain = plain.encode(errors="surrogateescape")[:STEM_BYTES].decode(errors="ignore")
    stem, number = plain, 2
    while stem in taken:
        stem, number = f"{plain}_{number}", number + 1
    taken.add(stem)
    return stem


def save_pixels(path: Path, pixels: np.ndarray, has_alpha: bool = False, profile: bytes | None = None) -> Path:
    """Write (T, H, W, C) without losing a bit, and return where.

    As PNG, animated if there are several frames; what no PNG can hold as .npy.
    """
    num_frames, _, _, channels = pixels.shape
    is_colour = channels - has_alpha in (1, 3) or channels == 4
    if not is_colour or pixels.dtype not in (np.uint8, np.uint16) or (pixels.dtype == np.uint16 and num_frames > 1):
        path = path.with_suffix(".npy")
        write_atomically(path, lambda part: _write_array(part, pixels[0] if num_frames == 1 else pixels))
        return path
    if pixels.dtype == np.uint16 and channels > 1:
        write_atomically(path, lambda part: part.write_bytes(_deep_png(pixels[0])))
        return path
    frames = [Image.fromarray(frame.squeeze(-1) if channels == 1 else frame) for frame in pixels]
    more: dict[str, Any] = {} if profile is None else {"icc_profile": profile}
    if num_frames > 1:
        more.update(save_all=True, append_images=frames[1:], duration=200, loop=0)
    write_atomically(path, lambda part: frames[0].save(part, format="PNG", **more))
    return path


def _write_array(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:  # to a path numpy would add .npy
        np.save(file, values)


def _as_colours(values: np.ndarray, channels: int) -> np.ndarray:
    """(..., 1) repeated, or (..., 3) as luma."""
    if values.shape[-1] == channels:
        return values
    return np.repeat(values, channels, -1) if values.shape[-1] == 1 else (values @ _LUMA)[..., None]


def read_original(data: bytes, where: str) -> Original:
    """A picture from the bytes of its file: upright, its first frame.

    Raises:
        BadPicture: it cannot be read, or only OpenCV reads or writes it, as 16 bits of each colour, and is not installed.
    """
    if data.startswith(NPY):
        values = load_array(io.BytesIO(data), where)
        values = values.astype(values.dtype.newbyteorder("="))
        return Original((values[:, :, None] if values.ndim == 2 else values)[None])
    with telling(where):
        image, notes = open_image(io.BytesIO(data))
        if (white := stored_white(image)) is not None and not is_deep(image):
            return _read_deep(data, image, white, where)
        ImageOps.exif_transpose(image, in_place=True)
        original = from_pillow(image, where)
    if original.has_alpha and original.top == 65535:
        _needed_cv(where, "Writing 16 bits with transparency")  # before it is painted
    return dataclasses.replace(original, notes=(*notes, *original.notes))


def from_pillow(image: Image.Image, where: str = "the picture") -> Original:
    """A Pillow picture's pixels, as they are; other colour models than grey, RGB and palettes of it are converted to RGB.

    Raises:
        BadPicture: its values are out of range.
    """
    profile = image.info.get("icc_profile")
    if is_deep(image):
        values = deep_values(image, where)
        if image.mode != "F":
            values = np.rint(values * 65535).astype(np.uint16)  # float32 tells every one of the 65,536 apart
        values = values[:, :, None]
        clear = image.info.get("transparency")  # a PNG's value that is not to be seen
        if isinstance(clear, int) and values.dtype == np.uint16:
            values = np.concatenate([values, np.where(values == clear, 0, 65535).astype(np.uint16)], -1)
        return Original(values[None], values.shape[-1] == 2, profile)
    wanted, notes = image.mode, ()
    if wanted not in ("1", "L", "LA", "RGB", "RGBA"):
        wanted = "RGB"
        if image.mode not in ("P", "PA"):
            notes, profile = (f"{image.mode} converted to RGB",), None  # which the profile is not about
    if image.mode == "1":
        wanted = "L"
    if image.has_transparency_data:
        wanted = "LA" if wanted in ("L", "LA") else "RGBA"
    values = np.array(image if image.mode == wanted else image.convert(wanted))
    values = values[:, :, None] if values.ndim == 2 else values
    return Original(values[None], wanted in ("LA", "RGBA"), profile, notes)


def hole_of(mask: Image.Image, name: str) -> np.ndarray:
    """A mask picture as (H, W) bool: at least half white is True; of a picture of one colour, at least half opaque.

    Transparency is passed over in a picture of several colours.

    Args:
        name: what to call it in a message.

    Raises:
        ValueError: it has something that is not black, and nothing that is white.
    """
    values = deep_values(mask, name) if is_deep(mask) else _eight_bits(mask) / np.float32(255)
    if 0 < values.max() < 0.5:
        raise ValueError(
            f"{name} has no white: its brightest value is {255 * values.max():.3g} of 255. White is repainted."
        )
    return values >= 0.5


def _eight_bits(mask: Image.Image) -> np.ndarray:
    """How white a mask picture is, or how opaque if that is all that tells its pixels apart, (H, W) uint8."""
    if mask.has_transparency_data:
        *colours, opaque = mask.convert("RGBA").split()
        if not any(map(_varies, colours)) and _varies(opaque):
            return np.array(opaque)
    return np.array(mask.convert("L"))


def _varies(band: Image.Image) -> bool:
    low, high = band.getextrema()
    return low != high


def read_hole(data: bytes, where: str, name: str) -> np.ndarray:
    """`hole_of` of a mask picture from the bytes of its file, opened and turned as a picture is.

    Raises:
        BadPicture: it cannot be read.
        ValueError: as `hole_of`.
    """
    with telling(where):
        image, _ = open_image(io.BytesIO(data))
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    return hole_of(image, name)


def _open_cv(what: str) -> Any:
    try:
        import cv2
    except ImportError:
        raise ValueError(
            f'{what} needs OpenCV: pip install "unveil[deep]", or make the picture one of 8 bits.'
        ) from None
    return cv2


def _needed_cv(where: str, what: str) -> Any:
    """OpenCV, without which a picture cannot be used."""
    try:
        return _open_cv(what)
    except ValueError as error:
        raise BadPicture(where, str(error)) from None


def _read_deep(data: bytes, image: Image.Image, white: int, where: str) -> Original:
    """A picture of more than 8 bits for each colour, brought to 16.

    Args:
        image: the same as Pillow opens it.
        white: the largest value that its file may hold; 0 if that is another one in each channel.
    """
    cv2 = _needed_cv(where, "Reading 16 bits of each colour")
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if white else None
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise BadPicture(where, "has 16 bits of each colour, and OpenCV cannot read it; make it a PNG or one of 8 bits")
    notes = []
    if white < 65535:  # which OpenCV leaves as they are
        values = np.rint(np.minimum(values / white, 1) * 65535).astype(np.uint16)
        notes.append(f"values up to {white} brought to 65535")
    turn = _TURNS.get(image.getexif().get(0x0112, 1))
    if turn is not None:
        values = turn(values)
    code = cv2.COLOR_BGRA2RGBA if values.shape[2] == 4 else cv2.COLOR_BGR2RGB
    values = cv2.cvtColor(np.ascontiguousarray(values), code)
    if image.info.get("icc_profile"):
        notes.append("its colour profile is not kept")
    return Original(values[None], values.shape[2] == 4, None, tuple(notes))


def _deep_png(values: np.ndarray) -> bytes:
    """(H, W, 2 to 4) uint16 as PNG; OpenCV has no grey with alpha, which becomes colours."""
    cv2 = _open_cv("Writing 16 bits of each colour")
    if values.shape[2] == 2:
        values = np.concatenate([np.repeat(values[..., :1], 3, -1), values[..., 1:]], -1)
    code = cv2.COLOR_RGBA2BGRA if values.shape[2] == 4 else cv2.COLOR_RGB2BGR
    return cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(values), code))[1].tobytes()
