"""Painting pictures of any size, and the pipeline that users of diffusers know."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import build, generator, pillow_picture, small, small_variant
from torch import Tensor

from unveil import painting as painting_module
from unveil.checkpoint import WEIGHTS, About, save_weights
from unveil.holes import named_holes
from unveil.inpainting import InpaintPipeline
from unveil.model import MaskedDiffusionAutoencoder
from unveil.painting import named_hole, paint
from unveil.pipeline import predict, repaint

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F"]


@pytest.fixture(scope="module")
def model() -> MaskedDiffusionAutoencoder:
    """A random model of 16 x 16 pixels in patches of 4."""
    return build(small("diffmae"))


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (30, 41)) -> Image.Image:
    return pillow_picture(mode, size, seed)


def hole_of(seed: int, size: tuple[int, int] = (30, 41)) -> np.ndarray:
    """Blocks, strokes of one pixel, and single pixels, that leave some of the picture."""
    rng = np.random.default_rng(seed)
    hole = rng.random(size) < rng.choice([0, 0.01])
    for _ in range(rng.integers(1, 4)):
        y, x = (int(rng.integers(0, length)) for length in size)
        h, w = ((1, 99), (99, 1), (size[0] // 2, size[1] // 3))[rng.integers(0, 3)]
        hole[y : y + h, x : x + w] = True
    hole[: size[0] // 3, : size[1] // 3] = False
    return hole


def as_mask(hole: np.ndarray) -> Image.Image:
    return Image.fromarray((hole * 255).astype(np.uint8))


# The promise: what is not masked is not touched


@pytest.mark.parametrize("seed", range(40))
def test_pixels_outside_the_mask_equal_the_input_bit_for_bit(model: MaskedDiffusionAutoencoder, seed: int) -> None:
    """Random sizes, modes, masks, samplers and contexts."""
    rng = np.random.default_rng(1000 + seed)
    size = int(rng.integers(5, 90)), int(rng.integers(5, 90))
    mode = MODES[seed % len(MODES)]
    image, hole = picture(seed, mode, size), hole_of(seed, size)
    made = InpaintPipeline(model)(
        image=image,
        mask_image=as_mask(hole),
        num_inference_steps=2,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(seed),
        sampler=("dpmpp", "ddim", "ddpm")[seed % 3],
        context=float(rng.choice([0, 0.5, 2])),
        max_scale=float(rng.choice([1, 2, 4])),
        smooth_share=0.5 * (seed % 5 == 0),
    ).images
    expected = image.convert({"1": "L", "P": "RGB"}.get(mode, mode))
    before = np.asarray(expected)
    assert len(made) == 2
    for painted in made:
        after = np.asarray(painted)
        assert (painted.mode, after.shape, after.dtype) == (expected.mode, before.shape, before.dtype)
        assert np.array_equal(after[~hole], before[~hole])
    if hole.sum() > 20 and seed % 5:
        assert (np.asarray(made[0])[hole] != before[hole]).any()
        assert (np.asarray(made[0])[hole] != np.asarray(made[1])[hole]).any()


# Windows


def clip_of(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.rand(3, 1, *size, generator=generator(seed))


def test_a_picture_of_the_models_size_is_repainted_as_it_is(model: MaskedDiffusionAutoencoder) -> None:
    clip, hole = clip_of((16, 16)), torch.from_numpy(hole_of(1, (16, 16)))[None]
    painted = paint(model, clip, hole, num_steps=3, sampler="ddpm", num_samples=2, seed=5, index=7)
    wanted = repaint(model, clip[None], hole[None], num_steps=3, sampler="ddpm", num_samples=2, seed=5, indices=[7])
    assert torch.equal(painted.samples, wanted[0])
    assert torch.equal(painted.prediction, predict(model, clip[None], hole[None], seed=5, indices=[7])[0])
    torch.testing.assert_close(painted.disagreement(), wanted[0].std(0).mean(0))


def test_a_small_hole_is_painted_from_its_surroundings_at_their_own_scale(model: MaskedDiffusionAutoencoder) -> None:
    """The window is cut out pixel by pixel, so what lies beyond it changes nothing."""
    clip, hole = clip_of((50, 60)), torch.zeros(1, 50, 60, dtype=torch.bool)
    hole[:, 20:24, 30:36] = True
    painted = paint(model, clip, hole, num_steps=3).samples[0]
    rows, columns = slice(14, 30), slice(25, 41)  # 16 x 16 around the hole
    window, window_hole = clip[:, :, rows, columns], hole[:, rows, columns]
    wanted = repaint(model, window[None], window_hole[None], num_steps=3, sampler="dpmpp")[0, 0]
    assert torch.equal(painted[:, :, rows, columns], wanted)
    other = clip_of((50, 60), 1)
    other[:, :, rows, columns] = window
    again = paint(model, other, hole, num_steps=3).samples[0]
    assert torch.equal(again[:, hole], painted[:, hole])


def test_a_large_hole_is_painted_window_by_window(
    model: MaskedDiffusionAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window is told what those before it painted, each sample its own; all of the hole is painted, with other noise."""
    clip, hole = clip_of((64, 64)), torch.zeros(1, 64, 64, dtype=torch.bool)
    hole[:, 8:56, 8:56] = True
    told: list[Tensor] = []

    def watched(model: Any, clips: Tensor, holes: Tensor, **options: Any) -> Tensor:
        told.append(clips)
        return repaint(model, clips, holes, **options)

    monkeypatch.setattr(painting_module, "repaint", watched)
    painted = paint(model, clip, hole, num_steps=2, num_samples=2, max_scale=1)
    assert len(told) > 9
    assert len(told[0]) == 1  # both samples from one pass of the encoder
    assert len(told[-1]) == 2  # by now they differ
    assert not torch.equal(told[-1][0], told[-1][1])
    for made in (*painted.samples, painted.prediction):
        assert (made[:, hole] != clip[:, hole]).all(0).float().mean() > 0.99
    blocks = painted.samples[0][:, 0, 8:56, 8:56].unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2)
    assert all(not torch.equal(blocks[:, i], blocks[:, j]) for i in range(36) for j in range(i))
    alone = paint(model, clip, hole, num_steps=2, num_samples=2, max_scale=1)
    assert torch.equal(alone.samples, painted.samples)


