"""Towards rho = 0 with the noise held fixed, a DiffMAE becomes an MAE whose mask token is that noise, embedded."""

import pytest
import torch
from small import build, clips_for, generator, small

from unveil.losses import Draws, Objective, draw

RHO = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


@pytest.mark.parametrize("decoder", ["joint", "cross_self", "cross"])
@pytest.mark.parametrize("t", [10, 500])
def test_the_loss_becomes_maes(decoder: str, t: int) -> None:
    """The gap falls with rho down to rounding (1e-6) and ends below 1e-5."""
    mae = build(small("mae_raw", decoder=decoder))
    clips = clips_for(mae.recipe, 4)
    masks = draw(mae.recipe, None, 0, 0, range(4))
    z = torch.randn(mae.recipe.clip.token_dim, generator=generator())  # one noise for every token
    times, noise = torch.full((4,), t), z.expand(4, masks.mask.hidden.shape[1], -1)
    gaps = []
    with torch.no_grad():
        for rho in RHO:
            diffmae = build(small(decoder=decoder, rho=rho))
            shared = {k: v for k, v in diffmae.state_dict().items() if "time_embed" not in k and "noisy_embed" not in k}
            token = diffmae.decoder.noisy_embed(z) + diffmae.decoder.time_embed(times[:1])[0]
            mae.load_state_dict({**shared, "decoder.mask_token": token[None, None]})
            loss, _ = Objective(diffmae)(clips, Draws(masks.mask, times, noise))
            gaps.append((loss - Objective(mae)(clips, masks)[0]).abs().item())
    assert gaps[0] > 1e-4
    for larger, smaller in zip(gaps, gaps[1:], strict=False):
        assert smaller < max(larger, 1e-6), gaps
    assert gaps[-1] < 1e-5, gaps
