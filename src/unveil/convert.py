"""Published weights of UMD and DiT as ours: flax parameters and a state dict, renamed, laid out anew and counted.

Every size is read from the shapes. Times need no care: UMD's network counts as ours does, 0 for clean; DiT's k is our t - 1,
which is folded into the weights.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from unveil import recipes
from unveil.config import Encoder
from unveil.foreign import Report, Source, State, shape_of, side_of, size_of
from unveil.layers import FREQUENCY_DIM
from unveil.recipe import Recipe
from unveil.tokens import sincos_positions

# Heads of the published widths, DiT's S, B, L and XL: the one size that its shapes do not tell.
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


# UMD


def _unstack_layers(source: Source) -> None:
    """Split arrays that flax's scan stacked, of all layers of a part, under the names of a model without it."""
    for part in ("Encoder", "Decoder"):
        for node in sorted(
            {name.split("/")[1] for name in source.values if name.count("/") > 1 and name.startswith(part)}
        ):
            prefix = f"{part}/{node}/"
            scale = source.values.get(f"{prefix}LayerNorm_0/scale")
            if scale is None or scale.ndim != 2:
                continue
            for name in [name for name in source.values if name.startswith(prefix)]:
                inner = name.removeprefix(prefix)
                if source.values[name].ndim == 0:
                    raise ValueError(
                        f"{source.origin[name]!r} has no axis of layers, as the other arrays beside it have."
                    )
                layers = range(len(source.values[name]))
                source.unstack(name, [f"{part}/Encoder1DBlock_{i}/{inner}" for i in layers])


