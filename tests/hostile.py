"""Requests that nobody who means well makes of the web page; imported by its tests, itself without one."""

import io
import json
import os
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


def decode(data: bytes, name: str, max_pixels: int) -> None:
    """A decoder with a fault."""
    os._exit(1) if data == b"die" else time.sleep(60)


FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF", "ppm": "PPM"}


@dataclass(frozen=True)
class Upload:
    """A file, and what is asked of it. asked: in place of what a repainting is usually asked."""

    what: str
    data: bytes
    name: str = "picture.png"
    kind: str = "image/png"
    asked: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """Something else than an upload."""

    what: str
    path: str
    method: str = "GET"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def encoded(kind: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"", rows: int | None = None) -> bytes:
    """A PNG of so many black pixels, which says so even if its data have fewer rows."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(width + 1)
    data = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def bombs() -> Iterator[Upload]:
    yield Upload("a small file of 400 megapixels", png(20_000, 20_000, rows=2000))
    yield Upload("a header of 10 gigapixels", png(100_000, 100_000, rows=0))
    yield Upload("a header of no pixels", png(0, 5, rows=0))
    text = zlib.compress(bytes(100_000_000), 9)
    yield Upload("a comment that unfolds to 100 MB", png(20, 20, _chunk(b"zTXt", b"a\0\0" + text)))
    yield Upload("a colour profile that unfolds to 100 MB", png(20, 20, _chunk(b"iCCP", b"a\0\0" + text)))
    yield Upload("a GIF of 65535 pixels", encoded("GIF")[:6] + b"\xff" * 4 + encoded("GIF")[10:], "a.gif", "image/gif")
    bmp = bytearray(encoded("BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    yield Upload("a BMP of 60000 pixels", bytes(bmp), "a.bmp", "image/bmp")
    bmp[18:26] = struct.pack("<ii", -1, -(2**31))
    yield Upload("a BMP of negative pixels", bytes(bmp), "a.bmp", "image/bmp")
    yield Upload("a PPM of 10^12 pixels", b"P6 1000000 1000000 255\n" + bytes(100), "a.ppm")
    jpeg = encoded("JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    yield Upload("a JPEG of 65500 pixels", jpeg[:at] + struct.pack(">HH", 65500, 65500) + jpeg[at + 4 :], "a.jpg")
    yield Upload(
        "an array of 10^12", _npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }"), "a.npy"
    )
    yield Upload(
        "an array cut off", _npy("{'descr': '|u1', 'fortran_order': False, 'shape': (900, 900, 3), }"), "a.npy"
    )
    yield Upload(
        "an array of objects", _npy("{'descr': '|O', 'fortran_order': False, 'shape': (4, 4), }", b"cos\nsystem\n")
    )
    yield Upload(
        "an array of negative shape", _npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 4), }"), "a.npy"
    )
    yield Upload("an array whose header is code", _npy("__import__('os').system('true')"), "a.npy")
    yield Upload("two gigabytes of nothing, said", b"RIFF\xff\xff\xff\x7fWEBPVP8X" + bytes(20), "a.webp", "image/webp")


def wrong() -> Iterator[Upload]:
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    entities = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c SYSTEM "file:///etc/passwd">]><svg>&b;&c;</svg>'
    for what, data, name, kind in (
        ("nothing", b"", "a.png", "image/png"),
        ("one byte", b"\x89", "a.png", "image/png"),
        ("zeros", bytes(5000), "a.png", "image/png"),
        ("noise", random.Random(0).randbytes(5000), "a.jpg", "image/jpeg"),
        ("a page", b"<html><script>alert(1)</script></html>", "a.png", "text/html"),
        ("a drawing with a script", svg.encode(), "a.svg", "image/svg+xml"),
        ("a drawing that asks for files", entities.encode(), "a.svg", "image/svg+xml"),
        (
            "PostScript",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) run\n",
            "a.eps",
            "application/postscript",
        ),
        ("a program", b"\x7fELF\x02\x01\x01" + bytes(200), "a.png", "application/octet-stream"),
        ("a shell script", b"#!/bin/sh\nrm -rf /\n", "a.png", "text/x-sh"),
        ("a PDF", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "a.pdf", "application/pdf"),
        ("a pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR.", "a.npy", "application/octet-stream"),
        ("an archive", b"PK\x03\x04" + bytes(100), "a.png", "application/zip"),
        ("a video", b"\0\0\0\x18ftypmp42" + bytes(100), "a.mp4", "video/mp4"),
        ("JSON", b'{"path": "/etc/passwd"}', "a.json", "application/json"),
        ("a path", b"/etc/passwd", "a.png", "image/png"),
    ):
        yield Upload(what, data, name, kind)


def damaged() -> Iterator[Upload]:
    for ending, kind in FORMATS.items():
        whole = encoded(kind)
        for share in (0.2, 0.6, 0.95):
            yield Upload(f"{share:.0%} of a {kind}", whole[: int(share * len(whole))], f"a.{ending}")
        for one_in in (20, 200):
            broken = bytearray(whole)
            for place in random.Random(1).sample(range(8, len(broken)), len(broken) // one_in):
                broken[place] ^= 0xA5
            yield Upload(f"a {kind} with one in {one_in} bytes wrong", bytes(broken), f"a.{ending}")


def names() -> Iterator[Upload]:
    whole = encoded()
    for name in (
        "../../../../etc/passwd",
        "..\\..\\windows\\system.ini",
        "/etc/passwd",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "a" * 5000 + ".png",
        "..",
        " ",
        ".htaccess",
        "~root",
        "$(touch x).png",
        "<script>alert(1)</script>.png",
        "a\u202egnp.exe",
        "\N{PILE OF POO}\u0301.png",
        "x.png/../../y.png",
        "'; drop table a; --.png",
        "a\tb\x7f.png",
    ):
        yield Upload(f"a file called {name[:30]!r}", whole, name)


def words() -> Iterator[Upload]:
    """Of a repainting's words; the places are those of tests/test_web.py."""
    whole = encoded()
    drawn = "data:image/png;base64,"
    for what, asked in (
        ("no such model", {0: "../../etc/passwd"}),
        ("a model that is a list", {0: ["a"]}),
        ("no such mask", {2: "all of it"}),
        ("a drawn mask of nothing", {2: "Draw it", 3: ""}),
        ("a drawn mask that is a path", {2: "Draw it", 3: "/etc/passwd"}),
        ("a drawn mask that is no base64", {2: "Draw it", 3: drawn + "!!!"}),
        ("a drawn mask that is no picture", {2: "Draw it", 3: drawn + "AAAA"}),
        ("a drawn mask that is a number", {2: "Draw it", 3: 7}),
        ("a share of nan", {5: "NaN"}),
        ("a share of 5", {5: 5}),
        ("ten million steps", {6: 10_000_000}),
        ("steps that are text", {6: "; ls"}),
        ("a million samples", {7: 1_000_000}),
        ("minus one sample", {7: -1}),
        ("a seed of 10^400", {8: 10**400}),
        ("a seed that is a dict", {8: {"a": 1}}),
        ("too few words", {-1: None}),
    ):
        yield Upload(what, whole, asked=asked)


