"""An encoder that is written for another library computes there what it computes here, on the same raw pictures.

Everything is random, also what starts at zero; the pictures are normalised by hand from what the file says of itself.
"""

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from small import build, clips_for, shipped, small
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoImageProcessor, ViTForImageClassification, ViTMAEForPreTraining, ViTModel

from unveil import recipes, sizes
from unveil.checkpoint import WEIGHTS, About, load_model, save_weights
from unveil.cli import main
from unveil.config import Network
from unveil.convert_vit import Told, from_vit
from unveil.data import Samples
from unveil.export import TIMM_NAMES, EncoderGraph, RecognizerGraph, to_timm, write_onnx
from unveil.features import encoder_features
from unveil.finetuning import SMALL, Recognition
from unveil.masking import Mask, gather
from unveil.model import MaskedDiffusionAutoencoder, model_of
from unveil.recipe import Recipe
from unveil.recognizer import Recognizer, load_recognizer
from unveil.sources import open_source
from unveil.tasks.convert import Convert, convert
from unveil.tasks.export import Export, export

ABOUT = About(step=7, images_seen=99, ema_decay=None, data="photos/", command="unveil pretrain --data photos/")
ONNX = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(ONNX), reason=f"{' and '.join(ONNX)} not installed; pip install 'unveil[export]'")


def changed(recipe: Recipe, **network: Any) -> Recipe:
    return dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, **network))


def save(folder: Path, recipe: Recipe, **about: Any) -> MaskedDiffusionAutoencoder:
    model = build(recipe)
    save_weights(folder / WEIGHTS, recipe, model.state_dict(), ABOUT)
    return model


def normalised(x: Tensor, mean: Any, std: Any) -> Tensor:
    return ((x - torch.tensor(mean).reshape(-1, 1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1, 1))[:, :, 0]


def no_class_token(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, num_class_tokens=0))


RECIPES = {
    "mae": small("mae"),
    "diffmae": small("diffmae"),
    "mae_raw, grey": small("mae_raw", channels=1),
    "learned positions": changed(small("mae"), positions="learned"),
    "another eps": changed(small("mae"), norm_eps=1e-3),
    "cross": small("mae_raw", decoder="cross_self"),
    "rectangle": small("diffmae", width=24),
    "no class token": no_class_token(small("mae")),
}


# timm


def loaded_by_timm(call: str) -> Any:
    """What the line of Python makes that the command prints."""
    return eval(call, {"timm": timm, "torch": torch, "functools": functools}).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_timm_agrees(tmp_path: Path, name: str, suffix: str) -> None:
    ours = save(tmp_path, RECIPES[name])
    out = tmp_path / f"vit{suffix}"
    result = export(Export(run=tmp_path, to="timm", out=out))
    theirs = loaded_by_timm(result["load"])
    beside = json.loads(out.with_suffix(".json").read_text())["pretrained_cfg"]
    x = clips_for(ours.recipe)
    tokens = theirs.forward_features(normalised(x, beside["mean"], beside["std"]))
    assert_close(tokens, ours.encode(x), rtol=1e-5, atol=1e-5)
    assert_close(theirs(normalised(x, beside["mean"], beside["std"])), torch.zeros(len(x), 1000))
    if suffix == ".safetensors":
        with safetensors.safe_open(out, framework="pt") as file:
            assert json.loads(file.metadata()["mean"]) == beside["mean"] == list(ours.recipe.clip.mean)


@torch.no_grad()
def test_a_named_model_loads_by_its_name(tmp_path: Path) -> None:
    """vit_tiny_patch16_224, whose name alone is enough."""
    recipe = small("mae", size="Ti/16", height=224, depth=12, decoder_depth=1)
    assert shipped("mae").clip.height == 224
    encoder = sizes.ENCODERS["Ti"]
    ours = save(tmp_path, dataclasses.replace(recipe, encoder=encoder, size="Ti/16"))
    result = export(Export(run=tmp_path, to="timm", out=tmp_path / "ti.safetensors"))
    assert result["load"].startswith("timm.create_model('vit_tiny_patch16_224', checkpoint_path=")
    theirs = loaded_by_timm(result["load"])
    x = clips_for(ours.recipe, n=1)
    tokens = theirs.forward_features(normalised(x, result["mean"], result["std"]))
    assert_close(tokens, ours.encode(x), rtol=1e-5, atol=1e-5)


