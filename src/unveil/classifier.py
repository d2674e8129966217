"""A small classifier that judges generated pictures: does a picture show its class, and how far is the set from real ones.

It is trained on the same real data. The Fréchet distance between its features is a classifier-feature distance: it
compares models judged by the same file, and no number of it can stand beside an FID, which has Inception's features.

real = load_arrays("digits:train", recipe.clip)
judge = train_judge(real, 10, epochs=20, seed=0, flip=False, shift=1)
verdict = judge_pictures(judge, generated, labels)
distance = frechet_distance(judge_pictures(judge, real[0]).features, verdict.features)
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unveil import draws
from unveil.checkpoint import write_atomically
from unveil.config import Clip
from unveil.data import Samples, batches, open_source
from unveil.metrics import accuracy

FORMAT = "unveil-judge-1"
FEATURE_DIM = 128

# Measured on CIFAR-10 and on digits. A judge is a yardstick, so they are not options.
BATCH_SIZE = 128
PEAK_LR = 0.15
WARMUP = 0.25  # share of the steps
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
# Largest norm of the gradient. Without it the warm-up on small data overshoots, and the judge ends, though as accurate,
# with features that are ten times as long for a few pictures as for the others, which then decide a distance.
GRAD_CLIP = 1.0


def _conv(in_channels: int, out_channels: int, halve: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)  # the norm has the bias
    # Halved before the norm, which then has a quarter to do: 15 to 25 % of the time of a step.
    pool = [nn.MaxPool2d(2)] if halve else []
    return nn.Sequential(conv, *pool, nn.BatchNorm2d(out_channels), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            _conv(channels, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


class Judge(nn.Module):
    """A convolutional classifier of seven 3 x 3 layers for pictures of one size, 8 to 64 pixels.

    Full resolution has few channels, and its layer is one, because there the time goes; three halvings follow.

    Args:
        shape: (C, H, W) of the pictures.
        num_classes: K.

    Raises:
        ValueError: pictures of fewer than 8 pixels, which three halvings leave nothing of, or fewer than 2 classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 8:
            raise ValueError(f"A judge was asked for {height}x{width} pixels; it halves three times. Use at least 8x8.")
        if num_classes < 2:
            raise ValueError(f"A judge was asked for {num_classes} classes; it tells classes apart. Use at least 2.")
        self.shape, self.num_classes = shape, num_classes
        # of the training pictures, in [0, 1]; train_judge measures them
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.body = nn.Sequential(
            _conv(channels, 32, halve=True),
            _conv(32, 64, halve=True),
            _conv(64, FEATURE_DIM),
            _Residual(FEATURE_DIM),
            nn.MaxPool2d(2),
            _Residual(FEATURE_DIM),
        )
        self.head = nn.Linear(FEATURE_DIM, num_classes)
        self.to(memory_format=torch.channels_last)  # a quarter faster on CPUs

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees: the body's output, averaged over the picture.

        Args:
            x: pictures, (B, C, H, W), floating point in [0, 1].

        Returns:
            (B, 128), at least 0.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"Pictures of (C, H, W)={tuple(x.shape[1:])} were given to a judge of {self.shape}. Resize or convert them, "
                "or train a judge for them."
            )
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        return self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, K), of pictures as `features` takes them."""
        return self.head(self.features(x))


class Arrays(NamedTuple):
    """A labelled source in memory. clips: (n, C, H, W), uint8. labels: (n,), int64."""

    clips: Tensor
    labels: Tensor


def load_arrays(data: str, clip: Clip) -> Arrays:
    """Read a whole labelled source at a clip's size, as evaluation sees it: resized and centred, nothing drawn.

    Values that are not bytes in the source are rounded to bytes.

    Raises:
        ValueError: the clip has several frames, the source has no labels or lacks some, or a sample cannot be read.
    """
    if clip.frames != 1:
        raise ValueError(
            f"{data!r} was to be read as clips of {clip.frames} frames; a judge takes pictures. Use frames=1."
        )
    source = open_source(data, clip.channels, height=clip.height, width=clip.width)
    if source.classes is None:
        raise ValueError(
            f"{data!r} has no labels, so no classifier can be trained on it. Use a folder for each class, or a 'label' column."
        )
    clips, labels = [], []
    samples = Samples(source, clip, seed=0, training=None)
    for batch in batches(samples, 256, epoch=0, seed=0, shuffle=False, drop_last=False, num_workers=0):
        if batch.problems:
            bad = batch.problems[0]
            raise ValueError(f"{bad.where} of {data!r} cannot be read: {bad.reason}. Mend or remove it.")
        if batch.labels.min() < 0:
            where = source.where(int(batch.indices[batch.labels.argmin()]))
            raise ValueError(f"{where} of {data!r} has no label, but others have. Label it or remove it.")
        clips.append((batch.clips().squeeze(2) * 255).round().to(torch.uint8))
        labels.append(batch.labels)
    return Arrays(torch.cat(clips), torch.cat(labels))


def _check_pictures(pictures: Tensor) -> None:
    if pictures.ndim != 4 or not len(pictures):
        raise ValueError(
            f"Pictures of shape {tuple(pictures.shape)} were given; they must be (n, C, H, W), at least one."
        )
    if pictures.dtype == torch.uint8:
        return
    if not pictures.is_floating_point():
        raise ValueError(f"Pictures of {pictures.dtype} were given; use uint8, or floating point in [0, 1].")
    low, high = pictures.aminmax()
    if not (low >= 0 and high <= 1):  # not the other way round, which lets NaN pass
        raise ValueError(
            f"Pictures with values from {low:g} to {high:g} were given; they must be in [0, 1]. Clamp them."
        )


def _check_labels(labels: Tensor, pictures: Tensor, num_classes: int) -> None:
    if labels.shape != (len(pictures),):
        raise ValueError(
            f"{len(pictures)} pictures were given with labels of shape {tuple(labels.shape)}; use one for each."
        )
    if labels.is_floating_point():
        raise ValueError(f"Labels of {labels.dtype} were given; they number the classes. Use integers.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels from {labels.min()} to {labels.max()} were given for {num_classes} classes, numbered from 0. "
            "Leave pictures without a label out, and number the others anew."
        )


def _as_float(pictures: Tensor) -> Tensor:
    return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()


def _moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (C,), float64; of a constant one 0.001, so that it becomes 0 and not infinite."""
    total = torch.zeros(2, pictures.shape[1], dtype=torch.float64, device=pictures.device)
    for chunk in pictures.split(1024):  # all at once would take eight times the memory of the bytes
        x = _as_float(chunk).double()
        total += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
    mean, square = total * pictures.shape[1] / pictures.numel()
    return mean, (square - mean.square()).clamp(min=1e-6).sqrt()


