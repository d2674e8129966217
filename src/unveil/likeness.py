"""How like a repainted picture is to the true one, in the hole and over the whole: PSNR, SSIM and LPIPS.

SSIM and LPIPS are torchmetrics' (`pip install "unveil[evaluate]"`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unveil.metric_weights import Published, Weights, read_state
from unveil.metrics import hole_mse, psnr

Trunk = Literal["alex", "vgg"]
TRUNKS: dict[Trunk, Published] = {
    "alex": Published(
        "LPIPS alex", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", sha256="7be5be79", megabytes=233
    ),
    "vgg": Published(
        "LPIPS vgg", "https://download.pytorch.org/models/vgg16-397923af.pth", sha256="397923af", megabytes=528
    ),
}
SMALLEST: dict[Trunk, int] = {"alex": 31, "vgg": 16}  # sides that leave a pixel of the trunk's last layer
SMALLEST_SSIM = 6  # half a window is reflected at the border

# Compares painted and true clips (B, C, T, H, W) in [0, 1] with a hole (B, T, H, W): in the hole and over the whole, (B,) each.
Compare = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class CannotJudge(ValueError):
    """A measure that cannot be had here: its library is missing, or the pictures do not suit it."""


@dataclass(frozen=True)
class Judge:
    """A measure of likeness.

    unit: for people. more_is_better: of what `compare` gives. told: makes of that, or of its mean over a picture's samples, the
    figure that people know: decibels, of a squared error.
    """

    name: str
    unit: str
    compare: Compare
    more_is_better: bool
    told: Callable[[Tensor], Tensor] = lambda values: values


def inside(maps: Tensor, hole: Tensor) -> Tensor:
    """Mean of a map (B, T, H, W) over the hole (B, T, H, W), (B,) float64."""
    weights = hole.flatten(1).double()
    return (maps.flatten(1).double() * weights).sum(1) / weights.sum(1)


def _squared_error(painted: Tensor, truth: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
    return hole_mse(painted, truth, hole), hole_mse(painted, truth, torch.ones_like(hole))


PSNR = Judge("psnr", "dB", _squared_error, more_is_better=False, told=psnr)


def _torchmetrics(what: str) -> Any:
    try:
        from torchmetrics.functional import image
        from torchmetrics.functional.image import lpips  # noqa: F401  # whose network is taken from there
    except Exception as error:  # a torchvision that does not fit its torch raises RuntimeError
        raise CannotJudge(
            f'{what} needs torchmetrics ({type(error).__name__}: {str(error)[:80]}): pip install "unveil[evaluate]"'
        ) from None
    return image


def _frames(clips: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B * T, C, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


def ssim_judge(height: int, width: int) -> Judge:
    """Structural similarity (Wang et al. 2004) by torchmetrics: Gaussian window of 11 x 11 pixels and sigma 1.5, values in
    [0, 1], borders reflected, the mean over channels and frames. In the hole it is the mean of SSIM's map over the hole's
    pixels, whose windows reach into what is known.

    Raises:
        CannotJudge: torchmetrics is missing, or the pictures are too small.
    """
    functional = _torchmetrics("SSIM")
    if min(height, width) < SMALLEST_SSIM:
        raise CannotJudge(f"SSIM needs pictures of {SMALLEST_SSIM} pixels on each side; these are {width} x {height}.")

    def compare(painted: Tensor, truth: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
        ssim = functional.structural_similarity_index_measure
        _, maps = ssim(_frames(painted), _frames(truth), data_range=1.0, reduction="none", return_full_image=True)
        maps = maps.mean(1).reshape(hole.shape)
        return inside(maps, hole), maps.double().mean((1, 2, 3))

    return Judge("ssim", "", compare, more_is_better=True)


def lpips_judge(
    trunk: Trunk, weights: Weights, channels: int, height: int, width: int, device: torch.device | str
) -> Judge:
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924) by torchmetrics, with its heads of version 0.1, on
    pictures of their own size; grey ones are repeated in three channels. In the hole it is the mean over the hole's pixels of
    its map, each layer enlarged to the picture's size by bilinear interpolation; what is outside of the hole is the truth.

    Raises:
        CannotJudge: torchmetrics is missing, or the pictures do not suit the trunk.
        ValueError: the weights are not its.
    """
    check_lpips(trunk, channels, height, width)
    network = _network(trunk, weights).to(device)
    layers: list[Tensor] = []

    def remember(module: nn.Module, args: Any, output: Tensor) -> None:
        layers.append(output)

    for head in network.lins:  # type: ignore[union-attr]
        head.register_forward_hook(remember)

    @torch.inference_mode()
    def compare(painted: Tensor, truth: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
        B, _, T, H, W = painted.shape
        seen = [_frames(x).expand(-1, 3, -1, -1) for x in (painted, truth)]
        layers.clear()
        whole = network(*seen, normalize=True).reshape(B, T)
        maps = sum(nn.functional.interpolate(layer, (H, W), mode="bilinear") for layer in layers)
        assert isinstance(maps, Tensor)
        return inside(maps.reshape(B, T, H, W), hole), whole.double().mean(1)

    return Judge(f"lpips_{trunk}", "", compare, more_is_better=False)


def check_lpips(trunk: Trunk, channels: int, height: int, width: int) -> None:
    """Refuse what a trunk cannot look at.

    Raises:
        CannotJudge: torchmetrics is missing, or the pictures do not suit the trunk.
    """
    _torchmetrics(f"LPIPS {trunk}")
    if channels not in (1, 3):
        raise CannotJudge(f"LPIPS looks at colour pictures, or grey ones, but these have {channels} channels.")
    if min(height, width) < SMALLEST[trunk]:
        raise CannotJudge(
            f"LPIPS {trunk} needs pictures of {SMALLEST[trunk]} pixels on each side; these are {width} x {height}, and are "
            "not enlarged, for that would be another measure."
        )


def _network(trunk: Trunk, weights: Weights) -> nn.Module:
    """torchmetrics' network with the trunk from a file of torchvision's, whose names are features.NUMBER."""
    from torchmetrics.functional.image.lpips import _LPIPS  # its public class fetches the trunk without being asked

    with torch.random.fork_rng(devices=[]):  # its layers are first drawn at random
        network = _LPIPS(net=trunk, pnet_rand=True)
    state = read_state(weights, TRUNKS[trunk].network)
    wanted = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({name: state[theirs] for name, theirs in wanted.items()})
    except (KeyError, RuntimeError):
        raise ValueError(
            f"{weights.path} holds other weights than {TRUNKS[trunk].name}, which LPIPS {trunk} needs. Fetch it from "
            f"{TRUNKS[trunk].url}."
        ) from None
    return network.eval()
