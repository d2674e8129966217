"""Every kind of picture and every kind of bad one; samples that depend on their number alone."""

import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from unveil.config import Clip, Training
from unveil.data import (
    BadPicture,
    Batch,
    Key,
    Order,
    Samples,
    Skipped,
    batches,
    collate,
    decoded_bytes,
    open_source,
    to_clips,
)
from unveil.finetuning import FineTuning
from unveil.transforms import augment, cut, cut_together, draw_crop, fit

RNG = np.random.default_rng(0)


def colours(height: int = 12, width: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(values: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(stream, format, **options)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_one(path: Path, channels: int = 3, **size: int) -> tuple[Tensor, str | None]:
    picture = open_source(str(path), channels, **size).read(0)
    return picture.values, picture.note


def clip(height: int = 8, width: int = 8, channels: int = 1, frames: int = 1) -> Clip:
    return Clip(
        channels=channels,
        frames=frames,
        height=height,
        width=width,
        patch_size=4,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )


def training(crop_scale: float = 0.2, flip: bool = True) -> Training:
    return Training(epochs=1, batch_size=4, base_lr=1e-3, warmup_epochs=0, crop_scale=crop_scale, flip=flip)


def reason(path: Path, channels: int = 3) -> str:
    with pytest.raises(BadPicture) as caught:
        read_one(path, channels)
    assert caught.value.where == path.name
    return caught.value.reason


# Decoding


def test_a_png_keeps_its_values(tmp_path: Path) -> None:
    values = colours()
    read, note = read_one(write(tmp_path / "a.png", encoded(values)))
    assert read.shape == (1, 3, 12, 16)
    assert read.dtype == torch.uint8
    assert torch.equal(read[0], torch.from_numpy(values).permute(2, 0, 1))
    assert note is None


def test_corrupt_refuses(tmp_path: Path) -> None:
    assert reason(write(tmp_path / "a.jpg", b"this is no JPEG" * 20)) == "not a picture that Pillow can read"
    content = bytearray(encoded(colours(64, 64)))
    content[80:4000] = bytes(3920)
    assert "cannot be decoded" in reason(write(tmp_path / "b.png", bytes(content)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF"])
def test_truncated_refuses(tmp_path: Path, format: str) -> None:
    content = encoded(Image.fromarray(colours(64, 64)), format)
    path = tmp_path / f"a.{format.lower()}"
    read_one(write(path, content))
    assert "cannot be decoded" in reason(write(path, content[: len(content) // 2]))


@pytest.mark.parametrize("limit, refused", [(192, False), (191, True), (95, True)])
def test_bombs_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, refused: bool) -> None:
    path = write(tmp_path / "a.png", encoded(colours()))  # 192 pixels; Pillow warns above 1x, raises above 2x its limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if not refused:
        read_one(path)
        return
    monkeypatch.setattr("unveil.decoding.np.array", lambda *_: pytest.fail("decoded"))
    assert "limit" in reason(path)
    assert "megapixels" in reason(path)


def test_postscript_is_not_run_under_another_name(tmp_path: Path) -> None:
    assert "not a picture" in reason(write(tmp_path / "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))


def test_a_file_that_vanished_refuses(tmp_path: Path) -> None:
    write(tmp_path / "b.png", encoded(colours()))
    path = write(tmp_path / "a.png", encoded(colours()))
    source = open_source(str(tmp_path), 3)
    source.read(0)
    path.unlink()
    with pytest.raises(BadPicture, match=r"a\.png: vanished"):
        source.read(0)


def test_a_file_without_permission_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write(tmp_path / "a.png", encoded(colours()))), 3)

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # root may read everything, so no mode would do
    with pytest.raises(BadPicture, match="Permission denied"):
        source.read(0)


def test_palette_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    read, note = read_one(write(tmp_path / "a.png", encoded(image)))
    assert read[0, :, 0, 0].tolist() == [200, 100, 50]
    assert read[0, :, 1, 3].tolist() == [10, 20, 30]
    assert note == "palette converted to RGB"


def test_palette_with_a_transparent_colour_is_put_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    read, note = read_one(write(tmp_path / "a.png", encoded(image, transparency=0)))
    assert read[0, :, 0, 0].tolist() == [200, 100, 50]
    assert read[0, :, 1, 3].tolist() == [255, 255, 255]
    assert "over white" in str(note)


def test_alpha_is_put_over_white_or_kept(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 4), np.uint8)
    values[0, 0] = (255, 0, 0, 255)
    path = write(tmp_path / "a.png", encoded(values))
    read, note = read_one(path, 3)
    assert read[0, :, 0, 0].tolist() == [255, 0, 0]
    assert read[0, :, 1, 1].tolist() == [255, 255, 255]
    assert note == "transparency put over white"
    read, note = read_one(path, 4)
    assert torch.equal(read[0], torch.from_numpy(values).permute(2, 0, 1))
    assert note is None


def test_opaque_alpha_is_dropped_without_a_note(tmp_path: Path) -> None:
    values = np.dstack([colours(), np.full((12, 16), 255, np.uint8)])
    read, note = read_one(write(tmp_path / "a.png", encoded(values)), 3)
    assert torch.equal(read[0], torch.from_numpy(values[:, :, :3]).permute(2, 0, 1))
    assert note is None


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    read, note = read_one(write(tmp_path / "a.tif", encoded(image, "TIFF")))
    assert read[0, :, 4, 4].tolist() == [255, 0, 0]
    assert note == "CMYK converted to RGB"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_kept_as_float(tmp_path: Path, channels: int) -> None:
    values = np.array([[0, 257, 40000], [65535, 1, 2]], np.uint16)
    read, note = read_one(write(tmp_path / "a.png", encoded(values)), channels)
    assert read.dtype == torch.float32
    expected = torch.from_numpy(values / 65535).float()
    for channel in range(min(channels, 3)):
        torch.testing.assert_close(read[0, channel], expected, atol=1e-7, rtol=0)
    if channels == 4:
        assert torch.equal(read[0, 3], torch.ones(2, 3))
    assert note == "16-bit"


def test_integers_beyond_sixteen_bits_refuse(tmp_path: Path) -> None:
    values = np.array([[0, 70000]], np.int32)
    assert "0 to 70000" in reason(write(tmp_path / "a.tif", encoded(values, "TIFF")))


def test_float_tiff_is_read(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.25, 1.0]], np.float32)
    read, _ = read_one(write(tmp_path / "a.tif", encoded(values, "TIFF")), 1)
    assert torch.equal(read[0, 0], torch.from_numpy(values))


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan")])
def test_float_tiff_refuses(tmp_path: Path, bad: float) -> None:
    values = np.array([[0.0, bad]], np.float32)
    assert "between 0 and 1" in reason(write(tmp_path / "a.tif", encoded(values, "TIFF")))


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_animated_gives_its_first_frame(tmp_path: Path, format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    read, note = read_one(write(tmp_path / f"a.{format.lower()}", content))
    assert read[0, :, 3, 3].tolist() == [255, 0, 0]
    assert "first of 3 frames used" in str(note)


def test_grey_is_repeated_and_colour_becomes_luma(tmp_path: Path) -> None:
    grey = RNG.integers(0, 256, (4, 4), dtype=np.uint8)
    read, note = read_one(write(tmp_path / "a.png", encoded(grey)), 3)
    for channel in range(3):
        assert torch.equal(read[0, channel], torch.from_numpy(grey))
    assert note == "grey repeated"
    green = np.zeros((4, 4, 3), np.uint8)
    green[:, :, 1] = 255
    read, note = read_one(write(tmp_path / "b.png", encoded(green)), 1)
    assert read.shape == (1, 1, 4, 4)
    assert read[0, 0, 0, 0] == 150  # 0.587 * 255, ITU-R 601-2
    assert note == "colour converted to grey"


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    values = colours(4, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    read, _ = read_one(write(tmp_path / "a.png", encoded(values, exif=exif)))
    expected = np.rot90(values, -1).copy()
    assert torch.equal(read[0], torch.from_numpy(expected).permute(2, 0, 1))


def test_a_large_jpeg_is_decoded_smaller_but_never_too_small(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", encoded(np.zeros((1000, 1600, 3), np.uint8), "JPEG"))
    assert read_one(path)[0].shape == (1, 3, 1000, 1600)
    assert read_one(path, height=96, width=96)[0].shape == (1, 3, 250, 400)  # 96 / sqrt(0.2) is 214.7, so 1/4
    assert read_one(path, height=224, width=96)[0].shape == (1, 3, 1000, 1600)  # 501: half would be just too small


def test_npy_arrays_of_any_channels(tmp_path: Path) -> None:
    values = RNG.random((6, 7, 5), dtype=np.float32)
    np.save(tmp_path / "a.npy", values)
    read, note = read_one(tmp_path / "a.npy", 5)
    assert torch.equal(read[0], torch.from_numpy(values).permute(2, 0, 1))
    assert note is None
    np.save(tmp_path / "b.npy", np.array([[0, 65535]], ">u2"))
    read, note = read_one(tmp_path / "b.npy", 1)
    assert read.tolist() == [[[[0.0, 1.0]]]]
    assert note == "16-bit"
    np.save(tmp_path / "c.npy", colours())
    assert read_one(tmp_path / "c.npy", 3)[0].dtype == torch.uint8


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((4, 4, 2), np.uint8), "2 channels where 5 are wanted"),
        (np.zeros((4, 4, 5), np.int64), "int64"),
        (np.full((4, 4, 5), 2, np.float32), "between 0 and 1"),
        (np.zeros((2, 4, 4, 5), np.uint8), "shape"),
        (np.zeros((0, 4, 5), np.uint8), "shape"),
        (np.array([None]), "not a .npy array"),  # a pickle, which could run code
    ],
)
def test_npy_refuses(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    assert message in reason(tmp_path / "a.npy", 5)


def test_truncated_npy_refuses(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-10])
    assert "not a .npy array" in reason(tmp_path / "a.npy")


def test_a_picture_file_refuses_five_channels(tmp_path: Path) -> None:
    assert "5 channels" in reason(write(tmp_path / "a.png", encoded(colours())), 5)


# Folders


def test_class_folders(tmp_path: Path) -> None:
    for name in ("dog/2.png", "cat/deep/er/1.png", "dog/1.PNG"):
        write(tmp_path / name, encoded(colours()))
    write(tmp_path / "notes.txt", b"not a picture, and not in a class")
    source = open_source(str(tmp_path), 3)
    assert source.classes == ("cat", "dog")
    assert [source.where(i) for i in range(len(source))] == ["cat/deep/er/1.png", "dog/1.PNG", "dog/2.png"]
    assert [source.label(i) for i in range(len(source))] == [0, 1, 1]
    assert source.skipped == [Skipped("notes.txt", "not a picture (.txt)")]
    assert source.name == str(tmp_path)


def test_a_flat_or_mixed_folder_has_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "b.png", encoded(colours()))
    assert open_source(str(tmp_path), 3).classes is None
    write(tmp_path / "cat/a.png", encoded(colours()))
    source = open_source(str(tmp_path), 3)
    assert source.classes is None
    assert [source.label(i) for i in range(2)] == [None, None]


def test_what_is_no_picture_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(colours()))
    write(tmp_path / "zero.png", b"")
    write(tmp_path / "README", b"x")
    write(tmp_path / "figure.eps", b"%!PS")
    write(tmp_path / ".hidden.png", encoded(colours()))
    write(tmp_path / ".git/a.png", encoded(colours()))
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(str(tmp_path), 3)
    assert len(source) == 1
    assert {bad.where: bad.reason for bad in source.skipped} == {
        "zero.png": "empty file (0 bytes)",
        "README": "not a picture (no extension)",
        "figure.eps": "not a picture (.eps)",
        "broken.png": "a broken link",
        "pipe.png": "not a file",
    }


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "data/cat/a.png", encoded(colours()))
    write(tmp_path / "elsewhere/b.png", encoded(colours()))
    (tmp_path / "data/cat/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/again").symlink_to(tmp_path / "data/cat")
    (tmp_path / "data/dog").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(tmp_path / "data"), 3)
    assert [source.where(i) for i in range(len(source))] == ["cat/a.png", "dog/b.png"]
    assert {bad.where for bad in source.skipped} == {"cat/loop", "again"}


