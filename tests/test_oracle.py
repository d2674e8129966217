"""Samplers on a Gaussian whose best denoiser is known in closed form: no network, no training, no statistical error.

The denoiser E[x0 | x_t] of a Gaussian is affine, so all of sampling is an affine map of the noise that goes in. Each row of
a batch gets a single 1 in one draw, and the outputs are the map's columns: mean and covariance of the samples, exactly.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from small import build, generator, small
from torch import Tensor, nn
from torch.testing import assert_close

from unveil.masking import Mask
from unveil.sampling import Denoise, by_scheduler, ddim, ddpm, dpmpp_2m, standard_normal
from unveil.schedule import DiscreteSchedule, FlowSchedule, Schedule, add_noise, make_schedule, posterior, transition

Noise = Callable[[Tensor], Tensor]
KINDS = [("linear", 1.0), ("linear", 0.8), ("cosine", 1.0), ("flow", 1.0)]


def gaussian(dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A mean and a covariance with strong correlations; eigenvalues from about 0.2 to 3, which [-1, 1] data have too."""
    factor = torch.randn(dim, dim, dtype=torch.float64, generator=generator(seed))
    return torch.randn(
        dim, dtype=torch.float64, generator=generator(seed + 100)
    ), factor @ factor.T / dim + 0.2 * torch.eye(dim, dtype=torch.float64)


