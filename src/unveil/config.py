"""What a model is and how it is trained, as frozen plain values.

These are the sections of a `Recipe` (`unveil.recipe`). A value that cannot work is refused when it is written down, not
when it is run.
"""

import difflib
import math
import typing
from dataclasses import dataclass
from typing import Literal

NoiseOn = Literal["none", "hidden", "visible"]
Predict = Literal["x0", "eps", "noisy", "variance"]
Where = Literal["visible", "hidden"]
Space = Literal["plain", "v"]
Masking = Literal["random", "tube", "center"]
ClassTokenInit = Literal["normal", "zeros"]
DecoderKind = Literal["joint", "cross_self", "cross"]
Summary = Literal["tokens", "mean", "own"]
Norm = Literal["layer", "layer_fixed", "rms"]
MlpKind = Literal["gelu", "gelu_tanh", "swiglu"]
Positions = Literal["sincos", "learned", "separable", "rotary"]
HeadInit = Literal["xavier", "normal", "zeros"]
TimeKind = Literal["none", "add", "token", "adaln"]
Trunk = Literal["plain", "wide"]
ScheduleKind = Literal["linear", "cosine", "flow"]
LrSchedule = Literal["cosine", "constant"]


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

    mean and std normalise values, one number per channel. bounded: the values are pixels in [0, 1], and predictions are kept
    there; otherwise they are whatever an autoencoder made (latents), and nothing is cut off.
    """

    channels: int
    frames: int = 1
    height: int
    width: int
    patch_size: int
    tubelet_size: int = 1
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bounded: bool = True

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
    """A ViT over the tokens that it is given.

    num_class_tokens: tokens of its own that go along, without a position.
    class_token_init: "zeros" starts them equal, and then nothing can ever tell several of them apart.
    """

    embed_dim: int
    depth: int
    num_heads: int
    num_class_tokens: int = 1
    class_token_init: ClassTokenInit = "normal"

    def __post_init__(self) -> None:
        check_choice("Encoder", "class_token_init", self.class_token_init, ClassTokenInit)
        _check_width("Encoder", self.embed_dim, self.num_heads, self.depth)
        if self.num_class_tokens < 0:
            raise ValueError(f"Encoder has num_class_tokens={self.num_class_tokens}; it is a count, at least 0.")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What predicts tokens from the encoder's output.

    taps: which encoder blocks the decoder's blocks read, counted from 1, deepest first. `joint` reads the last only;
        `cross` and `cross_self` have one for each decoder block.
    summary: how the class tokens enter a joint decoder: as "tokens" of their own, or their "mean" as one; or not at all, for
        the decoder has its "own".
    """

    kind: DecoderKind
    embed_dim: int
    depth: int
    num_heads: int
    taps: tuple[int, ...]
    summary: Summary = "tokens"

    def __post_init__(self) -> None:
        check_choice("Decoder", "kind", self.kind, DecoderKind)
        check_choice("Decoder", "summary", self.summary, Summary)
        _check_width("Decoder", self.embed_dim, self.num_heads, self.depth)
        wanted = 1 if self.kind == "joint" else self.depth
        if len(self.taps) != wanted:
            raise ValueError(
                f"Decoder kind={self.kind!r} with depth={self.depth} reads {wanted} encoder block(s), but taps={self.taps}."
            )
        if list(self.taps) != sorted(self.taps, reverse=True):
            raise ValueError(f"Decoder has taps={self.taps}; write them deepest first.")
        if self.summary != "tokens" and self.kind != "joint":
            raise ValueError(
                f"Decoder has summary={self.summary!r} with kind={self.kind!r}, which reads the encoder's tokens as they are. "
                "Use summary='tokens', or kind='joint'."
            )


