"""Features of a source's samples, for probes."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from unveil.config import check_choice
from unveil.data import Batch
from unveil.model import MaskedDiffusionAutoencoder

Pool = Literal["mean", "class"]


def encoder_features(model: MaskedDiffusionAutoencoder, pool: Pool) -> Callable[[Tensor], Tensor]:
    """The function from clips (B, C, T, H, W) to features (B, D): mean of the patch tokens, or the class token.

    Whole, clean clips through the encoder and its final LayerNorm; nothing is masked and nothing drawn.
    """
    check_choice("features", "pool", pool, Pool)

    @torch.inference_mode()
    def features(clips: Tensor) -> Tensor:
        encoded = model.encode(clips)
        return encoded[:, 1:].mean(1) if pool == "mean" else encoded[:, 0]

    return features


def raw_pixels(clips: Tensor) -> Tensor:
    """Every value of a clip as its features, (B, C * T * H * W): the baseline of a probe."""
    return clips.flatten(1)


def extract(
    loader: Iterable[Batch],
    *functions: Callable[[Tensor], Tensor],
    device: str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Read a source once and compute several kinds of features; on_batch is told how many samples come next.

    Returns:
        One (n, D) on the CPU for each function, and labels (n,). Unreadable samples are left out of all of them.

    Raises:
        ValueError: no sample could be read.
    """
    features: list[list[Tensor]] = [[] for _ in functions]
    labels = []
    for batch in loader:
        if batch.clips is None:
            continue
        if on_batch is not None:
            on_batch(len(batch.clips))
        clips = batch.clips.to(device)
        labels.append(batch.labels)
        for kept, function in zip(features, functions, strict=True):
            kept.append(function(clips).float().cpu())
    if not labels:
        raise ValueError("No sample of the data can be read, so there is nothing to compute features of.")
    return [torch.cat(kept) for kept in features], torch.cat(labels)
