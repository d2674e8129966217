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
