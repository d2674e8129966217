"""What may not see what: hidden pixels, unscored tokens, another token's noise, another row of the batch."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from small import (
    BRANCH_IDS,
    BRANCHES,
    VARIANTS,
    batch_for,
    build,
    clips_for,
    corrupted,
    enough,
    generator,
    labels_for,
    make,
    only,
    part_of,
    predicted,
    shipped,
    small,
    small_variant,
)
from torch import Tensor, nn
from torch.testing import assert_close

from unveil.config import Term
from unveil.corruption import corrupt
from unveil.holes import pixels_of
from unveil.layers import Trunk
from unveil.losses import BranchDraws, Draws, Objective, draw
from unveil.masking import Mask, gather, scatter
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import predict, repaint
from unveil.recipe import Recipe
from unveil.sizes import stage_ends
from unveil.tokens import patch_norm, unpatchify

DECODERS = ["joint", "cross", "cross_self"]


def branches_with(condition: Any) -> Any:
    """The branches of all variants that fulfil something, as a test's parameters."""
    chosen = [
        (case, name)
        for case, name in zip(BRANCHES, BRANCH_IDS, strict=True)
        if condition(shipped(case[0]).branches[case[1]])
    ]
    return pytest.mark.parametrize("variant, number", [case for case, _ in chosen], ids=[name for _, name in chosen])


def holes_of(recipe: Recipe, hidden: Tensor) -> Tensor:
    """Token indices (B, M) as the pixels that they cover, (B, C, T, H, W) bool."""
    flags = torch.zeros(len(hidden), recipe.clip.num_tokens, dtype=torch.bool).scatter(1, hidden, True)
    pixels = pixels_of(flags, recipe.clip.grid, recipe.clip.patch_size, recipe.clip.tubelet_size)
    return pixels[:, None].expand(-1, recipe.clip.channels, -1, -1, -1)


# The encoder and hidden pixels


@branches_with(lambda branch: 0 < branch.mask_ratio < 1)
def test_hidden_pixels_do_not_reach_the_memory(variant: str, number: int) -> None:
    """Neither the encoder's output nor what the decoder keeps of it moves by one bit; a visible pixel moves them.

    The noise of hidden tokens, where there is any, does not reach them either.
    """
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model, part = objective.model, part_of(draws, number)
    assert model.decoder is not None
    kept: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, arguments, output: kept.extend(output))
    prepare = model.decoder.prepare

    def prepare_and_keep(*arguments: Any) -> Any:
        context = prepare(*arguments)
        kept.extend([] if context.known is None else [context.known])
        kept.extend(x for keys_values in context.keys_values for x in keys_values)
        return context

    model.decoder.prepare = prepare_and_keep  # type: ignore[method-assign]

    def memory(clips: Tensor, draws: Draws) -> list[Tensor]:
        kept.clear()
        objective(clips, only(draws, number))  # the whole training step
        return [x.detach().clone() for x in kept]

    before = memory(clips, draws)
    holes = torch.zeros_like(clips, dtype=torch.bool)
    holes[part.rows] = holes_of(recipe, part.mask.hidden)
    after = memory(torch.where(holes, 1 - clips, clips), draws)
    assert len(before) >= 2
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    moved = memory(torch.where(holes, clips, 1 - clips), draws)
    for a, b in zip(before, moved, strict=True):
        assert not torch.equal(a, b)
    V = part.mask.visible.shape[1]
    of_hidden = slice(V, None) if recipe.branches[number].noise_on == "visible" else slice(None)
    if part.noise is not None and part.noise[:, of_hidden].numel():
        noise = part.noise.clone()
        noise[:, of_hidden] += 1
        other = tuple(dataclasses.replace(part, noise=noise) if p is part else p for p in draws.branches)
        for a, b in zip(before, memory(clips, Draws(other)), strict=True):
            assert torch.equal(a, b)


@branches_with(lambda branch: branch.mask_ratio and branch.noise_on != "hidden")
def test_where_mask_tokens_stand_in_predictions_do_not_know_what_is_hidden(variant: str, number: int) -> None:
    objective, clips, draws = batch_for(small_variant(variant))
    part, recipe = part_of(draws, number), objective.model.recipe
    holes = torch.zeros_like(clips, dtype=torch.bool)
    holes[part.rows] = holes_of(recipe, part.mask.hidden)
    before = predicted(objective, clips, draws, number)
    after = predicted(objective, torch.where(holes, 0.5, clips), draws, number)
    for where, predictions in before.items():
        for name, prediction in predictions.items():
            assert torch.equal(prediction, after[where][name])


