"""Probes and scores against other people's code and against closed forms."""

import math

import cv2
import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from small import generator

from unveil.metrics import (
    accuracy,
    choose_ridge,
    fewshot_predict,
    frechet_distance,
    gaussian_distance,
    hole_mse,
    knn_predict,
    laplacian_energy,
    psnr,
    ridge_predict,
    standardise,
)

Tensors = tuple[torch.Tensor, ...]


def clusters(
    n: int = 90, m: int = 60, dims: int = 7, classes: int = 4, spread: float = 0.7, decades: float = 2
) -> Tensors:
    """Overlapping classes of unequal size, with dimensions of very different scale: train, labels, test, truth."""
    g = generator()
    centres = torch.randn(classes, dims, generator=g)
    labels = torch.randint(classes, (n + m,), generator=g).clamp(max=classes - 1)
    labels[: n // 2] = labels[: n // 2] % 2
    scale = 10 ** torch.linspace(-decades, decades, dims)
    x = (centres[labels] + spread * torch.randn(n + m, dims, generator=g)) * scale + 5 * scale
    return x[:n], labels[:n], x[n:], labels[n:]


def test_standardise_uses_the_training_rows_alone() -> None:
    train, _, test, _ = clusters()
    x, z = standardise(train, test)
    scaler = StandardScaler().fit(train.double().numpy())
    n = len(train)
    correction = math.sqrt((n - 1) / n)  # scikit-learn divides by n, and unveil by n - 1
    torch.testing.assert_close(x.numpy(), scaler.transform(train.double().numpy()) * correction, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(z.numpy(), scaler.transform(test.double().numpy()) * correction, rtol=2e-3, atol=1e-5)
    assert x.dtype == torch.float64


def test_a_constant_feature_does_no_harm() -> None:
    train, labels, test, _ = clusters()
    wide = [torch.cat([x, torch.full((len(x), 1), 3.0)], 1) for x in (train, test)]
    expected = ridge_predict(train, labels, test, 4, 0.01)
    assert torch.equal(ridge_predict(wide[0], labels, wide[1], 4, 0.01), expected)


@pytest.mark.parametrize("l2", [1e-4, 0.03, 1.0, 30.0])
@pytest.mark.parametrize("n, dims", [(90, 7), (40, 39), (40, 40), (40, 41), (40, 300)])
def test_ridge_equals_scikit_learn(l2: float, n: int, dims: int) -> None:
    """With fewer features than rows, and with more, where it is computed the other way round."""
    train, labels, test, truth = clusters(n=n, dims=dims)
    x, z = standardise(train, test)
    targets = np.where(labels[:, None] == torch.arange(4), 1.0, -1.0)
    theirs = Ridge(alpha=l2 * len(x)).fit(x.numpy(), targets)  # theirs penalises the sum of squares, ours the mean
    ours = ridge_predict(train, labels, test, 4, l2)
    assert ours.tolist() == theirs.predict(z.numpy()).argmax(1).tolist()
    assert len(ours.unique()) > 1
    if l2 < 1:
        assert accuracy(ours, truth) > 40


def test_ridge_on_raw_pixels_needs_no_matrix_of_all_features() -> None:
    """200,000 features, as of pictures of 256 pixels: their Gram matrix would have 320 GB."""
    train, labels = torch.rand(8, 200_000, generator=generator()), torch.arange(8) % 2
    assert ridge_predict(train + labels[:, None], labels, train + labels[:, None], 2, 0.1).tolist() == labels.tolist()


def test_the_penalty_is_chosen_on_held_out_training_rows() -> None:
    train, labels, _, _ = clusters(n=100, dims=40, spread=3.0)
    penalties = (1e-6, 1.0, 1e6)
    chosen = choose_ridge(train, labels, 4, penalties)
    held = torch.arange(100) % 5 == 0
    scores = {
        l2: accuracy(ridge_predict(train[~held], labels[~held], train[held], 4, l2), labels[held]) for l2 in penalties
    }
    assert scores[chosen] == max(scores.values())
    assert len(set(scores.values())) > 1
    assert choose_ridge(train[:4], labels[:4], 4, penalties) == 1.0  # too few to hold some out: the middle one
    assert choose_ridge(train, labels, 4, (7.0,)) == 7.0


def fewshot_by_lstsq(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, l2: float) -> np.ndarray:
    """The same probe as a plain least-squares problem: the penalty as further rows sqrt(l2) I with targets 0."""
    x, z = train.double().numpy(), test.double().numpy()
    mean, std = np.mean(x, axis=0), np.std(x, axis=0) + 1e-5
    x, z = (np.hstack([(v - mean) / std, np.full((len(v), 1), 100.0)]) for v in (x, z))
    targets = np.where(labels.numpy()[:, None] == np.arange(4), 1.0, -1.0)
    rows = np.vstack([x, np.sqrt(l2) * np.eye(x.shape[1])])
    weights = np.linalg.lstsq(rows, np.vstack([targets, np.zeros((x.shape[1], 4))]), rcond=None)[0]
    return (z @ weights).argmax(1)


@pytest.mark.parametrize("l2", [1e-3, 8.0, 1024.0, 1e6])
@pytest.mark.parametrize("n, dims", [(90, 7), (5, 3), (40, 39), (40, 40), (40, 41), (40, 300)])
def test_fewshot_equals_least_squares_with_penalty_rows(l2: float, n: int, dims: int) -> None:
    """Of many test rows some lie at a border, so that another deviation, bias or penalty changes some predictions."""
    train, labels, test, _ = clusters(n=n, m=4000, dims=dims)
    assert fewshot_predict(train, labels, test, 4, l2).tolist() == fewshot_by_lstsq(train, labels, test, l2).tolist()


def test_fewshot_has_the_published_penalty_and_it_matters() -> None:
    train, labels, test, truth = clusters(n=90, m=4000)
    ours = fewshot_predict(train, labels, test, 4)
    assert ours.tolist() == fewshot_by_lstsq(train, labels, test, 1024.0).tolist()
    assert accuracy(ours, truth) > 30
    for l2 in (1e-3, 1e6):
        assert (ours != fewshot_predict(train, labels, test, 4, l2)).double().mean() > 0.02
    # 1,024 is not divided by the number of rows: with every row ten times, the same penalty weighs a tenth
    often = fewshot_predict(train.repeat(10, 1), labels.repeat(10), test, 4, 10 * 1024.0)
    assert torch.equal(often, ours)


def test_fewshot_on_raw_pixels_needs_no_matrix_of_all_features() -> None:
    train, labels = torch.rand(8, 200_000, generator=generator()), torch.arange(8) % 2
    shifted = train + labels[:, None]
    assert fewshot_predict(shifted, labels, shifted, 2).tolist() == labels.tolist()


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_knn_equals_scikit_learn(k: int) -> None:
    train, labels, test, truth = clusters(n=150, m=1100, decades=0.2)
    train, test = train - train.mean(0), test - train.mean(0)

    def weight(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)  # cosine distance is 1 - similarity

    theirs = KNeighborsClassifier(min(k, len(train)), weights=weight, metric="cosine", algorithm="brute")
    theirs.fit(train.double().numpy(), labels.numpy())
    ours = knn_predict(train, labels, test, 4, k)
    # float32 similarities may order two equal votes differently: at most one row in a thousand
    assert (ours.numpy() != theirs.predict(test.double().numpy())).mean() <= 1e-3
    assert accuracy(ours, truth) > 50


def test_knn_ignores_length_and_survives_zero_vectors() -> None:
    train, labels, test, _ = clusters()
    lengths = torch.rand(len(train), 1, generator=generator()) + 0.1
    assert torch.equal(knn_predict(train * lengths, labels, test * 100, 4, 5), knn_predict(train, labels, test, 4, 5))
    assert len(knn_predict(torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.zeros(1, 2), 2, 3)) == 1


def test_accuracy_is_in_percent() -> None:
    assert accuracy(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 0, 3])) == 50


