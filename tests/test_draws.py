"""Draws are named, so their order and company do not matter."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from unveil import draws


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
    # Python's own hash() of a string would differ between processes.
    program = "from unveil import draws; print(draws.key(5, 2, 'mask'))"
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert int(out.stdout) == draws.key(5, 2, "mask")
