"""UMD beside MAE, DiT, MaskDiT and the single-prediction variant on CIFAR-10: same network, data, seed and arithmetic.

    python examples/umd_cifar10.py --train cifar10/train.parquet --test cifar10/test.parquet --out runs/umd_cifar10

Every method is pre-trained without labels and then fine-tuned as a class-conditional generator, each stage with the
multiply-adds of --dit-epochs epochs of DiT. Before and after: few-shot and nearest-neighbour accuracy of the frozen encoder,
and the Frechet distance of generated pictures to the test pictures in the features of a small classifier that is trained on
the same data first (this is no FID). Stopped or killed, the same command goes on; what is finished is skipped. Several of them
may share a directory, each with --arms of its own, once the classifier is there (--arms "" --no-speeds makes it alone).
"""

import dataclasses
import fcntl
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from unveil import recipes
from unveil.checkpoint import load_model, write_atomically
from unveil.classifier import Judge, judge_pictures, load_arrays, load_judge, save_judge, train_judge
from unveil.cost import branch_cost, masked_step
from unveil.losses import Objective, draw
from unveil.metrics import frechet_distance
from unveil.model import MaskedDiffusionAutoencoder
from unveil.optim import optimizer_for
from unveil.pipeline import generate
from unveil.recipe import Recipe
from unveil.report import contact_sheet, save_png
from unveil.sampling import guidance
from unveil.tasks.finetune_generator import FinetuneGenerator, finetune_generator
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe

ARMS = ("umd", "umd_flow", "dit_umd", "maskdit_umd", "mae_umd")
NOISE_OF_PROBE = 51.0  # the noise that UMD's authors probe DiT and MaskDiT at
NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    train: str
    """Parquet file of the 50,000 training pictures, with labels."""
    test: str
    """Parquet file of the 10,000 test pictures."""
    out: Path = Path("runs/umd_cifar10")
    arms: tuple[str, ...] = ARMS
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


class Results:
    """results.json, written after every part, so that a finished part is never made twice.

    Read again before it is written, under a lock, as another process may have added to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def part(self, *names: str, make: Any) -> Any:
        """The part of that name, made now if it is not there."""

        def section_of(values: dict[str, Any]) -> dict[str, Any]:
            for name in names[:-1]:
                values = values.setdefault(name, {})
            return values

        section = section_of(self.read())
        if names[-1] in section:
            return section[names[-1]]
        print("...", " ".join(names), flush=True)
        made = make()
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            values = self.read()
            section_of(values)[names[-1]] = made
            write_atomically(self.path, lambda part: part.write_text(json.dumps(values, indent=2) + "\n"))
        print(" ".join(names), json.dumps(made), flush=True)
        return made


def recipe_of(name: str, options: Options) -> Recipe:
    return recipes.RECIPES[name](options.size, height=32)


def epochs_of(recipe: Recipe, options: Options) -> int:
    """Whole epochs for the arithmetic of options.dit_epochs epochs of DiT."""
    budget = options.dit_epochs * masked_step(recipe_of("dit_umd", options)).forward
    return max(1, round(budget / masked_step(recipe).forward))


def speeds(options: Options, rounds: int = 7) -> dict[str, Any]:
    """Pictures per second of every method's training step, one step of each in turn, medians; uncompiled."""
    steps = {}
    for name in ARMS:
        recipe = recipe_of(name, options)
        torch.manual_seed(options.seed)
        model = MaskedDiffusionAutoencoder(recipe)
        objective, optimizer = Objective(model), optimizer_for(model, recipe.training)
        steps[name] = (recipe, objective, optimizer)
    clips = torch.rand(64, 3, 1, 32, 32)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, (recipe, objective, optimizer) in steps.items():
            begin = time.perf_counter()
            loss, _ = objective(clips, draw(recipe, objective.model.schedule, options.seed, i, range(64)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if i >= 2:
                times[name].append(time.perf_counter() - begin)
    return {
        name: {
            "multiply_adds": masked_step(recipe).forward,
            "multiply_adds_of_each_branch": [branch_cost(recipe, branch).forward for branch in recipe.branches],
            "images_per_second": 64 / statistics.median(times[name]),
        }
        for name, (recipe, _, _) in steps.items()
    }


def timed(run: Any) -> dict[str, Any]:
    """What a training returns, with its seconds by the clock and of the processor."""
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    result = run()
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds = now.ru_utime + now.ru_stime - cpu.ru_utime - cpu.ru_stime
    kept = {name: result[name] for name in ("steps_now", "images_seen", "loss", "seconds")}
    return {**kept, "cpu_seconds": seconds, "threads": torch.get_num_threads()}


METHODS: tuple[Literal["fewshot", "knn", "linear"], ...] = ("fewshot", "knn", "linear")


def probes(run: Path, name: str, options: Options, pool: Literal["mean"] | None = None) -> dict[str, Any]:
    """Accuracy of the class tokens' mean, or of the patches': on clean pictures, and for methods whose class tokens never saw
    one also with a little noise on them."""
    sees_clean = recipe_of(name, options).branch_on("none") is not None
    scores = {}
    for time_ in (0.0,) if sees_clean or pool else (0.0, NOISE_OF_PROBE):
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
    """The finished results as lines of Markdown."""
    guided = f"guidance {values['setting']['guidance_scale']:g}"
    lines = [
        "| method | pre-training | few-shot | 20-NN | linear | patches: few-shot, linear | distance, no class | "
        f"fine-tuning | few-shot | 20-NN | linear | distance | named | distance, {guided} | named |",
        "|---|" + "---|" * 14,
    ]

    def three(scores: dict[str, float]) -> list[str]:
        return [f"{scores[f'{method}, t = 0']:.1f}" for method in METHODS]

    for name in ARMS:
        arm = values[name]
        few, _, linear = three(arm["probe of patches"])
        stages = [f"{arm[s]['epochs']} epochs, {arm[s]['cpu_seconds']:.0f} s" for s in ("pretrain", "finetune")]
        cells = [stages[0], *three(arm["probe"]), f"{few}, {linear}"]
        cells.append(f"{arm['generated']['distance']:.2f}" if "generated" in arm else "cannot")
        cells += [stages[1], *three(arm["probe after"])]
        for scale in ("1", guided.split()[1]):
            made = arm[f"generated after, guidance {scale}"]
            cells += [f"{made['distance']:.2f}", f"{made['named_as_asked']:.1f}"]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    for name, scores in values["probe floor"].items():
        lines.append(f"| {name} | | " + " | ".join(three(scores)) + " |" * 11)
    lines += ["", "| method | multiply-adds | ratio to DiT's | images/s | ratio to DiT's |", "|---|---|---|---|---|"]
    dit = values["speeds"]["dit_umd"]
    for name, speed in values["speeds"].items():
        work, rate = speed["multiply_adds"], speed["images_per_second"]
        ratios = work / dit["multiply_adds"], rate / dit["images_per_second"]
        lines.append(f"| `{name}` | {work / 1e6:.1f} M | {ratios[0]:.2f} | {rate:.0f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.json")
    results.part(
        "setting",
        make=lambda: {
            **{k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "arms", "speeds")},
            "train": Path(options.train).name,
            "test": Path(options.test).name,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
        },
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
        """What as many real training pictures get: no generator can be expected below it."""
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
        results.part("speeds", make=lambda: speeds(options))
        print(table(results.read()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
