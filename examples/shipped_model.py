"""The small model that the package ships, for `unveil web` without a run: half an hour of one CPU core.

    python examples/shipped_model.py --train "tiny/train-*.parquet" --out runs/shipped

Trains it (or goes on, or takes a finished run), and writes its weights in 16 bits to src/unveil/shipped/diffmae_64.safetensors.
"""

import dataclasses
from pathlib import Path

import torch
import tyro

from unveil.checkpoint import load_model, save_weights
from unveil.tasks.pretrain import Pretrain, pretrain

PLACE = Path(__file__).parent.parent / "src" / "unveil" / "shipped" / "diffmae_64.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    train: str
    """Training pictures: those of Tiny-ImageNet's first 100 classes for the model that is shipped."""
    out: Path = Path("runs/shipped")
    epochs: int = 4
    compile: bool = True


def main(options: Options) -> None:
    run = Pretrain(
        data=options.train,
        out=options.out,
        size="Nano/4",
        image_size="64",
        epochs=options.epochs,
        crop_scale=0.8,
        flip=True,
        compile=options.compile,
    )
    pretrain(run)
    model, about = load_model(options.out)
    state = {name: value.to(torch.float16) for name, value in model.state_dict().items()}
    about = dataclasses.replace(
        about, data="Tiny-ImageNet, 100 classes (first 100 wnids)", command="python examples/shipped_model.py"
    )
    PLACE.parent.mkdir(exist_ok=True)
    save_weights(PLACE, model.recipe, state, about)
    print(f"{PLACE}: {PLACE.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
