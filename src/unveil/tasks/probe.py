"""How much of the labels the frozen features hold, by ridge regression and by nearest neighbours."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unveil import draws
from unveil.checkpoint import FromRun, load_encoder, pick_device
from unveil.config import Clip
from unveil.data import Samples, batches, source_for
from unveil.features import Pool, encoder_features, extract, raw_pixels, usual_pool
from unveil.metrics import accuracy, choose_ridge, fewshot_predict, knn_predict, ridge_predict
from unveil.model import MaskedDiffusionAutoencoder

NEIGHBOURS = 20
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
FEW_LABEL_DRAWS = 5
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
    method: Literal["linear", "knn", "fewshot"] | None = None
    """linear: ridge with a chosen penalty. knn: nearest neighbours. fewshot: UMD's closed-form ridge with its fixed penalty,
    on at most 100 labels of each class unless --labels-per-class says otherwise, the mean of five draws (UMD's own numbers
    are of one). Default: linear and knn."""
    pool: Pool | None = None
    """mean of the patch tokens, or of the class tokens. Default: what the recipe trains: class for UMD's family, else mean."""
    time: float = 0.0
    """Put noise of this time on the pictures first, but not for raw pixels. UMD's authors probe models that only ever saw
    noise (DiT, MaskDiT) at 51."""
    k: int | None = None
    """Neighbours that vote, for knn. Default 20."""
    baselines: bool = True
    """Also probe raw pixels and the untrained encoder; of an encoder whose blocks start as the identity (adaLN-zero) the
    patches, since its class tokens are the same for every picture then."""
    seed: int = 0
    """Draws the few labels, and the untrained encoder."""
    batch_size: int = 256
    """Clips encoded at once; no effect on the result."""
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


def _few(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of per_class random samples of each class; of a class that has fewer, all of them."""
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen)


def _scores(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, options: Probe) -> dict[str, float]:
    """Accuracy of each method that was asked for, in percent, the mean over draws of the labels."""
    num_classes = int(max(labels.max(), truth.max())) + 1
    per_class = options.labels_per_class
    if per_class is not None:
        _check_enough(Counter(labels.tolist()), per_class)
    elif options.method == "fewshot":
        per_class = FEW_SHOTS
    if per_class is None:
        subsets = [torch.arange(len(labels))]
    else:
        generators = [draws.generator(options.seed, i, "few labels") for i in range(FEW_LABEL_DRAWS)]
        subsets = [_few(labels, per_class, g) for g in generators]
    methods = ("linear", "knn") if options.method is None else (options.method,)
    scores: dict[str, list[float]] = {method: [] for method in methods}
    for rows in subsets:
        x, y = train[rows], labels[rows]
        for method in methods:
            if method == "fewshot":
                predictions = fewshot_predict(x, y, test, num_classes)
            elif method == "knn":
                predictions = knn_predict(x, y, test, num_classes, options.k or NEIGHBOURS)
            else:
                # shuffled, because the penalty is chosen on every fifth row and few labels come sorted by class
                order = torch.randperm(len(x), generator=draws.generator(options.seed, "order"))
                penalty = choose_ridge(x[order], y[order], num_classes, PENALTIES)
                predictions = ridge_predict(x, y, test, num_classes, penalty)
            scores[method].append(accuracy(predictions, truth))
    return {method: sum(values) / len(values) for method, values in scores.items()}


def _labelled(data: str, clip: Clip) -> Samples:
    return Samples(source_for(data, clip, labelled=True), clip, seed=0, training=None)


def probe(options: Probe, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil probe`; on_progress is told the samples encoded and their number.

    Returns:
        For each kind of features, the accuracy of each method in percent, and the number of samples and labels.

    Raises:
        ValueError: the data has no labels, the classes differ, or there are fewer labels than asked for.
    """
    if options.k is not None and options.k < 1:
        raise ValueError(f"--k {options.k}: at least one neighbour must vote.")
    if options.k is not None and options.method not in (None, "knn"):
        raise ValueError(f"--k belongs to --method knn, but it is {options.method}. Drop one of the two.")
    if options.labels_per_class is not None and options.labels_per_class < 1:
        raise ValueError(f"--labels-per-class {options.labels_per_class}: train on at least one of each class.")
    device = pick_device(options.device)
    model, _ = load_encoder(options.run, device)
    clip = model.recipe.clip
    train_samples = _labelled(options.data, clip)
    functions = {"encoder": encoder_features(model, options.pool, options.time, options.seed)}
    if options.baselines:
        pool_at_start = "mean" if model.recipe.condition.time == "adaln" else options.pool
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            untrained = MaskedDiffusionAutoencoder(model.recipe).to(device).eval()
        functions |= {
            "untrained encoder": encoder_features(untrained, pool_at_start, options.time, options.seed),
            "raw pixels": raw_pixels,
        }

    if options.labels_per_class is not None:  # before the long part; a held-out share is only known after it
        labels_there = [train_samples.source.label(i) for i in range(len(train_samples))]
        _check_enough(Counter(label for label in labels_there if label is not None), options.labels_per_class)
    test_samples = None if options.test_data is None else _labelled(options.test_data, clip)
    if test_samples is not None and train_samples.source.classes != test_samples.source.classes:
        raise ValueError(
            f"{options.data} has the classes {train_samples.source.classes}, but {options.test_data} has "
            f"{test_samples.source.classes}. Use the same."
        )
    total = len(train_samples) + (0 if test_samples is None else len(test_samples))
    encoded = 0

    def count(num_samples: int) -> None:
        nonlocal encoded
        encoded += num_samples
        if on_progress is not None:
            on_progress(encoded, total)

    def features_of(samples: Samples) -> tuple[list[Tensor], Tensor]:
        loader = batches(samples, options.batch_size, 0, 0, shuffle=False, drop_last=False, num_workers=options.workers)
        features, classes = extract(loader, *functions.values(), device=device, on_batch=count)
        labelled = classes >= 0  # a parquet file may have rows without a label
        return [x[labelled] for x in features], classes[labelled]

    train, labels = features_of(train_samples)
    if test_samples is None:
        held = torch.zeros(len(labels), dtype=torch.bool)
        held[torch.randperm(len(labels), generator=draws.generator(options.seed, "held out"))[: len(labels) // 5]] = (
            True
        )
        test, truth = [x[held] for x in train], labels[held]
        train, labels = [x[~held] for x in train], labels[~held]
        if not len(truth):
            raise ValueError(f"{options.data} has {len(labels)} samples, too few to hold some out. Give --test-data.")
    else:
        test, truth = features_of(test_samples)
    results = {name: _scores(x, labels, z, truth, options) for name, x, z in zip(functions, train, test, strict=True)}
    return {
        "results": results,
        "train_samples": len(labels),
        "test_samples": len(truth),
        "num_classes": len(train_samples.source.classes or ()),
        "labels_per_class": options.labels_per_class,
        "pool": options.pool or usual_pool(model.recipe),
        "time": options.time,
        "k": options.k or NEIGHBOURS,
    }
