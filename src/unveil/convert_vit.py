"""Published masked auto-encoders and plain ViTs as ours: MAE's own files, timm's and Hugging Face's.

Sizes are read from the shapes. What shapes do not tell (heads, eps, normalisation) comes from the user, from the config.json
beside the file, or is what the published models have, and is told in this order. Positions that are MAE's fixed table are
not kept, all others become learned ones; the class token's own position is added to the class token.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unveil import recipes, sizes
from unveil.config import Decoder, Encoder
from unveil.foreign import HF_BLOCK, NAMES, Kind, Report, Source, State, is_hugging_face, side_of, size_of
from unveil.recipe import Recipe
from unveil.tokens import sincos_positions

# Heads of the published widths: the ViT papers' Ti to H, and MAE's decoder.
VIT_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}
# What Hugging Face's configs mean by saying nothing, in both of their classes.
HF_NORM_EPS = 1e-12
HF_MODELS = {"vit", "vit_mae", "videomae"}
HEADS = re.compile(r"(head|fc|classifier|pooler\.dense)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What somebody says of a file beside its tensors; None for what is not said.

    num_heads, decoder_heads: of the two parts. norm_eps: of every norm. patch_norm: whether predictions are of normalised
    patches. mean, std: by which pixels in [0, 1] were normalised, one number for each channel. frames, side: of VideoMAE's
    clips, which its tensors do not tell.
    """

    num_heads: int | None = None
    decoder_heads: int | None = None
    norm_eps: float | None = None
    patch_norm: bool | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    frames: int | None = None
    side: int | None = None