@dataclass(frozen=True, kw_only=True)
class Network:
    """How every block is built, in encoder and decoder alike.

    norm: LayerNorm, LayerNorm without parameters, or RMSNorm.
    norm_eps: what a norm adds to the variance. 1e-6 in MAE, DiT, UMD and timm; Hugging Face's ViTs have 1e-12, which
        converted weights keep.
    qk_norm: normalise queries and keys of every head.
    positions: fixed sin-cos; learned; learned as a table of places plus one of times ("separable"); or sin-cos at the input
        and a rotation of queries and keys in every block.
    head_init: of the Linear maps that make the predictions.
    """

    norm: Norm = "layer"
    norm_eps: float = 1e-6
    mlp: MlpKind = "gelu"
    qk_norm: bool = False
    positions: Positions = "sincos"
    head_init: HeadInit = "xavier"

    def __post_init__(self) -> None:
        check_choice("Network", "norm", self.norm, Norm)
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"Network has norm_eps={self.norm_eps}; it must be above 0, and below 1.")
        check_choice("Network", "mlp", self.mlp, MlpKind)
        check_choice("Network", "positions", self.positions, Positions)
        check_choice("Network", "head_init", self.head_init, HeadInit)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How the network is told the time, and the class if it has classes.

    time: not at all; added to the tokens once; as one more token in every block; or by shifting, scaling and gating
        every block (adaLN-zero).
    trunk: "plain", a sinusoid of 256 and one hidden layer of the width, classes by a table (DiT); "wide", a sinusoid of
        the width and a hidden layer of twice the width, the same again behind the table of classes (UMD).
    num_classes: 0 for a model without classes. One more row stands for "no class".
    label_tokens, label_tokens_from: with classes, this many tokens that carry the class join the encoder at that block,
        counted from 1.
    """

    time: TimeKind = "none"
    trunk: Trunk = "plain"
    num_classes: int = 0
    label_tokens: int = 0
    label_tokens_from: int = 1

    def __post_init__(self) -> None:
        check_choice("Condition", "time", self.time, TimeKind)
        check_choice("Condition", "trunk", self.trunk, Trunk)
        if self.num_classes < 0 or self.label_tokens < 0:
            raise ValueError(
                f"Condition has num_classes={self.num_classes} and label_tokens={self.label_tokens}; both are counts."
            )
        if self.num_classes and self.time == "none":
            raise ValueError(
                f"Condition has num_classes={self.num_classes} with time='none', so a class could not enter. "
                "Use time='add', 'token' or 'adaln'."
            )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How fast a clip turns into noise.

    linear, cosine: 1,000 steps whose betas are raised to the power rho. flow: a straight line from clip to noise.
    """

    kind: ScheduleKind
    rho: float = 1.0

    def __post_init__(self) -> None:
        check_choice("Schedule", "kind", self.kind, ScheduleKind)
        if not 0 < self.rho <= 2:
            raise ValueError(
                f"Schedule has rho={self.rho}; it must be above 0 (where every step is pure noise) and at most 2."
            )
        if self.kind == "flow" and self.rho != 1:
            raise ValueError(f"Schedule has rho={self.rho} with kind='flow', which has no betas. Use rho=1.")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One thing that is predicted: what, for which tokens, and how much it counts.

    predict: "x0", clean values; "eps", the noise; "noisy", the values x_t that a hidden token would have shown;
        "variance", the sampler's own, trained by the bound of Nichol & Dhariwal 2021.
    patch_norm: score after normalising each patch by its own mean and standard deviation.
    space: "v" measures an x0 as the velocity it implies, which weighs it by 1 / max(sigma, 0.05)^2.
    """

    predict: Predict
    on: Where
    weight: float = 1.0
    patch_norm: bool = False
    space: Space = "plain"

    def __post_init__(self) -> None:
        check_choice("Term", "predict", self.predict, Predict)
        check_choice("Term", "on", self.on, Where)
        check_choice("Term", "space", self.space, Space)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"Term has weight={self.weight}; it must be a number above 0.")
        if self.patch_norm and self.predict not in ("x0", "noisy"):
            raise ValueError(f"Term has patch_norm=True with predict={self.predict!r}; only values of a clip have it.")
        if self.space == "v" and self.predict != "x0":
            raise ValueError(f"Term has space='v' with predict={self.predict!r}. Use predict='x0', or space='plain'.")


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A share of the clips: what is hidden, who carries the noise, and what is predicted.

    share: of the clips of every batch, in (0, 1].
    mask_ratio: share of the tokens that is hidden, in [0, 1].
    noise_on: "none", the hidden tokens become mask tokens (MAE); "hidden", the decoder is handed the noisy hidden
        tokens (DiffMAE); "visible", the encoder sees noisy tokens, and the hidden ones become mask tokens (DiT, UMD).
    num_draws: with noise on hidden tokens, how many times and noises each encoded clip is decoded for.
    decode_share: of the hidden tokens, how many are decoded, others in each draw; by a `cross` decoder, whose tokens do not see
        each other.
    """

    share: float = 1.0
    mask_ratio: float
    masking: Masking = "random"
    noise_on: NoiseOn
    num_draws: int = 1
    decode_share: float = 1.0
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        check_choice("Branch", "masking", self.masking, Masking)
        check_choice("Branch", "noise_on", self.noise_on, NoiseOn)
        if not 0 < self.share <= 1:
            raise ValueError(f"Branch has share={self.share}; it is a share of the clips, above 0 and at most 1.")
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"Branch has mask_ratio={self.mask_ratio}; it is a share, between 0 and 1.")
        if self.num_draws < 1 or not 0 < self.decode_share <= 1:
            raise ValueError(
                f"Branch has num_draws={self.num_draws} and decode_share={self.decode_share}; draws are at least 1, and the "
                "share is above 0 and at most 1."
            )
        if (self.num_draws > 1 or self.decode_share < 1) and self.noise_on != "hidden":
            raise ValueError(
                f"Branch has num_draws={self.num_draws} and decode_share={self.decode_share} with noise_on={self.noise_on!r}: "
                "only a decoder of noisy hidden tokens has several noises of one clip to decode. Use 1 and 1."
            )
        keys = [(term.predict, term.on) for term in self.terms]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(f"Branch has the terms {keys}; give at least one, and none twice.")
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
        if self.noise_on == "visible" and self.mask_ratio == 1:
            raise ValueError(
                "Branch has mask_ratio=1 with noise_on='visible': no token is left to carry the noise. Use mask_ratio < 1."
            )
        for term in self.terms:
            self._check(term)

    def _check(self, term: Term) -> None:
        what = f"Branch predicts {term.predict!r} on {term.on} tokens with noise_on={self.noise_on!r}"
        if term.on == "hidden" and self.mask_ratio == 0:
            raise ValueError(f"{what} and mask_ratio=0: nothing is hidden. Use on='visible', or mask_ratio > 0.")
        if term.on == "visible" and self.noise_on != "visible":
            raise ValueError(f"{what}: the encoder sees these tokens as they are. Use on='hidden'.")
        carries = term.on == self.noise_on
        if (term.predict in ("eps", "variance") or term.space == "v") and not carries:
            raise ValueError(f"{what}: there is no noise on them to predict or to measure by. Use predict='x0'.")
        if term.predict == "noisy" and (carries or self.noise_on != "visible"):
            raise ValueError(
                f"{what}: noisy values are a target for hidden tokens of a clip whose visible ones carry noise."
            )
        if term.predict == "variance" and "eps" not in {other.predict for other in self.terms}:
            raise ValueError(f"{what}, but not 'eps', whose error the variance describes. Add that term.")
        if term.patch_norm and term.predict == "x0" and self.noise_on != "none":
            raise ValueError(
                f"{what} and patch_norm=True: a patch-normalised prediction cannot be put back at a noise level, so it could "
                "not be sampled. Use patch_norm=False."
            )