def best_denoiser(mean: Tensor, cov: Tensor, schedule: Schedule) -> Callable[[Tensor, float], Tensor]:
    """E[x0 | x_t] = mean + alpha cov (alpha^2 cov + sigma^2 I)^-1 (x_t - alpha mean)."""
    identity = torch.eye(len(mean), dtype=mean.dtype)

    def denoise(x_t: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.rates(t)
        gain = alpha * torch.linalg.solve(alpha**2 * cov + sigma**2 * identity, cov)
        return mean + (x_t - alpha * mean) @ gain

    return denoise


class UnitNoise:
    """Draw number i is 1 in one value of each of `dim` rows, which no other draw uses, and 0 elsewhere."""

    def __init__(self, dim: int, draws: int) -> None:
        self.dim, self.draws, self.used = dim, draws, 0

    def __call__(self, x: Tensor) -> Tensor:
        z = torch.zeros(1 + self.dim * self.draws, self.dim, dtype=x.dtype)
        first = 1 + self.dim * self.used
        z[first : first + self.dim] = torch.eye(self.dim, dtype=x.dtype)
        self.used += 1
        return z.reshape(x.shape)

    def start(self, *shape: int) -> Tensor:
        return self(torch.empty(1 + self.dim * self.draws, *shape, dtype=torch.float64))

    def moments(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        assert self.used == self.draws
        samples = samples.reshape(-1, self.dim)
        columns = samples[1:] - samples[0]
        return samples[0], columns.T @ columns


# A sampler, and how many draws n steps of it take: the start, what each step but those to 0 adds, and the way back.
SAMPLERS: dict[str, tuple[Callable[..., Tensor], Callable[[int], int]]] = {
    "ddpm": (ddpm, lambda n: n),
    "ddpm, each step twice": (lambda *given: ddpm(*given, num_resamples=2), lambda n: 3 * (n - 1)),
    "ddim": (lambda *given: ddim(*given[:4]), lambda n: 1),
    "ddim, eta 0.5": (lambda *given: ddim(*given[:4], eta=0.5, noise=given[4]), lambda n: n),
    "dpmpp_2m": (lambda *given: dpmpp_2m(*given[:4]), lambda n: 1),
}


def sampled(sampler: str, kind: str, rho: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the samples, less the data's."""
    mean, cov = gaussian(5)
    schedule = make_schedule(kind, rho)
    sample, draws = SAMPLERS[sampler]
    noise = UnitNoise(5, draws(num_steps))
    start = noise.start(5)
    samples = sample(best_denoiser(mean, cov, schedule), start, schedule, schedule.times(num_steps), noise)
    found_mean, found_cov = noise.moments(samples)
    return found_mean - mean, found_cov - cov


@pytest.mark.parametrize("kind, rho", KINDS)
@pytest.mark.parametrize(
    "sampler, num_steps, tolerance",
    [
        ("ddpm", 1000, 0.03),
        ("ddpm", 100, 0.25),
        ("ddpm, each step twice", 100, 0.27),
        ("ddim", 100, 0.12),
        ("ddim, eta 0.5", 100, 0.14),
        ("dpmpp_2m", 100, 0.005),
    ],
)
def test_samples_have_the_datas_mean_and_covariance(
    kind: str, rho: float, sampler: str, num_steps: int, tolerance: float
) -> None:
    """Tolerances are the discretisation's, for entries of the covariance up to 1.9: DDPM's posterior variance leaves out
    the uncertainty of x0 and so is too narrow, by 0.025 at most at 1,000 steps and 0.21 at 100. DDIM's is the smaller,
    and the second order's by far the smallest.
    The mean is exact up to what the last time leaves of the data: linear with rho = 1, alpha(T) = 0.006, leaves 0.02;
    a flow leaves nothing."""
    mean_error, cov_error = sampled(sampler, kind, rho, num_steps)
    left = {("linear", 1.0): 0.02, ("flow", 1.0): 1e-10}.get((kind, rho), 1e-3)
    assert_close(mean_error, torch.zeros_like(mean_error), rtol=0, atol=left)
    assert_close(cov_error, torch.zeros_like(cov_error), rtol=0, atol=tolerance)
    if sampler != "dpmpp_2m":
        assert (cov_error.diag() < 0).all()


@pytest.mark.parametrize("kind, rho", KINDS[2:])
@pytest.mark.parametrize(
    "sampler, factor", [*((name, 2.5) for name in SAMPLERS if name != "dpmpp_2m"), ("dpmpp_2m", 8)]
)
def test_more_steps_are_closer(sampler: str, factor: float, kind: str, rho: float) -> None:
    """Four times the steps: the covariance's error falls to about a quarter, and of second order to less than an eighth."""
    errors = [sampled(sampler, kind, rho, num_steps)[1].abs().max().item() for num_steps in (20, 80, 320)]
    assert errors[1] < errors[0] / factor
    assert errors[2] < errors[1] / factor


@pytest.mark.parametrize("kind, times", [("cosine", [1000, 700, 400, 150, 0]), ("flow", [1.0, 0.8, 0.55, 0.3, 0.0])])
def test_a_learned_variance_makes_four_steps_exact(kind: str, times: list[float]) -> None:
    """With the true variance of q(x_s | x_t) each step samples the Gaussian that it should, however long it is.

    The data's values are independent, so that it is a number for each of them: between the posterior's, of data without
    any variance, and the added noise's. The last step gives the mean, and leaves out what x_t cannot tell of x0.
    """
    schedule = make_schedule(kind, 1.0)
    mean, spread = torch.tensor([0.5, -1.0, 0.2]).double(), torch.tensor([0.02, 0.05, 0.1]).double()
    denoise = best_denoiser(mean, spread.diag(), schedule)
    following = dict(pairwise(times))

    def variance(t: float) -> Tensor:
        alpha, sigma = schedule.rates(t)
        return alpha**2 * spread + sigma**2

    def denoise_and_share(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        now, then = schedule.rates(t), schedule.rates(following[t])
        x0 = denoise(x_t, t)
        if following[t] == 0:
            return x0, torch.full_like(x0, 0.5)  # of no effect
        added = transition(now, then)[1]
        lower = posterior(x_t, x0, now, then)[1].log()
        true = (
            variance(following[t]) * added / variance(t)
        ).log()  # that of a Gaussian conditioned on a noisy look at it
        share = (true - lower) / (added.log() - lower)
        assert ((share > 0) & (share < 1)).all()
        return x0, share.expand_as(x0)

    noise = UnitNoise(3, 4)
    start = noise.start(3)
    found_mean, found_cov = noise.moments(ddpm(denoise_and_share, start, schedule, times, noise))
    untold = spread * schedule.rates(times[-2])[1] ** 2 / variance(times[-2])
    # the cosine's last alpha_bar, 2.4e-9, is what its start lacks
    assert_close(found_mean, mean, rtol=0, atol=1e-10 if kind == "flow" else 1e-4)
    assert_close(found_cov, (spread - untold).diag(), rtol=0, atol=1e-10 if kind == "flow" else 1e-7)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers and numpy
@pytest.mark.parametrize(
    "name, num_steps, tolerance",
    [
        ("DDIMScheduler", 100, 0.12),
        ("DPMSolverMultistepScheduler", 100, 0.01),
        ("EulerDiscreteScheduler", 100, 0.12),
        ("UniPCMultistepScheduler", 100, 0.01),
    ],
)
def test_samples_of_another_librarys_scheduler(name: str, num_steps: int, tolerance: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    settings: dict[str, Any] = {"beta_schedule": "linear", "prediction_type": "epsilon"}
    settings |= {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(timestep_spacing="trailing", **settings)
    mean, cov = gaussian(5)
    schedule, noise = DiscreteSchedule("linear"), UnitNoise(5, 1)
    start = noise.start(5)
    samples = by_scheduler(best_denoiser(mean, cov, schedule), start, schedule, scheduler, num_steps)
    found_mean, found_cov = noise.moments(samples)
    assert_close(found_mean, mean, rtol=0, atol=0.02)
    assert_close(found_cov, cov, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_drawn_samples_agree(kind: str) -> None:
    """The same with real noise: 20,000 samples, so five standard errors of the mean are 0.05."""
    mean, cov = gaussian(5)
    schedule = make_schedule(kind, 1.0)
    noise = standard_normal(generator(1))
    start = torch.randn(20_000, 5, dtype=torch.float64, generator=generator(2))
    samples = ddpm(best_denoiser(mean, cov, schedule), start, schedule, schedule.times(100), noise)
    assert_close(samples.mean(0), mean, rtol=0, atol=0.05)
    assert_close(samples.T.cov(), cov, rtol=0, atol=0.2)


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
@pytest.mark.parametrize("schedule", [DiscreteSchedule("linear", rho=0.8), FlowSchedule()])
def test_one_step_is_the_mean(sampler: Callable[..., Tensor], schedule: Schedule) -> None:
    mean, cov = gaussian(5)
    start = torch.randn(8, 5, dtype=torch.float64, generator=generator())
    one = sampler(best_denoiser(mean, cov, schedule), start, schedule, [schedule.end, 0])
    assert_close(one, mean.expand(8, -1), rtol=0, atol=1e-4)


# Known values by replacement, to a denoiser of known and unknown values together


def replaced(kind: str, num_resamples: int, jump_length: int = 1) -> tuple[float, float]:
    """Mean and variance of the second of two values, given the first, by 250 DDPM steps."""
    known, value = torch.tensor([True, False]), torch.tensor([1.9, torch.nan]).double()
    mean, cov = torch.tensor([0.5, 0.2]).double(), torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
    schedule, num_steps = make_schedule(kind, 1.0), 250
    joint = best_denoiser(mean, cov, schedule)
    ways_back = len(range(0, num_steps - jump_length, jump_length)) * (num_resamples - 1)
    predictions = num_steps + ways_back * jump_length
    noise = UnitNoise(2, 1 + 2 * predictions - num_resamples + ways_back)  # a step to 0 adds none

    def denoise(x_t: Tensor, t: float) -> Tensor:
        return joint(torch.where(known, add_noise(value, noise(x_t), *schedule.rates(t)), x_t), t)

    start, times = noise.start(2), schedule.times(num_steps)
    again = {"num_resamples": num_resamples, "jump_length": jump_length}
    found_mean, found_cov = noise.moments(ddpm(denoise, start, schedule, times, noise, **again))
    return found_mean[1].item(), found_cov[1, 1].item()


@pytest.mark.parametrize("kind", ["linear", "flow"])
def test_resampling_brings_replacement_to_the_truth(kind: str) -> None:
    """The truth is 0.2 + 0.9 (1.9 - 0.5) = 1.46 and 1 - 0.9^2 = 0.19; the value's own mean and variance are 0.2 and 1.

    One pass mixes known and unknown values too little: 1.07 and 0.30. Ten give XX.
    """
    mean, variance = replaced(kind, 1)
    assert mean < 1.46 - 0.35
    assert variance > 0.19 + 0.1
    for jump_length in (1, 10):
        mean, variance = replaced(kind, 10, jump_length)
        print(kind, jump_length, mean, variance)
        assert abs(mean - 1.46) < 0.04
        assert abs(variance - 0.19) < 0.025


# Known values inside the state: a mask finer than a patch


class Told(nn.Module):
    """In the condition's place: the time itself."""

    def forward(self, t: Tensor, labels: Tensor | None) -> tuple[Tensor, None]:
        return t, None


class ClosedForm(nn.Module):
    """In a decoder's place: E[x0 | x_t] of one hidden token of four values."""

    def __init__(self, denoise: Denoise) -> None:
        super().__init__()
        self.denoise = denoise

    def forward(self, context: object, hidden: Tensor, x_t: Tensor, t: Tensor) -> tuple[None, Tensor | tuple]:
        return None, self.denoise(x_t, int(t[0]))


class Read(nn.Module):
    """In the head's place: the decoder's output is the prediction."""

    def forward(self, x: Tensor, cond: Tensor) -> dict[str, Tensor]:
        return {"x0": x}


KNOWN = torch.tensor([True, True, False, False])


def repainted(rule: str, sampler: str, num_steps: int, seed: int = 1) -> dict[str, Tensor]:
    """Moments of the two unknown values, as sampled and true; `model.denoiser` itself around the closed form.

    Args:
        rule: "reimposed", as the model does it; "off", nothing known is told; "prediction", only the prediction is
            replaced at known values, and x_t is left alone.
    """
    mean, cov = gaussian(4, seed)
    model = build(small(channels=1, size="Nano/2", height=4))
    model.low.fill_(-torch.inf)
    model.high.fill_(torch.inf)
    assert model.schedule is not None
    model.prepare = lambda *arguments: object()  # type: ignore[method-assign]
    model.condition, model.head = Told(), Read()  # type: ignore[assignment]
    model.decoder = ClosedForm(best_denoiser(mean, cov, model.schedule))  # type: ignore[assignment]
    value = mean + torch.linalg.cholesky(cov) @ torch.tensor([1.5, -1.0, 0.0, 0.0], dtype=mean.dtype)
    tells = num_steps if rule == "reimposed" else 0
    noise = UnitNoise(4, 1 + tells + (num_steps - 1 if sampler == "ddpm" else 0))
    start = noise.start(1, 4)
    x0 = torch.zeros(len(start), 4, 4, dtype=torch.float64)
    x0[:, 2] = torch.where(KNOWN, value, torch.nan)  # what is not known is never read
    order = torch.tensor([0, 1, 3, 2]).expand(len(start), -1)
    known = KNOWN.expand(len(start), 1, 4)
    denoise = model.denoiser(x0, Mask(order[:, :3], order[:, 3:]), known if rule == "reimposed" else None, noise)
    if rule == "prediction":
        inner = denoise
        denoise = lambda x_t, t: torch.where(known, x0[:, 2:3], inner(x_t, t))  # noqa: E731
    times = model.schedule.times(num_steps)
    if sampler == "ddpm":
        samples = ddpm(denoise, start, model.schedule, times, noise)
    else:
        samples = ddim(denoise, start, model.schedule, times)
    found_mean, found_cov = noise.moments(samples)
    if rule != "off":
        assert_close(found_mean[KNOWN], value[KNOWN], rtol=1e-5, atol=1e-5)
    gain = torch.linalg.solve(cov[KNOWN][:, KNOWN], cov[KNOWN][:, ~KNOWN])
    return {
        "mean": found_mean[~KNOWN],
        "cov": found_cov[~KNOWN][:, ~KNOWN],
        "true mean": mean[~KNOWN] + (value - mean)[KNOWN] @ gain,
        "true cov": cov[~KNOWN][:, ~KNOWN] - cov[~KNOWN][:, KNOWN] @ gain,
        "marginal mean": mean[~KNOWN],
        "marginal cov": cov[~KNOWN][:, ~KNOWN],
    }


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_without_reimposing_known_values_are_ignored(sampler: str) -> None:
    """The samples are those of the marginal: a hidden token's known pixels are not used."""
    found = repainted("off", sampler, 250)
    assert_close(found["mean"], found["marginal mean"], rtol=0, atol=1e-3)
    assert_close(found["cov"], found["marginal cov"], rtol=0, atol=0.1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reimposing_known_values_brings_samples_closer_to_the_truth(sampler: str, seed: int) -> None:
    """Closer in mean and in variance, but not there: replacement is biased towards the marginal."""

    def errors(rule: str) -> tuple[float, float]:
        found = repainted(rule, sampler, 250, seed)
        mean_error = (found["mean"] - found["true mean"]).norm()
        return mean_error.item(), (found["cov"] - found["true cov"]).norm().item()

    on, off = errors("reimposed"), errors("off")
    assert on[0] < off[0]
    assert on[1] < off[1]


def test_recorded_moments_of_each_rule() -> None:
    """250 DDPM steps, linear with rho = 0.8, one Gaussian; true mean -0.540 and -0.088, variance 0.252 and 0.674."""
    recorded = {
        "reimposed": ((-0.445, 0.304), (0.234, 0.724)),
        "off": ((-0.320, 0.738), (0.256, 0.924)),
        "prediction": ((-0.445, 0.304), (0.236, 0.748)),
    }
    for rule, (mean, variance) in recorded.items():
        found = repainted(rule, "ddpm", 250)
        assert_close(found["true mean"], torch.tensor((-0.540, -0.088), dtype=torch.float64), rtol=0, atol=1e-3)
        assert_close(found["true cov"].diag(), torch.tensor((0.252, 0.674), dtype=torch.float64), rtol=0, atol=1e-3)
        assert_close(found["mean"], torch.tensor(mean, dtype=torch.float64), rtol=0, atol=1e-3)
        assert_close(found["cov"].diag(), torch.tensor(variance, dtype=torch.float64), rtol=0, atol=1e-3)
