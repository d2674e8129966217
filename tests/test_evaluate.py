"""`unveil evaluate inpainting`: what is scored where, masks that are pictures, and intervals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import build, small
from test_likeness import features
from torchmetrics.functional.image import lpips as library

from unveil import cli
from unveil.checkpoint import WEIGHTS, About, save_weights
from unveil.likeness import TRUNKS
from unveil.masking import tokens_touched
from unveil.metrics import mean_interval
from unveil.tasks import evaluate as task
from unveil.tasks.evaluate import FILLINGS, EvaluateInpainting, MaskPictures, evaluate_inpainting

ABOUT = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
Evaluate = Callable[..., dict[str, Any]]


def pictures(folder: Path, n: int = 5, size: int = 32) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def mask(path: Path, box: tuple[int, int, int, int] | None, size: int = 64, white: int = 255) -> Path:
    """A mask picture with a white box (top, left, height, width)."""
    values = np.zeros((size, size), dtype=np.uint8)
    if box:
        top, left, height, width = box
        values[top : top + height, left : left + width] = white
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Runs the command on five pictures of 32 pixels and a random model with patches of 4."""
    monkeypatch.setattr(library, "_get_tv_model_features", features)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    pictures(tmp_path / "pictures")

    def run(name: str = "diffmae", **options: Any) -> dict[str, Any]:
        path = tmp_path / name
        if not path.exists():
            model = build(small(name, height=32))
            save_weights(path / WEIGHTS, model.recipe, model.state_dict(), ABOUT)
        given: dict[str, Any] = {"data": str(tmp_path / "pictures"), "num_samples": 3, "num_steps": 2, "device": "cpu"}
        result = evaluate_inpainting(EvaluateInpainting(run=path, **{**given, **options}))
        json.dumps(result, allow_nan=False)
        return result

    return run


