"""How good generated pictures are beside a reference: ADM's FID, sFID, Inception score, precision and recall, and KID."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unveil.checkpoint import pick_device
from unveil.inception import (
    INCEPTION,
    KEPT,
    RESIZES,
    SPLIT,
    Inception,
    Reference,
    Resize,
    check_installed,
    look,
    look_at_reference,
    read_reference,
    statistics_folder,
)
from unveil.metric_weights import FromWeights, find_weights_of
from unveil.metrics import gaussian_distance
from unveil.picture_sets import SAMPLES, FromSource, PictureSet, arrays_of, is_npz, open_pictures
from unveil.sources import as_text

ENOUGH = 10_000  # pictures below which FID says more of their number than of what they show
NEIGHBOURS = 3  # of precision and recall: ADM's
KID_SUBSET = 1_000  # torch-fidelity's
NAMED = 3  # of the files that could not be used


@dataclass(frozen=True, kw_only=True)
class EvaluateGeneration(FromWeights):
    """Compare generated pictures with real ones: FID, sFID, Inception score, precision and recall by ADM's protocol, and KID.

    ADM's numbers are of 50,000 samples beside all training pictures; make as many by `unveil generate`. What is seen in the
    reference is kept in a file, so that it is looked at once. It needs `pip install "unveil[evaluate]"`, and the network's
    weights, which --download fetches.

    Example: unveil evaluate generation --images made/ --reference photos/ --download
    """

    images: str
    """What was generated: a folder as `unveil generate` writes it, its samples.npz (arr_0, uint8), or other data as for
    pretrain. All of one size."""
    reference: str
    """Real pictures, as for pretrain; they are brought to the size of the generated ones. Or an .npz: ADM's reference batches,
    other statistics with mu and sigma, or the file that an earlier comparison names."""
    resize: Resize = "tf1"
    """How pictures come to the network's 299 pixels. tf1: bilinear without antialiasing, ADM's. clean: antialiased bicubic,
    clean-fid's. Numbers of the two do not compare."""
    cache: Path | None = None
    """Folder for what was seen in references. Default: ~/.cache/unveil/statistics."""
    seed: int = 0
    """Draws the subsets of KID, and the 10,000 reference pictures of precision, recall and KID if there are more."""
    batch_size: int = 32
    """Pictures at once; no effect on the result."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def _size_of(pictures: PictureSet) -> tuple[int, int]:
    """Height and width of the first picture that can be read."""
    for _, picture in pictures:
        return picture.shape[1], picture.shape[2]
    raise ValueError(f"No picture of {pictures.name} can be read, so there is nothing to compare.")


def _of_one_size(pictures: PictureSet, size: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    for number, picture in pictures:
        if tuple(picture.shape[1:]) != size:
            raise ValueError(
                f"{pictures.name} has pictures of {size[1]} x {size[0]} and of {picture.shape[2]} x {picture.shape[1]} pixels; "
                "generated ones have one size. Bring them to one, or remove what was not generated."
            )
        yield number, picture


def _reference(
    options: EvaluateGeneration, inception: Inception, size: tuple[int, int], on_progress: Callable[[int, int], None]
) -> tuple[Reference, list[str]]:
    """What is compared with, and what to tell of its files; on_progress is told the pictures looked at and their number, if
    there are any to look at."""
    folder = (options.cache or statistics_folder()).expanduser()

    def looked_at(pictures: PictureSet) -> Reference:
        return look_at_reference(inception, pictures, size, folder, options.batch_size, options.seed, on_progress)

    if not is_npz(options.reference):
        pictures = open_pictures(options.reference)
        reference = looked_at(pictures)
        return reference, _unusable(pictures, len(pictures) if reference.n is None else reference.n)
    path = Path(options.reference).expanduser()
    names = arrays_of(path)
    if not {"mu", "sigma"} <= names:
        return looked_at(open_pictures(options.reference)), []
    given = read_reference(path, inception)
    if given.kept is not None or SAMPLES not in names:
        return given, []
    # ADM's reference batches: statistics of all training pictures, and 10,000 pictures for precision and recall
    some = looked_at(open_pictures(options.reference))
    return Reference(given.pooled, given.spatial, given.n, some.kept, some.file, some.reused, some.resized), []


def _unusable(pictures: PictureSet, used: int) -> list[str]:
    """What to tell of files that are no pictures, or could not be read.

    used: how many of the pictures could. Of a reference that was looked at earlier nobody knows which the others are.
    """
    # `unveil generate --npz` writes the same pictures beside them once more
    opened = (
        [bad for bad in pictures.source.skipped if not bad.where.endswith(".npz")]
        if isinstance(pictures, FromSource)
        else []
    )
    number = len(opened) + len(pictures) - used
    if not number:
        return []
    some = "; ".join(f"{as_text(bad.where)}: {bad.reason}" for bad in [*pictures.skipped, *opened][:NAMED])
    return [f"Files of {pictures.name} that could not be used: {number}{', as ' if some else ''}{some}."]


def inception_score(logits: Tensor) -> float:
    """ADM's: the mean over parts of 5,000 pictures in their order, the last of which may be smaller."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    parts = [isc_features_to_metric(part, splits=1, shuffle=False) for part in logits.split(SPLIT)]
    return float(np.mean([part[KEY_METRIC_ISC_MEAN] for part in parts]))


