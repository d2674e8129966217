"""Repainting with the call that users of diffusers know."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unveil.checkpoint import load_model, pick_device
from unveil.config import check_choice
from unveil.model import MaskedDiffusionAutoencoder
from unveil.originals import Original, from_pillow, hole_of
from unveil.painting import paint
from unveil.pipeline import SMOOTH_SHARE, Sampler

OutputType = Literal["pil", "np", "pt"]
Picture = Image.Image | np.ndarray | Tensor
OnStepEnd = Callable[["InpaintPipeline", int, float, dict[str, Any]], Any]


@dataclass(frozen=True)
class InpaintOutput:
    """images: num_images_per_prompt for each picture, those of the first picture first. disagreement: for each picture how far
    its samples lie apart, (H, W) float32, their standard deviation as a mean over colours; zeros if there is one sample."""

    images: Any
    disagreement: list[np.ndarray]


def _original(image: Picture, channels: int) -> Original:
    """A picture as a user gives it to a model of so many channels: Pillow's, (H, W) or (H, W, C) of numpy, (C, H, W) of
    torch."""
    if isinstance(image, Image.Image):
        return from_pillow(image)
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"image is a tensor of {tuple(image.shape)}; give (C, H, W), or (B, C, H, W) for several.")
        image = image.detach().cpu().movedim(0, -1)
        image = (image.float() if image.is_floating_point() else image).numpy()  # numpy has no bfloat16
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        given = f"an array of {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise ValueError(f"image is {given}; give a Pillow picture, an array (H, W, C), or a tensor (C, H, W).")
    if image.dtype not in (np.uint8, np.uint16):
        if not np.issubdtype(image.dtype, np.floating):
            raise ValueError(f"image is of {image.dtype}; give uint8, uint16, or floats between 0 and 1.")
        image = image.astype(np.float32)
        if not (image.size and image.min() >= 0 and image.max() <= 1):  # so that NaN is refused too
            raise ValueError("image has values outside 0 to 1. Divide by its largest possible value, or give uint8.")
    values = image[:, :, None] if image.ndim == 2 else image
    return Original(values[None], values.shape[-1] in (2, 4) and values.shape[-1] != channels)


def _hole(mask: Picture, size: tuple[int, int]) -> Tensor:
    """A mask as a user gives it, as (1, H, W) bool: at least half white is True."""
    if isinstance(mask, Image.Image):
        hole = hole_of(mask, "mask_image")
    else:
        if isinstance(mask, Tensor):
            mask = (mask.float() if mask.is_floating_point() else mask).detach().cpu()  # numpy has no bfloat16
        values = np.asarray(mask)
        values = values.squeeze(tuple(i for i, n in enumerate(values.shape) if n == 1 and values.ndim - i > 2))
        values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
        if values.dtype == np.uint8 and values.ndim == 2:
            hole = hole_of(Image.fromarray(values), "mask_image")
        elif values.dtype.kind in "buif" and values.size and values.min() >= 0 and values.max() <= 1:
            hole = values >= 0.5
        else:
            raise ValueError(
                f"mask_image is {values.shape} of {values.dtype}; give (H, W) from 0 to 1, where 1 is repainted, uint8 up to "
                "255, or a Pillow picture."
            )
    if hole.shape != size:
        raise ValueError(
            f"mask_image is {hole.shape} for a picture of {size} (height, width). Make them the same size."
        )
    return torch.from_numpy(np.ascontiguousarray(hole))[None]


def _several(images: Any) -> list[Any]:
    """A list of pictures from one picture or several."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        return list(images)
    return [images]