def test_a_single_picture(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.png", encoded(colours()))), 3)
    assert len(source) == 1
    assert source.classes is None
    assert source.where(0) == "a.png"


@pytest.mark.parametrize("name, content", [("a.txt", b"text"), ("zero.png", b"")])
def test_a_single_picture_refuses(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"is no data: (not a picture \(\.txt\)|empty file)"):
        open_source(str(write(tmp_path / name, content)), 3)


def test_a_folder_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no files"):
        open_source(str(tmp_path), 3)
    write(tmp_path / "a.txt", b"x")
    with pytest.raises(ValueError, match="1 files, none of which is a picture"):
        open_source(str(tmp_path), 3)


def test_a_missing_path_refuses(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    with pytest.raises(ValueError, match=r"Did you mean '.*flowers'"):
        open_source(str(tmp_path / "flower"), 3)
    with pytest.raises(ValueError, match=r"Did you mean '.*flowers'"):
        open_source(str(tmp_path / "flower" / "train"), 3)
    with pytest.raises(ValueError, match="Did you mean 'digits:train'"):
        open_source("digits:trian", 1)
    with pytest.raises(ValueError, match=r"Choose from .*moving-digits"):
        open_source("qqqqqqqq", 1)


def test_clips_refuse_pictures(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(colours()))
    for data in (str(tmp_path), "digits"):
        with pytest.raises(
            ValueError, match=r"given to a model of clips of 4 frames, and clips can be read of moving-digits alone"
        ):
            open_source(data, 1, frames=4)


# Parquet


def write_parquet(path: Path, struct: bool, labels: list[int | None] | None, names: list[str] | None = None) -> Path:
    rows = [encoded(np.full((4, 4, 3), 10 * i, np.uint8)) for i in range(3)]
    images = [{"bytes": row, "path": f"{i}.png"} for i, row in enumerate(rows)] if struct else rows
    columns: dict[str, Any] = {"image": images, "index": [7, 8, 9]}
    if labels is not None:
        columns["label"] = labels
    table = pa.table(columns)
    if names is not None:
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path: Path, struct: bool) -> None:
    source = open_source(str(write_parquet(tmp_path / "a.parquet", struct, [2, 0, None])), 3)
    assert len(source) == 3
    assert source.classes == ("0", "1", "2")
    assert [source.label(i) for i in range(3)] == [2, 0, None]
    assert [int(source.read(i).values[0, 0, 0, 0]) for i in range(3)] == [0, 10, 20]
    assert source.where(2) == "row 2"


def test_parquet_class_names_of_hugging_face(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", True, [0, 1, 1], ["cat", "dog", "eel"])
    assert open_source(str(path), 3).classes == ("cat", "dog", "eel")


@pytest.mark.parametrize("labels", [None, [-1, -1, -1]])  # Hugging Face writes -1 for a test set without labels
def test_parquet_without_labels(tmp_path: Path, labels: list[int | None] | None) -> None:
    source = open_source(str(write_parquet(tmp_path / "a.parquet", True, labels, ["cat"])), 3)
    assert source.classes is None
    assert source.label(0) is None


def test_parquet_shards_by_folder_and_by_pattern(tmp_path: Path) -> None:
    for shard in (1, 0):
        write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", True, [shard] * 3)
    write(tmp_path / "README.md", b"x")
    for data in (tmp_path, tmp_path / "train-*.parquet"):
        source = open_source(str(data), 3)
        assert [source.label(i) for i in range(len(source))] == [0, 0, 0, 1, 1, 1]
        assert source.where(4) == "train-00001-of-00002.parquet row 1"
        assert int(source.read(4).values[0, 0, 0, 0]) == 10
    assert open_source(str(tmp_path), 3).skipped == [Skipped("README.md", "not a picture (.md)")]


def test_parquet_refuses_to_mix_train_and_test(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val"):
        write_parquet(tmp_path / f"{name}.parquet", True, None)
    with pytest.raises(ValueError, match=r"2 different sets of parquet files \(train, val\)"):
        open_source(str(tmp_path), 3)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"img": [b"x"], "label": [1]}, r"no column 'image', only img \(binary\), label \(int64\)"),
        ({"image": ["a.png"]}, "type string"),
        ({"image": [{"path": "a.png"}]}, "struct with 'bytes'"),
        ({"image": [b"x"], "label": ["cat"]}, "'label' that is not an integer"),
        ({"image": pa.array([], pa.binary())}, "no rows"),
    ],
)
def test_parquet_refuses(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "a.parquet"), 3)


