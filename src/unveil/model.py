"""The model: one encoder, one decoder, and the three things they can do: encode, predict, denoise."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unveil.config import Recipe
from unveil.decoder import Context, Decoder
from unveil.encoder import Encoder
from unveil.layers import init_weights
from unveil.masking import Mask, gather
from unveil.schedule import DiscreteSchedule, add_noise, x0_from_eps
from unveil.tokens import patchify, unpatchify

Noise = Callable[[Tensor], Tensor]


class MaskedDiffusionAutoencoder(nn.Module):
    """What a `Recipe` describes. Clips are (B, C, T, H, W) in [0, 1]; tokens are normalised.

    Attributes:
        recipe: the whole config.
        schedule: of the noise; None for a model without noise.
        low, high: the normalised values of 0 and 1 for each value of a token, (P,).
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        clip, e, d, noise_on = recipe.clip, recipe.encoder, recipe.decoder, recipe.branch.noise_on
        self.schedule = DiscreteSchedule(recipe.schedule.kind, rho=recipe.schedule.rho) if recipe.schedule else None
        self.encoder = Encoder(
            grid=clip.grid,
            token_dim=clip.token_dim,
            embed_dim=e.embed_dim,
            depth=e.depth,
            num_heads=e.num_heads,
            with_time=noise_on == "visible",
        )
        self.taps = d.taps if d else (e.depth,)
        self.decoder = None
        self.head = None
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
                noisy=noise_on == "hidden",
            )
        else:
            self.head = nn.Linear(e.embed_dim, clip.token_dim)
            self.head.apply(init_weights)
        mean, std = torch.tensor(clip.mean), torch.tensor(clip.std)
        self.register_buffer("mean", mean.reshape(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.reshape(-1, 1, 1, 1), persistent=False)
        repeats = clip.token_dim // clip.channels  # the channel is the fastest index inside a token
        self.register_buffer("low", ((0 - mean) / std).repeat(repeats), persistent=False)
        self.register_buffer("high", ((1 - mean) / std).repeat(repeats), persistent=False)

    @property
    def can(self) -> frozenset[str]:
        """What this model was trained for: "represent", and perhaps "repaint" or "generate"."""
        branch = self.recipe.branch
        abilities = {"represent"}
        if 0 < branch.mask_ratio < 1 and not branch.patch_norm:
            abilities.add("repaint")
        if branch.noise_on == "visible" or (branch.noise_on == "hidden" and branch.mask_ratio == 1):
            abilities.add("generate")
        return frozenset(abilities)

    def tokens(self, clip: Tensor) -> Tensor:
        """Normalise and patchify: (B, C, T, H, W) in [0, 1] to (B, N, P)."""
        sizes = self.recipe.clip
        expected = (sizes.channels, sizes.frames, sizes.height, sizes.width)
        if tuple(clip.shape[1:]) != expected:
            raise ValueError(
                f"A clip of (channels, frames, height, width) = {tuple(clip.shape[1:])} came to a model of {expected}. "
                "Resize or convert it first, or build the model for that size."
            )
        return patchify((clip - self.mean) / self.std, sizes.patch_size, sizes.tubelet_size)

    def pixels(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`; not clamped."""
        sizes = self.recipe.clip
        return unpatchify(tokens, sizes.grid, sizes.patch_size, sizes.tubelet_size) * self.std + self.mean

    def encode(self, clip: Tensor) -> Tensor:
        """Features of whole, clean clips: (B, C, T, H, W) to (B, 1 + N, D), class token first. Never masks."""
        x0 = self.tokens(clip)
        everything = torch.arange(x0.shape[1], device=x0.device).expand(len(x0), -1)
        t = torch.zeros(len(x0), dtype=torch.long, device=x0.device)
        return self.encoder(x0, everything, (self.recipe.encoder.depth,), t)[0]

    def prepare(self, x_enc: Tensor, visible: Tensor) -> Context:
        """Encode visible tokens (B, V, P) and compute what the decoder keeps of them."""
        assert self.decoder is not None
        return self.decoder.prepare(self.encoder(x_enc, visible, self.taps), visible)

    def forward(self, x_enc: Tensor, mask: Mask, x_dec: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Predict the target of every scored token, (B, M or V, P): hidden ones, or visible ones that carry noise.

        Args:
            x_enc: visible tokens, (B, V, P).
            x_dec: noisy hidden tokens, (B, M, P), if the hidden ones carry noise.
            t: diffusion time, (B,), if anything carries noise.
        """
        if self.decoder is not None:
            return self.decoder(self.prepare(x_enc, mask.visible), mask.hidden, x_dec, t)
        assert self.head is not None
        return self.head(self.encoder(x_enc, mask.visible, self.taps, t)[0][:, 1:])

    def denoiser(
        self, x0: Tensor, mask: Mask, known: Tensor | None = None, noise: Noise | None = None
    ) -> Callable[[Tensor, int], Tensor]:
        """A function (x_t, t) -> x0 for a sampler, which runs the encoder once, now, if the encoder sees no noise.

        Args:
            x0: normalised tokens of the picture, (B, N, P). Only visible tokens and known values are ever read.
            mask: x_t holds the values of mask.hidden; everything, for an encoder that sees the noise.
            known: (B, M, P) bool, values inside hidden tokens that are known. At every step they are put into x_t at
                that step's noise level, with noise drawn afresh, and into the prediction as they are.
            noise: gives that fresh noise; needed with known.

        Returns:
            denoise(x_t, t): clean values of the hidden tokens, (B, M, P), within the range of pixels.
        """
        if self.decoder is None and mask.visible.shape[1]:
            raise ValueError(
                "This model sees noise on every token, so it generates whole pictures only: hide all of it."
            )
        truth = gather(x0, mask.hidden)
        context = self.prepare(gather(x0, mask.visible), mask.visible) if self.decoder is not None else None

        def denoise(x_t: Tensor, t: int) -> Tensor:
            times = torch.full((len(x_t),), t, device=x_t.device)
            if known is not None and self.schedule is not None:
                assert noise is not None
                x_t = torch.where(known, add_noise(truth, noise(x_t), *self.schedule.rates(t)), x_t)
            if self.decoder is None:
                assert self.head is not None
                prediction = self.head(self.encoder(x_t, mask.hidden, self.taps, times)[0][:, 1:])
            elif self.schedule is None:
                prediction = self.decoder(context, mask.hidden, None, None)
            else:
                prediction = self.decoder(context, mask.hidden, x_t, times)
            prediction = prediction.float()
            if self.recipe.branch.target == "eps":
                assert self.schedule is not None
                prediction = x0_from_eps(x_t, prediction, *self.schedule.rates(t))
            prediction = prediction.clamp(self.low, self.high)
            return prediction if known is None else torch.where(known, truth, prediction)

        return denoise
