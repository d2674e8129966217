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

from unveil.decoding import BadPicture
from unveil.originals import Original, hole_of, read_original, save_pixels

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


def test_without_opencv_sixteen_bits_of_each_colour_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.zeros((*SIZE, 3), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / "in.png"), values)
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "cv2":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadPicture, match=r'pip install "unveil\[deep\]", or make the picture one of 8 bits'):
        read_original((tmp_path / "in.png").read_bytes(), "in.png")


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
