"""Repainting and generating: clips and a mask in, or classes, and clips out; for the command line and every evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unveil import draws
from unveil.config import Predict, check_choice
from unveil.holes import filled_smoothly, hardly_touched
from unveil.masking import Mask, gather, group_rows, scatter, tokens_touched
from unveil.model import AnyModel, Guidance, MaskedDiffusionAutoencoder
from unveil.sampling import Denoise, OnStep, by_scheduler, ddim, ddpm, dpmpp_2m
from unveil.tokens import patchify

Sampler = Literal["ddpm", "ddim", "dpmpp"]
NUM_RESAMPLES = 10  # RePaint's (arXiv 2201.09865), for models that can be told of known pixels by replacement only
SMOOTH_SHARE = (
    0.5  # of a patch; painting those of which so little is missing was worse than smooth filling (results/LOG.md)
)
ROWS_AT_ONCE = 64  # samples of the same clips go through the decoder together, but a large batch is no faster for it


class RowNoise:
    """Standard normal noise of (B * S, ...), S samples of one clip after another, in which sample s of clip i depends on
    (seed, indices[i], s) alone, not on the batch."""

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        self.seed, self._indices = seed, indices
        self.begin([0])

    def begin(self, samples: Sequence[int]) -> None:
        """Start the streams of other samples."""
        self._generators = [draws.generator(self.seed, i, s, "sample") for i in self._indices for s in samples]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in self._generators]).to(x)


@dataclass(frozen=True)
class Step:
    """Where a sampler of `repaint` is, for who watches it.

    t: the time. rows, samples: which of the clips, and which of their num_samples, (b,). tokens: what it now takes their hidden
    tokens for, (b, M, P). clips: makes of that (b, C, T, H, W), the clips with their holes so filled.
    """

    t: float
    rows: Tensor
    samples: Tensor
    tokens: Tensor
    clips: Callable[[], Tensor]


def default_sampler(model: AnyModel) -> Sampler:
    """What 20 steps are enough for; but a model that is told of known pixels by replacement needs `repaint`'s resampling."""
    return "ddpm" if model.recipe.noise_on == "visible" else "dpmpp"


def _check_whole(model: AnyModel) -> None:
    if model.parts:
        raise ValueError(
            f"This {model.recipe.name} is an encoder only, so it predicts nothing: it cannot paint or generate. Use it for "
            "probe or embed, or start a pre-training from it."
        )


def check_can_paint(model: MaskedDiffusionAutoencoder) -> None:
    """Refuse a model that cannot."""
    _check_whole(model)
    if not model.can & {"repaint", "generate"}:
        raise ValueError(
            f"This {model.recipe.name} predicts patch-normalised values, whose brightness and contrast are unknown, so it "
            "cannot paint. Pre-train mae_raw or diffmae to repaint."
        )


def _check(model: MaskedDiffusionAutoencoder, clips: Tensor, holes: Tensor) -> None:
    """Refuse a model that cannot paint, and a mask that does not fit."""
    check_can_paint(model)
    if holes.shape != (len(clips), *clips.shape[2:]) or holes.dtype != torch.bool:
        raise ValueError(
            f"The mask is {tuple(holes.shape)} of {holes.dtype} for clips of {tuple(clips.shape)}; give "
            f"{(len(clips), *clips.shape[2:])} of torch.bool, True where the picture is to be repainted."
        )


def _check_hidden(model: MaskedDiffusionAutoencoder, hidden: Tensor) -> None:
    """Refuse hidden tokens (B, N) that the model was not trained for."""
    name, branch = model.recipe.name, model.recipe.branches[0]
    whole, untouched = hidden.all(1), ~hidden.any(1)
    if whole.any() and "generate" not in model.can:
        raise ValueError(
            f"The mask hides everything, but this {name} was trained with {branch.mask_ratio:.0%} hidden and needs some of "
            "the picture to go by. Leave some of it visible."
        )
    if "repaint" not in model.can and not (whole | untouched).all():
        raise ValueError(
            f"This {name} was trained with mask_ratio={branch.mask_ratio:g}: it makes whole pictures and cannot go by a "
            "visible part. Hide everything, or use a model whose mask ratio lies between 0 and 1."
        )


