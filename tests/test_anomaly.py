"""`unveil anomaly`: what a model would not paint is told from what it would, and figures are those of scikit-learn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from small import build, generator, small
from torch import Tensor

from unveil import anomalies
from unveil.anomalies import Usual, ensemble_holes, picture_score, surprise
from unveil.checkpoint import WEIGHTS, About, save_weights
from unveil.tasks.anomaly import Anomaly, anomaly

ABOUT = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
CLIP = small().clip  # 16 x 16 pixels in patches of 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_weights(folder / WEIGHTS, small(), build(small()).state_dict(), ABOUT)
    return folder


def square(path: Path, y: int | None, size: int = 16) -> Path:
    """A grey picture, with a bright square of 4 x 4 pixels at (y, y)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((size, size, 3), 100, dtype=np.uint8)
    if y is not None:
        values[y : y + 4, y : y + 4] = 250
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    root = tmp_path / "screw"
    for i in range(3):
        square(root / "train" / "good" / f"{i}.png", None)
        square(root / "test" / "good" / f"{i}.png", None)
    for i, kind in enumerate(("dent", "dent", "scratch")):
        y = 4 * i
        square(root / "test" / kind / f"{i}.png", y)
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[y : y + 4, y : y + 4] = 255
        (root / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / "ground_truth" / kind / f"{i}_mask.png")
    return root


@pytest.fixture
def grey_painter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is hidden is painted in the normal pictures' grey, by every sample with a little noise."""

    def repaint(model: Any, clips: Tensor, holes: Tensor, *, num_samples: int, seed: int, **given: Any) -> Tensor:
        noise = 0.05 * torch.randn(len(clips), num_samples, *clips.shape[1:], generator=generator(seed % 1000))
        return torch.where(holes[:, None, None], 100 / 255 + noise, clips[:, None])

    monkeypatch.setattr(anomalies, "repaint", repaint)
    monkeypatch.setattr(
        anomalies, "predict", lambda model, clips, holes, seed: torch.where(holes[:, None], 100 / 255, clips)
    )


@pytest.mark.parametrize("num_masks, mask_ratio", [(8, 0.75), (2, 0.5), (3, 0.5), (16, 1 / 16), (5, 0.9)])
def test_every_token_is_hidden_about_equally_often(num_masks: int, mask_ratio: float) -> None:
    holes = ensemble_holes(CLIP, num_masks, mask_ratio, seed=0)
    counts = holes.sum(0)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1
    assert (holes.float().mean((1, 2, 3)) == round(16 * mask_ratio) / 16).all()
    assert not torch.equal(holes, ensemble_holes(CLIP, num_masks, mask_ratio, seed=1))


@pytest.mark.parametrize(
    "num_masks, mask_ratio",
    [
        (1, 0.75),
        (3, 0.25),
        (8, 0.0),
        (8, 1.0),
        (0, 0.5),
        (-1, 0.5),
        *((8, r) for r in (-1.0, math.inf, -math.inf, math.nan)),
    ],
)
def test_masks_that_leave_tokens_out_refuse(num_masks: int, mask_ratio: float) -> None:
    with pytest.raises(ValueError, match="do not hide each of 16 patches once"):
        ensemble_holes(CLIP, num_masks, mask_ratio, seed=0)


def test_surprise_is_in_deviations_between_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error counts less where samples disagree: 0.3^2 / (2 * 0.1^2 + 0.2^2) against 0.3^2 / 0.2^2."""
    clip = torch.full((3, 1, 16, 16), 0.8)
    samples = torch.full((1, 2, 3, 1, 16, 16), 0.5)
    samples[:, 0, ..., :8] += 0.1
    samples[:, 1, ..., :8] -= 0.1
    monkeypatch.setattr(anomalies, "repaint", lambda model, clips, holes, **given: samples)
    monkeypatch.setattr(anomalies.ndimage, "gaussian_filter", lambda frame, sigma: frame)
    holes = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    found = surprise(build(small()), clip, holes, num_samples=2, num_steps=1)
    assert torch.allclose(found[..., :8], torch.tensor(1.5))
    assert torch.allclose(found[..., 8:], torch.tensor(2.25))


def test_disagreement_is_a_mean_over_the_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that lie apart in one of three colours: 0.3^2 / (2 * 0.3^2 / 3 + 0.2^2)."""
    samples = torch.full((1, 2, 3, 1, 16, 16), 0.5)
    samples[:, 0, 1] += 0.3
    samples[:, 1, 1] -= 0.3
    monkeypatch.setattr(anomalies, "repaint", lambda model, clips, holes, **given: samples)
    holes = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    found = surprise(build(small()), torch.full((3, 1, 16, 16), 0.8), holes, num_samples=2, num_steps=1)
    torch.testing.assert_close(found, torch.full_like(found, 0.9))