@dataclass(frozen=True, kw_only=True)
class Training:
    """The optimiser's numbers. lr = base_lr * batch_size / 256; epochs may be cut short by hand at any time.

    beta2, weight_decay: of AdamW; beta1 is 0.9. decay_norms: whether the scales of norms decay like matrices.
    grad_clip: largest norm of the gradient; None for no limit.
    crop_scale: smallest share of a picture's area that a random crop keeps; 1 means the whole picture, uncropped.
    label_dropout: share of the labels that is replaced by "no class", which is what guidance needs.
    ema_decays: running averages of the weights that are kept; the first is what is saved for use.
    """

    epochs: int
    batch_size: int
    base_lr: float
    warmup_epochs: float
    lr_schedule: LrSchedule = "cosine"
    beta2: float = 0.95
    weight_decay: float = 0.05
    decay_norms: bool = False
    grad_clip: float | None = None
    crop_scale: float = 0.2
    flip: bool = True
    label_dropout: float = 0.0
    ema_decays: tuple[float, ...] = (0.9999,)

    def __post_init__(self) -> None:
        check_choice("Training", "lr_schedule", self.lr_schedule, LrSchedule)
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
        for name in ("beta2", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Training has {name}={getattr(self, name)}; it must be at least 0 and below 1.")
        if not all(0 <= decay < 1 for decay in self.ema_decays) or len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(
                f"Training has ema_decays={self.ema_decays}; each must be at least 0 and below 1, and none come twice."
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"Training has weight_decay={self.weight_decay}; it must be a number, at least 0.")
        if self.grad_clip is not None and not 0 < self.grad_clip < math.inf:
            raise ValueError(f"Training has grad_clip={self.grad_clip}; it must be a number above 0, or None.")
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(f"Training has warmup_epochs={self.warmup_epochs}; it must be a number, at least 0.")

    @property
    def lr(self) -> float:
        return self.base_lr * self.batch_size / 256
