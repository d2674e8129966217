"""Digits by class: pre-train a UMD without labels, fine-tune it as a generator, and let a classifier name what it makes.

    python examples/umd_digits.py --out runs/umd_digits

A few minutes on two CPU cores. Writes results.json, generated.png, and the two run directories, which `unveil probe`,
`unveil generate` and `unveil inpaint` take. Run again, it goes on where it stopped.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from unveil.checkpoint import load_model
from unveil.classifier import judge_pictures, load_arrays, train_judge
from unveil.pipeline import generate
from unveil.report import contact_sheet, save_png
from unveil.sampling import guidance
from unveil.tasks.finetune_generator import FinetuneGenerator, finetune_generator
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe

NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    out: Path = Path("runs/umd_digits")
    epochs: int = 60
    """Of pre-training, and of fine-tuning."""
    num_samples: int = 1000
    num_steps: int = 20
    """Of DPM-Solver++."""
    guidance_scale: float = 1.5
    seed: int = 0


def main(options: Options) -> dict[str, Any]:
    first, second = options.out / "umd", options.out / "umd_finetune"
    begin = time.perf_counter()
    pretrain(Pretrain(data="digits:train", out=first, recipe="umd", epochs=options.epochs, seed=options.seed))
    middle = time.perf_counter()
    finetune_generator(
        FinetuneGenerator(run=first, data="digits:train", out=second, epochs=options.epochs, seed=options.seed)
    )
    end = time.perf_counter()
    features = probe(Probe(run=first, data="digits:train", test_data="digits:test", labels_per_class=10))

    model, _ = load_model(second)
    test = load_arrays("digits:test", model.recipe.clip)
    judge = train_judge(
        load_arrays("digits:train", model.recipe.clip), NUM_CLASSES, epochs=30, seed=options.seed, flip=False, shift=0
    )
    assert model.schedule is not None
    labels = torch.arange(options.num_samples) % NUM_CLASSES
    named = {}
    for scale in (1.0, options.guidance_scale):
        guide = guidance("constant", scale, model.schedule.end) if scale != 1 else None
        clips = torch.cat(
            [
                generate(
                    model,
                    rows.tolist(),
                    labels[rows],
                    num_steps=options.num_steps,
                    sampler="dpmpp",
                    guidance=guide,
                    seed=options.seed,
                )
                for rows in torch.arange(options.num_samples).split(250)
            ]
        )
        named[f"guidance {scale:g}"] = judge_pictures(judge, clips[:, :, 0], labels).accuracy
    save_png(
        options.out / "generated.png",
        contact_sheet([(f"{c}", list(clips[c : 16 * NUM_CLASSES : NUM_CLASSES])) for c in range(NUM_CLASSES)], cell=40),
    )
    results = {
        "seconds_pretrain": middle - begin,
        "seconds_finetune": end - middle,
        "probe_10_labels_per_class": features["results"],
        "classifier_on_real_test_digits": judge_pictures(judge, test.clips, test.labels).accuracy,
        "generated_digits_named_as_asked": named,
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Options, description=__doc__)), indent=2))