def test_only_what_is_hidden_counts(grey_painter: None) -> None:
    """A mask's visible pixels equal the picture, and must not make it look better."""
    clip = torch.full((3, 1, 16, 16), 0.8)
    model = build(small())
    found = [
        surprise(model, clip, ensemble_holes(CLIP, k, r, 0), num_samples=1, num_steps=1)
        for k, r in ((8, 0.75), (4, 0.5))
    ]
    assert torch.allclose(found[0], torch.full_like(found[0], (0.8 - 100 / 255) ** 2 / 0.04), rtol=1e-4)
    assert torch.allclose(*found, rtol=1e-4)


def test_usual_is_of_each_place() -> None:
    maps = torch.zeros(3, 1, 2, 2)
    maps[:, 0, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    usual = Usual.of(maps)
    excess = usual.excess(torch.full((1, 2, 2), 4.0))
    assert excess[0, 0, 0] == pytest.approx(2 / (1 + 0.125), rel=1e-3)
    assert excess[0, 1, 1] == pytest.approx(4 / 0.125, rel=1e-3)


def test_a_score_is_the_mean_of_the_highest_hundredth() -> None:
    values = torch.arange(400.0).reshape(1, 20, 20)
    assert picture_score(values) == 397.5
    assert picture_score(torch.arange(4.0).reshape(1, 2, 2)) == 3


@pytest.mark.parametrize("num_samples", [1, 3])
def test_mvtecs_layout(run: Path, mvtec: Path, tmp_path: Path, grey_painter: None, num_samples: int) -> None:
    result = anomaly(Anomaly(run=run, data=str(mvtec), out=tmp_path / "out", num_samples=num_samples))
    assert result["calibrated"] == 3
    assert result["mask_ratio"] == 0.75
    areas = result["auroc"]
    assert areas["pictures"] == 100
    assert areas["by_kind"] == {"dent": 100, "scratch": 100}
    assert areas["pixels"] > 99
    kinds = {p["picture"]: p["kind"] for p in result["pictures"]}
    assert kinds == {**{f"good/{i}.png": "good" for i in range(3)}, "dent/0.png": "dent", "dent/1.png": "dent",
                     "scratch/2.png": "scratch"}  # fmt: skip
    lines = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert lines[0] == "path,score"
    assert [line.split(",")[0].split("/")[0] for line in lines[1:]][3:] == ["good"] * 3
    with Image.open(tmp_path / "out" / "scratch_2_heat.png") as heat:
        values = np.asarray(heat).astype(int)
    assert values[8:12, 8:12].sum(-1).min() > 1.5 * values[:4, :4].sum(-1).max()
    assert Path(result["sheet"]).exists()


def test_areas_are_scikit_learns(run: Path, mvtec: Path, tmp_path: Path) -> None:
    """With a model that knows nothing; its scores are as good as any to compare figures."""
    result = anomaly(Anomaly(run=run, data=str(mvtec), out=tmp_path / "out", num_steps=2))
    bad = [p["kind"] != "good" for p in result["pictures"]]
    scores = [p["score"] for p in result["pictures"]]
    assert result["auroc"]["pictures"] == pytest.approx(100 * float(roc_auc_score(bad, scores)))
    few = [i for i, p in enumerate(result["pictures"]) if p["kind"] in ("good", "scratch")]
    area = float(roc_auc_score([bad[i] for i in few], [scores[i] for i in few]))
    assert result["auroc"]["by_kind"]["scratch"] == pytest.approx(100 * area)
    again = anomaly(Anomaly(run=run, data=str(mvtec), out=tmp_path / "out2", num_steps=2))
    assert again["pictures"] == result["pictures"]
    other = anomaly(Anomaly(run=run, data=str(mvtec), out=tmp_path / "out3", num_steps=2, seed=1))
    assert other["pictures"] != result["pictures"]


def test_a_plain_folder_has_scores_only(run: Path, mvtec: Path, tmp_path: Path, grey_painter: None) -> None:
    folder = tmp_path / "any"
    square(folder / "a.png", None, 40)
    square(folder / "a.bmp", 8, 33)
    (folder / "b.png").write_text("no picture")
    result = anomaly(Anomaly(run=run, data=str(folder), out=tmp_path / "out"))
    assert "auroc" not in result
    assert result["calibrated"] == 0
    score = {p["picture"]: p["score"] for p in result["pictures"]}
    assert score["a.bmp"] > score["a.png"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*_heat.png")) == ["a_2_heat.png", "a_heat.png"]
    assert any("b.png" in notice for notice in result["notices"])
    calibrated = anomaly(
        Anomaly(run=run, data=str(folder), out=tmp_path / "out", normal=str(mvtec / "train"), limit_normal=2)
    )
    assert calibrated["calibrated"] == 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_samples": 0}, "--num-samples 0: ask for at least 1"),
        ({"num_samples": 1, "num_steps": 0}, "--num-steps 0: ask for at least 1"),
        ({"num_samples": 1, "num_steps": 1001}, "Use 1 to 1000 steps"),
        ({"limit": 0}, "--limit 0: ask for at least 1"),
        ({"limit_normal": 1}, "--limit-normal 1: ask for at least 2"),
        ({"num_masks": 1}, "do not hide each of 16 patches once"),
        ({"num_masks": 0}, "do not hide each of 16 patches once"),
        *(({"mask_ratio": r}, "--mask-ratio .* is no share") for r in (math.inf, -math.inf, math.nan, 0.0, 1.0, -0.5)),
        ({"out": "one/a.png/x"}, "--out .*: no file can be written there"),
        ({"out": "one/a.png"}, "is a file"),
        ({"normal": "two", "out": "two"}, "lies in the folder of normal pictures"),
        ({"normal": "two", "out": "two/x"}, "lies in the folder of normal pictures"),
        ({"data": "two/sheet.png", "out": "two"}, "--out .*two: its sheet.png is read here, and would be overwritten"),
        ({"normal": "two/scores.csv", "out": "two"}, "--out .*two: its scores.csv is read here"),
        ({"data": "two/list.csv", "out": "two"}, "--out .*two: its b_heat.png is read here"),
        ({"data": "two/scores.csv", "out": "two"}, "--out .*two: its scores.csv is read here"),
        ({"normal": "one"}, "has 1 normal pictures to read; two at least are needed"),
        ({"data": "lonely"}, "no test/good, whose pictures are the normal ones"),
        ({"out": "screw/out"}, "lies in the folder of pictures"),
    ],
)
def test_refusals(
    run: Path, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    """Before any picture is scored, but for normal ones that are found to be too few; and nothing is changed."""
    square(tmp_path / "one" / "a.png", None)
    for name in ("sheet", "b", "b_heat"):
        square(tmp_path / "two" / f"{name}.png", None)
    (tmp_path / "two" / "scores.csv").write_text("path\nb.png\n")
    (tmp_path / "two" / "list.csv").write_text("path\nb.png\nb_heat.png\n")
    square(tmp_path / "lonely" / "test" / "dent" / "a.png", None)
    given = {"data": str(mvtec), "out": tmp_path / "out", **wrong}
    for name in ("normal", "data", "out"):
        if name in wrong:
            given[name] = tmp_path / wrong[name] if name == "out" else str(tmp_path / wrong[name])
    if wrong != {"normal": "one"}:
        monkeypatch.setattr(anomalies, "predict", None)
        monkeypatch.setattr(anomalies, "repaint", None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        anomaly(Anomaly(run=run, **given))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_results_may_lie_beside_what_was_read(run: Path, tmp_path: Path, grey_painter: None) -> None:
    """Where nothing of it is overwritten."""
    path = square(tmp_path / "a.png", 4)
    before = path.read_bytes()
    for _ in range(2):
        anomaly(Anomaly(run=run, data=str(path), out=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a_heat.png", "scores.csv", "sheet.png"]
    assert path.read_bytes() == before
