"""`unveil finetune-generator`: what is taken over from the pre-trained model, what is new, and what is refused."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import build, small
from torch import Tensor

from unveil import cli, planning, recipes
from unveil import train as train_module
from unveil.checkpoint import WEIGHTS, About, load_model, read_header, save_weights
from unveil.data import Samples, open_source
from unveil.model import MaskedDiffusionAutoencoder
from unveil.planning import prepare
from unveil.pretraining_job import PretrainingJob
from unveil.recipe import Recipe
from unveil.rundir import Run
from unveil.start import modules_of
from unveil.tasks import finetune_generator as task
from unveil.tasks.finetune_generator import FinetuneGenerator, finetune_generator, with_clean_share
from unveil.tasks.generate import Generate, generate
from unveil.trainer import Trainer

DIGIT = {"size": "Nano/2", "channels": 1, "height": 8}
DIGITS = tuple(str(digit) for digit in range(10))


def save(run: Path, name: str, classes: tuple[str, ...] = (), **arguments: Any) -> Path:
    """A run whose weights were drawn."""
    model = build(small(name, **{**DIGIT, **arguments}))
    about = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none", classes=classes)
    save_weights(run / WEIGHTS, model.recipe, model.state_dict(), about)
    return run


def finetune(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Two steps on 360 digits, unless the options say otherwise."""
    given = {"data": "digits:test", "epochs": 1, "batch_size": 180, "device": "cpu", **options}
    return finetune_generator(FinetuneGenerator(run=run, out=out, **given))


class Started(Exception):
    """Training would begin now."""


