"""Repainting beside what else fills holes, on small pictures: classical fills, MAE, DiffMAE, DiT and UMD told of the known
pixels by replacement, and a diffusion U-Net that is told of the mask.

    pip install ".[compare]"
    python examples/repainting.py --train "tiny/train-*.parquet" --test tiny/val.parquet --image-size 64 --size Nano/4 \
        --epochs 4 --masks masks_irregular --out runs/repainting/tiny
    python examples/repainting.py --train cifar10/train.parquet --test cifar10/test.parquet --image-size 32 --size Micro/4 \
        --masks masks_irregular --out runs/repainting/cifar10

Every network sees the same kind of masks while it trains, random:0.75. MAE has DiffMAE's encoder and decoder, and sees as many
pictures; DiT and UMD get DiffMAE's arithmetic, and the U-Net its seconds. All rows fill the same holes of the same test
pictures, and are compared with the truth by decibels in the hole and by a classifier's features (the distance of LPIPS,
without its weights), and as a set with other pictures by the same features (KID): of many right answers one alone is the
truth, so the first two prefer the mean, the third what looks like a picture. Stopped or killed, the same command goes on;
what is finished is skipped. Several may share a directory, with arms of their own.
"""

import dataclasses
import functools
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from comparison import Results, timed
from torch import Tensor

from unveil import draws, recipes
from unveil.checkpoint import load_model, write_atomically
from unveil.classifier import Judge, judge_pictures, load_arrays, load_judge, save_judge, train_judge
from unveil.cost import masked_step
from unveil.data import Samples, batches, open_source
from unveil.holes import masked_view, named_holes
from unveil.mask_files import MaskFolder
from unveil.metrics import hole_mse, laplacian_energy, psnr
from unveil.model import MaskedDiffusionAutoencoder
from unveil.optim import lr_factor
from unveil.painting import resize_hole
from unveil.pipeline import RowNoise, Sampler, predict, repaint
from unveil.recipe import Recipe
from unveil.report import contact_sheet, save_png
from unveil.sampling import dpmpp_2m
from unveil.schedule import make_schedule
from unveil.tasks.pretrain import Pretrain, pretrain

Arm = Literal["diffmae", "mae_raw", "dit", "umd", "unet", "judge"]
UNET_BATCH = 64
STEPS = (5, 10, 20, 50, 100)  # of DPM-Solver++


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
    limit: int = 256
    """Test pictures, from the first on."""
    num_samples: int = 2
    """Of each hole; of those in 1,000 steps, and by RePaint, one."""
    seed: int = 0
    compile: bool = True
    scores: bool = True
    """Make the table too, of what is trained."""


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
    """x0 on diffusers' linear schedule, for as many seconds of the processor as DiffMAE took, told by the first steps.

    As DiffMAE it predicts x0: from eps the colours at large t are lost, and samples had 10 dB.
    """
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
        loss = (F.mse_loss(guess, x, reduction="none") * hole).sum() / hole.sum() / 3
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


# Clips, holes, the clips' numbers, and how many samples, to (B, S, C, T, H, W).
Fill = Callable[[Tensor, Tensor, range, int], Tensor]


def one(fill: Callable[[Tensor, Tensor], Tensor]) -> Fill:
    """A fill that has one answer."""
    return lambda clips, holes, numbers, num_samples: fill(clips, holes)[:, None]


def mean_colour(clips: Tensor, holes: Tensor) -> Tensor:
    inside = holes[:, None].expand_as(clips)
    mean = clips.masked_fill(inside, 0).sum((2, 3, 4)) / (~inside).sum((2, 3, 4)).clamp(min=1)
    return torch.where(inside, mean[:, :, None, None, None], clips)


