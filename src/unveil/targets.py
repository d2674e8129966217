"""What the samples of a source should be told as: classes, labels or numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unveil.finetuning import Task
from unveil.sources import Listed, Source, cell_text

LARGEST = 1e100  # of a number to predict; its square still is one


@dataclass(frozen=True)
class Truth:
    """Targets of a source's samples.

    values: classes (n,) int64, labels of 0 and 1 (n, K) float32, or numbers (n, K) float64. known: which samples have one, (n,)
    bool. outputs: the names of classes, labels or numbers. offset, scale: mean and deviation of each number.
    """

    values: Tensor
    known: Tensor
    outputs: tuple[str, ...]
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()


def chosen_truth(truth: Truth, rows: Sequence[int]) -> Truth:
    """Of some samples; numbers are standardised by these."""
    values = truth.values[list(rows)]
    offset, scale = (), ()
    if values.ndim == 2 and truth.scale:
        offset = tuple(values.mean(0).tolist())
        largest = values.abs().amax(0)
        spread = values.std(0, correction=0)
        never = spread <= 1e-12 * largest  # but for rounding, a number that never varies
        scale = tuple(torch.where(never, 1.0, spread).tolist())
    return Truth(values, truth.known[list(rows)], truth.outputs, offset, scale)


def _columns(source: Source, task: Task, names: Sequence[str]) -> list[list[Any]]:
    if len(set(names)) < len(names):
        raise ValueError(f"--label-columns {' '.join(names)}: a column comes twice. Give each once.")
    if not isinstance(source, Listed):
        raise ValueError(
            f"{source.name} is no table, and --task {task} needs one: a .csv or .parquet with a column `path` and columns of "
            "labels or numbers."
        )
    for name in names:
        if name not in source.columns:
            raise ValueError(f"{source.name} has no column {name!r}, only {', '.join(source.columns)}.")
    return [source.columns[name] for name in names]


def _number(source: Source, name: str, row: int, value: Any) -> float:
    """A cell as a number; nan for an empty one."""
    if value is None or value == "":
        return math.nan
    value = {"True": 1, "False": 0}.get(str(value), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if abs(number) > LARGEST:
        raise ValueError(
            f"{source.name} has {value!r} in the column {name!r}, row {row + 1}, which is no number, or too large for one."
        )
    return number


def _classes(source: Source, names: Sequence[str], known_as: tuple[str, ...] | None) -> Truth:
    if tuple(names) != ("label",):
        raise ValueError(
            f"--label-columns {' '.join(names)} with --task single: a class stands in the column `label`. Rename it, or use "
            "--task multi or regression."
        )
    if not source.classes:
        raise ValueError(
            f"{source.name} has no labels: sort the pictures into a folder for each class, or give a column `label`."
        )
    outputs = known_as or source.classes
    strange = sorted(set(source.classes) - set(outputs))
    if strange:
        raise ValueError(
            f"{source.name} has the class {strange[0]!r}, which the training data lacks: it has {', '.join(outputs[:10])}. "
            "Train on it too, or remove it."
        )
    if len(outputs) == 1:
        raise ValueError(f"{source.name} has one class, {outputs[0]!r}; to tell classes apart takes two.")
    number = {name: outputs.index(name) for name in source.classes}
    labels = [source.label(i) for i in range(len(source))]
    values = [-1 if label is None else number[source.classes[label]] for label in labels]
    return Truth(torch.tensor(values), torch.tensor([value >= 0 for value in values]), outputs)


def _labels(source: Source, names: Sequence[str], known_as: tuple[str, ...] | None) -> Truth:
    columns = _columns(source, "multi", names)
    strange = [cell for column in columns for cell in column if not isinstance(cell, str | int | float | None)]
    if strange:
        raise ValueError(
            f"{source.name} has {strange[0]!r} in {', '.join(names)}. Write labels as text with | between."
        )
    if known_as is None:  # the training data decide what a single column is
        cells = {cell_text(cell).strip() for cell in columns[0]}
        indicators = cells <= {"", "0", "1", "0.0", "1.0", "True", "False"}
    else:
        indicators = known_as == tuple(names)
    if len(names) == 1 and not indicators:  # labels with | between them; an empty cell is a sample without any
        sets = [{part.strip() for part in cell_text(cell).split("|") if part.strip()} for cell in columns[0]]
        found = tuple(sorted(set().union(*sets)))
        outputs = known_as or found
        strange = sorted(set(found) - set(outputs))
        if strange:
            raise ValueError(f"{source.name} has the label {strange[0]!r}, which the training data lacks. Remove it.")
        if not outputs:
            raise ValueError(f"{source.name} has no labels in its column {names[0]!r}. Write them with | between.")
        values = torch.tensor([[float(name in one) for name in outputs] for one in sets])
        return Truth(values, torch.ones(len(sets), dtype=torch.bool), outputs)
    rows = [
        [_number(source, name, i, cell) for i, cell in enumerate(column)]
        for name, column in zip(names, columns, strict=True)
    ]
    values = torch.tensor(rows).T.contiguous()  # (n, K)
    known = ~values.isnan().any(1)
    wrong = ((values != 0) & (values != 1))[known]
    if wrong.any():
        raise ValueError(
            f"{source.name} has labels other than 0 and 1 in {', '.join(names)}, as {values[known][wrong][0]:g}."
        )
    return Truth(values, known, tuple(names))


def _numbers(source: Source, names: Sequence[str]) -> Truth:
    columns = _columns(source, "regression", names)
    rows = [
        [_number(source, name, i, cell) for i, cell in enumerate(column)]
        for name, column in zip(names, columns, strict=True)
    ]
    values = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    ones = (1.0,) * len(names)
    return Truth(values, ~values.isnan().any(1), tuple(names), ones, ones)


def truth_of(source: Source, task: Task, columns: Sequence[str], known_as: tuple[str, ...] | None = None) -> Truth:
    """The targets of a source's samples.

    Args:
        columns: of a table, see `unveil finetune`.
        known_as: the outputs of the training data, for a test set.

    Raises:
        ValueError: the source has no such labels, or some that the training data lacks.
    """
    if task == "single":
        return _classes(source, columns, known_as)
    if task == "multi":
        return _labels(source, columns, known_as)
    return _numbers(source, columns)
