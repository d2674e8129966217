"""How an encoder is fine-tuned for recognition, as frozen plain values, and the published presets.

MAE       He et al. 2022, arXiv 2111.06377, and its FINETUNE.md
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from unveil.config import Training, check_choice

Task = Literal["single", "multi", "regression"]
Pool = Literal["mean", "class"]


@dataclass(frozen=True, kw_only=True)
class FineTuning(Training):
    """The numbers of fine-tuning, beside those of any training.

    min_lr: where the cosine ends.
    layer_decay: a block's learning rate is that of the block above it times this; 1 for the same everywhere.
    drop_path: probability that a clip skips a residual branch, in the last block; it grows from 0 in the first.
    mixup, cutmix: parameter of the Beta distribution that blends two clips, or puts a part of one into another; 0 for
        never. With both, each batch gets one of them, by a coin.
    label_smoothing: share of the probability that is spread over all classes.
    randaugment_ops, randaugment_magnitude: how many changes of colour and shape a clip may get, each by a coin, and how
        strong, 0 to 10.
    erase: probability that a random rectangle of the clip becomes noise.
    """

    min_lr: float = 0.0
    layer_decay: float = 1.0
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    erase: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("drop_path", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Fine-tuning has {name}={getattr(self, name)}; it must be at least 0 and below 1.")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"Fine-tuning has erase={self.erase}; it is a probability, from 0 to 1.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"Fine-tuning has layer_decay={self.layer_decay}; it must be above 0 and at most 1.")
        for name in ("mixup", "cutmix", "min_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Fine-tuning has {name}={getattr(self, name)}; it must be a number, at least 0.")
        if not (0 <= self.randaugment_ops <= 14 and 0 <= self.randaugment_magnitude <= 10):
            raise ValueError(
                f"Fine-tuning has randaugment_ops={self.randaugment_ops} and "
                f"randaugment_magnitude={self.randaugment_magnitude}; use 0 to 14 changes of a magnitude from 0 to 10."
            )


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """What is put on an encoder: a pool over its tokens, a norm, and one Linear.

    task: "single", one of several classes; "multi", any number of labels; "regression", numbers.
    outputs: the names of the classes, of the labels, or of the numbers.
    pool: the mean of the patch tokens (MAE's global pool), or of the class tokens.
    offset, scale: of each number to predict, which is standardised in training; empty for classes and labels.
    """

    task: Task
    outputs: tuple[str, ...]
    pool: Pool
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    training: FineTuning

    def __post_init__(self) -> None:
        check_choice("Recognition", "task", self.task, Task)
        check_choice("Recognition", "pool", self.pool, Pool)
        least = 2 if self.task == "single" else 1
        if len(self.outputs) < least:
            raise ValueError(
                f"Recognition of the task {self.task!r} has the outputs {self.outputs}; it needs at least {least}."
            )
        wanted = len(self.outputs) if self.task == "regression" else 0
        if len(self.offset) != wanted or len(self.scale) != wanted:
            raise ValueError(
                f"Recognition of the task {self.task!r} has {len(self.offset)} offsets and {len(self.scale)} scales; it has "
                f"{wanted} of each."
            )


# MAE's FINETUNE.md. Differs from MAE in RandAugment, which is torchvision's because that is the kept library's: the magnitude
# is fixed, where timm's varies with a deviation of 0.5; Invert and SolarizeAdd are missing; turned pictures are interpolated
# linearly. And in evaluation: the whole picture, where MAE cuts out the centre 224 of 256 pixels.
_MAE = FineTuning(
    epochs=100,
    batch_size=1024,
    base_lr=5e-4,
    warmup_epochs=5,
    beta2=0.999,
    weight_decay=0.05,
    crop_scale=0.08,
    ema_decays=(),
    min_lr=1e-6,
    layer_decay=0.65,
    drop_path=0.1,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    randaugment_ops=2,
    randaugment_magnitude=9,
    erase=0.25,
)
_MAE_LARGE = dataclasses.replace(_MAE, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)

# Our choice for thousands of pictures on a CPU or one GPU, and for Nano and Micro: no blending, which needs many epochs.
SMALL = FineTuning(
    epochs=50,
    batch_size=64,
    base_lr=4e-3,
    warmup_epochs=3,
    beta2=0.999,
    weight_decay=0.05,
    crop_scale=0.4,
    ema_decays=(),
    min_lr=1e-6,
    layer_decay=0.75,
    drop_path=0.1,
    label_smoothing=0.1,
    randaugment_ops=1,
    randaugment_magnitude=5,
    erase=0.0,
)

PRESETS = {
    "small": SMALL,
    "B": _MAE,
    "L": _MAE_LARGE,
    "H": dataclasses.replace(_MAE_LARGE, drop_path=0.3),
}
SMALL_DATA = 20_000  # clips; below, MAE's hundred epochs at batch 1,024 are too few steps to learn from


def preset_of(size: str, num_samples: int) -> str:
    """The preset's name for an encoder ("B/16") and a number of labelled clips."""
    name = size.split("/")[0]
    if num_samples < SMALL_DATA or name in ("Nano", "Micro"):
        return "small"
    return {"L": "L", "H": "H", "XL": "L"}.get(name, "B")