def read_config(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Told:
    """What the config.json of Hugging Face or timm says, and the preprocessor_config.json of the former.

    Raises:
        ValueError: of a model that cannot be expressed here, or with values of the wrong type.
    """
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if "architecture" in config:  # timm's
        of_timm = config.get("pretrained_cfg", config)
        if not isinstance(of_timm, dict):
            raise ValueError(f"config.json says pretrained_cfg={of_timm!r}, which is no section with mean and std.")
        mean, std = of_timm.get("mean", mean), of_timm.get("std", std)
    try:
        numbers = [None if v is None else tuple(float(x) for x in v) for v in (mean, std)]
    except (TypeError, ValueError):
        raise ValueError(
            f"The file's config has mean={mean!r} and std={std!r}, which are no lists of numbers."
        ) from None
    told = Told(mean=numbers[0], std=numbers[1])
    if "model_type" not in config:
        return told
    for name, kind in (
        ("num_attention_heads", int),
        ("decoder_num_attention_heads", int),
        ("layer_norm_eps", int | float),
        ("num_frames", int),
    ):
        if not isinstance(config.get(name, 1), kind):
            raise ValueError(f"config.json says {name}={config[name]!r}, which is no number of its kind.")
    if not isinstance(config["model_type"], str) or config["model_type"] not in HF_MODELS:
        raise ValueError(
            f"config.json says model_type={config['model_type']!r}, but of Hugging Face's models only "
            "videomae, vit and vit_mae can be converted."
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"config.json says hidden_act={config['hidden_act']!r}, which no model here has; only 'gelu'.")
    patch_norm = bool(config.get("norm_pix_loss", False)) if config["model_type"] == "vit_mae" else None
    return dataclasses.replace(
        told,
        num_heads=config.get("num_attention_heads"),
        decoder_heads=config.get("decoder_num_attention_heads"),
        norm_eps=config.get("layer_norm_eps", HF_NORM_EPS),
        patch_norm=patch_norm,
        frames=config.get("num_frames"),
        side=_side(config.get("image_size")),
    )


def _side(size: Any) -> int | None:
    """Pixels on a side, of a number or of two alike."""
    sides = size if isinstance(size, list | tuple) else [size]
    if not sides or any(side != sides[0] for side in sides) or not isinstance(sides[0], int | None):
        raise ValueError(f"config.json says image_size={size!r}, but only square pictures can be converted.")
    return sides[0]


def timms_name(name: str) -> str:
    """timm's or MAE's name for Hugging Face's, as it writes them to disk; queries, keys and values stay apart."""
    name = name.removeprefix("vit.")
    name = re.sub(r"^encoder\.layer\.", "blocks.", name)
    name = re.sub(r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks.", name)
    name = name.removeprefix("decoder.")
    for theirs, ours in {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }.items():
        name = re.sub(rf"^{re.escape(theirs)}(?=\.|$)", ours, name)
    block = re.match(r"((?:decoder_)?blocks\.\d+)\.(.+)\.(weight|bias)$", name)
    if block:
        inner = HF_BLOCK.get(block[2], block[2].replace("attention.attention.", "attn."))
        return f"{block[1]}.{inner}.{block[3]}"
    return name


def take_linear(source: Source, theirs: str, ours: str, in_dim: int, out_dim: int) -> None:
    source.state[f"{ours}.weight"] = source.take(f"{theirs}.weight", out_dim, in_dim)
    source.state[f"{ours}.bias"] = source.take(f"{theirs}.bias", out_dim)


def take_norm(source: Source, theirs: str, ours: str, dim: int) -> None:
    for name in ("weight", "bias"):
        source.state[f"{ours}.{name}"] = source.take(f"{theirs}.{name}", dim)


def take_block(source: Source, theirs: str, ours: str, D: int) -> None:
    if f"{theirs}.attn.query.weight" in source.values:
        parts = [f"{theirs}.attn.{part}" for part in ("query", "key", "value")]
        source.state[f"{ours}.attn.qkv.weight"] = torch.cat([source.take(f"{p}.weight", D, D) for p in parts])
        if source.kind == "videomae":
            biases = [source.take(f"{theirs}.attn.{name}", D) for name in ("q_bias", "v_bias")]
            biases.insert(1, torch.zeros(D))
        else:
            biases = [source.take(f"{p}.bias", D) for p in parts]
        source.state[f"{ours}.attn.qkv.bias"] = torch.cat(biases)
    else:
        take_linear(source, f"{theirs}.attn.qkv", f"{ours}.attn.qkv", D, 3 * D)
    take_linear(source, f"{theirs}.attn.proj", f"{ours}.attn.proj", D, D)
    take_linear(source, f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1", D, 4 * D)
    take_linear(source, f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2", 4 * D, D)
    take_norm(source, f"{theirs}.norm1", f"{ours}.norm1", D)
    take_norm(source, f"{theirs}.norm2", f"{ours}.norm2", D)


def heads_of(given: int | None, known: Mapping[int, int], width: int, what: str, option: str) -> int:
    heads = known.get(width) if given is None else given
    if heads is None:
        raise ValueError(
            f"The {what} has a width of {width}, and nothing tells its number of heads, which is known for "
            f"{', '.join(str(w) for w in known)}. Give {option}, or the folder with its config.json."
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"The {what} has a width of {width}, which cannot be split into {heads!r} heads. Give {option}."
        )
    return heads


def _positions(source: Source, name: str, D: int, class_row: bool, side: int) -> tuple[Tensor, Tensor, bool]:
    """Of the class token, (1, D), of the patches, (N, D), and whether the latter are MAE's fixed table."""
    table = source.take(name, 1, side**2 + class_row, D)[0]
    first, rest = (table[:1], table[1:]) if class_row else (table.new_zeros(1, D), table)
    return first, rest, torch.allclose(rest, sincos_positions(D, (1, side, side)), rtol=0, atol=1e-6)


def normalisation_of(
    told: Told, says: Told, kind: Kind, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """mean, std, and where they are from."""
    if (told.mean is None) != (told.std is None):
        raise ValueError("Of --mean and --std one was given; they belong together. Give both.")
    for mean, std, why in (
        (told.mean, told.std, "as given"),
        (says.mean, says.std, "as the config beside the file says"),
    ):
        if mean is not None and std is not None:
            if len(mean) != channels or len(std) != channels:
                raise ValueError(
                    f"mean={mean} and std={std} ({why}) are not one number for each of the model's {channels} channels. Give "
                    "--mean and --std."
                )
            return mean, std, why
    if kind in ("mae", "videomae") and channels == 3:
        return sizes.IMAGENET_MEAN, sizes.IMAGENET_STD, f"ImageNet's, as {NAMES[kind]} has them; no file says so"
    if kind == "mae_st":
        return (0.45,) * channels, (0.225,) * channels, "as MAE-ST has them; no file says so"
    why = "as timm's and Hugging Face's plain ViTs have them; no file says so, and others have ImageNet's"
    return (0.5,) * channels, (0.5,) * channels, why


def from_vit(
    tensors: Mapping[str, Tensor],
    *,
    kind: Kind,
    given: Told | None = None,
    config: Told | None = None,
) -> tuple[Recipe, State, Report, list[str]]:
    """A masked auto-encoder or a plain ViT, in the names of MAE's code and timm, or in Hugging Face's.

    Files with a decoder become a whole `mae` (or `mae_raw`), all others an encoder only. A head of classes is left behind.
    Assumed: the picture is square; GELU and a hidden layer of four times the width, which its shape confirms.

    Args:
        kind: "mae", or "vit", which is taken for "mae" if its positions are MAE's.
        given, config: what the user says, and what the file's config.json does.

    Returns:
        The recipe, the tensors for a model of it, what became of theirs, and sentences on what was assumed.

    Raises:
        ValueError: a parameter is missing, unknown, or of another shape than the others make it; or nothing tells the heads.
    """
    given, config = given or Told(), config or Told()
    foreign = is_hugging_face(tensors)
    source = Source(kind, tensors)
    if foreign:
        source.rename({name: timms_name(name) for name in source.values})
    source.drop([n for n in source.values if HEADS.fullmatch(n)], "a head behind the features, which are what is kept")

    D, C, p, _ = source.sizes("patch_embed.proj.weight", 4)
    num_rows = source.sizes("pos_embed", 3)[1]
    has_class = "cls_token" in source.values
    class_row = has_class and round((num_rows - 1) ** 0.5) ** 2 == num_rows - 1
    side = side_of("pos_embed", num_rows - class_row)
    whole = "decoder_embed.weight" in source.values
    first, rest, fixed = _positions(source, "pos_embed", D, class_row, side)
    if kind == "vit" and fixed:
        kind = source.kind = "mae"
    if kind == "vit" and whole:
        raise ValueError("The file has a decoder, so it is no plain ViT. Use --kind mae, or leave it out.")

    state, depth = source.state, source.depth(r"blocks\.(\d+)\.")
    num_heads = heads_of(given.num_heads or config.num_heads, VIT_HEADS, D, "encoder", "--num-heads")
    mean, std, why = normalisation_of(given, config, kind, C)
    notices = [f"Pixels are normalised by mean {mean} and std {std}: {why}."]
    eps = given.norm_eps or config.norm_eps or (HF_NORM_EPS if foreign else 1e-6)
    patch_norm = config.patch_norm if given.patch_norm is None else given.patch_norm
    if whole and patch_norm is None:
        patch_norm = True
        notices.append(
            "Taken for a MAE of normalised patches, since no file says it; --no-patch-norm if it predicts pixels."
        )

    state["encoder.patch_embed.proj.weight"] = (
        source.take("patch_embed.proj.weight", D, C, p, p).permute(0, 2, 3, 1).flatten(1)
    )
    state["encoder.patch_embed.proj.bias"] = source.take("patch_embed.proj.bias", D)
    if has_class:
        state["encoder.cls_token"] = source.take("cls_token", 1, 1, D) + first
    for i in range(depth):
        take_block(source, f"blocks.{i}", f"encoder.blocks.{i}", D)
    take_norm(source, "norm", "encoder.norm", D)

    known, size = size_of(D, depth, num_heads, p)
    recipe = recipes.mae(known, height=side * p, channels=C, patch_norm=patch_norm is not False)
    encoder = Encoder(embed_dim=D, depth=depth, num_heads=num_heads, num_class_tokens=int(has_class))
    assert recipe.decoder is not None
    decoder = dataclasses.replace(recipe.decoder, taps=(depth,))
    decoder_rest = None
    if whole:
        decoder, decoder_rest, decoder_fixed = _decoder(source, given, config, side, p * p * C, D, class_row)
        fixed = fixed and decoder_fixed
    recipe = dataclasses.replace(
        recipe,
        name=recipe.name if kind == "mae" else "vit",
        size=size,
        clip=dataclasses.replace(recipe.clip, mean=mean, std=std),
        encoder=encoder,
        decoder=decoder,
        network=dataclasses.replace(recipe.network, norm_eps=eps, positions="sincos" if fixed else "learned"),
    )
    if not fixed:
        state["encoder.positions.pos_embed"] = rest
        if decoder_rest is not None:
            state["decoder.positions.pos_embed"] = decoder_rest
        notices.append("Its positions are not MAE's fixed table, so they were kept as learned ones.")
    else:
        for name in ("pos_embed", "decoder_pos_embed")[: 1 + whole]:
            if name != "pos_embed" or not first.any():
                source.leave(name, "fixed positions, which equal ours")
    if not whole:
        notices.append(
            f"It has no decoder, so {NAMES[kind]}'s encoder alone was written: for probe, embed, finetune and pretrain --init."
        )
    return *source.finish(recipe, () if whole else ("encoder",)), notices


def _decoder(
    source: Source, given: Told, config: Told, side: int, token_dim: int, D: int, class_row: bool
) -> tuple[Decoder, Tensor, bool]:
    """Take MAE's decoder of an encoder of width D; its positions, (N, W), and whether they are the fixed table."""
    W, _ = source.sizes("decoder_embed.weight", 2)
    depth = source.depth(r"decoder_blocks\.(\d+)\.")
    heads = heads_of(given.decoder_heads or config.decoder_heads, DECODER_HEADS, W, "decoder", "--decoder-heads")
    first, rest, fixed = _positions(source, "decoder_pos_embed", W, class_row, side)
    if first.any():
        raise ValueError(
            "'decoder_pos_embed' gives the class token a position of its own, for which the model has no place; in MAE it is "
            "zero."
        )
    if W != D:  # between equal widths there is no map here, and the file's has no place
        take_linear(source, "decoder_embed", "decoder.embed", D, W)
    source.state["decoder.mask_token"] = source.take("mask_token", 1, 1, W)
    for i in range(depth):
        take_block(source, f"decoder_blocks.{i}", f"decoder.blocks.{i}", W)
    take_norm(source, "decoder_norm", "head.norm", W)
    take_linear(source, "decoder_pred", "head.pred.x0", W, token_dim)
    taps = (source.depth(r"blocks\.(\d+)\."),)
    return Decoder(kind="joint", embed_dim=W, depth=depth, num_heads=heads, taps=taps), rest, fixed
