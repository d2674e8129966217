"""UMD and its siblings against their description (arXiv 2406.17688 and the authors' code), each formula written once more."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import (
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
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from unveil import recipes
from unveil.config import Term
from unveil.corruption import Part
from unveil.features import encoder_features, usual_pool
from unveil.layers import Attention, Block, Condition, PositionTable, RMSNorm, Trunk, rotate, run_block, sinusoid
from unveil.losses import BranchDraws, Draws, Objective, draw, variance_bound
from unveil.masking import gather, scatter
from unveil.model import MaskedDiffusionAutoencoder
from unveil.optim import optimizer_for
from unveil.recipe import Recipe
from unveil.schedule import DiscreteSchedule, FlowSchedule
from unveil.tokens import rotary_angles, unpatchify

FAMILY = [v for v in VARIANTS if "umd" in v and "flow" not in v]  # eps and x0, as UMD's authors have it
CLASSES_AND_CLEAN = ["umd_finetune", "umd_finetune faithful", "umd_flow generator", "mae_umd generator"]
ADALN = [v for v in VARIANTS if shipped(v).condition.time == "adaln"]
TOKEN = [v for v in VARIANTS if shipped(v).condition.time == "token"]


def spied(model: MaskedDiffusionAutoencoder) -> list[tuple[Tensor, Tensor | None]]:
    """Fills with the (t, labels) that the network is told."""
    told: list[tuple[Tensor, Tensor | None]] = []
    assert model.condition is not None
    model.condition.register_forward_hook(lambda module, arguments, output: told.append(arguments))
    return told


# The loss


def picture(recipe: Recipe, indices: Tensor, values: Tensor) -> Tensor:
    """Tokens at their places, zeros elsewhere, as normalised pixels."""
    blank = torch.zeros(len(values), recipe.clip.num_tokens, recipe.clip.token_dim)
    clip = recipe.clip
    return unpatchify(scatter(blank, indices, values), clip.grid, clip.patch_size, clip.tubelet_size)


@pytest.mark.parametrize("variant", FAMILY)
def test_the_loss_is_umds(variant: str) -> None:
    """spec/umd.md, section 2.3, on whole pictures with the mask M at the pixels' resolution, 1 = removed.

    L0 = mean(M (x0_hat - x0)^2) / mean(M)
    L1 = 1/2 [mean((1 - M) (eps_hat - eps)^2) / mean(1 - M) + mean(M (x0_hat - x0)^2) / mean(M)], of a clip with M != 0
    L1 = 1/2 [mean (eps_hat - eps)^2 + mean (x0_hat - x0)^2], of one with M = 0
    L = n0 / B L0 + (1 - n0 / B) L1
    """
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe, n=enough(recipe) + 3)
    model = objective.model
    x0 = (clips - model.mean) / model.std
    if recipe.clip.bounded:  # pixels in [-1, 1]; latents as they are
        assert recipe.clip.mean == recipe.clip.std == (0.5,) * recipe.clip.channels
    else:
        assert (recipe.clip.mean, recipe.clip.std) == ((0.0,) * 4, (1.0,) * 4)
    expected, counts = 0.0, []
    with torch.no_grad():
        for number, branch in enumerate(recipe.branches):
            part = part_of(draws, number)
            c = corrupted(objective, clips, draws, number)
            predictions = model(c.x_enc, part.mask, None, part.t, part.labels, on=("visible", "hidden"))

            def whole(name: str, predictions: Any = predictions, mask: Any = part.mask) -> Tensor:
                visible = picture(recipe, mask.visible, predictions["visible"][name])
                return visible + picture(recipe, mask.hidden, predictions["hidden"][name])

            ones = torch.ones(len(part.rows), part.mask.hidden.shape[1], recipe.clip.token_dim)
            M = picture(recipe, part.mask.hidden, ones)
            of_x0 = (whole("x0") - x0[part.rows]) ** 2
            if branch.noise_on == "none":
                loss = (M * of_x0).mean() / M.mean()
            else:
                assert part.noise is not None
                of_eps = (whole("eps") - picture(recipe, part.mask.visible, part.noise)) ** 2
                if branch.mask_ratio:
                    loss = ((1 - M) * of_eps).mean() / (1 - M).mean() + (M * of_x0).mean() / M.mean()
                else:
                    loss = of_eps.mean() + of_x0.mean()
                loss = loss / 2
            expected = expected + len(part.rows) / len(clips) * loss
            counts.append(len(part.rows))
        assert sum(counts) == len(clips)
        assert_close(objective(clips, draws)[0], torch.as_tensor(expected), rtol=1e-6, atol=1e-6)


def test_the_family_differs_in_branches_alone() -> None:
    """no_noise_prob 0 is MaskDiT and DiT, 1 is MAE; 75 %, 37.5 % and 50 % hidden."""
    described = {
        name: [(b.share, b.mask_ratio, b.noise_on) for b in recipes.RECIPES[name]().branches]
        for name in ("umd", "dit_umd", "maskdit_umd", "mae_umd")
    }
    assert described == {
        "umd": [(0.5, 0.75, "none"), (0.5, 0.375, "visible")],
        "dit_umd": [(1.0, 0.0, "visible")],
        "maskdit_umd": [(1.0, 0.5, "visible")],
        "mae_umd": [(1.0, 0.75, "none")],
    }
    umd = recipes.umd()
    for name in ("dit_umd", "maskdit_umd"):
        other = recipes.RECIPES[name]()
        assert dataclasses.replace(other, name="umd", branches=umd.branches) == umd
    assert recipes.umd(faithful=True).branches == recipes.mae_umd(faithful=True).branches == umd.branches


@pytest.mark.parametrize(
    "variant, visible",
    [("umd", (64, 160)), ("maskdit_umd", (128,)), ("dit_umd", (256,)), ("mae_umd", (64,)), ("umd_finetune", (64, 256))],
)
def test_kept_tokens(variant: str, visible: tuple[int, ...]) -> None:
    """64, 160 and 128 of 256 at 64 x 64 in patches of 4."""
    recipe = shipped(variant)
    model_free = draw(recipe, DiscreteSchedule("cosine"), 0, 0, range(enough(recipe)))
    assert tuple(part_of(model_free, i).mask.visible.shape[1] for i in range(len(visible))) == visible


@pytest.mark.parametrize("variant", ["umd", "umd_flow", "mae_umd", "dit_umd", "umd_finetune", "dit", "maskdit"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_branch_without_clips_leaves_no_trace(variant: str, n: int) -> None:
    """No mean over nothing: the loss is finite, and of one clip it is that of the clip's branch."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe, n=n)
    loss, logs = objective(clips, draws)
    loss.backward()
    assert loss.isfinite()
    present = [number for number, part in enumerate(draws.branches) if part is not None]
    assert sum(len(part_of(draws, number).rows) for number in present) == n
    assert {name.split("/")[0] for name in logs} == {recipe.branches[number].noise_on for number in present}
    for parameter in objective.model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    terms = [(recipe.branches[number], term) for number in present for term in recipe.branches[number].terms]
    shares = {recipe.branches[number].noise_on: len(part_of(draws, number).rows) / n for number in present}
    total = sum(
        shares[b.noise_on] * term.weight * logs[f"{b.noise_on}/{term.predict}/{term.on}"].mean() for b, term in terms
    )
    assert_close(loss.detach(), torch.as_tensor(total), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["umd_flow", "umd_flow generator"])
