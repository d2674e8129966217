"""What a page's server lets in and out: its own requests, and no path of this machine."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unveil.veil import FILES, MAX_WORDS, Veil

HOST = [(b"host", b"127.0.0.1:7860")]


def ask(
    folder: Path,
    path: str,
    method: str = "GET",
    body: bytes = b"",
    headers: list[tuple[bytes, bytes]] = HOST,
    answer: tuple[bytes, list[bytes]] = (b"application/json", [b"{}"]),
    host: str = "127.0.0.1",
    on_upload: Callable[[], None] = lambda: None,
    status: int = 200,
) -> tuple[int, bytes, dict[str, Any]]:
    """The status, the body, and what the application behind was asked, if it was."""
    asked: dict[str, Any] = {}
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.update(path=scope["path"], headers=dict(scope["headers"]), body=(await receive()).get("body"))
        kind, parts = answer
        length = str(sum(map(len, parts))).encode()
        head = [(b"content-type", kind), (b"content-length", length)]
        await send({"type": "http.response.start", "status": status, "headers": head})
        for i, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": i + 1 < len(parts)})
        if status == 500:
            raise KeyError("secret")

    halves = [body[: len(body) // 2], body[len(body) // 2 :]]

    async def receive() -> Any:
        return {"type": "http.request", "body": halves.pop(0), "more_body": bool(halves)}

    async def send(message: Any) -> None:
        sent.append(message)

    if not body:
        halves = [b""]
    scope = {"type": "http", "path": path, "method": method, "headers": headers, "query_string": b""}
    asyncio.run(Veil(app, folder, host, 1000, on_upload)(scope, receive, send))
    whole = b"".join(message.get("body", b"") for message in sent[1:])
    length = dict(sent[0]["headers"]).get(b"content-length")
    assert length is None or int(length) == len(whole)
    return sent[0]["status"], whole, asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "picture.png").write_bytes(b"picture")
    (tmp_path / "outside.png").write_bytes(b"secret")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "outside.png")
    return tmp_path / "in"


@pytest.mark.parametrize(
    "path", ["/", "/config", "/assets/index.js", "/gradio_api/info", "/gradio_api/call/repaint/1a"]
)
def test_what_the_page_asks_for_passes(folder: Path, path: str) -> None:
    status, _, asked = ask(folder, path)
    assert (status, asked["path"]) == (200, path)


@pytest.mark.parametrize(
    "path, method",
    [
        ("/gradio_api/proxy=http://x.hf.space/", "GET"),
        ("/gradio_api/file=http://169.254.169.254/latest", "GET"),
        ("/gradio_api/file=/etc/passwd", "GET"),
        (f"/gradio_api/file={FILES}/../outside.png", "GET"),
        (f"/gradio_api/file={FILES}/link.png", "GET"),
        (f"/gradio_api/file={FILES}/nothing.png", "GET"),
        (f"/gradio_api/file={FILES}/a", "GET"),
        (f"/gradio_api/file={FILES}/a\0.png", "GET"),
        (f"/gradio_api/file={FILES}/{'a' * 5000}", "GET"),
        ("/gradio_api/file/etc/passwd", "GET"),
        ("/gradio_api/component_server", "POST"),
        ("/gradio_api/process_recording", "POST"),
        ("/gradio_api/run/repaint", "POST"),
        ("/gradio_api/vibe-edit", "POST"),
        ("/monitoring", "GET"),
        ("/login", "POST"),
        ("/", "POST"),
        ("/", "DELETE"),
    ],
)
def test_what_the_page_does_not_ask_for_is_refused(folder: Path, path: str, method: str) -> None:
    status, body, asked = ask(folder, path, method)
    assert (status, asked) == (404, {})
    assert b"There is no such" in body


def test_the_folder_has_another_name_outside(folder: Path) -> None:
    status, _, asked = ask(folder, f"/gradio_api/file={FILES}/a/picture.png")
    assert (status, asked["path"]) == (200, f"/gradio_api/file={folder}/a/picture.png")
    for kind in (b"application/json", b"text/event-stream; charset=utf-8", b"text/html"):
        parts = [f'{{"path": "{folder}/a/picture.png"}}'.encode(), f"data: {folder}".encode()]
        _, body, _ = ask(folder, "/config", answer=(kind, parts))
        assert body == f'{{"path": "{FILES}/a/picture.png"}}data: {FILES}'.encode()
    picture = str(folder).encode()  # whose bytes are nobody's business
    assert ask(folder, "/config", answer=(b"image/png", [picture]))[1] == picture


def test_a_request_speaks_of_uploaded_files_alone(folder: Path) -> None:
    def told(value: Any) -> tuple[int, Any]:
        status, _, asked = ask(folder, "/gradio_api/queue/join", "POST", json.dumps({"data": [value]}).encode())
        return status, json.loads(asked["body"])["data"][0] if asked else None

    file = {"path": f"{FILES}/a/picture.png", "meta": {"_type": "gradio.FileData"}}
    assert told(file) == (200, {**file, "path": f"{folder}/a/picture.png"})
    assert told([1.5, None, "text", {"path": None}]) == (200, [1.5, None, "text", {"path": None}])
    for path in (
        "/etc/passwd",
        f"{folder}/a/picture.png",
        f"{FILES}/../outside.png",
        "http://x/y.png",
        "a/picture.png",
    ):
        assert told({"deep": [{"path": path}]})[0] == 404, path
    assert told({"path": ["/etc/passwd"]})[0] == 400


def test_a_request_must_be_readable_and_short(folder: Path) -> None:
    for body in (b"{", b"\xff\xfe", b"[" * 100_000):
        assert ask(folder, "/gradio_api/queue/join", "POST", body)[0] == 400
    assert ask(folder, "/gradio_api/queue/join", "POST", b" " * (MAX_WORDS + 1))[0] == 413
    calls: list[int] = []
    for length, status in ((b"1000", 200), (b"1001", 413), (b"many", 411)):
        headers = [*HOST, (b"content-length", length)]
        found = ask(folder, "/gradio_api/upload", "POST", b"x", headers, on_upload=lambda: calls.append(1))
        assert found[0] == status
    assert calls == [1]


def test_other_pages_and_names_are_refused(folder: Path) -> None:
    for name in (b"localhost", b"localhost:7860", b"[::1]:7860", b"127.0.0.1"):
        assert ask(folder, "/", headers=[(b"host", name)])[0] == 200
    for name in (b"evil.example", b"127.0.0.1.evil.example", b"", b"[", b"[::1", b"[x]", b"\xbd]"):
        assert ask(folder, "/", headers=[(b"host", name)])[0] == 400
    assert ask(folder, "/", headers=[(b"host", b"my.machine")], host="0.0.0.0")[0] == 200
    assert ask(folder, "/", headers=[*HOST, (b"origin", b"http://127.0.0.1:7860")])[0] == 200
    for origin in (b"http://evil.example", b"null", b"http://127.0.0.1:9999", b"http://[", b"http://[::1", b"//]"):
        assert ask(folder, "/", headers=[*HOST, (b"origin", origin)])[0] == 403
    assert b"accept-encoding" not in ask(folder, "/", headers=[*HOST, (b"accept-encoding", b"br")])[2]["headers"]


def test_what_fails_is_told_to_the_log_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    status, body, _ = ask(folder, "/config", status=500, answer=(b"text/plain", [b"secret", b"secret"]))
    assert (status, json.loads(body)) == (400, {"detail": "The request cannot be understood."})
    assert "KeyError: 'secret'" in caplog.text
