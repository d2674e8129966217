"""Work that is spread over the processes of torchrun."""

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from unveil.checkpoint import pick_device

WAIT = datetime.timedelta(hours=2)  # for the slowest process; one that dies is noticed at once


class Spread:
    """Which of several processes this one is: those of torchrun, or one alone.

    Used as a context it joins them, and leaves at the end.
    """

    def __init__(self, backend: str = "gloo") -> None:
        """backend: "gloo", on GPUs too, where only finished things are exchanged; see `torch.distributed`."""
        self.backend = backend
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.world > 1 else 0

    def check(self, can_be_spread: bool) -> None:
        """Refuse several processes for work that each of them would do over again.

        Raises:
            ValueError: there are several.
        """
        if self.world > 1 and not can_be_spread:
            raise ValueError(
                f"torchrun started {self.world} processes, but only pretrain, finetune, finetune-generator and generate spread "
                "their work over them. Start this command without torchrun."
            )

    def device(self, asked: str | None) -> str:
        """The device that was asked for; if that is any GPU, this process's own."""
        if self.world > 1 and asked in (None, "cuda") and torch.cuda.is_available():
            asked = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return pick_device(asked)

    def __enter__(self) -> "Spread":
        if self.world > 1:
            dist.init_process_group(self.backend, timeout=WAIT)
            self.wait()  # nobody writes before everybody has looked at the directory
        return self

    def wait(self) -> None:
        """For all the others."""
        if self.world > 1:
            dist.barrier()

    def another(self) -> Any:
        """A second way for the same processes to talk, for a thread whose words must not mix with those of the first."""
        return dist.new_group(backend="gloo", timeout=WAIT) if self.world > 1 else None

    def is_alone(self, error: RuntimeError) -> bool:
        """Whether an error says that another process is gone."""
        if self.world == 1:
            return False
        return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)

    def sum(self, *numbers: int) -> list[int]:
        """The sums over all processes, made without the devices, which go on meanwhile."""
        if self.world == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(together)
        return together.tolist()

    def __exit__(self, *error: object) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def gather(self, mine: Any, problem: str | None) -> list[Any]:
        """What every process has made, by rank; if one of them had a problem, all raise it.

        Raises:
            ValueError: the problem of the first process that had one.
        """
        everyone: list[Any] = [(mine, problem)]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, (mine, problem))
        for _, theirs in everyone:
            if theirs is not None:
                raise ValueError(theirs)
        return [made for made, _ in everyone]
