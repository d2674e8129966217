"""From noise to a clip, given a schedule and a denoiser `denoise(x_t, t) -> x0`. Knows nothing of masks or networks."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from unveil.schedule import DiscreteSchedule, add_noise, eps_from_x0, posterior

Denoise = Callable[[Tensor, int], Tensor]
Noise = Callable[[Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor], None]


def check_times(times: Sequence[int], num_steps: int) -> None:
    """A list of times must fall from at most num_steps to 0."""
    if len(times) < 2 or times[-1] != 0 or times[0] > num_steps or any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"times={list(times)}: give falling times, the first at most {num_steps}, the last 0 (clean).")


def ddpm(
    denoise: Denoise,
    x_t: Tensor,
    schedule: DiscreteSchedule,
    times: Sequence[int],
    noise: Noise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling: x_s ~ q(x_s | x_t, x0 = denoise(x_t, t)).

    Ho et al. 2020, arXiv 2006.11239, algorithm 2, with the posterior's own variance; respaced when times skip.

    Args:
        denoise: predicts clean values from x_t at an integer time.
        x_t: start, standard normal, any shape.
        times: falling, the last is 0. `schedule.times(n)` gives n even steps.
        noise: a standard normal of its argument's shape, fresh at each call.
        on_step: called with (t, x_t, x0) after each prediction.
    """
    check_times(times, schedule.num_steps)
    for t, s in pairwise(times):
        x0 = denoise(x_t, t)
        if on_step is not None:
            on_step(t, x_t, x0)
        mean, variance = posterior(x_t, x0, schedule.rates(t), schedule.rates(s))
        x_t = mean if s == 0 else mean + variance.sqrt().to(x_t.dtype) * noise(x_t)
    return x_t


def ddim(
    denoise: Denoise,
    x_t: Tensor,
    schedule: DiscreteSchedule,
    times: Sequence[int],
    on_step: OnStep | None = None,
) -> Tensor:
    """Deterministic sampling: keep the noise that x_t and x0 imply, at the next time's level.

    Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0. Arguments as in `ddpm`.
    """
    check_times(times, schedule.num_steps)
    for t, s in pairwise(times):
        x0 = denoise(x_t, t)
        if on_step is not None:
            on_step(t, x_t, x0)
        x_t = add_noise(x0, eps_from_x0(x_t, x0, *schedule.rates(t)), *schedule.rates(s))
    return x_t


def standard_normal(generator: torch.Generator) -> Noise:
    """Noise drawn on the generator's device and moved to its argument's."""
    return lambda x: torch.randn(x.shape, generator=generator, device=generator.device).to(x)
