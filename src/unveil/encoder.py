"""The encoder: a ViT over the visible tokens only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unveil.layers import Block, PositionTable, init_weights, norm_layer, run_block
from unveil.tokens import Grid


class _PatchEmbed(nn.Module):
    """A Linear on a token's values, under timm's name `patch_embed.proj`."""

    def __init__(self, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(token_dim, embed_dim)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Encoder(nn.Module):
    """Parameter names are timm's ViT's; fixed positions are made from the grid and not saved.

    Args:
        num_class_tokens, class_token_init, norm, norm_eps, mlp, qk_norm, positions: as in `unveil.config`.
        time: how the condition enters: "none", "add", "token" or "adaln".
        final_norm: whether the last block's output is normalised here; otherwise whoever reads it does.
        label_tokens_from: the block that tokens of the class join at, counted from 1.
        drop_path: of the last block; it grows evenly from 0 in the first.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        token_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_class_tokens: int = 1,
        class_token_init: str = "normal",
        norm: str = "layer",
        norm_eps: float = 1e-6,
        mlp: str = "gelu",
        qk_norm: bool = False,
        positions: str = "sincos",
        time: str = "none",
        final_norm: bool = True,
        label_tokens_from: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.time, self.num_class_tokens, self.label_tokens_from = time, num_class_tokens, label_tokens_from
        self.patch_embed = _PatchEmbed(token_dim, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, num_class_tokens, embed_dim)) if num_class_tokens else None
        if self.cls_token is not None and class_token_init == "normal":
            nn.init.normal_(self.cls_token, std=0.02)
        self.positions = PositionTable(positions, embed_dim, num_heads, grid)
        cond_dim = embed_dim if time == "adaln" else None
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                norm=norm,
                norm_eps=norm_eps,
                mlp=mlp,
                qk_norm=qk_norm,
                cond_dim=cond_dim,
                drop_path=drop_path * i / max(1, depth - 1),
            )
            for i in range(depth)
        )
        self.norm = norm_layer(norm, embed_dim, norm_eps) if final_norm else None

    def forward(
        self,
        x: Tensor,
        visible: Tensor,
        taps: Sequence[int],
        cond: Tensor | None = None,
        label_tokens: Tensor | None = None,
    ) -> list[Tensor]:
        """Encode the tokens that are given.

        Args:
            x: values of the visible tokens, (B, V, P); V may be 0.
            visible: where they stand, (B, V).
            taps: blocks whose outputs are wanted, counted from 1; the last block's comes through the final norm.
            cond: time and class, (B, D), for an encoder that is told them.
            label_tokens: (B, K, D), or None.

        Returns:
            One (B, R + V, D) for each tap, class tokens first.
        """
        x = self.patch_embed(x) + self.positions(visible)
        if self.time == "add":
            assert cond is not None
            x = x + cond[:, None]
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        length = x.shape[1]  # label tokens come last, and never leave
        rotation = self.positions.rotation(visible, self.num_class_tokens)
        outputs = {}
        for i, block in enumerate(self.blocks, start=1):
            if label_tokens is not None and i == self.label_tokens_from:
                x = torch.cat([x, label_tokens.to(x.dtype)], dim=1)
                rotation = self.positions.rotation(visible, self.num_class_tokens, label_tokens.shape[1])
            x = run_block(block, x, cond, self.time == "token", rotation)
            if i in taps:
                out = x[:, :length]
                outputs[i] = self.norm(out) if i == len(self.blocks) and self.norm is not None else out
        return [outputs[i] for i in taps]
