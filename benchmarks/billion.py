"""What a pre-training on a billion pictures needs, computed from measured numbers: the table of docs/scale.md.

    python benchmarks/billion.py                # the table
    python benchmarks/billion.py --measure      # measures what no other benchmark has: opening, the order, saves

Measured are the reading (results/data_photos.json, by benchmarks/data.py) and what --measure writes to results/billion.json.
Assumed, because no GPU was here: the share of a GPU's peak that training reaches. Counted by Meta: how often nodes fail.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from unveil import recipes
from unveil.cost import masked_step
from unveil.data import Order, open_source
from unveil.hardware import PEAKS
from unveil.model import MaskedDiffusionAutoencoder
from unveil.optim import adam_state
from unveil.recipe import Recipe
from unveil.rundir import Run
from unveil.saves import Saves
from unveil.shards import FORMAT, INDEX, MANIFEST, Shards
from unveil.tasks.bench import commit, hardware
from unveil.tasks.prepare import MOST

RESULTS = Path(__file__).resolve().parents[1] / "results"
GPUS = 8  # of a node

# Llama 3's 54 days on 16,384 H100, 8 in a node: 419 unexpected interruptions (arXiv 2407.21783, section 3.3.4 and table 5).
NODE_HOURS_TO_FAILURE = 54 * 24 * (16_384 / 8) / 419


@dataclass(frozen=True, kw_only=True)
class Options:
    samples: int = 1_000_000_000
    passes: int = 10
    """Over the data. MAE's 1,600 epochs of ImageNet are 2.05 billion pictures."""
    mfu: float = 0.4
    """Share of the peak that is reached. Assumed."""
    peak_tflops: float = PEAKS["H100"].bf16
    restart_minutes: float = 10.0
    """From a failure to the first step again, but for opening the data: noticing it, a node in its place, starting. Assumed."""
    runs: tuple[tuple[str, int], ...] = (("B/16", 1), ("B/16", 8), ("L/16", 8), ("H/14", 8), ("H/14", 64))
    """Sizes of DiffMAE, with the number of nodes."""
    measure: bool = False
    measured_samples: int = 100_000_000
    """Of the index that --measure opens: 2 GB of memory for a hundred million."""
    size: str = "B/16"
    """Whose saves --measure writes."""
    scratch: Path | None = None
    """Where --measure writes, on the disk that is to be measured. Default: the system's place for temporary files."""


@dataclass(frozen=True)
class Measured:
    """Inputs of the table.

    read_per_core: prepared pictures a second that one core reads. sample_bytes: of a prepared one. prepare_per_core:
    originals a second. open_seconds: the processor's, of a sample. save_bytes_per_second: to the disk, checksums included.
    stall_bytes_per_second: until the next step can begin.
    """

    read_per_core: float
    sample_bytes: float
    prepare_per_core: float
    open_seconds: float
    save_bytes_per_second: float
    stall_bytes_per_second: float


def measured(results: Path = RESULTS) -> Measured:
    photos = json.loads((results / "data_photos.json").read_text(encoding="utf-8"))
    ours = json.loads((results / "billion.json").read_text(encoding="utf-8"))
    return Measured(
        read_per_core=photos["loaders"]["prepared"]["pictures_per_second"],
        sample_bytes=photos["prepared_bytes"] / int(photos["options"]["made"]),
        prepare_per_core=photos["prepare_pictures_per_second"],
        open_seconds=ours["open"]["cpu_seconds"] / ours["open"]["samples"],
        save_bytes_per_second=ours["save"]["bytes"] / ours["save"]["seconds"],
        stall_bytes_per_second=ours["save"]["bytes"] / ours["save"]["stall_seconds"],
    )


