"""Decoders: from the encoder's memory, and the hidden tokens' noisy values if they carry noise, to a vector for each token.

    joint       visible and hidden tokens together through ordinary blocks; reads the encoder's last output (MAE's)
    cross       hidden tokens read the memory; they never see each other
    cross_self  the same, and then attend to each other

`cross` and `cross_self` are connected top-down: their first block reads the deepest tap of the encoder. Every tap has a
LayerNorm of its own; the last block's is the encoder's final one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unveil.layers import Block, CrossBlock, PositionTable, init_weights, modulate, norm_layer, run_block, zero_linear
from unveil.tokens import Grid


@dataclass(frozen=True)
class Context:
    """What a decoder keeps of the visible tokens.

    visible: where they stand, (B, V). known: the tokens of a joint decoder, (B, S + V, D), S of them a summary.
    keys_values: for each block of a decoder that crosses.
    """

    visible: Tensor
    known: Tensor | None
    keys_values: list[tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """Works out the hidden tokens, and in a joint decoder the visible ones as well.

    Args:
        kind: "joint", "cross" or "cross_self".
        memory_dim: width of the encoder.
        num_taps: memories that `prepare` will be given; the first is normalised already.
        noisy: whether some branch hands over the hidden tokens' noisy values.
        masked: whether some branch puts mask tokens in their place.
        num_class_tokens, summary: those of the encoder, and how they enter a joint decoder: "tokens", "mean" or "own".
        norm, norm_eps, mlp, qk_norm, positions, time: as in `unveil.config`.
        cond_dim: width of the condition.
    """

    def __init__(
        self,
        *,
        kind: str,
        grid: Grid,
        token_dim: int,
        memory_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_taps: int,
        noisy: bool,
        masked: bool,
        num_class_tokens: int = 1,
        summary: str = "tokens",
        norm: str = "layer",
        norm_eps: float = 1e-6,
        mlp: str = "gelu",
        qk_norm: bool = False,
        positions: str = "sincos",
        time: str = "none",
        cond_dim: int = 0,
    ) -> None:
        super().__init__()
        self.kind, self.time, self.summary, self.num_class_tokens = kind, time, summary, num_class_tokens
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if masked else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if summary == "own" else None
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        self.noisy_embed = nn.Linear(token_dim, embed_dim).apply(init_weights) if noisy else None
        self.embed = self.embed_modulation = None
        if kind == "joint":
            adaln = cond_dim if time == "adaln" else None
            if embed_dim != memory_dim:
                self.embed = nn.Linear(memory_dim, embed_dim).apply(init_weights)
                self.embed_modulation = zero_linear(adaln, 2 * memory_dim) if adaln else None
            self.blocks = nn.ModuleList(
                Block(embed_dim, num_heads, norm=norm, norm_eps=norm_eps, mlp=mlp, qk_norm=qk_norm, cond_dim=adaln)
                for _ in range(depth)
            )
        else:
            self.tap_norms = nn.ModuleList(
                nn.Identity() if i == 0 else norm_layer("layer", memory_dim, norm_eps) for i in range(num_taps)
            )
            self.blocks = nn.ModuleList(
                CrossBlock(embed_dim, memory_dim, num_heads, kind == "cross_self", norm_eps) for _ in range(depth)
            )
        self.positions = PositionTable(positions, embed_dim, num_heads, grid)

    def prepare(self, memory: Sequence[Tensor], visible: Tensor, cond: Tensor | None = None) -> Context:
        """All that depends on the visible tokens alone (and under adaLN on the condition), so that a sampler computes it once.

        Args:
            memory: one (B, R + V, memory_dim) for each tap, deepest first.
            visible: (B, V).
        """
        if self.kind == "joint":
            x = memory[0]
            if self.embed_modulation is not None:
                x = modulate(x, *self.embed_modulation(cond).chunk(2, dim=-1))
            if self.embed is not None:
                x = self.embed(x)
            summary, x = x[:, : self.num_class_tokens], x[:, self.num_class_tokens :]
            if self.summary == "mean":
                summary = summary.mean(1, keepdim=True)
            elif self.cls_token is not None:
                summary = self.cls_token.expand(x.shape[0], -1, -1)
            return Context(visible, torch.cat([summary, x + self.positions(visible)], dim=1), [])
        keys_values = []
        for block, norm, tap in zip(self.blocks, self.tap_norms, memory, strict=True):
            assert isinstance(block, CrossBlock)
            keys_values.append(block.cross_attn.keys_values(norm(tap)))
        return Context(visible, None, keys_values)

    def forward(
        self, context: Context, hidden: Tensor, x_t: Tensor | None = None, cond: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Work out every token.

        Args:
            context: what `prepare` returned.
            hidden: where the hidden tokens stand, (B, M); M may be 0 in a joint decoder. With K draws of noise for each clip
                of the context it, x_t and cond have B * K rows.
            x_t: their noisy values, (B, M, P), or None for mask tokens.
            cond: time and class, (B, cond_dim).

        Returns:
            Visible tokens (B, V, D), or None from decoders that cross; hidden tokens (B, M, D). Before the head.
        """
        x = self.positions(hidden)  # (B, M, D)
        if x_t is None:
            assert self.mask_token is not None
            x = x + self.mask_token
        else:
            assert self.noisy_embed is not None
            x = x + self.noisy_embed(x_t)
            if self.time == "add":
                assert cond is not None
                x = x + cond[:, None]
        if context.known is None:
            for block, keys_values in zip(self.blocks, context.keys_values, strict=True):
                x = block(x, keys_values)
            return None, x
        draws = len(x) // len(context.known)
        visible, known = context.visible, context.known
        if draws > 1:
            visible, known = visible.repeat_interleave(draws, dim=0), known.repeat_interleave(draws, dim=0)
        num_visible, num_known = visible.shape[1], known.shape[1]
        rotation = self.positions.rotation(torch.cat([visible, hidden], dim=1), num_known - num_visible)
        x = torch.cat([known, x], dim=1)
        for block in self.blocks:
            x = run_block(block, x, cond, self.time == "token", rotation)
        return x[:, num_known - num_visible : num_known], x[:, num_known:]
