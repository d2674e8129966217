"""How well a network's features tell classes apart while it is pre-trained, by their nearest neighbours."""

import math

import torch

from unveil import draws
from unveil.cost import encode_cost, masked_step
from unveil.data import Samples, chosen_batches
from unveil.features import encoder_features, extract
from unveil.metrics import accuracy, knn_predict
from unveil.model import MaskedDiffusionAutoencoder
from unveil.recipe import Recipe
from unveil.rundir import Run

FEW, MANY = (
    500,
    2_500,
)  # samples, of which a fifth are asked about and the others vote: a tenth of the data between these
NEIGHBOURS = 10
SHARE = 0.02  # of the training's arithmetic that may go into it
SHARE_READ = 0.1  # of the training's reading


class NearestNeighbours:
    """Which of the training samples are asked about and which vote, and after which epochs.

    Their labels are known to nobody else: the network is trained without them, so its own training samples will do.

    Args:
        samples: of the training; its source has labels.
    """

    def __init__(self, samples: Samples, recipe: Recipe, run: Run) -> None:
        self.samples = Samples(samples.source, recipe.clip, run.seed, None)
        self.run, self.epochs, self.batch_size = run, recipe.training.epochs, recipe.training.batch_size
        num = len(samples)
        order = torch.randperm(num, generator=draws.generator(run.seed, "nearest neighbours")).tolist()
        wanted = min(MANY, max(FEW, num // 10))
        labelled = [index for index in order[: 2 * wanted] if samples.source.label(index) is not None]
        self.indices = labelled[:wanted] if len(labelled) >= FEW else []
        asked = len(self.indices) * encode_cost(recipe).forward
        trained = 3 * num * masked_step(recipe).forward  # a step is about three forward passes
        self.every = max(1, math.ceil(asked / (SHARE * trained)), math.ceil(len(self.indices) / (SHARE_READ * num)))

    def wanted(self, epoch: int) -> bool:
        """Whether after so many epochs; also after the last one, if that is worth it."""
        last = epoch == self.epochs and epoch > self.every // 2
        return bool(self.indices) and (epoch % self.every == 0 or last)

    def evaluate(self, model: MaskedDiffusionAutoencoder) -> dict[str, float]:
        """{"knn": percent that are named right by the nearest ones, "score": the same}."""
        piece = min(256, -(-self.batch_size // self.run.accumulate))
        workers = min(self.run.workers, len(self.indices))
        loader = chosen_batches(self.samples, self.indices, piece, 0, workers)
        (features,), labels, _ = extract(loader, encoder_features(model), device=self.run.device)
        asked = len(labels) // 5
        right = knn_predict(
            features[asked:],
            labels[asked:],
            features[:asked],
            int(labels.max()) + 1,
            min(NEIGHBOURS, len(labels) - asked),
        )
        percent = accuracy(right, labels[:asked])
        return {"score": percent, "knn": percent}