def test_every_name_of_timms_fits() -> None:
    """A file that is said to be for a name has exactly its tensors."""
    for (size, side), name in TIMM_NAMES.items():
        with torch.device("meta"):
            theirs = timm.create_model(name).state_dict()
            state, config = to_timm(MaskedDiffusionAutoencoder(recipes.mae(size, height=side)), 1000)
        assert (config["architecture"], config["model_args"]) == (name, {})
        assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in theirs.items()}


def test_a_head_may_be_left_out(tmp_path: Path) -> None:
    save(tmp_path, small("mae"))
    result = export(Export(run=tmp_path, to="timm", out=tmp_path / "vit.safetensors", head_classes=0))
    assert "num_classes=0" in result["load"]
    assert not any("head" in notice for notice in result["notices"])
    loaded_by_timm(result["load"])


def test_there_and_back_by_timm(tmp_path: Path) -> None:
    ours = save(tmp_path, small("mae"))
    export(Export(run=tmp_path, to="timm", out=tmp_path / "vit.safetensors"))
    tensors = safetensors.torch.load_file(tmp_path / "vit.safetensors")
    recipe, state, report, _ = from_vit(tensors, kind="vit", given=Told(num_heads=ours.recipe.encoder.num_heads))
    assert recipe.name == "mae"  # its positions are MAE's
    back = model_of(recipe, report.parts)
    back.load_state_dict(state)
    for name, value in back.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


# Hugging Face


@pytest.mark.parametrize("name", ["diffmae", "cross", "learned positions", "another eps"])
@torch.no_grad()
def test_hugging_faces_encoder_agrees(tmp_path: Path, name: str) -> None:
    ours = save(tmp_path, RECIPES[name])
    folder = tmp_path / "hf"
    export(Export(run=tmp_path, to="hf", out=folder))
    theirs, told = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not told["missing_keys"]
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    x = clips_for(ours.recipe)
    inputs = normalised(x, preprocessor["image_mean"], preprocessor["image_std"])
    assert_close(theirs.eval()(pixel_values=inputs).last_hidden_state, ours.encode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        small("mae"),
        small("mae_raw", mask_ratio=0.5),
        changed(small("mae"), positions="learned", norm_eps=1e-3),
    ],
    ids=["mae", "raw", "learned"],
)
@torch.no_grad()
def test_hugging_faces_mae_agrees_and_comes_back(tmp_path: Path, recipe: Recipe) -> None:
    ours = save(tmp_path, recipe)
    folder = tmp_path / "hf"
    result = export(Export(run=tmp_path, to="hf", out=folder))
    assert "transformers.ViTMAEForPreTraining.from_pretrained" in result["load"]
    theirs, told = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    x, N = clips_for(recipe), recipe.clip.num_tokens
    noise = torch.rand(len(x), N, generator=torch.Generator().manual_seed(3))
    inputs = normalised(x, recipe.clip.mean, recipe.clip.std)
    expected = theirs.eval()(pixel_values=inputs, noise=noise)
    order, num_visible = noise.argsort(dim=1), N - int(expected.mask[0].sum())
    assert num_visible == N * (1 - recipe.branches[0].mask_ratio)
    mask = Mask(order[:, :num_visible], order[:, num_visible:])
    predictions = ours(gather(ours.tokens(x), mask.visible), mask)["hidden"]["x0"]
    assert_close(predictions, gather(expected.logits, mask.hidden), rtol=1e-5, atol=1e-5)
    assert theirs.config.norm_pix_loss == recipe.branches[0].terms[0].patch_norm

    convert(Convert(source=folder, out=tmp_path / "back.safetensors"))
    back, _ = load_model(tmp_path / "back.safetensors")
    assert back.recipe.clip == recipe.clip
    assert back.recipe.network == recipe.network
    for name, value in back.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@torch.no_grad()
