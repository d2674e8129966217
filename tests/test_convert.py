"""Weights of UMD and DiT become ours at any size, and a file that does not fit is refused before anything is written.

The trees are random, and what they should compute is written out here once more, plainly, from the papers' descriptions. Both
sides compute in float64, so that the tolerance (1e-9, and 2e-6 where folded weights were rounded to float32) leaves no room
for another eps or GELU.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from small import generator
from torch import Tensor
from torch.testing import assert_close

from unveil import recipes, sizes
from unveil.checkpoint import load_model
from unveil.convert import from_dit, from_umd
from unveil.foreign import Report, recognise
from unveil.masking import Mask, gather
from unveil.model import MaskedDiffusionAutoencoder
from unveil.recipe import recipe_from_dict, to_dict
from unveil.tasks.convert import Convert, convert, read_tensors
from unveil.tokens import patchify, sincos_positions, unpatchify

Tree = dict[str, Tensor]


def random_tree(shapes: dict[str, tuple[int, ...]], seed: int, spread: float = 0.2) -> Tree:
    """Every tensor N(0, spread), the scales of norms around 1: no path is silent, and no two are alike."""
    g = generator(seed)
    return {n: torch.randn(s, generator=g) * spread + n.endswith("scale") for n, s in sorted(shapes.items())}


def filled(recipe: Any, state: Tree) -> MaskedDiffusionAutoencoder:
    """In float64, but for the time's sinusoid, which is made in float32."""
    model = MaskedDiffusionAutoencoder(recipe)
    model.load_state_dict(state)
    assert model.condition is not None
    model.condition.time.register_forward_pre_hook(lambda module, args: args[0].double())
    return model.double().eval()


def everything(B: int, N: int) -> Mask:
    tokens = torch.arange(N).expand(B, -1)
    return Mask(tokens, tokens[:, :0])


# UMD


@dataclasses.dataclass(frozen=True, kw_only=True)
class UmdSize:
    D: int = 32
    heads: int = 4
    decoder_heads: int = 4
    depth: int = 2
    decoder_depth: int = 1
    p: int = 4
    C: int = 3
    side: int = 4
    num_class_tokens: int = 4
    num_classes: int = 0
    adaln: bool = True


UMD_SIZES = {
    "pre-training": UmdSize(),
    "pre-training, time token": UmdSize(adaln=False),
    "classes": UmdSize(num_classes=7),
    "classes, time token": UmdSize(num_classes=7, adaln=False, heads=8, decoder_heads=2),
    "wide and grey": UmdSize(D=48, heads=3, decoder_heads=6, p=2, C=1, side=5, num_class_tokens=1),
    "narrow": UmdSize(D=24, heads=2, decoder_heads=1, depth=1, decoder_depth=3, p=3, side=3, num_class_tokens=2),
    "latent": UmdSize(p=2, C=4, num_classes=3),
    "deep": UmdSize(D=16, heads=2, decoder_heads=2, depth=12, side=2),  # Encoder1DBlock_10 is not the second block
}


