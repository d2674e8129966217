"""The shipped recipes: each value with its source, or named as our choice where no source confirms one.

MAE       He et al. 2022, arXiv 2111.06377, and its official code
MAE-ST    Feichtenhofer et al. 2022, arXiv 2205.09113, and its official code: MAE of clips
DiffMAE   Wei et al. 2023, arXiv 2304.03283; no official code exists
DiT       Peebles & Xie 2023, arXiv 2212.09748, and its official code
MaskDiT   Zheng et al. 2024, arXiv 2306.09305, and its official code as it is described by others
UMD       Hansen-Estruch et al. 2024, arXiv 2406.17688, and its official code; the `*_umd` are its authors' baselines
"""

import dataclasses
from typing import Unpack

from unveil.config import (
    Branch,
    Condition,
    Decoder,
    DecoderKind,
    Masking,
    Network,
    Predict,
    Schedule,
    ScheduleKind,
    Term,
    TimeKind,
    Training,
    Where,
)
from unveil.recipe import Recipe
from unveil.sizes import (
    ENCODERS,
    LABEL_DROPOUT,
    NANO_TRAINING,
    SMALL_TRAINING,
    UMD_DECODER_DEPTH,
    Shape,
    clip_of,
    decoder_of,
    parse_size,
)


def _training(name: str, epochs: int) -> Training:
    """MAE's ImageNet recipe (its PRETRAIN.md) from Ti on; for DiffMAE, whose own is not confirmed, our choice.

    # Differs from MAE: a running average of the weights is kept, and is what is saved for use; because samples of a
    # diffusion model are better from it. The last weights as trained are in the run's state.pt.
    """
    if name in ("Nano", "Micro"):
        return NANO_TRAINING if name == "Nano" else SMALL_TRAINING
    return Training(epochs=epochs, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40)


def mae(
    size: str = "B/16",
    *,
    patch_norm: bool = True,
    mask_ratio: float = 0.75,
    masking: Masking = "random",
    decoder: DecoderKind = "joint",
    **shape: Unpack[Shape],
) -> Recipe:
    """A masked auto-encoder: 75 % hidden, mask tokens, x0 of hidden tokens.

    patch_norm=True is the published recipe for recognition. Only patch_norm=False can be painted and scored in decibels.
    Values in [0, 1] are normalised by ImageNet's mean and standard deviation (official code); 0.5 and 0.5 for other
    channel counts, and for raw pixels, which then compare with DiffMAE's.
    """
    name, patch_size = parse_size(size)
    return Recipe(
        name="mae" if patch_norm else "mae_raw",
        size=size,
        clip=clip_of(patch_size, 224, imagenet=patch_norm, **shape),
        encoder=ENCODERS[name],
        decoder=decoder_of(name, decoder),
        condition=Condition(),
        branches=(
            Branch(
                mask_ratio=mask_ratio,
                masking=masking,
                noise_on="none",
                terms=(Term(predict="x0", on="hidden", patch_norm=patch_norm),),
            ),
        ),
        schedule=None,
        training=_training(name, epochs=800),
    )


def diffmae(
    size: str = "B/16",
    *,
    mask_ratio: float = 0.75,
    masking: Masking = "random",
    decoder: DecoderKind = "cross_self",
    target: Predict = "x0",
    schedule: ScheduleKind = "linear",
    rho: float = 0.8,
    num_draws: int = 1,
    decode_share: float = 1.0,
    **shape: Unpack[Shape],
) -> Recipe:
    """A diffusion masked auto-encoder: 75 % hidden, noise on the hidden tokens, x0 in raw pixels.

    mask_ratio 0.75 at random: measured from the authors' published pictures. T = 1000: labelled in them. x0 of hidden
    tokens by plain squared error, cross-self decoder connected top-down: secondary sources that quote the paper.
    linear betas with rho = 0.8: two independent implementations. 1,600 epochs: what reviewers of another paper say of
    DiffMAE. Our choice, as no source confirms them: pixels in [-1, 1], time uniform on 1 to 1000 and added once at the
    decoder's input, a LayerNorm for each tap, which blocks are tapped, the decoder's size, and the optimiser.

    num_draws and decode_share are ours: the encoder does not see the noise, so one pass of it serves several, and tokens of a
    `cross` decoder do not see each other, so some of them can be left out; see `Branch`.

    At mask_ratio=1 the model is unconditional. At mask_ratio=0 there is nothing to hand a decoder: the encoder itself
    sees every token with noise and predicts x0, the ablation's plain denoiser.
    """
    name, patch_size = parse_size(size)
    noisy_encoder = mask_ratio == 0
    on: Where = "visible" if noisy_encoder else "hidden"
    return Recipe(
        name="diffmae",
        size=size,
        clip=clip_of(patch_size, 224, **shape),
        encoder=ENCODERS[name],
        decoder=None if noisy_encoder else decoder_of(name, decoder),
        condition=Condition(time="add"),
        branches=(
            Branch(
                mask_ratio=mask_ratio,
                masking=masking,
                noise_on=on,
                num_draws=num_draws,
                decode_share=decode_share,
                terms=(Term(predict=target, on=on),),
            ),
        ),
        schedule=Schedule(kind=schedule, rho=rho),
        training=_training(name, epochs=1600),
    )


