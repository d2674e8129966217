"""How a training step's time and memory grow with batch, tokens and depth, with the laws that they should follow.

    python benchmarks/growth.py --out results/growth.json       # and results/growth.png beside it

One thread, fp32, forward, backward and AdamW of random pictures. From one middle case, each sweep changes one thing alone. Time
is the processor's; every round runs one step of every case in turn, and the fastest of them counts, as what else the machine
does only adds to it. Memory is the peak of a fresh process for each case, beside what it had before its model was made.

A law is a sum of powers of what is swept: batch and depth a + b x; tokens a + b x + c x^2, as attention compares all with all.
Fits are of least squares in relative errors, so that small cases count as much as large ones.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from unveil import recipes
from unveil.contenders import Ours
from unveil.cost import masked_step
from unveil.recipe import Recipe
from unveil.sizes import stage_ends
from unveil.tasks.bench import commit, hardware


@dataclass(frozen=True, kw_only=True)
class Options:
    recipes: tuple[str, ...] = ("diffmae", "mae")
    size: str = "Ti/16"
    image_size: int = 128
    """Of the middle case, as are the batch and the size's own depths."""
    batch_size: int = 8
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    image_sizes: tuple[int, ...] = (64, 128, 192, 256, 320, 384, 448)
    tokens_batch_size: int = 2
    """Of the sweep over image sizes, whose largest case is large."""
    encoder_depths: tuple[int, ...] = (4, 8, 12, 16, 24)
    decoder_depths: tuple[int, ...] = (1, 2, 4, 8, 12)
    rounds: int = 12
    """That count; one more warms up."""
    memory: bool = True
    """Also measure memory, which starts a process for each case."""
    out: Path = Path("results/growth.json")


@dataclass(frozen=True)
class Case:
    """One step to measure; x is what its sweep changes."""

    sweep: str
    x: int
    recipe: Recipe
    batch_size: int


@dataclass(frozen=True)
class Fit:
    """y = the sum of coefficient * x^power.

    residuals: (what the law says - y) / y, for each point.
    """

    powers: tuple[int, ...]
    coefficients: tuple[float, ...]
    residuals: tuple[float, ...]

    @property
    def largest_residual(self) -> float:
        return max(abs(r) for r in self.residuals)

    def at(self, x: float) -> float:
        return sum(c * x**p for c, p in zip(self.coefficients, self.powers, strict=True))


# What each sweep should follow; and for tokens a straight line, to see whether the measurement could tell.
LAWS: dict[str, tuple[tuple[int, ...], ...]] = {
    "batch": ((0, 1),),
    "tokens": ((0, 1, 2), (0, 1)),
    "encoder depth": ((0, 1),),
    "decoder depth": ((0, 1),),
}


def fit(x: Sequence[float], y: Sequence[float], powers: tuple[int, ...]) -> Fit:
    """A law by least squares in relative errors.

    Args:
        y: above 0, one for each x.

    Raises:
        ValueError: there are not more points than powers, so that any law would fit.
    """
    if len(set(x)) <= len(powers):
        raise ValueError(f"{len(set(x))} points fit any law of {len(powers)} terms. Measure {len(powers) + 1} or more.")
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    columns = np.stack([(xs / xs.max()) ** power for power in powers], 1)  # of one size, for the solver
    solved = np.linalg.lstsq(columns / ys[:, None], np.ones(len(ys)), rcond=None)[0]
    residuals = columns @ solved / ys - 1
    coefficients = solved / xs.max() ** np.asarray(powers)
    return Fit(powers, tuple(coefficients.tolist()), tuple(residuals.tolist()))


