"""What DiffMAE's levers save, and what they do to quality when the time saved is spent on more pictures.

    python benchmarks/levers.py --train train.parquet --test test.parquet --work runs/levers --out results/levers.json

The levers are several noises decoded for each encoded picture, the `cross` decoder, and decoding a share of the hidden
tokens with it. Time: the processor's, one thread, fp32, forward, backward and AdamW; every round runs one step of each in
turn, and the fastest of them counts. Quality: each is pre-trained for as many pictures as it sees in the same time, then
probed and asked to repaint. Runs are gone on with, and what --out holds is kept, so that an interrupted benchmark can be
started again.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import tyro

from unveil import recipes
from unveil.checkpoint import write_atomically
from unveil.contenders import Ours
from unveil.cost import masked_step
from unveil.recipe import Recipe
from unveil.tasks.bench import commit, hardware
from unveil.tasks.evaluate import EvaluateInpainting, evaluate_inpainting
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "2 draws": {"num_draws": 2},
    "4 draws": {"num_draws": 4},
    "cross": {"decoder": "cross"},
    "cross, half decoded": {"decoder": "cross", "decode_share": 0.5},
    "cross, 4 draws of a quarter": {"decoder": "cross", "num_draws": 4, "decode_share": 0.25},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    train: Path | None = None
    """Parquet files with images and labels, 32 pixels. Without them, steps are timed alone."""
    test: Path | None = None
    work: Path = Path("runs/levers")
    out: Path = Path("results/levers.json")
    pictures: int = 20_000
    """Of --train that are used, its first rows."""
    minutes: float = 8.0
    """Processor time that each is pre-trained for."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """That are pre-trained."""
    seeds: tuple[int, ...] = (0,)
    rounds: int = 12
    """Timed, after one that warms up."""
    timed: tuple[tuple[str, int, int], ...] = (("Nano/4", 32, 128), ("S/16", 224, 8))
    """Size, pixels and batch of the steps that are timed; the first is pre-trained."""


def recipe_of(size: str, side: int, variant: str) -> Recipe:
    return recipes.diffmae(size, height=side, **VARIANTS[variant])


def seconds_per_picture(size: str, side: int, batch: int, rounds: int) -> dict[str, float]:
    """Of a training step, by variant: the processor's, the fastest of alternating rounds."""
    steps = {name: Ours(recipe_of(size, side, name), "cpu", "fp32", False) for name in VARIANTS}
    pictures = torch.rand(batch, 3, side, side)
    fastest = dict.fromkeys(VARIANTS, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step.step(pictures)
            if number:
                fastest[name] = min(fastest[name], (time.process_time() - begin) / batch)
    return fastest


def times(options: Options) -> list[dict[str, Any]]:
    rows = []
    for size, side, batch in options.timed:
        seconds = seconds_per_picture(size, side, batch, options.rounds)
        for name, value in seconds.items():
            cost = masked_step(recipe_of(size, side, name)).forward
            plain = masked_step(recipe_of(size, side, "as published")).forward
            rows.append(
                {
                    "size": size,
                    "image_size": side,
                    "batch_size": batch,
                    "variant": name,
                    "milliseconds_per_picture": 1000 * value,
                    "time": value / seconds["as published"],
                    "multiply_adds": cost / plain,
                }
            )
    return rows


def first_rows(options: Options) -> Path:
    """The training data's first rows, as a file of their own."""
    assert options.train is not None
    path = options.work / f"train-{options.pictures}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = pyarrow.parquet.read_table(options.train).slice(0, options.pictures)
        write_atomically(path, lambda part: pyarrow.parquet.write_table(rows, part))
    return path


def learn(options: Options, name: str, seed: int, epochs: int) -> dict[str, Any]:
    """Pre-train a variant, and measure what became of it."""
    size, side, batch = options.timed[0]
    data, out = first_rows(options), options.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    begin = time.process_time()
    told = pretrain(
        Pretrain(
            data=str(data),
            out=out,
            size=size,
            image_size=str(side),
            batch_size=batch,
            epochs=epochs,
            seed=seed,
            device="cpu",
            flip=True,
            crop_scale=0.5,
            workers=0,
            **VARIANTS[name],
        )
    )
    spent = time.process_time() - begin
    probed = probe(Probe(run=out, data=str(data), test_data=str(options.test), device="cpu"))
    row = {
        "variant": name,
        "seed": seed,
        "epochs": epochs,
        "pictures": told["images_seen"],
        "processor_seconds": spent if not told["resumed"] else None,
        "linear": probed["results"]["encoder"]["linear"],
        "knn": probed["results"]["encoder"]["knn"],
    }
    for mask in ("random:0.75", "center:0.25"):
        scores = evaluate_inpainting(
            EvaluateInpainting(
                run=out, data=str(options.test), mask=mask, num_samples=4, num_steps=20, sampler="ddpm", device="cpu"
            )
        )
        row[mask] = {key: scores["psnr"][key] for key in ("prediction", "sample", "sample_mean")}
    return row


def main(options: Options) -> None:
    torch.set_num_threads(1)
    record: dict[str, Any] = {"runs": []}
    if options.out.exists():
        record = json.loads(options.out.read_text())

    def write() -> None:
        write_atomically(options.out, lambda part: part.write_text(json.dumps(record, indent=2) + "\n"))

    if "times" not in record:
        record |= {"command": "python benchmarks/levers.py", "commit": commit(), "hardware": hardware("cpu")}
        record["options"] = {k: str(v) for k, v in dataclasses.asdict(options).items()}
        record["times"] = times(options)
        write()
    for row in record["times"]:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    if options.train is None:
        return
    size, side, _ = options.timed[0]
    cost = {row["variant"]: row for row in record["times"] if (row["size"], row["image_size"]) == (size, side)}
    for seed in options.seeds:
        for name in options.variants:
            if any((row["variant"], row["seed"]) == (name, seed) for row in record["runs"]):
                continue
            images = options.minutes * 60_000 / cost[name]["milliseconds_per_picture"]
            record["runs"].append(learn(options, name, seed, max(1, round(images / options.pictures))))
            write()
            print(record["runs"][-1], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
