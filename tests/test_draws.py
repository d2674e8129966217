"""Draws are named, so their order and company do not matter."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from unveil import draws
from unveil.data import Order


def draw(seed: int, *parts: int | str) -> torch.Tensor:
    return torch.randn(4, generator=draws.generator(seed, *parts))


def test_the_same_name_gives_the_same_draw() -> None:
    assert torch.equal(draw(0, 3, 17, "mask"), draw(0, 3, 17, "mask"))


@pytest.mark.parametrize(
    "other", [(1, 3, 17, "mask"), (0, 4, 17, "mask"), (0, 3, 18, "mask"), (0, 3, 17, "noise"), (0, 17, 3, "mask")]
)
def test_another_seed_epoch_sample_or_purpose_gives_another_draw(other: tuple[int | str, ...]) -> None:
    assert not torch.equal(draw(0, 3, 17, "mask"), draw(*other))  # type: ignore[arg-type]


def test_draws_do_not_depend_on_their_order_or_on_the_global_generator() -> None:
    forward = {index: draw(0, 1, index, "mask") for index in range(5)}
    torch.rand(7)
    state = torch.get_rng_state()
    backward = {index: draw(0, 1, index, "mask") for index in reversed(range(5))}
    assert torch.equal(torch.get_rng_state(), state)
    for index in range(5):
        assert torch.equal(forward[index], backward[index])


def test_keys_are_unambiguous() -> None:
    names = [(1, 23), (12, 3), (123,), ("1", 23), (1, "23"), ("1, 23",), ("'1', 23",), (-1, 23), (1, 23, ""), ()]
    assert len({draws.key(0, *name) for name in names}) == len(names)


def test_keys_fit_into_63_bits_and_do_not_collide_in_practice() -> None:
    keys = {draws.key(0, epoch, index, "augment") for epoch in range(20) for index in range(1000)}
    assert len(keys) == 20_000
    assert min(keys) >= 0
    assert 2**62 < max(keys) < 2**63


def test_integers_of_other_libraries_name_the_same_draw() -> None:
    assert draws.key(np.int64(0), np.int32(3), torch.tensor(4)) == draws.key(0, 3, 4)  # type: ignore[arg-type]


def test_keys_refuse_floats() -> None:
    with pytest.raises(TypeError, match="float"):
        draws.key(0, 0.5)  # type: ignore[arg-type]


def test_keys_are_the_same_in_every_process() -> None:
    # Python's own hash() of a string would differ between processes, as it must here.
    program = "from unveil import draws; print(draws.key(5, 2, 'mask'), hash('mask'))"
    environment = {**os.environ, "PYTHONHASHSEED": "random"}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    key, hashed = map(int, out.stdout.split())
    assert hashed != hash("mask")
    assert key == draws.key(5, 2, "mask")


# Who gets which clip


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.05, 0.95), (0.25, 0.75), (0.95, 0.05), (1 / 3, 2 / 3), (0.7, 0.3)])
def test_every_stretch_is_dealt_out_by_the_shares(shares: tuple[float, float]) -> None:
    """Wherever it begins: exactly where the shares give whole numbers, and otherwise to less than one."""
    party = np.array([draws.deal(place, shares) for place in range(1500)])
    for number, share in enumerate(shares):
        before = np.concatenate([[0], np.cumsum(party == number)])
        for n in (1, 2, 3, 4, 7, 20, 64, 100, 256, 1000):
            got = before[n:] - before[:-n]
            assert (abs(got - n * share) < 1 - 1e-6).all(), (number, n)
            if abs(n * share - round(n * share)) < 1e-9:
                assert (got == round(n * share)).all(), (number, n)


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0.1, 0.2, 0.3, 0.4), (1 / 3, 1 / 3, 1 / 3)])
def test_more_than_two_parties_get_their_shares_within_two(shares: tuple[float, ...]) -> None:
    party = np.array([draws.deal(place, shares) for place in range(3000)])
    for number, share in enumerate(shares):
        before = np.concatenate([[0], np.cumsum(party == number)])
        assert abs(before - share * np.arange(3001)).max() < 2
        for n in range(1, 200):
            assert (abs(before[n:] - before[:-n] - n * share) < 2).all()


def test_the_only_party_gets_everything() -> None:
    assert {draws.deal(place, (1.0,)) for place in range(100)} == {0}


def test_far_places_are_dealt_out_as_near_ones_are() -> None:
    """Places of a large data set, where a rounded product could skip a turn."""
    for shares in ((0.5, 0.5), (0.05, 0.95)):
        far = [draws.deal(place, shares) for place in range(10_000_000, 10_000_400)]
        assert far.count(0) == round(400 * shares[0])


def test_a_clips_branch_does_not_depend_on_the_batch_or_the_process() -> None:
    """Places in the epoch's order: every batch has its shares, however large, and whoever reads it."""
    shares = (0.5, 0.5)

    def places(batch_size: int, epoch: int) -> dict[int, int]:
        order = Order(101, batch_size, epoch=epoch, seed=5, shuffle=True, drop_last=False)
        return {index: place for batch in order for _, place, index in batch}

    order = Order(101, 8, epoch=3, seed=5, shuffle=True, drop_last=False)
    batches = [[place for _, place, _ in batch] for batch in order]
    assert list(itertools.chain(*batches)) == list(range(101))
    assert sorted(places(8, 3)) == list(range(101))
    branch = [draws.deal(place, shares) for place in range(101)]
    for batch in batches[:-1]:
        assert [branch[place] for place in batch].count(0) == 4
        for process in (batch[:4], batch[4:]):  # a batch over two processes, half of it each
            assert [branch[place] for place in process].count(0) == 2
    assert places(20, 3) == places(8, 3)
    assert places(8, 4) != places(8, 3)
