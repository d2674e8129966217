"""What a weights file holds."""

from dataclasses import dataclass
from typing import Any

import torch

from unveil.checkpoint import FromRun, find_weights, read_header, read_recognition
from unveil.cost import encode_cost, masked_step
from unveil.model import model_of
from unveil.recipe import to_dict
from unveil.recognizer import Recognizer


@dataclass(frozen=True, kw_only=True)
class Info(FromRun):
    """Print what a run or a weights file holds: recipe, target, normalisation, data, step, and what it can do.

    Example: unveil info --run runs/digits/diffmae
    """


def info(options: Info) -> dict[str, Any]:
    """Run `unveil info`; reads the header only."""
    recipe, about, shapes = read_header(options.run)
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + count
    recognition = read_recognition(options.run)
    with torch.device("meta"):  # names and shapes, no memory
        if recognition is not None:
            expected = Recognizer(recipe, recognition)
            can, cost = ["recognise"], encode_cost(recipe)
        else:
            expected = model_of(recipe, about.parts)
            can, cost = sorted(expected.can), encode_cost(recipe) if about.parts else masked_step(recipe)
    return {
        "file": str(find_weights(options.run)),
        "can": can,
        "recognition": None if recognition is None else to_dict(recognition),
        "parameters": parts,
        "missing_tensors": sorted(expected.state_dict().keys() - shapes.keys()),
        "multiply_adds_per_clip": cost.forward,
        "about": to_dict(about),
        "recipe": to_dict(recipe),
    }
