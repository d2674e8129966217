"""What may not see what: hidden pixels, unscored tokens, another token's noise, another row of the batch."""

import itertools
import math
from typing import Any

import pytest
import torch
from small import VARIANTS, batch_for, build, clips_for, generator, shipped, small, small_variant
from torch import Tensor, nn
from torch.testing import assert_close

from unveil.config import Recipe
from unveil.corruption import corrupt
from unveil.layers import TimeEmbedding
from unveil.losses import Draws, Objective, draw, target_of
from unveil.masking import Mask, gather, scatter
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import pixels_of, predict, repaint
from unveil.recipes import RECIPES, stage_ends
from unveil.tokens import patch_norm

MASKED = [v for v in VARIANTS if 0 < shipped(v).branch.mask_ratio < 1]
DECODERS = ["joint", "cross", "cross_self"]


def holes_of(recipe: Recipe, hidden: Tensor) -> Tensor:
    """Token indices (B, M) as the pixels that they cover, (B, C, T, H, W) bool."""
    flags = torch.zeros(len(hidden), recipe.clip.num_tokens, dtype=torch.bool).scatter(1, hidden, True)
    pixels = pixels_of(flags, recipe.clip.grid, recipe.clip.patch_size, recipe.clip.tubelet_size)
    return pixels[:, None].expand(-1, recipe.clip.channels, -1, -1, -1)


# The encoder and hidden pixels


@pytest.mark.parametrize("variant", MASKED)
def test_hidden_pixels_do_not_reach_the_memory(variant: str) -> None:
    """Neither the encoder's output nor the keys and values move by one bit; a visible pixel moves them."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model = objective.model
    kept: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, arguments, output: kept.extend(output))

    def memory(clips: Tensor) -> list[Tensor]:
        kept.clear()
        objective(clips, draws)  # the whole training step
        c = corrupt(model.tokens(clips), draws.mask, recipe.branch.noise_on, draws.t, model.schedule, draws.noise)
        context = model.prepare(c.x_enc, draws.mask.visible)
        flat = [x for item in context for x in (item if isinstance(item, tuple) else (item,))]
        return [x.detach().clone() for x in (*kept, *flat)]

    before = memory(clips)
    holes = holes_of(recipe, draws.mask.hidden)
    after = memory(torch.where(holes, 1 - clips, clips))
    assert len(before) >= 3
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    moved = memory(torch.where(holes, clips, 1 - clips))
    for a, b in zip(before, moved, strict=True):
        assert not torch.equal(a, b)


def test_an_mae_predicts_the_same_whatever_is_hidden() -> None:
    recipe = small("mae")
    objective, clips, draws = batch_for(recipe)
    model, holes = objective.model, holes_of(recipe, draws.mask.hidden)
    predictions = [
        model(gather(model.tokens(c), draws.mask.visible), draws.mask) for c in (clips, torch.where(holes, 0.5, clips))
    ]
    assert torch.equal(*predictions)


def test_at_the_last_time_a_diffmae_hardly_sees_what_is_hidden() -> None:
    """alpha at T is 4e-6 with rho = 0.8: the noisy tokens carry nothing."""
    recipe = small()
    objective, clips, draws = batch_for(recipe)
    model, holes = objective.model, holes_of(recipe, draws.mask.hidden)
    t = torch.full_like(draws.t, 1000)
    predictions = []
    for c in (clips, torch.where(holes, 1 - clips, clips)):
        corrupted = corrupt(model.tokens(c), draws.mask, "hidden", t, model.schedule, draws.noise)
        predictions.append(model(corrupted.x_enc, draws.mask, corrupted.x_dec, t))
    assert_close(*predictions, rtol=0, atol=1e-4)


def test_encode_never_masks() -> None:
    """Every pixel's token changes the features of whole clips, for any recipe; they are the encoder's at time 0."""
    for variant in ("mae", "diffmae", "diffmae nothing hidden"):
        recipe = small_variant(variant)
        model, clips = build(recipe), clips_for(recipe, 1)
        features = model.encode(clips)
        assert features.shape == (1, 1 + recipe.clip.num_tokens, 32)
        tokens = model.tokens(clips)
        for i in range(recipe.clip.num_tokens):
            changed = tokens.clone()
            changed[:, i] += 1
            assert not torch.equal(model.encode(model.pixels(changed)), features)


# Where the loss has a gradient


@pytest.mark.parametrize("variant", [v for v in VARIANTS if shipped(v).branch.target == "x0"])
def test_the_loss_scores_the_scored_tokens_only(variant: str) -> None:
    """With the prediction held fixed, the loss's gradient on the picture is exactly zero off the scored tokens."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    scored = draws.mask.hidden if recipe.decoder else draws.mask.visible
    frozen = torch.randn(2, scored.shape[1], recipe.clip.token_dim, generator=generator())
    objective.model.forward = lambda *arguments: frozen  # type: ignore[method-assign]
    clips.requires_grad_()
    objective(clips, draws)[0].backward()
    assert clips.grad is not None
    holes = holes_of(recipe, scored)
    assert (clips.grad[~holes] == 0).all()
    assert (clips.grad[holes] != 0).all()