def classical(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """OpenCV's fills (radius 3) or scikit-image's biharmonic one, picture by picture."""

    def fill(clips: Tensor, holes: Tensor) -> Tensor:
        import cv2
        from skimage.restoration import inpaint_biharmonic  # type: ignore[import-not-found]

        filled = []
        for clip, hole in zip(clips, holes, strict=True):
            pixels, mask = clip[:, 0].permute(1, 2, 0).numpy(), hole[0].numpy()
            if name == "biharmonic":
                made = inpaint_biharmonic(pixels * ~mask[..., None], mask, channel_axis=-1)
            else:
                flag = cv2.INPAINT_TELEA if name == "Telea" else cv2.INPAINT_NS
                made = cv2.inpaint((pixels * 255).round().astype("uint8"), mask.astype("uint8") * 255, 3, flag) / 255
            filled.append(torch.from_numpy(made).float().clamp(0, 1).permute(2, 0, 1)[:, None])
        return torch.where(holes[:, None], torch.stack(filled), clips)

    return fill


def by_prediction(model: MaskedDiffusionAutoencoder) -> Fill:
    return lambda clips, holes, numbers, num_samples: predict(model, clips, holes, indices=numbers)[:, None]


def by_model(model: MaskedDiffusionAutoencoder, sampler: Sampler, num_steps: int, **more: Any) -> Fill:
    def fill(clips: Tensor, holes: Tensor, numbers: range, num_samples: int) -> Tensor:
        how = {"num_steps": num_steps, "sampler": sampler, "num_samples": num_samples, **more}
        return repaint(model, clips, holes, seed=0, indices=numbers, **how)

    return fill


def by_unet(file: Path, image_size: int, num_steps: int) -> Fill:
    """The U-Net's average, sampled by DPM-Solver++ as DiffMAE is."""
    model = torch.optim.swa_utils.AveragedModel(unet_model(image_size))
    model.load_state_dict(torch.load(file, weights_only=True)["average"])
    model.eval()
    schedule = make_schedule("linear", 1.0)  # diffusers' default

    @torch.inference_mode()
    def fill(clips: Tensor, holes: Tensor, numbers: range, num_samples: int) -> Tensor:
        x, hole = clips[:, :, 0] * 2 - 1, holes.float()
        told = torch.cat([x * (1 - hole), hole], 1)
        made = []
        for sample in range(num_samples):
            start = RowNoise(sample, numbers)(x)

            def denoise(x_t: Tensor, t: float) -> Tensor:
                k = torch.full((len(x_t),), int(t) - 1)
                x0 = model(torch.cat([x_t, told], 1), k).sample.clamp(-1, 1)
                return torch.where(holes, x0, x)  # outside the hole it was never trained

            painted = dpmpp_2m(denoise, start, schedule, schedule.times(num_steps))
            made.append(torch.where(holes[:, None], (painted[:, :, None] + 1) / 2, clips))
        return torch.stack(made, 1)

    return fill


def rows_of(options: Options) -> dict[str, tuple[Fill, int]]:
    """What fills the holes, and how many samples of it are taken; of the networks those that are trained."""
    rows: dict[str, tuple[Fill, int]] = {"mean colour": (one(mean_colour), 1)}
    rows |= {name: (one(classical(name)), 1) for name in ("Telea", "Navier-Stokes", "biharmonic")}
    trained_ones = Results(options.out / "results.json").read()
    S = options.num_samples

    def loaded(arm: str) -> MaskedDiffusionAutoencoder:
        return load_model(options.out / arm)[0]

    if "mae_raw" in trained_ones:
        rows["MAE, raw pixels"] = (by_prediction(loaded("mae_raw")), 1)
    if "diffmae" in trained_ones:
        diffmae = loaded("diffmae")
        rows["DiffMAE, prediction in 1 step"] = (by_prediction(diffmae), 1)
        for steps in STEPS:
            rows[f"DiffMAE, {steps} steps"] = (by_model(diffmae, "dpmpp", steps), S)
        rows["DiffMAE, 1,000 steps of DDPM"] = (by_model(diffmae, "ddpm", 1000), 1)
    for arm, name in (("dit", "DiT"), ("umd", "UMD")):
        if arm in trained_ones:
            model = loaded(arm)
            rows[f"{name}, replacement, 50 steps"] = (by_model(model, "ddpm", 50, num_resamples=1), S)
            rows[f"{name}, RePaint, 50 steps"] = (by_model(model, "ddpm", 50, num_resamples=10, jump_length=10), 1)
    if "unet" in trained_ones:
        rows["U-Net, 20 steps"] = (by_unet(options.out / "unet" / "unet.pt", options.image_size, 20), S)
    return rows


@torch.inference_mode()
def feature_maps(judge: Judge, clips: Tensor) -> list[Tensor]:
    """Of each layer of the classifier, every place's vector of length 1."""
    x = (clips[:, :, 0] - judge.mean[:, None, None]) / judge.std[:, None, None]
    maps = []
    for layer in judge.body:
        x = layer(x)
        maps.append(F.normalize(x, dim=1))
    return maps


def feature_distance(judge: Judge, filled: Tensor, truth: Tensor) -> Tensor:
    """Squared distance of the features at each place, mean over places and layers: LPIPS with all weights 1, (B,)."""
    pairs = zip(feature_maps(judge, filled), feature_maps(judge, truth), strict=True)
    return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)


