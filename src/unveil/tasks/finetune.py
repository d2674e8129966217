"""From a pre-trained encoder to a network that tells classes, labels or numbers."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from unveil import draws, finetuning
from unveil.checkpoint import BEST, WEIGHTS, FromRun, write_atomically
from unveil.config import check_choice
from unveil.data import Samples, Source, decoded_bytes, source_for
from unveil.features import usual_pool
from unveil.finetuning import FineTuning, Recognition, Task
from unveil.metrics import confusion
from unveil.planning import CACHE_LIMIT, TrainingOptions, parse_image_size, planned, prepare
from unveil.recipe import Recipe, to_dict
from unveil.recognition_job import RecognitionJob, told
from unveil.recognition_report import write_report
from unveil.recognizer import (
    POSITIONS,
    Recognizer,
    always_the_same,
    load_any,
    load_recognizer,
    score,
    score_each,
    tensors_for,
)
from unveil.sources import Chosen, check_classes, files_of, trained_on_too
from unveil.spread import Spread
from unveil.targets import Truth, chosen_truth, truth_of
from unveil.train import Progress, run_job

Preset = Literal["small", "B", "L", "H"]
EVALUATION, REPORT = "evaluation.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingOptions, FromRun):
    """Train a pre-trained encoder with a linear head on labelled pictures, by MAE's published recipe.

    The encoder sees clean pictures, with nothing hidden. The last weights are model.safetensors, those of the best epoch on
    the test data best.safetensors; report.html shows curves, the confusion matrix and each class.

    Example: unveil finetune --run runs/photos --data labelled/ --test-data held-out/ --out runs/photos-classes
    """

    data: str
    """Labelled pictures: a folder for each class, a parquet file with columns image and label, `digits:train`, or a table: a
    .csv or .parquet with a column `path`, and `label` or what --label-columns names."""
    epochs: int | None = None
    """Passes over the data. Default: the preset's, 50; MAE's 100 for B."""
    batch_size: int | None = None
    """Clips in one step. Default: the preset's, 64 for small and 1,024 for the others."""
    blr: float | None = None
    """Base learning rate; the learning rate is blr * batch size / 256. Default: the preset's, 4e-3 for small."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. Default: the preset's, 3 for small and 5 for the others."""
    crop_scale: float | None = None
    """Smallest share of a picture's area that a random crop keeps; 1 for no cropping. Default: the preset's, 0.4 for small
    and 0.08 for the others; 1 if it was pre-trained with neither cropping nor mirroring, as on digits."""
    flip: bool | None = None
    """Mirror half of the pictures. Default: as it was pre-trained."""
    ema_decays: tuple[float, ...] | None = None
    """Decay of a running average of the weights, which is then what is tested and saved as model.safetensors, with the
    weights as trained beside it as last.safetensors. One at most. Default: none."""
    test_data: str | None = None
    """Labelled test data, with no class that --data lacks. Default: a random fifth of --data is held out, of each
    class if there are classes."""
    task: Task = "single"
    """single: one of several classes. multi: any number of labels. regression: numbers. The last two need a table, a .csv or
    .parquet with a column `path`."""
    label_columns: tuple[str, ...] = ("label",)
    """Columns of the table. single: the class, a name or a number. multi: one column of labels with | between them, or a
    column of 0 and 1 for each. regression: a number in each."""
    labels_per_class: int | None = None
    """Train on this many of each class, drawn by the seed. Default: on all."""
    from_scratch: bool = False
    """Draw the weights at random instead: the same network and training without pre-training, to compare with."""
    image_size: str | None = None
    """Height and width in pixels, one number or 64x48. Default: the pre-trained model's. Positions are resampled."""
    preset: Preset | None = None
    """Numbers of the training: small, ours for thousands of pictures; B, L, H, MAE's for ImageNet. Default: small below 20,000
    pictures and for Nano and Micro, else by the encoder's size."""
    pool: Literal["mean", "class"] | None = None
    """What the head reads: the mean of the patch tokens (MAE's global pool), or of the class tokens. Default: mean; class
    for UMD's family, which trains them as its summary."""

    layer_decay: float | None = None
    """A block's learning rate is that of the one above it times this."""
    drop_path: float | None = None
    """Probability that a picture skips a residual branch of the last block; less in those before."""
    mixup: float | None = None
    """Blend pairs of pictures and their labels: the parameter of the Beta distribution, 0 for never."""
    cutmix: float | None = None
    """Put a part of one picture into another, likewise; with both, each batch gets one of them."""
    label_smoothing: float | None = None
    """Share of the probability that is spread over all classes."""
    randaugment_ops: int | None = None
    """Random changes of colour and shape, each made or not by a coin."""
    randaugment_magnitude: int | None = None
    """How strong these are, 0 to 10."""
    erase: float | None = None
    """Probability that a rectangle of a picture becomes noise."""
    weight_decay: float | None = None
    """Of AdamW, on matrices; biases, norms, class tokens and positions have none. Default: the preset's, 0.05."""
    eval_epochs: int | None = None
    """Epochs between evaluations on the test data. Default: a 25th of all."""

    def __post_init__(self) -> None:
        check_choice("--task", "task", self.task, Task)
        if self.preset is not None:
            check_choice("--preset", "preset", self.preset, Preset)
        if isinstance(self.label_columns, str):
            raise ValueError(f"label_columns={self.label_columns!r} is one string; give a tuple of names.")


