"""What one masked training step costs, by arithmetic and by the clock, beside Hugging Face ViTMAE at the same sizes.

    python benchmarks/step_cost.py --out results/step_cost.json

Every round runs one step of each model in turn, so that whatever else the machine does falls on all of them; the medians and
their ratios are what counts. fp32, forward, backward and AdamW, the same batch of random pictures. Needs the extra [bench].
"""

import json
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro

from unveil import recipes
from unveil.contenders import Contender, HuggingFace, Ours
from unveil.cost import masked_step


@dataclass(frozen=True, kw_only=True)
class Options:
    sizes: tuple[str, ...] = ("S/16", "B/16")
    image_size: int = 224
    batch_size: int = 8
    rounds: int = 5
    out: Path = Path("results/step_cost.json")


def main(options: Options) -> None:
    table: list[dict[str, Any]] = []
    pictures = torch.rand(options.batch_size, 3, options.image_size, options.image_size)
    for size in options.sizes:
        mae = recipes.mae(size, height=options.image_size)
        variants = {
            "mae, joint": mae,
            "diffmae, cross_self": recipes.diffmae(size, height=options.image_size),
            "diffmae, cross": recipes.diffmae(size, height=options.image_size, decoder="cross"),
            "diffmae, joint": recipes.diffmae(size, height=options.image_size, decoder="joint"),
        }
        steps: dict[str, Contender] = {"Hugging Face ViTMAE": HuggingFace(mae, "cpu", "fp32", False)}
        steps |= {name: Ours(recipe, "cpu", "fp32", False) for name, recipe in variants.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(options.rounds + 1):
            for name, step in steps.items():
                begin = time.perf_counter()
                step.step(pictures)
                if i:  # the first round warms up
                    seconds[name].append(time.perf_counter() - begin)
        base = statistics.median(seconds["Hugging Face ViTMAE"])
        for name, times in seconds.items():
            cost = masked_step(variants.get(name, mae))
            median = statistics.median(times)
            row = {
                "size": size,
                "model": name,
                "forward_multiply_adds": cost.forward,
                "arithmetic_over_hugging_face": cost.forward / masked_step(mae).forward,
                "images_per_second": options.batch_size / median,
                "time_over_hugging_face": median / base,
                "gflops_per_second": cost.train_flops * options.batch_size / median / 1e9,
            }
            table.append(row)
            print(
                f"{size:<6}{name:<22}{cost.forward / 1e9:7.2f} G multiply-adds {row['images_per_second']:7.2f} images/s, "
                f"time {row['time_over_hugging_face']:.2f} and arithmetic {row['arithmetic_over_hugging_face']:.2f} of "
                "Hugging Face's"
            )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "command": "python benchmarks/step_cost.py",
        "commit": commit,
        "hardware": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "table": table,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
