"""Tensors of others: whose they are by their names, and a file of them that is taken apart by name and shape.

A parameter that is missing, unknown or of a shape that does not follow from the others is an error, as nothing would show it
later.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unveil import sizes
from unveil.model import model_of
from unveil.recipe import Recipe
from unveil.sizes import Shape

Kind = Literal["umd", "dit", "mae", "vit", "mae_st", "videomae"]
State = dict[str, Tensor]

NAMES = {"umd": "UMD", "dit": "DiT", "mae": "MAE", "vit": "a ViT", "mae_st": "MAE-ST", "videomae": "VideoMAE"}
# Of the block's parts: Hugging Face's names on disk, and timm's, which MAE's own code has and we have.
HF_BLOCK = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# How a file with more in it than parameters marks those; they are taken off.
PREFIXES = ("param/", "params/")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the tensors of a file.

    used: those whose values are in the result. left: those that are not, and why. A tensor of ours that would get
    nothing is no part of it, for then the conversion fails. parts: of our model, as in `unveil.checkpoint.About`.
    """

    kind: Kind
    used: tuple[str, ...]
    left: dict[str, str]
    parts: tuple[str, ...] = ()


def _parameters(tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters of a file, {name without prefix: name}, and {name: why not} of the others."""
    for prefix in PREFIXES:
        marked = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
        if marked:
            others = tensors.keys() - set(marked.values())
            return marked, {name: f"no parameter, for it is not under {prefix!r}" for name in sorted(others)}
    return {name: name for name in tensors}, {}


def recognise(tensors: Mapping[str, Tensor]) -> Kind:
    """Whose parameters these are, by their names.

    Raises:
        ValueError: of no one that is known here.
    """
    names, _ = _parameters(tensors)
    if any(name.startswith(("Encoder/", "final_conv/")) for name in names):
        return "umd"
    if any(name.startswith(("x_embedder.", "final_layer.")) for name in names):
        return "dit"
    if "pos_embed_temporal" in names:
        return "mae_st"
    if any(name.endswith("patch_embeddings.projection.weight") and tensors[names[name]].ndim == 5 for name in names):
        return "videomae"
    if any(name.startswith(("decoder_embed.", "decoder.decoder_embed.")) for name in names):
        return "mae"
    if any(name.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")) for name in names):
        return "vit"
    first = ", ".join(repr(name) for name in sorted(tensors)[:3]) or "nothing"
    raise ValueError(
        "These tensors are neither UMD's ('Encoder/...', 'final_conv/kernel') nor DiT's ('x_embedder.proj.weight', ...) nor "
        "MAE's or another ViT's ('patch_embed.proj.weight', or 'embeddings.patch_embeddings.projection.weight' in Hugging "
        "Face's names) nor MAE-ST's ('pos_embed_temporal') nor VideoMAE's (Hugging Face's names, a kernel of five axes): "
        f"the file holds {first}. Give a file of one of these."
    )


def is_hugging_face(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are Hugging Face's names, and not those of timm and MAE."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors)


def listed(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"


class Source:
    """Tensors to be taken by name and shape; what is wrong with any of them is collected or raised here."""

    def __init__(self, kind: Kind, tensors: Mapping[str, Tensor]) -> None:
        self.kind: Kind = kind
        self.origin, self.left = _parameters(tensors)
        self.values = {name: tensors[origin] for name, origin in self.origin.items()}
        self.used: dict[str, None] = {}  # a set that keeps its order
        self.missing: list[str] = []
        self.state: State = {}

    def unstack(self, name: str, names: list[str]) -> None:
        """One array for each layer, from one with a leading axis of layers."""
        value, origin = self.values.pop(name), self.origin.pop(name)
        for layer, part in zip(names, value, strict=True):
            self.values[layer], self.origin[layer] = part, origin

    def sizes(self, name: str, num_axes: int) -> tuple[int, ...]:
        """The shape of a parameter that tells sizes of the model."""
        if name not in self.values:
            raise ValueError(f"The file has no {name!r}, so it is not of {NAMES[self.kind]}, or damaged.")
        shape = tuple(self.values[name].shape)
        if len(shape) != num_axes or 0 in shape:
            raise ValueError(
                f"{self.origin[name]!r} is {shape}, but {NAMES[self.kind]}'s has {num_axes} axes, none empty."
            )
        return shape

    def depth(self, pattern: str) -> int:
        """How many blocks there are, by the numbers in their names."""
        return len({match[1] for name in self.values if (match := re.match(pattern, name))})

    def take(self, name: str, *shape: int) -> Tensor:
        """A parameter of exactly this shape as float32; of zeros if it is missing, which `finish` will tell."""
        if name not in self.values:
            self.missing.append(name)
            return torch.zeros(shape)
        value, origin = self.values[name], self.origin[name]
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{origin!r} is {tuple(value.shape)}, but the file's other parameters make it {shape}: it was written by "
                "other code or for another network."
            )
        result = value.detach().float()
        if not value.is_floating_point() or not result.isfinite().all():
            raise ValueError(
                f"{origin!r} has values that are no numbers (or of type {value.dtype}): take another copy."
            )
        self.used[name] = None
        return result

    def rename(self, names: Mapping[str, str]) -> None:
        """Call parameters by other names; what they were called is still what is told of them."""
        self.values = {names.get(name, name): value for name, value in self.values.items()}
        self.origin = {names.get(name, name): origin for name, origin in self.origin.items()}

    def drop(self, names: Iterable[str], reason: str) -> None:
        """Give up parameters that have no part in what is converted."""
        for name in names:
            del self.values[name]
            self.left[self.origin[name]] = reason

    def leave(self, name: str, reason: str) -> None:
        """Give up a parameter whose values are not needed."""
        del self.used[name], self.values[name]
        self.left[self.origin[name]] = reason

    def _check(self) -> None:
        """Refuse a file that lacks parameters, or has some that were not taken."""
        unknown = [self.origin[name] for name in self.values if name not in self.used]
        if self.missing:
            instead = f"; it holds {listed(unknown)} instead, for which the model has no place" if unknown else ""
            raise ValueError(
                f"The file lacks {listed(self.missing)}, which {NAMES[self.kind]}'s model has{instead}: it is damaged, or was "
                "written by other code."
            )
        if unknown:
            raise ValueError(
                f"The file holds {listed(unknown)}, for which the model has no place. Without it the result would compute "
                "something else, so nothing was converted."
            )

    def finish(self, recipe: Recipe, parts: tuple[str, ...] = ()) -> tuple[Recipe, State, Report]:
        """The result, if every parameter was used and every tensor of ours got one of its shape."""
        self._check()
        with torch.device("meta"):  # names and shapes, no memory
            model = model_of(recipe, parts)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        missing = sorted(expected.keys() - self.state.keys())
        if missing:
            raise ValueError(f"Of {len(expected)} tensors of the model, {listed(missing)} got no values.")
        assert {name: tuple(value.shape) for name, value in self.state.items()} == expected
        used = tuple(dict.fromkeys(self.origin[name] for name in self.used))
        return recipe, self.state, Report(kind=self.kind, used=used, left=self.left, parts=parts)


def side_of(name: str, num_tokens: int) -> int:
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens:
        raise ValueError(
            f"{name!r} has {num_tokens} positions, which are no square; only square pictures can be converted."
        )
    return side


def size_of(embed_dim: int, depth: int, num_heads: int, patch_size: int) -> tuple[str, str]:
    """A size that recipes know, and what to call this one: the same, or "32x2/4" for a width of 32 and two blocks."""
    for name, e in sizes.ENCODERS.items():
        if (e.embed_dim, e.depth, e.num_heads) == (embed_dim, depth, num_heads):
            return f"{name}/{patch_size}", f"{name}/{patch_size}"
    return f"B/{patch_size}", f"{embed_dim}x{depth}/{patch_size}"


def shape_of(channels: int, side: int) -> Shape:
    """Grey and RGB are pixels, which go in as [-1, 1]; all else is taken for latents."""
    return {"channels": channels, "height": side, "latents": channels not in (1, 3)}
