"""Attention in training on this CPU: torch's fused kernel against plain matrix products, forward and backward.

    python benchmarks/attention.py

The sizes are those of MAE ViT-B at 224 px: 50 tokens of 12 heads in the encoder, 197 of 16 heads in the decoder. Every round
runs each in turn; the medians of the processor's time are what counts.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Options:
    batch_size: int = 16
    rounds: int = 15


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def main(options: Options) -> None:
    B = options.batch_size
    for name, heads, L, d in (("encoder", 12, 50, 64), ("decoder", 16, 197, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(B, L, 3, heads, d, dtype=dtype, requires_grad=True)
            times: dict[str, list[float]] = {"fused": [], "plain": []}
            for _ in range(options.rounds + 1):
                for kind, attend in (("fused", F.scaled_dot_product_attention), ("plain", plain)):
                    begin = time.process_time()
                    q, k, v = qkv.permute(2, 0, 3, 1, 4)
                    out = attend(q, k, v)
                    torch.autograd.grad(out.transpose(1, 2).reshape(B, L, heads * d).float().square().sum(), qkv)
                    times[kind].append(time.process_time() - begin)
            fused, products = (1e3 * statistics.median(seen[1:]) for seen in times.values())
            print(
                f"{name}, {L} tokens of {heads} x {d}, {dtype}: fused {fused:.1f} ms, plain {products:.1f} ms, "
                f"fused / plain {fused / products:.2f}"
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