def test_what_lies_under_a_hole_is_not_read_by_any_window(model: MaskedDiffusionAutoencoder) -> None:
    clip = clip_of((70, 50))
    fine = torch.zeros(1, 70, 50, dtype=torch.bool)
    fine[:, ::3], fine[:, :, ::2] = True, True
    for hole, scale in ((fine, 1.0), *((torch.from_numpy(hole_of(3, (70, 50)))[None], s) for s in (1.0, 2.0))):
        other = torch.where(hole, 1 - clip, clip)
        ours, theirs = (paint(model, x, hole, num_steps=2, num_samples=2, max_scale=scale) for x in (clip, other))
        assert torch.equal(ours.samples[..., hole[0]], theirs.samples[..., hole[0]])
        assert torch.equal(ours.prediction[..., hole[0]], theirs.prediction[..., hole[0]])


@pytest.mark.parametrize("step", [2, 3, 5])
@pytest.mark.parametrize("size", [(16, 16), (30, 40), (9, 7)])
def test_a_mask_finer_than_every_patch_is_painted(
    model: MaskedDiffusionAutoencoder, size: tuple[int, int], step: int
) -> None:
    """Every second row, as one paints between the lines of a video, leaves no patch of 4 x 4 whole."""
    clip, hole = clip_of(size), torch.zeros(1, *size, dtype=torch.bool)
    hole[:, ::step] = True
    painted = paint(model, clip, hole, num_steps=2)
    assert torch.equal(painted.samples[0][:, ~hole], clip[:, ~hole])
    assert (painted.samples[0][:, hole] != clip[:, hole]).float().mean() > 0.9