@pytest.fixture
def at_the_start(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stops a command before its first step, and keeps what it would train."""
    kept: dict[str, Any] = {}

    def train(
        recipe: Recipe, samples: Samples, run: Run, on_progress: Any, initial: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        kept.update(recipe=recipe, samples=samples, run=run, initial=dict(initial))
        raise Started

    monkeypatch.setattr(task, "train", train)
    return kept


def begun(run: Path, kept: dict[str, Any], **options: Any) -> Recipe:
    with pytest.raises(Started):
        finetune(run, Path("nowhere"), **options)
    return kept["recipe"]


# What is taken over

TABLE, TRUNK = "condition.label_embed", "condition.label"
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "umd": ({}, [TRUNK, TABLE], []),
    "umd_flow": ({}, [TRUNK, TABLE, "condition.label_places"], []),
    "dit": ({}, [TABLE], []),
    "maskdit": ({}, [TABLE], ["head.pred.noisy"]),
    "mae_umd": ({}, [TRUNK, TABLE, "head.pred.eps"], []),
    "dit_umd": ({}, [TRUNK, TABLE], []),
    "maskdit_umd": ({}, [TRUNK, TABLE], []),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_becomes_a_generator(tmp_path: Path, name: str) -> None:
    arguments, fresh, dropped = CASES[name]
    run = save(tmp_path / "run", name, **arguments)
    result = finetune(run, tmp_path / "out")
    assert (result["fresh"], result["dropped"]) == (fresh, dropped)
    assert result["start"] == f"{name} Nano/2"
    assert (result["step"], result["num_classes"]) == (2, 10)
    recipe, about, shapes = read_header(tmp_path / "out")
    expected = recipes.generator(read_header(run)[0], 10)
    training = dataclasses.replace(expected.training, epochs=1, batch_size=180)
    assert recipe == dataclasses.replace(expected, training=training)
    assert about.classes == DIGITS
    new = [n for n in shapes if any(n == f or n.startswith(f + ".") for f in fresh)]
    assert result["tensors"] == len(shapes)
    assert result["loaded"] == len(shapes) - len(new)
    old, _ = load_model(run)
    model, _ = load_model(tmp_path / "out")
    moved = {n for n, v in model.state_dict().items() if n in old.state_dict() and not v.equal(old.state_dict()[n])}
    assert len(moved) > 0.9 * result["loaded"]  # it is all trained; a class token or mask token may be idle
    options = Generate(run=tmp_path / "out", out=tmp_path / "made", num_samples=2, num_steps=2, device="cpu")
    assert generate(options)["classes"] == {"0": 1, "1": 1}


@pytest.mark.parametrize("name", CASES)
def test_before_the_first_step_the_weights_are_the_pretrained_ones(
    tmp_path: Path, at_the_start: dict[str, Any], name: str
) -> None:
    arguments, fresh, dropped = CASES[name]
    run = save(tmp_path / "run", name, **arguments)
    recipe = begun(run, at_the_start, seed=3)
    started = at_the_start
    job = PretrainingJob(recipe, started["samples"], started["run"], started["initial"])
    trainer = Trainer(job, started["samples"], started["run"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        drawn = MaskedDiffusionAutoencoder(recipe).state_dict()
    old = load_model(run)[0].state_dict()
    for state in (trainer.model.state_dict(), trainer.in_use.state_dict()):  # the running average starts there too
        for name, value in state.items():
            is_fresh = any(name == f or name.startswith(f + ".") for f in fresh)
            assert value.equal(drawn[name] if is_fresh else old[name]), name
    left = old.keys() - trainer.model.state_dict().keys()
    assert {name.rpartition(".")[0] for name in left} == set(dropped)


def test_a_model_without_noise_gets_a_schedule(tmp_path: Path, at_the_start: dict[str, Any]) -> None:
    run = save(tmp_path, "mae_umd")
    assert read_header(run)[0].schedule is None
    recipe = begun(run, at_the_start)
    assert recipe.schedule is not None
    assert recipe.schedule.kind == "cosine"
    assert recipe.samplers_heads == ("eps", "x0")


@pytest.mark.parametrize(
    "classes, arguments, fresh",
    [
        (DIGITS, {"num_classes": 10}, []),
        ((), {"num_classes": 10}, []),  # of weights that do not tell their classes' names
        (tuple("abcdefghij"), {"num_classes": 10}, [TABLE]),
        (tuple("abcd"), {"num_classes": 4}, [TABLE]),
    ],
)
def test_the_table_of_classes_is_kept_for_the_same_classes(
    tmp_path: Path, classes: tuple[str, ...], arguments: dict[str, Any], fresh: list[str]
) -> None:
    run = save(tmp_path / "run", "dit", classes, **arguments)
    result = finetune(run, tmp_path / "out")
    assert result["fresh"] == result["dropped"] == fresh


def test_a_generator_can_be_trained_on(tmp_path: Path) -> None:
    run = save(tmp_path / "run", "umd", DIGITS, generator=10)
    result = finetune(run, tmp_path / "out")
    assert (result["fresh"], result["dropped"]) == ([], [])
    assert read_header(tmp_path / "out")[0].name == "umd_finetune"


def test_modules_are_named_by_as_few_words_as_can_be() -> None:
    known = ["a.b.weight", "a.b.bias", "a.c.weight", "d.weight", "e"]
    assert modules_of(["a.b.weight", "a.b.bias"], known) == ["a.b"]
    assert modules_of(["a.b.weight"], known) == ["a.b.weight"]
    assert modules_of(["a.b.weight", "a.b.bias", "a.c.weight", "e"], known) == ["a", "e"]
    assert modules_of([], known) == []
    assert modules_of(["ab.weight"], ["ab.weight", "a.weight"]) == ["ab"]
    assert modules_of(["a.weight"], ["ab.weight", "a.weight"]) == ["a"]


def test_clips_become_a_generator_too(tmp_path: Path) -> None:
    run = save(tmp_path / "run", "umd", size="Nano/4", height=24, frames=8, tubelet_size=2)
    result = finetune(run, tmp_path / "out", data="moving-digits:test", batch_size=None, clean_share=0.0)
    assert result["finished"]
    assert result["num_classes"] == 10


# Options


def test_options_reach_the_recipe(tmp_path: Path, at_the_start: dict[str, Any]) -> None:
    run = save(tmp_path, "umd")
    options: dict[str, Any] = {"epochs": 7, "batch_size": 50, "warmup_epochs": 0.5, "crop_scale": 0.7, "flip": True}
    options |= {"label_dropout": 0.2, "ema_decays": (0.9, 0.99)}
    training = begun(run, at_the_start, blr=0.01, seed=4, save_minutes=1.0, precision="bf16", **options).training
    assert {name: getattr(training, name) for name in options} == options
    assert training.base_lr == 0.01
    kept = at_the_start["run"]
    assert (kept.seed, kept.save_minutes, kept.precision, kept.start) == (4, 1.0, "bf16", str(tmp_path))
    assert kept.classes == DIGITS
    assert at_the_start["samples"].training == training


def test_the_defaults_are_the_recipes(tmp_path: Path, at_the_start: dict[str, Any]) -> None:
    run = save(tmp_path, "umd")
    recipe = begun(run, at_the_start, epochs=None, batch_size=None)
    assert recipe == recipes.generator(read_header(run)[0], 10)
    assert [branch.share for branch in recipe.branches] == [0.05, 0.95]


@pytest.mark.parametrize("batch_size", [16, 64, 128])
def test_the_defaults_do_not_hang_on_the_batch_of_pretraining(batch_size: int) -> None:
    recipe = recipes.umd("Nano/2", channels=1, height=8)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, batch_size=batch_size))
    training = recipes.generator(recipe, 10).training
    assert (training.batch_size, training.ema_decays) == (64, (0.999,))
    large = recipes.umd("S/4")
    large = dataclasses.replace(large, training=dataclasses.replace(large.training, batch_size=batch_size))
    assert recipes.generator(large, 10).training.batch_size == 256


@pytest.mark.parametrize("share, shares", [(0.0, [1.0]), (0.2, [0.2, 0.8]), (0.05, [0.05, 0.95])])
def test_the_clean_share(tmp_path: Path, at_the_start: dict[str, Any], share: float, shares: list[float]) -> None:
    recipe = begun(save(tmp_path, "umd_flow"), at_the_start, clean_share=share)
    assert [branch.share for branch in recipe.branches] == shares
    assert recipe.branches[-1].noise_on == "visible"
    assert [branch.noise_on for branch in recipe.branches[:-1]] == ["none"] * (len(shares) - 1)


def test_no_clean_share_of_a_model_that_had_none() -> None:
    recipe = recipes.generator(small("dit"), 10)
    assert with_clean_share(recipe, 0.0) == recipe


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_the_clean_share_refuses(share: float) -> None:
    with pytest.raises(ValueError, match=r"--clean-share .*at least 0 and below 1"):
        with_clean_share(recipes.generator(small("umd"), 10), share)


def test_a_batch_is_no_larger_than_the_data(tmp_path: Path, at_the_start: dict[str, Any]) -> None:
    photos(tmp_path / "photos")
    run = save(tmp_path / "run", "dit", channels=3)
    for given in (None, 100):
        recipe = begun(run, at_the_start, data=str(tmp_path / "photos"), batch_size=given)
        assert recipe.training.batch_size == 6
        assert recipe.training.lr == pytest.approx(recipe.training.base_lr * 6 / 256)
    assert at_the_start["run"].classes == ("bright", "dark")


def test_pictures_are_kept_in_memory_only_if_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.generator(small("dit", **DIGIT), 10)
    source = open_source("digits:test", 1)
    options = FinetuneGenerator(run=tmp_path, data="digits:test", out=tmp_path / "out", device="cpu")
    _, samples, run = prepare(recipe, source, options)
    assert (samples.cache, run.workers) == (True, 0)
    _, samples, run = prepare(recipe, source, dataclasses.replace(options, workers=1))
    assert (samples.cache, run.workers) == (False, 1)  # each worker would keep its own
    monkeypatch.setattr(planning, "CACHE_LIMIT", 100)
    _, samples, run = prepare(recipe, source, options)
    assert (samples.cache, run.workers) == (False, torch.get_num_threads())


def test_crops_are_left_to_a_gpu_if_the_pictures_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the command alone: a CPU is slower at it, and workers have time of their own."""
    monkeypatch.setattr(planning.Spread, "device", lambda _, wanted: wanted)
    recipe, source = recipes.generator(small("dit", **DIGIT), 10), open_source("digits:test", 1)
    for device, workers, limit, expected in (
        ("cuda", None, 2**31, True), ("cuda:1", 0, 2**31, True), ("cpu", None, 2**31, False), ("cuda", 1, 2**31, False),
        ("cuda", None, 100, False), ("cuda", 0, 100, False),
    ):  # fmt: skip
        options = FinetuneGenerator(
            run=tmp_path, data="digits:test", out=tmp_path / "o", device=device, workers=workers
        )
        monkeypatch.setattr(planning, "CACHE_LIMIT", limit)
        _, samples, run = prepare(recipe, source, options)
        assert (samples.crop_later, run.device) == (expected, device)


# Going on


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and from where it stopped, not from the pre-trained weights."""
    run = save(tmp_path / "run", "umd")
    whole = finetune(run, tmp_path / "whole", epochs=2)
    assert (whole["step"], whole["resumed"]) == (4, False)
    real = train_module.interruptible

    def stop_after_a_step(tell: bool = True) -> Any:
        received: list[int] = [2]

        class Stop:
            def __enter__(self) -> list[int]:
                return received

            def __exit__(self, *_: object) -> None: ...

        return Stop()

    monkeypatch.setattr(train_module, "interruptible", stop_after_a_step)
    part = finetune(run, tmp_path / "part", epochs=2)
    assert (part["step"], part["finished"]) == (1, False)
    monkeypatch.setattr(train_module, "interruptible", real)
    rest = finetune(run, tmp_path / "part", epochs=2)
    assert (rest["step"], rest["steps_now"], rest["resumed"]) == (4, 3, True)
    a, b = (load_model(tmp_path / name)[0].state_dict() for name in ("whole", "part"))
    for name, value in a.items():
        assert value.equal(b[name]), name
    again = finetune(run, tmp_path / "part", epochs=2)
    assert again["steps_now"] == 0


def test_renamed_classes_are_another_run(tmp_path: Path) -> None:
    """Otherwise every label after the renamed one would shift in the middle of a run."""
    run = save(tmp_path / "run", "dit")
    for name in "abc":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 20 * i).save(tmp_path / "photos" / name / f"{i}.png")
    finetune(run, tmp_path / "out", data=str(tmp_path / "photos"), batch_size=4)
    (tmp_path / "photos" / "a").rename(tmp_path / "photos" / "z")
    with pytest.raises(
        ValueError, match=r"holds another run: classes was \['a', 'b', 'c'\] and is now \['b', 'c', 'z'\]"
    ):
        finetune(run, tmp_path / "out", data=str(tmp_path / "photos"), batch_size=4)


def test_a_batch_without_clean_clips_tells_the_way_out(tmp_path: Path) -> None:
    run = save(tmp_path / "run", "umd")
    with pytest.raises(ValueError, match=r"A batch of 19 is too small for the 5% .* or --clean-share 0"):
        finetune(run, tmp_path / "out", batch_size=19)
    assert finetune(run, tmp_path / "out", batch_size=19, clean_share=0.0)["finished"]


def test_another_start_is_another_run(tmp_path: Path) -> None:
    """Otherwise the weights of the first would be trained on under the second one's name."""
    first, second = save(tmp_path / "first", "umd"), save(tmp_path / "second", "umd")
    finetune(first, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out holds another run: start was '.*first' and is now '.*second'"):
        finetune(second, tmp_path / "out")
    with pytest.raises(ValueError, match="holds another run"):
        finetune(first, tmp_path / "out", clean_share=0.1)


# The command line


def photos(folder: Path, size: int = 8) -> Path:
    for name, value in (("bright", 200), ("dark", 30)):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            values = np.full((size, size, 3), value + i, dtype=np.uint8)
            Image.fromarray(values).save(folder / name / f"{i}.png")
    return folder


def run_cli(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = 0
    try:
        cli.main(command.split())
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_tells_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(tmp_path / "run", "maskdit")
    command = f"finetune-generator --run {run} --data digits:test --out {tmp_path}/out --epochs 1 --device cpu"
    code, out, err = run_cli(f"{command} --batch-size 180", capsys)
    assert code == 0
    assert re.search(r"Started from maskdit Nano/2: \d+ of \d+ tensors are its; classes: 10\.", out)
    assert "New, and drawn at random: condition.label_embed.\n" in out
    assert "Left behind: head.pred.noisy.\n" in out
    assert "Finished: step 2 of 2, 360 images seen" in out
    assert "2 steps are few: expect noisy samples. Give more --epochs" in out
    assert re.search(r"2/2 \[.*loss", err)
    code, out, _ = run_cli(f"{command} --batch-size 180 --json", capsys)
    assert code == 0
    result = json.loads(out)
    assert result["resumed"]
    assert result["fresh"] == ["condition.label_embed"]
    code, out, _ = run_cli(f"{command} --batch-size 180", capsys)
    assert out.startswith("Finished before")


@pytest.mark.parametrize(
    "command, patterns",
    [
        ("--run {mae} --data digits:test", ["mae cannot become a generator", "Pre-train umd"]),
        ("--run {diffmae} --data digits:test", ["diffmae cannot become a generator", "mae_umd"]),
        ("--run {tmp}/nowhere --data digits:test", ["nowhere does not exist"]),
        ("--run {rgb} --data {tmp}/flat", ["flat has no labels", "a folder for each class"]),
        ("--run {umd} --data digit:test", ["There is no data at 'digit:test'"]),
        ("--run {video} --data digits:test", ["given to a model of clips of 4 frames"]),
        ("--run {umd} --data digits:test --clean-share 1", ["--clean-share 1: it is a share", "below 1"]),
        ("--run {umd} --data digits:test --clean-share -0.5", ["--clean-share -0.5"]),
        (
            "--run {dit} --data digits:test --clean-share 0.1",
            ["--clean-share 0.1", "without clean clips", "Leave it out"],
        ),
        ("--run {umd} --data digits:test --batch-size 10", ["A batch of 10 is too small", "--clean-share 0"]),
        ("--run {umd} --data digits:test --label-dropout 1", ["label_dropout=1"]),
        ("--run {umd} --data digits:test --epochs 0", ["epochs=0"]),
        ("--run {umd} --data digits:test --batch-size 0", ["batch_size=0"]),
        ("--run {umd} --data digits:test --blr 0", ["base_lr=0"]),
        ("--run {umd} --data digits:test --warmup-epochs -1", ["warmup_epochs=-1"]),
        ("--run {umd} --data digits:test --crop-scale 0", ["crop_scale=0"]),
        ("--run {umd} --data digits:test --ema-decays 1", [r"ema_decays=\(1.0,\)"]),
        ("--run {umd} --data digits:test --seed -1", ["--seed -1"]),
        ("--run {umd} --data digits:test --save-minutes -1", ["--save-minutes -1"]),
        ("--run {umd} --data digits:test --workers 9999", ["9999 workers for 360 samples"]),
        ("--run {umd} --data digits:test --device gpu", ["--device gpu cannot be used"]),
    ],
)
def test_finetune_generator_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, patterns: list[str]
) -> None:
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        **{name: (name, {}) for name in ("umd", "dit", "mae", "diffmae")},
        "rgb": ("umd", {"channels": 3}),
        "video": ("umd", {"frames": 4, "tubelet_size": 2}),
    }
    runs = {name: save(tmp_path / name, *of[:1], **of[1]) for name, of in shapes.items() if f"{{{name}}}" in command}
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    out = tmp_path / "new"
    words = f"finetune-generator --out {out} {command.format(tmp=tmp_path, **runs)}"
    code, printed, error = run_cli(words if "--device" in words else f"{words} --device cpu", capsys)
    assert (code, printed) == (2, ""), error
    (line,) = error.splitlines()
    for pattern in patterns:
        assert re.search(pattern, line), (pattern, line)
    assert not (out / WEIGHTS).exists()