def told(values: Tensor) -> dict[str, float]:
    """Mean over pictures and half of its 95 % interval."""
    return {"mean": values.mean().item(), "ci95": 1.96 * values.std().item() / math.sqrt(len(values))}


def kernel_distance(judge: Judge, filled: Tensor, others: Tensor) -> float:
    """How far the filled pictures are from as many others as a set: KID (arXiv 1801.01401), in the classifier's features."""
    from torchmetrics.image.kid import poly_mmd  # type: ignore[import-not-found]

    ours, theirs = (judge_pictures(judge, clips[:, :, 0]).features.double() for clips in (filled, others))
    return poly_mmd(theirs, ours).item()


def scored(
    fill: Fill, num_samples: int, clips: Tensor, others: Tensor, holes: Tensor, judge: Judge
) -> tuple[dict[str, Any], Tensor]:
    begin = cpu_seconds()
    parts = [range(len(clips))[i : i + 64] for i in range(0, len(clips), 64)]
    samples = torch.cat([fill(clips[p.start : p.stop], holes[p.start : p.stop], p, num_samples) for p in parts])
    seconds = cpu_seconds() - begin
    each = [psnr(hole_mse(samples[:, s], clips, holes)) for s in range(samples.shape[1])]
    sharp = torch.stack([laplacian_energy(samples[:, s], holes) for s in range(samples.shape[1])]).mean(0)
    result = {
        "psnr_of_a_sample": told(torch.stack(each).mean(0)),
        "psnr_of_the_mean": told(psnr(hole_mse(samples.mean(1), clips, holes))),
        "feature_distance": told(
            torch.stack([feature_distance(judge, samples[:, s], clips) for s in range(samples.shape[1])]).mean(0)
        ),
        "kernel_distance": kernel_distance(judge, samples[:, 0], others),
        "sharpness": (sharp.sum() / laplacian_energy(clips, holes).sum()).item(),
        "samples": samples.shape[1],
        "cpu_seconds_a_sample": seconds / len(clips) / samples.shape[1],
    }
    return result, samples[:12, 0]


