"""How good repainting is on held-out data: decibels in the hole, diversity and sharpness."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unveil.checkpoint import FromRun, load_model, pick_device
from unveil.data import Samples, batches, source_for
from unveil.holes import named_holes
from unveil.metrics import hole_mse, laplacian_energy, psnr
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import Sampler, predict, repaint


@dataclass(frozen=True, kw_only=True)
class Evaluate(FromRun):
    """Score repainting on held-out pictures, inside the hole: the one-step prediction, several samples, their mean.

    Example: unveil evaluate --run runs/digits/diffmae --data digits:test --mask random:0.75
    """

    data: str
    """Held-out pictures, as for pretrain."""
    mask: str = "random:0.75"
    """random:SHARE of the tokens, center:SHARE of the area, or tube:SHARE of the places in every frame."""
    limit: int = 256
    """How many pictures, from the first on."""
    num_samples: int = 8
    """Samples for each hole."""
    num_steps: int = 50
    """Sampling steps."""
    sampler: Sampler = "ddpm"
    """ddpm, ancestral; ddim, deterministic from its first noise; or dpmpp, the same of second order."""
    seed: int = 0
    """Draws masks and noise."""
    batch_size: int = 64
    """Pictures at once; no effect on the result."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def score(
    model: MaskedDiffusionAutoencoder,
    clips: Tensor,
    holes: Tensor,
    *,
    num_samples: int,
    num_steps: int,
    sampler: Sampler,
    seed: int,
    indices: Sequence[int] | None = None,
    reimpose_known: bool = True,
) -> dict[str, Tensor]:
    """Per-picture figures of one batch, (B,) each; MSE in the hole, values in [0, 1].

    mean_fill: the hole filled with the visible pixels' mean colour. prediction: the single one at t = T.
    sample: mean over samples of their MSE. sample_mean: MSE of the samples' mean. std: deviation between samples.
    sharpness: the samples' Laplacian energy over the truth's, both summed by the caller.
    """
    inside = holes[:, None].expand_as(clips)
    prediction = predict(model, clips, holes, seed=seed, indices=indices)
    figures = {
        "prediction": hole_mse(prediction, clips, holes),
        "laplacian_truth": laplacian_energy(clips, holes),
    }
    if not holes.flatten(1).all(1).any():  # otherwise there is no visible colour to fill with
        visible_mean = clips.masked_fill(inside, 0).sum((2, 3, 4)) / (~inside).sum((2, 3, 4))
        figures["mean_fill"] = hole_mse(visible_mean[:, :, None, None, None].expand_as(clips), clips, holes)
    if model.schedule is not None:
        samples = repaint(
            model,
            clips,
            holes,
            num_steps=num_steps,
            sampler=sampler,
            num_samples=num_samples,
            seed=seed,
            indices=indices,
            reimpose_known=reimpose_known,
        )
        each = torch.stack([hole_mse(samples[:, s], clips, holes) for s in range(num_samples)])
        figures["each_sample"] = each.T
        figures["sample"] = each.mean(0)
        figures["best_sample"] = each.amin(0)
        figures["sample_mean"] = hole_mse(samples.mean(1), clips, holes)
        figures["laplacian_samples"] = torch.stack(
            [laplacian_energy(samples[:, s], holes) for s in range(num_samples)]
        ).mean(0)
        deviation = samples.std(1, unbiased=True) if num_samples > 1 else torch.zeros_like(clips)
        figures["std"] = (deviation * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
    return {name: value.double().cpu() for name, value in figures.items()}


def evaluate(options: Evaluate, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil evaluate`; on_progress is told the pictures done and their number.

    Returns:
        "psnr": for each kind of filling, mean over pictures of the PSNR inside the hole, in dB; "std", the deviation
        between samples in units of the range; "sharpness", Laplacian energy of the samples over the truth's; and
        "psnr_of_each_sample", the mean PSNR of first samples, second ones, and so on; "mean_beats_all", the share of
        pictures whose samples' mean has a smaller error than every one of the samples.
    """
    if options.limit < 1:
        raise ValueError(f"--limit {options.limit}: ask for at least one picture.")
    device = pick_device(options.device)
    model, about = load_model(options.run, device)
    clip = model.recipe.clip
    source = source_for(options.data, clip)
    samples = Samples(source, clip, seed=0, training=None)
    loader = batches(samples, options.batch_size, 0, 0, shuffle=False, drop_last=False, num_workers=0)
    parts: list[dict[str, Tensor]] = []
    done = 0
    for batch in loader:
        if batch.values is None:
            continue
        take = min(len(batch.indices), options.limit - done)
        indices = batch.indices[:take].tolist()
        holes = named_holes(clip, options.mask, indices, options.seed).to(device)
        if not holes.any():
            raise ValueError(f"--mask {options.mask} hides nothing, so there is nothing to score. Use a larger share.")
        parts.append(
            score(
                model,
                batch.clips(device)[:take],
                holes,
                num_samples=options.num_samples,
                num_steps=options.num_steps,
                sampler=options.sampler,
                seed=options.seed,
                indices=indices,
            )
        )
        done += take
        if on_progress is not None:
            on_progress(done, min(options.limit, len(samples)))
        if done >= options.limit:
            break
    if not done:
        raise ValueError(f"No picture of {options.data} can be read, so there is nothing to score.")
    figures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    result: dict[str, Any] = {"pictures": done, "mask": options.mask, "num_samples": options.num_samples}
    errors = [name for name in figures if name not in ("std", "laplacian_truth", "laplacian_samples", "each_sample")]
    result["psnr"] = {name: psnr(figures[name]).mean().item() for name in errors}
    result["notices"] = []
    if about.data == options.data:
        result["notices"].append(f"{options.data} is what this model was trained on; held-out pictures would say more.")
    if result["psnr"]["prediction"] < result["psnr"].get("mean_fill", -100):
        result["notices"].append("The prediction is worse than a flat colour: the model has learned too little yet.")
    if "std" in figures:
        result["std"] = figures["std"].mean().item()
        result["sharpness"] = (figures["laplacian_samples"].sum() / figures["laplacian_truth"].sum()).item()
        result["psnr_of_each_sample"] = psnr(figures["each_sample"]).mean(0).tolist()
        result["mean_beats_all"] = (figures["sample_mean"] < figures["best_sample"]).double().mean().item()
        result["num_steps"], result["sampler"] = options.num_steps, options.sampler
    return result