def _umd_block(source: Source, theirs: str, ours: str, embed_dim: int, num_heads: int, adaln: bool) -> None:
    D, h, d = embed_dim, num_heads, embed_dim // num_heads
    state, attention = source.state, f"{theirs}/MultiHeadDotProductAttention_0"
    parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
    state[f"{ours}.attn.qkv.weight"] = torch.cat([source.take(f"{p}/kernel", D, h, d).flatten(1).T for p in parts])
    state[f"{ours}.attn.qkv.bias"] = torch.cat([source.take(f"{p}/bias", h, d).flatten() for p in parts])
    state[f"{ours}.attn.proj.weight"] = source.take(f"{attention}/out/kernel", h, d, D).flatten(0, 1).T
    state[f"{ours}.attn.proj.bias"] = source.take(f"{attention}/out/bias", D)
    for i in (0, 1):
        _umd_norm(source, f"{theirs}/LayerNorm_{i}", f"{ours}.norm{i + 1}", D)
    _umd_linear(source, f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.mlp.fc1", D, 4 * D)
    _umd_linear(source, f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.mlp.fc2", 4 * D, D)
    if adaln:
        _umd_linear(source, f"{theirs}/Dense_0", f"{ours}.modulation", D, 6 * D)


def _umd_linear(source: Source, theirs: str, ours: str, in_dim: int, out_dim: int) -> None:
    source.state[f"{ours}.weight"] = source.take(f"{theirs}/kernel", in_dim, out_dim).T
    source.state[f"{ours}.bias"] = source.take(f"{theirs}/bias", out_dim)


def _umd_norm(source: Source, theirs: str, ours: str, embed_dim: int) -> None:
    source.state[f"{ours}.weight"] = source.take(f"{theirs}/scale", embed_dim)
    source.state[f"{ours}.bias"] = source.take(f"{theirs}/bias", embed_dim)


def _umd_recipe(
    *,
    patch_size: int,
    channels: int,
    side: int,
    encoder: Encoder,
    decoder_depth: int,
    decoder_heads: int,
    adaln: bool,
    num_classes: int,
) -> Recipe:
    known, size = size_of(encoder.embed_dim, encoder.depth, encoder.num_heads, patch_size)
    # zeros for its class tokens, as the published code starts them
    recipe = recipes.umd(known, **shape_of(channels, side * patch_size), faithful=True)
    assert recipe.decoder is not None
    recipe = dataclasses.replace(
        recipe,
        size=size,
        encoder=encoder,
        decoder=dataclasses.replace(
            recipe.decoder,
            embed_dim=encoder.embed_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            taps=(encoder.depth,),
        ),
        condition=dataclasses.replace(recipe.condition, time="adaln" if adaln else "token"),
    )
    return recipes.generator(recipe, num_classes) if num_classes else recipe


def from_umd(params: Mapping[str, Tensor]) -> tuple[Recipe, State, Report]:
    """UMD's published model, from its flax parameters.

    Told from the shapes and names: width, depths, heads, patch, class tokens, classes, and whether the time shifts and
    scales or is a token. Assumed: the picture is square; one or three channels are pixels in [-1, 1] on cosine betas, and
    others latents as they are on linear betas, as published. A file with labels becomes UMD's fine-tuned generator, one
    without them `umd`. The authors' baselines have the same parameters, and nothing in a file tells which it is: of a MAE,
    eps was never trained.

    Args:
        params: names are the tree's, joined by "/" ("Encoder/Encoder1DBlock_0/LayerNorm_0/scale"), all of them perhaps
            under "params/". Layers may be stacked as flax's scan leaves them: then a part has one node of any name
            instead of its numbered blocks, with the same names below, and every array has a leading axis of layers.

    Returns:
        The recipe, the tensors for a model of it, and what became of the parameters.

    Raises:
        ValueError: a parameter is missing, unknown, or of another shape than the others make it.
    """
    source = Source("umd", params)
    _unstack_layers(source)
    patch_size, _, channels, embed_dim = source.sizes("embedding/kernel", 4)
    num_tokens = source.sizes("pos_embedding", 3)[1]
    num_class_tokens = source.sizes("cls", 3)[1]
    query = "Encoder1DBlock_0/MultiHeadDotProductAttention_0/query/kernel"
    num_heads, decoder_heads = (source.sizes(f"{part}/{query}", 3)[1] for part in ("Encoder", "Decoder"))
    depth, decoder_depth = (source.depth(rf"{part}/Encoder1DBlock_(\d+)/") for part in ("Encoder", "Decoder"))
    labels = "label_emb/embedding/embedding"
    labelled = any(name.startswith(("label_emb/", "label_trunk/")) for name in source.values)
    num_rows = source.sizes(labels, 2)[0] if labelled else 1
    if labelled and num_rows < 2:
        raise ValueError(f"{labels!r} has one row, which stands for no class; a labelled model has a class as well.")
    adaln = "final_modulation/kernel" in source.values
    recipe = _umd_recipe(
        patch_size=patch_size,
        channels=channels,
        side=side_of("pos_embedding", num_tokens),
        encoder=Encoder(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_class_tokens=num_class_tokens,
            class_token_init="zeros",
        ),
        decoder_depth=decoder_depth,
        decoder_heads=decoder_heads,
        adaln=adaln,
        num_classes=num_rows - 1,
    )

    p, C, D, N, state = patch_size, channels, embed_dim, num_tokens, source.state
    state["encoder.patch_embed.proj.weight"] = source.take("embedding/kernel", p, p, C, D).flatten(0, 2).T
    state["encoder.patch_embed.proj.bias"] = source.take("embedding/bias", D)
    state["encoder.cls_token"] = source.take("cls", 1, num_class_tokens, D)
    state["encoder.positions.pos_embed"] = source.take("pos_embedding", 1, N, D)[0]
    state["decoder.positions.pos_embed"] = source.take("dec_pos_embedding", 1, N, D)[0]
    state["decoder.mask_token"] = source.take("image_mask_embedding", 1, 1, D)
    for i in range(depth):
        _umd_block(source, f"Encoder/Encoder1DBlock_{i}", f"encoder.blocks.{i}", D, num_heads, adaln)
    for i in range(decoder_depth):
        _umd_block(source, f"Decoder/Encoder1DBlock_{i}", f"decoder.blocks.{i}", D, decoder_heads, adaln)
    _umd_norm(source, "Encoder/encoder_norm", "encoder.norm", D)
    _umd_norm(source, "Decoder/encoder_norm", "head.norm", D)
    trunks = {"time_trunk": "time", "label_trunk": "label"} if labelled else {"time_trunk": "time"}
    for theirs, ours in trunks.items():
        _umd_linear(source, f"{theirs}/Dense_0", f"condition.{ours}.fc1", D, 2 * D)
        _umd_linear(source, f"{theirs}/Dense_1", f"condition.{ours}.fc2", 2 * D, D)
    if labelled:
        state["condition.label_embed.weight"] = source.take(labels, num_rows, D)
    if adaln:
        _umd_linear(source, "final_modulation", "head.modulation", D, 2 * D)
    # flax's transposed convolution lands mirrored: pixel (i, j) of a patch is kernel[p - 1 - i, p - 1 - j]
    kernel = source.take("final_conv/kernel", p, p, D, 2 * C).flip(0, 1).transpose(2, 3)  # (p, p, 2C, D)
    bias = source.take("final_conv/bias", 2 * C)
    for name, channel in (("x0", slice(None, C)), ("eps", slice(C, None))):
        state[f"head.pred.{name}.weight"] = kernel[:, :, channel].flatten(0, 2)
        state[f"head.pred.{name}.bias"] = bias[channel].repeat(p * p)
    return source.finish(recipe)


# DiT


def _one_step_later(weight: Tensor) -> Tensor:
    """The first time Linear, (D, 256), for a time that is counted one higher.

    With w the frequencies: cos((t-1)w) = cos(tw) cos w + sin(tw) sin w, sin((t-1)w) = sin(tw) cos w - cos(tw) sin w.
    """
    half = FREQUENCY_DIM // 2
    # rounded to float32 as in `sinusoid`, so that the rotation is exact for those
    w = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32)).double()
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    rotated = [of_cos * w.cos() - of_sin * w.sin(), of_cos * w.sin() + of_sin * w.cos()]
    return torch.cat(rotated, dim=1).float()


