"""The judge of generated pictures: what it learns, what it is shown, and what it refuses."""

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits
from small import generator
from torch import Tensor

from unveil import classifier
from unveil.classifier import Arrays, Judge, judge_pictures, load_arrays, load_judge, save_judge, train_judge
from unveil.config import Clip
from unveil.metrics import frechet_distance


def clip(channels: int = 1, size: int = 8, frames: int = 1) -> Clip:
    mean, std = (0.5,) * channels, (0.5,) * channels
    return Clip(channels=channels, frames=frames, height=size, width=size, patch_size=4, mean=mean, std=std)


@pytest.fixture(scope="module")
def real() -> Arrays:
    return load_arrays("digits:train", clip())


@pytest.fixture(scope="module")
def unseen() -> Arrays:
    return load_arrays("digits:test", clip())


@pytest.fixture(scope="module")
def judge(real: Arrays) -> Judge:
    """Trained for about three seconds; 99.4 % of the unseen digits when this was written."""
    told: list[tuple[int, float]] = []
    judge = train_judge(real, 10, epochs=10, seed=0, flip=False, shift=0, on_progress=lambda *now: told.append(now))
    assert [epoch for epoch, _ in told] == list(range(1, 11))
    losses = [loss for _, loss in told]
    assert losses[0] > 1.2 > 0.55 > losses[-1] > 0.5  # log 10 at first; label smoothing keeps it above 0.5
    rises = [after - before for before, after in itertools.pairwise(losses)]
    assert max(rises) < 0.1  # unclipped gradients overshoot in the warm-up, by 0.5
    return judge


def pictures(n: int = 20, channels: int = 3, size: int = 9) -> tuple[Tensor, Tensor]:
    """Noise, uint8, of two classes: the second is brighter."""
    labels = torch.arange(n) % 2
    low = torch.randint(0, 128, (n, channels, size, size), generator=generator())
    return (low + 100 * labels.reshape(-1, 1, 1, 1)).to(torch.uint8), labels


# What it learns


def test_a_judge_learns_the_digits(judge: Judge, unseen: Arrays) -> None:
    verdict = judge_pictures(judge, *unseen)
    assert verdict.accuracy is not None
    assert verdict.accuracy >= 98
    assert verdict.accuracy == 100 * (verdict.classes == unseen.labels).double().mean().item()
    wrong = judge_pictures(judge, unseen.clips, (unseen.labels + 1) % 10)
    assert wrong.accuracy is not None
    assert wrong.accuracy < 3


def test_distance_between_features_tells_real_digits_from_damaged_ones(
    judge: Judge, real: Arrays, unseen: Arrays
) -> None:
    def features(clips: Tensor) -> Tensor:
        return judge_pictures(judge, clips).features

    n = len(unseen.clips)
    reference = features(real.clips[:n])
    noisy = unseen.clips / 255 + 0.3 * torch.randn(unseen.clips.shape, generator=generator())
    same = frechet_distance(reference, features(unseen.clips))
    assert frechet_distance(reference, features(noisy.clamp(0, 1))) > 3 * same
    one_class = unseen.clips[unseen.labels == 3]
    assert frechet_distance(reference, features(one_class[torch.arange(n) % len(one_class)])) > 3 * same


def test_the_judge_normalises_by_the_training_pictures() -> None:
    clips, labels = pictures(300)
    clips[:, 1] = 77  # a constant channel
    judge = train_judge((clips, labels), 2, epochs=1, seed=0, flip=False, shift=0)
    values = clips.double().numpy() / 255
    torch.testing.assert_close(judge.mean.numpy(), values.mean((0, 2, 3)).astype(np.float32))
    expected = np.maximum(values.std((0, 2, 3)), 1e-3).astype(np.float32)
    torch.testing.assert_close(judge.std.numpy(), expected)
    seen = []
    judge.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    judge_pictures(judge, clips)
    normalised = torch.cat(seen).double()
    assert normalised[:, 1].abs().max() < 1e-3
    torch.testing.assert_close(normalised[:, [0, 2]].std((0, 2, 3)), torch.ones(2).double(), rtol=1e-3, atol=0)
    assert normalised[:, [0, 2]].mean((0, 2, 3)).abs().max() < 1e-5


