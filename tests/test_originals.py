"""Pictures are written as they were read, but for the hole: 8 and 16 bits, grey and colours, with and without alpha."""

import builtins
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from small import generator, pillow_picture
from torch import Tensor

from unveil.decoding import BadPicture, decode, header_of
from unveil.originals import Original, hole_of, read_original, save_pixels
from unveil.painting import feather_weights

SIZE = (11, 7)
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F", "CMYK"]


def read_back(path: Path) -> np.ndarray:
    """By other means where there are some."""
    if path.suffix == ".npy":
        return np.load(path)
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert values is not None
    if values.ndim == 3 and values.dtype == np.uint16:
        return values[..., [2, 1, 0, 3][: values.shape[2]]]
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_outside_the_hole_is_the_files_own(tmp_path: Path, mode: str, channels: int) -> None:
    image = pillow_picture(mode, SIZE)
    stream = io.BytesIO()
    image.save(stream, {"F": "TIFF", "CMYK": "TIFF"}.get(mode, "PNG"))
    original = read_original(stream.getvalue(), "it")
    seen = original.seen(channels)
    assert seen.shape == (channels, 1, *SIZE)
    assert 0 <= seen.min() < seen.max() <= 1
    hole = torch.zeros(1, *SIZE, dtype=torch.bool)
    hole[:, 2:5, 3:6] = True
    path = original.painted(1 - seen, hole).save(tmp_path / "out.png")
    expected = np.asarray(image.convert({"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)))
    after = read_back(path).reshape(expected.shape)
    assert after.dtype == expected.dtype
    outside = ~hole[0].numpy()
    assert np.array_equal(after[outside], expected[outside])
    assert (after[~outside] != expected[~outside]).any()
    assert list(original.notes) == (["CMYK converted to RGB"] if mode == "CMYK" else [])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_of_each_colour_are_kept(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (*SIZE, channels), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / "in.png"), values[..., [2, 1, 0, 3][:channels]])
    original = read_original((tmp_path / "in.png").read_bytes(), "in.png")
    assert np.array_equal(original.pixels[0], values)
    hole = torch.zeros(1, *SIZE, dtype=torch.bool)
    hole[:, 4, 3] = True
    path = original.painted(torch.full((3, 1, *SIZE), 0.5), hole).save(tmp_path / "out.png")
    after = read_back(path)
    assert np.array_equal(after[~hole[0].numpy()], values[~hole[0].numpy()])
    assert (after[4, 3, :3] == 32768).all()
    assert channels == 3 or after[4, 3, 3] == 65535  # what is painted is opaque


def jpeg2000(values: np.ndarray, bits: list[int]) -> bytes:
    """(H, W, C) uint16 as a lossless file whose header says so many bits of each channel."""
    shift = 32768 - 2 ** (max(bits) - 1)  # values are stored less the middle of their range
    swapped = np.ascontiguousarray(values[..., [2, 1, 0, 3][: values.shape[2]]] + shift, dtype=np.uint16)
    data = bytearray(cv2.imencode(".jp2", swapped, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes())
    start = data.index(b"\xff\x4f\xff\x51") + 42
    for channel, count in enumerate(bits):
        data[start + 3 * channel] = count - 1
    data[data.index(b"ihdr") + 14] = max(bits) - 1
    return bytes(data)


@pytest.mark.parametrize(
    "kind, white",
    [("P6", 65535), ("P6", 1023), ("P3", 65535), ("P3", 1023), ("JP2", 65535), ("JP2", 4095), ("JP2A", 65535)],
)
def test_colours_of_more_than_eight_bits_are_kept_whatever_file_holds_them(
    tmp_path: Path, kind: str, white: int
) -> None:
    channels = 4 if kind == "JP2A" else 3
    values = np.random.default_rng(0).integers(0, white + 1, (40, 50, channels), dtype=np.uint16)
    if kind.startswith("JP2"):
        data = jpeg2000(values, [white.bit_length()] * channels)
    else:
        head = f"{kind}\n# a comment\n50 40\n{white}\n".encode()
        plain = "\n".join(" ".join(map(str, row)) for row in values.reshape(-1, 3)) + "\n"
        data = head + (plain.encode() if kind == "P3" else values.astype(">u2").tobytes())
    assert header_of(io.BytesIO(data), "it").bits == 16
    original = read_original(data, "it")
    assert original.has_alpha == (channels == 4)
    assert original.notes == (() if white == 65535 else (f"values up to {white} brought to 65535",))
    after = read_back(original.save(tmp_path / "out.png"))
    assert after.dtype == np.uint16
    assert np.array_equal(np.rint(after / 65535 * white), values)
    assert after.max() - after.min() > 65000
    note = decode(io.BytesIO(data), "it", 4).note
    assert note is not None
    assert "16-bit colour read as 8-bit" in note


def test_eight_bits_and_deep_greys_of_these_files_are_read_as_ever() -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for data in (b"P6\n50 40\n255\n" + values.tobytes(), cv2.imencode(".jp2", values)[1].tobytes()):
        assert read_original(data, "it").pixels.dtype == np.uint8
        assert decode(io.BytesIO(data), "it", 3).note is None
    deep = np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16)
    for data in (
        b"P5\n50 40\n65535\n" + deep.astype(">u2").tobytes(),
        cv2.imencode(".jp2", deep, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes(),
    ):
        assert header_of(io.BytesIO(data), "it").bits == 16
        assert np.array_equal(read_original(data, "it").pixels[0, :, :, 0], deep)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "depths"])
def test_more_than_eight_bits_that_cannot_be_kept_refuse(mode: str) -> None:
    """Which `decode`, for training, reads as 8 bits with a note."""
    stream = io.BytesIO()
    if mode == "depths":
        stream.write(jpeg2000(np.zeros((40, 50, 3), dtype=np.uint16), [12, 12, 8]))
    elif mode == "CMYK":
        data = bytearray(jpeg2000(np.zeros((40, 50, 4), dtype=np.uint16), [16] * 4))
        data[data.index(b"colr") + 10] = 12  # the number of this colour space
        stream.write(data)
    else:
        pillow_picture(mode, SIZE).save(stream, "SGI", bpc=2)
    with pytest.raises(BadPicture, match="has 16 bits of each colour, and OpenCV cannot read it"):
        read_original(stream.getvalue(), "it")
    stream.seek(0)
    note = decode(stream, "it", 1).note
    assert note is not None
    assert "16-bit colour read as 8-bit" in note


def clear_grey() -> tuple[np.ndarray, bytes]:
    """16 bits of grey of which one value is transparent, (H, W), and the PNG file."""
    values = np.random.default_rng(0).integers(0, 65536, SIZE, dtype=np.uint16)
    values[:, 0] = 1234
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG", transparency=1234)
    return values, stream.getvalue()


def test_sixteen_bits_of_grey_keep_the_value_that_is_transparent(tmp_path: Path) -> None:
    values, data = clear_grey()
    original = read_original(data, "it")
    assert original.has_alpha
    assert (original.seen(1)[0, 0, :, 0] == 1).all()  # over white
    hole = torch.zeros(1, *SIZE, dtype=torch.bool)
    hole[:, 4, 0] = True
    after = read_back(original.painted(torch.full((1, 1, *SIZE), 0.5), hole).save(tmp_path / "out.png"))
    outside = ~hole[0].numpy()
    assert after.dtype == np.uint16
    for colour in range(3):
        assert np.array_equal(after[..., colour][outside], values[outside])
    assert np.array_equal(after[..., 3][outside] == 65535, values[outside] != 1234)
    assert after[4, 0].tolist() == [32768] * 3 + [65535]


@pytest.mark.parametrize("clear", [False, True])
def test_without_opencv_sixteen_bits_of_each_colour_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, clear: bool
) -> None:
    data = clear_grey()[1] if clear else cv2.imencode(".png", np.zeros((*SIZE, 3), dtype=np.uint16))[1].tobytes()
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "cv2":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadPicture, match=r'pip install "unveil\[deep\]", or make the picture one of 8 bits'):
        read_original(data, "in.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_a_picture_is_upright(orientation: int, deep: bool) -> None:
    values = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG", exif=exif)
    upright = read_original(stream.getvalue(), "it").pixels[0]
    assert upright.shape == ((7, 11, 3) if orientation > 4 else (11, 7, 3))
    if deep:  # the same chunk of EXIF in a picture of 16 bits, whose own pixels are 257 times as large
        wide = cv2.imencode(".png", values[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
        data = stream.getvalue()
        start = data.index(b"eXIf") - 4
        chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
        original = read_original(wide[:33] + chunk + wide[33:], "it")
        assert original.pixels.dtype == np.uint16
        assert np.array_equal(original.pixels[0], upright.astype(np.uint16) * 257)


def test_transparent_pixels_are_seen_as_white_and_keep_their_colours(tmp_path: Path) -> None:
    values = np.full((*SIZE, 4), 60, dtype=np.uint8)
    values[..., 3] = 0
    original = Original(values[None], True)
    assert (original.seen(3) == 1).all()
    hole = torch.zeros(1, *SIZE, dtype=torch.bool)
    hole[:, 0, 0] = True
    after = read_back(original.painted(torch.zeros(3, 1, *SIZE), hole).save(tmp_path / "out.png"))
    assert after[0, 0].tolist() == [0, 0, 0, 255]
    assert (after.reshape(-1, 4)[1:] == [60, 60, 60, 0]).all()


def feathered(original: Original, painted: float, width: int = 3) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """A hole at the right end of a row, painted in a grey by a model of the channels of `seen`, as `unveil.painting.paint`
    blends it: what is written, (W, C); weights (W,); and what is then to be seen, (C, W)."""
    W = original.pixels.shape[2]
    hole = torch.zeros(original.pixels.shape[:3], dtype=torch.bool)
    hole[..., W - 2 :] = True
    weights = feather_weights(hole, width)
    channels = 1 if original.pixels.shape[-1] == 3 else 3
    blended = torch.lerp(original.seen(channels), torch.tensor(painted), weights)
    made = original.painted(blended, weights > 0, weights)
    return made.pixels[0, 0], weights[0, 0].numpy(), blended[:, 0, 0]


def test_a_feathered_hole_fades_into_transparency() -> None:
    """Over white it is what was blended; and what was transparent takes no white with it."""
    original = Original(np.zeros((1, 1, 8, 4), dtype=np.uint16), True)
    after, weights, blended = feathered(original, 0.2)
    assert weights.tolist() == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert after[:, 3].tolist() == np.rint(weights * 65535).tolist()
    assert (after[weights > 0, :3] == round(0.2 * 65535)).all()
    assert (after[weights == 0] == 0).all()
    values = after / 65535
    torch.testing.assert_close(
        torch.from_numpy(values[:, :3] * values[:, 3:] + 1 - values[:, 3:]).T, blended.double(), rtol=0, atol=1e-4
    )


def test_a_feathered_hole_in_what_is_half_transparent() -> None:
    """Colours weigh as much as they can be seen: (0.5 * 0.4 * 100 + 0.5 * 51) / (0.5 * 0.4 + 0.5)."""
    original = Original(np.full((1, 1, 8, 4), 100, dtype=np.uint8), True)
    original.pixels[..., 3] = 102
    after, weights, _ = feathered(original, 0.2)
    assert after[weights == 0.5].tolist() == [[65, 65, 65, 178]]
    assert (after[weights == 1] == [51, 51, 51, 255]).all()


def test_a_feathered_hole_fades_into_colours_that_a_grey_model_does_not_see() -> None:
    original = Original(np.broadcast_to(np.array([200, 40, 90], dtype=np.uint8), (1, 1, 8, 3)).copy())
    after, weights, _ = feathered(original, 0.6)
    expected = (1 - weights[:, None]) * [200, 40, 90] + weights[:, None] * 153
    torch.testing.assert_close(torch.from_numpy(after).double(), torch.from_numpy(expected), rtol=0, atol=0.51)


@pytest.mark.parametrize("colour", [0, 255, 90])
def test_a_mask_of_one_colour_is_read_by_its_alpha(colour: int) -> None:
    drawn = np.zeros((6, 8), dtype=bool)
    drawn[2:4, 3:] = True
    values = np.full((6, 8, 4), colour, dtype=np.uint8)
    values[..., 3] = drawn * 200
    image = Image.fromarray(values)
    for mask in (image, image.convert("LA")):
        assert np.array_equal(hole_of(mask, "it"), drawn)
    opaque = Image.fromarray(values[..., :3])
    if colour != 90:
        assert (hole_of(opaque, "it") == bool(colour)).all()
    values[0, 0, :3] = 255 - colour  # of several colours it is these that count
    if colour != 90:
        assert hole_of(Image.fromarray(values), "it")[0, 0] == (colour == 0)
        assert (hole_of(Image.fromarray(values), "it")[1:] == bool(colour)).all()


def test_the_colour_profile_is_kept(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stream = io.BytesIO()
    pillow_picture("RGB", SIZE).save(stream, "PNG", icc_profile=profile)
    path = read_original(stream.getvalue(), "it").save(tmp_path / "out.png")
    with Image.open(path) as image:
        assert image.info["icc_profile"] == profile


def test_channels_that_a_model_cannot_see_refuse() -> None:
    with pytest.raises(ValueError, match="5 channels, which a model of 3 channels cannot see"):
        Original(np.zeros((1, *SIZE, 5), dtype=np.uint8)).seen(3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pixels_are_written_without_losing_a_bit(tmp_path: Path, channels: int, frames: int, dtype: Any) -> None:
    """As PNG where PNG can hold it, animated if it has frames, and as an array where not."""
    top = {np.uint8: 256, np.uint16: 65536, np.float32: 2**20}[dtype]
    pixels = torch.randint(0, top, (frames, 5, 7, channels), generator=generator()).numpy().astype(dtype)
    path = save_pixels(tmp_path / "clip.png", pixels)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    png = channels in (1, 3, 4) and (dtype == np.uint8 or (dtype == np.uint16 and frames == 1))
    assert path.suffix == (".png" if png else ".npy")
    if png and frames > 1:
        with Image.open(path) as image:
            assert image.n_frames == frames  # type: ignore[attr-defined]
            read = []
            for frame in range(frames):
                image.seek(frame)
                read.append(np.asarray(image).reshape(5, 7, channels))
        values = np.stack(read)
    else:
        values = read_back(path).reshape(pixels.shape)
    assert values.dtype == dtype
    assert np.array_equal(values, pixels)
