"""From a batch of clips to a loss: draw, corrupt, predict, score each token, and only then reduce."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unveil import draws
from unveil.config import Branch, Term
from unveil.corruption import Corrupted, Part, corrupt
from unveil.hardware import onto
from unveil.masking import Mask, draw_mask, num_decoded
from unveil.model import MaskedDiffusionAutoencoder
from unveil.recipe import Recipe
from unveil.schedule import DiscreteSchedule, Schedule
from unveil.tokens import patch_norm


@dataclass(frozen=True)
class BranchDraws:
    """Everything random for the clips of one branch.

    rows: which clips of the batch, (b,). t: (b,), noise: as `corrupt` wants it, labels: (b,) with "no class" where a label
    is unknown or dropped; None where the branch has no such thing. With K draws of noise for a clip, t, noise, labels and
    mask.hidden have b * K rows, K in a row for each clip, and mask.hidden only the tokens that are decoded.
    counts: whether the clips have this branch; if not, there is one, so that the branch is computed at all.
    """

    rows: Tensor
    mask: Mask
    t: Tensor | None
    noise: Tensor | None
    labels: Tensor | None
    counts: bool = True

    def to(self, device: torch.device | str) -> "BranchDraws":
        t, noise, labels = (None if x is None else onto(device, x) for x in (self.t, self.noise, self.labels))
        mask = Mask(onto(device, self.mask.visible), onto(device, self.mask.hidden))
        return BranchDraws(onto(device, self.rows), mask, t, noise, labels, self.counts)


@dataclass(frozen=True)
class Draws:
    """Everything random in one training step: one part for each branch of the recipe, or None for a branch without clips."""

    branches: tuple[BranchDraws | None, ...]

    def to(self, device: torch.device | str) -> "Draws":
        return Draws(tuple(None if part is None else part.to(device) for part in self.branches))


def _draw_branch(
    recipe: Recipe, branch: Branch, schedule: Schedule | None, seed: int, epoch: int, rows: list[int],
    indices: Sequence[int], labels: Tensor | None, device: torch.device | str,
) -> BranchDraws:  # fmt: skip
    """Noise is drawn on the device; what is small, on the CPU."""
    clip, at = recipe.clip, torch.tensor(rows)

    def each(purpose: str, device: torch.device | str = "cpu") -> Iterator[torch.Generator]:
        return draws.generators(seed, epoch, indices, purpose, device)

    mask = draw_mask(branch.masking, each("mask"), clip.grid, branch.mask_ratio)
    if branch.noise_on == "none":
        return BranchDraws(at, mask, None, None, None)  # a clean clip is never labelled
    assert schedule is not None
    K = branch.num_draws
    if branch.decode_share < 1:
        mask = Mask(mask.visible, _some(mask.hidden, K, branch.decode_share, each("decode")))
    elif K > 1:
        mask = Mask(mask.visible, mask.hidden.repeat_interleave(K, dim=0))
    carriers = (mask.hidden if branch.noise_on == "hidden" else mask.visible).shape[1]
    if any(term.predict == "noisy" for term in branch.terms):
        carriers = clip.num_tokens
    t = torch.cat([schedule.sample_t(K, generator) for generator in each("t")])
    noise = torch.empty(len(indices) * K, carriers, clip.token_dim, device=device)
    for row, generator in zip(noise.unflatten(0, (-1, K)), each("noise", noise.device), strict=True):
        row.normal_(generator=generator)
    num_classes = recipe.condition.num_classes
    if not num_classes:
        return BranchDraws(at, mask, t, noise, None)
    assert K == 1  # classes are told to encoders that see noise alone
    if labels is None:
        return BranchDraws(at, mask, t, noise, torch.full((len(at),), num_classes))
    dropped = torch.cat([torch.rand(1, generator=generator) for generator in each("label")])
    kept = (labels[at] >= 0) & (dropped >= recipe.training.label_dropout)
    return BranchDraws(at, mask, t, noise, torch.where(kept, labels[at], num_classes))


def _some(hidden: Tensor, num_draws: int, share: float, generators: Iterable[torch.Generator]) -> Tensor:
    """A share of each clip's hidden tokens (b, M), drawn anew for each draw: (b * num_draws, m)."""
    M = hidden.shape[1]
    drawn = (torch.rand(num_draws, M, generator=generator) for generator in generators)
    chosen = torch.cat([scores.argsort(dim=1) for scores in drawn])[:, : num_decoded(M, share)]
    return hidden.repeat_interleave(num_draws, dim=0).gather(1, chosen)


