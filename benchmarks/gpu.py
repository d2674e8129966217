"""ViT-B and ViT-L on a GPU: images a second and model FLOPs utilisation, beside Hugging Face's ViTMAE, eager and compiled.

    python benchmarks/gpu.py --out results/gpu.json                     # below ten minutes, on the first GPU
    python benchmarks/gpu.py --data prepared/ --workers 16              # and how long steps wait for real pictures

Random pictures on the device, forward, backward and AdamW; the steps of a round follow each other without waiting for the
device, as in training, and the median of the rounds counts. bf16 by autocast on a GPU. Each row has a process of its own, which
is ended when the time is over; a row begins only if one like it took no longer than what is left. The record is written after
every row, and rows without numbers say why. Without a GPU the same runs on the CPU, which proves the script and no more:

    python benchmarks/gpu.py --sizes Nano/16 --batch-sizes 4 --data pictures/ --workers 1 --out results/gpu_on_cpu.json

Needs the extra [bench].
"""

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import tyro

from unveil import __version__, recipes
from unveil.checkpoint import pick_device, write_atomically
from unveil.contenders import Contender, HuggingFace, Ours
from unveil.cost import masked_step
from unveil.data import source_for
from unveil.hardware import peak_of
from unveil.recipe import Recipe
from unveil.rundir import Precision
from unveil.tasks.bench import Bench, commit, hardware, matrix_product_peak, with_data

HUGGING_FACE = "Hugging Face ViTMAE"


@dataclass(frozen=True, kw_only=True)
class Options:
    sizes: tuple[str, ...] = ("B/16", "L/16")
    batch_sizes: tuple[int, ...] = (256, 128)
    """Pictures in a step, for each size."""
    image_size: int = 224
    device: str | None = None
    """Default: cuda if there is one."""
    precision: Precision | None = None
    """Default: bf16 on a GPU, fp32 on a CPU."""
    rounds: int = 5
    steps: int = 5
    """In each round."""
    budget: float = 570.0
    """Seconds in all."""
    data: str | None = None
    """Pictures to read while training."""
    workers: int = 8
    """Processes that read --data."""
    out: Path = Path("results/gpu.json")


@dataclass(frozen=True)
class Case:
    """A row; what: "mae", "diffmae", Hugging Face's, or "data", DiffMAE on pictures that are read meanwhile."""

    what: str
    size: str
    batch_size: int
    compiled: bool = False


def cases_of(options: Options) -> list[Case]:
    """Rows in the order in which they are worth having: compiling takes longest, and comes last.

    Raises:
        ValueError: there is not one batch size for each size.
    """
    if len(options.sizes) != len(options.batch_sizes):
        raise ValueError(
            f"--sizes has {len(options.sizes)} and --batch-sizes {len(options.batch_sizes)}; give a batch size for each."
        )
    pairs = list(zip(options.sizes, options.batch_sizes, strict=True))

    def every(compiled: bool) -> list[Case]:
        names = (HUGGING_FACE, "mae", "diffmae")
        return [Case(name, size, batch, compiled) for size, batch in pairs for name in names]

    reading = [] if options.data is None else [Case("data", size, batch) for size, batch in pairs]
    return [*every(False), *reading, *every(True)]


