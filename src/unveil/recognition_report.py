"""The page that a fine-tuned network is shown on."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from unveil.finetuning import Recognition
from unveil.report import Page, curve, matrix_picture
from unveil.rundir import CONFIG, METRICS

# Of numbers in `unveil.recognizer.score` and `score_each`.
TITLES = {
    "accuracy": "right",
    "top5": "right among the first five",
    "mean_class_accuracy": "right, mean over classes",
    "mean_average_precision": "mean average precision",
    "labels_right": "labels right",
    "r2": "R2",
    "mean_absolute_error": "mean absolute error",
    "share": "have it",
    "average_precision": "average precision",
    "right": "right",
    "standard_deviation": "standard deviation",
}


def unit(name: str) -> str:
    """What stands behind a number of that name."""
    return "" if name in ("r2", "mean_absolute_error", "standard_deviation") else " %"


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
            (TITLES[name], f"{value:.4g}{unit(name)}", f"{best[name]:.4g}{unit(name)}" if name in best else "")
            for name, value in last.items()
            if name != "score"
        ],
    )
    if result["always_the_same"] is not None:
        what = "class" if recognition.task == "single" else "answer for each label"
        page.text(f"Always the most common {what} would get {result['always_the_same']:.1f} %.")
    if len(recognition.outputs) > 1 and recognition.task == "regression":
        page.text(
            "With several numbers, R2 and error above are means over them, whatever their units: look at each below."
        )
    if result["trained_on_too"]:
        page.text(f"{result['trained_on_too']:,} of the test samples were trained on too.")
    page.text("The best epoch is chosen by these test data themselves, so its numbers flatter; quote the last.")
    records = _records(out)
    loss = [(r["step"], r["loss"]) for r in records if "loss" in r]
    page.picture(curve({"loss": tuple(zip(*loss, strict=True))}, "step", "training loss"), "Training loss")  # type: ignore[dict-item]
    scores = [(r["step"], r["test/score"]) for r in records if "test/score" in r]
    if scores:
        first = next(n for n in last if n != "score")
        name = TITLES[first] + (", %" if unit(first) else "")
        page.picture(curve({name: tuple(zip(*scores, strict=True))}, "step", name), f"Test data: {name}")  # type: ignore[dict-item]
    if result["each"]:
        page.heading("Each label" if recognition.task == "multi" else "Each number")
        titles = list(next(iter(result["each"].values())))
        page.table(
            ["name", *(TITLES[title] for title in titles)],
            [
                (name, *("none tested" if values[t] is None else f"{values[t]:.4g}{unit(t)}" for t in titles))
                for name, values in result["each"].items()
            ],
        )
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
    page.heading("How it was made")
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    training = recognition.training
    page.table(
        ["", ""],
        [
            ("command", config["run"]["command"]),
            ("training data", config["data"]),
            ("test data", config["test"]),
            ("starts from", config["start"]),
            ("pool", "class tokens" if recognition.pool == "class" else "mean of the patches"),
            ("epochs, batch, learning rate", f"{training.epochs}, {training.batch_size}, {training.lr:.3g}"),
            ("seed", config["seed"]),
            ("Unveil", config["version"]),
        ],
    )
    page.save(path)
