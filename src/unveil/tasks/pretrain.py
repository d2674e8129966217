"""Pre-training without labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unveil.pretraining import PretrainingOptions, pretraining_of
from unveil.train import Progress, train


@dataclass(frozen=True, kw_only=True)
class Pretrain(PretrainingOptions):
    """Train a masked auto-encoder on unlabelled pictures or clips, or go on with a run that was interrupted.

    Example: unveil pretrain --data photos/ --out runs/photos --size Micro/8 --image-size 64 --epochs 100
    """


def pretrain(options: Pretrain, on_progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Run `unveil pretrain`; see `Pretrain` for the options and `train` for what is returned, and with --init:

    Returns:
        "start", the recipe of the weights that it started from, and what became of them: see `unveil.start.carry_over`.
    """
    recipe, samples, run, initial, start = pretraining_of(options)
    return {**train(recipe, samples, run, on_progress, initial), **start}
