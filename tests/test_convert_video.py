"""MAE-ST's and VideoMAE's weights become ours: against recorded numbers of the one, and the code of the other."""

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small import generator
from test_convert_vit import fill, saved
from test_parity import drawn, reference
from torch import Tensor
from torch.testing import assert_close
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

from unveil.checkpoint import load_encoder, load_model
from unveil.convert_video import from_mae_st, from_videomae, sinusoids_of_all
from unveil.convert_vit import Told
from unveil.foreign import recognise
from unveil.losses import Objective
from unveil.masking import gather, mask_from_scores
from unveil.model import MaskedDiffusionAutoencoder, model_of
from unveil.recipe import Recipe
from unveil.recognizer import resampled
from unveil.tasks.convert import Convert, convert

HEADS = {"num_heads": 4, "decoder_heads": 2}
PLAIN = Told(num_heads=4, decoder_heads=2, mean=(0.0,) * 3, std=(1.0,) * 3)  # the recorded clip is used as it is


def mae_st() -> dict[str, Tensor]:
    return {k: v for k, v in reference("mae_video").items() if k.startswith("param/")}


def converted_mae_st() -> tuple[MaskedDiffusionAutoencoder, Recipe]:
    recipe, state, _, _ = from_mae_st(mae_st(), given=PLAIN)
    model = MaskedDiffusionAutoencoder(recipe)
    model.load_state_dict(state)
    return model.eval(), recipe


@torch.no_grad()
def test_mae_st_encodes_predicts_and_scores() -> None:
    (model, recipe), expected = converted_mae_st(), reference("mae_video")
    assert (recipe.name, recipe.clip.frames, recipe.clip.grid) == ("mae_video", 8, (4, 2, 2))
    clips = expected["input/video_ncthw"]
    mask = mask_from_scores(expected["input/mask_scores"], 0.75)
    assert torch.equal(torch.zeros(2, 16).scatter(1, mask.hidden, 1.0), expected["mask"])
    x0 = model.tokens(clips)
    assert torch.equal(x0, expected["patchify"])
    visible = gather(x0, mask.visible)
    latent = model.encoder(visible, mask.visible, (2,))[0]
    assert_close(latent[:, 1:], expected["latent"], rtol=1e-5, atol=1e-5)
    assert_close(model(visible, mask)["hidden"]["x0"], gather(expected["pred"], mask.hidden), rtol=1e-5, atol=1e-5)
    loss, _ = Objective(model)(clips, drawn(mask))
    assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mae_sts_decoder_sees_a_class_token_of_its_own_only() -> None:
    model, _ = converted_mae_st()
    expected = reference("mae_video")
    mask = mask_from_scores(expected["input/mask_scores"], 0.75)
    assert model.decoder is not None
    assert model.decoder.cls_token is not None
    memory = model.encoder(gather(model.tokens(expected["input/video_ncthw"]), mask.visible), mask.visible, (2,))[0]
    known = model.decoder.prepare([memory], mask.visible).known
    other = memory.clone()
    other[:, 0] += 1
    assert known is not None
    assert torch.equal(known, model.decoder.prepare([other], mask.visible).known)  # type: ignore[arg-type]
    assert known.shape == (2, 1 + 4, 16)
    assert torch.equal(known[:, 0], model.decoder.cls_token[0].expand(2, -1))