def umd_shapes(size: UmdSize) -> dict[str, tuple[int, ...]]:
    D, p, C, N = size.D, size.p, size.C, size.side**2
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (p, p, C, D),
        "embedding/bias": (D,),
        "cls": (1, size.num_class_tokens, D),
        "pos_embedding": (1, N, D),
        "dec_pos_embedding": (1, N, D),
        "image_mask_embedding": (1, 1, D),
        "final_conv/kernel": (p, p, D, 2 * C),
        "final_conv/bias": (2 * C,),
    }

    def dense(name: str, into: int, out: int) -> None:
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = (into, out), (out,)

    def norm(name: str) -> None:
        shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (D,)

    for part, depth, h in (("Encoder", size.depth, size.heads), ("Decoder", size.decoder_depth, size.decoder_heads)):
        norm(f"{part}/encoder_norm")
        for i in range(depth):
            block = f"{part}/Encoder1DBlock_{i}"
            norm(f"{block}/LayerNorm_0")
            norm(f"{block}/LayerNorm_1")
            for word in ("query", "key", "value"):
                shapes[f"{block}/MultiHeadDotProductAttention_0/{word}/kernel"] = (D, h, D // h)
                shapes[f"{block}/MultiHeadDotProductAttention_0/{word}/bias"] = (h, D // h)
            shapes[f"{block}/MultiHeadDotProductAttention_0/out/kernel"] = (h, D // h, D)
            shapes[f"{block}/MultiHeadDotProductAttention_0/out/bias"] = (D,)
            dense(f"{block}/MlpBlock_0/Dense_0", D, 4 * D)
            dense(f"{block}/MlpBlock_0/Dense_1", 4 * D, D)
            if size.adaln:
                dense(f"{block}/Dense_0", D, 6 * D)
    if size.adaln:
        dense("final_modulation", D, 2 * D)
    dense("time_trunk/Dense_0", D, 2 * D)
    dense("time_trunk/Dense_1", 2 * D, D)
    if size.num_classes:
        dense("label_trunk/Dense_0", D, 2 * D)
        dense("label_trunk/Dense_1", 2 * D, D)
        shapes["label_emb/embedding/embedding"] = (size.num_classes + 1, D)
    return shapes


def umd_tree(size: UmdSize, seed: int = 0) -> Tree:
    return random_tree(umd_shapes(size), seed)


class PlainUmd:
    """UMD on pictures (B, H, W, C) with parameters by their flax names, one operation after another."""

    def __init__(self, params: Tree, size: UmdSize) -> None:
        self.params, self.size = {name: value.double() for name, value in params.items()}, size

    def dense(self, name: str, x: Tensor) -> Tensor:
        return x @ self.params[f"{name}/kernel"] + self.params[f"{name}/bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.params[f"{name}/scale"] + self.params[f"{name}/bias"]

    def trunk(self, name: str, x: Tensor) -> Tensor:
        x = self.dense(f"{name}/Dense_0", x)
        return self.dense(f"{name}/Dense_1", x * torch.sigmoid(x))

    def cond(self, t: Tensor, labels: Tensor | None) -> Tensor:
        half = self.size.D // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        cond = self.trunk("time_trunk", torch.cat([angles.sin(), angles.cos()], dim=1).double())
        if self.size.num_classes:
            rows = torch.full_like(t, self.size.num_classes) if labels is None else labels
            cond = cond + self.trunk("label_trunk", self.params["label_emb/embedding/embedding"][rows])
        return cond * torch.sigmoid(cond) if self.size.adaln else cond

    def attend(self, name: str, x: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("bld,dhe->bhle", x, self.params[f"{name}/{word}/kernel"])
            + self.params[f"{name}/{word}/bias"][:, None]
            for word in ("query", "key", "value")
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (
            torch.einsum("bhle,hed->bld", weights @ v, self.params[f"{name}/out/kernel"])
            + self.params[f"{name}/out/bias"]
        )

    def block(self, name: str, x: Tensor, cond: Tensor) -> Tensor:
        D = self.size.D
        if not self.size.adaln:
            x = torch.cat([cond[:, None], x], dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = 0.0, 0.0, 1.0, 0.0, 0.0, 1.0
        if self.size.adaln:
            chunks = self.dense(f"{name}/Dense_0", cond)[:, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = (chunks[..., i * D : (i + 1) * D] for i in range(6))
        h = self.norm(f"{name}/LayerNorm_0", x) * (1 + scale1) + shift1
        x = x + gate1 * self.attend(f"{name}/MultiHeadDotProductAttention_0", h)
        h = self.norm(f"{name}/LayerNorm_1", x) * (1 + scale2) + shift2
        h = self.dense(f"{name}/MlpBlock_0/Dense_0", h)
        h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + gate2 * self.dense(f"{name}/MlpBlock_0/Dense_1", h)
        return x if self.size.adaln else x[:, 1:]

    def __call__(self, image: Tensor, t: Tensor, labels: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction (B, H, W, 2C), x0 then eps, and representation (B, D), from the tokens kept (B, V)."""
        size, params = self.size, self.params
        B, p, side = len(image), size.p, size.side
        cond = self.cond(t, labels)
        x = F.conv2d(image.permute(0, 3, 1, 2), params["embedding/kernel"].permute(3, 2, 0, 1), stride=p)
        x = x.permute(0, 2, 3, 1).reshape(B, side**2, size.D) + params["embedding/bias"] + params["pos_embedding"]
        x = torch.stack([row[chosen] for row, chosen in zip(x, kept, strict=True)])
        x = torch.cat([params["cls"].repeat(B, 1, 1), x], dim=1)
        for i in range(size.depth):
            x = self.block(f"Encoder/Encoder1DBlock_{i}", x, cond)
        x = self.norm("Encoder/encoder_norm", x)
        representation, x = x[:, : size.num_class_tokens].mean(1), x[:, size.num_class_tokens :]
        grid = params["image_mask_embedding"].repeat(B, side**2, 1)
        for b in range(B):
            for row, place in enumerate(kept[b].tolist()):
                grid[b, place] = x[b, row]
        x = torch.cat([representation[:, None], grid + params["dec_pos_embedding"]], dim=1)
        for i in range(size.decoder_depth):
            x = self.block(f"Decoder/Encoder1DBlock_{i}", x, cond)
        x = self.norm("Decoder/encoder_norm", x)[:, 1:]
        if size.adaln:
            shift, scale = self.dense("final_modulation", cond)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        x = x.reshape(B, side, side, size.D)
        out = torch.zeros(B, side * p, side * p, 2 * size.C, dtype=torch.float64)
        for i in range(p):
            for j in range(p):
                out[:, i::p, j::p] = x @ params["final_conv/kernel"][p - 1 - i, p - 1 - j] + params["final_conv/bias"]
        return out, representation


def check_umd(tree: Tree, size: UmdSize, source: Tree | None = None) -> tuple[Any, Report]:
    """Convert, and compare every prediction and the representation with the plain model, masked and not."""
    recipe, state, report = from_umd(tree if source is None else source)
    model, plain = filled(recipe, state), PlainUmd(tree, size)
    B, N, p = 3, size.side**2, size.p
    image = torch.randn(B, size.side * p, size.side * p, size.C, generator=generator(1), dtype=torch.float64)
    x = patchify(image.permute(0, 3, 1, 2)[:, :, None], p)
    order = torch.rand(B, N, generator=generator(2)).argsort(dim=1)
    t = torch.tensor([0, 3, 211])
    classes = torch.tensor([0, size.num_classes - 1, size.num_classes]) if size.num_classes else None
    for num_visible, labels in ((N, classes), (N, None), (max(N // 3, 1), classes)):
        mask = Mask(order[:, :num_visible], order[:, num_visible:])
        expected, representation = plain(image, t, labels, mask.visible)
        with torch.no_grad():
            both = model(gather(x, mask.visible), mask, None, t, labels, on=("visible", "hidden"))
            (memory,), _ = model._encode(gather(x, mask.visible), mask.visible, model.taps, t, labels)
        assert_close(memory[:, : size.num_class_tokens].mean(1), representation, rtol=1e-9, atol=1e-9)
        for head, theirs in zip(("x0", "eps"), expected.chunk(2, dim=-1), strict=True):
            tokens = gather(torch.cat([both["visible"][head], both["hidden"][head]], dim=1), order.argsort(dim=1))
            ours = unpatchify(tokens, (1, size.side, size.side), p)[:, :, 0].permute(0, 2, 3, 1)
            assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return recipe, report


@pytest.mark.parametrize("name", UMD_SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_umd_computes_the_same(name: str, seed: int) -> None:
    size = UMD_SIZES[name]
    tree = umd_tree(size, seed)
    recipe, report = check_umd(tree, size)
    assert report == Report(kind="umd", used=report.used, left={})
    assert set(report.used) == tree.keys()
    assert (recipe.clip.channels, recipe.clip.height, recipe.clip.width) == (
        size.C,
        size.side * size.p,
        size.side * size.p,
    )
    assert (recipe.encoder.depth, recipe.decoder.depth) == (size.depth, size.decoder_depth)
    assert (recipe.encoder.num_heads, recipe.decoder.num_heads) == (size.heads, size.decoder_heads)
    assert recipe.condition.num_classes == size.num_classes
    assert recipe.condition.time == ("adaln" if size.adaln else "token")
    assert recipe_from_dict(to_dict(recipe)) == recipe


def test_a_umd_recipe_is_the_shipped_one() -> None:
    """At a shipped size nothing is left to differ but the size's own label."""
    e = sizes.ENCODERS["Nano"]
    size = UmdSize(D=e.embed_dim, heads=4, decoder_heads=4, depth=e.depth, decoder_depth=2, side=4)
    expected = recipes.umd("Nano/4", height=16, faithful=True)
    assert from_umd(umd_tree(size))[0] == expected
    labelled = dataclasses.replace(size, num_classes=5)
    assert from_umd(umd_tree(labelled))[0] == recipes.umd_finetune("Nano/4", height=16, faithful=True, num_classes=5)
    other = from_umd(umd_tree(dataclasses.replace(size, depth=3)))[0]
    assert other.size == "96x3/4"
    assert other.training == recipes.umd("B/4").training


def test_pixels_and_latents_of_umd() -> None:
    """Pixels enter as [-1, 1] on cosine betas, latents as they are on linear ones."""
    pixels, latents = (from_umd(umd_tree(UmdSize(C=channels)))[0] for channels in (3, 4))
    assert pixels.clip.mean == pixels.clip.std == (0.5,) * 3
    assert (latents.clip.mean, latents.clip.std) == ((0.0,) * 4, (1.0,) * 4)
    assert (pixels.schedule.kind, latents.schedule.kind) == ("cosine", "linear")


def stacked(tree: Tree, node: str = "ScanEncoder1DBlock_0") -> Tree:
    """The same parameters as flax's scan leaves them: an array for all layers of a part."""
    scanned: dict[str, list[Tensor]] = {}
    rest = {}
    for name in sorted(
        tree, key=lambda name: [int(w) if w.isdigit() else 0 for w in name.replace("_", "/").split("/")]
    ):
        part, _, inner = name.partition("/Encoder1DBlock_")
        if inner:
            scanned.setdefault(f"{part}/{node}/{inner.partition('/')[2]}", []).append(tree[name])
        else:
            rest[name] = tree[name]
    return {**rest, **{name: torch.stack(layers) for name, layers in scanned.items()}}


@pytest.mark.parametrize("name", ["pre-training, time token", "narrow", "deep"])
@pytest.mark.parametrize("node", ["ScanEncoder1DBlock_0", "Encoder1DBlock_0", "encoderblock"])
def test_stacked_layers_are_the_same_model(name: str, node: str) -> None:
    size = UMD_SIZES[name]
    tree = umd_tree(size)
    source = stacked(tree, node)
    assert len(source) < len(tree)
    _, report = check_umd(tree, size, source)
    assert set(report.used) == source.keys()


def test_a_prefix_is_taken_off() -> None:
    tree = umd_tree(UmdSize())
    recipe, state, _ = from_umd(tree)
    for prefix in ("param/", "params/"):
        source = {**{f"{prefix}{name}": value for name, value in tree.items()}, "opt/step": torch.zeros(())}
        assert recognise(source) == "umd"
        other, same, report = from_umd(source)
        assert other == recipe
        assert all(torch.equal(same[name], state[name]) for name in state)
        assert report.left == {"opt/step": f"no parameter, for it is not under {prefix!r}"}
        assert set(report.used) == {f"{prefix}{name}" for name in tree}


def test_other_precisions_become_float32() -> None:
    tree = {name: value.half() for name, value in umd_tree(UmdSize()).items()}
    same = from_umd({name: value.double() for name, value in tree.items()})[1]
    state = from_umd(tree)[1]
    assert {value.dtype for value in (*state.values(), *same.values())} == {torch.float32}
    assert all(torch.equal(state[name], same[name]) for name in state)


# DiT


@dataclasses.dataclass(frozen=True, kw_only=True)
class DitSize:
    D: int = 32
    heads: int = 4
    depth: int = 2
    p: int = 2
    C: int = 4
    side: int = 4
    num_classes: int = 10
    learn_sigma: bool = True


DIT_SIZES = {
    "latent": DitSize(),
    "fixed variance": DitSize(learn_sigma=False),
    "pixels": DitSize(D=48, heads=2, depth=1, p=4, C=3, side=3, num_classes=1),
    "published width": DitSize(D=384, heads=6, depth=1, p=2, side=2),
    "deep": DitSize(D=16, heads=1, depth=12, side=2),
}


def dit_tree(size: DitSize, seed: int = 0) -> Tree:
    D, p, C = size.D, size.p, size.C
    out = p * p * C * (2 if size.learn_sigma else 1)
    linears = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    for i in range(size.depth):
        linears[f"blocks.{i}.attn.qkv"] = (3 * D, D)
        linears[f"blocks.{i}.attn.proj"] = (D, D)
        linears[f"blocks.{i}.mlp.fc1"] = (4 * D, D)
        linears[f"blocks.{i}.mlp.fc2"] = (D, 4 * D)
        linears[f"blocks.{i}.adaLN_modulation.1"] = (6 * D, D)
    linears["final_layer.adaLN_modulation.1"] = (2 * D, D)
    linears["final_layer.linear"] = (out, D)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (D, C, p, p),
        "x_embedder.proj.bias": (D,),
        "y_embedder.embedding_table.weight": (size.num_classes + 1, D),
    }
    for name, shape in linears.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    tree = random_tree(shapes, seed, spread=D**-0.5)
    return {**tree, "pos_embed": sincos_positions(D, (1, size.side, size.side))[None]}


def exact_sinusoid(t: Tensor, dim: int) -> Tensor:
    """DiT's, but for the rounding of t times a frequency to float32, which is another one at k than at k + 1."""
    half = dim // 2
    angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def plain_dit(params: Tree, size: DitSize, image: Tensor, k: Tensor, labels: Tensor) -> Tensor:
    """DiT on (B, C, H, W) at its own times k = 0 .. 999: eps, and then the variance if it was learned, as channels."""
    D, p, side, h = size.D, size.p, size.side, size.heads
    params = {name: value.double() for name, value in params.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    cond = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", exact_sinusoid(k, 256))))
    cond = F.silu(cond + params["y_embedder.embedding_table.weight"][labels])
    x = F.conv2d(image, params["x_embedder.proj.weight"], params["x_embedder.proj.bias"], stride=p)
    x = x.flatten(2).transpose(1, 2) + params["pos_embed"]
    B, N, _ = x.shape
    for i in range(size.depth):
        chunks = linear(f"blocks.{i}.adaLN_modulation.1", cond)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = (chunks[..., j * D : (j + 1) * D] for j in range(6))
        qkv = linear(f"blocks.{i}.attn.qkv", norm(x) * (1 + scale1) + shift1)
        q, key, v = (part.reshape(B, N, h, D // h).transpose(1, 2) for part in qkv.split(D, dim=-1))
        attended = (q @ key.transpose(-1, -2) / (D // h) ** 0.5).softmax(-1) @ v
        x = x + gate1 * linear(f"blocks.{i}.attn.proj", attended.transpose(1, 2).reshape(B, N, D))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(x) * (1 + scale2) + shift2)
        hidden = 0.5 * hidden * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        x = x + gate2 * linear(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", cond)[:, None].split(D, dim=-1)
    x = linear("final_layer.linear", norm(x) * (1 + scale) + shift).reshape(B, side, side, p, p, -1)
    out = torch.zeros(B, x.shape[-1], side * p, side * p, dtype=torch.float64)
    for i in range(p):
        for j in range(p):
            out[:, :, i::p, j::p] = x[:, :, :, i, j].permute(0, 3, 1, 2)
    return out


@pytest.mark.parametrize("name", DIT_SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_dit_computes_the_same(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unveil.layers.sinusoid", exact_sinusoid)
    size = DIT_SIZES[name]
    tree = dit_tree(size, seed)
    recipe, state, report = from_dit(tree, num_heads=None if size.D == 384 else size.heads)
    assert report == Report(kind="dit", used=report.used, left={"pos_embed": "fixed positions, which equal ours"})
    assert set(report.used) == tree.keys() - {"pos_embed"}
    heads = ("eps", "variance") if size.learn_sigma else ("eps",)
    assert (recipe.heads, recipe.encoder.num_heads, recipe.condition.num_classes) == (
        heads,
        size.heads,
        size.num_classes,
    )
    k, labels = torch.tensor([0, 17, 999]), torch.tensor([0, size.num_classes - 1, size.num_classes])
    image = torch.randn(3, size.C, size.side * size.p, size.side * size.p, generator=generator(1), dtype=torch.float64)
    with torch.no_grad():
        x = patchify(image[:, :, None], size.p)
        ours = filled(recipe, state)(x, everything(3, size.side**2), None, k + 1, labels, on=("visible",))["visible"]
    theirs = plain_dit(tree, size, image, k, labels)
    for head, expected in zip(heads, theirs.split(size.C, dim=1), strict=True):
        tokens = unpatchify(ours[head], (1, size.side, size.side), size.p)[:, :, 0]
        assert_close(tokens, expected, rtol=2e-6, atol=2e-6)


def test_a_dit_recipe_is_the_shipped_one() -> None:
    e = sizes.ENCODERS["Nano"]
    recipe, _, _ = from_dit(dit_tree(DitSize(D=e.embed_dim, heads=4, depth=e.depth, p=4, C=3)), num_heads=4)
    assert recipe == recipes.dit("Nano/4", height=16, num_classes=10)
    latent = from_dit(dit_tree(DitSize()), num_heads=4)[0]
    assert (latent.clip.mean, latent.clip.std, latent.size) == ((0.0,) * 4, (1.0,) * 4, "32x2/2")


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_published_dits(width: int, heads: int) -> None:
    """On one block; the width alone decides."""
    size = DitSize(D=width, depth=1, side=2)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in dit_tree(size).items() if name != "pos_embed"}
    tree = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert from_dit({**tree, "pos_embed": sincos_positions(width, (1, 2, 2))[None]})[0].encoder.num_heads == heads


# Refusals


def without(*names: str) -> Callable[[Tree], Tree]:
    return lambda tree: {name: value for name, value in tree.items() if name not in names}


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tree], Tree]:
    return lambda tree: {**tree, name: change(tree[name])}


BLOCK = "Encoder/Encoder1DBlock_1"
UMD_REFUSALS: dict[str, tuple[Callable[[Tree], Tree], str]] = {
    "a parameter is missing": (without("final_conv/bias"), r"lacks 'final_conv/bias', which UMD's model has"),
    "a size is missing": (without("cls"), r"has no 'cls'"),
    "no block": (
        lambda tree: {name: value for name, value in tree.items() if "Decoder/Enc" not in name},
        r"has no 'Decoder/Encoder1DBlock_0/.*query/kernel'",
    ),
    "a block is missing": (
        lambda tree: {name.replace("Block_1", "Block_2"): value for name, value in tree.items()},
        r"lacks 'Encoder/Encoder1DBlock_1/MultiHead.*' and 17 more",
    ),
    "adaLN in the blocks only": (
        without("final_modulation/kernel", "final_modulation/bias"),
        r"holds 'Decoder/Encoder1DBlock_0/Dense_0/bias' and 5 more, for which the model has no place",
    ),
    "adaLN in one block less": (without(f"{BLOCK}/Dense_0/kernel"), rf"lacks '{BLOCK}/Dense_0/kernel'"),
    "a bias that we do not have": (
        lambda tree: {**tree, "Encoder/extra/bias": torch.zeros(3)},
        r"holds 'Encoder/extra/bias', for which the model has no place",
    ),
    "labels without a table": (without("label_emb/embedding/embedding"), r"has no 'label_emb/embedding/embedding'"),
    "labels without a trunk": (without("label_trunk/Dense_0/bias"), r"lacks 'label_trunk/Dense_0/bias'"),
    "no class": (replaced("label_emb/embedding/embedding", lambda v: v[:1]), r"has one row"),
    "another MLP": (
        replaced(f"{BLOCK}/MlpBlock_0/Dense_0/kernel", lambda v: v[:, :64]),
        r"MlpBlock_0/Dense_0/kernel' is \(32, 64\), but the file's other parameters make it \(32, 128\)",
    ),
    "a transposed kernel": (replaced("final_conv/kernel", lambda v: v.mT), r"'final_conv/kernel' is \(4, 4, 6, 32\)"),
    "another number of heads in one block": (
        replaced(f"{BLOCK}/MultiHeadDotProductAttention_0/key/kernel", lambda v: v.reshape(32, 2, 16)),
        r"key/kernel' is \(32, 2, 16\), but .* \(32, 4, 8\)",
    ),
    "an oblong": (
        lambda tree: {name: v[:, :15] if name.endswith("pos_embedding") else v for name, v in tree.items()},
        r"15 positions, which are no square",
    ),
    "oblong patches": (replaced("embedding/kernel", lambda v: v[:, :2]), r"'embedding/kernel' is \(4, 2, 3, 32\)"),
    "another number of axes": (replaced("cls", lambda v: v[0]), r"'cls' is \(4, 32\), but UMD's has 3 axes"),
    "no class tokens": (replaced("cls", lambda v: v[:, :0]), r"'cls' is \(1, 0, 32\), but UMD's has 3 axes"),
    "not a number": (replaced("cls", lambda v: v / 0), r"'cls' has values that are no numbers"),
    "integers": (
        replaced("cls", lambda v: v.long()),
        r"'cls' has values that are no numbers \(or of type torch.int64\)",
    ),
    "heads that do not divide": (
        lambda tree: {**tree, f"{BLOCK[:-1]}0/MultiHeadDotProductAttention_0/query/kernel": torch.zeros(32, 5, 6)},
        r"embed_dim=32, which num_heads=5 does not divide",
    ),
    "stacked by halves": (
        lambda tree: {**stacked(tree), "Encoder/ScanEncoder1DBlock_0/LayerNorm_0/bias": torch.zeros(1, 32)},
        r"lacks 'Encoder/Encoder1DBlock_1/LayerNorm_0/bias'",
    ),
    "stacked but for one": (
        lambda tree: {**stacked(tree), "Encoder/ScanEncoder1DBlock_0/LayerNorm_0/bias": torch.zeros(())},
        r"has no axis of layers",
    ),
}


@pytest.mark.parametrize("case", UMD_REFUSALS)
def test_umd_refuses(case: str) -> None:
    change, sentence = UMD_REFUSALS[case]
    with pytest.raises(ValueError, match=sentence):
        from_umd(change(umd_tree(UmdSize(num_classes=7))))


DIT_REFUSALS: dict[str, tuple[Callable[[Tree], Tree], dict[str, Any], str]] = {
    "unknown heads": (lambda tree: tree, {"num_heads": None}, r"width of 32.*Give --num-heads"),
    "heads that do not divide": (lambda tree: tree, {"num_heads": 5}, r"num_heads=5 does not divide"),
    "no heads": (lambda tree: tree, {"num_heads": 0}, r"num_heads=0"),
    "a parameter is missing": (without("blocks.1.mlp.fc1.bias"), {}, r"lacks 'blocks.1.mlp.fc1.bias', which DiT's"),
    "a size is missing": (without("pos_embed"), {}, r"has no 'pos_embed', so it is not of DiT"),
    "a tensor that we do not have": (
        lambda tree: {**tree, "blocks.0.norm1.weight": torch.ones(32)},
        {},
        r"holds 'blocks.0.norm1.weight', for which the model has no place",
    ),
    "learned positions": (replaced("pos_embed", lambda v: v + 1e-3), {}, r"'pos_embed' is not the fixed sin-cos table"),
    "other positions": (replaced("pos_embed", lambda v: v.flip(1)), {}, r"'pos_embed' is not the fixed sin-cos table"),
    "an oblong": (replaced("pos_embed", lambda v: v[:, :12]), {}, r"12 positions, which are no square"),
    "an output of neither width": (
        lambda tree: replaced("final_layer.linear.bias", lambda v: v[:24])(
            replaced("final_layer.linear.weight", lambda v: v[:24])(tree)
        ),
        {},
        r"returns 24 values for patches of 2 x 2 x 4; it must be 16, or 32",
    ),
    "another sinusoid": (
        replaced("t_embedder.mlp.0.weight", lambda v: v[:, :128]),
        {},
        r"'t_embedder.mlp.0.weight' is \(32, 128\), but .* \(32, 256\)",
    ),
    "no class": (replaced("y_embedder.embedding_table.weight", lambda v: v[:1]), {}, r"has one row"),
    "not a number": (replaced("x_embedder.proj.bias", lambda v: v / 0), {}, r"'x_embedder.proj.bias' has values"),
}


@pytest.mark.parametrize("case", DIT_REFUSALS)
def test_dit_refuses(case: str) -> None:
    change, arguments, sentence = DIT_REFUSALS[case]
    with pytest.raises(ValueError, match=sentence):
        from_dit(change(dit_tree(DitSize())), **{"num_heads": 4, **arguments})


def test_recognise_refuses() -> None:
    assert recognise(umd_tree(UmdSize())) == "umd"
    assert recognise(dit_tree(DitSize())) == "dit"
    with pytest.raises(ValueError, match=r"neither UMD's .* nor DiT's .* holds 'blocks.0.norm1.weight'"):
        recognise({"blocks.0.norm1.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="holds nothing"):
        recognise({})


# The command


def written(path: Path, tree: Tree) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tree, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in tree.items()})  # type: ignore[arg-type]
    else:
        torch.save(tree, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth"])
@pytest.mark.parametrize("kind", ["umd", "dit"])
def test_convert_writes_a_model(tmp_path: Path, kind: Any, suffix: str) -> None:
    """The file loads as any other, and holds what the function returns."""
    tree = umd_tree(UmdSize(num_classes=3)) if kind == "umd" else dit_tree(DitSize())
    num_heads = None if kind == "umd" else 4
    source, out = written(tmp_path / f"theirs{suffix}", tree), tmp_path / "new" / "ours.safetensors"
    before = torch.random.get_rng_state()
    result = convert(Convert(source=source, out=out, num_heads=num_heads))
    assert torch.equal(torch.random.get_rng_state(), before)
    recipe, state, report = from_umd(tree) if kind == "umd" else from_dit(tree, num_heads=4)
    model, about = load_model(out)
    assert model.recipe == recipe
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (about.step, about.ema_decay, about.data) == (0, None, f"not known: converted from theirs{suffix}")
    assert result == {
        "out": str(out),
        "kind": kind,
        "parts": [],
        "recipe": to_dict(recipe),
        "ema_decay": None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "used": list(report.used),
        "left": report.left,
        "notices": result["notices"],
    }
    assert len(result["notices"]) == 2 * (kind == "dit")  # of the comparison, and of latents
    named = tmp_path / "named.safetensors"
    assert convert(Convert(source=source, out=named, num_heads=num_heads, kind=kind))["used"] == result["used"]


def test_a_training_checkpoint_gives_its_running_average(tmp_path: Path) -> None:
    """As DiT's script saves it, options and optimiser and all; without an average the weights themselves."""
    tree, average = dit_tree(DitSize(), seed=0), dit_tree(DitSize(), seed=1)
    content = {
        "model": tree,
        "ema": average,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", epochs=1400),
    }
    torch.save(content, tmp_path / "0400000.pt")
    result = convert(Convert(source=tmp_path / "0400000.pt", out=tmp_path / "ours.safetensors", num_heads=4))
    model, about = load_model(tmp_path / "ours.safetensors")
    assert torch.equal(model.state_dict()["encoder.patch_embed.proj.bias"], average["x_embedder.proj.bias"])
    assert result["ema_decay"] == about.ema_decay == 0.9999
    assert about.data == "not known: converted from 0400000.pt (their running average)"
    torch.save({"model": tree}, tmp_path / "bare.pt")
    tensors, averaged = read_tensors(tmp_path / "bare.pt")
    assert not averaged
    assert all(torch.equal(tensors[name], tree[name]) for name in tree)


class Harm:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def refused(tmp_path: Path, sentence: str, **options: Any) -> None:
    """The sentence, and nothing written."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=sentence):
        convert(Convert(**{"out": tmp_path / "ours.safetensors", **options}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_convert_refuses_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = written(tmp_path / "theirs.pt", umd_tree(UmdSize()))
    out = tmp_path / "taken.safetensors"
    out.write_text("mine")
    refused(tmp_path, r"--out .* exists already and is not overwritten", source=source, out=out)
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path, r"--out .* exists already", source=source, out=tmp_path / "folder.safetensors")
    refused(tmp_path, r"--out .* must end in .safetensors", source=source, out=tmp_path / "ours.pt")
    refused(tmp_path, r"--source .*none.pt does not exist", source=tmp_path / "none.pt")
    refused(tmp_path, r"--source .* is of no known type", source=tmp_path / "theirs.ckpt")
    for suffix in (".safetensors", ".npz", ".pt"):
        (tmp_path / f"text{suffix}").write_text("not what its name says")
        refused(tmp_path, r"--source .* cannot be read", source=tmp_path / f"text{suffix}")
        whole = written(tmp_path / f"whole{suffix}", umd_tree(UmdSize())).read_bytes()
        (tmp_path / f"half{suffix}").write_bytes(whole[: len(whole) // 2])
        refused(tmp_path, r"--source .* cannot be read", source=tmp_path / f"half{suffix}")
    torch.save({"model": Harm()}, tmp_path / "harm.pt")
    refused(tmp_path, r"--source .*harm.pt cannot be read", source=tmp_path / "harm.pt")
    np.savez(tmp_path / "objects.npz", a=np.array([Harm()], dtype=object))
    refused(tmp_path, r"--source .*objects.npz cannot be read", source=tmp_path / "objects.npz")
    assert not (tmp_path / "harm").exists()
    for content in ([torch.zeros(3)], {"epoch": 3}, {0: torch.zeros(3)}):
        torch.save(content, tmp_path / "other.pt")
        refused(tmp_path, r"does not hold tensors by name", source=tmp_path / "other.pt")


def test_convert_refuses_what_does_not_fit(tmp_path: Path) -> None:
    umd = written(tmp_path / "umd.safetensors", umd_tree(UmdSize()))
    dit = written(tmp_path / "dit.safetensors", dit_tree(DitSize()))
    unknown = written(tmp_path / "unknown.npz", {"weight": torch.zeros(2)})
    damaged = written(tmp_path / "damaged.npz", without("final_conv/bias")(umd_tree(UmdSize())))
    refused(tmp_path, r"Give --num-heads", source=dit)
    refused(tmp_path, r"--num-heads is for a DiT", source=umd, num_heads=4)
    refused(tmp_path, r"has no 'embedding/kernel', so it is not of UMD", source=dit, kind="umd")
    refused(tmp_path, r"has no 'x_embedder.proj.weight', so it is not of DiT", source=umd, kind="dit", num_heads=4)
    refused(tmp_path, r"neither UMD's", source=unknown)
    refused(tmp_path, r"lacks 'final_conv/bias'", source=damaged)


def test_a_result_must_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the model ever have a tensor that the conversion does not know of."""
    build = MaskedDiffusionAutoencoder.__init__

    def with_more(self: MaskedDiffusionAutoencoder, recipe: Any) -> None:
        build(self, recipe)
        self.register_buffer("news", torch.zeros(1))

    monkeypatch.setattr(MaskedDiffusionAutoencoder, "__init__", with_more)
    with pytest.raises(ValueError, match=r"'news' got no values"):
        from_umd(umd_tree(UmdSize()))
