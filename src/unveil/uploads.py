"""Pictures from strangers: checked before they are decoded, and decoded in a process that may die of them.

What a picture costs is decided by its file, not by its size: a few kilobytes can unfold to gigabytes, and decoders have been
crashed by less. So the header is read first, and all reading is done by another process with little time and memory; if a
file ends it, another is forked in no time, of a third process that does nothing else. What it costs is a copy of the pixels
through a pipe.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import io
import multiprocessing
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unveil.decoding import NPY, BadPicture, header_of, open_image, telling
from unveil.originals import Original, read_hole, read_original
from unveil.painting import resize_hole

MEMORY = 2 * 2**30  # bytes beyond what the process has when it starts
FILES_READ = 500  # before a new process takes over, so that what a decoder forgets to free is freed


def _limit(max_pixels: int) -> None:
    """In the process that reads. Where the system has no limit of memory, that of pixels is the only one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, to all in its group; the server ends this one
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    except (ImportError, OSError, ValueError):
        return


def _check(data: bytes, name: str, max_pixels: int) -> None:
    """Refuse by the header alone: nothing is decoded."""
    try:
        if data.startswith(NPY):
            header = header_of(io.BytesIO(data), name)
            height, width, stored = header.height, header.width, header.height * header.width * header.bits // 8
        else:
            with telling(name):
                width, height = open_image(io.BytesIO(data))[0].size
            stored = 0  # who knows
    except BadPicture as bad:
        if isinstance(bad.__cause__, _BOMBS):
            raise _too_large(name, max_pixels) from None
        raise ValueError(
            f"{name} is no picture that can be read. Give a PNG, JPEG, WebP, TIFF, GIF or BMP file, or an array as .npy."
        ) from None
    if min(height, width) < 1:
        raise ValueError(f"{name} has no pixels. Give another.")
    if height * width > max_pixels:
        raise _too_large(name, max_pixels, f"{width:,} x {height:,} pixels")
    if len(data) < stored:
        raise ValueError(f"{name} is cut off: its file is shorter than it says.")


_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def _too_large(name: str, max_pixels: int, size: str = "too many pixels") -> ValueError:
    return ValueError(
        f"{name} has {size}: here up to {max_pixels / 1e6:g} million are taken. Make it smaller, or use `unveil inpaint`."
    )


def _reason(name: str, bad: BadPicture, max_pixels: int) -> ValueError:
    """A sentence of ours; what a library says of its own errors may hold anything."""
    if bad.__cause__ is None:
        return ValueError(f"{name}: {bad.reason}.")
    if isinstance(bad.__cause__, _BOMBS):
        return _too_large(name, max_pixels)
    return ValueError(f"{name} cannot be decoded: its file is damaged or cut off. Save it anew and try again.")


def _read_picture(data: bytes, name: str, max_pixels: int) -> Original:
    _check(data, name, max_pixels)
    try:
        original = read_original(data, name)
    except BadPicture as bad:
        raise _reason(name, bad, max_pixels) from None
    if original.pixels.size > 4 * max_pixels:
        raise ValueError(
            f"{name} unfolds to {original.pixels.size:,} values, more than are taken here. Make it smaller."
        )
    return original


