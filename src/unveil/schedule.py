"""How much of a clip is left at time t: x_t = alpha(t) x0 + sigma(t) eps. Time 0 is clean, the last time is noise.

All tables are float64: at rho = 0.4 the last alpha_bar is about 1e-71, which float32 cannot hold.

    alpha^2 = alpha_bar_t, sigma^2 = 1 - alpha_bar_t            Ho et al. 2020, arXiv 2006.11239, eq. 4
    beta_t <- beta_t ** rho                                     DiffMAE's exponent: rho < 1 is noisier, rho -> 0 is MAE
    v = alpha eps - sigma x0                                    Salimans & Ho 2022, arXiv 2202.00512
"""

import math

import torch
from torch import Tensor


def _linear_betas(num_steps: int) -> Tensor:
    """1e-4 to 0.02 at 1,000 steps, scaled for other counts so that the whole noise stays the same."""
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


def _cosine_betas(num_steps: int) -> Tensor:
    """Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17: s = 0.008, no beta above 0.999."""
    times = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class DiscreteSchedule:
    """A schedule over the integer times 0 (clean) to num_steps (noise).

    Attributes:
        betas: (num_steps,) float64; betas[t - 1] is the step from t - 1 to t.
        alpha_bar: (num_steps + 1,) float64; alpha_bar[0] = 1.
    """

    def __init__(self, kind: str = "linear", num_steps: int = 1000, rho: float = 1.0) -> None:
        betas = {"linear": _linear_betas, "cosine": _cosine_betas}[kind](num_steps).clamp(max=0.999)
        self.num_steps = num_steps
        self.betas = betas**rho
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - self.betas).cumprod(0)])
        self._rates = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])
        self._on_device: dict[torch.device, Tensor] = {self._rates.device: self._rates}

    def rates(self, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), float64, of t's shape. At t = 0 exactly 1 and 0."""
        t = torch.as_tensor(t)
        if t.device not in self._on_device:
            self._on_device[t.device] = self._rates.to(t.device)
        alpha, sigma = self._on_device[t.device]
        return alpha[t], sigma[t]

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """n times, uniform on 1 .. num_steps."""
        return torch.randint(1, self.num_steps + 1, (n,), generator=generator)

    def times(self, num_steps: int) -> list[int]:
        """The times a sampler visits: num_steps of them from the last one down, evenly spaced, and then 0."""
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(
                f"num_steps={num_steps}, but the schedule has {self.num_steps} times. Use 1 to {self.num_steps} steps."
            )
        return torch.linspace(self.num_steps, 0, num_steps + 1, dtype=torch.float64).round().long().tolist()


def _like(rate: Tensor, x: Tensor) -> Tensor:
    """A rate per clip, or one for all, in x's type and shaped to multiply x."""
    return rate.to(x.dtype).reshape(rate.shape + (1,) * (x.ndim - rate.ndim)) if rate.ndim else rate.to(x.dtype)


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps; the rates are (B,) or a single number."""
    return _like(alpha, x0) * x0 + _like(sigma, x0) * eps


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean values that x_t and its noise imply; undefined where alpha = 0."""
    return (x_t - _like(sigma, x_t) * eps) / _like(alpha, x_t)


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that x_t and its clean values imply; undefined where sigma = 0."""
    return (x_t - _like(alpha, x_t) * x0) / _like(sigma, x_t)


def v_from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return _like(alpha, x0) * eps - _like(sigma, x0) * x0


def x0_from_v(x_t: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Holds for any rates: alpha^2 + sigma^2 = 1 is not assumed."""
    a, s = _like(alpha, x_t), _like(sigma, x_t)
    return (a * x_t - s * v) / (a**2 + s**2)


def eps_from_v(x_t: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    a, s = _like(alpha, x_t), _like(sigma, x_t)
    return (s * x_t + a * v) / (a**2 + s**2)


def posterior(
    x_t: Tensor, x0: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x0) for an earlier time s; with s = t - 1, Ho et al. 2020, eq. 7.

    Args:
        now, then: (alpha, sigma) at t and at s, single numbers in float64.

    Returns:
        mean of x_t's shape, and the variance, a float64 number; 0 at s = 0.
    """
    (a_t, s_t), (a_s, s_s) = now, then
    # far into a noisy schedule both underflow, and nothing of x_s is left in x_t
    step = a_t / a_s if a_s > 0 else torch.zeros_like(a_t)
    noise = s_t**2 - step**2 * s_s**2  # variance that the steps from s to t add
    mean = (step * s_s**2 / s_t**2).to(x_t.dtype) * x_t + (a_s * noise / s_t**2).to(x_t.dtype) * x0
    return mean, noise * s_s**2 / s_t**2
