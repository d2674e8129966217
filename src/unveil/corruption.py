"""What the encoder and the decoder get to see, and every target that could be asked for."""

from dataclasses import dataclass

from torch import Tensor

from unveil.config import NoiseOn
from unveil.masking import Mask, gather
from unveil.schedule import DiscreteSchedule, add_noise


@dataclass(frozen=True)
class Corrupted:
    """One corrupted batch of tokens.

    x_enc: what the encoder sees, (B, V, P).
    x_dec: noisy hidden tokens for the decoder, (B, M, P); None where mask tokens stand in.
    x0, eps: targets of the scored tokens, which are the hidden ones, or the visible ones if these carry the noise;
        eps is None where there is no noise.
    """

    x_enc: Tensor
    x_dec: Tensor | None
    x0: Tensor
    eps: Tensor | None


def corrupt(
    x0: Tensor,
    mask: Mask,
    noise_on: NoiseOn,
    t: Tensor | None = None,
    schedule: DiscreteSchedule | None = None,
    noise: Tensor | None = None,
) -> Corrupted:
    """Hide some tokens of a clip and put noise on those that are to carry it.

    x_t = alpha(t) x0 + sigma(t) eps; independent noise on tokens is noise on pixels      Ho et al. 2020, eq. 4

    Args:
        x0: clean normalised tokens, (B, N, P).
        mask: which are visible and which hidden.
        t: diffusion time, (B,); 0 is clean and returns x0 exactly. None without noise.
        noise: standard normal for the tokens that carry noise, (B, M, P) or (B, V, P). Given, not drawn here, so that
            it can be repeated.
    """
    visible, hidden = gather(x0, mask.visible), gather(x0, mask.hidden)
    if noise_on == "none":
        return Corrupted(visible, None, hidden, None)
    assert t is not None and schedule is not None and noise is not None
    alpha, sigma = schedule.rates(t)
    if noise_on == "hidden":
        return Corrupted(visible, add_noise(hidden, noise, alpha, sigma), hidden, noise)
    return Corrupted(add_noise(visible, noise, alpha, sigma), None, visible, noise)
