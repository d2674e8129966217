"""`unveil segment`: coloured squares that a linear head finds, scores counted by hand, and maps that do not fit."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import build, generator, small
from torch.testing import assert_close

from unveil import cli, draws, probing
from unveil.checkpoint import WEIGHTS, About, load_model, save_weights
from unveil.data import Samples, open_source
from unveil.metrics import confusion, intersection_over_union
from unveil.probing import IGNORE, DenseProbe
from unveil.tasks import segment as segment_module
from unveil.tasks.segment import Segment, palette, read_label_map, segment
from unveil.transforms import fit

ABOUT = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
COLOURS = np.array([[90, 90, 90], [220, 40, 40], [40, 60, 220]], dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 x 16 pixels in patches of 4 that has learnt nothing."""
    return save(tmp_path_factory.mktemp("runs") / "run")


def save(run: Path, name: str = "diffmae", **arguments: Any) -> Path:
    model = build(small(name, **arguments))
    save_weights(run / WEIGHTS, model.recipe, model.state_dict(), ABOUT)
    return run


def squares(folder: Path, n: int = 20, seed: int = 0, height: int = 32, width: int = 40) -> tuple[Path, Path]:
    """Pictures with a red and a blue square on gray, class 1 and 2 on 0, in two sub-folders; and their label maps."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        values = np.zeros((height, width), dtype=np.uint8)
        for label in (1, 2):
            top, left = rng.integers(0, height - 12), rng.integers(0, width - 12)
            values[top : top + 12, left : left + 12] = label
        picture = COLOURS[values] + rng.integers(0, 30, (height, width, 3)).astype(np.uint8)
        for kind, array, suffix in (("pictures", picture, "jpg" if i % 2 else "png"), ("maps", values, "png")):
            path = folder / kind / f"part{i % 3}" / f"{i:02d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return folder / "pictures", folder / "maps"


def segmented(run: Path, folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"data": str(folder / "pictures"), "labels": folder / "maps", "device": "cpu", **options}
    return segment(Segment(run=run, out=out, **given))


# Scores


def test_iou_and_accuracy_equal_a_count_by_hand() -> None:
    """Class 2 is named but never true, class 3 is neither; 255 is not counted whatever is said there."""
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 255]], dtype=torch.uint8)
    named = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 1]], dtype=torch.uint8)
    counts = confusion(named, truth, 4, IGNORE)
    assert counts.tolist() == [[2, 1, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = intersection_over_union(counts)
    assert_close(iou[:2], torch.tensor([2 / 5, 2 / 4], dtype=torch.float64))
    assert iou[2:].isnan().all()
    assert segment_module._scores(named, truth, 4) == {
        "miou": pytest.approx(45.0),
        "pixel_accuracy": pytest.approx(100 * 4 / 7),
        "iou": [pytest.approx(40.0), pytest.approx(50.0), None, None],
    }


def test_a_map_is_brought_to_size_as_its_picture_is() -> None:
    """The same edges, no new values, and the centre of a wide one."""
    values = torch.zeros(1, 1, 24, 60, dtype=torch.uint8)
    values[..., 10:, 26:] = 200
    values[..., :6, :22] = 60
    small_map, picture = fit(values, 12, 12, nearest=True), fit(values, 12, 12)
    expected = torch.zeros(12, 12, dtype=torch.uint8)
    expected[5:, 4:] = 200  # half the size, of which columns 9 to 20 are the centre
    expected[:3, :2] = 60
    assert torch.equal(small_map[0, 0], expected)
    assert ((picture >= 100) == (small_map == 200)).all()
    assert torch.equal(fit(values, 24, 60, nearest=True), values)


# The head


def test_the_head_is_trained_on_upsampled_logits_of_known_pixels() -> None:
    """Against the same steps written out, with pictures whose pixels are all unknown among them."""
    g = generator()
    tokens, truth = torch.randn(5, 6, 4, generator=g), torch.randint(3, (5, 8, 12), generator=g).to(torch.uint8)
    truth[:, :3] = 255
    truth[4] = 255
    ours = DenseProbe(4, 3, (2, 3), (8, 12), batch_size=2, seed=3)
    head = probing.linear_head(4, 3, 3)
    assert ours.fit(tokens, truth, epochs=4) == 12
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for epoch in range(4):
        order = torch.randperm(5, generator=draws.generator(3, epoch, "order of pictures"))
        for chosen in order.split(2):
            flat = head(tokens[chosen].flatten(0, 1)).reshape(len(chosen), 2, 3, 3)
            grid = torch.stack([flat[..., k] for k in range(3)], 1)
            logits = F.interpolate(grid, (8, 12), mode="bilinear").permute(0, 2, 3, 1)
            known = truth[chosen] != 255
            loss = F.cross_entropy(logits[known], truth[chosen][known].long()) if known.any() else 0 * logits.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    assert_close(ours.head.state_dict(), head.state_dict(), rtol=1e-4, atol=1e-6)
    assert ours.predict(tokens).shape == (5, 8, 12)
    assert torch.equal(ours.predict(tokens)[1:2], ours.predict(tokens[1:2]))


def test_the_head_finds_the_squares(run: Path, tmp_path: Path) -> None:
    squares(tmp_path / "train")
    pictures, maps = squares(tmp_path / "test", n=6, seed=1)
    state = torch.get_rng_state()
    result = segmented(run, tmp_path / "train", tmp_path / "out", test_data=str(pictures), test_labels=maps, epochs=300)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(result["results"]) == ["encoder", "untrained encoder", "raw pixels"]
    assert (result["train_pictures"], result["test_pictures"], result["num_classes"]) == (20, 6, 3)
    raw = result["results"]["raw pixels"]
    assert raw["miou"] > 75
    assert result["steps"] == 600
    assert raw["pixel_accuracy"] > result["most_common"] + 5
    assert raw["miou"] == pytest.approx(np.mean(raw["iou"]))
    assert json.loads((tmp_path / "out" / "segment.json").read_text()) == result
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 96
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact_sheet.png", "segment.json"]


def test_the_scores_are_those_of_the_maps_by_hand(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions against the test maps, pixel by pixel in plain Python; and the tokens are the encoder's patches."""
    pictures, maps = squares(tmp_path / "data", n=7)
    Image.open(maps / "part0" / "03.png").point(lambda v: 255 if v == 1 else v).save(maps / "part0" / "03.png")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    predict = DenseProbe.predict

    def record(self: DenseProbe, tokens: torch.Tensor) -> torch.Tensor:
        seen.append((tokens, predict(self, tokens)))
        return seen[-1][1]

    monkeypatch.setattr(DenseProbe, "predict", record)
    result = segmented(run, tmp_path / "data", tmp_path / "out", epochs=5, test_data=str(pictures), test_labels=maps)
    model, _ = load_model(run)
    source = open_source(str(pictures), 3)
    samples = Samples(source, model.recipe.clip, 0, None)
    clips = torch.stack([clip for i in range(7) if (clip := samples[0, i, i].clip) is not None])
    with torch.inference_mode():
        assert_close(seen[0][0], model.encode(clips)[:, 1:], rtol=0, atol=1e-5)
    assert_close(seen[2][0], model.tokens(clips))
    truth = []
    for i in range(7):
        with Image.open((maps / source.where(i)).with_suffix(".png")) as image:
            # 32 x 40 to 16 x 20, the nearer of two equally near ones is the second, and the centre of it
            truth.append(np.array(image)[1::2, 1::2][:, 2:18])
    for (_, named), row in zip(seen, result["results"].values(), strict=True):
        inside, either, right, known = [0] * 3, [0] * 3, 0, 0
        for t, p in zip(np.stack(truth).flatten().tolist(), named.flatten().tolist(), strict=True):
            if t == 255:
                continue
            known, right = known + 1, right + (t == p)
            for k in range(3):
                inside[k] += t == k == p
                either[k] += k in (t, p)
        assert row["iou"] == [pytest.approx(100 * a / b) for a, b in zip(inside, either, strict=True)]
        assert row["miou"] == pytest.approx(100 * sum(a / b for a, b in zip(inside, either, strict=True)) / 3)
        assert row["pixel_accuracy"] == pytest.approx(100 * right / known)
    assert known < 7 * 256


