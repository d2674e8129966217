"""What a fine-tuned network tells of new pictures."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unveil.checkpoint import FromRun, pick_device, replacing
from unveil.data import Samples, batches, source_for
from unveil.recognizer import load_recognizer


@dataclass(frozen=True, kw_only=True)
class Predict(FromRun):
    """Tell the class, the labels or the numbers of pictures, by a network that `unveil finetune` made, as a .csv.

    Example: unveil predict --run runs/photos-classes --data new/ --out new.csv
    """

    data: str
    """Pictures, as for pretrain; labels are not looked at."""
    out: Path
    """The .csv to write: the path of each picture, the class and its probability, and a column for each output. It must
    not exist."""
    batch_size: int = 256
    """Clips at once; no effect on the result."""
    workers: int = 0
    """Processes that read data."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def predict(options: Predict, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil predict`; on_progress is told the samples done and their number.

    Returns:
        "out"; "task"; "samples"; "counts" of each class told, of single classes; "skipped", files that could not be read.

    Raises:
        ValueError: the run is not fine-tuned, the file exists, or no sample can be read.
    """
    if options.out.suffix != ".csv":
        raise ValueError(f"--out {options.out} must end in .csv, which is what is written.")
    if options.out.exists():
        raise ValueError(f"--out {options.out} exists already and is not overwritten. Give another name, or remove it.")
    device = pick_device(options.device)
    model, _ = load_recognizer(options.run, device)
    recognition = model.recognition
    source = source_for(options.data, model.recipe.clip)
    samples = Samples(source, model.recipe.clip, 0, None)
    loader = batches(samples, options.batch_size, 0, 0, shuffle=False, drop_last=False, num_workers=options.workers)
    single = recognition.task == "single"
    fixed = ["path", *(["told", "probability"] if single else [])]
    header = [*fixed, *(f"{name} (output)" if name in fixed else name for name in recognition.outputs)]
    rows: list[list[str]] = []
    counts = dict.fromkeys(recognition.outputs, 0) if single else None
    skipped = [(bad.where, bad.reason) for bad in source.skipped]
    with replacing(options.out) as part:  # made first, so that a name that cannot be written is found before the work
        for batch in loader:
            skipped += [(bad.where, bad.reason) for bad in batch.problems]
            if batch.clips is not None:
                outputs: Tensor = model.predict(batch.clips.to(device)).cpu()
                for index, output in zip(batch.indices.tolist(), outputs, strict=True):
                    row = [source.where(index)]
                    if counts is not None:
                        best = int(output.argmax())
                        counts[recognition.outputs[best]] += 1
                        row += [recognition.outputs[best], f"{output[best].item():.4f}"]
                    rows.append(row + [f"{value:.6g}" for value in output.tolist()])
            if on_progress is not None:
                on_progress(len(rows), len(samples))
        if not rows:
            where, reason = skipped[0] if skipped else (options.data, "no samples")
            raise ValueError(f"No sample of {options.data} can be read; the first problem: {where}: {reason}.")
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    return {
        "out": str(options.out),
        "task": recognition.task,
        "samples": len(rows),
        "counts": counts,
        "skipped": len(skipped),
        "problems": [f"{where}: {reason}" for where, reason in skipped[:20]],
    }
