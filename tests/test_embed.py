"""`unveil embed`: the file read back by other programs, the same features for every batch size, and no half files."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small import build, small

from unveil import cli
from unveil.checkpoint import WEIGHTS, About, load_model, save_weights
from unveil.data import Samples, open_source
from unveil.tasks import embed as embed_module
from unveil.tasks.embed import Embed, embed

ABOUT = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
DIGITS: dict[str, Any] = {"size": "Nano/2", "channels": 1, "height": 8}


def save(run: Path, name: str = "diffmae", **arguments: Any) -> Path:
    model = build(small(name, **arguments))
    save_weights(run / WEIGHTS, model.recipe, model.state_dict(), ABOUT)
    return run


def photos(folder: Path, classes: int = 2, each: int = 3) -> Path:
    """Class folders of noise, of several sizes, and in the first one a file that is no picture."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(each):
            values = rng.integers(0, 255, (16 + i, 20, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / f"class{label}" / f"{i}.png")
    (folder / "class0" / "broken.png").write_text("text")
    return folder


def embedded(run: Path, data: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    return embed(Embed(run=run, data=str(data), out=out, device="cpu", **options))


def by_hand(run: Path, data: str, pool: str) -> np.ndarray:
    """The encoder over the samples one by one."""
    model, _ = load_model(run)
    clip, registers = model.recipe.clip, model.recipe.encoder.num_class_tokens
    samples = Samples(open_source(data, clip.channels, clip.frames, clip.height, clip.width), clip, 0, None)
    clips = [sample.clip for sample in (samples[0, i, i] for i in range(len(samples))) if sample.clip is not None]
    with torch.inference_mode():
        encoded = torch.cat([model.encode(one[None]) for one in clips])
    tokens = {"mean": encoded[:, registers:].mean(1), "class": encoded[:, :registers].mean(1)}
    return tokens.get(pool, encoded[:, registers:]).numpy()


def columns(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What either kind of file holds: path, label and features as arrays, and the metadata."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            values = dict(arrays)
        return {k: v for k, v in values.items() if k != "metadata"}, json.loads(values["metadata"].item())
    table = pq.read_table(path)
    return (
        {name: np.array(table.column(name).to_pylist()) for name in table.column_names},
        json.loads(table.schema.metadata[b"unveil"]),
    )


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
@pytest.mark.parametrize("pool", ["mean", "class", "patches"])
def test_the_file_holds_the_encoders_features_of_each_path(tmp_path: Path, suffix: str, pool: str) -> None:
    run, data = save(tmp_path / "run"), photos(tmp_path / "photos")
    result = embedded(run, data, tmp_path / f"new/out{suffix}", pool=pool)
    values, about = columns(tmp_path / f"new/out{suffix}")
    paths = [f"class{label}/{i}.png" for label in range(2) for i in range(3)]
    assert values["path"].tolist() == paths
    assert values["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert values["label"].dtype == np.int64
    expected = by_hand(run, str(data), pool)
    assert expected.shape == ((6, 16, 32) if pool == "patches" else (6, 32))
    np.testing.assert_allclose(values["features"], expected, rtol=0, atol=1e-5)
    assert values["features"].std() > 0.1
    assert np.abs(np.diff(values["features"], axis=0)).max() > 1e-3  # not one picture six times
    assert about == {
        "model": str(run / WEIGHTS),
        "recipe": "diffmae",
        "size": "Nano/4",
        "data": str(data),
        "pool": pool,
        "time": 0.0,
        "seed": 0,
        "channels": 3,
        "frames": 1,
        "image_size": [16, 16],
        "grid": [1, 4, 4],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "classes": ["class0", "class1"],
    }
    assert (result["samples"], result["shape"]) == (6, list(expected.shape[1:]))
    assert [problem["where"] for problem in result["problems"]] == ["class0/broken.png"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"out{suffix}"]


@pytest.mark.parametrize("pool", ["mean", "patches"])
def test_pyarrow_reads_arrays_of_a_fixed_size(tmp_path: Path, pool: str) -> None:
    """As a program would, without a list for each value."""
    run = save(tmp_path / "run", **DIGITS)
    embedded(run, "digits:test", tmp_path / "out.parquet", pool=pool)
    table = pq.read_table(tmp_path / "out.parquet")
    column = table.column("features").combine_chunks()
    shape = (16, 32) if pool == "patches" else (32,)
    for length in shape:
        assert column.type.list_size == length
        column = column.flatten()
    flat = column.to_numpy()
    assert flat.dtype == np.float32
    np.testing.assert_allclose(flat.reshape(-1, *shape), by_hand(run, "digits:test", pool), rtol=0, atol=1e-5)


def test_pandas_reads_it(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    run = save(tmp_path / "run", **DIGITS)
    for pool in ("mean", "patches"):
        embedded(run, "digits:test", tmp_path / f"{pool}.parquet", pool=pool)
        frame = pandas.read_parquet(tmp_path / f"{pool}.parquet")
        features = np.array([np.stack(list(row)) for row in frame["features"]])
        np.testing.assert_allclose(features, by_hand(run, "digits:test", pool), rtol=0, atol=1e-5)
        assert frame["path"][1] == "row 1"


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
@pytest.mark.parametrize("name, time", [("diffmae", 0.0), ("umd", 51.0)])
def test_features_do_not_depend_on_the_batch_nor_on_chance(tmp_path: Path, name: str, time: float, suffix: str) -> None:
    run = save(tmp_path / "run", name, **DIGITS)
    made = []
    for i, batch_size in enumerate((256, 256, 7)):
        torch.manual_seed(i)
        state = torch.get_rng_state()
        embedded(run, "digits:test", tmp_path / f"{i}{suffix}", batch_size=batch_size, time=time, pool="mean")
        assert torch.equal(torch.get_rng_state(), state)
        made.append(columns(tmp_path / f"{i}{suffix}")[0]["features"])
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_allclose(made[2], made[0], rtol=0, atol=1e-5)
    embedded(run, "digits:test", tmp_path / f"seed{suffix}", seed=1, time=time, pool="mean")
    other = columns(tmp_path / f"seed{suffix}")[0]["features"]
    assert (np.abs(other - made[0]).max() > 1e-3) == bool(time)  # the seed draws noise, and nothing else


def test_the_usual_pool_is_the_default(tmp_path: Path) -> None:
    for name, pool in (("diffmae", "mean"), ("umd", "class")):
        run = save(tmp_path / name, name, **DIGITS)
        assert embedded(run, "digits:test", tmp_path / f"{name}.npz")["pool"] == pool
        values, _ = columns(tmp_path / f"{name}.npz")
        np.testing.assert_allclose(values["features"], by_hand(run, "digits:test", pool), rtol=0, atol=1e-5)


def test_parquet_is_written_in_row_groups_as_features_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save(tmp_path / "run", **DIGITS)
    embedded(run, "digits:test", tmp_path / "one.parquet", batch_size=50)
    monkeypatch.setattr(embed_module, "ROW_GROUP", 100 * 32 * 4)
    embedded(run, "digits:test", tmp_path / "several.parquet", batch_size=50)
    one, several = (pq.ParquetFile(tmp_path / f"{name}.parquet") for name in ("one", "several"))
    assert one.num_row_groups == 1
    assert [several.metadata.row_group(i).num_rows for i in range(several.num_row_groups)] == [100, 100, 100, 60]
    assert one.read().equals(several.read())


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_data_without_labels_gives_none(tmp_path: Path, suffix: str) -> None:
    data = photos(tmp_path / "photos", classes=1) / "class0"
    run = save(tmp_path / "run")
    embedded(run, data, tmp_path / f"out{suffix}")
    values, about = columns(tmp_path / f"out{suffix}")
    assert values.keys() == {"path", "features"}
    assert about["classes"] is None


def test_a_row_without_a_label_has_minus_one(tmp_path: Path) -> None:
    import pyarrow as pa

    folder = photos(tmp_path / "photos", classes=1) / "class0"
    images = [(folder / f"{i}.png").read_bytes() for i in range(3)]
    pq.write_table(pa.table({"image": images, "label": [1, None, 0]}), tmp_path / "in.parquet")
    embedded(save(tmp_path / "run"), tmp_path / "in.parquet", tmp_path / "out.parquet")
    values, about = columns(tmp_path / "out.parquet")
    assert values["label"].tolist() == [1, -1, 0]
    assert values["path"].tolist() == ["row 0", "row 1", "row 2"]
    assert about["classes"] == ["0", "1"]


def test_a_path_that_is_no_utf8_is_kept_readable(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", classes=1) / "class0"
    (data / "0.png").rename(data / "caf\udce9.png")  # Latin-1 on disk
    for suffix in (".parquet", ".npz"):
        embedded(save(tmp_path / "run"), data, tmp_path / f"out{suffix}")
        assert "caf\\xe9.png" in columns(tmp_path / f"out{suffix}")[0]["path"].tolist()


def test_clips_have_a_patch_for_each_tubelet(tmp_path: Path) -> None:
    run = save(tmp_path / "run", channels=1, frames=4, tubelet_size=2)
    result = embedded(run, "moving-digits:test", tmp_path / "out.npz", pool="patches")
    assert result["shape"] == [32, 32]
    assert columns(tmp_path / "out.npz")[0]["features"].shape == (360, 32, 32)


def test_the_command_tells_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = save(tmp_path / "run"), photos(tmp_path / "photos")
    for i in range(25):
        (data / "class1" / f"note{i}.txt").write_text("text")
    command = ["embed", "--run", str(run), "--data", str(data), "--device", "cpu", "--out"]
    cli.main([*command, str(tmp_path / "a.npz")])
    out = capsys.readouterr().out
    assert "Files that could not be used: 26.\n" in out
    assert "Skipped class1/note0.txt: not a picture (.txt).\n" in out
    assert out.count("Skipped ") == 20
    assert "And 6 more, which --json lists.\n" in out
    assert "Features: the mean of the patches; 32 values for a sample.\n" in out
    assert out.endswith(f"Wrote {tmp_path / 'a.npz'}: 6 samples, labels of 2 classes.\n")
    cli.main([*command, str(tmp_path / "b.parquet"), "--json", "--pool", "patches"])
    result = json.loads(capsys.readouterr().out)
    assert len(result["problems"]) == 26
    assert result["shape"] == [16, 32]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--out {tmp}/out.csv", r"out.csv is of no known type. Give a name that ends in .parquet or .npz"),
        ("--out {tmp}/out", "is of no known type"),
        ("--out {tmp}/there.npz", "exists already and is not overwritten"),
        ("--out {tmp}/afile/out.npz", "afile"),
        ("--out {tmp}/out.npz --data {tmp}/broken", "None of the 2 samples .*0.png: not a picture"),
        ("--out {tmp}/out.parquet --data {tmp}/broken", "None of the 2 samples"),
        ("--out {tmp}/out.npz --data {tmp}/nowhere", "There is no data"),
        ("--out {tmp}/out.npz --time 51", "encoder of this diffmae sees clean clips only"),
        ("--out {tmp}/out.npz --batch-size 0", "batch_size=0"),
        ("--out {tmp}/out.npz --workers 9999", "9999 workers"),
        ("--out {tmp}/out.npz --device gpu", "--device gpu cannot be used"),
        ("--out {tmp}/out.npz --run {tmp}/nowhere", "does not exist"),
        ("--out {tmp}/out.npz --run {tmp}/dit --pool class", "dit has no class token. Use --pool mean"),
        ("--out {tmp}/out.npz --run {tmp}/latents", "works on latents of 4 channels"),
    ],
)
def test_embed_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, sentence: str) -> None:
    save(tmp_path / "run", **DIGITS)
    save(tmp_path / "dit", "dit", **DIGITS)
    save(tmp_path / "latents", "umd", size="Nano/2", channels=4, height=8, latents=True)
    (tmp_path / "broken").mkdir()
    for i in range(2):
        (tmp_path / "broken" / f"{i}.png").write_text("text")
    (tmp_path / "there.npz").write_text("kept")
    (tmp_path / "afile").write_text("kept")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = {"--run": "{tmp}/run", "--data": "digits:test", "--device": "cpu"}
    pairs = words.split()
    given.update(zip(pairs[::2], pairs[1::2], strict=True))
    with pytest.raises(SystemExit) as stop:
        cli.main(["embed", *(word.format(tmp=tmp_path) for pair in given.items() for word in pair)])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert len(captured.err.splitlines()) == 1
    assert re.search(sentence, captured.err), captured.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_crash_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, error: type[BaseException]
) -> None:
    """And an error of the network is told as what it is, not as one of the disk."""
    run = save(tmp_path / "run", **DIGITS)

    def crash(done: int, total: int) -> None:
        assert list((tmp_path / "new").iterdir())  # something is being written
        raise error

    with pytest.raises(error):
        embed(Embed(run=run, data="digits:test", out=tmp_path / f"new/out{suffix}", batch_size=50, device="cpu"), crash)
    assert list((tmp_path / "new").iterdir()) == []