def mae_raw(size: str = "B/16", **fields: object) -> Recipe:
    """MAE on raw pixels: what it predicts can be painted and scored."""
    return mae(size, patch_norm=False, **fields)  # type: ignore[arg-type]


def mae_video(size: str = "B/16", *, mask_ratio: float = 0.9, **shape: Unpack[Shape]) -> Recipe:
    """MAE-ST: MAE of clips, 90 % hidden at random in space and time, normalised patches.

    16 frames in tokens of 2; a learned row for each place and for each time; a decoder of four blocks with a class token of
    its own; values normalised by 0.45 and 0.225; gradients clipped to a norm of 0.02, a base rate of 1.6e-3 (official code).
    Crops of half the area and more, 800 passes over the data of which 120 warm up: its second implementation, which draws
    every clip four times in each of 200 epochs. Our choice, as no source confirms it: the batch.
    # Differs from MAE-ST: every frame is predicted and not every other one; not here yet.
    """
    name, _ = parse_size(size)
    recipe = mae(size, mask_ratio=mask_ratio, **{"frames": 16, "tubelet_size": 2, **shape})  # type: ignore[arg-type]
    channels = recipe.clip.channels
    assert recipe.decoder is not None
    training = recipe.training
    if ENCODERS[name].embed_dim >= ENCODERS["Ti"].embed_dim:
        training = dataclasses.replace(
            training, batch_size=512, base_lr=1.6e-3, warmup_epochs=120, grad_clip=0.02, crop_scale=0.5
        )
    return dataclasses.replace(
        recipe,
        name="mae_video",
        clip=dataclasses.replace(recipe.clip, mean=(0.45,) * channels, std=(0.225,) * channels),
        decoder=dataclasses.replace(recipe.decoder, depth=min(4, recipe.decoder.depth), summary="own"),
        network=dataclasses.replace(recipe.network, positions="separable"),
        training=training,
    )


# DiT's blocks: adaLN on norms without parameters, and predictions that start at zero.
DIT_NETWORK = Network(norm="layer_fixed", mlp="gelu_tanh", head_init="zeros")


def _small_generative_training(name: str) -> Training:
    """Our choice: as for the other small recipes, but crops keep 80 % as UMD's do, for a generator paints what it is shown."""
    return NANO_TRAINING if name == "Nano" else dataclasses.replace(SMALL_TRAINING, crop_scale=0.8)


def _dit_training(name: str, epochs: int, batch_size: int) -> Training:
    """DiT's and MaskDiT's: AdamW at 1e-4 throughout, no decay, EMA of 0.9999, whole pictures, half of them mirrored."""
    if name in ("Nano", "Micro"):
        return dataclasses.replace(_small_generative_training(name), label_dropout=LABEL_DROPOUT)
    return Training(
        epochs=epochs,
        batch_size=batch_size,
        base_lr=1e-4 * 256 / batch_size,
        warmup_epochs=0,
        lr_schedule="constant",
        beta2=0.999,
        weight_decay=0.0,
        crop_scale=1.0,
        label_dropout=LABEL_DROPOUT,
    )


