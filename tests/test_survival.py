"""A run survives kills, damaged saves, a full disk and steps that are no numbers."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from test_train import assert_same_run, at_step, go, photo_recipe, read_save, short_sheets, terminate, write_pictures

from unveil import cli, recipes
from unveil import pretraining_job as job_module
from unveil.checkpoint import LAST, WEIGHTS, load_model
from unveil.data import Samples, open_source
from unveil.features import untrained
from unveil.losses import Objective, draw
from unveil.online_knn import NearestNeighbours
from unveil.rundir import METRICS, Run
from unveil.saves import Saves
from unveil.tasks.replay import Replay, replay
from unveil.trouble import BUNDLES, MAX_BUNDLES, MAX_RESTARTS, PATIENCE, Health, Step

FIRST_BATCH = "batch-0.safetensors"

pytestmark = pytest.mark.usefixtures(short_sheets.__name__)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    write_pictures(folder, 26)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert go(out, pictures)["finished"]
    return out


# Kills

# Forked off a process that has imported what takes long and done nothing: autograd cannot be forked once its threads run.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["unveil.cli", "torch.distributed.checkpoint"])


def _run(out: Path, pictures: Path, threads: int) -> None:
    """In a process of its own: the run of `uninterrupted`, saving after every step."""
    torch.set_num_threads(threads)  # on which the last bits depend
    go(out, pictures, save_minutes=0)
    os._exit(0)


def killed(out: Path, pictures: Path, after: float) -> bool:
    """Run, and kill it so many seconds after it has begun to train; whether it was still running."""
    process = FRESH.Process(target=_run, args=(out, pictures, torch.get_num_threads()))
    before = Saves(out).names()
    process.start()
    while process.is_alive() and Saves(out).names() == before:
        time.sleep(0.001)
    time.sleep(after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_equals_uninterrupted(
    tmp_path: Path, pictures: Path, uninterrupted: Path, kills: int
) -> None:
    """With a save after every step, most moments lie in the middle of one."""
    moments = random.Random(kills)
    done, number = 0, 0
    out = tmp_path / "0"
    while done < kills:
        if not killed(out, pictures, moments.uniform(0, 0.4)):
            assert_same_run(out, uninterrupted)  # it had finished; another one is begun
            number += 1
            out = tmp_path / str(number)
            continue
        done += 1
        assert Saves(out).newest() is not None
    assert go(out, pictures)["finished"]
    assert_same_run(out, uninterrupted)
    assert not list(out.glob("**/.*.part"))


# Damage


def _damage(save: Path, how: str) -> None:
    file = next(save.glob("*.distcp"))
    if how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "changed":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "lost":
        file.unlink()
    else:
        (save / "files.json").write_text("{")


@pytest.mark.parametrize("how", ["cut", "changed", "lost", "unsealed"])
def test_a_damaged_save_is_passed_over(
    tmp_path: Path,
    pictures: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    out = tmp_path / "run"
    at_step(monkeypatch, {6: terminate})
    assert go(out, pictures, save_minutes=0)["step"] == 7
    assert Saves(out).names() == ["step-000000006", "step-000000007"]
    _damage(out / "checkpoints" / "step-000000007", how)
    monkeypatch.setattr(job_module, "draw", draw)
    outcome = go(out, pictures)
    assert outcome["steps_now"] == 12
    (told,) = outcome["damaged_saves"]
    assert told.startswith("step-000000007: ")
    assert_same_run(out, uninterrupted)


def test_a_damaged_save_is_put_aside_and_made_again(
    tmp_path: Path, pictures: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in nobody's way: with one save kept, the good ones are kept, not it."""
    out = tmp_path / "run"
    assert go(out, pictures)["finished"]
    _damage(out / "checkpoints" / "step-000000018", "cut")
    assert go(out, pictures, keep=1, save_minutes=0)["steps_now"] == 18
    assert Saves(out).names() == ["step-000000018"]
    assert (out / "checkpoints" / "damaged-step-000000018").is_dir()
    outcome = go(out, pictures)
    assert (outcome["steps_now"], outcome["damaged_saves"]) == (0, [])
    assert_same_run(out, uninterrupted)


