"""Pre-training without labels."""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unveil import recipes
from unveil.checkpoint import pick_device
from unveil.config import DecoderKind, Masking, Recipe, ScheduleKind, Target
from unveil.data import Samples, decoded_bytes, open_source
from unveil.train import Precision, Progress, Run, train

CACHE_LIMIT = 2**31  # bytes of decoded pictures that are kept in memory
MAX_SIDE = 8192  # pixels; positions alone would fill the memory beyond


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train a masked auto-encoder on unlabelled pictures or clips, or go on with a run that was interrupted.

    Example: unveil pretrain --data photos/ --out runs/photos --size Micro/8 --image-size 64 --epochs 100
    """

    data: str
    """A folder of pictures (nested or flat), a parquet file with an image column, `digits:train`, or
    `moving-digits:train`."""
    out: Path
    """Directory of the run. If it holds an interrupted run of the same settings, that run is continued."""
    recipe: Literal["diffmae", "mae", "mae_raw"] = "diffmae"
    """diffmae: paints and represents. mae: normalised patches, represents. mae_raw: raw pixels, one-step painting."""
    size: str | None = None
    """Encoder and patch size, as in B/16: Nano, Micro, Ti, S, B, L or H. Default B/16; Nano/2 for digits, Nano/4 for
    moving-digits."""
    image_size: str | None = None
    """Height and width in pixels, one number or 64x48. Default 224; 8 for digits, 24 for moving-digits."""
    channels: int | None = None
    """Channels of the pictures: 3 colour, 1 gray, others from .npy arrays. Default 3; 1 for the digits."""
    frames: int | None = None
    """Frames of a clip. Default 1, a picture; 8 for moving-digits."""
    tubelet_size: int | None = None
    """Frames in one token. Default 1; 2 for moving-digits."""

    mask_ratio: float | None = None
    """Share of tokens that is hidden, 0 to 1. Default 0.75."""
    masking: Masking | None = None
    """random over space and time (default), tube (the same places in every frame), or the center block."""
    decoder: DecoderKind | None = None
    """cross_self (DiffMAE's default), cross, or joint (MAE's)."""
    schedule: ScheduleKind | None = None
    """Noise schedule of diffmae. Default linear."""
    rho: float | None = None
    """Exponent on the schedule's betas; below 1 is noisier. Default 0.8."""
    target: Target | None = None
    """What diffmae predicts: x0, clean values (default), or eps, the noise."""

    epochs: int | None = None
    """Passes over the data. Default: the recipe's, 1600 for DiffMAE, 800 for MAE, 100 for Nano and Micro."""
    batch_size: int | None = None
    """Clips in one step. Default: the recipe's, 4096, or 64 for Nano and Micro."""
    blr: float | None = None
    """Base learning rate; the learning rate is blr * batch size / 256."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up."""
    crop_scale: float | None = None
    """Smallest share of the area that a random crop keeps; 1 for no cropping. Default 0.2; 0.4 for Micro, 1 for Nano."""
    flip: bool | None = None
    """Mirror half of the pictures. Default: yes, but not for digits and Nano."""
    ema_decay: float | None = None
    """Decay of the running average of the weights, which is what is saved for use."""

    seed: int = 0
    """Fixes the initial weights, the order, and every draw."""
    workers: int | None = None
    """Processes that read data. Default: 0 if the pictures fit into memory, else one for each core."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""
    precision: Precision | None = None
    """fp32, or bf16 by autocast. Default: bf16 on cuda, fp32 on a CPU, where small models are no faster in bf16."""
    compile: bool = False
    """Compile the step with torch.compile; pays for long runs."""
    save_minutes: float = 2.0
    """Minutes between saves and refreshed contact sheets."""


BUILT_IN = {
    "digits": {"size": "Nano/2", "image_size": "8", "channels": 1},
    "moving-digits": {"size": "Nano/4", "image_size": "24", "channels": 1, "frames": 8, "tubelet_size": 2},
}


def parse_image_size(text: str) -> tuple[int, int]:
    """'224' or '64x48' (height x width) as two numbers."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) <= MAX_SIDE for part in parts):
        raise ValueError(
            f"--image-size {text!r} is no size: give pixels up to 8192 as 224, or height x width as 64x48."
        )
    return int(parts[0]), int(parts[-1])


def recipe_of(options: Pretrain) -> Recipe:
    """The recipe that the options name, with the fields replaced that they give."""
    built_in = BUILT_IN.get(options.data.partition(":")[0], {})
    height, width = parse_image_size(options.image_size or built_in.get("image_size", "224"))
    shape: dict[str, Any] = {"height": height, "width": width}
    for name in ("channels", "frames", "tubelet_size"):
        value = getattr(options, name)
        shape[name] = built_in.get(name) if value is None else value
    method = {name: getattr(options, name) for name in ("mask_ratio", "masking", "decoder")}
    diffusion = {name: getattr(options, name) for name in ("schedule", "rho", "target")}
    if options.recipe != "diffmae":
        for name, value in diffusion.items():
            if value is not None:
                raise ValueError(
                    f"--{name} {value} belongs to diffmae; {options.recipe} has no noise. Drop it, or use diffmae."
                )
    given = {name: value for name, value in {**shape, **method, **diffusion}.items() if value is not None}
    recipe = recipes.RECIPES[options.recipe](options.size or built_in.get("size", "B/16"), **given)
    training = {"epochs": options.epochs, "batch_size": options.batch_size, "base_lr": options.blr}
    for name in ("warmup_epochs", "crop_scale", "flip", "ema_decay"):
        training[name] = getattr(options, name)
    if built_in:  # digits at any size are augmented as the size meant for them is
        training["flip"] = recipes.NANO_TRAINING.flip if options.flip is None else options.flip
        if options.crop_scale is None:
            training["crop_scale"] = recipes.NANO_TRAINING.crop_scale
    changed = {name: value for name, value in training.items() if value is not None}
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changed))


def pretrain(options: Pretrain, on_progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Run `unveil pretrain`; see `Pretrain` for the options and `train` for what is returned."""
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed}: use a whole number from 0 to 2^63 - 1.")
    if not options.save_minutes >= 0:
        raise ValueError(f"--save-minutes {options.save_minutes}: use a number of minutes, at least 0.")
    recipe = recipe_of(options)
    clip = recipe.clip
    source = open_source(options.data, clip.channels, clip.frames, clip.height, clip.width)
    fits = decoded_bytes(source) < CACHE_LIMIT
    workers = options.workers
    if workers is None:
        workers = 0 if fits else min(torch.get_num_threads(), len(source))
    samples = Samples(source, clip, options.seed, recipe.training, cache=fits and workers == 0)
    if len(samples) < recipe.training.batch_size and options.batch_size is None:
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, batch_size=len(samples)))
    device = pick_device(options.device)
    run = Run(
        data=options.data,
        out=options.out,
        seed=options.seed,
        workers=workers,
        device=device,
        precision=options.precision or ("bf16" if device.startswith("cuda") else "fp32"),
        compile=options.compile,
        save_minutes=options.save_minutes,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    return train(recipe, samples, run, on_progress)
