"""Probes and scores against other people's code and against closed forms."""

import math

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from small import generator

from unveil.metrics import (
    accuracy,
    choose_ridge,
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