# What it is shown in training


def shown(monkeypatch: pytest.MonkeyPatch, clips: Tensor, **options: Any) -> list[Tensor]:
    """The pictures of each step of training, as the network got them."""
    steps: list[Tensor] = []
    forward = Judge.forward

    def spy(judge: Judge, x: Tensor) -> Tensor:
        steps.append(x.clone())
        return forward(judge, x)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "forward", spy)
        train_judge((clips, torch.arange(len(clips)) % 2), 2, **{"epochs": 1, "seed": 0, **options})
    return steps


def rows_of(found: Tensor, candidates: Tensor) -> list[int]:
    """Which candidate each picture is; every one must be exactly one of them."""
    same = (found[:, None] == candidates[None]).flatten(2).all(2)  # (found, candidates)
    assert same.sum(1).tolist() == [1] * len(found)
    return same.int().argmax(1).tolist()


def test_an_epoch_shows_pictures_once_and_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clips, _ = pictures(300)
    values = clips / 255
    steps = shown(monkeypatch, clips, flip=False, shift=0, epochs=2)
    assert [len(x) for x in steps] == [128, 128, 128, 128]  # 44 rows are left out of each epoch
    epochs = [rows_of(torch.cat(steps[i : i + 2]), values) for i in (0, 2)]
    for rows in epochs:
        assert len(set(rows)) == 256
        assert rows != sorted(rows)
    assert epochs[0] != epochs[1]
    assert [len(x) for x in shown(monkeypatch, clips[:20], flip=False, shift=0)] == [20]


def test_flip_mirrors_half_of_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    clips, _ = pictures(256)
    values = clips / 255
    found = torch.cat(shown(monkeypatch, clips, flip=True, shift=0))
    rows = rows_of(found, torch.cat([values, values.flip(3)]))
    assert sorted(row % 256 for row in rows) == list(range(256))
    assert 90 < sum(row >= 256 for row in rows) < 166


def test_shift_moves_pictures_both_ways_and_reflects_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clips, _ = pictures(256, channels=1)
    steps = shown(monkeypatch, clips, flip=False, shift=2)
    padded = np.pad(clips.numpy() / np.float32(255), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    places = [(row, column) for row in range(5) for column in range(5)]
    moved = torch.from_numpy(np.concatenate([padded[..., r : r + 9, c : c + 9] for r, c in places]))
    rows = rows_of(torch.cat(steps), moved)
    assert sorted(row % 256 for row in rows) == list(range(256))
    assert {row // 256 for row in rows} == set(range(25))


def test_the_learning_rate_rises_for_a_quarter_and_falls_to_almost_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.SGD.step

    def spy(optimizer: torch.optim.SGD, *arguments: Any) -> Any:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train_judge(pictures(), 2, epochs=40, seed=0, flip=False, shift=0)
    first = [rate for rate, _ in rates]
    assert first == [rate for _, rate in rates]
    assert len(first) == 40
    assert first[:10] == sorted(first[:10])
    assert first[10:] == sorted(first[10:], reverse=True)
    assert max(first) == pytest.approx(classifier.PEAK_LR, rel=0.06)
    assert first[-1] < classifier.PEAK_LR / 40


# Repeatable


def state(judge: Judge) -> dict[str, Tensor]:
    return judge.state_dict()


def equal(a: Judge, b: Judge) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a).values(), state(b).values(), strict=True))