def test_a_fifth_is_held_out_and_the_result_repeats(run: Path, tmp_path: Path) -> None:
    squares(tmp_path / "data", n=11)
    first = segmented(run, tmp_path / "data", tmp_path / "a", epochs=3)
    assert (first["train_pictures"], first["test_pictures"]) == (9, 2)
    again = segmented(run, tmp_path / "data", tmp_path / "b", epochs=3)
    assert again["results"] == first["results"]
    other = segmented(run, tmp_path / "data", tmp_path / "c", epochs=3, seed=1, baselines=False)
    assert list(other["results"]) == ["encoder"]
    assert other["results"]["encoder"] != first["results"]["encoder"]


def test_a_picture_that_cannot_be_read_is_left_out_and_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, maps = squares(tmp_path / "data", n=11)
    (pictures / "part0" / "00.png").write_text("text")
    (pictures / "notes.txt").write_text("text")
    words = f"segment --run {run} --data {pictures} --labels {maps} --epochs 2 --device cpu --no-baselines --out"
    cli.main([*words.split(), str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "2 epochs over 8 pictures, 2 steps, which are few: give more --epochs.\n" in out
    assert "2 test pictures, 3 classes" in out
    assert "Files that could not be used: 2.\n" in out
    assert "Skipped part0/00.png: not a picture that Pillow can read.\n" in out
    assert re.search(r"^features +mIoU % +pixels %\nencoder +\d+\.\d +\d+\.\d$", out, re.M)
    cli.main([*words.split(), str(tmp_path / "json"), "--json"])
    assert (
        json.loads(capsys.readouterr().out)["results"]
        == json.loads((tmp_path / "out/segment.json").read_text())["results"]
    )


def test_a_palettes_indices_are_the_classes(tmp_path: Path) -> None:
    values = np.array([[0, 1], [255, 2]], dtype=np.uint8)
    image = Image.fromarray(values, mode="P")
    image.putpalette([(37 * i) % 256 for i in range(768)])
    image.save(tmp_path / "a.png")
    assert read_label_map(tmp_path / "a.png").tolist() == values.tolist()


def test_a_turned_picture_is_as_large_as_it_is_seen(run: Path, tmp_path: Path) -> None:
    pictures, _ = squares(tmp_path / "data", n=5)
    path = pictures / "part1" / "01.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6  # a quarter turn
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert segmented(run, tmp_path / "data", tmp_path / "out", epochs=1)["problems"] == []


def test_colours_differ_and_no_class_is_black() -> None:
    colours = palette(150)
    assert len({tuple(colour.tolist()) for colour in colours[:150]}) == 150
    assert (colours[:150].amax(1) > 0.5).all()
    assert not colours[150:].any()


# Refusals


def other_size(data: Path) -> None:
    Image.new("L", (30, 32)).save(data / "maps" / "part1" / "01.png")


def colour(data: Path) -> None:
    Image.new("RGB", (40, 32)).save(data / "maps" / "part1" / "01.png")


def deep(data: Path) -> None:
    Image.new("I;16", (40, 32)).save(data / "maps" / "part1" / "01.png")


def missing(data: Path) -> None:
    (data / "maps" / "part1" / "01.png").unlink()


def broken(data: Path) -> None:
    (data / "maps" / "part1" / "01.png").write_text("text")


def unknown(data: Path) -> None:
    for path in (data / "maps").rglob("*.png"):
        Image.new("L", (40, 32), 255).save(path)


def one_class(data: Path) -> None:
    for path in (data / "maps").rglob("*.png"):
        Image.new("L", (40, 32), 0).save(path)


def inside(data: Path) -> None:
    (data / "maps").rename(data / "pictures" / "maps")


def full(data: Path) -> None:
    (data / "out").mkdir()
    (data / "out" / "kept.txt").write_text("kept")


def file(data: Path) -> None:
    (data / "out").write_text("kept")


def shards(data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (data / "shards").mkdir()
    pq.write_table(pa.table({"image": [b"x"]}), data / "shards" / "a.parquet")


@pytest.mark.parametrize(
    "spoil, words, sentence",
    [
        (missing, "", r"part1/01.jpg of .* has no label map: there is no .*maps/part1/01.png"),
        (other_size, "", r"maps/part1/01.png is 30 x 32 pixels, but part1/01.jpg is 40 x 32. Make them the same size"),
        (colour, "", r"maps/part1/01.png is RGB, but a map has one channel"),
        (deep, "", r"maps/part1/01.png is I;16, but a map has one channel"),
        (broken, "", r"maps/part1/01.png cannot be read \(UnidentifiedImageError"),
        (None, "--num-classes 2", r"has a value 2, but --num-classes 2 are the values 0 to 1, and 255 for none"),
        (None, "--num-classes 1", r"--num-classes 1: use 2 to 255"),
        (None, "--num-classes 256", r"--num-classes 256: use 2 to 255"),
        (unknown, "", r"No pixel of the label maps in .* has a class: all are 255"),
        (one_class, "", r"is of class 0, so there is nothing to tell apart"),
        (inside, "--labels {data}/pictures/maps", r"maps' lies in .*, so that its maps would be read as pictures"),
        (None, "--labels {data}/nowhere", r"nowhere' is no folder"),
        (None, "--data digits:test", r"'digits:test' is no folder; label maps are found by the paths"),
        (shards, "--data {data}/shards", r"shards' holds parquet files"),
        (None, "--test-data {data}/pictures", r"--test-data and --test-labels belong together"),
        (None, "--test-labels {data}/maps", r"--test-data and --test-labels belong together"),
        (None, "--epochs 0", r"--epochs 0: train for at least one"),
        (None, "--time 51", r"encoder of this diffmae sees clean clips only"),
        (None, "--batch-size 0", r"batch_size=0"),
        (None, "--device gpu", r"--device gpu cannot be used"),
        (None, "--run {data}/nowhere", r"does not exist"),
        (None, "--out {data}/pictures/new", r"--out .* lies in .*, where it would be read as a picture"),
        (full, "", r"--out .* is not empty"),
        (file, "", r"--out .* is a file. Name a directory"),
    ],
)
def test_segment_refuses(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, words: str, sentence: str
) -> None:
    """Before anything is encoded or written."""
    pictures, maps = squares(tmp_path, n=5)
    if spoil is not None:
        spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = {"--run": str(run), "--data": str(pictures), "--labels": str(maps), "--out": str(tmp_path / "out")}
    pairs = words.format(data=tmp_path).split()
    given |= dict(zip(pairs[::2], pairs[1::2], strict=True))
    if "--device" not in given:
        given["--device"] = "cpu"
    with pytest.raises(SystemExit) as stop:
        cli.main(["segment", *(word for pair in given.items() for word in pair)])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert len(captured.err.splitlines()) == 1, captured.err
    assert re.search(sentence, captured.err), captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_too_few_pictures_to_hold_some_out_are_refused(run: Path, tmp_path: Path) -> None:
    squares(tmp_path / "data", n=4)
    with pytest.raises(ValueError, match=r"has 4 pictures, too few to hold some out\. Give --test-data"):
        segmented(run, tmp_path / "data", tmp_path / "out")


def test_a_model_of_latents_refuses(tmp_path: Path) -> None:
    run = save(tmp_path / "run", "umd", size="Nano/2", channels=4, height=8, latents=True)
    squares(tmp_path / "data", n=5)
    with pytest.raises(ValueError, match="works on latents of 4 channels"):
        segmented(run, tmp_path / "data", tmp_path / "out")
