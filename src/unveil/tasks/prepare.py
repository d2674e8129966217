"""Any data as tar shards: pictures shrunk and checked once, so that training reads them fast."""

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unveil import __version__, draws
from unveil.checkpoint import write_atomically
from unveil.config import check_choice
from unveil.packing import Form, Format, finished_shard, sidecar, write_shard
from unveil.planning import MAX_SIDE
from unveil.rundir import PROBLEMS, interruptible, lock
from unveil.shards import FORMAT, MANIFEST, PLAN
from unveil.sources import Source, as_text, digest_of, open_source

QUALITY = 92  # of JPEG and WebP
FEWEST, MOST, PARTS = 256, 4096, 64  # samples of a shard, and how many shards there are in between


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make tar shards of pictures: each is decoded once, to know that it is whole, and shrunk to the size that is needed.

    What cannot be used is left out, counted and listed. The order is drawn once, so that every shard is a fair sample. The
    result is --data of every command, and webdataset and Hugging Face datasets read it too. Started again, the same command
    goes on where it was stopped.

    Example: unveil prepare --data photos/ --out prepared/
    """

    data: str
    """Pictures, as for pretrain; other tar shards too. Labels are kept."""
    out: Path
    """Directory of the shards. If it holds the unfinished shards of the same command, they are completed."""
    image_size: int = 256
    """Pixels of the short side; smaller pictures keep their size."""
    format: Format = "jpeg"
    """jpeg, png or webp. Files of this format that are small enough are copied byte for byte. What JPEG cannot hold, which is
    transparency and more than eight bits, becomes PNG or .npy, and .npy arrays stay such."""
    quality: int | None = None
    """Of jpeg and webp, 1 to 100. Default: 92."""
    shard_samples: int | None = None
    """Pictures in a shard. Default: a 64th of all, at least 256 and at most 4,096."""
    seed: int = 0
    """Draws the order."""
    workers: int | None = None
    """Processes, each of which makes whole shards; no effect on the result. Default: one for each core."""


def _check(options: Prepare) -> Form:
    check_choice("--format", "format", options.format, Format)
    if not 1 <= options.image_size <= MAX_SIDE:
        raise ValueError(f"--image-size {options.image_size}: use pixels from 1 to {MAX_SIDE}.")
    if options.quality is not None and options.format == "png":
        raise ValueError(f"--quality {options.quality} belongs to jpeg and webp; png keeps every value. Drop it.")
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise ValueError(f"--quality {options.quality}: use a number from 1 to 100.")
    if options.shard_samples is not None and options.shard_samples < 1:
        raise ValueError(f"--shard-samples {options.shard_samples}: a shard has at least 1.")
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers}: it takes at least 1.")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed}: use a whole number from 0 to 2^63 - 1.")
    data = Path(options.data)
    if data.is_dir() and options.out.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"--out {options.out} lies in {data}, where it would be read as data. Choose another directory."
        )
    return Form(side=options.image_size, format=options.format, quality=options.quality or QUALITY)


def _plan(options: Prepare, form: Form, source: Source) -> dict[str, Any]:
    """What is made of what: all that the shards depend on."""
    size = options.shard_samples or min(MOST, max(FEWEST, -(-len(source) // PARTS)))
    return {
        "data": options.data,
        "image_size": form.side,
        "format": form.format,
        "quality": None if form.format == "png" else form.quality,
        "shard_samples": size,
        "seed": options.seed,
        "source_samples": len(source),
        "source_digest": digest_of(source),
    }


def _check_directory(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a directory in which the same was finished before.

    Raises:
        ValueError: it holds something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ValueError(f"{out} is a file, and shards need a directory. Choose another name.")
    for name in (MANIFEST, PLAN):
        path = out / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before = found["made"]
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or another program's ({error}). Choose another directory.") from None
        for key, value in plan.items():
            if before.get(key) != value:
                change = f"{key} was {before.get(key)!r} and is now {value!r}"
                if key in ("source_samples", "source_digest"):
                    change = "files or labels of the data have changed since"
                raise ValueError(f"{out} holds other shards: {change}. Choose another directory.")
        return found if name == MANIFEST else None
    strangers = [path.name for path in out.iterdir() if path.name != ".lock"]
    if strangers:
        raise ValueError(f"{out} is not empty ({strangers[0]!r}) and holds no shards. Choose a new directory.")
    return None


@dataclass(frozen=True)
class _Work:
    """What every process needs: which shards are left, and of which samples each is made."""

    out: Path
    source: Source
    order: np.ndarray
    size: int
    form: Form
    left: list[int]

    def shard(self, number: int) -> Path:
        return self.out / f"shard-{number:06}.tar"

    def make(self, number: int, told: Callable[[], None]) -> None:
        first = number * self.size
        chosen = self.order[first : first + self.size].tolist()
        write_shard(self.shard(number), self.source, chosen, first, self.form, told)


class _Stopped(Exception):
    """Somebody wants the work to end."""


def _make_shards(work: _Work, taken: Any, done: Any, stop: Any, problems: Any, parent: int) -> None:
    """What each process does: the next shard that nobody has taken, until none is left.

    Args:
        taken, done: shared numbers, of shards that were begun and of pictures. stop: a shared event. problems: a queue.
        parent: the process that waits; without it nobody would hear of the work.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)

    def told() -> None:
        with done.get_lock():
            done.value += 1
        if stop.is_set() or os.getppid() != parent:
            raise _Stopped

    try:
        while True:
            with taken.get_lock():
                turn = taken.value
                taken.value += 1
            if turn >= len(work.left) or stop.is_set():
                return
            work.make(work.left[turn], told)
    except _Stopped:
        return
    except (ValueError, OSError) as error:
        problems.put(str(error))


