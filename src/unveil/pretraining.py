"""What a user may ask of a pre-training, and all that it needs then: `unveil pretrain` runs it, `unveil plan` foretells it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from unveil import recipes, sizes
from unveil.checkpoint import load_encoder
from unveil.config import DecoderKind, Masking, ScheduleKind
from unveil.data import Samples, source_for
from unveil.planning import TrainingOptions, parse_image_size, planned, prepare
from unveil.recipe import Recipe
from unveil.rundir import Run
from unveil.start import carry_over, starting_from

RecipeName = Literal[
    "diffmae", "mae", "mae_raw", "mae_video", "umd", "umd_flow", "dit", "maskdit", "dit_umd", "maskdit_umd", "mae_umd"
]


@dataclass(frozen=True, kw_only=True)
class PretrainingOptions(TrainingOptions):
    """What a user may say of a pre-training."""

    recipe: RecipeName = "diffmae"
    """diffmae: paints and represents. mae: normalised patches, represents. mae_raw: raw pixels, one-step painting.
    mae_video: MAE of clips (MAE-ST), represents. umd:
    represents and generates. umd_flow: the same with one prediction. dit, maskdit: generate. dit_umd, maskdit_umd,
    mae_umd: these methods in UMD's network, to compare with it."""
    size: str | None = None
    """Encoder and patch size, as in B/16: Nano, Micro, Ti, S, B, L, H or XL. Default: that of --init; else B/16,
    B/4 for umd and the others that generate; Nano/2 for digits, Nano/4 for moving-digits."""
    image_size: str | None = None
    """Height and width in pixels, one number or 64x48. Default 224, 64 for umd and the others that
    generate; 8 for digits, 24 for moving-digits."""
    channels: int | None = None
    """Channels of the pictures: 3 colour, 1 gray, others from .npy arrays. Default 3; 1 for the digits."""
    frames: int | None = None
    """Frames of a clip. Default 1, a picture; 16 for mae_video, 8 for moving-digits."""
    tubelet_size: int | None = None
    """Frames in one token. Default 1; 2 for mae_video and moving-digits."""

    mask_ratio: float | None = None
    """Share of tokens that is hidden, 0 to 1. Default 0.75; 0.9 for mae_video."""
    masking: Masking | None = None
    """random over space and time (default), tube (the same places in every frame), or the center block."""
    decoder: DecoderKind | None = None
    """cross_self (DiffMAE's default), cross, or joint (MAE's)."""
    schedule: ScheduleKind | None = None
    """Noise schedule of diffmae. Default linear."""
    rho: float | None = None
    """Exponent on the schedule's betas; below 1 is noisier. Default 0.8."""
    target: Literal["x0", "eps"] | None = None
    """What diffmae predicts: x0, clean values (default), or eps, the noise."""
    num_draws: int | None = None
    """Noises and times that each encoded picture of diffmae is decoded for; the encoder works once. Default 1."""
    decode_share: float | None = None
    """Share of the hidden tokens that diffmae decodes, others in each draw; needs --decoder cross. Default 1."""
    faithful: bool = False
    """umd, mae_umd: as the authors' code does it, with what docs/umd.md names as its flaws."""
    labels: bool = False
    """Train with the classes of the data, for dit, maskdit and the others that generate. Default: without."""
    init: Path | None = None
    """A run or weights file to start from, also one of an encoder only: all tensors of the same name and shape are its. The
    encoder must be of the same size; its normalisation and kind of positions are taken. Default: drawn weights."""


BUILT_IN = {
    "digits": {"size": "Nano/2", "image_size": "8", "channels": 1},
    "moving-digits": {"size": "Nano/4", "image_size": "24", "channels": 1, "frames": 8, "tubelet_size": 2},
}