def recipe_of(
    name: str, size: str, side: int, encoder_depth: int | None = None, decoder_depth: int | None = None
) -> Recipe:
    """A recipe with other depths than its size's."""
    recipe = recipes.RECIPES[name](size, height=side)
    decoder = recipe.decoder
    assert decoder is not None
    depths = (encoder_depth or recipe.encoder.depth, decoder_depth or decoder.depth)
    taps = depths[:1] if decoder.kind == "joint" else stage_ends(*depths)
    return dataclasses.replace(
        recipe,
        encoder=dataclasses.replace(recipe.encoder, depth=depths[0]),
        decoder=dataclasses.replace(decoder, depth=depths[1], taps=taps),
    )


def cases_of(options: Options, name: str) -> list[Case]:
    """All sweeps of a recipe."""
    make = functools.partial(recipe_of, name, options.size)
    side, batch = options.image_size, options.batch_size
    found = [Case("batch", n, make(side), n) for n in options.batch_sizes]
    for other in options.image_sizes:
        recipe = make(other)
        found.append(Case("tokens", recipe.clip.num_tokens, recipe, options.tokens_batch_size))
    found += [Case("encoder depth", n, make(side, encoder_depth=n), batch) for n in options.encoder_depths]
    return found + [Case("decoder depth", n, make(side, decoder_depth=n), batch) for n in options.decoder_depths]


def pictures_of(case: Case) -> Tensor:
    clip = case.recipe.clip
    return torch.rand(case.batch_size, clip.channels, clip.height, clip.width)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(case: Case) -> int:
    """Bytes that training takes at most, beside what this process has now; to be called in a fresh one."""
    torch.set_num_threads(1)
    before = _resident()
    contender = Ours(case.recipe, "cpu", "fp32", False)
    for _ in range(2):
        contender.step(pictures_of(case))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def memory_of(cases: Sequence[Case]) -> list[int]:
    """`peak_memory` of each in a process of its own, forked from one that has imported all and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unveil.contenders", __name__])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return pool.map(peak_memory, cases, chunksize=1)


def seconds_of(cases: Sequence[Case], rounds: int) -> list[list[float]]:
    """The processor's seconds of a step of each, in every round."""
    contenders: dict[Recipe, Ours] = {}
    for case in cases:
        if case.recipe not in contenders:
            contenders[case.recipe] = Ours(case.recipe, "cpu", "fp32", False)
    pictures = [pictures_of(case) for case in cases]
    seconds: list[list[float]] = [[] for _ in cases]
    for number in range(rounds + 1):
        for case, clips, times in zip(cases, pictures, seconds, strict=True):
            begin = time.process_time()
            contenders[case.recipe].step(clips)
            if number:
                times.append(time.process_time() - begin)
    return seconds


def row_of(case: Case, seconds: list[float], memory: int | None) -> dict[str, Any]:
    cost = masked_step(case.recipe)
    least = min(seconds)
    row: dict[str, Any] = {
        "recipe": case.recipe.name,
        "sweep": case.sweep,
        "x": case.x,
        "batch_size": case.batch_size,
        "multiply_adds": cost.forward * case.batch_size,
        "seconds": least,
        "median_seconds": statistics.median(seconds),
        "gflops_per_second": cost.train_flops * case.batch_size / least / 1e9,
    }
    return row if memory is None else {**row, "memory_bytes": memory}


