"""Several noises for one pass of the encoder, and a share of the hidden tokens decoded: the same numbers, for less."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small import clips_for, small
from torch import Tensor

from unveil import cli, recipes
from unveil.config import Branch, Term
from unveil.corruption import corrupt
from unveil.cost import masked_step
from unveil.losses import Objective, draw
from unveil.masking import Mask
from unveil.model import MaskedDiffusionAutoencoder
from unveil.recipe import Recipe


def built(**fields: Any) -> tuple[Recipe, MaskedDiffusionAutoencoder, Tensor]:
    recipe = small("diffmae", **fields)
    torch.manual_seed(0)
    model = MaskedDiffusionAutoencoder(recipe)
    return recipe, model, clips_for(recipe, 3)


@dataclass
class Drawn:
    mask: Mask
    t: Tensor
    noise: Tensor


def one_part(recipe: Recipe, model: MaskedDiffusionAutoencoder, num: int = 3) -> Drawn:
    (part,) = draw(recipe, model.schedule, 7, 2, range(num)).branches
    assert part is not None
    assert part.t is not None
    assert part.noise is not None
    return Drawn(part.mask, part.t, part.noise)


def predict(model: MaskedDiffusionAutoencoder, clips: Tensor, mask: Mask, t: Tensor, noise: Tensor) -> Tensor:
    c = corrupt(model.tokens(clips), mask, "hidden", t, model.schedule, noise)
    return model(c.x_enc, mask, c.x_dec, t)["hidden"]["x0"]


@pytest.mark.parametrize("decoder", ["cross_self", "cross", "joint"])
def test_draws_of_a_clip_are_decoded_as_if_each_were_alone(decoder: str) -> None:
    recipe, model, clips = built(decoder=decoder, num_draws=3)
    part = one_part(recipe, model)
    assert (part.t.shape, part.noise.shape[0]) == ((9,), 9)
    together = predict(model, clips, part.mask, part.t, part.noise).unflatten(0, (3, 3))
    hidden, t, noise = (x.unflatten(0, (3, 3)) for x in (part.mask.hidden, part.t, part.noise))
    assert not torch.equal(noise[:, 0], noise[:, 1])
    assert len(t.unique()) > 5
    for k in range(3):
        alone = predict(model, clips, Mask(part.mask.visible, hidden[:, k]), t[:, k], noise[:, k])
        torch.testing.assert_close(together[:, k], alone, rtol=1e-5, atol=1e-5)


def test_a_share_of_the_tokens_is_predicted_as_if_all_were() -> None:
    recipe, model, clips = built(decoder="cross", num_draws=2, decode_share=0.5)
    part = one_part(recipe, model)
    total = recipe.clip.num_tokens
    few = part.mask.hidden
    M = total - part.mask.visible.shape[1]
    assert few.shape == (6, round(M / 2))
    some = predict(model, clips, part.mask, part.t, part.noise)
    for row in range(6):
        clip = row // 2
        seen = set(part.mask.visible[clip].tolist())
        chosen = few[row].tolist()
        assert len(set(chosen)) == len(chosen)
        assert not seen & set(chosen)
        rest = [i for i in range(total) if i not in seen and i not in chosen]
        whole = Mask(part.mask.visible[clip : clip + 1], torch.tensor([chosen + rest]))
        noise = torch.cat([part.noise[row], torch.zeros(len(rest), recipe.clip.token_dim)])[None]
        alone = predict(model, clips[clip : clip + 1], whole, part.t[row : row + 1], noise)[0, : len(chosen)]
        torch.testing.assert_close(some[row], alone, rtol=1e-5, atol=1e-5)
    assert set(few[0].tolist()) != set(few[1].tolist())  # others in each draw


@pytest.mark.parametrize("masking", ["random", "center"])
def test_every_hidden_token_is_as_often_decoded(masking: Any) -> None:
    """Also where the hidden tokens stand in the grid's order, of which a prefix would be one side."""
    recipe = small("diffmae", decoder="cross", decode_share=0.25, masking=masking, mask_ratio=0.25, height=32)
    model = MaskedDiffusionAutoencoder(recipe)
    num = 2000
    part = one_part(recipe, model, num)
    counts = part.mask.hidden.flatten().bincount(minlength=recipe.clip.num_tokens).double()
    everywhere = counts[counts > 0]
    expected = part.mask.hidden.numel() / len(everywhere)
    assert ((everywhere - expected).abs() < 5 * expected**0.5).all()
    if masking == "random":
        assert len(everywhere) == recipe.clip.num_tokens


def test_the_loss_is_the_mean_over_draws_and_its_gradient_theirs() -> None:
    recipe, model, clips = built(num_draws=2)
    whole = draw(recipe, model.schedule, 7, 2, range(3))
    part = one_part(recipe, model)
    loss, _ = Objective(model)(clips, whole)
    separate = []
    for k in range(2):
        mask = Mask(part.mask.visible, part.mask.hidden[k::2])
        truth = model.tokens(clips)
        c = corrupt(truth, mask, "hidden", part.t[k::2], model.schedule, part.noise[k::2])
        prediction = model(c.x_enc, mask, c.x_dec, part.t[k::2])["hidden"]["x0"]
        separate.append((prediction.float() - c.hidden.x0).square().mean())
    torch.testing.assert_close(loss, torch.stack(separate).mean(), rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(torch.stack(separate).mean(), list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_draw_is_what_it_was_without_the_field() -> None:
    plain, model, _ = built()
    several = small("diffmae", num_draws=3)
    one, three = (one_part(recipe, model) for recipe in (plain, several))
    torch.testing.assert_close(one.t, three.t[::3], rtol=0, atol=0)
    torch.testing.assert_close(one.mask.visible, three.mask.visible, rtol=0, atol=0)


def test_what_it_saves_is_arithmetic() -> None:
    """Four draws by one pass of the encoder against four passes; and half of the tokens of a cross decoder."""
    one = masked_step(recipes.diffmae("B/16"))
    four = masked_step(recipes.diffmae("B/16", num_draws=4))
    assert four.encoder == one.encoder
    assert 3.7 * one.decoder < four.decoder < 4 * one.decoder  # keys and values once
    assert four.forward < 0.72 * 4 * one.forward
    whole = masked_step(recipes.diffmae("B/16", decoder="cross"))
    half = masked_step(recipes.diffmae("B/16", decoder="cross", decode_share=0.5))
    assert 0.45 * whole.decoder < half.decoder < 0.65 * whole.decoder


def test_from_the_command_line(tmp_path: Any) -> None:
    words = "pretrain --data digits:test --epochs 1 --decoder cross --num-draws 2 --decode-share 0.5 --out"
    cli.main([*words.split(), str(tmp_path / "run")])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_draws": 0}, "num_draws=0"),
        ({"decode_share": 0.0}, "decode_share=0.0"),
        ({"decode_share": 1.5}, "decode_share=1.5"),
        ({"decode_share": 0.5}, "whose hidden tokens see each other"),
        ({"decode_share": 0.5, "decoder": "joint"}, "whose hidden tokens see each other"),
        ({"num_draws": 2, "mask_ratio": 0.0}, "only a decoder of noisy hidden tokens"),
    ],
)
def test_levers_without_their_decoder_refuse(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.diffmae("Nano/4", **fields)


def test_levers_on_a_clean_branch_refuse() -> None:
    with pytest.raises(ValueError, match=r"num_draws=2 and decode_share=1\.0 with noise_on='none'"):
        Branch(mask_ratio=0.75, noise_on="none", num_draws=2, terms=(Term(predict="x0", on="hidden"),))
