"""From noise to a clip, given a schedule and a denoiser `denoise(x_t, t) -> x0`. Knows nothing of masks or networks.

Every sampler walks down a list of times on either schedule, whole ones on a DiscreteSchedule and real ones on a
FlowSchedule. A denoiser that learned its variance returns (x0, share), which `ddpm` uses and the others leave aside.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from unveil.schedule import (
    DiscreteSchedule,
    Schedule,
    add_noise,
    eps_from_x0,
    posterior,
    transition,
    v_from_x0_eps,
)

Denoise = Callable[[Tensor, float], Tensor | tuple[Tensor, Tensor]]
Noise = Callable[[Tensor], Tensor]
OnStep = Callable[[float, Tensor, Tensor], None]
GuidanceKind = Literal["constant", "interval", "power_cosine"]


def check_times(times: Sequence[float], end: float) -> None:
    """A list of times must fall from at most the schedule's end to 0."""
    falling = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or times[-1] != 0 or not times[0] <= end or not falling:
        raise ValueError(f"times={list(times)}: give falling times, the first at most {end}, the last 0 (clean).")


def _predict(denoise: Denoise, x_t: Tensor, t: float, on_step: OnStep | None) -> tuple[Tensor, Tensor | None]:
    """The clean values and, from a denoiser that learned it, the variance's share."""
    prediction = denoise(x_t, t)
    x0, share = prediction if isinstance(prediction, tuple) else (prediction, None)
    if on_step is not None:
        on_step(t, x_t, x0)
    return x0, share


def ddpm(
    denoise: Denoise,
    x_t: Tensor,
    schedule: Schedule,
    times: Sequence[float],
    noise: Noise,
    on_step: OnStep | None = None,
    num_resamples: int = 1,
    jump_length: int = 1,
) -> Tensor:
    """Ancestral sampling: x_s ~ q(x_s | x_t, x0 = denoise(x_t, t)).

    Ho et al. 2020, arXiv 2006.11239, algorithm 2, with the posterior's own variance; respaced when times skip. With a
    share from the denoiser the log variance lies that far from the posterior's (0) towards that of the noise which the
    step from s to t adds (1): Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15.

    Args:
        denoise: predicts clean values from x_t at a time, and may return (x0, share), share about 0 to 1, of x0's shape.
        x_t: start, standard normal, any shape.
        times: falling, the last is 0. `schedule.times(n)` gives n even steps.
        noise: a standard normal of its argument's shape, fresh at each call.
        on_step: called with (t, x_t, x0) after each prediction.
        num_resamples, jump_length: after every jump_length steps go as far back, with fresh noise, and down again, until they
            were taken num_resamples times; the first steps, from pure noise, are taken once. For denoisers that are told
            known values by replacement, which one pass mixes badly with the others: RePaint, Lugmayr et al. 2022,
            arXiv 2201.09865, algorithm 1, whose values are 10 and 10 for 250 steps.

    Raises:
        ValueError: times do not fall to 0, or num_resamples or jump_length is below 1.
    """
    check_times(times, schedule.end)
    if num_resamples < 1 or jump_length < 1:
        raise ValueError(
            f"num_resamples={num_resamples} and jump_length={jump_length}, but every step is taken at least once. "
            "Use 1 or more."
        )
    num_steps = len(times) - 1
    num_jumps = len(range(0, num_steps - jump_length, jump_length))
    first = num_steps - num_jumps * jump_length  # the steps that are taken once; the jumps count from the clean end
    for begin, end in pairwise([0, *range(first, num_steps + 1, jump_length)]):
        down = times[begin : end + 1]
        passes = num_resamples if begin else 1
        for i in range(passes):
            for t, s in pairwise(down):
                now, then = schedule.rates(t), schedule.rates(s)
                x0, share = _predict(denoise, x_t, t, on_step)
                x_s, variance = posterior(x_t, x0, now, then)
                if s > 0:
                    if share is not None:
                        added = transition(now, then)[1]
                        variance = (share * added.log() + (1 - share) * variance.log()).exp()
                    x_s = x_s + variance.sqrt().to(x_s.dtype) * noise(x_s)
                x_t = x_s
            if i < passes - 1:
                step, added = transition(schedule.rates(down[0]), schedule.rates(down[-1]))
                x_t = add_noise(x_t, noise(x_t), step, added.sqrt())
    return x_t


