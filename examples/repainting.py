"""Repainting beside what else fills holes, on small pictures: classical fills, MAE, DiffMAE, DiT and UMD told of the known
pixels by replacement, and a diffusion U-Net that is told of the mask.

    pip install ".[compare]"
    python examples/repainting.py --train "tiny/train-*.parquet" --test tiny/val.parquet --image-size 64 --size Micro/8 \
        --masks masks_irregular --out runs/repainting/tiny
    python examples/repainting.py --train cifar10/train.parquet --test cifar10/test.parquet --image-size 32 --size Micro/4 \
        --masks masks_irregular --out runs/repainting/cifar10

Every network sees the same kind of masks while it trains, random:0.75. MAE has DiffMAE's encoder and decoder, and sees as many
pictures; DiT and UMD get DiffMAE's arithmetic, and the U-Net its seconds. All rows fill the same holes of the same test
pictures. Stopped or killed, the same command goes on; what is finished is skipped. Several may share a directory, with arms
of their own.
"""

import dataclasses
import functools
import resource
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from comparison import Results, timed

from unveil import draws, recipes
from unveil.checkpoint import write_atomically
from unveil.classifier import judge_pictures, load_arrays, save_judge, train_judge
from unveil.cost import masked_step
from unveil.holes import named_holes
from unveil.optim import lr_factor
from unveil.recipe import Recipe
from unveil.tasks.pretrain import Pretrain, pretrain

Arm = Literal["diffmae", "mae_raw", "dit", "umd", "unet", "judge"]
UNET_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    train: str
    """Training pictures, with labels, which only the judge reads."""
    test: str
    """Test pictures, with labels."""
    masks: Path
    """Folder of irregular masks, white where a hole is, nested or flat."""
    image_size: int
    size: str
    out: Path
    arms: tuple[Arm, ...] = ("diffmae", "judge", "mae_raw", "unet", "dit", "umd")
    epochs: int = 6
    """Of DiffMAE and MAE."""
    judge_epochs: int = 6
    seed: int = 0
    compile: bool = True


def recipe_of(arm: str, options: Options) -> Recipe:
    given: dict[str, Any] = {"decoder": "cross_self"} if arm == "mae_raw" else {}
    return recipes.RECIPES[arm](options.size, height=options.image_size, **given)


def epochs_of(arm: str, options: Options) -> int:
    if arm in ("diffmae", "mae_raw"):
        return options.epochs
    ours, theirs = (masked_step(recipe_of(name, options)).forward for name in ("diffmae", arm))
    return max(1, round(options.epochs * ours / theirs))


def pretrained(arm: str, options: Options) -> dict[str, Any]:
    run = Pretrain(
        data=options.train, out=options.out / arm, recipe=arm, size=options.size, image_size=str(options.image_size),  # type: ignore[arg-type]
        epochs=epochs_of(arm, options), decoder="cross_self" if arm == "mae_raw" else None, crop_scale=0.8, flip=True,
        seed=options.seed, compile=options.compile,
    )  # fmt: skip
    return timed(lambda: pretrain(run))


def unet_model(image_size: int) -> Any:
    """diffusers' U-Net, told of the noisy picture, the known pixels and the mask."""
    from diffusers import UNet2DModel  # type: ignore[attr-defined]

    return UNet2DModel(
        sample_size=image_size,
        in_channels=7,
        out_channels=3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def train_unet(options: Options, budget: float) -> dict[str, Any]:
    """eps on diffusers' linear schedule, for as many seconds of the processor as DiffMAE took, told by the first steps."""
    from diffusers import DDPMScheduler  # type: ignore[attr-defined]

    recipe = recipe_of("diffmae", options)
    clips = load_arrays(options.train, recipe.clip).clips
    torch.manual_seed(options.seed)
    model, schedule = unet_model(options.image_size), DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    file = options.out / "unet" / "unet.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    first, steps, spent = 0, 10**9, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, steps, spent = state["step"], state["steps"], state["spent"]
    begin, begin_clock, saved = cpu_seconds(), time.perf_counter(), time.perf_counter()
    for step in range(first, 10**9):
        if step == 20:  # the first few also pay for what is made once
            warm = cpu_seconds() - begin
        if step == 120:
            each = (cpu_seconds() - begin - warm) / 100
            steps = 120 + round((budget - (cpu_seconds() - begin)) / each)
        if step >= steps:
            break
        generator = draws.generator(options.seed, step, "unet")
        rows = torch.randint(len(clips), (UNET_BATCH,), generator=generator)
        x = clips[rows].float() / 127.5 - 1
        flipped = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        hole = named_holes(recipe.clip, "random:0.75", rows.tolist(), draws.key(options.seed, step)).float()
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(1000, (len(x),), generator=generator)
        noisy = schedule.add_noise(x, noise, t)  # type: ignore[arg-type]
        guess = model(torch.cat([noisy, x * (1 - hole), hole], 1), t).sample
        loss = (F.mse_loss(guess, noise, reduction="none") * hole).sum() / hole.sum() / 3
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (min(1.0, step / 100) if step < 120 else lr_factor(step, steps, 100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        if step >= 120 and (step == steps - 1 or time.perf_counter() - saved > 120):
            saved = time.perf_counter()
            parts = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            now = {"step": step + 1, "steps": steps, "spent": spent + cpu_seconds() - begin}
            write_atomically(file, functools.partial(torch.save, {**parts, **now}))
            print(f"    U-Net, step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
    return {
        "steps": steps,
        "images_seen": steps * UNET_BATCH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": None if first else time.perf_counter() - begin_clock,
        "cpu_seconds": spent + cpu_seconds() - begin,
        "threads": torch.get_num_threads(),
    }


def judge(options: Options) -> dict[str, Any]:
    """The classifier in whose features samples are compared with the truth."""
    clip = recipe_of("diffmae", options).clip
    train, test = load_arrays(options.train, clip), load_arrays(options.test, clip)
    begin = time.perf_counter()
    made = train_judge(
        (train.clips, train.labels),
        int(train.labels.max()) + 1,
        epochs=options.judge_epochs,
        seed=0,
        flip=True,
        shift=options.image_size // 8,
        on_progress=lambda done, loss: print(f"    judge, epoch {done}, loss {loss:.3f}", flush=True),
    )
    verdict = judge_pictures(made, test.clips, test.labels)
    about = {
        "accuracy": verdict.accuracy,
        "seconds": time.perf_counter() - begin,
        "epochs": options.judge_epochs,
    }
    save_judge(options.out / "judge.safetensors", made, about)
    return about


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.json")
    for arm in options.arms:
        if arm == "judge":
            results.part("judge", make=lambda: judge(options))
        elif arm == "unet":
            budget = results.read()["diffmae"]["train"]["cpu_seconds"]
            results.part("unet", "train", make=lambda: train_unet(options, budget))  # noqa: B023
        else:
            results.part(
                arm,
                "train",
                make=lambda: {
                    "epochs": epochs_of(arm, options),  # noqa: B023
                    **pretrained(arm, options),  # noqa: B023
                },
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