def dit(
    size: str = "B/4",
    *,
    num_classes: int = 0,
    **shape: Unpack[Shape],
) -> Recipe:
    """A diffusion transformer: every token carries noise, eps and the sampler's variance are predicted.

    Linear betas, eps with learned variance by the hybrid loss, fixed sin-cos positions, adaLN-zero with the class beside
    the time, batch 256 at 1e-4, 1,400 epochs (7 million steps): official code and its README. Published for latents of an
    auto-encoder with patches of 2; pixels at this geometry are our choice, which makes it comparable with UMD.
    """
    name, patch_size = parse_size(size)
    return Recipe(
        name="dit",
        size=size,
        clip=clip_of(patch_size, 64, **shape),
        encoder=dataclasses.replace(ENCODERS[name], num_class_tokens=0),
        decoder=None,
        network=DIT_NETWORK,
        condition=Condition(time="adaln", num_classes=num_classes),
        branches=(
            Branch(
                mask_ratio=0.0,
                noise_on="visible",
                terms=(Term(predict="eps", on="visible"), Term(predict="variance", on="visible")),
            ),
        ),
        schedule=Schedule(kind="linear"),
        training=_dit_training(name, epochs=1400, batch_size=256),
    )


def maskdit(
    size: str = "B/4",
    *,
    num_classes: int = 0,
    **shape: Unpack[Shape],
) -> Recipe:
    """A masked diffusion transformer: half the tokens carry noise, the other half's noisy values are guessed.

    eps on visible tokens, 0.1 times patch-normalised noisy values on hidden ones, a decoder of 512 x 8 behind an adaLN
    bridge, batch 1,024 at 1e-4, 2 million steps (1,600 epochs): official code, as others describe it. Our choice: a
    prediction of its own for the noisy values.
    # Differs from MaskDiT: DDPM's eps on linear betas; because its EDM preconditioning is known to fail for patches as
    # large as pixels need (JiT, arXiv 2511.13720, table 10), and then it compares with DiT.
    """
    name, patch_size = parse_size(size)
    return Recipe(
        name="maskdit",
        size=size,
        clip=clip_of(patch_size, 64, **shape),
        encoder=dataclasses.replace(ENCODERS[name], num_class_tokens=0),
        decoder=decoder_of(name, "joint"),
        network=DIT_NETWORK,
        condition=Condition(time="adaln", num_classes=num_classes),
        branches=(
            Branch(
                mask_ratio=0.5,
                noise_on="visible",
                terms=(
                    Term(predict="eps", on="visible"),
                    Term(predict="noisy", on="hidden", weight=0.1, patch_norm=True),
                ),
            ),
        ),
        schedule=Schedule(kind="linear"),
        training=_dit_training(name, epochs=1600, batch_size=1024),
    )


def _umd_training(name: str, batch_size: int = 1024) -> Training:
    """The authors' config: norms decay too, gradients clipped, no running average; 40 of 800 epochs of warm-up."""
    if name in ("Nano", "Micro"):
        return _small_generative_training(name)
    return Training(
        epochs=800,
        batch_size=batch_size,
        base_lr=1.5e-4,
        warmup_epochs=40,
        decay_norms=True,
        grad_clip=1.0,
        crop_scale=0.8,
        ema_decays=(),
    )


def _umd_branches(clean_share: float, mask_ratio: float) -> tuple[Branch, ...]:
    """UMD's two: clean with 75 % hidden, and noisy with mask_ratio hidden; eps where there is noise, x0 elsewhere."""
    elsewhere: Where = "hidden" if mask_ratio else "visible"
    noisy = Branch(
        share=1 - clean_share,
        mask_ratio=mask_ratio,
        noise_on="visible",
        terms=(Term(predict="eps", on="visible", weight=0.5), Term(predict="x0", on=elsewhere, weight=0.5)),
    )
    if not clean_share:
        return (noisy,)
    clean = Branch(share=clean_share, mask_ratio=0.75, noise_on="none", terms=(Term(predict="x0", on="hidden"),))
    return clean, noisy


