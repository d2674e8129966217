"""Names of sizes, and what they stand for: encoders, decoders, and the training of small models."""

import dataclasses
import math
from typing import TypedDict, Unpack

from unveil.config import Clip, Decoder, DecoderKind, Encoder, Training, nearest


class Shape(TypedDict, total=False):
    """What a recipe's clips look like: 3 channels, one frame, square, tubelets of 1, pixels, unless given.

    latents: what an autoencoder made of pictures, taken as it is and never cut to a range.
    """

    channels: int
    frames: int
    height: int
    width: int | None
    tubelet_size: int
    latents: bool


# Ti to H are the ViT papers' sizes, and S to L those of DiT and UMD as well. Nano and Micro are ours, for pictures of 8
# to 64 pixels on a CPU.
ENCODERS = {
    "Nano": Encoder(embed_dim=96, depth=4, num_heads=4),
    "Micro": Encoder(embed_dim=144, depth=6, num_heads=3),
    "Ti": Encoder(embed_dim=192, depth=12, num_heads=3),
    "S": Encoder(embed_dim=384, depth=12, num_heads=6),
    "B": Encoder(embed_dim=768, depth=12, num_heads=12),
    "L": Encoder(embed_dim=1024, depth=24, num_heads=16),
    "H": Encoder(embed_dim=1280, depth=32, num_heads=16),
    "XL": Encoder(embed_dim=1152, depth=28, num_heads=16),  # DiT's
}

# (width, depth, heads). 512 x 8 with 16 heads is MAE's decoder for B, L and H; the others are our choice. That DiffMAE's
# decoder has the same size is not confirmed by a source at hand.
DECODERS = {"Nano": (64, 2, 4), "Micro": (96, 3, 3), "Ti": (192, 4, 3), "S": (256, 8, 8)}
MAE_DECODER = (512, 8, 16)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Blocks of UMD's decoder, which is as wide as its encoder; those of S, B and L are the authors', the others our choice.
UMD_DECODER_DEPTH = {"Nano": 2, "Micro": 2, "Ti": 4, "S": 4, "B": 4, "L": 8, "H": 8, "XL": 8}

# Our choice, for thousands to tens of thousands of small pictures on a CPU or one GPU. Measured on digits (results/LOG.md).
SMALL_TRAINING = Training(
    epochs=100, batch_size=64, base_lr=6e-3, warmup_epochs=1, crop_scale=0.4, flip=True, ema_decays=(0.999,)
)
# Nano is for digits: eight pixels leave nothing to crop, and a mirrored 2 is no 2.
NANO_TRAINING = dataclasses.replace(SMALL_TRAINING, crop_scale=1.0, flip=False)


LABEL_DROPOUT = 0.1  # DiT's and UMD's, for models with classes; without it there is no guidance


def stage_ends(encoder_depth: int, decoder_depth: int) -> tuple[int, ...]:
    """The ends of decoder_depth equal stages of the encoder, deepest first: 24, 21, ..., 3 for 8 of 24.

    Our choice: which encoder blocks DiffMAE's shorter decoder reads is not confirmed by a source at hand.
    """
    return tuple(math.ceil(encoder_depth * (decoder_depth - i) / decoder_depth) for i in range(decoder_depth))


def parse_size(size: str) -> tuple[str, int]:
    name, _, patch = size.partition("/")
    if name not in ENCODERS:
        raise ValueError(
            f"Unknown size {size!r}: write a name and a patch size, as in 'B/16'. {nearest(name, ENCODERS)}"
        )
    if not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"Size {size!r} lacks its patch size in pixels: write it as in '{name}/16'.")
    return name, int(patch)


def clip_of(patch_size: int, default_side: int, imagenet: bool = False, **shape: Unpack[Shape]) -> Clip:
    """A recipe's clip of a given shape; ImageNet's mean and deviation for three channels if asked for, else 0.5.

    Latents are not normalised, and not bounded.
    """
    unknown = shape.keys() - Shape.__annotations__
    if unknown:
        raise ValueError(
            f"There is no argument {sorted(unknown)[0]!r} of a recipe. {nearest(sorted(unknown)[0], Shape.__annotations__)}"
        )
    channels, height = shape.get("channels", 3), shape.get("height", default_side)
    width, latents = shape.get("width"), shape.get("latents", False)
    mean, std = ((0.0,) * channels, (1.0,) * channels) if latents else ((0.5,) * channels,) * 2
    if imagenet and channels == 3 and not latents:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return Clip(
        channels=channels,
        frames=shape.get("frames", 1),
        height=height,
        width=height if width is None else width,
        patch_size=patch_size,
        tubelet_size=shape.get("tubelet_size", 1),
        mean=mean,
        std=std,
        bounded=not latents,
    )


def decoder_of(name: str, kind: DecoderKind) -> Decoder:
    embed_dim, depth, num_heads = DECODERS.get(name, MAE_DECODER)
    encoder_depth = ENCODERS[name].depth
    taps = (encoder_depth,) if kind == "joint" else stage_ends(encoder_depth, depth)
    return Decoder(kind=kind, embed_dim=embed_dim, depth=depth, num_heads=num_heads, taps=taps)
