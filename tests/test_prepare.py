"""`unveil prepare`: nothing is lost that need not be, what is bad is counted, and stopping it at any moment costs little."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from unveil import cli
from unveil.data import open_source
from unveil.decoding import BadPicture
from unveil.packing import Form, pack
from unveil.tasks import prepare as task
from unveil.tasks.prepare import Prepare, prepare
from unveil.tasks.pretrain import Pretrain, pretrain

RNG = np.random.default_rng(0)
JPEG = Form(side=16, format="jpeg", quality=92)
PNG = Form(side=16, format="png", quality=92)
WEBP = Form(side=16, format="webp", quality=92)


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Values that shrink and compress well."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    return np.stack([20 * i + 90 * (rows + columns) for i in range(channels)], axis=2).astype(np.uint8)


def noisy(height: int = 12, width: int = 14, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(values: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(stream, format, **options)
    return stream.getvalue()


def array(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=values.dtype == object)
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def folder(path: Path, number: int = 10, size: int = 12) -> Path:
    """So many noisy PNGs in two classes."""
    for i in range(number):
        (path / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy(size, size)).save(path / "ab"[i % 2] / f"{i:04}.png")
    return path


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


# One picture


@pytest.mark.parametrize(
    "data, form, extension",
    [
        (encoded(noisy(), "JPEG"), JPEG, "jpg"),
        (encoded(noisy()[:, :, 0], "JPEG"), JPEG, "jpg"),
        (encoded(noisy()), PNG, "png"),
        (encoded(noisy(channels=4)), PNG, "png"),
        (encoded(noisy(channels=4)), JPEG, "png"),  # which JPEG cannot hold
        (encoded(noisy(), "WEBP"), WEBP, "webp"),
        (encoded(noisy(16, 300), "JPEG"), JPEG, "jpg"),  # its short side counts
        (array(RNG.random((5, 6, 7), dtype=np.float32)), JPEG, "npy"),
        (array(noisy()), JPEG, "npy"),
    ],
)
def test_what_is_small_enough_is_copied_byte_for_byte(data: bytes, form: Form, extension: str) -> None:
    packed = pack(data, "a", form)
    assert packed.data == data
    assert (packed.outcome, packed.extension, packed.note) == ("copied", extension, None)


def test_sixteen_bits_of_colour_are_copied_but_told_when_they_are_lost() -> None:
    ihdr = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + RNG.bytes(20 * 6) for _ in range(20)))
    chunks = [(b"IHDR", ihdr), (b"IDAT", lines), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    copied = pack(data, "a", Form(side=20, format="png", quality=92))
    assert (copied.data, copied.outcome, copied.note) == (data, "copied", None)
    shrunk = pack(data, "a", PNG)
    assert (shrunk.outcome, shrunk.note) == ("shrunk", "16-bit colour read as 8-bit")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("stored", ["TIFF", "PNG"])
def test_png_keeps_the_values_of_small_pictures(mode: str, stored: str) -> None:
    data = encoded(Image.fromarray(noisy(channels=4)).convert(mode), stored)
    packed = pack(data, "a", PNG)
    kept = "RGBA" if mode == "RGBA" else "L" if mode in "1L" else "RGB"
    assert packed.outcome == ("copied" if stored == "PNG" and mode == kept else "rewritten")
    assert packed.extension == "png"
    np.testing.assert_array_equal(np.array(opened(packed.data).convert("RGBA")), np.array(opened(data).convert("RGBA")))


def test_what_others_hold_exactly_is_told_to_be_compressed() -> None:
    packed = pack(encoded(smooth(12, 14)), "a", JPEG)
    assert (packed.outcome, packed.extension) == ("compressed", "jpg")
    assert_close(np.asarray(opened(packed.data), np.float32), smooth(12, 14).astype(np.float32), atol=4, rtol=0)


@pytest.mark.parametrize("size, shrunk", [((64, 32), (32, 16)), ((33, 100), (16, 48)), ((17, 17), (16, 16))])
@pytest.mark.parametrize("stored", ["JPEG", "PNG"])
@pytest.mark.parametrize("form", [JPEG, PNG, WEBP])
def test_large_pictures_are_shrunk_to_the_short_side(
    size: tuple[int, int], shrunk: tuple[int, int], stored: str, form: Form
) -> None:
    image = Image.fromarray(smooth(*size[::-1]))
    packed = pack(encoded(image, stored, **({"quality": 95} if stored == "JPEG" else {})), "a", form)
    assert packed.outcome == "shrunk"
    result = opened(packed.data)
    assert (result.format, result.size, result.mode) == (form.format.upper(), shrunk, "RGB")
    expected = np.asarray(image.resize(shrunk, Image.Resampling.BICUBIC), np.float32)
    assert_close(np.asarray(result, np.float32), expected, atol=8, rtol=0)


def test_a_large_jpeg_decoded_at_a_fraction_looks_as_one_decoded_whole() -> None:
    image = Image.fromarray(smooth(640, 800))
    packed = pack(encoded(image, "JPEG", quality=95), "a", PNG)
    expected = image.resize((20, 16), Image.Resampling.BICUBIC)
    assert_close(np.asarray(opened(packed.data), np.float32), np.asarray(expected, np.float32), atol=3, rtol=0)


@pytest.mark.parametrize("side", [8, 4000])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_that_lie_on_their_side_are_turned_upright(orientation: int, side: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(16, 32), "JPEG", exif=exif, quality=95)
    packed = pack(data, "a", Form(side=side, format="jpeg", quality=95))
    assert (packed.data == data) == (orientation == 1 and side > 16)
    turned = opened(packed.data)
    assert turned.getexif().get(0x0112, 1) == 1
    assert (turned.width < turned.height) == (orientation >= 5)


@pytest.mark.parametrize("dtype, extension", [(np.uint16, "png"), (np.float32, "npy")])
def test_deep_grey_keeps_its_values(dtype: Any, extension: str) -> None:
    values = RNG.random((9, 10), dtype=np.float32)
    values = (values * 65535).astype(np.uint16) if dtype == np.uint16 else values
    packed = pack(encoded(values, "TIFF"), "a", JPEG)
    assert (packed.extension, packed.outcome) == (extension, "rewritten")
    read = np.load(io.BytesIO(packed.data)) if extension == "npy" else np.array(opened(packed.data))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_large_arrays_are_shrunk_and_stay_arrays(dtype: Any, channels: int) -> None:
    values = smooth(64, 32, channels) / 255
    values = values.astype(dtype) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)
    values = values[:, :, 0] if channels == 1 else values
    packed = pack(array(values), "a", JPEG)
    assert (packed.extension, packed.outcome) == ("npy", "shrunk")
    read = np.load(io.BytesIO(packed.data))
    assert (read.dtype, read.shape) == (dtype, (32, 16, *values.shape[2:]))
    whole = 1 if dtype == np.float32 else np.iinfo(dtype).max
    assert read.max() <= whole
    boxes = values.astype(np.float64).reshape(32, 2, 16, 2, *values.shape[2:]).mean((1, 3))
    assert_close(read.astype(np.float64), boxes, atol=0.01 * whole, rtol=0)


def test_deep_grey_is_shrunk_with_its_bits() -> None:
    ramp = np.linspace(1000, 60000, 64 * 32).reshape(64, 32).astype(np.uint16)
    packed = pack(encoded(ramp), "a", JPEG)
    read = np.array(opened(packed.data))
    assert (packed.extension, read.dtype, read.shape) == ("png", np.uint16, (32, 16))
    assert len(np.unique(read)) > 256


@pytest.mark.parametrize("side", [8, 100])
@pytest.mark.parametrize("form, extension", [("jpeg", "png"), ("png", "png"), ("webp", "webp")])
def test_transparency_is_kept(form: Any, extension: str, side: int) -> None:
    values = np.concatenate([smooth(20, 20), np.full((20, 20, 1), 255, np.uint8)], 2)
    values[:, 10:, 3] = 0
    packed = pack(encoded(values, "TIFF"), "a", Form(side=side, format=form, quality=92))
    assert packed.extension == extension
    alpha = np.array(opened(packed.data).convert("RGBA"))[:, :, 3]
    assert (alpha[:, :3] == 255).all()
    assert (alpha[:, -3:] == 0).all()


def test_opaque_alpha_is_no_transparency() -> None:
    values = np.concatenate([smooth(20, 20), np.full((20, 20, 1), 255, np.uint8)], 2)
    assert pack(encoded(values), "a", JPEG).extension == "jpg"


@pytest.mark.parametrize(
    "data, note",
    [
        (encoded(Image.fromarray(smooth(12, 12)).convert("CMYK"), "JPEG"), "CMYK converted to RGB"),
        (encoded(Image.fromarray(smooth(12, 12)).convert("P"), "PNG"), "palette converted to RGB"),
        (
            encoded(Image.new("L", (4, 4), 9), "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))]),
            "first of 2 frames used",
        ),
    ],
)
def test_what_had_to_be_converted_is_noted(data: bytes, note: str) -> None:
    assert pack(data, "a", JPEG).note == note


@pytest.mark.parametrize("form, longest", [("jpeg", 65_535), ("webp", 16_383)])
def test_what_is_too_long_for_its_format_refuses(form: Any, longest: int) -> None:
    line = Image.new("L", (longest + 1, 1))
    with pytest.raises(BadPicture, match=rf"{longest + 1} x 1 pixels are too long for .*--format png"):
        pack(encoded(line), "a", Form(side=16, format=form, quality=92))
    assert opened(pack(encoded(line, "TIFF"), "a", PNG).data).size == (longest + 1, 1)


# Bad files


def corrupt_files(path: Path) -> int:
    """A hundred files and more that are no whole pictures, of every kind, and how many."""
    path.mkdir(parents=True, exist_ok=True)
    made = 0

    def add(name: str, data: bytes) -> None:
        nonlocal made
        (path / f"{made:03}_{name}").write_bytes(data)
        made += 1

    jpeg = encoded(noisy(64, 64), "JPEG", quality=90)
    progressive = encoded(noisy(64, 64), "JPEG", quality=90, progressive=True)
    png = encoded(noisy(40, 40))
    for share in range(2, 94, 6):
        add("cut.jpg", jpeg[: len(jpeg) * share // 100])
        add("cut_progressive.jpg", progressive[: len(progressive) * share // 100])
    for share in range(2, 98, 8):
        for format in ("PNG", "TIFF", "WEBP", "BMP"):
            whole = encoded(noisy(40, 40), format)
            add(f"cut.{format.lower()}", whole[: len(whole) * share // 100])
    for at in (30, 60, len(png) // 2):  # a bad CRC: the header's and the data's
        add("crc.png", png[:at] + bytes([png[at] ^ 255]) + png[at + 1 :])
    gif = encoded(noisy(40, 40)[:, :, 0], "GIF")
    for share in (5, 50, 90):
        add("cut.gif", gif[: len(gif) * share // 100])
    html = b"<!doctype html><html><head><title>404</title></head><body>Not Found</body></html>"
    for extension in ("jpg", "png", "webp", "gif", "bmp", "tif", "npy"):
        add(f"page.{extension}", html)
        add(f"text.{extension}", b"these are not the pixels you are looking for\n" * 9)
        add(f"empty.{extension}", b"")
        add(f"zeros.{extension}", bytes(4000))
    add("gzip.jpg", gzip.compress(jpeg))
    add("zip.png", b"PK\x03\x04" + bytes(100))
    add("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    add("integers.tif", encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"))
    add("float.tif", encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))
    add("bomb.png", bomb())
    add("pickle.npy", array(np.array([{"a": 1}], dtype=object)))
    add("cut.npy", array(noisy())[:-10])
    add("int64.npy", array(np.zeros((4, 4, 3), np.int64)))
    add("four.npy", array(np.zeros((2, 4, 4, 3), np.uint8)))
    add("range.npy", array(np.full((4, 4, 3), 2.0, np.float32)))
    add("none.npy", array(np.zeros((0, 4, 3), np.uint8)))
    add("readme.txt", b"a text")
    add("no_extension", jpeg)
    add("movie.mp4", b"\0\0\0\x18ftypmp42" + bytes(100))
    (path / f"{made:03}_link.jpg").symlink_to(path / "nowhere.jpg")
    made += 1
    os.mkfifo(path / f"{made:03}_pipe.jpg")
    made += 1
    (path / "directory.jpg").mkdir()  # which is nothing, as an empty folder is
    return made


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels by its header."""
    ihdr = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def test_a_hundred_corrupt_files_are_counted_by_preparing_and_by_training(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 20)
    bad = corrupt_files(data / "a" / "more")
    assert bad >= 100
    result = prepare(Prepare(data=str(data), out=tmp_path / "out", workers=2))
    assert (result["samples"], result["skipped"]) == (20, bad)
    lines = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    assert len([line for line in lines if not line["used"]]) == bad
    assert all(line["what"] and "\n" not in line["what"] for line in lines)

    words: dict[str, Any] = {"size": "Nano/4", "image_size": "8", "epochs": 1, "batch_size": 999, "device": "cpu"}
    raw = pretrain(Pretrain(data=str(data), out=tmp_path / "raw", **words))
    assert raw["finished"]
    assert raw["skipped"] == bad
    prepared = pretrain(Pretrain(data=str(tmp_path / "out"), out=tmp_path / "run", **words))
    assert (prepared["images_seen"], prepared["skipped"]) == (20, 0)


