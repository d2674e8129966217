"""Holes by name, and masks from files: what is white is repainted, and which mask belongs to which picture."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from small import build, generator, small

from unveil.holes import filled_smoothly, hardly_touched, named_holes, parse_named, strokes
from unveil.mask_files import MaskFolder, open_masks, read_mask
from unveil.painting import feather_weights, paint
from unveil.pipeline import default_sampler

CLIP = small().clip  # 16 x 16 pixels in patches of 4


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [(64, 64), (30, 200), (1500, 900)])
def test_strokes_cover_a_share_and_are_connected(size: tuple[int, int], share: float) -> None:
    """No dust: every part is a stroke, which is at least as wide as a thirtieth of the shorter side."""
    hole = strokes(*size, share, generator(3))
    assert hole.shape == size
    assert share <= hole.float().mean() <= share + 0.09
    _, parts = ndimage.label(hole.numpy())
    assert parts <= 40
    assert torch.equal(hole, strokes(*size, share, generator(3)))
    assert not torch.equal(hole, strokes(*size, share, generator(4)))


@pytest.mark.parametrize("name", ["random", "center", "block", "irregular", "tube"])
def test_named_holes_depend_on_the_seed_and_the_index_alone(name: str) -> None:
    holes = named_holes(CLIP, f"{name}:0.25", [0, 1, 2, 3, 4, 5], seed=0)
    assert holes.shape == (6, 1, 16, 16)
    assert torch.equal(named_holes(CLIP, f"{name}:0.25", [4], seed=0), holes[4:5])
    if name != "center":
        assert len({hole.numpy().tobytes() for hole in holes}) > 1
        assert not torch.equal(named_holes(CLIP, f"{name}:0.25", range(6), seed=1), holes)
    for share in (0, 1):
        assert (named_holes(CLIP, f"{name}:{share}", [0], seed=0) == bool(share)).all()


def test_a_block_is_one_rectangle_of_patches_anywhere() -> None:
    holes = named_holes(CLIP, "block:0.25", range(60), seed=0)
    patches = holes.reshape(60, 4, 4, 4, 4)
    assert (patches.any(4).any(2) == patches.all(4).all(2)).all()
    corners = set()
    for hole in patches[:, :, 0, :, 0]:
        rows, columns = hole.nonzero().T
        assert len(rows) == 4
        assert rows.max() - rows.min() == columns.max() - columns.min() == 1
        corners.add((int(rows.min()), int(columns.min())))
    assert len(corners) == 9


# Holes finer than a patch


def patches_of(hole: torch.Tensor) -> torch.Tensor:
    """How many pixels of each patch of 4 x 4 a hole (1, 16, 16) takes, (4, 4)."""
    return hole.reshape(4, 4, 4, 4).sum((1, 3))


@pytest.mark.parametrize("name", ["random:0.9", "center", "block", "tube", "random:1"])
def test_whole_patches_are_all_painted(name: str) -> None:
    assert not hardly_touched(named_holes(CLIP, name, range(6), seed=0), CLIP, 0.5).any()


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 1])
def test_patches_of_which_a_hole_takes_little_are_not_painted(share: float) -> None:
    hole = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    hole[0, :, 2:11, 1:14] = True
    part = hardly_touched(hole, CLIP, share)
    assert not (part & ~hole).any()
    assert not part[1].any()
    counts = patches_of(hole[0])
    assert counts.tolist() == [[6, 8, 8, 4], [12, 16, 16, 8], [9, 12, 12, 6], [0, 0, 0, 0]]
    assert torch.equal(patches_of(part[0]), torch.where((counts <= 16 * share) & (counts < 16), counts, 0))


@pytest.mark.parametrize("rows, seen", [(1, 12), (3, 4)])
@pytest.mark.parametrize("share", [0, 0.5])
def test_of_a_mask_that_touches_every_patch_some_are_seen(rows: int, seen: int, share: float) -> None:
    """A quarter even where most of each is hidden, in no order, and never one that is hidden whole."""
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    for row in range(rows):
        hole[..., row::4, :] = True
    hole[..., :4, :] = True
    part = patches_of(hardly_touched(hole, CLIP, share)[0]) > 0
    assert part.sum() == (seen if share else 4)
    assert not part[0].any()
    assert part.all(1).sum() == (3 if part.sum() == 12 else 0)
    hole[...] = True
    assert not hardly_touched(hole, CLIP, share).any()


def test_what_is_hardly_touched_does_not_depend_on_the_other_clips() -> None:
    holes = torch.stack([strokes(16, 16, share, generator(seed)) for seed in range(4) for share in (0.1, 0.4, 0.8)])
    holes = holes[:, None]
    together = hardly_touched(holes, CLIP, 0.5)
    assert together.any()
    for hole, part in zip(holes, together, strict=True):
        assert torch.equal(hardly_touched(hole[None], CLIP, 0.5)[0], part)


def test_a_tube_is_touched_in_any_of_its_frames() -> None:
    clip = small("diffmae", frames=4, tubelet_size=2).clip
    hole = torch.zeros(1, 4, clip.height, clip.width, dtype=torch.bool)
    hole[:, 0, :4, :4] = True  # one of the two frames of a token
    hole[:, 2:, 4:8, :4] = True
    part = hardly_touched(hole, clip, 0.5)
    assert torch.equal(part[:, 0], hole[:, 0])
    assert not part[:, 1:].any()


def test_a_smooth_filling_goes_on_with_what_is_around_it() -> None:
    """A slope is filled without an error, through time too, and other parts of the hole count for nothing."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(14.0), indexing="ij")
    slope = (0.3 + 0.02 * y + 0.03 * x).expand(2, 3, 12, 14)
    clips = torch.stack([slope, slope.flip(-1)])
    hole = torch.zeros(2, 3, 12, 14, dtype=torch.bool)
    hole[:, :, 3:7, 2:6] = True
    hole[0, :, 9:, 9:] = True
    part = hole.clone()
    part[:, :, 9:, 9:] = False
    damaged = torch.where(hole[:, None], torch.nan, clips)
    filled = filled_smoothly(damaged, hole, part)
    torch.testing.assert_close(filled[part[:, None].expand_as(filled)], clips[part[:, None].expand_as(filled)])
    assert torch.equal(filled[~hole[:, None].expand_as(filled)], clips[~hole[:, None].expand_as(filled)])
    assert filled[0][:, hole[0] & ~part[0]].isnan().all()
    assert damaged.isnan().sum() == hole.sum() * 2  # what was given is as it was
    whole_frame = torch.zeros(1, 3, 12, 14, dtype=torch.bool)
    whole_frame[:, 1] = True
    torch.testing.assert_close(filled_smoothly(clips[:1], whole_frame, whole_frame), clips[:1], atol=0.02, rtol=0)


