"""Schedules: recorded values, exact ends, conversions, posterior, the times of a sampler."""

import itertools

import pytest
import torch
from small import generator
from torch.testing import assert_close

from unveil.sampling import check_times
from unveil.schedule import (
    DiscreteSchedule,
    add_noise,
    eps_from_v,
    eps_from_x0,
    posterior,
    v_from_x0_eps,
    x0_from_eps,
    x0_from_v,
)
from unveil.tokens import patchify

KINDS = [("linear", 1.0), ("linear", 0.8), ("linear", 0.6), ("linear", 0.4), ("cosine", 1.0), ("cosine", 0.8)]


@pytest.mark.parametrize("kind, rho", KINDS)
@pytest.mark.parametrize("num_steps", [1000, 50])
def test_alpha_bar_falls_from_one(kind: str, rho: float, num_steps: int) -> None:
    schedule = DiscreteSchedule(kind, num_steps, rho)
    assert schedule.alpha_bar.dtype == torch.float64
    assert schedule.alpha_bar.shape == (num_steps + 1,)
    assert schedule.alpha_bar[0] == 1
    assert (schedule.alpha_bar.diff() < 0).all()
    assert schedule.alpha_bar[-1] > 0
    assert_close(1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1], schedule.betas, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind, rho", KINDS)
def test_time_zero_is_exact(kind: str, rho: float) -> None:
    alpha, sigma = DiscreteSchedule(kind, rho=rho).rates(torch.zeros(2, dtype=torch.long))
    x0, eps = torch.randn(2, 2, 4, 3, generator=generator()).unbind()
    assert alpha.tolist() == [1, 1]
    assert sigma.tolist() == [0, 0]
    assert torch.equal(add_noise(x0, eps, alpha, sigma), x0)


@pytest.mark.parametrize(
    "kind, rho, values",
    [
        ("linear", 1.0, (0.999900, 0.8970, 0.5241, 7.859e-2, 4.036e-5)),
        ("linear", 0.8, (0.999369, 0.6602, 0.1260, 8.009e-4, 1.708e-11)),
        ("linear", 0.6, (0.996019, 0.1996, 1.1e-3, 1.355e-9, 9.2e-28)),
        ("cosine", 1.0, (0.999959, 0.9721, 0.8470, 0.4938, 2.4e-9)),
        ("cosine", 0.8, (0.999689, 0.8678, 0.4978, 7.92e-2, 1.7e-14)),
    ],
)
def test_recorded_alpha_bar(kind: str, rho: float, values: tuple[float, ...]) -> None:
    """At t = 1, 100, 250, 500 and 1000; each to half a unit of the last digit that was written down."""
    found = DiscreteSchedule(kind, rho=rho).alpha_bar[[1, 100, 250, 500, 1000]].tolist()
    for value, recorded in zip(found, values, strict=True):
        text = f"{recorded:e}"
        digits = len(text.split("e")[0].rstrip("0").replace(".", ""))
        assert f"{value:.{digits - 1}e}" == f"{recorded:.{digits - 1}e}"


@pytest.mark.parametrize("rho, first", [(1.0, 260), (0.8, 135), (0.6, 58)])
def test_recorded_half_time(rho: float, first: int) -> None:
    schedule = DiscreteSchedule("linear", rho=rho)
    assert int((schedule.alpha_bar < 0.5).nonzero()[0]) == first


def test_recorded_betas() -> None:
    betas = DiscreteSchedule("linear", rho=0.8).betas
    assert f"{betas[0]:.3e}" == "6.310e-04"
    assert f"{betas[-1]:.4f}" == "0.0437"