def test_equal_widths_get_the_identity(tmp_path: Path) -> None:
    """Hugging Face has a map between encoder and decoder at any width."""
    recipe = small("mae")
    assert recipe.decoder is not None
    decoder = dataclasses.replace(recipe.decoder, embed_dim=recipe.encoder.embed_dim)
    ours = save(tmp_path, dataclasses.replace(recipe, decoder=decoder))
    export(Export(run=tmp_path, to="hf", out=tmp_path / "hf"))
    theirs = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").eval()
    x, N = clips_for(recipe), recipe.clip.num_tokens
    order = torch.arange(N).expand(len(x), -1)
    expected = theirs(pixel_values=normalised(x, recipe.clip.mean, recipe.clip.std), noise=order.float()).logits
    mask = Mask(order[:, : N // 4], order[:, N // 4 :])
    predictions = ours(gather(ours.tokens(x), mask.visible), mask)["hidden"]["x0"]
    assert_close(predictions, gather(expected, mask.hidden), rtol=1e-5, atol=1e-5)


def test_the_preprocessor_is_read_by_its_library(tmp_path: Path) -> None:
    recipe = small("mae")
    save(tmp_path, recipe)
    export(Export(run=tmp_path, to="hf", out=tmp_path / "hf"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(processor.image_mean) == list(recipe.clip.mean)
    assert list(processor.image_std) == list(recipe.clip.std)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 60, 3)).astype(np.uint8))
    wide.save(tmp_path / "wide.png")
    source = open_source(str(tmp_path / "wide.png"), 3)
    ours = Samples(source, recipe.clip, 0, None)[0, 0, 0].clip
    assert ours is not None
    theirs = processor(wide, return_tensors="pt")["pixel_values"]
    # they round to 8 bits after scaling, and before normalising
    assert_close(theirs, normalised(ours[None], recipe.clip.mean, recipe.clip.std), rtol=0, atol=0.02)


@torch.no_grad()
def test_numbers_that_float32_would_round_go_to_onnx_alone(tmp_path: Path) -> None:
    """Dates in seconds."""
    ours = tuned(tmp_path / "run", "regression", "class")
    told = dataclasses.replace(ours.recognition, offset=(1.7e9, 0.0, 1.0), scale=(56.0, 1.0, 1.0))
    about = About(step=1, images_seen=1, ema_decay=None, data="x", command="x")
    save_weights(tmp_path / WEIGHTS, ours.recipe, ours.state_dict(), about, told)
    for to, name in (("timm", "x.pth"), ("hf", "x")):
        with pytest.raises(ValueError, match=r"'cat' is about 1.7e\+09 with a spread of 56, which a head of float32"):
            export(Export(run=tmp_path, to=to, out=tmp_path / name))  # type: ignore[arg-type]
    graph = RecognizerGraph(load_recognizer(tmp_path)[0])
    assert graph(clips_for(ours.recipe, 3)[:, :, 0])[0].dtype == torch.float64


# ONNX


@pytest.mark.parametrize("name", ["mae", "umd", "dit", "diffmae"])
@torch.no_grad()
def test_the_graph_is_the_encoder_at_time_zero_and_its_features(name: str) -> None:
    """Before it becomes a graph: the tokens of `encode`, and the features that a probe reads."""
    model = build(small(name))
    x = clips_for(model.recipe)
    tokens, pooled = EncoderGraph(model)(x[:, :, 0])
    assert torch.equal(tokens, model.encode(x))
    assert_close(pooled, encoder_features(model)(x, torch.arange(len(x))))


@needs_onnx
@pytest.mark.parametrize(
    "recipe",
    [
        small("mae"),
        small("umd"),
        pytest.param(small("diffmae", channels=1), marks=pytest.mark.slow),
        pytest.param(small("dit"), marks=pytest.mark.slow),
        pytest.param(small("umd_flow"), marks=pytest.mark.slow),
        pytest.param(small("mae", frames=4), marks=pytest.mark.slow),
    ],
    ids=["mae", "umd", "diffmae", "dit", "umd_flow", "video"],
)
@torch.no_grad()
def test_onnxruntime_agrees(tmp_path: Path, recipe: Recipe) -> None:
    import onnxruntime  # type: ignore[import-not-found]

    ours = save(tmp_path, recipe)
    out = tmp_path / "encoder.onnx"
    export(Export(run=tmp_path, to="onnx", out=out))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == list(recipe.clip.mean)
    assert json.loads(metadata["std"]) == list(recipe.clip.std)
    for n in (1, 2, 5):  # the batch is free
        x = clips_for(recipe, n=n, seed=n)
        pixels = x if recipe.clip.frames > 1 else x[:, :, 0]
        tokens, pooled = session.run(["tokens", "pooled"], {"pixels": pixels.numpy()})
        assert_close(torch.from_numpy(tokens), ours.encode(x), rtol=1e-4, atol=1e-4)
        expected = encoder_features(ours)(x, torch.arange(n))
        assert_close(torch.from_numpy(pooled), expected, rtol=1e-4, atol=1e-4)


# Fine-tuned networks


def tuned(folder: Path, task: Any = "single", pool: Any = "mean", name: str = "mae", **arguments: Any) -> Recognizer:
    """A fine-tuned network of three outputs, everything about it random."""
    outputs = ("cat", "dog", "owl")
    numbers = {"offset": (1.0, 2.0, 3.0), "scale": (4.0, 5.0, 6.0)} if task == "regression" else {}
    told = Recognition(task=task, outputs=outputs, pool=pool, training=SMALL, **numbers)
    recipe = small(name, **arguments)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Recognizer(recipe, told).eval()
        for parameter in network.parameters():
            parameter.data.normal_(std=0.2)
    save_weights(folder / WEIGHTS, recipe, network.state_dict(), ABOUT, told)
    return network


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("task", ["single", "multi", "regression"])
@torch.no_grad()
def test_timm_tells_what_a_fine_tuned_network_tells(tmp_path: Path, task: str, pool: str) -> None:
    ours = tuned(tmp_path, task, pool)
    result = export(Export(run=tmp_path, to="timm", out=tmp_path / "vit.pth"))
    theirs = loaded_by_timm(result["load"])
    beside = json.loads((tmp_path / "vit.json").read_text())
    assert beside["outputs"] == ["cat", "dog", "owl"]
    x = clips_for(ours.recipe, 3)
    output = theirs(normalised(x, beside["pretrained_cfg"]["mean"], beside["pretrained_cfg"]["std"]))
    expected = ours.predict(x).float()
    told = {"single": output.softmax(1), "multi": output.sigmoid(), "regression": output}[task]
    assert_close(told, expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).max() > 1e-3
    assert any("cat, dog, owl" in notice for notice in result["notices"])


@pytest.mark.parametrize("task", ["single", "multi", "regression"])
@torch.no_grad()
def test_hugging_face_tells_what_a_fine_tuned_network_tells(tmp_path: Path, task: str) -> None:
    ours = tuned(tmp_path, task, "class")
    result = export(Export(run=tmp_path, to="hf", out=tmp_path / "hf"))
    assert result["load"] == f"transformers.ViTForImageClassification.from_pretrained({str(tmp_path / 'hf')!r})"
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    x = clips_for(ours.recipe, 3)
    output = theirs(pixel_values=normalised(x, result["mean"], result["std"])).logits
    expected = ours.predict(x).float()
    told = {"single": output.softmax(1), "multi": output.sigmoid(), "regression": output}[task]
    assert_close(told, expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).max() > 1e-3
    back = convert(Convert(source=tmp_path / "hf", out=tmp_path / "back.safetensors"))
    assert {"classifier.weight", "classifier.bias"} <= back["left"].keys()


@torch.no_grad()
def test_a_fine_tuned_networks_graph_tells_the_same_before_it_is_one(tmp_path: Path) -> None:
    for name in ("mae", "umd", "dit"):
        ours = tuned(tmp_path / name, name=name)
        x = clips_for(ours.recipe, 3)
        told, pooled = RecognizerGraph(ours)(x[:, :, 0])
        assert_close(told, ours.predict(x))
        assert_close(pooled, ours.pooled(x))


@needs_onnx
@torch.no_grad()
def test_onnxruntime_tells_what_a_fine_tuned_network_tells(tmp_path: Path) -> None:
    import onnxruntime  # type: ignore[import-not-found]

    ours = tuned(tmp_path, "regression", name="umd")
    export(Export(run=tmp_path, to="onnx", out=tmp_path / "net.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["outputs"]) == ["cat", "dog", "owl"]
    x = clips_for(ours.recipe, 4)
    told, pooled = session.run(["told", "pooled"], {"pixels": x[:, :, 0].numpy()})
    assert_close(torch.from_numpy(told), ours.predict(x), rtol=1e-4, atol=1e-4)
    assert_close(torch.from_numpy(pooled), ours.pooled(x), rtol=1e-4, atol=1e-4)


def test_a_fine_tuned_network_refuses_another_head(tmp_path: Path) -> None:
    tuned(tmp_path)
    with pytest.raises(ValueError, match="is fine-tuned and brings its own head"):
        export(Export(run=tmp_path, to="timm", out=tmp_path / "x.pth", head_classes=5))
    with pytest.raises(ValueError, match="reads the class token, and this network the mean of its patches"):
        export(Export(run=tmp_path, to="hf", out=tmp_path / "x"))
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS}


# Refusals


@pytest.mark.parametrize(
    "recipe, to, message",
    [
        (small("umd"), "timm", "the encoder of this umd is told the time, which a plain ViT"),
        (small("dit"), "hf", "the encoder of this dit is told the time"),
        (small("mae_umd"), "timm", "the encoder of this mae_umd is told the time"),
        (small("mae", frames=4), "timm", "sees clips of 4 frames"),
        (changed(small("mae"), norm="rms"), "timm", "has norm='rms'"),
        (changed(small("mae"), mlp="swiglu"), "timm", "has mlp='swiglu'"),
        (changed(small("mae"), qk_norm=True), "hf", "normalises queries and keys"),
        (changed(small("mae"), positions="rotary"), "hf", "has rotary positions"),
        (no_class_token(small("mae")), "hf", "has no class token"),
        (small("mae", width=24), "hf", "sees pictures of 16 x 24"),
    ],
)
def test_export_refuses_what_is_no_plain_vit(tmp_path: Path, recipe: Recipe, to: Any, message: str) -> None:
    save(tmp_path, recipe)
    out = tmp_path / ("out.safetensors" if to == "timm" else "out")
    with pytest.raises(ValueError, match=re.escape(message)):
        export(Export(run=tmp_path, to=to, out=out))
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": "timm", "out": "x.bin"}, "x.bin must end in .safetensors or .pth for --to timm."),
        ({"to": "onnx", "out": "x.pth"}, "x.pth must end in .onnx for --to onnx."),
        ({"to": "hf", "out": "x.safetensors"}, "names a file, but --to hf writes a folder"),
        ({"to": "hf", "out": "there"}, "there exists already and is not overwritten"),
        ({"to": "timm", "out": "there.pth"}, "there.json exists already and is not overwritten"),
        ({"to": "hf", "out": "x", "head_classes": 3}, "--head-classes belongs to --to timm, but it is hf."),
        ({"to": "timm", "out": "x.pth", "head_classes": -1}, "--head-classes -1: it is a count"),
    ],
)
def test_export_refuses(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    save(tmp_path / "run", small("mae"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(message)):
        export(Export(run=tmp_path / "run", **{**options, "out": tmp_path / options["out"]}))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.json").read_text() == "mine"


def test_onnx_refuses_without_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, small("mae"))
    monkeypatch.setattr("unveil.export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"--to onnx needs onnx, which is not installed. Run pip install 'unveil\[export\]'"
    ):
        export(Export(run=tmp_path, to="onnx", out=tmp_path / "x.onnx"))


def test_onnx_refuses_what_one_file_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unveil.export.importlib.util.find_spec", lambda name: True)
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipes.mae("H/14"))
    with pytest.raises(ValueError, match=r"the encoder's weights are 2\.5 GB, and one file holds 1\.5 GB of them"):
        write_onnx(tmp_path / "x.onnx", model)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", small("mae"))

    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("unveil.export.safetensors.torch.save_file", full)
    for to, name in (("hf", "out"), ("timm", "out.safetensors")):
        with pytest.raises(OSError, match="No space left"):
            export(Export(run=tmp_path / "run", to=to, out=tmp_path / name))  # type: ignore[arg-type]
        assert not (tmp_path / name).exists()
        assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_export_says_how_to_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, small("mae"))
    main(["export", "--run", str(tmp_path), "--to", "timm", "--out", str(tmp_path / "vit.pth")])
    told = capsys.readouterr().out
    assert (
        "the encoder of mae Nano/4. It is loaded by\n  timm.create_model('vit_base_patch16_224', img_size=[16, 16]"
        in told
    )
    assert "do that first" in told
    assert Network().norm_eps == 1e-6  # so that norm_layer need not be said
    assert "norm_layer" not in told
