"""`unveil generate`: which samples are made and where they lie, and what is refused before anything is written."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import build, small
from torch import Tensor

from unveil import cli, gallery, pipeline, spread
from unveil.checkpoint import WEIGHTS, About, load_model, save_weights
from unveil.gallery import CLAIM, grid_rows, write_npz
from unveil.masking import Mask
from unveil.model import MaskedDiffusionAutoencoder
from unveil.report import contact_sheet
from unveil.sampling import guidance
from unveil.tasks import generate as task
from unveil.tasks.generate import Generate, chosen_classes, generate

DIGIT = {"size": "Nano/2", "channels": 1, "height": 8}
NAMES = ("ant", "bee", "cat")


def save(run: Path, name: str, classes: tuple[str, ...] = (), seed: int = 0, **arguments: Any) -> Path:
    """A run whose weights were drawn; with classes, the recipe's generator."""
    if classes:
        arguments["generator"] = len(classes)
    label_dropout = arguments.pop("label_dropout", None)
    recipe = small(name, **{**DIGIT, **arguments})
    if label_dropout is not None:
        training = dataclasses.replace(recipe.training, label_dropout=label_dropout)
        recipe = dataclasses.replace(recipe, training=training)
    model = build(recipe, seed, spread=0.2)
    about = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none", classes=classes)
    save_weights(run / WEIGHTS, model.recipe, model.state_dict(), about)
    return run


@pytest.fixture
def conditional(tmp_path: Path) -> Path:
    return save(tmp_path / "conditional", "umd", NAMES)


@pytest.fixture
def unconditional(tmp_path: Path) -> Path:
    return save(tmp_path / "unconditional", "umd")


