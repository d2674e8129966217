"""Looks into a step that a run skipped because its loss or gradient was no number."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from unveil.checkpoint import load_model, pick_device, read_recognition
from unveil.losses import Objective, draw
from unveil.trouble import BATCHES, BUNDLES


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Compute a step again that a run skipped because its loss or gradient was no number, and say what is to blame.

    Example: unveil replay --bundle runs/photos/skipped/step-000001234
    """

    bundle: Path
    """A folder below skipped/ in a run directory: the batch as it was read, and the weights as they were when it
    was noticed, at most a second later."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def replay(options: Replay) -> dict[str, Any]:
    """Run `unveil replay`.

    Returns:
        step; loss and its parts for the precision of the run and for fp32: {"loss", "bad_clips": indices of the clips whose
        loss alone is no number, "bad_gradients": parameters whose gradient holds one}; bad_input: indices of clips that
        hold a value that is no number or outside [0, 1]; and same_noise: whether the noise is the run's, which it is on a
        device of its kind. A loss that is no number is None.

    Raises:
        ValueError: the folder holds no skipped step of a pre-training.
    """
    parts, facts = [], {}
    try:
        for path in sorted(options.bundle.glob(BATCHES), key=lambda path: (len(path.name), path.name)):
            with safetensors.safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                parts.append([file.get_tensor(name) for name in ("clips", "labels", "indices", "places")])
        if not parts:
            raise FileNotFoundError(f"there is no {BATCHES}")
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{options.bundle} holds no skipped step ({type(error).__name__}: {error}). Give one below {BUNDLES}/ of a run."
        ) from None
    ends = list(itertools.accumulate(len(clips) for clips, *_ in parts))
    of_each = [list(range(begin, end)) for begin, end in itertools.pairwise([0, *ends])]
    clips, labels, indices, places = (torch.cat(values) for values in zip(*parts, strict=True))
    if read_recognition(options.bundle) is not None:
        raise ValueError(
            f"{options.bundle} is a step of a fine-tuning, and replay computes those of pre-training. Its clips are in "
            f"{BATCHES}, its weights beside them, as `unveil predict --run` takes them."
        )
    device = pick_device(options.device)
    model, _ = load_model(options.bundle, device)
    model.train()
    objective = Objective(model)

    def loss_of(rows: list[int], precision: str) -> Tensor:
        drawn = draw(
            model.recipe,
            model.schedule,
            facts["seed"],
            facts["epoch"],
            indices[rows].tolist(),
            places=places[rows].tolist(),
            labels=labels[rows],
            device=device,
        )
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            return objective(clips[rows].to(device), drawn)[0]

    def told(precision: str) -> dict[str, Any]:
        model.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for rows in of_each:  # process, as one device may not hold what all of them held
            part = loss_of(rows, precision) * (len(rows) / len(clips))
            part.backward()
            loss += part.detach()
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        with torch.no_grad():
            alone = [loss_of([row], precision) for row in range(len(clips))]
        return {
            "loss": loss.item() if loss.isfinite() else None,
            "bad_clips": [int(indices[row]) for row, value in enumerate(alone) if not value.isfinite()],
            "bad_gradients": bad,
        }

    noisy = any(branch.noise_on != "none" for branch in model.recipe.branches)
    outside = [not bool(((clip >= 0) & (clip <= 1)).all()) for clip in clips]
    return {
        "step": facts["step"],
        "num_clips": len(clips),
        "precision": facts["precision"],
        "as_it_was": told(facts["precision"]),
        "in_fp32": told("fp32"),
        "same_noise": not noisy or torch.device(facts["device"]).type == torch.device(device).type,
        "bad_input": [int(index) for index, is_bad in zip(indices, outside, strict=True) if is_bad],
    }
