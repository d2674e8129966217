"""What people look at: contact sheets, curves, and a page that needs no other file."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import generator

from unveil.report import CAPTION, MARGIN, Page, contact_sheet, curve, save_png, to_image


def clips(n: int, channels: int = 3, frames: int = 1, height: int = 8, width: int = 8) -> list[torch.Tensor]:
    return list(torch.rand(n, channels, frames, height, width, generator=generator()))


def test_an_rgb_picture_keeps_its_values() -> None:
    values = torch.randint(0, 256, (3, 1, 5, 6), generator=generator(), dtype=torch.uint8)
    image = np.asarray(to_image(values / 255))
    assert np.array_equal(image, values[:, 0].permute(1, 2, 0).numpy())


def test_a_clip_is_a_strip_of_its_frames() -> None:
    (clip,) = clips(1, frames=3, height=4, width=5)
    strip = np.asarray(to_image(clip))
    assert strip.shape == (4, 15, 3)
    for t in range(3):
        assert np.array_equal(strip[:, 5 * t : 5 * t + 5], np.asarray(to_image(clip[:, t : t + 1])))


@pytest.mark.parametrize("channels, shown", [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_other_channel_counts_are_shown(channels: int, shown: list[int]) -> None:
    (clip,) = clips(1, channels)
    expected = (clip[shown, 0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(np.asarray(to_image(clip)), expected)


def test_values_out_of_range_are_clipped_not_wrapped() -> None:
    image = np.asarray(to_image(torch.tensor([-0.3, 1.7]).reshape(1, 1, 1, 2)))
    assert image[0, :, 0].tolist() == [0, 255]


def test_a_contact_sheet_holds_every_clip_enlarged_without_blur() -> None:
    rows = [("truth", clips(9)), ("samples", clips(9))]
    sheet = contact_sheet(rows, cell=24)
    assert sheet.size == (9 * (24 + MARGIN) + MARGIN, 2 * (24 + CAPTION + MARGIN) + MARGIN)
    pixels = np.asarray(sheet)
    for j, (_, row) in enumerate(rows):
        for i, clip in enumerate(row):
            x, y = MARGIN + i * (24 + MARGIN), MARGIN + CAPTION + j * (24 + CAPTION + MARGIN)
            expected = np.asarray(to_image(clip)).repeat(3, 0).repeat(3, 1)
            assert np.array_equal(pixels[y : y + 24, x : x + 24], expected)
    captions = pixels[MARGIN : MARGIN + CAPTION]
    assert (captions < 128).any()  # something is written there


def test_a_contact_sheet_of_video_has_strips() -> None:
    sheet = contact_sheet([("truth", clips(2, frames=4, height=24, width=24))], cell=24)
    assert sheet.size == (2 * (4 * 24 + MARGIN) + MARGIN, 24 + CAPTION + 2 * MARGIN)


def test_a_contact_sheet_takes_any_size_and_a_long_caption() -> None:
    mixed = [*clips(1, height=16, width=40), *clips(1, height=30, width=8)]
    caption = "a caption that is much longer than the pictures below it are wide, and must not be cut off"
    sheet = contact_sheet([(caption, mixed)], cell=8)
    assert sheet.size == (7 * len(caption) + 2 * MARGIN, 30 + CAPTION + 2 * MARGIN)
    assert contact_sheet([("", clips(1, height=300, width=300))]).size[0] >= 300  # large ones are not shrunk


def test_png_is_written_whole(tmp_path: Path) -> None:
    image = to_image(clips(1)[0])
    save_png(tmp_path / "new" / "sheet.png", image)
    with Image.open(tmp_path / "new" / "sheet.png") as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize("log_x", [False, True])
def test_a_curve_is_a_png(log_x: bool) -> None:
    png = curve({"a": ([1, 10, 100], [3, 2, 1]), "b": (range(1, 40), range(39))}, "steps", "loss", log_x)
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert np.asarray(image.convert("L")).std() > 5


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_needs_no_other_file(tmp_path: Path) -> None:
    page = Page("Digits & <friends>", "What the model sees.")
    page.heading("Pictures")
    image = contact_sheet([("truth", clips(3))])
    page.picture(image, 'truth "and" <holes>')
    page.picture(curve({"loss": ([1, 2], [2, 1])}, "x", "y"), "a curve")
    page.table(["features", "linear %"], [["encoder", 91.25], ["raw <pixels>", 98]])
    page.text("1 < 2 & <b>so</b> on")
    page.save(tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r"base64,[\w+/=]+", "", source))
    for reference in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', source):
        assert reference.startswith("data:image/png;base64,")
    reader = Reader()
    reader.feed(source)
    assert [p["alt"] for p in reader.pictures] == ['truth "and" <holes>', "a curve"]
    decoded = [base64.b64decode((p["src"] or "").split(",")[1], validate=True) for p in reader.pictures]
    with Image.open(io.BytesIO(decoded[0])) as first:
        assert np.array_equal(np.asarray(first), np.asarray(image))
    with Image.open(io.BytesIO(decoded[1])) as second:
        second.load()
    for text in ("Digits & <friends>", "raw <pixels>", "1 < 2 & <b>so</b> on", "91.25", "linear %"):
        assert text in reader.text
    assert reader.tags.count("table") == 1
    assert reader.tags.count("tr") == 3
    assert reader.tags.count("h2") == 1
