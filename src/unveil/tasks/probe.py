"""How much of the labels the frozen features hold: by ridge regression, nearest neighbours, or a trained linear layer."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unveil import draws
from unveil.checkpoint import FromRun, pick_device
from unveil.config import Clip, check_choice
from unveil.data import Batch, Samples, Skipped, batches, chosen_batches, source_for
from unveil.features import Pool, encoder_features, extract, raw_pixels, untrained, usual_pool
from unveil.metrics import accuracy, choose_ridge, fewshot_predict, knn_predictions, ridge_predict
from unveil.probing import LARS_BATCH, LarsProbe
from unveil.recognizer import Recognizer, load_any, tuned_features
from unveil.sources import as_text, check_classes, files_of, trained_on_too

Method = Literal["linear", "knn", "fewshot", "lars"]
NEIGHBOURS = 20
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
FEW_LABEL_DRAWS = 5
LARS_EPOCHS = 90
LARS_STEPS = 2000  # at least, where features are encoded once, and an epoch of few samples costs next to nothing
FEW_SHOTS = 100  # labels of each class at most, as in UMD's published probe


@dataclass(frozen=True, kw_only=True)
class Probe(FromRun):
    """Measure the frozen encoder on labelled data: a linear probe (closed-form ridge) and k nearest neighbours.

    The same probes on raw pixels and on the untrained encoder are printed beside it. The ridge penalty is chosen on
    held-out training labels, for each kind of features by itself.

    Example: unveil probe --run runs/digits/diffmae --data digits:train --test-data digits:test --labels-per-class 10
    """

    data: str
    """Labelled training data: class folders, a parquet file with a label column, or `digits:train`."""
    test_data: str | None = None
    """Labelled test data with the same classes. Default: a random fifth of --data is held out."""
    labels_per_class: int | None = None
    """Train on this many labels of each class, mean of five draws. Default: on all."""
    method: Method | None = None
    """linear: ridge with a chosen penalty. knn: nearest neighbours. fewshot: UMD's closed-form ridge with its fixed penalty,
    on at most 100 labels of each class unless --labels-per-class says otherwise, the mean of five draws (UMD's own numbers
    are of one). lars: MAE's linear probe, a linear layer trained by LARS in batches of 16,384, for which --augment and
    --pool class are the published protocol. Default: linear and knn."""
    pool: Pool | None = None
    """mean of the patch tokens, or of the class tokens. Default: what the recipe trains: class for UMD's family, else mean."""
    time: float = 0.0
    """Put noise of this time on the pictures first, but not for raw pixels. UMD's authors probe models that only ever saw
    noise (DiT, MaskDiT) at 51."""
    k: tuple[int, ...] | None = None
    """Neighbours that vote, for knn, one number or several, as in --k 10 20 100 200; each votes with the weight
    exp(cosine similarity / 0.07). Default 20, or all if there are fewer."""
    epochs: int | None = None
    """Epochs of lars. Default 90, or without --augment as many as make 2,000 steps, for fewer than 16,384 samples are a single
    step an epoch."""
    augment: bool = False
    """For lars: encode new random crops, of 8 % of a picture or more, and mirror images in every epoch, as the published
    protocol does, at the cost of reading and encoding the data once for each epoch. Default: encode once, without."""
    baselines: bool = True
    """Also probe raw pixels and the untrained encoder; of an encoder whose blocks start as the identity (adaLN-zero) the
    patches, since its class tokens are the same for every picture then."""
    seed: int = 0
    """Draws the few labels, the untrained encoder, and the start, order and crops of lars."""
    batch_size: int = 256
    """Clips encoded at once; no effect on the result but for the last digits."""
    workers: int = 0
    """Processes that read data."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def _check_enough(available: Counter[int], per_class: int) -> None:
    """Refuse to draw more labels of a class than it has."""
    fewest = min(available, key=lambda label: available[label])
    if available[fewest] < per_class:
        raise ValueError(
            f"--labels-per-class {per_class}, but class {fewest} has {available[fewest]} training samples. "
            f"Use {available[fewest]} or fewer."
        )


def _check_neighbours(ks: tuple[int, ...], num_samples: int) -> None:
    """Refuse more neighbours than there are training samples."""
    if max(ks) > num_samples:
        raise ValueError(
            f"--k {max(ks)}: only {num_samples} training samples can vote. Use {num_samples} or fewer neighbours, or more data."
        )


def _few(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of per_class random samples of each class; of a class that has fewer, all of them."""
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen)


def _subsets(labels: Tensor, options: Probe) -> list[Tensor]:
    """The training rows of each draw: all of them once, or few labels five times."""
    per_class = options.labels_per_class
    if per_class is not None:
        _check_enough(Counter(labels.tolist()), per_class)
    elif options.method == "fewshot":
        per_class = FEW_SHOTS
    if per_class is None:
        return [torch.arange(len(labels))]
    generators = [draws.generator(options.seed, i, "few labels") for i in range(FEW_LABEL_DRAWS)]
    return [_few(labels, per_class, g) for g in generators]


