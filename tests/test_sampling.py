"""Samplers: identities between them, the papers' formulas, diffusers' trajectories, foreign schedulers, guidance, refusals.

That their samples have the data's mean and covariance is in test_oracle.py.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import generator
from torch import Tensor
from torch.testing import assert_close

from unveil.sampling import by_scheduler, ddim, ddpm, dpmpp_2m, guidance, standard_normal
from unveil.schedule import DiscreteSchedule, FlowSchedule, Schedule, make_schedule, posterior, transition

LINEAR, FLOW = DiscreteSchedule("linear"), FlowSchedule()
# diffusers and numpy of these days
quiet = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def fake(x_t: Tensor, t: float) -> Tensor:
    """Something smooth of x_t and t that a schedule cannot foresee."""
    return torch.tanh(0.7 * x_t.flip(-1) + 0.3 * math.sin(5 * t)) * 0.9


def fake_with_share(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
    return fake(x_t, t), torch.sigmoid(x_t.roll(1, -1) - 0.5)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    """float64 for formulas; float32 where noise is drawn by two libraries, of which one draws in its own type."""
    return torch.randn(3, 2, 6, dtype=dtype, generator=generator())


def forbidden(x: Tensor) -> Tensor:
    raise AssertionError("noise was drawn")


class Counted:
    """Standard normal noise that counts its draws."""

    def __init__(self, seed: int = 1) -> None:
        self.draw, self.count = standard_normal(generator(seed)), 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.draw(x)


# Identities


TIMES: list[tuple[Schedule, list[Any]]] = [
    (LINEAR, LINEAR.times(50)),
    (LINEAR, LINEAR.strided_times(125)),
    (LINEAR, [1000, 999, 400, 7, 1, 0]),
    (DiscreteSchedule("linear", rho=0.4), [1000, 500, 20, 0]),
    (DiscreteSchedule("cosine"), [900, 300, 0]),
    (FLOW, FLOW.times(30)),
    (FLOW, [1.0, 0.999, 0.4, 0.01, 0.0]),
    (FLOW, [0.7, 0.1, 0.0]),
]


@pytest.mark.parametrize("schedule, times", TIMES)
def test_ddim_with_eta_1_is_ddpm(schedule: Schedule, times: list[float]) -> None:
    """Draw for draw, respaced or not, and where alpha^2 + sigma^2 is not 1."""
    ours = ddim(fake, start(), schedule, times, eta=1.0, noise=standard_normal(generator(1)))
    assert_close(ours, ddpm(fake, start(), schedule, times, standard_normal(generator(1))), rtol=1e-10, atol=1e-10)
    single = ddim(fake, start().float(), schedule, times, eta=1.0, noise=standard_normal(generator(1)))
    expected = ddpm(fake, start().float(), schedule, times, standard_normal(generator(1)))
    assert_close(single, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule, times", TIMES)
def test_eta_is_the_noise_in_units_of_the_posteriors(schedule: Schedule, times: list[float]) -> None:
    """The step's mean and standard deviation, from noise of 0 and 1; x_t's own noise makes up the rest of the level."""
    zero, one = torch.zeros_like(start()), torch.ones_like(start())
    for t, s in pairwise(times[:-1]):
        found: list[Tensor] = []
        keep = lambda t, x_t, x0, found=found: found.append(x_t)  # noqa: E731
        for z in (zero, one):
            ddim(fake, start(), schedule, [t, s, 0], keep, 0.6, lambda x, z=z: z)
        deviation = found[3] - found[1]  # each call records x_t at t and at s
        now, then = schedule.rates(t), schedule.rates(s)
        variance = posterior(start(), start(), now, then)[1]
        assert_close(deviation, 0.6 * variance.sqrt() * one, rtol=1e-7, atol=1e-10)
        x0 = fake(start(), t)
        eps = (start() - now[0] * x0) / now[1]
        expected = then[0] * x0 + (then[1] ** 2 - 0.36 * variance).sqrt() * eps
        assert_close(found[1], expected, rtol=1e-7, atol=1e-10)


def test_eta_0_draws_nothing() -> None:
    assert torch.equal(
        ddim(fake, start(), FLOW, FLOW.times(5), noise=forbidden), ddim(fake, start(), FLOW, FLOW.times(5))
    )


def test_ddim_on_a_flow_is_eulers_method() -> None:
    """x moves along the velocity (x_t - x0) / t, which is eps - x0."""
    x, times = start(), FLOW.times(7)
    for t, s in pairwise(times):
        x = x + (s - t) * (x - fake(x, t)) / t
    assert_close(ddim(fake, start(), FLOW, times), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule, times", TIMES)
def test_dpmpp_2m_is_the_papers_algorithm(schedule: Schedule, times: list[float]) -> None:
    """Lu et al. 2022, algorithm 2, as it is written: in lambda, h and r, but for the ends where lambda is infinite."""

    def lam(t: float) -> float:
        alpha, sigma = schedule.rates(t)
        return math.log(alpha) - math.log(sigma)

    times = [t for t in times if 0 < schedule.rates(t)[0] < 1]
    x, buffer, states = start(), [], []
    for i, t in enumerate(times):
        states.append(x)
        buffer.append(fake(x, t))
        if i == len(times) - 1:
            break
        (_, s_t), (a_s, s_s) = schedule.rates(t), schedule.rates(times[i + 1])
        h = lam(times[i + 1]) - lam(t)
        line = buffer[-1]
        if i > 0:
            r = (lam(t) - lam(times[i - 1])) / h
            line = (1 + 1 / (2 * r)) * buffer[-1] - 1 / (2 * r) * buffer[-2]
        x = s_s / s_t * x - a_s * math.expm1(-h) * line
    found: list[Tensor] = []
    end = dpmpp_2m(fake, start(), schedule, [*times, 0], lambda t, x_t, x0: found.append(x_t))
    assert len(found) == len(states)
    for a, b in zip(found, states, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert_close(end, buffer[-1], rtol=1e-9, atol=1e-9)  # the last step, to 0, is of first order


@pytest.mark.parametrize("schedule", [LINEAR, FLOW])
def test_the_first_and_the_last_step_of_dpmpp_2m_are_ddims(schedule: Schedule) -> None:
    short = schedule.times(2)
    assert_close(dpmpp_2m(fake, start(), schedule, short), ddim(fake, start(), schedule, short), rtol=1e-12, atol=1e-12)
    long = [t for t in schedule.times(5) if t < schedule.end]  # lambda is finite at the first
    difference = dpmpp_2m(fake, start(), schedule, long) - ddim(fake, start(), schedule, long)
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("schedule", [FLOW, DiscreteSchedule("linear", rho=0.4), DiscreteSchedule("linear", rho=0.05)])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 40])
def test_nothing_is_nan_where_alpha_vanishes(schedule: Schedule, num_steps: int) -> None:
    """alpha(T) is 0, is 1e-36, or underflows at the first hundreds of times. Two-term lines of a step from there drop out."""
    times = schedule.times(num_steps)
    noise = standard_normal(generator(1))
    ends = [
        ddpm(fake_with_share, start(), schedule, times, noise),
        ddpm(fake, start(), schedule, times, noise, num_resamples=2),
        ddim(fake, start(), schedule, times, eta=0.5, noise=noise),
        dpmpp_2m(fake, start(), schedule, times),
        dpmpp_2m(fake, start().float(), schedule, times),
    ]
    for end in ends:
        assert end.isfinite().all()
        assert end.abs().max() < 5


# A learned variance


def test_a_share_of_0_is_the_posteriors_variance() -> None:
    for schedule in (LINEAR, FLOW):
        times = schedule.times(20)
        plain = ddpm(fake, start(), schedule, times, standard_normal(generator(1)))
        none = lambda x_t, t: (fake(x_t, t), torch.zeros_like(x_t))  # noqa: E731
        assert_close(ddpm(none, start(), schedule, times, standard_normal(generator(1))), plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule, t, s", [(LINEAR, 500, 499), (LINEAR, 900, 300), (FLOW, 0.5, 0.2), (FLOW, 1.0, 0.9)])
def test_a_share_interpolates_the_log_variance_value_by_value(schedule: Schedule, t: float, s: float) -> None:
    share = torch.linspace(0, 1, 36, dtype=torch.float64).reshape(3, 2, 6)
    found: list[Tensor] = []
    for size in (0.0, 1.0):
        ddpm(
            lambda x_t, t: (fake(x_t, t), share),
            start(),
            schedule,
            [t, s, 0],
            lambda x, size=size: torch.full_like(x, size),
            lambda t, x_t, x0: found.append(x_t),
        )
    deviation = found[3] - found[1]
    now, then = schedule.rates(t), schedule.rates(s)
    added = (now[1] ** 2 - (now[0] / then[0]) ** 2 * then[1] ** 2).item()
    posteriors = added * then[1].item() ** 2 / now[1].item() ** 2
    expected = torch.tensor([added**w * posteriors ** (1 - w) for w in share.flatten().tolist()]).double().sqrt()
    assert_close(deviation.flatten(), expected, rtol=1e-6, atol=1e-9)
    if schedule is LINEAR and s == t - 1:
        assert_close(deviation[-1, -1, -1] ** 2, LINEAR.betas[t - 1], rtol=1e-9, atol=1e-12)


def test_other_samplers_leave_the_share_aside() -> None:
    for schedule in (LINEAR, FLOW):
        times = schedule.times(6)
        noise = lambda: standard_normal(generator(1))  # noqa: E731
        given = [ddim(d, start(), schedule, times, eta=0.5, noise=noise()) for d in (fake, fake_with_share)]
        assert torch.equal(*given)
        assert torch.equal(*[dpmpp_2m(d, start(), schedule, times) for d in (fake, fake_with_share)])


# Resampling


@pytest.mark.parametrize("schedule", [LINEAR, FLOW])
def test_each_step_but_the_first_is_taken_again(schedule: Schedule) -> None:
    """Three passes: two ways back to t in between, so five draws; two for the last step, which is to 0."""
    visited: list[float] = []
    noise, times = Counted(), schedule.times(4)
    ddpm(fake, start(), schedule, times, noise, lambda t, x_t, x0: visited.append(t), num_resamples=3)
    assert visited == [times[0], *(t for t in times[1:-1] for _ in range(3))]
    assert noise.count == 1 + 5 + 5 + 2
    once = Counted()
    ddpm(fake, start(), schedule, times, once)
    assert once.count == 3


def repaint_visits(num_steps: int, jump_length: int, num_resamples: int) -> list[int]:
    """The steps left at each prediction of RePaint's walk, as its paper tells it (arXiv 2201.09865): whenever a multiple of
    jump_length below num_steps - jump_length is reached, jump_length steps back up, num_resamples - 1 times."""
    jumps = dict.fromkeys(range(0, num_steps - jump_length, jump_length), num_resamples - 1)
    left, visits = num_steps, []
    while left >= 1:
        visits.append(left)
        left -= 1
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            left += jump_length
    return visits


@pytest.mark.parametrize("num_steps, jump_length", [(20, 5), (23, 5), (5, 5), (4, 9), (6, 1), (12, 10)])
def test_jumps_are_repaints(num_steps: int, jump_length: int) -> None:
    times = FLOW.times(num_steps)
    visited: list[float] = []
    ddpm(
        fake,
        start(),
        FLOW,
        times,
        Counted(),
        lambda t, x_t, x0: visited.append(t),
        num_resamples=3,
        jump_length=jump_length,
    )
    assert visited == [times[num_steps - left] for left in repaint_visits(num_steps, jump_length, 3)]


@pytest.mark.parametrize(
    "schedule, times", [(LINEAR, (600, 500, 498, 249)), (LINEAR, (990, 900, 600, 300)), (FLOW, (0.9, 0.8, 0.5, 0.2))]
)
@pytest.mark.parametrize("jump_length", [1, 2])
def test_the_way_back_is_the_forward_process(schedule: Schedule, times: tuple[float, ...], jump_length: int) -> None:
    """Draws of 0 and then of 2: each x_s is the posterior's mean, and the second x_t is the noised copy of what it came to."""
    states: list[Tensor] = []
    down = [0.0] * (1 + jump_length)
    sizes = iter([*down, 2.0, *down])
    ddpm(
        fake,
        start(),
        schedule,
        [
            *times[: 2 + jump_length],
            *([] if jump_length == 1 else [type(times[3])(times[3] / 3)]),
            0,
        ],  # the jump under test is not the last
        lambda x: torch.full_like(x, next(sizes, 0.0)),
        lambda t, x_t, x0: states.append(x_t),
        num_resamples=2,
        jump_length=jump_length,
    )
    x = states[1]
    for now, then in pairwise(times[1 : 2 + jump_length]):
        x = posterior(x, fake(x, now), schedule.rates(now), schedule.rates(then))[0]
    step, added = transition(schedule.rates(times[1]), schedule.rates(times[1 + jump_length]))
    assert_close(states[1 + jump_length], step * x + 2 * added.sqrt(), rtol=1e-12, atol=1e-12)


