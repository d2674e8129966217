"""The encoder: a ViT with a class token over the visible tokens only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unveil.layers import Block, TimeEmbedding, init_weights, layer_norm
from unveil.tokens import Grid, sincos_positions


class _PatchEmbed(nn.Module):
    """A Linear on a token's values, under timm's name `patch_embed.proj`."""

    def __init__(self, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(token_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Encoder(nn.Module):
    """Parameter names are timm's ViT's; positions are fixed, made from the grid, and not saved.

    Args:
        with_time: give it the time of its noisy input; only for encoders that see noise.
    """

    pos_embed: Tensor

    def __init__(
        self, *, grid: Grid, token_dim: int, embed_dim: int, depth: int, num_heads: int, with_time: bool = False
    ) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(token_dim, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.time_embed = TimeEmbedding(embed_dim) if with_time else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = layer_norm(embed_dim)
        self.register_buffer("pos_embed", sincos_positions(embed_dim, grid), persistent=False)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.time_embed is not None:
            self.time_embed.init_weights()

    def forward(self, x: Tensor, visible: Tensor, taps: Sequence[int], t: Tensor | None = None) -> list[Tensor]:
        """Encode the tokens that are given.

        Args:
            x: values of the visible tokens, (B, V, P); V may be 0.
            visible: where they stand, (B, V).
            taps: blocks whose outputs are wanted, counted from 1; the last block's comes through the final LayerNorm.
            t: time of noisy input, (B,), for an encoder with time.

        Returns:
            One (B, 1 + V, D) for each tap, class token first.
        """
        x = self.patch_embed(x) + self.pos_embed[visible]
        if self.time_embed is not None:
            assert t is not None
            x = x + self.time_embed(t)[:, None]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        outputs = {}
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if i in taps:
                outputs[i] = self.norm(x) if i == len(self.blocks) else x
        return [outputs[i] for i in taps]