def test_at_the_last_time_a_diffmae_hardly_sees_what_is_hidden() -> None:
    """alpha at T is 4e-6 with rho = 0.8: the noisy tokens carry nothing."""
    recipe = small()
    objective, clips, draws = batch_for(recipe)
    part = dataclasses.replace(part_of(draws), t=torch.full((2,), 1000))
    holes = holes_of(recipe, part.mask.hidden)
    predictions = [
        predicted(objective, c, Draws((part,)))["hidden"]["x0"] for c in (clips, torch.where(holes, 1 - clips, clips))
    ]
    assert_close(*predictions, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "variant", ["mae", "diffmae", "diffmae nothing hidden", "umd", "umd_flow generator", "dit", "maskdit", "mae_umd"]
)
def test_encode_never_masks(variant: str) -> None:
    """Every pixel's token changes the features of whole clips, for any recipe; they are the encoder's at time 0."""
    recipe = small_variant(variant)
    model, clips = build(recipe), clips_for(recipe, 1)
    features = model.encode(clips)
    assert features.shape == (1, recipe.encoder.num_class_tokens + recipe.clip.num_tokens, 32)
    tokens = model.tokens(clips)
    for i in range(recipe.clip.num_tokens):
        changed = tokens.clone()
        changed[:, i] += 1
        assert not torch.equal(model.encode(model.pixels(changed)), features)


# Where the loss has a gradient


@pytest.mark.parametrize("variant, number", BRANCHES, ids=BRANCH_IDS)
def test_the_loss_scores_the_scored_tokens_only(variant: str, number: int) -> None:
    """With the predictions held fixed, the loss's gradient on the picture is exactly zero off the scored tokens.

    The noise is no function of the picture, so a prediction of it leaves no gradient at all; nor does the variance's bound,
    which after the first step compares noise with noise.
    """
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    part, terms = part_of(draws, number), recipe.branches[number].terms
    places = {"visible": part.mask.visible, "hidden": part.mask.hidden}
    frozen = {
        where: {
            name: torch.randn(len(part.rows), at.shape[1], recipe.clip.token_dim, generator=generator(i))
            for i, name in enumerate(recipe.heads)
        }
        for where, at in places.items()
    }
    objective.model.forward = lambda *arguments, **more: frozen  # type: ignore[method-assign]
    clips.requires_grad_()
    loss, _ = objective(clips, only(draws, number))
    holes = torch.zeros_like(clips, dtype=torch.bool)
    for term in terms:
        if term.predict not in ("eps", "variance"):
            holes[part.rows] |= holes_of(recipe, places[term.on])
    if not holes.any():
        assert not loss.requires_grad or torch.autograd.grad(loss, clips)[0].abs().max() == 0
        return
    loss.backward()
    assert clips.grad is not None
    assert (clips.grad[~holes] == 0).all()
    assert (clips.grad[holes] != 0).all()


@pytest.mark.parametrize("variant, number", BRANCHES, ids=BRANCH_IDS)
def test_only_scored_predictions_have_a_gradient(variant: str, number: int) -> None:
    """All predictions are asked for at every place: those that no term names have no gradient, every token of the others has.

    So x0 of visible tokens has none in UMD's clean branch, nor in its noisy one, where eps of hidden tokens has none either.
    """
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model, forward = objective.model, objective.model.forward
    both = recipe.decoder is not None and recipe.decoder.kind == "joint"
    made: list[Any] = []

    def everywhere(*arguments: Any, on: tuple[str, ...]) -> Any:
        predictions = forward(*arguments, on=("visible", "hidden") if both else on)
        for at_place in predictions.values():
            for prediction in at_place.values():
                prediction.retain_grad()
        made.append(predictions)
        return predictions

    model.forward = everywhere  # type: ignore[method-assign]
    objective(clips, only(draws, number))[0].backward()
    (predictions,) = made
    scored = {(term.on, term.predict) for term in recipe.branches[number].terms}
    for where, at_place in predictions.items():
        for name, prediction in at_place.items():
            if (where, name) in scored:
                assert prediction.numel()
                assert (prediction.grad.abs().amax(-1) > 0).all(), (where, name)
            else:
                assert prediction.grad is None or (prediction.grad == 0).all(), (where, name)
    assert scored <= {(where, name) for where, at_place in predictions.items() for name in at_place}


