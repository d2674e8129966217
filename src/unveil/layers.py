"""Transformer blocks with timm's parameter names, and the embedding of time. Sizes are flat arguments."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LN_EPS = 1e-6  # as MAE and timm have it; torch's default is 1e-5


def layer_norm(embed_dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(embed_dim, eps=LN_EPS)


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier for every Linear, zero biases, LayerNorms at identity. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class Mlp(nn.Module):
    def __init__(self, embed_dim: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, int(embed_dim * mlp_ratio))
        self.fc2 = nn.Linear(int(embed_dim * mlp_ratio), embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention over (B, L, D)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = (
            self.qkv(x).reshape(B, L, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        )  # (B, h, L, d)
        x = F.scaled_dot_product_attention(q, k, v)
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
        B, M, D = x.shape
        q = self.q(x).reshape(B, M, self.num_heads, -1).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, *keys_values)
        return self.proj(x.transpose(1, 2).reshape(B, M, D))


class Block(nn.Module):
    """Pre-norm ViT block."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(embed_dim)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = layer_norm(embed_dim)
        self.mlp = Mlp(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Pre-norm block whose tokens read a memory, then each other if self_attention, then go through an MLP."""

    def __init__(self, embed_dim: int, memory_dim: int, num_heads: int, self_attention: bool) -> None:
        super().__init__()
        self.norm_cross = layer_norm(embed_dim)
        self.cross_attn = CrossAttention(embed_dim, memory_dim, num_heads)
        self.norm1 = layer_norm(embed_dim) if self_attention else None
        self.attn = Attention(embed_dim, num_heads) if self_attention else None
        self.norm2 = layer_norm(embed_dim)
        self.mlp = Mlp(embed_dim)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.cross_attn(self.norm_cross(x), keys_values)
        if self.attn is not None and self.norm1 is not None:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t at dim / 2 frequencies from 1 to about 1/10000: (B,) to (B, dim), always float32.

    Nichol & Dhariwal's embedding as DiT has it, arXiv 2212.09748, official code.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Time to width: sinusoid, Linear, SiLU, Linear. (B,) to (B, D)."""

    def __init__(self, embed_dim: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.fc1 = nn.Linear(frequency_dim, embed_dim)
        self.fc2 = nn.Linear(embed_dim, embed_dim)

    def init_weights(self) -> None:
        """DiT's: N(0, 0.02); call after the module's general initialisation."""
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(sinusoid(t, self.frequency_dim))))
