"""What pre-training is worth on CIFAR-10 with 100 labels of each class: ViTs of one size, seven beginnings, equal arithmetic.

    pip install ".[compare]"
    python examples/recognition_cifar10.py --train cifar10/train.parquet --test cifar10/test.parquet --out runs/recognition

A small ViT is pre-trained on all training pictures without labels as MAE (patch-normalised and raw pixels), DiffMAE, DiT
(denoising diffusion of whole pictures) and SimCLR (by lightly), each with the multiply-adds of --dit-epochs epochs of DiT;
and not at all. DiT's blocks have adaLN, and half as many parameters more, as in its paper. Then it is fine-tuned on 100
labels of each class by `unveil finetune`, the same for all, and its frozen features are probed. Beside them the features of
a diffusion U-Net (diffusers' UNet2DModel) of the same arithmetic. Stopped or killed, the same command goes on; what is
finished is skipped. Several may share a directory, with --arms of their own.
"""

import dataclasses
import functools
import math
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from comparison import Results, timed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import to_pil_image

from unveil import draws, recipes
from unveil.checkpoint import WEIGHTS, About, save_weights, write_atomically
from unveil.classifier import load_arrays
from unveil.cost import encode_cost, masked_step
from unveil.metrics import accuracy, choose_ridge, ridge_predict
from unveil.model import EncoderOnly
from unveil.optim import lr_factor
from unveil.recipe import Recipe
from unveil.tasks.finetune import Finetune, finetune
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import FEW_LABEL_DRAWS, PENALTIES, Probe, probe

Arm = Literal["scratch", "mae", "mae_raw", "diffmae", "dit", "simclr", "unet"]
ARMS: tuple[Arm, ...] = ("scratch", "mae", "mae_raw", "diffmae", "dit", "simclr", "unet")
UNET_TIME = 50  # of 1,000, where the U-Net's features are read; more noise hides the picture
TEMPERATURE = 0.5  # SimCLR's on CIFAR-10, Chen et al. 2020, arXiv 2002.05709, appendix B.9
BATCH = 256  # of SimCLR, whose loss compares the clips of a batch, and of the U-Net


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    train: str
    """Parquet file of the 50,000 training pictures, with labels."""
    test: str
    """Parquet file of the 10,000 test pictures."""
    out: Path = Path("runs/recognition")
    arms: tuple[Arm, ...] = ARMS
    size: str = "Nano/4"
    dit_epochs: float = 4.0
    """Epochs of DiT whose arithmetic each pre-training gets."""
    labels_per_class: int = 100
    finetune_epochs: int = 100
    seeds: tuple[int, ...] = (0, 1)
    compile: bool = True


def seconds_of(saved: Path, make: Callable[[], Any]) -> dict[str, float | None]:
    """Seconds by the clock and of the processor; None if it goes on from what was saved earlier."""
    resumed = saved.exists()

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    begin, before = time.perf_counter(), cpu()
    make()
    spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu() - before}
    return dict.fromkeys(spent) if resumed else {**spent}


