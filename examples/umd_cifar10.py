"""UMD beside MAE, DiT, MaskDiT and the single-prediction variant on CIFAR-10: same network, data, seed and arithmetic.

    python examples/umd_cifar10.py --train cifar10/train.parquet --test cifar10/test.parquet --out runs/umd_cifar10

Every method is pre-trained without labels and then fine-tuned as a class-conditional generator, each stage with the
multiply-adds of --dit-epochs epochs of DiT, to the nearest whole epoch. Before and after: few-shot, nearest-neighbour and
linear accuracy of the frozen encoder, and the Frechet distance of generated pictures to the test pictures in the features
of a small classifier that is trained on the same data first (this is no FID). Stopped or killed, the same command goes on;
what is finished is skipped. Several of them may share a directory, each with --arms of its own, once the classifier is
there (--arms --no-speeds makes it alone).
"""

import dataclasses
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from comparison import Results, timed
from torch import Tensor

from unveil import recipes
from unveil.checkpoint import load_model
from unveil.classifier import Judge, judge_pictures, load_arrays, load_judge, save_judge, train_judge
from unveil.cost import branch_cost, masked_step
from unveil.losses import Objective, draw
from unveil.metrics import frechet_distance
from unveil.model import MaskedDiffusionAutoencoder
from unveil.optim import optimizer_for
from unveil.pipeline import generate
from unveil.pretraining import RecipeName
from unveil.recipe import Recipe
from unveil.report import contact_sheet, save_png
from unveil.sampling import guidance
from unveil.tasks.finetune_generator import FinetuneGenerator, finetune_generator
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe

ARMS: tuple[RecipeName, ...] = ("umd", "umd_flow", "dit_umd", "maskdit_umd", "mae_umd")
NOISE_OF_PROBE = 51.0  # the noise that UMD's authors probe DiT and MaskDiT at
NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    train: str
    """Parquet file of the 50,000 training pictures, with labels."""
    test: str
    """Parquet file of the 10,000 test pictures."""
    out: Path = Path("runs/umd_cifar10")
    arms: tuple[RecipeName, ...] = ARMS
    size: str = "Nano/4"
    dit_epochs: float = 4.0
    """Epochs of DiT whose arithmetic each stage of each method gets."""
    judge_epochs: int = 10
    num_samples: int = 1000
    """Generated pictures for each distance."""
    num_steps: int = 25
    """Of DPM-Solver++."""
    guidance_scale: float = 1.5
    seed: int = 0
    compile: bool = True
    speeds: bool = True
    """Measure pictures per second at the end; wants an idle machine."""


def recipe_of(name: str, options: Options) -> Recipe:
    return recipes.RECIPES[name](options.size, height=32)


def epochs_of(recipe: Recipe, options: Options) -> int:
    """Whole epochs for the arithmetic of options.dit_epochs epochs of DiT."""
    budget = options.dit_epochs * masked_step(recipe_of("dit_umd", options)).forward
    return max(1, round(budget / masked_step(recipe).forward))


SPEEDS = {"32": 64, "64": 16}  # pixels, and the batch of a step


