"""The command `unveil inpaint` and the pictures it writes: what is visible stays as it is, bit for bit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import build, generator, small

from unveil.checkpoint import WEIGHTS, About, save_weights
from unveil.painting import shrink_around
from unveil.recipe import Recipe
from unveil.tasks.inpaint import Inpaint, inpaint

ABOUT = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
Result = dict[str, Any]


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Path]:
    """A run directory with a random model of 16 x 16 pixels in patches of 4."""

    def write(name: str = "diffmae", **arguments: Any) -> Path:
        recipe: Recipe = small(name, **arguments)
        run = tmp_path / "_".join(["run", name, *(f"{k}{v}" for k, v in arguments.items())])
        save_weights(run / WEIGHTS, recipe, build(recipe).state_dict(), ABOUT)
        return run

    return write


def picture(path: Path, height: int = 16, width: int = 16, channels: int = 3, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if channels == 1 else (height, width, channels)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def mask(path: Path, hole: np.ndarray) -> Path:
    Image.fromarray((hole * 255).astype(np.uint8)).save(path)
    return path


def hole_of(height: int, width: int) -> np.ndarray:
    """A hole at odd places: neither patches of the model nor whole pixels of its size."""
    hole = np.zeros((height, width), dtype=bool)
    hole[height // 5 : height // 2 + 1, width // 3 + 1 : 2 * width // 3] = True
    return hole


def go(run: Path, images: Path | str, out: Path, **options: Any) -> Result:
    settings = {"num_samples": 2, "num_steps": 3, **options}
    settings["mask"] = str(settings.get("mask", "random:0.5"))
    return inpaint(Inpaint(run=run, images=str(images), out=out, **settings))


def read(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


PAINTED = ("prediction", "sample1", "sample2")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (37, 50), (64, 16), (7, 9)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_visible_pixels_are_kept_bit_for_bit(
    tmp_path: Path, run_of: Callable[..., Path], channels: int, size: tuple[int, int], sampler: str
) -> None:
    """White is repainted, black is kept, for a picture of the model's size and of others."""
    source = picture(tmp_path / "in.png", *size, channels)
    hole = hole_of(*size)
    assert hole.any()
    run = run_of(channels=channels)
    options = {"mask": mask(tmp_path / "mask.png", hole), "sampler": sampler, "smooth_share": 0.0}
    result = go(run, source, tmp_path / "out", **options)
    files = result["pictures"][0]["files"]
    assert list(files) == ["masked", *PAINTED, "disagreement"]
    before = read(source)
    apart = read(files.pop("disagreement"))
    assert apart.shape == (*size, 3)
    assert not apart[~hole].sum() > (~hole).sum() * 3 * 3  # inferno's darkest is nearly black
    assert apart[hole].max() > 20
    for label, path in files.items():
        after = read(path)
        assert after.shape == before.shape
        assert after.dtype == np.uint8
        assert np.array_equal(after[~hole], before[~hole]), label
        assert not np.array_equal(after[hole], before[hole]), label
    assert (read(files["masked"])[hole] == 128).all()
    assert not result["notices"]


