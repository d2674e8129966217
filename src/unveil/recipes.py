"""The shipped recipes: each value with its source, or named as our choice where no source confirms one.

MAE       He et al. 2022, arXiv 2111.06377, and its official code
DiffMAE   Wei et al. 2023, arXiv 2304.03283; no official code exists
"""

import dataclasses
import math

from unveil.config import (
    Branch,
    Clip,
    Decoder,
    DecoderKind,
    Encoder,
    Masking,
    Recipe,
    Schedule,
    ScheduleKind,
    Target,
    Training,
    nearest,
)

# Ti to H are the ViT papers' sizes. Nano and Micro are ours, for pictures of 8 to 64 pixels on a CPU.
ENCODERS = {
    "Nano": Encoder(embed_dim=96, depth=4, num_heads=4),
    "Micro": Encoder(embed_dim=144, depth=6, num_heads=3),
    "Ti": Encoder(embed_dim=192, depth=12, num_heads=3),
    "S": Encoder(embed_dim=384, depth=12, num_heads=6),
    "B": Encoder(embed_dim=768, depth=12, num_heads=12),
    "L": Encoder(embed_dim=1024, depth=24, num_heads=16),
    "H": Encoder(embed_dim=1280, depth=32, num_heads=16),
}

# (width, depth, heads). 512 x 8 with 16 heads is MAE's decoder for B, L and H; the others are our choice. That DiffMAE's
# decoder has the same size is not confirmed by a source at hand.
DECODERS = {"Nano": (64, 2, 4), "Micro": (96, 3, 3), "Ti": (192, 4, 3), "S": (256, 8, 8)}
MAE_DECODER = (512, 8, 16)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Our choice, for thousands to tens of thousands of small pictures on a CPU or one GPU. Measured on digits (results/LOG.md).
SMALL_TRAINING = Training(
    epochs=100, batch_size=64, base_lr=6e-3, warmup_epochs=1, crop_scale=0.4, flip=True, ema_decay=0.999
)
# Nano is for digits: eight pixels leave nothing to crop, and a mirrored 2 is no 2.
NANO_TRAINING = dataclasses.replace(SMALL_TRAINING, crop_scale=1.0, flip=False)


def stage_ends(encoder_depth: int, decoder_depth: int) -> tuple[int, ...]:
    """The ends of decoder_depth equal stages of the encoder, deepest first: 24, 21, ..., 3 for 8 of 24.

    Our choice: which encoder blocks DiffMAE's shorter decoder reads is not confirmed by a source at hand.
    """
    return tuple(math.ceil(encoder_depth * (decoder_depth - i) / decoder_depth) for i in range(decoder_depth))


def _parse_size(size: str) -> tuple[str, int]:
    name, _, patch = size.partition("/")
    if name not in ENCODERS:
        raise ValueError(
            f"Unknown size {size!r}: write a name and a patch size, as in 'B/16'. {nearest(name, ENCODERS)}"
        )
    if not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"Size {size!r} lacks its patch size in pixels: write it as in '{name}/16'.")
    return name, int(patch)


def _clip(
    channels: int, frames: int, height: int, width: int | None, patch_size: int, tubelet_size: int, imagenet: bool
) -> Clip:
    rgb = imagenet and channels == 3
    return Clip(
        channels=channels,
        frames=frames,
        height=height,
        width=height if width is None else width,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        mean=IMAGENET_MEAN if rgb else (0.5,) * channels,
        std=IMAGENET_STD if rgb else (0.5,) * channels,
    )


def _decoder(name: str, kind: DecoderKind) -> Decoder:
    embed_dim, depth, num_heads = DECODERS.get(name, MAE_DECODER)
    encoder_depth = ENCODERS[name].depth
    taps = (encoder_depth,) if kind == "joint" else stage_ends(encoder_depth, depth)
    return Decoder(kind=kind, embed_dim=embed_dim, depth=depth, num_heads=num_heads, taps=taps)


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
    channels: int = 3,
    frames: int = 1,
    height: int = 224,
    width: int | None = None,
    tubelet_size: int = 1,
    patch_norm: bool = True,
    mask_ratio: float = 0.75,
    masking: Masking = "random",
    decoder: DecoderKind = "joint",
) -> Recipe:
    """A masked auto-encoder: 75 % hidden, mask tokens, x0 of hidden tokens.

    patch_norm=True is the published recipe for recognition. Only patch_norm=False can be painted and scored in decibels.
    Values in [0, 1] are normalised by ImageNet's mean and standard deviation (official code); 0.5 and 0.5 for other
    channel counts, and for raw pixels, which then compare with DiffMAE's.
    """
    name, patch_size = _parse_size(size)
    return Recipe(
        name="mae" if patch_norm else "mae_raw",
        size=size,
        clip=_clip(channels, frames, height, width, patch_size, tubelet_size, imagenet=patch_norm),
        encoder=ENCODERS[name],
        decoder=_decoder(name, decoder),
        branch=Branch(mask_ratio=mask_ratio, masking=masking, noise_on="none", patch_norm=patch_norm),
        schedule=None,
        training=_training(name, epochs=800),
    )


def diffmae(
    size: str = "B/16",
    *,
    channels: int = 3,
    frames: int = 1,
    height: int = 224,
    width: int | None = None,
    tubelet_size: int = 1,
    mask_ratio: float = 0.75,
    masking: Masking = "random",
    decoder: DecoderKind = "cross_self",
    target: Target = "x0",
    schedule: ScheduleKind = "linear",
    rho: float = 0.8,
) -> Recipe:
    """A diffusion masked auto-encoder: 75 % hidden, noise on the hidden tokens, x0 in raw pixels.

    mask_ratio 0.75 at random: measured from the authors' published pictures. T = 1000: labelled in them. x0 of hidden
    tokens by plain squared error, cross-self decoder connected top-down: secondary sources that quote the paper.
    linear betas with rho = 0.8: two independent implementations. 1,600 epochs: what reviewers of another paper say of
    DiffMAE. Our choice, as no source confirms them: pixels in [-1, 1], time uniform on 1 to 1000 and added once at the
    decoder's input, a LayerNorm for each tap, which blocks are tapped, the decoder's size, and the optimiser.

    At mask_ratio=1 the model is unconditional. At mask_ratio=0 there is nothing to hand a decoder: the encoder itself
    sees every token with noise and predicts x0, the ablation's plain denoiser.
    """
    name, patch_size = _parse_size(size)
    noisy_encoder = mask_ratio == 0
    return Recipe(
        name="diffmae",
        size=size,
        clip=_clip(channels, frames, height, width, patch_size, tubelet_size, imagenet=False),
        encoder=ENCODERS[name],
        decoder=None if noisy_encoder else _decoder(name, decoder),
        branch=Branch(
            mask_ratio=mask_ratio, masking=masking, noise_on="visible" if noisy_encoder else "hidden", target=target
        ),
        schedule=Schedule(kind=schedule, rho=rho),
        training=_training(name, epochs=1600),
    )


def mae_raw(size: str = "B/16", **fields: object) -> Recipe:
    """MAE on raw pixels: what it predicts can be painted and scored."""
    return mae(size, patch_norm=False, **fields)  # type: ignore[arg-type]


RECIPES = {"diffmae": diffmae, "mae": mae, "mae_raw": mae_raw}