def _read_mask(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    _check(data, name, max_pixels)
    try:
        return read_hole(data, name, name)
    except BadPicture as bad:
        raise _reason(name, bad, max_pixels) from None


def _processes() -> Any:
    """How processes are started: not by a fork of the server, whose threads may hold locks, but by one of a process without.

    That one has imported what its children need: this module, and the tasks, as each of them imports the command line again.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(name for name in sys.modules if name.startswith("unveil.tasks."))])
    return context


class Reader:
    """Reads files that nobody vouches for, one at a time.

    Args:
        max_bytes: of a file.
        max_pixels: of a picture.
        max_seconds: for one file.
    """

    def __init__(self, max_bytes: int, max_pixels: int, max_seconds: float = 20.0) -> None:
        self.max_bytes, self.max_pixels, self.max_seconds = max_bytes, max_pixels, max_seconds
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._num_read = 0

    def picture(self, data: bytes | Path, name: str = "The picture") -> Original:
        """A picture from its file, or that file's bytes.

        Raises:
            ValueError: it is too large, damaged, or none; a sentence for the one who sent it.
        """
        return self._run(_read_picture, data, name)

    def hole(self, data: bytes | Path, name: str = "The mask") -> Tensor:
        """A mask picture as (H, W) bool, as `unveil.originals.hole_of`; raises as `picture`."""
        return torch.from_numpy(self._run(_read_mask, data, name))

    def _run(self, function: Any, data: bytes | Path, name: str) -> Any:
        if isinstance(data, Path):
            if data.stat().st_size > self.max_bytes:
                raise ValueError(self._too_long(name))
            data = data.read_bytes()
        if len(data) > self.max_bytes:
            raise ValueError(self._too_long(name))
        if not data:
            raise ValueError(f"{name} is an empty file. Give another.")
        with self._lock:
            if self._num_read >= FILES_READ:
                self._stop()
            self._num_read += 1
            try:
                self._started().submit(int).result()  # its start is not the file's time
                return self._started().submit(function, data, name, self.max_pixels).result(self.max_seconds)
            except TimeoutError:
                self._stop()
                raise ValueError(f"{name} takes more than {self.max_seconds:g} s to read. Save it anew.") from None
            except (concurrent.futures.process.BrokenProcessPool, MemoryError, OSError, EOFError):
                self._stop()
                raise ValueError(f"{name} needs more memory to read than a picture may. Save it anew.") from None

    def _too_long(self, name: str) -> str:
        return f"{name} has more than {self.max_bytes / 1e6:g} MB, which is what is taken here. Make it smaller."

    def _started(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(1, _processes(), _limit, (self.max_pixels,))
            self._pool.submit(int)
        return self._pool

    def start(self) -> None:
        """Start the process, so that the first file need not wait for it."""
        with self._lock, contextlib.suppress(Exception):  # the end may come first; and the first file tries again
            self._started()

    def _stop(self) -> None:
        pool, self._pool, self._num_read = self._pool, None, 0
        if pool is not None:
            for process in list((pool._processes or {}).values()):  # it has no public way to end what is stuck
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._stop()


def hole_for(drawn: Tensor, height: int, width: int) -> Tensor:
    """A hole (h, w) that was drawn on a picture shown smaller, for that picture: (height, width) bool."""
    return resize_hole(drawn[None], height, width)[0]


class Store:
    """The one folder of a page, of its own, and what is thrown away of it.

    Args:
        max_age: seconds for which a file is kept.
        max_bytes: of all files; the oldest go first.
    """

    def __init__(self, max_age: float = 1800.0, max_bytes: float = 2e9) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="unveil-web-")).resolve()
        self.max_age, self.max_bytes = max_age, max_bytes
        self._lock = threading.Lock()

    @property
    def kept(self) -> Path:
        """What lies here is not thrown away before the end."""
        return self.folder / "kept"

    def new(self) -> Path:
        """A folder for what comes out of one request, whose name nobody guesses."""
        folder = self.folder / "made" / secrets.token_hex(16)
        folder.mkdir(parents=True)
        return folder

    def sweep(self) -> None:
        """Throw away what is too old or too much."""
        with self._lock:
            files = []
            for path in self.folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # a file of an upload is renamed when it is whole
                    if path.is_file() and not path.is_relative_to(self.kept):
                        files.append((path, path.stat()))
            files.sort(key=lambda file: file[1].st_mtime)
            total, now = sum(stat.st_size for _, stat in files), time.time()
            for path, stat in files:
                if now - stat.st_mtime <= self.max_age and total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size
                with contextlib.suppress(OSError):  # another request's file is in it
                    path.parent.rmdir()

    def close(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder, ignore_errors=True)
