"""What a run goes on from: directories that torch.distributed.checkpoint writes, sealed with checksums, the last few kept.

A save is written beside the others under a hidden name, in the background, and takes its name when all of it is on the
disk. So whatever happens while it is written, the one before it is whole.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from unveil.spread import Spread

# That there is one process is meant. For good, as the words come from a thread, for which no block of code can be quiet.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

SAVES = "checkpoints"
NAME = re.compile(r"step-(\d{9,})(?:-restart-(\d+))?")
FACTS, SEAL, METADATA = "run.json", "files.json", ".metadata"  # the last is DCP's


class Saves:
    """The saves of a run directory, by name: "step-000000120", or "step-000000120-restart-1" after the run went back once.

    Args:
        keep: so many are kept, the newest ones.
        spread: the processes that write together, each its shards of the tensors; None for one that writes alone.
    """

    def __init__(self, out: Path, keep: int = 2, spread: Spread | None = None) -> None:
        self.folder, self.keep = out / SAVES, keep
        self.spread = spread
        self.first = spread is None or spread.rank == 0  # which does what is done once
        self._group = None if spread is None else spread.another()
        self.damaged: list[str] = []  # what `newest` passed over, and why
        self._aside: list[str] = []
        self._finisher = ThreadPoolExecutor(1, "save")
        self._pending: Future[None] | None = None

    def names(self) -> list[str]:
        """Of those that are whole as far as their names tell, the oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(
            (path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()), key=_order
        )

    def clear(self) -> None:
        """Remove what a killed process left half written."""
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)

    def write(
        self, step: int, restarts: int, state: dict[str, Any], facts: dict[str, Any], then: Callable[[], None]
    ) -> None:
        """Begin to save; what is in `state` may be changed as soon as this returns. Processes that write together all call it.

        Args:
            state: tensors by name, nested; any number of processes can read them, each its part.
            facts: all else, as JSON holds it.
            then: called in the background once the save has its name.

        Raises:
            OSError: the save before this one could not be written.
        """
        self.wait()
        name = f"step-{step:09d}" + (f"-restart-{restarts}" if restarts else "")
        part = self.folder / f".{name}.part"
        there = name in self.names()  # the same step of the same run is the same state
        if self.first and not there:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        if self.spread is not None:  # not before the first has made room
            there = self.spread.gather(there, None)[0]
        if there:
            if self.first:
                then()
            return
        written = async_save(state, checkpoint_id=part, process_group=self._group, no_dist=self.spread is None)
        assert isinstance(written, Future)
        self._pending = self._finisher.submit(self._finish, written, part, name, facts, then)

    def _finish(
        self, written: "Future[Any]", part: Path, name: str, facts: dict[str, Any], then: Callable[[], None]
    ) -> None:
        try:
            written.result()  # of all processes, as the first writes the metadata when the others have told it theirs
            if not self.first:
                return
            (part / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            seal = {
                path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(part.iterdir())
            }
            (part / SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")
            for path in (*part.iterdir(), part):
                _to_disk(path)
            os.rename(part, self.folder / name)
            _to_disk(self.folder)
        except (Exception, CheckpointException) as error:
            if self.first:
                shutil.rmtree(part, ignore_errors=True)
            left = (
                "The save before it is whole: make room, and the same command goes on from there."
                if self.names()
                else "There is none before it: make room, and begin anew."
            )
            raise OSError(
                f"{self.folder / name} could not be written ({_first_line(error)}). Is the disk full? {left}"
            ) from None
        for old in self.names()[: -self.keep]:
            shutil.rmtree(self.folder / old, ignore_errors=True)
        then()

    def wait(self) -> None:
        """Until the save that was begun is written, if there is one.

        Raises:
            OSError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the background work; what was begun is finished, and its failure told by `wait` alone."""
        self._finisher.shutdown(wait=True)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest save whose files are as they were written, and its facts; None if the run has none.

        Others that are newer are named in `damaged`.

        Raises:
            ValueError: there are saves, and none is whole.
        """
        self._aside = []
        for name in reversed(self.names()):
            problem = check(self.folder / name)
            if problem is None:
                return self.folder / name, json.loads((self.folder / name / FACTS).read_text(encoding="utf-8"))
            self._aside.append(name)
            self.damaged.append(f"{name}: {problem}")
        if self._aside:
            raise ValueError(
                f"{self.folder} holds no save that is whole ({'; '.join(self.damaged)}). Restore it from a copy, or remove the "
                "run's directory to start over."
            )
        return None

    def put_aside(self) -> None:
        """Give what `newest` passed over another name, so that it stands in nobody's way and is not counted among the last."""
        for name in self._aside:
            with contextlib.suppress(OSError):
                os.rename(self.folder / name, self.folder / f"damaged-{name}")
        self._aside = []

    def read(self, path: Path, state: dict[str, Any]) -> None:
        """Fill the tensors of `state`, in place, from a save that `newest` found.

        Raises:
            ValueError: it holds other tensors.
        """
        try:
            load(state, checkpoint_id=path, no_dist=True)
        except (Exception, CheckpointException) as error:  # whatever a foreign file leads to
            raise ValueError(
                f"{path} cannot be read ({_first_line(error)}): it is of another run or version. Remove it to start over."
            ) from None


def check(save: Path) -> str | None:
    """What is wrong with a save's files; None if they are as they were written."""
    try:
        seal = json.loads((save / SEAL).read_text(encoding="utf-8"))
        missing = [name for name in (FACTS, METADATA) if name not in seal]
        if missing:
            return f"{SEAL} does not list {missing[0]}"
        for name, wanted in seal.items():
            size = (save / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} of {wanted['bytes']} bytes"
            if _sha256(save / name) != wanted["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        return f"{SEAL} or what it lists cannot be read ({_first_line(error)})"
    return None


def _order(name: str) -> tuple[int, int]:
    found = NAME.fullmatch(name)
    assert found is not None
    return int(found[2] or 0), int(found[1])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    """Of what it says; of DCP's, which is no Exception, of what it wraps."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
