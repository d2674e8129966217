"""Published masked auto-encoders of clips as ours: MAE-ST's own files, and Hugging Face's VideoMAE.

MAE-ST becomes a whole `mae_video` if it predicts every frame, and else an encoder. VideoMAE becomes an encoder: its decoder
predicts patches that are normalised channel by channel, which no recipe here does.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unveil import recipes
from unveil.config import Clip, Decoder, Encoder
from unveil.convert_vit import (
    DECODER_HEADS,
    HEADS,
    HF_NORM_EPS,
    VIT_HEADS,
    Told,
    heads_of,
    normalisation_of,
    take_block,
    take_linear,
    take_norm,
    timms_name,
)
from unveil.foreign import Report, Source, State, side_of, size_of
from unveil.recipe import Recipe

# Of the published VideoMAEs, whose positions are in no file: frames, and pixels on a side.
VIDEOMAE_CLIP = (16, 224)


def _patches(source: Source) -> tuple[int, int, int, int]:
    """The patch embedding of clips, a convolution: width, channels, tubelet and patch size."""
    D, C, u, p, _ = source.sizes("patch_embed.proj.weight", 5)
    kernel = source.take("patch_embed.proj.weight", D, C, u, p, p)
    source.state["encoder.patch_embed.proj.weight"] = kernel.permute(0, 2, 3, 4, 1).flatten(1)
    source.state["encoder.patch_embed.proj.bias"] = source.take("patch_embed.proj.bias", D)
    return D, C, u, p


def _recipe(clip: Clip, encoder: Encoder, *, patch_norm: bool = True) -> Recipe:
    known, size = size_of(encoder.embed_dim, encoder.depth, encoder.num_heads, clip.patch_size)
    shape = {"height": clip.height, "channels": clip.channels, "frames": clip.frames, "tubelet_size": clip.tubelet_size}
    recipe = recipes.mae_video(known, **shape)  # type: ignore[arg-type]
    assert recipe.decoder is not None
    (branch,) = recipe.branches
    term = dataclasses.replace(branch.terms[0], patch_norm=patch_norm)
    return dataclasses.replace(
        recipe,
        size=size,
        clip=clip,
        encoder=encoder,
        decoder=dataclasses.replace(recipe.decoder, taps=(encoder.depth,)),
        branches=(dataclasses.replace(branch, terms=(term,)),),
    )


def _separable(source: Source, prefix: str, D: int, grid: tuple[int, int, int], ours: str) -> Tensor:
    """Take the positions of a part of MAE-ST; returns the row of its class token, (1, 1, D)."""
    source.state[f"{ours}.pos_space"] = source.take(f"{prefix}pos_embed_spatial", 1, grid[1] * grid[2], D)[0]
    source.state[f"{ours}.pos_time"] = source.take(f"{prefix}pos_embed_temporal", 1, grid[0], D)[0]
    return source.take(f"{prefix}pos_embed_class", 1, 1, D)


def from_mae_st(tensors: Mapping[str, Tensor], *, given: Told | None = None) -> tuple[Recipe, State, Report, list[str]]:
    """MAE-ST's published model: separable learned positions, a class token, and a decoder with a class token of its own.

    Assumed: square frames, and LayerNorm's eps of 1e-6, which no tensor tells.

    Args:
        given: what the user says.

    Returns:
        The recipe, the tensors for a model of it, what became of theirs, and sentences on what was assumed.

    Raises:
        ValueError: a parameter is missing, unknown, or of another shape than the others make it; or nothing tells the heads.
    """
    given = given or Told()
    source = Source("mae_st", tensors)
    letters = {"q": "query", "k": "key", "v": "value"}
    source.rename(
        {
            n: re.sub(r"\.attn\.([qkv])\.(weight|bias)$", lambda m: f".attn.{letters[m[1]]}.{m[2]}", n)
            for n in source.values
        }
    )
    source.drop([n for n in source.values if HEADS.fullmatch(n)], "a head behind the features, which are what is kept")

    D, C, u, p = _patches(source)
    side = side_of("pos_embed_spatial", source.sizes("pos_embed_spatial", 3)[1])
    grid = (source.sizes("pos_embed_temporal", 3)[1], side, side)
    depth = source.depth(r"blocks\.(\d+)\.")
    encoder = Encoder(
        embed_dim=D, depth=depth, num_heads=heads_of(given.num_heads, VIT_HEADS, D, "encoder", "--num-heads")
    )
    mean, std, why = normalisation_of(given, Told(), "mae_st", C)
    notices = [f"Pixels are normalised by mean {mean} and std {std}: {why}."]
    clip = Clip(
        channels=C, frames=grid[0] * u, height=side * p, width=side * p, patch_size=p, tubelet_size=u, mean=mean, std=std
    )  # fmt: skip
    source.state["encoder.cls_token"] = source.take("cls_token", 1, 1, D) + _separable(
        source, "", D, grid, "encoder.positions"
    )
    for i in range(depth):
        take_block(source, f"blocks.{i}", f"encoder.blocks.{i}", D)
    take_norm(source, "norm", "encoder.norm", D)

    predicted = source.values["decoder_pred.weight"].shape[0] if "decoder_pred.weight" in source.values else 0
    whole = predicted == clip.token_dim
    if predicted and not whole:
        decoder = [name for name in source.values if name.startswith("decoder_") or name == "mask_token"]
        frames = predicted / (p * p * C) / u * clip.frames
        source.drop(decoder, f"it predicts {frames:g} of {clip.frames} frames, which no recipe here does yet")
    if whole and given.patch_norm is None:
        notices.append(
            "Taken for a MAE of normalised patches, since no file says it; --no-patch-norm if it predicts pixels."
        )
    recipe = _recipe(clip, encoder, patch_norm=given.patch_norm is not False)
    if whole:
        recipe = dataclasses.replace(recipe, decoder=_decoder(source, given, grid, clip.token_dim, encoder))
    else:
        what = "Its decoder was left" if predicted else "It has no decoder"
        notices.append(
            f"{what}, so MAE-ST's encoder alone was written: for probe, embed, finetune and pretrain --init."
        )
    return *source.finish(recipe, () if whole else ("encoder",)), notices


def _decoder(source: Source, given: Told, grid: tuple[int, int, int], token_dim: int, encoder: Encoder) -> Decoder:
    W, _ = source.sizes("decoder_embed.weight", 2)
    depth = source.depth(r"decoder_blocks\.(\d+)\.")
    heads = heads_of(given.decoder_heads, DECODER_HEADS, W, "decoder", "--decoder-heads")
    if encoder.embed_dim != W:  # between equal widths there is no map here, and the file's has no place
        take_linear(source, "decoder_embed", "decoder.embed", encoder.embed_dim, W)
    source.state["decoder.mask_token"] = source.take("mask_token", 1, 1, W)
    source.state["decoder.cls_token"] = source.take("decoder_cls_token", 1, 1, W) + _separable(
        source, "decoder_", W, grid, "decoder.positions"
    )
    for i in range(depth):
        take_block(source, f"decoder_blocks.{i}", f"decoder.blocks.{i}", W)
    take_norm(source, "decoder_norm", "head.norm", W)
    take_linear(source, "decoder_pred", "head.pred.x0", W, token_dim)
    return Decoder(kind="joint", embed_dim=W, depth=depth, num_heads=heads, taps=(encoder.depth,), summary="own")


def sinusoids_of_all(num_tokens: int, embed_dim: int) -> Tensor:
    """VideoMAE's fixed positions, (N, D): sine and cosine of a token's number in turn, whatever its row and column.

    Tong et al. 2022, arXiv 2203.12602, as Hugging Face has it; made in float64 and cast once.
    """
    rates = 10000.0 ** -(torch.arange(embed_dim, dtype=torch.float64) // 2 * 2 / embed_dim)
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float64), rates)
    shift = torch.arange(embed_dim, dtype=torch.float64) % 2 * math.pi / 2  # cos x = sin(x + pi / 2)
    return (angles + shift).sin().float()


def from_videomae(
    tensors: Mapping[str, Tensor], *, given: Told | None = None, config: Told | None = None
) -> tuple[Recipe, State, Report, list[str]]:
    """The encoder of Hugging Face's VideoMAEModel or VideoMAEForPreTraining. Keys have no bias, which is one of zeros here.

    Args:
        given, config: what the user says, and what the file's config.json does.

    Returns:
        As `from_mae_st`.

    Raises:
        ValueError: as `from_mae_st`; or the encoder has no last norm, as a fine-tuned one, which norms the mean of its tokens.
    """
    given, config = given or Told(), config or Told()
    source = Source("videomae", tensors)
    decoder = [n for n in source.values if n.startswith(("decoder.", "encoder_to_decoder.")) or n == "mask_token"]
    source.drop(decoder, "the decoder, which predicts patches normalised channel by channel; no recipe here does")
    source.rename(
        {
            name: timms_name(name.removeprefix("videomae.")).replace(".attention.attention.", ".attn.")
            for name in source.values
        }
    )
    source.drop([n for n in source.values if HEADS.fullmatch(n)], "a head behind the features, which are what is kept")
    if "norm.weight" not in source.values:
        raise ValueError(
            "The file's encoder has no last norm ('layernorm.weight'): with use_mean_pooling, as fine-tuned VideoMAEs have it, "
            "the mean of the tokens is normed instead, behind the encoder. Give one with use_mean_pooling=False."
        )
    D, C, u, p = _patches(source)
    depth = source.depth(r"blocks\.(\d+)\.")
    num_heads = heads_of(given.num_heads or config.num_heads, VIT_HEADS, D, "encoder", "--num-heads")
    mean, std, why = normalisation_of(given, config, "videomae", C)
    notices = [f"Pixels are normalised by mean {mean} and std {std}: {why}."]
    frames, side = config.frames or VIDEOMAE_CLIP[0], config.side or VIDEOMAE_CLIP[1]
    if config.frames is None or config.side is None:
        notices.append(
            f"Taken for a model of {frames} frames of {side} x {side}, as the published ones; no file says it."
        )
    clip = Clip(
        channels=C, frames=frames, height=side, width=side, patch_size=p, tubelet_size=u, mean=mean, std=std
    )  # fmt: skip
    for i in range(depth):
        take_block(source, f"blocks.{i}", f"encoder.blocks.{i}", D)
    take_norm(source, "norm", "encoder.norm", D)
    source.state["encoder.positions.pos_embed"] = sinusoids_of_all(clip.num_tokens, D)
    recipe = _recipe(clip, Encoder(embed_dim=D, depth=depth, num_heads=num_heads, num_class_tokens=0))
    assert recipe.decoder is not None
    recipe = dataclasses.replace(
        recipe,
        name="videomae",
        decoder=dataclasses.replace(recipe.decoder, summary="tokens"),
        network=dataclasses.replace(
            recipe.network, norm_eps=given.norm_eps or config.norm_eps or HF_NORM_EPS, positions="learned"
        ),
        branches=tuple(dataclasses.replace(branch, masking="tube") for branch in recipe.branches),
    )
    notices += [
        "Its positions are one sinusoid over all tokens, so they were kept as learned ones.",
        "VideoMAE's encoder alone was written: for probe, embed, finetune and pretrain --init.",
    ]
    return *source.finish(recipe, ("encoder",)), notices
