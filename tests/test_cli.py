"""The command line: people's text on stderr, one JSON line on stdout, and one sentence for a user's error."""

import ast
import dataclasses
import inspect
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import tyro
from PIL import Image
from small import build, small

from unveil import cli, recipes
from unveil import pretraining_job as job_module
from unveil.checkpoint import WEIGHTS, About, load_model, read_header, save_weights
from unveil.data import Samples, open_source
from unveil.planning import parse_image_size
from unveil.pretraining import recipe_of
from unveil.tasks.pretrain import Pretrain
from unveil.train import Progress
from unveil.trouble import Step, write_bundle

ABOUT = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
COMMANDS = {  # as people write them
    re.sub(r"(?<=[a-z])(?=[A-Z])", "-", options.__name__).lower().replace("evaluate-", "evaluate "): options
    for options in cli.RUN
}
DIGITS: dict[str, Any] = {"size": "Nano/2", "channels": 1, "height": 8}
README = Path(__file__).parent.parent / "README.md"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def unveil(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(command: str, *words: str | Path) -> Outcome:
        """A command's words split at spaces, and further ones as they are."""
        capsys.readouterr()
        try:
            cli.main([*command.split(), *map(str, words)])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


Unveil = Callable[..., Outcome]


def assert_refuses(outcome: Outcome, *patterns: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that matches."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("unveil: ")
    for pattern in patterns:
        assert re.search(pattern, lines[0]), (pattern, lines[0])


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A model of the digits' size that has learnt nothing."""
    return save(tmp_path / "digits_run", **DIGITS)


def save(run: Path, name: str = "diffmae", about: About = ABOUT, **arguments: Any) -> Path:
    model = build(small(name, **arguments))
    save_weights(run / WEIGHTS, model.recipe, model.state_dict(), about)
    return run


def photos(folder: Path, classes: int = 2, each: int = 12, size: int = 20) -> Path:
    """Class folders of flat colours with noise, which a probe tells apart."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(each):
            values = 60 + 120 * label + rng.integers(0, 60, (size, size, 3))
            Image.fromarray(values.astype(np.uint8)).save(folder / f"class{label}" / f"{i}.png")
    return folder


def test_every_command_can_be_run() -> None:
    assert tuple(dict.fromkeys(command.split()[0] for command in COMMANDS)) == cli.COMMANDS
    assert tuple(command.split()[1] for command in COMMANDS if command.startswith("evaluate ")) == cli.EVALUATIONS
    assert {"pretrain", "inpaint", "probe", "evaluate inpainting", "info"} <= COMMANDS.keys()


# Output


COMMANDS_WITH_FIELDS = [
    ("doctor --data digits:test --workers 0", {"readable", "problems", "sizes", "color", "advice"}),
    ("plan --data digits:test --measure-seconds 0.05", {"parameters", "training", "time", "memory", "disk", "advice"}),
    ("pretrain --data digits:test --out {new} --epochs 1", {"out", "finished", "step", "loss", "skipped"}),
    ("inpaint --run {run} --images digits:test --out {new} --limit 2 --num-steps 2", {"pictures", "sheet"}),
    ("probe --run {run} --data digits:test", {"results", "train_samples", "test_samples"}),
    (
        "evaluate inpainting --run {run} --data digits:test --limit 4 --num-steps 2 --num-samples 2",
        {"psnr", "std", "sharpness", "scores"},
    ),
    ("info --run {run}", {"recipe", "about", "can", "parameters"}),
]


@pytest.mark.parametrize(
    "command, fields, first",
    [
        *((command, fields, first) for command, fields in COMMANDS_WITH_FIELDS for first in (False, True)),
        (
            "pretrain --data digits:test --out {new} --epochs 1 --size Nano/4 --recipe umd_flow --labels",
            {"loss"},
            False,
        ),
        ("generate --run {dit} --out {new} --num-samples 2 --num-steps 2", {"out"}, False),
        ("finetune-generator --run {dit} --data digits:test --out {new} --epochs 1", {"fresh", "loaded"}, False),
        ("probe --run {dit} --data digits:test --time 51 --no-baselines", {"results", "pool", "time"}, False),
        ("inpaint --run {dit} --images digits:test --out {new} --limit 1 --num-steps 2", {"pictures", "sheet"}, False),
        (
            "evaluate inpainting --run {dit} --data digits:test --limit 2 --num-steps 2 --num-samples 2",
            {"psnr", "std"},
            False,
        ),
    ],
)
def test_json_is_the_last_line_of_stdout_and_text_is_on_stderr(
    tmp_path: Path, digits: Path, unveil: Unveil, command: str, fields: set[str], first: bool
) -> None:
    if "{dit}" in command:
        save(tmp_path / "dit_run", "dit", **DIGITS)
    command = command.format(run=digits, dit=tmp_path / "dit_run", new=tmp_path / "new")
    name = next(name for name in COMMANDS if command.startswith(f"{name} "))
    outcome = unveil(f"{name} --json {command.removeprefix(name)}" if first else f"{command} --json")
    assert outcome.code == 0
    (line,) = outcome.out.splitlines()
    result = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert fields <= result.keys()
    assert outcome.err.strip()
    plain = unveil(command.replace(str(tmp_path / "new"), str(tmp_path / "newer")))
    assert plain.code == 0
    assert plain.out.strip()  # without --json, results go where they can be piped


def test_pretrain_tells_progress(tmp_path: Path, unveil: Unveil) -> None:
    outcome = unveil("pretrain --data digits:test --epochs 2 --batch-size 90 --out", tmp_path / "run")
    assert re.search(r"8/8 \[.*loss \d+\.\d+, [\d,.]+ images/s", outcome.err)
    assert "Finished: step 8 of 8, 720 images seen" in outcome.out
    assert "report.html" in outcome.out


def test_probe_prints_its_baselines(digits: Path, unveil: Unveil) -> None:
    outcome = unveil("probe --data digits:train --test-data digits:test --labels-per-class 10 --json --run", digits)
    result = json.loads(outcome.out)
    assert list(result["results"]) == ["encoder", "untrained encoder", "raw pixels"]
    assert result["train_samples"] == 1437
    assert result["test_samples"] == 360
    assert 75 < result["results"]["raw pixels"]["linear"] < 95
    for name in result["results"]:
        assert name in outcome.err
    alone = json.loads(unveil("probe --data digits:test --no-baselines --pool class --json --run", digits).out)
    assert list(alone["results"]) == ["encoder"]


def test_raw_pixels_reach_98_percent_with_all_labels(digits: Path, unveil: Unveil) -> None:
    result = json.loads(unveil("probe --data digits:train --test-data digits:test --k 3 --json --run", digits).out)
    assert result["results"]["raw pixels"]["knn"] > 97
    assert result["results"]["raw pixels"]["linear"] > 90


def test_probe_is_repeatable_and_independent_of_the_batch(digits: Path, unveil: Unveil) -> None:
    command = "probe --data digits:test --labels-per-class 5 --json"
    first = json.loads(unveil(command, "--run", digits).out)
    assert json.loads(unveil(command, "--run", digits).out) == first
    assert json.loads(unveil(command + " --batch-size 300", "--run", digits).out)["results"] == first["results"]
    assert json.loads(unveil(command + " --seed 1", "--run", digits).out)["results"] != first["results"]


@pytest.mark.parametrize("method", ["linear", "fewshot"])
def test_neighbours_belong_to_their_method(digits: Path, unveil: Unveil, method: str) -> None:
    outcome = unveil(f"probe --data digits:test --method {method} --k 5 --run", digits)
    assert_refuses(outcome, f"--k belongs to --method knn, but it is {method}")


def test_the_untrained_baseline_of_class_tokens_says_something(tmp_path: Path, unveil: Unveil) -> None:
    """adaLN-zero blocks start as the identity, where class tokens are the same for every picture."""
    run = save(tmp_path / "run", "umd", **DIGITS)
    result = json.loads(unveil("probe --data digits:test --k 1 --json --run", run).out)["results"]
    assert result["untrained encoder"]["knn"] > 18  # the mean of its patches, which is little; chance is 10


def test_a_systems_error_names_its_file(digits: Path, unveil: Unveil, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = save(tmp_path / "run", "umd", **DIGITS)
    outcome = unveil(f"generate --num-samples 1 --num-steps 1 --device cpu --run {run} --out {tmp_path}/file/out")
    assert_refuses(outcome, r"file/out: Not a directory\.$")


UMDS_FAMILY = ["umd", "umd_flow", "dit_umd", "maskdit_umd", "mae_umd"]


@pytest.mark.parametrize("name", ["mae", "diffmae", "dit", "maskdit", *UMDS_FAMILY])
def test_probe_reads_what_the_recipe_trains_as_its_summary(tmp_path: Path, unveil: Unveil, name: str) -> None:
    """The class tokens of UMD's family, whose mean its decoder reads; otherwise the patches. Either can be asked for."""
    run = save(tmp_path / "run", name, **DIGITS)
    command = "probe --data digits:test --no-baselines --labels-per-class 5 --json"
    default, mean, other = (
        json.loads(unveil(f"{command} {pool}", "--run", run).out or "{}")
        for pool in ("", "--pool mean", "--pool class" if name not in ("dit", "maskdit") else "--pool mean --seed 1")
    )
    assert default["pool"] == ("class" if name in UMDS_FAMILY else "mean")
    assert default == (other if name in UMDS_FAMILY else mean)
    assert mean["results"] != other["results"]
    if name in ("dit", "maskdit"):
        assert_refuses(unveil(f"{command} --pool class", "--run", run), f"{name} has no class token. Use --pool mean")


@pytest.mark.parametrize("name, time", [("dit", "51"), ("umd", "51"), ("umd_flow", "0.1"), ("diffmae nothing", "51")])
def test_probe_at_a_time_is_repeatable_and_independent_of_the_batch(
    tmp_path: Path, unveil: Unveil, name: str, time: str
) -> None:
    recipe, _, hidden = name.partition(" ")
    run = save(tmp_path / "run", recipe, **DIGITS, **({"mask_ratio": 0.0} if hidden else {}))
    command = f"probe --data digits:test --labels-per-class 5 --json --run {run}"
    clean = json.loads(unveil(command).out)
    first = json.loads(unveil(f"{command} --time {time}").out)
    assert first["time"] == float(time)
    assert json.loads(unveil(f"{command} --time {time} --batch-size 77").out) == first
    assert first["results"]["encoder"] != clean["results"]["encoder"]
    assert first["results"]["raw pixels"] == clean["results"]["raw pixels"]


@pytest.mark.parametrize(
    "name, time, pattern",
    [
        ("mae", "51", "encoder of this mae sees clean clips only"),
        ("mae_umd", "0.5", "encoder of this mae_umd sees clean clips only"),
        ("diffmae", "51", "encoder of this diffmae sees clean clips only"),
        ("umd", "1001", "Features at time 1001 .* of this umd sees whole times from 0 to 1000"),
        ("umd", "-1", "Features at time -1 were asked for"),
        ("umd", "nan", "Features at time nan were asked for"),
        ("dit", "50.5", "time 50.5 .* whole times from 0 to 1000"),
        ("umd", "0.5", "time 0.5 .* whole times from 0 to 1000"),
        ("umd_flow", "51", "this umd_flow sees times from 0 to 1"),
        ("umd_flow", "-0.1", "Features at time -0.1 were asked for"),
    ],
)
def test_probe_at_a_time_that_the_model_never_saw_refuses(
    tmp_path: Path, unveil: Unveil, name: str, time: str, pattern: str
) -> None:
    run = save(tmp_path / "run", name, **DIGITS)
    assert_refuses(unveil(f"probe --data digits:test --run {run} --time={time}"), pattern)


def test_evaluate_is_repeatable_and_independent_of_the_batch(digits: Path, unveil: Unveil) -> None:
    command = "evaluate inpainting --data digits:test --limit 12 --num-steps 3 --num-samples 2 --json"
    first = json.loads(unveil(command, "--run", digits).out)
    assert json.loads(unveil(command, "--run", digits).out) == first
    other = json.loads(unveil(command + " --batch-size 5", "--run", digits).out)
    for name, value in first["psnr"].items():
        assert other["psnr"][name] == pytest.approx(value, abs=1e-4)
    assert first["psnr"]["best_sample"] >= first["psnr"]["sample"]


def test_evaluate_of_raw_mae_has_no_samples(tmp_path: Path, unveil: Unveil) -> None:
    run = save(tmp_path / "mae", "mae_raw", size="Nano/2", channels=1, height=8)
    result = json.loads(unveil("evaluate inpainting --data digits:test --limit 4 --json --run", run).out)
    assert result["psnr"].keys() == {"mean_fill", "prediction"}
    assert "std" not in result


INFO = {
    "mae": ["mae Nano/2", "75% hidden (random), noise on none, predicts patch-normalised x0 on hidden tokens"],
    "diffmae": ["75% hidden (random), noise on hidden, predicts x0 on hidden tokens", "repaint, represent"],
    "dit": ["0% hidden", "noise on visible, predicts eps on visible tokens, variance on visible tokens", "generate"],
    "maskdit": ["50% hidden", "eps on visible tokens, 0.1 patch-normalised noisy on hidden tokens"],
    "umd": [
        "50% of the clips: 75% hidden (random), noise on none, predicts x0 on hidden tokens; 50% of the clips: 37.5% hidden",
        "0.5 eps on visible tokens, 0.5 x0 on hidden tokens",
        "generate, repaint, represent",
    ],
    "umd_flow": ["0.5 x0 on visible tokens as a velocity, 0.5 x0 on hidden tokens"],
    "mae_umd": [
        "mae_umd Nano/2",
        "75% hidden (random), noise on none, predicts x0 on hidden tokens",
        "repaint, represent",
    ],
    "umd_finetune": ["5% of the clips", "95% of the clips: 0% hidden", "0.5 eps on visible tokens, 0.5 x0 on visible"],
}


@pytest.mark.parametrize("name", INFO)
@pytest.mark.parametrize("decay", [None, 0.9999])
def test_info_says_what_a_model_is(tmp_path: Path, unveil: Unveil, name: str, decay: float | None) -> None:
    classes = ("ant", "bee", "cat", "dog", "eel") if name == "umd_finetune" else ()
    about = dataclasses.replace(ABOUT, ema_decay=decay, classes=classes)
    outcome = unveil("info --json --run", save(tmp_path / "run", name, about, **DIGITS))
    assert outcome.code == 0
    result = json.loads(outcome.out)
    model = build(small(name, **DIGITS))
    assert result["can"] == sorted(model.can)
    assert result["missing_tensors"] == []
    assert sum(result["parameters"].values()) == sum(v.numel() for v in model.state_dict().values())
    assert result["about"]["ema_decay"] == decay
    for text in INFO[name]:
        assert text in outcome.err
    weights = "as trained" if decay is None else "running average (EMA) of decay 0.9999"
    assert re.search(rf"^weights +{re.escape(weights)}$", outcome.err, re.M)
    told = r"5 \(ant, bee, cat, dog, eel\)" if classes else "none"
    assert re.search(rf"^classes +{told}$", outcome.err, re.M)


def test_info_tells_an_unfinished_run(tmp_path: Path, unveil: Unveil) -> None:
    for steps, told in (
        (60, "1 of 60 steps, not finished, 1 images"),
        (1, "1 steps, 1 images"),
        (None, "1 steps, 1 images"),
    ):
        run = save(tmp_path / f"{steps}", "mae", dataclasses.replace(ABOUT, num_steps=steps), **DIGITS)
        assert re.search(rf"^trained for +{told}$", unveil("info --run", run).out, re.M)


def test_info_counts_what_is_there_and_says_what_is_missing(digits: Path, unveil: Unveil) -> None:
    result = json.loads(unveil("info --json --run", digits).out)
    model = build(small(size="Nano/2", channels=1, height=8))
    assert sum(result["parameters"].values()) == sum(v.numel() for v in model.state_dict().values())
    assert result["missing_tensors"] == []
    weights = digits / WEIGHTS
    with safetensors.safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(weights)
    del tensors["decoder.tap_norms.1.weight"]
    safetensors.torch.save_file(tensors, weights, metadata)
    outcome = unveil("info --json --run", digits)
    assert json.loads(outcome.out)["missing_tensors"] == ["decoder.tap_norms.1.weight"]
    assert "'decoder.tap_norms.1.weight'" in outcome.err


# Help


def field_docs(options: type) -> dict[str, str]:
    """Each field of an options class with the docstring below it."""
    docs, name = {}, None
    for owner in options.__mro__[:-1]:  # its own and those that all trainings have
        (definition,) = ast.parse(inspect.getsource(owner)).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                docs.setdefault(name, str(node.value.value))  # its own words before those of all trainings
                name = None
    return docs


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_option(unveil: Unveil, command: str) -> None:
    options = COMMANDS[command]
    docs = field_docs(options)
    assert docs.keys() == {f.name for f in dataclasses.fields(options)}  # each has a description
    outcome = unveil(f"{command} --help")
    assert (outcome.code, outcome.err) == (0, "")
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", outcome.out).split())
    assert " ".join((inspect.getdoc(options) or "").split("\n")[0].split()) in text
    assert f"Example: unveil {command} " in text
    for name, doc in docs.items():
        assert "--" + name.replace("_", "-") in text
        squeezed = re.sub(r"\W", "", doc)
        assert len(squeezed) > 8
        assert squeezed in re.sub(r"\W", "", outcome.out), name


@pytest.mark.parametrize("words", ["", "--help", "--json"])
def test_help_names_every_command(unveil: Unveil, words: str) -> None:
    outcome = unveil(words)
    assert outcome.code == 0
    for command in cli.COMMANDS:
        assert command in outcome.out
    assert "--json" in outcome.out


def test_help_of_evaluate_names_both(unveil: Unveil) -> None:
    outcome = unveil("evaluate --help")
    assert outcome.code == 0
    assert "{inpainting,generation}" in outcome.out
    assert "{inpainting,generation}" in unveil("evaluate --json --help").out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_the_help_parses(command: str) -> None:
    example = re.search(r"Example: unveil (.*)", inspect.getdoc(COMMANDS[command]) or "")
    assert example
    assert isinstance(parse(example[1]), COMMANDS[command])


def parse(command: str) -> Any:
    words = [word for word in shlex.split(command, comments=True) if word != "--json"]
    return tyro.cli(cli.Command, args=words)  # type: ignore[call-overload]


def name_of(command: str) -> str:
    words = command.split()
    return " ".join(words[: 2 if words[0] == "evaluate" else 1])


def readme_commands() -> list[str]:
    if not README.exists():
        return []
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("unveil ").partition("#")[0].strip() for line in lines if line.startswith("unveil ")]


def test_readme_commands_parse() -> None:
    if not README.exists():
        pytest.skip("there is no README.md")
    commands = readme_commands()
    assert {name_of(command) for command in commands} == COMMANDS.keys()
    for command in commands:
        assert isinstance(parse(command), COMMANDS[name_of(command)])


def skipped_step(run: Path, bundle: Path) -> None:
    """What a run writes of a step that it skips."""
    model, about = load_model(run)
    recipe = model.recipe
    source = open_source("photos", recipe.clip.channels)
    step = Step(int(bundle.name.removeprefix("step-")), [(0, 0, 0), (0, 1, 1)])
    write_bundle(
        run,
        step,
        0,
        Samples(source, recipe.clip, 0, recipe.training),
        lambda path: save_weights(path, recipe, model.state_dict(), about),
        {"seed": 0, "precision": "fp32", "device": "cpu"},
    )


def end_when_it_answers(port: int) -> None:
    """Tell this process to end as soon as it serves a page, which it does for ever."""

    def look() -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            except OSError:
                time.sleep(0.1)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=look, daemon=True).start()


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unveil: Unveil) -> None:
    """One after the other, on two dozen photos; epochs, pictures and steps are fewer, and what is timed is smaller."""
    from test_convert import UmdSize, umd_tree, written  # what a file of UMD's looks like
    from test_evaluate_generation import look_quickly  # in place of Inception

    if not README.exists():
        pytest.skip("there is no README.md")
    for folder in ("photos", "others", "labelled", "held-out", "new"):
        photos(tmp_path / folder)
    for path in (tmp_path / "photos").rglob("*.png"):  # a label map for each: dark and bright
        with Image.open(path) as image:
            values = (np.array(image.convert("L")) > 120).astype(np.uint8)
        target = tmp_path / "maps" / path.relative_to(tmp_path / "photos")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(target)
    written(tmp_path / "umd.npz", umd_tree(UmdSize()))
    (tmp_path / "inception.pth").write_bytes(b"weights")
    look_quickly(monkeypatch)
    monkeypatch.setattr("unveil.sheet.SHEET_STEPS", 5)
    monkeypatch.setattr(
        "unveil.tasks.bench._peak_memory", lambda *arguments: 1
    )  # of a process each, which test_bench has
    monkeypatch.chdir(tmp_path)
    for command in readme_commands():
        if command.startswith("web"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            end_when_it_answers(port)
            command += f" --port {port}"
        if command.startswith("replay"):
            skipped_step(Path("runs/photos"), parse(command).bundle)
        few = {
            "plan": " --measure-seconds 0.05",
            "inpaint": " --limit 2 --num-steps 5",
            "anomaly": " --limit 2 --num-steps 2",
            "evaluate inpainting": " --limit 2 --num-steps 5",
            "evaluate generation": " --weights inception.pth --cache statistics",
            "generate": " --num-steps 5",
            "bench": " --rounds 1 --size Nano/16 --image-size 32",
            "finetune": " --epochs 2",
        }
        command = re.sub(r"--num-samples \d+", "--num-samples 2", re.sub(r"--epochs \d+", "--epochs 2", command))
        outcome = unveil(command.replace("--download", "") + few.get(name_of(command), ""))
        assert outcome.code == 0, (command, outcome.err)
    assert (tmp_path / "painted" / "sheet.png").exists()
    assert (tmp_path / "segmented" / "segment.json").exists()
    assert pq.read_table(tmp_path / "photos.parquet").num_rows == 24


# Refusals

NEW = "{tmp}/new"


@pytest.mark.parametrize(
    "command, patterns",
    [
        (f"pretrain --data {{tmp}}/empty --out {NEW}", ["empty.*holds no files"]),
        (f"pretrain --data {{tmp}}/texts --out {NEW}", ["texts.*holds 2 files, none of which is a picture"]),
        (f"pretrain --data {{tmp}}/fake --out {NEW} --size Nano/4 --image-size 8", ["None of the 3 samples"]),
        (
            f"pretrain --data digit:train --out {NEW}",
            ["There is no data at 'digit:train'", "Did you mean 'digits:train'"],
        ),
        (f"pretrain --data digits:val --out {NEW}", ["There is no data at 'digits:val'"]),
        (f"pretrain --data {{tmp}}/photo --out {NEW}", ["There is no data", "Did you mean '.*photos'"]),
        (f"pretrain --data digits --out {NEW} --image-size 9", ["height=9", "patch_size=2", "Use 8 or 10"]),
        (f"pretrain --data {{tmp}}/photos --out {NEW} --size B/16 --image-size 32x40", ["width=40", "Use 32 or 48"]),
        (f"pretrain --data digits --out {NEW} --image-size big", ["--image-size 'big' is no size"]),
        (f"pretrain --data digits --out {NEW} --image-size 8x8x8", ["--image-size '8x8x8' is no size"]),
        (f"pretrain --data digits --out {NEW} --image-size 0", ["--image-size '0' is no size"]),
        (f"pretrain --data digits --out {NEW} --size Nono/2", ["Unknown size 'Nono/2'", "Did you mean 'Nano'"]),
        (f"pretrain --data digits --out {NEW} --size Nano", ["lacks its patch size", "'Nano/16'"]),
        (f"pretrain --data digits --out {NEW} --recipe mae --target eps", ["--target eps belongs to diffmae"]),
        (f"pretrain --data digits --out {NEW} --recipe mae_raw --rho 0.5", ["--rho 0.5 belongs to diffmae"]),
        (
            f"pretrain --data digits --out {NEW} --recipe mae --schedule cosine",
            ["--schedule cosine belongs to diffmae"],
        ),
        (
            f"pretrain --data digits --out {NEW} --recipe mae --mask-ratio 0",
            ["mask_ratio=0", "nothing would be hidden"],
        ),
        (f"pretrain --data digits --out {NEW} --mask-ratio 1.5", ["mask_ratio=1.5", "between 0 and 1"]),
        (
            f"pretrain --data digits --out {NEW} --recipe umd --mask-ratio 0.5",
            ["--mask-ratio 0.5 belongs to diffmae and mae and mae_raw and mae_video; umd has it fixed", "Drop it"],
        ),
        (f"pretrain --data digits --out {NEW} --recipe dit --mask-ratio 0", ["--mask-ratio 0.0 belongs to"]),
        (f"pretrain --data digits --out {NEW} --recipe umd_flow --masking tube", ["--masking tube belongs to"]),
        (f"pretrain --data digits --out {NEW} --recipe maskdit --decoder cross", ["--decoder cross belongs to"]),
        (f"pretrain --data digits --out {NEW} --recipe mae_umd --decoder joint", ["--decoder joint belongs to"]),
        (f"pretrain --data digits --out {NEW} --recipe umd --rho 0.8", ["--rho 0.8 belongs to diffmae; umd"]),
        (f"pretrain --data digits --out {NEW} --recipe umd --schedule cosine", ["--schedule cosine belongs to"]),
        (f"pretrain --data digits --out {NEW} --recipe dit_umd --target x0", ["--target x0 belongs to diffmae"]),
        (f"pretrain --data digits --out {NEW} --schedule flow --rho 0.8", ["rho=0.8 with kind='flow'", "Use rho=1"]),
        *(
            (
                f"pretrain --data digits --out {NEW} --recipe {name} --faithful",
                [f"--faithful True belongs to umd and mae_umd; {name} has"],
            )
            for name in ("dit", "mae", "diffmae", "umd_flow", "maskdit_umd")
        ),
        *(
            (f"pretrain --data digits --out {NEW} --recipe {name} --labels", [f"--labels, but {name}.*Drop it"])
            for name in ("mae", "mae_raw", "diffmae", "mae_umd")
        ),
        (
            f"pretrain --data {{tmp}}/flat --out {NEW} --recipe dit --labels",
            ["flat has no labels", "folder"],
        ),
        (f"pretrain --data digits --out {NEW} --recipe umd --batch-size 1", ["A batch of 1 leaves", "at least 2"]),
        (f"pretrain --data digits --out {NEW} --rho 0", ["rho=0"]),
        (f"pretrain --data digits --out {NEW} --epochs 0", ["epochs=0"]),
        (f"pretrain --data digits --out {NEW} --batch-size 0", ["batch_size=0"]),
        (f"pretrain --data digits --out {NEW} --blr -1", ["base_lr=-1"]),
        (f"pretrain --data digits --out {NEW} --crop-scale 2", ["crop_scale=2"]),
        (f"pretrain --data digits --out {NEW} --crop-scale 0", ["crop_scale=0"]),
        (f"pretrain --data digits --out {NEW} --ema-decays 1", [r"ema_decays=\(1\.0,\)"]),
        (f"pretrain --data digits --out {NEW} --ema-decays 0.9 0.9", [r"ema_decays=\(0\.9, 0\.9\)", "none come twice"]),
        (f"pretrain --data digits --out {NEW} --ema-decays 0.9 -0.1", [r"ema_decays=\(0\.9, -0\.1\)"]),
        (f"pretrain --data digits --out {NEW} --channels 4", ["grey, which cannot fill 4 channels"]),
        (f"pretrain --data digits --out {NEW} --channels 0", ["channels=0"]),
        (f"pretrain --data digits --out {NEW} --frames 4", ["given to a model of clips of 4 frames"]),
        (f"pretrain --data moving-digits --out {NEW} --frames 3", ["frames=3", "tubelet_size=2"]),
        (f"pretrain --data digits --out {NEW} --workers 9999", ["9999 workers for 1797 samples", "--workers 1797"]),
        (f"pretrain --data digits --out {NEW} --workers -1", ["num_workers=-1"]),
        (f"pretrain --data digits --out {NEW} --device gpu", ["--device gpu cannot be used"]),
        (f"pretrain --data digits --out {NEW} --device cuda:99", ["--device cuda:99 cannot be used"]),
        ("pretrain --data digits --out {tmp}/afile/run", ["afile"]),
        ("pretrain --data digits --out {tmp}/texts", ["is not empty", "holds no run"]),
        (
            f"pretrain --data {{tmp}}/five --out {NEW} --size Nano/4 --image-size 8",
            ["None of the 2", "5 channels where 3"],
        ),
        ("inpaint --run {tmp}/nowhere --images digits --out {tmp}/new", ["nowhere does not exist"]),
        ("inpaint --run {tmp}/texts --images digits --out {tmp}/new", ["holds no model.safetensors"]),
        ("inpaint --run {run} --images digits --out {tmp}/new --mask random:1", ["hides everything"]),
        ("inpaint --run {run} --images digits --out {tmp}/new --mask blob", ["--mask 'blob' is neither"]),
        ("inpaint --run {run} --images digits --out {tmp}/new --num-steps 0", ["num_steps=0", "1 to 1000"]),
        ("inpaint --run {run} --images digits --out {tmp}/new --num-samples 0", ["--num-samples 0"]),
        ("inpaint --run {run} --images digits --out {tmp}/new --limit 0", ["--limit 0"]),
        ("inpaint --run {run} --images digits --out {tmp}/new --device gpu", ["--device gpu cannot be used"]),
        ("inpaint --run {run} --images {tmp}/none --out {tmp}/new", ["There is no data"]),
        ("inpaint --run {run} --images digits --out {tmp}/afile/x --limit 1 --num-steps 1", ["afile"]),
        ("inpaint --run {mae} --images digits --out {tmp}/new", ["patch-normalised", "cannot paint"]),
        ("inpaint --run {five} --images digits --out {tmp}/new", ["cannot fill 5 channels"]),
        ("inpaint --run {broken} --images digits --out {tmp}/new", [r"lacks 1 of \d+ tensors", "decoder"]),
        ("probe --run {run} --data {tmp}/flat", ["flat has no labels"]),
        ("probe --run {run} --data digits --k 0", ["--k 0"]),
        ("probe --run {run} --data digits --labels-per-class 0", ["--labels-per-class 0"]),
        ("probe --run {run} --data digits:test --labels-per-class 999", ["--labels-per-class 999, but class 8 has 35"]),
        ("probe --run {run} --data digits --test-data {tmp}/photos", ["has the classes", "Use the same"]),
        ("probe --run {run} --data digits --batch-size 0", ["batch_size=0"]),
        ("probe --run {run} --data digits --workers 9999", ["9999 workers"]),
        ("probe --run {run} --data digits --device gpu", ["--device gpu cannot be used"]),
        ("info --run {first}", ["was written by Unveil 0.1", "Train it again"]),
        ("probe --run {first} --data digits", ["was written by Unveil 0.1"]),
        ("probe --run {broken} --data digits", ["lacks 1 of"]),
        ("probe --run {tmp}/nowhere --data digits", ["does not exist"]),
        ("evaluate inpainting --run {run} --data digits --mask random:1", ["hides everything"]),
        ("evaluate inpainting --run {run} --data digits --mask box", ["The mask 'box' is unknown"]),
        ("evaluate inpainting --run {run} --data digits --limit 0", ["--limit 0"]),
        ("evaluate inpainting --run {run} --data digits --limit 2 --num-samples 0", ["num_samples=0"]),
        ("evaluate inpainting --run {run} --data digits --limit 2 --num-steps 1001", ["num_steps=1001"]),
        ("evaluate inpainting --run {run} --data digits --device gpu", ["--device gpu cannot be used"]),
        ("evaluate inpainting --run {mae} --data digits", ["patch-normalised"]),
        ("evaluate", ["`unveil evaluate inpainting` scores", "`unveil evaluate generation` generated"]),
        ("evaluate --run {run} --data digits", ["`unveil evaluate inpainting` scores"]),
        ("evaluate painting --run {run}", ["`unveil evaluate inpainting` scores"]),
        (
            "evaluate generation --images digits --reference digits --weights {tmp}/empty",
            ["fetch https://github.com/toshas"],
        ),
        ("web --run {run} --port 70000", ["--port 70000: use 1 to 65535"]),
        ("web --run {run} --max-seconds 0", ["--max-seconds 0: use a number above 0"]),
        ("info --run {tmp}/nowhere", ["does not exist"]),
        ("info --run {tmp}/afile", ["cannot be read as safetensors"]),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(
    tmp_path: Path, unveil: Unveil, command: str, patterns: list[str]
) -> None:
    shape: dict[str, Any] = {"size": "Nano/2", "channels": 1, "height": 8}
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text("text")
    (tmp_path / "fake").mkdir()
    for i in range(3):
        (tmp_path / "fake" / f"{i}.png").write_text("text")
    (tmp_path / "five").mkdir()
    for i in range(2):
        np.save(tmp_path / "five" / f"{i}.npy", np.zeros((8, 8, 5), dtype=np.uint8))
    (tmp_path / "afile").write_text("a file")
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "flat" / "a.png")
    if "photos" in command or "/photo " in command:
        photos(tmp_path / "photos", each=1)
    runs = {}
    for name, recipe, arguments in (
        ("run", "diffmae", shape),
        ("first", "diffmae", shape),
        ("mae", "mae", shape),
        ("five", "diffmae", {**shape, "channels": 5}),
        ("broken", "diffmae", shape),
    ):
        if f"{{{name}}}" in command:
            runs[name] = save(tmp_path / f"{name}_run", recipe, **arguments)
    if "first" in runs:
        file = runs["first"] / WEIGHTS
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file(tensors, file, {"format": "unveil-1", "recipe": "{}", "about": "{}"})
    if "broken" in runs:
        model = build(small("diffmae", **shape))
        state = model.state_dict()
        del state["decoder.tap_norms.1.weight"]
        save_weights(runs["broken"] / WEIGHTS, model.recipe, state, ABOUT)
    assert_refuses(unveil(command.format(tmp=tmp_path, **runs)), *patterns)
    if not command.startswith("pretrain"):
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command, nearest",
    [
        ("pretrain --data digits --out x --epoch 3", "--epochs"),
        ("pretrain --data digits --out x --mask-ration 0.5", "--mask-ratio"),
        ("inpaint --run x --images digits --out x --num-step 3", "--num-steps"),
        ("probe --run x --data digits --test-date digits", "--test-data"),
        ("evaluate inpainting --run x --data digits --sampel ddim", "--sampler"),
        ("evaluate generation --images x --reference y --resize clan", "clean"),
        ("evaluate generation --images x --referense y", "--reference"),
        ("info --ran x", "--run"),
        ("pretrane --data digits", "'pretrain'"),
        ("doktor --data digits", "'doctor'"),
        ("plan --data digits --peak-tflop 3", "--peak-tflops"),
        ("pretrain --data digits --out x --recipe dffmae", "diffmae"),
        ("pretrain --data digits --out x --recipe ditt", "dit"),
        ("pretrain --data digits --out x --ema-decay 0.9", "--ema-decays"),
        ("probe --run x --data digits --pool clas", "class"),
        ("pretrain --data digits --out x --decoder cros", "cross"),
        ("pretrain --data digits --out x --epochs many", "--epochs"),
        ("pretrain --out x", "--data"),
    ],
)
def test_what_cannot_be_parsed_is_refused_with_the_nearest_name(unveil: Unveil, command: str, nearest: str) -> None:
    outcome = unveil(command)
    assert (outcome.code, outcome.out) == (2, "")
    assert nearest in outcome.err


def test_labels_that_are_missing_are_left_out(tmp_path: Path, unveil: Unveil) -> None:
    """A parquet file may have rows without a label; a probe uses the others."""
    folder = photos(tmp_path / "photos")
    images = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    labels = [0] * 12 + [1] * 12
    labels[3] = labels[20] = None  # type: ignore[call-overload]
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "photos.parquet")
    run = save(tmp_path / "run")
    outcome = unveil("probe --json --run", run, "--data", tmp_path / "photos.parquet")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["train_samples"] + result["test_samples"] == 22
    assert result["results"]["raw pixels"]["linear"] == 100