def test_v_space_is_the_error_of_the_velocity(variant: str) -> None:
    """v = eps - x0, and v_hat = (x_t - x0_hat) / max(t, 0.05): JiT, arXiv 2511.13720, where 1 - t is our t."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    part = part_of(draws, 1)
    t = torch.linspace(0.01, 1.0, len(part.rows))
    part = dataclasses.replace(part, t=t)
    draws = Draws((draws.branches[0], part))
    c = corrupted(objective, clips, draws, 1)
    x0_hat = predicted(objective, clips, draws, 1)["visible"]["x0"]
    assert c.visible.x_t is not None
    assert part.noise is not None
    bound = t.clamp(min=0.05)[:, None, None]
    v, v_hat = (c.visible.x_t - c.visible.x0) / bound, (c.visible.x_t - x0_hat) / bound
    _, logs = objective(clips, draws)
    assert_close(logs["visible/x0/visible"], (v_hat - v).square().mean(-1), rtol=1e-4, atol=1e-5)
    late = t > 0.05
    assert late.any()
    assert not late.all()
    assert_close(v[late], (part.noise - c.visible.x0)[late], rtol=1e-4, atol=1e-4)


def test_v_space_holds_on_a_schedule_of_steps_too() -> None:
    """v = alpha eps - sigma x0 with eps_hat from x0_hat; Salimans & Ho 2022."""
    recipe = dataclasses.replace(
        small("umd_flow"),
        schedule=dataclasses.replace(small("umd").schedule, kind="linear"),  # type: ignore[type-var]
    )
    objective, clips, draws = batch_for(recipe)
    part = dataclasses.replace(part_of(draws, 1), t=torch.tensor([60, 700]))
    draws = Draws((draws.branches[0], part))
    c = corrupted(objective, clips, draws, 1)
    x0_hat = predicted(objective, clips, draws, 1)["visible"]["x0"]
    assert c.visible.x_t is not None
    assert c.visible.eps is not None
    alpha, sigma = (r.float()[:, None, None] for r in objective.model.schedule.rates(part.t))  # type: ignore[union-attr]
    eps_hat = (c.visible.x_t - alpha * x0_hat) / sigma
    error = (alpha * eps_hat - sigma * x0_hat) - (alpha * c.visible.eps - sigma * c.visible.x0)
    assert_close(objective(clips, draws)[1]["visible/x0/visible"], error.square().mean(-1), rtol=1e-4, atol=1e-5)


# The learned variance


def bound_by_hand(share: Tensor, part: Part, eps_hat: Tensor, t: int, kind: str) -> Tensor:
    """Bits per value of one clip's tokens, (S,), float64, from Ho et al. 2020 and Nichol & Dhariwal 2021 by the betas."""
    betas = DiscreteSchedule(kind).betas
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    beta, now, before = betas[t - 1], abar[t], abar[t - 1]

    def posterior_variance(t: int) -> Tensor:
        return betas[t - 1] * (1 - abar[t - 1]) / (1 - abar[t])

    def posterior_mean(x0: Tensor, x_t: Tensor) -> Tensor:
        return before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * x_t

    assert part.x_t is not None
    x0, x_t, eps_hat, share = (x.double() for x in (part.x0, part.x_t, eps_hat, share))
    log_variance = share * beta.log() + (1 - share) * posterior_variance(max(t, 2)).log()
    mean = posterior_mean((x_t - (1 - now).sqrt() * eps_hat) / now.sqrt(), x_t)
    model = Normal(mean, (log_variance / 2).exp())
    if t > 1:
        nats = kl_divergence(Normal(posterior_mean(x0, x_t), posterior_variance(t).sqrt()), model)
    else:  # the probability of each value's bin of 1/255 of the range [-1, 1]
        above = torch.where(x0 > 1 - 1 / 255, 1.0, model.cdf(x0 + 1 / 255))
        below = torch.where(x0 < -1 + 1 / 255, 0.0, model.cdf(x0 - 1 / 255))
        nats = -(above - below).clamp(min=1e-12).log()
    return nats.mean(-1) / math.log(2)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1, 2, 3, 50, 500, 999, 1000])
def test_the_variances_bound_by_hand(kind: str, t: int) -> None:
    schedule = DiscreteSchedule(kind)
    alpha, sigma = (rate.float() for rate in schedule.rates(t))
    x0 = torch.rand(2, 5, 12, generator=generator(1)) * 2 - 1
    x0[0, 0, :2], x0[0, 1, :2] = 1.0, -1.0  # the outermost bins
    eps, wrong = torch.randn(2, 2, 5, 12, generator=generator(2)).unbind()
    eps_hat, share = eps + 0.1 * wrong, torch.rand(2, 5, 12, generator=generator(3))
    part = Part(x0, eps, alpha * x0 + sigma * eps)
    low, high = torch.full((12,), -1.0), torch.ones(12)
    times = torch.full((2,), t)
    bits = variance_bound(share, part, eps_hat, times, schedule, low, high)
    expected = torch.stack(
        [bound_by_hand(*(x[i] for x in (share,)), one(part, i), eps_hat[i], t, kind) for i in (0, 1)]
    )
    assert_close(bits.double(), expected, rtol=2e-3, atol=2e-4)


def one(part: Part, row: int) -> Part:
    return Part(*(None if x is None else x[row] for x in (part.x0, part.eps, part.x_t)))  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["dit", "dit classes", "dit generator"])