def make(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    return generate(Generate(run=run, out=out, **{"num_samples": 6, "num_steps": 3, "device": "cpu", **options}))


def pictures(out: Path) -> dict[str, np.ndarray]:
    """The samples' files by name."""
    return {path.name: np.array(Image.open(path)) for path in sorted(out.glob("[0-9]*.png"))}


def as_bytes(clips: Tensor) -> np.ndarray:
    """(B, C, 1, H, W) in [0, 1] as (B, H, W, C) uint8."""
    return (clips[:, :, 0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def labels_of(out: Path) -> list[dict[str, str]]:
    with (out / "labels.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def assert_same(made: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert made.keys() == other.keys()
    for name, values in made.items():
        np.testing.assert_array_equal(values, other[name])


# Which samples


def test_a_sample_is_the_pipelines(tmp_path: Path, conditional: Path) -> None:
    result = make(conditional, tmp_path / "out", seed=5)
    model, _ = load_model(conditional)
    expected = pipeline.generate(model, range(6), torch.arange(6) % 3, num_steps=3, seed=5)
    made = pictures(tmp_path / "out")
    assert list(made) == [f"{i:05d}.png" for i in range(6)]
    np.testing.assert_array_equal(np.stack(list(made.values())), as_bytes(expected)[..., 0])
    assert len(np.unique(np.stack(list(made.values())), axis=0)) == 6  # they differ
    assert result["num_samples"] == result["files"]["samples"] == 6
    assert result["steps"] == result["network_evaluations"] == 3
    assert result["guidance"] is None
    assert result["samples_per_second"] == pytest.approx(6 / result["seconds"])
    json.dumps(result, allow_nan=False)


def test_the_seed_decides(tmp_path: Path, unconditional: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(unconditional, tmp_path / name, seed=seed)
    assert_same(pictures(tmp_path / "a"), pictures(tmp_path / "b"))
    a, c = pictures(tmp_path / "a"), pictures(tmp_path / "c")
    assert all((a[name] != c[name]).any() for name in a)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("dpmpp", 0.0)])
def test_a_sample_does_not_depend_on_its_batch(conditional: Path, sampler: str, eta: float) -> None:
    """float32; a batch of another size sums in another order."""
    model, _ = load_model(conditional)
    labels = torch.arange(7) % 3
    scale = guidance("constant", 2.0, 1000)
    settings: dict[str, Any] = {"num_steps": 5, "sampler": sampler, "eta": eta, "guidance": scale}
    whole = pipeline.generate(model, range(7), labels, **settings)
    for size in (1, 2, 3):
        parts = [
            pipeline.generate(model, range(7)[i : i + size], labels[i : i + size], **settings)
            for i in range(0, 7, size)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.arange(4) % 3, "4 labels for 7 clips"),
        (torch.zeros(1).long(), "1 labels for 7 clips"),
        (torch.zeros(7), r"The labels are \(7,\) of torch.float32; give one class for each clip, as int64"),
        (torch.zeros(7, 1).long(), r"The labels are \(7, 1\) of torch.int64"),
    ],
)
def test_the_pipeline_wants_one_class_for_each_clip(conditional: Path, labels: Tensor, message: str) -> None:
    model, _ = load_model(conditional)
    with pytest.raises(ValueError, match=message):
        pipeline.generate(model, range(7), labels, num_steps=1)


def test_out_of_memory_is_a_sentence(
    tmp_path: Path, unconditional: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.\nA page of advice")

    monkeypatch.setattr(pipeline, "generate", full)
    code, _, error = run_cli(f"generate --run {unconditional} --device cpu --out {tmp_path}/out", capsys)
    assert (code, error) == (2, "unveil: --batch-size 64 does not fit into the memory of cpu. Use a smaller one.\n")
    monkeypatch.setitem(cli.RUN, Generate, (full, cli.RUN[Generate][1]))
    code, _, error = run_cli(f"generate --run {unconditional} --out {tmp_path}/out", capsys)
    assert code == 2
    assert error == (
        "unveil: CUDA out of memory. Tried to allocate 1 TiB. Use a smaller --batch-size, or a smaller model.\n"
    )


def test_the_batch_size_changes_nothing(tmp_path: Path, conditional: Path) -> None:
    make(conditional, tmp_path / "a", npz=True)
    make(conditional, tmp_path / "b", npz=True, batch_size=4)
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in "ab")
    assert np.abs(a - b).max() <= 1
    assert [row["label"] for row in labels_of(tmp_path / "a")] == [row["label"] for row in labels_of(tmp_path / "b")]


def test_more_samples_go_on_from_the_first(tmp_path: Path, conditional: Path) -> None:
    make(conditional, tmp_path / "whole", batch_size=1)
    make(conditional, tmp_path / "begin", num_samples=4, batch_size=1)
    make(conditional, tmp_path / "end", num_samples=2, first=4, batch_size=1)
    begin, end = pictures(tmp_path / "begin"), pictures(tmp_path / "end")
    assert list(end) == ["00004.png", "00005.png"]
    assert_same({**begin, **end}, pictures(tmp_path / "whole"))
    assert labels_of(tmp_path / "begin") + labels_of(tmp_path / "end") == labels_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "classes, labels",
    [
        (None, [0, 1, 2, 0, 1, 2]),
        ("all", [0, 1, 2, 0, 1, 2]),
        ("2", [2] * 6),
        ("cat", [2] * 6),
        ("cat, 0", [2, 0, 2, 0, 2, 0]),
        ("1,bee,cat", [1, 1, 2, 1, 1, 2]),
    ],
)
def test_classes_take_turns(tmp_path: Path, conditional: Path, classes: str | None, labels: list[int]) -> None:
    result = make(conditional, tmp_path / "out", classes=classes, num_steps=1)
    rows = labels_of(tmp_path / "out")
    assert [int(row["label"]) for row in rows] == labels
    assert [row["class"] for row in rows] == [NAMES[label] for label in labels]
    assert [row["file"] for row in rows] == list(pictures(tmp_path / "out"))
    assert result["classes"] == {NAMES[label]: labels.count(label) for label in sorted(set(labels))}
    model, _ = load_model(conditional)
    expected = pipeline.generate(model, range(6), torch.tensor(labels), num_steps=1)
    np.testing.assert_array_equal(np.stack(list(pictures(tmp_path / "out").values())), as_bytes(expected)[..., 0])


def test_a_name_goes_before_a_number() -> None:
    """Folders sort as words, so the class that is called 10 is not the tenth."""
    assert chosen_classes("10,2,3", 4, ("1", "10", "2", "3")) == [1, 2, 3]
    assert chosen_classes("2,3", 4, ()) == [2, 3]
    assert chosen_classes("all", 4, ()) == [0, 1, 2, 3]
    assert chosen_classes("all", 3, ("all", "none", "bread, white")) == [0]
    assert chosen_classes("bread, white", 3, ("all", "none", "bread, white")) == [2]


def test_no_class_of_a_model_with_classes(tmp_path: Path, conditional: Path) -> None:
    result = make(conditional, tmp_path / "out", classes="none")
    assert result["classes"] is None
    assert not (tmp_path / "out" / "labels.csv").exists()
    model, _ = load_model(conditional)
    expected = pipeline.generate(model, range(6), torch.full((6,), 3), num_steps=3)
    np.testing.assert_array_equal(np.stack(list(pictures(tmp_path / "out").values())), as_bytes(expected)[..., 0])
    make(conditional, tmp_path / "ants", classes="ant")
    ants = pictures(tmp_path / "ants")
    assert any((values != ants[name]).any() for name, values in pictures(tmp_path / "out").items())