def _flipped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture of (B, C, H, W) mirrored left to right or not, by a coin."""
    coins = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(coins[:, None, None, None].to(x.device), x.flip(3), x)


def _shifted(x: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each picture of (B, C, H, W) moved by up to `shift` pixels both ways; what comes in is the picture's reflection."""
    H, W = x.shape[2:]
    padded = F.pad(x, (shift,) * 4, mode="reflect")
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # (B, C, rows, columns, H, W), a view
    row, column = torch.randint(2 * shift + 1, (2, len(x)), generator=generator).to(x.device)
    return windows[torch.arange(len(x), device=x.device), :, row, column]


def _batches_of(num: int, generator: torch.Generator) -> Iterator[Tensor]:
    """An epoch's rows in batches of BATCH_SIZE; the incomplete last one is dropped if there is a whole one."""
    order = torch.randperm(num, generator=generator)
    size = min(BATCH_SIZE, num)
    return (order[i : i + size] for i in range(0, num - size + 1, size))


def train_judge(
    samples: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    epochs: int,
    seed: int,
    flip: bool,
    shift: int,
    on_progress: Callable[[int, float], None] | None = None,
) -> Judge:
    """Train a judge on pictures in memory, where they are; the same for a seed, on one machine with as many threads.

    On CIFAR-10, 8 epochs make 84 % in seven minutes of one core; on the digits, 10 make 99 % in three seconds.

    Args:
        samples: pictures (n, C, H, W), uint8 or floating point in [0, 1], and labels (n,) in 0 .. num_classes - 1.
        flip: mirror half of the pictures left to right. Not where that makes another class of them, as with digits.
        shift: move pictures by up to so many pixels; an eighth of their size is usual, 0 is not at all.
        on_progress: called after each epoch with how many are done and the mean loss of the last.

    Returns:
        The judge, in eval mode.

    Raises:
        ValueError: pictures or labels of the wrong kind, fewer than 2 pictures, no epoch, or a shift that is too large.
    """
    pictures, labels = samples
    _check_pictures(pictures)
    _check_labels(labels, pictures, num_classes)
    _, channels, height, width = pictures.shape
    if len(pictures) < 2 or epochs < 1:
        raise ValueError(
            f"{len(pictures)} pictures and epochs={epochs} were given; use at least 2 pictures and 1 epoch."
        )
    if not 0 <= shift < min(height, width):
        raise ValueError(f"shift={shift} was given for {height}x{width} pixels. Use 0 to {min(height, width) - 1}.")
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.default_generator.manual_seed(draws.key(seed, "judge"))
        judge = Judge((channels, height, width), num_classes)
    mean, std = _moments(pictures)
    judge.mean.copy_(mean)
    judge.std.copy_(std)
    judge.to(pictures.device).train()

    # Scales and biases are not decayed: there is nothing to keep small in them.
    matrices = [p for p in judge.parameters() if p.ndim > 1]
    vectors = [p for p in judge.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=PEAK_LR, momentum=0.9, nesterov=True)
    num_steps = epochs * (len(pictures) // min(BATCH_SIZE, len(pictures)))
    step = 0
    for epoch in range(epochs):
        generator = draws.generator(seed, epoch, "judge")
        losses = []
        for rows in _batches_of(len(pictures), generator):
            x = _as_float(pictures[rows.to(pictures.device)])
            if flip:
                x = _flipped(x, generator)
            if shift:
                x = _shifted(x, shift, generator)
            # One cycle: up to the peak in the first quarter, and down to almost 0.   Smith and Topin, arXiv 1708.07120
            done = (step + 0.5) / num_steps
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(done / WARMUP, (1 - done) / (1 - WARMUP))
            target = labels[rows.to(labels.device)].to(x.device).long()
            loss = F.cross_entropy(judge(x), target, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(judge.parameters(), GRAD_CLIP)
            optimizer.step()
            losses.append(loss.detach())
            step += 1
        if on_progress is not None:
            on_progress(epoch + 1, torch.stack(losses).mean().item())
    return judge.eval()


class Verdict(NamedTuple):
    """What a judge says of pictures.

    features: (n, 128), float32. classes: the predicted ones, (n,). accuracy: how many were named as labelled, in percent;
    None without labels.
    """

    features: Tensor
    classes: Tensor
    accuracy: float | None


@torch.inference_mode()
def judge_pictures(judge: Judge, pictures: Tensor, labels: Tensor | None = None) -> Verdict:
    """Judge pictures in eval mode, in batches, on the judge's device; the verdict is on the CPU.

    Args:
        pictures: (n, C, H, W), uint8 or floating point in [0, 1].
        labels: (n,), what the pictures were meant to show.

    Raises:
        ValueError: pictures of another shape or range than the judge's, or labels that it does not know.
    """
    _check_pictures(pictures)
    if labels is not None:
        _check_labels(labels, pictures, judge.num_classes)
    judge.eval()
    features, classes = [], []
    for chunk in pictures.split(256):
        found = judge.features(_as_float(chunk.to(judge.head.weight.device)))
        features.append(found.cpu())
        classes.append(judge.head(found).argmax(1).cpu())
    predicted = torch.cat(classes)
    return Verdict(torch.cat(features), predicted, None if labels is None else accuracy(predicted, labels.cpu()))


def save_judge(path: str | Path, judge: Judge, about: dict[str, Any]) -> None:
    """Write a judge as safetensors that describe themselves.

    Args:
        about: plain values for whoever reads the file: on which data it was trained, by which command, its accuracy.
    """
    described = {"shape": judge.shape, "num_classes": judge.num_classes}
    metadata = {"format": FORMAT, "judge": json.dumps(described), "about": json.dumps(about)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in judge.state_dict().items()}
    write_atomically(Path(path), lambda part: safetensors.torch.save_file(tensors, part, metadata))


def load_judge(path: str | Path) -> tuple[Judge, dict[str, Any]]:
    """The judge of a file, on the CPU and in eval mode, and what was written about it.

    Raises:
        ValueError: there is no such file, it is no judge, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no judge at {path}. Give a file that save_judge wrote.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}). Is the file whole?") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no judge: its format is {metadata.get('format')!r}, not {FORMAT!r}. Train one.")
    try:
        described, about = json.loads(metadata["judge"]), json.loads(metadata["about"])
        channels, height, width = described["shape"]
        with torch.random.fork_rng(devices=[]):  # its first weights are thrown away
            judge = Judge((channels, height, width), described["num_classes"])
        judge.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is a damaged judge ({error}). Take another copy, or train it again.") from None
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path} has values in {broken[0]!r} that are no numbers: it is damaged; take another copy.")
    return judge.eval(), about
