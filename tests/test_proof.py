"""The code that makes published numbers: probes without a look at the test labels, scores as they are named."""

import dataclasses
import io
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import VARIANTS, batch_for, build, clips_for, small_variant
from torch import Tensor

from unveil import recipes
from unveil.checkpoint import load_model, write_atomically
from unveil.config import Term
from unveil.data import Samples, open_source
from unveil.features import encoder_features
from unveil.metrics import choose_ridge, hole_mse, laplacian_energy
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import repaint
from unveil.rundir import Run
from unveil.tasks import evaluate as evaluate_module
from unveil.tasks import probe as probe_module
from unveil.tasks.inpaint import Inpaint, inpaint
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe
from unveil.train import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    pretrain(Pretrain(data="digits:test", out=out, size="Nano/4", epochs=2))
    return out


def test_the_penalty_is_chosen_on_training_rows_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(x: Tensor, y: Tensor, *arguments: Any) -> float:
        seen.append((x, y))
        return choose_ridge(x, y, *arguments)

    monkeypatch.setattr(probe_module, "choose_ridge", record)
    probe(Probe(run=run, data="digits:train", test_data="digits:test"))
    source = open_source("digits:train", 1)
    labels = torch.tensor([source.label(i) for i in range(1437)])
    assert len(seen) == 3
    for x, y in seen:
        assert len(x) == len(y) == 1437
        assert torch.equal(y.bincount(), labels.bincount())


def test_the_penalty_is_chosen_on_rows_that_were_not_fitted() -> None:
    # as many dimensions as rows: a fit that has seen the held rows remembers them and likes the smallest penalty
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 100, generator=generator)
    y = (x[:, 0] + 0.3 * torch.randn(120, generator=generator) > 0).long()
    assert choose_ridge(x, y, 2, (1e-6, 1.0)) == 1.0


def test_the_untrained_baseline_is_untrained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[MaskedDiffusionAutoencoder] = []

    def record(model: MaskedDiffusionAutoencoder, *arguments: Any) -> Any:
        models.append(model)
        return encoder_features(model, *arguments)

    monkeypatch.setattr(probe_module, "encoder_features", record)
    probe(Probe(run=run, data="digits:test", seed=3))
    trained, untrained = models
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        fresh = MaskedDiffusionAutoencoder(trained.recipe)
    for name, value in fresh.state_dict().items():
        assert torch.equal(untrained.state_dict()[name], value), name
    assert not torch.equal(trained.encoder.blocks[0].attn.qkv.weight, untrained.encoder.blocks[0].attn.qkv.weight)  # type: ignore[union-attr]