# What every sampler promises

RUNS: dict[str, Callable[..., Tensor]] = {
    "ddpm": lambda d, x, schedule, times, step: ddpm(d, x, schedule, times, standard_normal(generator(1)), step),
    "ddim": lambda d, x, schedule, times, step: ddim(d, x, schedule, times, step, 0.5, standard_normal(generator(1))),
    "dpmpp_2m": dpmpp_2m,
}


@pytest.mark.parametrize("schedule", [LINEAR, FLOW])
@pytest.mark.parametrize("sampler", RUNS)
def test_steps_are_reported_and_types_kept(sampler: str, schedule: Schedule) -> None:
    times, steps = schedule.times(4), []
    end = RUNS[sampler](fake_with_share, start(torch.float32), schedule, times, lambda *step: steps.append(step))
    assert [t for t, _, _ in steps] == times[:-1]
    assert all(type(t) is type(times[0]) for t, _, _ in steps)
    assert torch.equal(steps[0][1], start(torch.float32))
    for t, x_t, x0 in steps:
        assert torch.equal(x0, fake(x_t, t))
        assert x_t.dtype == torch.float32
    assert end.dtype == torch.float32
    assert_close(end, steps[-1][2], rtol=1e-5, atol=1e-5)  # the step to 0 is the prediction


