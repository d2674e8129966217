"""How fast training is here: steps side by side with Hugging Face's, their stages, memory, and the data beside them."""

import dataclasses
import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unveil import __version__, recipes
from unveil.checkpoint import pick_device, write_atomically
from unveil.config import check_choice
from unveil.contenders import STAGES, Contender, HuggingFace, Ours
from unveil.cost import masked_step
from unveil.data import Samples, Source, batches, source_for
from unveil.hardware import peak_of
from unveil.planning import parse_image_size
from unveil.recipe import Recipe
from unveil.rundir import Precision

Beside = Literal["huggingface"]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time training steps, side by side and in turn, and write a dated record.

    Example: unveil bench --size B/16 --batch-size 16 --precision bf16 --beside huggingface
    """

    recipes: tuple[str, ...] = ("mae", "diffmae")
    """Recipes to time, of pictures."""
    size: str = "B/16"
    """Encoder and patch size."""
    image_size: str = "224"
    """Height and width in pixels, one number or 64x48."""
    batch_size: int = 16
    """Pictures in one step."""
    precision: Precision | None = None
    """fp32, or bf16 by autocast. Default: bf16 on cuda, fp32 on a CPU."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""
    compile: bool = False
    """Time each also compiled by torch.compile."""
    beside: Beside | None = None
    """huggingface: transformers' ViTMAE of the same sizes in the same rounds, on the same pictures and with the same optimiser.
    Needs mae among --recipes."""
    rounds: int = 5
    """Rounds that count, in each of which every contender makes one step; one more warms up."""
    data: str | None = None
    """Also measure how fast these pictures are read, and how long steps wait for them. Default: no data, random pictures."""
    workers: int | None = None
    """Processes that read --data. Default: one for each core."""
    out: Path = Path("benchmarks")
    """Folder of the records."""