def test_parquet_refuses_other_files_labels_and_channels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        open_source(str(write(tmp_path / "text.parquet", b"no parquet at all")), 3)
    path = write_parquet(tmp_path / "a.parquet", True, [0, 1, 5], ["cat", "dog"])
    with pytest.raises(ValueError, match="label 5 but its schema names 2 classes"):
        open_source(str(path), 3)
    with pytest.raises(ValueError, match="cannot fill 5 channels"):
        open_source(str(path), 5)
    with pytest.raises(ValueError, match="No file matches"):
        open_source(str(tmp_path / "b-*.parquet"), 3)
    write(tmp_path / "a.png", b"x")
    with pytest.raises(ValueError, match=r"not a \.parquet file"):
        open_source(str(tmp_path / "a*"), 3)


def test_parquet_rows_refuse_one_by_one(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(colours())}, {"bytes": b"garbage"}, {"bytes": None}, {"bytes": b""}, None]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), 3)
    source.read(0)
    for row, message in enumerate(["not a picture", "no bytes", "no bytes", "no bytes"], start=1):
        with pytest.raises(BadPicture, match=f"row {row}: {message}"):
            source.read(row)


# Digits


def test_digits() -> None:
    every, train, test = (open_source(name, 1) for name in ("digits", "digits:train", "digits:test"))
    assert (len(every), len(train), len(test)) == (1797, 1437, 360)
    assert every.classes == tuple("0123456789")
    values = torch.cat([every.read(i).values for i in range(len(every))])
    assert values.shape == (1797, 1, 8, 8)
    assert values.dtype == torch.uint8
    assert set(values.unique().tolist()) == {round(level * 255 / 16) for level in range(17)}
    for split in (train, test):  # stratified: every class has its share
        counts = torch.bincount(torch.tensor([split.label(i) for i in range(len(split))]))
        torch.testing.assert_close(counts / len(split), torch.full((10,), 0.1), atol=0.01, rtol=0)
    joined = sorted(s.read(i).values.numpy().tobytes() for s in (train, test) for i in range(len(s)))
    assert joined == sorted(row.numpy().tobytes() for row in values)


