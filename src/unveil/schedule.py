"""How much of a clip is left at time t: x_t = alpha(t) x0 + sigma(t) eps. Time 0 is clean, the last time is noise.

All tables are float64: at rho = 0.4 the last alpha_bar is about 1e-71, which float32 cannot hold.

    alpha^2 = alpha_bar_t, sigma^2 = 1 - alpha_bar_t            Ho et al. 2020, arXiv 2006.11239, eq. 4
    beta_t <- beta_t ** rho                                     DiffMAE's exponent: rho < 1 is noisier, rho -> 0 is MAE
    alpha = 1 - t, sigma = t                                    rectified flow, Liu et al. 2022, arXiv 2209.03003
    v = alpha eps - sigma x0                                    Salimans & Ho 2022, arXiv 2202.00512
"""

import math

import torch
from torch import Tensor


def _linear_betas(num_steps: int) -> Tensor:
    """1e-4 to 0.02 at 1,000 steps, scaled for other counts so that the whole noise stays the same."""
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64, device="cpu")


def _cosine_betas(num_steps: int) -> Tensor:
    """Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17: s = 0.008, no beta above 0.999."""
    times = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class DiscreteSchedule:
    """A schedule over the integer times 0 (clean) to num_steps (noise).

    Attributes:
        end: the last time, num_steps.
        betas: (num_steps,) float64; betas[t - 1] is the step from t - 1 to t.
        alpha_bar: (num_steps + 1,) float64; alpha_bar[0] = 1.
    """

    def __init__(self, kind: str = "linear", num_steps: int = 1000, rho: float = 1.0) -> None:
        betas = {"linear": _linear_betas, "cosine": _cosine_betas}[kind](num_steps).clamp(max=0.999)
        self.num_steps = self.end = num_steps
        self.betas = betas**rho
        # on the CPU, also of a model that is built for its names and shapes alone
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), (1 - self.betas).cumprod(0)])
        self._rates = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])
        self._on_device: dict[torch.device, Tensor] = {self._rates.device: self._rates}

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), float64, of t's shape. At t = 0 exactly 1 and 0.

        Raises:
            ValueError: t is of a floating-point type.
        """
        t = torch.as_tensor(t)
        if t.is_floating_point():
            raise ValueError(
                f"t={t.tolist()} is of a floating-point type, but this schedule has the whole times 0 to {self.num_steps} "
                "only. Give integers, as from schedule.times(num_steps)."
            )
        if t.device not in self._on_device:
            self._on_device[t.device] = self._rates.to(t.device)
        alpha, sigma = self._on_device[t.device]
        return alpha[t], sigma[t]

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """n times, uniform on 1 .. num_steps."""
        return torch.randint(1, self.num_steps + 1, (n,), generator=generator)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told of t: t itself, float32."""
        return t.float()

    def times(self, num_steps: int) -> list[int]:
        """The times a sampler visits: num_steps of them from the last one down, evenly spaced, and then 0.

        Raises:
            ValueError: num_steps is below 1 or above the schedule's own.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(
                f"num_steps={num_steps}, but the schedule has {self.num_steps} times. Use 1 to {self.num_steps} steps."
            )
        return torch.linspace(self.num_steps, 0, num_steps + 1, dtype=torch.float64).round().long().tolist()

    def strided_times(self, num_steps: int) -> list[int]:
        """The times of UMD's published sampler: an even stride down from the last one, then 1, then 0 (clean).

        UMD counts k = t - 1: 125 steps are its 999, 991, ..., 15, 7 and a last prediction at 0. So there is one
        prediction more than num_steps, unless the stride is 1 and visits t = 1 by itself.

        Raises:
            ValueError: num_steps does not divide the schedule's own.
        """
        if num_steps < 1 or self.num_steps % num_steps:
            raise ValueError(
                f"num_steps={num_steps} does not divide the schedule's {self.num_steps} times. UMD's own code rounds the "
                "stride there and visits another number of times than was asked for (59 for 62 of 1000), so there is no "
                "grid to follow. Use a divisor, or even steps: times(num_steps)."
            )
        stride = self.num_steps // num_steps
        return [*range(self.num_steps, 1, -stride), 1, 0]


class FlowSchedule:
    """Straight lines from the clip to noise over the real times 0 (clean) to 1 (noise): alpha = 1 - t, sigma = t.

    Liu et al. 2022, arXiv 2209.03003; SiT's linear interpolant, Ma et al. 2024, arXiv 2401.08740.

    Attributes:
        end: the last time, 1.0.
    """

    end = 1.0

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), float64, of t's shape. At t = 0 exactly 1 and 0, at t = 1 exactly 0 and 1."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return 1 - t, t

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """n times (n,), float32, whose logit is N(0.8, 0.8^2); never 0 or 1.

        JiT, Li & He 2025, arXiv 2511.13720: the share of the clip left, 1 - t, is the sigmoid of N(-0.8, 0.8^2).
        """
        # a drawn normal is below 9 in size, so the sigmoid is far enough from 0 and 1 for float32
        return torch.sigmoid(0.8 + 0.8 * torch.randn(n, generator=generator))

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told of t, float32: 1000 t, in the range that its sinusoid is made for."""
        return 1000 * t.float()

    def times(self, num_steps: int) -> list[float]:
        """The times a sampler visits: num_steps of them from 1.0 down, evenly spaced, and then 0.0.

        Raises:
            ValueError: num_steps is below 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}, but sampling takes at least one step. Use 1 or more.")
        return [(num_steps - i) / num_steps for i in range(num_steps + 1)]


Schedule = DiscreteSchedule | FlowSchedule


def make_schedule(kind: str, rho: float) -> Schedule:
    """The schedule that a config names: "linear" and "cosine" with the exponent rho of their betas, or "flow"."""
    if kind == "flow":
        assert rho == 1, "a flow has no betas for rho to act on"
        return FlowSchedule()
    return DiscreteSchedule(kind, rho=rho)


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


def transition(now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The forward process from an earlier time s to t: x_t = step x_s + N(0, added). For any rates.

    Args:
        now, then: (alpha, sigma) at t and at s, single numbers in float64.

    Returns:
        step = alpha_t / alpha_s and added = sigma_t^2 - step^2 sigma_s^2, float64 numbers; with s = t - 1 on a discrete
        schedule sqrt(1 - beta_t) and beta_t.
    """
    (a_t, s_t), (a_s, s_s) = now, then
    # far into a noisy schedule both underflow, and nothing of x_s is left in x_t
    step = a_t / a_s if a_s > 0 else torch.zeros_like(a_t)
    return step, s_t**2 - step**2 * s_s**2


def posterior(
    x_t: Tensor, x0: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x0) for an earlier time s; with s = t - 1, Ho et al. 2020, eq. 7.

    Args:
        now, then: (alpha, sigma) at t and at s, single numbers in float64.

    Returns:
        mean of x_t's shape, and the variance, a float64 number; 0 at s = 0.
    """
    (_, s_t), (a_s, s_s) = now, then
    step, added = transition(now, then)
    mean = (step * s_s**2 / s_t**2).to(x_t.dtype) * x_t + (a_s * added / s_t**2).to(x_t.dtype) * x0
    return mean, added * s_s**2 / s_t**2
