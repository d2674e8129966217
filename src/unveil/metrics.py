"""Arithmetic of probes, of repainting and of generated sets, each a named protocol."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Each dimension by the mean and deviation of the training features, (n, D), in float64."""
    mean, std = train.double().mean(0), train.double().std(0)
    return [(x.double() - mean) / (std + 1e-5) for x in (train, *others)]


def _ridge(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, penalties: Sequence[float]) -> list[Tensor]:
    """Predictions for each penalty; the normal equations, which cost most, are made once."""
    x, z = standardise(train, test)
    y = F.one_hot(labels, num_classes).double() * 2 - 1
    bias = y.mean(0)  # standardised features have mean 0, so the bias stands alone
    n, D = x.shape
    if n < D:  # the same solution from n equations instead of D, for raw pixels have thousands: X'(XX' + n l2 I)^-1 Y
        gram, similarity, identity = x @ x.T, z @ x.T, torch.eye(n, dtype=x.dtype)
        return [
            (similarity @ torch.linalg.solve(gram + n * l2 * identity, y - bias) + bias).argmax(1) for l2 in penalties
        ]
    gram, moments, identity = x.T @ x / n, x.T @ (y - bias) / n, torch.eye(D, dtype=x.dtype)
    return [(z @ torch.linalg.solve(gram + l2 * identity, moments) + bias).argmax(1) for l2 in penalties]


def ridge_predict(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, l2: float) -> Tensor:
    """Closed-form ridge regression to -1/+1 class targets on standardised features, with a bias that is not penalised.

    Args:
        train: (n, D), labels: (n,) in 0 .. num_classes - 1, test: (m, D).
        l2: penalty on the mean squared error's scale: (X'X / n + l2 I) W = X'Y / n.

    Returns:
        (m,) predicted classes.
    """
    return _ridge(train, labels, test, num_classes, [l2])[0]


def fewshot_predict(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, l2: float = 1024.0) -> Tensor:
    """The closed-form least-squares probe that UMD's numbers were made with: one penalty for all, and nothing chosen.

    X: the features by the training mean and deviation, and a last column of 100. W = (X'X + l2 I)^-1 X'Y with targets
    Y of -1/+1. The penalty is on the sum of squares, so it weighs less the more rows there are; `ridge_predict` has it on
    the mean. The column's weight is penalised too, but being large it hardly notices.

    UMD, arXiv 2406.17688, whose evaluator is Big Vision's few-shot probe with l2 = 1024.

    Args:
        train: (n, D), labels: (n,) in 0 .. num_classes - 1, test: (m, D).

    Returns:
        (m,) predicted classes.
    """
    train, test = train.double(), test.double()
    mean, std = train.mean(0), train.std(0, correction=0) + 1e-5  # of the n rows, where `standardise` divides by n - 1
    x, z = (F.pad((features - mean) / std, (0, 1), value=100.0) for features in (train, test))
    y = F.one_hot(labels, num_classes).double() * 2 - 1
    n, D = x.shape  # with the column
    identity = torch.eye(min(n, D), dtype=x.dtype, device=x.device)
    if n < D:  # the same from n equations: X'(XX' + l2 I)^-1 Y
        return (z @ x.T @ torch.linalg.solve(x @ x.T + l2 * identity, y)).argmax(1)
    return (z @ torch.linalg.solve(x.T @ x + l2 * identity, x.T @ y)).argmax(1)


def choose_ridge(train: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float]) -> float:
    """The penalty with the best accuracy on held-out training rows; the first on a tie.

    Rows are held out in turn, every fifth: in five folds, or in one where a fold has 2,000 rows and is precise enough.
    The rows must come in random order. With fewer rows than classes in a fold, the middle penalty is taken.
    """
    fold = torch.arange(len(train)) % 5
    if (fold == 4).sum() < num_classes:
        return penalties[len(penalties) // 2]
    right = torch.zeros(len(penalties), dtype=torch.long)
    for i in range(1 if len(train) >= 10_000 else 5):
        held = fold == i
        predictions = _ridge(train[~held], labels[~held], train[held], num_classes, penalties)
        right += torch.stack([(p == labels[held]).sum() for p in predictions])
    return penalties[int(right.argmax())]


def knn_predictions(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, ks: Sequence[int], temperature: float = 0.07
) -> list[Tensor]:
    """Weighted nearest neighbours by cosine, for several k at once: each of the k nearest votes exp(similarity / temperature).

    Wu et al. 2018, arXiv 1805.01978, as DINO's evaluation has it. Same shapes as `ridge_predict`, one result for each k; a
    k above the number of training rows takes all of them.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    predictions: list[list[Tensor]] = [[] for _ in ks]
    for chunk in test.split(1024):
        similarities = chunk @ train.T
        for kept, k in zip(predictions, ks, strict=True):  # a topk each: of equal ones, topk's choice depends on k
            similarity, nearest = similarities.topk(min(k, len(train)), dim=1)
            votes = torch.zeros(len(chunk), num_classes, dtype=torch.float64)
            # minus 1 keeps the exponent in range and changes no order
            votes.scatter_add_(1, labels[nearest], ((similarity - 1) / temperature).double().exp())
            kept.append(votes.argmax(1))
    return [torch.cat(kept) for kept in predictions]


def knn_predict(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, k: int, temperature: float = 0.07
) -> Tensor:
    """`knn_predictions` for one k."""
    return knn_predictions(train, labels, test, num_classes, [k], temperature)[0]


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of right answers, in percent."""
    return 100 * (predictions == labels).double().mean().item()


def confusion(predictions: Tensor, truth: Tensor, num_classes: int, ignore: int | None = None) -> Tensor:
    """How many samples or pixels of each true class (row) were named as each class (column), (K, K) int64.

    Args:
        predictions, truth: classes, of one shape and any integer dtype; where truth is `ignore`, nothing is counted.
    """
    known = torch.ones_like(truth, dtype=torch.bool) if ignore is None else truth != ignore
    pairs = truth[known].long() * num_classes + predictions[known].long()
    return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


def intersection_over_union(counts: Tensor) -> Tensor:
    """IoU of each class from its `confusion`, (K,) float64: right pixels over those of the class or named so.

    NaN for a class that has no pixel in the truth, so that a mean over the others is over the same classes for every
    predictor.
    """
    counts = counts.double()
    right, true, named = counts.diagonal(), counts.sum(1), counts.sum(0)
    return torch.where(true > 0, right / (true + named - right), torch.nan)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)      Dowson and Landau 1982; FID: arXiv 1706.08500

    It is biased upward, the more the fewer samples there are: two samples of one distribution are not at 0. So only
    distances from equal counts compare, and the two sets should have well over D samples each.

    Args:
        a, b: (n, D) and (m, D). Covariances divide by n - 1 and m - 1.

    Raises:
        ValueError: sets that are not features of one width, fewer than 2 samples in one, or values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"Features of shapes {tuple(a.shape)} and {tuple(b.shape)} were given; they must be (n, D) and (m, D) with one "
            "D. Compute both with the same classifier."
        )
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"Sets of {len(a)} and {len(b)} samples were given; one sample has no spread. Use 2 or more in each."
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(
            "Features with infinite values or NaN were given, which have no Gaussian. Find where they come from."
        )
    a, b = a.double(), b.double()
    # Of the features themselves, not over a covariance, whose eigenvalues of 0, as of features that never fire or of too few
    # samples, rounding makes negative: over eigenvalues the distance of a set to itself comes out as -4e-6, and so as 1e-13.
    roots = [torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b)]
    return _distance((a.mean(0), roots[0]), (b.mean(0), roots[1]))