def ddim(
    denoise: Denoise,
    x_t: Tensor,
    schedule: Schedule,
    times: Sequence[float],
    on_step: OnStep | None = None,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Tensor:
    """Keep the noise that x_t and x0 imply, at the next time's level; deterministic unless eta asks for fresh noise.

    Song et al. 2021, arXiv 2010.02502, eq. 12 and 16; other arguments as in `ddpm`. On a flow eta = 0 is Euler's method.

    Args:
        eta: standard deviation of the fresh noise in units of the posterior's; 1 is `ddpm`, draw for draw.
        noise: as in `ddpm`; needed with eta > 0.

    Raises:
        ValueError: times do not fall to 0, eta is outside [0, 1], or it asks for noise that is not given.
    """
    check_times(times, schedule.end)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}, but it runs from 0 (deterministic) to 1 (as ddpm). Use a value between.")
    if eta > 0 and noise is None:
        raise ValueError(f"eta={eta} adds fresh noise at every step, but noise is None. Give noise, or use eta=0.")
    for t, s in pairwise(times):
        x0, _ = _predict(denoise, x_t, t, on_step)
        now, then = schedule.rates(t), schedule.rates(s)
        eps = eps_from_x0(x_t, x0, *now)
        if noise is not None and eta > 0 and s > 0:
            # The posterior's variance is sigma_s^2 new, so eps and fresh noise share sigma_s^2 between them. This is
            # eq. 12 without assuming alpha^2 + sigma^2 = 1, and no root of a rounded negative number.
            new = transition(now, then)[1] / now[1] ** 2
            eps = add_noise(eps, noise(x_t), (1 - eta**2 * new).sqrt(), eta * new.sqrt())
        x_t = add_noise(x0, eps, *then)
    return x_t


def dpmpp_2m(
    denoise: Denoise, x_t: Tensor, schedule: Schedule, times: Sequence[float], on_step: OnStep | None = None
) -> Tensor:
    """Deterministic sampling of second order: x0 is continued on a line through this prediction and the last one.

    DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, algorithm 2, in lambda = log(alpha / sigma), as float64; arguments
    as in `ddpm`. Its sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D is DDIM's step with D for x0. The first step and
    the last are DDIM's.
    """
    check_times(times, schedule.end)
    last_x0, last_length = x_t, math.inf
    for t, s in pairwise(times):
        x0, _ = _predict(denoise, x_t, t, on_step)
        now, then = schedule.rates(t), schedule.rates(s)
        length = float((then[0] / then[1]).log() - (now[0] / now[1]).log())
        line = x0
        # The last step is of infinite length, as is one from pure noise, where alpha = 0 (nan where alpha underflows at
        # both ends). The first, and one after an infinite one, has a line without slope: the limit of its formula.
        if math.isfinite(length):
            line = x0 + length / (2 * last_length) * (x0 - last_x0)
        x_t = add_noise(line, eps_from_x0(x_t, line, *now), *then)
        last_x0, last_length = x0, length
    return x_t


def _check_scheduler(schedule: Schedule, scheduler: Any) -> None:
    """A foreign scheduler must have our schedule's table: the network was trained for no other."""
    name = type(scheduler).__name__
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(
            f"{name} counts the steps of a discrete schedule, but this model's is a flow over real times. Use ddpm, ddim "
            "or dpmpp_2m."
        )
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ValueError(f"{name} has no alphas_cumprod, so it is not one for discrete diffusion. Use one that has.")
    table = torch.as_tensor(table).detach().cpu().double()
    ours = schedule.alpha_bar[1:]
    # theirs is float32, a product of up to 1,000 rounded numbers
    if table.shape != ours.shape or not torch.allclose(table, ours, rtol=1e-3, atol=1e-8):
        raise ValueError(
            f"{name} has {len(table)} alphas_cumprod that end at {table[-1]:.3g}, but the model was trained with "
            f"{len(ours)} that end at {ours[-1]:.3g} (or they differ before). Make it with "
            "trained_betas=schedule.betas.numpy()."
        )
    if table[-1] == 0:
        raise ValueError(
            f"{name}'s alphas_cumprod are float32 and reach 0 on a schedule as noisy as this one (ours end at "
            f"{ours[-1]:.3g}), and it divides by them. Use ddpm, ddim or dpmpp_2m."
        )


