"""The model: one encoder, one decoder, one head, and what they can do: encode, predict, denoise, reconstruct."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unveil.config import Predict
from unveil.decoder import Context, Decoder
from unveil.encoder import Encoder
from unveil.layers import Condition, Head
from unveil.masking import Mask, gather
from unveil.recipe import Recipe
from unveil.schedule import add_noise, make_schedule, x0_from_eps
from unveil.tokens import patchify, unpatchify

Noise = Callable[[Tensor], Tensor]
Guidance = Callable[[float], float]
Predictions = dict[str, dict[str, Tensor]]


class Backbone(nn.Module):
    """The part of a model that sees a clip: its normalisation, what tells it time and class, and the encoder.

    Clips are (B, C, T, H, W), in [0, 1] if they are bounded; tokens are normalised.

    Attributes:
        recipe: the whole config.
        schedule: of the noise; None for a model without noise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Recipe, *, final_norm: bool, told: bool, drop_path: float = 0.0) -> None:
        """final_norm: whether the encoder ends with one; told: whether anything here is told time and class."""
        super().__init__()
        self.recipe = recipe
        clip, e, d, net, condition = recipe.clip, recipe.encoder, recipe.decoder, recipe.network, recipe.condition
        self.schedule = make_schedule(recipe.schedule.kind, recipe.schedule.rho) if recipe.schedule else None
        self.condition = None
        if told:
            self.condition = Condition(
                e.embed_dim if recipe.time_in_encoder or d is None else d.embed_dim,
                wide=condition.trunk == "wide",
                num_classes=condition.num_classes,
                num_label_tokens=condition.label_tokens,
                activate=condition.time == "adaln",
            )
        self.encoder = Encoder(
            grid=clip.grid,
            token_dim=clip.token_dim,
            embed_dim=e.embed_dim,
            depth=e.depth,
            num_heads=e.num_heads,
            num_class_tokens=e.num_class_tokens,
            class_token_init=e.class_token_init,
            norm=net.norm,
            norm_eps=net.norm_eps,
            mlp=net.mlp,
            qk_norm=net.qk_norm,
            positions=net.positions,
            time=condition.time if recipe.time_in_encoder else "none",
            final_norm=final_norm,
            label_tokens_from=condition.label_tokens_from,
            drop_path=drop_path,
        )
        mean, std = torch.tensor(clip.mean), torch.tensor(clip.std)
        self.register_buffer("mean", mean.reshape(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.reshape(-1, 1, 1, 1), persistent=False)

    def tokens(self, clip: Tensor) -> Tensor:
        """Normalise and patchify: (B, C, T, H, W) to (B, N, P)."""
        sizes = self.recipe.clip
        expected = (sizes.channels, sizes.frames, sizes.height, sizes.width)
        if tuple(clip.shape[1:]) != expected:
            raise ValueError(
                f"A clip of (channels, frames, height, width) = {tuple(clip.shape[1:])} came to a model of {expected}. "
                "Resize or convert it first, or build the model for that size."
            )
        if not clip.is_floating_point():
            raise ValueError(
                f"A clip of {clip.dtype} came to a model of numbers in [0, 1]. Divide 8-bit pixels by 255 first."
            )
        clip = clip.to(self.mean.dtype)
        return patchify((clip - self.mean) / self.std, sizes.patch_size, sizes.tubelet_size)

    def _told(self, t: Tensor | None, labels: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The condition (B, D), and the class as tokens; None where there is none. t = None is clean."""
        if self.condition is None:
            return None, None
        if t is None or self.schedule is None:
            t = torch.zeros(x.shape[0], device=x.device)
        else:
            t = self.schedule.network_time(t)
        return self.condition(t, labels)

    def _encode(
        self, x: Tensor, visible: Tensor, taps: Sequence[int], t: Tensor | None, labels: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        cond, label_tokens = self._told(t, labels, x)
        in_encoder = self.recipe.time_in_encoder
        memory = self.encoder(x, visible, taps, cond if in_encoder else None, label_tokens if in_encoder else None)
        return memory, cond

    def encode(self, clip: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Features of whole clips: (B, C, T, H, W) to (B, R + N, D), class tokens first. Never masks.

        Args:
            t, noise: to look at a noisy version, as models that never saw a clean clip want it: times (B,), and standard
                normal values (B, N, P). Without them the clip is clean, t = 0.

        Raises:
            ValueError: noise for a model whose encoder never saw any.
        """
        x = self.tokens(clip)
        if t is not None:
            if self.recipe.noise_on != "visible" or self.schedule is None:
                raise ValueError(
                    f"The encoder of this {self.recipe.name} sees clean clips only, so it has no features at t > 0. Use t = 0."
                )
            assert noise is not None
            x = add_noise(x, noise, *self.schedule.rates(t))
        everything = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)  # len() would fix a graph's batch
        (encoded,), _ = self._encode(x, everything, (self.recipe.encoder.depth,), t, None)
        return encoded


class EncoderOnly(Backbone):
    """The encoder of a recipe without decoder and head, which it is not asked for: `encode` is all that it can do.

    Raises:
        ValueError: the encoder is told the time, or has its last norm in the head.
    """

    parts = ("encoder",)
    can = frozenset({"represent"})

    def __init__(self, recipe: Recipe) -> None:
        if recipe.decoder is None or recipe.time_in_encoder:
            raise ValueError(
                f"The encoder of this {recipe.name} computes nothing without the model's other parts, which tell it the time "
                "or hold its last norm. Take the whole model."
            )
        super().__init__(recipe, final_norm=True, told=False)


class MaskedDiffusionAutoencoder(Backbone):
    """What a `Recipe` describes.

    Attributes:
        parts: () for all of them.
        low, high: the range of each value of a token, (P,): the normalised 0 and 1; of unbounded clips, infinite.
    """

    parts = ()
    low: Tensor
    high: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, final_norm=recipe.decoder is not None, told=recipe.condition.time != "none")
        clip, e, d, net, told = recipe.clip, recipe.encoder, recipe.decoder, recipe.network, recipe.condition
        cond_dim = 0
        if told.time != "none":
            cond_dim = e.embed_dim if recipe.time_in_encoder or d is None else d.embed_dim
        self.taps = d.taps if d else (e.depth,)
        self.decoder = None
        if d is not None:
            self.decoder = Decoder(
                kind=d.kind,
                grid=clip.grid,
                token_dim=clip.token_dim,
                memory_dim=e.embed_dim,
                embed_dim=d.embed_dim,
                depth=d.depth,
                num_heads=d.num_heads,
                num_taps=len(d.taps),
                noisy=recipe.noise_on == "hidden",
                masked=any(branch.noise_on != "hidden" for branch in recipe.branches),
                num_class_tokens=e.num_class_tokens,
                summary=d.summary,
                norm=net.norm,
                norm_eps=net.norm_eps,
                mlp=net.mlp,
                qk_norm=net.qk_norm,
                positions=net.positions,
                time=told.time,
                cond_dim=cond_dim,
            )
        self.head = Head(
            d.embed_dim if d else e.embed_dim,
            clip.token_dim,
            recipe.heads,
            norm=net.norm,
            norm_eps=net.norm_eps,
            init=net.head_init,
            cond_dim=cond_dim if told.time == "adaln" else None,
        )
        repeats = clip.token_dim // clip.channels  # the channel is the fastest index inside a token
        low, high = (0.0, 1.0) if clip.bounded else (-torch.inf, torch.inf)
        mean, std = self.mean.flatten(), self.std.flatten()
        self.register_buffer("low", ((low - mean) / std).repeat(repeats), persistent=False)
        self.register_buffer("high", ((high - mean) / std).repeat(repeats), persistent=False)

    @property
    def can(self) -> frozenset[str]:
        """What this model was trained for: "represent", and perhaps "repaint" or "generate"."""
        recipe = self.recipe
        noisy = recipe.branch_on("hidden")
        abilities = {"represent"}
        if recipe.noise_on == "visible" or (noisy and noisy.mask_ratio == 1):
            abilities.add("generate")
        if recipe.noise_on == "visible" or (noisy and noisy.mask_ratio < 1) or recipe.reconstructs:
            abilities.add("repaint")
        return frozenset(abilities)

    def pixels(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`; not clamped."""
        sizes = self.recipe.clip
        return unpatchify(tokens, sizes.grid, sizes.patch_size, sizes.tubelet_size) * self.std + self.mean

    def clips(self, tokens: Tensor) -> Tensor:
        """Predicted tokens (B, N, P) as clips, cut to [0, 1] if these are bounded."""
        pixels = self.pixels(tokens)
        return pixels.clamp(0, 1) if self.recipe.clip.bounded else pixels

    def encode(self, clip: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        encoded = super().encode(clip, t, noise)
        return encoded if self.decoder is not None else self.head.norm(encoded)

    def prepare(self, x_enc: Tensor, visible: Tensor) -> Context:
        """Encode clean visible tokens (B, V, P), for an encoder without time, and keep what the decoder needs of them."""
        assert self.decoder is not None
        return self.decoder.prepare(self.encoder(x_enc, visible, self.taps), visible)

    def forward(
        self,
        x_enc: Tensor,
        mask: Mask,
        x_dec: Tensor | None = None,
        t: Tensor | None = None,
        labels: Tensor | None = None,
        on: Sequence[str] = ("hidden",),
    ) -> Predictions:
        """Predict every head's quantity.

        Args:
            x_enc: visible tokens, (B, V, P).
            x_dec: noisy hidden tokens, (B, M, P), if the hidden ones carry noise.
            t: diffusion time, (B,); None is clean.
            labels: classes (B,), num_classes for "no class"; None for no class at all.
            on: which tokens are wanted: "visible", "hidden" or both.

        Returns:
            {where: {name: (B, V or M, P)}}.
        """
        memory, cond = self._encode(x_enc, mask.visible, self.taps, t, labels)
        if self.decoder is None:
            tokens: dict[str, Tensor | None] = {"visible": memory[0][:, self.recipe.encoder.num_class_tokens :]}
        else:
            context = self.decoder.prepare(memory, mask.visible, cond)
            visible, hidden = self.decoder(context, mask.hidden, x_dec, cond)
            tokens = {"visible": visible, "hidden": hidden}
        predictions = {}
        for where in on:
            x = tokens[where]
            assert x is not None
            predictions[where] = self.head(x, cond)
        return predictions

    def reconstruct(self, x0: Tensor, mask: Mask) -> Tensor:
        """Hidden tokens (B, M, P) of clean clips (B, N, P) in one step, within their range, as MAE does."""
        assert self.recipe.reconstructs
        prediction = self(gather(x0, mask.visible), mask)["hidden"]["x0"]
        return prediction.float().clamp(self.low, self.high)

    def _guided(self, x_t: Tensor, mask: Mask, times: Tensor, labels: Tensor | None, scale: float) -> dict[str, Tensor]:
        """Predictions for visible noisy tokens: uncond + scale * (cond - uncond), the variance as it is with the class."""
        if labels is None or scale == 1:
            return self(x_t, mask, None, times, labels, on=("visible",))["visible"]
        null = torch.full_like(labels, self.recipe.condition.num_classes)
        if scale == 0:
            return self(x_t, mask, None, times, null, on=("visible",))["visible"]
        twice = Mask(mask.visible.repeat(2, 1), mask.hidden.repeat(2, 1))
        both = self(x_t.repeat(2, 1, 1), twice, None, times.repeat(2), torch.cat([labels, null]), on=("visible",))
        guided = {}
        for name, value in both["visible"].items():
            cond, uncond = value.chunk(2)
            guided[name] = cond if name == "variance" else uncond + scale * (cond - uncond)
        return guided

    def denoiser(
        self,
        x0: Tensor,
        mask: Mask,
        known: Tensor | None = None,
        noise: Noise | None = None,
        *,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        predict: Predict | None = None,
    ) -> Callable[[Tensor, float], Tensor | tuple[Tensor, Tensor]]:
        """A function (x_t, t) -> x0 for a sampler, which runs the encoder once, now, if the encoder sees no noise.

        Args:
            x0: normalised tokens of the picture, (B, N, P). Only visible tokens and known values are ever read.
            mask: x_t holds the values of mask.hidden; everything, for an encoder that sees the noise.
            known: (B, M, P) bool, values inside hidden tokens that are known. At every step they are put into x_t at
                that step's noise level, with noise drawn afresh, and into the prediction as they are.
            noise: gives that fresh noise; needed with known.
            labels: classes (B,), for a model with classes; None for none.
            guidance: how far to go beyond the class's prediction at a time; 1 is not at all, 0 ignores the class.
            predict: which prediction to go by, of `recipe.samplers_heads`; the first if not given.

        Returns:
            denoise(x_t, t): clean values of the hidden tokens, (B, M, P), within their range; of a model that learned its
            variance, also that share of it, (B, M, P), about 0 to 1. With S samples of each clip, one after another, B * S.
        """
        recipe, schedule = self.recipe, self.schedule
        assert schedule is not None and recipe.samplers_heads
        if recipe.noise_on == "visible" and mask.visible.shape[1]:
            raise ValueError(
                "This model puts noise on every token it sees: hide all of the clip, and say what is known."
            )
        head = predict or recipe.samplers_heads[0]
        if head not in recipe.samplers_heads:
            raise ValueError(
                f"This {recipe.name} cannot be sampled by {head!r}; it predicts {', '.join(recipe.samplers_heads)} for noise."
            )
        context = self.prepare(gather(x0, mask.visible), mask.visible) if recipe.noise_on == "hidden" else None
        once = (gather(x0, mask.hidden), mask.hidden, mask.visible, known, labels)

        def denoise(x_t: Tensor, t: float) -> Tensor | tuple[Tensor, Tensor]:
            num_samples = len(x_t) // len(x0)  # which share the context
            truth, hidden, visible, known, labels = (
                given if given is None or num_samples == 1 else given.repeat_interleave(num_samples, 0)
                for given in once
            )
            assert truth is not None and hidden is not None and visible is not None
            times = torch.full((len(x_t),), t, device=x_t.device)
            rates = schedule.rates(t)
            if known is not None:
                assert noise is not None
                x_t = torch.where(known, add_noise(truth, noise(x_t), *rates), x_t)
            if context is not None:
                assert self.decoder is not None
                cond, _ = self._told(times, labels, x_t)
                predictions = self.head(self.decoder(context, hidden, x_t, cond)[1], cond)
            else:
                scale = 1.0 if guidance is None else guidance(t)
                predictions = self._guided(x_t, Mask(hidden, visible), times, labels, scale)
            prediction = predictions[head].float()
            if head == "eps":
                prediction = x0_from_eps(x_t, prediction, *rates)
            prediction = prediction.clamp(self.low, self.high)
            if known is not None:
                prediction = torch.where(known, truth, prediction)
            if "variance" in predictions:
                return prediction, (predictions["variance"].float() + 1) / 2
            return prediction

        return denoise


AnyModel = MaskedDiffusionAutoencoder | EncoderOnly


def model_of(recipe: Recipe, parts: tuple[str, ...] = ()) -> AnyModel:
    """The model of a recipe: all of it, or ("encoder",) alone.

    Raises:
        ValueError: other parts, or an encoder that is nothing alone.
    """
    if parts not in ((), ("encoder",)):
        raise ValueError(f"A model has parts={parts!r}; that is () for all of it, or ('encoder',).")
    return EncoderOnly(recipe) if parts else MaskedDiffusionAutoencoder(recipe)
