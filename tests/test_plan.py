"""`unveil plan`: what it foretells is what a run then does: steps, files to the byte, memory; and it leaves nothing behind."""

import dataclasses
import json
import math
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unveil import cli, hardware, measuring
from unveil.data import Order
from unveil.hardware import memory_of, peak_of
from unveil.layers import blocks_of
from unveil.measuring import a_batch, activations, one_step, outline, read_some, saved_bytes, static_memory, time_steps
from unveil.pretraining import pretraining_of
from unveil.pretraining_job import PretrainingJob
from unveil.tasks import plan as plan_module
from unveil.tasks.plan import Plan, plan
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.trainer import Trainer

SMALL: dict[str, Any] = {"data": "digits:test", "device": "cpu", "workers": 0}
QUICK: dict[str, Any] = {**SMALL, "measure_seconds": 0.02}


def photos(folder: Path, number: int = 7) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def trainer_of(**options: Any) -> tuple[Trainer, Any]:
    """A run's own trainer, and what it was made from."""
    asked = pretraining_of(Plan(**{**SMALL, **options}))
    return Trainer(PretrainingJob(asked.recipe, asked.samples, asked.run), asked.samples, asked.run), asked


# Against a run


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2, "batch_size": 100},
        {"epochs": 1, "ema_decays": (0.9, 0.999, 0.99)},
        {"epochs": 3, "batch_size": 1000, "accumulate": 3, "recipe": "mae"},  # a batch of all the data
        {"epochs": 1, "recipe": "umd", "size": "Nano/2", "labels": True},  # no averages
        {"epochs": 1, "recipe": "diffmae", "decoder": "joint", "warmup_epochs": 0.5},
    ],
)
def test_steps_and_files_are_those_of_the_run(tmp_path: Path, options: dict[str, Any]) -> None:
    told = plan(Plan(**QUICK, **options))
    outcome = pretrain(Pretrain(**SMALL, **options, out=tmp_path / "run"))
    training = told["training"]
    assert outcome["finished"]
    assert (training["num_steps"], training["images_seen"]) == (outcome["num_steps"], outcome["images_seen"])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert training["batch_size"] == config["recipe"]["training"]["batch_size"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["lr"] for line in lines) <= training["lr"]
    written = {path.name: path.stat().st_size for path in (tmp_path / "run").iterdir()}
    files = told["disk"]["files"]
    assert files == {name: written[name] for name in files}
    assert {name for name in written if name.endswith(".safetensors")} - {"best.safetensors"} == files.keys()
    assert written.get("best.safetensors", 0) == pytest.approx(
        told["disk"]["best"], abs=16
    )  # its step has fewer digits
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert told["disk"]["save"] == pytest.approx(sum(path.stat().st_size for path in newest.iterdir()), rel=0.01)


def test_the_best_weights_are_foretold_if_they_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretrainingJob, "evaluates", lambda job, epoch: epoch == 2)
    monkeypatch.setattr(PretrainingJob, "evaluate", lambda job, model: {"knn": 50.0, "score": 50.0})
    told = plan(Plan(**QUICK, epochs=2))
    pretrain(Pretrain(**SMALL, epochs=2, out=tmp_path / "run"))
    size = (tmp_path / "run/best.safetensors").stat().st_size
    assert told["disk"]["best"] == pytest.approx(size, abs=16)  # its step may have fewer digits
    assert any("best.safetensors 2.46 MB" in line for line in cli._tell_plan(told))


def test_files_are_foretold_for_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    data = photos(tmp_path / 'Ä "photos"\t')
    (data / "notes.txt").write_text("no picture")
    options: dict[str, Any] = {
        "data": str(data), "size": "Nano/4", "image_size": "8", "epochs": 1, "batch_size": 7, "device": "cpu"
    }  # fmt: skip
    told = plan(Plan(**options, measure_seconds=0.02))
    pretrain(Pretrain(**options, out=tmp_path / "run"))
    assert told["data"]["skipped"] == 1
    for name, size in told["disk"]["files"].items():
        assert (tmp_path / "run" / name).stat().st_size == size