OWN = (
    "layer_decay",
    "drop_path",
    "mixup",
    "cutmix",
    "label_smoothing",
    "randaugment_ops",
    "randaugment_magnitude",
    "erase",
    "weight_decay",
)


def training_of(options: Finetune, recipe: Recipe, num_samples: int) -> FineTuning:
    """The preset with what the user says in its place.

    Raises:
        ValueError: an option is out of its range, or does not fit the task or the pictures.
    """
    preset = options.preset or finetuning.preset_of(recipe.size, num_samples)
    training = finetuning.PRESETS[preset]
    given = {name: getattr(options, name) for name in OWN if getattr(options, name) is not None}
    if options.task == "regression":
        for name in ("label_smoothing", "mixup", "cutmix"):
            if given.get(name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {given[name]} is for classes and labels; numbers are not blended. Drop it."
                )
            given[name] = 0.0
        given.setdefault("randaugment_ops", 0)  # a number may be of the colours or places that it changes
    if recipe.clip.channels not in (1, 3):
        if given.get("randaugment_ops"):
            raise ValueError(
                f"--randaugment-ops {given['randaugment_ops']} needs pictures of 1 or 3 channels, but these have "
                f"{recipe.clip.channels}. Drop it."
            )
        given["randaugment_ops"] = 0
    if not recipe.training.flip:  # whatever was pre-trained without mirroring, as text
        given["flip"] = False
    if not recipe.training.flip and recipe.training.crop_scale == 1:  # digits
        given["crop_scale"] = 1.0
        given.setdefault("randaugment_ops", 0)  # eight pixels leave nothing to shear
    training = dataclasses.replace(training, **given)
    if len(options.ema_decays or ()) > 1:
        raise ValueError(
            f"--ema-decays {' '.join(str(d) for d in options.ema_decays or ())}: fine-tuning keeps one running average, "
            "which is what it evaluates. Give one."
        )
    changed = planned(training, options)
    assert isinstance(changed, FineTuning)
    return changed


def split(options: Finetune, recipe: Recipe) -> tuple[Source, Truth, Source, Truth, int]:
    """Training and test samples with their truth, samples without a label left out, and how many of --data these are.

    Raises:
        ValueError: there are no labels, or too few samples or classes, or the two sets do not fit each other.
    """
    source = source_for(options.data, recipe.clip)
    check_classes(source)
    truth = truth_of(source, options.task, options.label_columns)
    known = [i for i in range(len(source)) if truth.known[i]]
    if options.test_data is None:
        held = _held_out(known, truth, options)
        files = files_of(source)
        there = {files[i] for i in held}
        held |= {i for i in known if files[i] in there}  # all rows of a file are on one side
        if not held:
            raise ValueError(
                f"{options.data} has {len(known)} labelled samples, too few to hold some out. Give --test-data."
            )
        rows, test_rows = [i for i in known if i not in held], sorted(held)
        test, test_truth = source, truth
    else:
        test = source_for(options.test_data, recipe.clip)
        test_truth = truth_of(test, options.task, options.label_columns, truth.outputs)
        rows, test_rows = known, [i for i in range(len(test)) if test_truth.known[i]]
        if not test_rows:
            raise ValueError(f"{options.test_data} has no labelled samples, so nothing can be tested. Give labels.")
    if options.labels_per_class is not None:
        rows = _some_of_each(rows, truth, options)
    if options.task == "single":
        there = Counter(truth.values[rows].tolist())
        empty = [name for c, name in enumerate(truth.outputs) if not there[c]]
        if empty:
            raise ValueError(
                f"{options.data} has no picture of the class {empty[0]!r} to train on"
                + (f", nor of {len(empty) - 1} others" if len(empty) > 1 else "")
                + ". Add some, or remove the class."
            )
    return (
        Chosen(source, rows),
        chosen_truth(truth, rows),
        Chosen(test, test_rows),
        chosen_truth(test_truth, test_rows),
        len(source) - len(known),
    )


