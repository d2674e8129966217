"""How long a picture takes to repaint, with weights that were never trained: time does not depend on them.

    python benchmarks/repaint.py --out results/repaint_clock.json

The middle quarter of a picture of the model's size, 75 % of its patches, and strokes over a quarter of it; one sample and four,
by 20 steps of DPM-Solver++; the median of several rounds.
"""

import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import tyro

from unveil import recipes
from unveil.holes import named_holes
from unveil.model import MaskedDiffusionAutoencoder
from unveil.painting import paint

# encoder and patch, pixels, and how many seconds it may take on two CPU cores
CLOCKS = (("Micro/8", 64, 1.0), ("B/16", 224, 5.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    out: Path | None = None
    """A .json file for what is measured."""
    rounds: int = 5
    num_steps: int = 20


def main(options: Options) -> None:
    rows = []
    for size, side, aim in CLOCKS:
        torch.manual_seed(0)
        model = MaskedDiffusionAutoencoder(recipes.diffmae(size, height=side)).eval()
        clip = torch.rand(3, 1, side, side)
        for mask in ("center:0.25", "random:0.75", "irregular:0.25"):
            hole = named_holes(model.recipe.clip, mask, [0], seed=0)[0]
            for num_samples in (1, 4):
                times = []
                for _ in range(options.rounds + 1):  # the first warms up
                    begin = time.perf_counter()
                    paint(model, clip, hole, num_steps=options.num_steps, num_samples=num_samples)
                    times.append(time.perf_counter() - begin)
                seconds = statistics.median(times[1:])
                rows.append({"size": size, "pixels": side, "mask": mask, "num_samples": num_samples,
                             "seconds": seconds, "aim": aim if num_samples == 1 else None})  # fmt: skip
                print(f"{size} at {side} px, {mask}, {num_samples} sample(s): {seconds:.2f} s", flush=True)
    about = {
        "hardware": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "num_steps": options.num_steps,
        "rounds": options.rounds,
        "weights": "random",
    }
    if options.out is not None:
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
