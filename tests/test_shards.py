"""Tar shards as data: prepared and foreign ones, whole, cut and away for a while; and what others read of them."""

import errno
import io
import json
import os
import pickle
import re
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unveil import api
from unveil.config import Clip, Training
from unveil.data import BadPicture, Samples, batches, open_source
from unveil.decoding import Away
from unveil.shards import INDEX, Shards
from unveil.sources import Folder, files_of
from unveil.tasks.doctor import Doctor, doctor
from unveil.tasks.prepare import Prepare, prepare
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.segment import Segment, segment

RNG = np.random.default_rng(0)
DOCS = Path(__file__).parent.parent / "docs" / "data.md"
WORDS: dict[str, Any] = {"size": "Nano/4", "image_size": "8", "batch_size": 10, "device": "cpu"}


def png(height: int = 8, width: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))
    return path


def pictures(path: Path, number: int = 40) -> Path:
    for i in range(number):
        (path / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (path / "ab"[i % 2] / f"{i:04}.png").write_bytes(png())
    return path


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Forty pictures in four shards."""
    data = pictures(tmp_path / "data")
    prepare(Prepare(data=str(data), out=tmp_path / "prepared", shard_samples=10, format="png", workers=1))
    return tmp_path / "prepared"


def unreadable(source: Any) -> list[str]:
    """Reasons of the samples that cannot be read."""
    reasons = []
    for i in range(len(source)):
        try:
            source.read(i)
        except BadPicture as bad:
            reasons.append(str(bad))
    return reasons


def shards(path: Path | str) -> Shards:
    source = open_source(str(path), 3)
    assert isinstance(source, Shards)
    return source


# Foreign shards


def test_shards_of_others_are_read_with_their_labels(tmp_path: Path) -> None:
    held = [png() for _ in range(5)]
    tar(
        tmp_path / "set" / "train-000.tar",
        [
            ("a/001.png", held[0]),
            ("a/001.cls", b"2\n"),
            ("a/001.json", b'{"text": "a"}'),
            ("a/002.cls", b"0"),
            ("a/002.png", held[1]),
            ("a/003.PNG", held[2]),
        ],
    )
    tar(tmp_path / "set" / "train-001.tar", [("./x.seg.png", b"mask"), ("./x.png", held[3]), ("./x.cls", b"-1")])
    source = shards(tmp_path / "set")
    assert len(source) == 4
    assert source.classes == ("0", "1", "2")
    assert [source.label(i) for i in range(4)] == [2, 0, None, None]
    expected = ["train-000.tar/a/001", "train-000.tar/a/002", "train-000.tar/a/003", "train-001.tar/./x"]
    assert [source.where(i) for i in range(4)] == expected
    for i in range(4):
        assert source.encoded(i) == held[i]
    for name, number in (("train-*.tar", 4), ("train-000.tar", 3)):
        assert len(shards(tmp_path / "set" / name)) == number
    assert source.skipped == []


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tmp_path: Path, format: int) -> None:
    name = "/".join(["folder" * 8] * 3) + "/ü.png"
    held = png()
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as file:
        about = tarfile.TarInfo(name)
        about.size = len(held)
        file.addfile(about, io.BytesIO(held))
    source = shards(tmp_path / "a.tar")
    assert source.where(0) == f"a.tar/{name.removesuffix('.png')}"
    assert source.encoded(0) == held
    assert source.classes is None


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.txt", b"text")], "holds no picture. A shard has members such as"),
        ([], "holds no picture"),
        ([("a.png", png()), ("a.jpg", png())], "has 2 pictures of the key 'a'; keep one"),
        ([("a.png", png()), ("a.cls", b"cat")], r"a\.cls holds b'cat', and a class is a whole number"),
        ([("a.png", png()), ("a.cls", b"5000000")], r"a class 5000000, and classes are numbered from 0"),
    ],
)
def test_shards_of_others_refuse(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        open_source(str(path), 3)


def test_what_is_no_tar_refuses(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [("a.png", png())], "w:gz")
    (tmp_path / "b.tar").write_bytes(b"no archive at all")
    for name in ("a.tar", "b.tar"):
        with pytest.raises(ValueError, match=r"cannot be read as a tar archive .*compressed must be unpacked"):
            open_source(str(tmp_path / name), 3)


def test_train_and_test_shards_refuse_to_be_mixed(tmp_path: Path) -> None:
    for name in ("train-000", "test-000"):
        tar(tmp_path / f"{name}.tar", [("a.png", png())])
    with pytest.raises(ValueError, match=r"2 different sets of tar files \(test, train\)"):
        open_source(str(tmp_path), 3)
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ValueError, match=r"which is not a \.parquet file; a pattern matches these, or .tar files"):
        open_source(str(tmp_path / "t*"), 3)


def test_what_is_no_member_of_a_sample_is_left_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
            about = tarfile.TarInfo(f"{kind!r}.png")
            about.type = kind
            file.addfile(about)
        for name in ("no_dot", ".hidden"):
            file.addfile(tarfile.TarInfo(name))
        about = tarfile.TarInfo("x.png")
        about.size = 0
        file.addfile(about)
    source = shards(tmp_path / "a.tar")
    assert [source.where(i) for i in range(len(source))] == ["a.tar/x"]
    assert unreadable(source) == ["a.tar/x: empty file (0 bytes)"]


@pytest.mark.parametrize("left", [0.2, 0.5, 0.52, 0.9])
def test_a_cut_shard_of_others_gives_what_lies_before_the_cut(tmp_path: Path, left: float) -> None:
    members = [(f"{i:02}.png", png(40, 40)) for i in range(10)]
    whole = tar(tmp_path / "a.tar", members).read_bytes()
    end = int(left * 10 * (512 + -(-len(members[0][1]) // 512) * 512))
    (tmp_path / "a.tar").write_bytes(whole[:end])
    source = shards(tmp_path / "a.tar")
    assert 2 <= len(source) <= 10
    (bad,) = source.skipped
    assert bad.where == "a.tar"
    assert re.match(rf"cut or damaged after {len(source)} samples; those behind are lost", bad.reason)
    reasons = unreadable(source)
    assert len(reasons) <= 1  # the one that the cut goes through
    assert all("its shard is cut" in reason for reason in reasons)


def test_a_damaged_header_is_no_silent_end(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [(f"{i}.png", png()) for i in range(5)])
    held = bytearray(path.read_bytes())
    third = held.index(b"2.png")
    held[third : third + 512] = b"\7" * 512
    path.write_bytes(held)
    source = shards(path)
    assert len(source) == 2
    assert [bad.reason[:32] for bad in source.skipped] == ["cut or damaged after 2 samples; "]


# Prepared shards


def test_prepared_shards_are_told_from_foreign_ones(prepared: Path) -> None:
    source = shards(prepared)
    assert source.classes == ("a", "b")
    assert source.starts.tolist() == [0, 10, 20, 30, 40]
    foreign = shards(prepared / "shard-*.tar")
    assert foreign.classes == ("0", "1")
    for i in range(40):
        assert foreign.encoded(i) == source.encoded(i)
        assert foreign.label(i) == source.label(i)
        assert foreign.where(i) == source.where(i)


def test_an_open_source_takes_twenty_bytes_for_a_sample(prepared: Path) -> None:
    assert INDEX.itemsize == 20
    source = shards(prepared)
    source.read(0)
    assert 40 * 20 <= len(pickle.dumps(source)) < 40 * 20 + 3000


@pytest.mark.parametrize("end", [0, 1, 1000, 5000, -12_000, -1])
def test_a_shard_that_is_cut_loses_the_samples_behind(prepared: Path, end: int) -> None:
    path = prepared / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:end])
    index = np.load(path.with_suffix(".npy"))
    lost = int((index["offset"] + index["size"] > path.stat().st_size).sum())
    assert lost == {0: 10, 1: 10, 1000: 9, -1: 0}.get(end, lost)
    reasons = unreadable(shards(prepared))
    assert len(reasons) == lost
    pattern = r"shard-000002\.tar/0000000\d\d: its shard is cut: it ends \d+ bytes too early for it"
    assert all(re.fullmatch(pattern, reason) for reason in reasons)


def test_training_on_a_cut_shard_goes_on_and_counts(prepared: Path, tmp_path: Path) -> None:
    path = prepared / "shard-000001.tar"
    index = np.load(path.with_suffix(".npy"))
    path.write_bytes(path.read_bytes()[: int(index["offset"][4]) + 10])
    result = pretrain(Pretrain(data=str(prepared), out=tmp_path / "run", epochs=2, **WORDS))
    assert result["finished"]
    assert (result["images_seen"], result["skipped"]) == (2 * 34, 6)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "shard-000001.tar").unlink(), "lacks 1 of its 4 shards, the first is 'shard-000001.tar'"),
        (lambda p: (p / "shard-000001.npy").unlink(), r"shard-000001\.npy cannot be read"),
        (lambda p: (p / "shard-000001.npy").write_bytes(b"x"), r"shard-000001\.npy cannot be read"),
        (lambda p: np.save(p / "shard-000001.npy", np.zeros(10)), "no index of the 10 samples"),
        (lambda p: np.save(p / "shard-000001.npy", np.zeros(9, INDEX)), "no index of the 10 samples"),
        (lambda p: (p / "manifest.json").write_text('{"format": "unveil-shards-1"}'), "is damaged"),
        (
            lambda p: (p / "manifest.json").write_text(
                (p / "manifest.json").read_text().replace('"samples": 10', '"samples": -10')
            ),
            "is damaged",
        ),
        (
            lambda p: (p / "manifest.json").write_text(
                (p / "manifest.json").read_text().replace('"samples": 10', '"samples": 10000000000000000')
            ),
            "samples, whose index of 20 bytes each does not fit into the memory",
        ),
        (lambda p: (p / "manifest.json").write_text('{"format": "unveil-shards-2"}'), "this version reads"),
        (lambda p: (p / "manifest.json").rename(p / "prepare.json"), "is not finished"),
        (
            lambda p: (p / "manifest.json").write_text(
                (p / "manifest.json").read_text().replace("shard-000001.tar", "../data.tar")
            ),
            r"lacks 1 of its 4 shards, the first is '\.\./data\.tar'",
        ),
    ],
)
def test_a_prepared_folder_that_is_not_whole_refuses(
    prepared: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(prepared)
    with pytest.raises(ValueError, match=message):
        open_source(str(prepared), 3)


def test_opening_holds_the_index_once(prepared: Path) -> None:
    """Of a billion samples it is 20 GB; what is read of each shard is gone before the next one."""
    number = 200_000
    manifest = json.loads((prepared / "manifest.json").read_text())
    for shard in manifest["shards"]:
        shard["samples"] = number
        np.save((prepared / shard["name"]).with_suffix(".npy"), np.zeros(number, INDEX))
    (prepared / "manifest.json").write_text(json.dumps({**manifest, "samples": 4 * number}))
    tracemalloc.start()
    try:
        source = shards(prepared)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 4 * number
    whole = 4 * number * INDEX.itemsize
    assert whole <= held < 1.05 * whole
    assert most < 1.8 * whole  # with one shard of the four being read


def test_a_shard_in_the_place_of_another_refuses(prepared: Path) -> None:
    """As after a careless copy: pictures of one under the labels of the other."""
    first, second = (prepared / f"shard-00000{number}.tar" for number in range(2))
    second.write_bytes(first.read_bytes() + first.read_bytes())
    with pytest.raises(
        ValueError, match=r"shard-000001\.tar is longer than manifest\.json says, so it is another file"
    ):
        open_source(str(prepared), 3)


def test_a_class_without_a_name_refuses(prepared: Path) -> None:
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "classes": manifest["classes"][:1]}))
    with pytest.raises(ValueError, match=r"has a class 1, and manifest\.json names 1"):
        open_source(str(prepared), 3)


def test_a_manifest_of_another_program_is_none(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", 2)
    for text in ('{"name": "an extension"}', "{", "[1]"):
        (data / "manifest.json").write_text(text)
        assert isinstance(open_source(str(data), 3), Folder)


def test_a_sample_has_one_name_however_its_folder_is_spelt(prepared: Path) -> None:
    spelt = prepared.parent / "data" / ".." / "prepared"
    assert files_of(shards(prepared)) == files_of(shards(spelt))
    assert files_of(shards(prepared))[11].endswith("/prepared/shard-000001.tar/000000011")


# Files that are open, and disks that are away


def test_few_files_are_open_at_a_time(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unveil.shards.MAX_OPEN", 2)
    source = shards(prepared)
    before = len(os.listdir("/proc/self/fd"))
    for i in (0, 10, 20, 30, 5, 15):
        source.read(i)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_copy_in_another_process_opens_its_own_files(prepared: Path) -> None:
    source = shards(prepared)
    expected = [source.read(i).values for i in range(40)]
    copy = pickle.loads(pickle.dumps(source))
    assert all(torch.equal(copy.read(i).values, expected[i]) for i in range(40))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_that_read_at_once_do_not_disturb_each_other(prepared: Path, num_workers: int) -> None:
    clip = Clip(channels=3, frames=1, height=8, width=8, patch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = shards(prepared)
    source.read(0)  # so that the workers inherit an open file
    loader = batches(Samples(source, clip, 0, None), 5, 0, 0, True, False, num_workers)
    seen: dict[int, Tensor] = {}
    for batch in loader:
        assert not batch.problems
        seen |= dict(zip(batch.indices.tolist(), batch.clips(), strict=True))
    for i in range(40):
        assert torch.equal(seen[i][:, 0] * 255, source.read(i).values[0].float())


class Disk:
    """Reads that fail a number of times, and what was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int, number: int) -> None:
        self.left, self.number = failures, number
        self.waits: list[float] = []
        self.files: list[int] = []
        real = os.pread

        def pread(file: int, size: int, offset: int) -> bytes:
            self.files.append(file)
            if self.left:
                self.left -= 1
                raise OSError(self.number, os.strerror(self.number))
            return real(file, size, offset)

        monkeypatch.setattr(os, "pread", pread)
        monkeypatch.setattr("time.sleep", self.waits.append)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN])