def _holes_in_tokens(model: MaskedDiffusionAutoencoder, clips: Tensor, holes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with nothing under the holes (B, N, P), the holes' values (B, N, P), and the tokens that any of them touches
    (B, N)."""
    sizes = model.recipe.clip
    hole_values = patchify(holes[:, None].expand(-1, sizes.channels, -1, -1, -1), sizes.patch_size, sizes.tubelet_size)
    # what is under a hole must not matter, not even through a hidden token's own values
    x0 = model.tokens(clips).masked_fill(hole_values, 0.0)
    hidden = tokens_touched(holes, sizes.patch_size, sizes.tubelet_size)
    _check_hidden(model, hidden)
    return x0, hole_values, hidden


def _sample(
    denoise: Denoise,
    start: Tensor,
    model: MaskedDiffusionAutoencoder,
    sampler: Any,
    times: Sequence[float],
    noise: "RowNoise",
    eta: float = 0.0,
    num_resamples: int = 1,
    jump_length: int = 1,
    on_step: Callable[[float, Tensor, Tensor], None] | None = None,
) -> Tensor:
    schedule = model.schedule
    assert schedule is not None
    if sampler == "ddpm":
        again = {"num_resamples": num_resamples, "jump_length": jump_length}
        return ddpm(denoise, start, schedule, times, noise, on_step, **again)
    if sampler == "ddim":
        return ddim(denoise, start, schedule, times, on_step, eta=eta, noise=noise)
    if sampler == "dpmpp":
        return dpmpp_2m(denoise, start, schedule, times, on_step)
    # it draws for the whole batch at once, so its noise depends on the batch
    generator = draws.generator(noise.seed, "scheduler")
    return by_scheduler(denoise, start, schedule, sampler, len(times) - 1, generator, on_step)


def _check_sampler(owner: str, sampler: Any) -> None:
    """One of ours by name, or an object with diffusers' scheduler interface."""
    if not (hasattr(sampler, "set_timesteps") and hasattr(sampler, "step")):
        check_choice(owner, "sampler", sampler, Sampler)


def _watch(
    on_step: Callable[[Step], None] | None, rows: Tensor, samples: Tensor, filled: Callable[[Tensor], Tensor]
) -> OnStep | None:
    """What a sampler tells, told as a `Step`."""
    if on_step is None:
        return None
    return lambda t, x_t, x0: on_step(Step(t, rows, samples, x0, lambda: filled(x0)))


def _smoothed(model: MaskedDiffusionAutoencoder, clips: Tensor, holes: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The clips with that part of their holes filled which is not worth hiding its tokens, and the rest of the holes."""
    if not 0 <= share <= 1:
        raise ValueError(f"smooth_share={share:g}; give a share of a patch, from 0 to 1.")
    if "repaint" not in model.can:  # which the rest of a hole must be told, too
        return clips, holes
    part = hardly_touched(holes, model.recipe.clip, share)
    return (filled_smoothly(clips, holes, part), holes & ~part) if part.any() else (clips, holes)


@torch.inference_mode()
def repaint(
    model: MaskedDiffusionAutoencoder,
    clips: Tensor,
    holes: Tensor,
    *,
    num_steps: int,
    sampler: Sampler = "ddpm",
    num_samples: int = 1,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    smooth_share: float = SMOOTH_SHARE,
    reimpose_known: bool = True,
    num_resamples: int = NUM_RESAMPLES,
    jump_length: int = 1,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Fill the holes of clips by conditional diffusion.

    DiffMAE's encoder sees the visible tokens and runs once for each clip. A model whose encoder sees the noise (DiT, UMD) is
    told of all known pixels by replacement at every step, which is biased; so with "ddpm" each of its steps is done ten times
    over, as RePaint does. A model without noise (MAE) has one prediction only, whatever the steps.

    Args:
        clips: (B, C, T, H, W), in [0, 1] unless they are unbounded. What lies under a hole is never read.
        holes: (B, T, H, W) bool, True = repaint. A token is hidden if any of its pixels is.
        num_samples: different answers for each hole.
        seed, indices: noise of clip i and sample s depends on (seed, indices[i], s) alone; indices are 0, 1, ... if not given.
        smooth_share: tokens of which a hole takes at most this share are not painted but seen, their part of it filled smoothly
            from the pixels around (`unveil.holes.hardly_touched`); 0 paints every token that a hole touches, if others are left
            to go by. Not for DiT and UMD, which go by pixels.
        reimpose_known: tell the sampler the known pixels inside hidden tokens at every step.
        num_resamples, jump_length: of RePaint, as in `ddpm`, for models whose encoder sees the noise.
        on_step: told each step; clips with other numbers of hidden tokens take theirs one after another, and samples that are
            too many to be painted together.

    Returns:
        (B, num_samples, C, T, H, W); pixels outside the holes equal the input bit for bit.

    Raises:
        ValueError: the mask does not fit the clips, or asks for what the model was not trained to do.
    """
    check_choice("repaint", "sampler", sampler, Sampler)
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; ask for at least 1.")
    _check(model, clips, holes)
    if model.schedule is None:
        return predict(model, clips, holes, smooth_share=smooth_share)[:, None].repeat(1, num_samples, 1, 1, 1, 1)
    told = model.recipe.noise_on == "visible"  # of every known pixel, so that none need be hidden with a hole
    if not told:
        clips, holes = _smoothed(model, clips, holes, smooth_share)
    x0, hole_values, hidden = _holes_in_tokens(model, clips, holes)
    if told:  # it has noise everywhere, and known is whatever is no hole
        hidden = hidden.any(1, keepdim=True).expand_as(hidden)
    times = model.schedule.times(num_steps)
    result = clips[:, None].repeat(1, num_samples, 1, 1, 1, 1)
    # those with known values in hidden tokens draw more noise, so they go apart: a clip must not depend on its company
    partly = (hidden[..., None] & ~hole_values).flatten(1).any(1).cpu()
    kinds = (partly.nonzero().flatten(), (~partly).nonzero().flatten())
    groups = [(kind[rows], mask) for kind in kinds for rows, mask in group_rows(hidden.cpu()[kind])]
    for rows, mask in groups:
        if mask.hidden.shape[1] == 0:
            continue
        rows, mask = rows.to(clips.device), mask.to(clips.device)
        known = ~gather(hole_values[rows], mask.hidden)
        known = known if known.any() and (reimpose_known or told) else None
        noise = RowNoise(seed, [i if indices is None else indices[i] for i in rows.tolist()])
        denoise = model.denoiser(x0[rows], mask, known, noise)
        again = num_resamples if told and known is not None else 1
        start = gather(x0[rows], mask.hidden)
        for samples in torch.arange(num_samples).split(max(1, ROWS_AT_ONCE // len(rows))):
            which = rows.repeat_interleave(len(samples))
            noise.begin(samples.tolist())

            def filled(tokens: Tensor, which: Tensor = which, mask: Mask = mask, times: int = len(samples)) -> Tensor:
                hidden = mask.hidden.repeat_interleave(times, 0)
                pixels = model.clips(scatter(x0[which], hidden, tokens))
                return torch.where(holes[which][:, None], pixels, clips[which])

            painted = _sample(
                denoise,
                noise(start.repeat_interleave(len(samples), 0)),
                model,
                sampler,
                times,
                noise,
                num_resamples=again,
                jump_length=jump_length,
                on_step=_watch(on_step, which, samples.repeat(len(rows)), filled),
            )
            result[rows[:, None], samples.to(rows)] = filled(painted).unflatten(0, (len(rows), len(samples)))
    return result


@torch.inference_mode()
def predict(
    model: MaskedDiffusionAutoencoder,
    clips: Tensor,
    holes: Tensor,
    *,
    smooth_share: float = SMOOTH_SHARE,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """The single prediction from the visible tokens, (B, C, T, H, W): a mean, so blurry, and the best in decibels.

    Of a model with a clean branch it is that branch's, if anything is visible; otherwise the prediction at the last time,
    from noise alone, to which seed and indices belong as in `repaint`, as does smooth_share.
    """
    once: Any = {"num_steps": 1, "sampler": "ddim", "seed": seed}
    if not model.recipe.reconstructs:
        return repaint(model, clips, holes, smooth_share=smooth_share, indices=indices, **once)[:, 0]
    _check(model, clips, holes)
    clips, holes = _smoothed(model, clips, holes, smooth_share)
    x0, _, hidden = _holes_in_tokens(model, clips, holes)
    result = clips.clone()
    for rows, mask in group_rows(hidden.cpu()):
        if mask.hidden.shape[1] == 0:
            continue
        if mask.visible.shape[1] == 0:  # which the clean branch never saw
            mine = [i if indices is None else indices[i] for i in rows.tolist()]
            rows = rows.to(clips.device)
            result[rows] = repaint(model, clips[rows], holes[rows], indices=mine, **once)[:, 0]
            continue
        rows, mask = rows.to(clips.device), mask.to(clips.device)
        painted = model.reconstruct(x0[rows], mask)
        pixels = model.clips(scatter(x0[rows], mask.hidden, painted))
        result[rows] = torch.where(holes[rows][:, None], pixels, clips[rows])
    return result


def check_can_generate(model: MaskedDiffusionAutoencoder, labels: Tensor | None, guided: bool) -> None:
    """Refuse what the model was not trained for.

    Args:
        labels: classes (B,), num_classes for "no class", or None.
        guided: whether a guidance other than 1 is asked for.
    """
    recipe, num_classes = model.recipe, model.recipe.condition.num_classes
    _check_whole(model)
    if "generate" not in model.can:
        told = recipe.condition.time in ("token", "adaln")  # then only noise is missing
        raise ValueError(
            f"This {recipe.name} {recipe.size} cannot generate: it always saw a part of the clip. It can "
            f"{' and '.join(sorted(model.can))}. "
            + (
                "Teach it by `unveil finetune-generator`."
                if told
                else "Train umd, dit, maskdit or umd_flow to generate."
            )
        )
    if labels is not None and not num_classes:
        raise ValueError(
            f"This {recipe.name} {recipe.size} was trained without classes, so it cannot be asked for one. "
            "Ask for pictures of no class, or give it classes by `unveil finetune-generator`."
        )
    if labels is not None and (labels.dtype != torch.int64 or labels.ndim != 1):
        raise ValueError(
            f"The labels are {tuple(labels.shape)} of {labels.dtype}; give one class for each clip, as int64 of shape (B,)."
        )
    if labels is not None and not bool(((labels >= 0) & (labels <= num_classes)).all()):
        raise ValueError(
            f"A class of {labels.min()} to {labels.max()} was asked for, but this model's are 0 to {num_classes - 1}."
        )
    if guided and (labels is None or not num_classes):
        raise ValueError(
            f"Guidance leads towards a class, but {'none was asked for' if num_classes else 'this model has none'}. "
            "Use guidance 1, or " + ("ask for a class." if num_classes else "a model with classes.")
        )
    if guided and recipe.training.label_dropout == 0:
        raise ValueError(
            f'This {recipe.name} {recipe.size} was trained with label_dropout=0, so it never learned "no class", from which '
            "guidance leads away. Use guidance 1, or fine-tune it with --label-dropout 0.1."
        )


@torch.inference_mode()
def generate(
    model: MaskedDiffusionAutoencoder,
    indices: Sequence[int],
    labels: Tensor | None = None,
    *,
    num_steps: int,
    sampler: Any = "ddim",
    eta: float = 0.0,
    guidance: Guidance | None = None,
    predict: Predict | None = None,
    times: Sequence[float] | None = None,
    seed: int = 0,
    on_step: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """Make whole clips from noise.

    Args:
        indices: the clips' numbers; the noise of clip i depends on (seed, i) alone, whatever the batch.
        labels: classes (B,), num_classes for "no class"; None for a model without classes, or for no class.
        sampler: "ddpm", "ddim" (with eta, 0 deterministic, 1 as DDPM) or "dpmpp"; or a scheduler with diffusers' interface,
            which visits its own num_steps times and, if it draws noise, draws it for the whole batch.
        guidance: scale at a time, from `unveil.sampling.guidance`; None for none.
        predict: by which of the model's predictions, as `model.denoiser` explains.
        times: which times to visit, in place of num_steps even ones.
        on_step: called with (t, predicted tokens) at each step.

    Returns:
        (B, C, T, H, W), in [0, 1] unless the model's clips are unbounded.

    Raises:
        ValueError: the model cannot generate, has no such class, or cannot be guided.
    """
    _check_sampler("generate", sampler)
    check_can_generate(model, labels, guidance is not None)
    assert model.schedule is not None
    if not indices:
        raise ValueError("No clip was asked for. Give at least one index.")
    if labels is not None and len(labels) != len(indices):
        raise ValueError(f"{len(labels)} labels for {len(indices)} clips. Give one class for each clip.")
    if times is None:
        times = model.schedule.times(num_steps)
    elif not isinstance(sampler, str):
        raise ValueError("times were given with a scheduler, which visits its own. Give num_steps only.")
    clip, device = model.recipe.clip, model.mean.device
    x0 = torch.zeros(len(indices), clip.num_tokens, clip.token_dim, device=device)
    everything = torch.arange(clip.num_tokens, device=device).expand(len(indices), -1)
    mask = Mask(everything[:, :0], everything)
    noise = RowNoise(seed, indices)
    labels = None if labels is None else labels.to(device)
    denoise = model.denoiser(x0, mask, labels=labels, guidance=guidance, predict=predict)
    step = None if on_step is None else lambda t, x_t, x0: on_step(t, x0)
    made = _sample(denoise, noise(x0), model, sampler, times, noise, eta=eta, on_step=step)
    return model.clips(made)