def test_digits_in_three_channels() -> None:
    grey, rgb = open_source("digits", 1).read(5).values, open_source("digits", 3).read(5).values
    assert torch.equal(rgb, grey.repeat(1, 3, 1, 1))


def test_digits_refuse() -> None:
    with pytest.raises(ValueError, match="cannot fill 4 channels"):
        open_source("digits", 4)
    with pytest.raises(ValueError, match="at least 1"):
        open_source("digits", 1, frames=0)


def test_moving_digits_move_within_the_walls_and_are_deterministic() -> None:
    source = open_source("moving-digits:train", 1, frames=40)
    again = open_source("moving-digits:train", 1, frames=40)
    digits = open_source("digits:train", 1)
    assert len(source) == 1437
    num_single = 0
    for index in range(30):
        values = source.read(index).values
        assert values.shape == (40, 1, 24, 24)
        assert values.dtype == torch.uint8
        assert torch.equal(values, again.read(index).values)
        assert (values[1:] != values[:-1]).flatten(1).any(1).all(), "a frame repeats the one before"
        assert source.label(index) == digits.label(index)
        digit = digits.read(index).values
        sums = values.long().sum((1, 2, 3))
        assert (sums >= digit.long().sum()).all(), "a digit left the frame"
        num_single += bool((sums == digit.long().sum()).all())
    assert 0 < num_single < 30  # some clips have one digit, some two


def test_moving_digits_bounce_and_do_not_jump() -> None:
    source, digits = open_source("moving-digits", 1, frames=60), open_source("digits", 1)
    steps = []
    for index in range(30):
        values = source.read(index).values
        if values[0].long().sum() != digits.read(index).values.long().sum():
            continue  # two digits: their corner below would be a mixture
        corners = torch.stack([frame[0].nonzero().min(0).values for frame in values])  # (T, 2), top and left
        steps.append(corners.diff(dim=0))
    moved = torch.stack(steps)
    assert moved.abs().max() == 2
    assert (moved.amin(1) < 0).all(), "never turned back"
    assert (moved.amax(1) > 0).all(), "never turned back"


def test_moving_digits_keep_their_course_when_the_clip_gets_longer() -> None:
    short, long = (open_source("moving-digits", 1, frames=frames).read(3).values for frames in (4, 16))
    assert torch.equal(short, long[:4])


def test_moving_digits_have_a_size_and_channels() -> None:
    assert open_source("moving-digits", 3, frames=2, height=48, width=64).read(0).values.shape == (2, 3, 48, 64)