def trained(
    model: nn.Module, loss_of: Callable[[Tensor, int, int], Tensor], clips: Tensor, epochs: int, file: Path, seed: int
) -> None:
    """A plain training loop, for what Unveil does not train; saved after each epoch, and resumed there.

    Args:
        loss_of: of uint8 pictures, the epoch and the step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    steps = len(clips) // BATCH
    first = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        order = torch.randperm(len(clips), generator=draws.generator(seed, epoch, "order"))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * lr_factor(epoch * steps + step, epochs * steps, steps // 2)
            loss = loss_of(clips[order[step * BATCH : (step + 1) * BATCH]], epoch, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        write_atomically(file, functools.partial(torch.save, state))
        print(f"    epoch {epoch + 1} of {epochs}, loss {loss.item():.4f}", flush=True)


def simclr(recipe: Recipe, clips: Tensor, epochs: int, folder: Path, seed: int) -> None:
    """SimCLR of the recipe's encoder, as an encoder-only file; views, loss and projection by lightly."""
    from lightly.loss import NTXentLoss  # type: ignore[import-not-found]
    from lightly.models.modules.heads import SimCLRProjectionHead  # type: ignore[import-not-found]
    from lightly.transforms.simclr_transform import SimCLRTransform  # type: ignore[import-not-found]

    torch.manual_seed(seed)
    encoder = EncoderOnly(recipe)
    width = recipe.encoder.embed_dim
    model = nn.ModuleDict({"encoder": encoder, "head": SimCLRProjectionHead(width, width, 64)})
    compare = NTXentLoss(temperature=TEMPERATURE)
    # the paper's on CIFAR-10: half the colour jitter of ImageNet's and no blur; crops as MAE's, not down to 0.08 of 32 px
    views = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, min_scale=0.2, normalize=None)

    def loss_of(pictures: Tensor, epoch: int, step: int) -> Tensor:
        torch.manual_seed(draws.key(seed, epoch, step, "views"))
        first, second = zip(*(views(to_pil_image(picture)) for picture in pictures), strict=True)
        tokens = encoder.encode(torch.stack(first + second)[:, :, None])
        projected = model["head"](tokens[:, recipe.encoder.num_class_tokens :].mean(1))
        return compare(*projected.chunk(2))

    trained(model, loss_of, clips, epochs, folder / "simclr.pt", seed)
    about = About(
        step=epochs * (len(clips) // BATCH), images_seen=epochs * len(clips), ema_decay=None, data="CIFAR-10",
        command="SimCLR by lightly", parts=("encoder",),
    )  # fmt: skip
    save_weights(folder / WEIGHTS, recipe, encoder.state_dict(), about)


def unet_model() -> Any:
    """A small U-Net; convolutions at full size cost more for each parameter than a ViT does."""
    from diffusers import UNet2DModel  # type: ignore[attr-defined]

    return UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def unet(clips: Tensor, epochs: int, folder: Path, seed: int) -> Any:
    """A denoising diffusion U-Net, by diffusers; eps on its linear schedule."""
    from diffusers import DDPMScheduler  # type: ignore[attr-defined]

    torch.manual_seed(seed)
    model, schedule = unet_model(), DDPMScheduler()

    def loss_of(pictures: Tensor, epoch: int, step: int) -> Tensor:
        generator = draws.generator(seed, epoch, step, "noise")
        x = pictures.float() / 127.5 - 1
        flipped = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(1000, (len(x),), generator=generator)
        return F.mse_loss(model(schedule.add_noise(x, noise, t), t).sample, noise)  # type: ignore[arg-type]

    trained(model, loss_of, clips, epochs, folder / "unet.pt", seed)
    return model.eval()


@torch.inference_mode()
def unet_features(model: Any, clips: Tensor) -> Tensor:
    """The middle block's output at a little noise, the mean over places, (n, 64)."""
    from diffusers import DDPMScheduler  # type: ignore[attr-defined]

    kept: list[Tensor] = []
    hook = model.mid_block.register_forward_hook(lambda module, inputs, output: kept.append(output.mean((2, 3))))
    schedule, generator = DDPMScheduler(), draws.generator(0, "features")
    t = torch.full((1,), UNET_TIME)
    for part in clips.split(500):
        x = part.float() / 127.5 - 1
        model(schedule.add_noise(x, torch.randn(x.shape, generator=generator), t), t)  # type: ignore[arg-type]
    hook.remove()
    return torch.cat(kept)


def ridge_of(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, per_class: int | None) -> float:
    """`unveil probe --method linear` on given features: the mean over draws of few labels, or all of them."""
    scores = []
    for i in range(1 if per_class is None else FEW_LABEL_DRAWS):
        rows = torch.randperm(len(labels), generator=draws.generator(0, i, "few labels"))
        if per_class is not None:
            rows = torch.cat([rows[labels[rows] == c][:per_class] for c in range(10)])
        rows = rows[torch.randperm(len(rows), generator=draws.generator(0, "order"))]
        penalty = choose_ridge(train[rows], labels[rows], 10, PENALTIES)
        scores.append(accuracy(ridge_predict(train[rows], labels[rows], test, 10, penalty), truth))
    return statistics.mean(scores)


def budget_of(options: Options) -> float:
    return options.dit_epochs * masked_step(recipes.dit(options.size, height=32)).forward


def cost_of(arm: str, options: Options) -> float:
    """Multiply-adds of one picture's forward pass in pre-training."""
    if arm == "simclr":  # two views
        return 2 * encode_cost(recipes.mae(options.size, height=32)).forward
    if arm == "unet":
        with torch.device("meta"):
            model, x, t = unet_model(), torch.empty(1, 3, 32, 32), torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            model(x, t)
        return counter.get_total_flops() / 2
    return masked_step(recipes.RECIPES[arm](options.size, height=32)).forward


def pretrained(arm: str, seed: int, options: Options, results: Results) -> Path:
    """The arm's run, trained now if it is not there."""
    folder = options.out / f"{arm}-{seed}"
    epochs = max(1, round(budget_of(options) / cost_of(arm, options)))

    def make() -> dict[str, Any]:
        if arm == "simclr":
            folder.mkdir(parents=True, exist_ok=True)
            clips = load_arrays(options.train, recipes.mae(options.size, height=32).clip).clips
            return seconds_of(
                folder / "simclr.pt", lambda: simclr(recipes.mae(options.size, height=32), clips, epochs, folder, seed)
            )
        run = Pretrain(
            data=options.train, out=folder, recipe=arm, size=options.size, image_size="32", epochs=epochs,  # type: ignore[arg-type]
            crop_scale=0.4, flip=True, seed=seed, compile=options.compile,
        )  # fmt: skip
        return timed(lambda: pretrain(run))

    results.part(arm, f"pretrain {seed}", make=lambda: {"epochs": epochs, **make()})
    return folder


def probes(run: Path, options: Options) -> dict[str, float]:
    """Linear accuracy of frozen features, with few labels and with all."""
    shared = {"run": run, "data": options.train, "test_data": options.test, "method": "linear", "baselines": False}
    return {
        name: probe(Probe(**shared, labels_per_class=number))["results"]["encoder"]["linear"]  # type: ignore[arg-type]
        for name, number in (("few", options.labels_per_class), ("all", None))
    }


def tuned(arm: str, run: Path, seed: int, options: Options) -> dict[str, Any]:
    given = Finetune(
        run=run, data=options.train, test_data=options.test, out=options.out / f"{arm}-{seed}-tuned", seed=seed,
        epochs=options.finetune_epochs, labels_per_class=options.labels_per_class, from_scratch=arm == "scratch",
        eval_epochs=options.finetune_epochs, compile=options.compile,
    )  # fmt: skip
    begin = time.perf_counter()
    result = finetune(given)
    if not result["finished"]:
        raise SystemExit(130)
    return {"accuracy": result["last"]["accuracy"], "seconds": time.perf_counter() - begin}


def table(values: dict[str, Any], options: Options) -> str:
    lines = [
        f"| pre-training | epochs | CPU | {options.labels_per_class} labels: fine-tuned | linear | all labels: linear |",
        "|---|---|---|---|---|---|",
    ]

    def told(numbers: list[float]) -> str:
        if not numbers:
            return ""
        spread = f" ± {statistics.stdev(numbers) / math.sqrt(len(numbers)):.1f}" if len(numbers) > 1 else ""
        return f"{statistics.mean(numbers):.1f}{spread}"

    for arm in ARMS:
        parts = values.get(arm, {})
        of = {name: [parts[f"{name} {s}"] for s in options.seeds if f"{name} {s}" in parts] for name in
              ("pretrain", "probe", "finetune")}  # fmt: skip
        if not any(of.values()):
            continue
        epochs = str(of["pretrain"][0]["epochs"]) if of["pretrain"] else "none"
        cpu = [run["cpu_seconds"] for run in of["pretrain"] if run.get("cpu_seconds")]
        cells = [
            f"`{arm}`", epochs, f"{statistics.mean(cpu):.0f} s" if cpu else "",
            told([run["accuracy"] for run in of["finetune"]]), told([p["few"] for p in of["probe"]]),
            told([p["all"] for p in of["probe"]]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.json")
    setting = {
        **{k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "arms", "seeds")},
        "train": Path(options.train).name,
        "test": Path(options.test).name,
        "torch": torch.__version__,
    }
    before = results.part("setting", make=lambda: setting)
    if before != setting:
        raise SystemExit(f"{options.out} was made with {before}, not {setting}. Name another --out.")
    for seed in options.seeds:
        for arm in options.arms:
            if arm == "unet":
                epochs = max(1, round(budget_of(options) / cost_of(arm, options)))
                clip = recipes.mae(options.size, height=32).clip

                def features(seed: int = seed, epochs: int = epochs, clip: Any = clip) -> None:
                    folder = options.out / f"unet-{seed}"
                    folder.mkdir(parents=True, exist_ok=True)
                    train, test = (load_arrays(data, clip) for data in (options.train, options.test))
                    made: list[Any] = []
                    spent = seconds_of(folder / "unet.pt", lambda: made.append(unet(train.clips, epochs, folder, seed)))
                    x, z = (unet_features(made[0], arrays.clips) for arrays in (train, test))
                    scores = {
                        name: ridge_of(x, train.labels, z, test.labels, number)
                        for name, number in (("few", options.labels_per_class), ("all", None))
                    }
                    results.part("unet", f"probe {seed}", make=lambda: scores)
                    results.part("unet", f"pretrain {seed}", make=lambda: {"epochs": epochs, **spent})

                if f"pretrain {seed}" not in results.read().get("unet", {}):
                    print("... unet", seed, flush=True)
                    features()
                continue
            # the network that scratch begins from is any other's, whose weights it does not take
            run = pretrained("mae" if arm == "scratch" else arm, seed, options, results)
            if arm != "scratch":
                results.part(arm, f"probe {seed}", make=lambda run=run: probes(run, options))
            results.part(
                arm, f"finetune {seed}", make=lambda run=run, arm=arm, seed=seed: tuned(arm, run, seed, options)
            )
    print(table(results.read(), options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