def speeds(options: Options, height: str, rounds: int = 7) -> dict[str, Any]:
    """Pictures per second of every method's training step, one step of each in turn, medians; uncompiled.

    At 32 pixels of the size that is trained here, at 64 of the paper's S/4.
    """
    steps, batch = {}, SPEEDS[height]
    for name in ARMS:
        recipe = recipes.RECIPES[name](options.size if height == "32" else "S/4", height=int(height))
        torch.manual_seed(options.seed)
        model = MaskedDiffusionAutoencoder(recipe)
        objective, optimizer = Objective(model), optimizer_for(model, recipe.training)
        steps[name] = (recipe, objective, optimizer)
    clips = torch.rand(batch, 3, 1, int(height), int(height))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, (recipe, objective, optimizer) in steps.items():
            begin = time.perf_counter()
            loss, _ = objective(clips, draw(recipe, objective.model.schedule, options.seed, i, range(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if i >= 2:
                times[name].append(time.perf_counter() - begin)
    return {
        name: {
            "multiply_adds": masked_step(recipe).forward,
            "multiply_adds_of_each_branch": [branch_cost(recipe, branch).forward for branch in recipe.branches],
            "images_per_second": batch / statistics.median(times[name]),
        }
        for name, (recipe, _, _) in steps.items()
    }


METHODS: tuple[Literal["fewshot", "knn", "linear"], ...] = ("fewshot", "knn", "linear")


def probes(run: Path, name: str, options: Options, pool: Literal["mean"] | None = None) -> dict[str, Any]:
    """Accuracy of the class tokens' mean, or of the patches': on clean pictures, and for methods that never saw one also with
    a little noise on them."""
    sees_clean = recipe_of(name, options).branch_on("none") is not None
    scores = {}
    for time_ in (0.0,) if sees_clean else (0.0, NOISE_OF_PROBE):
        for method in METHODS:
            asked = Probe(
                run=run,
                data=options.train,
                test_data=options.test,
                method=method,
                time=time_,
                pool=pool,
                baselines=False,
            )
            scores[f"{method}, t = {time_:g}"] = probe(asked)["results"]["encoder"][method]
    return scores


def floor_of_probes(run: Path, options: Options) -> dict[str, Any]:
    """The same probes of what no training made: raw pixels, and the patches of the untrained encoder of that run."""
    scores: dict[str, Any] = {}
    for method in METHODS:
        rows = probe(Probe(run=run, data=options.train, test_data=options.test, method=method))["results"]
        for features in ("raw pixels", "untrained encoder"):
            scores.setdefault(features, {})[f"{method}, t = 0"] = rows[features][method]
    return scores


def made(run: Path, options: Options, scale: float | None) -> tuple[Tensor, Tensor | None]:
    """Generated pictures (n, 3, 32, 32), and the classes that they were asked for, in turn; scale None for no class."""
    model, _ = load_model(run)
    labels = None if scale is None else torch.arange(options.num_samples) % NUM_CLASSES
    assert model.schedule is not None
    guide = guidance("constant", scale, model.schedule.end) if scale not in (None, 1.0) else None
    parts = []
    for i in range(0, options.num_samples, 250):
        rows = range(i, min(i + 250, options.num_samples))
        mine = None if labels is None else labels[rows.start : rows.stop]
        clips = generate(
            model, rows, mine, num_steps=options.num_steps, sampler="dpmpp", guidance=guide, seed=options.seed
        )
        parts.append(clips[:, :, 0])
    return torch.cat(parts), labels


def judged(
    run: Path, options: Options, scale: float | None, judge: Judge, real: Tensor, picture: Path
) -> dict[str, Any]:
    """Distance of generated pictures to real ones in the classifier's features, and the share named as asked for."""
    begin = time.perf_counter()
    pictures, labels = made(run, options, scale)
    seconds = time.perf_counter() - begin
    verdict = judge_pictures(judge, pictures, labels)
    rows = [(f"class {c}" if labels is not None else "", list(pictures[c:100:10, :, None])) for c in range(NUM_CLASSES)]
    save_png(picture, contact_sheet(rows, cell=48))
    result: dict[str, Any] = {"distance": frechet_distance(verdict.features, real), "seconds": seconds}
    if labels is not None:
        result["named_as_asked"] = verdict.accuracy
    return result


def table(values: dict[str, Any]) -> str:
    """The results as lines of Markdown; methods of which a part is missing are left out."""
    scales = ("1", f"{values['setting']['guidance_scale']:g}")
    done = [name for name in ARMS if "probe of patches after" in values.get(name, {})]

    def scores_of(scores: dict[str, float]) -> list[str]:
        """Each accuracy, the one at a little noise behind it."""
        noisy = [scores.get(f"{method}, t = {NOISE_OF_PROBE:g}") for method in METHODS]
        return [
            f"{scores[f'{method}, t = 0']:.1f}" + ("" if with_noise is None else f" ({with_noise:.1f})")
            for method, with_noise in zip(METHODS, noisy, strict=True)
        ]

    def stage(name: str, part: str) -> str:
        made = values[name][part]
        seconds = "resumed" if made["cpu_seconds"] is None else f"{made['cpu_seconds']:.0f} s"
        return f"{made['epochs']} epochs, {seconds}"

    lines = []
    for title, part, suffix in (("pre-training", "pretrain", ""), ("fine-tuning", "finetune", " after")):
        head = [f"after {title}", "CPU", *(f"class tokens: {method}" for method in METHODS)]
        head += [f"patches: {method}" for method in METHODS]
        head += [f"distance, guidance {g}; named as asked" for g in scales] if suffix else ["distance, no class"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name in done:
            arm = values[name]
            cells = [stage(name, part), *scores_of(arm[f"probe{suffix}"]), *scores_of(arm[f"probe of patches{suffix}"])]
            if suffix:
                made = [arm[f"generated after, guidance {g}"] for g in scales]
                cells += [f"{one['distance']:.2f}; {one['named_as_asked']:.1f} %" for one in made]
            else:
                cells.append(f"{arm['generated']['distance']:.2f}" if "generated" in arm else "cannot")
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        if not suffix:
            floors = values.get("probe floor", {})
            lines += [
                f"| {name} | | | | | " + " | ".join(scores_of(scores)) + " | |" for name, scores in floors.items()
            ]
        lines.append("")
    for height, table_of in values.get("speeds", {}).items():
        lines += [
            f"| at {height} px | multiply-adds | ratio to DiT's | images/s | DiT's time is so many times as long |"
        ]
        lines += ["|---|---|---|---|---|"]
        dit = table_of["dit_umd"]
        for name, speed in table_of.items():
            work, rate = speed["multiply_adds"], speed["images_per_second"]
            ratios = work / dit["multiply_adds"], rate / dit["images_per_second"]
            lines.append(f"| `{name}` | {work / 1e6:.1f} M | {ratios[0]:.2f} | {rate:.0f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.json")
    setting = {
        **{k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "arms", "speeds")},
        "train": Path(options.train).name,
        "test": Path(options.test).name,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    before = results.part("setting", make=lambda: setting)
    for name, value in setting.items():
        if before.get(name) != value:
            raise SystemExit(
                f"{options.out} was made with {name}={before.get(name)!r}, not {value!r}. Name another --out."
            )
    clip = recipe_of("umd", options).clip
    test = load_arrays(options.test, clip)
    judge_file = options.out / "judge.safetensors"

    def make_judge() -> dict[str, Any]:
        begin = time.perf_counter()
        judge = train_judge(
            load_arrays(options.train, clip),
            NUM_CLASSES,
            epochs=options.judge_epochs,
            seed=options.seed,
            flip=True,
            shift=4,
        )
        verdict = judge_pictures(judge, test.clips, test.labels)
        about = {"accuracy": verdict.accuracy, "seconds": time.perf_counter() - begin, "epochs": options.judge_epochs}
        save_judge(judge_file, judge, about)
        return about

    results.part("judge", make=make_judge)
    judge, _ = load_judge(judge_file)
    real = judge_pictures(judge, test.clips).features

    def floor() -> float:
        """What as many real training pictures get, which the classifier has seen."""
        train = load_arrays(options.train, clip).clips[: options.num_samples]
        return frechet_distance(judge_pictures(judge, train).features, real)

    results.part("distance of real training pictures", make=floor)
    for name in options.arms:
        first, second = options.out / name, options.out / f"{name}_finetune"
        recipe = recipe_of(name, options)
        epochs = epochs_of(recipe, options)
        shared = {"seed": options.seed, "compile": options.compile, "flip": True}
        run = Pretrain(
            data=options.train, out=first, recipe=name, size=options.size, image_size="32",
            epochs=epochs, crop_scale=0.8, **shared,
        )  # fmt: skip
        results.part(name, "pretrain", make=lambda run=run: {"epochs": run.epochs, **timed(lambda: pretrain(run))})
        results.part(name, "probe", make=lambda: probes(first, name, options))  # noqa: B023
        results.part(name, "probe of patches", make=lambda: probes(first, name, options, "mean"))  # noqa: B023
        if recipe.branch_on("visible"):
            sheet = options.out / f"{name}.png"
            results.part(name, "generated", make=lambda: judged(first, options, None, judge, real, sheet))  # noqa: B023
        tuned = recipes.generator(recipe, NUM_CLASSES)
        more = FinetuneGenerator(
            run=first, data=options.train, out=second, epochs=epochs_of(tuned, options), crop_scale=0.95, **shared
        )
        results.part(
            name, "finetune", make=lambda run=more: {"epochs": run.epochs, **timed(lambda: finetune_generator(run))}
        )
        results.part(name, "probe after", make=lambda: probes(second, name, options))  # noqa: B023
        results.part(name, "probe of patches after", make=lambda: probes(second, name, options, "mean"))  # noqa: B023
        for scale in (1.0, options.guidance_scale):
            sheet = options.out / f"{name}_guidance_{scale:g}.png"
            results.part(
                name,
                f"generated after, guidance {scale:g}",
                make=lambda: judged(second, options, scale, judge, real, sheet),  # noqa: B023
            )
    if options.arms:
        results.part("probe floor", make=lambda: floor_of_probes(options.out / options.arms[0], options))
    if options.speeds:
        for height in SPEEDS:
            results.part("speeds", height, make=lambda: speeds(options, height))  # noqa: B023
    print(table(results.read()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