def test_scores_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MaskedDiffusionAutoencoder(recipes.diffmae("Nano/4", channels=1, height=8))
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(2, 1, 1, 8, 8, generator=generator)
    samples = torch.rand(2, 3, 1, 1, 8, 8, generator=generator)
    one_step = torch.rand(2, 1, 1, 1, 8, 8, generator=generator)
    holes = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    holes[:, :, :4] = True

    monkeypatch.setattr(evaluate_module, "predict", lambda *_, **__: one_step[:, 0])
    monkeypatch.setattr(evaluate_module, "repaint", lambda *_, **__: samples)
    score = evaluate_module.score(model, clips, holes, num_samples=3, num_steps=5, sampler="ddpm", seed=0)
    top = (..., slice(None, 4), slice(None))
    errors = ((samples - clips[:, None])[top] ** 2).mean((2, 3, 4, 5)).double()
    visible = clips[..., 4:, :].mean((1, 2, 3, 4))
    expected = {
        "prediction": ((one_step[:, 0] - clips)[top] ** 2).mean((1, 2, 3, 4)),
        "mean_fill": ((visible[:, None, None, None, None] - clips)[top] ** 2).mean((1, 2, 3, 4)),
        "sample": errors.mean(1),
        "best_sample": errors.amin(1),
        "sample_mean": ((samples.mean(1) - clips)[top] ** 2).mean((1, 2, 3, 4)),
        "std": samples.std(1)[top].mean((1, 2, 3, 4)),
        "laplacian_truth": laplacian_energy(clips, holes),
        "laplacian_samples": torch.stack([laplacian_energy(samples[:, s], holes) for s in range(3)]).mean(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(score[name], value.double(), rtol=1e-5, atol=1e-7, msg=name)
    torch.testing.assert_close(score["prediction"], hole_mse(one_step[:, 0], clips, holes))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    seen = set()
    forward = torch.nn.Linear.forward

    def record(self: torch.nn.Linear, x: Tensor) -> Tensor:
        y = forward(self, x)
        if torch.is_grad_enabled():  # not while the contact sheet is painted
            seen.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", record)
    recipe = recipes.diffmae("Nano/4", channels=1, height=8)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, epochs=1))
    samples = Samples(open_source("digits:test", 1), recipe.clip, 0, recipe.training)
    result = train(recipe, samples, Run(data="digits:test", out=tmp_path / "run", precision=precision))
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert np.isfinite(result["loss"])


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if "video" not in variant])
@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_bf16_changes_the_last_digits_only(variant: str) -> None:
    """Every recipe's loss and gradient under autocast beside float32: 8 bits of precision are 0.4 %."""
    losses, gradients = [], []
    for enabled in (False, True):
        objective, clips, draws = batch_for(small_variant(variant))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = objective(clips, draws)
        assert loss.dtype == torch.float32
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99


def test_a_loss_that_is_no_number_is_never_saved(tmp_path: Path) -> None:
    options = Pretrain(data="digits:test", out=tmp_path / "run", size="Nano/4", epochs=3, blr=1e30, save_minutes=0)
    with pytest.raises(ValueError, match=r"became infinite or no numbers|no number in \d+ steps in a row"):
        pretrain(options)
    if (tmp_path / "run" / "model.safetensors").exists():
        load_model(tmp_path / "run")  # refuses values that are no numbers