@pytest.fixture
def trunks(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, net in (("alex", "alexnet"), ("vgg", "vgg16")):
        state = {f"features.{key}": value for key, value in features(net).state_dict().items()}
        torch.save(state, folder / TRUNKS[name].name)
    return folder


def test_every_filling_is_scored_by_every_metric_in_both_regions(evaluate: Evaluate, trunks: Path) -> None:
    result = evaluate(mask="center:0.25")
    assert result["scores"].keys() == {"psnr", "ssim", "lpips_alex", "lpips_vgg"}
    for name, regions in result["scores"].items():
        assert regions.keys() == {"hole", "whole"}
        better = np.greater_equal if name in ("psnr", "ssim") else np.less_equal
        for region, told in regions.items():
            assert tuple(told) == FILLINGS
            assert better(told["best_sample"]["mean"], told["sample"]["mean"]), (name, region)
            assert all(score["low"] < score["mean"] < score["high"] for score in told.values())
    assert result["scores"]["psnr"]["whole"]["sample"]["mean"] == pytest.approx(
        result["scores"]["psnr"]["hole"]["sample"]["mean"] + 10 * np.log10(4), abs=1e-6
    )
    assert {name: told["mean"] for name, told in result["scores"]["psnr"]["hole"].items()} == pytest.approx(
        result["psnr"]
    )
    assert result["extractors"].keys() == {"lpips_alex", "lpips_vgg"}
    assert not result["extractors"]["lpips_alex"]["published"]
    assert sum("is not the file that everybody has" in notice for notice in result["notices"]) == 2
    told = {key: result[key] for key in ("pictures", "num_samples", "num_steps", "sampler", "mask", "size", "seed")}
    assert list(told.values()) == [5, 3, 2, "dpmpp", "center:0.25", [32, 32], 0]
    assert "antialiased bicubic" in result["resize"]


def test_samples_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known fillings, and a judge that tells their mean value, of which less is better."""
    model = build(small("diffmae"))
    clips, holes = torch.zeros(2, 3, 1, 16, 16), torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    holes[..., :8] = True
    values = torch.tensor([[1.0, 3.0, 2.0], [6.0, 4.0, 5.0]])  # of two pictures' samples
    samples = values[:, :, None, None, None, None].expand(-1, -1, 3, 1, 16, 16)
    monkeypatch.setattr(task, "repaint", lambda *_, **__: samples)
    monkeypatch.setattr(task, "predict", lambda *_, **__: clips + 7)
    judge = task.Judge(
        "colour",
        "",
        lambda painted, truth, hole: (painted.mean((1, 2, 3, 4)), -painted.mean((1, 2, 3, 4))),
        more_is_better=False,
        told=torch.square,
    )
    settings: dict[str, Any] = {"num_samples": 3, "num_steps": 1, "sampler": "ddpm", "seed": 0}
    figures = task.score(model, clips, holes, judges=[judge], **settings)
    expected = {
        "sample": [4.0, 25.0],
        "best_sample": [1.0, 16.0],
        "sample_mean": [4.0, 25.0],
        "prediction": [49.0, 49.0],
    }
    for name, wanted in expected.items():
        assert figures[f"colour hole {name}"].tolist() == pytest.approx(wanted)
    assert figures["colour whole best_sample"].tolist() == [9.0, 36.0]  # the best is another one there


def test_scores_do_not_depend_on_the_batch(evaluate: Evaluate, trunks: Path, tmp_path: Path) -> None:
    for i in range(4):
        mask(tmp_path / "masks" / str(i % 2) / f"{i}.png", (8 * i, 16, 12, 20))
    for options in ({"mask": "random:0.75"}, {"mask": str(tmp_path / "masks")}):
        one, two = (evaluate(batch_size=size, lpips="alex", **options)["scores"] for size in (5, 2))
        for name, regions in one.items():
            for region, told in regions.items():
                for filling, score in told.items():
                    assert score == pytest.approx(two[name][region][filling], rel=1e-4, abs=1e-6), (
                        name,
                        region,
                        filling,
                    )


def test_a_model_without_noise_has_no_samples(evaluate: Evaluate) -> None:
    result = evaluate("mae_raw")
    assert result["scores"]["ssim"]["hole"].keys() == {"mean_fill", "prediction"}


def test_pictures_that_cannot_be_read_are_told(evaluate: Evaluate, tmp_path: Path) -> None:
    whole = evaluate(lpips="none")
    assert not any("could not be used" in notice for notice in whole["notices"])
    folder = tmp_path / "pictures"
    for i in range(4):
        (folder / f"9{i}.png").write_bytes(b"no picture")
    (folder / "empty.png").touch()
    result = evaluate(lpips="none")
    assert (result["pictures"], result["scores"]) == (5, whole["scores"])
    (notice,) = [notice for notice in result["notices"] if "could not be used" in notice]
    assert notice.startswith(
        f"Files of {folder} that could not be used: 5, as empty.png: empty file (0 bytes); 90.png: "
    )
    assert "91.png" in notice
    assert "92.png" not in notice
    assert evaluate(lpips="none", batch_size=1)["notices"] == result["notices"]  # also if none of a batch can be read
    for i in range(5):
        (folder / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"nothing to score\. Files of .* could not be used: 10, as empty\.png"):
        evaluate()


# LPIPS, or why not


def test_lpips_is_left_out_unless_its_weights_are_here(evaluate: Evaluate, trunks: Path, tmp_path: Path) -> None:
    (trunks / TRUNKS["vgg"].name).rename(tmp_path / "vgg.pth")
    result = evaluate()
    assert result["scores"].keys() == {"psnr", "ssim", "lpips_alex"}
    (notice,) = [notice for notice in result["notices"] if "Left out" in notice]
    assert TRUNKS["vgg"].url in notice
    assert str(trunks / TRUNKS["vgg"].name) in notice
    assert evaluate(lpips="none")["scores"].keys() == {"psnr", "ssim"}
    assert not any("Left out" in notice for notice in evaluate(lpips="none")["notices"])
    assert evaluate(lpips="vgg", weights=tmp_path / "vgg.pth")["scores"].keys() == {"psnr", "ssim", "lpips_vgg"}
    with pytest.raises(ValueError, match="LPIPS vgg needs weights that are not here: fetch https"):
        evaluate(lpips="both")
    with pytest.raises(ValueError, match=r"vgg\.pth is one file\. Say whose by --lpips alex or vgg"):
        evaluate(weights=tmp_path / "vgg.pth")


def test_small_pictures_and_a_missing_library_leave_measures_out(
    tmp_path: Path, trunks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(small("diffmae", size="Nano/2", channels=1, height=8))
    save_weights(tmp_path / "run" / WEIGHTS, model.recipe, model.state_dict(), ABOUT)
    options: dict[str, Any] = {
        "run": tmp_path / "run",
        "data": "digits:test",
        "limit": 3,
        "num_steps": 1,
        "device": "cpu",
    }
    result = evaluate_inpainting(EvaluateInpainting(**options))
    assert result["scores"].keys() == {"psnr", "ssim"}
    assert any("LPIPS alex needs pictures of 31 pixels" in notice for notice in result["notices"])
    with pytest.raises(ValueError, match="LPIPS vgg needs pictures of 16 pixels"):
        evaluate_inpainting(EvaluateInpainting(**options, lpips="vgg"))
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional", None)
    result = evaluate_inpainting(EvaluateInpainting(**options))
    assert result["scores"].keys() == {"psnr"}
    assert any("SSIM needs torchmetrics" in notice and "unveil[evaluate]" in notice for notice in result["notices"])


# Masks that are pictures


def test_a_pixel_that_any_pixel_of_a_hole_falls_into_is_one(tmp_path: Path) -> None:
    clip = small("diffmae", height=32).clip
    path = mask(tmp_path / "thin.png", (33, 10, 1, 41))  # one row of 64, from column 10 to 50
    (hole,) = MaskPictures.below(path, clip, some_visible=True).of(0, 0)
    assert hole.nonzero().tolist() == [[16, x] for x in range(5, 26)]


def test_every_picture_draws_its_mask_by_number_and_seed(tmp_path: Path) -> None:
    clip = small("diffmae", height=32).clip
    for i in range(6):
        mask(tmp_path / "masks" / f"share{i // 3}" / f"{i}.png", (0, 0, 8 * (i + 1), 64))
    (tmp_path / "masks" / "README.md").write_text("no mask")
    masks = MaskPictures.below(tmp_path / "masks", clip, some_visible=True)
    drawn = [int(masks.of(i, 0)[0, :, 0].sum()) for i in range(30)]
    assert set(drawn) == {4, 8, 12, 16, 20, 24}
    again = MaskPictures.below(tmp_path / "masks", clip, some_visible=True)
    assert [int(again.of(i, 0)[0, :, 0].sum()) for i in reversed(range(30))] == drawn[::-1]
    assert [int(masks.of(i, 1)[0, :, 0].sum()) for i in range(30)] != drawn
    assert not masks.passed_over


def test_masks_that_cannot_be_used_are_passed_over_and_told(evaluate: Evaluate, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    mask(folder / "black.png", None)
    mask(folder / "white.png", (0, 0, 64, 64))
    usable = mask(folder / "usable.png", (0, 0, 32, 32))
    result = evaluate(mask=str(folder))
    assert result["scores"]["psnr"] == evaluate(mask=str(usable))["scores"]["psnr"]
    assert result["mask_files"] == 3
    (notice,) = [notice for notice in result["notices"] if "passed over: 2" in notice]
    assert "black.png" in notice
    usable.unlink()
    with pytest.raises(ValueError, match=r"none of 2 file\(s\), as .*black.png, can be used at 32 x 32 pixels"):
        evaluate(mask=str(folder))
    assert evaluate("umd", mask=str(folder / "white.png"))["scores"]["psnr"]["hole"].keys() == set(FILLINGS) - {
        "mean_fill"
    }


def test_a_mask_that_touches_every_patch_is_scored(evaluate: Evaluate, tmp_path: Path) -> None:
    scattered = np.zeros((64, 64), dtype=np.uint8)
    scattered[::8, ::8] = 255
    Image.fromarray(scattered).save(tmp_path / "scattered.png")
    result = evaluate(mask=str(tmp_path / "scattered.png"))
    assert result["scores"]["psnr"].keys() == {"hole", "whole"}
    assert not any("passed over" in notice for notice in result["notices"])


def test_masks_reach_the_model(evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mask(tmp_path / "mask.png", (0, 0, 32, 16))
    seen = []
    score = task.score

    def spy(model: Any, clips: torch.Tensor, holes: torch.Tensor, **named: Any) -> dict[str, torch.Tensor]:
        seen.append(holes)
        return score(model, clips, holes, **named)

    monkeypatch.setattr(task, "score", spy)
    evaluate(mask=str(path), lpips="none")
    (holes,) = seen
    assert holes[:, 0, :16, :8].all()
    assert holes.sum() == 5 * 16 * 8
    assert tokens_touched(holes, 4).sum() == 5 * 4 * 2


@pytest.mark.parametrize(
    "case, words",
    [
        ("box", "The mask 'box' is unknown"),
        ("empty", "empty holds no mask picture"),
        ("text.png", "cannot be read as a picture"),
        ("grey.png", "has no white"),
    ],
)
def test_masks_refuse(evaluate: Evaluate, tmp_path: Path, case: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    mask(tmp_path / "grey.png", (0, 0, 9, 9), white=100)
    with pytest.raises(ValueError, match=words):
        evaluate(mask=case if case == "box" else str(tmp_path / case))


# For people


def test_the_table_has_means_and_half_widths(
    evaluate: Evaluate, tmp_path: Path, trunks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(lpips="alex")
    command = f"evaluate inpainting --run {tmp_path}/diffmae --data {tmp_path}/pictures --num-samples 3 --num-steps 2"
    cli.main([*command.split(), "--device", "cpu", "--lpips", "alex"])
    out = capsys.readouterr().out
    score = result["scores"]["ssim"]["whole"]["prediction"]
    assert f"{score['mean']:.4f} ± {score['high'] - score['mean']:.4f}" in out
    assert "5 pictures, mask random:0.75, 3 sample(s) of 2 DPMPP steps, seed 0." in out
    assert "Scored at 32 x 32 pixels, to which pictures came by antialiased bicubic" in out
    assert "PSNR dB              SSIM        LPIPS alex\n" in out
    cli.main([*command.split(), "--device", "cpu", "--lpips", "none", "--limit", "1"])  # one picture has no interval
    assert "±" not in capsys.readouterr().out


def test_an_interval_shrinks_with_the_number_of_pictures() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(25)
    few, many = mean_interval(values[:4]), mean_interval(values)
    assert few["mean"] == many["mean"] == 2.5
    assert few["low"] < many["low"] < 2.5 < many["high"] < few["high"]  # type: ignore[operator]
