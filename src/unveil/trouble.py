"""Steps whose loss or gradient is no number: they are skipped on the device, counted, and kept to be looked into."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from unveil.checkpoint import WEIGHTS, write_atomically
from unveil.data import Key, Samples, collate
from unveil.sharding import whole

PATIENCE = 3  # steps in a row that are skipped before a run goes back to its last save
MAX_RESTARTS = 3
MAX_BUNDLES = 3  # each holds the whole model
BUNDLES, BATCHES = "skipped", "batch-*.safetensors"  # a file of each process


@dataclass(frozen=True)
class Step:
    """A step and what names its draws.

    number: of steps before it. keys: of its readable samples, the epoch as it names draws.
    """

    number: int
    keys: list[Key]


def guard(optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor) -> Tensor:
    """Whether a step may be made, as a bool on the device; if not, the optimiser's next step changes nothing.

    The optimiser is told as mixed precision's scaler tells it, without a look from the host.

    Args:
        loss: of the batch. norm: of its gradient.
    """
    fine = loss.isfinite() & norm.isfinite()
    optimizer.found_inf = (~fine).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    return fine


def gradient_norm(model: nn.Module, limit: float | None) -> Tensor:
    """The norm of a model's gradient, which is cut to `limit` if there is one."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


class Health:
    """Losses since the last look, and which of their steps were skipped.

    in_a_row: the most steps in a row that were skipped, of those of the last look and the row that led up to them.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self._row = 0  # at the end of the last look
        self._steps: list[Step] = []
        self._values: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._steps)

    def note(self, step: Step, loss: Tensor, norm: Tensor, fine: Tensor) -> None:
        self._steps.append(step)
        self._values.append(torch.stack([loss.float(), norm.float(), fine.float()]))

    def look(self) -> tuple[float | None, float | None, list[Step]]:
        """Mean loss and mean norm of the steps that were made, None if none was; and the skipped ones. Waits for the device."""
        losses, norms, fine = torch.stack(self._values).cpu().double().unbind(1)
        made = fine.bool()
        skipped = [step for step, good in zip(self._steps, made.tolist(), strict=True) if not good]
        self.in_a_row = 0
        for good in made.tolist():
            self._row = 0 if good else self._row + 1
            self.in_a_row = max(self.in_a_row, self._row)
        self._steps, self._values = [], []
        if not made.any():
            return None, None, skipped
        return losses[made].mean().item(), norms[made].mean().item(), skipped


def bundle_name(step: Step) -> str:
    """Of a skipped step's folder."""
    return f"step-{step.number:09d}"


def write_bundle(
    out: Path,
    step: Step,
    rank: int,
    samples: Samples,
    save_model: Callable[[Path], None],
    facts: dict[str, Any],
) -> None:
    """Keep a skipped step in a folder of its own: its samples as they were read, and the model.

    Args:
        rank: of the process, of which each keeps its part of the batch, and the first the model.
        save_model: writes the weights, which the step left as they were, to a path.
        facts: the run's seed, precision and device, for a replay.
    """
    folder = out / BUNDLES / bundle_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        save_model(folder / WEIGHTS)
    batch = collate([samples[key] for key in step.keys])
    if batch.values is None:  # it could be read a second ago
        return
    tensors = {
        "clips": batch.clips(facts["device"]).cpu(),
        "labels": batch.labels,
        "indices": batch.indices,
        "places": batch.places,
    }
    metadata = {"facts": json.dumps({**facts, "step": step.number, "epoch": step.keys[0][0]})}
    name = f"batch-{rank}.safetensors"
    write_atomically(folder / name, lambda part: safetensors.torch.save_file(tensors, part, metadata))
