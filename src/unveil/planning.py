"""From a user's options to what training needs: the recipe's numbers, samples and a run."""

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from unveil.config import Training, check_choice
from unveil.data import Samples, Source, decoded_bytes
from unveil.recipe import Recipe
from unveil.rundir import Precision, Run
from unveil.spread import Spread

MAX_SIDE = 8192  # pixels; positions alone would fill the memory beyond
CACHE_LIMIT = 2**31  # bytes of decoded pictures that are kept in memory
FEW_STEPS = 1000  # digits are legible after some 1,300


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a user may say of any training; a command's options are these and its own."""

    data: str
    """A folder of pictures (nested or flat), a folder that `unveil prepare` made, a parquet file with an image column, tar
    shards as webdataset has them, `digits:train`, or `moving-digits:train`. With labels: a folder for each class, a label
    column, or .cls members."""
    out: Path
    """Directory of the run. If it holds an interrupted run of the same settings, that run is continued."""

    epochs: int | None = None
    """Passes over the data. Default: the recipe's; for Nano and Micro 100, and 50 to fine-tune a generator."""
    batch_size: int | None = None
    """Clips in one step. Default: the recipe's; 64 for Nano and Micro."""
    blr: float | None = None
    """Base learning rate; the learning rate is blr * batch size / 256. Default: the recipe's; 6e-3 for Nano and Micro."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. Default: the recipe's; 1 for Nano and Micro."""
    crop_scale: float | None = None
    """Smallest share of a picture's area that a random crop keeps; 1 for no cropping. Default: the recipe's."""
    flip: bool | None = None
    """Mirror half of the pictures. Default: yes, but not for digits and Nano."""
    ema_decays: tuple[float, ...] | None = None
    """Decays of running averages of the weights, one or several; the first is saved as model.safetensors, the others as
    ema-DECAY.safetensors beside it, the weights as trained as last.safetensors. Default: the recipe's; 0.999 for Nano and
    Micro."""

    accumulate: int = 1
    """Pieces that a batch is computed in, one after another, when it does not fit into memory. The result is the same but
    for the last digits, and for drop path, MixUp and CutMix, which are drawn for each piece."""
    gradient_checkpointing: bool = False
    """Keep less for the backward pass and compute it again there: a step takes a third longer, and less memory."""
    fsdp: bool = False
    """Of several processes, give each its shards of the weights, gradients, averages and optimiser's state, instead of all:
    for models that do not fit otherwise. Nothing for one process."""

    seed: int = 0
    """Fixes the initial weights, the order, and every draw."""
    workers: int | None = None
    """Processes that read data. Default: 0 if the pictures fit into memory, else one for each core."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""
    precision: Precision | None = None
    """fp32, or bf16 by autocast. Default: bf16 on cuda, fp32 on a CPU, where small models are no faster in bf16."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile, in the first step, for half a minute or more. Without a compiler
    it says so and goes on."""
    save_minutes: float = 2.0
    """Minutes between saves, which also refresh the contact sheet and report.html."""
    keep: int = 2
    """Saves to go on from that are kept; a damaged one is passed over for the one before it."""
    wandb: str | None = None
    """Log to this project at Weights & Biases too; needs pip install wandb. Without it, numbers are in
    metrics.jsonl and tensorboard/ of the run."""


def command_line() -> str:
    """The command as it was typed; started as a module, its file's name stands for `unveil`."""
    name = Path(sys.argv[0]).name
    return shlex.join(["unveil" if name == "cli.py" else name, *sys.argv[1:]])


def parse_image_size(text: str) -> tuple[int, int]:
    """'224' or '64x48' (height x width) as two numbers."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) <= MAX_SIDE for part in parts):
        raise ValueError(
            f"--image-size {text!r} is no size: give pixels up to 8192 as 224, or height x width as 64x48."
        )
    return int(parts[0]), int(parts[-1])


def planned(training: Training, options: TrainingOptions) -> Training:
    """A recipe's training with what the user says in its place."""
    given = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "base_lr": options.blr,
        "warmup_epochs": options.warmup_epochs,
        "crop_scale": options.crop_scale,
        "flip": options.flip,
        "ema_decays": options.ema_decays,
    }
    return dataclasses.replace(training, **{name: value for name, value in given.items() if value is not None})


def prepare(
    recipe: Recipe, source: Source, options: TrainingOptions, classes: tuple[str, ...] = (), start: str | None = None
) -> tuple[Recipe, Samples, Run]:
    """What `train` needs for a user's options: pictures are kept in memory if they fit, and are otherwise read by one worker
    for each core; a batch is no larger than the data, and its learning rate goes with it.

    Raises:
        ValueError: an option is out of its range, or the device cannot be used.
    """
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed}: use a whole number from 0 to 2^63 - 1.")
    if not options.save_minutes >= 0:
        raise ValueError(f"--save-minutes {options.save_minutes}: use a number of minutes, at least 0.")
    if options.keep < 1:
        raise ValueError(f"--keep {options.keep}: at least 1 save is kept, to go on from.")
    if Path(options.data).is_dir() and options.out.resolve().is_relative_to(Path(options.data).resolve()):
        raise ValueError(
            f"--out {options.out} lies in {options.data}, where its pictures would be read as data. Choose another directory."
        )
    check_choice("--precision", "precision", options.precision or "fp32", Precision)
    batch_size = min(recipe.training.batch_size, len(source))
    if not 1 <= options.accumulate <= batch_size:
        raise ValueError(
            f"--accumulate {options.accumulate}: a batch of {batch_size} clips can be computed in 1 to {batch_size} pieces."
        )
    fits = decoded_bytes(source) < CACHE_LIMIT
    workers = options.workers
    if workers is None:
        workers = 0 if fits else min(torch.get_num_threads(), len(source))
    if len(source) < recipe.training.batch_size:  # and the learning rate with it
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, batch_size=len(source)))
    device = Spread().device(options.device)
    run = Run(
        data=options.data,
        out=options.out,
        seed=options.seed,
        workers=workers,
        device=device,
        precision=options.precision or ("bf16" if device.startswith("cuda") else "fp32"),
        compile=options.compile,
        save_minutes=options.save_minutes,
        command=command_line(),
        classes=classes,
        start=start,
        accumulate=options.accumulate,
        gradient_checkpointing=options.gradient_checkpointing,
        fsdp=options.fsdp,
        keep=options.keep,
        wandb=options.wandb,
    )
    cache = fits and workers == 0
    # On a CPU it is slower than one by one.
    samples = Samples(source, recipe.clip, run.seed, recipe.training, cache, cache and device.startswith("cuda"))
    return recipe, samples, run