def _make_all(work: _Work, workers: int, interrupted: list[int], on_progress: Callable[[int], None]) -> None:
    """Make the shards that are left, or as many as are done when the user interrupts.

    Raises:
        ValueError: the data is out of reach, nothing can be written, or a process died.
    """
    context = multiprocessing.get_context()
    taken, done = context.Value("q", 0), context.Value("q", 0)
    stop, problems = context.Event(), context.SimpleQueue()
    arguments = (work, taken, done, stop, problems, os.getpid())
    processes = [context.Process(target=_make_shards, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()], 0.2)
            on_progress(done.value)
            if interrupted or not problems.empty() or any(process.exitcode for process in processes):
                stop.set()
    finally:
        stop.set()
        for process in processes:
            process.join()
    if not problems.empty():
        raise ValueError(problems.get())
    died = [process.exitcode for process in processes if process.exitcode]
    if died:
        how = f"was killed by signal {-died[0]}" if died[0] < 0 else f"ended with code {died[0]}"
        raise ValueError(
            f"A process that makes shards {how}; perhaps the memory is full. Finished shards are kept: start the same command "
            "again, with fewer --workers."
        )


def _moments(shards: Iterable[dict[str, Any]]) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel, every picture counting once; None if pictures have unlike channels."""
    sums: dict[str, list[Any]] = {}
    for shard in shards:
        for channels, (count, means, squares) in shard["moments"].items():
            held = sums.setdefault(channels, [0, 0.0, 0.0])
            held[:] = held[0] + count, held[1] + np.array(means), held[2] + np.array(squares)
    if len(sums) != 1:
        return None
    ((count, means, squares),) = sums.values()
    mean = means / count
    return mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()


def _finish(out: Path, source: Source, plan: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the list of problems and the manifest, and remove what was only needed until then."""
    skipped = [(as_text(bad.where), bad.reason) for bad in source.skipped]
    skipped += [(where, reason) for shard in shards for where, reason in shard["skipped"]]
    notes = [(where, note) for shard in shards for where, note in shard["notes"]]
    if not any(shard["samples"] for shard in shards):
        _clear(out, len(shards))
        (out / PLAN).unlink()
        raise ValueError(
            f"None of the {len(source)} samples of {source.name!r} can be read; the first problem: {': '.join(skipped[-1])}."
        )
    outcomes: Counter[str] = Counter()
    for shard in shards:
        outcomes.update(shard["outcomes"])
    moments = _moments(shards)
    kept = [{name: shard[name] for name in ("name", "samples", "bytes", "sha256")} for shard in shards]
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "made": plan,
        "samples": sum(shard["samples"] for shard in shards),
        "classes": None if source.classes is None else [as_text(name) for name in source.classes],
        "mean": moments and moments[0],
        "std": moments and moments[1],
        **{name: outcomes[name] for name in ("copied", "rewritten", "compressed", "shrunk")},
        "skipped": len(skipped),
        "converted": dict(Counter(note for _, note in notes)),
        "shards": [shard for shard in kept if shard["samples"]],
    }
    lines = [{"where": where, "used": False, "what": reason} for where, reason in sorted(skipped)]
    lines += [{"where": where, "used": True, "what": note} for where, note in sorted(notes)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(out / PROBLEMS, lambda part: part.write_text(text, encoding="utf-8"))
    write_atomically(out / MANIFEST, lambda part: part.write_text(json.dumps(manifest, indent=2) + "\n"))
    return manifest


def _clear(out: Path, num_shards: int) -> None:
    """Remove what says of each shard that it is finished, which the manifest now says of all."""
    for number in range(num_shards):
        sidecar(out / f"shard-{number:06}.tar").unlink(missing_ok=True)


def prepare(options: Prepare, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil prepare`; on_progress is told the pictures done and their number.

    Returns:
        "out"; "finished"; "interrupted", None or the name of the signal; "resumed", whether there were finished shards before;
        "done_before", whether all was; "samples", "shards", "bytes" and "skipped", of what is finished; "seconds" of this call;
        and when it is finished what the manifest says: "classes", "mean", "std", how many pictures were "copied", "rewritten",
        "compressed" and "shrunk", "converted", and "format".

    Raises:
        ValueError: an option is out of its range, the directory holds something else, the data is out of reach, or none of
            it can be used.
    """
    begin = time.perf_counter()
    form = _check(options)
    source = open_source(options.data, channels=1)
    plan = _plan(options, form, source)
    manifest = _check_directory(options.out, plan)
    done_before = manifest is not None
    num_shards = -(-len(source) // plan["shard_samples"])
    resumed = False
    with lock(options.out), interruptible() as interrupted:
        if manifest is None:
            write_atomically(
                options.out / PLAN, lambda part: part.write_text(json.dumps({"format": FORMAT, "made": plan}) + "\n")
            )
            order = torch.randperm(len(source), generator=draws.generator(options.seed, "shards")).numpy()
            work = _Work(options.out, source, order, plan["shard_samples"], form, [])
            finished = [number for number in range(num_shards) if finished_shard(work.shard(number)) is not None]
            resumed = bool(finished)
            before = sum(min(work.size, len(source) - number * work.size) for number in finished)
            work = dataclasses.replace(work, left=sorted(set(range(num_shards)) - set(finished)))

            def progress(done: int) -> None:
                if on_progress is not None:
                    on_progress(before + done, len(source))

            workers = min(options.workers or torch.get_num_threads(), max(1, len(work.left)))
            _make_all(work, workers, interrupted, progress)
            made = [about for number in range(num_shards) if (about := finished_shard(work.shard(number))) is not None]
            if len(made) < num_shards and not interrupted:
                raise ValueError(
                    f"Shards were removed from {options.out} while others were made. Start the command again."
                )
            if len(made) < num_shards:
                return {
                    "out": str(options.out),
                    "finished": False,
                    "interrupted": signal.Signals(interrupted[0]).name,
                    "resumed": resumed,
                    "done_before": False,
                    "samples": sum(shard["samples"] for shard in made),
                    "shards": len(made),
                    "bytes": sum(shard["bytes"] for shard in made),
                    "skipped": sum(len(shard["skipped"]) for shard in made),
                    "seconds": time.perf_counter() - begin,
                }
            manifest = _finish(options.out, source, plan, made)
        _clear(options.out, num_shards)  # also what a kill between manifest and here has left
        (options.out / PLAN).unlink(missing_ok=True)
    said = {name: value for name, value in manifest.items() if name not in ("format", "version", "made", "shards")}
    return {
        "out": str(options.out),
        "finished": True,
        "interrupted": None,
        "resumed": resumed,
        "done_before": done_before,
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "format": plan["format"],
        "seconds": time.perf_counter() - begin,
        **said,
    }
