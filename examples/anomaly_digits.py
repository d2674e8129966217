"""Finding damaged digits, in MVTec AD's layout, with nothing to download: about three minutes of one CPU core.

    python examples/anomaly_digits.py --out runs/anomaly_digits

Writes scikit-learn's digits as pictures, damages half of the held-out ones in three ways, pre-trains on the others, and scores
them with `unveil anomaly`, with and without what it takes from normal pictures, beside two scores without a model.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from sklearn.metrics import roc_auc_score

from unveil import draws
from unveil.data import open_source
from unveil.tasks.anomaly import Anomaly, anomaly
from unveil.tasks.pretrain import Pretrain, pretrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    out: Path = Path("runs/anomaly_digits")
    epochs: int = 200
    seed: int = 0


def damaged(
    digit: np.ndarray, kind: str, other: np.ndarray, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A digit (8, 8) with a blot, a gap, or a part of another digit, all of 3 x 3 pixels; and where, bool.

    Drawn again until it is to be seen: nine grey values change by 60 of 255 on average.
    """
    while True:
        y, x = torch.randint(6, (2,), generator=generator).tolist()
        where = np.zeros((8, 8), dtype=bool)
        where[y : y + 3, x : x + 3] = True
        new = {"blot": np.full_like(digit, 200), "gap": np.zeros_like(digit), "graft": other}[kind]
        made = np.where(where, new, digit)
        if np.abs(made.astype(int) - digit)[where].mean() >= 60:
            return made, where
        other = np.rot90(other)


def write_folder(folder: Path, seed: int) -> None:
    def pictures(name: str) -> list[np.ndarray]:
        source = open_source(name, 1)
        return [(source.read(i).values[0, 0].numpy() * 255).round().astype(np.uint8) for i in range(len(source))]

    def save(picture: np.ndarray, *place: str) -> None:
        path = folder.joinpath(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)

    train, test = pictures("digits:train"), pictures("digits:test")
    for i, digit in enumerate(train):
        save(digit, "train", "good", f"{i:04}.png")
    for i, digit in enumerate(test):
        kind = ("good", "blot", "good", "gap", "good", "graft")[i % 6]
        if kind != "good":
            generator = draws.generator(seed, i, "damage")
            digit, where = damaged(digit, kind, train[i], generator)
            save(where.astype(np.uint8) * 255, "ground_truth", kind, f"{i:04}_mask.png")
        save(digit, "test", kind, f"{i:04}.png")


def without_a_model(folder: Path) -> dict[str, float]:
    """Pictures by their distance to the nearest normal one, and by how far pixels lie from what is usual there."""

    def read(paths: list[Path]) -> np.ndarray:
        return np.stack([np.asarray(Image.open(path), dtype=np.float32).ravel() / 255 for path in paths])

    tests = sorted((folder / "test").rglob("*.png"))
    normal, test = read(sorted((folder / "train").rglob("*.png"))), read(tests)
    bad = np.array([path.parent.name != "good" for path in tests])
    nearest = ((test[:, None] - normal[None]) ** 2).sum(-1).min(1)
    usual = np.abs(test - normal.mean(0)) / (normal.std(0) + 0.05)
    return {
        "nearest normal picture": 100 * float(roc_auc_score(bad, nearest)),
        "largest deviation of a pixel": 100 * float(roc_auc_score(bad, usual.max(1))),
    }


def main(options: Options) -> None:
    folder, run = options.out / "digits", options.out / "run"
    if not folder.exists():
        write_folder(folder, options.seed)
    pretrain(
        Pretrain(
            data=str(folder / "train"), out=run, size="Nano/2", image_size="8", channels=1, epochs=options.epochs,
            seed=options.seed,
        )
    )  # fmt: skip
    result: dict[str, Any] = {"pictures, without a model": without_a_model(folder)}
    for name, given in {
        "as it comes": {},
        "one prediction, no samples": {"num_samples": 1},
        "half hidden": {"mask_ratio": 0.5},
        "a quarter hidden": {"mask_ratio": 0.25},
    }.items():
        scored = anomaly(Anomaly(run=run, data=str(folder), out=options.out / name.replace(" ", "_"), **given))
        plain = anomaly(
            Anomaly(run=run, data=str(folder / "test"), out=options.out / f"{name.replace(' ', '_')}_plain", **given)
        )
        bad = [not p["picture"].startswith("good") for p in plain["pictures"]]
        scores = [p["score"] for p in plain["pictures"]]
        result[name] = {**scored["auroc"], "pictures, without normal ones": 100 * float(roc_auc_score(bad, scores))}
        print(name, json.dumps(result[name]), flush=True)
    (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