def precision_and_recall(made: Tensor, real: Tensor) -> dict[str, float]:
    """Kynkäänniemi et al. 2019, arXiv 1904.06991, with three neighbours in Inception's pooled features, as ADM has them.

    ADM computes distances in float16; these are in float32.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # a thousand rows at a time, as the distances of 50,000 pictures take 10 GB
    found = prc_features_to_metric(
        made, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=1_000, save_cpu_ram=True, verbose=False
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def kernel_distance(made: Tensor, real: Tensor, seed: int) -> dict[str, float]:
    """KID, Bińkowski et al. 2018, arXiv 1801.01401: mean and deviation over 100 subsets of 1,000, or of all if fewer."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET, len(made), len(real))
    found = kid_features_to_metric(made, real, kid_subset_size=size, rng_seed=seed, verbose=False)
    return {"mean": found[KEY_METRIC_KID_MEAN], "std": found[KEY_METRIC_KID_STD], "subset": size}


def evaluate_generation(
    options: EvaluateGeneration, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Run `unveil evaluate generation`; on_progress is told the pictures looked at and their number.

    Returns:
        "scores": "fid", "sfid", "inception_score", "precision", "recall" and "kid" ("mean", "std", "subset"), those of them
        that the reference allows; what they belong to: "images", "num_images", "image_size", "reference", "num_reference",
        "num_reference_features", "resize", "resize_means", "extractor", "seed"; "statistics", the file in which the reference
        is kept, and "statistics_reused"; "notices".

    Raises:
        ValueError: pictures, reference or weights are missing or do not fit each other.
    """
    for name, least in (("batch_size", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: use {least} or more.")
    check_installed()
    images = open_pictures(options.images)
    size = _size_of(images)
    weights = find_weights_of(INCEPTION, options)
    inception = Inception(weights, options.resize, pick_device(options.device))
    before = 0

    def tell_reference(done: int, total: int) -> None:
        nonlocal before
        before = total
        if on_progress is not None:
            on_progress(done, total + len(images))

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(before + done, before + len(images))

    # The reference first, so that what is wrong with it is told before thousands of pictures are looked at.
    reference, notices = _reference(options, inception, size, tell_reference)
    looked = look(inception, _of_one_size(images, size), options.batch_size, lambda number: True, tell)

    scores: dict[str, Any] = {"fid": gaussian_distance(looked.pooled, reference.pooled)}
    if reference.spatial is not None:
        scores["sfid"] = gaussian_distance(looked.spatial, reference.spatial)
    scores["inception_score"] = inception_score(looked.logits)
    kept = reference.kept
    if kept is not None and min(len(kept), looked.n) > NEIGHBOURS:
        scores |= precision_and_recall(looked.kept, kept)
    if kept is not None and min(len(kept), looked.n) > 1:
        scores["kid"] = kernel_distance(looked.kept, kept, options.seed)
    return {
        "images": options.images,
        "num_images": looked.n,
        "image_size": list(size),
        "reference": options.reference,
        "num_reference": reference.n,
        "num_reference_features": 0 if kept is None else len(kept),
        "resize": options.resize,
        "resize_means": RESIZES[options.resize],
        "extractor": {"name": "inception-v3-compat", **weights.told()},
        "seed": options.seed,
        "scores": scores,
        "statistics": None if reference.file is None else str(reference.file),
        "statistics_reused": reference.reused,
        "notices": [
            *_unusable(images, looked.n),
            *notices,
            *_notices(options, images, size, looked.n, reference, weights.published),
        ],
    }


def _notices(
    options: EvaluateGeneration,
    images: PictureSet,
    size: tuple[int, int],
    n: int,
    reference: Reference,
    published: bool,
) -> list[str]:
    notices = []
    if not published:
        notices.append(
            f"The network's weights are not those that everybody has (sha256 {INCEPTION.sha256}...), so these numbers compare "
            "among themselves alone."
        )
    few = [
        f"{count:,} {what}"
        for what, count in (("pictures", n), ("of the reference", reference.n))
        if count and count < ENOUGH
    ]
    if few:
        notices.append(
            f"{' and '.join(few)} are few: below some {ENOUGH:,}, FID and sFID are biased upward, so they compare between "
            "equal numbers of pictures alone; KID is not biased."
        )
    if reference.resized:
        notices.append(
            f"{reference.resized:,} pictures of the reference had another size and were brought to {size[1]} x {size[0]} by "
            "antialiased bicubic resize and a centre crop, as for training."
        )
    if reference.n is not None and reference.n > KEPT and reference.kept is not None:
        notices.append(
            f"Precision, recall and KID are beside {len(reference.kept):,} of the reference's pictures, drawn by the seed."
        )
    if n > SPLIT and images.by_class():
        notices.append(
            f"{images.name} is sorted by class, and the Inception score is the mean over parts of {SPLIT:,} in their order, so "
            "it comes out too low. Number the pictures so that classes take turns, as `unveil generate` does."
        )
    if reference.spatial is None:
        notices.append(f"{options.reference} has no mu_s and sigma_s, so there is no sFID.")
    if reference.kept is None:
        notices.append(f"{options.reference} has no pictures, so there is no precision, recall or KID.")
    elif min(len(reference.kept), n) <= NEIGHBOURS:
        notices.append(
            f"Precision and recall need more than {NEIGHBOURS} pictures on both sides, so they are left out."
        )
    return notices
