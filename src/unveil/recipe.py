"""A whole model and its training as one frozen value, which is saved beside the weights as JSON and builds the model again.

Users take one from `unveil.recipes` and replace fields; nobody spells a method out. Sections that do not fit each other are
refused here.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from unveil.config import (
    Branch,
    Clip,
    Condition,
    Decoder,
    Encoder,
    Network,
    NoiseOn,
    Predict,
    Schedule,
    Training,
    nearest,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole model and its training. `name` and `size` are labels for people; the sections decide."""

    name: str
    size: str
    clip: Clip
    encoder: Encoder
    decoder: Decoder | None
    network: Network = field(default_factory=Network)
    condition: Condition
    branches: tuple[Branch, ...]
    schedule: Schedule | None
    training: Training = field(repr=False)

    def __post_init__(self) -> None:
        if not self.branches or abs(sum(branch.share for branch in self.branches) - 1) > 1e-6:
            raise ValueError(
                f"Recipe {self.name!r} has branches of the shares {[b.share for b in self.branches]}; they must sum to 1."
            )
        noisy = {branch.noise_on for branch in self.branches} - {"none"}
        if len(noisy) > 1:
            raise ValueError(
                f"Recipe {self.name!r} has noise on hidden tokens in one branch and on visible ones in another, so a sampler "
                "could not know which to put it on. Use one of the two."
            )
        if (self.schedule is None) != (not noisy):
            raise ValueError(
                f"Recipe {self.name!r} has noise_on={[b.noise_on for b in self.branches]} and schedule={self.schedule}: "
                "a schedule belongs to a recipe with noise, and only to one."
            )
        if len({branch.noise_on for branch in self.branches}) < len(self.branches):
            raise ValueError(
                f"Recipe {self.name!r} has noise_on={[b.noise_on for b in self.branches]}: two branches with the same noise "
                "could not be told apart. Give them as one."
            )
        some = [branch.decode_share for branch in self.branches if branch.decode_share < 1]
        if some and (self.decoder is None or self.decoder.kind != "cross"):
            raise ValueError(
                f"Recipe {self.name!r} has decode_share={some[0]:g} with a decoder whose hidden tokens see each other, so that "
                "none can be left out. Use decoder='cross', or decode_share=1."
            )
        if noisy and self.condition.time == "none":
            raise ValueError(f"Recipe {self.name!r} has noise but time='none'. Use time='add', 'token' or 'adaln'.")
        if not noisy and self.condition.time == "add":
            raise ValueError(
                f"Recipe {self.name!r} has time='add' but no noise, so there is no time to add. Use time='none', or 'token' or "
                "'adaln', whose blocks are then told that everything is clean."
            )
        if noisy == {"hidden"} and self.condition.time in ("token", "adaln"):
            raise ValueError(
                f"Recipe {self.name!r} has time={self.condition.time!r} with noise on hidden tokens: its encoder runs once for "
                "all times, so it cannot be told one. Use time='add'."
            )
        if not noisy and self.condition.num_classes:
            raise ValueError(
                f"Recipe {self.name!r} has num_classes={self.condition.num_classes}, but no noise: clean clips are never "
                "labelled, so the classes would not be learned. Use num_classes=0."
            )
        if self.condition.label_tokens and not self.time_in_encoder:
            raise ValueError(
                f"Recipe {self.name!r} has label_tokens={self.condition.label_tokens}, but an encoder that is not told the "
                "class. Use label_tokens=0."
            )
        if self.schedule is not None and self.schedule.kind == "flow":
            for head, why in (("variance", "steps have none"), ("eps", "last time has no clean value to tell it from")):
                if head in self.heads:
                    raise ValueError(
                        f"Recipe {self.name!r} predicts {head!r} on a flow, whose {why}. Use kind='linear' or 'cosine', or "
                        "predict x0."
                    )
        if self.condition.label_tokens_from not in range(1, self.encoder.depth + 1):
            raise ValueError(
                f"Recipe {self.name!r} has label_tokens_from={self.condition.label_tokens_from} of {self.encoder.depth} "
                f"encoder blocks. Use 1 to {self.encoder.depth}."
            )
        if self.network.positions == "rotary" and any(
            part.embed_dim // part.num_heads % 4 for part in (self.encoder, self.decoder) if part
        ):
            raise ValueError(
                f"Recipe {self.name!r} has positions='rotary', which needs a multiple of 4 values in each head. "
                "Use another width or number of heads."
            )
        if self.decoder is None:
            hides = max(branch.mask_ratio for branch in self.branches)
            if hides > 0:
                raise ValueError(
                    f"Recipe {self.name!r} has decoder=None, which returns encoder tokens only, so it cannot predict the "
                    f"{round(self.clip.num_tokens * hides)} hidden of {self.clip.num_tokens} tokens. Use mask_ratio=0 or a "
                    "decoder."
                )
            return
        self._check_decoder(self.decoder)

    def _check_decoder(self, decoder: Decoder) -> None:
        if decoder.taps[0] != self.encoder.depth or decoder.taps[-1] < 1:
            raise ValueError(
                f"Recipe {self.name!r} has taps={decoder.taps} of an encoder of {self.encoder.depth} blocks: the first must be "
                f"{self.encoder.depth}, so that the whole encoder is trained, and none may be below 1."
            )
        if decoder.summary == "mean" and not self.encoder.num_class_tokens:
            raise ValueError(
                f"Recipe {self.name!r} has summary='mean', but its encoder has no class tokens to take the mean of. "
                "Use summary='tokens'."
            )
        time = self.condition.time
        if decoder.kind != "joint":
            plain = (
                dataclasses.replace(self.network, norm_eps=1e-6, positions="sincos", head_init="xavier") == Network()
            )
            if not plain or self.network.positions == "rotary" or time in ("token", "adaln"):
                raise ValueError(
                    f"Recipe {self.name!r} has kind={decoder.kind!r} with time={time!r} and {self.network}: decoders that "
                    "cross are built of plain ViT blocks. Use kind='joint', or time='add' and the default network."
                )
            if any(branch.noise_on == "visible" for branch in self.branches):
                raise ValueError(
                    f"Recipe {self.name!r} has kind={decoder.kind!r} with noise_on='visible': decoders that cross return "
                    "hidden tokens only. Use kind='joint'."
                )
        shared = time == "token" or (time == "add" and self.time_in_encoder)
        if shared and decoder.embed_dim != self.encoder.embed_dim:
            raise ValueError(
                f"Recipe {self.name!r} has time={time!r} in an encoder of embed_dim={self.encoder.embed_dim} and a decoder of "
                f"{decoder.embed_dim}; the time has one width. Use equal widths, or time='adaln'."
            )

    @property
    def noise_on(self) -> NoiseOn:
        """Who carries the noise, in the branches that have any."""
        carriers: list[NoiseOn] = [branch.noise_on for branch in self.branches if branch.noise_on != "none"]
        return carriers[0] if carriers else "none"

    @property
    def time_in_encoder(self) -> bool:
        """Whether the encoder is told the time: if it can be given noise, or if every block is told."""
        return self.condition.time in ("token", "adaln") or self.noise_on == "visible"

    @property
    def heads(self) -> tuple[Predict, ...]:
        """What is predicted by any branch, in a fixed order."""
        used = {term.predict for branch in self.branches for term in branch.terms}
        return tuple(word for word in typing.get_args(Predict) if word in used)

    @property
    def samplers_heads(self) -> tuple[Predict, ...]:
        """The predictions that a sampler can go by, the usual one first: made for tokens that carry noise."""
        terms = [term for branch in self.branches for term in branch.terms if term.on == branch.noise_on]
        return tuple(dict.fromkeys(term.predict for term in terms if term.predict in ("x0", "eps")))

    def branch_on(self, noise_on: NoiseOn) -> Branch | None:
        """The branch with that noise, if there is one."""
        return next((branch for branch in self.branches if branch.noise_on == noise_on), None)

    @property
    def reconstructs(self) -> bool:
        """Whether hidden tokens of a clean clip are predicted in one step, as pixels."""
        branch = self.branch_on("none")
        return branch is not None and any(t.predict == "x0" and not t.patch_norm for t in branch.terms)


Section = typing.TypeVar("Section")


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


def section_from_dict(kind: type[Section], values: dict[str, Any]) -> Section:
    """The section that `to_dict` wrote, checked again. Unknown and missing fields are errors."""
    return _from_dict(kind, values, kind.__name__)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote, checked again. Unknown and missing fields are errors."""
    return section_from_dict(Recipe, values)
