"""What a training takes over from other weights, and what it has to draw or leave."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from unveil.model import AnyModel, MaskedDiffusionAutoencoder
from unveil.recipe import Recipe

LABEL_TABLE = "condition.label_embed.weight"


def modules_of(names: Collection[str], known: Collection[str]) -> list[str]:
    """Some of a model's tensors as few words: the largest modules of which every one of the known tensors is meant."""
    others = set(known) - set(names)
    found = set()
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        found.add(next(p for p in prefixes if p == name or not any(other.startswith(p + ".") for other in others)))
    return sorted(found)


def what_carries_over(
    state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], same_classes: bool
) -> dict[str, Tensor]:
    """The tensors that a new model takes from a pre-trained one: of the same name and shape.

    Args:
        shapes: of the new model.
        same_classes: whether the rows of a table of classes mean the same in both, as far as is known.
    """
    return {
        name: value
        for name, value in state.items()
        if shapes.get(name) == tuple(value.shape) and (same_classes or name != LABEL_TABLE)
    }


def carry_over(model: AnyModel, recipe: Recipe, same_classes: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that a new model of a recipe takes from a trained one, see `what_carries_over`, and a report of it.

    Returns:
        The tensors, and: "loaded" of "tensors", how many of the new model's tensors are the old one's; "fresh" and "dropped",
        the modules that only the new model has, and those that only the old one had.
    """
    state = model.state_dict()
    with torch.device("meta"):  # names and shapes, no memory
        new = MaskedDiffusionAutoencoder(recipe).state_dict()
    initial = what_carries_over(state, {n: tuple(v.shape) for n, v in new.items()}, same_classes)
    return initial, {
        "loaded": len(initial),
        "tensors": len(new),
        "fresh": modules_of(new.keys() - initial.keys(), new),
        "dropped": modules_of(state.keys() - initial.keys(), state),
    }


def starting_from(recipe: Recipe, origin: Recipe) -> Recipe:
    """A recipe whose encoder computes what the origin's does: its normalisation, its norms' eps, its kind of positions.

    Raises:
        ValueError: the two encoders are built differently, so that the same weights would compute something else.
    """
    for what, ours, theirs in (
        ("bounded", recipe.clip.bounded, origin.clip.bounded),
        ("channels", recipe.clip.channels, origin.clip.channels),
        ("patch_size", recipe.clip.patch_size, origin.clip.patch_size),
        ("tubelet_size", recipe.clip.tubelet_size, origin.clip.tubelet_size),
        *(
            (name, getattr(recipe.encoder, name), getattr(origin.encoder, name))
            for name in ("embed_dim", "depth", "num_heads")
        ),
        *((name, getattr(recipe.network, name), getattr(origin.network, name)) for name in ("norm", "mlp", "qk_norm")),
        ("rotary positions", *(part.network.positions == "rotary" for part in (recipe, origin))),
    ):
        if ours != theirs:
            raise ValueError(
                f"--init: its encoder has {what}={theirs!r}, but {recipe.name} {recipe.size} has {ours!r}, so its weights "
                "would not fit or compute something else. Give another --size, --recipe or shape."
            )
    if origin.network.positions in ("learned", "separable") and origin.clip.grid != recipe.clip.grid:
        raise ValueError(
            f"--init: its learned positions are of a grid of {origin.clip.grid} tokens (time, rows, columns), but here it is "
            f"{recipe.clip.grid}. Use its --image-size, {origin.clip.height}x{origin.clip.width}, and as many frames."
        )
    network = dataclasses.replace(recipe.network, norm_eps=origin.network.norm_eps, positions=origin.network.positions)
    clip = dataclasses.replace(recipe.clip, mean=origin.clip.mean, std=origin.clip.std)
    return dataclasses.replace(recipe, network=network, clip=clip)