def test_the_bound_trains_the_variance_alone(variant: str) -> None:
    """Its value enters the loss at weight 1; its gradient reaches the variance's prediction, and not that of the noise."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    part = dataclasses.replace(part_of(draws), t=torch.tensor([1, 3]))  # where the share makes the largest difference
    draws = Draws((part,))
    made = predicted(objective, clips, draws)["visible"]
    predictions = {name: value.detach().requires_grad_() for name, value in made.items()}
    c = corrupted(objective, clips, draws)
    bound, noise = recipe.branches[0].terms[1], recipe.branches[0].terms[0]
    assert (bound.predict, bound.weight, noise.predict) == ("variance", 1.0, "eps")
    bits = objective.score(bound, predictions, c.visible, part.t)
    bits.mean().backward()
    assert predictions["eps"].grad is None
    gradient = predictions["variance"].grad
    assert gradient is not None
    assert (gradient != 0).all()
    assert part.t is not None
    for i, t in enumerate(part.t.tolist()):
        share = (made["variance"][i].detach() + 1) / 2
        expected = bound_by_hand(share, one(c.visible, i), made["eps"][i].detach(), t, "linear")
        assert_close(bits[i].detach().double(), expected, rtol=2e-3, atol=2e-4)
        assert (
            bound_by_hand(share * 0.9, one(c.visible, i), made["eps"][i].detach(), t, "linear") - expected
        ).abs().max() > 0.01
    objective.score(noise, predictions, c.visible, part.t).mean().backward()
    assert predictions["eps"].grad is not None
    loss, logs = objective(clips, draws)
    assert_close(loss, logs["visible/eps/visible"].mean() + logs["visible/variance/visible"].mean())


# Time and class


@pytest.mark.parametrize("variant", [v for v in VARIANTS if shipped(v).condition.time in ("adaln", "token")])
def test_the_network_is_told_the_time_and_zero_for_clean(variant: str) -> None:
    """k + 1 in 1 .. 1000 for k in 0 .. 999; 1000 t on a flow; nothing but 0 in the clean branch."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    told = spied(objective.model)
    objective(clips, draws)
    assert len(told) == len(recipe.branches)
    for number, (branch, (t, _)) in enumerate(zip(recipe.branches, told, strict=True)):
        part = part_of(draws, number)
        assert t.shape == part.rows.shape
        if branch.noise_on == "none":
            assert (t == 0).all()
            assert part.t is None
            continue
        assert part.t is not None
        assert torch.equal(t, (1000 * part.t if recipe.schedule.kind == "flow" else part.t).float())  # type: ignore[union-attr]
        assert (t > 0).all()
        assert (t <= 1000).all()
    told.clear()
    objective.model.encode(clips[:2])
    assert (told[0][0] == 0).all()  # the probe's input is clean
    assert told[0][1] is None


def test_every_time_is_drawn() -> None:
    schedule = DiscreteSchedule("cosine")
    times = part_of(draw(small("dit_umd"), schedule, 0, 0, range(2000))).t
    assert times is not None
    assert times.min() >= 1
    assert times.max() <= 1000
    counts = torch.histc(times.float(), bins=4, min=0.5, max=1000.5)
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    drawn = schedule.sample_t(20_000, generator())
    assert (int(drawn.min()), int(drawn.max())) == (1, 1000)


@pytest.mark.parametrize("variant", CLASSES_AND_CLEAN)
def test_the_clean_branch_ignores_labels(variant: str) -> None:
    """Other labels move no bit of it, and what its network is told is "no class"; the noisy branch is another matter."""
    recipe = small_variant(variant)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, label_dropout=0.0))
    n, K = enough(recipe), recipe.condition.num_classes
    objective, clips = Objective(build(recipe)), clips_for(recipe, n)
    schedule, told = objective.model.schedule, spied(objective.model)
    labels = labels_for(recipe, n)
    assert labels is not None
    before, after = (
        objective(clips, draw(recipe, schedule, 0, 0, range(n), labels=chosen))[1]
        for chosen in (labels, (labels + 1) % K)
    )
    for name, values in before.items():
        assert torch.equal(values, after[name]) == name.startswith("none/"), name
    (_, clean), (_, noisy) = told[:2]
    assert clean is None or (clean == K).all()
    assert noisy is not None
    rows = part_of(draw(recipe, schedule, 0, 0, range(n), labels=labels), 1).rows
    assert torch.equal(noisy, labels[rows])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if shipped(v).condition.num_classes])
def test_no_class_is_the_last_row(variant: str) -> None:
    recipe = small_variant(variant)
    model, K = build(recipe), recipe.condition.num_classes
    assert model.condition is not None
    t = torch.tensor([3.0, 700.0])
    none, last, first = (model.condition(t, labels)[0] for labels in (None, torch.full((2,), K), torch.zeros(2).long()))
    assert torch.equal(none, last)
    assert not torch.equal(none, first)
    assert model.condition.label_embed.weight.shape[0] == K + 1  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", ["umd_finetune", "dit classes", "umd_flow generator"])
def test_a_tenth_of_the_labels_is_dropped(variant: str) -> None:
    """Those of unknown class, -1, always; the others become "no class" at random, by seed, epoch and index."""
    recipe = small_variant(variant)
    n, K = 3000, recipe.condition.num_classes
    labels, number = torch.arange(n) % K, len(recipe.branches) - 1
    small_noise = dataclasses.replace(recipe, clip=dataclasses.replace(recipe.clip, height=4, width=8))
    schedule = build(recipe).schedule

    def drawn(epoch: int, labels: Tensor | None, recipe: Recipe = small_noise) -> BranchDraws:
        part = part_of(draw(recipe, schedule, 0, epoch, range(n), labels=labels), number)
        assert part.labels is not None
        return part

    part = drawn(0, labels)
    mine, kept = labels[part.rows], part.labels != K  # type: ignore[operator]
    assert torch.equal(part.labels[kept], mine[kept])  # type: ignore[index]
    share = 1 - kept.double().mean().item()
    assert recipe.training.label_dropout == 0.1
    assert abs(share - 0.1) < 5 * (0.09 / len(mine)) ** 0.5
    again, other = drawn(0, labels), drawn(1, labels)
    assert torch.equal(part.labels, again.labels)  # type: ignore[arg-type]
    assert not torch.equal(part.labels, other.labels)  # type: ignore[arg-type]
    unknown = labels.clone()
    unknown[::3] = -1
    part = drawn(0, unknown)
    assert (part.labels[part.rows % 3 == 0] == K).all()  # type: ignore[index]
    assert (part.labels[part.rows % 3 > 0] != K).any()  # type: ignore[index]
    assert (drawn(0, None).labels == K).all()
    sure = dataclasses.replace(small_noise, training=dataclasses.replace(recipe.training, label_dropout=0.0))
    assert torch.equal(drawn(0, labels, sure).labels, mine)  # type: ignore[arg-type]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def through(trunk: Trunk, x: Tensor) -> Tensor:
    hidden = silu(x @ trunk.fc1.weight.T + trunk.fc1.bias)
    return hidden @ trunk.fc2.weight.T + trunk.fc2.bias


