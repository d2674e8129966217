"""The contact sheet of a model: one picture for all that it can do."""

from typing import Any

import torch
from torch import Tensor

from unveil.holes import masked_view, pixels_of
from unveil.masking import draw_mask, gather, scatter
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import generate, predict, repaint
from unveil.report import contact_sheet
from unveil.tokens import patch_statistics

SHEET_STEPS = 20


def what_it_sees(model: MaskedDiffusionAutoencoder, clips: Tensor, seed: int = 0) -> Any:
    """The contact sheet of a model: the truth, what is left of it, what it makes of the rest and of nothing."""
    recipe, sizes = model.recipe, model.recipe.clip
    rows = [("truth", list(clips))]
    noisy = recipe.branch_on("hidden")
    branch = recipe.branch_on("none") or (noisy if noisy and noisy.mask_ratio < 1 else None)
    if branch is not None:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(clips))]
        mask = draw_mask(branch.masking, generators, sizes.grid, branch.mask_ratio).to(clips.device)
        holes = pixels_of(mask.flags(), sizes.grid, sizes.patch_size, sizes.tubelet_size)
        rows.append((f"what the encoder sees ({branch.mask_ratio:.0%} hidden)", list(masked_view(clips, holes))))
        if "repaint" not in model.can:
            with torch.inference_mode():
                x0 = model.tokens(clips)
                prediction = model(gather(x0, mask.visible), mask)["hidden"]["x0"].float()
                mean, std = patch_statistics(gather(x0, mask.hidden))
                painted = model.pixels(scatter(x0, mask.hidden, prediction * std + mean))
            rows.append(
                ("prediction, with each patch's true brightness and contrast (target is normalised)", list(painted))
            )
        elif recipe.reconstructs:
            rows.append(("prediction", list(predict(model, clips, holes))))
        else:
            rows.append(
                (
                    f"prediction at t = {model.schedule.end if model.schedule else 0} (one step)",
                    list(predict(model, clips, holes)),
                )
            )
            samples = repaint(model, clips, holes, num_steps=SHEET_STEPS, seed=seed, num_samples=2)
            for i in range(2):
                rows.append((f"sample {i + 1}, {SHEET_STEPS} DDPM steps", list(samples[:, i])))
    if "generate" in model.can:
        labels, of = None, "nothing"
        if recipe.condition.num_classes:
            labels = torch.arange(len(clips)) % recipe.condition.num_classes
            of = f"classes {', '.join(str(label) for label in labels.tolist())}"
        made = generate(model, range(len(clips)), labels, num_steps=SHEET_STEPS, seed=seed)
        rows.append((f"generated from {of}, {SHEET_STEPS} DDIM steps", list(made)))
    return contact_sheet(rows)
