"""Recipes and inputs of test size, and every shipped variant; imported by the tests, itself without one."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from unveil import recipes
from unveil.config import Decoder, Encoder, Recipe
from unveil.losses import Draws, Objective, draw
from unveil.model import MaskedDiffusionAutoencoder

# Everything that the shipped functions can make of their arguments, once. The rule of two is held against this list.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("mae", {}),
    "mae_raw": ("mae_raw", {}),
    "diffmae": ("diffmae", {}),
    "diffmae large": ("diffmae", {"size": "L/16"}),
    "diffmae joint": ("diffmae", {"decoder": "joint"}),
    "diffmae cross": ("diffmae", {"decoder": "cross"}),
    "diffmae eps": ("diffmae", {"target": "eps"}),
    "diffmae all hidden": ("diffmae", {"mask_ratio": 1.0}),
    "diffmae nothing hidden": ("diffmae", {"mask_ratio": 0.0}),
    "diffmae nothing hidden, eps": ("diffmae", {"mask_ratio": 0.0, "target": "eps"}),
    "diffmae cosine": ("diffmae", {"schedule": "cosine"}),
    "diffmae rho 1": ("diffmae", {"rho": 1.0}),
    "diffmae center": ("diffmae", {"masking": "center", "height": 256, "mask_ratio": 0.25}),
    "diffmae video": ("diffmae", {"frames": 16, "tubelet_size": 2, "mask_ratio": 0.9}),
    "diffmae tubes": ("diffmae", {"frames": 16, "tubelet_size": 2, "mask_ratio": 0.9, "masking": "tube"}),
    "diffmae rectangle": ("diffmae", {"height": 128, "width": 256}),
    "diffmae digits": ("diffmae", {"size": "Nano/4", "channels": 1, "height": 28}),
    "mae cross_self": ("mae_raw", {"decoder": "cross_self"}),
    "mae video": ("mae", {"frames": 16, "tubelet_size": 2, "mask_ratio": 0.9}),
}


def shipped(variant: str) -> Recipe:
    """A variant at its full size."""
    name, arguments = VARIANTS[variant]
    return recipes.RECIPES[name](**arguments)


def small(name: str = "diffmae", *, depth: int = 3, decoder_depth: int = 2, **arguments: Any) -> Recipe:
    """A shipped recipe at test size: 16 pixels in patches of 4, three blocks of width 32, two of width 16."""
    recipe = recipes.RECIPES[name](**{"size": "Nano/4", "height": 16, **arguments})
    decoder = None
    if recipe.decoder is not None:
        taps = (depth,) if recipe.decoder.kind == "joint" else recipes.stage_ends(depth, decoder_depth)
        decoder = Decoder(kind=recipe.decoder.kind, embed_dim=16, depth=decoder_depth, num_heads=2, taps=taps)
    return dataclasses.replace(recipe, encoder=Encoder(embed_dim=32, depth=depth, num_heads=4), decoder=decoder)


def small_variant(variant: str) -> Recipe:
    """A variant at test size: what it does is kept, how large it is is not."""
    name, arguments = VARIANTS[variant]
    sizes: dict[str, Any] = {"size": "Nano/4", "height": 16}
    if "frames" in arguments:
        sizes["frames"] = 4
    if "width" in arguments:
        sizes.update(height=8, width=24)
    return small(name, **{**arguments, **sizes})


def build(recipe: Recipe, seed: int = 0, spread: float = 0.05) -> MaskedDiffusionAutoencoder:
    """A model with every parameter moved by N(0, spread), so that no path is silent because it starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedDiffusionAutoencoder(recipe)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips_for(recipe: Recipe, n: int = 2, seed: int = 0) -> Tensor:
    """n clips (n, C, T, H, W) of uniform values in [0, 1]."""
    clip = recipe.clip
    return torch.rand(n, clip.channels, clip.frames, clip.height, clip.width, generator=generator(seed))


def batch_for(recipe: Recipe, n: int = 2, seed: int = 0) -> tuple[Objective, Tensor, Draws]:
    """A model's training step, its clips and its draws."""
    objective = Objective(build(recipe, seed))
    return objective, clips_for(recipe, n, seed), draw(recipe, objective.model.schedule, seed, 0, range(n))
