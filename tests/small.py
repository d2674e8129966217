"""Recipes and inputs of test size, and every shipped variant; imported by the tests, itself without one."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unveil import recipes, sizes
from unveil.config import Decoder
from unveil.corruption import Corrupted, corrupt
from unveil.losses import BranchDraws, Draws, Objective, draw
from unveil.model import MaskedDiffusionAutoencoder, Predictions
from unveil.recipe import Recipe

# Everything that the shipped functions can make of their arguments, once. The rule of two is held against this list.
# "generator" is no argument: it makes the recipe its generator of that many classes.
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
    "mae_video": ("mae_video", {}),
    "mae_video images": ("mae_video", {"frames": 1, "tubelet_size": 1}),
    "mae video": ("mae", {"frames": 16, "tubelet_size": 2, "mask_ratio": 0.9}),
    "dit": ("dit", {}),
    "dit latent": ("dit", {"size": "XL/2", "channels": 4, "height": 32, "latents": True, "num_classes": 1000}),
    "dit classes": ("dit", {"num_classes": 1000}),
    "dit generator": ("dit", {"generator": 1000}),
    "maskdit": ("maskdit", {}),
    "maskdit classes": ("maskdit", {"num_classes": 1000}),
    "maskdit generator": ("maskdit", {"generator": 1000}),
    "umd": ("umd", {}),
    "umd faithful": ("umd", {"faithful": True}),
    "umd small": ("umd", {"size": "S/4"}),
    "umd latent": ("umd", {"size": "L/2", "channels": 4, "height": 32, "latents": True}),
    "umd video": ("umd", {"frames": 16, "tubelet_size": 2}),
    "umd_finetune": ("umd_finetune", {}),
    "umd_finetune faithful": ("umd_finetune", {"faithful": True, "num_classes": 10}),
    "umd_flow": ("umd_flow", {}),
    "umd_flow video": ("umd_flow", {"frames": 16, "tubelet_size": 2}),
    "umd_flow generator": ("umd_flow", {"generator": 1000}),
    "dit_umd": ("dit_umd", {}),
    "dit_umd generator": ("dit_umd", {"generator": 1000}),
    "maskdit_umd": ("maskdit_umd", {}),
    "maskdit_umd generator": ("maskdit_umd", {"generator": 1000}),
    "mae_umd": ("mae_umd", {}),
    "mae_umd faithful": ("mae_umd", {"faithful": True}),
    "mae_umd generator": ("mae_umd", {"generator": 1000}),
}
# Those with several rows of the decoder for one of the encoder, whose own tests are in tests/test_levers.py.
LEVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffmae four draws": ("diffmae", {"num_draws": 4}),
    "diffmae joint, two draws": ("diffmae", {"decoder": "joint", "num_draws": 2}),
    "diffmae cross, half of it": ("diffmae", {"decoder": "cross", "num_draws": 2, "decode_share": 0.5}),
}
EVERY = {**VARIANTS, **LEVERS}
SMALL_CLASSES = 5


def make(name: str, arguments: dict[str, Any]) -> Recipe:
    """What a line of VARIANTS stands for."""
    arguments = dict(arguments)
    num_classes = arguments.pop("generator", 0)
    recipe = recipes.RECIPES[name](**arguments)
    return recipes.generator(recipe, num_classes) if num_classes else recipe


def shipped(variant: str) -> Recipe:
    """A variant at its full size."""
    return make(*EVERY[variant])


def small(name: str = "diffmae", *, depth: int = 3, decoder_depth: int = 2, **arguments: Any) -> Recipe:
    """A shipped recipe at test size: 16 pixels in patches of 4, three blocks of width 32, two of width 16.

    A decoder as wide as its encoder stays so (UMD's). generator=K makes it its generator; umd_finetune has five classes.
    """
    if name == "umd_finetune":
        arguments.setdefault("num_classes", SMALL_CLASSES)
    recipe = make(name, {"size": "Nano/4", "height": 16, **arguments})
    wide, decoder, told = 32, recipe.decoder, recipe.condition
    if decoder is not None:
        taps = (depth,) if decoder.kind == "joint" else sizes.stage_ends(depth, decoder_depth)
        width = wide if decoder.embed_dim == recipe.encoder.embed_dim else wide // 2
        decoder = Decoder(
            kind=decoder.kind,
            embed_dim=width,
            depth=decoder_depth,
            num_heads=width // 8,
            taps=taps,
            summary=decoder.summary,
        )
    if told.label_tokens:
        told = dataclasses.replace(told, label_tokens_from=depth // 3 + 1)
    encoder = dataclasses.replace(recipe.encoder, embed_dim=wide, depth=depth, num_heads=wide // 8)
    return dataclasses.replace(recipe, encoder=encoder, decoder=decoder, condition=told)


def small_variant(variant: str) -> Recipe:
    """A variant at test size: what it does is kept, how large it is is not."""
    name, arguments = EVERY[variant]
    sizes: dict[str, Any] = {"size": "Nano/4", "height": 16}
    if "frames" in arguments:
        sizes["frames"] = 4
    if "width" in arguments:
        sizes.update(height=8, width=24)
    sizes.update({key: SMALL_CLASSES for key in ("num_classes", "generator") if key in arguments})
    return small(name, **{**arguments, **sizes})


def networks() -> list[str]:
    """One variant for each set of parameters, of those that differ in masks, noise or losses alone."""
    found: dict[Any, str] = {}
    for variant in EVERY:
        with torch.device("meta"):
            model = MaskedDiffusionAutoencoder(small_variant(variant))
        recipe = model.recipe
        key = tuple((name, p.shape) for name, p in model.named_parameters()), len(recipe.branches), recipe.noise_on
        found.setdefault(key, variant)
    return list(found.values())


def build(recipe: Recipe, seed: int = 0, spread: float = 0.05) -> MaskedDiffusionAutoencoder:
    """A model with every parameter moved by N(0, spread), so that no path is silent because it starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedDiffusionAutoencoder(recipe)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


def pillow_picture(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of noise, (height, width), in one of Pillow's modes."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size, dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(rng.random(size, dtype=np.float32))
    rgba = Image.fromarray(rng.integers(0, 256, (*size, 4), dtype=np.uint8))
    return rgba if mode == "RGBA" else rgba.convert("RGB").quantize(20) if mode == "P" else rgba.convert(mode)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips_for(recipe: Recipe, n: int = 2, seed: int = 0) -> Tensor:
    """n clips (n, C, T, H, W) of uniform values in [0, 1]."""
    clip = recipe.clip
    return torch.rand(n, clip.channels, clip.frames, clip.height, clip.width, generator=generator(seed))


def labels_for(recipe: Recipe, n: int = 2, seed: int = 0) -> Tensor | None:
    """n classes (n,), or None for a recipe without classes."""
    num_classes = recipe.condition.num_classes
    return torch.randint(num_classes, (n,), generator=generator(seed)) if num_classes else None


def enough(recipe: Recipe) -> int:
    """So many clips that every branch has some: 2 of one branch, 4 of two halves, 20 where one has a twentieth."""
    shares = [branch.share for branch in recipe.branches]
    return max(2 * len(shares), math.ceil(1 / min(shares)))


def batch_for(recipe: Recipe, n: int | None = None, seed: int = 0) -> tuple[Objective, Tensor, Draws]:
    """A model's training step, clips that are enough for every branch, and its draws."""
    n = enough(recipe) if n is None else n
    objective = Objective(build(recipe, seed))
    labels = labels_for(recipe, n, seed)
    return (
        objective,
        clips_for(recipe, n, seed),
        draw(recipe, objective.model.schedule, seed, 0, range(n), labels=labels),
    )


# Every branch of every variant, for tests that look at one at a time.
BRANCHES = [(variant, number) for variant in VARIANTS for number in range(len(shipped(variant).branches))]
BRANCH_IDS = [f"{variant}: {shipped(variant).branches[number].noise_on}" for variant, number in BRANCHES]


def only(draws: Draws, number: int) -> Draws:
    """The same draws with nothing for the other branches."""
    return Draws(tuple(part if i == number else None for i, part in enumerate(draws.branches)))


def part_of(draws: Draws, number: int = 0) -> BranchDraws:
    part = draws.branches[number]
    assert part is not None
    return part


def corrupted(objective: Objective, clips: Tensor, draws: Draws, number: int = 0) -> Corrupted:
    """What a branch makes of its clips."""
    part, model = part_of(draws, number), objective.model
    x0 = model.tokens(clips[part.rows])
    noise_on = model.recipe.branches[number].noise_on
    return corrupt(x0, part.mask, noise_on, part.t, model.schedule, part.noise)


def predicted(objective: Objective, clips: Tensor, draws: Draws, number: int = 0) -> Predictions:
    """What the model predicts for a branch's clips, wherever the branch scores something."""
    part, c = part_of(draws, number), corrupted(objective, clips, draws, number)
    places = tuple(dict.fromkeys(term.on for term in objective.model.recipe.branches[number].terms))
    return objective.model(c.x_enc, part.mask, c.x_dec, part.t, part.labels, on=places)