@pytest.mark.parametrize(
    "options, batch",
    [
        ({}, 64),
        ({"recipe": "mae"}, 40),
        ({"recipe": "umd", "size": "Nano/2", "labels": True}, 64),
        ({"decoder": "cross"}, 64),
        ({"precision": "bf16"}, 32),
        ({"gradient_checkpointing": True}, 64),
    ],
)
def test_activations_of_a_whole_batch_are_foretold_from_small_ones(options: dict[str, Any], batch: int) -> None:
    trainer, asked = trainer_of(**options)
    assert isinstance(trainer.order, Order)
    samples = read_some(asked.samples, trainer.order, 1.0).samples
    least = math.ceil(1 / min(branch.share for branch in asked.recipe.branches))
    kept = activations(trainer, samples, least)
    counted = saved_bytes(trainer, a_batch(samples, list(range(batch))))
    assert kept.of(batch) == pytest.approx(counted, rel=0.02)
    assert counted > 50_000 * batch / (16 if "gradient_checkpointing" in options else 8)


def test_checkpointing_keeps_what_blocks_are_given_and_what_one_of_them_saves() -> None:
    trainer, asked = trainer_of()
    batch = a_batch([asked.samples[0, i, i] for i in range(8)], list(range(8)))
    plain = saved_bytes(trainer, batch)
    given: list[int] = []
    for block in blocks_of(trainer.model):
        block.recompute = True
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].nbytes))
        for block in blocks_of(trainer.model)
    ]
    less = saved_bytes(trainer, batch)
    for hook in hooks:
        hook.remove()
    blocks = len(given)
    assert blocks > 4
    assert sum(given) < less < plain
    largest = (plain - less) / (blocks - 1)  # about what a block saves, more than it is given
    assert less > sum(given) + largest / 2


def test_what_is_saved_is_counted_once_and_without_the_weights() -> None:
    trainer, asked = trainer_of()

    class Known(torch.nn.Module):
        def forward(self, clips: torch.Tensor, drawn: Any) -> tuple[torch.Tensor, None]:
            weight = next(trainer.model.parameters())
            values = clips.flatten().requires_grad_()  # as long as the clips
            squared = (values * values).exp()  # keeps the values, and its own result
            return (squared * (weight * weight).sum()).sum(), None  # keeps the weights, a number, and that result again

    trainer.job.objective = Known()  # type: ignore[misc]
    batch = a_batch([asked.samples[0, i, i] for i in range(3)], [0, 1, 2])
    assert saved_bytes(trainer, batch) == 2 * batch.clips().nbytes + 4


def test_what_stays_in_memory_is_what_a_trainer_holds() -> None:
    trainer, asked = trainer_of(ema_decays=(0.9, 0.99))
    assert isinstance(trainer.order, Order)
    one_step(trainer, a_batch([asked.samples[0, 0, 0]], list(range(64))), 1)
    told = static_memory(outline(asked))
    state = [x for each in trainer.optimizer.state.values() for x in each.values()]
    assert told["optimizer"] == sum(x.nbytes for x in state)
    assert told["gradients"] == sum(p.grad.nbytes for p in trainer.model.parameters() if p.grad is not None)
    assert told["weights"] == sum(x.nbytes for x in (*trainer.model.parameters(), *trainer.model.buffers()))
    averages = (*trainer.averages.parameters(), *trainer.averages.buffers())
    assert told["averages"] == sum(x.nbytes for x in averages)


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_step_that_is_timed_is_the_step_of_a_training(tmp_path: Path, pieces: int) -> None:
    """Its gradient, as AdamW's first moment remembers it, and it leaves the weights as they are."""
    options: dict[str, Any] = {"epochs": 1, "batch_size": 360, "accumulate": pieces}
    trainer, asked = trainer_of(**options)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    order = trainer.order
    assert isinstance(order, Order)
    (keys,) = order
    samples = [asked.samples[key] for key in keys]
    one_step(trainer, a_batch(samples, [key[-1] for key in keys]), pieces)
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    pretrain(Pretrain(**SMALL, **options, out=tmp_path / "run"))
    trained, _ = trainer_of(**options, out=tmp_path / "run")
    assert trained.load()
    ours, theirs = (each.state()["optimizer"] for each in (trainer, trained))
    assert ours.keys() == theirs.keys()
    for name, moments in theirs.items():
        torch.testing.assert_close(ours[name]["exp_avg"], moments["exp_avg"], rtol=0, atol=0)


# Numbers by arithmetic