# Classes and averages


def test_pretrain_with_labels_learns_the_classes_of_the_folders(tmp_path: Path, unveil: Unveil) -> None:
    data = photos(tmp_path / "photos", classes=3, each=4)
    command = f"pretrain --recipe dit --size Nano/4 --image-size 8 --epochs 1 --data {data} --out {tmp_path / 'run'}"
    outcome = unveil(f"{command} --labels --json")
    assert outcome.code == 0, outcome.err
    recipe, about, shapes = read_header(tmp_path / "run")
    assert about.classes == ("class0", "class1", "class2")
    assert recipe.condition.num_classes == 3
    assert shapes["condition.label_embed.weight"][0] == 4  # and one row for no class
    assert recipe.training.label_dropout == 0.1
    info = unveil(f"info --run {tmp_path / 'run'}").out
    assert "3 (class0, class1, class2)" in info
    assert_refuses(unveil(command), "holds another run: recipe.condition.num_classes was 3 and is now 0")
    plain = unveil(f"{command}2")
    assert plain.code == 0
    recipe, about, _ = read_header(tmp_path / "run2")
    assert (about.classes, recipe.condition.num_classes) == ((), 0)


def test_pretrain_keeps_the_averages_that_it_is_told(tmp_path: Path, unveil: Unveil) -> None:
    command = f"pretrain --data digits:test --size Nano/4 --batch-size 120 --epochs 1 --out {tmp_path / 'run'}"
    assert unveil(f"{command} --ema-decays 0.9 0.99").code == 0
    decays = {path.name: read_header(path)[1].ema_decay for path in (tmp_path / "run").glob("*.safetensors")}
    assert decays == {"model.safetensors": 0.9, "ema-0.99.safetensors": 0.99, "last.safetensors": None}
    for name, decay in decays.items():
        told = "as trained" if decay is None else f"running average (EMA) of decay {decay:g}"
        assert told in unveil(f"info --run {tmp_path / 'run' / name}").out
    assert unveil(f"{command}2 --ema-decays").code == 0  # none at all
    assert [path.name for path in (tmp_path / "run2").glob("*.safetensors")] == ["model.safetensors"]
    assert read_header(tmp_path / "run2")[1].ema_decay is None


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(Pretrain)["recipe"]))
def test_every_recipe_has_a_size_for_photos_and_one_for_digits(name: str) -> None:
    generates = name not in ("diffmae", "mae", "mae_raw", "mae_video")
    recipe = recipe_of(Pretrain(data="photos/", out=Path("x"), recipe=name))  # type: ignore[arg-type]
    assert recipe == recipes.RECIPES[name]("B/4", height=64) if generates else recipes.RECIPES[name]("B/16", height=224)
    digits = recipe_of(Pretrain(data="digits:train", out=Path("x"), recipe=name))  # type: ignore[arg-type]
    assert digits == recipes.RECIPES[name](**DIGITS)
    clips = recipe_of(Pretrain(data="moving-digits", out=Path("x"), recipe=name)).clip  # type: ignore[arg-type]
    assert (clips.frames, clips.height, clips.tubelet_size, clips.patch_size) == (8, 24, 2, 4)