@pytest.mark.parametrize("variant", ["mae", "diffmae joint", "umd", "mae_umd"])
def test_a_joint_decoders_visible_outputs_have_no_gradient(variant: str) -> None:
    """Where only hidden tokens are scored; nor have its summary's."""
    objective, clips, draws = batch_for(small_variant(variant))
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    decoder = objective.model.decoder
    assert decoder is not None
    decoder.blocks[-1].register_forward_hook(keep)
    objective(clips, only(draws, 0))[0].backward()
    mask = part_of(draws).mask
    as_tokens = 1 if decoder.time == "token" else 0  # the condition, which is put before the others
    known = as_tokens + 1 + mask.visible.shape[1]
    gradient = outputs[0].grad
    assert gradient is not None
    assert gradient.shape[1] == known + mask.hidden.shape[1]
    assert (gradient[:, :known] == 0).all()
    assert (gradient[:, known:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("variant", ["diffmae nothing hidden", "dit", "dit classes"])
def test_an_encoder_only_denoisers_class_token_is_not_scored(variant: str) -> None:
    objective, clips, draws = batch_for(small_variant(variant))
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: list[Tensor]) -> None:
        output[0].retain_grad()
        outputs.append(output[0])

    objective.model.encoder.register_forward_hook(keep)
    objective(clips, draws)[0].backward()
    gradient = outputs[0].grad
    assert gradient is not None
    own = objective.model.encoder.num_class_tokens
    assert gradient.shape[1] == own + objective.model.recipe.clip.num_tokens
    assert (gradient[:, :own] == 0).all()
    assert (gradient[:, own:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_mean_squared_error_of_the_named_target(variant: str) -> None:
    """Against one loop over clips and tokens; the mean over tokens is MAE's sum(loss * mask) / sum(mask), each branch
    counts by its share of the clips, and each term by its weight. (A variance is no squared error: tests/test_umd.py.)"""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model = objective.model
    loss, per_token = objective(clips, draws)
    total = 0.0
    for number, branch in enumerate(recipe.branches):
        part = part_of(draws, number)
        x0 = model.tokens(clips[part.rows])
        predictions = predicted(objective, clips, draws, number)
        for term in branch.terms:
            scored = part.mask.hidden if term.on == "hidden" else part.mask.visible
            mine = per_token[f"{branch.noise_on}/{term.predict}/{term.on}"]
            if term.predict != "variance":
                expected = torch.empty(scored.shape)
                for b, s in itertools.product(range(len(part.rows)), range(scored.shape[1])):
                    token = int(scored[b, s])
                    target = x0[b, token]
                    if term.predict in ("eps", "noisy"):
                        assert part.noise is not None
                        assert part.t is not None
                        assert model.schedule is not None
                        first = part.mask.visible.shape[1] if term.predict == "noisy" else 0
                        eps = part.noise[b, first + s]
                        alpha, sigma = model.schedule.rates(part.t[b])
                        target = eps if term.predict == "eps" else alpha.float() * target + sigma.float() * eps
                    if term.patch_norm:
                        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                    expected[b, s] = nn.functional.mse_loss(predictions[term.on][term.predict][b, s], target)
                    if term.space == "v":
                        assert part.t is not None
                        expected[b, s] /= max(float(part.t[b]), 0.05) ** 2
                assert_close(mine, expected, rtol=1e-5, atol=1e-5)
            flags = torch.zeros(len(part.rows), recipe.clip.num_tokens).scatter(1, scored, 1.0)
            everywhere = torch.zeros(len(part.rows), recipe.clip.num_tokens).scatter(1, scored, mine)
            total = total + term.weight * len(part.rows) / len(clips) * (everywhere * flags).sum() / flags.sum()
    assert sum(len(part_of(draws, i).rows) for i in range(len(recipe.branches))) == len(clips)
    assert set(per_token) == {f"{b.noise_on}/{t.predict}/{t.on}" for b in recipe.branches for t in b.terms}
    assert_close(loss, torch.as_tensor(total), rtol=1e-5, atol=1e-5)


def test_targets_are_what_they_are_called() -> None:
    objective, clips, draws = batch_for(small("mae"))
    c = corrupted(objective, clips, draws)
    assert torch.equal(c.hidden.x0, gather(objective.model.tokens(clips), part_of(draws).mask.hidden))
    assert c.x_dec is None
    assert {c.visible.eps, c.hidden.eps, c.visible.x_t, c.hidden.x_t} == {None}
    right = {"x0": patch_norm(c.hidden.x0)}
    assert objective.score(Term(predict="x0", on="hidden", patch_norm=True), right, c.hidden, None).max() == 0
    assert objective.score(Term(predict="x0", on="hidden"), right, c.hidden, None).min() > 0


@pytest.mark.parametrize(
    "variant", ["diffmae", "diffmae nothing hidden", "umd", "umd_flow", "dit", "maskdit", "umd_finetune"]
)
def test_corruption_at_time_zero_is_clean(variant: str) -> None:
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    number = len(recipe.branches) - 1
    part = part_of(draws, number)
    x0 = objective.model.tokens(clips[part.rows])
    t = torch.zeros_like(part.t)  # type: ignore[arg-type]
    c = corrupt(x0, part.mask, recipe.branches[number].noise_on, t, objective.model.schedule, part.noise)
    assert torch.equal(c.x_enc, gather(x0, part.mask.visible))
    for seen, at in ((c.visible, part.mask.visible), (c.hidden, part.mask.hidden)):
        assert torch.equal(seen.x0, gather(x0, at))
        assert seen.x_t is None or torch.equal(seen.x_t, gather(x0, at))
    if recipe.noise_on == "hidden":
        assert c.x_dec is not None
        assert torch.equal(c.x_dec, gather(x0, part.mask.hidden))


@pytest.mark.parametrize("variant", ["diffmae", "dit", "umd", "umd_flow", "maskdit"])
def test_corruption_is_noise_on_pixels(variant: str) -> None:
    """x_t of each token is alpha x0 + sigma eps with that token's own noise, all of it put together as pictures."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    number = len(recipe.branches) - 1
    part, branch = part_of(draws, number), recipe.branches[number]
    model, c = objective.model, corrupted(objective, clips, draws, number)
    assert part.t is not None
    assert part.noise is not None
    assert model.schedule is not None

    def picture(indices: Tensor, values: Tensor) -> Tensor:
        blank = torch.zeros(len(part.rows), recipe.clip.num_tokens, recipe.clip.token_dim)
        return unpatchify(scatter(blank, indices, values), recipe.clip.grid, recipe.clip.patch_size)

    carriers = part.mask.hidden if branch.noise_on == "hidden" else part.mask.visible
    if part.noise.shape[1] == recipe.clip.num_tokens:
        carriers = torch.cat([part.mask.visible, part.mask.hidden], dim=1)
    alpha, sigma = (rate.float()[:, None, None, None, None] for rate in model.schedule.rates(part.t))
    normalised = (clips[part.rows] - model.mean) / model.std
    noisy = torch.where(
        holes_of(recipe, carriers), alpha * normalised + sigma * picture(carriers, part.noise), normalised
    )
    seen = torch.cat([c.x_enc, c.x_dec if c.x_dec is not None else c.hidden.x0], dim=1)
    if c.hidden.x_t is not None:
        assert c.x_dec is None or c.x_dec is c.hidden.x_t
        seen = torch.cat([c.x_enc, c.hidden.x_t], dim=1)
    order = torch.cat([part.mask.visible, part.mask.hidden], dim=1)
    assert_close(picture(order, seen), noisy, rtol=1e-5, atol=1e-6)


# One token's noise and another's prediction


@pytest.mark.parametrize("decoder", DECODERS)
def test_who_sees_another_tokens_noise(decoder: str) -> None:
    """In `cross` nobody; in `joint` and `cross_self` everybody."""
    objective, clips, draws = batch_for(small(decoder=decoder), n=1)
    model, part = objective.model, part_of(draws)
    visible = gather(model.tokens(clips), part.mask.visible)
    assert part.noise is not None

    def predictions(noise: Tensor) -> Tensor:
        return model(visible, part.mask, noise, part.t)["hidden"]["x0"]

    before = predictions(part.noise)
    for changed in range(part.noise.shape[1]):
        noise = part.noise.clone()
        noise[:, changed] += 1
        same = (predictions(noise) == before).all(-1)[0]
        others = torch.arange(len(same)) != changed
        assert not same[changed]
        assert same[others].all() if decoder == "cross" else not same[others].any()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_mask_tokens_prediction_depends_on_the_others_only_if_they_attend(decoder: str) -> None:
    """An MAE: take one hidden token away, and the others' predictions change or not."""
    objective, clips, draws = batch_for(small("mae_raw", decoder=decoder), n=1)
    model, mask = objective.model, part_of(draws).mask
    visible = gather(model.tokens(clips), mask.visible)
    all_of_them = model(visible, mask)["hidden"]["x0"]
    fewer = model(visible, Mask(mask.visible, mask.hidden[:, 1:]))["hidden"]["x0"]
    difference = (all_of_them[:, 1:] - fewer).abs().amax()
    assert difference < 1e-6 if decoder == "cross" else difference > 1e-4


@pytest.mark.parametrize("variant, number", BRANCHES, ids=BRANCH_IDS)
def test_the_order_of_tokens_does_not_matter(variant: str, number: int) -> None:
    """Positions go along with the tokens, added or rotated: predictions are permuted as the tokens are."""
    objective, clips, draws = batch_for(small_variant(variant))
    model, part = objective.model, part_of(draws, number)
    c = corrupted(objective, clips, draws, number)
    V, M = part.mask.visible.shape[1], part.mask.hidden.shape[1]
    v, h = torch.randperm(V, generator=generator(1)), torch.randperm(M, generator=generator(2))
    shuffled = Mask(part.mask.visible[:, v], part.mask.hidden[:, h])
    on = tuple({term.on for term in objective.model.recipe.branches[number].terms})
    before = model(c.x_enc, part.mask, c.x_dec, part.t, part.labels, on=on)
    after = model(c.x_enc[:, v], shuffled, None if c.x_dec is None else c.x_dec[:, h], part.t, part.labels, on=on)
    for where in on:
        for name, prediction in before[where].items():
            order = v if where == "visible" else h
            assert_close(after[where][name], prediction[:, order], rtol=1e-5, atol=1e-5)


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
    model, mask = objective.model, part_of(draws).mask
    outputs: dict[int, Tensor] = {}
    for i, block in enumerate(model.encoder.blocks, start=1):
        block.register_forward_hook(lambda module, arguments, output, i=i: outputs.update({i: output}))
    context = model.prepare(gather(model.tokens(clips), mask.visible), mask.visible)
    norms = [model.encoder.norm, *list(model.decoder.tap_norms)[1:]]
    assert all(isinstance(norm, nn.LayerNorm) for norm in norms)
    assert context.known is None
    for block, norm, tap, (k, v) in zip(model.decoder.blocks, norms, (5, 4, 2), context.keys_values, strict=True):
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


@pytest.mark.parametrize("name", ["umd", "umd_flow", "dit", "maskdit", "dit_umd", "mae_umd", "umd_finetune"])
@pytest.mark.parametrize("once", [False, True], ids=["sampled", "predicted"])
def test_replacement_never_reads_a_hole_and_never_touches_the_rest(name: str, once: bool) -> None:
    """Models that put noise on every token they see, and the clean branches of those that have one."""
    model = build(small(name))
    clips, holes = clips_for(model.recipe, 2), pixel_holes(model.recipe, 2)
    result = predict(model, clips, holes) if once else repaint(model, clips, holes, num_steps=2)[:, 0]
    everywhere = holes[:, None].expand_as(result)
    for content in (1 - clips, torch.full_like(clips, torch.nan)):
        blind = torch.where(everywhere, content, clips)
        other = predict(model, blind, holes) if once else repaint(model, blind, holes, num_steps=2)[:, 0]
        assert torch.equal(other, result)
    assert torch.equal(result[~everywhere], clips[~everywhere])
    inside = result[everywhere]
    assert ((inside >= 0) & (inside <= 1)).all()
    assert (inside != clips[everywhere]).float().mean() > 0.9


@pytest.mark.parametrize("finer", [False, True], ids=["tokens", "pixels"])
def test_the_denoiser_is_not_even_handed_a_hole(finer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = painter("cross_self")
    handed: list[Tensor] = []
    denoiser = model.denoiser
    monkeypatch.setattr(model, "denoiser", lambda x0, *arguments: (handed.append(x0), denoiser(x0, *arguments))[1])
    clips = clips_for(model.recipe, 1)
    holes = pixel_holes(model.recipe, 1) if finer else token_holes(model.recipe, 1, 9)
    for content in (clips, 1 - clips):
        repaint(model, torch.where(holes[:, None], content, clips), holes, num_steps=1, smooth_share=0)
    assert torch.equal(handed[0], handed[1])


@pytest.mark.parametrize("name", ["cross_self", "cross", "joint"])
def test_known_pixels_inside_a_hidden_token_are_told_at_every_step(name: str) -> None:
    """The predictions equal the picture there exactly, and the pixels around a hole change what is painted."""
    model = painter(name)
    clips, holes = clips_for(model.recipe, 2), torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    holes[:, :, 5:7, 5:7] = True  # inside one token of 4 x 4
    seen: list[Tensor] = []
    result = repaint(
        model, clips, holes, num_steps=3, smooth_share=0, on_step=lambda step: seen.append(step.tokens.clone())
    )
    assert len(seen) == 3
    truth = model.tokens(clips)[:, 5:6]
    known = torch.ones(4, 4, 3, dtype=torch.bool)
    known[1:3, 1:3] = False
    for x0 in seen:
        assert torch.equal(x0[:, :, known.flatten()], truth[:, :, known.flatten()])
        assert not torch.equal(x0, truth)
    nearby = clips.clone()
    nearby[:, :, :, 4, 4] = 1 - nearby[:, :, :, 4, 4]  # known, in the same token
    other = repaint(model, nearby, holes, num_steps=3, smooth_share=0)
    assert not torch.equal(other[..., 5:7, 5:7], result[..., 5:7, 5:7])
    off = [repaint(model, c, holes, num_steps=3, smooth_share=0, reimpose_known=False) for c in (clips, nearby)]
    assert torch.equal(off[0][..., 5:7, 5:7], off[1][..., 5:7, 5:7])


@pytest.mark.parametrize("name", [*PAINTERS, "mae_raw"])
@pytest.mark.parametrize("num_steps, num_samples", [(1, 1), (5, 3)])
def test_the_encoder_runs_once(name: str, num_steps: int, num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each group of rows with equal counts, whatever the steps and samples."""
    model = painter(name)
    calls = {"encoder": 0, "decoder": 0}
    for part in calls:
        getattr(model, part).register_forward_hook(
            lambda module, arguments, output, part=part: calls.update({part: calls[part] + 1})
        )
    clips = clips_for(model.recipe, 4)
    repaint(model, clips, token_holes(model.recipe, 4, 7), num_steps=num_steps, num_samples=num_samples)
    steps = 1 if name == "mae_raw" else num_steps  # of all samples together; an MAE has one answer and one step
    assert calls == {"encoder": 1, "decoder": steps}
    calls.update(encoder=0, decoder=0)
    holes = torch.cat([token_holes(model.recipe, 2, 7), token_holes(model.recipe, 2, 8)])[[0, 2, 1, 3]]
    repaint(model, clips, holes, num_steps=num_steps, num_samples=num_samples)
    assert calls == {"encoder": 2, "decoder": 2 * steps}
    calls.update(encoder=0, decoder=0)
    monkeypatch.setattr("unveil.pipeline.ROWS_AT_ONCE", 4)  # too few for two samples of the four clips
    repaint(model, clips, token_holes(model.recipe, 4, 7), num_steps=num_steps, num_samples=num_samples)
    assert calls == {"encoder": 1, "decoder": steps if name == "mae_raw" else steps * num_samples}


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
    result = repaint(model, clips, holes, num_steps=1, sampler="ddim", on_step=lambda step: at.append(step.t), seed=3)
    assert at == [1000]
    assert torch.equal(predict(model, clips, holes, seed=3), result[:, 0])


def test_repaint_equals_training_time_prediction() -> None:
    """The denoiser at t hands the decoder what `corrupt` would."""
    recipe = small()
    objective, clips, draws = batch_for(recipe)
    model, x0 = objective.model, objective.model.tokens(clips)
    part = dataclasses.replace(part_of(draws), t=torch.full((2,), 300))
    c = corrupted(objective, clips, Draws((part,)))
    expected = predicted(objective, clips, Draws((part,)))["hidden"]["x0"].clamp(model.low, model.high)
    blind = scatter(x0, part.mask.hidden, torch.full_like(c.hidden.x0, torch.nan))
    assert c.x_dec is not None
    assert_close(model.denoiser(blind, part.mask)(c.x_dec, 300), expected, rtol=1e-5, atol=1e-5)


# Initialisation and gradients

INITIALISED = [
    "mae",
    "mae_video",
    "diffmae",
    "diffmae joint",
    "diffmae nothing hidden",
    "dit classes",
    "maskdit",
    "umd",
    "umd faithful",
    "umd_flow generator",
    "mae_umd",
    "umd_finetune",
]


@pytest.mark.parametrize("variant", INITIALISED)
def test_initialisation_after_all_of_it_ran(variant: str) -> None:
    """Xavier Linears, zero biases, norms at identity; time and class, class and mask tokens N(0, 0.02); modulations zero;
    predictions as the network says; learned positions N(0, 1 / N), separable ones N(0, 0.02)."""
    name, arguments = VARIANTS[variant]
    few_classes = {**arguments, "size": "S/16", "height": 224}
    if "generator" in arguments:
        few_classes["generator"] = 10
    torch.manual_seed(0)
    model = MaskedDiffusionAutoencoder(make(name, few_classes))
    recipe = model.recipe
    told = {f"{n}.{m}" for n, x in model.named_modules() if isinstance(x, Trunk) for m in ("fc1", "fc2")}
    assert len(told) == (
        0 if variant in ("mae", "mae_video") else 4 if recipe.condition.num_classes and "dit" not in variant else 2
    )
    modulated = 0
    checked = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            init = {"xavier": "uniform", "normal": "normal", "zeros": "zeros"}[recipe.network.head_init]
            if "modulation" in path:
                init, modulated = "zeros", modulated + 1
            elif path in told:
                init = "normal"
            elif not path.startswith("head."):
                init = "uniform"
            if init == "zeros":
                assert (module.weight == 0).all()
            else:
                std = 0.02 if init == "normal" else bound / 3**0.5
                assert_close(module.weight.std(), torch.tensor(std), rtol=0.02, atol=0)
                error = 5 * std / module.weight.numel() ** 0.5
                assert_close(module.weight.mean(), torch.tensor(0.0), rtol=0, atol=error)
                # normal, not uniform
                assert module.weight.abs().max() > 3 * 0.02 if init == "normal" else module.weight.abs().max() <= bound
            assert (module.bias == 0).all()
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            assert module.eps == 1e-6
            if not module.elementwise_affine:
                assert recipe.network.norm == "layer_fixed"
                continue
            assert (module.weight == 1).all()
            assert isinstance(module, nn.RMSNorm) or (module.bias == 0).all()
        else:
            continue
        checked |= {f"{path}.weight", f"{path}.bias"}
    if recipe.condition.time == "adaln":  # one in each block, one before the predictions, one before a narrower decoder
        depth = recipe.encoder.depth + (recipe.decoder.depth if recipe.decoder else 0)
        narrow = recipe.decoder is not None and recipe.decoder.embed_dim != recipe.encoder.embed_dim
        assert modulated == depth + 1 + narrow
    else:
        assert modulated == 0
    others = {n: p for n, p in model.named_parameters() if n not in checked}
    expected = {"encoder.cls_token"} if recipe.encoder.num_class_tokens else set()
    if recipe.noise_on != "hidden" and recipe.decoder:
        expected.add("decoder.mask_token")
    if recipe.network.positions == "learned":
        expected |= {"encoder.positions.pos_embed", "decoder.positions.pos_embed"}
    if recipe.network.positions == "separable":
        expected |= {
            f"{part}.positions.{rows}" for part in ("encoder", "decoder") for rows in ("pos_space", "pos_time")
        }
    if recipe.decoder is not None and recipe.decoder.summary == "own":
        expected.add("decoder.cls_token")
    if recipe.condition.num_classes:
        expected.add("condition.label_embed.weight")
        if recipe.condition.label_tokens:
            expected.add("condition.label_places")
    assert set(others) == expected
    for path, values in others.items():
        if path == "encoder.cls_token" and recipe.encoder.class_token_init == "zeros":
            assert (values == 0).all()
            continue
        std = recipe.clip.num_tokens**-0.5 if path.endswith("pos_embed") else 0.02
        assert_close(values.std(), torch.tensor(std), rtol=0.2, atol=0)
        assert values.abs().max() < std * 5.5


def without_gradient(recipe: Recipe) -> set[str]:
    """Parameters whose gradient is zero by arithmetic.

    When nothing is visible no patch is embedded, and attention over the class token alone has weight 1 whatever the query.
    When nothing is hidden no mask token is used.
    """
    if recipe.decoder is None:
        return set()
    if all(branch.mask_ratio == 0 for branch in recipe.branches):
        return {"decoder.mask_token"}
    if recipe.branches[0].mask_ratio < 1:
        return set()
    names = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    if recipe.decoder.kind != "joint":
        for i in range(recipe.decoder.depth):
            parts = ("norm_cross.weight", "norm_cross.bias", "cross_attn.q.weight", "cross_attn.q.bias")
            names |= {f"decoder.blocks.{i}.{part}" for part in parts}
    return names


ALL_HIDDEN = {f"all hidden, {kind}": {"mask_ratio": 1.0, "decoder": kind} for kind in DECODERS}


@pytest.mark.parametrize("variant", [*VARIANTS, *ALL_HIDDEN])
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    """Finite as it is initialised; and not zero, there or, where something starts at zero, once that is moved."""
    recipe = small(**ALL_HIDDEN[variant]) if variant in ALL_HIDDEN else small_variant(variant)
    starts_at_zero = recipe.condition.time == "adaln"
    torch.manual_seed(0)
    n = max(4, enough(recipe))
    labels = labels_for(recipe, n)
    for model in (MaskedDiffusionAutoencoder(recipe), build(recipe)):
        objective = Objective(model)
        draws = draw(recipe, model.schedule, 0, 0, range(n), labels=labels)
        loss, _ = objective(clips_for(recipe, n), draws)
        loss.backward()
        silent = set()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # the kernel's softmax over one key leaves rounding; others are above 1e-4, or 1e-6 behind small gates
            if parameter.grad.abs().max() < 1e-7:
                silent.add(name)
        if not starts_at_zero:
            break
    assert silent == without_gradient(recipe)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_equals_its_items_one_by_one(variant: str) -> None:
    """Draws, losses of tokens, and the loss; and it equals its two unequal halves, weighted by their sizes."""
    recipe = small_variant(variant)
    n = max(3, enough(recipe))
    objective, clips, draws = batch_for(recipe, n)
    labels, schedule = labels_for(recipe, n), objective.model.schedule
    loss, per_token = objective(clips, draws)
    where = {int(row): (number, at) for number in range(len(recipe.branches))
             for at, row in enumerate(part_of(draws, number).rows)}  # fmt: skip
    assert set(where) == set(range(n))

    def alone(first: int, last: int) -> tuple[Draws, Tensor, dict[str, Tensor]]:
        some = None if labels is None else labels[first:last]
        mine = draw(recipe, schedule, 0, 0, range(first, last), labels=some)
        return mine, *objective(clips[first:last], mine)

    losses = []
    for i in range(n):
        mine, one, tokens = alone(i, i + 1)
        number, at = where[i]
        part, whole = part_of(mine, number), part_of(draws, number)
        assert all(other is None for other in mine.branches if other is not part)
        assert torch.equal(part.mask.hidden[0], whole.mask.hidden[at])
        assert torch.equal(part.mask.visible[0], whole.mask.visible[at])
        for name in ("t", "noise", "labels"):
            of_part, of_whole = getattr(part, name), getattr(whole, name)
            assert (of_part is None) == (of_whole is None)
            assert of_part is None or torch.equal(of_part[0], of_whole[at])
        for name, values in tokens.items():
            assert_close(values[0], per_token[name][at], rtol=1e-5, atol=1e-5)
        losses.append(one)
    assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
    third = n // 3
    halves = third / n * alone(0, third)[1] + (n - third) / n * alone(third, n)[1]
    assert_close(loss, halves, rtol=1e-5, atol=1e-5)


def test_draws_depend_on_seed_epoch_and_index() -> None:
    recipe = small()
    schedule = build(recipe).schedule

    def drawn(seed: int, epoch: int, indices: list[int]) -> BranchDraws:
        return part_of(draw(recipe, schedule, seed, epoch, indices))

    first = drawn(0, 0, [5, 3])
    swapped = drawn(0, 0, [3, 5])
    assert torch.equal(first.mask.hidden, swapped.mask.hidden.flip(0))
    assert torch.equal(first.t, swapped.t.flip(0))
    assert torch.equal(first.noise, swapped.noise.flip(0))
    for other in (drawn(1, 0, [5, 3]), drawn(0, 1, [5, 3]), drawn(0, 0, [6, 4])):
        assert not torch.equal(first.mask.hidden, other.mask.hidden)
        assert not torch.equal(first.noise, other.noise)


@pytest.mark.parametrize("arguments", [{}, {"name": "umd"}, {"name": "umd_flow"}])
def test_one_frame_of_a_clip_model_is_the_image_model(arguments: dict[str, str]) -> None:
    """Patch embedding summed over a still tubelet: the video path at one token in time equals the image path."""
    image, video = build(small(**arguments)), build(small(**arguments, frames=2, tubelet_size=2))
    state = image.state_dict()
    patches = state["encoder.patch_embed.proj.weight"]
    state["encoder.patch_embed.proj.weight"] = torch.cat([patches, patches], dim=1) / 2
    shared = {n: x for n, x in state.items() if n.startswith(("encoder.", "condition."))}
    assert not video.load_state_dict(shared, strict=False).unexpected_keys
    clips = clips_for(image.recipe)
    still = clips.expand(-1, -1, 2, -1, -1)
    assert_close(video.encode(still), image.encode(clips), rtol=1e-5, atol=1e-5)


def test_pixels_undo_tokens() -> None:
    for variant in (
        "mae",
        "diffmae",
        "diffmae video",
        "diffmae rectangle",
        "diffmae digits",
        "umd latent",
        "umd video",
    ):
        model = build(small_variant(variant))
        clips = clips_for(model.recipe)
        assert_close(model.pixels(model.tokens(clips)), clips, rtol=1e-5, atol=1e-6)
        if not model.recipe.clip.bounded:
            assert model.low.isneginf().all()
            assert model.high.isposinf().all()
            continue
        for value, limit in ((0.0, model.low), (1.0, model.high)):
            tokens = model.tokens(torch.full_like(clips, value))
            assert_close(tokens, limit.expand_as(tokens), rtol=1e-5, atol=1e-6)