def test_hours_by_a_stated_speed() -> None:
    options = {**SMALL, "epochs": 5, "peak_tflops": 1e-6, "mfu": 0.5, "num_devices": 2, "device": "cuda"}
    if torch.cuda.is_available():
        options["device"] = "xpu"
    told = plan(Plan(**options, measure_seconds=0.02))
    training, clock = told["training"], told["time"]
    step = told["arithmetic"]["train_flops_per_clip"] * training["batch_size"] / (1e-6 * 1e12 * 0.5 * 2)
    assert clock["step_seconds"] == pytest.approx(step, rel=1e-12)
    assert (clock["by"], clock["measured"], clock["reached_tflops"]) == ("arithmetic", None, None)
    assert clock["hours"] == pytest.approx(step * training["num_steps"] / 3600, rel=0.01)  # and some reading
    assert (training["clips_at_once"], training["precision"]) == (32, "bf16")
    assert told["memory"]["limit"] is None
    advice = " ".join(told["advice"])
    assert f"There is no {options['device']} here" in advice
    assert "2 devices are counted as sharing without loss; that is not measured." in advice


def test_a_device_that_is_not_here_is_not_timed() -> None:
    device = "xpu" if torch.cuda.is_available() else "cuda"
    told = plan(Plan(**{**QUICK, "device": device}, hours=1.0))
    assert (told["time"]["step_seconds"], told["time"]["hours"], told["budget"]) == (None, None, None)
    assert told["memory"]["activations"] > 0
    advice = " ".join(told["advice"])
    assert "Give --peak-tflops and --mfu" in advice
    assert "How many epochs fit into --hours is not known" in advice
    assert any(f"not known: no step was run on {device}" in line for line in cli._tell_plan(told))


@pytest.mark.parametrize("hours", [1e-9, 0.01, 3.0])
def test_as_many_epochs_as_fit_into_the_hours(hours: float) -> None:
    told = plan(Plan(**QUICK, hours=hours))
    seconds, epochs = told["time"]["epoch_seconds"], told["budget"]["epochs"]
    taken = seconds["first"] + (epochs - 1) * seconds["other"]
    assert (epochs == 0) == (seconds["first"] > hours * 3600)
    if epochs:
        assert taken <= hours * 3600 < taken + seconds["other"]
    assert told["budget"]["num_steps"] == epochs * told["training"]["steps_per_epoch"]
    assert ("Not one epoch fits" in " ".join(told["advice"])) == (epochs == 0)