def _umd(
    method: str,
    size: str,
    shape: Shape,
    branches: tuple[Branch, ...],
    *,
    time: TimeKind = "adaln",
    faithful: bool = False,
    batch_size: int = 1024,
) -> Recipe:
    name, patch_size = parse_size(size)
    encoder = ENCODERS[name]
    noisy = any(branch.noise_on == "visible" for branch in branches)
    schedule = Schedule(kind="linear" if shape.get("latents") else "cosine")  # UMD's, for latents and for pixels
    return Recipe(
        name=f"{method}_faithful" if faithful else method,
        size=size,
        clip=clip_of(patch_size, 64, **shape),
        encoder=dataclasses.replace(encoder, num_class_tokens=4, class_token_init="zeros" if faithful else "normal"),
        decoder=Decoder(
            kind="joint",
            embed_dim=encoder.embed_dim,
            depth=UMD_DECODER_DEPTH[name],
            num_heads=encoder.num_heads,
            taps=(encoder.depth,),
            summary="mean",
        ),
        network=Network(mlp="gelu_tanh", positions="learned", head_init="normal"),
        condition=Condition(time=time, trunk="wide"),
        branches=branches,
        schedule=schedule if noisy else None,
        training=_umd_training(name, batch_size),
    )


def umd(
    size: str = "B/4",
    *,
    faithful: bool = False,
    **shape: Unpack[Shape],
) -> Recipe:
    """Unified masked diffusion: half the clips clean and 75 % hidden, half noisy and 37.5 % hidden.

    Everything from the authors' code: cosine betas, x0 on hidden tokens and eps on visible ones at equal weight, a decoder
    as wide as the encoder that is given the mean of four class tokens, learned positions, adaLN-zero in every block.

    Args:
        faithful: start the class tokens at zero, as the authors' code does, so that the four stay one for ever.
            # Differs from UMD's code when False: they start at N(0, 0.02); because four equal tokens are one.
    """
    return _umd("umd", size, shape, _umd_branches(0.5, 0.375), faithful=faithful)


def dit_umd(
    size: str = "B/4",
    **shape: Unpack[Shape],
) -> Recipe:
    """DiT as UMD's authors trained theirs: their network, nothing hidden, half eps and half x0 on every token."""
    return _umd("dit_umd", size, shape, _umd_branches(0.0, 0.0))


def maskdit_umd(
    size: str = "B/4",
    **shape: Unpack[Shape],
) -> Recipe:
    """MaskDiT as UMD's authors trained theirs: their network, half hidden, clean values on the hidden tokens."""
    return _umd("maskdit_umd", size, shape, _umd_branches(0.0, 0.5))


def mae_umd(
    size: str = "B/4",
    *,
    faithful: bool = False,
    **shape: Unpack[Shape],
) -> Recipe:
    """MAE as UMD's authors meant theirs: their network, time as a token that always says clean, raw pixels, batch 4,096.

    Args:
        faithful: what the published command trains instead: it leaves the noisy branch on, so it is UMD without adaLN.
    """
    branches = _umd_branches(0.5, 0.375) if faithful else _umd_branches(0.5, 0.375)[:1]
    if not faithful:
        branches = (dataclasses.replace(branches[0], share=1.0),)
    return _umd("mae_umd", size, shape, branches, time="token", faithful=faithful, batch_size=4096)


def umd_flow(
    size: str = "B/4",
    **shape: Unpack[Shape],
) -> Recipe:
    """UMD with one prediction, our own variant after JiT (arXiv 2511.13720): clean values everywhere, on a straight flow.

    Visible tokens are measured as velocities, hidden ones plainly; the clean branch is t = 0 exactly. Logit-normal times,
    RMSNorm, SwiGLU, qk-norm, rotary positions that are gathered with the mask, and eight tokens that carry the class from
    the second third of the encoder on: JiT's, whose own counts are 32 from block 4 of 12. Our choice: everything of UMD's
    that is not named here, rotary in the decoder too, and equal weights.
    """
    recipe = umd(size, **shape)
    clean, noisy = recipe.branches
    terms = (
        Term(predict="x0", on="visible", weight=0.5, space="v"),
        Term(predict="x0", on="hidden", weight=0.5),
    )
    return dataclasses.replace(
        recipe,
        name="umd_flow",
        network=Network(norm="rms", mlp="swiglu", qk_norm=True, positions="rotary", head_init="zeros"),
        condition=Condition(
            time="adaln", trunk="wide", label_tokens=8, label_tokens_from=recipe.encoder.depth // 3 + 1
        ),
        branches=(clean, dataclasses.replace(noisy, terms=terms)),
        schedule=Schedule(kind="flow"),
    )


