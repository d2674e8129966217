"""What the encoder and the decoder get to see, and every target that could be asked for."""

from dataclasses import dataclass

from torch import Tensor

from unveil.config import NoiseOn
from unveil.masking import Mask, gather
from unveil.schedule import Schedule, add_noise


@dataclass(frozen=True)
class Part:
    """The visible or the hidden tokens of a batch, (B, S, P) each.

    x0: clean values. eps: their noise, and x_t: their noisy values; None without noise.
    """

    x0: Tensor
    eps: Tensor | None
    x_t: Tensor | None


@dataclass(frozen=True)
class Corrupted:
    """One corrupted batch of tokens.

    x_enc: what the encoder sees, (B, V, P).
    x_dec: noisy hidden tokens for the decoder, (B, M, P); None where mask tokens stand in.
    visible, hidden: what could be asked for.
    """

    x_enc: Tensor
    x_dec: Tensor | None
    visible: Part
    hidden: Part


def corrupt(
    x0: Tensor,
    mask: Mask,
    noise_on: NoiseOn,
    t: Tensor | None = None,
    schedule: Schedule | None = None,
    noise: Tensor | None = None,
) -> Corrupted:
    """Hide some tokens of a clip and put noise on those that are to carry it.

    x_t = alpha(t) x0 + sigma(t) eps; independent noise on tokens is noise on pixels      Ho et al. 2020, eq. 4

    Args:
        x0: clean normalised tokens, (B, N, P).
        mask: which are visible and which hidden.
        t: diffusion time, (B,); 0 is clean and returns x0 exactly. None without noise.
        noise: standard normal for the tokens that carry noise, (B, M, P) or (B, V, P); or for all, (B, V + M, P), visible
            ones first, where noisy values of hidden tokens are asked for. Given, not drawn here, so that it can be
            repeated.
    """
    visible, hidden = gather(x0, mask.visible), gather(x0, mask.hidden)
    if noise_on == "none":
        return Corrupted(visible, None, Part(visible, None, None), Part(hidden, None, None))
    assert t is not None and schedule is not None and noise is not None
    rates = schedule.rates(t)
    if noise_on == "hidden":
        part = Part(hidden, noise, add_noise(hidden, noise, *rates))
        return Corrupted(visible, part.x_t, Part(visible, None, None), part)
    V = visible.shape[1]
    x_t = add_noise(visible, noise[:, :V], *rates)
    unseen = Part(hidden, None, None)
    if noise.shape[1] > V:
        unseen = Part(hidden, noise[:, V:], add_noise(hidden, noise[:, V:], *rates))
    return Corrupted(x_t, None, Part(visible, noise[:, :V], x_t), unseen)
