"""What fine-tuning, probing and telling make of labels, files and numbers that are not as one would have them."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from small import build, small

import unveil
from unveil import cli
from unveil import recognition_job as job_module
from unveil.checkpoint import WEIGHTS, About, save_weights
from unveil.finetuning import SMALL, Recognition
from unveil.recognizer import Recognizer, load_any, load_recognizer, score_each
from unveil.sources import files_of, open_source, trained_on_too
from unveil.targets import truth_of
from unveil.tasks.embed import Embed, embed
from unveil.tasks.finetune import Finetune, finetune
from unveil.tasks.predict import Predict, predict
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe

SIDE = 8


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe = small("mae", channels=3, height=SIDE)
    about = About(step=1, images_seen=1, ema_decay=None, data="x", command="x")
    save_weights(tmp_path / "run" / WEIGHTS, recipe, build(recipe).state_dict(), about)
    return tmp_path / "run"


def picture(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 40, (SIDE, SIDE, 3))
    Image.fromarray((noise + value % 200).astype(np.uint8)).save(path)
    return path


def folders(root: Path, names: tuple[str, ...] = ("cat", "dog"), number: int = 10) -> Path:
    for c, name in enumerate(names):
        for i in range(number):
            picture(root / name / f"{i}.png", 100 * c + i)
    return root


def table(root: Path, columns: dict[str, list[Any]], name: str = "t.csv") -> Path:
    """Pictures, and a table of them with these columns; `path` if it is not given."""
    number = len(next(iter(columns.values())))
    for i in range(number):
        picture(root / f"{i}.png", i)
    columns = {"path": [f"{i}.png" for i in range(number)], **columns}
    if name.endswith(".csv"):
        with (root / name).open("w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    else:
        pq.write_table(pa.table(columns), root / name)
    return root / name


def tuned(run: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"epochs": 1, "device": "cpu", "batch_size": 8}
    return finetune(Finetune(run=run, data=str(data), out=out, **{**given, **options}))


# Names


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("names", [("$\\foo", "b$_$"), ("^_$", "x" * 200), (os.fsdecode(b"caf\xe9"), "tea")])
def test_any_name_of_a_class_reaches_the_report(tmp_path: Path, run: Path, names: tuple[str, str]) -> None:
    result = tuned(run, folders(tmp_path / "data", names), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in result["outputs"])
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["outputs"] == result["outputs"]


def test_a_path_that_is_no_utf8_is_told(tmp_path: Path, run: Path) -> None:
    tuned(run, folders(tmp_path / "data"), tmp_path / "out")
    new = tmp_path / "new" / os.fsdecode(b"caf\xe9") / "a.png"
    picture(new, 3)
    predict(Predict(run=tmp_path / "out", data=str(tmp_path / "new"), out=tmp_path / "told.csv", device="cpu"))
    assert "caf\\xe9/a.png" in (tmp_path / "told.csv").read_text(encoding="utf-8")


# Classes without pictures


def test_a_class_folder_without_a_picture_is_refused(tmp_path: Path, run: Path) -> None:
    data = folders(tmp_path / "data")
    (data / "owl").mkdir()
    (data / "owl" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match="has a folder 'owl' without a picture that can be used"):
        tuned(run, data, tmp_path / "out")
    with pytest.raises(ValueError, match="has a folder 'owl' without a picture that can be used"):
        probe(Probe(run=run, data=str(data), device="cpu"))
    (data / ".hidden").mkdir()
    (data / "owl" / "notes.txt").unlink()
    (data / "owl").rmdir()
    assert tuned(run, data, tmp_path / "out")["outputs"] == ["cat", "dog"]


def test_a_class_of_which_nothing_can_be_read_is_refused(tmp_path: Path, run: Path) -> None:
    data = folders(tmp_path / "data", ("cat", "dog", "owl"))
    for path in (data / "owl").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"No picture of the class 'owl' can be read; the first problem: owl/\d\.png"):
        tuned(run, data, tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    picture(data / "owl" / "9.png", 3)  # one is enough
    picture(data / "owl" / "8.png", 3)
    assert tuned(run, data, tmp_path / "out", test_data=str(data))["skipped"] > 0


def test_a_probe_names_what_it_could_not_read(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folders(tmp_path / "data")
    (data / "dog" / "3.png").write_bytes(b"broken")
    result = probe(Probe(run=run, data=str(data), test_data=str(data), device="cpu", method="knn", k=(1,)))
    assert [problem["where"] for problem in result["problems"]] == ["dog/3.png"] * 2
    assert result["trained_on_too"] == 20
    cli.main(f"probe --run {run} --data {data} --test-data {data} --device cpu --method knn --k 1".split())
    out = capsys.readouterr().out
    assert "Files that could not be used: 2." in out
    assert "20 of the test samples are trained on too" in out
    for path in (data / "dog").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="has one class that can be read, and to tell classes apart takes two"):
        probe(Probe(run=run, data=str(data), device="cpu"))


# The same file under several names


def test_a_file_is_the_same_however_it_is_spelt(tmp_path: Path, run: Path) -> None:
    root = tmp_path / "data"
    absolute = [str(root / f"{i}.png") for i in range(10)]
    paths = [f"{i}.png" for i in range(10)] + absolute + [f"./{i}.png" for i in range(10)]
    listed = table(root, {"label": (["a", "b"] * 5) * 3})
    table(root, {"path": paths, "label": (["a", "b"] * 5) * 3})
    source = open_source(str(listed), 3)
    names = files_of(source)
    assert len(set(names)) == 10
    assert names[:10] == names[10:20] == names[20:]
    (tmp_path / "link").symlink_to(root)
    assert files_of(open_source(str(tmp_path / "link" / "t.csv"), 3)) == names
    assert trained_on_too(open_source(str(root), 3), source) == 30
    result = tuned(run, listed, tmp_path / "out")  # a fifth of the rows, and whatever else is of their files
    assert result["trained_on_too"] == 0
    assert result["train_samples"] + result["test_samples"] == 30
    assert result["test_samples"] % 3 == 0


# Another run


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    real = job_module.blend

    def act(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(job_module, "blend", act)


@pytest.mark.parametrize("change", ["labels", "files"])
def test_a_run_does_not_go_on_with_other_samples(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    labels = ["a", "b"] * 10
    listed = table(tmp_path / "data", {"label": labels})
    with monkeypatch.context() as patch:
        interrupt(patch)
        assert not tuned(run, listed, tmp_path / "out", epochs=3)["finished"]
    before = listed.read_text()
    if change == "labels":
        table(tmp_path / "data", {"label": labels[::-1]})
    else:
        picture(tmp_path / "data" / "other.png", 7)
        listed.write_text(before.replace("3.png", "other.png", 1))
    with pytest.raises(ValueError, match="holds a run of other samples"):
        tuned(run, listed, tmp_path / "out", epochs=3)
    listed.write_text(before)
    assert tuned(run, listed, tmp_path / "out", epochs=3)["finished"]


def test_pieces_are_the_same_as_long_as_pictures_are_blended(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folders(tmp_path / "data")
    with monkeypatch.context() as patch:
        interrupt(patch)
        tuned(run, data, tmp_path / "out", mixup=0.8, epochs=3)
    with pytest.raises(
        ValueError, match=r"processes x --accumulate.*decides what is blended and which paths are dropped"
    ):
        tuned(run, data, tmp_path / "out", mixup=0.8, epochs=3, accumulate=2)
    with pytest.raises(ValueError, match="--accumulate 8 leaves single pictures of a batch of 8"):
        tuned(run, data, tmp_path / "new", mixup=0.8, accumulate=8)
    assert tuned(run, data, tmp_path / "out", mixup=0.8, epochs=3)["finished"]


def test_what_a_killed_save_left_is_removed(tmp_path: Path, run: Path) -> None:
    data = folders(tmp_path / "data")
    tuned(run, data, tmp_path / "out")
    (tmp_path / "out" / ".state.pt.abc.part").write_bytes(b"half")
    tuned(run, data, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.part"))


@pytest.mark.parametrize(
    "make", [tuned, lambda run, data, out: pretrain(Pretrain(data=str(data), out=out, size="Nano/4"))]
)
def test_a_run_does_not_lie_in_its_own_data(tmp_path: Path, run: Path, make: Any) -> None:
    data = folders(tmp_path / "data")
    with pytest.raises(ValueError, match=r"lies in .*, where its pictures would be read as data"):
        make(run, data, data / "run")
    assert not (data / "run").exists()


# Numbers


def test_dates_in_seconds_are_learned_in_their_own_digits(tmp_path: Path, run: Path) -> None:
    """float32 knows them to 128 seconds."""
    seconds = [1_700_000_000 + i for i in range(40)]
    listed = table(tmp_path / "data", {"when": seconds})
    given = {"task": "regression", "label_columns": ("when",), "test_data": str(listed), "epochs": 3}
    result = tuned(run, listed, tmp_path / "out", **given)
    assert result["last"]["mean_absolute_error"] < 12  # 10 by always telling the mean
    network, _ = load_recognizer(tmp_path / "out")
    assert network.recognition.offset == (1_700_000_019.5,)
    told = network.predict(torch.rand(4, 3, 1, SIDE, SIDE))
    assert told.dtype == torch.float64
    assert (told - 1_700_000_019.5).abs().max() < 60
    predict(Predict(run=tmp_path / "out", data=str(listed), out=tmp_path / "told.csv", device="cpu"))
    with (tmp_path / "told.csv").open() as file:
        values = [float(row["when"]) for row in csv.DictReader(file)]
    assert len(set(values)) > 1
    assert np.abs(np.array(values) - 1_700_000_019.5).max() < 60


@pytest.mark.parametrize("unit", [1e-30, 1e20, 1e38])
def test_numbers_of_any_size_are_scored_alike(tmp_path: Path, run: Path, unit: float) -> None:
    scores = []
    for name, factor in (("plain", 1.0), ("scaled", unit)):
        listed = table(tmp_path / name, {"w": [repr(i * factor) for i in range(30)]})
        given = {"task": "regression", "label_columns": ("w",), "test_data": str(listed), "epochs": 2}
        scores.append(tuned(run, listed, tmp_path / f"out-{name}", **given)["last"]["r2"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_every_number_and_label_is_told_apart(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"big": [1000 * i for i in range(30)], "little": [i / 100 for i in range(30)]}
    listed = table(tmp_path / "data", columns)
    words = f"finetune --run {run} --data {listed} --test-data {listed} --out {tmp_path}/out --epochs 2 --device cpu"
    cli.main([*words.split(), "--task", "regression", "--label-columns", "big", "little"])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    each = result["each"]
    assert each["big"]["standard_deviation"] == pytest.approx(np.std(columns["big"]))
    assert each["big"]["mean_absolute_error"] > 1000 * each["little"]["mean_absolute_error"]
    mean = (each["big"]["mean_absolute_error"] + each["little"]["mean_absolute_error"]) / 2
    assert result["last"]["mean_absolute_error"] == pytest.approx(mean, rel=1e-5)
    assert f"  little: R2 {each['little']['r2']:.3f}" in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Each number" in page
    assert str(listed) in page


def test_labels_are_scored_one_by_one() -> None:
    told = Recognition(task="multi", outputs=("sea", "sky", "owl"), pool="mean", training=SMALL)
    outputs = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.1], [0.1, 0.9, 0.2], [0.2, 0.4, 0.3]])
    truth = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    each = score_each(told, outputs, truth)
    assert each["sea"] == {"share": 50.0, "average_precision": 100.0, "right": 100.0}
    assert each["sky"] == {"share": 50.0, "average_precision": 100.0, "right": 75.0}
    assert each["owl"] == {"share": 0.0, "average_precision": None, "right": 100.0}


# Labels of tables


@pytest.mark.parametrize(
    "cells, classes",
    [
        ([3.0, None, 1.0, 3.0], ("1", "3")),  # whole numbers with gaps
        ([1, 0, 1, 0], ("0", "1")),
        (["b", None, "", "a"], ("a", "b")),
        ([0.5, float("nan"), 2.0, 0.5], ("2", "0.5")),
        (["1", "01", "001", "1"], ("001", "01", "1")),
    ],
)
def test_classes_of_a_parquet_table(tmp_path: Path, cells: list[Any], classes: tuple[str, ...]) -> None:
    source = open_source(str(table(tmp_path, {"label": cells}, "t.parquet")), 3)
    assert source.classes == classes
    known = [cell is not None and cell == cell and cell != "" for cell in cells]
    assert truth_of(source, "single", ("label",)).known.tolist() == known


@pytest.mark.parametrize("cells", [[b"a", b"b"], [["a"], ["b"]]])
def test_cells_that_are_no_class_are_refused(tmp_path: Path, cells: list[Any]) -> None:
    with pytest.raises(ValueError, match="in its column 'label', row 1; a class is text or a number"):
        open_source(str(table(tmp_path, {"label": cells}, "t.parquet")), 3)


def test_the_label_0_is_a_label(tmp_path: Path) -> None:
    source = open_source(str(table(tmp_path, {"label": [0, 1, 2, 0]}, "t.parquet")), 3)
    truth = truth_of(source, "multi", ("label",))
    assert truth.outputs == ("0", "1", "2")
    assert truth.values.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_the_order_of_equal_numbers_is_the_same_in_every_process(tmp_path: Path) -> None:
    listed = table(tmp_path, {"label": ["1", "01", "001", "0001"]})
    code = f"from unveil.sources import open_source; print(open_source({str(listed)!r}, 3).classes)"
    orders = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert orders == {f"{open_source(str(listed), 3).classes}\n"}  # the third process is this one


def test_what_looks_like_several_labels_is_said(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = table(tmp_path / "data", {"label": ["a|b", "c", ""] * 10})
    cli.main(f"finetune --run {run} --data {listed} --out {tmp_path}/out --epochs 1 --device cpu".split())
    out = capsys.readouterr().out
    assert "10 samples of the training data have no label and were left out." in out
    assert "If that separates several labels of one picture, use --task multi." in out


def test_a_column_given_twice_is_refused(tmp_path: Path, run: Path) -> None:
    listed = table(tmp_path / "data", {"w": list(range(20))})
    with pytest.raises(ValueError, match="--label-columns w w: a column comes twice"):
        tuned(run, listed, tmp_path / "out", task="regression", label_columns=("w", "w"))


# Telling


def test_pictures_with_labels_are_scored(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folders(tmp_path / "data")
    tuned(run, data, tmp_path / "out", test_data=str(data), epochs=4)
    evaluated = json.loads((tmp_path / "out" / "evaluation.json").read_text())["last"]
    made = predict(Predict(run=tmp_path / "out", data=str(data), out=tmp_path / "a.csv", device="cpu", batch_size=3))
    assert made["scores"] == pytest.approx(evaluated)
    assert made["scored"] == 20
    cli.main(f"predict --run {tmp_path}/out --data {data} --out {tmp_path}/b.csv --device cpu".split())
    assert f"Of 20 samples with a label: {evaluated['accuracy']:.2f} % right" in capsys.readouterr().out
    strange = folders(tmp_path / "strange", ("cat", "owl"))
    made = predict(Predict(run=tmp_path / "out", data=str(strange), out=tmp_path / "c.csv", device="cpu"))
    assert made["scores"] is None
    assert "has the class 'owl', which the training data lacks" in made["unscored"]
    flat = predict(Predict(run=tmp_path / "out", data=str(data / "cat"), out=tmp_path / "d.csv", device="cpu"))
    assert (flat["scores"], flat["unscored"]) == (None, None)


def test_numbers_and_labels_of_a_table_are_scored(tmp_path: Path, run: Path) -> None:
    numbers = table(tmp_path / "numbers", {"w": list(range(20))})
    tuned(run, numbers, tmp_path / "a", task="regression", label_columns=("w",), test_data=str(numbers))
    made = predict(Predict(run=tmp_path / "a", data=str(numbers), out=tmp_path / "a.csv", device="cpu"))
    assert made["scores"] == pytest.approx(
        json.loads((tmp_path / "a" / "evaluation.json").read_text())["last"], rel=1e-5
    )
    labels = table(tmp_path / "labels", {"label": ["sea|sky", "sea", "", "owl"] * 5})
    (labels.parent / "0.png").write_bytes(b"broken")
    tuned(run, labels, tmp_path / "b", task="multi", test_data=str(labels), epochs=4)
    made = predict(Predict(run=tmp_path / "b", data=str(labels), out=tmp_path / "b.csv", device="cpu"))
    assert made["scored"] == 19
    with (tmp_path / "b.csv").open() as file:
        rows = list(csv.DictReader(file))
    there = [int(name in set(["sea|sky", "sea", "", "owl"][int(row["path"][:-4]) % 4].split("|"))) for row in rows
             for name in ("owl", "sea", "sky")]  # fmt: skip
    told = [int(float(row[name]) > 0.5) for row in rows for name in ("owl", "sea", "sky")]
    right = 100 * np.mean(np.array(there) == np.array(told))
    assert made["scores"]["labels_right"] == pytest.approx(right)
    assert made["scores"] == pytest.approx(
        json.loads((tmp_path / "b" / "evaluation.json").read_text())["last"], rel=1e-5
    )
    other = labels.with_name("tags.csv")
    other.write_text(labels.read_text().replace("label", "tags"))
    made = predict(Predict(run=tmp_path / "b", data=str(other), out=tmp_path / "c.csv", device="cpu"))
    assert "it has no columns owl, sea, sky, and no column label" in made["unscored"]


# Going on from a fine-tuned network


def test_fine_tuning_goes_on_from_a_fine_tuned_network(tmp_path: Path, run: Path) -> None:
    data = folders(tmp_path / "data")
    tuned(run, data, tmp_path / "first", pool="class")
    first, _ = load_recognizer(tmp_path / "first")
    on = tuned(tmp_path / "first", data, tmp_path / "on", blr=1e-30)
    assert on["loaded"] == on["tensors"]
    second, _ = load_recognizer(tmp_path / "on")
    assert second.recognition.pool == "class"
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=1e-6)
    others = folders(tmp_path / "others", ("owl", "emu", "ape"))
    result = tuned(tmp_path / "first", others, tmp_path / "others-out")
    assert result["tensors"] - result["loaded"] == 2  # the head is of other classes
    assert "fine-tuned" in result["start"]


def test_a_fine_tuned_network_is_saved_with_a_card(tmp_path: Path, run: Path) -> None:
    tuned(run, folders(tmp_path / "data"), tmp_path / "out")
    model, about = load_any(tmp_path / "out")
    unveil.save_pretrained(tmp_path / "card", model, about, license="apache-2.0")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "cat, dog (single)" in card
    back = unveil.from_pretrained(tmp_path / "card")
    assert isinstance(back, Recognizer)
    x = torch.rand(3, 3, 1, SIDE, SIDE)
    assert torch.equal(back.predict(x), model.predict(x))  # type: ignore[union-attr]
    snippet = (
        card.split("```python\n")[1].split("```")[0].replace(repr(str(tmp_path / "card")), repr(str(tmp_path / "out")))
    )
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    assert scope["told"].shape == (4, 2)
    with pytest.raises(ValueError, match="is no name of one"):
        unveil.save_pretrained(tmp_path / "x", model, about, license="mit\n---\n<script>")


def test_a_damaged_fine_tuned_file_is_refused(tmp_path: Path, run: Path) -> None:
    tuned(run, folders(tmp_path / "data"), tmp_path / "out")
    file = tmp_path / "out" / WEIGHTS
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    broken = {**tensors, "head.weight": tensors["head.weight"] * float("nan")}
    safetensors.torch.save_file(broken, tmp_path / "nan.safetensors", metadata)
    for command in (
        lambda: predict(
            Predict(run=tmp_path / "nan.safetensors", data="digits:test", out=tmp_path / "x.csv", device="cpu")
        ),
        lambda: embed(
            Embed(run=tmp_path / "nan.safetensors", data="digits:test", out=tmp_path / "x.npz", device="cpu")
        ),
    ):
        with pytest.raises(ValueError, match=r"has values in 'head\.weight' that are no numbers"):
            command()
    safetensors.torch.save_file(tensors, tmp_path / "header.safetensors", {**metadata, "recognition": "{broken"})
    with pytest.raises(ValueError, match=r"header\.safetensors has a header that this version"):
        load_any(tmp_path / "header.safetensors")


# From Python


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ValueError, match="no argument 'mask_ration' of a recipe"):
        unveil.create_model("mae_vit_nano_patch4_16", mask_ration=0.9)
    with pytest.raises(ValueError, match="method='zzz'"):
        unveil.probe(run="x", data="digits", method="zzz")
    with pytest.raises(ValueError, match="precision='fp8'"):
        unveil.pretrain(data="digits", out="x", precision="fp8")
    model = unveil.create_model("mae_vit_nano_patch4_8")
    with pytest.raises(ValueError, match=r"A clip of torch.uint8 .* Divide 8-bit pixels by 255"):
        model.encode(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))
    x = torch.rand(2, 3, 1, 8, 8)
    assert torch.equal(model.encode(x.double()), model.encode(x))
    assert "labels_per_class: int | None = None" in str(unveil.probe.__signature__)  # type: ignore[attr-defined]


def test_a_pretraining_takes_the_size_of_what_it_starts_from(tmp_path: Path) -> None:
    data = folders(tmp_path / "data")
    pretrain(Pretrain(data=str(data), out=tmp_path / "a", size="Nano/4", image_size="8", epochs=1, batch_size=8))
    on = pretrain(
        Pretrain(data=str(data), out=tmp_path / "b", init=tmp_path / "a", image_size="8", epochs=1, batch_size=8)
    )
    assert on["loaded"] == on["tensors"]
    assert load_any(tmp_path / "b")[0].recipe.size == "Nano/4"


def test_a_probe_holds_out_files_and_not_rows(tmp_path: Path, run: Path) -> None:
    """A table that lists every file twice: the nearest neighbour of a held-out row must not be its own copy."""
    root = tmp_path / "data"
    paths = [f"{i}.png" for i in range(20)] + [str(root / f"{i}.png") for i in range(20)]
    table(root, {"label": ["a", "b"] * 20})
    labels = [str(label) for label in np.random.default_rng(0).integers(0, 2, 20)]
    listed = table(root, {"path": paths, "label": labels * 2})
    result = probe(Probe(run=run, data=str(listed), device="cpu", method="knn", k=(1,), baselines=False))
    assert result["train_samples"] + result["test_samples"] == 40
    assert result["test_samples"] % 2 == 0
    assert result["results"]["encoder"]["knn"] < 100


def test_a_batch_is_no_larger_than_the_data(tmp_path: Path, run: Path) -> None:
    """And the learning rate is that of the batch that there is."""
    data = folders(tmp_path / "data")
    tuned(run, data, tmp_path / "out", batch_size=1024)
    training = load_recognizer(tmp_path / "out")[0].recognition.training
    assert training.batch_size == 16
    assert training.lr == pytest.approx(training.base_lr * 16 / 256)


def test_a_run_goes_on_whatever_fields_are_newer(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folders(tmp_path / "data")
    with monkeypatch.context() as patch:
        interrupt(patch)
        tuned(run, data, tmp_path / "out", epochs=3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["recognition"]["training"]["erase"]  # 0 by default, as in SMALL
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert tuned(run, data, tmp_path / "out", epochs=3)["finished"]