def test_a_model_without_names_of_its_classes(tmp_path: Path) -> None:
    model = build(small("umd", **DIGIT, generator=3))
    about = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
    save_weights(tmp_path / WEIGHTS, model.recipe, model.state_dict(), about)
    assert make(tmp_path, tmp_path / "out", classes="2", num_steps=1)["classes"] == {"2": 6}
    with pytest.raises(ValueError, match="It knows no names"):
        make(tmp_path, tmp_path / "new", classes="cat")


def test_a_model_that_is_nothing_but_hidden(tmp_path: Path) -> None:
    """DiffMAE with everything hidden has noise in its decoder."""
    run = save(tmp_path / "run", "diffmae", mask_ratio=1.0)
    make(run, tmp_path / "out", num_samples=2)
    assert len(pictures(tmp_path / "out")) == 2


# Guidance


def by_pipeline(model: MaskedDiffusionAutoencoder, labels: Tensor, **settings: Any) -> Tensor:
    return pipeline.generate(model, range(6), labels, num_steps=3, **settings)


@pytest.mark.parametrize("name", ["umd", "umd_flow", "dit", "maskdit"])
def test_guidance_1_is_the_class_and_0_is_none(tmp_path: Path, name: str) -> None:
    model, _ = load_model(save(tmp_path, name, NAMES))
    assert model.schedule is not None
    labels, null = torch.arange(6) % 3, torch.full((6,), 3)

    def guided(scale: float) -> Tensor:
        return by_pipeline(model, labels, guidance=guidance("constant", scale, model.schedule.end))  # type: ignore[union-attr]

    torch.testing.assert_close(guided(1.0), by_pipeline(model, labels), rtol=0, atol=0)
    torch.testing.assert_close(guided(0.0), by_pipeline(model, null), rtol=0, atol=0)
    torch.testing.assert_close(guided(1 + 1e-6), by_pipeline(model, labels), rtol=0, atol=1e-4)
    assert (by_pipeline(model, labels) - by_pipeline(model, null)).abs().max() > 1e-3
    assert (guided(3.0) - guided(1.0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options, evaluations",
    [
        ({"guidance_scale": 2.0}, 8),
        ({"guidance_scale": 0.0}, 4),
        ({"guidance_scale": 1.0}, 4),
        ({"guidance_scale": 2.0, "guidance": "interval", "guidance_interval": (0.4, 0.8)}, 6),
        ({"guidance_scale": 2.0, "guidance": "power_cosine", "guidance_power": 2.0}, 7),
    ],
)
def test_guidance_reaches_the_pipeline(
    tmp_path: Path, conditional: Path, options: dict[str, Any], evaluations: int
) -> None:
    """Times 1000, 750, 500, 250; power cosine is 1 at the first of them."""
    result = make(conditional, tmp_path / "out", num_steps=4, npz=True, **options)
    assert result["network_evaluations"] == evaluations
    model, _ = load_model(conditional)
    scale = None
    kind = options.get("guidance", "constant")
    if options["guidance_scale"] != 1:
        interval, power = options.get("guidance_interval", (0.0, 1.0)), options.get("guidance_power", 4.0)
        scale = guidance(kind, options["guidance_scale"], 1000, interval, power)
        assert result["guidance"].items() >= {"kind": kind, "scale": options["guidance_scale"]}.items()
    expected = pipeline.generate(model, range(6), torch.arange(6) % 3, num_steps=4, guidance=scale)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], as_bytes(expected))


# Samplers