def _scores(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, options: Probe) -> dict[str, float]:
    """Accuracy of each method that was asked for, in percent, the mean over draws of the labels."""
    num_classes = int(max(labels.max(), truth.max())) + 1
    ks = options.k or (NEIGHBOURS,)
    scores: dict[str, list[float]] = {}

    def score(name: str, predictions: Tensor) -> None:
        scores.setdefault(name, []).append(accuracy(predictions, truth))

    for rows in _subsets(labels, options):
        x, y = train[rows], labels[rows]
        if options.method == "fewshot":
            score("fewshot", fewshot_predict(x, y, test, num_classes))
        if options.method in ("linear", None):
            # shuffled, because the penalty is chosen on every fifth row and few labels come sorted by class
            order = torch.randperm(len(x), generator=draws.generator(options.seed, "order"))
            penalty = choose_ridge(x[order], y[order], num_classes, PENALTIES)
            score("linear", ridge_predict(x, y, test, num_classes, penalty))
        if options.method in ("knn", None):
            if options.k is not None:
                _check_neighbours(options.k, len(x))
            for k, predictions in zip(ks, knn_predictions(x, y, test, num_classes, ks), strict=True):
                score("knn" if len(ks) == 1 else f"knn, k = {k}", predictions)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _check_options(options: Probe) -> None:
    if options.method is not None:
        check_choice("--method", "method", options.method, Method)
    ks = options.k
    if ks is not None and options.method not in (None, "knn"):
        raise ValueError(f"--k belongs to --method knn, but it is {options.method}. Drop one of the two.")
    if ks is not None and (not ks or min(ks) < 1):
        raise ValueError(f"--k {' '.join(map(str, ks))}: at least one neighbour must vote.")
    if ks is not None and len(set(ks)) < len(ks):
        raise ValueError(f"--k {' '.join(map(str, ks))}: a number comes twice. Give each once.")
    if options.method != "lars" and (options.epochs is not None or options.augment):
        name = "--augment" if options.augment else f"--epochs {options.epochs}"
        raise ValueError(f"{name} belongs to --method lars, but it is {options.method or 'linear and knn'}. Drop one.")
    if options.epochs is not None and options.epochs < 1:
        raise ValueError(f"--epochs {options.epochs}: train for at least one.")
    if options.labels_per_class is not None and options.labels_per_class < 1:
        raise ValueError(f"--labels-per-class {options.labels_per_class}: train on at least one of each class.")


def _check_labels(options: Probe, samples: Samples) -> int:
    """How many samples will be trained on if all can be read.

    Refuses more labels or neighbours than there are, before the long part; a held-out share is only known after it.
    """
    labels = [samples.source.label(i) for i in range(len(samples))]
    available = Counter(label for label in labels if label is not None)
    num_samples = available.total()
    if options.test_data is None:
        num_samples -= num_samples // 5
    if options.labels_per_class is not None:
        _check_enough(available, options.labels_per_class)
        num_samples = min(num_samples, options.labels_per_class * len(available))
    if options.k is not None:
        _check_neighbours(options.k, num_samples)
    return num_samples