def test_moving_digits_refuse() -> None:
    with pytest.raises(ValueError, match="room to move"):
        open_source("moving-digits", 1, frames=2, height=8, width=24)


# Transforms


def test_fit_keeps_the_aspect_and_the_centre() -> None:
    picture = torch.zeros(1, 1, 40, 80, dtype=torch.uint8)
    picture[..., 20:60] = 200  # the central square
    inner = fit(picture, 20, 20)[..., 2:-2]  # bicubic mixes in a little of the outside at the border
    assert torch.equal(inner, torch.full_like(inner, 200))
    squeezed = fit(picture, 40, 40)  # no resize at all, only the crop
    assert torch.equal(squeezed, torch.full_like(squeezed, 200))


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (9, 5), (1, 3000), (3000, 1), (33, 47)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_fit_gives_the_size_and_the_range(size: tuple[int, int], dtype: torch.dtype) -> None:
    picture = torch.randint(0, 2, (2, 3, *size), generator=torch.Generator().manual_seed(0))
    picture = (picture * 255).to(torch.uint8) if dtype == torch.uint8 else picture.to(dtype)
    fitted = fit(picture, 32, 48)
    assert fitted.shape == (2, 3, 32, 48)
    assert fitted.dtype == dtype
    assert fitted.min() >= 0
    assert fitted.max() <= (255 if dtype == torch.uint8 else 1)


def test_fit_returns_what_already_fits() -> None:
    picture = torch.rand(1, 3, 8, 8)
    assert fit(picture, 8, 8) is picture


