"""The Inception network of FID, what it sees in pictures, and what is kept of a reference so that it is looked at once.

The network is torch-fidelity's (`pip install "unveil[evaluate]"`), TensorFlow's graph of 2015-12-05 in PyTorch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unveil import draws
from unveil.checkpoint import write_atomically
from unveil.metric_weights import Published, Weights, read_state
from unveil.picture_sets import Fitted, PictureSet

SIDE = 299
INCEPTION = Published(
    "Inception v3, by which FID is measured,",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    megabytes=96,
    also=("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's name
)

Resize = Literal["tf1", "clean"]
RESIZES: dict[Resize, str] = {
    "tf1": "to 299 x 299 by TensorFlow 1's bilinear resize without antialiasing, as ADM's evaluator and torch-fidelity",
    "clean": "to 299 x 299 by Pillow's antialiased bicubic resize of float values, as clean-fid",
}

POOLED, SPATIAL = 2048, 7 * 17 * 17
SPATIAL_CHANNELS = 7  # of the first branch of mixed_6, which torchvision calls Mixed_6d: ADM's choice
KEPT = 10_000  # pictures of a reference whose features are kept, for precision, recall and KID: as many as ADM has
SPLIT = 5_000  # pictures in one part of the Inception score: ADM's
FORMAT = 1


class Seen(NamedTuple):
    """What the network sees in pictures. pooled: (B, 2048). spatial: (B, 2023), rows, columns and channels in ADM's order.
    logits: (B, 1008), without the last layer's bias, as the Inception score has them."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class Inception:
    """The network with a way to bring pictures to its size.

    Raises:
        ValueError: torch-fidelity is missing, or the file holds other weights.
    """

    def __init__(self, weights: Weights, resize: Resize, device: torch.device | str) -> None:
        check_installed()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

        read_state(weights, INCEPTION.network)  # refuses what would run code, which torch-fidelity's reading does not
        try:
            with torch.random.fork_rng(devices=[]):  # its layers are first drawn at random
                network = Network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights.path))
        except RuntimeError:
            raise ValueError(
                f"{weights.path} holds other weights than {INCEPTION.name}. Fetch it from {INCEPTION.url}."
            ) from None
        self.weights, self.resize, self.device = weights, resize, torch.device(device)
        self._network = network.to(self.device)
        self._branch: list[Tensor] = []

        def remember(module: nn.Module, args: Any, output: Tensor) -> None:
            self._branch.append(output)

        network.Mixed_6d.branch1x1.register_forward_hook(remember)

    def _brought(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 as (B, 3, 299, 299) float32 from 0 to 255, on the device."""
        if self.resize == "clean":
            return torch.stack([_clean(picture) for picture in pictures]).to(self.device)
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as bilinear

        return bilinear(pictures.to(self.device).float(), (SIDE, SIDE), align_corners=False)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Seen:
        """What is seen in (B, 3, H, W) uint8."""
        x = (self._brought(pictures) - 128) / 128
        self._branch.clear()
        # Not the network's own forward pass, which takes bytes alone, and so no picture that was resized in floats.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # whose ten bits would round every layer
            for name, layer in self._network.named_children():
                if name != "fc":
                    x = layer(x)
        pooled = x.flatten(1)
        (branch,) = self._branch
        spatial = branch[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        fc = self._network.fc
        assert isinstance(fc, nn.Linear)
        return Seen(pooled, spatial, pooled @ fc.weight.T)


def check_installed() -> None:
    """
    Raises:
        ValueError: torch-fidelity is missing.
    """
    try:
        import torch_fidelity  # noqa: F401
    except Exception as error:  # a torchvision that does not fit its torch raises RuntimeError
        raise ValueError(
            f'This needs torch-fidelity ({type(error).__name__}: {str(error)[:80]}): pip install "unveil[evaluate]"'
        ) from None


def _clean(picture: Tensor) -> Tensor:
    """(3, H, W) uint8 as (3, 299, 299) float32 from 0 to 255, each channel by Pillow in floats."""
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in picture]
    resized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255)


class Moments:
    """Mean and covariance of features that come a batch at a time."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.n = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._origin = self._sum  # near the mean, so that nothing is lost when its square is subtracted

    def add(self, features: Tensor) -> None:
        """Take (B, D)."""
        x = features.double()
        if not self.n:
            self._origin = x.mean(0)
        x = x - self._origin
        self.n += len(x)
        self._sum += x.sum(0)
        self._products += x.T @ x

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """The mean (D,) and the covariance (D, D), which divides by n - 1, on the CPU."""
        mean = self._sum / self.n
        covariance = (self._products - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return (mean + self._origin).cpu(), covariance.cpu()


@dataclass(frozen=True)
class Looked:
    """What was seen in a set. n: pictures. pooled, spatial: mean and covariance. kept: pooled features of some, (k, 2048).
    logits: of these, (k, 1008)."""

    n: int
    pooled: tuple[Tensor, Tensor]
    spatial: tuple[Tensor, Tensor]
    kept: Tensor
    logits: Tensor


def look(
    inception: Inception,
    pictures: Iterable[tuple[int, Tensor]],
    batch_size: int,
    keep: Callable[[int], bool],
    on_progress: Callable[[int], None],
) -> Looked:
    """Look at a set.

    Args:
        pictures: number and (3, H, W) uint8 of each, all of one size.
        keep: whether the features of the picture of this number are kept.
        on_progress: told how many are done.

    Raises:
        ValueError: there are fewer than two pictures.
    """
    pooled, spatial = Moments(POOLED, inception.device), Moments(SPATIAL, inception.device)
    kept, logits = [], []
    numbers: list[int] = []
    waiting: list[Tensor] = []

    def take() -> None:
        seen = inception(torch.stack(waiting))
        pooled.add(seen.pooled)
        spatial.add(seen.spatial)
        chosen = torch.tensor([keep(number) for number in numbers])
        kept.append(seen.pooled.cpu()[chosen])
        logits.append(seen.logits.cpu()[chosen])
        waiting.clear()
        numbers.clear()
        on_progress(pooled.n)

    for number, picture in pictures:
        waiting.append(picture)
        numbers.append(number)
        if len(waiting) == batch_size:
            take()
    if waiting:
        take()
    if pooled.n < 2:
        raise ValueError(
            f"{pooled.n} picture(s) could be read; a distribution needs two at least, and 10,000 to be known."
        )
    return Looked(pooled.n, pooled.gaussian(), spatial.gaussian(), torch.cat(kept), torch.cat(logits))


@dataclass(frozen=True)
class Reference:
    """What generated pictures are compared with.

    pooled, spatial: mean and covariance; spatial is None if a file has only the others. n: of how many pictures; None if a file
    does not say. kept: pooled features of some of them, (k, 2048), or None. file: where this lies. reused: it lay there before.
    resized: how many of the pictures had another size.
    """

    pooled: tuple[Tensor, Tensor]
    spatial: tuple[Tensor, Tensor] | None
    n: int | None
    kept: Tensor | None
    file: Path | None
    reused: bool
    resized: int = 0


def statistics_folder() -> Path:
    """Where statistics of references are kept: unveil/statistics in the user's folder for caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "unveil" / "statistics"


def look_at_reference(
    inception: Inception,
    pictures: PictureSet,
    size: tuple[int, int],
    folder: Path,
    batch_size: int,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> Reference:
    """The statistics of reference pictures, from the folder if they were looked at before; otherwise on_progress is told the
    pictures looked at and their number.

    The file's name is a digest of the pictures' contents, the size (height, width) they are brought to, the way to the
    network's size, its weights, and the seed, which draws the pictures whose features are kept if there are over 10,000.
    """
    told = {
        "format": FORMAT,
        "pictures": pictures.digest(),
        "size": list(size),
        "resize": inception.resize,
        "weights": inception.weights.sha256,
        "seed": seed,
    }
    path = folder / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]}.npz"
    if path.is_file():
        return read_reference(path, inception)
    fitted = Fitted(pictures, *size)
    drawn = torch.randperm(len(pictures), generator=draws.generator(seed, "kept features"))[:KEPT]
    chosen = set(drawn.tolist())
    looked = look(inception, fitted, batch_size, chosen.__contains__, lambda done: on_progress(done, len(pictures)))
    told |= {"name": pictures.name, "n": looked.n, "resized": fitted.resized}
    arrays: dict[str, Any] = {  # ADM's names, so that its evaluator and others' read the file too
        "mu": looked.pooled[0],
        "sigma": looked.pooled[1],
        "mu_s": looked.spatial[0],
        "sigma_s": looked.spatial[1],
        "pool_3": looked.kept,
    }

    def write(part: Path) -> None:
        with part.open("wb") as stream:  # given a name, numpy would add an extension to it
            np.savez(stream, unveil=np.array(json.dumps(told)), **{name: x.numpy() for name, x in arrays.items()})

    write_atomically(path, write)
    return Reference(looked.pooled, looked.spatial, looked.n, looked.kept, path, reused=False, resized=fitted.resized)


def read_reference(path: Path, inception: Inception) -> Reference:
    """A file of statistics: one that was written here, or another with ADM's `mu` and `sigma`, and perhaps `mu_s`, `sigma_s`.

    Raises:
        ValueError: it is no such file, or was made another way than the pictures are to be looked at.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "pool_3", "unveil") if name in file
            }
    except Exception as error:  # a damaged file raises nearly every type
        raise ValueError(f"{path} cannot be read as statistics ({type(error).__name__}: {error}). Remove it.") from None
    told: dict[str, Any] = json.loads(str(arrays["unveil"])) if "unveil" in arrays else {"resize": "tf1"}
    if told["resize"] != inception.resize:
        why = "as all such files are taken to be" if "unveil" not in arrays else "as it says"
        raise ValueError(
            f"{path} was made of pictures resized as {told['resize']}, {why}, and numbers of two ways do not compare. Use "
            f"--resize {told['resize']}."
        )
    if told.get("weights", inception.weights.sha256) != inception.weights.sha256:
        raise ValueError(
            f"{path} was made with other weights (sha256 {told['weights'][:8]}) than {inception.weights.path} "
            f"({inception.weights.sha256[:8]}). Use the same, or name the pictures as --reference."
        )
    shapes = {"mu": (POOLED,), "sigma": (POOLED, POOLED), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}
    for name, shape in shapes.items():
        found = arrays[name].shape if name in arrays else None
        if found != shape and (found is not None or name in ("mu", "sigma")):
            raise ValueError(
                f"{path} has {name} of shape {found}; of Inception's features it is {shape}. Use another file."
            )
    values = {name: torch.from_numpy(x) for name, x in arrays.items() if name != "unveil"}
    spatial = (values["mu_s"], values["sigma_s"]) if {"mu_s", "sigma_s"} <= values.keys() else None
    return Reference(
        (values["mu"], values["sigma"]),
        spatial,
        told.get("n"),
        values.get("pool_3"),
        path,
        reused=True,
        resized=told.get("resized", 0),
    )