def _train_lars(
    options: Probe,
    names: Iterable[str],
    train: list[Tensor],
    labels: Tensor,
    num_classes: int,
    device: str,
    fresh: Callable[[int, Tensor], list[Tensor]] | None,
) -> dict[str, list[LarsProbe]]:
    """A probe for each kind of features and each draw of the labels, all trained side by side.

    fresh(epoch, rows) gives the features of augmented pictures at these rows.
    """
    subsets = _subsets(labels, options)
    epochs = options.epochs or LARS_EPOCHS
    if options.epochs is None and fresh is None:
        epochs = max(epochs, math.ceil(LARS_STEPS / max(1, len(subsets[0]) // LARS_BATCH)))
    used = torch.cat(subsets).unique()
    if fresh is not None:
        place = torch.full((len(labels),), -1)
        place[used] = torch.arange(len(used))
        subsets, labels = [place[rows] for rows in subsets], labels[used]
    probes = {
        name: [
            LarsProbe(rows, x.shape[1], num_classes, epochs=epochs, seed=options.seed, device=device)
            for rows in subsets
        ]
        for name, x in zip(names, train, strict=True)
    }
    for epoch in range(epochs):
        features = train if fresh is None else fresh(epoch, used)
        for trained, x in zip(probes.values(), features, strict=True):
            for each in trained:
                each.epoch(x, labels)
    return probes


def _labelled(data: str, clip: Clip) -> Samples:
    return Samples(source_for(data, clip, labelled=True), clip, seed=0, training=None)


def probe(options: Probe, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil probe`; on_progress is told the samples encoded and their number.

    Returns:
        "results": for each kind of features, the accuracy of each method in percent; the number of samples and labels; and
        how they were made. "lars": steps, batch size, and whether pictures were augmented, or None.

    Raises:
        ValueError: the data has no labels, the classes differ, or there are fewer labels or neighbours than asked for.
    """
    _check_options(options)
    device = pick_device(options.device)
    model, _ = load_any(options.run, device)
    clip, pool = model.recipe.clip, options.pool
    train_samples = _labelled(options.data, clip)
    check_classes(train_samples.source)
    if isinstance(model, Recognizer):
        functions = {"encoder": tuned_features(model, pool, options.time)}
        pool = model.recognition.pool
    else:
        functions = {"encoder": encoder_features(model, pool, options.time, options.seed)}
    if options.baselines:
        pool_at_start = "mean" if model.recipe.condition.time == "adaln" else pool
        at_start = untrained(model.recipe, options.seed, device)
        functions |= {
            "untrained encoder": encoder_features(at_start, pool_at_start, options.time, options.seed),
            "raw pixels": raw_pixels,
        }

    num_train = _check_labels(options, train_samples)
    test_samples = None if options.test_data is None else _labelled(options.test_data, clip)
    if test_samples is not None and train_samples.source.classes != test_samples.source.classes:
        raise ValueError(
            f"{options.data} has the classes {train_samples.source.classes}, but {options.test_data} has "
            f"{test_samples.source.classes}. Use the same."
        )
    total = len(train_samples) + (0 if test_samples is None else len(test_samples))
    if options.augment:
        draws_of_labels = 1 if options.labels_per_class is None else FEW_LABEL_DRAWS
        total += (options.epochs or LARS_EPOCHS) * min(num_train * draws_of_labels, len(train_samples))
    encoded = 0

    def count(num_samples: int) -> None:
        nonlocal encoded
        encoded += num_samples
        if on_progress is not None:
            on_progress(min(encoded, total), total)

    problems: list[Skipped] = []

    def noted(loader: Iterable[Batch]) -> Iterator[Batch]:
        for batch in loader:
            problems.extend(batch.problems)
            yield batch

    def features_of(samples: Samples) -> tuple[list[Tensor], Tensor, Tensor]:
        problems.extend(samples.source.skipped)
        loader = batches(samples, options.batch_size, 0, 0, shuffle=False, drop_last=False, num_workers=options.workers)
        features, classes, indices = extract(noted(loader), *functions.values(), device=device, on_batch=count)
        labelled = classes >= 0  # a parquet file may have rows without a label
        return [x[labelled] for x in features], classes[labelled], indices[labelled]

    train, labels, indices = features_of(train_samples)
    if test_samples is None:
        held = torch.zeros(len(labels), dtype=torch.bool)
        held[torch.randperm(len(labels), generator=draws.generator(options.seed, "held out"))[: len(labels) // 5]] = (
            True
        )
        files = files_of(train_samples.source)
        there = {files[i] for i in indices[held].tolist()}
        # all rows of a file are on one side
        held = torch.tensor([files[i] in there for i in indices.tolist()], dtype=torch.bool)
        test, truth = [x[held] for x in train], labels[held]
        train, labels, indices = [x[~held] for x in train], labels[~held], indices[~held]
        if not len(truth):
            raise ValueError(f"{options.data} has {len(labels)} samples, too few to hold some out. Give --test-data.")
    else:
        test, truth, _ = features_of(test_samples)

    if len(labels.unique()) < 2:
        first = (
            f"; the first of {len(problems)} problems: {problems[0].where}: {problems[0].reason}" if problems else ""
        )
        raise ValueError(
            f"{options.data} has one class that can be read, and to tell classes apart takes two{first}. Give more of them."
        )

    # as torchvision's RandomResizedCrop, and so MAE's linear probe, has it by default
    training = dataclasses.replace(model.recipe.training, crop_scale=0.08, flip=True)
    augmented = Samples(train_samples.source, clip, seed=options.seed, training=training)

    def fresh(epoch: int, rows: Tensor) -> list[Tensor]:
        wanted = indices[rows]
        loader = chosen_batches(augmented, wanted.tolist(), options.batch_size, epoch, options.workers)
        features, _, read = extract(loader, *functions.values(), device=device, on_batch=count)
        if not torch.equal(read, wanted):
            raise ValueError(
                f"Samples of {options.data} can no longer be read, though they could before: has it moved?"
            )
        return features

    lars = None
    if options.method == "lars":
        num_classes = int(max(labels.max(), truth.max())) + 1
        probes = _train_lars(options, functions, train, labels, num_classes, device, fresh if options.augment else None)
        results = {}
        for (name, trained), x in zip(probes.items(), test, strict=True):
            scores = [accuracy(each.predict(x), truth) for each in trained]
            results[name] = {"lars": sum(scores) / len(scores)}
        one = probes["encoder"][0]
        lars = {"steps": one.num_steps, "batch_size": one.batch_size, "augment": options.augment}
    else:
        results = {
            name: _scores(x, labels, z, truth, options) for name, x, z in zip(functions, train, test, strict=True)
        }
    return {
        "results": results,
        "train_samples": len(labels),
        "test_samples": len(truth),
        "num_classes": len(train_samples.source.classes or ()),
        "labels_per_class": options.labels_per_class,
        "pool": pool or usual_pool(model.recipe),
        "time": options.time,
        "k": list(options.k or (NEIGHBOURS,)),
        "lars": lars,
        "trained_on_too": 0 if test_samples is None else trained_on_too(train_samples.source, test_samples.source),
        "problems": [{"where": as_text(problem.where), "what": problem.reason} for problem in problems],
    }
