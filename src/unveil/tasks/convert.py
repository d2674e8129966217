"""Published weights of others as a weights file of ours."""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from unveil.checkpoint import About, save_weights
from unveil.convert import Kind, from_dit, from_umd, recognise
from unveil.model import MaskedDiffusionAutoencoder
from unveil.recipe import to_dict

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
# Of DiT's published training script, whose files hold the weights and their running average.
DIT_EMA_DECAY = 0.9999


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn published weights of UMD or DiT into a weights file of this package. Fails unless every tensor finds its place.

    Example: unveil convert --source DiT-XL-2-256x256.pt --out dit_xl_2.safetensors
    """

    source: Path
    """A .safetensors, an .npz of flax parameters with names joined by "/", or a .pt or .pth (a running average is taken
    if there is one). No code in it is run."""
    out: Path
    """The .safetensors file to write; it must not exist."""
    kind: Literal["umd", "dit"] | None = None
    """Whose weights they are. Default: told from their names."""
    num_heads: int | None = None
    """Attention heads of a DiT, which its file does not tell. Default: the published model's of its width."""


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    with torch.serialization.safe_globals(
        [argparse.Namespace]
    ):  # the options that DiT's script saves beside the weights
        return torch.load(path, map_location="cpu", weights_only=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file, and whether they were chosen as its running average.

    Raises:
        ValueError: there is no such file, or it is not of a known type, cannot be read, or holds anything but tensors.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--source {path} is of no known type. Give a file that ends in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"--source {path} does not exist, or is no file. Give the file with the weights.")
    try:
        content = _read(path)
    except Exception as error:  # a damaged file can make its reader raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--source {path} cannot be read ({reason}). Is the file whole, and of numbers only?"
        ) from None
    averaged = False
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content, averaged = content[key], key == "ema"
            break
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(
            f"--source {path} does not hold tensors by name. Give a state dict, or flax's flattened parameters."
        )
    return content, averaged


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors, which is what is written.")
    if out.exists():
        raise ValueError(f"--out {out} exists already and is not overwritten. Give another name, or remove it.")


def convert(options: Convert) -> dict[str, Any]:
    """Run `unveil convert`.

    Returns:
        What was written and what became of each tensor, see `unveil.convert.Report`.

    Raises:
        ValueError: a file is not what it should be; then nothing is written.
    """
    _check_out(options.out)
    tensors, averaged = read_tensors(options.source)
    kind: Kind = options.kind or recognise(tensors)
    if kind == "umd" and options.num_heads is not None:
        raise ValueError("--num-heads is for a DiT; UMD's weights tell their heads themselves. Leave it out.")
    recipe, state, report = from_umd(tensors) if kind == "umd" else from_dit(tensors, num_heads=options.num_heads)
    with torch.random.fork_rng(devices=[]):
        MaskedDiffusionAutoencoder(recipe).load_state_dict(state)  # every tensor of the model is filled, or this raises
    average = " (their running average)" if averaged else ""
    about = About(
        step=0,  # how long they were trained is not in the file
        images_seen=0,
        ema_decay=DIT_EMA_DECAY if averaged and kind == "dit" else None,
        data=f"not known: converted from {options.source.name}{average}",
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    save_weights(options.out, recipe, state, about)
    notices = []
    if not recipe.clip.bounded:
        notices.append(
            f"It was trained on latents of {recipe.clip.channels} channels, as an autoencoder makes them, so `unveil generate` "
            "writes latents too, which that autoencoder decodes; pictures cannot be given to it."
        )
    return {
        "out": str(options.out),
        "kind": kind,
        "recipe": to_dict(recipe),
        "ema_decay": about.ema_decay,
        "parameters": sum(value.numel() for value in state.values()),
        "used": list(report.used),
        "left": report.left,
        "notices": notices,
    }
