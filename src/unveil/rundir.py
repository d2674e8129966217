"""A run and its directory: how it is run, the names of its files, who may write in them, and whether it is the same run."""

import contextlib
import fcntl
import importlib
import json
import math
import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from unveil.checkpoint import write_atomically
from unveil.finetuning import Recognition
from unveil.recipe import recipe_from_dict, section_from_dict, to_dict

Precision = Literal["fp32", "bf16"]
CONFIG, METRICS, SHEET, PROBLEMS = (
    "config.json",
    "metrics.jsonl",
    "contact_sheet.png",
    "problems.jsonl",
)
OUTCOME = "outcome.json"
WANDB = "wandb-id.txt"


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a recipe is run here, beside what is trained. Data and seed make the result, with the kind of device, as a GPU draws
    noise of its own; precision and compile move its last digits.

    save_minutes: time between saves; one more is made at the end and when the run is interrupted.
    classes: the names of the classes, for a recipe that has them.
    start: the weights that it starts from, as given by the user; None for drawn ones.
    accumulate: pieces that a batch is computed in, one after another; the same gradient but for the last digits, and but for
        drop path and blending, which are drawn for each piece.
    gradient_checkpointing: work out in the backward pass what the blocks' forward pass would have kept.
    fsdp: leave to each process its shards of the weights and of all that goes with them, if there are several.
    keep: saves to go on from that are kept.
    wandb: a project at Weights & Biases to log to as well.
    """

    data: str
    out: Path
    seed: int = 0
    workers: int = 0
    device: str = "cpu"
    precision: Precision = "fp32"
    compile: bool = False
    save_minutes: float = 2.0
    command: str = ""
    classes: tuple[str, ...] = ()
    start: str | None = None
    accumulate: int = 1
    gradient_checkpointing: bool = False
    fsdp: bool = False
    keep: int = 2
    wandb: str | None = None


def _step_of(line: str) -> float:
    """The step of a record; past every step for a line that a killed process left incomplete."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Metrics:
    """Numbers of a run as JSON lines, as tensorboard scalars if that is installed, and in Weights & Biases if asked for.

    Records after `step`, of steps that were lost with a killed process and will be made again, are dropped.

    Args:
        wandb: the project's name there.
        config: what is told of the run there.

    Raises:
        ValueError: wandb is asked for and cannot be used.
    """

    def __init__(self, out: Path, step: int, wandb: str | None = None, config: dict[str, Any] | None = None) -> None:
        self._path = out / METRICS
        self._open(step)
        self._wandb = None if wandb is None else _join_wandb(wandb, out, config)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"))
        except Exception:  # a broken installation must not stop training either
            self._board = None

    def _open(self, step: int) -> None:
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            write_atomically(self._path, lambda part: part.write_text("".join(kept), encoding="utf-8"))
        self._file = self._path.open("a", encoding="utf-8")

    def go_back(self, step: int) -> None:
        """Drop the records after this step."""
        self._file.close()
        self._open(step)

    def write(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(record["step"]))
        if self._wandb is not None:
            self._wandb.log(record, step=int(record["step"]))

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _join_wandb(project: str, out: Path, config: dict[str, Any] | None) -> Any:
    """The run's page at Weights & Biases; a run that goes on has the same one."""
    try:
        wandb: Any = importlib.import_module("wandb")
    except Exception as error:
        raise ValueError(
            f"--wandb {project} needs the package wandb ({error}). Install it: pip install wandb."
        ) from None
    name = out / WANDB
    if not name.exists():
        write_atomically(name, lambda part: part.write_text(uuid.uuid4().hex))
    try:
        return wandb.init(
            project=project, name=out.name, id=name.read_text(), resume="allow", dir=str(out), config=config
        )
    except Exception as error:
        raise ValueError(
            f"--wandb {project}: {(str(error) or type(error).__name__).splitlines()[0]}. Log in with `wandb login`, or set "
            "WANDB_MODE=offline."
        ) from None


_locks: list[Any] = []


def _drop_locks() -> None:
    for file in _locks:
        file.close()
    _locks.clear()


# A forked data worker would share the lock and keep it for seconds after its parent was killed.
os.register_at_fork(after_in_child=_drop_locks)


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep a second process out of a run directory."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out} is in use by another run. Wait for it, or choose another directory.") from None
        _locks.append(file)
        for left in out.glob(".*.part"):  # of a process that was killed while it saved
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            _locks.remove(file)


@contextlib.contextmanager
def interruptible(tell: bool = True) -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C instead of dying of them, so that the step can end and be saved.

    Args:
        tell: whether to say so at once, since the save takes a while.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            # The second Ctrl-C is meant. Launchers send every signal twice: to the group, and by themselves.
            if number == signal.SIGINT and os.environ.get("WORLD_SIZE", "1") == "1":
                raise KeyboardInterrupt
            return
        received.append(number)
        if tell:  # by the system, as Python's own stream may be in the middle of a line
            os.write(2, b"\nunveil: stopping after this step, and saving; Ctrl-C again ends it without a save\n")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals do not arrive
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_same_run(out: Path, config: dict[str, Any]) -> None:
    """Refuse a directory that holds another run, and name the first difference."""
    path = out / CONFIG
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file, and a run needs a directory. Choose another name.")
    if not path.exists():
        strangers = [p.name for p in out.iterdir() if p.name != ".lock"]
        if strangers:
            raise ValueError(f"{out} is not empty ({strangers[0]!r}) and holds no run. Choose a new directory.")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Choose another directory.") from None

    with contextlib.suppress(KeyError, ValueError):  # fields that are newer than the run have their defaults
        before["recipe"] = to_dict(recipe_from_dict(before["recipe"]))
        if before.get("recognition"):
            before["recognition"] = to_dict(section_from_dict(Recognition, before["recognition"]))

    def differences(a: Any, b: Any, where: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in [*a, *(n for n in b if n not in a)]:
                yield from differences(a.get(name), b.get(name), f"{where}.{name}" if where else name)
        elif a != b:
            yield f"{where} was {a!r} and is now {b!r}"

    for part in ("recipe", "recognition", "test", "data", "seed", "num_samples", "start", "classes"):
        # through JSON, so that tuples compare as the lists they were written as
        for difference in differences(
            json.loads(json.dumps(before.get(part))), json.loads(json.dumps(config.get(part))), part
        ):
            raise ValueError(
                f"{out} holds another run: {difference}. Choose another directory; only a run of the same settings goes on, "
                "because its learning rate is planned for them."
            )
    if "digest" in before and before["digest"] != config.get("digest"):
        raise ValueError(
            f"{out} holds a run of other samples: files, their labels or what is held out have changed since. Choose another "
            "directory, or put the data back."
        )
    if "pieces" in before and before["pieces"] != config.get("pieces"):
        raise ValueError(
            f"{out} holds a run whose batches are cut into {before['pieces']} (processes x --accumulate), and now into "
            f"{config.get('pieces')}; that decides what is blended and which paths are dropped. Give as many, or choose "
            "another directory."
        )


def last_loss(out: Path) -> float | None:
    """The loss of the last record of a run that has one, as those of an evaluation have not; None before the first."""
    path = out / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((record["loss"] for line in reversed(lines) if "loss" in (record := json.loads(line))), None)