@pytest.mark.parametrize("rho", [0.1, 0.05, 0.0001, 2.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_are_finite_for_every_rho(rho: float, sampler: Any) -> None:
    model = MaskedDiffusionAutoencoder(recipes.diffmae("Nano/4", channels=1, height=8, rho=rho)).eval()
    holes = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    holes[:, :, :4] = True
    assert repaint(model, torch.rand(1, 1, 1, 8, 8), holes, num_steps=20, sampler=sampler).isfinite().all()


@pytest.mark.parametrize(
    "recipe, fields", [("diffmae", {"mask_ratio": 0.999}), ("diffmae", {"mask_ratio": 0.75, "masking": "center"})]
)
def test_a_ratio_that_hides_all_refuses_before_training(tmp_path: Path, recipe: Any, fields: dict[str, Any]) -> None:
    options = Pretrain(
        data="digits:test", out=tmp_path / "run", recipe=recipe, size="Nano/4", image_size="16", **fields
    )
    with pytest.raises(ValueError, match=r"hides 16\. Use another ratio|would hide all of them"):
        pretrain(options)


def test_data_that_vanishes_stops_the_run_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unveil.reading.WAITS", (0.01,))
    folder, away, out = tmp_path / "photos", tmp_path / "away", tmp_path / "run"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    options = Pretrain(
        data=str(folder), out=out, size="Nano/4", image_size="8", epochs=6, batch_size=3, workers=1, save_minutes=0
    )

    def hide(progress: Any) -> None:
        if folder.exists():
            folder.rename(away)

    with pytest.raises(ValueError, match=r"cannot be read any more.*goes on from there"):
        pretrain(options, hide)
    away.rename(folder)
    result = pretrain(options)
    assert result["resumed"]
    assert result["finished"]
    assert result["skipped"] == 0  # what could not be read for a while counts no more


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 6893056 vs 6892944")

    with pytest.raises(OSError, match=r"could not be written.*Is the disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_sixteen_bits_are_kept(run: Path, tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000 + 7
    Image.fromarray(values).save(tmp_path / "deep.png")
    files = inpaint(
        Inpaint(run=run, images=str(tmp_path / "deep.png"), out=tmp_path / "out", mask="random:0.5", num_steps=3)
    )
    painted = np.array(Image.open(files["pictures"][0]["files"]["sample1"])).astype(np.uint16)
    changed = painted != values
    assert changed.any()
    hidden = np.array(Image.open(files["pictures"][0]["files"]["masked"])).astype(np.uint16) != values
    assert not changed[~hidden].any()


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def readme_cells(name: str) -> list[str]:
    """A recipe's row in the README, without its fidelity, as the code has it."""
    recipe = recipes.RECIPES[name]()
    with torch.device("meta"):
        can = MaskedDiffusionAutoencoder(recipe).can

    def term(t: Term) -> str:
        weight = "" if t.weight == 1 else f"{t.weight:g} "
        normalised, velocity = "normalised " if t.patch_norm else "", " as v" if t.space == "v" else ""
        return f"{weight}{normalised}{t.predict}{velocity} on {t.on}"

    branches = recipe.branches
    return [
        f"`{name}`",
        "; ".join(f"{b.share:g}" for b in branches),
        "; ".join(f"{100 * b.mask_ratio:g} %" for b in branches),
        "; ".join(b.noise_on for b in branches),
        "; ".join(", ".join(term(t) for t in b.terms) for b in branches),
        recipe.decoder.kind if recipe.decoder else "none",
        recipe.condition.time,
        ", ".join(word for word in ("represent", "repaint", "generate") if word in can),
    ]


def test_the_readmes_table_of_recipes_is_the_code() -> None:
    rows = re.findall(r"^\| (`\w+` \|.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    cells = [row.split(" | ") for row in rows]
    assert [row[:-1] for row in cells] == [readme_cells(name) for name in recipes.RECIPES]
    assert {row[-1] for row in cells} <= {"code", "paper", "ours"}


def test_rows_without_a_label_are_no_class(run: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = open_source("digits:test", 1)
    images = []
    for i in range(len(source)):
        buffer = io.BytesIO()
        Image.fromarray(source.read(i).values[0, 0].numpy()).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    labels = [None if i == 0 else source.label(i) for i in range(len(source))]
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "d.parquet")
    result = probe(Probe(run=run, data=str(tmp_path / "d.parquet"), test_data="digits:test", labels_per_class=10))
    assert result["train_samples"] == len(source) - 1


def test_few_shots_take_at_most_a_hundred_of_each_class_and_fewer_of_a_rare_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = torch.cat([torch.zeros(150), torch.ones(3)]).long()
    seen: list[list[int]] = []

    def count(train: Tensor, classes: Tensor, test: Tensor, num_classes: int) -> Tensor:
        seen.append(classes.bincount().tolist())
        return torch.zeros(len(test), dtype=torch.long)

    monkeypatch.setattr(probe_module, "fewshot_predict", count)
    options = Probe(run=Path("none"), data="none", method="fewshot")
    x, test = torch.randn(153, 4), torch.randn(2, 4)
    assert probe_module._scores(x, labels, test, torch.tensor([0, 1]), options) == {"fewshot": 50.0}
    assert seen == [[100, 3]] * 5


def test_the_demo_shows_what_the_tests_hold() -> None:
    """`make demo` trains for minutes before it computes this; here on drawn weights."""
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "digits.py"))
    model = build(recipes.diffmae("Nano/4", channels=1, height=8, decoder="cross_self"))
    diffusion, mae = example["loss_towards_mae"](model, clips_for(model.recipe, 4))
    assert diffusion[-1] == pytest.approx(mae, rel=1e-5)
    assert diffusion[0] != pytest.approx(mae, rel=1e-3)