def file_of(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    file = tmp_path / "theirs.pth"
    torch.save({"model": tensors}, file)
    return file


def test_mae_sts_own_key_is_known(tmp_path: Path) -> None:
    """Its fine-tuning reads files whose weights stand under "model" or "model_state"."""
    torch.save({"model_state": plain_names(), "epoch": 3}, tmp_path / "theirs.pth")
    result = convert(Convert(source=tmp_path / "theirs.pth", out=tmp_path / "out.safetensors", **HEADS))  # type: ignore[arg-type]
    assert result["kind"] == "mae_st"


def plain_names() -> dict[str, Tensor]:
    return {name.removeprefix("param/"): value.clone() for name, value in mae_st().items()}


def test_mae_sts_file_by_command(tmp_path: Path) -> None:
    result = convert(Convert(source=file_of(tmp_path, plain_names()), out=tmp_path / "out.safetensors", **HEADS))  # type: ignore[arg-type]
    assert (result["kind"], result["parts"], result["left"]) == ("mae_st", [], {})
    assert "mean (0.45, 0.45, 0.45) and std (0.225, 0.225, 0.225): as MAE-ST has them" in result["notices"][0]
    model, _ = load_model(tmp_path / "out.safetensors")
    assert_close(
        model.encode(torch.full((1, 3, 8, 16, 16), 0.45)),
        converted_mae_st()[0].encode(torch.zeros(1, 3, 8, 16, 16)),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_mae_st_that_predicts_every_other_frame_gives_its_encoder(tmp_path: Path) -> None:
    tensors = plain_names()
    for kind in ("weight", "bias"):
        tensors[f"decoder_pred.{kind}"] = tensors[f"decoder_pred.{kind}"][:192]
    result = convert(Convert(source=file_of(tmp_path, tensors), out=tmp_path / "out.safetensors", num_heads=4))
    assert result["parts"] == ["encoder"]
    assert "it predicts 4 of 8 frames" in result["left"]["decoder_pred.weight"]
    assert any("MAE-ST's encoder alone was written" in notice for notice in result["notices"])
    encoder, _ = load_encoder(tmp_path / "out.safetensors")
    assert not set(result["left"]) & set(result["used"])
    assert set(result["left"]) | set(result["used"]) == set(tensors)
    clip = torch.rand(1, 3, 8, 16, 16, generator=generator())
    normalised = (clip - 0.45) / 0.225
    assert_close(encoder.encode(clip), converted_mae_st()[0].encode(normalised), rtol=1e-5, atol=1e-5)


def without(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in plain_names().items() if k != name}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (without("pos_embed_class"), "lacks 'pos_embed_class'"),
        (without("blocks.1.attn.k.bias"), r"lacks 'blocks.1.attn.key.bias'"),
        (without("decoder_cls_token"), "lacks 'decoder_cls_token'"),
        ({**plain_names(), "extra": torch.zeros(1)}, "holds 'extra', for which the model has no place"),
        ({**plain_names(), "pos_embed_spatial": torch.zeros(1, 3, 32)}, "3 positions, which are no square"),
        ({**plain_names(), "pos_embed_temporal": torch.zeros(1, 4, 16)}, r"'pos_embed_temporal' is \(1, 4, 16\)"),
    ],
)
def test_a_damaged_mae_st_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(Convert(source=file_of(tmp_path, tensors), out=tmp_path / "out.safetensors", **HEADS))  # type: ignore[arg-type]
    assert not (tmp_path / "out.safetensors").exists()


def test_mae_st_has_no_library_to_check_against(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--check has no part in converting MAE-ST"):
        convert(
            Convert(source=file_of(tmp_path, plain_names()), out=tmp_path / "o.safetensors", check=True, **HEADS)  # type: ignore[arg-type]
        )


def test_separable_positions_are_the_sum_of_both_and_are_resampled_apart() -> None:
    model, _ = converted_mae_st()
    positions = model.encoder.positions
    table = positions.table().reshape(4, 4, 32)
    for t in range(4):
        for s in range(4):
            assert torch.equal(table[t, s], positions.pos_time[t] + positions.pos_space[s])
    state = {n: v for n, v in model.state_dict().items() if n.startswith("encoder.")}
    larger = resampled(state, (4, 2, 2), (8, 3, 3))
    shapes = {n: tuple(v.shape) for n, v in larger.items() if "positions" in n}
    assert shapes == {"encoder.positions.pos_space": (9, 32), "encoder.positions.pos_time": (8, 32)}
    assert all(larger[n] is state[n] for n in state if "positions" not in n)
    same_times = resampled(state, (4, 2, 2), (4, 3, 3))
    assert torch.equal(same_times["encoder.positions.pos_time"], state["encoder.positions.pos_time"])


# VideoMAE

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 4,
    "num_frames": 6,
    "tubelet_size": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "use_mean_pooling": False,
}


