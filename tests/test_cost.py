"""Multiply-adds from the recipe's numbers equal what PyTorch counts while the model runs."""

import pytest
import torch
from small import VARIANTS, batch_for, small, small_variant
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unveil.config import Recipe
from unveil.corruption import corrupt
from unveil.cost import masked_step


def counted(recipe: Recipe) -> dict[str, int]:
    """Multiply-adds of the forward pass of one clip, in all, in the encoder's blocks and in the decoder's."""
    objective, clips, draws = batch_for(recipe, n=1)
    model = objective.model
    c = corrupt(model.tokens(clips), draws.mask, recipe.branch.noise_on, draws.t, model.schedule, draws.noise)
    # attention by matrix products, which are counted; the fused kernel of a CPU is not
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(c.x_enc, draws.mask, c.x_dec, draws.t)
    by_module = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}

    def under(part: str, *leaves: str) -> int:
        return sum(by_module.get(f"{type(model).__name__}.{part}{leaf}", 0) for leaf in leaves)

    return {
        "forward": counter.get_total_flops() // 2,
        "embed": under("encoder.", "patch_embed", "time_embed") + under("decoder.", "noisy_embed", "time_embed"),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_multiply_adds_equal_pytorchs_count(variant: str) -> None:
    recipe = small_variant(variant)
    cost, expected = masked_step(recipe), counted(recipe)
    assert cost.forward == expected["forward"]
    assert cost.embed == expected["embed"]
    assert cost.train_flops == 6 * expected["forward"]


@pytest.mark.parametrize("arguments", [{"decoder": "cross", "mask_ratio": 1.0}, {"mask_ratio": 0.3, "height": 24}])
def test_multiply_adds_of_odd_shapes(arguments: dict) -> None:
    recipe = small(**arguments)
    assert masked_step(recipe).forward == counted(recipe)["forward"]


@pytest.mark.slow
@pytest.mark.parametrize("name, decoder", [("mae", "joint"), ("diffmae", "cross_self"), ("diffmae", "cross")])
def test_multiply_adds_at_full_size(name: str, decoder: str) -> None:
    from unveil.recipes import RECIPES

    recipe = RECIPES[name]("B/16", decoder=decoder)
    assert masked_step(recipe).forward == counted(recipe)["forward"]
