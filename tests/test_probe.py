"""`unveil probe`: which samples, labels and neighbours decide, and the linear probe trained by LARS."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
import torch.nn.functional as F
from small import build, generator, small
from torch.testing import assert_close

from unveil import cli, draws, probing
from unveil.checkpoint import WEIGHTS, About, load_model, save_weights
from unveil.data import Samples, open_source
from unveil.metrics import accuracy, knn_predict, knn_predictions
from unveil.optim import Lars
from unveil.probing import LarsProbe
from unveil.tasks.probe import Probe, probe

ABOUT = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
DIGITS: dict[str, Any] = {"size": "Nano/2", "channels": 1, "height": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the digits' size that has learnt nothing."""
    return save(tmp_path_factory.mktemp("runs") / "digits", **DIGITS)


def save(run: Path, name: str = "diffmae", **arguments: Any) -> Path:
    model = build(small(name, **arguments))
    save_weights(run / WEIGHTS, model.recipe, model.state_dict(), ABOUT)
    return run


def pixels(data: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures as rows, and their labels."""
    source = open_source(data, 1)
    values = torch.stack([source.read(i).values.flatten().float() / 255 for i in range(len(source))])
    return values, torch.tensor([source.label(i) for i in range(len(source))])


def probed(run: Path, **options: Any) -> dict[str, Any]:
    return probe(Probe(run=run, device="cpu", **{"data": "digits:train", "test_data": "digits:test", **options}))


# Neighbours


def votes_by_hand(train: torch.Tensor, labels: torch.Tensor, row: torch.Tensor, k: int) -> list[float]:
    """Weights of three classes for one row, in plain Python over unit vectors."""
    pairs = []
    for x, label in zip(train.double(), labels.tolist(), strict=True):
        pairs.append((float(x @ row.double() / (x.norm() * row.double().norm())), label))
    votes = [0.0, 0.0, 0.0]
    for similarity, label in sorted(pairs, reverse=True)[:k]:
        votes[label] += np.exp(similarity / 0.07)
    return votes


def test_neighbours_vote_by_the_published_weight() -> None:
    g = generator()
    train, labels = torch.randn(60, 5, generator=g) * 7, torch.randint(3, (60,), generator=g)
    test = torch.randn(200, 5, generator=g)
    ks = (1, 3, 10, 60)
    predictions = knn_predictions(train, labels, test, 3, ks)
    plain = []
    for k, ours in zip(ks, predictions, strict=True):
        assert ours.tolist() == [int(np.argmax(votes_by_hand(train, labels, row, k))) for row in test]
        assert torch.equal(ours, knn_predict(train, labels, test, 3, k))
        plain.append(knn_predict(train, labels, test, 3, k, temperature=1e6))  # every vote weighs the same
    assert torch.equal(predictions[0], plain[0])  # one vote alone decides whatever it weighs
    assert all((ours != flat).any() for ours, flat in zip(predictions[1:], plain[1:], strict=True))


def test_several_numbers_of_neighbours_are_scored_each(run: Path) -> None:
    several = probed(run, method="knn", k=(1, 20, 200))
    assert several["k"] == [1, 20, 200]
    train, labels = pixels("digits:train")
    test, truth = pixels("digits:test")
    for name, row in several["results"].items():
        assert list(row) == ["knn, k = 1", "knn, k = 20", "knn, k = 200"]
        for k in (1, 20, 200):
            alone = probed(run, method="knn", k=(k,))
            assert alone["results"][name] == {"knn": row[f"knn, k = {k}"]}
    for k in (1, 20, 200):
        expected = accuracy(knn_predict(train, labels, test, 10, k), truth)
        assert several["results"]["raw pixels"][f"knn, k = {k}"] == pytest.approx(expected, abs=1e-9)
    assert probed(run, method="knn", baselines=False)["results"]["encoder"] == {
        "knn": several["results"]["encoder"]["knn, k = 20"]
    }


def test_few_samples_all_vote_unless_a_number_is_given(run: Path) -> None:
    result = probed(run, method="knn", labels_per_class=1)
    assert result["results"]["raw pixels"]["knn"] > 30  # of ten samples, though the default is 20
    assert probed(run, method="knn", labels_per_class=1, k=(10,))["results"] == result["results"]


def test_the_command_tells_every_number_of_neighbours(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"probe --run {run} --data digits:test --k 5 50 --no-baselines --device cpu"
    cli.main(words.split())
    out = capsys.readouterr().out
    assert re.search(r"^features +linear % +5-NN % +50-NN %$", out, re.M), out
    cli.main([*words.split(), "--json"])
    row = json.loads(capsys.readouterr().out)["results"]["encoder"]
    assert list(row) == ["linear", "knn, k = 5", "knn, k = 50"]
    assert re.search(rf"^encoder +{row['linear']:.1f} +{row['knn, k = 5']:.1f} +{row['knn, k = 50']:.1f}$", out, re.M)


# MAE's linear probe


def test_lars_equals_timm() -> None:
    """On a matrix with trust, on a vector without."""
    g = generator()
    start = [torch.randn(4, 3, generator=g), torch.randn(4, generator=g)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    lars = Lars(ours, lr=0.7)
    timms = timm.optim.Lars(theirs[:1], lr=0.7, momentum=0.9, trust_coeff=0.001, weight_decay=0, always_adapt=True)
    sgd = torch.optim.SGD(theirs[1:], lr=0.7, momentum=0.9)
    x, y = torch.randn(50, 3, generator=g), torch.randint(4, (50,), generator=g)
    for factor in (0.1, 1.0, 1.0, 0.5, 0.0):
        for weight, bias in (ours, theirs):
            weight.grad = bias.grad = None
            F.cross_entropy(F.linear(x, weight, bias), y).backward()
        lars.step(factor)
        for optimizer in (timms, sgd):
            optimizer.param_groups[0]["lr"] = 0.7 * factor
            optimizer.step()
        assert_close(list(ours), list(theirs), rtol=1e-5, atol=1e-7)
    assert all((after - before).abs().max() > 1e-3 for after, before in zip(ours, start, strict=True))


def test_lars_survives_a_weight_and_a_gradient_of_zero() -> None:
    weight, other = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    lars = Lars([weight, other], lr=1.0)
    weight.grad, other.grad = torch.ones(2, 2), torch.zeros(2, 2)
    lars.step(1.0)
    assert_close(weight.detach(), -torch.ones(2, 2))
    assert_close(other.detach(), torch.ones(2, 2))


def published(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, orders: list[torch.Tensor], batch: int
) -> torch.Tensor:
    """MAE's linear probe written out over float64 matrices: logits of z after an epoch for each order."""
    x, z, w, b = x.double(), z.double(), weight.double().clone(), torch.zeros(len(weight), dtype=torch.float64)
    speed_w, speed_b = torch.zeros_like(w), torch.zeros_like(b)
    mean, var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
    per_epoch = len(x) // batch
    total, warm = len(orders) * per_epoch, 10 * per_epoch
    step = 0
    for order in orders:
        for part in order[: per_epoch * batch].split(batch):
            batch_mean, batch_var = x[part].mean(0), x[part].var(0, correction=0)
            mean, var = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * x[part].var(0)
            normed = (x[part] - batch_mean) / (batch_var + 1e-6).sqrt()
            wrong = torch.softmax(normed @ w.T + b, 1)
            wrong[torch.arange(batch), y[part]] -= 1
            slope_w, slope_b = wrong.T @ normed / batch, wrong.mean(0)
            rate = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
            speed_w = 0.9 * speed_w + slope_w * 0.001 * w.norm() / slope_w.norm()
            speed_b = 0.9 * speed_b + slope_b
            w, b = w - 0.1 * batch / 256 * rate * speed_w, b - 0.1 * batch / 256 * rate * speed_b
            step += 1
    return (z - mean) / (var + 1e-6).sqrt() @ w.T + b


@pytest.mark.parametrize("batch", [16_384, 40])
def test_the_probe_is_maes_protocol(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """In one batch of all rows, and in two whole batches of 40 of 90."""
    monkeypatch.setattr(probing, "LARS_BATCH", batch)
    g = generator()
    x, y, z = torch.randn(100, 6, generator=g) * 3 + 1, torch.randint(3, (100,), generator=g), torch.randn(50, 6)
    rows = torch.randperm(100, generator=g)[:90]
    ours = LarsProbe(rows, 6, 3, epochs=30, seed=5)
    assert (ours.batch_size, ours.num_steps) == ((90, 30) if batch > 90 else (40, 60))
    weight = ours.head[1].weight.detach().clone()
    assert weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert not ours.head[1].bias.any()
    for _ in range(30):
        ours.epoch(x, y)
    orders = [torch.randperm(90, generator=draws.generator(5, epoch, "order of LARS")) for epoch in range(30)]
    expected = published(x[rows], y[rows], z, weight, orders, ours.batch_size)
    assert torch.equal(ours.predict(z), expected.argmax(1))
    assert_close(ours.head(z).detach().double(), expected, rtol=1e-4, atol=1e-5)  # predict left it in eval


def test_lars_finds_the_labels_and_repeats(run: Path) -> None:
    state = torch.get_rng_state()
    first = probed(run, method="lars", epochs=90)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first["results"]) == ["encoder", "untrained encoder", "raw pixels"]
    assert first["lars"] == {"steps": 90, "batch_size": 1437, "augment": False}
    assert 30 < first["results"]["raw pixels"]["lars"] < 80  # ridge has 93, and 90 steps are few
    assert (
        probed(run, method="lars", epochs=90, batch_size=100)["results"]["raw pixels"] == first["results"]["raw pixels"]
    )
    assert probed(run, method="lars", epochs=90, seed=1)["results"] != first["results"]
    longer = probed(run, method="lars")  # of few samples an epoch is one step, so as many as make 2,000
    assert longer["lars"]["steps"] == 2000
    assert longer["results"]["raw pixels"]["lars"] > 91
    assert longer["results"]["encoder"]["lars"] > first["results"]["encoder"]["lars"]


def test_lars_reads_the_tokens_that_it_is_told(run: Path) -> None:
    mean, by_class = (
        probed(run, method="lars", pool=pool, data="digits:test", test_data=None, baselines=False)["results"]["encoder"]
        for pool in ("mean", "class")
    )
    assert mean != by_class


def test_augmented_pictures_are_encoded_anew_in_every_epoch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original = Samples.__getitem__

    def record(self: Samples, key: tuple[int, int, int]) -> Any:
        if self.training is not None:
            assert (self.training.crop_scale, self.training.flip) == (0.08, True)
            read.append((key[0], key[2]))
        return original(self, key)

    monkeypatch.setattr(Samples, "__getitem__", record)
    trained: list[torch.Tensor] = []
    epoch = LarsProbe.epoch

    def spy(self: LarsProbe, features: torch.Tensor, labels: torch.Tensor) -> None:
        trained.append(features[self.rows])
        spied.append(labels[self.rows])
        epoch(self, features, labels)

    spied: list[torch.Tensor] = []
    monkeypatch.setattr(LarsProbe, "epoch", spy)
    told: list[tuple[int, int]] = []
    options = Probe(
        run=run,
        data="digits:test",
        method="lars",
        augment=True,
        epochs=3,
        labels_per_class=2,
        device="cpu",
        pool="mean",
    )
    result = probe(options, lambda done, total: told.append((done, total)))
    assert result["lars"] == {"steps": 3, "batch_size": 20, "augment": True}
    chosen = [index for epoch, index in read if epoch == 0]
    assert 40 < len(set(chosen)) == len(chosen) <= 100  # of 288: those of the five draws, and no others
    assert sorted(read) == [(epoch, index) for epoch in range(3) for index in sorted(chosen)]
    assert len(trained) == 3 * 3 * 5  # epochs, kinds of features, draws
    for first, later in zip(trained[:15], trained[15:30], strict=True):
        assert (first - later).abs().max() > 0.01
    for labels in spied:
        assert labels.bincount(minlength=10).tolist() == [2] * 10
    assert told[-1][0] <= told[-1][1] == 360 + 3 * 100
    # of one picture: the crop that its number draws, and its label
    source, training = open_source("digits:test", 1), small(**DIGITS).training
    training = dataclasses.replace(training, crop_scale=0.08, flip=True)
    pictures = Samples(source, load_model(run)[0].recipe.clip, 0, training)
    known = {tuple(original(pictures, (0, i, i)).clip.flatten().tolist()): source.label(i) for i in chosen}
    for i, row in enumerate(trained[10]):  # raw pixels of the first epoch
        assert known[tuple(row.tolist())] == spied[10][i]


def test_augmenting_does_not_depend_on_the_batch_or_the_workers(run: Path) -> None:
    def scored(**options: Any) -> Any:
        return probed(run, method="lars", augment=True, epochs=2, data="digits:test", test_data=None, **options)[
            "results"
        ]

    first = scored()
    assert scored(batch_size=50, workers=1)["raw pixels"] == first["raw pixels"]
    assert first != probed(run, method="lars", epochs=2, data="digits:test", test_data=None)["results"]


def test_the_command_tells_the_steps_of_lars(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"probe --run {run} --data digits:train --method lars --no-baselines --device cpu --labels-per-class 5"
    cli.main([*words.split(), "--epochs", "90"])
    out = capsys.readouterr().out
    assert "LARS: 90 steps with 50 pictures as they are each.\nThat is few" in out
    assert re.search(r"^features +LARS %$", out, re.M)
    cli.main(words.split())
    assert "few" not in capsys.readouterr().out


REFUSALS: list[tuple[str, str]] = [
    ("--k 0", r"--k 0: at least one neighbour"),
    ("--k 5 -1", r"--k 5 -1: at least one neighbour"),
    ("--k", r"--k : at least one neighbour"),
    ("--k 5 5", r"--k 5 5: a number comes twice"),
    ("--k 10 1438", r"--k 1438: only 1437 training samples can vote. Use 1437 or fewer"),
    ("--k 30 --labels-per-class 2", r"--k 30: only 20 training samples can vote"),
    ("--k 5 --method linear", r"--k belongs to --method knn, but it is linear"),
    ("--k 5 --method lars", r"--k belongs to --method knn, but it is lars"),
    ("--epochs 5", r"--epochs 5 belongs to --method lars, but it is linear and knn"),
    ("--augment --method knn", r"--augment belongs to --method lars, but it is knn"),
    ("--method lars --epochs 0", r"--epochs 0: train for at least one"),
]


@pytest.mark.parametrize("words, sentence", REFUSALS)
def test_probe_refuses(run: Path, capsys: pytest.CaptureFixture[str], words: str, sentence: str) -> None:
    """Before anything is encoded: no bar was drawn."""
    with pytest.raises(SystemExit) as stop:
        cli.main(f"probe --run {run} --data digits:train --test-data digits:test --device cpu {words}".split())
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert len(captured.err.splitlines()) == 1
    assert re.search(sentence, captured.err), captured.err