@pytest.mark.parametrize("activate", [True, False])
def test_umds_condition_by_hand(activate: bool) -> None:
    """[sin, cos] of t exp(-ln(10000) i / (w/2 - 1)), w to 2w to w; labels likewise; SiLU of the sum under adaLN only."""
    w = 32
    torch.manual_seed(0)
    condition = Condition(w, wide=True, num_classes=5, activate=activate)
    assert condition.time.fc1.weight.shape == (2 * w, w)
    t, labels = torch.tensor([0.0, 1.0, 500.0, 1000.0]), torch.tensor([5, 0, 3, 1])
    frequencies = torch.tensor([math.exp(-math.log(10000) * i / (w // 2 - 1)) for i in range(w // 2)])
    angles = t[:, None] * frequencies
    expected = through(condition.time, torch.cat([angles.sin(), angles.cos()], dim=1))
    assert condition.label is not None
    assert condition.label_embed is not None
    expected = expected + through(condition.label, condition.label_embed.weight[labels])
    assert_close(condition(t, labels)[0], silu(expected) if activate else expected, rtol=1e-5, atol=1e-6)


def test_dits_condition_by_hand() -> None:
    """256 values, [cos, sin] of t exp(-ln(10000) i / 128), a hidden layer of the width; a class is its row."""
    w = 32
    torch.manual_seed(0)
    condition = Condition(w, wide=False, num_classes=5, activate=True)
    assert condition.time.fc1.weight.shape == (w, 256)
    assert condition.label is None
    t, labels = torch.tensor([0.0, 1.0, 500.0, 1000.0]), torch.tensor([5, 0, 3, 1])
    angles = t[:, None] * torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)])
    embedded = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert_close(sinusoid(t, 256), embedded, rtol=0, atol=2e-4)  # angles up to 1000 in float32
    assert condition.label_embed is not None
    expected = through(condition.time, embedded) + condition.label_embed.weight[labels]
    assert_close(condition(t, labels)[0], silu(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ADALN)
def test_every_adaln_block_is_the_identity_at_init(variant: str) -> None:
    """In the encoder and the decoder, whatever it is told; once moved, it listens."""
    recipe = small_variant(variant)
    torch.manual_seed(0)
    fresh, moved = MaskedDiffusionAutoencoder(recipe), build(recipe)
    for model, same in ((fresh, True), (moved, False)):
        blocks = [*model.encoder.blocks, *(model.decoder.blocks if model.decoder else ())]
        assert len(blocks) == recipe.encoder.depth + (recipe.decoder.depth if recipe.decoder else 0)
        for block in blocks:
            assert isinstance(block, Block)
            width = block.norm1.normalized_shape[0]
            cond_dim = block.modulation.in_features  # type: ignore[union-attr]
            x, cond = torch.randn(2, 7, width, generator=generator()), torch.randn(2, cond_dim, generator=generator(1))
            assert torch.equal(block(x, cond), x) == same
            assert torch.equal(block(x, cond), block(x, cond + 1)) == same
    # so the encoder's output is its normalised input, and the condition leaves no trace
    clips = clips_for(recipe)
    x = fresh.tokens(clips)
    everything = torch.arange(x.shape[1]).expand(2, -1)
    plain = fresh.encoder.patch_embed(x) + fresh.encoder.positions(everything)
    norm = fresh.encoder.norm or fresh.head.norm
    assert torch.equal(fresh.encode(clips)[:, recipe.encoder.num_class_tokens :], norm(plain))


def test_a_modulated_block_by_hand() -> None:
    """h = LN(x) (1 + scale) + shift, both branches gated; in the order shift, scale, gate, shift, scale, gate."""
    torch.manual_seed(0)
    block = Block(16, 2, cond_dim=8, mlp="gelu_tanh")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, cond = torch.randn(2, 5, 16), torch.randn(2, 8)
    linear = block.modulation
    assert linear is not None
    s1, c1, g1, s2, c2, g2 = (cond @ linear.weight.T + linear.bias).reshape(2, 6, 1, 16).unbind(1)
    middle = x + g1 * block.attn(block.norm1(x) * (1 + c1) + s1)
    hidden = F.gelu(block.mlp.fc1(block.norm2(middle) * (1 + c2) + s2), approximate="tanh")
    assert_close(block(x, cond), middle + g2 * block.mlp.fc2(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", TOKEN)
def test_the_condition_is_put_before_every_block_and_taken_off_again(variant: str) -> None:
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model = objective.model
    assert model.condition is not None
    assert model.decoder is not None
    conditions: list[Tensor] = []
    model.condition.register_forward_hook(lambda module, arguments, output: conditions.append(output[0]))
    seen: list[tuple[Tensor, Tensor]] = []
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.register_forward_hook(lambda module, arguments, output: seen.append((arguments[0], output)))
    depth = recipe.encoder.depth
    for number in range(len(recipe.branches)):
        conditions.clear()
        seen.clear()
        objective(clips, only(draws, number))
        assert len(seen) == depth + len(model.decoder.blocks)
        for given, _ in seen:
            assert torch.equal(given[:, 0], conditions[0])  # fresh, whatever the last block made of it
        for (_, output), (given, _) in (*itertools.pairwise(seen[:depth]), *itertools.pairwise(seen[depth:])):
            assert torch.equal(output[:, 1:], given[:, 1:])
            assert not torch.equal(output[:, 0], given[:, 0])


@pytest.mark.parametrize("variant", ["diffmae nothing hidden"])
def test_an_added_time_goes_to_the_patches(variant: str) -> None:
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model, part = objective.model, part_of(draws)
    given: list[Tensor] = []
    model.encoder.blocks[0].register_forward_hook(lambda module, arguments, output: given.append(arguments[0]))
    objective(clips, draws)
    c = corrupted(objective, clips, draws)
    assert model.condition is not None
    assert part.t is not None
    patches = model.encoder.patch_embed(c.x_enc) + model.encoder.positions(part.mask.visible)
    assert torch.equal(given[0][:, 1:], patches + model.condition(part.t, None)[0][:, None])
    assert torch.equal(given[0][:, :1], model.encoder.cls_token.expand(2, -1, -1))  # type: ignore[union-attr]


# Class tokens, summary and decoder


@pytest.mark.parametrize("variant", ["umd", "umd faithful", "umd_flow", "mae_umd", "dit_umd"])
def test_four_class_tokens_stand_nowhere(variant: str) -> None:
    """They come first, without a position, whatever is visible."""
    objective, clips, draws = batch_for(small_variant(variant))
    model = objective.model
    given: list[Tensor] = []
    model.encoder.blocks[0].register_forward_hook(lambda module, arguments, output: given.append(arguments[0]))
    objective(clips, only(draws, 0))
    first = 1 if model.encoder.time == "token" else 0
    tokens = model.encoder.cls_token
    assert tokens is not None
    assert tokens.shape == (1, 4, 32)
    assert torch.equal(given[0][:, first : first + 4], tokens.expand(len(given[0]), -1, -1))
    assert given[0].shape[1] == first + 4 + part_of(draws).mask.visible.shape[1]


@pytest.mark.parametrize("variant", ["umd faithful", "umd_finetune faithful"])
def test_equal_class_tokens_stay_equal(variant: str) -> None:
    """The authors' zeros: no step can tell the four apart. Up to the rounding of their different places in a sum."""
    recipe = small_variant(variant)
    torch.manual_seed(0)
    assert (MaskedDiffusionAutoencoder(recipe).encoder.cls_token == 0).all()
    objective, clips, draws = batch_for(recipe)
    tokens = objective.model.encoder.cls_token
    assert tokens is not None
    with torch.no_grad():
        tokens.zero_()
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        objective(clips, draws)[0].backward()
        optimizer.step()
        encoded = objective.model.encode(clips)[:, :4]
        assert_close(encoded, encoded[:, :1].expand_as(encoded), rtol=0, atol=1e-5)
        assert_close(tokens, tokens[:, :1].expand_as(tokens), rtol=0, atol=1e-6)
    assert tokens.abs().max() > 1e-4  # and yet they learned


@pytest.mark.parametrize("variant", ["umd", "umd_flow", "mae_umd", "umd_finetune"])
def test_class_tokens_are_told_apart_by_default(variant: str) -> None:
    recipe = small_variant(variant)
    torch.manual_seed(0)
    model = MaskedDiffusionAutoencoder(recipe)
    tokens, encoded = model.encoder.cls_token, model.encode(clips_for(recipe))[:, :4]
    assert tokens is not None
    for i in range(3):
        assert (tokens[:, i] - tokens[:, i + 1]).abs().max() > 1e-3
        assert (encoded[:, i] - encoded[:, i + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["umd", "umd_finetune", "mae_umd", "umd_flow"])
def test_the_decoder_is_given_the_mean_of_the_class_tokens_and_mask_tokens(variant: str) -> None:
    """One summary without projection or position; patches with the decoder's own positions; mask tokens alike with theirs."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model = objective.model
    decoder, encoder = model.decoder, model.encoder
    assert decoder is not None
    assert decoder.embed is None
    assert decoder.noisy_embed is None
    given: list[Tensor] = []
    memory: list[Tensor] = []
    decoder.blocks[0].register_forward_hook(lambda module, arguments, output: given.append(arguments[0]))
    encoder.register_forward_hook(lambda module, arguments, output: memory.extend(output))
    for number in range(len(recipe.branches)):
        given.clear()
        memory.clear()
        objective(clips, only(draws, number))
        mask = part_of(draws, number).mask
        V = mask.visible.shape[1]
        x = given[0][:, 1:] if decoder.time == "token" else given[0]
        assert x.shape[1] == 1 + recipe.clip.num_tokens
        assert torch.equal(x[:, 0], memory[0][:, :4].mean(1))
        assert torch.equal(x[:, 1 : 1 + V], memory[0][:, 4:] + decoder.positions(mask.visible))
        assert decoder.mask_token is not None
        assert torch.equal(x[:, 1 + V :], decoder.mask_token + decoder.positions(mask.hidden))
    if recipe.network.positions == "learned":
        assert encoder.positions.pos_embed is not decoder.positions.pos_embed
        assert not torch.equal(encoder.positions.pos_embed, decoder.positions.pos_embed)


def test_a_narrower_decoder_is_bridged_under_the_condition() -> None:
    """MaskDiT's: the encoder's output is modulated, projected, and only then given positions."""
    objective, clips, draws = batch_for(small("maskdit"))
    model, part = objective.model, part_of(draws)
    decoder = model.decoder
    assert decoder is not None
    c = corrupted(objective, clips, draws)
    assert model.condition is not None
    assert part.t is not None
    cond, _ = model.condition(part.t, None)
    (memory,) = model.encoder(c.x_enc, part.mask.visible, (3,), cond)
    assert decoder.embed is not None
    assert decoder.embed_modulation is not None
    shift, scale = decoder.embed_modulation(cond)[:, None].chunk(2, dim=-1)
    expected = decoder.embed(memory * (1 + scale) + shift) + decoder.positions(part.mask.visible)
    assert_close(decoder.prepare([memory], part.mask.visible, cond).known, expected, rtol=1e-6, atol=1e-6)


def test_a_head_is_modulated_and_not_gated() -> None:
    head = build(small("umd")).head
    x, cond = torch.randn(2, 3, 32, generator=generator()), torch.randn(2, 32, generator=generator(1))
    assert head.modulation is not None
    shift, scale = head.modulation(cond)[:, None].chunk(2, dim=-1)
    for name, prediction in head(x, cond).items():
        assert_close(prediction, head.pred[name](head.norm(x) * (1 + scale) + shift), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["umd", "umd_flow", "mae_umd", "dit_umd"])
def test_the_representation_is_the_mean_of_the_class_tokens(variant: str) -> None:
    """After the final norm; patches are not pooled. DiT and MaskDiT have no class tokens."""
    recipe = small_variant(variant)
    model, clips = build(recipe), clips_for(recipe)
    last: list[Tensor] = []
    model.encoder.blocks[-1].register_forward_hook(lambda module, arguments, output: last.append(output))
    features = encoder_features(model)(clips, torch.arange(2))
    assert usual_pool(recipe) == "class"
    block = last[0][:, 1:] if model.encoder.time == "token" else last[0]
    assert model.encoder.norm is not None
    with torch.inference_mode():
        assert_close(features, model.encoder.norm(block)[:, :4].mean(1), rtol=1e-6, atol=1e-6)
    for other in ("dit", "maskdit", "mae", "diffmae"):
        assert usual_pool(small(other)) == "mean"


# Tokens that carry the class


def test_label_tokens_join_at_their_block_and_never_leave_the_encoder() -> None:
    """Patches and class tokens depend on them from that block on, and not before; no token of theirs comes out."""
    recipe = small("umd_flow", depth=4, generator=5)
    recipe = dataclasses.replace(recipe, condition=dataclasses.replace(recipe.condition, label_tokens_from=3))
    objective, clips, draws = batch_for(recipe)
    model, part = objective.model, part_of(draws, 1)
    c = corrupted(objective, clips, draws, 1)
    assert model.condition is not None
    assert part.t is not None
    n = len(part.rows)
    t = part.t * 1000
    cond, _ = model.condition(t, None)
    outputs = [
        model.encoder(c.x_enc, part.mask.visible, (1, 2, 3, 4), cond, model.condition(t, labels)[1])
        for labels in (torch.zeros(n).long(), torch.ones(n).long())
    ]
    for block, (a, b) in enumerate(zip(*outputs, strict=True), start=1):
        assert a.shape == b.shape == (n, 4 + part.mask.visible.shape[1], 32)
        assert torch.equal(a, b) == (block < 3)
        if block >= 3:
            assert (a != b).any(-1).all()
    without = model.encoder(c.x_enc, part.mask.visible, (4,), cond)[0]
    assert not torch.equal(without, outputs[0][-1])


def test_label_tokens_are_the_class_and_a_place() -> None:
    recipe = small("umd_flow", generator=5)
    model = build(recipe)
    condition = model.condition
    assert condition is not None
    assert condition.label is not None
    assert condition.label_embed is not None
    assert condition.label_places is not None
    t, labels = torch.zeros(2), torch.tensor([4, 2])
    row = through(condition.label, condition.label_embed.weight[labels])
    _, tokens = condition(t, labels)
    assert tokens is not None
    assert tokens.shape == (2, 8, 32)
    assert_close(tokens, row[:, None] + condition.label_places, rtol=1e-5, atol=1e-6)
    assert torch.equal(condition(t, None)[1], condition(t, torch.full((2,), 5))[1])  # type: ignore[arg-type]


def test_without_classes_there_are_no_label_tokens() -> None:
    model = build(small("umd_flow"))
    assert model.recipe.condition.label_tokens == 8
    assert model.condition is not None
    assert model.condition.label_places is None
    assert model.condition(torch.zeros(2), None)[1] is None
    assert not [name for name, _ in model.named_parameters() if "label" in name]
    assert recipes.umd_flow().condition.label_tokens_from == 5  # the second third of 12 begins there


# Rotary positions


@pytest.mark.parametrize("grid", [(1, 9, 9), (4, 7, 8)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_with_rotary_positions_depends_on_distances_alone(grid: tuple[int, int, int], qk_norm: bool) -> None:
    torch.manual_seed(0)
    attention, table = Attention(48, 2, qk_norm), PositionTable("rotary", 48, 2, grid)
    _, H, W = grid
    places = torch.stack([torch.randint(0, size // 2 + 1, (2, 6)) for size in grid], dim=-1)
    shift = torch.tensor([(size - 1) // 2 for size in grid])

    def index(places: Tensor) -> Tensor:
        return (places[..., 0] * H + places[..., 1]) * W + places[..., 2]

    x = torch.randn(2, 6, 48)
    here, there, nowhere, mirrored = (
        attention(x, None if at is None else table.rotation(index(at), 0))
        for at in (places, places + shift, None, places * torch.tensor([1, 1, -1]) + torch.tensor([0, 0, W - 1]))
    )
    assert_close(here, there, rtol=1e-5, atol=1e-5)
    assert (here - nowhere).abs().max() > 1e-3
    assert (here - mirrored).abs().max() > 1e-3
    assert table.sin.abs().max() > 0.5


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    """Values j and j + d/2 are the real and imaginary part; lengths are kept."""
    angles = rotary_angles(8, (1, 4, 4))
    x = torch.randn(2, 3, 16, 8, generator=generator(), dtype=torch.float64)
    turned = rotate(x, (angles.cos(), angles.sin()))
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(16, 4).double(), angles[:, :4])
    assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1), rtol=1e-10, atol=1e-10)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-10, atol=1e-10)


def test_rotations_are_gathered_with_the_mask() -> None:
    """Each token's own angles in the order of the indices; tokens that stand nowhere are not turned."""
    grid = (1, 4, 4)
    table, angles = PositionTable("rotary", 32, 4, grid), rotary_angles(8, grid)
    at = torch.tensor([[5, 0, 15], [1, 2, 3]])
    rotation = table.rotation(at, 2, 1)
    assert rotation is not None
    for made, of_angles, still in zip(rotation, (angles.cos(), angles.sin()), (1.0, 0.0), strict=True):
        assert made.shape == (2, 1, 6, 8)
        assert torch.equal(made[:, 0, 2:5], of_angles.float()[at])
        assert (made[:, :, :2] == still).all()
        assert (made[:, :, 5:] == still).all()
    assert PositionTable("sincos", 32, 4, grid).rotation(at, 2, 1) is None


@pytest.mark.parametrize("variant", ["umd_flow", "umd_flow generator", "umd_flow video"])
def test_every_block_turns_each_token_by_its_own_place(variant: str) -> None:
    """In encoder and decoder, masked and in order; class, summary and label tokens are not turned."""
    recipe = small_variant(variant)
    objective, clips, draws = batch_for(recipe)
    model = objective.model
    assert model.decoder is not None
    angles = rotary_angles(8, recipe.clip.grid)
    given: dict[str, list[Any]] = {"encoder": [], "decoder": []}
    for part in given:
        for block in getattr(model, part).blocks:
            block.attn.register_forward_hook(lambda module, arguments, output, part=part: given[part].append(arguments))
    for number in range(len(recipe.branches)):
        for seen in given.values():
            seen.clear()
        objective(clips, only(draws, number))
        mask = part_of(draws, number).mask
        for part, at, first in (
            ("encoder", mask.visible, 4),
            ("decoder", torch.cat([mask.visible, mask.hidden], 1), 1),
        ):
            for x, (cos, sin) in given[part]:
                last = first + at.shape[1]
                assert cos.shape[2] == sin.shape[2] == x.shape[1]
                assert torch.equal(sin[:, 0, first:last], angles.sin().float()[at])
                assert torch.equal(cos[:, 0, first:last], angles.cos().float()[at])
                assert (sin[:, :, :first] == 0).all()
                assert (sin[:, :, last:] == 0).all()
                assert x.shape[1] - last in ((0, 8) if part == "encoder" else (0,))


def test_a_condition_as_a_token_is_not_turned() -> None:
    torch.manual_seed(0)
    block, table = Block(32, 4), PositionTable("rotary", 32, 4, (1, 4, 4))
    x, cond, at = torch.randn(2, 5, 32), torch.randn(2, 32), torch.tensor([[3, 1, 9, 15]] * 2)
    rotation, with_one_more = table.rotation(at, 1), table.rotation(at, 2)
    expected = block(torch.cat([cond[:, None], x], dim=1), None, with_one_more)[:, 1:]
    assert torch.equal(run_block(block, x, cond, True, rotation), expected)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_bounds_the_logits(qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query and key has length sqrt(d), so q k / sqrt(d) is at most sqrt(d), however large the tokens are."""
    seen: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend((q, k))
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    torch.manual_seed(0)
    attention, table = Attention(32, 4, qk_norm), PositionTable("rotary", 32, 4, (1, 3, 3))
    attention(1e4 * torch.randn(2, 9, 32), table.rotation(torch.arange(9).expand(2, -1), 0))
    q, k = seen
    if qk_norm:
        assert_close(q.norm(dim=-1), torch.full((2, 4, 9), 8**0.5), rtol=1e-4, atol=0)
        assert_close(k.norm(dim=-1), torch.full((2, 4, 9), 8**0.5), rtol=1e-4, atol=0)
        assert (q @ k.transpose(-1, -2)).abs().max() / 8**0.5 <= 8**0.5 + 1e-4
    else:
        assert (q @ k.transpose(-1, -2)).abs().max() > 1e6


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
def test_an_mlp_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    block = Block(48, 2, mlp=kind)
    mlp, x = block.mlp, torch.randn(2, 5, 48)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    if kind == "swiglu":
        assert mlp.fc2.in_features == 128  # 8/3 of the width
        hidden = silu(hidden[..., :128]) * hidden[..., 128:]
    elif kind == "gelu":
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    else:
        hidden = hidden * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, expected", [("layer", nn.LayerNorm), ("layer_fixed", nn.LayerNorm), ("rms", RMSNorm)])
def test_every_norm_of_a_network_is_the_one_it_names(kind: str, expected: type) -> None:
    name = {"layer": "umd", "layer_fixed": "maskdit", "rms": "umd_flow"}[kind]
    model = build(small(name))
    norms = [
        m
        for n, m in model.named_modules()
        if isinstance(m, nn.LayerNorm | nn.RMSNorm) and not n.endswith(("q_norm", "k_norm"))
    ]
    assert len(norms) == 2 * (3 + 2) + 2  # two in each block, the encoder's and the head's
    for norm in norms:
        assert type(norm) is expected
        assert norm.elementwise_affine == (kind != "layer_fixed")


# Recipes


def test_umds_recipe_is_the_papers() -> None:
    """spec/umd.md, sections 1 to 3."""
    for size, width, depth, heads, decoder_depth in (
        ("S/4", 384, 12, 6, 4),
        ("B/4", 768, 12, 12, 4),
        ("L/2", 1024, 24, 16, 8),
    ):
        recipe = recipes.umd(size)
        encoder, decoder = recipe.encoder, recipe.decoder
        assert decoder is not None
        assert (encoder.embed_dim, encoder.depth, encoder.num_heads) == (width, depth, heads)
        assert (decoder.embed_dim, decoder.depth, decoder.num_heads) == (width, decoder_depth, heads)
        assert (encoder.num_class_tokens, decoder.summary) == (4, "mean")
    recipe = recipes.umd()
    assert recipe.clip.grid == (1, 16, 16)
    assert recipe.schedule == dataclasses.replace(recipe.schedule, kind="cosine", rho=1.0)  # type: ignore[type-var]
    assert recipe.network.positions == "learned"
    training = recipe.training
    assert (training.epochs, training.warmup_epochs, training.batch_size) == (800, 40, 1024)
    assert (training.beta2, training.weight_decay, training.grad_clip) == (0.95, 0.05, 1.0)
    assert (training.crop_scale, training.flip, training.ema_decays) == (0.8, True, ())
    assert training.lr == pytest.approx(6e-4)
    assert recipes.mae_umd().training.lr == pytest.approx(2.4e-3)
    assert recipes.umd(faithful=True).encoder.class_token_init == "zeros"
    assert recipe.encoder.class_token_init == "normal"


GENERATORS = [v for v in VARIANTS if "generator" in VARIANTS[v][1]]


@pytest.mark.parametrize("variant", GENERATORS)
def test_a_generator_keeps_its_models_weights(variant: str) -> None:
    """Everything but the predictions that it no longer makes; what is new is about classes, or the noise MAE never saw."""
    name, arguments = VARIANTS[variant]
    before, after = (
        {n: p.shape for n, p in build(small(name, **fields)).named_parameters()}
        for fields in ({k: v for k, v in arguments.items() if k != "generator"}, {"generator": 5})
    )
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    assert {n.rsplit(".", 1)[0] for n in gone} <= {"head.pred.noisy"}
    without_noise = {"head.pred.eps"} if name == "mae_umd" else set()
    about_classes = {n for n in new if n.startswith("condition.label")}
    assert about_classes
    assert {n.rsplit(".", 1)[0] for n in new - about_classes} == without_noise
    for n in before.keys() & after.keys():
        assert before[n] == after[n]


@pytest.mark.parametrize("variant", GENERATORS)
def test_a_generators_branches(variant: str) -> None:
    """Nothing hidden and every token scored; 5 % of clean clips, as masked as before, where there were any."""
    name, arguments = VARIANTS[variant]
    before, recipe = recipes.RECIPES[name](), shipped(variant)
    noisy, clean = recipe.branch_on("visible"), recipe.branch_on("none")
    assert noisy is not None
    assert noisy.mask_ratio == 0
    had = before.branch_on("none")
    if had is None:
        assert recipe.branches == (noisy,)
    else:
        assert recipe.branches == (dataclasses.replace(had, share=0.05), noisy)
        assert clean is not None
        assert clean.mask_ratio == 0.75
        assert noisy.share == pytest.approx(0.95)
    half = (Term(predict="eps", on="visible", weight=0.5), Term(predict="x0", on="visible", weight=0.5))
    expected = {
        "dit": (Term(predict="eps", on="visible"), Term(predict="variance", on="visible")),
        "maskdit": (Term(predict="eps", on="visible"),),
        "umd_flow": (Term(predict="x0", on="visible", space="v"),),
    }.get(name, half)
    assert set(noisy.terms) == set(expected)
    assert recipe.condition.num_classes == arguments["generator"]
    assert "generate" in build(small_variant(variant)).can
    # once more makes no difference, but for the number of classes
    again = recipes.generator(recipe, 7)
    assert dataclasses.replace(again, condition=recipe.condition) == recipe
    assert make("umd", {"generator": 10}) == recipes.umd_finetune(num_classes=10)


@pytest.mark.parametrize("variant", ["umd", "umd_flow", "umd_finetune", "dit", "mae", "diffmae", "mae_umd"])
def test_what_does_not_decay(variant: str) -> None:
    """UMD: class tokens, mask token and biases; scales of norms and positions do decay. MAE: every vector is spared."""
    recipe = shipped(variant)
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipe)
    optimizer = optimizer_for(model, recipe.training)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decays: dict[str, float] = {}
    for group in optimizer.param_groups:
        decays |= {name_of[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    assert set(decays) == set(name_of.values())
    spared = {name for name, decay in decays.items() if decay == 0}
    tokens = {"encoder.cls_token", "decoder.mask_token"} & set(decays)
    biases = {name for name in decays if name.endswith("bias")}
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.elementwise_affine
    }
    assert norms <= set(decays)
    if recipe.training.weight_decay == 0:
        assert spared == set(decays)
    elif variant.startswith(("umd", "mae_umd")):
        assert spared == tokens | biases
        if recipe.network.positions == "learned":
            assert {"encoder.positions.pos_embed", "decoder.positions.pos_embed"} <= set(decays) - spared
    else:
        assert spared == tokens | biases | norms
    assert {decays[name] for name in set(decays) - spared} <= {recipe.training.weight_decay}


# Schedules inside the step


def test_a_flows_clean_branch_is_its_time_zero() -> None:
    """The same network told 0: what the clean branch sees is x_t at t = 0, not nearly but exactly."""
    recipe = small("umd_flow")
    model = build(recipe)
    assert isinstance(model.schedule, FlowSchedule)
    clips = clips_for(recipe)
    noise = torch.randn(2, 16, 48, generator=generator())
    assert torch.equal(model.encode(clips, torch.zeros(2), noise), model.encode(clips))
    umd = build(small("umd"))
    assert torch.equal(umd.encode(clips, torch.zeros(2).long(), noise), umd.encode(clips))


@pytest.mark.parametrize("variant", ["umd", "umd_flow", "dit", "maskdit"])
def test_encoding_at_a_time_sees_that_noise(variant: str) -> None:
    recipe = small_variant(variant)
    model, clips = build(recipe), clips_for(recipe)
    noise = torch.randn(2, 16, 48, generator=generator())
    t = torch.tensor([51, 700]) if model.schedule.end > 1 else torch.tensor([0.051, 0.7])  # type: ignore[union-attr]
    told = spied(model)
    encoded = model.encode(clips, t, noise)
    alpha, sigma = (r.float()[:, None, None] for r in model.schedule.rates(t))  # type: ignore[union-attr]
    x_t = alpha * model.tokens(clips) + sigma * noise
    everything = torch.arange(16).expand(2, -1)
    assert model.condition is not None
    (expected,) = model.encoder(x_t, everything, (3,), model.condition(told[0][0], None)[0])
    assert_close(encoded, expected if model.decoder else model.head.norm(expected), rtol=1e-5, atol=1e-5)
    assert_close(told[0][0], torch.tensor([51.0, 700.0]))


def test_maskdits_target_is_the_noisy_picture() -> None:
    """0.1 times patch-normalised x_t of hidden tokens, whose own noise no one sees, and eps on the visible ones."""
    objective, clips, draws = batch_for(small("maskdit"))
    model, part = objective.model, part_of(draws)
    assert part.t is not None
    assert part.noise is not None
    assert model.schedule is not None
    V = part.mask.visible.shape[1]
    alpha, sigma = (r.float()[:, None, None] for r in model.schedule.rates(part.t))
    x_t = alpha * gather(model.tokens(clips), part.mask.hidden) + sigma * part.noise[:, V:]
    target = (x_t - x_t.mean(-1, keepdim=True)) / (x_t.var(-1, keepdim=True) + 1e-6).sqrt()
    predictions = predicted(objective, clips, draws)
    of_eps = (predictions["visible"]["eps"] - part.noise[:, :V]).square().mean()
    of_noisy = (predictions["hidden"]["noisy"] - target).square().mean()
    assert_close(objective(clips, draws)[0], of_eps + 0.1 * of_noisy, rtol=1e-6, atol=1e-6)


def test_the_training_of_the_full_sizes_is_the_papers() -> None:
    """umd.md 3 and 4; DiT's and MaskDiT's own: constant 1e-4, no decay. In numbers, because no small recipe uses them."""
    umd, tuned = recipes.umd("B/4").training, recipes.umd_finetune("B/4").training
    assert (umd.epochs, umd.batch_size, umd.base_lr, umd.warmup_epochs) == (800, 1024, 1.5e-4, 40)
    assert (umd.beta2, umd.weight_decay, umd.decay_norms, umd.grad_clip) == (0.95, 0.05, True, 1.0)
    assert (umd.lr_schedule, umd.crop_scale, umd.flip, umd.ema_decays) == ("cosine", 0.8, True, ())
    assert umd.lr == pytest.approx(6e-4)
    assert (tuned.epochs, tuned.batch_size, tuned.lr, tuned.warmup_epochs) == (50, 256, 1.5e-4, 2)
    assert (tuned.beta2, tuned.weight_decay, tuned.grad_clip) == (0.999, 0.0, 1.0)
    assert (tuned.lr_schedule, tuned.crop_scale, tuned.label_dropout) == ("cosine", 0.95, 0.1)
    assert tuned.ema_decays == (0.9999,)
    assert recipes.mae_umd("B/4").training == dataclasses.replace(umd, batch_size=4096)
    for recipe, batch_size, steps in ((recipes.dit("B/4"), 256, 7e6), (recipes.maskdit("B/4"), 1024, 2e6)):
        training = recipe.training
        assert (training.batch_size, training.lr, training.lr_schedule) == (batch_size, pytest.approx(1e-4), "constant")
        assert (training.warmup_epochs, training.weight_decay, training.beta2) == (0, 0.0, 0.999)
        assert (training.crop_scale, training.flip, training.ema_decays) == (1.0, True, (0.9999,))
        assert training.label_dropout == 0.1
        assert training.grad_clip is None
        assert training.epochs * 1.28e6 / batch_size == pytest.approx(steps, rel=0.01)
