"""What a model is and how it is trained, as frozen plain values.

A `Recipe` is the whole description: it is saved beside the weights as JSON and builds the same model again. Users take
one from `unveil.recipes` and replace fields; nobody spells a method out. A combination that cannot work is refused
when it is written down, not when it is run.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

NoiseOn = Literal["none", "hidden", "visible"]
Target = Literal["x0", "eps"]
Masking = Literal["random", "tube", "center"]
DecoderKind = Literal["joint", "cross_self", "cross"]
ScheduleKind = Literal["linear", "cosine"]


def nearest(word: str, words: typing.Iterable[str]) -> str:
    """The end of an error message: which of `words` was probably meant, and otherwise all of them."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Choose from {', '.join(words)}."


def check_choice(owner: str, name: str, value: object, allowed: typing.Any) -> None:
    """Refuse a value that is not one of a `Literal`'s words."""
    words = typing.get_args(allowed)
    if value not in words:
        raise ValueError(f"{owner} has {name}={value!r}, which does not exist. {nearest(str(value), words)}")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What one sample looks like: (channels, frames, height, width); an image is a clip of one frame.

    mean and std normalise values in [0, 1], one number per channel.
    """

    channels: int
    frames: int = 1
    height: int
    width: int
    patch_size: int
    tubelet_size: int = 1
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("channels", "frames", "height", "width", "patch_size", "tubelet_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Clip has {name}={getattr(self, name)}; it must be at least 1.")
        for name, size in (("height", self.height), ("width", self.width)):
            if size % self.patch_size:
                below = size // self.patch_size * self.patch_size
                near = [str(s) for s in (below, below + self.patch_size) if s]
                raise ValueError(
                    f"Clip has {name}={size}, which patch_size={self.patch_size} does not divide. "
                    f"Use {' or '.join(near)}, or another patch size."
                )
        if self.frames % self.tubelet_size:
            raise ValueError(
                f"Clip has frames={self.frames}, which tubelet_size={self.tubelet_size} does not divide. "
                f"Use a multiple of {self.tubelet_size}, or another tubelet size."
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f"Clip has {len(getattr(self, name))} values of {name} for {self.channels} channels; give one for each."
                )
        if min(self.std) <= 0:
            raise ValueError(f"Clip has std={self.std}; every value must be above 0.")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return self.frames // self.tubelet_size, self.height // self.patch_size, self.width // self.patch_size

    @property
    def num_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def token_dim(self) -> int:
        """Values in one token (P): tubelet * patch * patch * channels."""
        return self.tubelet_size * self.patch_size**2 * self.channels


def _check_width(owner: str, embed_dim: int, num_heads: int, depth: int) -> None:
    if depth < 1 or num_heads < 1:
        raise ValueError(f"{owner} has depth={depth} and num_heads={num_heads}; both must be at least 1.")
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(
            f"{owner} has embed_dim={embed_dim}; sin-cos positions in two directions need a multiple of 4."
        )
    if embed_dim % num_heads:
        raise ValueError(f"{owner} has embed_dim={embed_dim}, which num_heads={num_heads} does not divide.")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A ViT with a class token over the tokens that it is given."""

    embed_dim: int
    depth: int
    num_heads: int

    def __post_init__(self) -> None:
        _check_width("Encoder", self.embed_dim, self.num_heads, self.depth)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What predicts the hidden tokens from the encoder's output.

    taps: which encoder blocks the decoder's blocks read, counted from 1, deepest first. `joint` reads the last only;
        `cross` and `cross_self` have one for each decoder block.
    """

    kind: DecoderKind
    embed_dim: int
    depth: int
    num_heads: int
    taps: tuple[int, ...]

    def __post_init__(self) -> None:
        check_choice("Decoder", "kind", self.kind, DecoderKind)
        _check_width("Decoder", self.embed_dim, self.num_heads, self.depth)
        wanted = 1 if self.kind == "joint" else self.depth
        if len(self.taps) != wanted:
            raise ValueError(
                f"Decoder kind={self.kind!r} with depth={self.depth} reads {wanted} encoder block(s), but taps={self.taps}."
            )
        if list(self.taps) != sorted(self.taps, reverse=True):
            raise ValueError(f"Decoder has taps={self.taps}; write them deepest first.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How fast a clip turns into noise over 1,000 steps; every beta is raised to the power rho."""

    kind: ScheduleKind
    rho: float = 1.0

    def __post_init__(self) -> None:
        check_choice("Schedule", "kind", self.kind, ScheduleKind)
        if not 0 < self.rho <= 2:
            raise ValueError(
                f"Schedule has rho={self.rho}; it must be above 0 (where every step is pure noise) and at most 2."
            )


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What is hidden, who carries the noise, and what is predicted.

    mask_ratio: share of the tokens that is hidden, in [0, 1].
    noise_on: "none", the hidden tokens become mask tokens (MAE); "hidden", the decoder is handed the noisy hidden
        tokens (DiffMAE); "visible", the encoder sees noisy tokens.
    target: what is predicted for every scored token: clean values or the noise.
    patch_norm: score x0 after normalising each patch by its own mean and standard deviation.
    """

    mask_ratio: float
    masking: Masking = "random"
    noise_on: NoiseOn
    target: Target = "x0"
    patch_norm: bool = False

    def __post_init__(self) -> None:
        check_choice("Branch", "masking", self.masking, Masking)
        check_choice("Branch", "noise_on", self.noise_on, NoiseOn)
        check_choice("Branch", "target", self.target, Target)
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"Branch has mask_ratio={self.mask_ratio}; it is a share, between 0 and 1.")
        if self.target == "eps" and self.noise_on == "none":
            raise ValueError(
                "Branch has target='eps' but noise_on='none': there is no noise to predict. Use target='x0'."
            )
        if self.patch_norm and self.noise_on != "none":
            raise ValueError(
                f"Branch has patch_norm=True with noise_on={self.noise_on!r}: a patch-normalised prediction cannot be put "
                "back at a noise level, so it could not be sampled. Use patch_norm=False."
            )
        if self.noise_on == "visible" and self.mask_ratio > 0:
            raise ValueError(
                f"Branch has noise_on='visible' with mask_ratio={self.mask_ratio}: only mask_ratio=0 is defined, where the "
                "encoder sees every token with noise. Use noise_on='hidden' to hide some."
            )
        if self.noise_on == "none" and self.mask_ratio == 1:
            raise ValueError(
                "Branch has mask_ratio=1 with noise_on='none': with nothing visible and no noise, every prediction would be "
                "the same. Use mask_ratio < 1, or noise_on='hidden'."
            )
        if self.noise_on != "visible" and self.mask_ratio == 0:
            raise ValueError(
                f"Branch has mask_ratio=0 with noise_on={self.noise_on!r}: nothing would be hidden, so nothing predicted. "
                "Use mask_ratio > 0, or noise_on='visible'."
            )


@dataclass(frozen=True, kw_only=True)
class Training:
    """The optimiser's numbers. lr = base_lr * batch_size / 256; epochs may be cut short by hand at any time.

    crop_scale: smallest share of a picture's area that a random crop keeps; 1 means the whole picture, uncropped.
    """

    epochs: int
    batch_size: int
    base_lr: float
    warmup_epochs: float
    crop_scale: float = 0.2
    flip: bool = True
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"Training has epochs={self.epochs} and batch_size={self.batch_size}; both must be at least 1."
            )
        if not 0 < self.base_lr < math.inf:
            raise ValueError(f"Training has base_lr={self.base_lr}; it must be a number above 0.")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(
                f"Training has crop_scale={self.crop_scale}; it is a share of the area, above 0 and at most 1."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"Training has ema_decay={self.ema_decay}; it must be at least 0 and below 1.")
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(f"Training has warmup_epochs={self.warmup_epochs}; it must be a number, at least 0.")

    @property
    def lr(self) -> float:
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole model and its training. `name` and `size` are labels for people; the sections decide."""

    name: str
    size: str
    clip: Clip
    encoder: Encoder
    decoder: Decoder | None
    branch: Branch
    schedule: Schedule | None
    training: Training = field(repr=False)

    def __post_init__(self) -> None:
        if (self.schedule is None) != (self.branch.noise_on == "none"):
            raise ValueError(
                f"Recipe {self.name!r} has noise_on={self.branch.noise_on!r} and schedule={self.schedule}: "
                "a schedule belongs to a recipe with noise, and only to one."
            )
        if self.decoder is None:
            if self.branch.mask_ratio > 0:
                hidden = round(self.clip.num_tokens * self.branch.mask_ratio)
                raise ValueError(
                    f"Recipe {self.name!r} has decoder=None, which returns encoder tokens only, so it cannot predict the "
                    f"{hidden} hidden of {self.clip.num_tokens} tokens. Use mask_ratio=0 or a decoder."
                )
            return
        if self.branch.mask_ratio == 0:
            raise ValueError(
                f"Recipe {self.name!r} hides nothing, so a decoder has nothing to predict. Use decoder=None."
            )
        taps = self.decoder.taps
        if taps[0] != self.encoder.depth or taps[-1] < 1:
            raise ValueError(
                f"Recipe {self.name!r} has taps={taps} of an encoder of {self.encoder.depth} blocks: the first must be "
                f"{self.encoder.depth}, so that the whole encoder is trained, and none may be below 1."
            )


def to_dict(section: Any) -> dict[str, Any]:
    """A config as plain values for JSON."""
    return dataclasses.asdict(section)


def _from_value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):  # only `Section | None` is used
        return None if value is None else _from_value(typing.get_args(kind)[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _from_dict(kind, value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is {value!r}, but it must be a list.")
        return tuple(_from_value(typing.get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = kind if isinstance(kind, type) else str
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, but it must be of type {wanted.__name__}.")
    return value


def _from_dict(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}, but it must be a section with fields.")
    kinds = typing.get_type_hints(kind)
    for name in values:
        if name not in kinds:
            raise ValueError(f"Unknown field {name!r} in {where}. {nearest(name, kinds)}")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.name not in values and required:
            raise ValueError(f"{where} lacks the field {f.name!r}.")
    return kind(**{name: _from_value(kinds[name], value, f"{where}.{name}") for name, value in values.items()})


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote, checked again. Unknown and missing fields are errors."""
    return _from_dict(Recipe, values, "Recipe")
