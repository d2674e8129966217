"""Pre-training as a job for the training loop."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unveil.checkpoint import About, save_weights
from unveil.data import Batch, Samples
from unveil.losses import Draws, Objective, draw
from unveil.masking import draw_mask
from unveil.model import MaskedDiffusionAutoencoder
from unveil.online_knn import NearestNeighbours
from unveil.optim import lr_factor, optimizer_for
from unveil.recipe import Recipe
from unveil.rundir import Run
from unveil.sheet import what_it_sees


class PretrainingJob:
    """The job of a recipe: its branches and their losses; see `unveil.trainer.Job`.

    Args:
        initial: tensors to start from in place of the drawn ones, by name; not all need be given.
    """

    def __init__(self, recipe: Recipe, samples: Samples, run: Run, initial: Mapping[str, Tensor] | None = None) -> None:
        self.recipe, self.run, self.training = recipe, run, recipe.training
        self._check_branches(min(recipe.training.batch_size, len(samples)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = MaskedDiffusionAutoencoder(recipe)
        if initial is not None:
            self.model.load_state_dict({**self.model.state_dict(), **initial})
        self.objective = Objective(self.model)
        self.neighbours = NearestNeighbours(samples, recipe, run) if samples.source.classes else None

    def _check_branches(self, batch_size: int) -> None:
        """Refuse a mask that rounds to nothing or everything, and a batch too small to give every branch a clip."""
        for branch in self.recipe.branches:
            clip = self.recipe.clip
            mask = draw_mask(branch.masking, [torch.Generator()], clip.grid, branch.mask_ratio)
            hidden, total = mask.hidden.shape[1], clip.num_tokens
            if (hidden == 0) != (branch.mask_ratio == 0) or (hidden == total) != (branch.mask_ratio == 1):
                raise ValueError(
                    f"mask_ratio={branch.mask_ratio:g} of {total} tokens hides {hidden}. Use another ratio, or smaller "
                    "patches."
                )
            if branch.share * batch_size < 1:
                needed = math.ceil(1 / branch.share)
                raise ValueError(
                    f"A batch of {batch_size} leaves the branch of share={branch.share:g} with noise on {branch.noise_on} "
                    f"without a clip in some steps. Use a batch of at least {needed}, and at least as many samples."
                )

    def optimizer(self) -> torch.optim.Optimizer:
        return optimizer_for(self.model, self.training)

    @property
    def uses_all(self) -> bool:
        decoder = self.model.decoder
        masks_some = any(branch.mask_ratio and branch.noise_on != "hidden" for branch in self.recipe.branches)
        return len(self.recipe.branches) == 1 and (decoder is None or decoder.mask_token is None or masks_some)

    def inputs(self, batch: Batch, epoch: int, places: Sequence[int], everything: bool = False) -> tuple[Tensor, Draws]:
        drawn = draw(
            self.recipe,
            self.model.schedule,
            self.run.seed,
            epoch,
            batch.indices.tolist(),
            places=places,
            labels=batch.labels,
            every_branch=everything,
            device=self.run.device,
        )
        return batch.clips(self.run.device), drawn

    def lr_at(self, step: int, num_steps: int, warmup_steps: int) -> float:
        return self.training.lr * lr_factor(step, num_steps, warmup_steps, self.training.lr_schedule)

    def randomness(self, step: int, piece: int) -> AbstractContextManager[Any]:
        return nullcontext()  # everything is drawn in `inputs`

    def save(self, path: Path, weights: dict[str, Tensor], about: About) -> None:
        save_weights(path, self.recipe, weights, about)

    def sheet(self, model: nn.Module, clips: Tensor) -> Image.Image:
        assert isinstance(model, MaskedDiffusionAutoencoder)
        return what_it_sees(model, clips)

    def evaluates(self, epoch: int) -> bool:
        return self.neighbours is not None and self.neighbours.wanted(epoch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert self.neighbours is not None and isinstance(model, MaskedDiffusionAutoencoder)
        return self.neighbours.evaluate(model)