@pytest.mark.parametrize("schedule, times", [(LINEAR, [1001, 0]), (FLOW, [1000, 0]), (FLOW, [0.5, 0.2])])
@pytest.mark.parametrize("sampler", RUNS)
def test_samplers_refuse_times(sampler: str, schedule: Schedule, times: list[float]) -> None:
    with pytest.raises(ValueError, match="give falling times"):
        RUNS[sampler](fake, start(), schedule, times, None)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_ddim_refuses_eta(eta: float) -> None:
    with pytest.raises(ValueError, match=rf"eta={eta}, but it runs from 0"):
        ddim(fake, start(), LINEAR, [1000, 0], eta=eta, noise=forbidden)


def test_ddim_refuses_eta_without_noise() -> None:
    with pytest.raises(ValueError, match=r"eta=0\.5 adds fresh noise at every step, but noise is None"):
        ddim(fake, start(), LINEAR, [1000, 0], eta=0.5)


@pytest.mark.parametrize("given", [{"num_resamples": 0}, {"num_resamples": -3}, {"jump_length": 0}])
def test_ddpm_refuses_resampling(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(given))}={next(iter(given.values()))}.* taken at least once"):
        ddpm(fake, start(), LINEAR, [1000, 0], forbidden, **given)


# diffusers, with our samplers

BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def visited(scheduler: Any) -> list[int]:
    """Its times in our counting."""
    return [*(int(k) + 1 for k in scheduler.timesteps), 0]


@quiet
@pytest.mark.parametrize("num_steps", [10, 20, 50])
@pytest.mark.parametrize("kind", BETAS)
def test_dpmpp_2m_equals_diffusers(kind: str, num_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=BETAS[kind],
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=True,
    )
    scheduler.set_timesteps(num_steps)
    schedule, x = make_schedule(kind, 1.0), start()
    theirs, ours = [x], []
    for k in scheduler.timesteps:
        x = scheduler.step(fake(x, int(k) + 1), k, x).prev_sample
        theirs.append(x)
    end = dpmpp_2m(fake, start(), schedule, visited(scheduler), lambda t, x_t, x0: ours.append(x_t))
    assert len(ours) == num_steps
    for a, b in zip([*ours, end], theirs, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("kind", BETAS)
def test_ddim_with_eta_equals_diffusers(kind: str, eta: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule=BETAS[kind], prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(40)
    x, theirs = start(torch.float32), generator(1)
    for k in scheduler.timesteps:
        x = scheduler.step(fake(x, int(k) + 1), k, x, eta=eta, generator=theirs).prev_sample
    noise = standard_normal(generator(1))
    ours = ddim(fake, start(torch.float32), make_schedule(kind, 1.0), visited(scheduler), eta=eta, noise=noise)
    assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1000, 25])
