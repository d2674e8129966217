"""`unveil doctor`: counts equal to a training's, moments to numpy's, and advice that names what exists."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unveil import cli
from unveil.decoding import BadPicture, header_of
from unveil.inspection import spread_rows
from unveil.sources import Chosen, open_source
from unveil.tasks.doctor import Doctor, doctor
from unveil.tasks.pretrain import Pretrain, pretrain

RNG = np.random.default_rng(0)


def noise(height: int = 20, width: int = 24, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def photos(folder: Path, number: int = 6, **size: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(number):
        Image.fromarray(noise(**size)).save(folder / f"{i}.png")
    return folder


def examined(data: Path | str, **options: Any) -> dict[str, Any]:
    return doctor(Doctor(data=str(data), **{"workers": 0, **options}))


def damaged(folder: Path) -> Path:
    """Six pictures, and one of each kind of damage."""
    photos(folder)
    encoded = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(encoded, "JPEG")
    (folder / "cut.jpg").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
    (folder / "text.png").write_text("text")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    np.save(folder / "five.npy", np.zeros((8, 8, 5), np.uint8))
    np.save(folder / "wide.npy", np.full((8, 8, 3), 7, np.float32))
    (folder / "array.npy").write_bytes(b"\x93NUMPY\x01\x00cut")
    return folder


def test_what_cannot_be_used_is_what_a_training_skips(tmp_path: Path) -> None:
    data = damaged(tmp_path / "data")
    found = examined(data)
    told = pretrain(
        Pretrain(
            data=str(data), out=tmp_path / "run", size="Nano/4", image_size="8", epochs=1, batch_size=64, device="cpu"
        )
    )
    lines = map(json.loads, (tmp_path / "run/problems.jsonl").read_text().splitlines())
    skipped = {line["where"]: line["what"] for line in lines if not line["used"]}
    assert {problem["where"]: problem["what"] for problem in found["problems"]} == skipped
    assert len(found["problems"]) == told["skipped"] == 8
    assert (found["files"], found["readable"]) == (14, 6)


# Numbers


@pytest.mark.parametrize("channels, kind", [(3, np.uint8), (6, np.uint8), (1, np.uint16), (4, np.float32)])
def test_mean_and_std_equal_numpys(tmp_path: Path, channels: int, kind: type) -> None:
    values = RNG.random((5, 9, 7, channels)).astype(np.float32)
    scale = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[kind]
    stored = (values * scale).astype(kind)
    for i, one in enumerate(stored):
        np.save(tmp_path / f"{i}.npy", one)
    found = examined(tmp_path)
    # 16-bit values are read as float32, as training reads them
    pixels = (stored / scale).astype(np.float64 if kind is np.uint8 else np.float32).astype(np.float64)
    np.testing.assert_allclose(found["color"]["mean"], pixels.mean((0, 1, 2)), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found["color"]["std"], pixels.std((0, 1, 2)), rtol=0, atol=1e-7)
    assert (found["channels"], found["color"]["pictures"]) == (channels, 5)
    assert found["color"]["low"] == pytest.approx(pixels.min(), abs=1e-7)
    assert found["color"]["high"] == pytest.approx(pixels.max(), abs=1e-7)
    bits = 8 * np.dtype(kind).itemsize
    assert found["modes"] == {f"{channels} channel{'s' * (channels > 1)}, {bits}-bit": 5}


def test_a_large_picture_counts_as_much_as_a_small_one(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100), (255, 0, 0)).save(tmp_path / "large.png")
    Image.new("RGB", (10, 10), (0, 0, 0)).save(tmp_path / "small.png")
    color = examined(tmp_path)["color"]
    assert color["mean"] == [0.5, 0, 0]
    assert color["std"] == [0.5, 0, 0]


def test_formats_sizes_and_colours(tmp_path: Path) -> None:
    rgb = Image.fromarray(noise(30, 20))
    rgb.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("L").convert("RGB").save(tmp_path / "as_colour.png")
    film = [Image.fromarray(noise(64, 64)).convert("P") for _ in range(3)]
    film[0].save(tmp_path / "film.gif", save_all=True, append_images=film[1:])
    Image.fromarray(RNG.integers(0, 4000, (300, 230)).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (30, 30)).save(tmp_path / "bits.tif")
    found = examined(tmp_path)
    assert found["formats"] == {"PNG": 4, "TIFF": 1, "GIF": 1, "JPEG": 1}
    assert found["modes"] == {"RGB, 8-bit": 3, "1, 1-bit": 1, "I;16, 16-bit": 1, "P, 8-bit": 1, "L, 8-bit": 1}
    assert (found["turned"], found["animated"], found["grey"], found["grey_as_colour"]) == (1, 1, 3, 1)
    sizes = found["sizes"]
    assert sizes["height"] == {"min": 20, "median": 30, "max": 300}  # one is turned upright
    assert sizes["width"] == {"min": 20, "median": 30, "max": 230}
    assert sizes["commonest"][0] == {"height": 30, "width": 20, "pictures": 3}
    assert (sizes["different"], sizes["not_square"]) == (5, 5)
    assert sizes["smaller_than"] == {"64": 5, "224": 6}
    assert found["constant"] == ["bits.tif"]
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert found["decoded_bytes"] == 3 * (4 * 600 + 64 * 64 + 900) + 3 * 4 * 300 * 230


def test_duplicates_and_what_is_in_both(tmp_path: Path) -> None:
    train, test = photos(tmp_path / "train", 3), photos(tmp_path / "test", 2)
    (train / "copy.png").write_bytes((train / "0.png").read_bytes())
    Image.open(train / "0.png").save(train / "same.bmp")
    (test / "seen.png").write_bytes((train / "1.png").read_bytes())
    found = examined(train, test_data=str(test))
    assert found["duplicates"] == {"extra": 2, "files": 1, "groups": [["0.png", "copy.png", "same.bmp"]]}
    assert found["in_both"] == [{"data": "1.png", "test_data": "seen.png"}]
    assert found["test_looked_at"] == 3
    assert found["advice"][0].startswith(f"Test pictures that are in {train} too: 1.")
    assert examined(test)["duplicates"] == {"extra": 0, "files": 0, "groups": []}


def test_labels_are_counted(tmp_path: Path) -> None:
    photos(tmp_path / "data/a", 11)
    photos(tmp_path / "data/b", 1)
    (tmp_path / "data/none").mkdir()
    found = examined(tmp_path / "data")
    assert found["classes"] == {"counts": {"a": 11, "b": 1}, "unlabelled": 0, "empty": ["none"]}
    assert "Classes have from 1 to 11 pictures" in " ".join(found["advice"])
    assert "'none' has no picture" in " ".join(found["advice"])


def test_a_part_is_spread_over_all() -> None:
    assert spread_rows(10, None) == spread_rows(10, 10) == spread_rows(10, 99) == list(range(10))
    assert spread_rows(10, 4) == [0, 2, 5, 7]
    assert spread_rows(10, 1) == [0]


def test_a_part_says_so(tmp_path: Path) -> None:
    found = examined(photos(tmp_path / "data", 10), limit=4)
    assert (found["files"], found["looked_at"], found["readable"], found["color"]["pictures"]) == (10, 4, 4, 4)
    assert "few to learn from" not in " ".join(found["advice"])


def test_workers_change_nothing(tmp_path: Path) -> None:
    data = damaged(tmp_path / "data")
    assert examined(data, workers=2) == examined(data, workers=0)


# Every kind of data


def parquet(path: Path, pictures: list[bytes | None]) -> Path:
    pq.write_table(pa.table({"image": pictures, "label": list(range(len(pictures)))}), path)
    return path


def encoded(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def test_a_parquet_file(tmp_path: Path) -> None:
    pictures = [encoded(noise()) for _ in range(3)]
    found = examined(parquet(tmp_path / "a.parquet", [*pictures, None, b"text"]))
    assert (found["files"], found["readable"], found["formats"]) == (5, 3, {"PNG": 3})
    assert [problem["where"] for problem in found["problems"]] == ["row 3", "row 4"]
    assert found["bytes"] == sum(map(len, pictures))


def test_a_table(tmp_path: Path) -> None:
    photos(tmp_path / "data", 3)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), ("data/0.png", "x"), ("data/1.png", "y"), ("data/0.png", "")])
    found = examined(tmp_path / "list.csv")
    assert found["classes"] == {"counts": {"x": 1, "y": 1}, "unlabelled": 1, "empty": []}
    assert found["duplicates"]["groups"] == [["data/0.png", "data/0.png"]]


@pytest.mark.parametrize("name, frames, side", [("digits:test", 1, 8), ("moving-digits:test", 8, 24)])
def test_what_is_built_in_has_no_files(name: str, frames: int, side: int) -> None:
    found = examined(name, limit=10)
    assert (found["formats"], found["bytes"], found["channels"]) == ({}, 0, 1)
    assert found["decoded_bytes"] == 10 * frames * side * side
    assert found["sizes"]["commonest"] == [{"height": side, "width": side, "pictures": 10}]
    assert not [line for line in found["advice"] if "smaller" in line]


def test_a_source_gives_the_bytes_that_it_decodes(tmp_path: Path) -> None:
    folder = open_source(str(photos(tmp_path / "data", 2)), 3)
    assert folder.encoded(1) == (tmp_path / "data/1.png").read_bytes()
    assert Chosen(folder, [1, 0]).encoded(0) == folder.encoded(1)
    (tmp_path / "data/1.png").unlink()
    with pytest.raises(BadPicture, match="vanished"):
        folder.encoded(1)
    rows = open_source(str(parquet(tmp_path / "a.parquet", [b"abc", None])), 3)
    assert rows.encoded(0) == b"abc"
    with pytest.raises(BadPicture, match="no bytes in this row"):
        rows.encoded(1)
    assert open_source("digits:test", 1).encoded(0) is None


@pytest.mark.parametrize("where, content", [("a.png", b"text"), ("a.npy", b"text"), ("a.npy", b"\x93NUMPY\x09\x00")])
def test_a_header_refuses_what_is_none(where: str, content: bytes) -> None:
    with pytest.raises(BadPicture, match="has no header that can be read"):
        header_of(io.BytesIO(content), where)


# Advice


def bright(values: np.ndarray) -> np.ndarray:
    return values // 8 + 220


ADVICE = [
    (
        lambda folder: photos(folder, 3, height=600, width=500),
        "2.2 times as large as 224 pixels .*--image-size 256",
    ),
    (lambda folder: photos(folder, 3, height=40, width=40), "100% .* smaller than 224 pixels.*--image-size 40, and a"),
    (lambda folder: photos(folder, 3), "3 is few to learn from.*--init"),
    (lambda folder: damaged(folder), "Files that cannot be used: 8"),
]


@pytest.mark.parametrize("make, expected", ADVICE)
def test_advice(tmp_path: Path, make: Any, expected: str) -> None:
    assert re.search(expected, "\n".join(examined(make(tmp_path / "data"))["advice"]))


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.repeat(noise(300, 300, 1), 3, axis=2), "100% of the pictures are grey, 1 of them stored as colour. --channels 1"),
        (bright(noise(300, 300)), "pale or very bright"),
        (noise(300, 300) // 20, "very dark"),
        (RNG.integers(0, 4096, (300, 300)).astype(np.uint16), "reach only 6.2% of their range.*multiply by 16"),
        (np.full((300, 300, 3), 100, np.uint8), "of a single colour, which teach nothing: 1"),
        (noise(300, 300), None),
    ],
)  # fmt: skip
def test_advice_about_colours(tmp_path: Path, values: np.ndarray, expected: str | None) -> None:
    Image.fromarray(values).save(tmp_path / "a.png")
    advice = [line for line in examined(tmp_path)["advice"] if "few to learn" not in line]
    if expected is None:
        assert advice == []
    else:
        assert re.search(expected, "\n".join(advice))


def test_sixteen_bits_of_colour_are_told(tmp_path: Path) -> None:
    import zlib

    rows = b"".join(b"\0" + RNG.integers(0, 256, 6 * 8, dtype=np.uint8).tobytes() for _ in range(8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    found = examined(tmp_path)
    assert found["modes"] == {"RGB, 16-bit": 1}
    assert "16-bit colour is read as 8-bit" in " ".join(found["advice"])


def test_nothing_readable_is_a_finding_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    found = examined(tmp_path)
    assert (found["readable"], found["sizes"], found["color"]) == (0, None, None)
    assert found["advice"] == ["No picture can be read, so there is nothing to train on. The reasons are above."]
    assert list(cli._tell_doctor(found))


def test_advice_names_what_exists() -> None:
    """Commands and options, wherever they stand in the source's sentences."""
    from unveil.tasks import doctor as module
    from unveil.tasks import plan as other

    for task in (module, other):
        text = Path(task.__file__ or "").read_text()
        for command in re.findall(r"`unveil ([a-z-]+)", text):
            assert command in cli.COMMANDS, command
        known = {field.name for options in (Pretrain, Doctor, other.Plan) for field in dataclasses.fields(options)}
        for option in re.findall(r"--([a-z]+(?:-[a-z]+)*)", text):
            assert option.replace("-", "_") in known, option