def draw(
    recipe: Recipe,
    schedule: Schedule | None,
    seed: int,
    epoch: int,
    indices: Sequence[int],
    *,
    places: Sequence[int] | None = None,
    labels: Tensor | None = None,
    every_branch: bool = False,
    device: torch.device | str = "cpu",
) -> Draws:
    """Draws for the samples with these indices, on a device. Each depends on (seed, epoch, index) alone, not on the batch.

    Masks, times and dropped labels are the same on every device. Noise is drawn where it is used, as that takes a CPU longer
    than a GPU takes for the step: it is the same on every GPU of a kind, and another on a CPU.

    Args:
        places: where each sample stands in the epoch's order, which decides its branch; its index if not given.
        labels: (B,) in 0 .. num_classes - 1, or -1 where unknown; for a recipe with classes.
        every_branch: give a branch that no sample has the first one, which does not count there.
    """
    shares = [branch.share for branch in recipe.branches]
    party = [draws.deal(place, shares) for place in (indices if places is None else places)]
    parts: list[BranchDraws | None] = []
    for number, branch in enumerate(recipe.branches):
        rows = [row for row, p in enumerate(party) if p == number]
        counts = bool(rows)
        if not counts and every_branch:
            rows = [0]
        chosen = [indices[row] for row in rows]
        part = _draw_branch(recipe, branch, schedule, seed, epoch, rows, chosen, labels, device) if rows else None
        parts.append(part if part is None or counts else dataclasses.replace(part, counts=False))
    return Draws(tuple(parts)).to(device)


