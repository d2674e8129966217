"""Proof on real pictures: a DiffMAE of two million parameters on CIFAR-10 for about fifteen minutes of two CPU cores.

    python examples/cifar10.py --train cifar10/train.parquet --test cifar10/test.parquet --out runs/cifar10

Takes parquet files with an `image` and a `label` column. Pre-trains, probes against the untrained encoder and raw pixels,
scores repainting against OpenCV's Telea fill, and writes results.json and pictures. Needs the extra [bench] for OpenCV.
"""

import dataclasses
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from unveil.checkpoint import load_model
from unveil.data import Samples, batches, open_source
from unveil.holes import masked_view, named_holes
from unveil.metrics import hole_mse, psnr
from unveil.pipeline import predict, repaint
from unveil.report import contact_sheet, save_png
from unveil.tasks.evaluate import EvaluateInpainting, evaluate_inpainting, score
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe

MASKS = ("random:0.75", "center:0.25")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    train: str
    """Parquet file of the 50,000 training pictures."""
    test: str
    """Parquet file of the 10,000 test pictures."""
    out: Path = Path("runs/cifar10")
    epochs: int = 7
    seed: int = 0
    compile: bool = True


def telea(clips: torch.Tensor, holes: torch.Tensor) -> torch.Tensor:
    """OpenCV's inpainting of Telea 2004, radius 3, picture by picture."""
    import cv2

    filled = []
    for clip, hole in zip(clips, holes, strict=True):
        pixels = (clip[:, 0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        mask = hole[0].to(torch.uint8).numpy() * 255
        filled.append(torch.from_numpy(cv2.inpaint(pixels, mask, 3, cv2.INPAINT_TELEA)).permute(2, 0, 1)[:, None])
    return torch.stack(filled).float() / 255


def main(options: Options) -> None:
    run = Pretrain(
        data=options.train,
        out=options.out,
        size="Micro/4",
        image_size="32",
        epochs=options.epochs,
        seed=options.seed,
        compile=options.compile,
    )
    begin = time.perf_counter()
    trained = pretrain(
        run, lambda p: print(f"\r{p.step}/{p.num_steps} loss {p.loss:.4f} {p.images_per_second:.0f}/s", end="")
    )
    print()
    training_seconds = time.perf_counter() - begin
    result: dict[str, Any] = {
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "seed": options.seed,
        "hardware": f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}",
        "training": {**trained, "wall_clock_seconds": training_seconds},
        "probe": probe(Probe(run=options.out, data=options.train, test_data=options.test)),
        "repaint": {
            m: evaluate_inpainting(
                EvaluateInpainting(run=options.out, data=options.test, mask=m, limit=256, num_steps=50, sampler="ddpm")
            )
            for m in MASKS
        },
    }
    model, _ = load_model(options.out)
    source = open_source(options.test, 3)
    samples = Samples(source, model.recipe.clip, seed=0, training=None)
    clips = next(iter(batches(samples, 256, 0, 0, shuffle=False, drop_last=False, num_workers=0))).clips()
    for mask in MASKS:
        holes = named_holes(model.recipe.clip, mask, list(range(len(clips))), seed=0)
        filled = telea(clips, holes)
        result["repaint"][mask]["psnr"]["telea"] = psnr(hole_mse(filled, clips, holes)).mean().item()
        few, few_holes = clips[:12], holes[:12]
        painted = repaint(model, few, few_holes, num_steps=50, num_samples=3)
        rows = [
            ("truth", list(few)),
            ("input", list(masked_view(few, few_holes))),
            ("Telea", list(filled[:12])),
            ("one-step prediction at t = T", list(predict(model, few, few_holes))),
            *((f"sample {i + 1}, 50 DDPM steps", list(painted[:, i])) for i in range(3)),
        ]
        save_png(options.out / f"repaint_{mask.partition(':')[0]}.png", contact_sheet(rows, cell=64))
    # a hole of 12 x 12 pixels that cuts through patches: 112 pixels of the hidden 16 x 16 are known
    cut = torch.zeros(len(clips), 1, 32, 32, dtype=torch.bool)
    cut[:, :, 10:22, 10:22] = True
    settings: dict[str, Any] = {"num_samples": 8, "num_steps": 50, "sampler": "ddpm", "seed": 0}
    result["known_pixels_in_hidden_patches"] = {}
    for name, told in (("re-imposed", True), ("ignored", False)):
        figures = score(model, clips, cut, reimpose_known=told, **settings)
        result["known_pixels_in_hidden_patches"][name] = {
            key: psnr(figures[key]).mean().item() for key in ("sample", "sample_mean")
        }
    (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