def videomae(build: Any, **fields: Any) -> Any:
    model = build(VideoMAEConfig(**{**SIZES, **fields})).eval()
    fill(model)
    return model


def test_the_sinusoid_is_theirs() -> None:
    theirs = videomae(VideoMAEModel).embeddings.position_embeddings[0]
    assert_close(sinusoids_of_all(*theirs.shape), theirs, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("build", [VideoMAEForPreTraining, VideoMAEModel, VideoMAEForVideoClassification])
@pytest.mark.parametrize("fields", [{}, {"layer_norm_eps": 1e-3, "tubelet_size": 3}])
def test_videomaes_encoder(tmp_path: Path, build: Any, fields: dict[str, Any]) -> None:
    theirs = videomae(build, **fields)
    out = tmp_path / "out.safetensors"
    result = convert(Convert(source=saved(tmp_path / "hf", theirs), out=out))
    assert (result["kind"], result["parts"]) == ("videomae", ["encoder"])
    assert any(re.search("Compared with transformers .* tokens differ by", notice) for notice in result["notices"])
    model, _ = load_encoder(out)
    recipe = model.recipe
    assert (recipe.clip.frames, recipe.clip.grid) == (6, (6 // fields.get("tubelet_size", 2), 4, 4))
    assert recipe.network.norm_eps == fields.get("layer_norm_eps", 1e-12)
    x = torch.rand(2, 3, 6, 16, 16, generator=generator(4))
    mean, std = (torch.tensor(v).reshape(-1, 1, 1, 1) for v in (recipe.clip.mean, recipe.clip.std))
    body = theirs if build is VideoMAEModel else theirs.videomae
    expected = body(pixel_values=((x - mean) / std).transpose(1, 2)).last_hidden_state
    assert_close(model.encode(x), expected, rtol=1e-5, atol=1e-5)
    heads = {"decoder", "encoder_to_decoder", "mask_token", "classifier"}
    assert {name.split(".")[0] for name in result["left"]} <= heads


def test_a_videomae_that_was_fine_tuned_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", videomae(VideoMAEForVideoClassification, use_mean_pooling=True))
    with pytest.raises(ValueError, match=r"no last norm .* Give one with use_mean_pooling=False"):
        convert(Convert(source=folder, out=tmp_path / "out.safetensors"))


def test_a_videomae_of_another_library_is_compared_and_refused(tmp_path: Path) -> None:
    """What config.json says of it is what it is compared by: other heads compute something else."""
    folder = saved(tmp_path / "hf", videomae(VideoMAEModel))
    with pytest.raises(ValueError, match="tokens differ from transformers's by"):
        convert(Convert(source=folder, out=tmp_path / "out.safetensors", num_heads=8))


def test_without_its_config_a_videomae_is_taken_for_a_published_one(tmp_path: Path) -> None:
    wide = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 1}
    theirs = VideoMAEModel(VideoMAEConfig(**{**SIZES, **wide, "image_size": 224, "patch_size": 16, "num_frames": 16}))
    folder = saved(tmp_path / "hf", theirs)
    recipe, state, _, notices = from_videomae(safetensors.torch.load_file(folder / "model.safetensors"))
    assert (recipe.clip.frames, recipe.clip.height, recipe.encoder.num_heads) == (16, 224, 3)
    assert any("16 frames of 224 x 224, as the published ones" in notice for notice in notices)
    model_of(recipe, ("encoder",)).load_state_dict(state)


def test_names_tell_the_two_from_images() -> None:
    assert recognise(mae_st()) == "mae_st"
    assert recognise(videomae(VideoMAEModel).state_dict()) == "videomae"