# The whole


def test_every_sample_is_there_once_in_a_drawn_order_with_its_class(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 21)
    result = prepare(Prepare(data=str(data), out=tmp_path / "out", shard_samples=5, format="png", workers=1))
    assert (result["samples"], result["shards"], result["classes"]) == (21, 5, ["a", "b"])
    before, after = open_source(str(data), 3), open_source(str(tmp_path / "out"), 3)
    assert after.classes == ("a", "b")
    order = torch.randperm(21, generator=task.draws.generator(0, "shards")).tolist()
    assert order != sorted(order)
    for i, index in enumerate(order):
        assert torch.equal(after.read(i).values, before.read(index).values)
        assert after.label(i) == before.label(index)
        assert after.where(i) == f"shard-{i // 5:06}.tar/{i:09}"


@pytest.mark.parametrize("other", [{"workers": 3}, {"data": "again"}])
def test_the_shards_depend_neither_on_the_processes_nor_on_the_day(tmp_path: Path, other: dict[str, Any]) -> None:
    data = folder(tmp_path / "data", 21)
    prepare(Prepare(data=str(data), out=tmp_path / "out", shard_samples=5, workers=1))
    again = {name: value for name, value in other.items() if name != "data"}
    prepare(Prepare(data=str(data), out=tmp_path / "other", shard_samples=5, **again))
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    prepare(Prepare(data=str(data), out=tmp_path / "seeded", shard_samples=5, seed=1))
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "seeded").keys()
    assert contents(tmp_path / "out") != contents(tmp_path / "seeded")


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 9)
    (data / "a" / "bad.png").write_bytes(b"no picture")
    result = prepare(Prepare(data=str(data), out=tmp_path / "out", shard_samples=4, format="png"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format"] == "unveil-shards-1"
    assert (manifest["samples"], manifest["skipped"], manifest["copied"]) == (9, 1, 9)
    assert sum(shard["samples"] for shard in manifest["shards"]) == 9
    for shard in manifest["shards"]:
        held = (tmp_path / "out" / shard["name"]).read_bytes()
        assert shard["bytes"] == len(held)
        assert shard["sha256"] == hashlib.sha256(held).hexdigest()
    assert result["bytes"] == sum(shard["bytes"] for shard in manifest["shards"])
    source = open_source(str(tmp_path / "out"), 3)
    values = torch.stack([source.read(i).values[0] for i in range(9)]).double() / 255
    assert_close(torch.tensor(manifest["mean"], dtype=torch.float64), values.mean((0, 2, 3)), atol=1e-10, rtol=0)
    assert_close(
        torch.tensor(manifest["std"], dtype=torch.float64), values.std((0, 2, 3), correction=0), atol=1e-10, rtol=0
    )
    names = sorted(contents(tmp_path / "out"))
    shards = [f"shard-{i:06}.{kind}" for i in range(3) for kind in ("npy", "tar")]
    assert names == ["manifest.json", "problems.jsonl", *shards]


def test_pictures_of_unlike_channels_have_no_mean(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 2)
    np.save(data / "a" / "five.npy", RNG.random((8, 8, 5), dtype=np.float32))
    result = prepare(Prepare(data=str(data), out=tmp_path / "out"))
    assert (result["samples"], result["mean"], result["std"]) == (3, None, None)


def test_samples_without_a_label_keep_none(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 4)
    (data / "list.csv").write_text("path,label\na/0000.png,cat\nb/0001.png,\na/0002.png,dog\n")
    prepare(Prepare(data=str(data / "list.csv"), out=tmp_path / "out"))
    source = open_source(str(tmp_path / "out"), 3)
    assert source.classes == ("cat", "dog")
    assert sorted((source.label(i) for i in range(3)), key=str) == [0, 1, None]


@pytest.mark.parametrize("data, channels", [("digits:test", 1), ("moving-digits:test", 1)])
def test_what_is_no_file_is_prepared_without_loss(tmp_path: Path, data: str, channels: int) -> None:
    result = prepare(Prepare(data=data, out=tmp_path / "out", format="png"))
    assert (result["samples"], result["copied"]) == (360, 360)
    before, after = open_source(data, channels), open_source(str(tmp_path / "out"), channels)
    order = torch.randperm(360, generator=task.draws.generator(0, "shards")).tolist()
    for i in range(0, 360, 40):
        assert torch.equal(after.read(i).values, before.read(order[i]).values)


def test_shards_can_be_prepared_again(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 6, size=40)
    prepare(Prepare(data=str(data), out=tmp_path / "out", format="png"))
    result = prepare(Prepare(data=str(tmp_path / "out"), out=tmp_path / "small", format="png", image_size=8))
    assert (result["samples"], result["shrunk"], result["classes"]) == (6, 6, ["a", "b"])
    assert open_source(str(tmp_path / "small"), 3).read(0).values.shape == (1, 3, 8, 8)


# Stopping and going on


@pytest.fixture
def slow_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture takes a hundredth of a second."""
    fast = pack

    def slow(*arguments: Any) -> Any:
        time.sleep(0.01)
        return fast(*arguments)

    monkeypatch.setattr("unveil.packing.pack", slow)


@pytest.mark.usefixtures("slow_pack")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_preparation_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    data = folder(tmp_path / "data", 60)
    sent = []

    def interrupt(done: int, total: int) -> None:
        assert total == 60
        if done >= 25 and not sent:
            sent.append(done)
            os.kill(os.getpid(), number)

    options = Prepare(data=str(data), out=tmp_path / "out", shard_samples=10, workers=1)
    first = prepare(options, interrupt)
    assert not first["finished"]
    assert first["interrupted"] == number.name
    assert 20 <= first["samples"] < 60
    with pytest.raises(ValueError, match=r"out is not finished.*The same command goes on"):
        open_source(str(tmp_path / "out"), 3)
    told: list[int] = []
    second = prepare(options, lambda done, _: told.append(done))
    assert second["finished"]
    assert second["resumed"]
    assert min(told) >= first["samples"]  # finished shards are not made again
    prepare(Prepare(data=str(data), out=tmp_path / "whole", shard_samples=10))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    third = prepare(options)
    assert third["done_before"]
    assert {**third, "seconds": 0} == {**second, "resumed": False, "done_before": True, "seconds": 0}


@pytest.mark.usefixtures("slow_pack")
def test_a_killed_preparation_goes_on_and_leaves_no_process_behind(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 60)
    out = tmp_path / "out"
    options = Prepare(data=str(data), out=out, shard_samples=10, workers=2)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=prepare, args=(options,))
    process.start()
    while not (out / "shard-000001.json").exists():
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    time.sleep(0.3)  # a picture's time and more
    before = sorted(contents(out))
    time.sleep(0.2)
    assert sorted(contents(out)) == before  # nobody works any more
    assert "manifest.json" not in before
    result = prepare(options)
    assert result["resumed"]
    assert result["samples"] == 60
    prepare(Prepare(data=str(data), out=tmp_path / "whole", shard_samples=10))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_shard_that_was_damaged_meanwhile_is_made_again(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 30)
    options = Prepare(data=str(data), out=tmp_path / "out", shard_samples=10, workers=1)

    def interrupt(done: int, total: int) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        prepare(options, interrupt)
    shard = tmp_path / "out" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "out" / "shard-000002.npy").unlink()
    (tmp_path / "out" / "shard-000000.json").write_text("{")
    prepare(options)
    prepare(Prepare(data=str(data), out=tmp_path / "whole", shard_samples=10))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("emptied", [False, True])
def test_data_that_vanishes_stops_the_preparation_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emptied: bool
) -> None:
    monkeypatch.setattr("unveil.reading.WAITS", (0.01, 0.01))
    data, away = folder(tmp_path / "data", 60), tmp_path / "away"
    fast = pack
    seen = multiprocessing.get_context().Value("q", 0)

    def packing(*arguments: Any) -> Any:
        seen.value += 1
        if seen.value == 25:
            data.rename(away)
            if emptied:  # as a mount point is
                data.mkdir()
        return fast(*arguments)

    monkeypatch.setattr("unveil.packing.pack", packing)
    options = Prepare(data=str(data), out=tmp_path / "out", shard_samples=10, workers=1)
    with pytest.raises(ValueError, match=r"data' cannot be read any more .*the same command goes on from there"):
        prepare(options)
    if emptied:
        data.rmdir()
    away.rename(data)
    result = prepare(options)
    assert (result["samples"], result["skipped"], result["resumed"]) == (60, 0, True)


def test_a_file_that_was_removed_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tmp_path / "data", 6)
    real = task.open_source

    def opened_then_removed(*arguments: Any, **options: Any) -> Any:
        source = real(*arguments, **options)
        (data / "a" / "0002.png").unlink()
        return source

    monkeypatch.setattr("unveil.tasks.prepare.open_source", opened_then_removed)
    begin = time.perf_counter()
    result = prepare(Prepare(data=str(data), out=tmp_path / "out"))
    assert (result["samples"], result["skipped"]) == (5, 1)
    assert "vanished since" in (tmp_path / "out" / "problems.jsonl").read_text()
    assert time.perf_counter() - begin < 3  # a missing file is not waited for


def test_a_process_that_is_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tmp_path / "data", 6)
    with monkeypatch.context() as patched:
        patched.setattr("unveil.tasks.prepare.write_shard", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(ValueError, match=r"was killed by signal 9; perhaps the memory is full.*fewer --workers"):
            prepare(Prepare(data=str(data), out=tmp_path / "out"))
    assert prepare(Prepare(data=str(data), out=tmp_path / "out"))["samples"] == 6


def test_a_full_disk_is_told_and_the_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tmp_path / "data", 6)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("unveil.packing._member", full)
        with pytest.raises(ValueError, match="No space left on device"):
            prepare(Prepare(data=str(data), out=tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["prepare.json"]
    assert prepare(Prepare(data=str(data), out=tmp_path / "out"))["samples"] == 6


# Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 0}, "--image-size 0: use pixels from 1 to 8192"),
        ({"image_size": 9000}, "--image-size 9000"),
        ({"format": "gif"}, "--format has format='gif', which does not exist"),
        ({"quality": 0}, "--quality 0: use a number from 1 to 100"),
        ({"quality": 101}, "--quality 101"),
        ({"quality": 90, "format": "png"}, "--quality 90 belongs to jpeg and webp"),
        ({"shard_samples": 0}, "--shard-samples 0"),
        ({"workers": 0}, "--workers 0"),
        ({"seed": -1}, "--seed -1"),
        ({"data": "{tmp}/nowhere"}, "There is no data"),
        ({"out": "{tmp}/data/out"}, "lies in .*data, where it would be read as data"),
        ({"out": "{tmp}/file"}, "is a file, and shards need a directory"),
        ({"out": "{tmp}/taken"}, r"is not empty \('letter.txt'\) and holds no shards"),
    ],
)
def test_prepare_refuses(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder(tmp_path / "data", 2)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("Dear")
    words: dict[str, Any] = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out"), **change}
    words = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in words.items()}
    with pytest.raises(ValueError, match=message):
        prepare(Prepare(**{**words, "out": Path(words["out"])}))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "letter.txt").read_text() == "Dear"


def test_another_commands_directory_refuses(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 4)
    options: dict[str, Any] = {"data": str(data), "out": tmp_path / "out"}
    prepare(Prepare(**options))
    before = contents(tmp_path / "out")
    for change, message in (
        ({"image_size": 64}, "image_size was 256 and is now 64"),
        ({"format": "png"}, "format was 'jpeg' and is now 'png'"),
        ({"quality": 50}, "quality was 92 and is now 50"),
        ({"seed": 3}, "seed was 0 and is now 3"),
        ({"shard_samples": 3}, "shard_samples was 256 and is now 3"),
        ({"data": str(data / "a")}, "data was "),
    ):
        with pytest.raises(ValueError, match=f"holds other shards: {message}"):
            prepare(Prepare(**{**options, **change}))
    Image.new("RGB", (4, 4)).save(data / "a" / "new.png")
    with pytest.raises(ValueError, match="files or labels of the data have changed since"):
        prepare(Prepare(**options))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "unveil-shards-9", "made": {}}', '{"name": "an extension"}'])
def test_a_damaged_or_foreign_manifest_refuses(tmp_path: Path, text: str) -> None:
    data = folder(tmp_path / "data", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or another program's"):
        prepare(Prepare(data=str(data), out=tmp_path / "out"))
    assert (tmp_path / "out" / "manifest.json").read_text() == text


def test_only_unreadable_pictures_refuse(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 3)
    for path in data.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"None of the 3 samples of .* can be read; the first problem: .*\.png: not a"):
        prepare(Prepare(data=str(data), out=tmp_path / "out"))
    assert contents(tmp_path / "out") == {}
    shutil.rmtree(data)
    assert prepare(Prepare(data=str(folder(data, 3)), out=tmp_path / "out"))["samples"] == 3


def test_a_shard_without_a_usable_picture_is_left_out(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 9)
    order = torch.randperm(9, generator=task.draws.generator(0, "shards")).tolist()
    paths = sorted(data.rglob("*.png"))
    for index in order[3:6]:
        paths[index].write_bytes(b"no picture")
    result = prepare(Prepare(data=str(data), out=tmp_path / "out", shard_samples=3))
    assert (result["samples"], result["shards"], result["skipped"]) == (6, 2, 3)
    source = open_source(str(tmp_path / "out"), 3)
    assert [source.where(i) for i in (2, 3)] == ["shard-000000.tar/000000002", "shard-000002.tar/000000006"]
    assert source.read(3).values.shape == (1, 3, 12, 12)


# The command


@pytest.fixture
def unveil(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str | Path) -> tuple[int, str, str]:
        try:
            cli.main([*map(str, words)])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_tells_what_it_did(tmp_path: Path, unveil: Callable[..., tuple[int, str, str]]) -> None:
    data = folder(tmp_path / "data", 8)
    (data / "a" / "bad.png").write_bytes(b"no picture")
    Image.fromarray(smooth(600, 300)).convert("CMYK").save(data / "b" / "large.jpg")
    words = ("prepare", "--data", data, "--out", tmp_path / "out")
    code, out, err = unveil(*words)
    assert code == 0
    assert "Finished: 9 pictures in 1 shard(s)" in out
    assert "Shrunk: 1. Small enough: 0 copied byte for byte, 0 rewritten without loss, 8 compressed." in out
    assert "With --format png, pictures that are small enough keep every value." in out
    assert "Files that could not be used: 1." in out
    assert "Converted pictures: 1 (CMYK converted to RGB)." in out
    assert "10/10" in err or "picture" in err
    code, out, err = unveil(*words, "--json")
    assert json.loads(out)["done_before"]
    assert "Finished before, so nothing was done" in err


@pytest.mark.usefixtures("slow_pack")
@pytest.mark.parametrize("number, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])  # a scheduler's way to ask
def test_the_command_tells_when_it_was_interrupted(
    tmp_path: Path,
    unveil: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: int,
) -> None:
    data = folder(tmp_path / "data", 200)
    sent: list[int] = []

    def interrupt(done: int, total: int) -> None:
        if not sent:
            sent.append(done)
            os.kill(os.getpid(), number)

    monkeypatch.setitem(cli.RUN, Prepare, (lambda options: prepare(options, interrupt), cli._tell_prepare))
    code, out, _ = unveil(
        "prepare", "--data", data, "--out", tmp_path / "out", "--workers", "1", "--shard-samples", "20"
    )
    assert code == expected
    assert re.fullmatch(
        r"Interrupted: \d+ pictures in \d shard\(s\) of [\d.]+ MB together are finished, and the same command goes on from "
        r"there\.\n",
        out,
    )