def rows_within(
    cases: Sequence[Case],
    budget: float,
    run: Callable[[Case, float], dict[str, Any]],
    tell: Callable[[list[dict[str, Any]]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """A row for each case, with what `run` found or with why nothing was.

    Args:
        budget: seconds for all.
        run: measures a case in at most so many seconds.
        tell: given all rows so far, after each.
    """
    begin, rows = clock(), list[dict[str, Any]]()
    longest: dict[bool, float] = {}
    for case in cases:
        left, likely = budget - (clock() - begin), longest.get(case.compiled, 0.0)
        if left <= 0:
            found = {"not_measured": "out of time"}
        elif left <= likely:
            found = {"not_measured": f"out of time: {left:.0f} s were left, and a row like it took {likely:.0f} s"}
        else:
            started = clock()
            found = run(case, left)
            longest[case.compiled] = max(likely, clock() - started)
        rows.append({**dataclasses.asdict(case), **found})
        tell(rows)
    return rows


def _end_with_parent() -> None:
    """Where the script itself is killed, nothing shall keep the GPU."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()  # so that whatever compiles for it ends with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        connection.send((True, function(*arguments)))
    except Exception as error:  # whatever a compiler or an allocator raises is what the row says
        lines = str(error).strip().splitlines() or [""]
        connection.send((False, f"{type(error).__name__}: {lines[0][:200]}"))


def in_process(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> tuple[bool, Any]:
    """Whether a function ended well in a process of its own within so many seconds; and what it returned, or why not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unveil.contenders", __name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return False, f"out of time: it was stopped after {seconds:.0f} s"
        answer = here.recv()
        process.join(10)  # its libraries clear up
        return answer
    except EOFError:
        process.join()
        return False, f"its process ended with {process.exitcode}"
    finally:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # one that was stopped before it had a group of its own
        process.join()
        here.close()


def recipe_of(case: Case, image_size: int) -> Recipe:
    make = recipes.diffmae if case.what in ("diffmae", "data") else recipes.mae
    return make(case.size, height=image_size)


def contender_of(case: Case, image_size: int, device: str, precision: Precision) -> Contender:
    make = HuggingFace if case.what == HUGGING_FACE else Ours
    return make(recipe_of(case, image_size), device, precision, case.compiled)


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(case: Case, options: Options, device: str, precision: Precision) -> dict[str, Any]:
    """Seconds of a step, and what follows from them; to be called in a fresh process."""
    contender = contender_of(case, options.image_size, device, precision)
    pictures = torch.rand(case.batch_size, 3, options.image_size, options.image_size, device=device)
    begin = time.perf_counter()
    for _ in range(2):  # allocates, picks kernels, compiles
        contender.step(pictures, wait=False)
    _finish(device)
    started, times = time.perf_counter() - begin, []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        for _ in range(options.steps):
            contender.step(pictures, wait=False)
        _finish(device)
        times.append((time.perf_counter() - begin) / options.steps)
    step = statistics.median(times)
    return {
        "images_per_second": case.batch_size / step,
        "seconds": {"median": step, "lowest": min(times), "highest": max(times)},
        "first_two_steps_seconds": started,
        "flops_per_second": masked_step(contender.recipe).train_flops * case.batch_size / step,
        "memory_bytes": torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
    }


def read(case: Case, options: Options, device: str, precision: Precision) -> dict[str, Any]:
    """How fast pictures are read, and what share of the time steps wait for them; to be called in a fresh process."""
    assert options.data is not None
    contender = contender_of(case, options.image_size, device, precision)
    assert isinstance(contender, Ours)
    source = source_for(options.data, contender.recipe.clip)
    asked = Bench(
        batch_size=case.batch_size, data=options.data, workers=options.workers, rounds=options.rounds * options.steps
    )
    return {**with_data(asked, source, contender, device), "name": Path(options.data).name}


def with_shares(row: dict[str, Any], peaks: dict[str, float]) -> dict[str, Any]:
    """A row with its speed as a share of each peak; model FLOPs utilisation is the share of the datasheet's."""
    if "flops_per_second" not in row:
        return row
    return {**row, "share_of_peak": {name: row["flops_per_second"] / peak for name, peak in peaks.items()}}


def line_of(row: dict[str, Any]) -> str:
    name = f"{row['size']:<8}{row['what'] + (', compiled' if row['compiled'] else ''):<30}"
    if "not_measured" in row:
        return f"{name}not measured: {row['not_measured']}"
    speed = row["images_per_second"]
    told = f"{speed:9.4g} images/s" if speed is not None else "too few pictures to tell"
    if "data_wait" in row and row["data_wait"] is not None:
        told += f", {100 * row['data_wait']:.1f} % of the time waiting for data"
    shares = [f"{100 * share:.1f} % of the {kind} peak" for kind, share in row.get("share_of_peak", {}).items()]
    return name + ", ".join([told, *shares])


def main(options: Options) -> None:
    if min(options.rounds, options.steps, *options.batch_sizes) < 1:
        sys.exit("gpu: --rounds, --steps and --batch-sizes are at least 1.")
    begin = time.monotonic()
    device = pick_device(options.device)
    on_gpu = device.startswith("cuda")
    precision: Precision = options.precision or ("bf16" if on_gpu else "fp32")
    try:
        cases = cases_of(options)
    except ValueError as error:
        sys.exit(f"gpu: {error}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    peaks: dict[str, float] = {}
    known = peak_of(torch.cuda.get_device_name(device)) if on_gpu else None
    if known is not None:
        peaks["datasheet"] = 1e12 * getattr(known, precision)
    well, peak = in_process(matrix_product_peak, (device, precision), options.budget)
    if well:
        peaks["matrix product"] = peak
    record: dict[str, Any] = {
        "command": "python benchmarks/gpu.py",
        "options": {
            **{name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(options).items()},
            "data": options.data and Path(options.data).name,
        },
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(device),
        "versions": {"unveil": __version__, "torch": torch.__version__, "cuda": torch.version.cuda if on_gpu else None},
        "precision": precision,
        "peaks": peaks,
    }

    def run(case: Case, seconds: float) -> dict[str, Any]:
        well, found = in_process(read if case.what == "data" else measure, (case, options, device, precision), seconds)
        return with_shares(found, peaks) if well else {"not_measured": found}

    def tell(rows: list[dict[str, Any]]) -> None:
        print(line_of(rows[-1]), flush=True)
        text = json.dumps({**record, "seconds": round(time.monotonic() - begin, 1), "rows": rows}, indent=2) + "\n"
        write_atomically(options.out, lambda part: part.write_text(text, encoding="utf-8"))

    rows_within(cases, options.budget - (time.monotonic() - begin), run, tell)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
