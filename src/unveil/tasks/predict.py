"""What a fine-tuned network tells of new pictures."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.checkpoint import FromRun, pick_device, replacing
from unveil.data import Samples, batches, source_for
from unveil.finetuning import Recognition
from unveil.recognizer import load_recognizer, score
from unveil.sources import Listed, Source, as_text
from unveil.targets import Truth, truth_of


@dataclass(frozen=True, kw_only=True)
class Predict(FromRun):
    """Tell the class, the labels or the numbers of pictures, by a network that `unveil finetune` made, as a .csv.

    Example: unveil predict --run runs/photos-classes --data new/ --out new.csv
    """

    data: str
    """Pictures, as for pretrain. If they have labels that fit (class folders, or a table's columns), what is told is also
    scored."""
    out: Path
    """The .csv to write: the path of each picture, the class and its probability or the labels above 0.5, and a column for
    each output. It must not exist."""
    batch_size: int = 256
    """Clips at once; no effect on the result but for the last digits."""
    workers: int = 0
    """Processes that read data."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def _truth(source: Source, recognition: Recognition) -> tuple[Truth | None, str | None]:
    """What the samples are, if labels say so that fit what the network tells; and why they do not fit."""
    columns: tuple[str, ...] = ("label",)
    if recognition.task == "single":
        if not source.classes:
            return None, None
    else:
        there = source.columns if isinstance(source, Listed) else {}
        if all(name in there for name in recognition.outputs):
            columns = recognition.outputs
        elif recognition.task == "regression" or "label" not in there:
            missing = f"it has no columns {', '.join(recognition.outputs[:5])}" + (
                ", and no column label." if recognition.task == "multi" else "."
            )
            return None, missing if isinstance(source, Listed) else None
    try:
        return truth_of(source, recognition.task, columns, recognition.outputs), None
    except ValueError as error:
        return None, str(error)


def predict(options: Predict, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil predict`; on_progress is told the samples done and their number.

    Returns:
        "out"; "task"; "samples"; "counts" of each class or label told, None of numbers; "scores" as `unveil.recognizer.score`
        has them of the "scored" samples, whose labels are known, or None and why not in "unscored"; "skipped", files that
        could not be read.

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
    digits = ".12g" if recognition.task == "regression" else ".6g"  # dates in seconds have ten
    told = {"single": ["told", "probability"], "multi": ["told"], "regression": []}[recognition.task]
    fixed = ["path", *told]
    header = [*fixed, *(f"{name} (output)" if name in fixed else name for name in recognition.outputs)]
    truth, unscored = _truth(source, recognition)
    rows: list[list[str]] = []
    outputs_of: list[Tensor] = []
    indices: list[int] = []
    counts = None if recognition.task == "regression" else dict.fromkeys(recognition.outputs, 0)
    skipped = [(bad.where, bad.reason) for bad in source.skipped]
    with replacing(options.out) as part:  # made first, so that a name that cannot be written is found before the work
        for batch in loader:
            skipped += [(bad.where, bad.reason) for bad in batch.problems]
            if batch.values is not None:
                outputs: Tensor = model.predict(batch.clips(device)).cpu()
                if truth is not None:
                    outputs_of.append(outputs)
                    indices += batch.indices.tolist()
                for index, output in zip(batch.indices.tolist(), outputs, strict=True):
                    row = [as_text(source.where(index))]
                    best = recognition.outputs[int(output.argmax())]
                    names = (
                        [best] if single else [n for n, p in zip(recognition.outputs, output, strict=True) if p > 0.5]
                    )
                    if counts is not None:
                        counts.update({name: counts[name] + 1 for name in names})
                        row += ["|".join(names), *([f"{output.max().item():.4f}"] if single else [])]
                    rows.append(row + [f"{value:{digits}}" for value in output.tolist()])
            if on_progress is not None:
                on_progress(len(rows), len(samples))
        if not rows:
            where, reason = skipped[0] if skipped else (options.data, "no samples")
            raise ValueError(f"No sample of {options.data} can be read; the first problem: {where}: {reason}.")
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    scores, scored = None, 0
    if truth is not None:
        known = truth.known[indices]
        scored = int(known.sum())
        if scored >= (2 if recognition.task == "regression" else 1):
            scores = score(recognition, torch.cat(outputs_of)[known], truth.values[indices][known])
    return {
        "out": str(options.out),
        "task": recognition.task,
        "samples": len(rows),
        "scores": scores,
        "scored": scored,
        "unscored": unscored,
        "counts": counts,
        "skipped": len(skipped),
        "problems": [f"{as_text(where)}: {reason}" for where, reason in skipped[:20]],
    }
