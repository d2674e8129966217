"""What repainting refuses, and what a model says that it can do."""

import re
from typing import Any

import pytest
import torch
from small import build, clips_for, small, small_variant
from torch import Tensor

from unveil.pipeline import masked_view, repaint


def all_of(value: bool) -> Tensor:
    return torch.full((2, 1, 16, 16), value)


def some() -> Tensor:
    holes = all_of(False)
    holes[..., 8:] = True
    return holes


@pytest.mark.parametrize(
    "variant, abilities",
    [
        ("mae", {"represent"}),
        ("mae_raw", {"represent", "repaint"}),
        ("diffmae", {"represent", "repaint"}),
        ("diffmae all hidden", {"represent", "generate"}),
        ("diffmae nothing hidden", {"represent", "generate"}),
    ],
)
def test_can(variant: str, abilities: set[str]) -> None:
    assert build(small_variant(variant)).can == abilities


@pytest.mark.parametrize(
    "variant, holes, settings, message",
    [
        ("mae", some(), {}, "predicts patch-normalised values"),
        ("diffmae", all_of(True), {}, "was trained with 75% hidden and needs some of the picture"),
        ("mae_raw", all_of(True), {}, "Leave at least one whole patch visible"),
        ("diffmae all hidden", some(), {}, "it makes whole pictures and cannot go by a visible part"),
        ("diffmae nothing hidden", some(), {}, "it makes whole pictures and cannot go by a visible part"),
        ("diffmae", some().float(), {}, "The mask is (2, 1, 16, 16) of torch.float32"),
        ("diffmae", some()[:1], {}, "The mask is (1, 1, 16, 16)"),
        ("diffmae", some()[..., :8], {}, "True where the picture is to be repainted"),
        ("diffmae", some(), {"num_samples": 0}, "num_samples=0; ask for at least 1"),
        ("diffmae", some(), {"num_steps": 0}, "num_steps=0, but the schedule has 1000 times"),
        ("diffmae", some(), {"num_steps": 1001}, "Use 1 to 1000 steps"),
        ("diffmae", some(), {"sampler": "ddmp"}, "Did you mean 'ddpm'?"),
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


def test_a_denoiser_of_whole_pictures_refuses_a_visible_token() -> None:
    model = build(small(mask_ratio=0.0))
    from unveil.masking import Mask

    order = torch.arange(16)[None]
    with pytest.raises(ValueError, match="generates whole pictures only"):
        model.denoiser(torch.zeros(1, 16, 48), Mask(order[:, :1], order[:, 1:]))


def test_masked_view_is_gray_where_hidden() -> None:
    clips, holes = clips_for(small()), some()
    view = masked_view(clips, holes)
    everywhere = holes[:, None].expand_as(view)
    assert (view[everywhere] == 0.5).all()
    assert torch.equal(view[~everywhere], clips[~everywhere])


@pytest.mark.parametrize("variant", ["diffmae", "mae_raw"])
def test_an_untouched_picture_comes_back(variant: str) -> None:
    model = build(small_variant(variant))
    clips = clips_for(model.recipe)
    assert torch.equal(repaint(model, clips, all_of(False), num_steps=2)[:, 0], clips)