def test_faithful_is_told_on() -> None:
    for name in ("umd", "mae_umd"):
        for faithful in (False, True):
            recipe = recipe_of(Pretrain(data="digits", out=Path("x"), recipe=name, faithful=faithful))  # type: ignore[arg-type]
            assert recipe == recipes.RECIPES[name](**DIGITS, faithful=faithful)


def test_an_interrupted_run_says_so(tmp_path: Path, unveil: Unveil, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = job_module.draw

    def terminate(*arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return draw(*arguments, **named)

    monkeypatch.setattr(job_module, "draw", terminate)
    outcome = unveil("pretrain --data digits:test --epochs 2 --json --out", tmp_path / "run")
    assert outcome.code == 130
    assert (
        "Interrupted and saved; the same command goes on from here" in outcome.err
    )  # --json keeps stdout for programs
    assert json.loads(outcome.out)["finished"] is False
    monkeypatch.setattr(job_module, "draw", draw)
    outcome = unveil("pretrain --data digits:test --epochs 2 --json --out", tmp_path / "run")
    assert (outcome.code, json.loads(outcome.out)["resumed"]) == (0, True)
    step = json.loads(outcome.out)["step"] - json.loads(outcome.out)["steps_now"]
    assert f"Went on from step {step}.\n" in outcome.err


@pytest.mark.parametrize("text, size", [("224", (224, 224)), ("64x48", (64, 48)), ("8X16", (8, 16))])
def test_image_size(text: str, size: tuple[int, int]) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "8x", "x8", "8x0", "-8", "8.5", "8 8", "1x2x3"])
def test_image_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_image_size(text)