@pytest.mark.parametrize("kind", BETAS)
def test_a_learned_variance_equals_diffusers(kind: str, num_steps: int) -> None:
    """Their network's second half is the share from -1 to 1."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=BETAS[kind], prediction_type="sample", clip_sample=False, variance_type="learned_range"
    )
    scheduler.set_timesteps(num_steps)
    x, theirs = start(torch.float32), generator(1)
    for k in scheduler.timesteps:
        x0, share = fake_with_share(x, int(k) + 1)
        x = scheduler.step(torch.cat([x0, 2 * share - 1], dim=1), k, x, generator=theirs).prev_sample
    schedule, noise = make_schedule(kind, 1.0), standard_normal(generator(1))
    assert_close(
        ddpm(fake_with_share, start(torch.float32), schedule, visited(scheduler), noise), x, rtol=1e-4, atol=1e-4
    )


# Foreign schedulers


def linear(x_t: Tensor, t: float) -> Tensor:
    return (0.4 + 0.0003 * t) * x_t.flip(-1) + 0.1


@quiet
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize(
    "name, settings",
    [
        ("DDIMScheduler", {"clip_sample": False}),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
        ("DPMSolverMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_a_foreign_scheduler_equals_our_sampler(
    name: str, settings: dict[str, Any], kind: str, prediction_type: str
) -> None:
    """Euler's method in x_t / alpha, which is what these schedulers scale their sample to, is DDIM."""
    diffusers = pytest.importorskip("diffusers")
    schedule, x = make_schedule(kind, 1.0), start(torch.float32)
    scheduler = getattr(diffusers, name)(beta_schedule=BETAS[kind], prediction_type=prediction_type, **settings)
    theirs: list[tuple[float, Tensor, Tensor]] = []
    found = by_scheduler(linear, x, schedule, scheduler, 25, generator(1), lambda *step: theirs.append(step))
    times, noise = visited(scheduler), standard_normal(generator(1))
    ours: list[tuple[float, Tensor, Tensor]] = []
    keep = lambda *step: ours.append(step)  # noqa: E731
    if name == "DDPMScheduler":
        expected = ddpm(linear, x, schedule, times, noise, keep)
    elif name == "DPMSolverMultistepScheduler":
        expected = dpmpp_2m(linear, x, schedule, times, keep)
    else:
        expected = ddim(linear, x, schedule, times, keep)
    assert [t for t, _, _ in theirs] == times[:-1]
    # to get x0 from eps a scheduler divides by the cosine's last alpha, 5e-5, in a float32 table
    close = 1e-3 if (kind, prediction_type) == ("cosine", "epsilon") else 1e-4
    for (_, *a), (_, *b) in zip(theirs, ours, strict=True):
        assert_close(a, b, rtol=close, atol=close)
    assert_close(found, expected, rtol=close, atol=close)


