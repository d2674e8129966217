"""Against independent code: recorded numbers of MAE, UMD, DiT and guided-diffusion, timm, Hugging Face ViTMAE, diffusers."""

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
from unveil.config import Clip, Decoder, Encoder
from unveil.convert import from_dit, from_umd
from unveil.losses import BranchDraws, Draws, Objective
from unveil.masking import Mask, gather, mask_from_scores
from unveil.model import MaskedDiffusionAutoencoder
from unveil.recipe import Recipe
from unveil.reference import largest_difference
from unveil.sampling import ddim, ddpm, standard_normal
from unveil.schedule import DiscreteSchedule, add_noise, posterior, x0_from_eps
from unveil.tokens import patchify, unpatchify

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


def drawn(mask: Mask) -> Draws:
    """A step of MAE, where only the mask is random."""
    return Draws((BranchDraws(torch.arange(len(mask.hidden)), mask, None, None, None),))


def filled(recipe: Recipe, state: dict[str, Tensor]) -> MaskedDiffusionAutoencoder:
    model = MaskedDiffusionAutoencoder(recipe)
    model.load_state_dict(state)
    return model.eval()


# MAE's published model


def our_name(name: str) -> str:
    for theirs, ours in {
        "norm": "head.norm",
        "pred": "head.pred.x0",
        "embed": "decoder.embed",
        "blocks": "decoder.blocks",
    }.items():
        if name.startswith(f"decoder_{theirs}"):
            return name.replace(f"decoder_{theirs}", ours, 1)
    return "decoder.mask_token" if name == "mask_token" else f"encoder.{name}"


@functools.cache
def published_mae() -> MaskedDiffusionAutoencoder:
    model = MaskedDiffusionAutoencoder(tiny_mae())
    state = {k.removeprefix("param/"): v for k, v in reference("mae_image_normpix1").items() if k.startswith("param/")}
    for name, part in (("pos_embed", model.encoder), ("decoder_pos_embed", model.decoder)):
        table = state.pop(name)[0]
        assert (table[0] == 0).all()  # the class token's
        assert torch.equal(table[1:], part.positions.pos_embed)  # bit for bit
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
    assert_close(model(visible, mask)["hidden"]["x0"], gather(expected["pred"], mask.hidden), rtol=1e-5, atol=1e-5)
    loss, _ = Objective(model)(clips, drawn(mask))
    assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-5)


# UMD's published model


@functools.cache
def published_umd(name: str) -> MaskedDiffusionAutoencoder:
    recipe, state, _ = from_umd(reference(name))
    return filled(recipe, state)


def everything(B: int, N: int) -> Mask:
    tokens = torch.arange(N).expand(B, -1)
    return Mask(tokens, tokens[:, :0])


