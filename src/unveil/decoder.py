"""Decoders: from the encoder's memory and the hidden tokens' noisy values to a prediction for each hidden token.

    joint       visible and hidden tokens together through ordinary blocks; reads the encoder's last output (MAE's)
    cross       hidden tokens read the memory; they never see each other
    cross_self  the same, and then attend to each other

`cross` and `cross_self` are connected top-down: their first block reads the deepest tap of the encoder. Every tap has a
LayerNorm of its own; the last block's is the encoder's final one. Time is added to the hidden tokens at the input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unveil.layers import Block, CrossBlock, TimeEmbedding, init_weights, layer_norm
from unveil.tokens import Grid, sincos_positions

Context = list[Tensor] | list[tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """Predicts the hidden tokens.

    Args:
        kind: "joint", "cross" or "cross_self".
        memory_dim: width of the encoder.
        noisy: whether the hidden tokens' noisy values and their time come in; otherwise they are mask tokens.
        num_taps: memories that `prepare` will be given; the first is normalised already.
    """

    pos_embed: Tensor

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
    ) -> None:
        super().__init__()
        self.kind = kind
        self.mask_token = None if noisy else nn.Parameter(torch.empty(1, 1, embed_dim))
        self.noisy_embed = nn.Linear(token_dim, embed_dim) if noisy else None
        self.time_embed = TimeEmbedding(embed_dim) if noisy else None
        if kind == "joint":
            self.embed = nn.Linear(memory_dim, embed_dim)
            self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        else:
            self.tap_norms = nn.ModuleList(nn.Identity() if i == 0 else layer_norm(memory_dim) for i in range(num_taps))
            self.blocks = nn.ModuleList(
                CrossBlock(embed_dim, memory_dim, num_heads, self_attention=kind == "cross_self") for _ in range(depth)
            )
        self.norm = layer_norm(embed_dim)
        self.pred = nn.Linear(embed_dim, token_dim)
        self.register_buffer("pos_embed", sincos_positions(embed_dim, grid), persistent=False)
        self.apply(init_weights)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        if self.time_embed is not None:
            self.time_embed.init_weights()

    def prepare(self, memory: Sequence[Tensor], visible: Tensor) -> Context:
        """All that depends on the visible tokens alone, so that a sampler computes it once.

        Args:
            memory: one (B, 1 + V, memory_dim) for each tap, deepest first.
            visible: (B, V).

        Returns:
            Keys and values for each block, or for `joint` the embedded visible tokens.
        """
        if self.kind == "joint":
            x = self.embed(memory[0])
            return [torch.cat([x[:, :1], x[:, 1:] + self.pos_embed[visible]], dim=1)]
        context = []
        for block, norm, tap in zip(self.blocks, self.tap_norms, memory, strict=True):
            assert isinstance(block, CrossBlock)
            context.append(block.cross_attn.keys_values(norm(tap)))
        return context

    def forward(self, context: Context, hidden: Tensor, x_t: Tensor | None, t: Tensor | None) -> Tensor:
        """Predict every hidden token.

        Args:
            context: what `prepare` returned.
            hidden: where the hidden tokens stand, (B, M).
            x_t: their noisy values, (B, M, P), and t: its time, (B,); None for mask tokens.

        Returns:
            (B, M, P).
        """
        x = self.pos_embed[hidden]  # (B, M, D)
        if self.mask_token is not None:
            x = x + self.mask_token
        else:
            assert self.noisy_embed is not None and self.time_embed is not None and x_t is not None and t is not None
            x = x + self.noisy_embed(x_t) + self.time_embed(t)[:, None]
        if self.kind == "joint":
            known = context[0]
            assert isinstance(known, Tensor)
            x = torch.cat([known, x], dim=1)
            for block in self.blocks:
                x = block(x)
            x = x[:, known.shape[1] :]
        else:
            for block, keys_values in zip(self.blocks, context, strict=True):
                x = block(x, keys_values)
        return self.pred(self.norm(x))
