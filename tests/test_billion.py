"""`benchmarks/billion.py`: the page's table is the script's, and the numbers follow from their inputs."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import billion

from unveil import recipes
from unveil.cost import masked_step
from unveil.model import MaskedDiffusionAutoencoder

ROOT = Path(__file__).parents[1]
KNOWN = billion.Measured(
    read_per_core=1000.0,
    sample_bytes=30_000.0,
    prepare_per_core=25.0,
    open_seconds=1e-7,
    save_bytes_per_second=1e8,
    stall_bytes_per_second=1e9,
)


def need(size: str = "L/16", nodes: int = 8, **changed: Any) -> dict[str, float]:
    known = {name: value for name, value in changed.items() if hasattr(KNOWN, name)}
    options = {name: value for name, value in changed.items() if name not in known}
    return billion.need(size, nodes, billion.Options(**options), dataclasses.replace(KNOWN, **known))


def test_the_page_holds_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    billion.main(billion.Options())
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") > 15
    assert printed in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_inputs_are_those_of_the_records() -> None:
    known = billion.measured()
    photos = json.loads((ROOT / "results" / "data_photos.json").read_text())
    assert known.read_per_core == photos["loaders"]["prepared"]["pictures_per_second"]
    assert known.sample_bytes == photos["prepared_bytes"] / 24
    record = json.loads((ROOT / "results" / "billion.json").read_text())
    assert known.open_seconds == record["open"]["cpu_seconds"] / record["open"]["samples"]
    assert known.save_bytes_per_second < known.stall_bytes_per_second  # steps go on while it is written


def test_hours_by_hand() -> None:
    flops = masked_step(recipes.diffmae("L/16")).train_flops
    found = need(samples=10**9, passes=10, mfu=0.4, peak_tflops=989)
    assert found["rate"] == pytest.approx(0.4 * 989e12 / flops)
    assert found["seconds"] == pytest.approx(1e10 * flops / (64 * 0.4 * 989e12))
    assert found["cores"] == pytest.approx(found["rate"] / 1000)
    assert found["bandwidth"] == pytest.approx(8 * found["rate"] * 30_000)


def test_more_nodes_are_faster_and_fail_more_often() -> None:
    few, many = need(nodes=8), need(nodes=64)
    assert many["seconds"] == pytest.approx(few["seconds"] / 8)
    assert many["between"] == pytest.approx(few["between"] / 8)
    assert many["failures"] == pytest.approx(few["failures"])  # as many node-hours


def test_failures_are_metas() -> None:
    """419 in 54 days of 2,048 nodes: one in three hours."""
    found = need(nodes=2048)
    assert found["between"] / 3600 == pytest.approx(54 * 24 / 419)
    assert 3.0 < found["between"] / 3600 < 3.2


def test_the_interval_loses_least() -> None:
    cost, between = 4.0, 1e6
    best = billion.interval(cost, between)
    assert best == pytest.approx(math.sqrt(8e6))
    lost = [billion.lost_share(best * factor, cost, 30.0, 600.0, between) for factor in (0.8, 1.0, 1.25)]
    assert lost[1] == min(lost)
    # a hundred failures, with each of which half an interval, a save and a restart are lost, and saves every `best`
    whole = 100 * between
    by_hand = 100 * (best / 2 + 30 + 600) + whole / best * cost
    assert lost[1] == pytest.approx(by_hand / whole)


def test_saves_no_faster_than_they_are_written() -> None:
    """Where the disk takes longer than the best interval, the disk counts."""
    slow = need(save_bytes_per_second=1e3)
    assert slow["interval"] == slow["written"]
    usual = need()
    assert usual["interval"] == pytest.approx(math.sqrt(2 * usual["stall"] * usual["between"]))


def test_a_saves_bytes_are_those_of_a_real_one(tmp_path: Path) -> None:
    recipe = recipes.diffmae("Nano/8", height=32)
    state, files = billion.state_bytes(recipe)
    written = billion.measure_saves(tmp_path, recipe, times=1)
    assert 0 < written["stall_seconds"] <= written["seconds"]
    tensors = len(MaskedDiffusionAutoencoder(recipe).state_dict())
    assert state < written["bytes"] < state + 5 * 2000 * tensors  # what stands around each tensor
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipe)
    assert files == 2 * sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_large_saves_bytes_are_foretold() -> None:
    record = json.loads((ROOT / "results" / "billion.json").read_text())["save"]
    state, _ = billion.state_bytes(recipes.diffmae(record["size"]))
    assert record["bytes"] == pytest.approx(state, rel=0.01)


def test_opening_and_the_order_are_measured(tmp_path: Path) -> None:
    opened = billion.measure_opening(tmp_path / "prepared", 100_000)
    assert (opened["samples"], opened["shards"]) == (25 * 4096, 25)
    assert opened["cpu_seconds"] > 0
    order = billion.measure_order(2_000_000, batch_size=1000, batches=4)
    assert all(order[name] > 0 for name in ("first_batch_seconds", "middle_batch_seconds", "other_batch_seconds"))


@pytest.mark.parametrize(
    "asked",
    [{"samples": 0}, {"passes": 0}, {"mfu": 0.0}, {"mfu": 5.0}, {"runs": (("L/16", 0),)}, {"runs": (("L/16", -2),)}],
)
def test_what_cannot_be_refuses(asked: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="at least 1"):
        billion.main(billion.Options(**asked))
