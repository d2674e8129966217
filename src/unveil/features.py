"""Features of a source's samples, for probes and for files."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from unveil import draws
from unveil.config import check_choice
from unveil.data import Batch
from unveil.model import AnyModel, MaskedDiffusionAutoencoder
from unveil.recipe import Recipe
from unveil.schedule import DiscreteSchedule

Pool = Literal["mean", "class"]
Kept = Literal["mean", "class", "patches"]  # patches: every token, none pooled
Features = Callable[[Tensor, Tensor], Tensor]


def usual_pool(recipe: Recipe) -> Pool:
    """What the recipe trains as its summary: the class tokens where their mean feeds the decoder (UMD), else the patches."""
    return "class" if recipe.decoder is not None and recipe.decoder.summary == "mean" else "mean"


def encoder_features(model: AnyModel, pool: Kept | None = None, time: float = 0.0, seed: int = 0) -> Features:
    """The function from clips (B, C, T, H, W) and their indices (B,) to features (B, D), or (B, N, D) of all patches.

    Whole clips through the encoder and its final norm; nothing is masked.

    Args:
        pool: mean of the patch tokens, or of the class tokens, or patches, all patch tokens; `usual_pool` if not given.
        time: 0, clean. Above, noise of that time is put on; the noise of clip i depends on (seed, i) alone.

    Raises:
        ValueError: the encoder has no class tokens, or never saw noise, or the schedule has no such time.
    """
    recipe = model.recipe
    pool = pool or usual_pool(recipe)
    check_choice("features", "pool", pool, Kept)
    num_class_tokens = recipe.encoder.num_class_tokens
    if pool == "class" and not num_class_tokens:
        raise ValueError(f"This {recipe.name} has no class token. Use --pool mean.")
    schedule = model.schedule if recipe.noise_on == "visible" else None
    whole = isinstance(schedule, DiscreteSchedule)
    if time and (schedule is None or not 0 < time <= schedule.end or (whole and time != int(time))):
        known = "clean clips only"
        if schedule is not None:
            known = f"{'whole ' if whole else ''}times from 0 to {schedule.end:g}"
        raise ValueError(
            f"Features at time {time:g} were asked for, but the encoder of this {recipe.name} sees {known}. Use another time."
        )

    @torch.inference_mode()
    def features(clips: Tensor, indices: Tensor) -> Tensor:
        t = noise = None
        if time:
            t = torch.full((len(clips),), int(time) if whole else time)
            shape = (recipe.clip.num_tokens, recipe.clip.token_dim)
            generators = [draws.generator(seed, i, "features") for i in indices.tolist()]
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(clips)
            t = t.to(clips.device)
        encoded = model.encode(clips, t, noise)
        if pool == "patches":
            return encoded[:, num_class_tokens:]
        return (encoded[:, num_class_tokens:] if pool == "mean" else encoded[:, :num_class_tokens]).mean(1)

    return features


def untrained(recipe: Recipe, seed: int, device: torch.device | str = "cpu") -> MaskedDiffusionAutoencoder:
    """The model as it is before training, drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedDiffusionAutoencoder(recipe).to(device).eval()


def raw_pixels(clips: Tensor, indices: Tensor) -> Tensor:
    """Every value of a clip as its features, (B, C * T * H * W): the baseline of a probe."""
    return clips.flatten(1)


def extract(
    loader: Iterable[Batch],
    *functions: Features,
    device: str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Read a source once and compute several kinds of features; on_batch is told how many samples come next.

    Returns:
        One (n, D), or (n, N, D), on the CPU for each function, labels (n,) and the samples' indices (n,). Unreadable
        samples are left out of all of them.

    Raises:
        ValueError: no sample could be read.
    """
    features: list[list[Tensor]] = [[] for _ in functions]
    labels, indices = [], []
    for batch in loader:
        if batch.values is None:
            continue
        if on_batch is not None:
            on_batch(len(batch.indices))
        clips = batch.clips(device)
        labels.append(batch.labels)
        indices.append(batch.indices)
        for kept, function in zip(features, functions, strict=True):
            kept.append(function(clips, batch.indices).float().cpu())
    if not labels:
        raise ValueError("No sample of the data can be read, so there is nothing to compute features of.")
    return [torch.cat(kept) for kept in features], torch.cat(labels), torch.cat(indices)
