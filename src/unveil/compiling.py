"""Transformer blocks compiled by torch.compile, each by itself: all blocks of a kind are compiled once, in seconds."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from unveil.layers import Block, CrossBlock, blocks_of

MAX_GRAPHS = 64  # of one function; blocks differ in drop path and shapes


def compile_blocks(model: nn.Module, device: str, bf16: bool) -> str | None:
    """Have every block of a model compiled when it is first trained, if this machine can compile.

    Running averages are to be made before, as compiled functions are not copied. Gradient checkpointing and FSDP work around
    what is compiled.

    Returns:
        Why nothing is compiled, in a line; None if it is.
    """
    try:
        _compile_one(device, bf16)
    except Exception as error:  # no compiler, no Triton, no room for its cache: whatever it is, eager works
        torch._dynamo.reset()
        return _first_line(error)
    torch._dynamo.config.optimize_ddp = False  # it would cut a block's graph where DDP's buckets end
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    for block in blocks_of(model):
        block.compiled = _or_eager(block)
    return None


def _or_eager(block: Block | CrossBlock) -> Callable[..., Tensor]:
    compiled = torch.compile(block.compute)

    def compute(*inputs: Any) -> Tensor:
        try:
            return compiled(*inputs)
        except TorchDynamoException as error:  # what the trial did not show
            block.compiled = None
            warnings.warn(f"A {type(block).__name__} stays uncompiled: {_first_line(error)}", stacklevel=1)
            return block.compute(*inputs)

    return compute


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _compile_one(device: str, bf16: bool) -> None:
    """Train a block of its own, small and compiled, for one step."""
    torch._dynamo.reset()  # it counts the graphs of earlier runs in this process
    with torch.random.fork_rng(devices=[]):
        block = Block(16, 2).to(device)
    x = torch.zeros(2, 4, 16, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        torch.compile(block.compute)(x, None, None).sum().backward()
