"""What stands between a page's server and the network: its own requests pass, nothing else, and no path of this machine.

A library for web pages has more doors than a page needs (proxies, recordings, fetching of addresses, several ways of asking
for a file), and speaks of files by their paths. Here a request that the page does not make is refused before it gets there,
and the one folder that the page may use is called `FILES` to the outside, whatever it is called here.
"""

import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)
FILES = "/unveil-files"
MAX_WORDS = 6_000_000  # bytes of a request that is no upload: the largest is a drawn mask
_API = "/gradio_api"
_ASKED = re.compile(
    r"/|/(theme\.css|config|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static|svelte)/[^?]*"
    rf"|{_API}/(info|app_id|startup-events|upload_progress|queue/data|heartbeat/\w+|call/\w+/\w+|file={FILES}/.+)"
)
_TOLD = re.compile(rf"{_API}/(upload|queue/join|call/\w+|cancel|reset/?)")
_TEXTS = (b"text/html", b"text/plain", b"text/event-stream", b"application/json")


class _Refused(Exception):
    """status: of HTTP. The message is for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _hosts(host: str) -> set[str] | None:
    """Names by which a server bound to `host` may be called; None for any. Another was made by somebody to point here."""
    loopback = {"localhost", "127.0.0.1", "::1"}
    return loopback if host in loopback else None


def _split(address: str, refused: _Refused) -> SplitResult:
    """The parts of an address, or `refused`: with a bracket that nothing closes it has none."""
    try:
        return urlsplit(address)
    except ValueError:
        raise refused from None


class Veil:
    """An ASGI application in front of another.

    Args:
        folder: the only one whose files go in or out.
        host: that the server is bound to.
        max_upload: bytes of one upload.
        on_upload: called before each.
    """

    def __init__(self, app: App, folder: Path, host: str, max_upload: int, on_upload: Callable[[], None]) -> None:
        self.app, self.folder = app, folder
        self.hosts, self.max_upload, self.on_upload = _hosts(host), max_upload, on_upload
        real = str(folder)
        spellings = {real, quote(real), json.dumps(real)[1:-1], json.dumps(real, ensure_ascii=False)[1:-1]}
        self.spellings = sorted((s.encode() for s in spellings), key=len, reverse=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                scope, receive = await self._let_in(scope, receive)
            except _Refused as refused:
                await _answer(send, refused.status, str(refused))
            else:
                try:
                    await self.app(scope, receive, self._let_out(send))
                except Exception as error:  # it has been answered
                    _log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
        else:  # no page of ours opens a web socket
            await send({"type": "websocket.close", "code": 1008})

    async def _let_in(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        other_name = _Refused(400, "This page answers to the name localhost only.")
        if self.hosts is not None and _split(f"//{host}", other_name).hostname not in self.hosts:
            raise other_name
        origin = headers.get(b"origin", b"").decode("latin-1")
        other_page = _Refused(403, "Another page may not ask this one.")
        if origin and _split(origin, other_page).netloc != host:
            raise other_page
        path, method = scope["path"], scope["method"]
        allowed = {"GET": _ASKED, "HEAD": _ASKED, "POST": _TOLD}.get(method)
        if allowed is None or not allowed.fullmatch(path):
            raise _Refused(404, "There is no such page.")
        scope = dict(scope)
        # What is compressed cannot be read here, and between two programs of one machine nothing is gained by it.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() != b"accept-encoding"]
        before, begin, file = path.partition(f"{_API}/file=")
        if begin:
            scope["path"] = before + begin + str(self._inside(file))
            scope["raw_path"] = quote(scope["path"]).encode()
        if method != "POST":
            return scope, receive
        if path == f"{_API}/upload":
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                raise _Refused(411, "An upload must say how long it is.")
            if int(length) > self.max_upload:
                raise _Refused(413, f"An upload may have {self.max_upload:,} bytes.")
            self.on_upload()
            return scope, receive
        body = await _whole(receive)
        if body:
            body = self._ours(body)
            scope["headers"] = [(n, v) for n, v in scope["headers"] if n.lower() != b"content-length"]
            scope["headers"].append((b"content-length", str(len(body)).encode()))
        return scope, _again(body, receive)

    def _inside(self, name: str) -> Path:
        """The real path of what the outside calls FILES/..."""
        folder = self.folder.resolve()
        try:
            real = (folder / name.removeprefix(f"{FILES}/")).resolve()
            if not name.startswith(f"{FILES}/") or not real.is_relative_to(folder) or not real.is_file():
                raise _Refused(404, "There is no such file.")
        except (OSError, ValueError):  # names that are too long or hold a zero byte
            raise _Refused(404, "There is no such file.") from None
        return real

    def _ours(self, body: bytes) -> bytes:
        """A request's JSON with real paths, of uploaded files alone."""

        def walk(value: Any) -> Any:
            if isinstance(value, dict):
                if "path" in value and not (value["path"] is None or isinstance(value["path"], str)):
                    raise _Refused(400, "A file's path is not a text.")
                return {
                    name: str(self._inside(inner)) if name == "path" and inner else walk(inner)
                    for name, inner in value.items()
                }
            return [walk(inner) for inner in value] if isinstance(value, list) else value

        try:
            return json.dumps(walk(json.loads(body))).encode()
        except (ValueError, RecursionError):
            raise _Refused(400, "The request is no JSON that can be read.") from None

    def _let_out(self, send: Send) -> Send:
        """A `send` that tells nobody where the folder is."""
        begun: Message | None = None
        failed = False

        async def veiled(message: Message) -> None:
            nonlocal begun, failed
            if failed:
                return
            if message["type"] == "http.response.start":
                if message["status"] >= 500:  # what a library makes of a request that it did not foresee
                    failed = True
                    await _answer(send, 400, "The request cannot be understood.")
                    return
                kind = dict(message["headers"]).get(b"content-type", b"").split(b";")[0]
                if kind not in _TEXTS:
                    await send(message)
                else:
                    begun = message  # whose length is known with the body
                return
            if message["type"] != "http.response.body":
                await send(message)
                return
            if begun is not None:
                body = message.get("body", b"")
                for spelling in self.spellings:
                    body = body.replace(spelling, FILES.encode())
                message = {**message, "body": body}
                if "sent" not in begun:
                    headers = [(n, v) for n, v in begun["headers"] if n.lower() != b"content-length"]
                    if not message.get("more_body"):
                        headers.append((b"content-length", str(len(body)).encode()))
                    await send({**begun, "headers": headers})
                    begun["sent"] = True
            await send(message)

        return veiled


async def _answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _whole(receive: Receive) -> bytes:
    """A request's body, if it is of words."""
    parts, length, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > MAX_WORDS:
            raise _Refused(413, f"A request may have {MAX_WORDS} bytes.")
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, and then what comes."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving
