"""Against independent code: MAE's and guided-diffusion's recorded numbers, timm, Hugging Face ViTMAE, diffusers."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import clips_for, generator
from torch import Tensor
from torch.testing import assert_close

from unveil import recipes
from unveil.config import Clip, Decoder, Encoder, Recipe
from unveil.losses import Draws, Objective
from unveil.masking import gather, mask_from_scores
from unveil.model import MaskedDiffusionAutoencoder
from unveil.sampling import ddim, ddpm, standard_normal
from unveil.schedule import DiscreteSchedule, add_noise, posterior, x0_from_eps
from unveil.tokens import patchify

REFERENCE = Path(__file__).parent / "reference"


@functools.cache
def reference(name: str) -> dict[str, Tensor]:
    return load_file(REFERENCE / f"{name}.safetensors")


def tiny_mae() -> Recipe:
    """MAE at the size of the reference; mean 0 and deviation 1, so that the picture is used as it is."""
    return dataclasses.replace(
        recipes.mae("Nano/8", height=32),
        clip=Clip(channels=3, height=32, width=32, patch_size=8, mean=(0.0,) * 3, std=(1.0,) * 3),
        encoder=Encoder(embed_dim=32, depth=2, num_heads=4),
        decoder=Decoder(kind="joint", embed_dim=16, depth=2, num_heads=2, taps=(2,)),
    )


def as_linear(weight: Tensor) -> Tensor:
    """A patch convolution (D, C, p, p) as a Linear (D, p * p * C): a patch is (row, column, channel)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


# MAE's published model


def our_name(name: str) -> str:
    for prefix in ("embed", "blocks", "norm", "pred"):
        if name.startswith(f"decoder_{prefix}"):
            return name.replace("decoder_", "decoder.", 1)
    return "decoder.mask_token" if name == "mask_token" else f"encoder.{name}"


@functools.cache
def published_mae() -> MaskedDiffusionAutoencoder:
    model = MaskedDiffusionAutoencoder(tiny_mae())
    state = {k.removeprefix("param/"): v for k, v in reference("mae_image_normpix1").items() if k.startswith("param/")}
    for name, part in (("pos_embed", model.encoder), ("decoder_pos_embed", model.decoder)):
        table = state.pop(name)[0]
        assert (table[0] == 0).all()  # the class token's
        assert torch.equal(table[1:], part.pos_embed)  # bit for bit
    state["patch_embed.proj.weight"] = as_linear(state["patch_embed.proj.weight"])
    model.load_state_dict({our_name(name): value for name, value in state.items()})
    return model.eval()


def test_mae_latent_prediction_and_loss() -> None:
    model, expected = published_mae(), reference("mae_image_normpix1")
    clips = expected["input/image_nchw"][:, :, None]
    mask = mask_from_scores(expected["input/mask_scores"], 0.75)
    flags = torch.zeros(3, 16).scatter(1, mask.hidden, 1.0)
    assert torch.equal(flags, expected["mask"])
    order = torch.cat([mask.visible, mask.hidden], dim=1)
    assert torch.equal(order.argsort(dim=1), expected["ids_restore"])
    x0 = model.tokens(clips)
    assert torch.equal(x0, expected["patchify"])
    visible = gather(x0, mask.visible)
    assert_close(model.encoder(visible, mask.visible, (2,))[0], expected["latent"], rtol=1e-5, atol=1e-5)
    assert_close(model(visible, mask), gather(expected["pred"], mask.hidden), rtol=1e-5, atol=1e-5)
    loss, _ = Objective(model)(clips, Draws(mask, None, None))
    assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-5)


# Guided-diffusion


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_tables(kind: str) -> None:
    """Their k is our t = k + 1."""
    expected = {k.split("/")[1]: v for k, v in reference("gaussian_diffusion").items() if k.startswith(f"{kind}/")}
    schedule = DiscreteSchedule(kind)
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    assert_close(schedule.betas, expected["betas"], **tolerance)
    assert_close(schedule.alpha_bar[1:], expected["alphas_cumprod"], **tolerance)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    rates = [schedule.rates(t) for t in range(1001)]
    steps = list(zip(rates[1:], rates[:-1], strict=True))
    of_x_t, variance = (torch.stack(x) for x in zip(*(posterior(one, zero, *step) for step in steps), strict=True))
    of_x0 = torch.stack([posterior(zero, one, *step)[0] for step in steps])
    assert_close(variance, expected["posterior_variance"], **tolerance)
    assert_close(of_x0, expected["posterior_mean_coef1"], **tolerance)
    assert_close(of_x_t, expected["posterior_mean_coef2"], **tolerance)
    assert_close(variance[1:].log(), expected["posterior_log_variance_clipped"][1:], rtol=1e-10, atol=1e-10)


def clipped_x0(target: str, x_t: Tensor, output: Tensor, rates: tuple[Tensor, Tensor]) -> Tensor:
    x0 = x0_from_eps(x_t, output, *rates) if target == "eps" else output
    return x0.clamp(-1, 1)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("target", ["eps", "x0"])
def test_noising_and_one_step_back(kind: str, target: str) -> None:
    prefix = f"{kind}/{target}/"
    expected = {k.removeprefix(prefix): v for k, v in reference("gaussian_diffusion").items() if k.startswith(prefix)}
    schedule, t = DiscreteSchedule(kind), expected["t"] + 1
    assert t.tolist() == [1, 2, 501, 1000]
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    noised = add_noise(expected["q_sample_x0"], expected["q_sample_noise"], *schedule.rates(t))
    assert_close(noised, expected["q_sample"], **tolerance)
    for i, now in enumerate(t.tolist()):
        x_t = expected["x_t"][i]
        x0 = clipped_x0(target, x_t, expected["model_output"][i], schedule.rates(now))
        assert_close(x0, expected["pred_x0_clipped"][i], **tolerance)
        mean, variance = posterior(x_t, x0, schedule.rates(now), schedule.rates(now - 1))
        assert_close(mean, expected["posterior_mean"][i], **tolerance)
        assert_close(variance.float().expand_as(mean), expected["posterior_variance"][i], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("target", ["eps", "x0"])
def test_ddim_end_point(kind: str, target: str) -> None:
    prefix = f"{kind}/{target}/ddim50/"
    expected = {k.removeprefix(prefix): v for k, v in reference("gaussian_diffusion").items() if k.startswith(prefix)}
    schedule = DiscreteSchedule(kind)
    times = [*(expected["timesteps"].flip(0) + 1).tolist(), 0]  # written down in ascending order
    assert times[:2] == [981, 961]
    assert times[-2:] == [1, 0]

    def denoise(x_t: Tensor, t: int) -> Tensor:
        output = x_t.flatten(1) @ expected["denoiser_weight"].T + expected["denoiser_bias"]
        return clipped_x0(target, x_t, output.reshape(x_t.shape), schedule.rates(t))

    assert_close(ddim(denoise, expected["noise"], schedule, times), expected["sample"], rtol=1e-4, atol=1e-4)


# timm


@pytest.mark.parametrize("height, width", [(32, 32), (16, 40)])
def test_encoder_equals_timms(height: int, width: int) -> None:
    """The same state dict but for the patch embedding's shape and the positions, which are not saved here."""
    timm = pytest.importorskip("timm")
    recipe = dataclasses.replace(
        tiny_mae(), clip=Clip(channels=3, height=height, width=width, patch_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = timm.models.vision_transformer.VisionTransformer(
            img_size=(height, width), patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0
        ).eval()
        ours = MaskedDiffusionAutoencoder(recipe).eval()
    state = {
        name: torch.randn(value.shape, generator=generator(i)) * (0.3 if "weight" in name else 0.1)
        for i, (name, value) in enumerate(ours.encoder.state_dict().items())
    }
    ours.encoder.load_state_dict(state)
    weight = state["patch_embed.proj.weight"].reshape(32, 8, 8, 3).permute(0, 3, 1, 2)
    positions = torch.cat([torch.zeros(1, 32), ours.encoder.pos_embed])[None]
    theirs.load_state_dict({**state, "patch_embed.proj.weight": weight, "pos_embed": positions})
    clips = clips_for(recipe, 3)
    with torch.no_grad():
        assert_close(ours.encode(clips), theirs.forward_features(clips[:, :, 0]), rtol=1e-5, atol=1e-5)


# Hugging Face


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ViTMAE's names as ours: queries, keys and values joined, positions left out."""
    renamed = {}
    words = {
        "vit.embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
        "vit.embeddings.cls_token": "encoder.cls_token",
        "vit.layers": "encoder.blocks",
        "vit.layernorm": "encoder.norm",
        "decoder.decoder_layers": "decoder.blocks",
        "decoder.decoder_": "decoder.",
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }
    for name, value in state.items():
        if name.endswith(("position_embeddings", "decoder_pos_embed")) or "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            value = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        renamed[name] = as_linear(value) if value.ndim == 4 else value
    return renamed


@pytest.mark.parametrize("patch_norm", [True, False])
def test_equals_hugging_face_vitmae(patch_norm: bool) -> None:
    """With random numbers in every tensor, as its positions, class and mask tokens start at zero.

    Only the decoder's position of the class token stays zero, as MAE has it: there is no place for another here.
    """
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            norm_pix_loss=patch_norm,
            mask_ratio=0.75,
            layer_norm_eps=1e-6,  # the original's; its default is 1e-12
        )
    ).eval()
    state = {
        name: torch.randn(value.shape, generator=generator(i)) * 0.2
        for i, (name, value) in enumerate(theirs.state_dict().items())
    }
    state["decoder.decoder_pos_embed"][:, 0] = 0
    theirs.load_state_dict(state)
    recipe = tiny_mae()
    ours = MaskedDiffusionAutoencoder(
        dataclasses.replace(recipe, branch=dataclasses.replace(recipe.branch, patch_norm=patch_norm))
    ).eval()
    renamed = from_hugging_face(state)
    positions = state["vit.embeddings.position_embeddings"][0]
    renamed["encoder.cls_token"] = renamed["encoder.cls_token"] + positions[0]
    ours.load_state_dict(renamed)
    ours.encoder.pos_embed.copy_(positions[1:])
    ours.decoder.pos_embed.copy_(state["decoder.decoder_pos_embed"][0, 1:])
    clips = clips_for(recipe, 3)
    scores = torch.rand(3, 16, generator=generator(1))
    mask = mask_from_scores(scores, 0.75)
    with torch.no_grad():
        expected = theirs(clips[:, :, 0], noise=scores)
        prediction = ours(gather(ours.tokens(clips), mask.visible), mask)
        loss, _ = Objective(ours)(clips, Draws(mask, None, None))
    assert_close(prediction, gather(expected.logits, mask.hidden), rtol=1e-5, atol=1e-5)
    assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


# diffusers


def fake(x_t: Tensor, t: int) -> Tensor:
    """Something smooth of x_t and t that a schedule cannot foresee."""
    return torch.tanh(0.7 * x_t.flip(-1) + 0.002 * t) * 0.9


def follow(scheduler: Any, x_t: Tensor, num_steps: int, step: Callable[..., Any]) -> tuple[list[int], list[Tensor]]:
    """Their trajectory: the times in our counting and x_t before each step and after the last."""
    scheduler.set_timesteps(num_steps)
    times, states = [], [x_t]
    for k in scheduler.timesteps.tolist():
        times.append(k + 1)
        states.append(step(fake(states[-1], k + 1), k, states[-1]).prev_sample)
    return [*times, 0], states


SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("num_steps", [1000, 50])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_trajectory_equals_diffusers(sampler: str, kind: str, num_steps: int) -> None:
    """Step for step, with the same noise. Their tables are float32, ours float64."""
    diffusers = pytest.importorskip("diffusers")
    settings = {"beta_schedule": SCHEDULES[kind], "prediction_type": "sample", "clip_sample": False}
    start = torch.randn(2, 3, 8, 8, generator=generator())
    schedule, ours = DiscreteSchedule(kind), []
    keep = lambda t, x_t, x0: ours.append(x_t)  # noqa: E731
    if sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(**settings, variance_type="fixed_small")
        times, theirs = follow(scheduler, start, num_steps, functools.partial(scheduler.step, generator=generator(1)))
        end = ddpm(fake, start, schedule, times, standard_normal(generator(1)), keep)
    else:
        scheduler = diffusers.DDIMScheduler(**settings)
        times, theirs = follow(scheduler, start, num_steps, scheduler.step)
        end = ddim(fake, start, schedule, times, keep)
    assert times[0] == 1001 - 1000 // num_steps
    assert len(theirs) == len(ours) + 1 == num_steps + 1
    for t, a, b in zip(times, [*ours, end], theirs, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, t=t: f"at t={t}: {text}")


def test_patch_values_are_row_column_channel() -> None:
    """A patch convolution and the Linear that it becomes."""
    weight = torch.randn(5, 3, 8, 8, generator=generator())
    image = torch.randn(2, 3, 16, 24, generator=generator(1))
    expected = torch.nn.functional.conv2d(image, weight, stride=8).flatten(2).transpose(1, 2)
    assert_close(patchify(image[:, :, None], 8) @ as_linear(weight).T, expected, rtol=1e-5, atol=1e-5)
