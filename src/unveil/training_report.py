"""The page that a run is watched on, made anew at every save."""

import json
import statistics
from pathlib import Path
from typing import Any

from PIL import Image

from unveil.report import Page, curve
from unveil.rundir import CONFIG, METRICS

REPORT = "report.html"
RECENT = 20  # records whose median is told as the speed of now

# What is drawn, if the run has it: of a record, its title and its axis.
CURVES = (
    ("loss", "Training loss", "loss"),
    ("gradient_norm", "Norm of the gradient, mean of the steps since the record before", "norm"),
    ("lr", "Learning rate", "learning rate"),
    ("images_per_second", "Speed", "images/s"),
    ("data_wait", "Share of the time spent waiting for data", "share"),
)

TESTED = {"test/knn": "right by nearest neighbours, %"}


def write_training_report(out: Path, facts: dict[str, Any], sheet: Image.Image | None) -> None:
    """Write report.html of a run directory from its metrics.jsonl.

    Args:
        facts: lines of the table at the top, by their title.
        sheet: the contact sheet.
    """
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    lines = (out / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    # The run may be writing its next record.
    records: list[dict[str, float]] = [json.loads(line) for line in lines if line.endswith("\n")]
    recipe = config["recipe"]
    page = Page(
        f"{recipe['name']} {recipe['size']}", f"Trained on {config['data']}; this page is made anew at every save."
    )
    trained = [record for record in records if "images_per_second" in record]
    recent = trained[-RECENT:]
    rows = list(facts.items())
    if recent:
        wait = statistics.median(record["data_wait"] for record in recent)
        rows += [
            (
                "images/s, median of the last records",
                f"{statistics.median(r['images_per_second'] for r in recent):.0f}",
            ),
            ("waiting for data, likewise", f"{wait:.1%}"),
        ]
    tests = [record for record in records if any(name.startswith("test/") for name in record)]
    if tests:
        rows += [
            (TESTED.get(name, name.removeprefix("test/")), f"{value:.4g}")
            for name, value in tests[-1].items()
            if name not in ("step", "test/score")  # which is one of the others
        ]
    page.table(["", "now"], rows)
    if sheet is not None:
        page.picture(sheet, "The contact sheet")
    try:
        for name, title, axis in CURVES:
            points = [(record["step"], record[name]) for record in trained if name in record]
            if points:
                page.picture(curve({axis: tuple(zip(*points, strict=True))}, "step", axis), title)  # type: ignore[dict-item]
        if tests:
            points = [(record["step"], record["test/score"]) for record in tests]
            page.picture(curve({"score": tuple(zip(*points, strict=True))}, "step", "score"), "Test score")  # type: ignore[dict-item]
    except ImportError:
        page.text("There are no curves because matplotlib is not installed; metrics.jsonl has their numbers.")
    page.heading("How it is made")
    page.table(
        ["", ""],
        [
            ("command", config["run"]["command"]),
            ("samples", f"{config['num_samples']:,}"),
            ("seed", config["seed"]),
            ("starts from", config["start"] or "drawn weights"),
            ("Unveil", config["version"]),
        ],
    )
    page.save(out / REPORT)