def test_a_large_batch_is_extrapolated_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock by which each picture takes a second and an update three."""
    trainer, asked = trainer_of(batch_size=300, accumulate=2)
    taken: list[int] = []
    monkeypatch.setattr(measuring, "one_step", lambda trainer, batch, pieces: taken.append(len(batch.indices) + 3))
    monkeypatch.setattr(measuring, "update", lambda trainer, loss: taken.append(3))

    def clock(trainer: Trainer, run: Any) -> float:
        run()
        return taken[-1]

    monkeypatch.setattr(measuring, "_seconds", clock)
    assert isinstance(trainer.order, Order)
    samples = [asked.samples[0, 0, 0]]
    told = time_steps(trainer, samples, trainer.order, 100, 0.0)
    assert (told["measured_batch"], told["step_seconds"], told["update_seconds"]) == (4, 303, 3)
    monkeypatch.setattr(measuring.time, "perf_counter", iter(range(0, 10**9, 10)).__next__)
    told = time_steps(trainer, samples, trainer.order, 100, 900.0)
    assert (told["measured_batch"], told["step_seconds"]) == (100, 303)  # no more fit into the memory
    told = time_steps(trainer, samples, trainer.order, 1000, 2000.0)
    assert (told["measured_batch"], told["step_seconds"], told["measured_steps"]) == (300, 303, 200)


# Advice


def advice_of(**options: Any) -> str:
    return "\n".join(plan(Plan(**{**QUICK, **options}))["advice"])


def test_few_steps_are_told() -> None:
    advice = advice_of(epochs=3, batch_size=100)
    assert "9 steps are few: expect little but colours. Give --epochs 334 or more" in advice
    assert "steps are few" not in advice_of(epochs=334, batch_size=100)


def test_a_batch_larger_than_the_data_is_told() -> None:
    assert "A batch of 4,096 is larger than the data; it is 360" in advice_of(batch_size=4096)
    assert "larger than the data" not in advice_of(batch_size=360)


def test_a_batch_that_does_not_fit_says_in_how_many_pieces_it_does() -> None:
    memory = plan(Plan(**QUICK, batch_size=256))["memory"]
    fixed = sum(memory[name] for name in ("weights", "gradients", "optimizer", "averages", "pictures"))
    fixed += memory["activations_fixed"]

    def gib(clips: float) -> float:
        """A memory for so many clips at once."""
        return (fixed + memory["activations_per_clip"] * clips) / plan_module.MEMORY_SHARE / 2**30

    assert "memory" not in advice_of(batch_size=256, memory_gib=gib(256.5))
    for clips, pieces in ((255.5, 2), (128.5, 2), (127.5, 3), (1.5, 256)):
        told = advice_of(batch_size=256, memory_gib=gib(clips))
        assert f"does not fit into the memory. Give --accumulate {pieces}, or --gradient-checkpointing, or" in told
    assert "does not fit" not in advice_of(batch_size=256, memory_gib=gib(128.5), accumulate=2)
    assert "does not fit" not in advice_of(batch_size=256, memory_gib=gib(128.5), num_devices=2)
    nothing_fits = "Not even one picture at once does: give a smaller --size, or --gradient-checkpointing{}."
    assert nothing_fits.format("") in advice_of(batch_size=256, memory_gib=gib(0.5))
    assert nothing_fits.format(", or --fsdp") in advice_of(batch_size=256, memory_gib=gib(0.5), num_devices=2)


def test_shards_divide_what_stays_in_memory() -> None:
    one, four = (plan(Plan(**QUICK, num_devices=4, fsdp=fsdp))["memory"] for fsdp in (False, True))
    for name in ("weights", "gradients", "optimizer", "averages"):
        assert four[name] == math.ceil(one[name] / 4) > 0
    assert four["activations"] == one["activations"]
    trainer, _ = trainer_of()
    block = max(sum(p.nbytes for p in block.parameters()) for block in blocks_of(trainer.model))
    assert (one["gathered"], plan(Plan(**QUICK, fsdp=True))["memory"]["gathered"]) == (0, 0)
    assert 3 * block < four["gathered"] < one["weights"] + one["gradients"]
    assert any(
        "gathered from the shards" in line for line in cli._tell_plan(plan(Plan(**QUICK, num_devices=4, fsdp=True)))
    )


def test_hours_by_arithmetic_count_what_checkpointing_computes_again() -> None:
    plain, again = (
        plan(Plan(**QUICK, peak_tflops=1.0, gradient_checkpointing=checkpointing)) for checkpointing in (False, True)
    )
    assert again["time"]["step_seconds"] == pytest.approx(plain["time"]["step_seconds"] * 4 / 3)
    assert any(line.endswith("the forward pass made twice") for line in cli._tell_plan(again))
    assert not any("made twice" in line for line in cli._tell_plan(plain))


def test_a_model_that_is_too_large_for_this_machine_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "memory_of", lambda device: 1000)
    told = plan(Plan(**QUICK))
    assert (told["memory"]["activations"], told["time"]["step_seconds"]) == (None, None)
    assert "so nothing was run" in told["advice"][-1]
    assert any("activations not counted" in line for line in cli._tell_plan(told))


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    assert f"The disk of {tmp_path / 'a/b'} is too small" in advice_of(out=tmp_path / "a/b")


@pytest.mark.parametrize(
    "workers, expected", [(0, "try --workers 500."), (2, "--workers 500 would keep up, if there are")]
)
def test_slow_reading_is_told(monkeypatch: pytest.MonkeyPatch, workers: int, expected: str) -> None:
    slow = lambda samples, order, seconds: measuring.Reading(1.0, 1.0, [samples[0, 0, 0]], 1)  # noqa: E731
    monkeypatch.setattr(plan_module, "read_some", slow)
    flops = plan(Plan(**QUICK))["arithmetic"]["train_flops_per_clip"]
    advice = advice_of(workers=workers, peak_tflops=flops * 500 / 1e12, mfu=1.0)
    assert expected in advice


# The command


def test_the_same_line_is_a_plan_and_a_training() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(Plan)}
    theirs = {field.name: field.default for field in dataclasses.fields(Pretrain)}
    assert {name: ours[name] for name in theirs if name != "out"} == {n: d for n, d in theirs.items() if n != "out"}


def test_nothing_is_written_and_no_generator_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.get_rng_state()
    plan(Plan(**QUICK, out=tmp_path / "run"))
    torch.testing.assert_close(torch.get_rng_state(), generator)
    assert list(tmp_path.iterdir()) == []


def test_init_counts(tmp_path: Path) -> None:
    pretrain(Pretrain(**SMALL, out=tmp_path / "run", epochs=1, recipe="mae", size="Micro/4"))
    told = plan(Plan(**QUICK, init=tmp_path / "run", size="Micro/4", image_size="8"))
    assert told["size"] == "Micro/4"


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan --data digits:test --device cpu --epochs 4 --hours 1 --measure-seconds 0.02"
    cli.main([*line.split(), "--json"])
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told["training"]["num_steps"] == 20
    for pattern in (
        r"model +diffmae Nano/2: 611,332 parameters \(condition",
        r"tokens +16 of 4 values each; 4 visible, 12 hidden",
        r"batch +64; learning rate 0.006 x 64 / 256 = 0.0015, reached after 5 steps",
        r"length +4 epochs of 5 steps: 20 steps, 1,280 pictures seen",
        r"measured here, cpu in fp32: the median of \d+ steps of \d+ pictures",
        r"disk +.* MB: last.safetensors 2.46 MB, model.safetensors 2.46 MB, 2 save\(s\) of about",
        r"budget +1 hours: [\d,]+ epochs",
        r"- 20 steps are few",
    ):
        assert re.search(pattern, captured.err), pattern


def test_the_line_in_the_weights_is_the_one_that_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that files are foretold to the byte from the command line, too."""
    monkeypatch.chdir(tmp_path)
    line = "--data digits:test --device cpu --epochs 1 --out new"
    for command in (f"plan {line} --hours 3 --measure-seconds=0.02", f"pretrain {line}"):
        monkeypatch.setattr("sys.argv", ["/usr/bin/unveil", *command.split()])
        if command.startswith("plan"):
            told = plan(Plan(**QUICK, epochs=1, out=Path("new"), hours=3.0))
        else:
            pretrain(Pretrain(**SMALL, epochs=1, out=Path("new")))
    assert told["disk"]["files"] == {name: (Path("new") / name).stat().st_size for name in told["disk"]["files"]}
    assert plan_module.training_command("unveil plan --data 'a b' --num-devices 2", Path("runs/plan")) == (
        "unveil pretrain --data 'a b' --out runs/plan"
    )


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--num-devices 0", "--num-devices 0: use 1 or more."),
        ("--hours 0", "--hours 0: use a number above 0."),
        ("--hours nan", "--hours nan: use a number above 0."),
        ("--peak-tflops -1", "--peak-tflops -1: use a number above 0."),
        ("--memory-gib 0", "--memory-gib 0: use a number above 0."),
        ("--measure-seconds inf", "--measure-seconds inf: use a number above 0."),
        ("--mfu 0.5", "--mfu 0.5 is a share of --peak-tflops, which is not given."),
        ("--peak-tflops 9 --mfu 1.5", "--mfu 1.5: use a share of the peak"),
        ("--device gpu", "--device gpu cannot be used here"),
        ("--accumulate 100", "--accumulate 100: a batch of 64 clips"),
        ("--size Nano/3", "patch_size=3 does not divide"),
        ("--data {tmp}/bad --size Nano/4 --image-size 8", "None of the first 1 samples .*`unveil doctor` looks"),
    ],
)
def test_plan_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_text("text")
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--data", "digits:test", *words.format(tmp=tmp_path).split()])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert re.search(expected, captured.err.splitlines()[-1])


# Hardware


@pytest.mark.parametrize(
    "name, bf16",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10", None),
    ],
)
def test_peaks_by_name(name: str, bf16: float | None) -> None:
    peak = peak_of(name)
    assert (None if peak is None else peak.bf16) == bf16


def test_a_containers_limit_is_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory_of("cpu")
    assert whole > 2**28
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "LIMITS", (str(limit), str(tmp_path / "none")))
    for text, expected in (("max\n", None), ("1000\n", 1000), (str(2**62), None)):
        limit.write_text(text)
        assert memory_of("cpu") == (
            expected or hardware.os.sysconf("SC_PHYS_PAGES") * hardware.os.sysconf("SC_PAGE_SIZE")
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")
def test_a_gpu_is_measured_by_its_allocator() -> None:
    told = plan(Plan(**{**QUICK, "device": "cuda", "batch_size": 256}))
    assert told["memory"]["activations"] > 0
    assert told["time"]["by"] == "measurement"
    assert told["memory"]["limit"] == torch.cuda.get_device_properties("cuda").total_memory