def generator(recipe: Recipe, num_classes: int) -> Recipe:
    """A pre-trained recipe as its class-conditional generator: labels, nothing hidden, 5 % clean clips if it had some.

    UMD's authors' fine-tuning for every method of this family: batch 256 at 1.5e-4 for 50 epochs with 2 of warm-up, beta2
    0.999, no decay, a tenth of the labels dropped, crops of at least 95 %, EMA. MAE and UMD keep a share of 5 % clean clips,
    DiT and MaskDiT have none.
    # Differs from UMD's code: EMA's decay is 0.9999 whatever the batch, theirs is 1 - 1e-4 * batch / 256; and it grows to
    # that over the first steps instead of starting from the loaded weights; because short runs would keep their first ones.

    Raises:
        ValueError: the recipe has no place where noise and classes could enter.
    """
    told = recipe.condition
    if told.time not in ("token", "adaln"):
        raise ValueError(
            f"{recipe.name} cannot become a generator: its encoder was never told how much noise there is. "
            "Pre-train umd, umd_flow, dit, maskdit, or one of dit_umd, maskdit_umd, mae_umd."
        )
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}; a class-conditional generator has at least one class.")
    clean = recipe.branch_on("none")
    noisy = recipe.branch_on("visible")
    terms = (
        [Term(predict=t.predict, on="visible", weight=t.weight, space=t.space) for t in noisy.terms] if noisy else []
    )
    unique: dict[str, Term] = {}
    for term in terms:
        if term.predict != "noisy":
            unique.setdefault(term.predict, term)  # the first of each, which is the one on visible tokens
    whole = tuple(unique.values()) if unique else _umd_branches(0.0, 0.0)[0].terms
    if len(whole) == 1:  # what shared its weight with terms on hidden tokens now stands alone
        whole = (dataclasses.replace(whole[0], weight=1.0),)
    share = 0.05 if clean else 0.0
    branches = (
        *([dataclasses.replace(clean, share=share)] if clean else []),
        Branch(share=1 - share, mask_ratio=0.0, noise_on="visible", terms=whole),
    )
    small = recipe.encoder.embed_dim < ENCODERS["Ti"].embed_dim  # whatever batch it was pre-trained with
    training = Training(
        epochs=50,
        batch_size=64 if small else 256,
        base_lr=SMALL_TRAINING.base_lr if small else 1.5e-4,
        warmup_epochs=1 if small else 2,
        beta2=0.999,
        weight_decay=0.0,
        decay_norms=recipe.training.decay_norms,
        grad_clip=1.0,
        crop_scale=1.0 if recipe.training.crop_scale == 1 else 0.95,
        flip=recipe.training.flip,
        label_dropout=LABEL_DROPOUT,
        ema_decays=(0.999,) if small else (0.9999,),
    )
    return dataclasses.replace(
        recipe,
        name=recipe.name if recipe.name.endswith("_finetune") else f"{recipe.name}_finetune",
        condition=dataclasses.replace(told, num_classes=num_classes),
        branches=branches,
        schedule=recipe.schedule or Schedule(kind="cosine" if recipe.clip.bounded else "linear"),
        training=training,
    )


def umd_finetune(
    size: str = "B/4", *, num_classes: int = 1000, faithful: bool = False, **shape: Unpack[Shape]
) -> Recipe:
    """UMD as a class-conditional generator: `generator` of `umd`."""
    return generator(umd(size, faithful=faithful, **shape), num_classes)


RECIPES = {
    "diffmae": diffmae,
    "mae": mae,
    "mae_raw": mae_raw,
    "mae_video": mae_video,
    "dit": dit,
    "maskdit": maskdit,
    "umd": umd,
    "umd_flow": umd_flow,
    "dit_umd": dit_umd,
    "maskdit_umd": maskdit_umd,
    "mae_umd": mae_umd,
    "umd_finetune": umd_finetune,
}