@pytest.mark.parametrize("alpha, sigma", [(0.8, 0.6), (0.7, 0.3), (0.2, 1.9), (1.0, 5.0), (1e-3, 1.0)])
def test_conversions_round_trip(alpha: float, sigma: float) -> None:
    """Also where alpha^2 + sigma^2 is not 1."""
    x0, eps = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator()).unbind()
    rates = (torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    x_t = add_noise(x0, eps, *rates)
    v = v_from_x0_eps(x0, eps, *rates)
    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    assert_close(x_t, alpha * x0 + sigma * eps, **tolerance)
    assert_close(v, alpha * eps - sigma * x0, **tolerance)
    assert_close(x0_from_eps(x_t, eps, *rates), x0, **tolerance)
    assert_close(eps_from_x0(x_t, x0, *rates), eps, **tolerance)
    assert_close(x0_from_v(x_t, v, *rates), x0, **tolerance)
    assert_close(eps_from_v(x_t, v, *rates), eps, **tolerance)


def test_each_clip_has_its_own_rate() -> None:
    schedule = DiscreteSchedule("linear")
    x0, eps = torch.randn(2, 3, 5, 4, generator=generator()).unbind()
    t = torch.tensor([0, 500, 1000])
    together = add_noise(x0, eps, *schedule.rates(t))
    for i in range(3):
        assert torch.equal(together[i], add_noise(x0[i], eps[i], *schedule.rates(int(t[i]))))
    assert together.dtype == torch.float32


def test_noise_on_tokens_is_noise_on_pixels() -> None:
    rates = DiscreteSchedule("linear", rho=0.8).rates(torch.tensor([30, 700]))
    x0, eps = torch.randn(2, 2, 3, 2, 8, 8, generator=generator()).unbind()
    on_tokens = add_noise(patchify(x0, 4, 2), patchify(eps, 4, 2), *rates)
    assert torch.equal(patchify(add_noise(x0, eps, *rates), 4, 2), on_tokens)


@pytest.mark.parametrize("kind, rho", KINDS[:3])
@pytest.mark.parametrize("t, s", [(1, 0), (2, 1), (500, 499), (500, 300), (1000, 999), (1000, 0)])
def test_posterior_is_bayes(kind: str, rho: float, t: int, s: int) -> None:
    """q(x_s | x_0) times q(x_t | x_s), by precisions: another way to the same Gaussian."""
    schedule = DiscreteSchedule(kind, rho=rho)
    x0, x_t = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator()).unbind()
    mean, variance = posterior(x_t, x0, schedule.rates(t), schedule.rates(s))
    if s == 0:
        assert float(variance) == 0
        assert_close(mean, x0, rtol=1e-10, atol=1e-10)
        return
    bar_t, bar_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    ratio = bar_t / bar_s  # x_t = sqrt(ratio) x_s + noise of variance 1 - ratio
    precision = 1 / (1 - bar_s) + ratio / (1 - ratio)
    assert_close(variance, 1 / precision, rtol=1e-9, atol=1e-12)
    expected = (bar_s.sqrt() * x0 / (1 - bar_s) + ratio.sqrt() * x_t / (1 - ratio)) / precision
    assert_close(mean, expected, rtol=1e-9, atol=1e-9)


def test_sample_t_is_uniform_on_1_to_the_end() -> None:
    schedule = DiscreteSchedule("linear", num_steps=10)
    t = schedule.sample_t(20_000, generator())
    share = torch.bincount(t, minlength=11) / 20_000
    assert share[0] == 0
    assert len(share) == 11
    assert_close(share[1:], torch.full((10,), 0.1), rtol=0, atol=5 * (0.1 * 0.9 / 20_000) ** 0.5)
    assert torch.equal(t, schedule.sample_t(20_000, generator()))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50, 333, 999, 1000])
def test_times_fall_from_the_end_to_zero(num_steps: int) -> None:
    times = DiscreteSchedule("linear").times(num_steps)
    assert len(times) == num_steps + 1
    assert times[0] == 1000
    check_times(times, 1000)
    gaps = [a - b for a, b in itertools.pairwise(times)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_times_refuses(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps={num_steps}, but the schedule has 1000 times"):
        DiscreteSchedule("linear").times(num_steps)


@pytest.mark.parametrize("times", [[], [0], [5], [5, 1], [5, 5, 0], [3, 4, 0], [11, 0], [5, 0, -1]])
def test_check_times_refuses(times: list[int]) -> None:
    with pytest.raises(ValueError, match="give falling times"):
        check_times(times, 10)