@pytest.mark.parametrize("size", [(16, 16), (25, 25), (50, 37), (64, 48), (100, 100)])
@pytest.mark.parametrize("name", ["random:0.5", "block:0.25", "center:0.25"])
def test_a_hole_by_name_hides_the_patches_that_it_names(
    model: MaskedDiffusionAutoencoder, monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int]
) -> None:
    """And no more of them, whatever the picture's size."""
    told: list[Tensor] = []

    def watched(model: Any, clips: Tensor, holes: Tensor, **options: Any) -> Tensor:
        told.append(holes.clone())
        return repaint(model, clips, holes, **options)

    monkeypatch.setattr(painting_module, "repaint", watched)
    hole, seen = named_hole(model.recipe.clip, name, 3, 0, (1, *size))
    clip = clip_of(size)
    painted = paint(model, clip, hole, num_steps=1, seen=seen)
    (only,) = told
    assert torch.equal(only[0], named_holes(model.recipe.clip, name, [3], seed=0)[0])
    assert torch.equal(painted.prediction[:, ~hole], clip[:, ~hole])
    assert (painted.prediction[:, hole] != clip[:, hole]).float().mean() > 0.99


def test_every_window_has_noise_of_its_own(model: MaskedDiffusionAutoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def watched(model: Any, clips: Tensor, holes: Tensor, **options: Any) -> Tensor:
        seeds.append(options["seed"])
        return repaint(model, clips, holes, **options)

    monkeypatch.setattr(painting_module, "repaint", watched)
    hole = torch.zeros(1, 64, 64, dtype=torch.bool)
    hole[:, 8:56, 8:56] = True
    paint(model, clip_of((64, 64)), hole, num_steps=1, max_scale=1)
    assert seeds[0] == 0
    assert len(set(seeds)) == len(seeds) > 5


def test_how_far_samples_lie_apart(model: MaskedDiffusionAutoencoder) -> None:
    clip, hole = clip_of((30, 20)), torch.zeros(1, 30, 20, dtype=torch.bool)
    hole[:, 3:20, 4:17] = True
    painted = paint(model, clip, hole, num_steps=1, num_samples=3, sampler="ddpm")
    torch.testing.assert_close(painted.disagreement(), painted.samples.std(0).mean(0))
    alone = paint(model, clip, hole, num_steps=1)
    assert torch.equal(alone.disagreement(), torch.zeros(1, 30, 20))
    nothing = paint(model, clip, hole & False, num_steps=1, num_samples=2)
    assert torch.equal(nothing.disagreement(), torch.zeros(1, 30, 20))


@pytest.mark.parametrize("options", [{"feather": 5}, {"context": 0.0, "max_scale": 1.0}])
def test_a_window_of_nothing_but_hole_says_why(model: MaskedDiffusionAutoencoder, options: dict[str, Any]) -> None:
    hole = torch.zeros(1, 48, 48, dtype=torch.bool)
    hole[:, ::4] = True
    if "context" in options:
        hole[...] = False
        hole[:, 8:40, 8:40] = True
    with pytest.raises(ValueError, match="would see nothing but the hole"):
        paint(model, clip_of((48, 48)), hole, num_steps=1, **options)


@pytest.mark.parametrize("options", [{"context": -0.1}, {"max_scale": 0.5}, {"context": float("nan")}])
def test_impossible_windows_refuse(model: MaskedDiffusionAutoencoder, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 0, and max_scale=.* at least 1"):
        paint(model, clip_of((20, 20)), torch.ones(1, 20, 20, dtype=torch.bool), num_steps=1, **options)


# The call


def test_kinds_of_pictures_are_painted_alike(model: MaskedDiffusionAutoencoder) -> None:
    pipe, image, hole = InpaintPipeline(model), picture(0), hole_of(0)
    array = np.array(image)

    def go(image: Any, mask: Any, **options: Any) -> Any:
        given = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3), **options}
        return pipe(image, mask, **given).images

    wanted = np.asarray(go(image, as_mask(hole))[0])
    tensor = torch.from_numpy(array).movedim(-1, 0).float() / 255
    deep = Image.fromarray((hole * 40000).astype(np.uint16))
    half = torch.from_numpy(hole).to(torch.bfloat16)
    for mask in (hole, (hole * 255).astype(np.uint8), torch.from_numpy(hole), hole[None], hole[..., None], half, deep):
        assert np.array_equal(np.asarray(go(array, mask)[0]), wanted)
    made = go(image, hole, output_type="np")
    assert (made.shape, made.dtype) == ((1, 30, 41, 3), np.float32)
    assert np.array_equal(np.rint(made[0] * 255), wanted)
    assert np.array_equal((made[0] * 255).astype(np.float64).round()[~hole], array[~hole])
    made = go(tensor, torch.from_numpy(hole)[None], output_type="pt")
    assert made.shape == (1, 3, 30, 41)
    assert torch.equal(made[0][:, ~torch.from_numpy(hole)], tensor[:, ~torch.from_numpy(hole)])
    assert (made[0].movedim(0, -1).numpy() * 255 - wanted).max() < 0.51
    assert isinstance(pipe(image, hole, 2, return_dict=False), tuple)