def recipe_of(options: PretrainingOptions) -> Recipe:
    """The recipe that the options name, with the fields replaced that they give."""
    built_in = BUILT_IN.get(options.data.partition(":")[0], {})
    default_side = "224" if options.recipe in ("diffmae", "mae", "mae_raw", "mae_video") else "64"
    height, width = parse_image_size(options.image_size or built_in.get("image_size", default_side))
    shape: dict[str, Any] = {"height": height, "width": width}
    for name in ("channels", "frames", "tubelet_size"):
        value = getattr(options, name)
        shape[name] = built_in.get(name) if value is None else value
    ratio = {"mask_ratio": options.mask_ratio}
    masks = {name: getattr(options, name) for name in ("masking", "decoder")}
    diffusion = {name: getattr(options, name) for name in ("schedule", "rho", "target", "num_draws", "decode_share")}
    fidelity = {"faithful": options.faithful or None}
    for belongs_to, given in (
        (("diffmae", "mae", "mae_raw", "mae_video"), ratio),
        (("diffmae", "mae", "mae_raw"), masks),
        (("diffmae",), diffusion),
        (("umd", "mae_umd"), fidelity),
    ):
        for name, value in given.items():
            if value is not None and options.recipe not in belongs_to:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} belongs to {' and '.join(belongs_to)}; {options.recipe} has it fixed "
                    "or has no such thing. Drop it, or use one of these."
                )
    given = {
        name: value for name, value in {**shape, **ratio, **masks, **diffusion, **fidelity}.items() if value is not None
    }
    recipe = recipes.RECIPES[options.recipe](
        options.size or built_in.get("size", "B/16" if default_side == "224" else "B/4"), **given
    )
    training = recipe.training
    if built_in:  # digits at any size are augmented as the size meant for them is
        nano = sizes.NANO_TRAINING
        training = dataclasses.replace(training, flip=nano.flip, crop_scale=nano.crop_scale)
    return dataclasses.replace(recipe, training=planned(training, options))


class Pretraining(NamedTuple):
    """What a pre-training needs.

    initial: tensors to start from in place of the drawn ones. start: with --init, the recipe of the weights that it starts
    from ("start"), and what becomes of them, see `unveil.start.carry_over`; else empty.
    """

    recipe: Recipe
    samples: Samples
    run: Run
    initial: dict[str, Tensor] | None
    start: dict[str, Any]


def pretraining_of(options: PretrainingOptions) -> Pretraining:
    """What the options ask for; opens the data and reads the weights of --init.

    Raises:
        ValueError: an option cannot be, alone or with the others or with the data.
    """
    loaded = None if options.init is None else load_encoder(options.init)
    if loaded is not None and options.size is None and options.data.partition(":")[0] not in BUILT_IN:
        options = dataclasses.replace(options, size=loaded[0].recipe.size)
    recipe = recipe_of(options)
    if loaded is not None:
        recipe = starting_from(recipe, loaded[0].recipe)
    if options.labels and recipe.noise_on != "visible":
        raise ValueError(
            f"--labels, but {recipe.name} as it is asked for here cannot be told a class: that takes an encoder that sees "
            "noise. Drop it, or use umd, umd_flow, dit, maskdit, dit_umd or maskdit_umd."
        )
    source = source_for(options.data, recipe.clip, labelled=options.labels)
    classes = tuple(source.classes or ()) if options.labels else ()
    if classes:
        told = dataclasses.replace(recipe.condition, num_classes=len(classes))
        training = dataclasses.replace(recipe.training, label_dropout=sizes.LABEL_DROPOUT)
        recipe = dataclasses.replace(recipe, condition=told, training=training)
    if loaded is None:
        return Pretraining(*prepare(recipe, source, options, classes), None, {})
    model, about = loaded
    initial, report = carry_over(model, recipe, about.classes == classes)
    start = {"start": f"{model.recipe.name} {model.recipe.size}", **report}
    return Pretraining(*prepare(recipe, source, options, classes, start=str(options.init)), initial, start)