def gaussian_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """`frechet_distance` of two Gaussians, each given by its mean (D,) and covariance (D, D), as where the samples are gone.

    Raises:
        ValueError: they are not of one width, or values are not finite.
    """
    shapes = [tuple(x.shape) for x in (*a, *b)]
    D = len(a[0])
    if shapes != 2 * [(D,), (D, D)]:
        raise ValueError(
            f"Means and covariances of shapes {', '.join(map(str, shapes))} were given; they must be (D,) and (D, D) with one "
            "D. Take both of the same features."
        )
    if not all(x.isfinite().all() for x in (*a, *b)):
        raise ValueError("A mean or covariance with infinite values or NaN was given. Find where they come from.")
    means, covariances = [[pair[i].double().cpu() for pair in (a, b)] for i in (0, 1)]
    return _distance(*((mean, _root(covariance)) for mean, covariance in zip(means, covariances, strict=True)))


def _root(covariance: Tensor) -> Tensor:
    """R with R'R = covariance, (rank, D), by Cholesky's method with pivots, which stops at the rank."""
    from scipy.linalg import get_lapack_funcs  # scipy costs a command that needs none of it 0.1 s

    (pivoted_cholesky,) = get_lapack_funcs(("pstrf",), (covariance.numpy(),))
    factor, pivots, rank, _ = pivoted_cholesky(covariance.numpy())
    root = torch.zeros(rank, len(covariance), dtype=torch.float64)
    root[:, torch.from_numpy(pivots).long() - 1] = torch.from_numpy(factor).triu()[:rank]
    return root


def _distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Squared Fréchet distance of two Gaussians by their means (D,) and roots (r, D), where covariance = root' root."""
    (mean_a, root_a), (mean_b, root_b) = a, b
    # The trace of the root of the product is the sum of the singular values of R_a R_b': no root of a product is taken.
    spread = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, ((mean_a - mean_b).square().sum() + spread).item())  # rounding may leave -1e-13


def hole_mse(painted: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """Mean squared error over the repainted pixels of each clip, (B,) float64.

    Args:
        painted, truth: (B, C, T, H, W) in [0, 1].
        hole: (B, T, H, W) bool, True = repainted.
    """
    inside = hole[:, None].expand_as(truth).double()
    return ((painted.double() - truth.double()).square() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)


def psnr(mse: Tensor) -> Tensor:
    """Decibels for values in [0, 1]; 100 at most, so that a perfect picture has a finite number."""
    return -10 * mse.clamp(min=1e-10).log10()


def mean_interval(values: Tensor) -> dict[str, float | None]:
    """The mean of values (n,) with its 95 % confidence interval by Student's t, as "mean", "low" and "high".

    The interval is over the draw of the n; None for one value, which has no spread.
    """
    from scipy.stats import t

    values = values.double()
    n, mean = len(values), values.mean().item()
    if n < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, n - 1)) * values.std().item() / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def laplacian_energy(clip: Tensor, hole: Tensor) -> Tensor:
    """Mean square of the 4-neighbour Laplacian over the repainted pixels, (B,): how sharp a picture is."""
    B, C, T, H, W = clip.shape
    frames = F.pad(clip.transpose(1, 2).reshape(B * T, C, H, W).double(), (1, 1, 1, 1), mode="replicate")
    centre = frames[..., 1:-1, 1:-1]
    laplacian = (
        frames[..., :-2, 1:-1] + frames[..., 2:, 1:-1] + frames[..., 1:-1, :-2] + frames[..., 1:-1, 2:] - 4 * centre
    )
    energy = laplacian.reshape(B, T, C, H, W).square().mean(2)  # (B, T, H, W)
    inside = hole.double()
    return (energy * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