def test_colours_that_are_floats_become_pillows_of_8_bits(model: MaskedDiffusionAutoencoder) -> None:
    """By default, as users of diffusers are used to it; the bits of 8-bit pictures are the same again."""
    hole, array = hole_of(0), np.array(picture(0))
    for given in (array.astype(np.float32) / 255, torch.from_numpy(array).movedim(-1, 0) / 255):
        (made,) = InpaintPipeline(model)(given, hole, 2).images
        assert made.mode == "RGB"
        assert np.array_equal(np.asarray(made)[~hole], array[~hole])


@pytest.mark.parametrize("variant", ["umd", "diffmae"])
def test_the_sampler_is_the_models_unless_one_is_given(variant: str) -> None:
    pipe, image, hole = InpaintPipeline(build(small_variant(variant))), picture(0), hole_of(0)

    def go(**options: Any) -> np.ndarray:
        drawn = torch.Generator().manual_seed(3)
        return pipe(image, hole, 2, generator=drawn, output_type="np", smooth_share=0, **options).images

    wanted, other = ("ddpm", "dpmpp") if variant == "umd" else ("dpmpp", "ddpm")
    assert np.array_equal(go(), go(sampler=wanted))
    assert not np.array_equal(go(), go(sampler=other))


def test_several_pictures_of_several_sizes(model: MaskedDiffusionAutoencoder) -> None:
    pipe = InpaintPipeline(model)
    images, holes = [picture(0), picture(1, size=(16, 20))], [hole_of(0), hole_of(1, (16, 20))]
    made = pipe(images, holes, 2, 3, smooth_share=0)
    assert [i.size for i in made.images] == [(41, 30)] * 3 + [(20, 16)] * 3
    assert [d.shape for d in made.disagreement] == [(30, 41), (16, 20)]
    assert all((d[~h] == 0).all() and (d[h] > 0).mean() > 0.9 for d, h in zip(made.disagreement, holes, strict=True))
    assert [a.shape for a in pipe(images, holes, 2, output_type="np").images] == [(30, 41, 3), (16, 20, 3)]
    one = pipe([images[0], images[0]], holes[0], 2, smooth_share=0).images
    assert len(one) == 2
    assert not np.array_equal(*map(np.asarray, one))


def test_the_generator_says_what_is_painted_and_moves_on(model: MaskedDiffusionAutoencoder) -> None:
    pipe, image, hole = InpaintPipeline(model), picture(0), hole_of(0)

    def go(generator: Any) -> np.ndarray:
        return pipe(image, hole, 2, generator=generator, output_type="np", smooth_share=0).images

    first = torch.Generator().manual_seed(0)
    a, b = go(first), go(first)
    assert not np.array_equal(a, b)
    assert np.array_equal(a, go(torch.Generator().manual_seed(0)))
    assert np.array_equal(a, go([torch.Generator().manual_seed(0)]))
    torch.manual_seed(0)
    c = go(None)
    torch.manual_seed(0)
    assert np.array_equal(c, go(None))
    assert not np.array_equal(c, go(None))


def test_the_callback_sees_every_step(model: MaskedDiffusionAutoencoder) -> None:
    pipe, image, hole = InpaintPipeline(model), picture(0, size=(40, 40)), hole_of(2, (40, 40))
    seen: list[tuple[int, float, Tensor]] = []

    def see(given: InpaintPipeline, step: int, time: float, told: dict[str, Any]) -> None:
        assert given is pipe
        seen.append((step, time, told["pred_original_sample"]))

    made = pipe(image, hole, 4, 2, torch.Generator().manual_seed(0), "pt", callback_on_step_end=see, max_scale=1).images
    assert [step for step, _, _ in seen] == list(range(len(seen)))
    assert len(seen) % 4 == 0
    assert [t for _, t, _ in seen[:4]] == sorted({t for _, t, _ in seen}, reverse=True)
    outside = ~torch.from_numpy(hole)
    for _, _, pixels in seen:
        assert pixels.shape == (3, 40, 40)
        assert torch.equal(pixels[:, outside], made[0][:, outside])
    assert (seen[0][2] == 0.5).all(0).any()  # grey where no window was painted yet
    # The last step ends at what it predicted.
    assert (seen[-1][2] - made[0]).abs().max() < 0.5 / 255 + 1e-5


