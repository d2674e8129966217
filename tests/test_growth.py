"""`benchmarks/growth.py`: laws of a step's cost are told from one another, and each sweep changes one thing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import growth

X = (16, 64, 144, 256, 400)

SMALL: dict[str, Any] = {
    "recipes": ("diffmae", "mae"),
    "size": "Nano/8",
    "image_size": 16,
    "batch_size": 2,
    "batch_sizes": (1, 2, 4),
    "image_sizes": (16, 24, 32, 40),
    "encoder_depths": (1, 2, 4),
    "decoder_depths": (1, 2, 3),
    "rounds": 1,
}


@pytest.mark.parametrize(
    "coefficients, powers", [((3.0, 0.5), (0, 1)), ((3.0, 0.5, 2e-3), (0, 1, 2)), ((1e8, -2.0, 1e-3), (0, 1, 2))]
)
def test_a_fit_finds_the_law_that_made_the_points(coefficients: tuple[float, ...], powers: tuple[int, ...]) -> None:
    y = [sum(c * x**p for c, p in zip(coefficients, powers, strict=True)) for x in X]
    law = growth.fit(X, y, powers)
    assert law.coefficients == pytest.approx(coefficients)
    assert law.largest_residual < 1e-9
    assert law.at(1000) == pytest.approx(sum(c * 1000**p for c, p in zip(coefficients, powers, strict=True)))


def test_a_wrong_law_shows() -> None:
    """A straight line through what grows with the square, or through what has steps, is off by far more than noise."""
    squares = [1.0 + 1e-3 * x**2 for x in X]
    assert growth.fit(X, squares, (0, 1, 2)).largest_residual < 1e-9
    assert growth.fit(X, squares, (0, 1)).largest_residual > 0.3
    assert growth.fit(X, [1.0, 2.0, 1.0, 2.0, 1.0], (0, 1)).largest_residual > 0.3


def test_residuals_are_relative_and_signed() -> None:
    law = growth.fit((1, 2, 3), (1.0, 1.0, 2.0), (0, 1))
    said = [law.at(x) for x in (1, 2, 3)]
    assert law.residuals == pytest.approx([said[0] - 1, said[1] - 1, (said[2] - 2) / 2])


@pytest.mark.parametrize("x", [(1, 2), (1, 1, 2, 2)])
def test_a_fit_that_could_not_fail_refuses(x: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 points fit any law of 2 terms"):
        growth.fit(x, [1.0] * len(x), (0, 1))


@pytest.mark.parametrize("name", ["diffmae", "mae"])
def test_each_sweep_changes_one_thing(name: str) -> None:
    cases = growth.cases_of(growth.Options(**SMALL), name)
    for sweep in growth.LAWS:
        told = [case for case in cases if case.sweep == sweep]
        values = {
            "batch": {case.batch_size for case in told},
            "tokens": {case.recipe.clip.num_tokens for case in told},
            "encoder depth": {case.recipe.encoder.depth for case in told},
            "decoder depth": {case.recipe.decoder.depth for case in told},
        }
        assert values.pop(sweep) == {case.x for case in told}
        assert len({case.x for case in told}) >= 3
        assert all(len(others) == 1 for others in values.values())


def test_the_script_runs_and_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "made" / "growth.json"
    growth.main(growth.Options(**SMALL, memory=False, out=out))
    record = json.loads(out.read_text(encoding="utf-8"))
    assert len(record["rows"]) == 2 * (3 + 4 + 3 + 3)
    for row in record["rows"]:
        assert 0 < row["seconds"] <= row["median_seconds"]
        assert row["gflops_per_second"] == pytest.approx(6e-9 * row["multiply_adds"] / row["seconds"])
    arithmetic = [fit for fit in record["fits"] if fit["of"] == "multiply_adds"]
    assert len(arithmetic) == 2 * (3 + 2)
    exact = {
        fit["largest_residual"] < 0.05 for fit in arithmetic if fit["powers"] != [0, 1] or fit["sweep"] != "tokens"
    }
    assert exact == {True}  # it is counted, and follows the laws but for rounding the number of hidden tokens
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "asked", [{"image_sizes": (16, 24, 32)}, {"batch_sizes": (1, 2)}, {"encoder_depths": (1,)}, {"decoder_depths": ()}]
)
def test_too_few_points_are_refused_before_anything_is_measured(asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs 4 points or more"):
        growth.main(growth.Options(**{**SMALL, **asked}, out=tmp_path / "growth.json"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes(tmp_path: Path) -> None:
    """A case's peak does not depend on those before it, and grows with the batch."""
    small, large = (growth.Case("batch", n, growth.recipe_of("mae", "Nano/8", 64), n) for n in (1, 64))
    first, most, again = growth.memory_of([small, large, small])
    assert most > 1.5 * max(first, again)
    assert again == pytest.approx(first, rel=0.25)
