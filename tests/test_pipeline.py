"""What a model says that it can do, what repainting refuses, and how it goes on with models that see noise everywhere."""

import re
from typing import Any

import pytest
import torch
from small import VARIANTS, build, clips_for, small, small_variant
from torch import Tensor

from unveil.holes import filled_smoothly, hardly_touched, masked_view, named_holes
from unveil.masking import group_rows, scatter, tokens_touched
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import predict, repaint


def all_of(value: bool) -> Tensor:
    return torch.full((2, 1, 16, 16), value)


def some() -> Tensor:
    holes = all_of(False)
    holes[..., 8:] = True
    return holes


def scratch() -> Tensor:
    holes = all_of(False)
    holes[..., 5, :] = True
    return holes


CAN = {
    "represent": {"mae", "mae video", "mae_video", "mae_video images"},
    "represent repaint": {
        "mae_raw",
        "mae cross_self",
        "diffmae",
        "diffmae large",
        "diffmae joint",
        "diffmae cross",
        "diffmae eps",
        "diffmae cosine",
        "diffmae rho 1",
        "diffmae center",
        "diffmae video",
        "diffmae tubes",
        "diffmae rectangle",
        "diffmae digits",
        "mae_umd",
    },
    "represent generate": {"diffmae all hidden"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_can(variant: str) -> None:
    """Whoever sees noise on what it sees can generate, and be told of known pixels."""
    named = [abilities for abilities, variants in CAN.items() if variant in variants]
    abilities = set((named[0] if named else "represent repaint generate").split())
    recipe = small_variant(variant)
    assert build(recipe).can == abilities
    if not named:
        assert recipe.noise_on == "visible"


@pytest.mark.parametrize(
    "variant, holes, settings, message",
    [
        ("mae", some(), {}, "predicts patch-normalised values"),
        ("diffmae", all_of(True), {}, "was trained with 75% hidden and needs some of the picture"),
        ("mae_raw", all_of(True), {}, "Leave some of it visible"),
        ("diffmae all hidden", some(), {}, "it makes whole pictures and cannot go by a visible part"),
        ("mae_umd", all_of(True), {}, "was trained with 75% hidden and needs some of the picture"),
        ("diffmae", some().float(), {}, "The mask is (2, 1, 16, 16) of torch.float32"),
        ("diffmae", some()[:1], {}, "The mask is (1, 1, 16, 16)"),
        ("diffmae", some()[..., :8], {}, "True where the picture is to be repainted"),
        ("diffmae", some(), {"num_samples": 0}, "num_samples=0; ask for at least 1"),
        ("diffmae", some(), {"num_steps": 0}, "num_steps=0, but the schedule has 1000 times"),
        ("diffmae", some(), {"num_steps": 1001}, "Use 1 to 1000 steps"),
        ("diffmae", some(), {"sampler": "ddmp"}, "Did you mean 'ddpm'?"),
        ("diffmae", some(), {"smooth_share": 1.5}, "smooth_share=1.5; give a share of a patch"),
        ("diffmae all hidden", scratch(), {}, "it makes whole pictures and cannot go by a visible part"),
        ("umd", some(), {"num_steps": 1001}, "Use 1 to 1000 steps"),
        ("umd_flow", some(), {"num_steps": 0}, "num_steps=0"),
        ("umd", some().float(), {}, "The mask is (2, 1, 16, 16) of torch.float32"),
        ("dit", some()[:1], {}, "The mask is (1, 1, 16, 16)"),
        ("dit", some(), {"num_samples": 0}, "num_samples=0; ask for at least 1"),
    ],
)
def test_repaint_refuses(variant: str, holes: Tensor, settings: dict[str, Any], message: str) -> None:
    model = build(small_variant(variant))
    with pytest.raises(ValueError, match=re.escape(message)):
        repaint(model, clips_for(model.recipe), holes, **{"num_steps": 2, **settings})


def test_a_model_refuses_another_size() -> None:
    model = build(small())
    with pytest.raises(ValueError, match=r"\(3, 1, 16, 20\) came to a model of \(3, 1, 16, 16\)"):
        model.tokens(torch.zeros(1, 3, 1, 16, 20))


@pytest.mark.parametrize("variant", ["diffmae nothing hidden", "dit", "umd", "umd_flow"])
def test_a_denoiser_that_sees_noise_everywhere_refuses_a_clean_token(variant: str) -> None:
    model = build(small_variant(variant))
    hidden = torch.ones(1, 16, dtype=torch.bool)
    hidden[:, 3] = False
    ((_, mask),) = group_rows(hidden)
    with pytest.raises(
        ValueError, match="puts noise on every token it sees: hide all of the clip, and say what is known"
    ):
        model.denoiser(torch.zeros(1, 16, 48), mask)


def test_masked_view_is_gray_where_hidden() -> None:
    clips, holes = clips_for(small()), some()
    view = masked_view(clips, holes)
    everywhere = holes[:, None].expand_as(view)
    assert (view[everywhere] == 0.5).all()
    assert torch.equal(view[~everywhere], clips[~everywhere])


@pytest.mark.parametrize("variant", ["diffmae", "mae_raw", "dit", "umd", "umd_flow"])
def test_an_untouched_picture_comes_back(variant: str) -> None:
    model = build(small_variant(variant))
    clips = clips_for(model.recipe)
    assert torch.equal(repaint(model, clips, all_of(False), num_steps=2)[:, 0], clips)
    assert torch.equal(predict(model, clips, all_of(False)), clips)


# Holes of several kinds in one batch


PAINTERS = ["mae_raw", "diffmae", "dit", "maskdit", "umd", "umd_flow", "dit_umd", "maskdit_umd", "umd_finetune"]
SEE_NOISE = ["diffmae nothing hidden", "dit", "maskdit", "umd", "umd_flow", "umd_flow generator", "umd_finetune"]


def odd_holes(model: MaskedDiffusionAutoencoder) -> Tensor:
    """Four holes: one that cuts through patches, whole patches, nothing, and everything if the model can do that."""
    holes = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    holes[0, :, 3:10, 5:9] = True
    holes[1, :, 4:12, :8] = True
    holes[3] = True
    if "generate" not in model.can:
        holes[3, :, :, :4] = False
    return holes


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
@pytest.mark.parametrize("variant", [*SEE_NOISE, "diffmae"])
def test_what_is_outside_a_hole_is_kept_and_what_is_inside_is_not_read(variant: str, sampler: Any) -> None:
    """Bit for bit, both; and every sample is another."""
    model = build(small_variant(variant))
    clips, holes = clips_for(model.recipe, 4), odd_holes(model)
    painted = repaint(model, clips, holes, num_steps=3, sampler=sampler, num_samples=2, seed=5)
    assert painted.shape == (4, 2, *clips.shape[1:])
    assert painted.isfinite().all()
    assert painted.min() >= 0
    assert painted.max() <= 1
    inside = holes[:, None, None].expand_as(painted)
    before = clips[:, None].expand_as(painted)
    assert torch.equal(painted[~inside], before[~inside])
    for i in (0, 1, 3):
        one, other = painted[i, :, holes[i].expand(3, -1, -1, -1)]
        assert not torch.equal(one, before[i, 0, holes[i].expand(3, -1, -1, -1)])
        assert not torch.equal(one, other)
    other = torch.where(holes[:, None], torch.rand(clips.shape, generator=torch.Generator().manual_seed(9)), clips)
    again = repaint(model, other, holes, num_steps=3, sampler=sampler, num_samples=2, seed=5)
    assert torch.equal(painted, again)
    assert torch.equal(predict(model, clips, holes), predict(model, other, holes))


@pytest.mark.parametrize("variant", PAINTERS)
def test_a_hole_is_filled_the_same_way_in_any_company(variant: str) -> None:
    """By its number and the seed alone, though the others' holes are of other kinds."""
    model = build(small_variant(variant))
    clips, holes = clips_for(model.recipe, 4), odd_holes(model)
    numbers, settings = [7, 3, 5, 11], {"num_steps": 3, "num_samples": 2, "seed": 5}
    together = repaint(model, clips, holes, indices=numbers, **settings)
    for i in range(4):
        alone = repaint(model, clips[i : i + 1], holes[i : i + 1], indices=numbers[i : i + 1], **settings)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-5)
    if model.schedule is not None:
        other = repaint(model, clips, holes, indices=[8, 4, 6, 12], **settings)
        assert not torch.equal(together[0], other[0])
    mean = predict(model, clips, holes)
    for i in range(4) if model.recipe.reconstructs else ():
        alone = predict(model, clips[i : i + 1], holes[i : i + 1], indices=[i])
        torch.testing.assert_close(mean[i], alone[0], rtol=0, atol=1e-5)


# Holes that take little of a patch


def partly() -> Tensor:
    """Of a 16 x 16 picture in patches of 4: four patches whole, and a corner of four others."""
    holes = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    holes[..., 4:12, 4:12] = True
    holes[..., 12:14, 6:8] = holes[..., 2:4, 6:8] = holes[..., 6:8, 12:14] = holes[..., 6:8, 2:4] = True
    return holes


@pytest.mark.parametrize("variant", ["diffmae", "mae_raw", "mae_umd"])
def test_patches_that_a_hole_hardly_takes_are_seen_filled_smoothly(variant: str) -> None:
    """And stay so; the others are painted as if nothing but these were hidden."""
    model = build(small_variant(variant))
    clips, holes = clips_for(model.recipe), partly()
    part = holes.clone()
    part[..., 4:12, 4:12] = False
    assert torch.equal(hardly_touched(holes, model.recipe.clip, 0.5), part)
    filled = filled_smoothly(clips, holes, part)
    assert torch.equal(predict(model, clips, holes), predict(model, filled, holes & ~part))
    settings = {"num_steps": 2, "num_samples": 3, "seed": 4}
    made = repaint(model, clips, holes, **settings)
    assert torch.equal(made, repaint(model, filled, holes & ~part, **settings))
    inside = part[:, None].expand_as(clips)
    assert torch.equal(made[:, 2][inside], filled[inside])
    painted = repaint(model, clips, holes, smooth_share=0, **settings)
    assert torch.isclose(painted[:, 2][inside], filled[inside], atol=1e-3).float().mean() < 0.5


@pytest.mark.parametrize("variant", ["diffmae", "mae_raw", "umd", "dit"])
def test_a_scratch_is_filled_smoothly_and_nothing_is_asked_of_the_model(variant: str) -> None:
    """But of a model that goes by pixels."""
    model = build(small_variant(variant))
    clips, holes = clips_for(model.recipe), scratch()
    steps = []
    made = repaint(model, clips, holes, num_steps=2, on_step=steps.append)
    smooth = (clips[..., 4, :] + clips[..., 6, :]) / 2
    if variant in ("diffmae", "mae_raw"):
        assert not steps
        assert (made[:, 0, ..., 5, :] - smooth).abs().mean() < (clips[..., 5, :] - smooth).abs().mean()
        assert torch.equal(made[:, 0], filled_smoothly(clips, holes, holes))
    else:
        assert steps
        assert not torch.equal(made[:, 0], filled_smoothly(clips, holes, holes))


def test_known_pixels_in_hidden_tokens_are_told_unless_they_are_not_to_be() -> None:
    model = build(small_variant("diffmae"))
    clips, holes = clips_for(model.recipe), all_of(False)
    holes[..., 5:11, 5:11] = True
    told, untold = (
        repaint(model, clips, holes, num_steps=3, smooth_share=0, reimpose_known=known) for known in (True, False)
    )
    assert not torch.equal(told, untold)


@pytest.mark.parametrize("jump_length", [1, 2])
def test_jumps_of_repaint_reach_the_sampler(jump_length: int) -> None:
    model = build(small_variant("umd"))
    clips, holes = clips_for(model.recipe, 2), some()
    seen: list[float] = []
    options: Any = {"num_steps": 4, "num_resamples": 2, "jump_length": jump_length}
    repaint(model, clips, holes, on_step=lambda step: seen.append(step.t), **options)
    assert len(seen) == {1: 7, 2: 6}[jump_length], seen


@pytest.mark.parametrize("variant", SEE_NOISE)
def test_a_model_that_sees_noise_is_told_of_what_is_known(variant: str) -> None:
    """A visible pixel far from the hole changes what is painted; of a picture that is all hole nothing does."""
    model = build(small_variant(variant))
    clips, holes = clips_for(model.recipe, 4), odd_holes(model)
    painted = repaint(model, clips, holes, num_steps=3)
    changed = clips.clone()
    changed[..., 15, 15] = 1 - changed[..., 15, 15].round()
    other = repaint(model, changed, holes, num_steps=3)
    for i in (0, 1):
        hole = holes[i].expand(3, -1, -1, -1)
        assert not torch.equal(painted[i, 0, hole], other[i, 0, hole])
    assert torch.equal(painted[3], other[3])
    assert torch.equal(
        painted, repaint(model, clips, holes, num_steps=3, reimpose_known=False)
    )  # it knows no other way


@pytest.mark.parametrize("variant", ["dit", "umd", "umd_flow"])
def test_ddpm_goes_over_each_step_ten_times_where_something_is_known(variant: str) -> None:
    """All but the last, in which nothing is left to mix; a picture that is all hole is made in plain steps."""
    model = build(small_variant(variant))
    clips, holes = clips_for(model.recipe, 2), torch.ones(2, 1, 16, 16, dtype=torch.bool)
    for known, sampler, calls in ((True, "ddpm", 31), (False, "ddpm", 4), (True, "ddim", 4), (True, "dpmpp", 4)):
        holes[..., :3] = not known
        seen: list[float] = []
        repaint(model, clips, holes, num_steps=4, sampler=sampler, on_step=lambda step, seen=seen: seen.append(step.t))
        assert len(seen) == calls
        assert len(set(seen)) == 4


@pytest.mark.parametrize("variant", ["umd", "umd_flow", "umd faithful", "mae_umd", "mae_umd faithful", "umd_finetune"])
def test_the_prediction_of_a_model_with_clean_clips_is_its_clean_branchs(variant: str) -> None:
    """One step without noise, time 0 and no class, from the visible tokens alone."""
    model = build(small_variant(variant))
    clips = clips_for(model.recipe, 3)
    holes = named_holes(model.recipe.clip, "random:0.5", [0, 1, 2], seed=0)
    ((_, mask),) = group_rows(tokens_touched(holes, 4))
    with torch.inference_mode():
        x0 = model.tokens(clips)
        expected = model.pixels(scatter(x0, mask.hidden, model.reconstruct(x0, mask))).clamp(0, 1)
        visible = x0.gather(1, mask.visible[..., None].expand(-1, -1, 48))
        by_hand = model(visible, mask, None, torch.zeros(3) if model.schedule is None else None, None)["hidden"]["x0"]
        torch.testing.assert_close(model.reconstruct(x0, mask), by_hand.clamp(model.low, model.high), rtol=0, atol=0)
    assert torch.equal(predict(model, clips, holes), torch.where(holes[:, None], expected, clips))
    assert torch.equal(predict(model, clips, holes, seed=1), predict(model, clips, holes))
    if model.schedule is None:
        assert torch.equal(repaint(model, clips, holes, num_steps=9, num_samples=2)[:, 1], predict(model, clips, holes))


@pytest.mark.parametrize("variant", ["diffmae", "dit", "maskdit", "dit_umd", "diffmae nothing hidden", "umd_flow"])
def test_without_clean_clips_the_prediction_is_one_step_from_noise(variant: str) -> None:
    model = build(small_variant(variant))
    clips, holes = clips_for(model.recipe), some()
    one_step = repaint(model, clips, holes, num_steps=1, sampler="ddim", seed=4)[:, 0]
    assert torch.equal(predict(model, clips, holes, seed=4), one_step) == (variant != "umd_flow")


def test_predict_without_anything_visible_starts_from_noise() -> None:
    """UMD's clean branch always saw a quarter; and the noise of a clip is that of its own index."""
    recipe = small("umd")
    model, clips = build(recipe), clips_for(recipe, 3)
    everything = torch.ones(3, *clips.shape[2:], dtype=torch.bool)
    expected = repaint(model, clips, everything, num_steps=1, sampler="ddim", indices=[7, 8, 9])[:, 0]
    torch.testing.assert_close(predict(model, clips, everything, indices=[7, 8, 9]), expected)
    assert not torch.equal(predict(model, clips, everything), expected)