@pytest.mark.parametrize(
    "image, mask, options, message",
    [
        (picture(0), hole_of(0, (30, 40)), {}, r"mask_image is \(30, 40\) for a picture of \(30, 41\)"),
        ([picture(0)] * 3, [hole_of(0)] * 2, {}, "2 masks for 3 pictures"),
        (picture(0), hole_of(0), {"generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
        (picture(0), hole_of(0), {"output_type": "latent"}, "output_type"),
        (picture(0), hole_of(0), {"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        (picture(0), hole_of(0), {"num_inference_steps": 0}, "num_inference_steps=0; give a whole number"),
        (picture(0), hole_of(0), {"num_inference_steps": 1.5}, "num_inference_steps=1.5; give a whole number"),
        (picture(0), hole_of(0), {"num_images_per_prompt": "3"}, "num_images_per_prompt='3'; give a whole number"),
        (picture(0), hole_of(0), {"generator": 0}, "generator=0; give a torch.Generator"),
        ([], hole_of(0), {}, "image holds no picture"),
        (np.zeros((30, 41, 3), dtype=np.uint16), hole_of(0), {}, "is none of Pillow's. Ask for output_type"),
        (picture(0), hole_of(0), {"sampler": "euler"}, "sampler"),
        (np.full((30, 41, 3), 2.0), hole_of(0), {}, "values outside 0 to 1"),
        (np.full((30, 41, 3), np.nan), hole_of(0), {}, "values outside 0 to 1"),
        (np.zeros((30, 41, 3), dtype=np.int64), hole_of(0), {}, "image is of int64"),
        (torch.zeros(30, 41), hole_of(0), {}, r"tensor of \(30, 41\)"),
        ("photo.jpg", hole_of(0), {}, "image is a str"),
        (np.zeros((30, 41, 5), dtype=np.uint8), hole_of(0), {}, "5 channels"),
        (picture(0), np.ones((30, 41), dtype=bool), {}, "hides everything"),
        (picture(0), hole_of(0).astype(np.uint8), {}, "mask_image has no white: its brightest value is 1 of 255"),
        (picture(0), hole_of(0) * 255.0, {}, r"mask_image is \(30, 41\) of float64; give"),
        (picture(0), "hole.png", {}, r"mask_image is \(\) of <U8; give"),
        (picture(0), hole_of(0) * np.nan, {}, r"mask_image is \(30, 41\) of float64; give"),
    ],
)
def test_what_cannot_be_painted_refuses(
    model: MaskedDiffusionAutoencoder, image: Any, mask: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        InpaintPipeline(model)(image, mask, **{"num_inference_steps": 1, **options})


def test_a_run_is_taken_up(tmp_path: Path, model: MaskedDiffusionAutoencoder) -> None:
    about = About(step=1, images_seen=1, ema_decay=None, data="nothing", command="none")
    save_weights(tmp_path / WEIGHTS, model.recipe, model.state_dict(), about)
    ours, theirs = (
        pipe(picture(0), hole_of(0), 2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (InpaintPipeline(model), InpaintPipeline.from_pretrained(str(tmp_path), "cpu").to("cpu"))
    )
    assert np.array_equal(ours, theirs)


def test_a_feathered_hole_fades_into_transparency() -> None:
    hole = np.zeros((16, 40), dtype=bool)
    hole[:, 30:] = True
    pipe = InpaintPipeline(build(small()))
    made = pipe(Image.new("RGBA", (40, 16)), hole, 2, feather=4).images[0]
    assert (np.asarray(made)[:, 24:32, 3] == [0, 0, 51, 102, 153, 204, 255, 255]).all()
