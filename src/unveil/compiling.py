"""Transformer blocks compiled by torch.compile, each by itself: all blocks of a kind are compiled once, in seconds."""

import torch
from torch import nn

from unveil.layers import Block, blocks_of

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
        lines = [line for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    for block in blocks_of(model):
        block.compiled = torch.compile(block.compute)
    return None


def _compile_one(device: str, bf16: bool) -> None:
    """Train a block of its own, small and compiled, for one step."""
    torch._dynamo.reset()  # it counts the graphs of earlier runs in this process
    with torch.random.fork_rng(devices=[]):
        block = Block(16, 2).to(device)
    x = torch.zeros(2, 4, 16, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        torch.compile(block.compute)(x, None, None).sum().backward()