def _held_out(known: list[int], truth: Truth, options: Finetune) -> set[int]:
    """A random fifth of the labelled samples, of each class if there are classes; one of a class stays for training."""
    order = torch.randperm(len(known), generator=draws.generator(options.seed, "held out")).tolist()
    shuffled = [known[i] for i in order]
    if options.task != "single":
        return set(shuffled[: len(known) // 5])
    members: dict[int, list[int]] = {}
    for i in shuffled:
        members.setdefault(int(truth.values[i]), []).append(i)
    return {i for mine in members.values() for i in mine[: min(round(len(mine) / 5), len(mine) - 1)]}


def _some_of_each(rows: list[int], truth: Truth, options: Finetune) -> list[int]:
    number = options.labels_per_class
    assert number is not None
    if options.task != "single" or number < 1:
        raise ValueError(f"--labels-per-class {number} with --task {options.task}: give at least 1, of single classes.")
    order = torch.randperm(len(rows), generator=draws.generator(options.seed, "few labels")).tolist()
    taken: Counter[int] = Counter()
    chosen = []
    for i in order:
        label = int(truth.values[rows[i]])
        if taken[label] < number:
            taken[label] += 1
            chosen.append(rows[i])
    for c, name in enumerate(truth.outputs):
        if taken[c] < number:
            raise ValueError(
                f"--labels-per-class {number}, but the class {name!r} has {taken[c]} to train on. Use {taken[c]} or fewer."
            )
    return sorted(chosen)


def _check_readable(samples: Samples, truth: Truth) -> None:
    """Refuse a class of which no picture to train on can be read; looks no further than each class's first readable one."""
    if truth.values.ndim > 1:
        return
    read: dict[int, bool] = {}
    first: dict[int, str] = {}
    for i, label in enumerate(truth.values.tolist()):
        if not read.get(label):
            sample = samples[0, i, i]
            read[label] = sample.values is not None
            if sample.problem is not None:
                first.setdefault(label, f"{sample.problem.where}: {sample.problem.reason}")
    for label, readable in read.items():
        if not readable:
            raise ValueError(
                f"No picture of the class {truth.outputs[label]!r} can be read; the first problem: {first[label]}. Mend them, "
                "or remove the class."
            )


def _digest(source: Source, truth: Truth, test: Source, test_truth: Truth) -> str:
    """What tells these samples and labels from others, so that a run goes on with its own only."""
    digest = hashlib.sha256()
    for part, wanted in ((source, truth), (test, test_truth)):
        for i, value in enumerate(wanted.values.tolist()):
            digest.update(f"{part.where(i)}\n{value}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def finetune(options: Finetune, on_progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Run `unveil finetune`; see `Finetune` for the options and `train` for what is returned, and:

    Returns:
        "start", the pre-trained model's recipe; "loaded" of "tensors", how many are its; "task", "outputs", "train_samples",
        "test_samples", "last" and "best": numbers of the test set by the last weights and by those of the best epoch.

    Raises:
        ValueError: the data has no labels that fit the task, or an option is out of its range.
    """
    model, _ = load_any(options.run)
    recipe = model.recipe
    pool = model.recognition.pool if isinstance(model, Recognizer) else usual_pool(recipe)
    if options.image_size is not None:
        height, width = parse_image_size(options.image_size)
        recipe = dataclasses.replace(recipe, clip=dataclasses.replace(recipe.clip, height=height, width=width))
    if recipe.network.positions == "sincos":  # trained from here on, as in MAE's fine-tuning
        recipe = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, positions="learned"))
    if options.eval_epochs is not None and options.eval_epochs < 1:
        raise ValueError(f"--eval-epochs {options.eval_epochs}: evaluate after every epoch (1), or after several.")
    source, truth, test, test_truth, unlabelled = split(options, recipe)
    if options.task == "regression" and len(test) < 2:
        raise ValueError(
            f"{len(test)} test sample has no spread to be explained, which R2 measures. Give more --test-data."
        )
    training = training_of(options, recipe, len(source))
    training = dataclasses.replace(training, batch_size=min(training.batch_size, len(source)))
    world = Spread().world
    if (training.mixup or training.cutmix) and training.batch_size < 2 * options.accumulate * world:
        processes = f" over {world} processes" if world > 1 else ""
        raise ValueError(
            f"--accumulate {options.accumulate}{processes} leaves single pictures of a batch of {training.batch_size}, and "
            "MixUp and CutMix blend two. Use fewer pieces, or --mixup 0 --cutmix 0."
        )
    recognition = Recognition(
        task=options.task,
        outputs=truth.outputs,
        pool=options.pool or pool,
        offset=truth.offset,
        scale=truth.scale,
        training=training,
    )
    start = "from scratch" if options.from_scratch else str(options.run)
    _, samples, run = prepare(
        dataclasses.replace(recipe, training=training), source, options, truth.outputs, start=start
    )
    both = decoded_bytes(source) + decoded_bytes(test)
    test_samples = Samples(test, recipe.clip, run.seed, None, cache=samples.cache and both < CACHE_LIMIT)
    if all(test_samples[0, i, i].values is None for i in range(min(16, len(test)))):
        problem = test_samples[0, 0, 0].problem
        raise ValueError(f"The first samples of the test data cannot be read: {problem}. Are these the right files?")
    _check_readable(samples, truth)
    initial = tensors_for(model, recipe, recognition)
    if options.from_scratch:  # but for a fixed table of positions, which is where learned ones begin too
        fixed = model.recipe.network.positions == "sincos"
        initial = {name: value for name, value in initial.items() if fixed and name == POSITIONS + "pos_embed"}
    eval_epochs = options.eval_epochs or max(1, training.epochs // 25)
    with torch.device("meta"):
        new = Recognizer(recipe, recognition).state_dict()

    def make() -> RecognitionJob:
        return RecognitionJob(
            recipe, recognition, run, initial, truth.values, test_samples, test_truth.values, eval_epochs
        )

    outcome = run_job(
        make, to_dict(recipe), samples, run, on_progress, recognition=to_dict(recognition),
        test=options.test_data or "a fifth", digest=_digest(source, truth, test, test_truth),
        pieces=world * options.accumulate if training.mixup or training.cutmix or training.drop_path else None,
    )  # fmt: skip
    if "rank" in outcome:
        return outcome
    tuned = ", fine-tuned" if isinstance(model, Recognizer) else ""
    result = {
        **outcome,
        "start": "random weights" if options.from_scratch else f"{model.recipe.name} {model.recipe.size}{tuned}",
        "loaded": len(initial),
        "tensors": len(new),
        "task": recognition.task,
        "outputs": list(recognition.outputs),
        "train_samples": len(source),
        "test_samples": len(test),
        "unlabelled": unlabelled,
        "trained_on_too": trained_on_too(source, test),
    }
    if not outcome["finished"]:
        return result
    network, _ = load_recognizer(run.out / WEIGHTS, run.device)
    outputs, wanted, problems = told(network, test_samples, test_truth.values, run, training.batch_size)
    result["last"] = score(recognition, outputs, wanted)
    result["each"] = score_each(recognition, outputs, wanted)
    result["always_the_same"] = always_the_same(recognition, wanted)
    result["test_samples"] = len(wanted)
    result["test_problems"] = [{"where": problem.where, "what": problem.reason} for problem in problems]
    matrix = None
    if recognition.task == "single":
        matrix = confusion(outputs.argmax(1), wanted, len(recognition.outputs))
        result["per_class_accuracy"] = {
            name: 100 * row[c].item() / row.sum().item() if row.sum() else None
            for c, (name, row) in enumerate(zip(recognition.outputs, matrix, strict=True))
        }
        result["confusion"] = matrix.tolist()
    write_atomically(run.out / EVALUATION, lambda part: part.write_text(json.dumps(result, indent=2) + "\n"))
    write_report(run.out / REPORT, run.out, recognition, result, matrix)
    return {**result, "best_file": str(run.out / BEST)}