def test_the_command_is_installed_and_the_global_state_is_left_alone(tmp_path: Path) -> None:
    """As people start it, from another folder: stdout has nothing but the JSON."""
    program = Path(sys.executable).parent / "unveil"
    if not program.exists():
        pytest.skip("the package is not installed in this environment")
    run = save(tmp_path / "run")
    done = subprocess.run([program, "info", "--run", run, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["name"] == "diffmae"


def test_commands_leave_the_global_generator_alone(tmp_path: Path, digits: Path, unveil: Unveil) -> None:
    state = torch.get_rng_state()
    unveil("probe --data digits:test --labels-per-class 3 --run", digits)
    unveil("evaluate inpainting --data digits:test --limit 2 --num-steps 2 --num-samples 2 --run", digits)
    unveil("inpaint --images digits:test --limit 1 --num-steps 2 --run", digits, "--out", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    """As `unveil info --run FILE | head -1`: nothing is said of a broken pipe."""
    run = save(tmp_path / "mae", "mae", size="Nano/2", channels=1, height=8)
    command = [sys.executable, "-m", "unveil.cli", "info", "--run", str(run)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_that_goes_back_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def run(options: Any, on_progress: Any) -> dict[str, Any]:
        for step, loss in (
            (1, None),  # no loss yet that is a number
            (5, 2.0),
            (2, 1.0),
            (9, 0.5),
        ):
            on_progress(Progress("the setup", step, 9, step, loss, 100.0))
        return {}

    assert cli._training(run)(None) == {}
    error = capsys.readouterr().err
    assert error.count("the setup") == 1
    assert error.count("the run went back to its last save, and on with other draws") == 1
    assert "9/9" in error