def test_a_smooth_filling_is_the_mean_of_its_neighbours() -> None:
    clips = torch.rand(1, 3, 1, 9, 8, generator=generator(0))
    hole = strokes(9, 8, 0.3, generator(1))[None, None]
    filled = filled_smoothly(clips, hole, hole)[0, :, 0]
    around = torch.nn.functional.pad(filled, (1, 1, 1, 1), value=torch.nan)
    near = torch.stack([around[:, :-2, 1:-1], around[:, 2:, 1:-1], around[:, 1:-1, :-2], around[:, 1:-1, 2:]])
    torch.testing.assert_close(filled[:, hole[0, 0]], near.nanmean(0)[:, hole[0, 0]])


@pytest.mark.parametrize("text, message", [("wave:0.5", "The mask 'wave:0.5' is unknown"), ("block:2", "from 0 to 1"),
                                           ("irregular:nan", "from 0 to 1"), ("center:a", "from 0 to 1")])  # fmt: skip
def test_wrong_words_refuse(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_named(text)


def test_feather_weights_fall_with_the_distance() -> None:
    hole = torch.zeros(2, 9, 9, dtype=torch.bool)
    hole[0, 4, 4] = True
    weights = feather_weights(hole, 3)
    assert torch.allclose(weights[0, 4], torch.tensor([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]))
    assert weights[0, 0, 0] == 0
    assert not weights[1].any()  # a frame without a hole stays as it is
    assert torch.equal(feather_weights(hole, 0), hole.float())


def test_feathering_blends_around_the_hole_and_keeps_what_is_further_out() -> None:
    model, clip = build(small()), torch.rand(3, 1, 16, 16, generator=generator())
    hole = torch.zeros(1, 16, 16, dtype=torch.bool)
    hole[:, 6:10, 6:10] = True
    plain = paint(model, clip, hole, num_steps=2)
    soft = paint(model, clip, hole, num_steps=2, feather=2)
    ring = soft.hole & ~hole
    assert torch.equal(plain.hole, hole)
    assert ring.sum() == 48
    assert torch.equal(soft.samples[0][:, ~soft.hole], clip[:, ~soft.hole])
    assert (soft.samples[0][:, ring] != clip[:, ring]).any()
    hard = paint(model, clip, soft.hole, num_steps=2).samples[0]
    weights = feather_weights(hole, 2)
    assert torch.allclose(soft.samples[0], weights * hard + (1 - weights) * clip, atol=1e-6)
    with pytest.raises(ValueError, match="feather=-1"):
        paint(model, clip, hole, num_steps=2, feather=-1)


def test_models_that_see_noise_everywhere_are_resampled() -> None:
    assert default_sampler(build(small())) == "dpmpp"
    assert default_sampler(build(small("dit"))) == "ddpm"


# Masks from files


def top_row(width: int = 4, height: int = 3) -> np.ndarray:
    hole = np.zeros((height, width), dtype=bool)
    hole[0] = True
    return hole


def masks_of(folder: Path, count: int) -> Path:
    """Masks 0.png, 1.png, ..., of which mask i hides i + 1 pixels of the first row."""
    folder.mkdir()
    for i in range(count):
        values = np.zeros((4, 6), dtype=np.uint8)
        values[0, : i + 1] = 255
        Image.fromarray(values).save(folder / f"{i}.png")
    return folder


def test_masks_are_taken_in_turn_and_begun_again(tmp_path: Path) -> None:
    masks = open_masks(str(masks_of(tmp_path / "masks", 3)), None)
    assert isinstance(masks, MaskFolder)
    assert [masks.number_for(i, f"{i}.jpg") for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [int(masks.read(i).hole.sum()) for i in range(3)] == [1, 2, 3]


def test_white_may_be_kept_by_a_folder_too(tmp_path: Path) -> None:
    folder = str(masks_of(tmp_path / "masks", 2))
    for keep_white in (False, True):
        masks = open_masks(folder, None, keep_white)
        assert isinstance(masks, MaskFolder)
        for i in range(2):
            alone = open_masks(f"{folder}/{i}.png", None, keep_white)
            assert not isinstance(alone, MaskFolder)
            assert torch.equal(masks.read(i).hole, alone.hole)
            assert int(alone.hole.sum()) == (24 - i - 1 if keep_white else i + 1)


@pytest.mark.parametrize(
    "orientation, side", list(enumerate(["top", "top", "bottom", "bottom", "left", "right", "right", "left"], 1))
)
def test_masks_are_upright_as_pictures_are(tmp_path: Path, orientation: int, side: str) -> None:
    """Where EXIF says the first row that is stored belongs."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / "m.png"
    Image.fromarray(top_row()).convert("L").save(path, exif=exif)
    expected = np.zeros((3, 4) if side in ("top", "bottom") else (4, 3), dtype=bool)
    expected[{"top": np.s_[0], "bottom": np.s_[-1], "left": np.s_[:, 0], "right": np.s_[:, -1]}[side]] = True
    masks = open_masks(str(tmp_path / "masks"), None)
    assert isinstance(masks, MaskFolder)
    for hole in (read_mask(str(path)).hole, masks.read(0).hole):
        assert np.array_equal(hole.numpy(), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TGA", "SGI", "BMP", "PPM", "plain PPM", "EPS"])
def test_a_damaged_mask_refuses_by_its_name(tmp_path: Path, kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(top_row(90, 80)).convert("L").save(stream, "PPM" if kind == "plain PPM" else kind)
    data = stream.getvalue()
    if kind == "plain PPM":
        data = b"P2\n90 80\n255\n" + b"0 1 x "
    path = tmp_path / f"mask.{kind.split()[-1].lower()}"
    path.write_bytes(data if kind == "EPS" else data[: len(data) // 2])
    reason = "not a picture that Pillow can read" if kind == "EPS" else r"cannot be decoded \(.+\)"
    with pytest.raises(
        ValueError, match=rf"^--mask '.*mask\.\w+' cannot be read as a picture \({reason}\)\.$"
    ) as caught:
        read_mask(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "what, reason", [("", "neither random:SHARE"), ("x", r"cannot be read as a picture \(.*directory")]
)
def test_a_mask_that_is_no_file_refuses(tmp_path: Path, what: str, reason: str) -> None:
    path = tmp_path / "mask.png"
    if what:
        path.mkdir()
    with pytest.raises(ValueError, match=reason):
        read_mask(str(path))
