"""Reading from disks that may be away for a while, as those of a network are."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

WAITS = (0.1, 0.4, 1.0, 2.0)  # seconds before each further try

# What a disk or a network says of itself, and not of one file.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "ENODEV", "ENXIO", "EREMOTEIO", "ENOLINK", "ECOMM"),
        *("ENOTCONN", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EPIPE", "ESHUTDOWN"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
    )
    if hasattr(errno, name)  # not every system has all of them
)


def is_away(root: Path) -> bool:
    """Whether a folder cannot be listed or is empty, as it is while its disk is not mounted."""
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def system_error(error: BaseException) -> OSError | None:
    """What the system said, if that is what an error is or comes from; a decoder's own OSError has no number."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return cause if isinstance(cause, OSError) and cause.errno is not None else None


class Patience:
    """Tries to read again, after growing waits, where the disk and not the file seems to be at fault.

    Once it has waited in vain, later reads fail at once until one of them succeeds: otherwise each of a million samples
    would take seconds to be found missing.
    """

    def __init__(self) -> None:
        self._in_vain = False

    def read(self, once: Callable[[], T], root: Path) -> T:
        """What `once` returns, or its last error.

        Args:
            once: reads, from an opened file of its own, because one that was opened before may stay broken.
            root: the folder that holds everything.
        """
        waits = list(() if self._in_vain else WAITS)
        while True:
            try:
                value = once()
            except (OSError, ValueError) as error:
                system = system_error(error)
                if system is None or not (system.errno in _PASSING or is_away(root)):
                    raise
                if not waits:
                    self._in_vain = True
                    raise
            else:
                self._in_vain = False
                return value
            time.sleep(waits.pop(0))