def fits_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every law of every sweep, of time, memory and arithmetic."""
    found = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for sweep, laws in LAWS.items():
            points = [row for row in rows if (row["recipe"], row["sweep"]) == (recipe, sweep)]
            for quantity in ("seconds", "memory_bytes", "multiply_adds"):
                if quantity not in points[0]:
                    continue
                for powers in laws:
                    law = fit([row["x"] for row in points], [row[quantity] for row in points], powers)
                    about = {"recipe": recipe, "sweep": sweep, "of": quantity}
                    found.append({**about, **dataclasses.asdict(law), "largest_residual": law.largest_residual})
    return found


def rates_of(rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """10^9 floating-point operations a second: the slowest and fastest case of each sweep, and what its law adds for one more.

    The last is the first power's time against the first power's arithmetic, so that what every step costs is left out.
    """
    found = []
    for recipe, sweep in dict.fromkeys((row["recipe"], row["sweep"]) for row in rows):
        speeds = [row["gflops_per_second"] for row in rows if (row["recipe"], row["sweep"]) == (recipe, sweep)]
        law = {f["of"]: f for f in reversed(fits) if (f["recipe"], f["sweep"]) == (recipe, sweep)}
        added = 6 * law["multiply_adds"]["coefficients"][1] / law["seconds"]["coefficients"][1] / 1e9
        found.append({"recipe": recipe, "sweep": sweep, "lowest": min(speeds), "highest": max(speeds), "added": added})
    return found


def draw(rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]], path: Path) -> None:
    """Points with their laws: time above, memory below, a column for each sweep."""
    from matplotlib.figure import Figure

    quantities = [
        (name, unit, scale)
        for name, unit, scale in (("seconds", "seconds a step", 1.0), ("memory_bytes", "peak memory, MB", 1e6))
        if name in rows[0]
    ]
    figure = Figure(figsize=(13, 3.2 * len(quantities)), layout="constrained")
    grid = figure.subplots(len(quantities), len(LAWS), squeeze=False)
    for line, (quantity, unit, scale) in zip(grid, quantities, strict=True):
        for axes, (sweep, (powers, *_)) in zip(line, LAWS.items(), strict=True):
            for i, recipe in enumerate(dict.fromkeys(row["recipe"] for row in rows)):
                points = [row for row in rows if (row["recipe"], row["sweep"]) == (recipe, sweep)]
                found = next(
                    f
                    for f in fits
                    if (f["recipe"], f["sweep"], f["of"], f["powers"]) == (recipe, sweep, quantity, powers)
                )
                law = Fit(powers, found["coefficients"], found["residuals"])
                axes.plot([p["x"] for p in points], [p[quantity] / scale for p in points], "o", color=f"C{i}")
                line_x = np.linspace(0, max(p["x"] for p in points), 100)
                label = f"{recipe}, within {100 * law.largest_residual:.0f} %"
                axes.plot(line_x, [law.at(x) / scale for x in line_x], color=f"C{i}", label=label)
            axes.set_xlabel(sweep)
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def main(options: Options) -> None:
    sweeps = (options.batch_sizes, options.image_sizes, options.encoder_depths, options.decoder_depths)
    if min(len(sweep) for sweep in sweeps) < 3 or len(options.image_sizes) < 4:
        sys.exit("growth: --image-sizes needs 4 points or more, and each other sweep 3, or any law fits them.")
    torch.set_num_threads(1)
    cases = [case for name in options.recipes for case in cases_of(options, name)]
    memory: list[int | None] = [None] * len(cases)
    if options.memory:
        memory = list(memory_of(cases))
    begin = time.perf_counter()
    seconds = seconds_of(cases, options.rounds)
    took = time.perf_counter() - begin
    rows = [row_of(*told) for told in zip(cases, seconds, memory, strict=True)]
    fits = fits_of(rows)
    for found in fits:
        law = " + ".join(f"{c:.3g} x^{p}" for c, p in zip(found["coefficients"], found["powers"], strict=True))
        name = f"{found['recipe']}, {found['sweep']}, {found['of']}"
        print(f"{name:<40}{law}; within {100 * found['largest_residual']:.1f} %")
    rates = rates_of(rows, fits)
    for rate in rates:
        print("{recipe}, {sweep}: {lowest:.1f} to {highest:.1f} GFLOP/s, {added:.1f} of what is added".format(**rate))
    record = {
        "command": "python benchmarks/growth.py",
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(options).items()},
        "commit": commit(),
        "hardware": f"{hardware('cpu')}, one thread",
        "torch": torch.__version__,
        "seconds": round(took),
        "rows": rows,
        "fits": fits,
        "rates": rates,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draw(rows, fits, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
