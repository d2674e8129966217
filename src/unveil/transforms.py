"""A decoded picture or clip brought to the size that a model takes: at random for training, centred for evaluation."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F


@functools.cache
def _random_crop(height: int, width: int, crop_scale: float) -> v2.RandomResizedCrop:
    return v2.RandomResizedCrop(
        (height, width), scale=(crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True
    )


@functools.cache
def _randaugment(magnitude: int, fill: tuple[float, ...]) -> v2.RandAugment:
    """One change; the magnitude counts to 10, as in timm's recipes, where torchvision counts to 30."""
    return v2.RandAugment(1, 3 * magnitude, interpolation=InterpolationMode.BILINEAR, fill=list(fill))


def _check(picture: Tensor) -> None:
    if picture.dtype != torch.uint8 and not picture.is_floating_point():
        raise ValueError(
            f"A picture of {picture.dtype} cannot be resized without losing values. Give uint8, or float in [0, 1]."
        )


def _clipped(picture: Tensor) -> Tensor:
    # Bicubic overshoots at edges; uint8 saturates by itself.
    return picture.clamp(0, 1) if picture.is_floating_point() else picture


def fit(picture: Tensor, height: int, width: int, nearest: bool = False) -> Tensor:
    """Resize so that the picture just covers (height, width) with its aspect kept, and cut out the centre.

    Args:
        picture: (T, C, H, W), uint8, or float in [0, 1].
        nearest: take the nearest pixel, as for label maps, whose values must not be mixed; otherwise bicubic.

    Returns:
        (T, C, height, width) of the same dtype; `picture` itself if it already has that size.

    Raises:
        ValueError: the picture is of another integer dtype.
    """
    _check(picture)
    h, w = picture.shape[-2:]
    if (h, w) == (height, width):
        return picture
    # A picture of 1 x 10,000 would be resized to gigabytes; what the centre crop cannot reach is cut off first.
    h, w = min(h, 4 * math.ceil(w * height / width)), min(w, 4 * math.ceil(h * width / height))
    picture = F.center_crop(picture, [h, w])
    scale = max(height / h, width / w)
    size = [max(height, round(h * scale)), max(width, round(w * scale))]
    kind = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BICUBIC  # exact: centred as bicubic is
    picture = F.resize(picture, size, interpolation=kind, antialias=True)
    return _clipped(F.center_crop(picture, [height, width]))


class Crop(NamedTuple):
    """A box of a picture, in pixels, and whether it is mirrored left and right."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def _crop_of(picture: Tensor, height: int, width: int, crop_scale: float, mirrored: bool) -> Crop:
    return Crop(**_random_crop(height, width, crop_scale).make_params([picture]), mirrored=mirrored)


def draw_crop(picture: Tensor, height: int, width: int, crop_scale: float, flip: bool, seed_key: int) -> Crop:
    """What `augment` with these arguments cuts out, for crop_scale below 1."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_key)
        mirrored = flip and bool(torch.rand(()) < 0.5)
        return _crop_of(picture, height, width, crop_scale, mirrored)


def cut(picture: Tensor, crop: Crop, height: int, width: int) -> Tensor:
    """A crop of a picture (T, C, H, W), resized to (T, C, height, width)."""
    box, size = crop[:4], [height, width]
    picture = _clipped(F.resized_crop(picture, *box, size, InterpolationMode.BICUBIC, antialias=True))
    return F.horizontal_flip(picture) if crop.mirrored else picture


def _weights(start: Tensor, length: Tensor, size: int, whole: int) -> Tensor:
    """What each of `size` pixels takes of a row of `whole` ones, of which `length` from `start` on are resized.

    torch's antialiased bicubic interpolation, of a = -0.5 as Pillow's.

    Returns:
        (B, size, whole).
    """
    start, length = start[:, None, None].float(), length[:, None, None].float()
    place = torch.arange(whole, device=start.device) - start  # (B, 1, whole), in the box
    centre = length / size * (torch.arange(size, device=start.device)[:, None] + 0.5)  # (B, size, 1)
    stretch = (length / size).clamp(min=1)
    low = (centre - 2 * stretch + 0.5).floor().clamp(min=0)
    high = torch.minimum((centre + 2 * stretch + 0.5).floor(), length)
    x = ((place + 0.5 - centre) / stretch).abs()
    cubic = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    cubic = cubic * ((x < 2) & (place >= low) & (place < high))
    return cubic / cubic.sum(-1, keepdim=True)


