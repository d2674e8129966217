"""`unveil bench` times what it says it times."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unveil import cli, recipes
from unveil import layers as layers_module
from unveil.contenders import HuggingFace, Ours, vit_mae
from unveil.cost import masked_step
from unveil.layers import attend
from unveil.tasks import bench as bench_module
from unveil.tasks.bench import Bench, bench, matrix_product_peak

SMALL: dict[str, Any] = {"size": "Nano/8", "image_size": "16", "batch_size": 4, "rounds": 2, "precision": "fp32"}


def test_a_record_has_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench --size Nano/8 --image-size 16 --batch-size 4 --rounds 2 --beside huggingface"
    cli.main([*words.split(), "--out", str(tmp_path), "--json"])
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    (file,) = tmp_path.iterdir()
    assert result.pop("file") == str(file)
    assert json.loads(file.read_text()) == result
    assert [row["name"] for row in result["rows"]] == ["Hugging Face ViTMAE", "mae", "diffmae"]
    assert result["command"].startswith("unveil bench --size Nano/8")
    assert result["versions"].keys() == {"unveil", "torch", "transformers"}
    for row in result["rows"]:
        seconds = row["seconds"]
        assert 0 < seconds["lowest"] <= seconds["median"] <= seconds["highest"]
        assert row["images_per_second"] == pytest.approx(4 / seconds["median"])
        assert sum(row["stages"].values()) <= seconds["highest"] * 1.01
        assert row["memory_bytes"] > 0
        flops = 6 * row["forward_multiply_adds"] * row["images_per_second"]
        assert row["share_of_peak"]["matrix_product"] == pytest.approx(flops / result["peaks"]["matrix_product"])
        assert f"{row['name']}: {row['images_per_second']:.4g} images/s" in captured.err
    assert result["rows"][0]["speed_over_hugging_face"] == 1
    cost = masked_step(recipes.diffmae("Nano/8", height=16, width=16)).forward
    assert result["rows"][2]["forward_multiply_adds"] == cost


@pytest.fixture
def no_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured of a machine and of memory takes seconds; one record above has the real ones."""
    monkeypatch.setattr(bench_module, "matrix_product_peak", lambda device, precision: 1e10)
    monkeypatch.setattr(bench_module, "_peak_memory", lambda *arguments: 1)


@pytest.mark.usefixtures("no_processor")
def test_records_of_a_day_are_kept_beside_each_other(tmp_path: Path) -> None:
    files = [bench(Bench(**SMALL, recipes=("mae",), out=tmp_path))["file"] for _ in range(2)]
    assert len(set(files)) == 2
    assert all(Path(file).exists() for file in files)


def test_time_is_the_steps_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that sleeps makes the encoder's stage slower, and no other's."""
    slow = layers_module.Block.forward

    def sleepy(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        time.sleep(0.02)
        return slow(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("unveil.layers.Block.forward", sleepy)
    recipe = recipes.diffmae("Nano/8", height=16, width=16)  # whose decoder has other blocks
    told = Ours(recipe, "cpu", "fp32", False).step(torch.rand(2, 3, 16, 16))
    depth = recipe.encoder.depth
    assert told["encoder"] > 0.02 * depth
    assert told["draw"] < 0.02 * depth


def test_hugging_faces_network_has_our_sizes() -> None:
    recipe = recipes.mae("Nano/8", height=16, width=16)
    theirs = vit_mae(recipe)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    ours = sum(p.numel() for p in Ours(recipe, "cpu", "fp32", False).model.parameters())
    assert trained == ours


def test_steps_of_both_learn() -> None:
    """They are whole steps: the weights move, and by the same optimiser."""
    recipe = recipes.mae("Nano/8", height=16, width=16)
    for make in (Ours, HuggingFace):
        contender = make(recipe, "cpu", "bf16", False)
        before = [p.detach().clone() for p in contender.model.parameters()]  # type: ignore[attr-defined]
        contender.step(torch.rand(4, 3, 16, 16))
        moved = [not torch.equal(a, b) for a, b in zip(before, contender.model.parameters(), strict=True)]  # type: ignore[attr-defined]
        assert sum(moved) > 0.9 * len(moved) - 2
        assert type(contender.optimizer) is torch.optim.AdamW


@pytest.mark.usefixtures("no_processor")
def test_data_are_measured_too(tmp_path: Path) -> None:
    from test_train import write_pictures

    write_pictures(tmp_path / "pictures", 26, size=20)
    result = bench(Bench(**SMALL, recipes=("mae",), data=str(tmp_path / "pictures"), workers=0, out=tmp_path / "out"))
    data = result["data"]
    assert (data["samples"], data["workers"], data["contender"]) == (26, 0, "mae")
    assert data["read_per_second"] > 0
    assert 0 < data["data_wait"] < 1


def test_the_peak_is_a_plausible_one() -> None:
    assert 1e9 < matrix_product_peak("cpu", "fp32") < 1e15


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"recipes": ("diffmae",), "beside": "huggingface"}, "none of the recipes is that, as diffmae. Put mae among"),
        ({"recipes": ("mea",)}, "There is no recipe 'mea'"),
        ({"recipes": ("mae_video",)}, "mae_video is a recipe of clips"),
        ({"rounds": 0}, "--rounds 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"size": "Nano/7"}, "height=16"),
        ({"data": "nowhere/"}, "There is no data at 'nowhere/'"),
    ],
)
def test_what_cannot_be_timed_refuses(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(Bench(**{**SMALL, "out": tmp_path, **changed}))
    assert not list(tmp_path.iterdir())


# Attention as it is trained on a CPU in bf16


@pytest.mark.parametrize("queries", [7, 3])
def test_attention_in_bf16_on_a_cpu_is_the_fused_one(queries: int) -> None:
    """The same values and gradients to bf16's eight bits, whichever of the two computes them."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=drawn) for n in (queries, 7, 7))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        out.float().square().sum().backward()
        results.append([out.float(), *(x.grad.float() for x in inputs if x.grad is not None)])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=0.03, atol=0.03)


def test_only_training_in_bf16_on_a_cpu_has_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[torch.dtype] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        fused.append(q.dtype)
        return kernel(q, *others)

    monkeypatch.setattr("unveil.layers.F.scaled_dot_product_attention", watched)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 2, 5, 8, dtype=dtype)
        attend(x, x, x)
        with torch.no_grad():
            attend(x, x, x)
    assert fused == [torch.float32, torch.float32, torch.bfloat16]