def test_pictures(options: Options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The pictures, as many others, and holes of each kind; picture i takes an irregular mask drawn by its number."""
    clip = recipe_of("diffmae", options).clip
    samples = Samples(open_source(options.test, 3), clip, seed=0, training=None)
    several = iter(batches(samples, options.limit, 0, 0, shuffle=False, drop_last=False, num_workers=0))
    clips, others = next(several).clips(), next(several).clips()
    holes = {mask: named_holes(clip, mask, range(len(clips)), seed=0) for mask in ("random:0.75", "center:0.25")}
    folder = MaskFolder(open_source(str(options.masks), 1), False, ())
    order = torch.randperm(len(folder), generator=draws.generator(0, "masks")).tolist()
    holes["irregular"] = torch.stack(
        [resize_hole(folder.read(order[i % len(order)]).hole[None], clip.height, clip.width) for i in range(len(clips))]
    )
    return clips, others, holes


def score(options: Options, results: Results) -> None:
    clips, others, kinds = test_pictures(options)
    judge, _ = load_judge(options.out / "judge.safetensors")
    for mask, holes in kinds.items():
        sheet = [("truth", list(clips[:12])), (f"hidden, {mask}", list(masked_view(clips[:12], holes[:12])))]
        for name, (fill, num_samples) in rows_of(options).items():
            kept = options.out / "painted" / f"{mask.partition(':')[0]}_{name}.pt"

            def make(
                fill: Fill = fill, num: int = num_samples, holes: Tensor = holes, kept: Path = kept
            ) -> dict[str, Any]:
                figures, few = scored(fill, num, clips, others, holes, judge)
                kept.parent.mkdir(exist_ok=True)
                torch.save(few, kept)
                return figures

            results.part("score", mask, name, make=make)
            sheet.append((name, list(torch.load(kept))))
        save_png(options.out / f"{mask.partition(':')[0]}.png", contact_sheet(sheet, cell=64))
        draw_curve(results.read()["score"][mask], options.out / f"{mask.partition(':')[0]}_steps.png")
    print(table(results.read()["score"]))


def draw_curve(rows: dict[str, Any], file: Path) -> None:
    """What more steps of DiffMAE are worth, in seconds and in quality; the others as marks."""
    from matplotlib.figure import Figure

    figure = Figure((15, 4), layout="constrained")
    lines = [name for name in rows if name.startswith("DiffMAE") and name.endswith("steps")]
    others = [name for name in rows if name not in lines and name != "mean colour"]
    kinds = {
        "psnr_of_a_sample": "decibels of a sample (more is better)",
        "feature_distance": "feature distance (less is better)",
        "kernel_distance": "KID (less is better)",
    }

    def value(name: str, key: str) -> tuple[float, float]:
        found = rows[name][key]
        return (found["mean"], found["ci95"]) if isinstance(found, dict) else (found, 0.0)

    for axes, (key, label) in zip(figure.subplots(1, 3), kinds.items(), strict=True):
        x = [rows[name]["cpu_seconds_a_sample"] for name in lines]
        y, error = zip(*(value(name, key) for name in lines), strict=True)
        axes.errorbar(x, y, error, marker="o", capsize=3, label="DiffMAE, DPM-Solver++")
        for name, *place in zip(lines, x, y, strict=True):
            axes.annotate(name.split()[1], place, textcoords="offset points", xytext=(5, 5), fontsize=8)
        for name in others:
            axes.plot(rows[name]["cpu_seconds_a_sample"], value(name, key)[0], "x", label=name)
        axes.set(xscale="log", xlabel="seconds of the processor for one sample", ylabel=label)
    figure.axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110)


def table(values: dict[str, Any]) -> str:
    lines = []
    for mask, rows in values.items():
        lines += [
            "",
            f"| {mask} | samples | dB of one | dB of their mean | feature distance | KID, x 100 | sharpness | CPU s a sample |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|")
        for name, r in rows.items():
            several = "steps" in name  # otherwise there is one answer
            mean = r["psnr_of_the_mean"]["mean"]
            cells = [
                name,
                str(r["samples"]) if several else "",
                f"{r['psnr_of_a_sample']['mean']:.2f} ± {r['psnr_of_a_sample']['ci95']:.2f}",
                f"{mean:.2f}" if r["samples"] > 1 else "",
                f"{r['feature_distance']['mean']:.3f} ± {r['feature_distance']['ci95']:.3f}",
                f"{100 * r['kernel_distance']:.1f}",
                f"{r['sharpness']:.2f}",
                f"{r['cpu_seconds_a_sample']:.3f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    if options.scores:
        score(options, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