@pytest.mark.parametrize(
    "options, settings",
    [
        ({"sampler": "ddpm"}, {"sampler": "ddpm"}),
        ({"sampler": "dpmpp"}, {"sampler": "dpmpp"}),
        ({"eta": 0.5}, {"eta": 0.5}),
        ({"predict": "x0"}, {"predict": "x0"}),
        ({"predict": "eps"}, {"predict": "eps"}),
        ({"times": "strided", "eta": 1.0}, {"eta": 1.0, "times": [1000, 750, 500, 250, 1, 0]}),
    ],
)
def test_options_reach_the_sampler(
    tmp_path: Path, conditional: Path, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    result = make(conditional, tmp_path / "out", num_steps=4, npz=True, **options)
    model, _ = load_model(conditional)
    labels = torch.arange(6) % 3
    expected = as_bytes(pipeline.generate(model, range(6), labels, num_steps=4, **settings))
    plain = as_bytes(pipeline.generate(model, range(6), labels, num_steps=4))
    made = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    np.testing.assert_array_equal(made, expected)
    if options != {"predict": "eps"}:  # which is the usual one
        assert (made != plain).any()
    assert result["steps"] == (5 if "times" in options else 4)


# Files


def test_the_npz_holds_the_files(tmp_path: Path, conditional: Path) -> None:
    make(conditional, tmp_path / "out", npz=True, classes="cat,ant")
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert set(file.files) == {"arr_0", "arr_1"}
        samples, labels = file["arr_0"], file["arr_1"]
    assert (samples.shape, samples.dtype) == ((6, 8, 8, 1), np.dtype(np.uint8))
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(samples[..., 0], np.stack(list(pictures(tmp_path / "out").values())))
    assert labels.tolist() == [int(row["label"]) for row in labels_of(tmp_path / "out")] == [2, 0] * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(f"{i:05d}.png" for i in range(6)), "grid.png", "labels.csv", "samples.npz"]
    )


def test_colour_is_kept(tmp_path: Path) -> None:
    make(save(tmp_path / "run", "dit", channels=3), tmp_path / "out", npz=True)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file.files == ["arr_0"]  # no classes, no labels
        samples = file["arr_0"]
    assert samples.shape == (6, 8, 8, 3)
    np.testing.assert_array_equal(samples, np.stack(list(pictures(tmp_path / "out").values())))