@pytest.mark.parametrize(
    "text, share", [("random:0.5", 0.5), ("random", 0.75), ("center", 0.25), ("center:0.25", 0.25)]
)
@pytest.mark.parametrize("size", [(16, 16), (48, 32)])
def test_named_masks(
    tmp_path: Path, run_of: Callable[..., Path], text: str, share: float, size: tuple[int, int]
) -> None:
    source = picture(tmp_path / "in.png", *size)
    files = go(run_of(), source, tmp_path / "out", mask=text)["pictures"][0]["files"]
    gray = (read(files["masked"]) == 128).all(-1)
    patches = gray.reshape(4, size[0] // 4, 4, size[1] // 4).all((1, 3))
    assert patches.sum() == 16 * share
    assert np.array_equal(np.kron(patches, np.ones((size[0] // 4, size[1] // 4), dtype=bool)), gray)
    for label in PAINTED:
        assert np.array_equal(read(files[label])[~gray], read(source)[~gray])


def test_a_mask_finer_than_a_patch(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    """A single pixel: its patch is hidden from the model, and its neighbours in the patch are still kept."""
    source = picture(tmp_path / "in.png")
    hole = np.zeros((16, 16), dtype=bool)
    hole[6, 9] = True
    files = go(run_of(), source, tmp_path / "out", mask=mask(tmp_path / "m.png", hole))["pictures"][0]["files"]
    for label in PAINTED:
        changed = (read(files[label]) != read(source)).any(-1)
        assert changed.sum() == 1
        assert changed[6, 9]


@pytest.mark.parametrize("size", [(16, 16), (37, 50), (64, 64), (11, 9)])
def test_what_lies_under_the_mask_is_not_read(
    tmp_path: Path, run_of: Callable[..., Path], size: tuple[int, int]
) -> None:
    """Also not through the neighbours, when the picture is resized for the model."""
    hole = hole_of(*size)
    original = read(picture(tmp_path / "a" / "in.png", *size))
    other = np.where(hole[..., None], 255 - original // 2, original)
    (tmp_path / "b").mkdir()
    Image.fromarray(other).save(tmp_path / "b" / "in.png")
    run, path = run_of(), mask(tmp_path / "m.png", hole)
    for label in PAINTED:
        ours, theirs = (
            go(run, tmp_path / d / "in.png", tmp_path / f"out_{d}", mask=path)["pictures"][0]["files"][label]
            for d in "ab"
        )
        assert np.array_equal(read(ours), read(theirs))


@pytest.mark.parametrize("size", [(64, 48), (37, 50), (16, 16), (9, 30)])
def test_a_flat_picture_with_something_under_the_mask_becomes_flat(size: tuple[int, int]) -> None:
    """What the model sees of a picture of one colour is that colour, whatever is to be painted over."""
    hole = torch.from_numpy(hole_of(*size))[None]
    clip = torch.where(hole, torch.rand(3, 1, *size, generator=generator()), torch.tensor(0.7))
    seen = shrink_around(clip, hole, 16, 16)
    visible = ~F.adaptive_max_pool2d(hole.float(), (16, 16)).bool()
    torch.testing.assert_close(seen[:, visible], torch.full_like(seen[:, visible], 0.7), rtol=0, atol=1e-5)


def test_without_a_hole_shrinking_is_plain_resizing() -> None:
    clip = torch.rand(3, 1, 40, 23, generator=generator())
    expected = F.interpolate(clip.transpose(0, 1), (16, 16), mode="bicubic", antialias=True).clamp(0, 1).transpose(0, 1)
    seen = shrink_around(clip, torch.zeros(1, 40, 23, dtype=torch.bool), 16, 16)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_samples_differ_and_repeat(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    run, source = run_of(), picture(tmp_path / "in.png")

    def files(out: str, **options: Any) -> list[np.ndarray]:
        result = go(run, source, tmp_path / out, mask="center:0.5", num_samples=3, **options)
        return [read(path) for label, path in result["pictures"][0]["files"].items() if label.startswith("sample")]

    first, again, other = files("a"), files("b"), files("c", seed=1)
    assert len(first) == 3
    for x, y in zip(first, again, strict=True):
        assert np.array_equal(x, y)
    for i in range(3):
        assert not np.array_equal(first[i], first[i - 1])
        assert not np.array_equal(first[i], other[i])


@pytest.mark.parametrize("name", ["diffmae", "umd"])
def test_a_picture_does_not_depend_on_its_company(tmp_path: Path, run_of: Callable[..., Path], name: str) -> None:
    """The first one is painted alike alone and before others, and equal ones in different places differently."""
    for i in range(3):
        picture(tmp_path / "in" / f"{i}.png", seed=i // 2)
    run = run_of(name)
    alone = go(run, tmp_path / "in", tmp_path / "a", limit=1)["pictures"]
    together = go(run, tmp_path / "in", tmp_path / "b")["pictures"]
    assert (len(alone), len(together)) == (1, 3)
    for label, path in alone[0]["files"].items():
        assert np.array_equal(read(path), read(together[0]["files"][label]))
    hole = mask(tmp_path / "m.png", hole_of(16, 16))
    first, second, _ = go(run, tmp_path / "in", tmp_path / "c", mask=hole, smooth_share=0.0)["pictures"]
    assert not np.array_equal(read(first["files"]["sample1"]), read(second["files"]["sample1"]))


def test_a_scratch_that_is_filled_smoothly_is_told(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    source, hole = picture(tmp_path / "in.png"), np.zeros((16, 16), dtype=bool)
    hole[5] = True
    options: dict[str, Any] = {"mask": mask(tmp_path / "m.png", hole)}
    result = go(run_of(), source, tmp_path / "out", **options)
    assert any("filled smoothly, and the samples are alike. --smooth-share 0" in notice for notice in result["notices"])
    files = result["pictures"][0]["files"]
    assert np.array_equal(read(files["sample1"]), read(files["sample2"]))
    result = go(run_of(), source, tmp_path / "out", **options, smooth_share=0.0)
    assert not result["notices"]
    assert not np.array_equal(*(read(result["pictures"][0]["files"][label]) for label in ("sample1", "sample2")))


def test_long_names_are_cut_off(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    for end in ("a", "b", "ä" * 20):
        picture(tmp_path / "in" / f"{'n' * 210}{end}.png")
    result = go(run_of(), tmp_path / "in", tmp_path / "out")
    assert not result["notices"]
    assert len({made["files"]["sample1"] for made in result["pictures"]}) == 3
    assert all(Path(file).exists() for made in result["pictures"] for file in made["files"].values())


def test_a_picture_that_cannot_be_painted_is_passed_over(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    """By its name, and the others are painted; alone it is an error."""
    for name, size in (("a", 16), ("b", 1), ("c", 20)):
        picture(tmp_path / "in" / f"{name}.png", size, size)
    result = go(run_of(), tmp_path / "in", tmp_path / "out", mask="irregular:0.2")
    assert [made["picture"] for made in result["pictures"]] == ["a.png", "c.png"]
    assert any(re.match(r"Skipped b.png: .*hides everything", notice) for notice in result["notices"])
    assert Path(result["sheet"]).exists()
    with pytest.raises(ValueError, match="hides everything"):
        go(run_of(), tmp_path / "in" / "b.png", tmp_path / "out2", mask="irregular:0.2")


@pytest.mark.parametrize(
    "what, name", [("images", "sheet.png"), ("images", "a_sample1.png"), ("mask", "in_masked.png")]
)
def test_no_input_is_overwritten(tmp_path: Path, run_of: Callable[..., Path], what: str, name: str) -> None:
    out = tmp_path / "out"
    given = {"images": picture(tmp_path / "in.png"), "mask": mask(tmp_path / "m.png", hole_of(16, 16))}
    given[what] = given[what].rename((out / name) if out.mkdir() is None else out)
    before = given[what].read_bytes()
    with pytest.raises(ValueError, match=f"{name} lies in --out .* might be overwritten"):
        go(run_of(), given["images"], out, mask=given["mask"])
    assert given[what].read_bytes() == before
    assert list(out.iterdir()) == [given[what]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "--num-samples 0: ask for at least one"),
        ({"num_samples": -1, "animate": True}, "--num-samples -1"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1001}, "Use 1 to 1000 steps"),
        ({"smooth_share": 1.5}, "--smooth-share 1.5: give a share"),
    ],
)
def test_numbers_are_looked_at_before_any_work(
    tmp_path: Path, run_of: Callable[..., Path], options: dict[str, Any], message: str
) -> None:
    """Even where nothing is to be painted."""
    nothing = mask(tmp_path / "m.png", np.zeros((16, 16), dtype=bool))
    with pytest.raises(ValueError, match=message):
        go(run_of(), picture(tmp_path / "in.png"), tmp_path / "out", mask=nothing, **options)
    assert not (tmp_path / "out").exists()


def test_nothing_hidden_returns_the_picture_with_a_notice(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    run = run_of()
    for size in ((16, 16), (30, 41)):
        source = picture(tmp_path / f"{size[0]}.png", *size)
        nothing = mask(tmp_path / "m.png", np.zeros(size, dtype=bool))
        for text in (str(nothing), "random:0", "center:0"):
            result = go(run, source, tmp_path / "out", mask=text)
            assert any("hides nothing" in notice for notice in result["notices"])
            for label, path in result["pictures"][0]["files"].items():
                assert label == "disagreement" or np.array_equal(read(path), read(source))


@pytest.mark.parametrize("text", ["random:1", "center:1", "file"])
def test_a_mask_that_hides_everything_refuses(tmp_path: Path, run_of: Callable[..., Path], text: str) -> None:
    source = picture(tmp_path / "in.png", 20, 20)
    if text == "file":
        text = str(mask(tmp_path / "m.png", np.ones((20, 20), dtype=bool)))
    with pytest.raises(
        ValueError, match=r"hides everything, but this diffmae needs some of the picture|hides all of in.png"
    ):
        go(run_of(), source, tmp_path / "out", mask=text)


def test_a_model_of_wholes_takes_a_mask_that_hides_everything_and_no_other(
    tmp_path: Path, run_of: Callable[..., Path]
) -> None:
    source, run = picture(tmp_path / "in.png"), run_of(mask_ratio=1.0)
    files = go(run, source, tmp_path / "out", mask="random:1")["pictures"][0]["files"]
    assert not np.array_equal(read(files["sample1"]), read(files["sample2"]))
    with pytest.raises(ValueError, match="Hide everything, or use a model"):
        go(run, source, tmp_path / "out", mask="random:0.5")


NOISE_EVERYWHERE: list[tuple[str, dict[str, Any]]] = [
    ("diffmae", {"mask_ratio": 0.0}),
    ("dit", {}),
    ("umd", {}),
    ("umd_flow", {}),
    ("umd_finetune", {}),
]


@pytest.mark.parametrize("name, arguments", NOISE_EVERYWHERE)
def test_a_model_that_sees_noise_everywhere_takes_any_mask(
    tmp_path: Path, run_of: Callable[..., Path], name: str, arguments: dict[str, Any]
) -> None:
    """What is visible is kept bit for bit at any size, what is hidden is not read, and every sample is another."""
    run = run_of(name, **arguments)
    for size in ((16, 16), (37, 50)):
        hole = hole_of(*size)
        path = mask(tmp_path / "mask.png", hole)
        before = read(picture(tmp_path / f"a{size[0]}" / "in.png", *size))
        (tmp_path / f"b{size[0]}").mkdir()
        Image.fromarray(np.where(hole[..., None], 255 - before // 2, before)).save(tmp_path / f"b{size[0]}" / "in.png")
        ours, theirs = (
            go(run, tmp_path / f"{d}{size[0]}" / "in.png", tmp_path / f"out_{d}", mask=path, num_steps=2)["pictures"][0]
            for d in "ab"
        )
        after = {label: read(ours["files"][label]) for label in PAINTED}
        for label in PAINTED:
            assert np.array_equal(after[label][~hole], before[~hole])
            assert not np.array_equal(after[label][hole], before[hole])
            assert np.array_equal(after[label], read(theirs["files"][label]))
        assert not np.array_equal(after["sample1"], after["sample2"])
    whole = go(run, tmp_path / "a16" / "in.png", tmp_path / "whole", mask="random:1")["pictures"][0]["files"]
    assert not np.array_equal(read(whole["sample1"]), read(whole["sample2"]))


@pytest.mark.parametrize("name, same", [("umd", True), ("umd_flow", True), ("dit", False), ("diffmae", False)])
def test_the_prediction_of_a_model_with_clean_clips_has_no_noise(
    tmp_path: Path, run_of: Callable[..., Path], name: str, same: bool
) -> None:
    run, source = run_of(name), picture(tmp_path / "in.png")
    first, other = (
        go(run, source, tmp_path / f"out{seed}", mask="center", num_steps=2, seed=seed)["pictures"][0]["files"]
        for seed in (0, 1)
    )
    assert np.array_equal(read(first["prediction"]), read(other["prediction"])) == same
    assert not np.array_equal(read(first["sample1"]), read(other["sample1"]))


def test_a_patch_normalised_mae_refuses(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"patch-normalised.*cannot paint.*mae_raw or diffmae"):
        go(run_of("mae"), picture(tmp_path / "in.png"), tmp_path / "out")


@pytest.mark.parametrize("name", ["mae_raw", "mae_umd"])
def test_a_mae_paints_once_with_a_notice(tmp_path: Path, run_of: Callable[..., Path], name: str) -> None:
    result = go(run_of(name), picture(tmp_path / "in.png"), tmp_path / "out", num_samples=4)
    assert result["notices"] == [f"A {name} has one prediction for a hole, so one sample is painted, in one step."]
    files = result["pictures"][0]["files"]
    assert list(files) == ["masked", "prediction", "sample1"]
    assert np.array_equal(read(files["prediction"]), read(files["sample1"]))


def test_a_mask_of_another_size_refuses(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"is 30 x 20 pixels, but the picture in\.png is 16 x 16"):
        go(run_of(), picture(tmp_path / "in.png"), tmp_path / "o", mask=mask(tmp_path / "m.png", np.ones((20, 30))))


@pytest.mark.parametrize("text", ["random:2", "random:-0.1", "random:half", "center:nan", "box:0.3", "missing.png"])
def test_a_mask_that_is_none_refuses(tmp_path: Path, run_of: Callable[..., Path], text: str) -> None:
    with pytest.raises(ValueError, match="mask"):
        go(run_of(), picture(tmp_path / "in.png"), tmp_path / "out", mask=text)


def test_a_mask_that_is_no_picture_refuses(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    (tmp_path / "mask.png").write_text("white")
    with pytest.raises(ValueError, match="cannot be read as a picture") as caught:
        go(run_of(), picture(tmp_path / "in.png"), tmp_path / "out", mask=tmp_path / "mask.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"limit": 0}, {"num_samples": 0}, {"num_steps": 0}, {"num_steps": 1001}, {"device": "gpu"}, {"device": "cuda:99"}],
)
def test_options_refuse(tmp_path: Path, run_of: Callable[..., Path], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).replace("_", "[-_]")) as caught:
        go(run_of(), picture(tmp_path / "in.png"), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_picture_is_skipped_and_only_bad_ones_refuse(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    (tmp_path / "in" / "note.txt").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"No picture of .* could be repainted.*a\.png"):
        go(run_of(), tmp_path / "in", tmp_path / "out")
    picture(tmp_path / "in" / "b.png")
    result = go(run_of(), tmp_path / "in", tmp_path / "out")
    assert [p["picture"] for p in result["pictures"]] == ["b.png"]
    assert any(notice.startswith("Skipped a.png: ") for notice in result["notices"])
    assert any(notice.startswith("Skipped note.txt: ") for notice in result["notices"])


def test_a_picture_keeps_its_colours_beside_what_a_grey_model_paints(
    tmp_path: Path, run_of: Callable[..., Path]
) -> None:
    """And a grey one stays grey in the hands of a model of colours."""
    hole = hole_of(16, 16)
    path = mask(tmp_path / "m.png", hole)
    for channels, other in ((1, 3), (3, 1)):
        before = read(source := picture(tmp_path / f"{other}.png", channels=other))
        files = go(run_of(channels=channels), source, tmp_path / "out", mask=path)["pictures"][0]["files"]
        for label in PAINTED:
            after = read(files[label])
            assert after.shape == before.shape
            assert np.array_equal(after[~hole], before[~hole])
            assert not np.array_equal(after[hole], before[hole])
            assert after.ndim == 2 or (after[hole] == after[hole][:, :1]).all()


def test_pictures_of_one_name_do_not_overwrite_each_other(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    names = ["a.png", "a.bmp", "a_b.png", "a/b.png", "a_2.png"]
    for i, name in enumerate(names):
        picture(tmp_path / "in" / name, seed=i)
    result = go(run_of(), tmp_path / "in", tmp_path / "out", mask="center")
    written = [path for p in result["pictures"] for path in p["files"].values()]
    assert len(set(written)) == len(written) == 5 * len(names)
    for p in result["pictures"]:
        assert np.array_equal(read(p["files"]["prediction"])[0], read(tmp_path / "in" / p["picture"])[0])


def test_arrays_of_five_channels(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 5), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", values)
    files = go(run_of(channels=5), tmp_path / "in", tmp_path / "out", mask="center")["pictures"][0]["files"]
    for label in PAINTED:
        after = np.load(files[label])
        assert after.shape == values.shape
        assert np.array_equal(after[0], values[0])
        assert not np.array_equal(after, values)


def test_a_clip_becomes_an_animation(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    run = run_of(channels=1, frames=4, tubelet_size=2, height=16, width=24)
    result = go(run, "moving-digits:test", tmp_path / "out", mask="center", limit=1)
    with Image.open(result["pictures"][0]["files"]["sample1"]) as image:
        assert (image.size, image.n_frames) == ((24, 16), 4)


@pytest.mark.parametrize("name", ["diffmae", "umd"])
def test_the_sheet_shows_everything(tmp_path: Path, run_of: Callable[..., Path], name: str) -> None:
    for i, size in enumerate([(16, 16), (40, 20)]):
        picture(tmp_path / "in" / f"{i}.png", *size, seed=i)
    result = go(run_of(name), tmp_path / "in", tmp_path / "out")
    with Image.open(result["sheet"]) as sheet:
        assert sheet.size[0] > 2 * 96
        assert sheet.size[1] > 5 * 96  # the picture, masked, the mean, and two samples


# Masks from a folder


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[[dict[str, tuple[int, int]], dict[str, np.ndarray]], tuple[Path, Path]]:
    """Folders of pictures of these sizes, and of these masks."""

    def write(sizes: dict[str, tuple[int, int]], holes: dict[str, np.ndarray]) -> tuple[Path, Path]:
        for i, (name, size) in enumerate(sizes.items()):
            picture(tmp_path / "pictures" / name, *size, seed=i)
        for name, hole in holes.items():
            (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
            mask(tmp_path / "masks" / name, hole)
        return tmp_path / "pictures", tmp_path / "masks"

    return write


def painted_where(result: Result, folder: Path) -> list[np.ndarray]:
    return [(read(made["files"]["sample1"]) != read(folder / made["picture"])).any(-1) for made in result["pictures"]]


Pairs = Callable[[dict[str, tuple[int, int]], dict[str, np.ndarray]], tuple[Path, Path]]


def test_masks_of_a_folder_belong_to_the_pictures_of_their_names(
    tmp_path: Path, run_of: Callable[..., Path], pairs: Pairs
) -> None:
    holes = {"b.png": hole_of(20, 30), "a.png": hole_of(16, 16), "c.png": hole_of(5, 5), "other.png": hole_of(7, 7)}
    pictures, masks = pairs({"a.png": (16, 16), "b.bmp": (20, 30), "c.png": (16, 16), "d.png": (16, 16)}, holes)
    result = go(run_of(), pictures, tmp_path / "out", mask=masks, smooth_share=0.0)
    assert [(made["picture"], made["mask"]) for made in result["pictures"]] == [("a.png", "a"), ("b.bmp", "b")]
    for changed, name in zip(painted_where(result, pictures), ("a.png", "b.png"), strict=True):
        assert np.array_equal(changed, holes[name])
    assert result["notices"] == [
        "Skipped: The mask c is 5 x 5 pixels, but the picture c.png is 16 x 16. Make them the same size.",
        "Skipped: d.png: no mask has its name, as others do",
    ]


def test_other_masks_are_taken_in_turn_and_stretched(tmp_path: Path, run_of: Callable[..., Path], pairs: Pairs) -> None:
    half = np.zeros((32, 32), dtype=bool)
    half[:, :16] = True
    pictures, masks = pairs(
        {"a.png": (16, 16), "b.png": (20, 30), "c.png": (16, 16)}, {"0/left.png": half, "1/top.png": half.T}
    )
    (masks / "2.png").write_text("no picture")
    result = go(run_of(), pictures, tmp_path / "out", mask=masks)
    changed = painted_where(result, pictures)
    assert np.array_equal(changed[0], half[::2, ::2])
    assert changed[1].shape == (20, 30)
    assert np.array_equal(changed[1].any(1), np.arange(20) < 10)
    assert [made["mask"] for made in result["pictures"]] == ["0/left", "1/top"]
    assert any("2.png" in notice and "not a picture" in notice for notice in result["notices"])


def test_every_picture_with_every_mask(tmp_path: Path, run_of: Callable[..., Path], pairs: Pairs) -> None:
    pictures, masks = pairs(
        {"a.png": (16, 16), "b.png": (20, 30)}, {"a.png": hole_of(16, 16), "m/x.png": hole_of(40, 40)}
    )
    done: list[tuple[int, int]] = []
    options = Inpaint(
        run=run_of(), images=str(pictures), out=tmp_path / "out", mask=str(masks), each_mask=True, num_steps=2
    )
    result = inpaint(options, lambda *progress: done.append(progress))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    names = sorted(path.name for path in (tmp_path / "out").glob("*_sample1.png"))
    assert names == ["a_a_sample1.png", "a_m_x_sample1.png", "b_a_sample1.png", "b_m_x_sample1.png"]
    assert np.array_equal(painted_where(result, pictures)[0], hole_of(16, 16))
    with pytest.raises(ValueError, match="--each-mask goes with a folder of masks"):
        go(run_of(), pictures, tmp_path / "out", mask="random:0.5", each_mask=True)


def test_white_may_be_what_is_kept(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    hole = hole_of(16, 16)
    source, path = picture(tmp_path / "in.png"), mask(tmp_path / "m.png", ~hole)
    result = go(run_of(), source, tmp_path / "out", mask=path, keep_white=True, smooth_share=0.0)
    assert np.array_equal((read(result["pictures"][0]["files"]["sample1"]) != read(source)).any(-1), hole)
    assert not result["notices"]
    other = go(run_of(), source, tmp_path / "out", mask=path)
    assert "add --keep-white" in other["notices"][0]
    with pytest.raises(ValueError, match="--keep-white is about mask pictures"):
        go(run_of(), source, tmp_path / "out", keep_white=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_feathered_hole_fades_into_what_is_transparent(
    tmp_path: Path, run_of: Callable[..., Path], channels: int
) -> None:
    """And into colours that a grey model does not see."""
    values = np.full((16, 40, 4), (200, 60, 20, 0), dtype=np.uint8)
    values[8:, :, 3] = 255
    Image.fromarray(values).save(tmp_path / "in.png")
    hole = np.zeros((16, 40), dtype=bool)
    hole[:, 30:] = True
    options = {"mask": mask(tmp_path / "m.png", hole), "feather": 4}
    files = go(run_of(channels=channels), tmp_path / "in.png", tmp_path / "out", **options)["pictures"][0]["files"]
    for label in PAINTED:
        after = read(files[label])
        assert np.array_equal(after[:, :26], values[:, :26])
        assert (after[:8, 26:31, 3] == [51, 102, 153, 204, 255]).all()
        assert (after[8:, :, 3] == 255).all()
        if channels == 1:  # of the 180 between red and blue there is less and less
            apart = after[8:, 26:31, 0].astype(int) - after[8:, 26:31, 2]
            assert (np.abs(apart - [144, 108, 72, 36, 0]) <= 1).all()
    assert (read(files["masked"])[~hole] == values[~hole]).all()


def test_one_mask_that_hides_everything_does_not_end_a_folders_run(
    tmp_path: Path, run_of: Callable[..., Path], pairs: Pairs
) -> None:
    pictures, masks = pairs(
        {"a.png": (16, 16), "b.png": (16, 16)}, {"0.png": np.ones((9, 9), dtype=bool), "1.png": hole_of(16, 16)}
    )
    result = go(run_of(), pictures, tmp_path / "out", mask=masks)
    assert [made["picture"] for made in result["pictures"]] == ["b.png"]
    assert "hides all of a.png" in result["notices"][0]


@pytest.mark.parametrize("size", [(16, 16), (70, 90)])
def test_strokes_are_of_the_pictures_own_pixels(
    tmp_path: Path, run_of: Callable[..., Path], size: tuple[int, int]
) -> None:
    source = picture(tmp_path / "in.png", *size)
    result = go(run_of(), source, tmp_path / "out", mask="irregular:0.2")
    changed = (read(result["pictures"][0]["files"]["sample1"]) != read(source)).any(-1)
    assert 0.19 <= changed.mean() <= 0.3


def test_the_chain_of_predictions_as_an_animation(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    """The masked picture, one frame for each step, and the first sample; it plays for ever."""
    source, hole = picture(tmp_path / "in.png", 20, 30), hole_of(20, 30)
    options = {"mask": mask(tmp_path / "m.png", hole), "num_steps": 6, "animate": True, "smooth_share": 0.0}
    result = go(run_of(), source, tmp_path / "out", **options)
    files = result["pictures"][0]["files"]
    with Image.open(files["chain"]) as chain:
        # the last step is the sample, and Pillow shows it once for longer
        assert getattr(chain, "n_frames", 1) == 1 + 6
        assert chain.info["loop"] == 0
        frames = []
        for i in range(7):
            chain.seek(i)
            frames.append(np.asarray(chain.convert("RGB")).astype(int))
    assert np.abs(frames[0] - read(files["masked"])).mean() < 12  # GIF has 256 colours
    assert np.abs(frames[-1] - read(files["sample1"])).mean() < 12
    assert np.abs(frames[1][hole] - frames[-1][hole]).mean() > 5


def test_a_long_animation_is_thinned(tmp_path: Path, run_of: Callable[..., Path]) -> None:
    source, hole = picture(tmp_path / "in.png"), hole_of(16, 16)
    options = {
        "mask": mask(tmp_path / "m.png", hole),
        "num_steps": 300,
        "animate": True,
        "num_samples": 1,
        "smooth_share": 0.0,
    }
    result = go(run_of(), source, tmp_path / "out", **options)
    with Image.open(result["pictures"][0]["files"]["chain"]) as chain:
        assert 25 < getattr(chain, "n_frames", 1) <= 62
