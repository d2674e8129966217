"""What the comparisons of this folder share: results that several processes add to, and the time that a training took."""

import fcntl
import json
import resource
from pathlib import Path
from typing import Any

import torch

from unveil.checkpoint import write_atomically


class Results:
    """results.json, written after every part, so that a finished part is never made twice.

    Read again before it is written, under a lock, as another process may have added to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def part(self, *names: str, make: Any) -> Any:
        """The part of that name, made now if it is not there."""

        def section_of(values: dict[str, Any]) -> dict[str, Any]:
            for name in names[:-1]:
                values = values.setdefault(name, {})
            return values

        section = section_of(self.read())
        if names[-1] in section:
            return section[names[-1]]
        print("...", " ".join(names), flush=True)
        made = make()
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            values = self.read()
            section_of(values)[names[-1]] = made
            write_atomically(self.path, lambda part: part.write_text(json.dumps(values, indent=2) + "\n"))
        print(" ".join(names), json.dumps(made), flush=True)
        return made


def timed(run: Any) -> dict[str, Any]:
    """What a training returns, with its seconds by the clock and of the processor; None of these where it went on from an
    earlier start, whose seconds are not known."""
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    result = run()
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds = now.ru_utime + now.ru_stime - cpu.ru_utime - cpu.ru_stime
    if not result["finished"]:  # by Ctrl-C, and saved; the same command goes on
        raise SystemExit(130)
    kept = {name: result[name] for name in ("steps_now", "images_seen", "loss")}
    spent = {"seconds": result["seconds"], "cpu_seconds": seconds}
    if result["resumed"]:
        spent = dict.fromkeys(spent)
    return {**kept, **spent, "threads": torch.get_num_threads()}