def test_a_scheduler_with_our_own_betas_fits() -> None:
    """What the refusal advises."""
    diffusers = pytest.importorskip("diffusers")
    schedule = DiscreteSchedule("linear", rho=0.8)
    scheduler = diffusers.DDIMScheduler(
        trained_betas=schedule.betas.numpy(), prediction_type="sample", clip_sample=False
    )
    found = by_scheduler(fake, start(), schedule, scheduler, 20)
    assert_close(found, ddim(fake, start(), schedule, visited(scheduler)), rtol=1e-4, atol=1e-4)


class Plain:
    """The least that a scheduler can be; its steps go to x0 itself. No generator, no scaling."""

    def __init__(self, schedule: DiscreteSchedule = LINEAR, prediction_type: str = "sample") -> None:
        self.alphas_cumprod = schedule.alpha_bar[1:].float()
        self.config = SimpleNamespace(prediction_type=prediction_type)
        self.given: list[tuple[Tensor, int, Tensor]] = []

    def set_timesteps(self, num_steps: int) -> None:
        self.timesteps = [k - 1 for k in LINEAR.times(num_steps)[:-1]]

    def step(self, model_output: Tensor, k: int, sample: Tensor) -> Any:
        self.given.append((model_output, k, sample))
        return SimpleNamespace(prev_sample=sample * 0.5)


class Scaled(Plain):
    """Keeps its sample four times as large as the network's, and draws."""

    init_noise_sigma = 4.0

    def scale_model_input(self, sample: Tensor, k: int) -> Tensor:
        return sample / 4

    def step(self, model_output: Tensor, k: int, sample: Tensor, generator: torch.Generator | None = None) -> Any:
        assert generator is not None
        super().step(model_output, k, sample)
        return SimpleNamespace(prev_sample=torch.randn(sample.shape, generator=generator).double())


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_what_a_scheduler_is_given(prediction_type: str) -> None:
    """Its k is t - 1, and its quantity follows from x_t and x0; the share stays here."""
    scheduler, steps = Plain(prediction_type=prediction_type), []
    end = by_scheduler(fake_with_share, start(), LINEAR, scheduler, 3, generator(), lambda *step: steps.append(step))
    assert_close(end, start() / 8, rtol=0, atol=0)
    assert [k for _, k, _ in scheduler.given] == [999, 666, 332]
    assert [t for t, _, _ in steps] == [1000, 667, 333]
    for (output, k, sample), (_, x_t, x0) in zip(scheduler.given, steps, strict=True):
        assert torch.equal(sample, x_t)
        assert torch.equal(x0, fake(x_t, k + 1))
        alpha, sigma = LINEAR.alpha_bar[k + 1].sqrt(), (1 - LINEAR.alpha_bar[k + 1]).sqrt()
        eps = (x_t - alpha * x0) / sigma
        expected = {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[prediction_type]
        assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_a_scheduler_may_scale_its_sample_and_draw() -> None:
    scheduler, steps = Scaled(), []
    end = by_scheduler(fake, start(), LINEAR, scheduler, 2, generator(3), lambda *step: steps.append(step))
    assert torch.equal(scheduler.given[0][2], 4 * start())
    assert torch.equal(steps[0][1], start())
    draws = generator(3)
    first, second = (torch.randn(start().shape, generator=draws).double() for _ in range(2))
    assert torch.equal(scheduler.given[1][2], first)
    assert torch.equal(steps[1][1], first / 4)
    assert torch.equal(end, second)


def test_by_scheduler_refuses_a_flow() -> None:
    with pytest.raises(ValueError, match="Plain counts the steps of a discrete schedule, but this model's is a flow"):
        by_scheduler(fake, start(), FLOW, Plain(), 3)


@pytest.mark.parametrize(
    "other",
    [DiscreteSchedule("cosine"), DiscreteSchedule("linear", rho=0.9995), DiscreteSchedule("linear", num_steps=500)],
)
def test_by_scheduler_refuses_another_table(other: DiscreteSchedule) -> None:
    with pytest.raises(ValueError, match=r"alphas_cumprod that end at .* but the model was trained with 1000 that end"):
        by_scheduler(fake, start(), LINEAR, Plain(other), 3)


def test_by_scheduler_refuses_a_scheduler_without_a_table() -> None:
    scheduler = Plain()
    del scheduler.alphas_cumprod
    with pytest.raises(ValueError, match="Plain has no alphas_cumprod"):
        by_scheduler(fake, start(), LINEAR, scheduler, 3)


def test_by_scheduler_refuses_a_table_that_underflows() -> None:
    noisy = DiscreteSchedule("linear", rho=0.4)
    with pytest.raises(ValueError, match=r"float32 and reach 0 .* \(ours end at .*e-7\d\)"):
        by_scheduler(fake, start(), noisy, Plain(noisy), 3)


def test_by_scheduler_refuses_a_prediction_type() -> None:
    with pytest.raises(ValueError, match="Plain asks for prediction_type='flow_prediction'"):
        by_scheduler(fake, start(), LINEAR, Plain(prediction_type="flow_prediction"), 3)


@quiet
def test_by_scheduler_refuses_fractional_times() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="linear", timestep_spacing="linspace")
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler visits k=\d+\.\d\d, between the whole times"):
        by_scheduler(fake, start(), LINEAR, scheduler, 30)


