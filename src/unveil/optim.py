"""The optimiser, its learning rate, and running averages of the weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unveil.config import LrSchedule, Training

ADAM_BETA1 = 0.9
LARS_MOMENTUM, LARS_TRUST = 0.9, 0.001


def optimizer_for(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, class and mask tokens, and norms unless the recipe decays them (UMD does)."""
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        spared = name.endswith(("_token", "bias")) or (parameter.ndim <= 1 and not training.decay_norms)
        (plain if spared else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.lr, betas=(ADAM_BETA1, training.beta2), fused=True)


def adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """What fused AdamW keeps of a parameter, to be filled from a save."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


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
        spared = parameter.ndim <= 1 or name.endswith(("cls_token", "label_places")) or ".positions." in name
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


class Lars:
    """LARS without weight decay: momentum over gradients whose length is a share of their weight's.

    v = 0.9 v + g * 0.001 |w| / |g|, w = w - lr v; parameters of one dimension take g as it is. You et al. 2017, arXiv
    1708.03888, as MAE's linear probe has it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.momentum = [torch.zeros_like(parameter) for parameter in self.parameters]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step with the learning rate lr * factor."""
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            assert parameter.grad is not None
            gradient, trust = parameter.grad, torch.ones((), device=parameter.device)
            if parameter.ndim > 1:
                lengths = parameter.norm(), gradient.norm()
                known = (lengths[0] > 0) & (lengths[1] > 0)
                trust = torch.where(known, LARS_TRUST * lengths[0] / lengths[1], trust)
            momentum.mul_(LARS_MOMENTUM).add_(gradient * trust)
            parameter.sub_(momentum, alpha=self.lr * factor)


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """An average of the weights whose decay grows to its full value over the first steps: min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(averages: Any, currents: Any, _: Tensor | int) -> None:
        n = float(average.n_averaged)  # on the CPU; the one that is given is on the device, which would be waited for
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averages), list(currents), weight)  # type: ignore[attr-defined]

    average = AveragedModel(model, multi_avg_fn=update)
    return average