def by_scheduler(
    denoise: Denoise,
    x_t: Tensor,
    schedule: Schedule,
    scheduler: Any,
    num_steps: int,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sampling by a scheduler of diffusers, or any object with its interface; arguments as in `ddpm`, and:

    What fits: `set_timesteps`, `timesteps` and `step(model_output, k, sample).prev_sample` over whole k = t - 1, with
    `alphas_cumprod` equal to ours; DDIM, DDPM, DPM-Solver, UniPC and so on. Euler's and others that scale their sample
    do too, with `scale_model_input` and `init_noise_sigma`, if made with timestep_spacing="leading" or "trailing".
    Some clip x0 to [-1, 1] unless made with clip_sample=False.

    Args:
        scheduler: gets what its config.prediction_type names ("epsilon", "sample" or "v_prediction"), computed from x0.
        num_steps: given to set_timesteps.
        generator: for a scheduler that draws noise; without one it draws from torch's global seed.
        on_step: called with x_t at the schedule's own rates, whatever the scheduler's scale.

    Raises:
        ValueError: the schedule is a flow, or the scheduler has another table, another kind of prediction or fractional
            times.
    """
    _check_scheduler(schedule, scheduler)
    name, kind = type(scheduler).__name__, scheduler.config.prediction_type
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"{name} asks for prediction_type={kind!r}, which does not follow from x0 on a discrete schedule. Make it "
            "with 'epsilon', 'sample' or 'v_prediction'."
        )
    scheduler.set_timesteps(num_steps)
    fractional = [float(k) for k in scheduler.timesteps if float(k) != int(k)]
    if fractional:
        raise ValueError(
            f"{name} visits k={fractional[0]:.2f}, between the whole times that the model was trained at. Make it with "
            'timestep_spacing="leading" or "trailing", and without karras, exponential or beta sigmas.'
        )
    scale = getattr(scheduler, "scale_model_input", lambda sample, k: sample)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    sample = x_t * getattr(scheduler, "init_noise_sigma", 1.0)
    for k in scheduler.timesteps:
        t = int(k) + 1
        x_t = scale(sample, k)
        x0, _ = _predict(denoise, x_t, t, on_step)
        rates = schedule.rates(t)
        output = x0
        if kind != "sample":
            output = eps = eps_from_x0(x_t, x0, *rates)
            if kind == "v_prediction":
                output = v_from_x0_eps(x0, eps, *rates)
        sample = scheduler.step(output, k, sample, **draws).prev_sample
    return sample


def guidance(
    kind: GuidanceKind, scale: float, end: float, interval: tuple[float, float] = (0.0, 1.0), power: float = 4.0
) -> Callable[[float], float]:
    """How strongly to guide at each time: a function from t to the scale there, where 1 is no guidance.

    constant: scale at every time.                      Ho & Salimans 2022, arXiv 2207.12598
    interval: scale inside the interval, ends included, and 1 outside.  Kynkaanniemi et al. 2024, arXiv 2404.07724
    power_cosine: from 1 at the end to scale at t = 0, (scale - 1) (1 - cos(pi (1 - t / end)^power)) / 2 + 1.
        MDTv2, Gao et al. 2023, arXiv 2303.14389, whose power is 4

    Args:
        scale: at least 0; 0 ignores the condition.
        end: the schedule's last time, `schedule.end`.
        interval: of t / end, where 0 is clean; of "interval" alone.
        power: of "power_cosine" alone, above 0; the larger, the later guidance sets in.

    Raises:
        ValueError: a value is out of its range, or the kind unknown.
    """
    low, high = interval
    if kind not in get_args(GuidanceKind):
        raise ValueError(f"Guidance {kind!r} is unknown. Use one of {', '.join(get_args(GuidanceKind))}.")
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale={scale}, but guidance needs a finite scale of at least 0. Use 1 for no guidance.")
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"interval={interval}, but it is a part of t / end from 0 (clean) to 1 (noise). Give 0 <= low < high <= 1."
        )
    if not (math.isfinite(power) and power > 0):
        raise ValueError(f"power={power}, but the cosine needs a finite power above 0. MDTv2 uses 4.")
    if kind == "constant":
        return lambda t: scale
    if kind == "interval":
        return lambda t: scale if low <= t / end <= high else 1.0
    return lambda t: (scale - 1) * (1 - math.cos(math.pi * (1 - t / end) ** power)) / 2 + 1


def standard_normal(generator: torch.Generator) -> Noise:
    """Noise drawn on the generator's device and moved to its argument's."""
    return lambda x: torch.randn(x.shape, generator=generator, device=generator.device).to(x)