def samples_with(mean: torch.Tensor, std: torch.Tensor, n: int = 60, seed: int = 0) -> torch.Tensor:
    """Samples whose own mean and covariance are exactly these, the latter diagonal: (n, D), float64."""
    x = torch.randn(n, len(mean), generator=generator(seed), dtype=torch.float64)
    q = torch.linalg.qr(x - x.mean(0)).Q  # orthonormal columns, which sum to 0
    return q * math.sqrt(n - 1) * std + mean


def features(n: int, dims: int = 5, seed: int = 0) -> torch.Tensor:
    """Samples with a full covariance, (n, dims), float64."""
    g = generator(seed)
    mixing = torch.randn(dims, dims, generator=g, dtype=torch.float64)
    return torch.randn(n, dims, generator=g, dtype=torch.float64) @ mixing + torch.randn(dims, generator=g)


def test_frechet_distance_of_diagonal_covariances_has_a_closed_form() -> None:
    means, stds = torch.rand(2, 4, generator=generator()).double(), torch.rand(2, 4, generator=generator(1)).double()
    a, b = samples_with(means[0], stds[0], n=60), samples_with(means[1], stds[1], n=25, seed=3)
    expected = (means[0] - means[1]).square().sum() + (stds[0] - stds[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_equals_scipy() -> None:
    a, b = features(200), features(150, seed=1)
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    gap = a.numpy().mean(0) - b.numpy().mean(0)
    expected = gap @ gap + np.trace(ca + cb - 2 * np.real(linalg.sqrtm(ca @ cb)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [2, 30, 400])
def test_frechet_distance_of_a_set_to_itself_is_zero_and_to_itself_moved_the_way(n: int) -> None:
    """Also with fewer samples than features and with features that never fire, where covariances are singular."""
    a = features(n, dims=64)
    a[:, :9] = 0
    scale = a.square().sum(1).mean().item()
    assert 0 <= frechet_distance(a, a) <= 1e-12 * scale
    assert 0 <= frechet_distance(a, a.flip(0)) <= 1e-12 * scale
    assert frechet_distance(a, a + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)
    assert frechet_distance(a.float(), a.float() + 0.5) == pytest.approx(64 * 0.25, rel=1e-5)


def test_frechet_distance_is_the_same_in_rotated_features() -> None:
    a, b = features(200), features(150, seed=1)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator(2), dtype=torch.float64)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-10)


@pytest.mark.parametrize("n, m", [(300, 200), (20, 300), (9, 5)])
def test_the_distance_of_gaussians_is_that_of_their_samples(n: int, m: int) -> None:
    """Also where there are fewer samples than features, and with features that never fire or are a sum of others."""
    g = generator()
    a, b = (torch.randn(k, 40, generator=g, dtype=torch.float64) * torch.logspace(-2, 2, 40) for k in (n, m))
    for x in (a, b):
        x[:, 7] = 0
        x[:, 8] = x[:, 9] + x[:, 10]
    told = gaussian_distance((a.mean(0), torch.cov(a.T)), (b.mean(0), torch.cov(b.T)))
    assert told == pytest.approx(frechet_distance(a, b), rel=1e-7)
    assert gaussian_distance((a.mean(0), torch.cov(a.T)), (a.mean(0), torch.cov(a.T))) <= 1e-9 * told


def test_gaussian_distance_refuses() -> None:
    mean, covariance = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"they must be \(D,\) and \(D, D\) with one D"):
        gaussian_distance((mean, covariance), (torch.zeros(4), torch.eye(4)))
    with pytest.raises(ValueError, match=r"they must be \(D,\) and \(D, D\) with one D"):
        gaussian_distance((mean, covariance[:2]), (mean, covariance))
    with pytest.raises(ValueError, match="infinite values or NaN"):
        gaussian_distance((mean, covariance), (mean / 0, covariance))


