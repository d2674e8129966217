"""`benchmarks/gpu.py` keeps its time, and leaves a record of what it measured and of what it did not."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu

from unveil import recipes
from unveil.contenders import Clock, Ours

SMALL: dict[str, Any] = {"sizes": ("Nano/8",), "batch_sizes": (2,), "image_size": 16, "rounds": 1, "steps": 1}


class Time:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def rows(
    budget: float, takes: dict[str, float], cases: list[gpu.Case]
) -> tuple[list[dict[str, Any]], float, list[int]]:
    """Rows of cases that take so long by their size; how much time was spent; how many rows each record had."""
    clock, told = Time(), list[int]()

    def run(case: gpu.Case, seconds: float) -> dict[str, Any]:
        assert seconds > 0
        clock.now += min(takes[case.size], seconds)
        return {"not_measured": "stopped"} if takes[case.size] > seconds else {"images_per_second": 1.0}

    found = gpu.rows_within(cases, budget, run, lambda so_far: told.append(len(so_far)), clock)
    return found, clock.now - 100.0, told


def test_what_fits_is_measured() -> None:
    cases = [gpu.Case("mae", "B/16", 8), gpu.Case("diffmae", "B/16", 8)]
    found, spent, told = rows(20.0, {"B/16": 5.0}, cases)
    assert [row.get("images_per_second") for row in found] == [1.0, 1.0]
    assert (spent, told) == (10.0, [1, 2])  # a record after each row


def test_a_row_that_no_longer_fits_is_left_out_and_says_so() -> None:
    cases = [gpu.Case("mae", size, 8) for size in ("long", "short", "long")]
    found, spent, _ = rows(18.0, {"long": 10.0, "short": 1.0}, cases)
    assert "images_per_second" in found[0]
    # nothing is known of it but that one like it took ten seconds, and eight are left
    assert [row["not_measured"] for row in found[1:]] == ["out of time: 8 s were left, and a row like it took 10 s"] * 2
    assert spent == 10.0


def test_compiled_rows_are_judged_by_compiled_ones() -> None:
    cases = [gpu.Case("mae", "B/16", 8), gpu.Case("mae", "slow", 8, True), gpu.Case("mae", "B/16", 8)]
    found, spent, _ = rows(30.0, {"B/16": 1.0, "slow": 20.0}, cases)
    assert ["images_per_second" in row for row in found] == [True, True, True]
    assert spent == 22.0


def test_a_row_that_hangs_takes_no_more_than_the_budget() -> None:
    cases = [gpu.Case("mae", "hangs", 8)] * 3
    found, spent, _ = rows(30.0, {"hangs": 1e9}, cases)
    assert spent == 30.0
    assert [row["not_measured"].startswith(("stopped", "out of time")) for row in found] == [True] * 3


def test_without_time_every_row_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "in_process", lambda *_: (False, "never started"))
    out = tmp_path / "made" / "gpu.json"
    gpu.main(gpu.Options(**SMALL, device="cpu", budget=0.0, out=out))
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {row["not_measured"] for row in record["rows"]} == {"out of time"}
    assert [(row["what"], row["compiled"]) for row in record["rows"]] == [
        (name, compiled) for compiled in (False, True) for name in ("Hugging Face ViTMAE", "mae", "diffmae")
    ]
    assert capsys.readouterr().out.count("not measured: out of time") == 6


def test_a_row_is_measured() -> None:
    case = gpu.Case("diffmae", "Nano/8", 4)
    row = gpu.measure(case, gpu.Options(**{**SMALL, "rounds": 3, "steps": 2}), "cpu", "fp32")
    assert row["images_per_second"] == pytest.approx(4 / row["seconds"]["median"])
    assert 0 < row["seconds"]["lowest"] <= row["seconds"]["median"] <= row["seconds"]["highest"]
    shares = gpu.with_shares(row, {"datasheet": 2 * row["flops_per_second"]})["share_of_peak"]
    assert shares == {"datasheet": pytest.approx(0.5)}
    assert gpu.with_shares({"not_measured": "x"}, {"datasheet": 1.0}) == {"not_measured": "x"}


def test_a_step_that_does_not_wait_asks_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("torch.cuda.synchronize", asked.append)
    Clock("cuda:0", False).end("encoder")
    assert not asked
    Clock("cuda:0", True).end("encoder")
    assert asked == ["cuda:0", "cuda:0"]
    told = Ours(recipes.mae("Nano/8", height=16), "cpu", "fp32", False).step(torch.rand(2, 3, 16, 16), wait=False)
    assert "backward" in told


def test_sizes_without_a_batch_size_each_refuse() -> None:
    with pytest.raises(ValueError, match="--sizes has 2 and --batch-sizes 1; give a batch size for each"):
        gpu.cases_of(gpu.Options(batch_sizes=(8,)))


@pytest.mark.parametrize(
    "asked, told",
    [({"rounds": 0}, "at least 1"), ({"batch_sizes": (8, -1)}, "at least 1"), ({"batch_sizes": (8,)}, "for each")],
)
def test_what_cannot_be_measured_refuses_and_writes_nothing(asked: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=told):
        gpu.main(gpu.Options(**asked, device="cpu", out=tmp_path / "made" / "gpu.json"))
    assert not list(tmp_path.iterdir())


def test_data_are_a_row_before_what_is_compiled() -> None:
    cases = gpu.cases_of(gpu.Options(data="photos"))
    order = [(case.what == "data", case.compiled) for case in cases]
    assert order == [(False, False)] * 6 + [(True, False)] * 2 + [(False, True)] * 6


def _hang(path: str) -> None:
    Path(path).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


@pytest.mark.slow
def test_a_process_is_ended_in_time(tmp_path: Path) -> None:
    begin = time.monotonic()
    well, said = gpu.in_process(_hang, (str(tmp_path / "pid"),), 5.0)
    assert (well, said) == (False, "out of time: it was stopped after 5 s")
    assert time.monotonic() - begin < 60  # most of it to start
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_an_error_is_the_rows_reason() -> None:
    assert gpu.in_process(gpu.contender_of, (gpu.Case("mae", "Nano/7", 2), 16, "cpu", "fp32"), 60.0) == (
        False,
        "ValueError: Clip has height=16, which patch_size=7 does not divide. Use 14 or 21, or another patch size.",
    )
    assert gpu.in_process(os._exit, (3,), 60.0) == (False, "its process ended with 3")


@pytest.mark.slow
def test_data_are_measured(tmp_path: Path) -> None:
    from test_train import write_pictures

    write_pictures(tmp_path / "pictures", 26, size=20)
    options = gpu.Options(**{**SMALL, "rounds": 2}, data=str(tmp_path / "pictures"), workers=0)
    row = gpu.read(gpu.Case("data", "Nano/8", 4), options, "cpu", "fp32")
    assert 0 < row["data_wait"] < 1
    assert "waiting for data" in gpu.line_of({"what": "data", "size": "Nano/8", "compiled": False, **row})