def requests(files: str) -> Iterator[Request]:
    """files: what the page calls its folder."""
    for path in (
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={files}/../../../etc/passwd",
        f"/gradio_api/file={files}/%2e%2e/%2e%2e/etc/passwd",
        f"/gradio_api/file={files}/..%5c..%5cetc%5cpasswd",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file=/proc/self/environ",
        f"/gradio_api/file={files}/" + "a" * 3000,
        f"/gradio_api/file={files}/%00",
        "/assets/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/routes.py",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/heartbeat/../../x",
        "/monitoring",
        "/docs",
        "/openapi.json",
    ):
        yield Request(f"GET {path[:60]}", path)
    for path in ("/etc/passwd", "../../etc/passwd", f"{files}/../x", "http://127.0.0.1:1/a.png", "file:///etc/passwd"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        yield Request(
            f"a picture at {path}", "/gradio_api/call/repaint", "POST", json.dumps({"data": ["", file]}).encode()
        )
    for what, body in (
        ("no JSON", b"\xff{"),
        ("deep JSON", b'{"data": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        ("data that are no list", b'{"data": 7}'),
        ("nothing", b""),
    ):
        yield Request(what, "/gradio_api/call/repaint", "POST", body)
    yield Request("an unknown name", "/gradio_api/call/exec", "POST", b'{"data": []}')
    yield Request(
        "an unknown event", "/gradio_api/queue/join", "POST", b'{"data": [], "fn_index": 999, "session_hash": "a"}'
    )
    yield Request("a component", "/gradio_api/component_server", "POST", b"{}")
    yield Request("another name", "/", headers={"Host": "evil.example"})
    yield Request("another page", "/gradio_api/call/repaint", "POST", b"{}", {"Origin": "http://evil.example"})
    for host in ("[", "[::1", "]", "[]", "[x]", "localhost:port"):
        yield Request(f"the name {host!r}", "/", headers={"Host": host})
    for origin in ("http://[", "http://[::1", "//]", "http://[x]/", "http://a@b"):
        yield Request(f"a page at {origin!r}", "/gradio_api/call/repaint", "POST", b"{}", {"Origin": origin})
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    yield Request("no multipart", "/gradio_api/upload", "POST", b"x", {"Content-Type": "text/plain"})
    yield Request("a broken multipart", "/gradio_api/upload", "POST", b"--x", multipart)
    yield Request("a multipart without", "/gradio_api/upload", "POST", b"x", {"Content-Type": "multipart/form-data"})
    yield Request("too much", "/gradio_api/upload", "POST", bytes(4_000_000), multipart)


UPLOADS: list[Callable[[], Iterator[Upload]]] = [bombs, wrong, damaged, names, words]
