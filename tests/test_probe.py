"""`unveil probe`: which samples, labels and neighbours decide, and the linear probe trained by LARS."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import build, generator, small

from unveil import cli
from unveil.checkpoint import WEIGHTS, About, save_weights
from unveil.data import open_source
from unveil.metrics import accuracy, knn_predict, knn_predictions
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


REFUSALS: list[tuple[str, str]] = [
    ("--k 0", r"--k 0: at least one neighbour"),
    ("--k 5 -1", r"--k 5 -1: at least one neighbour"),
    ("--k", r"--k : at least one neighbour"),
    ("--k 5 5", r"--k 5 5: a number comes twice"),
    ("--k 10 1438", r"--k 1438: only 1437 training samples can vote. Use 1437 or fewer"),
    ("--k 30 --labels-per-class 2", r"--k 30: only 20 training samples can vote"),
    ("--k 5 --method linear", r"--k belongs to --method knn, but it is linear"),
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
