"""Random draws by name: what is drawn for a sample depends on (seed, epoch, sample, purpose) and on nothing else.

Not on the batch that a sample is in, the worker that reads it, the process, or what was drawn before it.
"""

import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence

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


def generators(
    seed: int, epoch: int, indices: Iterable[int], purpose: str, device: torch.device | str = "cpu"
) -> Iterator[torch.Generator]:
    """`generator(seed, epoch, index, purpose)` for one sample after the other, or one on another device.

    It is one generator that is seeded anew, which takes half the time: draw from it before the next sample's turn. A GPU has
    other numbers for a key than a CPU, and the same ones whenever it is asked; it is not waited for.
    """
    one = torch.Generator(device)
    for index in indices:
        yield one.manual_seed(key(seed, epoch, index, purpose))


def deal(place: int, shares: Sequence[float]) -> int:
    """Who gets the sample at this place of an epoch's order, so that every stretch of the order is dealt out by the shares.

    Of two parties, n places in a row give each share * n samples, to less than one whole sample; exactly where that is a
    whole number. Of more, to less than two. It needs no count of what came before, so a batch, a process or a resumed run
    changes nothing.

    Args:
        place: 0, 1, ... in the epoch's order.
        shares: of each party; they sum to 1.

    Returns:
        The party's number.
    """
    left = 1.0
    for party, share in enumerate(shares[:-1]):
        part = share / left
        taken = math.floor(place * part + 1e-9)  # so that 0.05 * 20 counts as 1
        if math.floor((place + 1) * part + 1e-9) > taken:
            return party
        place, left = place - taken, left - share
    return len(shares) - 1
