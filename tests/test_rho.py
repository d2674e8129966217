"""Towards rho = 0 with the noise held fixed, a DiffMAE becomes an MAE whose mask token is that noise, embedded."""

import dataclasses
import itertools

import pytest
import torch
from small import build, clips_for, generator, part_of, predicted, small
from torch.testing import assert_close

from unveil.losses import Draws, Objective, draw

RHO = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
ROUNDING = 2e-6


@pytest.mark.parametrize("decoder", ["joint", "cross_self", "cross"])
@pytest.mark.parametrize("t", [10, 30, 500])
def test_diffmae_becomes_mae(decoder: str, t: int) -> None:
    """The gap falls with rho down to rounding and ends below 1e-5.

    It is that of the predictions, and at t = 500 also that of the losses; at early times the losses may cross on the way.
    """
    mae = build(small("mae_raw", decoder=decoder))
    clips = clips_for(mae.recipe, 4)
    masked = draw(mae.recipe, None, 0, 0, range(4))
    masks = part_of(masked)
    z = torch.randn(mae.recipe.clip.token_dim, generator=generator())  # one noise for every token
    times, noise = torch.full((4,), t), z.expand(4, masks.mask.hidden.shape[1], -1)
    noised = Draws((dataclasses.replace(masks, t=times, noise=noise),))
    prediction_gaps, loss_gaps = [], []
    with torch.no_grad():
        for rho in RHO:
            diffmae = build(small(decoder=decoder, rho=rho))
            shared = {k: v for k, v in diffmae.state_dict().items() if "condition" not in k and "noisy_embed" not in k}
            token = diffmae.decoder.noisy_embed(z) + diffmae.condition(times[:1], None)[0][0]
            mae.load_state_dict({**shared, "decoder.mask_token": token[None, None]})
            objectives = (Objective(diffmae), noised), (Objective(mae), masked)
            predictions = [predicted(objective, clips, draws)["hidden"]["x0"] for objective, draws in objectives]
            losses = [objective(clips, draws)[0] for objective, draws in objectives]
            prediction_gaps.append((predictions[0] - predictions[1]).abs().max().item())
            loss_gaps.append((losses[0] - losses[1]).abs().item())
    for gaps in (prediction_gaps, loss_gaps) if t == 500 else (prediction_gaps,):
        assert gaps[0] > 1e-3
        for larger, smaller in itertools.pairwise(gaps):
            assert smaller < max(larger, ROUNDING), gaps
    assert_close(*predictions, rtol=0, atol=1e-5)
    assert_close(*losses, rtol=0, atol=1e-5)