def cut_together(pictures: Tensor, crops: Tensor, height: int, width: int) -> Tensor:
    """`cut` for a whole batch, by matrix products: but for a level here and there the same, and on a GPU much faster.

    Args:
        pictures: (B, T, C, H, W), uint8. crops: a `Crop` in each row, (B, 5), on the same device.

    Returns:
        (B, T, C, height, width), uint8.
    """
    B, T, C, H, W = pictures.shape
    top, left, h, w, mirrored = crops.unbind(1)
    rows, columns = _weights(top, h, height, H), _weights(left, w, width, W)
    columns = torch.where(mirrored[:, None, None].bool(), columns.flip(1), columns)
    # Rounded after each of the two, as torch resizes bytes.
    values = (pictures.float().reshape(B, -1, W) @ columns.mT).round_().clamp_(0, 255)
    values = (rows[:, None] @ values.reshape(B, T * C, H, width)).round_().clamp_(0, 255)
    return values.to(torch.uint8).reshape(B, T, C, height, width)


def augment(
    picture: Tensor,
    height: int,
    width: int,
    crop_scale: float,
    flip: bool,
    seed_key: int,
    *,
    num_ops: int = 0,
    magnitude: int = 9,
    fill: tuple[float, ...] = (),
) -> Tensor:
    """Cut out a random part, resize it, mirror half of all pictures, and change colour and shape; the same for every frame.

    Args:
        picture: (T, C, H, W), uint8, or float in [0, 1].
        crop_scale: smallest share of the area that the crop keeps, in (0, 1]; 1 is the crop of `fit`.
        flip: whether to mirror left and right with probability 1/2.
        seed_key: from `draws.key`; the same key gives the same result.
        num_ops, magnitude, fill: of RandAugment (Cubuk et al. 2020, arXiv 1909.13719): so many changes, each made or not by a
            coin, as timm has it; how strong, 0 to 10; and what a turned picture shows in its corners, a value in [0, 1] for
            each channel.

    Returns:
        (T, C, height, width) of the same dtype.

    Raises:
        ValueError: the picture is of another integer dtype.
    """
    _check(picture)
    # torchvision's transforms draw from the global generator. torch.manual_seed would also reseed every GPU, which
    # fork_rng(devices=[]) does not restore, and is 25 times slower.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_key)
        mirrored = flip and bool(torch.rand(()) < 0.5)
        if crop_scale < 1:
            picture = cut(picture, _crop_of(picture, height, width, crop_scale, mirrored), height, width)
        else:
            picture = fit(picture, height, width)
            picture = F.horizontal_flip(picture) if mirrored else picture
        for _ in range(num_ops):
            if torch.rand(()) < 0.5:
                scale = 255 if picture.dtype == torch.uint8 else 1
                picture = _clipped(_randaugment(magnitude, tuple(scale * value for value in fill))(picture))
        return picture


def erase(clip: Tensor, probability: float, mean: Tensor, std: Tensor, seed_key: int) -> Tensor:
    """Perhaps fill a random rectangle with noise, the same rectangle in every frame.

    A 50th to a third of the area, an aspect of 0.3 to 3.3, normal noise of the data's mean and deviation.
    Zhong et al. 2020, arXiv 1708.04896.

    Args:
        clip: (C, T, H, W), float.
        mean, std: of the channels, (C, 1, 1, 1).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_key)
        frames = ((clip - mean) / std).transpose(0, 1)  # (T, C, H, W)
        erased = v2.RandomErasing(probability, value="random")(frames)  # type: ignore[arg-type]
    return clip if erased is frames else erased.transpose(0, 1) * std + mean