def test_frechet_distance_is_biased_upward_for_few_samples() -> None:
    a, b = torch.randn(2, 4000, 16, generator=generator())
    assert frechet_distance(a[:50], b[:50]) > 5 * frechet_distance(a, b) > 0


@pytest.mark.parametrize(
    "a, b, words",
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "one sample has no spread"),
        (torch.zeros(5, 3), torch.zeros(0, 3), "one sample has no spread"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "the same classifier"),
        (torch.zeros(5, 3, 1), torch.zeros(5, 3), "the same classifier"),
        (torch.zeros(5, 3), torch.full((5, 3), math.nan), "no Gaussian"),
        (torch.full((5, 3), math.inf), torch.zeros(5, 3), "no Gaussian"),
    ],
)
def test_frechet_distance_refuses(a: torch.Tensor, b: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frechet_distance(a, b)


def scene(B: int = 3, C: int = 3, T: int = 2, H: int = 9, W: int = 7) -> Tensors:
    g = generator()
    truth, painted = torch.rand(B, C, T, H, W, generator=g), torch.rand(B, C, T, H, W, generator=g)
    return painted, truth, torch.rand(B, T, H, W, generator=g) < torch.tensor([0.1, 0.5, 1.0]).reshape(-1, 1, 1, 1)


def test_hole_mse_is_over_the_repainted_pixels_alone() -> None:
    painted, truth, hole = scene()
    ours = hole_mse(painted, truth, hole)
    assert ours.dtype == torch.float64
    for i in range(3):
        inside = hole[i].numpy()[None].repeat(3, 0)
        expected = np.mean((painted[i].double().numpy()[inside] - truth[i].double().numpy()[inside]) ** 2)
        assert ours[i].item() == pytest.approx(expected, rel=1e-10)
    outside = ~hole[:, None].expand_as(painted)
    assert torch.equal(hole_mse(torch.where(outside, 9.0, painted), truth, hole), ours)


def test_psnr_equals_opencv() -> None:
    a, b = (np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(2))
    x, y = (torch.from_numpy(v).permute(2, 0, 1)[None, :, None] / 255 for v in (a, b))
    mse = hole_mse(x.double(), y.double(), torch.ones(1, 1, 16, 16, dtype=torch.bool))
    assert psnr(mse).item() == pytest.approx(cv2.PSNR(a, b), abs=1e-5)
    torch.testing.assert_close(psnr(torch.tensor([1.0, 0.1, 0.01])), torch.tensor([0.0, 10.0, 20.0]))


def test_laplacian_energy_equals_scipy() -> None:
    """Mean over the hole's pixels and the channels of the squared 4-neighbour Laplacian, edges repeated."""
    _, clip, hole = scene()
    ours = laplacian_energy(clip, hole)
    for i in range(3):
        frames = [
            np.stack([ndimage.laplace(c[t].double().numpy(), mode="nearest") ** 2 for c in clip[i]]).mean(0)
            for t in range(2)
        ]
        expected = np.stack(frames)[hole[i].numpy()].mean()
        assert ours[i].item() == pytest.approx(expected, rel=1e-10)


def test_laplacian_energy_falls_with_blur_and_is_zero_for_a_flat_picture() -> None:
    _, clip, hole = scene()
    blurred = torch.nn.functional.avg_pool2d(clip.flatten(1, 2), 3, 1, 1, count_include_pad=False).reshape(clip.shape)
    assert (laplacian_energy(blurred, hole) < laplacian_energy(clip, hole) / 2).all()
    assert laplacian_energy(torch.full_like(clip, 0.3), hole).max() < 1e-12
