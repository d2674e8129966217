"""Random draws by name: what is drawn for a sample depends on (seed, epoch, sample, purpose) and on nothing else.

Not on the batch that a sample is in, the worker that reads it, the process, or what was drawn before it.
"""

import hashlib
import operator

import torch


def key(seed: int, *parts: int | str) -> int:
    """The number that names one draw, in [0, 2^63); (1, 23), (12, 3), (23, 1) and ("1", 23) have different ones.

    Args:
        seed: the run's seed, any integer.
        parts: what the draw is for, for example `epoch, index, "augment"`.
    """
    plain = (operator.index(seed), *(part if isinstance(part, str) else operator.index(part) for part in parts))
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A fresh CPU generator for one draw, seeded with `key(seed, *parts)`."""
    # torch's CPU generator keeps the low 32 bits of a seed: among millions of keys a few will share a stream by chance.
    return torch.Generator().manual_seed(key(seed, *parts))
