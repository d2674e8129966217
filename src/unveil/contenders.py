"""Training steps to be timed side by side: our recipes, and Hugging Face's ViTMAE at the same sizes."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unveil.compiling import compile_blocks
from unveil.losses import Objective, draw
from unveil.model import MaskedDiffusionAutoencoder
from unveil.optim import optimizer_for
from unveil.recipe import Recipe
from unveil.rundir import Precision

STAGES = ("draw", "encoder", "rest of forward", "backward", "optimizer")


class Contender(Protocol):
    """A network in training, on a device."""

    name: str
    recipe: Recipe  # whose arithmetic counts

    def step(self, pictures: Tensor, wait: bool = True) -> dict[str, float]:
        """One whole step on pictures (B, C, H, W) on the device; seconds of its stages, those that it can tell.

        Args:
            wait: for the device at the end of each stage. Without, as in training, it may still be at work when this returns,
                and the seconds are those of the host.
        """
        ...


class Clock:
    """Seconds between the ends of stages, the device's work included if it is waited for."""

    def __init__(self, device: str, wait: bool) -> None:
        self.device, self.wait, self.seconds = device, wait, dict[str, float]()
        self._last = self._now()

    def _now(self) -> float:
        if self.wait and self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def end(self, stage: str) -> None:
        now = self._now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _autocast(device: str, precision: Precision) -> AbstractContextManager[Any]:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


class Ours:
    """A recipe's step, as `unveil.train` makes it, but for running averages and the norm of the gradient, which neither has."""

    def __init__(self, recipe: Recipe, device: str, precision: Precision, compile: bool) -> None:
        self.name = recipe.name + (", compiled" if compile else "")
        self.recipe, self.device = recipe, device
        self.precision: Precision = precision
        self.model = MaskedDiffusionAutoencoder(recipe).to(device).train()
        self.optimizer = optimizer_for(self.model, recipe.training)
        self.objective = Objective(self.model)
        reason = compile_blocks(self.model, device, precision == "bf16") if compile else None
        if reason is not None:
            raise ValueError(f"--compile, but this machine cannot compile: {reason}. Drop it.")
        self.count = 0

    def step(self, pictures: Tensor, wait: bool = True) -> dict[str, float]:
        clock = Clock(self.device, wait)
        hook = self.model.encoder.register_forward_hook(lambda *_: clock.end("encoder"))
        drawn = draw(self.recipe, self.model.schedule, 0, self.count, range(len(pictures)), device=self.device)
        clock.end("draw")
        with _autocast(self.device, self.precision):
            loss, _ = self.objective(pictures[:, :, None], drawn)
        clock.end("rest of forward")
        hook.remove()
        _update(loss, self.optimizer, clock)
        self.count += 1
        return clock.seconds


class HuggingFace:
    """ViTMAEForPreTraining with a recipe's sizes, mask ratio and target, and our optimiser.

    Raises:
        ValueError: transformers is not installed, or the recipe is no MAE of pictures.
    """

    def __init__(self, recipe: Recipe, device: str, precision: Precision, compile: bool) -> None:
        self.name = "Hugging Face ViTMAE" + (", compiled" if compile else "")
        self.recipe, self.device = recipe, device
        self.precision: Precision = precision
        model = vit_mae(recipe).to(device).train()
        self.optimizer = optimizer_for(model, recipe.training)
        self.model: Callable[..., Any] = torch.compile(model) if compile else model

    def step(self, pictures: Tensor, wait: bool = True) -> dict[str, float]:
        clock = Clock(self.device, wait)
        with _autocast(self.device, self.precision):
            loss = self.model(pictures).loss
        clock.end("rest of forward")
        _update(loss, self.optimizer, clock)
        return clock.seconds


def _update(loss: Tensor, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    clock.end("backward")
    optimizer.step()
    clock.end("optimizer")


def vit_mae(recipe: Recipe) -> nn.Module:
    """Hugging Face's network of a recipe's sizes, with drawn weights; see `HuggingFace`."""
    e, d, clip, branch = recipe.encoder, recipe.decoder, recipe.clip, recipe.branches[0]
    if recipe.name != "mae" or d is None or clip.frames > 1 or clip.height != clip.width:
        raise ValueError(
            f"Hugging Face's ViTMAE is MAE on square pictures, and none of the recipes is that, as {recipe.name}. Put mae "
            "among --recipes."
        )
    try:
        import transformers
    except Exception as error:
        raise ValueError(
            f"Hugging Face's ViTMAE needs transformers ({error}). Install it: pip install transformers. Or drop --beside."
        ) from None
    config = transformers.ViTMAEConfig(
        hidden_size=e.embed_dim,
        num_hidden_layers=e.depth,
        num_attention_heads=e.num_heads,
        intermediate_size=4 * e.embed_dim,
        decoder_hidden_size=d.embed_dim,
        decoder_num_hidden_layers=d.depth,
        decoder_num_attention_heads=d.num_heads,
        decoder_intermediate_size=4 * d.embed_dim,
        image_size=clip.height,
        patch_size=clip.patch_size,
        num_channels=clip.channels,
        mask_ratio=branch.mask_ratio,
        norm_pix_loss=True,
        layer_norm_eps=recipe.network.norm_eps,
    )
    return transformers.ViTMAEForPreTraining(config)
