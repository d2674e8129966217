"""Things for people to look at: contact sheets as pictures, and one self-contained HTML page."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unveil.checkpoint import write_atomically

MARGIN = 4
CAPTION = 18


def to_image(clip: Tensor) -> Image.Image:
    """A clip (C, T, H, W) in [0, 1] as a picture, frames side by side. Channels past the third are not shown."""
    strip = clip.detach().float().cpu().nan_to_num(0).clamp(0, 1).permute(2, 1, 3, 0)  # (H, T, W, C)
    H, T, W, C = strip.shape
    values = (strip.reshape(H, T * W, C).numpy() * 255).round().astype(np.uint8)
    values = np.repeat(values[..., :1], 3, 2) if C < 3 else values[..., :3]
    return Image.fromarray(values)


def heat(values: Tensor, top: float = 1.0) -> Tensor:
    """A map (T, H, W) as colours (3, T, H, W) in [0, 1]: black is 0, and the brightest `top` and more."""
    from matplotlib import colormaps  # heavy

    colours = colormaps["inferno"]((values / top).clamp(0, 1).numpy())[..., :3]
    return torch.from_numpy(colours).permute(3, 0, 1, 2).float()


def contact_sheet(rows: Sequence[tuple[str, Sequence[Tensor]]], cell: int = 96) -> Image.Image:
    """Rows of clips under captions.

    Args:
        rows: (caption, clips of (C, T, H, W) in [0, 1]).
        cell: at least this many pixels high for each clip; small ones are enlarged by a whole number, without blur.
    """
    strips = [(caption, [to_image(clip) for clip in clips]) for caption, clips in rows]
    scale = max(1, round(cell / max(image.height for _, images in strips for image in images)))
    strips = [
        (
            caption,
            [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in row],
        )
        for caption, row in strips
    ]
    width = max(sum(image.width + MARGIN for image in row) for _, row in strips) + MARGIN
    width = max(width, *(7 * len(caption) + 2 * MARGIN for caption, _ in strips))
    height = sum(max(image.height for image in row) + CAPTION + MARGIN for _, row in strips) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for caption, row in strips:
        pen.text((MARGIN, y), caption, fill="black", font_size=12)
        y += CAPTION
        x = MARGIN
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + MARGIN
        y += max(image.height for image in row) + MARGIN
    return sheet


def save_png(path: Path, image: Image.Image) -> None:
    """Write a picture so that a reader never sees half of it."""
    write_atomically(path, lambda part: image.save(part, format="PNG"))


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str, log_x: bool = False
) -> bytes:
    """Lines of (x, y) by name as a PNG."""
    from matplotlib.figure import Figure  # heavy, and only a page needs it

    figure = Figure(figsize=(6, 3.2))
    # Fixed: a layout that fits the labels draws all of it twice, and there are several curves at every save.
    axes = figure.add_axes((0.16, 0.16, 0.81, 0.76))
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, marker="o" if len(x) < 20 else None, markersize=3)
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


MAX_NAMED = 40  # classes whose names can be read beside a matrix


def matrix_picture(matrix: Tensor, names: Sequence[str]) -> bytes:
    """A confusion matrix (K, K), each row as shares of its sum, as a PNG."""
    from matplotlib.figure import Figure

    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    side = min(10.0, max(3.5, 0.35 * len(names) + 1.5))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set_xlabel("told")
    axes.set_ylabel("true")
    if len(names) <= MAX_NAMED:
        short = [name[:16] for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, parse_math=False)  # a dollar is no formula
        axes.set_yticks(range(len(names)), short, parse_math=False)
    if len(names) <= 12:
        for i, row in enumerate(matrix.tolist()):
            for j, count in enumerate(row):
                if count:
                    axes.text(
                        j,
                        i,
                        str(count),
                        ha="center",
                        va="center",
                        color="white" if shares[i, j] > 0.5 else "black",
                        fontsize=8,
                    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


class Page:
    """An HTML page that needs no other file: add parts from top to bottom, then save."""

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(lead)}</p>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def picture(self, picture: Image.Image | bytes, caption: str) -> None:
        """A picture, or PNG bytes, with a caption that is also its alternative text."""
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            picture = buffer.getvalue()
        data, caption = base64.b64encode(picture).decode(), html.escape(caption)
        self._parts.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
        )

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        def line(tag: str, cells: Sequence[object]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

        body = "\n".join(line("td", row) for row in rows)
        self._parts.append(f"<table>\n<thead>{line('th', header)}</thead>\n<tbody>\n{body}\n</tbody></table>")

    def save(self, path: Path) -> None:
        style = (
            "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
            "img{max-width:100%;image-rendering:auto}figure{margin:1rem 0}figcaption{color:#555;font-size:.9rem}"
            "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.3rem .9rem;text-align:left}"
            "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}figcaption{color:#aaa}"
            "td,th{border-color:#444}}"
        )
        body = "\n".join(self._parts)
        page = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>{html.escape(self._title)}</title>\n'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">\n<style>{style}</style></head>\n'
            f"<body>\n{body}\n</body></html>\n"
        )
        write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