def test_fit_and_augment_refuse_other_integers() -> None:
    picture = torch.zeros(1, 1, 8, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        fit(picture, 4, 4)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        augment(picture, 4, 4, 0.5, True, 0)


def test_augment_depends_on_its_key_alone() -> None:
    picture = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first = augment(picture, 16, 16, 0.2, True, 5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"
    torch.rand(3)
    assert torch.equal(first, augment(picture, 16, 16, 0.2, True, 5))
    assert not torch.equal(first, augment(picture, 16, 16, 0.2, True, 6))


def test_augment_crops_every_frame_alike() -> None:
    frame = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for seed_key in range(8):
        frames = augment(frame.repeat(4, 1, 1, 1), 16, 16, 0.2, True, seed_key)
        alone = augment(frame, 16, 16, 0.2, True, seed_key)
        assert torch.equal(frames, alone.repeat(4, 1, 1, 1))


def test_augment_flips_half_and_nothing_else() -> None:
    picture = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    num_flipped = 0
    for seed_key in range(200):
        result = augment(picture, 8, 8, 1.0, True, seed_key)
        num_flipped += torch.equal(result, picture.flip(-1))
        assert torch.equal(result, picture) or torch.equal(result, picture.flip(-1))
        assert torch.equal(augment(picture, 8, 8, 1.0, False, seed_key), picture)
    assert 60 < num_flipped < 140  # 5.6 standard deviations


def test_augment_keeps_at_least_the_share_of_the_area() -> None:
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64).contiguous()
    seen = []
    for seed_key in range(100):
        crop = augment(ramp, 64, 64, 0.5, False, seed_key)
        assert crop.min() >= 0
        assert crop.max() <= 1
        seen.append(float(crop[0, 0, 32, -1] - crop[0, 0, 32, 0]))  # the share of the width
    assert min(seen) > (0.5 * 0.75) ** 0.5 - 0.05  # aspect at least 3/4
    assert max(seen) > 0.9
    assert max(seen) - min(seen) > 0.2


# Samples and batches


def test_a_sample_is_channels_first_and_scaled() -> None:
    source = open_source("moving-digits:train", 3, frames=4)
    sample = Samples(source, clip(24, 24, channels=3, frames=4), 0, None)[0, 2, 7]
    assert sample.clip is not None
    assert sample.clip.shape == (3, 4, 24, 24)
    assert sample.clip.dtype == torch.float32
    torch.testing.assert_close(sample.clip.transpose(0, 1) * 255, source.read(7).values.float(), atol=1e-4, rtol=0)
    assert (sample.index, sample.place, sample.label) == (7, 2, source.label(7))


def test_samples_refuse_a_source_of_another_shape() -> None:
    samples = Samples(open_source("digits", 1), clip(channels=3), 0, None)
    with pytest.raises(ValueError, match=r"\(frames, channels\)=\(1, 1\), but the clip has \(1, 3\)"):
        samples[0, 0, 0]


def test_evaluation_ignores_the_epoch_and_training_does_not() -> None:
    source = open_source("digits", 1)
    still, moved = Samples(source, clip(), 0, None), Samples(source, clip(), 0, training())
    torch.testing.assert_close(still[0, 3, 3].clip, still[1, 9, 3].clip, atol=0, rtol=0)
    assert not torch.equal(*(clip_of(moved, epoch, 3) for epoch in (0, 1)))
    assert torch.equal(*(clip_of(moved, epoch, 3) for epoch in (1, 1)))
    assert not torch.equal(clip_of(moved, 0, 3), clip_of(Samples(source, clip(), 1, training()), 0, 3))


def clip_of(samples: Samples, epoch: int, index: int) -> Tensor:
    result = samples[epoch, 0, index].clip
    assert result is not None
    return result


@pytest.mark.parametrize("make", [lambda: None, training])
def test_the_cache_changes_nothing_and_reads_once(
    make: Callable[[], Training | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("digits", 1)
    plain, cached = (Samples(source, clip(), 0, make(), cache=cache) for cache in (False, True))
    for _ in range(2):
        for epoch in range(3):
            assert torch.equal(clip_of(plain, epoch, 3), clip_of(cached, epoch, 3))
    monkeypatch.setattr(source, "read", lambda _: pytest.fail("read again"))
    clip_of(cached, 9, 3)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for index in range(6):
        write(tmp_path / f"{index}.png", encoded(RNG.integers(0, 256, (9, 9), dtype=np.uint8)))
    write(tmp_path / "2.png", b"broken" * 10)
    return tmp_path


def test_a_bad_picture_leaves_its_batch_and_is_reported(mixed: Path) -> None:
    samples = Samples(open_source(str(mixed), 3), clip(channels=3), 0, None)
    batch = collate([samples[0, index, index] for index in (1, 2, 3)])
    assert batch.indices.tolist() == [1, 3]
    assert batch.clips().shape == (2, 3, 1, 8, 8)
    assert torch.equal(batch.clips()[1], clip_of(samples, 0, 3))
    assert batch.labels.tolist() == [-1, -1]
    assert batch.problems == [Skipped("2.png", "not a picture that Pillow can read")]
    assert [note for _, note in batch.notes] == ["grey repeated"] * 2


def test_a_batch_of_bad_pictures_has_no_clips(mixed: Path) -> None:
    batch = collate([Samples(open_source(str(mixed), 3), clip(channels=3), 0, None)[0, 2, 2]])
    assert batch.values is None
    assert len(batch.indices) == len(batch.labels) == 0
    assert len(batch.problems) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bytes_stay_bytes_until_they_are_clips(mixed: Path, num_workers: int) -> None:
    """A quarter of what is sent to a device; and a picture of 16 bits among them makes its batch one of numbers."""
    samples = Samples(open_source(str(mixed), 3), clip(channels=3), 0, training())
    (batch,) = batches(samples, 6, 0, 0, False, False, num_workers)
    assert isinstance(batch, Batch)
    assert batch.values is not None
    assert (batch.values.dtype, batch.values.shape) == (torch.uint8, (5, 1, 3, 8, 8))
    assert torch.equal(batch.clips(), batch.values.transpose(1, 2).float() / 255)
    halves = batch.pieces(2)
    assert all(half.values is not None and half.values.dtype == torch.uint8 for half in halves)
    assert torch.equal(torch.cat([half.clips() for half in halves]), batch.clips())

    write(mixed / "2.png", encoded(RNG.integers(0, 2**16, (9, 9), dtype=np.uint16)))
    samples = Samples(open_source(str(mixed), 3), clip(channels=3), 0, training())
    (other,) = batches(samples, 6, 0, 0, False, False, num_workers)
    assert other.values.dtype == torch.float32
    assert torch.equal(other.clips()[[0, 1, 3, 4, 5]], batch.clips())
    assert torch.equal(other.clips()[2], clip_of(samples, 0, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")
def test_a_gpu_makes_the_same_clips_of_bytes() -> None:
    """Bit for bit, which its division by a number is not."""
    values = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 4, 256)
    assert torch.equal(to_clips(values, "cuda").cpu(), to_clips(values))


# Crops that are cut together


def assert_levels(cut: Tensor, expected: Tensor) -> None:
    """Bytes that are the same but for a level, or two, where a sum lies next to the middle of two levels."""
    assert cut.shape == expected.shape
    apart = (cut.float() - expected.float()).abs()
    assert apart.max() <= 2
    assert (apart > 1).float().mean() < 1e-4
    assert (apart > 0).float().mean() < 0.05


@pytest.mark.parametrize("kind", ["noise", "black and white", "smooth"])
@pytest.mark.parametrize("picture, size", [((32, 32), (32, 32)), ((48, 40), (16, 24)), ((9, 20), (32, 32))])
def test_crops_are_cut_together_as_one_by_one(kind: str, picture: tuple[int, int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (64, 2, 3, *picture), dtype=torch.uint8, generator=generator)
    if kind == "black and white":  # whose edges overshoot
        pictures = (pictures > 127).to(torch.uint8) * 255
    if kind == "smooth":
        pictures[:] = torch.linspace(0, 255, picture[1]).to(torch.uint8)
    crops = [draw_crop(one, *size, 0.1, True, seed) for seed, one in enumerate(pictures)]
    expected = torch.stack([cut(one, crop, *size) for one, crop in zip(pictures, crops, strict=True)])
    assert 10 < sum(crop.mirrored for crop in crops) < 54
    assert_levels(cut_together(pictures, torch.tensor(crops), *size), expected)
    for seed in range(8):
        assert torch.equal(augment(pictures[seed], *size, 0.1, True, seed), expected[seed])


def test_a_crop_of_a_whole_picture_is_the_picture() -> None:
    pictures = torch.randint(0, 256, (2, 1, 3, 12, 16), dtype=torch.uint8)
    crops = torch.tensor([(0, 0, 12, 16, False), (0, 0, 12, 16, True)])
    assert torch.equal(cut_together(pictures, crops, 12, 16), torch.stack([pictures[0], pictures[1].flip(-1)]))


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    for index in range(6):
        write(tmp_path / f"{index}.png", encoded(colours()))
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_whose_crops_are_left_to_them_have_the_same_clips(alike: Path, num_workers: int) -> None:
    source = open_source(str(alike), 3)
    later, now = (Samples(source, clip(channels=3), 0, training(), crop_later=x) for x in (True, False))
    (batch,), (expected,) = (batches(samples, 6, 3, 0, True, False, num_workers) for samples in (later, now))
    assert isinstance(batch, Batch)
    assert batch.values is not None
    assert batch.crops is not None
    assert batch.values.shape == (6, 1, 3, 12, 16)
    assert_levels((255 * batch.clips()).round(), (255 * expected.clips()).round())
    pieces = batch.pieces(4)
    assert [len(piece.indices) for piece in pieces] == [1, 2, 1, 2]
    assert torch.equal(torch.cat([piece.clips() for piece in pieces]), batch.clips())
    for row, key in enumerate(zip(batch.places.tolist(), batch.indices.tolist(), strict=True)):
        assert torch.equal(later[3, *key].clip, expected.clips()[row])  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["sizes", "16 bits", "large", "evaluation", "no crop", "fine-tuning"])
def test_what_cannot_be_cut_together_is_cut_as_ever(alike: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "sizes":
        write(alike / "2.png", encoded(colours(13, 16)))
    if what == "16 bits":
        write(alike / "2.png", encoded(RNG.integers(0, 2**16, (12, 16), dtype=np.uint16)))
    if what == "large":
        monkeypatch.setattr("unveil.data.SMALL", 12 * 16 - 1)
    how = {
        "evaluation": None,
        "no crop": dataclasses.replace(training(), crop_scale=1.0),
        "fine-tuning": FineTuning(**dataclasses.asdict(training())),
    }
    source = open_source(str(alike), 3)
    later, now = (Samples(source, clip(channels=3), 0, how.get(what, training()), crop_later=x) for x in (True, False))
    (batch,), (expected,) = (batches(samples, 6, 3, 0, True, False, 0) for samples in (later, now))
    assert isinstance(batch, Batch)
    assert batch.crops is None
    assert torch.equal(batch.clips(), expected.clips())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")
def test_a_gpu_cuts_as_a_cpu() -> None:
    pictures = torch.randint(0, 256, (64, 1, 3, 32, 32), dtype=torch.uint8)
    crops = torch.tensor([draw_crop(one, 32, 32, 0.2, True, seed) for seed, one in enumerate(pictures)])
    on_gpu = [cut_together(pictures.cuda(), crops.cuda(), 32, 32).cpu() for _ in range(2)]
    assert torch.equal(*on_gpu)
    assert_levels(on_gpu[0], cut_together(pictures, crops, 32, 32))


def test_decoded_bytes_counts_the_readable_ones(mixed: Path) -> None:
    assert decoded_bytes(open_source(str(mixed), 3)) == 6 * 3 * 9 * 9
    write(mixed / "only/a.png", b"broken")
    assert decoded_bytes(open_source(str(mixed / "only"), 3)) == 0


def test_workers_do_not_change_the_batches(mixed: Path) -> None:
    samples = Samples(open_source(str(mixed), 3), clip(channels=3), 0, training())
    loaders = [batches(samples, 2, epoch=0, seed=0, shuffle=True, drop_last=False, num_workers=n) for n in (0, 2)]
    orders = []
    for epoch in range(2):
        for loader in loaders:
            loader.batch_sampler.epoch = epoch  # type: ignore[union-attr]
        state = torch.get_rng_state()
        passes: list[list[Batch]] = [list(loader) for loader in loaders]
        assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"
        assert [len(p) for p in passes] == [3, 3]
        for alone, worker in zip(*passes, strict=True):
            assert torch.equal(alone.indices, worker.indices)
            assert torch.equal(alone.clips(), worker.clips())
            assert torch.equal(alone.labels, worker.labels)
            assert alone.problems == worker.problems
        orders.append(torch.cat([batch.indices for batch in passes[0]]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == [0, 1, 3, 4, 5]
    assert orders[0] != orders[1]


def test_a_sample_does_not_depend_on_its_batch() -> None:
    samples = Samples(open_source("digits:test", 1), clip(), 0, training())
    seen: list[dict[int, Tensor]] = []
    for batch_size in (7, 64):
        loader = batches(samples, batch_size, epoch=3, seed=0, shuffle=True, drop_last=False, num_workers=0)
        pairs = [(int(i), c) for batch in loader for i, c in zip(batch.indices, batch.clips(), strict=True)]
        seen.append(dict(pairs))
        assert len(pairs) == len(seen[-1]) == 360
    for index, one in seen[0].items():
        assert torch.equal(one, seen[1][index])


def test_order_drops_the_last_batch_only_if_there_is_a_whole_one() -> None:
    def sizes(num_samples: int, drop_last: bool) -> list[int]:
        order = Order(num_samples, 4, 0, 0, True, drop_last)
        lengths = [len(batch) for batch in order]
        assert len(order) == len(lengths)
        return lengths

    assert sizes(10, False) == [4, 4, 2]
    assert sizes(10, True) == [4, 4]
    assert sizes(8, True) == sizes(8, False) == [4, 4]
    assert sizes(3, True) == [3]


def test_order_without_shuffling_counts_up() -> None:
    assert list(Order(5, 2, 7, 0, False, False)) == [[(7, 0, 0), (7, 1, 1)], [(7, 2, 2), (7, 3, 3)], [(7, 4, 4)]]


def keys_of(order: Order, epoch: int = 0, first_batch: int = 0) -> list[Key]:
    order.epoch, order.first_batch = epoch, first_batch
    return [key for batch in order for key in batch]


def sharded(sizes: list[int], batch_size: int = 4, **arguments: Any) -> Order:
    starts = np.cumsum([0, *sizes]).tolist()
    return Order(sum(sizes), batch_size, 0, 5, arguments.pop("shuffle", True), False, starts=starts, **arguments)


ORDERS: dict[str, Callable[..., Order]] = {
    "counting": lambda batch_size, **a: Order(23, batch_size, 0, 5, False, False, **a),
    "shuffled": lambda batch_size, **a: Order(23, batch_size, 0, 5, True, False, **a),
    "sharded": lambda batch_size, **a: sharded([7, 1, 9, 2, 4], batch_size, **a),
}


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("unveil.data.WINDOW", 5)
    return 5


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("kind", ORDERS)
def test_a_samples_place_is_where_it_comes_in_the_epoch(kind: str) -> None:
    """Whatever the batch size, where an epoch is taken up, and which epoch was asked for before."""
    whole = {epoch: keys_of(ORDERS[kind](4), epoch) for epoch in (0, 1, 7)}
    for batch_size, first_batch in ((4, 0), (4, 3), (9, 1), (100, 0)):
        order = ORDERS[kind](batch_size)
        for epoch in (0, 1, 0, 7):
            keys = keys_of(order, epoch, first_batch)
            assert keys == whole[epoch][first_batch * batch_size :]
            assert [place for _, place, _ in keys] == list(range(first_batch * batch_size, 23))
            assert {e for e, _, _ in keys} == {epoch}
    assert all(sorted(index for _, _, index in keys) == list(range(23)) for keys in whole.values())
    assert ([i for _, _, i in whole[0]] == [i for _, _, i in whole[1]]) == (kind == "counting")


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [4, 6])
def test_processes_share_the_batches_of_one(kind: str, world: int, batch_size: int) -> None:
    """In the order of their ranks, with the places of one process, and as many batches each, even of a last one of three."""
    alone = list(ORDERS[kind](batch_size))
    parts = [list(ORDERS[kind](batch_size, rank=rank, world=world)) for rank in range(world)]
    for batch, *pieces in zip(alone, *parts, strict=True):
        assert [key for piece in pieces for key in piece] == batch
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_more_processes_than_a_batch_has_samples_refuse() -> None:
    with pytest.raises(ValueError, match=r"A batch of 4 cannot be split over 5 processes\. Use --batch-size 5"):
        Order(23, 4, 0, 5, True, False, rank=0, world=5)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_processes_read_what_one_reads_with_any_number_of_workers(num_workers: int) -> None:
    samples = Samples(open_source("digits:test", 1), clip(), 0, training())

    def load(rank: int, world: int, workers: int) -> list[Batch]:
        loader = batches(samples, 90, 2, 5, True, True, workers, rank=rank, world=world)
        return list(loader)

    alone = load(0, 1, 0)
    halves = [load(rank, 2, num_workers) for rank in range(2)]
    for batch, first, second in zip(alone, *halves, strict=True):
        for name in ("indices", "places", "values", "labels"):
            assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(batch, name))


def test_shards_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stretch of the order is of some shards alone, all of their samples, and of others in another epoch."""
    monkeypatch.setattr("unveil.data.WINDOW", 30)
    order = sharded([10] * 12)
    seen = []
    for epoch in (0, 1):
        indices = [index for _, _, index in keys_of(order, epoch)]
        windows = [indices[i : i + 30] for i in range(0, 120, 30)]
        shards = [{index // 10 for index in window} for window in windows]
        assert [len(its) for its in shards] == [3, 3, 3, 3]
        assert all(window != sorted(window) for window in windows)
        within = [
            [index for index in window if index // 10 == min(its)] for window, its in zip(windows, shards, strict=True)
        ]
        assert all(those != sorted(those) for those in within)
        seen.append(shards)
    assert seen[0] != seen[1]


def test_shards_of_few_samples_are_shuffled_as_a_whole() -> None:
    assert keys_of(sharded([10] * 12)) == keys_of(Order(120, 4, 0, 5, True, False))


def test_shards_of_any_sizes_make_windows_of_about_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unveil.data.WINDOW", 50)
    for sizes in ([1000, 1, 1], [1] * 120, [60, 60], [49, 2], [7, 50, 3, 80, 1, 1, 40]):
        order = sharded(sizes)
        lengths = [length for length, _ in order._stretches(3)]
        assert sum(lengths) == sum(sizes)
        assert min(lengths) >= min(50, sum(sizes)) - max(sizes)
        assert sorted(index for _, _, index in keys_of(order, 3)) == list(range(sum(sizes)))


def test_batches_refuse() -> None:
    samples = Samples(open_source("digits:test", 1), clip(), 0, None)

    def load(batch_size: int, num_workers: int) -> None:
        batches(samples, batch_size, epoch=0, seed=0, shuffle=False, drop_last=False, num_workers=num_workers)

    with pytest.raises(ValueError, match="batch_size=0"):
        load(0, 0)
    with pytest.raises(ValueError, match="num_workers=-1"):
        load(4, -1)
    with pytest.raises(ValueError, match="400 workers for 360 samples"):
        load(4, 400)
