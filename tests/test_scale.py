"""Several processes train as one does with the same batch."""

import copy
import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small import build, clips_for, labels_for, small_variant
from test_finetune import save, tuned
from test_train import PHOTO_RECIPES, go, photo_recipe, read_save, write_pictures

from unveil import cli
from unveil import pretraining_job as job_module
from unveil.checkpoint import WEIGHTS, load_model
from unveil.losses import Objective, draw
from unveil.recipe import Recipe
from unveil.rundir import METRICS
from unveil.saves import Saves
from unveil.sharding import local, shard, whole
from unveil.spread import Spread
from unveil.tasks.replay import Replay, replay
from unveil.trouble import BUNDLES


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 26, classes=2)


def _one(rank: int, world: int, port: int, run: Callable[[int], Any], told: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        told.put((rank, run(rank)))
    except BaseException as error:
        told.put((rank, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        told.close()
        told.join_thread()
        os._exit(1)


def together(run: Callable[[int], Any], world: int = 2, refuses: bool = False) -> list[Any]:
    """What a function of the rank returns in each of several processes, as torchrun starts them; or what it raised, as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=_one, args=(rank, world, port, run, told)) for rank in range(world)]
    for process in processes:
        process.start()
    results = dict(told.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode is not None
    failures = [text for text in results.values() if isinstance(text, str)]
    assert not failures or refuses, failures[0]
    return [results[rank] for rank in range(world)]


def losses(out: Path, name: str = "loss") -> list[float]:
    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [record[name] for record in records if name in record]


def with_gradient(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor without the biases of keys, which softmax does not see: AdamW makes their gradient, which is rounding, large."""
    if name.endswith("qkv.bias"):
        return torch.cat([value.chunk(3)[0], value.chunk(3)[2]])
    return value.chunk(2)[1] if name.endswith("attn.kv.bias") else value


def assert_close(a: Path, b: Path) -> None:
    """Two runs that differ by rounding alone: losses, weights, and what they go on from."""
    torch.testing.assert_close(losses(a), losses(b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(losses(out, "gradient_norm") for out in (a, b)), rtol=1e-4, atol=1e-5)
    files = sorted(path.name for path in a.glob("*.safetensors"))
    assert files == sorted(path.name for path in b.glob("*.safetensors"))
    for file in files:
        ours, theirs = (safetensors.torch.load_file(out / file) for out in (a, b))
        for name, value in ours.items():
            torch.testing.assert_close(*(with_gradient(name, x) for x in (value, theirs[name])), rtol=1e-3, atol=1e-4)
    ours, theirs = read_save(a), read_save(b)
    assert ours["facts"] == theirs["facts"]
    assert ours["tensors"].keys() == theirs["tensors"].keys()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, Path]:
    """A run of each of PHOTO_RECIPES in one process, which records every step."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unveil.train.RECORD_SECONDS", -1.0)
        for name, recipe in PHOTO_RECIPES.items():
            runs[name] = tmp_path_factory.mktemp("runs") / name
            assert go(runs[name], pictures, recipe)["finished"]
    return runs


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unveil.train.RECORD_SECONDS", -1.0)


@pytest.mark.parametrize(
    "name, run",
    [
        *itertools.product(PHOTO_RECIPES, [{}, {"accumulate": 2}, {"workers": 1}]),
        ("umd_flow", {"fsdp": True}),
        ("diffmae", {"fsdp": True, "accumulate": 2}),
    ],
)
def test_two_processes_equal_one(
    tmp_path: Path, pictures: Path, alone: dict[str, Path], name: str, run: dict[str, Any]
) -> None:
    """Batches of 4 in two processes of 2 clips each, with two branches, labels and clipped gradients in one of the recipes."""
    first, second = together(lambda rank: go(tmp_path / "run", pictures, PHOTO_RECIPES[name], **run))
    assert first["finished"], first
    assert (first["step"], first["images_seen"]) == (18, 72)
    assert second == {"rank": 1}
    assert len(losses(tmp_path / "run")) == 18
    assert_close(tmp_path / "run", alone[name])
    written = {path.name for path in Saves(tmp_path / "run").folder.glob("step-000000018/*.distcp")}
    assert written == ({"__0_0.distcp", "__1_0.distcp"} if "fsdp" in run else {"__0_0.distcp"})


SHARDED = ("mae", "diffmae", "diffmae cross", "diffmae joint", "mae_video", "umd", "umd_flow generator", "dit classes")


def test_every_network_computes_the_same_in_shards() -> None:
    """Loss and gradients of every kind of block and decoder, and how much of a network a process has."""

    def compare(rank: int) -> dict[str, Any]:
        told = {}
        with Spread():
            for name in SHARDED:
                recipe = small_variant(name)
                model = build(recipe, spread=0.2)  # so that no gate is zero and hides what is behind it
                sharded = copy.deepcopy(model)
                shard(sharded, "cpu")
                clips = clips_for(recipe, 3)
                drawn = draw(recipe, model.schedule, 0, 0, [0, 1, 2], labels=labels_for(recipe, 3), every_branch=True)
                ours, theirs = (Objective(each)(clips, drawn)[0] for each in (model, sharded))
                ours.backward()
                theirs.backward()
                torch.testing.assert_close(theirs, ours)
                for (path, parameter), other in zip(model.named_parameters(), sharded.parameters(), strict=True):
                    assert (parameter.grad is None) == (other.grad is None), (name, path)
                    if parameter.grad is not None and other.grad is not None:
                        torch.testing.assert_close(whole(other.grad), parameter.grad, msg=f"{name}: {path}")
                part = sum(local(parameter).numel() for parameter in sharded.parameters())
                told[name] = part / sum(parameter.numel() for parameter in model.parameters())
        return told

    for told in together(compare):
        assert tuple(told) == SHARDED
        assert all(0.4 < part < 0.6 for part in told.values()), told


def stop_at(step: int, at_rank: int, fsdp: bool) -> Callable[[int, Path, Path, Recipe], Any]:
    """A run in which one process alone gets SIGTERM, in the middle of a step."""

    def run(rank: int, out: Path, pictures: Path, recipe: Recipe) -> Any:
        calls = iter(range(10**6))

        def draw_and_stop(*arguments: Any, **named: Any) -> Any:
            if next(calls) == step and rank == at_rank:
                signal.raise_signal(signal.SIGTERM)
            return draw(*arguments, **named)

        job_module.draw = draw_and_stop  # type: ignore[attr-defined]  # in a process of its own
        return go(out, pictures, recipe, fsdp=fsdp)

    return run


@pytest.mark.parametrize("at_rank, fsdp", [(0, False), (1, False), (1, True)], ids=["first", "second", "shards"])
def test_a_save_of_two_processes_is_taken_up_by_one_and_the_other_way_round(
    tmp_path: Path, pictures: Path, alone: dict[str, Path], monkeypatch: pytest.MonkeyPatch, at_rank: int, fsdp: bool
) -> None:
    """Whichever process the signal reaches, all stop after the same step."""
    recipe, out = PHOTO_RECIPES["umd_flow"], tmp_path / "run"
    first, second = together(lambda rank: stop_at(4, at_rank, fsdp)(rank, out, pictures, recipe))
    assert (first["interrupted"], second) == ("SIGTERM", {"rank": 1}), (first, second)
    step = first["step"]
    assert step in (5, 6)  # the others learn of it when the next step begins
    monkeypatch.setattr(job_module, "draw", draw)
    assert stop_at(4, 0, fsdp)(0, out, pictures, recipe)["step"] == step + 5
    job_module.draw = draw  # type: ignore[attr-defined]
    first, second = together(lambda rank: go(out, pictures, recipe, fsdp=fsdp))
    assert first["finished"], first
    assert first["resumed"]
    assert_close(out, alone["umd_flow"])


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_process_without_a_readable_clip_waits_for_the_others(tmp_path: Path, pictures: Path, fsdp: bool) -> None:
    """Batches of two clips in two processes, a third of them unreadable; also the count of what is wrong."""
    write_pictures(tmp_path / "data", 18)
    for number in (1, 4, 5, 8, 11, 12):
        (tmp_path / "data" / f"{number:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 40)
    recipe = photo_recipe(epochs=2, batch_size=2)
    whole = go(tmp_path / "alone", tmp_path / "data", recipe)
    first, _ = together(lambda rank: go(tmp_path / "run", tmp_path / "data", recipe, fsdp=fsdp))
    assert first["finished"], first
    assert first["images_seen"] == whole["images_seen"] == 24
    assert first["skipped"] == whole["skipped"] == 6
    problems = [(out / "problems.jsonl").read_text() for out in (tmp_path / "run", tmp_path / "alone")]
    assert problems[0] == problems[1]
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=1e-5, atol=1e-6)


def broken_at(rank: int, calls: set[int]) -> type[Objective]:
    """An objective whose loss is no number at some of its calls, from 1, in one process."""

    class Broken(Objective):
        count = 0

        def forward(self, *arguments: Any) -> Any:
            loss, logs = super().forward(*arguments)
            Broken.count += 1
            broken = os.environ.get("RANK") == str(rank) and Broken.count in calls
            return (loss * float("nan") if broken else loss), logs

    return Broken


def test_processes_whose_clips_have_other_branches_compute_all_of_them_in_shards(
    tmp_path: Path, pictures: Path
) -> None:
    """Of two clips in a batch one has each branch; a process that left the other's out would wait for ever."""
    recipe = PHOTO_RECIPES["umd_flow"]
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, batch_size=2, epochs=1))
    assert go(tmp_path / "alone", pictures, recipe)["finished"]
    first, _ = together(lambda rank: go(tmp_path / "run", pictures, recipe, fsdp=True))
    assert first["finished"], first
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_gradient_that_is_no_number_on_one_process_is_skipped_by_all(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, fsdp: bool
) -> None:
    monkeypatch.setattr(job_module, "Objective", broken_at(1, {5}))
    first, second = together(lambda rank: go(tmp_path, pictures, fsdp=fsdp))
    assert first["finished"], first
    assert first["skipped_steps"] == 1
    assert second == {"rank": 1}
    bundle = tmp_path / BUNDLES / "step-000000004"
    assert [path.name for path in (tmp_path / BUNDLES).iterdir()] == [bundle.name]
    assert {path.name for path in bundle.iterdir()} == {WEIGHTS, "batch-0.safetensors", "batch-1.safetensors"}
    assert replay(Replay(bundle=bundle))["num_clips"] == 4
    assert all(value.isfinite().all() for value in load_model(tmp_path)[0].state_dict().values())


def test_a_run_that_goes_back_does_so_in_all_processes(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "Objective", broken_at(0, {3, 4, 5}))
    first, _ = together(lambda rank: go(tmp_path, pictures, save_minutes=0, fsdp=True))
    assert first["finished"], first
    assert (first["went_back"], first["skipped_steps"], first["images_seen"]) == (1, 3, 72)
    assert Saves(tmp_path).names()[-1] == "step-000000018-restart-1"


def test_a_batch_that_cannot_be_split_refuses(tmp_path: Path, pictures: Path) -> None:
    for told in together(lambda rank: go(tmp_path, pictures, photo_recipe(batch_size=1)), refuses=True):
        assert "ValueError: A batch of 1 cannot be split over 2 processes. Use --batch-size 2 or more." in told


def test_other_commands_refuse_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as caught:
        cli.main(["probe", "--run", str(tmp_path), "--data", "digits:test"])
    assert caught.value.code == 2
    assert "torchrun started 2 processes, but only pretrain" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tuned_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pre-trained model, and a fine-tuning of it in one process."""
    folder = tmp_path_factory.mktemp("tuning")
    save(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unveil.train.RECORD_SECONDS", -1.0)
        tuned(folder / "run", folder / "alone", **NOT_BLENDED)
    return folder / "run", folder / "alone"


# MixUp and CutMix blend within a process's part of a batch, and drop path draws for it.
NOT_BLENDED = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_fine_tune_as_one_does(tmp_path: Path, tuned_alone: tuple[Path, Path], fsdp: bool) -> None:
    start, alone = tuned_alone
    first, second = together(lambda rank: tuned(start, tmp_path / "run", fsdp=fsdp, **NOT_BLENDED))
    assert first["finished"], first
    assert second == {"rank": 1}
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone), rtol=1e-4, atol=1e-5)
    ours, theirs = (safetensors.torch.load_file(out / WEIGHTS) for out in (tmp_path / "run", alone))
    for name, value in ours.items():
        torch.testing.assert_close(*(with_gradient(name, x) for x in (value, theirs[name])), rtol=1e-3, atol=1e-3)
    numbers = [json.loads((out / "evaluation.json").read_text()) for out in (tmp_path / "run", alone)]
    assert abs(numbers[0]["last"]["score"] - numbers[1]["last"]["score"]) < 1


def test_processes_blend_and_drop_apart_from_each_other(tmp_path: Path, tuned_alone: tuple[Path, Path]) -> None:
    """Pieces of a batch that processes compute at once draw as pieces that one process computes one after another."""
    start, _ = tuned_alone
    drawn = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2}
    tuned(start, tmp_path / "pieces", accumulate=2, **drawn)
    first, _ = together(lambda rank: tuned(start, tmp_path / "run", **drawn))
    assert first["finished"], first
    with pytest.raises(ValueError, match=r"cut into 2 \(processes x --accumulate\), and now into 1"):
        tuned(start, tmp_path / "run", **drawn)
    assert tuned(start, tmp_path / "run", accumulate=2, **drawn)["finished"]
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "pieces"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_documented_command_runs(tmp_path: Path) -> None:
    """torchrun itself, with the command line."""
    import subprocess
    import sys

    words = "--standalone --nproc-per-node 2 -m -- unveil.cli pretrain --data digits:test --epochs 1 --json --out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words.split(), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"]
    assert (tmp_path / "run" / WEIGHTS).exists()