def test_training_repeats_for_a_seed_and_touches_no_global_one() -> None:
    samples = pictures(140)
    options: dict[str, Any] = {"epochs": 2, "seed": 3, "flip": True, "shift": 1}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = train_judge(samples, 2, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(one, train_judge(samples, 2, **options))
    for other in ({"seed": 4}, {"flip": False}, {"shift": 0}):
        assert not equal(one, train_judge(samples, 2, **{**options, **other}))


def test_bytes_and_floats_train_the_same_judge() -> None:
    clips, labels = pictures()
    one = train_judge((clips, labels), 2, epochs=2, seed=0, flip=False, shift=0)
    assert equal(one, train_judge((clips.float() / 255, labels.int()), 2, epochs=2, seed=0, flip=False, shift=0))


# What it says


def test_pictures_are_judged_one_by_one_as_in_batches(judge: Judge, unseen: Arrays) -> None:
    before = {name: value.clone() for name, value in state(judge).items()}
    judge.train()  # as somebody may have left it: it must judge in eval mode, and learn nothing from what it judges
    verdict = judge_pictures(judge, unseen.clips[:300])
    assert verdict.features.shape == (300, 128)
    assert verdict.accuracy is None
    for i in (0, 1, 255, 256, 299):
        alone = judge_pictures(judge, unseen.clips[i : i + 1])
        torch.testing.assert_close(alone.features[0], verdict.features[i], rtol=1e-4, atol=1e-5)
        assert alone.classes.tolist() == verdict.classes[i : i + 1].tolist()
    for name, value in state(judge).items():
        assert torch.equal(value, before[name]), name


def test_logits_and_features_belong_together(judge: Judge, unseen: Arrays) -> None:
    values = unseen.clips[:64] / 255
    verdict = judge_pictures(judge, values)
    with torch.no_grad():
        logits = judge(values)
        torch.testing.assert_close(judge.head(verdict.features), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.argmax(1), verdict.classes)
    assert torch.equal(judge_pictures(judge, unseen.clips[:64]).features, verdict.features)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (4, 9, 13), (3, 64, 64)])
def test_a_judge_takes_pictures_of_its_size(shape: tuple[int, int, int]) -> None:
    judge = Judge(shape, 7)
    x = torch.rand(4, *shape, generator=generator())
    logits = judge(x)
    assert logits.shape == (4, 7)
    features = judge.features(x)
    assert features.shape == (4, 128)
    assert features.min() >= 0
    logits.square().mean().backward()
    for name, parameter in judge.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "shape, num_classes, words",
    [((1, 7, 8), 10, "at least 8x8"), ((3, 32, 4), 10, "at least 8x8"), ((3, 32, 32), 1, "at least 2")],
)
def test_a_judge_refuses(shape: tuple[int, int, int], num_classes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Judge(shape, num_classes)


@pytest.mark.parametrize(
    "clips, labels, words",
    [
        (torch.zeros(2, 1, 9, 9), None, "judge of"),
        (torch.zeros(2, 3, 8, 8), None, "judge of"),
        (torch.zeros(3, 8, 8), None, "must be"),
        (torch.zeros(0, 1, 8, 8), None, "at least one"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), None, "use uint8"),
        (torch.full((2, 1, 8, 8), 1.01), None, "Clamp"),
        (torch.full((2, 1, 8, 8), -0.01), None, "Clamp"),
        (torch.full((2, 1, 8, 8), math.nan), None, "Clamp"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64), "one for each"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]), "numbered from 0"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([-1, 0]), "numbered from 0"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), "integers"),
    ],
)
def test_judging_refuses(judge: Judge, clips: Tensor, labels: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        judge_pictures(judge, clips, labels)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"samples": (torch.zeros(1, 1, 8, 8), torch.zeros(1).long())}, "at least 2 pictures"),
        ({"samples": (torch.zeros(9, 1, 8, 8) - 1, torch.zeros(9).long())}, "Clamp"),
        ({"samples": (torch.zeros(9, 1, 8, 8), torch.zeros(9).long() - 1)}, "numbered from 0"),
        ({"epochs": 0}, "1 epoch"),
        ({"shift": 8}, "Use 0 to 7"),
        ({"shift": -1}, "Use 0 to 7"),
    ],
)
def test_training_refuses(changed: dict[str, Any], words: str) -> None:
    samples = (torch.zeros(9, 1, 8, 8), torch.zeros(9).long())
    options = {"samples": samples, "num_classes": 2, "epochs": 1, "seed": 0, "flip": False, "shift": 0, **changed}
    with pytest.raises(ValueError, match=words):
        train_judge(**options)


# Sources in memory