# Guidance


@pytest.mark.parametrize("end", [1000, 1.0])
def test_guidance_at_each_time(end: float) -> None:
    constant = guidance("constant", 2.5, end)
    assert [constant(share * end) for share in (0, 0.3, 1)] == [2.5, 2.5, 2.5]
    interval = guidance("interval", 2.5, end, interval=(0.25, 0.5))
    shares = (0, 0.2, 0.25, 0.3, 0.5, 0.51, 1)
    assert [interval(share * end) for share in shares] == [1, 1, 2.5, 2.5, 2.5, 1, 1]
    everywhere = guidance("interval", 0.0, end)
    assert [everywhere(share * end) for share in (0, 0.5, 1)] == [0, 0, 0]
    cosine = guidance("power_cosine", 3.0, end)
    assert cosine(end) == 1
    assert cosine(0) == pytest.approx(3, abs=1e-12)
    assert cosine(end / 2) == pytest.approx(1 + (1 - math.cos(math.pi / 16)), abs=1e-12)  # (1 / 2)^4
    values = [cosine(share * end / 100) for share in range(101)]
    assert all(a > b for a, b in pairwise(values[:-1]))
    straight = guidance("power_cosine", 3.0, end, power=1.0)
    assert straight(end / 2) == pytest.approx(2, abs=1e-12)
    for kind in ("constant", "interval", "power_cosine"):
        none = guidance(kind, 1.0, end)
        assert all(none(share * end / 10) == 1 for share in range(11))


@pytest.mark.parametrize("scale", [-0.1, float("inf"), float("nan")])
def test_guidance_refuses_scale(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"scale={scale}, but guidance needs a finite scale of at least 0"):
        guidance("constant", scale, 1.0)


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.5, 0.5), (0.6, 0.4), (0.2, 1.1), (float("nan"), 1.0), (0, 1000)])
def test_guidance_refuses_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"interval=\(.*\), but it is a part of t / end"):
        guidance("interval", 2.0, 1000, interval=interval)


@pytest.mark.parametrize("power", [0, -1.0, float("inf"), float("nan")])
def test_guidance_refuses_power(power: float) -> None:
    with pytest.raises(ValueError, match=rf"power={power}, but the cosine needs a finite power above 0"):
        guidance("power_cosine", 2.0, 1.0, power=power)


def test_guidance_refuses_kind() -> None:
    with pytest.raises(ValueError, match=r"Guidance 'cosine' is unknown\. Use one of constant, interval, power_cosine"):
        guidance("cosine", 2.0, 1.0)  # type: ignore[arg-type]