def bench(options: Bench, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil bench`.

    Args:
        on_progress: called with the rounds that are done, and how many there are.

    Returns:
        The record, as it is written to "file": "rows", one for each contender, with images_per_second and seconds of a step
        (median, lowest, highest), of its stages, speed against Hugging Face's and against the peaks, and memory_bytes; "peaks",
        in floating-point operations a second; and "data" if any was given.

    Raises:
        ValueError: a recipe, size, device or source that cannot be used.
    """
    if options.rounds < 1 or options.batch_size < 1:
        raise ValueError(
            f"--rounds {options.rounds} and --batch-size {options.batch_size} were given; each is at least 1."
        )
    check_choice("--precision", "precision", options.precision or "fp32", Precision)
    device = pick_device(options.device)
    precision: Precision = options.precision or ("bf16" if device.startswith("cuda") else "fp32")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers {options.workers}: use 0 to read in the main process, or more.")
    options.out.mkdir(parents=True, exist_ok=True)  # before anything is measured that could not be written
    makers = _makers(options, device, precision)
    source = None
    if options.data is not None:  # before the hours of a large model
        source = source_for(options.data, _recipe(options, options.recipes[0]).clip)
    height, width = parse_image_size(options.image_size)
    pictures = torch.rand(options.batch_size, 3, height, width, device=device)
    before = matrix_product_peak(device, precision)
    memory = {name: _peak_memory(options, device, precision, name) for name in makers}
    contenders = [make() for make in makers.values()]
    total = options.rounds + 1
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    stages: dict[str, list[dict[str, float]]] = {c.name: [] for c in contenders}
    for number in range(total):
        for contender in contenders:
            told = contender.step(pictures)
            if number:
                seconds[contender.name].append(sum(told.values()))
                stages[contender.name].append(told)
        if on_progress is not None:
            on_progress(number + 1, total)
    peaks = {"matrix_product": max(before, matrix_product_peak(device, precision))}
    datasheet = peak_of(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None
    if datasheet is not None:
        peaks["datasheet"] = 1e12 * (datasheet.bf16 if precision == "bf16" else datasheet.fp32)
    base = seconds.get("Hugging Face ViTMAE")
    rows = [
        _row(c, options.batch_size, seconds[c.name], stages[c.name], base, peaks, memory[c.name]) for c in contenders
    ]
    data = None
    if source is not None:
        data = with_data(options, source, next(c for c in contenders if isinstance(c, Ours)), device)
    record = {
        "command": "unveil bench " + " ".join(_words(options)),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "versions": {"unveil": __version__, "torch": torch.__version__, **_version("transformers", options.beside)},
        "precision": precision,
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "size": options.size,
        "rounds": options.rounds,
        "peaks": peaks,
        "rows": rows,
        **({} if data is None else {"data": data}),
    }
    where = re.sub(r"[^a-z0-9]+", "-", f"{hardware(device)}".lower()).strip("-")
    stem = f"step_{where}_{record['date']}_{options.size.lower().replace('/', '-')}-{precision}"
    path = options.out / f"{stem}.json"
    number = 2
    while path.exists():  # a record of the same day is kept
        path, number = options.out / f"{stem}-{number}.json", number + 1
    write_atomically(path, lambda part: part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"))
    return {**record, "file": str(path)}


def _recipe(options: Bench, name: str) -> Recipe:
    check = recipes.RECIPES
    if name not in check:
        raise ValueError(f"There is no recipe {name!r}. Choose from {', '.join(check)}.")
    height, width = parse_image_size(options.image_size)
    recipe = check[name](options.size, height=height, width=width)
    if recipe.clip.frames > 1:
        raise ValueError(f"{name} is a recipe of clips, and pictures are timed here. Choose another for --recipes.")
    return recipe


def _makers(options: Bench, device: str, precision: Precision) -> dict[str, Callable[[], Contender]]:
    """How to make each contender, by its name."""
    found: dict[str, Callable[[], Contender]] = {}
    ways = (False, True) if options.compile else (False,)
    if options.beside == "huggingface":
        mae = _recipe(options, next((name for name in options.recipes if name == "mae"), options.recipes[0]))
        for way in ways:
            found["Hugging Face ViTMAE" + (", compiled" if way else "")] = lambda way=way: HuggingFace(
                mae, device, precision, way
            )
    for name in options.recipes:
        recipe = _recipe(options, name)
        for way in ways:
            found[name + (", compiled" if way else "")] = lambda recipe=recipe, way=way: Ours(
                recipe, device, precision, way
            )
    return found


def _row(
    contender: Contender,
    batch_size: int,
    seconds: list[float],
    stages: list[dict[str, float]],
    base: list[float] | None,
    peaks: dict[str, float],
    memory: int,
) -> dict[str, Any]:
    median = statistics.median(seconds)
    cost = masked_step(contender.recipe)
    flops = cost.train_flops * batch_size / median
    row: dict[str, Any] = {
        "name": contender.name,
        "images_per_second": batch_size / median,
        "seconds": {"median": median, "lowest": min(seconds), "highest": max(seconds)},
        "stages": {stage: statistics.median(told[stage] for told in stages) for stage in STAGES if stage in stages[0]},
        "forward_multiply_adds": cost.forward,
        "share_of_peak": {name: flops / peak for name, peak in peaks.items()},
        "memory_bytes": memory,
    }
    if base is not None:
        # by rounds, as what else the machine does falls on a round as a whole
        row["speed_over_hugging_face"] = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
    return row


def matrix_product_peak(device: str, precision: Precision) -> float:
    """Floating-point operations a second of the fastest of a few large square matrix products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for side in (4096, 8192) if device.startswith("cuda") else (1024, 2048):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        for _ in range(6):
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            torch.mm(a, b)
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    return best


def _peak_memory(options: Bench, device: str, precision: Precision, name: str) -> int:
    """Bytes that a contender's training takes at most, measured in a process of its own."""
    fields = {
        key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(options).items()
    }
    program = (
        "import json, sys; from unveil.tasks.bench import Bench, _measure_memory; told = json.loads(sys.argv[1]); "
        "told['recipes'] = tuple(told['recipes']); print(_measure_memory(Bench(**told), *sys.argv[2:]))"
    )
    words = [sys.executable, "-c", program, json.dumps(fields), device, precision, name]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no word"]
        raise ValueError(f"{name} cannot be timed: {last[0].removeprefix('ValueError: ')}")
    return int(done.stdout.split()[-1])


def _measure_memory(options: Bench, device: str, precision: Precision, name: str) -> int:
    height, width = parse_image_size(options.image_size)
    before = _resident()
    contender = _makers(options, device, precision)[name]()
    pictures = torch.rand(options.batch_size, 3, height, width, device=device)
    for _ in range(2):
        contender.step(pictures)
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def _resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def with_data(options: Bench, source: Source, contender: Ours, device: str) -> dict[str, Any]:
    """How fast a source is read by itself, and how long steps wait for it."""
    recipe = contender.recipe
    workers = min(options.workers if options.workers is not None else torch.get_num_threads(), len(source))
    samples = Samples(source, recipe.clip, 0, recipe.training)

    def loader() -> Any:
        return batches(samples, options.batch_size, 0, 0, shuffle=True, drop_last=True, num_workers=workers)

    def clips_of(batch: Any) -> Tensor:
        if batch.values is None:
            raise ValueError(f"A whole batch of {options.data!r} cannot be read. `unveil doctor` says why.")
        return batch.clips(device)[:, :, 0]

    num, begin = 0, 0.0
    for number, batch in enumerate(loader()):
        clips_of(batch)
        if number == 0:  # workers start with it
            begin = time.perf_counter()
            continue
        num += len(batch.indices)
        if number == options.rounds:
            break
    alone = num / (time.perf_counter() - begin) if num else None
    waited = trained = 0.0
    asked = time.perf_counter()
    for number, batch in enumerate(loader()):
        pictures, got = clips_of(batch), time.perf_counter()
        contender.step(pictures)
        if number:
            waited, trained = waited + got - asked, trained + time.perf_counter() - got
        if number == options.rounds:
            break
        asked = time.perf_counter()
    whole = waited + trained
    return {
        "name": options.data,
        "samples": len(source),
        "workers": workers,
        "read_per_second": alone,
        "contender": contender.name,
        "images_per_second": options.batch_size * options.rounds / whole if whole else None,
        "data_wait": waited / whole if whole else None,
    }


def _words(options: Bench) -> list[str]:
    """The options that are not the default, as they are typed."""
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name == "out":  # where a record is written says nothing of it
            continue
        word = "--" + field.name.replace("_", "-")
        values = value if isinstance(value, tuple) else (() if value is True else (value,))
        words += [word, *(str(part) for part in values)]
    return words


def _version(name: str, wanted: object) -> dict[str, str]:
    if wanted is None:
        return {}
    from importlib.metadata import version

    return {name: version(name)}


def hardware(device: str) -> str:
    """The name of the processor or GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{found.group(1)}, {os.cpu_count()} cores" if found else platform.machine()


def commit() -> str | None:
    """Of the source that runs, if it is a checkout."""
    where = Path(__file__).resolve().parent
    words = ["git", "-C", str(where), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