def state_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes of what a run goes on from, and of the weights files for use that are written with it."""
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipe)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    files = weights * (1 + len(recipe.training.ema_decays))
    return files + 2 * sum(parameter.nbytes for parameter in model.parameters()), files


def interval(cost: float, between_failures: float) -> float:
    """Seconds between saves that lose least: sqrt(2 cost MTBF), Young 1974, doi 10.1145/361147.361115.

    Args:
        cost: seconds that a save holds training up.
        between_failures: mean time, in seconds.
    """
    return math.sqrt(2 * cost * between_failures)


def lost_share(every: float, cost: float, written: float, restart: float, between_failures: float) -> float:
    """Of the time: what saves hold up; and with each failure half an interval, a save not yet written, and the restart."""
    return cost / every + (every / 2 + written + restart) / between_failures


def need(size: str, nodes: int, options: Options, known: Measured) -> dict[str, float]:
    """Of one run; seconds, bytes and counts."""
    recipe = recipes.diffmae(size)
    gpus = GPUS * nodes
    rate = options.peak_tflops * 1e12 * options.mfu / masked_step(recipe).train_flops  # pictures a second of a GPU
    seconds = options.samples * options.passes / (rate * gpus)
    between = NODE_HOURS_TO_FAILURE / nodes * 3600
    state, files = state_bytes(recipe)
    stall, written = state / known.stall_bytes_per_second, (state + files) / known.save_bytes_per_second
    restart = 60 * options.restart_minutes + options.samples * known.open_seconds
    default = max(60 * Run.save_minutes, written)  # a save waits for the one before it
    best = max(interval(stall, between), written)
    return {
        "gpus": gpus,
        "rate": rate,
        "seconds": seconds,
        "cores": rate / known.read_per_core,
        "bandwidth": GPUS * rate * known.sample_bytes,
        "between": between,
        "failures": seconds / between,
        "state": state,
        "files": files,
        "stall": stall,
        "written": written,
        "interval": best,
        "lost": lost_share(best, stall, written, restart, between),
        "lost_by_default": lost_share(default, stall, written, restart, between),
    }


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def table(options: Options, known: Measured) -> str:
    """Markdown: what the data need whoever trains on them, and what each run does."""
    samples = options.samples
    shards = math.ceil(samples / MOST)
    opening = samples * known.open_seconds
    rows = [
        "| the data | | from |",
        "|---|---|---|",
        f"| a prepared picture | {_bytes(known.sample_bytes)} | measured |",
        f"| shards | {shards:,} of {_bytes(MOST * known.sample_bytes)} | {MOST:,} pictures each |",
        f"| disk | {_bytes(samples * known.sample_bytes)} | |",
        f"| preparing them | {samples / known.prepare_per_core / 3600:,.0f} core-hours | measured on 12 megapixels |",
        f"| opening them, each process | {_time(opening)}, {_bytes(samples * INDEX.itemsize)} of memory | measured |",
        f"| memory of a node's index | {_bytes(GPUS * samples * INDEX.itemsize)} | {GPUS} processes |",
    ]
    found = [need(size, nodes, options, known) for size, nodes in options.runs]
    names = [f"{size}, {nodes} node{'s' if nodes > 1 else ''}" for size, nodes in options.runs]
    lines: list[tuple[str, list[str]]] = [
        ("GPUs", [f"{n['gpus']:,}" for n in found]),
        ("pictures/s of a GPU", [f"{n['rate']:,.0f}" for n in found]),
        (f"{options.passes} passes", [_time(n["seconds"]) for n in found]),
        ("cores that read, for each GPU", [f"{n['cores']:.1f}" for n in found]),
        ("bytes read, for each node", [f"{_bytes(n['bandwidth'])}/s" for n in found]),
        ("a save, and weights with it", [f"{_bytes(n['state'])} + {_bytes(n['files'])}" for n in found]),
        ("that is written in", [_time(n["written"]) for n in found]),
        ("and holds steps up for", [_time(n["stall"]) for n in found]),
        ("time between failures", [_time(n["between"]) for n in found]),
        ("failures in the run", [f"{n['failures']:.2g}" for n in found]),
        ("best time between saves", [_time(n["interval"]) for n in found]),
        ("time lost with it", [f"{100 * n['lost']:.2g} %" for n in found]),
        (
            f"time lost with `--save-minutes {Run.save_minutes:g}`",
            [f"{100 * n['lost_by_default']:.2g} %" for n in found],
        ),
    ]
    rows += ["", f"| DiffMAE | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows += [f"| {name} | {' | '.join(cells)} |" for name, cells in lines]
    return "\n".join(rows)


# What is measured here


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure_opening(folder: Path, samples: int) -> dict[str, Any]:
    """Open prepared shards of so many samples: indices that are links to a few files, and empty archives."""
    shards = math.ceil(samples / MOST)
    folder.mkdir(parents=True)
    index = np.zeros(MOST, INDEX)
    index["offset"] = 512 + 32_768 * np.arange(MOST)
    index["size"], index["number"] = 32_000, np.arange(MOST)
    names = [f"shard-{i:06}.tar" for i in range(shards)]
    for i, name in enumerate(names):
        path = folder / name
        if i % 10_000 == 0:  # file systems bear some ten thousand names for a file
            first = path
            path.touch()
            np.save(path.with_suffix(".npy"), index)
        else:
            path.hardlink_to(first)
            path.with_suffix(".npy").hardlink_to(first.with_suffix(".npy"))
    manifest = {
        "format": FORMAT,
        "classes": None,
        "shards": [{"name": name, "samples": MOST, "bytes": 10**9, "sha256": "0" * 64} for name in names],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    before, begin, cpu = resident(), time.perf_counter(), time.process_time()
    source = open_source(str(folder), 3)
    took, worked = time.perf_counter() - begin, time.process_time() - cpu
    assert isinstance(source, Shards)
    return {
        "samples": len(source),
        "shards": shards,
        "seconds": took,
        "cpu_seconds": worked,
        "memory_bytes": resident() - before,
    }


def measure_order(samples: int, batch_size: int = 4096, batches: int = 64) -> dict[str, Any]:
    """Of an epoch of so many samples in full shards: its first batch, one in the middle after a resumption, and any other."""
    starts = [*range(0, samples, MOST), samples]

    def seconds(first: int) -> tuple[float, float]:
        begin = time.perf_counter()
        order = Order(samples, batch_size, 0, 0, True, True, starts=starts)
        order.first_batch = first
        keys = iter(order)
        next(keys)
        begun = time.perf_counter()
        for _ in range(batches):
            next(keys)
        return begun - begin, (time.perf_counter() - begun) / batches

    first, each = seconds(0)
    middle, _ = seconds(samples // batch_size // 2)
    return {
        "samples": samples,
        "batch_size": batch_size,
        "first_batch_seconds": first,
        "middle_batch_seconds": middle,
        "other_batch_seconds": each,
    }


def measure_saves(folder: Path, recipe: Recipe, times: int = 3) -> dict[str, Any]:
    """Medians of saving a run's state, as training does: until it returns, and until it is on the disk."""
    model = MaskedDiffusionAutoencoder(recipe)
    weights = model.state_dict()
    state = {
        "model": weights,
        "averages": {
            f"{i}.{name}": tensor.clone()
            for i in range(len(recipe.training.ema_decays))
            for name, tensor in weights.items()
        },
        "optimizer": {name: adam_state(parameter) for name, parameter in model.named_parameters()},
    }
    saves, stalls, wholes = Saves(folder, keep=1), list[float](), list[float]()
    for step in range(times + 1):
        begin = time.perf_counter()
        saves.write(step, 0, state, {"step": step}, lambda: None)
        stalled = time.perf_counter() - begin
        saves.wait()
        if step:  # the first one imports and allocates
            stalls.append(stalled)
            wholes.append(time.perf_counter() - begin)
    size = sum(path.stat().st_size for path in (folder / saves.folder.name / saves.names()[-1]).iterdir())
    begin = time.perf_counter()
    newest = saves.newest()
    assert newest is not None
    saves.read(newest[0], state)
    read = time.perf_counter() - begin
    saves.close()
    return {
        "size": recipe.size,
        "bytes": size,
        "stall_seconds": statistics.median(stalls),
        "seconds": statistics.median(wholes),
        "read_seconds": read,
    }


def measure(options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        return {
            "command": "python benchmarks/billion.py --measure",
            "commit": commit(),
            "hardware": hardware("cpu"),
            "torch": torch.__version__,
            "open": measure_opening(folder / "prepared", options.measured_samples),
            "order": measure_order(options.samples),
            "save": measure_saves(folder / "run", recipes.diffmae(options.size)),
        }


def check(options: Options) -> None:
    """Refuse what cannot be, before anything is computed."""
    nodes = [number for _, number in options.runs]
    if min(options.samples, options.passes, *nodes) < 1 or not 0 < options.mfu <= 1:
        sys.exit("billion: --samples, --passes and nodes are at least 1, and --mfu is above 0 and at most 1.")


def main(options: Options) -> None:
    check(options)
    if options.measure:
        record = measure(options)
        text = json.dumps(record, indent=2)
        print(text)
        (RESULTS / "billion.json").write_text(text + "\n", encoding="utf-8")
        return
    print(table(options, measured()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
