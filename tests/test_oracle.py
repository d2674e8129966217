"""Samplers on a Gaussian whose best denoiser is known in closed form: no network, no training, no statistical error.

The denoiser E[x0 | x_t] of a Gaussian is affine, so all of sampling is an affine map of the noise that goes in. Each row of
a batch gets a single 1 in one draw, and the outputs are the map's columns: mean and covariance of the samples, exactly.
"""

from collections.abc import Callable

import pytest
import torch
from small import build, generator, small
from torch import Tensor, nn
from torch.testing import assert_close

from unveil.masking import Mask
from unveil.sampling import Denoise, ddim, ddpm, standard_normal
from unveil.schedule import DiscreteSchedule

Noise = Callable[[Tensor], Tensor]


def gaussian(dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A mean and a covariance with strong correlations; eigenvalues from about 0.2 to 3, which [-1, 1] data have too."""
    factor = torch.randn(dim, dim, dtype=torch.float64, generator=generator(seed))
    return torch.randn(
        dim, dtype=torch.float64, generator=generator(seed + 100)
    ), factor @ factor.T / dim + 0.2 * torch.eye(dim, dtype=torch.float64)


def best_denoiser(mean: Tensor, cov: Tensor, schedule: DiscreteSchedule) -> Denoise:
    """E[x0 | x_t] = mean + alpha cov (alpha^2 cov + sigma^2 I)^-1 (x_t - alpha mean)."""
    identity = torch.eye(len(mean), dtype=mean.dtype)

    def denoise(x_t: Tensor, t: int) -> Tensor:
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


@pytest.mark.parametrize("kind, rho", [("linear", 1.0), ("linear", 0.8), ("cosine", 1.0)])
@pytest.mark.parametrize(
    "sampler, num_steps, tolerance", [("ddpm", 1000, 0.03), ("ddpm", 100, 0.25), ("ddim", 100, 0.12)]
)
def test_samples_have_the_datas_mean_and_covariance(
    kind: str, rho: float, sampler: str, num_steps: int, tolerance: float
) -> None:
    """Tolerances are the discretisation's, for entries of the covariance up to 1.9: DDPM's posterior variance leaves out
    the uncertainty of x0 and so is too narrow, by 0.025 at most at 1,000 steps and 0.21 at 100. DDIM's is the smaller.
    The mean is exact up to what the last time leaves of the data: linear with rho = 1, alpha(T) = 0.006, leaves 0.02."""
    mean, cov = gaussian(5)
    schedule = DiscreteSchedule(kind, rho=rho)
    denoise, times = best_denoiser(mean, cov, schedule), schedule.times(num_steps)
    if sampler == "ddpm":
        noise = UnitNoise(5, num_steps)
        samples = ddpm(denoise, noise.start(5), schedule, times, noise)
    else:
        noise = UnitNoise(5, 1)
        samples = ddim(denoise, noise.start(5), schedule, times)
    found_mean, found_cov = noise.moments(samples)
    assert_close(found_mean, mean, rtol=0, atol=0.02 if (kind, rho) == ("linear", 1.0) else 1e-3)
    assert_close(found_cov, cov, rtol=0, atol=tolerance)
    if sampler == "ddpm":
        assert (found_cov.diag() < cov.diag()).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_more_steps_are_closer(sampler: str) -> None:
    """The covariance's error falls about as 1 / steps."""
    mean, cov = gaussian(5)
    schedule = DiscreteSchedule("cosine")
    errors = []
    for num_steps in (20, 80, 320):
        noise = UnitNoise(5, num_steps if sampler == "ddpm" else 1)
        start, denoise, times = noise.start(5), best_denoiser(mean, cov, schedule), schedule.times(num_steps)
        samples = (
            ddpm(denoise, start, schedule, times, noise) if sampler == "ddpm" else ddim(denoise, start, schedule, times)
        )
        errors.append((noise.moments(samples)[1] - cov).abs().max().item())
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5


def test_drawn_samples_agree() -> None:
    """The same with real noise: 20,000 samples, so five standard errors of the mean are 0.05."""
    mean, cov = gaussian(5)
    schedule = DiscreteSchedule("cosine")
    noise = standard_normal(generator(1))
    start = torch.randn(20_000, 5, dtype=torch.float64, generator=generator(2))
    samples = ddpm(best_denoiser(mean, cov, schedule), start, schedule, schedule.times(250), noise)
    assert_close(samples.mean(0), mean, rtol=0, atol=0.05)
    assert_close(samples.T.cov(), cov, rtol=0, atol=0.12)


def test_one_step_is_the_mean() -> None:
    mean, cov = gaussian(5)
    schedule = DiscreteSchedule("linear", rho=0.8)
    start = torch.randn(8, 5, dtype=torch.float64, generator=generator())
    one = ddim(best_denoiser(mean, cov, schedule), start, schedule, [1000, 0])
    assert_close(one, mean.expand(8, -1), rtol=0, atol=1e-4)


# Known values inside the state: a mask finer than a patch


class ClosedForm(nn.Module):
    """In a decoder's place: E[x0 | x_t] of one hidden token of four values."""

    def __init__(self, denoise: Denoise) -> None:
        super().__init__()
        self.denoise = denoise

    def forward(self, context: object, hidden: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.denoise(x_t, int(t[0]))


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
    model.prepare = lambda *arguments: None  # type: ignore[method-assign]
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