def test_what_else_lies_beside_the_saves_is_left_alone(tmp_path: Path, pictures: Path) -> None:
    go(tmp_path, pictures, photo_recipe(epochs=1))
    newest = tmp_path / "checkpoints" / "step-000000006"
    for name in ("step-000000006-copy", "step-000000006.bak", "notes"):
        shutil.copytree(newest, newest.with_name(name))
    (newest.with_name("step-000000007")).write_text("a file")
    assert go(tmp_path, pictures, photo_recipe(epochs=1))["steps_now"] == 0
    (newest / "files.json").write_text("{}")
    (newest / "run.json").unlink()
    outcome = go(tmp_path, pictures, photo_recipe(epochs=1))
    assert outcome["damaged_saves"] == ["step-000000006: files.json does not list run.json"]
    assert outcome["finished"]


@pytest.mark.parametrize("lost", [[WEIGHTS, "outcome.json", "report.html"], []])
def test_weights_that_a_kill_left_behind_are_made_from_the_save(
    tmp_path: Path, pictures: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, lost: list[str]
) -> None:
    """A process may end between the save and the weights: then they are missing, or those of the save before."""
    out = tmp_path / "run"
    at_step(monkeypatch, {6: terminate})
    go(out, pictures)
    old = {name: (out / name).read_bytes() for name in (WEIGHTS, LAST, "outcome.json")}
    monkeypatch.setattr(job_module, "draw", draw)
    assert go(out, pictures)["finished"]
    for name, content in old.items():
        (out / name).write_bytes(content)
    for name in lost:
        (out / name).unlink()
    assert go(out, pictures)["steps_now"] == 0
    assert load_model(out)[1].step == 18
    assert json.loads((out / "outcome.json").read_text())["finished"]
    assert (out / "report.html").exists()
    assert_same_run(out, uninterrupted)


def test_a_run_without_its_saves_is_not_begun_again_over_its_weights(tmp_path: Path, pictures: Path) -> None:
    go(tmp_path, pictures, photo_recipe(epochs=1))
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"holds weights, but nothing to go on from .*--init"):
        go(tmp_path, pictures, photo_recipe(epochs=1))
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_a_run_does_not_go_on_with_other_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", 5)
    recipe = photo_recipe(epochs=1)
    go(tmp_path / "run", tmp_path / "data", recipe)
    assert go(tmp_path / "run", tmp_path / "data", recipe)["steps_now"] == 0
    picture = tmp_path / "data" / "003.png"
    with Image.open(picture) as image:
        image.resize((40, 40)).save(picture)
    with pytest.raises(ValueError, match="holds a run of other samples"):
        go(tmp_path / "run", tmp_path / "data", recipe)


