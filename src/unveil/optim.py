"""The optimiser, its learning rate, and running averages of the weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unveil.config import LrSchedule, Training

ADAM_BETA1 = 0.9


def optimizer_for(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, class and mask tokens, and norms unless the recipe decays them (UMD does)."""
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        spared = name.endswith(("_token", "bias")) or (parameter.ndim <= 1 and not training.decay_norms)
        (plain if spared else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.lr, betas=(ADAM_BETA1, training.beta2), fused=True)


def layer_decay_groups(model: nn.Module, depth: int, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Parameters of an encoder with a head by layer: "lr_scale" is decay ** (layers above it), as in MAE's fine-tuning.

    Layer 0 embeds: patches, class tokens, positions, and what is told time and class. Block i is layer i, from 1. Norm and
    head are layer depth + 1, whose scale is 1. Biases, vectors, class tokens and positions have no weight decay.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        else:
            layer = (
                0 if name.startswith(("encoder.patch_embed", "encoder.cls", "encoder.pos", "condition.")) else depth + 1
            )
        spared = parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed", "label_places"))
        groups.setdefault((layer, spared), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if spared else weight_decay,
            "lr_scale": decay ** (depth + 1 - layer),
        }
        for (layer, spared), parameters in groups.items()
    ]


def lr_factor(step: int, num_steps: int, warmup_steps: int, schedule: LrSchedule = "cosine") -> float:
    """Linear warm-up, then half a cosine to 0, or 1 throughout."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """An average of the weights whose decay grows to its full value over the first steps: min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(averages: Any, currents: Any, num_averaged: Tensor | int) -> None:
        n = float(num_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current, weight)

    return AveragedModel(model, multi_avg_fn=update)