def test_a_source_is_read_whole_and_in_order() -> None:
    flat, labels = load_digits(return_X_y=True)
    arrays = load_arrays("digits", clip(channels=3))
    assert arrays.clips.dtype == torch.uint8
    expected = np.round(flat.reshape(-1, 1, 8, 8) * 255 / 16).astype(np.uint8).repeat(3, 1)
    assert np.array_equal(arrays.clips.numpy(), expected)
    assert arrays.labels.tolist() == labels.tolist()
    assert arrays.labels.dtype == torch.int64


def encoded(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def parquet(path: Path, images: list[bytes], labels: list[int | None] | None) -> str:
    columns: dict[str, Any] = {"image": images} if labels is None else {"image": images, "label": labels}
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = load_arrays(parquet(tmp_path / "a.parquet", [encoded(i) for i in range(5)], [2, 0, 1, 1, 0]), clip(3))
    for i in range(5):
        values = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        assert np.array_equal(arrays.clips[i].permute(1, 2, 0).numpy(), values)
    assert arrays.labels.tolist() == [2, 0, 1, 1, 0]


def test_values_between_bytes_are_rounded(tmp_path: Path) -> None:
    for folder, value in (("a", 0.9), ("b", 99.6)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "picture.npy", np.full((8, 8), value / 255, dtype=np.float32))
    arrays = load_arrays(str(tmp_path), clip())
    assert arrays.clips[:, 0, 3, 3].tolist() == [1, 100]
    assert arrays.labels.tolist() == [0, 1]


def test_a_source_refuses(tmp_path: Path) -> None:
    good = [encoded(0), encoded(1)]
    with pytest.raises(ValueError, match="a judge takes pictures"):
        load_arrays("moving-digits", clip(size=24, frames=4))
    with pytest.raises(ValueError, match="has no labels"):
        load_arrays(parquet(tmp_path / "none.parquet", good, None), clip(3))
    with pytest.raises(ValueError, match=r"row 1 of .* has no label"):
        load_arrays(parquet(tmp_path / "some.parquet", good, [0, None]), clip(3))
    with pytest.raises(ValueError, match=r"row 1 of .* cannot be read"):
        load_arrays(parquet(tmp_path / "broken.parquet", [good[0], good[1][:50]], [0, 1]), clip(3))


# Files


def test_a_saved_judge_judges_as_before(judge: Judge, unseen: Arrays, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "judge.safetensors"
    about = {"data": "digits:train", "accuracy": 98.9, "classes": list("0123456789"), "command": "here"}
    save_judge(path, judge, about)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded, read = load_judge(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert read == about
    assert loaded.shape == judge.shape == (1, 8, 8)
    assert not loaded.training
    one, two = judge_pictures(judge, *unseen), judge_pictures(loaded, *unseen)
    assert torch.equal(one.features, two.features)
    assert torch.equal(one.classes, two.classes)
    assert [p.name for p in path.parent.iterdir()] == ["judge.safetensors"]


def rewritten(path: Path, judge: Judge, *, metadata: dict[str, str] | None = None, **changed: Tensor | None) -> Path:
    """A judge's file with other metadata or tensors; None takes a tensor out."""
    save_judge(path, judge, {})
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata() if metadata is None else metadata
    tensors = {**safetensors.torch.load_file(path), **changed}
    safetensors.torch.save_file({k: v for k, v in tensors.items() if v is not None}, path, header)
    return path


def test_loading_refuses_what_is_no_judge(judge: Judge, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    with pytest.raises(ValueError, match="There is no judge"):
        load_judge(path)
    path.write_text("weights")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_judge(path)
    with pytest.raises(ValueError, match="'unveil-2', not 'unveil-judge-1'"):
        load_judge(rewritten(path, judge, metadata={"format": "unveil-2"}))
    with pytest.raises(ValueError, match=r"damaged judge .*about"):
        load_judge(rewritten(path, judge, metadata={"format": classifier.FORMAT, "judge": "{}"}))
    for changed in ({"mean": None}, {"mean": torch.zeros(3)}, {"other": torch.zeros(3)}):
        with pytest.raises(ValueError, match="damaged judge"):
            load_judge(rewritten(path, judge, **changed))
    with pytest.raises(ValueError, match="no numbers"):
        load_judge(rewritten(path, judge, mean=torch.full((1,), math.nan)))
