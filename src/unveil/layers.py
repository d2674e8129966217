"""Transformer blocks with timm's parameter names, and what tells them positions, time and class. Sizes are flat arguments."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from unveil.tokens import Grid, rotary_angles, sincos_positions

Rotation = tuple[Tensor, Tensor]  # cos and sin, (B, 1, L, d) each


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the type of the input: its fused form wants that, and autocast does not see to it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def norm_layer(kind: str, dim: int, eps: float) -> nn.Module:
    """ "layer", "layer_fixed" (without parameters) or "rms"."""
    if kind == "rms":
        return RMSNorm(dim, eps=eps)
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=kind == "layer")


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier for every Linear, zero biases, norms at identity. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Mlp(nn.Module):
    """Hidden layer of four times the width; for "swiglu" two of 8/3, which is as many parameters."""

    def __init__(self, embed_dim: int, kind: str = "gelu") -> None:
        super().__init__()
        self.kind = kind
        self.hidden_dim = swiglu_dim(embed_dim) if kind == "swiglu" else 4 * embed_dim
        self.fc1 = nn.Linear(embed_dim, 2 * self.hidden_dim if kind == "swiglu" else self.hidden_dim)
        self.fc2 = nn.Linear(self.hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


def swiglu_dim(embed_dim: int) -> int:
    """8/3 of the width, rounded to a multiple of 8."""
    return 8 * round(embed_dim / 3)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x[j], x[j + d/2]) of (B, h, L, d) by its angle.      Su et al. 2021, arXiv 2104.09864"""
    cos, sin = rotation
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query's mean of the values, by softmax(q k^T / sqrt(d)): (B, h, M, d) on (B, h, L, d) twice, to (B, h, M, d).

    torch's fused attention, but for training in bf16 on a CPU, where its backward pass is slower than these plain products:
    4.5 times at 50 tokens of 12 x 64, 1.7 times at 197 of 16 x 32 (benchmarks/attention.py).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention over (B, L, D)."""

    def __init__(self, embed_dim: int, num_heads: int, qk_norm: bool = False, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.q_norm = norm_layer("rms", embed_dim // num_heads, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = norm_layer("rms", embed_dim // num_heads, norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        B, L, D = x.shape
        q, k, v = (
            self.qkv(x).reshape(B, L, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        )  # (B, h, L, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class CrossAttention(nn.Module):
    """Queries of one width on a memory of another; keys and values are computed apart, so that they can be kept."""

    def __init__(self, embed_dim: int, memory_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(embed_dim, embed_dim)
        self.kv = nn.Linear(memory_dim, 2 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory (B, L, memory_dim) to keys and values, (B, heads, L, d) each."""
        B, L, _ = memory.shape
        k, v = self.kv(memory).reshape(B, L, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, M, D), or (B * K, M, D) with K rows for each of the memory's: they ask together, so nothing is repeated."""
        B = len(keys_values[0])
        q = self.q(x).reshape(B, -1, self.num_heads, x.shape[-1] // self.num_heads).transpose(1, 2)
        return self.proj(attend(q, *keys_values).transpose(1, 2).reshape(x.shape))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D) scaled and shifted by (B, D) each."""
    return x * (1 + scale[:, None]) + shift[:, None]


def zero_linear(in_dim: int, out_dim: int) -> nn.Linear:
    """A Linear that returns zeros at first. Not for `init_weights`, which would undo it."""
    linear = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Block(nn.Module):
    """Pre-norm ViT block.

    With cond_dim it is adaLN-zero: both residual branches are shifted, scaled and gated by the condition, and the block is
    the identity at first.      Peebles & Xie 2023, arXiv 2212.09748, section 3.2

    drop_path: probability that a row skips a branch in training, drawn from torch's global generator.
    Set from outside, for training: recompute, whether to work out again in the backward pass what the forward pass would
    otherwise keep; compiled, what to call in place of `compute`.
    """

    recompute = False
    compiled: Callable[..., Tensor] | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        mlp: str = "gelu",
        qk_norm: bool = False,
        cond_dim: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(norm, embed_dim, norm_eps)
        self.attn = Attention(embed_dim, num_heads, qk_norm, norm_eps)
        self.norm2 = norm_layer(norm, embed_dim, norm_eps)
        self.mlp = Mlp(embed_dim, mlp)
        self.drop = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()
        self.apply(init_weights)
        self.modulation = zero_linear(cond_dim, 6 * embed_dim) if cond_dim else None

    def forward(self, x: Tensor, cond: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """x (B, L, D); cond (B, cond_dim) if it was built for one."""
        return _computed(self, x, cond, rotation)

    def compute(self, x: Tensor, cond: Tensor | None, rotation: Rotation | None) -> Tensor:
        if self.modulation is None:
            x = x + self.drop(self.attn(self.norm1(x), rotation))
            return x + self.drop(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + self.drop(gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rotation))
        return x + self.drop(gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2)))


class CrossBlock(nn.Module):
    """Pre-norm block whose tokens read a memory, then each other if self_attention, then go through an MLP.

    recompute, compiled: as those of `Block`.
    """

    recompute = False
    compiled: Callable[..., Tensor] | None = None

    def __init__(
        self, embed_dim: int, memory_dim: int, num_heads: int, self_attention: bool, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm_cross = norm_layer("layer", embed_dim, norm_eps)
        self.cross_attn = CrossAttention(embed_dim, memory_dim, num_heads)
        self.norm1 = norm_layer("layer", embed_dim, norm_eps) if self_attention else None
        self.attn = Attention(embed_dim, num_heads) if self_attention else None
        self.norm2 = norm_layer("layer", embed_dim, norm_eps)
        self.mlp = Mlp(embed_dim)
        self.apply(init_weights)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, L, D); keys and values as `CrossAttention.keys_values` makes them."""
        return _computed(self, x, keys_values)

    def compute(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.cross_attn(self.norm_cross(x), keys_values)
        if self.attn is not None and self.norm1 is not None:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks_of(model: nn.Module) -> list[Block | CrossBlock]:
    """Every transformer block of a model, encoder and decoder."""
    return [module for module in model.modules() if isinstance(module, (Block, CrossBlock))]


def _computed(block: Block | CrossBlock, *inputs: Any) -> Tensor:
    """A block's output, by its compiled function where it is trained, and worked out twice if it is to be."""
    if not torch.is_grad_enabled():
        return block.compute(*inputs)
    compute = block.compiled or block.compute
    return checkpoint(compute, *inputs, use_reentrant=False) if block.recompute else compute(*inputs)


class PositionTable(nn.Module):
    """Where tokens stand: what is added to them, (N, D), and by how much rotary attention turns each head.

    Args:
        kind: "sincos" and "rotary" are made from the grid and not saved; "learned" is N(0, 1/N) at first, as UMD has it;
            "separable" is a row for each place and one for each time, N(0, 0.02), whose sum it is, as MAE-ST has it.
    """

    pos_embed: Tensor
    pos_space: Tensor
    pos_time: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, kind: str, embed_dim: int, num_heads: int, grid: Grid) -> None:
        super().__init__()
        table = sincos_positions(embed_dim, grid)
        self.separable = kind == "separable"
        if self.separable:
            self.pos_space = nn.Parameter(torch.empty(grid[1] * grid[2], embed_dim))
            self.pos_time = nn.Parameter(torch.empty(grid[0], embed_dim))
            for rows in (self.pos_space, self.pos_time):
                nn.init.normal_(rows, std=0.02)
        elif kind == "learned":
            self.pos_embed = nn.Parameter(torch.empty_like(table))
            nn.init.normal_(self.pos_embed, std=len(table) ** -0.5)
        else:
            self.register_buffer("pos_embed", table, persistent=False)
        self.rotary = kind == "rotary"
        if self.rotary:
            angles = rotary_angles(embed_dim // num_heads, grid)
            self.register_buffer("cos", angles.cos().float(), persistent=False)
            self.register_buffer("sin", angles.sin().float(), persistent=False)

    def table(self) -> Tensor:
        """What is added to every token, (N, D)."""
        if self.separable:
            return (self.pos_time[:, None] + self.pos_space).flatten(0, 1)
        return self.pos_embed

    def forward(self, indices: Tensor) -> Tensor:
        """What is added to the tokens at these indices: (B, L) to (B, L, D)."""
        return self.table()[indices]

    def rotation(self, indices: Tensor, before: int, after: int = 0) -> Rotation | None:
        """For tokens at these indices (B, L), with tokens that stand nowhere before and after them, which are not turned."""
        if not self.rotary:
            return None
        return (
            F.pad(self.cos[indices], (0, 0, before, after), value=1.0)[:, None],
            F.pad(self.sin[indices], (0, 0, before, after))[:, None],
        )


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t at dim / 2 frequencies from 1 to about 1/10000: (B,) to (B, dim), always float32.

    Nichol & Dhariwal's embedding as DiT has it, arXiv 2212.09748, official code.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sinusoid_to_the_end(t: Tensor, dim: int) -> Tensor:
    """[sin | cos] of t at dim / 2 frequencies from 1 to exactly 1/10000, as UMD has it; otherwise `sinusoid`."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * -(math.log(10000) / max(1, half - 1))
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


FREQUENCY_DIM = 256  # of the plain trunk; DiT's


class Trunk(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, hidden_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        for linear in (self.fc1, self.fc2):  # DiT's
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class Condition(nn.Module):
    """Time and class as one vector.

    Args:
        wide: UMD's trunk instead of DiT's; see `unveil.config.Condition`.
        num_classes: 0 for none; the table's last row means "no class".
        num_label_tokens: tokens made of the class row and a learned place of their own.
        activate: end with a SiLU, which adaLN's modulations share.
    """

    def __init__(
        self, embed_dim: int, *, wide: bool, num_classes: int, num_label_tokens: int = 0, activate: bool = False
    ) -> None:
        super().__init__()
        self.wide, self.num_classes, self.activate = wide, num_classes, activate
        self.frequency_dim = embed_dim if wide else FREQUENCY_DIM
        self.time = Trunk(self.frequency_dim, 2 * embed_dim if wide else embed_dim, embed_dim)
        self.label_embed = nn.Embedding(num_classes + 1, embed_dim) if num_classes else None
        self.label = Trunk(embed_dim, 2 * embed_dim, embed_dim) if num_classes and wide else None
        self.label_places = None
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
            if num_label_tokens:
                self.label_places = nn.Parameter(torch.empty(1, num_label_tokens, embed_dim))
                nn.init.normal_(self.label_places, std=0.02)

    def _row(self, t: Tensor, labels: Tensor | None) -> Tensor:
        assert self.label_embed is not None
        if labels is None:
            labels = torch.full((t.shape[0],), self.num_classes, device=t.device)
        row = self.label_embed(labels)
        return row if self.label is None else self.label(row)

    def forward(self, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Time and class, (B, D), and the class as tokens, (B, num_label_tokens, D), or None without them.

        Args:
            t: (B,), as the network counts it.
            labels: (B,) in 0 .. K, K for "no class", as None is.
        """
        embed = sinusoid_to_the_end if self.wide else sinusoid
        cond = self.time(embed(t, self.frequency_dim))
        tokens = None
        if self.label_embed is not None:
            row = self._row(t, labels)
            cond = cond + row
            tokens = None if self.label_places is None else row[:, None] + self.label_places
        return F.silu(cond) if self.activate else cond, tokens


def run_block(block: nn.Module, x: Tensor, cond: Tensor | None, as_token: bool, rotation: Rotation | None) -> Tensor:
    """One block, with the condition as one more token that is put before its input and taken off its output again."""
    if not as_token:
        return block(x, cond, rotation)
    assert cond is not None
    if rotation is not None:
        rotation = (F.pad(rotation[0], (0, 0, 1, 0), value=1.0), F.pad(rotation[1], (0, 0, 1, 0)))
    return block(torch.cat([cond[:, None], x], dim=1), None, rotation)[:, 1:]


class Head(nn.Module):
    """From a width to predictions: norm, modulation under adaLN, and a Linear for each quantity.

    Args:
        names: what is predicted.
        init: "xavier", "normal" (0.02) or "zeros", of those Linear maps.
    """

    def __init__(
        self,
        embed_dim: int,
        token_dim: int,
        names: tuple[str, ...],
        *,
        norm: str,
        norm_eps: float,
        init: str,
        cond_dim: int | None,
    ) -> None:
        super().__init__()
        self.norm = norm_layer(norm, embed_dim, norm_eps)
        self.modulation = zero_linear(cond_dim, 2 * embed_dim) if cond_dim else None
        self.pred = nn.ModuleDict({name: nn.Linear(embed_dim, token_dim) for name in names})
        for linear in self.pred.values():
            assert isinstance(linear, nn.Linear)
            if init == "normal":
                nn.init.normal_(linear.weight, std=0.02)
            elif init == "zeros":
                nn.init.zeros_(linear.weight)
            else:
                nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, cond: Tensor | None) -> dict[str, Tensor]:
        """(B, S, D) to one (B, S, P) for each name."""
        x = self.norm(x)
        if self.modulation is not None:
            x = modulate(x, *self.modulation(cond).chunk(2, dim=-1))
        return {name: linear(x) for name, linear in self.pred.items()}
