"""Fine-tuning as a job for the training loop."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unveil import draws
from unveil.checkpoint import About, save_weights
from unveil.data import Batch, Samples, Skipped, batches
from unveil.finetuning import Recognition
from unveil.hardware import onto
from unveil.optim import ADAM_BETA1, layer_decay_groups, lr_factor
from unveil.recipe import Recipe
from unveil.recognizer import RecognitionObjective, Recognizer, Targets, blend, score, to_targets
from unveil.report import contact_sheet
from unveil.rundir import Run


class RecognitionJob:
    """The job of fine-tuning; see `unveil.trainer.Job`."""

    def __init__(
        self,
        recipe: Recipe,
        recognition: Recognition,
        run: Run,
        initial: dict[str, Tensor],
        train_truth: Tensor,
        test: Samples,
        truth: Tensor,
        eval_epochs: int,
    ) -> None:
        """initial: tensors in place of drawn ones. train_truth, test, truth: as `score` wants truth."""
        self.recipe, self.recognition, self.run = recipe, recognition, run
        self.training = recognition.training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = Recognizer(recipe, recognition)
        self.model.load_state_dict({**self.model.state_dict(), **initial})
        self.objective = RecognitionObjective(self.model)
        self.train_truth, self.test, self.truth, self.eval_epochs = train_truth, test, truth, eval_epochs

    def optimizer(self) -> torch.optim.Optimizer:
        training, depth = self.training, self.recipe.encoder.depth
        groups = layer_decay_groups(self.model, depth, training.weight_decay, training.layer_decay)
        return torch.optim.AdamW(groups, lr=training.lr, betas=(ADAM_BETA1, training.beta2), fused=True)

    @property
    def uses_all(self) -> bool:
        return True

    def inputs(
        self, batch: Batch, epoch: int, places: Sequence[int], everything: bool = False
    ) -> tuple[Tensor, Targets]:
        device = self.run.device
        targets = onto(device, to_targets(self.recognition, self.train_truth[batch.indices]))
        key = draws.key(self.run.seed, epoch, places[0], "blend")
        clips, targets = blend(batch.clips(device), targets, self.training, key)
        return clips, Targets(targets)

    def lr_at(self, step: int, num_steps: int, warmup_steps: int) -> float:
        training = self.training
        low = 0.0 if step < warmup_steps else min(training.min_lr, training.lr)
        return low + (training.lr - low) * lr_factor(step, num_steps, warmup_steps, training.lr_schedule)

    def randomness(self, step: int, piece: int) -> AbstractContextManager[Any]:
        return _seeded(self.run.device, draws.key(self.run.seed, step, piece, "drop path"))

    def save(self, path: Path, weights: dict[str, Tensor], about: About) -> None:
        save_weights(path, self.recipe, weights, about, self.recognition)

    def sheet(self, model: nn.Module, clips: Tensor) -> Image.Image:
        blended = ", before they are blended" if self.training.mixup or self.training.cutmix else ""
        return contact_sheet([(f"pictures as they are trained on{blended}", list(clips.cpu()))])

    def evaluates(self, epoch: int) -> bool:
        return epoch % self.eval_epochs == 0 or epoch == self.training.epochs

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Recognizer)
        outputs, wanted, _ = told(model, self.test, self.truth, self.run, self.training.batch_size)
        return score(self.recognition, outputs, wanted)


class _seeded(AbstractContextManager[None]):
    """torch's global generators from this seed within, and as they were after."""

    def __init__(self, device: str, seed: int) -> None:
        self.fork = torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else [])
        self.device, self.seed = device, seed

    def __enter__(self) -> None:
        self.fork.__enter__()
        if self.device.startswith("cuda"):
            torch.manual_seed(self.seed)
        else:
            torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


def told(
    model: Recognizer, samples: Samples, truth: Tensor, run: Run, batch_size: int
) -> tuple[Tensor, Tensor, list[Skipped]]:
    """What a network tells of every readable test sample, (n, K), the truth of these, and what was not readable.

    Args:
        batch_size: of training; no more clips than one of its pieces are held at once.

    Raises:
        ValueError: no sample can be read, or the network tells no numbers.
    """
    piece = min(256, -(-batch_size // run.accumulate))
    workers = min(run.workers, len(samples))
    loader = batches(samples, piece, 0, 0, shuffle=False, drop_last=False, num_workers=workers)
    device = torch.device(run.device)
    outputs, wanted, problems = [], [], []
    for batch in loader:
        problems += batch.problems
        if batch.values is None:
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            outputs.append(model.predict(batch.clips(device)).cpu())
        wanted.append(truth[batch.indices])
    if not outputs:
        raise ValueError(f"No sample of the test data {samples.source.name!r} can be read.")
    if not all(output.isfinite().all() for output in outputs):
        raise ValueError(
            f"What the network tells became infinite or no numbers. What {run.out} holds is from before that; start again in a "
            "new directory with a smaller --blr."
        )
    return torch.cat(outputs), torch.cat(wanted), problems
