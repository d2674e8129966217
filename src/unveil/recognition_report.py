"""The page that a fine-tuned network is shown on."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from unveil.finetuning import Recognition
from unveil.report import Page, curve, matrix_picture
from unveil.rundir import METRICS


def _records(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]


def write_report(
    path: Path, out: Path, recognition: Recognition, result: dict[str, Any], matrix: Tensor | None
) -> None:
    """Write the page: numbers of the last and the best epoch, curves, the confusion matrix (K, K), each class."""
    page = Page(
        "What the fine-tuned network tells",
        f"{result['start']}, fine-tuned on {result['train_samples']:,} samples, tested on {result['test_samples']:,}.",
    )
    best, last = result.get("best", {}), result["last"]
    page.table(
        ["test data", "last epoch", f"best epoch (step {best.get('step', 0):,})"],
        [
            (name.replace("_", " "), f"{value:.3f}", f"{best.get(name, float('nan')):.3f}")
            for name, value in last.items()
            if name != "score"
        ],
    )
    if result["trained_on_too"]:
        page.text(f"{result['trained_on_too']:,} of the test samples were trained on too.")
    page.text("The best epoch is chosen by these test data themselves, so its numbers flatter; quote the last.")
    records = _records(out)
    loss = [(r["step"], r["loss"]) for r in records if "loss" in r]
    page.picture(curve({"loss": tuple(zip(*loss, strict=True))}, "step", "training loss"), "Training loss")  # type: ignore[dict-item]
    scores = [(r["step"], r["test/score"]) for r in records if "test/score" in r]
    if scores:
        name = next(n for n in last if n != "score").replace("_", " ")
        page.picture(curve({name: tuple(zip(*scores, strict=True))}, "step", name), f"Test data: {name}")  # type: ignore[dict-item]
    if matrix is not None:
        page.heading("Confusion")
        page.picture(
            matrix_picture(matrix, recognition.outputs), "Rows are the true classes, columns what the network tells"
        )
        page.heading("Each class")
        mistakes = matrix - matrix.diag().diag()
        rows = []
        for c, name in enumerate(recognition.outputs):
            accuracy = result["per_class_accuracy"][name]
            mixed = int(mistakes[c].argmax())
            rows.append(
                (
                    name,
                    int(matrix[c].sum()),
                    "none tested" if accuracy is None else f"{accuracy:.1f} %",
                    f"{recognition.outputs[mixed]} ({int(mistakes[c, mixed])})" if mistakes[c].sum() else "",
                )
            )
        page.table(["class", "tested", "right", "most often taken for"], rows)
    page.save(path)