def umd_inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, times and classes of a file. Their times are ours: 0 is clean."""
    file = reference(name)
    tokens = patchify(file["input/image_nhwc"].permute(0, 3, 1, 2)[:, :, None], 4)
    assert file["input/t"].flatten().tolist() == [0, 1, 700]
    return tokens, file["input/t"][:, 0].long(), file["input/y"].long()


def as_nhwc(predictions: dict[str, Tensor]) -> Tensor:
    """Predictions of all 16 tokens in grid order as they write them: x0, then eps, in channels."""
    clips = [unpatchify(predictions[head], (1, 4, 4), 4)[:, :, 0] for head in ("x0", "eps")]
    return torch.cat(clips, dim=1).permute(0, 2, 3, 1)


UMDS = ["umd_adaln_cond", "umd_timetoken_cond"]


@pytest.mark.parametrize("name", UMDS)
@torch.no_grad()
def test_umd_predicts_whole_pictures(name: str) -> None:
    model, expected = published_umd(name), reference(name)
    x, t, labels = umd_inputs(name)
    predictions = model(x, everything(3, 16), None, t, labels, on=("visible",))["visible"]
    assert_close(as_nhwc(predictions), expected["full/pred_nhwc"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UMDS)
@pytest.mark.parametrize("part", ["full", "masked"])
@torch.no_grad()
def test_umd_represents(name: str, part: str) -> None:
    """The mean class token behind the encoder's norm; at t = 700 their sinusoid is rounded otherwise."""
    model, expected = published_umd(name), reference(name)
    x, t, labels = umd_inputs(name)
    visible = everything(3, 16).visible
    if part == "masked":
        visible, t = expected["masked/ids_shuffle"].long()[:, :4], torch.zeros_like(t)
    (memory,), _ = model._encode(gather(x, visible), visible, model.taps, t, labels)
    representation = memory[:, : model.recipe.encoder.num_class_tokens].mean(1)
    for row in range(3):
        tolerance = 2e-5 if t[row] == 700 else 1e-5
        assert_close(representation[row], expected[f"{part}/rep"][row], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", UMDS)
@torch.no_grad()
def test_umd_predicts_visible_and_hidden_tokens(name: str) -> None:
    model, expected = published_umd(name), reference(name)
    x, t, labels = umd_inputs(name)
    order = expected["masked/ids_shuffle"].long()
    mask = Mask(order[:, :4], order[:, 4:])
    flags = unpatchify(mask.flags().float()[..., None].expand(-1, -1, 16), (1, 4, 4), 4)[:, 0, 0, :, :, None]
    assert torch.equal(flags, expected["masked/mask_nhw1"])
    both = model(gather(x, mask.visible), mask, None, torch.zeros_like(t), labels, on=("visible", "hidden"))
    predictions = {
        head: gather(torch.cat([both["visible"][head], both["hidden"][head]], dim=1), order.argsort(dim=1))
        for head in ("x0", "eps")
    }
    assert_close(as_nhwc(predictions), expected["masked/pred_nhwc"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UMDS)
@torch.no_grad()
def test_umd_is_guided(name: str) -> None:
    """Every prediction, and what a sampler is given of it, which ends at the range of pixels."""
    model, expected = published_umd(name), reference(name)
    x, t, _ = umd_inputs(name)
    labels, scale = expected["cfg/y"].long(), float(expected["cfg/scale"])
    guided = model._guided(x, everything(3, 16), t, labels, scale)
    assert_close(as_nhwc(guided), expected["cfg/pred_nhwc"], rtol=1e-5, atol=1e-5)
    tokens = everything(1, 16).visible
    all_hidden = Mask(tokens[:, :0], tokens)
    for row in range(3):
        clip, one = (
            patchify(expected["cfg/pred_nhwc"][row : row + 1].permute(0, 3, 1, 2)[:, :, None], 4),
            x[row : row + 1],
        )
        x0, eps = clip.reshape(1, 16, 16, 6).chunk(2, dim=-1)
        for head, prediction in (("x0", x0.flatten(2)), ("eps", eps.flatten(2))):
            if head == "eps":
                assert model.schedule is not None
                prediction = x0_from_eps(one, prediction, *model.schedule.rates(t[row]))
            denoise = model.denoiser(
                torch.full_like(one, torch.nan),
                all_hidden,
                labels=labels[row : row + 1],
                guidance=lambda t: scale,
                predict=head,
            )
            assert_close(denoise(one, int(t[row])), prediction.clamp(-1, 1), rtol=1e-5, atol=1e-5)


# DiT's published model


@functools.cache
def published_dit() -> MaskedDiffusionAutoencoder:
    recipe, state, _ = from_dit(reference("dit"), num_heads=4)
    return filled(recipe, state)


def as_nchw(tokens: Tensor) -> Tensor:
    return unpatchify(tokens, (1, 4, 4), 2)[:, :, 0]


@torch.no_grad()
def test_dit_predicts_noise_and_variance() -> None:
    """At 2e-6, for at 1e-5 a wrong eps of LayerNorm passes. Their k is our t = k + 1."""
    model, expected = published_dit(), reference("dit")
    x = patchify(expected["input/x_nchw"][:, :, None], 2)
    assert expected["input/t"].tolist() == [0, 10, 999]
    predictions = model(x, everything(3, 16), None, expected["input/t"] + 1, expected["input/y"], on=("visible",))[
        "visible"
    ]
    eps, variance = expected["out"].chunk(2, dim=1)
    assert_close(as_nchw(predictions["eps"]), eps, rtol=2e-6, atol=2e-6)
    assert_close(as_nchw(predictions["variance"]), variance, rtol=2e-6, atol=2e-6)


@torch.no_grad()
def test_dit_is_guided() -> None:
    """Their code guides the first three channels of eps; the fourth and the variance stay as they are with the class.

    Here every channel of eps is guided. Their batch is twice the first two pictures, with the class and without.
    """
    model, expected = published_dit(), reference("dit")
    x = patchify(expected["cfg/x"][:2, :, None], 2)
    t, labels, scale = expected["cfg/t"][:2] + 1, expected["cfg/y"][:2], float(expected["cfg/scale"])
    mask = everything(2, 16)
    guided = {head: as_nchw(value) for head, value in model._guided(x, mask, t, labels, scale).items()}
    plain = {
        head: as_nchw(value) for head, value in model(x, mask, None, t, labels, on=("visible",))["visible"].items()
    }
    for rows in (slice(0, 2), slice(2, 4)):
        assert_close(guided["eps"][:, :3], expected["cfg/out"][rows, :3], rtol=2e-6, atol=2e-6)
    assert_close(plain["eps"][:, 3], expected["cfg/out"][:2, 3], rtol=2e-6, atol=2e-6)
    assert_close(guided["variance"], expected["cfg/out"][:2, 4:], rtol=2e-6, atol=2e-6)


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
    positions = torch.cat([torch.zeros(1, 32), ours.encoder.positions.pos_embed])[None]
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
        "decoder.decoder_norm": "head.norm",
        "decoder.decoder_pred": "head.pred.x0",
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
    (branch,) = recipe.branches
    terms = (dataclasses.replace(branch.terms[0], patch_norm=patch_norm),)
    ours = MaskedDiffusionAutoencoder(
        dataclasses.replace(recipe, branches=(dataclasses.replace(branch, terms=terms),))
    ).eval()
    renamed = from_hugging_face(state)
    positions = state["vit.embeddings.position_embeddings"][0]
    renamed["encoder.cls_token"] = renamed["encoder.cls_token"] + positions[0]
    ours.load_state_dict(renamed)
    ours.encoder.positions.pos_embed.copy_(positions[1:])
    ours.decoder.positions.pos_embed.copy_(state["decoder.decoder_pos_embed"][0, 1:])
    clips = clips_for(recipe, 3)
    scores = torch.rand(3, 16, generator=generator(1))
    mask = mask_from_scores(scores, 0.75)
    with torch.no_grad():
        expected = theirs(clips[:, :, 0], noise=scores)
        prediction = ours(gather(ours.tokens(clips), mask.visible), mask)["hidden"]["x0"]
        loss, _ = Objective(ours)(clips, drawn(mask))
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


def test_dit_is_diffusers_dit() -> None:
    """By `unveil convert`'s own comparison: the code that published DiTs are run by today, and other heads are noticed."""
    tensors = {k.removeprefix("param/"): v for k, v in reference("dit").items() if k.startswith("param/")}
    with torch.no_grad():
        assert largest_difference("dit", published_dit(), tensors, {})[0] < 1e-5
        recipe, state, _ = from_dit(tensors, num_heads=2)
        other = filled(recipe, state)
        other.recipe = dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, num_heads=4))
        assert largest_difference("dit", other, tensors, {})[0] > 1e-3
