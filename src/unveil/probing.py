"""Linear heads on frozen features that are trained by gradient: MAE's linear probe, and one for every patch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unveil import draws
from unveil.optim import Lars, lr_factor

# MAE's main_linprobe.py, arXiv 2111.06377, appendix A.1
LARS_BATCH = 16_384
LARS_BASE_LR = 0.1
LARS_WARMUP_EPOCHS = 10
DENSE_LR = 1e-2  # ours: at 1e-3, 600 steps leave coloured squares at a mIoU of 56, at 1e-2 and 3e-2 at 83
IGNORE = 255  # of a label map: no class, not trained on and not scored


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


class DenseProbe:
    """A linear segmentation probe: `linear_head` on every patch, its logits upsampled to pixels, trained by AdamW.

    Cross entropy over the pixels that have a class; learning rate 0.01, half a cosine to 0, no weight decay.

    Args:
        dim: width of the patch tokens.
        grid: rows and columns of patches.
        size: height and width of the label maps.
        batch_size: pictures in a step.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        grid: tuple[int, int],
        size: tuple[int, int],
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.grid, self.size, self.batch_size, self.seed, self.device = grid, size, batch_size, seed, device
        self.head = linear_head(dim, num_classes, seed).to(device)

    def _logits(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, K, H, W)."""
        flat = self.head(tokens.to(self.device).flatten(0, 1))  # (B * N, K)
        small = flat.unflatten(0, (len(tokens), *self.grid)).permute(0, 3, 1, 2)
        return F.interpolate(small, self.size, mode="bilinear", align_corners=False)

    def fit(self, tokens: Tensor, truth: Tensor, epochs: int) -> int:
        """Train on tokens (n, N, D) and label maps (n, H, W), uint8; returns the number of steps."""
        self.head.train()
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=DENSE_LR, weight_decay=0)
        num_steps, step = epochs * math.ceil(len(tokens) / self.batch_size), 0
        for epoch in range(epochs):
            order = torch.randperm(len(tokens), generator=draws.generator(self.seed, epoch, "order of pictures"))
            for chosen in order.split(self.batch_size):
                classes = truth[chosen].long().to(self.device)
                # a sum, because the mean over a batch without a known pixel is no number
                loss = F.cross_entropy(self._logits(tokens[chosen]), classes, ignore_index=IGNORE, reduction="sum")
                loss = loss / (classes != IGNORE).sum().clamp(min=1)
                for group in optimizer.param_groups:
                    group["lr"] = DENSE_LR * lr_factor(step, num_steps, 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
        return num_steps

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Classes (n, H, W), uint8, of tokens (n, N, D)."""
        self.head.eval()
        chunks = tokens.split(self.batch_size)
        return torch.cat([self._logits(chunk).argmax(1).to(torch.uint8).cpu() for chunk in chunks])