class InpaintPipeline:
    """Repaint what a mask says, white = repaint, in pictures of any size; pixels outside it equal the input bit for bit.

        pipe = InpaintPipeline.from_pretrained("runs/photos")
        pipe(image=Image.open("holiday.jpg"), mask_image=Image.open("hole.png")).images[0].save("painted.png")

    There is no prompt: what is painted follows from the picture.
    """

    def __init__(self, model: MaskedDiffusionAutoencoder) -> None:
        self.model = model.eval()

    @classmethod
    def from_pretrained(cls, run: str | Path, device: str | None = None) -> "InpaintPipeline":
        """The model of a run directory or a .safetensors file, on a device: cuda if there is one, otherwise the CPU."""
        return cls(load_model(Path(run), pick_device(device))[0])

    def to(self, device: torch.device | str) -> "InpaintPipeline":
        self.model.to(device)
        return self

    def __call__(
        self,
        image: Picture | Sequence[Picture],
        mask_image: Picture | Sequence[Picture],
        num_inference_steps: int = 20,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        *,
        sampler: Sampler | None = None,
        smooth_share: float = SMOOTH_SHARE,
        context: float = 0.5,
        max_scale: float = 4.0,
        feather: int = 0,
    ) -> InpaintOutput | tuple[Any]:
        """Repaint.

        Args:
            image: a Pillow picture, an array (H, W, C) or a tensor (C, H, W); a list of them, (B, H, W, C) or (B, C, H, W).
                uint8, uint16, or floats between 0 and 1. A fourth channel is alpha; what is painted becomes opaque.
            mask_image: as large as its picture, at least half white where it is to be repainted; one for all, or one each.
            num_inference_steps: of the sampler.
            num_images_per_prompt: samples for each picture.
            generator: the noise follows from its state, which moves on; one for all pictures or one each. Without, torch's
                global one.
            output_type: "pil", Pillow pictures of the input's mode, of 8 bits for colours that are floats; "np",
                (N, H, W, C), or "pt", (N, C, H, W), float32 in [0, 1], which times 255 or 65535 is the input outside the mask.
                Pictures of several sizes come as a list.
            return_dict: an `InpaintOutput`; otherwise a tuple with its images alone.
            callback_on_step_end: called as f(pipe, step, time, {"pred_original_sample": (C, H, W)}) after each step of the
                first sample of each picture, with the picture as the model then takes it to be. A picture that takes several
                windows takes so many times the steps, which are counted on. What it returns is ignored.
            sampler: "dpmpp", "ddim" or "ddpm"; without, what `unveil.pipeline.default_sampler` says: "dpmpp" for DiffMAE.
            smooth_share: patches of which a hole takes at most this share are filled smoothly in place of painted.
            context, max_scale: as in `unveil.windows.regions`.
            feather: so many pixels around each hole are painted too, and blended; 0 keeps all of them.

        Raises:
            ValueError: pictures and masks do not fit, or the model was not trained for what is asked.
        """
        check_choice("InpaintPipeline", "output_type", output_type, OutputType)
        counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        for name, number in counts.items():
            if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
                raise ValueError(f"{name}={number!r}; give a whole number, at least 1.")
        if self.model.recipe.clip.frames != 1:
            raise ValueError(f"This {self.model.recipe.name} is a model of clips. Use unveil inpaint for them.")
        channels = self.model.recipe.clip.channels
        originals = [_original(picture, channels) for picture in _several(image)]
        if not originals:
            raise ValueError("image holds no picture. Give at least one.")
        masks = _several(mask_image)
        if len(masks) not in (1, len(originals)):
            raise ValueError(f"{len(masks)} masks for {len(originals)} pictures. Give one for all, or one each.")
        masks = masks * len(originals) if len(masks) == 1 else masks
        generators = _several(generator)
        if any(not isinstance(given, torch.Generator | None) for given in generators):
            raise ValueError(f"generator={generator!r}; give a torch.Generator, as torch.Generator().manual_seed(0).")
        if len(generators) not in (1, len(originals)):
            raise ValueError(
                f"{len(generators)} generators for {len(originals)} pictures. Give one for all, or one each."
            )
        generators = generators * len(originals) if len(generators) == 1 else generators
        holes = [_hole(mask, o.pixels.shape[1:3]) for mask, o in zip(masks, originals, strict=True)]
        seen = [original.seen(channels) for original in originals]
        if output_type == "pil":
            for original in originals:
                _as_bytes(original).to_pillow()  # which refuses what Pillow cannot hold, before any work
        made: list[Original] = []
        disagreement = []
        for original, clip, hole, drawn in zip(originals, seen, holes, generators, strict=True):
            # On the generator's device, so that one of a GPU does too.
            device = "cpu" if drawn is None else drawn.device
            seed = int(torch.randint(2**62, (), generator=drawn, device=device))
            painted = paint(
                self.model,
                clip,
                hole,
                num_steps=num_inference_steps,
                sampler=sampler,
                num_samples=num_images_per_prompt,
                seed=seed,
                context=context,
                max_scale=max_scale,
                feather=feather,
                smooth_share=smooth_share,
                on_step=None if callback_on_step_end is None else self._telling(callback_on_step_end),
            )
            made += [original.painted(sample, painted.hole, painted.weights) for sample in painted.samples]
            disagreement.append(painted.disagreement()[0].numpy())
        images = _as(made, output_type)
        return InpaintOutput(images, disagreement) if return_dict else (images,)

    def _telling(self, callback: OnStepEnd) -> Callable[[float, Callable[[], Tensor]], None]:
        steps = iter(range(10**9))
        return lambda t, made: callback(self, next(steps), t, {"pred_original_sample": made()[:, 0]})


def _as_bytes(original: Original) -> Original:
    """Colours that are floats, for which Pillow has no mode, in 8 bits: those that were 8 bits over 255 are so again."""
    if original.pixels.dtype != np.float32 or original.pixels.shape[-1] == 1:
        return original
    return dataclasses.replace(original, pixels=np.rint(original.pixels * 255).astype(np.uint8))


def _as(made: list[Original], output_type: OutputType) -> Any:
    if output_type == "pil":
        return [_as_bytes(original).to_pillow() for original in made]
    arrays = [original.pixels[0].astype(np.float32) / original.top for original in made]
    if output_type == "pt":
        tensors = [torch.from_numpy(array).movedim(-1, 0) for array in arrays]
        return torch.stack(tensors) if len({t.shape for t in tensors}) == 1 else tensors
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays
