"""Weights of MAE, timm and Hugging Face become ours, and compute what their own code computes.

Every tensor of the originals is filled with random values first: transformers builds positions, class and mask tokens of
zeros, with which a mistake about them would pass.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from small import generator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from unveil.checkpoint import load_encoder, load_model, read_header
from unveil.cli import main
from unveil.convert_vit import Told, from_vit, read_config
from unveil.foreign import recognise
from unveil.losses import BranchDraws, Draws, Objective
from unveil.masking import Mask, gather
from unveil.model import MaskedDiffusionAutoencoder, model_of
from unveil.reference import largest_difference
from unveil.sizes import IMAGENET_MEAN, IMAGENET_STD
from unveil.tasks.convert import Convert, convert
from unveil.tokens import sincos_positions

Tree = dict[str, Tensor]
SIDE, P, D, W = 16, 4, 32, 16
HF_SIZES: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 4 * D,
    "image_size": SIDE,
    "patch_size": P,
}
MAE_SIZES: dict[str, Any] = {
    **HF_SIZES,
    "decoder_hidden_size": W,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 4 * W,
}


def fill(model: nn.Module, seed: int = 0) -> None:
    """Every parameter N(0, 0.2), the scales of norms around 1."""
    g = generator(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = "norm" in name and name.endswith("weight")
            value.copy_(torch.randn(value.shape, generator=g) * 0.2 + scale)


def table(width: int) -> Tensor:
    """MAE's positions with the class token's row of zeros, (1, 1 + N, width)."""
    return torch.cat([torch.zeros(1, width), sincos_positions(width, (1, SIDE // P, SIDE // P))])[None]


def hf_mae(learned: bool = False, **fields: Any) -> ViTMAEForPreTraining:
    model = ViTMAEForPreTraining(ViTMAEConfig(**{**MAE_SIZES, **fields})).eval()
    fill(model)
    with torch.no_grad():
        if not learned:
            model.vit.embeddings.position_embeddings.copy_(table(D))
        model.decoder.decoder_pos_embed.copy_(table(W))
    return model


def timm_vit(learned: bool = True, **fields: Any) -> VisionTransformer:
    options = {"img_size": SIDE, "patch_size": P, "embed_dim": D, "depth": 3, "num_heads": 4, "num_classes": 5}
    model = VisionTransformer(**{**options, **fields}).eval()
    fill(model)
    if not learned:
        with torch.no_grad():
            assert model.pos_embed is not None
            model.pos_embed.copy_(table(D))
    return model


def pictures(n: int = 3, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, 1, SIDE, SIDE, generator=generator(5))


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """As the originals want it, (B, C, H, W)."""
    return ((x - torch.tensor(mean).reshape(-1, 1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1, 1))[:, :, 0]


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def mae_names(model: ViTMAEForPreTraining) -> Tree:
    """The same weights as MAE's own code names them, written out here a second time."""
    config = model.config
    state: Tree = {}

    def block(theirs: Any, ours: str) -> None:
        a = theirs.attention
        for kind in ("weight", "bias"):
            parts = [getattr(proj, kind).detach() for proj in (a.q_proj, a.k_proj, a.v_proj)]
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            for name, module in {
                "attn.proj": a.o_proj,
                "norm1": theirs.layernorm_before,
                "norm2": theirs.layernorm_after,
                "mlp.fc1": theirs.mlp.fc1,
                "mlp.fc2": theirs.mlp.fc2,
            }.items():
                state[f"{ours}.{name}.{kind}"] = getattr(module, kind).detach()

    for i in range(config.num_hidden_layers):
        block(model.vit.layers[i], f"blocks.{i}")
    for i in range(config.decoder_num_hidden_layers):
        block(model.decoder.decoder_layers[i], f"decoder_blocks.{i}")
    for kind in ("weight", "bias"):
        for name, module in {
            "patch_embed.proj": model.vit.embeddings.patch_embeddings.projection,
            "norm": model.vit.layernorm,
            "decoder_embed": model.decoder.decoder_embed,
            "decoder_norm": model.decoder.decoder_norm,
            "decoder_pred": model.decoder.decoder_pred,
        }.items():
            state[f"{name}.{kind}"] = getattr(module, kind).detach()
    state["cls_token"] = model.vit.embeddings.cls_token.detach()
    state["pos_embed"] = model.vit.embeddings.position_embeddings.detach()
    state["mask_token"] = model.decoder.mask_token.detach()
    state["decoder_pos_embed"] = model.decoder.decoder_pos_embed.detach()
    return state


def converted(tmp_path: Path, source: Path, **options: Any) -> tuple[MaskedDiffusionAutoencoder, dict[str, Any]]:
    out = tmp_path / "out.safetensors"
    result = convert(Convert(source=source, out=out, **options))
    return load_encoder(out)[0], result


# Hugging Face's MAE


@torch.no_grad()
def compare_whole(theirs: ViTMAEForPreTraining, model: MaskedDiffusionAutoencoder) -> None:
    """Predictions for a given mask, the loss, and the tokens of whole pictures."""
    clip = model.recipe.clip
    x = pictures()
    inputs = normalised(x, clip.mean, clip.std)
    noise = torch.rand(len(x), clip.num_tokens, generator=generator(2))
    expected = theirs(pixel_values=inputs, noise=noise)
    order = noise.argsort(dim=1)
    num_visible = int(clip.num_tokens * (1 - theirs.config.mask_ratio))
    mask = Mask(order[:, :num_visible], order[:, num_visible:])
    assert torch.equal(expected.mask.sum(1), torch.full((len(x),), mask.hidden.shape[1], dtype=torch.float32))
    ours = model(gather(model.tokens(x), mask.visible), mask)["hidden"]["x0"]
    assert_close(ours, gather(expected.logits, mask.hidden), rtol=1e-5, atol=1e-5)
    draws = Draws((BranchDraws(torch.arange(len(x)), mask, None, None, None),))
    loss, _ = Objective(model)(x, draws)
    assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    theirs.config.mask_ratio = 0.0
    in_order = torch.arange(clip.num_tokens).expand(len(x), -1).float()
    tokens = theirs.vit(pixel_values=inputs, noise=in_order).last_hidden_state
    assert_close(model.encode(x), tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields, learned, name",
    [
        ({"norm_pix_loss": True}, False, "mae"),
        ({"norm_pix_loss": False}, False, "mae_raw"),
        ({"norm_pix_loss": True, "layer_norm_eps": 1e-3}, True, "mae"),
    ],
)
def test_hugging_faces_mae(tmp_path: Path, fields: dict[str, Any], learned: bool, name: str) -> None:
    theirs = hf_mae(learned, **fields)
    model, result = converted(tmp_path, saved(tmp_path / "hf", theirs))
    recipe = model.recipe
    assert recipe.name == name
    assert recipe.network.norm_eps == fields.get("layer_norm_eps", 1e-12)
    assert recipe.network.positions == ("learned" if learned else "sincos")
    assert (recipe.clip.mean, recipe.clip.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert load_model(tmp_path / "out.safetensors")[1].parts == ()
    assert any(re.search("Compared with transformers .* predictions differ by", n) for n in result["notices"])
    compare_whole(theirs, model)


def test_the_file_alone_is_told_its_heads(tmp_path: Path) -> None:
    theirs = hf_mae(norm_pix_loss=True)
    file = saved(tmp_path / "hf", theirs) / "model.safetensors"
    file = file.rename(tmp_path / "alone.safetensors")
    model, result = converted(tmp_path, file, num_heads=4, decoder_heads=2)
    assert any("Taken for a MAE of normalised patches" in notice for notice in result["notices"])
    compare_whole(theirs, model)
    raw, _ = converted(tmp_path / "raw", file, num_heads=4, decoder_heads=2, patch_norm=False)
    assert raw.recipe.name == "mae_raw"


def test_published_names_of_the_decoder_are_known_too(tmp_path: Path) -> None:
    """Files of transformers 4 say decoder_layers where version 5 writes decoder_encoder.layer."""
    theirs = hf_mae(norm_pix_loss=True)
    file = saved(tmp_path / "hf", theirs) / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    old = {name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): v for name, v in tensors.items()}
    assert old.keys() != tensors.keys()
    safetensors.torch.save_file(old, file)
    compare_whole(theirs, converted(tmp_path, tmp_path / "hf")[0])


def test_a_preprocessors_normalisation_comes_along(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", hf_mae())
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    )
    model, result = converted(tmp_path, folder)
    assert (model.recipe.clip.mean, model.recipe.clip.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert "as the config beside the file says" in result["notices"][0]
    given, _ = converted(tmp_path / "given", folder, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert (given.recipe.clip.mean, given.recipe.clip.std) == ((0.5,) * 3, (0.25,) * 3)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    theirs = hf_mae(norm_pix_loss=True).half()
    folder = saved(tmp_path / "hf", theirs)
    assert safetensors.torch.load_file(folder / "model.safetensors")["vit.layernorm.bias"].dtype == torch.float16
    model, result = converted(tmp_path, folder)
    assert any("Compared with transformers" in notice for notice in result["notices"])
    compare_whole(theirs.float(), model)


# MAE's own files


@pytest.mark.parametrize("learned", [False, True])
def test_maes_own_checkpoint(tmp_path: Path, learned: bool) -> None:
    theirs = hf_mae(learned, norm_pix_loss=True, layer_norm_eps=1e-6)
    file = tmp_path / "mae.pth"
    torch.save({"model": mae_names(theirs)}, file)
    model, result = converted(tmp_path, file, num_heads=4, decoder_heads=2)
    assert result["kind"] == "mae"
    assert any(re.search("Compared with timm .* tokens differ by", notice) for notice in result["notices"])
    assert "ImageNet's" in result["notices"][0]
    compare_whole(theirs, model)


def test_maes_encoder_alone(tmp_path: Path) -> None:
    """As mae_pretrain_vit_base.pth is: no decoder."""
    theirs = timm_vit(learned=False)
    tensors = {name: value for name, value in theirs.state_dict().items() if not name.startswith("head")}
    torch.save({"model": tensors}, tmp_path / "mae_pretrain.pth")
    model, result = converted(tmp_path, tmp_path / "mae_pretrain.pth", num_heads=4)
    assert result["kind"] == "mae"
    assert result["parts"] == ["encoder"]
    assert model.recipe.name == "mae"
    assert result["left"] == {"pos_embed": "fixed positions, which equal ours"}
    x = pictures()
    expected = theirs.forward_features(normalised(x, IMAGENET_MEAN, IMAGENET_STD))
    assert_close(model.encode(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds an encoder only"):
        load_model(tmp_path / "out.safetensors")


# Plain ViTs


@pytest.mark.parametrize(
    "fields",
    [{}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg", "fc_norm": False}, {"in_chans": 1}],
)
def test_timms_vit(tmp_path: Path, fields: dict[str, Any]) -> None:
    theirs = timm_vit(**fields)
    file = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(theirs.state_dict(), file)
    model, result = converted(tmp_path, file, num_heads=4)
    channels = fields.get("in_chans", 3)
    assert (model.recipe.name, model.recipe.encoder.num_class_tokens) == ("vit", int(fields.get("class_token", True)))
    assert result["left"].keys() == {"head.weight", "head.bias"}
    assert "as timm's and Hugging Face's plain ViTs have them" in result["notices"][0]
    x = pictures(channels=channels)
    expected = theirs.forward_features(normalised(x, (0.5,) * channels, (0.5,) * channels))
    assert_close(model.encode(x), expected, rtol=1e-5, atol=1e-5)


def test_timms_folder_tells_its_normalisation(tmp_path: Path) -> None:
    folder = tmp_path / "timm"
    folder.mkdir()
    safetensors.torch.save_file(timm_vit().state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_small_something", "pretrained_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = converted(tmp_path, folder, num_heads=4)
    assert (model.recipe.clip.mean, model.recipe.clip.std) == ((0.4,) * 3, (0.3,) * 3)


@pytest.mark.parametrize("build", [ViTModel, ViTForImageClassification])
def test_hugging_faces_vit(tmp_path: Path, build: Callable[[ViTConfig], Any]) -> None:
    theirs = build(ViTConfig(**HF_SIZES)).eval()
    fill(theirs)
    model, result = converted(tmp_path, saved(tmp_path / "hf", theirs))
    assert model.recipe.network.norm_eps == 1e-12
    assert result["parts"] == ["encoder"]
    assert len(result["left"]) == 2
    x = pictures()
    clip = model.recipe.clip
    body = theirs if build is ViTModel else theirs.vit
    expected = body(pixel_values=normalised(x, clip.mean, clip.std)).last_hidden_state
    assert_close(model.encode(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width, heads", [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_published_widths_tell_their_heads(width: int, heads: int) -> None:
    with torch.device("meta"):
        sizes: dict[str, Any] = {"img_size": SIDE, "patch_size": P, "embed_dim": width, "depth": 1, "num_heads": heads}
        shapes = VisionTransformer(**sizes, num_classes=0).state_dict()
    tensors = {name: torch.zeros(value.shape) for name, value in shapes.items()}
    assert from_vit(tensors, kind="vit")[0].encoder.num_heads == heads


def test_a_norms_eps_makes_a_difference() -> None:
    """So that the comparisons above can tell 1e-6 from 1e-12: with small activations they differ."""
    theirs = hf_mae(norm_pix_loss=True)
    recipe, state, _, _ = from_vit(
        mae_names(theirs), kind="mae", given=Told(num_heads=4, decoder_heads=2, norm_eps=1e-12)
    )
    other, _, _, _ = from_vit(mae_names(theirs), kind="mae", given=Told(num_heads=4, decoder_heads=2))
    assert (recipe.network.norm_eps, other.network.norm_eps) == (1e-12, 1e-6)
    state["encoder.patch_embed.proj.weight"] = state["encoder.patch_embed.proj.weight"] * 1e-3
    tokens = []
    for r in (recipe, other):
        model = MaskedDiffusionAutoencoder(r).eval()
        model.load_state_dict(state)
        model.encoder.positions.pos_embed.mul_(1e-3)
        with torch.no_grad():
            tokens.append(model.encode(pictures() * 1e-3))
    assert not torch.equal(*tokens)


# Refusals


def changed(**change: Callable[[Tensor], Tensor] | Tensor | None) -> Tree:
    """MAE's names with something changed in them; `__` stands for a dot, None takes one out."""
    tensors = mae_names(hf_mae())
    for name, by in change.items():
        name = name.replace("__", ".")
        if by is None:
            del tensors[name]
        else:
            tensors[name] = by if isinstance(by, Tensor) else by(tensors[name])
    return tensors


HEADS = Told(num_heads=4, decoder_heads=2)
BAD: dict[str, tuple[Callable[[], Tree], Told, str]] = {
    "layer scale": (
        lambda: changed(blocks__0__ls1__gamma=torch.ones(D)),
        HEADS,
        "holds 'blocks.0.ls1.gamma', for which",
    ),
    "registers": (
        lambda: changed(reg_token=torch.ones(1, 4, D)),
        HEADS,
        "holds 'reg_token', for which the model has no",
    ),
    "norm after pooling": (lambda: changed(fc_norm__weight=torch.ones(D)), HEADS, "holds 'fc_norm.weight', for which"),
    "SwiGLU": (
        lambda: changed(blocks__0__mlp__w12__weight=torch.ones(4, D), blocks__0__mlp__fc1__weight=None),
        HEADS,
        "lacks 'blocks.0.mlp.fc1.weight', which MAE's model has; it holds 'blocks.0.mlp.w12.weight' instead, for which",
    ),
    "narrow mlp": (
        lambda: changed(blocks__0__mlp__fc1__weight=lambda v: v[:64]),
        HEADS,
        "'blocks.0.mlp.fc1.weight' is (64",
    ),
    "no mask token": (
        lambda: changed(mask_token=None),
        HEADS,
        "lacks 'mask_token', which MAE's model has: it is damaged",
    ),
    "no norm": (lambda: changed(norm__weight=None, norm__bias=None), HEADS, "lacks 'norm.weight' and 1 more"),
    "no square": (lambda: changed(pos_embed=lambda v: v[:, :-2]), HEADS, "no square; only square pictures"),
    "no number": (
        lambda: changed(cls_token=lambda v: v * torch.nan),
        HEADS,
        "'cls_token' has values that are no numbers",
    ),
    "class row of the decoder": (
        lambda: changed(decoder_pos_embed=lambda v: v + 1),
        HEADS,
        "'decoder_pos_embed' gives the class token a position of its own",
    ),
    "heads not told": (changed, Told(), "The encoder has a width of 32, and nothing tells its number of heads"),
    "decoder's heads not told": (changed, Told(num_heads=4), "The decoder has a width of 16, and nothing tells"),
    "heads that do not divide": (changed, Told(num_heads=5), "a width of 32, which cannot be split into 5 heads."),
    "mean without std": (
        changed,
        Told(num_heads=4, decoder_heads=2, mean=(0.5,) * 3),
        "Of --mean and --std one was given",
    ),
    "mean of one channel": (
        changed,
        Told(num_heads=4, decoder_heads=2, mean=(0.5,), std=(0.5,)),
        "are not one number for each of the model's 3 channels",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_from_vit_refuses(case: str) -> None:
    build, told, message = BAD[case]
    tensors = build()
    with pytest.raises(ValueError, match=re.escape(message)):
        from_vit(tensors, kind=recognise(tensors), given=told)


def test_equal_widths_refuse() -> None:
    """MAE has a map between encoder and decoder there too, for which the model has no place."""
    theirs = hf_mae(decoder_hidden_size=W)
    tensors = mae_names(theirs)
    wide = ViTMAEForPreTraining(
        ViTMAEConfig(**{**MAE_SIZES, "decoder_hidden_size": D, "decoder_intermediate_size": 4 * D})
    )
    tensors = {**mae_names(wide), "pos_embed": table(D), "decoder_pos_embed": table(D)}
    with pytest.raises(ValueError, match=r"'decoder_embed\.weight' and 1 more, for which the model has no place"):
        from_vit(tensors, kind="mae", given=HEADS)


def test_a_decoder_refuses_kind_vit() -> None:
    with pytest.raises(ValueError, match="has a decoder, so it is no plain ViT"):
        from_vit(changed(pos_embed=lambda v: v + 1), kind="vit", given=HEADS)


@pytest.mark.parametrize(
    "config, preprocessor, message",
    [
        (
            {"model_type": "dinov2"},
            {},
            "model_type='dinov2', but of Hugging Face's models only videomae, vit and vit_mae",
        ),
        ({"model_type": "vit", "hidden_act": "quick_gelu"}, {}, "hidden_act='quick_gelu', which no model here has"),
        ({"model_type": "vit", "num_attention_heads": "4"}, {}, "num_attention_heads='4', which is no number"),
        ({"model_type": "vit"}, {"image_mean": 0.5}, "mean=0.5 and std=None, which are no lists of numbers"),
    ],
)
def test_read_config_refuses(config: dict[str, Any], preprocessor: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(config, preprocessor)


def test_what_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose difference no tensor tells, here timm's quick GELU."""
    file = tmp_path / "timm" / "model.safetensors"
    file.parent.mkdir()
    name = "vit_base_patch32_clip_quickgelu_224"
    assert name in timm.list_models()
    options = {"img_size": SIDE, "patch_size": P, "embed_dim": D, "depth": 2, "num_heads": 4, "pre_norm": False}
    theirs = timm.create_model(name, pretrained=False, num_classes=0, **options)
    fill(theirs)
    safetensors.torch.save_file(theirs.state_dict(), file)
    model_args = {**options, "num_classes": 0}
    file.with_name("config.json").write_text(json.dumps({"architecture": name, "model_args": model_args}))
    with pytest.raises(ValueError, match=r"tokens differ from timm's by .* nothing was written"):
        converted(tmp_path, file.parent, num_heads=4)
    assert not (tmp_path / "out.safetensors").exists()
    converted(tmp_path, file.parent, num_heads=4, check=False)
    monkeypatch.setattr("unveil.tasks.convert.is_installed", lambda library: False)
    (tmp_path / "out.safetensors").unlink()
    with pytest.raises(ValueError, match="--check needs timm, which is not installed"):
        converted(tmp_path, file.parent, num_heads=4, check=True)
    _, result = converted(tmp_path, file.parent, num_heads=4)
    assert result["notices"][-1] == "Not compared with timm, which is not installed."


def test_a_config_of_another_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    safetensors.torch.save_file(timm_vit().state_dict(), tmp_path / "timm" / "model.safetensors")
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(ValueError, match=r"timm cannot build what config\.json describes from these tensors \(Error"):
        converted(tmp_path, tmp_path / "timm", num_heads=4)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_comparison_sees_a_changed_weight(tmp_path: Path) -> None:
    theirs = timm_vit()
    tensors = theirs.state_dict()
    recipe, state, report, _ = from_vit(tensors, kind="vit", given=Told(num_heads=4))
    model = model_of(recipe, report.parts).eval()
    model.load_state_dict(state)
    assert largest_difference("mae", model, tensors, {})[0] < 1e-5
    with torch.no_grad():
        model.encoder.blocks[1].attn.qkv.bias[3] += 0.1  # type: ignore[union-attr,index,operator]
    assert largest_difference("mae", model, tensors, {})[0] > 1e-4


def test_convert_and_info_speak_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "hf", hf_mae())
    out = tmp_path / "mae.safetensors"
    main(["convert", "--source", str(folder), "--out", str(out)])
    told = capsys.readouterr().out
    assert f"Wrote {out}: mae_raw 32x3/4" in told
    assert "Tensors left out: 2 (fixed positions, which equal ours)." in told
    main(["info", "--run", str(out)])
    assert "mae_raw 32x3/4" in capsys.readouterr().out
    assert read_header(out)[1].data == "not known: converted from hf"


def refused(tmp_path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(Convert(**{"out": tmp_path / "out.safetensors", **options}))
    assert not (tmp_path / "out.safetensors").exists()


def test_convert_refuses_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "is a folder without a model.safetensors", source=tmp_path / "empty")
    folder = saved(tmp_path / "hf", hf_mae())
    (folder / "config.json").write_text("{")
    refused(tmp_path, "config.json is no JSON", source=folder)
    (folder / "config.json").write_text("[]")
    refused(tmp_path, "config.json is no JSON object", source=folder)


@pytest.mark.parametrize("option", ["decoder_heads", "patch_norm", "mean", "std"])
def test_options_of_a_vit_refuse_others(tmp_path: Path, option: str) -> None:
    file = tmp_path / "dit.safetensors"
    safetensors.torch.save_file({"x_embedder.proj.weight": torch.zeros(4, 4, 2, 2)}, file)
    value = {"decoder_heads": 2, "patch_norm": True}.get(option, (0.5,))
    refused(tmp_path, f"--{option.replace('_', '-')} has no part in converting DiT", source=file, **{option: value})