def _log_cdf_difference(
    x: Tensor, mean: Tensor, log_std: Tensor, bin_width: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Log-probability of a value's own bin under a normal distribution; the outermost bins reach to infinity."""
    inverse = (-log_std).exp()
    upper = torch.where(x > high - bin_width / 2, 1.0, torch.special.ndtr((x - mean + bin_width / 2) * inverse))
    lower = torch.where(x < low + bin_width / 2, 0.0, torch.special.ndtr((x - mean - bin_width / 2) * inverse))
    return (upper - lower).clamp(min=1e-12).log()


def variance_bound(
    share: Tensor, part: Part, eps: Tensor, t: Tensor, schedule: Schedule, low: Tensor, high: Tensor
) -> Tensor:
    """The variational bound's term of each token in bits per value, (B, S), through the variance alone.

    KL(q(x_s | x_t, x0) || N(mean, variance)) with s = t - 1; at t = 1 the likelihood of the clean values in bins of 1/255 of
    their range low to high. Latents have none, and that of [-1, 1] stands in, as in DiT's code.
    The share, (B, S, P) in [0, 1] between them, interpolates the log variance from the posterior's to the step's own.
    Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15 and 16: the mean is taken from eps without gradient.
    """
    assert isinstance(schedule, DiscreteSchedule) and part.x_t is not None and part.eps is not None

    def per_clip(value: Tensor) -> Tensor:
        return value[:, None, None]

    (a_t, s_t), (a_s, s_s) = schedule.rates(t), schedule.rates(t - 1)
    step = a_t / a_s
    beta = s_t**2 - step**2 * s_s**2  # variance that the step adds
    # at t = 1 the posterior's is 0, and the one of the next step stands in, as the published code has it
    (a_2, s_2), (_, s_1) = schedule.rates(2), schedule.rates(1)
    beta_2 = s_2**2 - (a_2 / schedule.rates(1)[0]) ** 2 * s_1**2
    posterior = torch.where(t == 1, beta_2 * s_1**2 / s_2**2, beta * s_s**2 / s_t**2)
    log_beta, log_posterior = per_clip(beta.log().float()), per_clip(posterior.log().float())
    log_variance = share * log_beta + (1 - share) * log_posterior
    # the two means differ through the noise alone; nothing is divided by alpha, which may be next to nothing
    apart = per_clip((beta / (s_t * step)).float()) * (eps - part.eps).detach()
    kl = 0.5 * (
        log_variance - log_posterior - 1 + (log_posterior - log_variance).exp() + apart.square() * (-log_variance).exp()
    )
    a_1 = per_clip(torch.where(t == 1, a_t, 1.0).float())  # at t = 1 the mean is the clean values that eps implies
    mean = ((part.x_t - per_clip(s_t.float()) * eps) / a_1).detach()
    low, high = torch.where(low.isinf(), -1.0, low), torch.where(high.isinf(), 1.0, high)
    likelihood = -_log_cdf_difference(part.x0, mean, 0.5 * log_variance, (high - low) / 255, low, high)
    return torch.where(per_clip(t == 1), likelihood, kl).mean(-1) / math.log(2)


class Objective(nn.Module):
    """One module whose forward is the whole training step up to the loss, so that it can be wrapped and compiled."""

    def __init__(self, model: MaskedDiffusionAutoencoder) -> None:
        super().__init__()
        self.model = model

    def score(self, term: Term, predictions: dict[str, Tensor], part: Part, t: Tensor | None) -> Tensor:
        """The loss of each token, (b, S), without the term's weight: a mean over its values."""
        model, schedule = self.model, self.model.schedule
        prediction = predictions[term.predict].float()
        if term.predict == "variance":
            assert t is not None and schedule is not None
            eps = predictions["eps"].float().detach()
            return variance_bound((prediction + 1) / 2, part, eps, t, schedule, model.low, model.high)
        target = {"x0": part.x0, "eps": part.eps, "noisy": part.x_t}[term.predict]
        assert target is not None
        loss = (prediction - (patch_norm(target) if term.patch_norm else target)).square().mean(-1)
        if term.space == "v":
            assert t is not None and schedule is not None
            loss = loss / schedule.rates(t)[1].float().clamp(min=0.05).square()[:, None]
        return loss

    def forward(self, clip: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Score a batch of clips, (B, C, T, H, W), in [0, 1] unless they are unbounded.

        Every clip counts the same, so that a branch counts by its share of them: the loss is the mean over clips of the
        weighted sum of the terms of the clip's own branch, each a mean over the scored tokens.

        Returns:
            loss: a scalar.
            per_token: the loss of each scored token of each term without its weight, (b, S), detached, by a name such as
                "none/x0/hidden": who carries noise, what is predicted, and where.
        """
        model = self.model
        loss = clip.new_zeros(())
        logs = {}
        for branch, part in zip(model.recipe.branches, draws.branches, strict=True):
            if part is None:
                continue
            # all rows of the batch in order need no copy
            mine = clip if len(part.rows) == len(clip) else clip[part.rows]
            c: Corrupted = corrupt(model.tokens(mine), part.mask, branch.noise_on, part.t, model.schedule, part.noise)
            places = tuple(dict.fromkeys(term.on for term in branch.terms))
            predictions = model(c.x_enc, part.mask, c.x_dec, part.t, part.labels, on=places)
            for term in branch.terms:
                scored = c.visible if term.on == "visible" else c.hidden
                per_token = self.score(term, predictions[term.on], scored, part.t)
                loss = loss + term.weight * per_token.mean() * (part.counts * len(part.rows) / len(clip))
                logs[f"{branch.noise_on}/{term.predict}/{term.on}"] = per_token.detach()
        return loss, logs