@pytest.mark.parametrize("files, grid, npz", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for_is_written(
    tmp_path: Path, conditional: Path, files: bool, grid: bool, npz: bool
) -> None:
    result = make(conditional, tmp_path / "out", files=files, grid=grid, npz=npz, num_samples=2, num_steps=1)
    expected = {"00000.png", "00001.png", "labels.csv"} if files else {"grid.png"} if grid else {"samples.npz"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert result["files"]["samples"] == (2 if files else 0)
    assert {Path(str(path)).name for name, path in result["files"].items() if name != "samples"} <= expected


def test_clips_are_animated(tmp_path: Path) -> None:
    run = save(tmp_path / "run", "umd", frames=4, tubelet_size=2)
    make(run, tmp_path / "out", num_samples=2)
    model, _ = load_model(run)
    clips = pipeline.generate(model, range(2), num_steps=3)
    with Image.open(tmp_path / "out" / "00001.png") as image:
        assert image.n_frames == 4  # type: ignore[attr-defined]
        for frame in range(4):
            image.seek(frame)
            expected = (clips[1, 0, frame] * 255).round().to(torch.uint8).numpy()
            np.testing.assert_array_equal(np.array(image.convert("L")), expected)
    assert (tmp_path / "out" / "grid.png").exists()


def test_what_no_png_can_hold_is_an_array(tmp_path: Path) -> None:
    make(save(tmp_path / "run", "umd", NAMES, channels=5), tmp_path / "out", num_samples=2, num_steps=1)
    for row in labels_of(tmp_path / "out"):
        assert np.load(tmp_path / "out" / row["file"]).shape == (8, 8, 5)


def flat(value: int) -> Tensor:
    return torch.full((1, 1, 4, 4), value / 255)


def test_a_sheet_has_a_row_for_each_class() -> None:
    labels = [i % 3 for i in range(100)]
    rows = grid_rows([flat(i) for i in range(100)], labels, NAMES, 0, 10)
    assert [caption for caption, _ in rows] == ["ant", "", "", "bee", "", "", "cat", "", ""]
    assert [round(float(clip.mean() * 255)) for clip in rows[3][1]] == list(range(1, 31, 3))
    (one,) = grid_rows([flat(i) for i in range(7)], [1] * 7, NAMES, 0, 10)
    assert (one[0], len(one[1])) == ("bee", 7)
    assert contact_sheet(rows).width > 0


def test_a_sheet_of_many_classes_names_them_under_each_row() -> None:
    rows = grid_rows([flat(i) for i in range(25)], list(range(25)), (), 0, 10)
    assert [caption for caption, _ in rows] == [
        ", ".join(map(str, range(a, b))) for a, b in ((0, 10), (10, 20), (20, 25))
    ]
    assert [len(clips) for _, clips in rows] == [10, 10, 5]


def test_a_sheet_without_classes_numbers_its_samples() -> None:
    rows = grid_rows([flat(i) for i in range(12)], None, (), 64, 10)
    assert [caption for caption, _ in rows] == ["samples 64 to 73", "samples 74 to 75"]


def test_a_sheet_is_limited(tmp_path: Path, unconditional: Path) -> None:
    """110 samples of 8 pixels, enlarged twelve times: ten lines of ten with a caption each."""
    make(unconditional, tmp_path / "out", num_samples=110, num_steps=1, files=False)
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.size == (10 * (96 + 4) + 4, 10 * (96 + 4 + 18) + 4)


def test_nothing_is_left_of_a_failure(tmp_path: Path, unconditional: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(gallery, "save_png", full)
    with pytest.raises(ValueError, match="No space left"):
        make(unconditional, tmp_path / "out", npz=True, files=False)
    assert list((tmp_path / "out").iterdir()) == []


# The command line


def run_cli(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = 0
    try:
        cli.main(command.split())
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_tells_what_it_made(tmp_path: Path, conditional: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"generate --run {conditional} --num-samples 6 --num-steps 4 --guidance-scale 1.5 --device cpu --out {tmp_path}"
    )
    code, out, _ = run_cli(f"{command}/a", capsys)
    assert code == 0
    assert re.search(
        r"Made 6 sample\(s\) of 3 class\(es\) in 4 DDIM steps, constant guidance 1\.5: 8 network eval", out
    )
    assert "6 samples" in out
    assert "grid.png" in out
    code, out, err = run_cli(f"{command}/b --json", capsys)
    assert code == 0
    assert json.loads(out)["guidance"] == {"kind": "constant", "scale": 1.5}
    assert "Made 6" in err


def test_the_first_process_speaks_for_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(cli.RUN, Generate, (lambda options: {"rank": 1}, cli.RUN[Generate][1]))
    assert run_cli(f"generate --run a --out {tmp_path}", capsys) == (0, "", "")
    assert run_cli(f"generate --run a --out {tmp_path} --json", capsys) == (0, "", "")


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "umd": ("umd", {}),
    "classes": ("umd", {"classes": NAMES}),
    "undropped": ("umd", {"classes": NAMES, "label_dropout": 0.0}),
    "many": ("umd", {"classes": tuple(f"class {i}" for i in range(30))}),
    "flow": ("umd_flow", {"classes": NAMES}),
    "video": ("umd", {"frames": 4, "tubelet_size": 2}),
    "mae": ("mae", {}),
    "mae_umd": ("mae_umd", {}),
    "diffmae": ("diffmae", {}),
}


@pytest.mark.parametrize(
    "command, patterns",
    [
        ("{mae}", ["This mae Nano/2 cannot generate", "Train umd"]),
        ("{diffmae}", ["This diffmae Nano/2 cannot generate", "represent"]),
        ("{mae_umd}", ["This mae_umd Nano/2 cannot generate", "unveil finetune-generator"]),
        ("{umd} --classes all", ["trained without classes"]),
        ("{umd} --classes 3", ["trained without classes", "Ask for pictures of no class"]),
        ("{umd} --guidance-scale 2", ["Guidance leads towards a class, but this model has none"]),
        ("{classes} --classes none --guidance-scale 2", ["but none was asked for", "ask for a class"]),
        ("{classes} --classes 3", ["--classes '3': 3 is no class of this model. Use 0 to 2"]),
        ("{classes} --classes=-1", ["--classes '-1': -1 is no class"]),
        ("{classes} --classes cta", ["'cta' is no class of this model", "0 to 2. Did you mean 'cat'"]),
        ("{classes} --classes 0,", ["'' is no class of this model"]),
        ("{many} --classes dog", ["'dog' is no class of this model", "0 to 29. `unveil info --json` lists"]),
        ("{umd} --num-samples 0", ["--num-samples 0: use 1 to 10000000"]),
        ("{umd} --batch-size 0", ["--batch-size 0: use 1 to"]),
        ("{umd} --num-samples 99999999999", ["--num-samples 99999999999: use 1 to 10000000"]),
        ("{umd} --first -1", ["--first -1: samples are numbered from 0"]),
        ("{umd} --first 9223372036854775807", ["samples are numbered from 0 to 1000000000000"]),
        ("{classes} --classes=", ["'' is no class of this model"]),
        ("{umd} --device meta", ["--device meta computes nothing"]),
        ("{undropped} --guidance-scale 2", ["label_dropout=0", "--label-dropout 0.1"]),
        ("{umd} --num-steps 0", ["--num-steps 0", "Use 1 or more"]),
        ("{umd} --num-steps 1001", ["--num-steps 1001", "Use 1 to 1000"]),
        ("{flow} --num-steps 0", ["--num-steps 0", "Use 1 or more"]),
        (
            "{umd} --times strided --num-steps 62",
            ["--num-steps 62 --times strided: the stride must divide 1000. Use 50 or 40"],
        ),
        ("{flow} --times strided", ["--times strided", "umd_flow_finetune is a flow", "--times even"]),
        ("{umd} --eta 0.5 --sampler ddpm", ["--eta 0.5 belongs to ddim; ddpm has its noise fixed"]),
        ("{umd} --eta 1 --sampler dpmpp", ["belongs to ddim; dpmpp"]),
        ("{umd} --eta 1.5", ["--eta 1.5: it runs from 0"]),
        ("{umd} --eta nan", ["--eta nan: it runs from 0"]),
        ("{flow} --predict eps", ["--predict eps, but this umd_flow_finetune predicts x0 for noise"]),
        ("{umd} --predict x0", ["--predict x0, but this umd predicts eps for noise"]),
        ("{classes} --guidance-scale -1", ["--guidance-scale -1: use 0 to 1000"]),
        ("{classes} --guidance-scale nan", ["--guidance-scale nan: use 0"]),
        ("{classes} --guidance-scale 1e38", [r"--guidance-scale 1e\+38: use 0"]),
        ("{classes} --guidance interval", ["--guidance interval with --guidance-scale 1 guides nowhere"]),
        (
            "{classes} --guidance-scale 2 --guidance interval --guidance-interval 0.5 0.2",
            ["--guidance-interval 0.5 0.2: it is a part", "the first number is the lower"],
        ),
        (
            "{classes} --guidance-scale 2 --guidance-interval 0.2 0.5",
            ["--guidance-interval belongs to --guidance interval, but it is constant"],
        ),
        (
            "{classes} --guidance-scale 2 --guidance power_cosine --guidance-power 0",
            ["--guidance-power 0: use a number above 0"],
        ),
        ("{classes} --guidance-scale 2 --guidance interval --guidance-power 2", ["belongs to --guidance power_cosine"]),
        ("{video} --npz", ["--npz holds pictures", "clips of 4 frames"]),
        ("{umd} --no-files --no-grid", ["nothing would be kept"]),
        ("{umd} --device gpu", ["--device gpu cannot be used"]),
        ("{tmp}/nowhere", ["nowhere does not exist"]),
    ],
)
def test_generate_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, patterns: list[str]
) -> None:
    runs = {}
    for name, (recipe, arguments) in SHAPES.items():
        if f"{{{name}}}" in command:
            runs[name] = save(tmp_path / name, recipe, **arguments)
    out = tmp_path / "new"
    code, printed, error = run_cli(f"generate --out {out} --run {command.format(tmp=tmp_path, **runs)}", capsys)
    assert (code, printed) == (2, ""), error
    (line,) = error.splitlines()
    for pattern in patterns:
        assert re.search(pattern, line), (pattern, line)
    assert not out.exists()


def test_a_second_run_in_the_same_new_directory_is_refused(
    tmp_path: Path, unconditional: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found it empty; only one may write, and it leaves no mark behind."""
    out, checked = tmp_path / "out", task.plan

    def plan_and_start_another(options: Any, *arguments: Any) -> Any:
        planned = checked(options, *arguments)
        monkeypatch.setattr(task, "plan", checked)
        make(unconditional, tmp_path / "elsewhere", num_samples=1)
        out.mkdir()
        (out / CLAIM).touch()  # the other one has begun
        return planned

    monkeypatch.setattr(task, "plan", plan_and_start_another)
    with pytest.raises(ValueError, match="out is in use by another run"):
        make(unconditional, out, num_samples=2)
    assert [path.name for path in out.iterdir()] == [CLAIM]
    assert not (tmp_path / "elsewhere" / CLAIM).exists()


def test_generate_refuses_a_directory_that_holds_something(
    tmp_path: Path, unconditional: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(unconditional, tmp_path / "out", num_samples=2)
    before = pictures(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is not empty \('00000.png'\). Name a new directory"):
        make(unconditional, tmp_path / "out", num_samples=2, seed=1)
    assert_same(pictures(tmp_path / "out"), before)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file\. Name a directory"):
        make(unconditional, tmp_path / "file")
    code, _, error = run_cli(f"generate --run {unconditional} --out {tmp_path}/file/x", capsys)
    assert code == 2
    assert "file" in error
    (tmp_path / "empty").mkdir()
    make(unconditional, tmp_path / "empty", num_samples=1, num_steps=1)
    (tmp_path / "killed").mkdir()
    for name in (CLAIM, "00000.png"):
        (tmp_path / "killed" / name).touch()
    with pytest.raises(ValueError, match="killed holds what another run is writing, or left when it was killed"):
        make(unconditional, tmp_path / "killed")


def test_a_class_called_none_can_be_asked_for(tmp_path: Path) -> None:
    run = save(tmp_path / "run", "umd", ("all", "none"))
    make(run, tmp_path / "out", classes="none", num_samples=2, num_steps=1)
    assert [row["class"] for row in labels_of(tmp_path / "out")] == ["none", "none"]


def test_a_model_that_never_saw_a_whole_picture_says_so(
    tmp_path: Path, conditional: Path, unconditional: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (notice,) = make(unconditional, tmp_path / "a", num_samples=1, num_steps=1)["notices"]
    assert re.search(r"This umd was trained with 37\.5% of every noisy picture hidden", notice)
    assert make(conditional, tmp_path / "b", num_samples=1, num_steps=1)["notices"] == []
    command = f"generate --run {unconditional} --num-samples 1 --num-steps 1 --device cpu --out {tmp_path}/c"
    assert notice in run_cli(command, capsys)[1]


# Latents

LATENT = {"size": "Nano/2", "channels": 4, "height": 8, "latents": True}


def test_latents_are_neither_cut_nor_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(tmp_path / "run", "umd", NAMES, **LATENT)
    result = make(run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"{i:05d}.npy" for i in range(6)),
        "labels.csv",
    ]
    assert [row["file"] for row in labels_of(tmp_path / "out")] == [f"{i:05d}.npy" for i in range(6)]
    values = np.stack([np.load(tmp_path / "out" / f"{i:05d}.npy") for i in range(6)])
    assert (values.shape, values.dtype) == ((6, 8, 8, 4), np.float32)
    assert values.min() < -1
    assert values.max() > 2
    model, _ = load_model(run)
    expected = pipeline.generate(model, range(6), torch.arange(6) % 3, num_steps=3)
    np.testing.assert_array_equal(values, expected[:, :, 0].permute(0, 2, 3, 1).numpy())
    assert "latents, not pictures" in result["notices"][0]
    for option in ("--npz", "--no-files"):
        code, _, error = run_cli(f"generate --run {run} --out {tmp_path}/{option} --device cpu {option}", capsys)
        assert code == 2
        assert "makes latents of 4 channels" in error


def test_commands_that_read_pictures_refuse_a_model_of_latents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run", "umd", **LATENT)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "photos" / "a.png")
    for command in (
        "probe --data {photos}",
        "evaluate inpainting --data {photos}",
        f"finetune-generator --data {{photos}} --out {tmp_path}/new",
        f"inpaint --images {{photos}} --out {tmp_path}/new",
    ):
        code, out, error = run_cli(f"{command.format(photos=tmp_path / 'photos')} --run {run}", capsys)
        assert (code, out) == (2, ""), command
        assert "This model works on latents of 4 channels" in error, command
    assert not (tmp_path / "new").exists()
    assert "8 x 8 latents" in run_cli(f"info --run {run}", capsys)[1]


def test_predictions_of_latents_keep_their_range() -> None:
    """The same weights, once on pixels and once on latents: only what lies outside of the pixels' range differs."""
    latents = build(small("umd_flow", **LATENT), spread=0.2)
    clip = dataclasses.replace(latents.recipe.clip, bounded=True)
    bounded = MaskedDiffusionAutoencoder(dataclasses.replace(latents.recipe, clip=clip)).eval()
    bounded.load_state_dict(latents.state_dict())
    x_t = 3 * torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    everything = torch.arange(16).expand(2, -1)
    free, cut = (m.denoiser(x_t, Mask(everything[:, :0], everything))(x_t, 0.5) for m in (latents, bounded))
    assert isinstance(free, Tensor)
    assert free.min() < 0
    assert free.max() > 1
    assert torch.equal(cut, free.clamp(0, 1))
    assert latents.clips(free).min() < 0
    assert bounded.clips(free).min() == 0


# Several processes


def torchrun(command: str, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Two processes of the command line, or of a script that has the same arguments."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words += ["--", str(script)] if script else ["-m", "--", "unveil.cli"]
    words += command.split()
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.parametrize(
    "asked, there, device",
    [
        (None, True, "cuda:1"),
        ("cuda", True, "cuda:1"),
        ("cuda:0", True, "cuda:0"),
        ("cpu", True, "cpu"),
        (None, False, None),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, there: bool, device: str | None
) -> None:
    monkeypatch.setattr(spread, "pick_device", lambda chosen: chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    for name, value in {"WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    one = spread.Spread()
    assert (one.world, one.rank) == (2, 3)
    assert one.device(asked) == device
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert spread.Spread().device(asked) == asked
    assert spread.Spread().rank == 0


def test_the_parts_of_processes_are_put_in_order(tmp_path: Path) -> None:
    """Sample i is of process i % 3; more processes than samples leave no part of the last ones."""
    parts = [tmp_path / f"{rank}.npy" for rank in range(3)]
    for rank, part in enumerate(parts):
        np.save(part, np.arange(rank, 7, 3, dtype=np.uint8).reshape(-1, 1, 1, 1))
    write_npz(tmp_path / "samples.npz", parts, 7, torch.arange(7) % 2)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].flatten().tolist() == list(range(7))
        assert file["arr_1"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    np.save(parts[0], np.zeros((1, 2, 2, 1), dtype=np.uint8))
    write_npz(tmp_path / "one.npz", [parts[0], tmp_path / "none.npy"], 1, None)
    with np.load(tmp_path / "one.npz") as file:
        assert file.files == ["arr_0"]


@pytest.mark.slow
def test_processes_share_the_samples(tmp_path: Path, conditional: Path) -> None:
    """Seven samples of two processes in batches of 2 are those of one process in batches of 64."""
    options = f"generate --run {conditional} --num-samples 7 --num-steps 10 --sampler ddpm --npz --device cpu --json"
    outcome = torchrun(f"{options} --batch-size 2 --out {tmp_path}/two --guidance-scale 2")
    assert outcome.returncode == 0, outcome.stderr
    (line,) = outcome.stdout.splitlines()  # of one process only
    assert json.loads(line)["processes"] == 2
    make(conditional, tmp_path / "one", num_samples=7, num_steps=10, sampler="ddpm", npz=True, guidance_scale=2.0)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    with np.load(tmp_path / "one" / "samples.npz") as one, np.load(tmp_path / "two" / "samples.npz") as two:
        # 1e-3 of the range is a quarter of a step, so a rounded value may be the next one
        assert np.abs(one["arr_0"].astype(int) - two["arr_0"].astype(int)).max() <= 1
        assert len(np.unique(one["arr_0"], axis=0)) == 7
        np.testing.assert_array_equal(one["arr_1"], two["arr_1"])
        np.testing.assert_array_equal(two["arr_0"][..., 0], np.stack(list(pictures(tmp_path / "two").values())))
    assert labels_of(tmp_path / "one") == labels_of(tmp_path / "two")
    grids = [np.array(Image.open(tmp_path / name / "grid.png")).astype(int) for name in ("one", "two")]
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
def test_more_processes_than_samples(tmp_path: Path, unconditional: Path) -> None:
    outcome = torchrun(
        f"generate --run {unconditional} --num-samples 1 --num-steps 2 --npz --device cpu --out {tmp_path}/out"
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "Made 1 sample(s)" in outcome.stdout
    assert len(np.load(tmp_path / "out" / "samples.npz")["arr_0"]) == 1


@pytest.mark.slow
def test_an_error_ends_every_process(tmp_path: Path, unconditional: Path) -> None:
    begin = time.monotonic()
    outcome = torchrun(f"generate --run {unconditional} --num-samples 0 --device cpu --out {tmp_path}/out")
    assert outcome.returncode != 0
    assert "--num-samples 0: use 1 to 10000000" in outcome.stderr
    assert time.monotonic() - begin < 120
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_failure_of_one_process_ends_the_other(tmp_path: Path, unconditional: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from unveil import cli, gallery\n"
        "def full(*_):\n"
        "    raise OSError('no room for the second')\n"
        "if os.environ['RANK'] == '1':\n"
        "    assert callable(gallery.save_pixels)\n"
        "    gallery.save_pixels = full\n"
        "cli.main(sys.argv[1:])\n"
    )
    begin = time.monotonic()
    options = "--num-samples 4 --num-steps 2 --npz --device cpu"
    outcome = torchrun(f"generate --run {unconditional} {options} --out {tmp_path}/out", script)
    assert outcome.returncode != 0
    assert "unveil: no room for the second" in outcome.stderr
    assert "Made" not in outcome.stdout
    assert time.monotonic() - begin < 120
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "00002.png"]


def test_other_commands_are_not_spread(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, error = run_cli("info --run nowhere", capsys)
    assert (code, out) == (2, "")
    assert "torchrun started 2 processes, but only pretrain, finetune, finetune-generator and generate" in error