# The command


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    data, out = damaged(tmp_path / "data"), tmp_path / "new/report.json"
    found = examined(data, out=out)
    assert json.loads(out.read_text()) == found
    assert found["out"] == str(out)


def test_json_is_the_report_and_text_is_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = damaged(tmp_path / "data")
    cli.main(["doctor", "--data", str(data), "--test-data", str(data), "--workers", "0", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == examined(data, test_data=str(data))
    assert "colours     RGB, 8-bit: 6" in captured.err
    assert "Skipped text.png: not a picture that Pillow can read." in captured.err
    assert "In both: 0.png is 0.png of the test data." in captured.err
    cli.main(["doctor", "--data", str(data), "--workers", "0"])
    assert capsys.readouterr().out.splitlines()[0].endswith("14 files or rows, 6 can be used")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--limit 0", "--limit 0: look at 1 picture at least."),
        ("--workers -1", "--workers -1: use 0"),
        ("--image-size x", "--image-size 'x' is no size"),
        ("--channels 0", "channels=0 and frames=1"),
        ("--out report.txt", "--out report.txt is of no known type. Give a name that ends in .json."),
        ("--out {tmp}/there.json", "there.json exists already and is not overwritten."),
        ("--test-data {tmp}/nowhere", "There is no data at"),
        ("--data {tmp}/nothing", "holds no files"),
    ],
)
def test_doctor_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    data = photos(tmp_path / "data", 1)
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--data", str(data), *words.format(tmp=tmp_path).split()])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert expected in captured.err
    assert (tmp_path / "there.json").read_text() == "mine"