def _dit_linear(source: Source, theirs: str, ours: str, in_dim: int, out_dim: int) -> None:
    source.state[f"{ours}.weight"] = source.take(f"{theirs}.weight", out_dim, in_dim)
    source.state[f"{ours}.bias"] = source.take(f"{theirs}.bias", out_dim)


def from_dit(state: Mapping[str, Tensor], *, num_heads: int | None = None) -> tuple[Recipe, State, Report]:
    """DiT's published model, from its state dict; arguments and result as of `from_umd`.

    Told from the shapes: width, depth, patch, channels, classes, and whether the variance was learned. Assumed: the picture
    is square; one or three channels are pixels in [-1, 1], and others latents as they are.

    Args:
        num_heads: not told by any shape. Default: the published model's of that width.

    Raises:
        ValueError: as for `from_umd`; or the width is not a published one and num_heads is not given.
    """
    source = Source("dit", state)
    D, C, p, _ = source.sizes("x_embedder.proj.weight", 4)
    N = source.sizes("pos_embed", 3)[1]
    num_rows = source.sizes("y_embedder.embedding_table.weight", 2)[0]
    out_dim = source.sizes("final_layer.linear.weight", 2)[0]
    depth = source.depth(r"blocks\.(\d+)\.")
    if num_heads is None:
        num_heads = DIT_HEADS.get(D)
    if num_heads is None:
        raise ValueError(
            f"This DiT has a width of {D}, and no shape in it tells the number of heads, which is known for "
            f"{', '.join(str(width) for width in DIT_HEADS)}. Give --num-heads."
        )
    if num_rows < 2:
        raise ValueError("'y_embedder.embedding_table.weight' has one row; it needs a class and one for no class.")
    if out_dim not in (p * p * C, 2 * p * p * C):
        raise ValueError(
            f"'final_layer.linear.weight' returns {out_dim} values for patches of {p} x {p} x {C}; it must be {p * p * C}, "
            f"or {2 * p * p * C} with a learned variance."
        )
    names = ("eps", "variance") if out_dim == 2 * p * p * C else ("eps",)
    side = side_of("pos_embed", N)
    known, size = size_of(D, depth, num_heads, p)
    recipe = recipes.dit(known, **shape_of(C, side * p), num_classes=num_rows - 1)
    branch = recipe.branches[0]
    recipe = dataclasses.replace(
        recipe,
        size=size,
        encoder=Encoder(embed_dim=D, depth=depth, num_heads=num_heads, num_class_tokens=0),
        branches=(dataclasses.replace(branch, terms=tuple(t for t in branch.terms if t.predict in names)),),
    )

    positions = source.take("pos_embed", 1, N, D)[0]
    if not torch.allclose(positions, sincos_positions(D, recipe.clip.grid), rtol=0, atol=1e-5):
        raise ValueError(
            "'pos_embed' is not the fixed sin-cos table of this grid, which is what the model would use in its place. "
            "Only a DiT with DiT's own positions can be converted."
        )
    source.leave("pos_embed", "fixed positions, which equal ours")

    ours = source.state
    ours["encoder.patch_embed.proj.weight"] = (
        source.take("x_embedder.proj.weight", D, C, p, p).permute(0, 2, 3, 1).flatten(1)
    )
    ours["encoder.patch_embed.proj.bias"] = source.take("x_embedder.proj.bias", D)
    for i in range(depth):
        for name, out, into in (
            ("attn.qkv", 3 * D, D),
            ("attn.proj", D, D),
            ("mlp.fc1", 4 * D, D),
            ("mlp.fc2", D, 4 * D),
        ):
            _dit_linear(source, f"blocks.{i}.{name}", f"encoder.blocks.{i}.{name}", into, out)
        _dit_linear(source, f"blocks.{i}.adaLN_modulation.1", f"encoder.blocks.{i}.modulation", D, 6 * D)
    _dit_linear(source, "t_embedder.mlp.0", "condition.time.fc1", FREQUENCY_DIM, D)
    _dit_linear(source, "t_embedder.mlp.2", "condition.time.fc2", D, D)
    ours["condition.time.fc1.weight"] = _one_step_later(ours["condition.time.fc1.weight"])
    ours["condition.label_embed.weight"] = source.take("y_embedder.embedding_table.weight", num_rows, D)
    _dit_linear(source, "final_layer.adaLN_modulation.1", "head.modulation", D, 2 * D)
    weight = source.take("final_layer.linear.weight", out_dim, D).reshape(p * p, len(names), C, D)
    bias = source.take("final_layer.linear.bias", out_dim).reshape(p * p, len(names), C)
    for i, name in enumerate(names):
        ours[f"head.pred.{name}.weight"] = weight[:, i].flatten(0, 1)
        ours[f"head.pred.{name}.bias"] = bias[:, i].flatten()
    return source.finish(recipe)
