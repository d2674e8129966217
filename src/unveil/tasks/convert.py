"""Published weights of others as a weights file of ours."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from unveil.checkpoint import About, save_weights
from unveil.convert import from_dit, from_umd
from unveil.convert_video import from_mae_st, from_videomae
from unveil.convert_vit import Told, from_vit, read_config
from unveil.foreign import NAMES, Kind, recognise
from unveil.model import AnyModel, model_of
from unveil.planning import command_line
from unveil.recipe import to_dict
from unveil.reference import is_installed, largest_difference, library_of

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
# Of DiT's published training script, whose files hold the weights and their running average.
DIT_EMA_DECAY = 0.9999
TENSORS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
TOLERANCE = 1e-4  # of --check, float32


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn published weights of MAE, MAE-ST, VideoMAE, a plain ViT, UMD or DiT into a weights file of this package. Fails
    unless every tensor finds its place. See docs/weights.md.

    Example: unveil convert --source mae_pretrain_vit_base.pth --out mae_b.safetensors
    """

    source: Path
    """A .safetensors, an .npz of flax parameters with names joined by "/", a .pt, .pth or .bin (a running average is taken
    if there is one), or a folder of Hugging Face or timm with model.safetensors and config.json. No code in it is run."""
    out: Path
    """The .safetensors file to write; it must not exist."""
    kind: Literal["umd", "dit", "mae", "vit", "mae_st", "videomae"] | None = None
    """Whose weights they are. Default: told from their names."""
    num_heads: int | None = None
    """Attention heads of any but UMD's, which its tensors do not tell. Default: what config.json says, else the
    published model's of its width."""
    decoder_heads: int | None = None
    """Attention heads of a MAE's decoder. Default: as for --num-heads."""
    patch_norm: bool | None = None
    """Whether a whole MAE predicts normalised patches. Default: what config.json says, else yes."""
    mean: tuple[float, ...] | None = None
    """By what a MAE or a ViT normalises pixels in [0, 1], for each channel. Default: what config.json says, else ImageNet's
    for MAE and VideoMAE, 0.45 and 0.225 for MAE-ST, 0.5 for a ViT."""
    std: tuple[float, ...] | None = None
    """The same for the standard deviation."""
    check: bool | None = None
    """Run it beside a library that has it too (timm, transformers, for a DiT diffusers) on random pictures, and fail if they
    differ by more than 1e-4. Default: if that library is installed."""


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
    if path.is_dir():
        if not (path / TENSORS).is_file():
            raise ValueError(f"--source {path} is a folder without a {TENSORS}. Give the file with the weights.")
        path /= TENSORS
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
    for key in ("ema", "model", "model_state"):  # the last of MAE-ST
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}). Mend it, or move the weights away from it.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object. Mend it, or move the weights away from it.")
    return content


def _configs(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json of a folder, or beside its model.safetensors."""
    if source.is_file() and source.name != TENSORS:
        return {}, {}
    folder = source if source.is_dir() else source.parent
    return read_json(folder / CONFIG), read_json(folder / PREPROCESSOR)


def _check_options(options: Convert, kind: Kind) -> None:
    for name in ("num_heads", "decoder_heads"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given}: give at least one head.")
    if kind == "umd" and options.num_heads is not None:
        raise ValueError(
            "--num-heads is for a DiT, a MAE or a ViT; UMD's weights tell their heads themselves. Leave it out."
        )
    refused = {
        "umd": ("decoder_heads", "patch_norm", "mean", "std", "check"),
        "dit": ("decoder_heads", "patch_norm", "mean", "std"),
        "mae_st": ("check",),
        "videomae": ("decoder_heads", "patch_norm"),
    }
    for name in refused.get(kind, ()):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no part in converting {NAMES[kind]}. Leave it out.")


def _check_against(
    library: str, kind: Kind, model: AnyModel, tensors: dict[str, Tensor], config: dict[str, Any]
) -> str:
    """What to say of the comparison with the original's own library."""
    try:
        difference, what = largest_difference(kind, model, tensors, config)
    except Exception as error:  # whatever that library raises of a config
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{library} cannot build what config.json describes from these tensors ({reason}), so nothing "
            "was written. --no-check converts it all the same."
        ) from None
    if not difference <= TOLERANCE:
        raise ValueError(
            f"The converted model's {what} differ from {library}'s by {difference:.2g}, which is more than {TOLERANCE:g}, so "
            "nothing was written: the file is of a network that computes something else. --no-check converts it all the same."
        )
    return f"Compared with {library} on random pictures: {what} differ by {difference:.2g} at most."


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
    _check_options(options, kind)
    notices, config = [], {}
    if kind in ("umd", "dit"):
        recipe, state, report = from_umd(tensors) if kind == "umd" else from_dit(tensors, num_heads=options.num_heads)
    else:
        given = Told(
            num_heads=options.num_heads,
            decoder_heads=options.decoder_heads,
            patch_norm=options.patch_norm,
            mean=options.mean,
            std=options.std,
        )
        config, preprocessor = _configs(options.source)
        says = read_config(config, preprocessor)
        if kind == "mae_st":
            recipe, state, report, notices = from_mae_st(tensors, given=given)
        elif kind == "videomae":
            recipe, state, report, notices = from_videomae(tensors, given=given, config=says)
        else:
            recipe, state, report, notices = from_vit(tensors, kind=kind, given=given, config=says)
    with torch.random.fork_rng(devices=[]):
        model = model_of(recipe, report.parts)
    model.load_state_dict(state)  # every tensor of the model is filled, or this raises
    library = library_of(kind, tensors)
    if library is not None and options.check is not False:
        if is_installed(library):
            notices.append(_check_against(library, kind, model.eval(), tensors, config))
        elif options.check:
            raise ValueError(
                f"--check needs {library}, which is not installed. Run pip install {library}, or leave it out."
            )
        else:
            notices.append(f"Not compared with {library}, which is not installed.")
    average = " (their running average)" if averaged else ""
    about = About(
        step=0,  # how long they were trained is not in the file
        images_seen=0,
        ema_decay=DIT_EMA_DECAY if averaged and kind == "dit" else None,
        data=f"not known: converted from {options.source.name}{average}",
        command=command_line(),
        parts=report.parts,
    )
    save_weights(options.out, recipe, state, about)
    if not recipe.clip.bounded:
        notices.append(
            f"It was trained on latents of {recipe.clip.channels} channels, as an autoencoder makes them, so `unveil generate` "
            "writes latents too, which that autoencoder decodes; pictures cannot be given to it."
        )
    return {
        "out": str(options.out),
        "kind": report.kind,
        "parts": list(report.parts),
        "recipe": to_dict(recipe),
        "ema_decay": about.ema_decay,
        "parameters": sum(value.numel() for value in state.values()),
        "used": list(report.used),
        "left": report.left,
        "notices": notices,
    }