def test_a_second_sigterm_does_not_cut_the_save_short(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers and schedulers send it twice; Ctrl-C is repeated by a person, who means it."""

    def twice(number: int) -> Any:
        def act() -> None:
            signal.raise_signal(number)
            signal.raise_signal(number)

        return act

    at_step(monkeypatch, {6: twice(signal.SIGTERM)})
    assert go(tmp_path / "a", pictures)["interrupted"] == "SIGTERM"
    assert Saves(tmp_path / "a").names()[-1] == "step-000000007"
    at_step(monkeypatch, {6: twice(signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "b", pictures)
    assert Saves(tmp_path / "b").names() == ["step-000000000"]


def test_a_run_without_a_whole_save_refuses(tmp_path: Path, pictures: Path) -> None:
    go(tmp_path, pictures, photo_recipe(epochs=1))
    for save in (tmp_path / "checkpoints").iterdir():
        _damage(save, "changed")
    with pytest.raises(
        ValueError, match=r"no save that is whole .*step-000000006: .* is not what was written"
    ) as caught:
        go(tmp_path, pictures, photo_recipe(epochs=1))
    assert "\n" not in str(caught.value)


def test_a_save_of_another_network_refuses_in_one_line(tmp_path: Path, pictures: Path) -> None:
    """As after somebody copied saves about."""
    go(tmp_path / "a", pictures, photo_recipe(epochs=1))
    go(tmp_path / "b", pictures, photo_recipe("mae", epochs=1))
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "b" / "checkpoints").rename(tmp_path / "a" / "checkpoints")
    with pytest.raises(
        ValueError, match=r"is of another run or version: this one has no .decoder\.mask_token"
    ) as caught:
        go(tmp_path / "a", pictures, photo_recipe(epochs=1))
    assert "\n" not in str(caught.value)


def test_a_run_of_an_older_version_refuses(tmp_path: Path, pictures: Path) -> None:
    go(tmp_path, pictures, photo_recipe(epochs=1))
    (tmp_path / "checkpoints").rename(tmp_path.parent / f"{tmp_path.name}-aside")
    (tmp_path / "state.pt").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"run of an older version \(state\.pt\).*--init"):
        go(tmp_path, pictures, photo_recipe(epochs=1))


@pytest.mark.parametrize("keep, names", [(1, ["018"]), (3, ["016", "017", "018"])])
def test_the_last_saves_are_kept(tmp_path: Path, pictures: Path, keep: int, names: list[str]) -> None:
    go(tmp_path, pictures, save_minutes=0, keep=keep)
    assert Saves(tmp_path).names() == [f"step-000000{name}" for name in names]


def test_keeping_no_save_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain", "--data", "digits:test", "--out", str(tmp_path / "run"), "--keep", "0"])
    assert caught.value.code == 2
    assert "--keep 0: at least 1 save is kept" in capsys.readouterr().err


@pytest.fixture
def file_limit() -> Iterator[Any]:
    """Sets the size beyond which no file can be written, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_at_the_first_save_says_that_there_is_none(
    tmp_path: Path, pictures: Path, uninterrupted: Path, file_limit: Any
) -> None:
    whole = next((uninterrupted / "checkpoints" / "step-000000018").glob("*.distcp")).stat().st_size
    file_limit(whole // 10)
    with pytest.raises(OSError, match=r"Is the disk full\? There is none before it: make room, and begin anew"):
        go(tmp_path / "run", pictures)


def test_a_full_disk_leaves_the_save_before(
    tmp_path: Path, pictures: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, file_limit: Any
) -> None:
    out = tmp_path / "run"
    whole = next((uninterrupted / "checkpoints" / "step-000000018").glob("*.distcp")).stat().st_size
    at_step(monkeypatch, {6: lambda: file_limit(whole - 1)})
    with pytest.raises(
        OSError, match=r"step-00000000[67] could not be written .*Is the disk full\? The save before it is whole"
    ):
        go(out, pictures, save_minutes=0)
    file_limit(resource.RLIM_INFINITY)
    kept = read_save(out)["facts"]["step"]
    assert kept in (5, 6)  # the sixth save may have been under way, in the background
    assert load_model(out)[1].step == kept
    assert not list(out.glob("**/.*.part"))
    monkeypatch.setattr(job_module, "draw", draw)
    assert go(out, pictures)["steps_now"] == 18 - kept
    assert_same_run(out, uninterrupted)


# Steps that are no numbers


class Broken(Objective):
    """Gives a loss that is no number at some of its calls, or a gradient that is none under a loss that is one."""

    calls = 0
    at: frozenset[int] = frozenset()
    gradient_only = False

    def forward(self, *arguments: Any) -> Any:
        loss, logs = super().forward(*arguments)
        Broken.calls += 1
        if Broken.calls - 1 not in Broken.at:
            return loss, logs
        if Broken.gradient_only:
            return loss + (loss - loss.detach()).abs().sqrt(), logs  # the root of 0, whose slope is infinite
        return loss * float("nan"), logs


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    monkeypatch.setattr(job_module, "Objective", Broken)
    Broken.calls, Broken.at, Broken.gradient_only = 0, frozenset(), False
    return Broken


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_no_number_is_skipped_counted_and_kept(
    tmp_path: Path,
    pictures: Path,
    broken: type[Broken],
    monkeypatch: pytest.MonkeyPatch,
    gradient_only: bool,
) -> None:
    out = tmp_path / "run"
    stale = out / BUNDLES / "step-000000008" / "batch-1.safetensors"  # of a second process that the run had before
    broken.at, broken.gradient_only = frozenset({8}), gradient_only
    at_step(monkeypatch, {8: terminate, 7: terminate})
    go(out, pictures, save_minutes=0)
    before = read_save(out)
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    outcome = go(out, pictures, save_minutes=0)
    assert (outcome["step"], outcome["skipped_steps"], outcome["went_back"]) == (9, 1, 0)
    after = read_save(out)
    assert after["facts"]["skipped"] == [8]
    assert after["facts"]["images_seen"] == before["facts"]["images_seen"] + 4
    for name, value in before["tensors"].items():
        if name.startswith(("model.", "optimizer.")):  # momentum and the count of steps, too
            assert torch.equal(value, after["tensors"][name]), name
    record = json.loads((out / METRICS).read_text().splitlines()[-1])
    assert (record["step"], record["skipped_steps"]) == (9, 1)
    assert "loss" not in record

    bundle = out / BUNDLES / "step-000000008"
    assert {path.name for path in bundle.iterdir()} == {WEIGHTS, FIRST_BATCH}
    kept = safetensors.torch.load_file(bundle / FIRST_BATCH)
    assert kept["clips"].shape[0] == 4
    monkeypatch.setattr(job_module, "draw", draw)
    outcome = go(out, pictures)
    assert outcome["finished"]
    assert outcome["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in safetensors.torch.load_file(out / WEIGHTS).values())


def test_a_bundle_is_the_step_that_was_skipped(
    tmp_path: Path, pictures: Path, broken: type[Broken], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed without what broke it, the step has the loss that it would have had."""
    told: list[float] = []

    class Watched(Objective):
        def forward(self, *arguments: Any) -> Any:
            loss, logs = super().forward(*arguments)
            told.append(loss.item())
            return loss, logs

    recipe = photo_recipe(epochs=3, ema_decays=())  # the third, so that the epoch matters
    monkeypatch.setattr(job_module, "Objective", Watched)
    go(tmp_path / "whole", pictures, recipe)
    monkeypatch.setattr(job_module, "Objective", Broken)
    broken.at = frozenset({14})
    go(tmp_path / "run", pictures, recipe, save_minutes=0)
    result = replay(Replay(bundle=tmp_path / "run" / BUNDLES / "step-000000014"))
    assert result["as_it_was"]["loss"] == pytest.approx(told[14], rel=1e-6)
    assert result["step"] == 14
    assert result["as_it_was"]["bad_gradients"] == result["as_it_was"]["bad_clips"] == result["bad_input"] == []


def test_replay_says_what_is_to_blame(
    tmp_path: Path, pictures: Path, broken: type[Broken], capsys: pytest.CaptureFixture[str]
) -> None:
    broken.at = frozenset({4})
    go(tmp_path / "run", pictures, photo_recipe(epochs=1), save_minutes=0)
    bundle = tmp_path / "run" / BUNDLES / "step-000000004"
    tensors = safetensors.torch.load_file(bundle / FIRST_BATCH)
    with safetensors.safe_open(bundle / FIRST_BATCH, framework="pt") as file:
        metadata = file.metadata()
    tensors["clips"][2, 0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(tensors, bundle / FIRST_BATCH, metadata)
    cli.main(["replay", "--bundle", str(bundle)])
    told = capsys.readouterr().out
    index = int(tensors["indices"][2])
    assert "as it was: loss no number, no number in the gradient of" in told
    assert f"by themselves, clips {index}." in told
    assert f"outside [0, 1] are in clips {index}." in told


def test_replay_on_another_kind_of_device_says_that_its_noise_is_another(
    tmp_path: Path, pictures: Path, broken: type[Broken], capsys: pytest.CaptureFixture[str]
) -> None:
    broken.at = frozenset({2})
    go(tmp_path / "run", pictures, photo_recipe(epochs=1), save_minutes=0)
    bundle = tmp_path / "run" / BUNDLES / "step-000000002"
    cli.main(["replay", "--bundle", str(bundle), "--device", "cpu"])
    assert "other noise" not in capsys.readouterr().out
    tensors = safetensors.torch.load_file(bundle / FIRST_BATCH)
    with safetensors.safe_open(bundle / FIRST_BATCH, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["device"] == "cpu"
    safetensors.torch.save_file(tensors, bundle / FIRST_BATCH, {"facts": json.dumps({**facts, "device": "cuda:1"})})
    cli.main(["replay", "--bundle", str(bundle), "--device", "cpu"])
    assert "With other noise than the run's" in capsys.readouterr().out


@pytest.mark.parametrize("there", ["nothing", "text"])
def test_replay_of_something_else_refuses(tmp_path: Path, there: str) -> None:
    if there == "text":
        (tmp_path / FIRST_BATCH).write_text("no tensors")
    with pytest.raises(ValueError, match="holds no skipped step"):
        replay(Replay(bundle=tmp_path))


def test_a_few_in_a_row_send_the_run_back_with_other_draws(
    tmp_path: Path, pictures: Path, broken: type[Broken], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []  # epoch as it names draws, step

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append((arguments[3], len(seen)))
        if len(seen) in (6, 15):
            terminate()
        return draw(*arguments, **named)

    monkeypatch.setattr(job_module, "draw", watched)
    out = tmp_path / "run"
    go(out, pictures)
    assert Saves(out).names()[-1] == "step-000000006"
    broken.calls, broken.at = 0, frozenset(range(2, 2 + PATIENCE))
    monkeypatch.setattr("unveil.train.RECORD_SECONDS", 0.0)  # a look after every step, as after a second of longer ones
    outcome = go(out, pictures)
    assert outcome["went_back"] == 1
    assert outcome["skipped_steps"] == PATIENCE
    assert [epoch for epoch, _ in seen] == [0] * 6 + [1] * 5 + [1_000_001] * 4
    assert not outcome["finished"]
    assert Saves(out).names()[-1] == "step-000000010-restart-1"
    facts = read_save(out)["facts"]
    assert (facts["skipped"], facts["restarts"]) == ([8, 9, 10], 1)
    records = [json.loads(line)["step"] for line in (out / METRICS).read_text().splitlines()]
    assert records == sorted(set(records))  # those of the lost steps are gone
    outcome = go(out, pictures)
    assert outcome["finished"]
    assert {epoch for epoch, _ in seen[15:]} == {1_000_001, 1_000_002}  # a resumed run keeps its other draws
    assert len(list((out / BUNDLES).iterdir())) == MAX_BUNDLES


def test_a_row_that_ended_before_the_look_counts() -> None:
    """Many steps lie between two looks: that the last one was fine does not mean that all is well."""
    health, number = Health(), torch.tensor(1.0)
    rows = []
    for look in ([True, False, False], [False, False, True], [False, True], [True]):
        for good in look:
            health.note(Step(0, []), number, number, torch.tensor(good))
        health.look()
        rows.append(health.in_a_row)
    assert rows == [2, 4, 1, 0]


def test_a_run_that_goes_back_too_often_stops_with_a_sentence(
    tmp_path: Path, pictures: Path, broken: type[Broken], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    at_step(monkeypatch, {3: terminate})
    go(out, pictures)
    saved = {path.name: path.read_bytes() for path in (out / "checkpoints" / "step-000000004").iterdir()}
    monkeypatch.setattr(job_module, "draw", draw)
    broken.at = frozenset(range(10**6))
    with pytest.raises(
        ValueError, match=rf"no number in .* steps in a row by step .*went back {MAX_RESTARTS} times.*--blr"
    ):
        go(out, pictures)
    assert {p.name: p.read_bytes() for p in (out / "checkpoints" / "step-000000004").iterdir()} == saved
    assert Saves(out).names()[-1] == "step-000000004"
    ended = json.loads((out / "outcome.json").read_text())  # by which scripts know not to start it again
    assert (ended["finished"], ended["interrupted"]) == (False, None)
    assert "--blr" in ended["error"]


def test_weights_that_become_infinite_are_not_saved(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite gradients can still lead there, by a learning rate that is far too high."""
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"infinite or no numbers|no number in"):
        go(out, pictures, photo_recipe(base_lr=1e38))
    assert Saves(out).names() == ["step-000000000"]
    assert not (out / WEIGHTS).exists()


def test_going_back_before_the_first_save_is_to_the_start(
    tmp_path: Path, pictures: Path, broken: type[Broken], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unveil.train.RECORD_SECONDS", 0.0)
    broken.at = frozenset({1, 2, 3})
    outcome = go(tmp_path, pictures)
    assert outcome["finished"]
    assert (outcome["went_back"], outcome["images_seen"]) == (1, 72)


# The page


@pytest.mark.usefixtures("curves")
def test_a_runs_page_shows_how_it_goes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    cli.main(["pretrain", "--data", "digits:train", "--out", str(out), "--epochs", "2", "--batch-size", "100"])
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in (
        "28 of 28",
        "Training loss",
        "Norm of the gradient",
        "Speed",
        "waiting for data",
        "The contact sheet",
        "skipped steps",
        "digits:train",
    ):
        assert words in page, words
    assert page.count("<img") >= 6


@pytest.mark.parametrize("seconds, painted", [(30.0, 1), (-1.0, 18)])
def test_quick_saves_paint_nothing(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, painted: int
) -> None:
    """A page and a sheet are made so many seconds after the ones before, and at the end."""
    made: list[Path] = []
    monkeypatch.setattr("unveil.trainer.REPORT_SECONDS", seconds)
    monkeypatch.setattr("unveil.trainer.write_training_report", lambda out, *_: made.append(out))
    sheets: list[Any] = []
    monkeypatch.setattr("unveil.trainer.save_png", lambda path, image: sheets.append(image))
    go(tmp_path, pictures, save_minutes=0)
    assert (len(made), len(sheets)) == (painted, painted)


def test_nearest_neighbours_are_asked_while_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    few = ["--size", "Nano/4", "--epochs", "20", "--batch-size", "720"]
    cli.main(["pretrain", "--data", "digits:train", "--out", str(out), *few, "--json"])
    result = json.loads(capsys.readouterr().out)
    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    told = [record for record in records if "test/knn" in record]
    assert [record["step"] for record in told] == [10, result["num_steps"]]  # after every ten epochs, of one step
    assert all(0 <= record["test/knn"] <= 100 for record in told)
    assert result["best"]["knn"] == max(record["test/knn"] for record in told)
    assert (out / "best.safetensors").exists()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "right by nearest neighbours" in page


@pytest.mark.parametrize("labels, right", [("true", (85, 100)), ("shuffled", (4, 17))])
def test_nearest_neighbours_do_not_vote_for_themselves(
    monkeypatch: pytest.MonkeyPatch, labels: str, right: tuple[int, int]
) -> None:
    """With labels that say nothing of the pictures they are right by chance, one time in ten; by raw pixels with true ones."""
    recipe = recipes.diffmae("Nano/4", channels=1, height=8)
    source = open_source("digits:train", 1)
    shuffled = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    real = source.label
    if labels == "shuffled":
        monkeypatch.setattr(source, "label", lambda index: real(shuffled[index]))
    run = Run(data="digits:train", out=Path("nowhere"))
    neighbours = NearestNeighbours(Samples(source, recipe.clip, 0, recipe.training), recipe, run)
    monkeypatch.setattr("unveil.online_knn.encoder_features", lambda model: lambda clips, indices: clips.flatten(1))
    told = neighbours.evaluate(untrained(recipe, 0))
    assert right[0] <= told["knn"] <= right[1]
    assert len(neighbours.indices) == 500


# Logs


class Board:
    """What stands in for wandb: it keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def init(self, **named: Any) -> "Board":
        self.begun.append(named)
        return self

    def log(self, record: dict[str, float], step: int) -> None:
        self.told.append((step, record))

    def finish(self) -> None:
        self.ended += 1


def test_a_run_is_logged_to_wandb_if_asked_for(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)  # type: ignore[arg-type]
    at_step(monkeypatch, {3: terminate})
    go(tmp_path / "run", pictures, wandb="faces")
    monkeypatch.setattr(job_module, "draw", draw)
    go(tmp_path / "run", pictures, wandb="faces")
    first, second = board.begun
    assert (first["project"], first["name"], first["resume"]) == ("faces", "run", "allow")
    assert first["id"] == second["id"]  # one page for one run
    assert first["config"]["recipe"]["name"] == "diffmae"
    assert board.ended == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert board.told == [(line["step"], line) for line in lines]


def test_wandb_that_is_not_installed_refuses(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--wandb faces needs the package wandb .*pip install wandb"):
        go(tmp_path / "run", pictures, wandb="faces")


ALONE = """
import sys

sys.modules.update(dict.fromkeys({others}))  # so that importing one of them fails
import unveil
outcome = unveil.pretrain(data={data!r}, out={out!r}, size="Nano/4", image_size="8", epochs=2, batch_size=8)
assert outcome["finished"]
"""


def test_training_needs_torch_torchvision_numpy_pillow_and_safetensors_alone(tmp_path: Path, pictures: Path) -> None:
    others = {"tyro", "tqdm", "pyarrow", "tensorboard", "sklearn", "matplotlib", "scipy", "pandas", "huggingface_hub"}
    program = ALONE.format(others=others, data=str(pictures), out=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "matplotlib is not installed" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