@pytest.mark.parametrize("variant", ["mae", "diffmae joint"])
def test_a_joint_decoders_visible_outputs_have_no_gradient(variant: str) -> None:
    objective, clips, draws = batch_for(small_variant(variant))
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    objective.model.decoder.blocks[-1].register_forward_hook(keep)
    objective(clips, draws)[0].backward()
    known = 1 + draws.mask.visible.shape[1]
    gradient = outputs[0].grad
    assert gradient is not None
    assert gradient.shape[1] == known + draws.mask.hidden.shape[1]
    assert (gradient[:, :known] == 0).all()
    assert (gradient[:, known:].abs().amax(-1) > 0).all()


def test_an_encoder_only_denoisers_class_token_is_not_scored() -> None:
    objective, clips, draws = batch_for(small_variant("diffmae nothing hidden"))
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: list[Tensor]) -> None:
        output[0].retain_grad()
        outputs.append(output[0])

    objective.model.encoder.register_forward_hook(keep)
    objective(clips, draws)[0].backward()
    gradient = outputs[0].grad
    assert gradient is not None
    assert (gradient[:, 0] == 0).all()
    assert (gradient[:, 1:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_mean_squared_error_of_the_named_target(variant: str) -> None:
    """Against one loop over clips and tokens; and the mean over tokens is MAE's sum(loss * mask) / sum(mask)."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model = objective.model
    loss, per_token = objective(clips, draws)
    x0 = model.tokens(clips)
    scored = draws.mask.hidden if recipe.decoder else draws.mask.visible
    c = corrupt(x0, draws.mask, recipe.branch.noise_on, draws.t, model.schedule, draws.noise)
    prediction = model(c.x_enc, draws.mask, c.x_dec, draws.t)
    for b, s in itertools.product(range(2), range(scored.shape[1])):
        target = x0[b, scored[b, s]]
        if recipe.branch.patch_norm:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        if recipe.branch.target == "eps":
            assert draws.noise is not None
            target = draws.noise[b, s]
        assert_close(per_token[b, s], nn.functional.mse_loss(prediction[b, s], target), rtol=1e-5, atol=1e-5)
    flags = torch.zeros(2, recipe.clip.num_tokens).scatter(1, scored, 1.0)
    everywhere = torch.zeros(2, recipe.clip.num_tokens).scatter(1, scored, per_token)
    assert_close(loss, (everywhere * flags).sum() / flags.sum(), rtol=1e-5, atol=1e-5)


def test_targets_are_what_they_are_called() -> None:
    objective, clips, draws = batch_for(small("mae"))
    model = objective.model
    corrupted = corrupt(model.tokens(clips), draws.mask, "none")
    assert torch.equal(target_of(model.recipe, corrupted), patch_norm(gather(model.tokens(clips), draws.mask.hidden)))
    assert corrupted.x_dec is None
    assert corrupted.eps is None


@pytest.mark.parametrize("noise_on", ["hidden", "visible"])
def test_corruption_at_time_zero_is_clean(noise_on: Any) -> None:
    recipe = small() if noise_on == "hidden" else small(mask_ratio=0.0)
    objective, clips, draws = batch_for(recipe)
    x0 = objective.model.tokens(clips)
    t = torch.zeros(2, dtype=torch.long)
    c = corrupt(x0, draws.mask, noise_on, t, objective.model.schedule, draws.noise)
    assert torch.equal(c.x_enc, gather(x0, draws.mask.visible))
    if noise_on == "hidden":
        assert c.x_dec is not None
        assert torch.equal(c.x_dec, gather(x0, draws.mask.hidden))


# One token's noise and another's prediction


@pytest.mark.parametrize("decoder", DECODERS)
def test_who_sees_another_tokens_noise(decoder: str) -> None:
    """In `cross` nobody; in `joint` and `cross_self` everybody."""
    objective, clips, draws = batch_for(small(decoder=decoder), n=1)
    model = objective.model
    visible = gather(model.tokens(clips), draws.mask.visible)
    assert draws.noise is not None
    before = model(visible, draws.mask, draws.noise, draws.t)
    for changed in range(draws.noise.shape[1]):
        noise = draws.noise.clone()
        noise[:, changed] += 1
        same = (model(visible, draws.mask, noise, draws.t) == before).all(-1)[0]
        others = torch.arange(len(same)) != changed
        assert not same[changed]
        assert same[others].all() if decoder == "cross" else not same[others].any()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_mask_tokens_prediction_depends_on_the_others_only_if_they_attend(decoder: str) -> None:
    """An MAE: take one hidden token away, and the others' predictions change or not."""
    objective, clips, draws = batch_for(small("mae_raw", decoder=decoder), n=1)
    model = objective.model
    visible = gather(model.tokens(clips), draws.mask.visible)
    all_of_them = model(visible, draws.mask)
    fewer = model(visible, Mask(draws.mask.visible, draws.mask.hidden[:, 1:]))
    difference = (all_of_them[:, 1:] - fewer).abs().amax()
    assert difference < 1e-6 if decoder == "cross" else difference > 1e-4


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_order_of_tokens_does_not_matter(decoder: str) -> None:
    objective, clips, draws = batch_for(small(decoder=decoder), n=1)
    model, x0 = objective.model, objective.model.tokens(clips)
    assert draws.noise is not None
    v = torch.randperm(draws.mask.visible.shape[1], generator=generator(1))
    h = torch.randperm(draws.mask.hidden.shape[1], generator=generator(2))
    shuffled = Mask(draws.mask.visible[:, v], draws.mask.hidden[:, h])
    before = model(gather(x0, draws.mask.visible), draws.mask, draws.noise, draws.t)
    after = model(gather(x0, shuffled.visible), shuffled, draws.noise[:, h], draws.t)
    assert_close(after, before[:, h], rtol=1e-5, atol=1e-5)


# Top-down connections


def test_taps_of_24_blocks_for_8() -> None:
    assert stage_ends(24, 8) == (24, 21, 18, 15, 12, 9, 6, 3)
    assert shipped("diffmae large").decoder.taps == (24, 21, 18, 15, 12, 9, 6, 3)
    assert shipped("diffmae joint").decoder.taps == (12,)


@pytest.mark.parametrize("encoder_depth, decoder_depth", [(12, 8), (12, 12), (32, 8), (4, 2), (6, 3), (12, 1), (12, 5)])
def test_taps_fall_from_the_last_block(encoder_depth: int, decoder_depth: int) -> None:
    taps = stage_ends(encoder_depth, decoder_depth)
    assert len(taps) == decoder_depth
    assert taps[0] == encoder_depth
    assert taps[-1] == math.ceil(encoder_depth / decoder_depth)
    gaps = [a - b for a, b in itertools.pairwise(taps)]
    assert all(encoder_depth // decoder_depth <= gap <= -(-encoder_depth // decoder_depth) for gap in gaps)


@pytest.mark.parametrize("decoder", ["cross", "cross_self"])
def test_each_decoder_block_reads_its_own_tap(decoder: str) -> None:
    """The first reads the last block's output through the encoder's final norm, each other its tap's by its own."""
    recipe = small(decoder=decoder, depth=5, decoder_depth=3)
    assert recipe.decoder is not None
    assert recipe.decoder.taps == (5, 4, 2)
    objective, clips, draws = batch_for(recipe)
    model = objective.model
    outputs: dict[int, Tensor] = {}
    for i, block in enumerate(model.encoder.blocks, start=1):
        block.register_forward_hook(lambda module, arguments, output, i=i: outputs.update({i: output}))
    context = model.prepare(gather(model.tokens(clips), draws.mask.visible), draws.mask.visible)
    norms = [model.encoder.norm, *list(model.decoder.tap_norms)[1:]]
    assert all(isinstance(norm, nn.LayerNorm) for norm in norms)
    for block, norm, tap, (k, v) in zip(model.decoder.blocks, norms, (5, 4, 2), context, strict=True):
        keys, values = block.cross_attn.kv(norm(outputs[tap])).chunk(2, dim=-1)
        assert torch.equal(k.transpose(1, 2).flatten(2), keys)
        assert torch.equal(v.transpose(1, 2).flatten(2), values)


# Repainting


def token_holes(recipe: Recipe, n: int, hidden: int, seed: int = 0) -> Tensor:
    """(n, T, H, W) bool with `hidden` whole tokens hidden in each row."""
    flags = torch.stack(
        [torch.randperm(recipe.clip.num_tokens, generator=generator(seed + i)) < hidden for i in range(n)]
    )
    return pixels_of(flags, recipe.clip.grid, recipe.clip.patch_size, recipe.clip.tubelet_size)


def pixel_holes(recipe: Recipe, n: int, seed: int = 0) -> Tensor:
    """(n, T, H, W) bool: a rectangle that follows no patch, and single pixels; the first column stays."""
    clip = recipe.clip
    holes = torch.rand(n, clip.frames, clip.height, clip.width, generator=generator(seed)) < 0.02
    for i in range(n):
        holes[i, :, 2 : 5 + i, 5 : 8 + i] = True
    holes[..., : clip.patch_size] = False
    return holes


PAINTERS = {
    "joint": {"decoder": "joint"},
    "cross": {"decoder": "cross"},
    "cross_self": {},
    "eps": {"target": "eps"},
    "video": {"frames": 4, "tubelet_size": 2},
    "rectangle": {"height": 8, "width": 24},
    "gray": {"channels": 1},
}


def painter(name: str) -> MaskedDiffusionAutoencoder:
    return build(small("mae_raw") if name == "mae_raw" else small(**PAINTERS[name]))


@pytest.mark.parametrize("name", [*PAINTERS, "mae_raw"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("finer", [False, True], ids=["tokens", "pixels"])
@pytest.mark.parametrize("reimpose", [True, False], ids=["reimposed", "not"])
def test_repaint_never_reads_a_hole_and_never_touches_the_rest(
    name: str, sampler: Any, finer: bool, reimpose: bool
) -> None:
    model = painter(name)
    clips = clips_for(model.recipe, 3)
    holes = pixel_holes(model.recipe, 3) if finer else token_holes(model.recipe, 3, 9)
    settings: dict[str, Any] = {"num_steps": 3, "sampler": sampler, "num_samples": 2, "reimpose_known": reimpose}
    result = repaint(model, clips, holes, **settings)
    assert result.shape == (3, 2, *clips.shape[1:])
    everywhere = holes[:, None, None].expand_as(result)
    for content in (1 - clips, torch.zeros_like(clips), torch.full_like(clips, torch.nan)):
        other = repaint(model, torch.where(holes[:, None], content, clips), holes, **settings)
        assert torch.equal(other, result)
    assert torch.equal(result[~everywhere], clips[:, None].expand_as(result)[~everywhere])
    inside = result[everywhere]
    assert ((inside >= 0) & (inside <= 1)).all()
    assert (inside != clips[:, None].expand_as(result)[everywhere]).float().mean() > 0.9


@pytest.mark.parametrize("finer", [False, True], ids=["tokens", "pixels"])
def test_the_denoiser_is_not_even_handed_a_hole(finer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = painter("cross_self")
    handed: list[Tensor] = []
    denoiser = model.denoiser
    monkeypatch.setattr(model, "denoiser", lambda x0, *arguments: (handed.append(x0), denoiser(x0, *arguments))[1])
    clips = clips_for(model.recipe, 1)
    holes = pixel_holes(model.recipe, 1) if finer else token_holes(model.recipe, 1, 9)
    for content in (clips, 1 - clips):
        repaint(model, torch.where(holes[:, None], content, clips), holes, num_steps=1)
    assert torch.equal(handed[0], handed[1])


@pytest.mark.parametrize("name", ["cross_self", "cross", "joint"])
def test_known_pixels_inside_a_hidden_token_are_told_at_every_step(name: str) -> None:
    """The predictions equal the picture there exactly, and the pixels around a hole change what is painted."""
    model = painter(name)
    clips, holes = clips_for(model.recipe, 2), torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    holes[:, :, 5:7, 5:7] = True  # inside one token of 4 x 4
    seen: list[Tensor] = []
    result = repaint(model, clips, holes, num_steps=3, on_step=lambda t, x0: seen.append(x0.clone()))
    assert len(seen) == 3
    truth = model.tokens(clips)[:, 5:6]
    known = torch.ones(4, 4, 3, dtype=torch.bool)
    known[1:3, 1:3] = False
    for x0 in seen:
        assert torch.equal(x0[:, :, known.flatten()], truth[:, :, known.flatten()])
        assert not torch.equal(x0, truth)
    nearby = clips.clone()
    nearby[:, :, :, 4, 4] = 1 - nearby[:, :, :, 4, 4]  # known, in the same token
    other = repaint(model, nearby, holes, num_steps=3)
    assert not torch.equal(other[..., 5:7, 5:7], result[..., 5:7, 5:7])
    off = [repaint(model, c, holes, num_steps=3, reimpose_known=False) for c in (clips, nearby)]
    assert torch.equal(off[0][..., 5:7, 5:7], off[1][..., 5:7, 5:7])


@pytest.mark.parametrize("name", [*PAINTERS, "mae_raw"])
@pytest.mark.parametrize("num_steps, num_samples", [(1, 1), (5, 3)])
def test_the_encoder_runs_once(name: str, num_steps: int, num_samples: int) -> None:
    """For each group of rows with equal counts, whatever the steps and samples."""
    model = painter(name)
    calls = {"encoder": 0, "decoder": 0}
    for part in calls:
        getattr(model, part).register_forward_hook(
            lambda module, arguments, output, part=part: calls.update({part: calls[part] + 1})
        )
    clips = clips_for(model.recipe, 4)
    repaint(model, clips, token_holes(model.recipe, 4, 7), num_steps=num_steps, num_samples=num_samples)
    steps = 1 if name == "mae_raw" else num_steps
    assert calls == {"encoder": 1, "decoder": steps * num_samples}
    calls.update(encoder=0, decoder=0)
    holes = torch.cat([token_holes(model.recipe, 2, 7), token_holes(model.recipe, 2, 8)])[[0, 2, 1, 3]]
    repaint(model, clips, holes, num_steps=num_steps, num_samples=num_samples)
    assert calls == {"encoder": 2, "decoder": 2 * steps * num_samples}


@pytest.mark.parametrize("name", ["cross_self", "joint", "mae_raw", "video"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_pictures_samples_do_not_depend_on_its_batch(name: str, sampler: Any) -> None:
    """Rows with unequal counts together give what each gives alone, for every sample."""
    model = painter(name)
    clips = clips_for(model.recipe, 5)
    holes = torch.cat([token_holes(model.recipe, 1, hidden, seed) for seed, hidden in enumerate((3, 9, 3, 0, 9))])
    holes[2] |= pixel_holes(model.recipe, 1)[0]
    settings: dict[str, Any] = {"num_steps": 4, "sampler": sampler, "seed": 7}
    together = repaint(model, clips, holes, num_samples=2, indices=range(10, 10 + len(clips)), **settings)
    for i in range(5):
        alone = repaint(model, clips[i : i + 1], holes[i : i + 1], num_samples=2, indices=[10 + i], **settings)
        assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(together[3], clips[3].expand(2, -1, -1, -1, -1))  # nothing hidden, nothing done
    fewer = repaint(model, clips, holes, num_samples=1, indices=range(10, 10 + len(clips)), **settings)
    assert_close(fewer[:, 0], together[:, 0], rtol=1e-5, atol=1e-5)
    if name != "mae_raw":
        assert not torch.equal(together[0, 0], together[0, 1])
        other = repaint(model, clips, holes, num_samples=2, indices=range(11, 11 + len(clips)), **settings)
        assert not torch.equal(other[0], together[0])
        other = repaint(
            model, clips, holes, num_samples=2, indices=range(10, 10 + len(clips)), **{**settings, "seed": 8}
        )
        assert not torch.equal(other[0], together[0])


@pytest.mark.parametrize("variant", ["diffmae all hidden", "diffmae nothing hidden", "diffmae nothing hidden, eps"])
def test_generating_reads_nothing_of_the_clip(variant: str) -> None:
    model = build(small_variant(variant))
    clips = clips_for(model.recipe, 2)
    holes = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    result = repaint(model, clips, holes, num_steps=3)
    assert torch.equal(repaint(model, torch.full_like(clips, torch.nan), holes, num_steps=3), result)
    assert not torch.equal(result[0], result[1])


def test_predict_is_one_step() -> None:
    model = painter("cross_self")
    clips, holes = clips_for(model.recipe, 2), token_holes(small(), 2, 9)
    at: list[int] = []
    result = repaint(model, clips, holes, num_steps=1, sampler="ddim", on_step=lambda t, x0: at.append(t), seed=3)
    assert at == [1000]
    assert torch.equal(predict(model, clips, holes, seed=3), result[:, 0])


def test_repaint_equals_training_time_prediction() -> None:
    """The denoiser at t hands the decoder what `corrupt` would."""
    recipe = small()
    objective, clips, draws = batch_for(recipe)
    model, x0 = objective.model, objective.model.tokens(clips)
    assert draws.noise is not None
    t = torch.full((2,), 300)
    c = corrupt(x0, draws.mask, "hidden", t, model.schedule, draws.noise)
    expected = model(c.x_enc, draws.mask, c.x_dec, t).clamp(model.low, model.high)
    blind = scatter(x0, draws.mask.hidden, torch.full_like(c.x0, torch.nan))
    assert c.x_dec is not None
    assert_close(model.denoiser(blind, draws.mask)(c.x_dec, 300), expected, rtol=1e-5, atol=1e-5)


# Initialisation and gradients


@pytest.mark.parametrize("variant", ["mae", "diffmae", "diffmae joint", "diffmae nothing hidden"])
def test_initialisation_after_all_of_it_ran(variant: str) -> None:
    """Xavier Linears, zero biases, LayerNorms at identity; time embedding, class and mask token N(0, 0.02)."""
    name, arguments = VARIANTS[variant]
    torch.manual_seed(0)
    model = MaskedDiffusionAutoencoder(RECIPES[name](**{**arguments, "size": "S/16"}))
    in_time = {f"{n}.{m}" for n, x in model.named_modules() if isinstance(x, TimeEmbedding) for m in ("fc1", "fc2")}
    assert bool(in_time) == (variant != "mae")
    checked = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            std = 0.02 if path in in_time else bound / 3**0.5
            assert_close(module.weight.std(), torch.tensor(std), rtol=0.02, atol=0)
            assert_close(module.weight.mean(), torch.tensor(0.0), rtol=0, atol=5 * std / module.weight.numel() ** 0.5)
            if path in in_time:
                assert module.weight.abs().max() > 3 * 0.02  # normal, not uniform
            else:
                assert module.weight.abs().max() <= bound
            assert (module.bias == 0).all()
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        else:
            continue
        checked |= {f"{path}.weight", f"{path}.bias"}
    tokens = {n: p for n, p in model.named_parameters() if n not in checked}
    assert set(tokens) == {"encoder.cls_token"} | ({"decoder.mask_token"} if variant == "mae" else set())
    for token in tokens.values():
        assert_close(token.std(), torch.tensor(0.02), rtol=0.2, atol=0)
        assert token.abs().max() < 0.02 * 5


def without_gradient(recipe: Recipe) -> set[str]:
    """Parameters whose gradient is zero by arithmetic when nothing is visible: no patch is embedded, and attention over
    the class token alone has weight 1 whatever the query."""
    if recipe.branch.mask_ratio < 1:
        return set()
    assert recipe.decoder is not None
    names = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    if recipe.decoder.kind != "joint":
        for i in range(recipe.decoder.depth):
            parts = ("norm_cross.weight", "norm_cross.bias", "cross_attn.q.weight", "cross_attn.q.bias")
            names |= {f"decoder.blocks.{i}.{part}" for part in parts}
    return names


ALL_HIDDEN = {f"all hidden, {kind}": {"mask_ratio": 1.0, "decoder": kind} for kind in DECODERS}


@pytest.mark.parametrize("variant", [*VARIANTS, *ALL_HIDDEN])
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    recipe = small(**ALL_HIDDEN[variant]) if variant in ALL_HIDDEN else small_variant(variant)
    torch.manual_seed(0)
    objective = Objective(MaskedDiffusionAutoencoder(recipe))  # as it is initialised, not moved
    draws = draw(recipe, objective.model.schedule, 0, 0, range(4))
    loss, _ = objective(clips_for(recipe, 4), draws)
    loss.backward()
    silent = set()
    for name, parameter in objective.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if (
            parameter.grad.abs().max() < 1e-7
        ):  # the kernel's softmax over one key leaves rounding; others are above 1e-4
            silent.add(name)
    assert silent == without_gradient(recipe)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_equals_its_items_one_by_one(variant: str) -> None:
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe, n=3)
    loss, per_token = objective(clips, draws)
    losses = []
    for i in range(3):
        alone = draw(recipe, objective.model.schedule, 0, 0, [i])
        assert torch.equal(alone.mask.hidden[0], draws.mask.hidden[i])
        one, tokens = objective(clips[i : i + 1], alone)
        assert_close(tokens[0], per_token[i], rtol=1e-5, atol=1e-5)
        losses.append(one)
    assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def test_draws_depend_on_seed_epoch_and_index() -> None:
    recipe = small()
    schedule = build(recipe).schedule

    def drawn(seed: int, epoch: int, indices: list[int]) -> Draws:
        return draw(recipe, schedule, seed, epoch, indices)

    first = drawn(0, 0, [5, 3])
    swapped = drawn(0, 0, [3, 5])
    assert torch.equal(first.mask.hidden, swapped.mask.hidden.flip(0))
    assert torch.equal(first.t, swapped.t.flip(0))
    assert torch.equal(first.noise, swapped.noise.flip(0))
    for other in (drawn(1, 0, [5, 3]), drawn(0, 1, [5, 3]), drawn(0, 0, [6, 4])):
        assert not torch.equal(first.mask.hidden, other.mask.hidden)
        assert not torch.equal(first.noise, other.noise)


def test_one_frame_of_a_clip_model_is_the_image_model() -> None:
    """Patch embedding summed over a still tubelet: the video path at one token in time equals the image path."""
    image, video = build(small()), build(small(frames=2, tubelet_size=2))
    state = image.state_dict()
    patches = state["encoder.patch_embed.proj.weight"]
    state["encoder.patch_embed.proj.weight"] = torch.cat([patches, patches], dim=1) / 2
    encoder = {name.removeprefix("encoder."): x for name, x in state.items() if name.startswith("encoder.")}
    video.encoder.load_state_dict(encoder)
    clips = clips_for(image.recipe)
    still = clips.expand(-1, -1, 2, -1, -1)
    assert_close(video.encode(still), image.encode(clips), rtol=1e-5, atol=1e-5)


def test_pixels_undo_tokens() -> None:
    for variant in ("mae", "diffmae", "diffmae video", "diffmae rectangle", "diffmae digits"):
        model = build(small_variant(variant))
        clips = clips_for(model.recipe)
        assert_close(model.pixels(model.tokens(clips)), clips, rtol=1e-5, atol=1e-6)
        for value, limit in ((0.0, model.low), (1.0, model.high)):
            tokens = model.tokens(torch.full_like(clips, value))
            assert_close(tokens, limit.expand_as(tokens), rtol=1e-5, atol=1e-6)
