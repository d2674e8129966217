"""Schedules: recorded values, exact ends, conversions, transition and posterior, the times of a sampler."""

import itertools
import re

import pytest
import torch
from small import generator
from torch.testing import assert_close

from unveil.sampling import check_times
from unveil.schedule import (
    DiscreteSchedule,
    FlowSchedule,
    Schedule,
    add_noise,
    eps_from_x0,
    make_schedule,
    posterior,
    transition,
    v_from_x0_eps,
    x0_from_eps,
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


@pytest.mark.parametrize("kind, rho", [*KINDS, ("flow", 1.0)])
def test_time_zero_is_exact(kind: str, rho: float) -> None:
    alpha, sigma = make_schedule(kind, rho).rates(torch.zeros(2, dtype=torch.long))
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


def test_flow_is_a_straight_line() -> None:
    """From the clip to the noise: half-way is their mean, and the velocity eps - x0 is everywhere the same."""
    schedule = FlowSchedule()
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    alpha, sigma = schedule.rates(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha.tolist() == [1, 0.75, 0.5, 0]
    assert sigma.tolist() == [0, 0.25, 0.5, 1]
    for i, value in enumerate(t.tolist()):
        one_alpha, one_sigma = schedule.rates(value)
        assert one_alpha.dtype == torch.float64
        assert (one_alpha.item(), one_sigma.item()) == (alpha[i], sigma[i])
    assert schedule.rates(0.1)[1].item() == 0.1  # never through float32
    x0, eps = torch.randn(2, 4, 3, generator=generator()).unbind()
    x_t = add_noise(x0, eps, alpha, sigma)
    assert torch.equal(x_t[3], eps[3])
    assert_close(x_t[2], (x0[2] + eps[2]) / 2, rtol=0, atol=1e-6)
    assert_close((x_t - x0)[1:] / t[1:, None], (eps - x0)[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [500.0, torch.tensor([1.0, 2.0])])
def test_rates_refuses_times_between(t: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"floating-point type, but this schedule has the whole times 0 to 1000"):
        DiscreteSchedule("linear").rates(t)


def test_what_the_network_is_told() -> None:
    """Both in the sinusoid's range, up to 1,000, and float32 as it is computed in."""
    discrete = DiscreteSchedule("linear").network_time(torch.tensor([0, 1, 1000]))
    flow = FlowSchedule().network_time(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert discrete.dtype == flow.dtype == torch.float32
    assert discrete.tolist() == [0, 1, 1000]
    assert flow.tolist() == [0, 500, 1000]


def test_schedules_by_name() -> None:
    for kind, rho in KINDS:
        made = make_schedule(kind, rho)
        assert isinstance(made, DiscreteSchedule)
        assert torch.equal(made.alpha_bar, DiscreteSchedule(kind, rho=rho).alpha_bar)
        assert made.end == made.num_steps == 1000
    flow = make_schedule("flow", 1.0)
    assert isinstance(flow, FlowSchedule)
    assert flow.end == 1.0
    with pytest.raises(AssertionError):
        make_schedule("flow", 0.8)


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


PAIRS = [
    *(
        (kind, rho, t, s)
        for kind, rho in KINDS[:3]
        for t, s in [(1, 0), (2, 1), (500, 499), (500, 300), (1000, 999), (1000, 0)]
    ),
    *(
        ("flow", 1.0, t, s)
        for t, s in [(0.1, 0.0), (0.2, 0.1), (0.5, 0.49), (0.9, 0.2), (1.0, 0.99), (1.0, 0.5), (1.0, 0.0)]
    ),
]


@pytest.mark.parametrize("kind, rho, t, s", PAIRS)
def test_transition_and_marginals_agree(kind: str, rho: float, t: float, s: float) -> None:
    """Noise to s and then on to t is noise to t; by a time between is the same as at once."""
    schedule = make_schedule(kind, rho)
    now, then = schedule.rates(t), schedule.rates(s)
    step, added = transition(now, then)
    tolerance = {"rtol": 1e-10, "atol": 1e-14}
    assert_close(step * then[0], now[0], **tolerance)
    assert_close(step**2 * then[1] ** 2 + added, now[1] ** 2, **tolerance)
    between = schedule.rates((t + s) / 2 if kind == "flow" else int(t + s) // 2)
    first, second = transition(between, then), transition(now, between)
    assert_close(second[0] * first[0], step, **tolerance)
    assert_close(second[0] ** 2 * first[1] + second[1], added, **tolerance)


@pytest.mark.parametrize("kind, rho", KINDS)
def test_transition_of_one_step_is_its_beta(kind: str, rho: float) -> None:
    schedule = DiscreteSchedule(kind, rho=rho)
    for t in (1, 2, 500, 1000):
        step, added = transition(schedule.rates(t), schedule.rates(t - 1))
        assert_close(added, schedule.betas[t - 1], rtol=1e-10, atol=1e-14)
        assert_close(step**2, 1 - schedule.betas[t - 1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind, rho, t, s", PAIRS)
def test_posterior_is_bayes(kind: str, rho: float, t: float, s: float) -> None:
    """q(x_s | x_0) times q(x_t | x_s), by precisions: another way to the same Gaussian."""
    schedule: Schedule = make_schedule(kind, rho)
    x0, x_t = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator()).unbind()
    now, then = schedule.rates(t), schedule.rates(s)
    mean, variance = posterior(x_t, x0, now, then)
    if s == 0:
        assert float(variance) == 0
        assert_close(mean, x0, rtol=1e-10, atol=1e-10)
        return
    (a_t, s_t), (a_s, s_s) = ((float(alpha), float(sigma)) for alpha, sigma in (now, then))
    step = a_t / a_s  # x_t = step x_s + noise of variance `added`
    added = s_t**2 - step**2 * s_s**2
    precision = 1 / s_s**2 + step**2 / added
    assert_close(variance.item(), 1 / precision, rtol=1e-9, atol=1e-12)
    expected = (a_s * x0 / s_s**2 + step * x_t / added) / precision
    assert_close(mean, expected, rtol=1e-9, atol=1e-9)


def test_sample_t_is_uniform_on_1_to_the_end() -> None:
    schedule = DiscreteSchedule("linear", num_steps=10)
    t = schedule.sample_t(20_000, generator())
    share = torch.bincount(t, minlength=11) / 20_000
    assert share[0] == 0
    assert len(share) == 11
    assert_close(share[1:], torch.full((10,), 0.1), rtol=0, atol=5 * (0.1 * 0.9 / 20_000) ** 0.5)
    assert torch.equal(t, schedule.sample_t(20_000, generator()))


def test_sample_t_of_a_flow_is_logit_normal() -> None:
    """Five standard errors of 100,000; as JiT has it, the share of the clip that is left has the logit N(-0.8, 0.8^2)."""
    schedule = FlowSchedule()
    t = schedule.sample_t(100_000, generator())
    assert t.dtype == torch.float32
    assert t.shape == (100_000,)
    assert ((t > 0) & (t < 1)).all()
    logit = schedule.rates(t)[0].logit()
    assert abs(logit.mean().item() + 0.8) < 5 * 0.8 / 100_000**0.5
    assert abs(logit.std().item() - 0.8) < 5 * 0.8 / 200_000**0.5
    inner = ((logit + 0.8).abs() < 0.8).double().mean().item()
    assert abs(inner - 0.6827) < 5 * (0.6827 * 0.3173 / 100_000) ** 0.5
    assert torch.equal(t, schedule.sample_t(100_000, generator()))


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


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 49, 50, 333, 10_000])  # 49 * (1 / 49) is not 1
def test_times_of_a_flow_fall_from_one_to_zero(num_steps: int) -> None:
    times = FlowSchedule().times(num_steps)
    assert len(times) == num_steps + 1
    assert all(type(t) is float for t in times)
    assert (times[0], times[-1]) == (1.0, 0.0)
    check_times(times, 1.0)
    gaps = [a - b for a, b in itertools.pairwise(times)]
    assert max(gaps) - min(gaps) < 1e-15


@pytest.mark.parametrize("num_steps", [0, -1])
def test_times_of_a_flow_refuses(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps={num_steps}, but sampling takes at least one step"):
        FlowSchedule().times(num_steps)


def test_strided_times_are_the_published_ones() -> None:
    """UMD counts from 0: 999, 991, ..., 15, 7, 0 and 999, 995, ..., 7, 3, 0; then comes our 0, clean."""
    schedule = DiscreteSchedule("linear")
    for num_steps, first, last in [(125, [999, 991, 983], [15, 7, 0]), (250, [999, 995, 991], [7, 3, 0])]:
        times = schedule.strided_times(num_steps)
        check_times(times, schedule.end)
        theirs = [t - 1 for t in times[:-1]]
        assert theirs[:3] == first
        assert theirs[-3:] == last
        assert len(theirs) == num_steps + 1  # predictions
        assert {a - b for a, b in itertools.pairwise(theirs[:-1])} == {1000 // num_steps}


def test_strided_times_at_the_ends() -> None:
    schedule = DiscreteSchedule("linear")
    assert schedule.strided_times(1000) == schedule.times(1000)  # t = 1 is not visited twice
    assert schedule.strided_times(1) == [1000, 1, 0]
    assert DiscreteSchedule("linear", num_steps=6).strided_times(3) == [6, 4, 2, 1, 0]


@pytest.mark.parametrize("num_steps", [62, 300, 999, 2000, 0, -5])
def test_strided_times_refuses(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps={num_steps} does not divide the schedule's 1000 times"):
        DiscreteSchedule("linear").strided_times(num_steps)


@pytest.mark.parametrize("times", [[], [0], [5], [5, 1], [5, 5, 0], [3, 4, 0], [11, 0], [5, 0, -1]])
def test_check_times_refuses(times: list[int]) -> None:
    with pytest.raises(ValueError, match="give falling times, the first at most 10"):
        check_times(times, 10)


@pytest.mark.parametrize("times", [[1.1, 0.0], [1000, 0], [0.5, 0.1], [0.5, 0.5, 0.0], [1.0, float("nan"), 0.0]])
def test_check_times_of_a_flow_refuses(times: list[float]) -> None:
    text = re.escape(f"times={times}: give falling times, the first at most 1.0")
    with pytest.raises(ValueError, match=text):
        check_times(times, FlowSchedule().end)
