"""Linear heads on frozen features that are trained by gradient: MAE's linear probe."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unveil import draws
from unveil.optim import Lars, lr_factor

# MAE's main_linprobe.py, arXiv 2111.06377, appendix A.1
LARS_BATCH = 16_384
LARS_BASE_LR = 0.1
LARS_WARMUP_EPOCHS = 10


def linear_head(dim: int, num_classes: int, seed: int) -> nn.Sequential:
    """Features (n, dim), each by its mean and deviation over the batch, or the running ones in eval, to logits (n, classes).

    BatchNorm1d without weights, eps 1e-6, and a Linear of deviation 0.01 with bias 0, as MAE's linear probe has it.
    """
    with torch.random.fork_rng(devices=[]):  # for what nn.Linear draws first
        linear = nn.Linear(dim, num_classes)
    nn.init.normal_(linear.weight, std=0.01, generator=draws.generator(seed, "linear head"))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)


class LarsProbe:
    """MAE's linear probe: `linear_head` by LARS, learning rate 0.1 * batch / 256, 10 epochs of warm-up, half a cosine to 0.

    A batch has 16,384 rows, or all where there are fewer; what does not fill one is left for another epoch.

    Args:
        rows: which rows of the features to train on, (n,).
        dim: width of the features.
        seed: draws the initial weights and the order of each epoch.
    """

    def __init__(
        self, rows: Tensor, dim: int, num_classes: int, *, epochs: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.rows, self.seed, self.device = rows, seed, device
        self.batch_size = min(LARS_BATCH, len(rows))
        self.steps_per_epoch = len(rows) // self.batch_size
        self.num_steps = epochs * self.steps_per_epoch
        self.warmup_steps = min(LARS_WARMUP_EPOCHS * self.steps_per_epoch, self.num_steps // 2)
        self.step = 0
        self.head = linear_head(dim, num_classes, seed).to(device)
        self.optimizer = Lars(self.head.parameters(), lr=LARS_BASE_LR * self.batch_size / 256)

    def epoch(self, features: Tensor, labels: Tensor) -> None:
        """Train on the features (N, dim) and labels (N,) at the probe's rows once."""
        self.head.train()
        number = self.step // self.steps_per_epoch
        order = torch.randperm(len(self.rows), generator=draws.generator(self.seed, number, "order of LARS"))
        for chosen in self.rows[order].split(self.batch_size)[: self.steps_per_epoch]:
            factor = lr_factor(self.step, self.num_steps, self.warmup_steps)
            loss = F.cross_entropy(self.head(features[chosen].to(self.device)), labels[chosen].to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step(factor)
            self.step += 1

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Classes (m,) of features (m, dim)."""
        self.head.eval()
        chunks = features.split(LARS_BATCH)
        return torch.cat([self.head(chunk.to(self.device)).argmax(1).cpu() for chunk in chunks])