def test_a_disk_that_comes_back_is_waited_for(prepared: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    source = shards(prepared)
    expected = source.read(3).values
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    disk = Disk(monkeypatch, 3, number)
    assert torch.equal(source.read(3).values, expected)
    assert disk.waits == [0.1, 0.4, 1.0]
    assert len(opened) == 3  # what was open before may never come back


def test_a_disk_that_stays_away_is_waited_for_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shards(prepared)
    disk = Disk(monkeypatch, 7, errno.EIO)
    with pytest.raises(BadPicture, match=r"000000003: its shard cannot be read \(Input/output error\)"):
        source.read(3)
    assert disk.waits == [0.1, 0.4, 1.0, 2.0]
    for _ in range(2):  # else each of a million samples would take seconds
        with pytest.raises(BadPicture):
            source.read(4)
    assert len(disk.waits) == 4
    source.read(5)
    disk.left = 1
    source.read(6)  # it was back, so it is waited for again
    assert len(disk.waits) == 5


def test_what_will_not_come_back_is_not_waited_for(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shards(prepared)
    disk = Disk(monkeypatch, 1, errno.EACCES)
    with pytest.raises(BadPicture, match="Permission denied"):
        source.read(3)
    (prepared / "shard-000002.tar").unlink()
    with pytest.raises(BadPicture, match="No such file") as caught:
        source.read(25)
    assert not isinstance(caught.value, Away)
    assert disk.waits == []


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("emptied", [False, True])
def test_a_folder_that_is_away_for_a_while_is_waited_for(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, kind: str, emptied: bool
) -> None:
    """Unmounted, when nothing or an empty folder is there."""
    root = prepared if kind == "shards" else prepared.parent / "data"
    source, away = open_source(str(root), 3), prepared.parent / "away"
    expected = open_source(str(root), 3).read(3).values
    waits: list[float] = []

    def hide() -> None:
        root.rename(away)
        if emptied:
            root.mkdir()

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            root.rmdir() if emptied else None
            away.rename(root)

    monkeypatch.setattr("time.sleep", sleep)
    hide()
    assert torch.equal(source.read(3).values, expected)
    assert waits == [0.1, 0.4]
    hide()
    with pytest.raises(Away):
        open_away(source, kind).read(13)
    assert len(waits) == 6


def open_away(source: Any, kind: str) -> Any:
    """Shards that are open can be read still; a new process would have to open them."""
    return pickle.loads(pickle.dumps(source)) if kind == "shards" else source


# Training and the other commands


def test_a_resumed_run_reads_shards_in_the_order_of_an_uninterrupted_one(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unveil.data.WINDOW", 20)
    clip = Clip(channels=3, frames=1, height=8, width=8, patch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    training = Training(epochs=1, batch_size=4, base_lr=1e-3, warmup_epochs=0, crop_scale=0.5, flip=True)

    def seen(first_batch: int, num_workers: int) -> list[tuple[list[int], list[int], Tensor]]:
        loader = batches(Samples(shards(prepared), clip, 0, training), 4, 1, 7, True, True, num_workers)
        loader.batch_sampler.first_batch = first_batch  # type: ignore[union-attr]
        return [(batch.indices.tolist(), batch.places.tolist(), batch.clips()) for batch in loader]

    whole = seen(0, 0)
    assert [place for _, places, _ in whole for place in places] == list(range(40))
    assert sorted({index // 10 for indices, _, _ in whole[:5] for index in indices}) != [0, 1, 2, 3]
    for first_batch, num_workers in ((7, 0), (3, 2)):
        for (indices, places, clips), expected in zip(seen(first_batch, num_workers), whole[first_batch:], strict=True):
            assert (indices, places) == expected[:2]
            assert torch.equal(clips, expected[2])


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A model that was trained on shards."""
    assert api.pretrain(data=prepared, out=tmp_path / "run", epochs=1, **WORDS)["finished"]
    return tmp_path / "run"


def test_shards_are_probed_and_embedded(prepared: Path, run: Path, tmp_path: Path) -> None:
    assert api.probe(run=run, data=str(prepared), baselines=False)["num_classes"] == 2
    assert api.embed(run=run, data=str(prepared / "*.tar"), out=tmp_path / "features.npz")["samples"] == 40
    paths = np.load(tmp_path / "features.npz")["path"].tolist()
    assert paths[:2] == ["shard-000000.tar/000000000", "shard-000000.tar/000000001"]


def test_shards_are_learned_from(prepared: Path, run: Path, tmp_path: Path) -> None:
    tuned = api.finetune(run=run, data=str(prepared), out=tmp_path / "tuned", epochs=1, batch_size=8)
    assert (tuned["train_samples"], tuned["test_samples"]) == (32, 8)


def test_doctor_knows_the_arrays_of_shards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(3):
        np.save(tmp_path / "data" / f"{i}.npy", RNG.random((8, 8, 5), dtype=np.float32))
    prepare(Prepare(data=str(tmp_path / "data"), out=tmp_path / "prepared", workers=1))
    found = doctor(Doctor(data=str(tmp_path / "prepared"), channels=5))
    assert (found["problems"], found["formats"]) == ([], {"NPY": 3})


def test_segment_refuses_shards(prepared: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    options = Segment(run=run, data=str(prepared), labels=tmp_path / "maps", out=tmp_path / "segmented")
    with pytest.raises(ValueError, match="holds parquet files or tar shards; label maps are found by the paths"):
        segment(options)


# What others read of them


def documented(language: str, word: str) -> str:
    """The block of the documentation that has a word in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    (found,) = [block for block in blocks if word in block]
    return found


def run_documented(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    pictures(tmp_path / "photos", 12)
    prepare(Prepare(data=str(tmp_path / "photos"), out=tmp_path / "prepared", workers=1))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(documented("python", word), names)
    return names


def assert_same_samples(read: Sequence[tuple[Image.Image, int, dict[str, str]]], tmp_path: Path) -> None:
    source = shards(tmp_path / "prepared")
    assert len(read) == len(source) == 12
    for i, (picture, label, about) in enumerate(read):
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert torch.equal(values, source.read(i).values[0])
        assert label == source.label(i)
        assert about == {"path": about["path"], "label": "ab"[label]}
        assert (tmp_path / "photos" / about["path"]).exists()


def test_webdataset_reads_what_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    names = run_documented("webdataset.WebDataset", tmp_path, monkeypatch)
    assert_same_samples(list(names["samples"]), tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hugging_face_datasets_reads_what_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    names = run_documented("load_dataset", tmp_path, monkeypatch)
    assert_same_samples([(row["jpg"], row["cls"], row["json"]) for row in names["rows"]], tmp_path)


def test_the_documented_layout_is_the_layout(prepared: Path) -> None:
    """The members of a sample, in their order, and the fields of the manifest."""
    with tarfile.open(prepared / "shard-000000.tar") as file:
        assert file.getnames()[:3] == ["000000000.png", "000000000.cls", "000000000.json"]
    text = DOCS.read_text(encoding="utf-8")
    for field in json.loads((prepared / "manifest.json").read_text()):
        assert f"`{field}`" in text, field
    for name in ("manifest.json", "problems.jsonl", "shard-000000.tar", "shard-000000.npy"):
        assert (prepared / name).exists()
        assert name in text
