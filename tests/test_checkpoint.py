"""Weight files describe themselves, are written whole or not at all, and say what is wrong with them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small import VARIANTS, build, clips_for, shipped, small, small_variant

from unveil import __version__
from unveil.checkpoint import (
    FORMAT,
    WEIGHTS,
    About,
    check_tensors,
    find_weights,
    load_encoder,
    load_model,
    read_header,
    save_weights,
    write_atomically,
)
from unveil.cli import main
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import generate, repaint
from unveil.recipe import recipe_from_dict, to_dict

ABOUT = About(step=7, images_seen=99, ema_decay=0.999, data="photos/", command="unveil pretrain --data photos/")


def save(path: Path, model: MaskedDiffusionAutoencoder) -> Path:
    save_weights(path, model.recipe, model.state_dict(), ABOUT)
    return path


def header_and_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save(tmp_path / WEIGHTS, build(small()))


def changed(path: Path, header: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Path:
    """The file again, with other header entries and tensors; None takes one out. `__` in a name stands for a dot."""
    metadata, values = header_and_tensors(path)
    for name, value in tensors.items():
        values.pop(name.replace("__", "."), None)
        if value is not None:
            values[name.replace("__", ".")] = value
    safetensors.torch.save_file(values, path, {**metadata, **(header or {})})
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_equals_the_saved_one(tmp_path: Path, variant: str) -> None:
    model = build(small_variant(variant))
    loaded, about = load_model(save(tmp_path / WEIGHTS, model))
    assert loaded.recipe == model.recipe
    assert about == ABOUT
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    clips = clips_for(model.recipe)
    assert torch.equal(model.encode(clips), loaded.encode(clips))


def test_a_file_describes_itself_to_other_programs(weights: Path) -> None:
    """The header is plain JSON: recipe, target, normalisation, data, step, EMA, command and version."""
    metadata, tensors = header_and_tensors(weights)
    assert metadata["format"] == FORMAT
    recipe, about = json.loads(metadata["recipe"]), json.loads(metadata["about"])
    (branch,) = recipe["branches"]
    assert (branch["noise_on"], branch["mask_ratio"], branch["share"]) == ("hidden", 0.75, 1.0)
    assert branch["terms"] == [{"predict": "x0", "on": "hidden", "weight": 1.0, "patch_norm": False, "space": "plain"}]
    assert recipe["clip"]["mean"] == [0.5] * 3
    assert recipe["size"] == "Nano/4"
    assert about == {**to_dict(ABOUT), "classes": [], "parts": [], "version": __version__}
    assert about["ema_decay"] == 0.999
    assert tensors.keys() == build(small()).state_dict().keys()


def test_the_header_is_read_without_the_tensors(weights: Path) -> None:
    recipe, about, shapes = read_header(weights.parent)
    assert recipe == small()
    assert about == ABOUT
    assert shapes == {name: tuple(v.shape) for name, v in build(small()).state_dict().items()}


@pytest.mark.parametrize(
    "about",
    [
        dataclasses.replace(ABOUT, ema_decay=None),
        dataclasses.replace(ABOUT, ema_decay=0.9999),
        dataclasses.replace(ABOUT, classes=("cat", "dog", "Übergröße")),
    ],
)
def test_what_a_file_says_of_itself_is_read_back(tmp_path: Path, about: About) -> None:
    model = build(small())
    save_weights(tmp_path / WEIGHTS, model.recipe, model.state_dict(), about)
    assert read_header(tmp_path)[1] == load_model(tmp_path)[1] == about


def test_a_header_without_classes_is_of_a_model_without(weights: Path) -> None:
    about = to_dict(ABOUT)
    del about["classes"]
    assert load_model(changed(weights, {"about": json.dumps(about)}))[1] == ABOUT


def test_a_directory_and_a_file_both_name_weights(weights: Path) -> None:
    assert find_weights(weights) == find_weights(weights.parent) == find_weights(str(weights)) == weights


def test_a_missing_file_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_model(tmp_path)


def test_a_missing_tensor_refuses(weights: Path) -> None:
    changed(weights, encoder__norm__weight=None)
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ tensors .*'encoder\.'.*damaged"):
        load_model(weights)


def test_an_encoder_alone_refuses(weights: Path) -> None:
    names = [name for name in header_and_tensors(weights)[1] if name.startswith("decoder.")]
    changed(weights, **{name.replace(".", "__"): None for name in names})
    with pytest.raises(
        ValueError, match=rf"lacks {len(names)} of \d+ tensors \(all under 'decoder\.'\): .*whole decoder"
    ):
        load_model(weights)


def test_tensors_missing_in_several_parts_refuse(weights: Path) -> None:
    names = [name for name in header_and_tensors(weights)[1] if name.endswith(".norm.weight")]
    assert len({name.split(".")[0] for name in names}) == 2
    changed(weights, **{name.replace(".", "__"): None for name in names})
    with pytest.raises(ValueError, match=rf"lacks {len(names)} of .*the first is '{min(names)}'"):
        load_model(weights)


def test_an_extra_tensor_refuses(weights: Path) -> None:
    changed(weights, condition__time__fc3__weight=torch.zeros(3))
    with pytest.raises(ValueError, match=r"holds 1 tensors that its recipe does not have, as 'condition\.time\.fc3"):
        load_model(weights)


def test_a_tensor_of_another_shape_refuses(weights: Path) -> None:
    changed(weights, encoder__norm__weight=torch.zeros(31))
    with pytest.raises(ValueError, match=r"'encoder\.norm\.weight' as \(31,\), but its recipe makes it \(32,\)"):
        load_model(weights)


def test_a_tensor_transposed_refuses() -> None:
    with pytest.raises(ValueError, match=r"'w' as \(2, 3\)"):
        check_tensors(Path("x"), {"w": (3, 2)}, {"w": (2, 3)})


@pytest.mark.parametrize("keep", [0, 4, 200, -10])
def test_a_truncated_file_refuses(weights: Path, keep: int) -> None:
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot be read as safetensors .*Is the file whole") as caught:
        load_model(weights)
    assert "\n" not in str(caught.value)


def test_another_kind_of_file_refuses(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_model(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "unveil-3"}, {"format": "unveil"}])
def test_a_file_that_does_not_describe_itself_refuses(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match="does not describe itself as unveil-2"):
        load_model(path)


def test_a_file_of_the_first_version_refuses_with_a_sentence_of_its_own(weights: Path) -> None:
    with pytest.raises(
        ValueError, match=r"was written by Unveil 0\.1, .*Train it again, or read it with that"
    ) as caught:
        load_model(changed(weights, {"format": "unveil-1"}))
    assert str(weights) in str(caught.value)
    assert "describe itself" not in str(caught.value)


def edited(section: str | None, variant: str = "diffmae", **fields: Any) -> dict[str, str]:
    """The header of a recipe with some fields changed, of a section such as "branches.0"; ... takes a field out."""
    recipe = json.loads(json.dumps(to_dict(small_variant(variant))))
    part = recipe
    for step in section.split(".") if section else ():
        part = part[int(step) if step.isdecimal() else step]
    for name, value in fields.items():
        part.pop(name, None)
        if value is not ...:
            part[name] = value
    return {"recipe": json.dumps(recipe)}


@pytest.mark.parametrize(
    "header, message",
    [
        (
            edited("branches.0", mask_ration=0.5),
            r"Unknown field 'mask_ration' in Recipe\.branches\[0\]\. Did you mean 'mask_ratio'\?",
        ),
        (edited(None, banches={}), r"Unknown field 'banches' in Recipe\. Did you mean 'branches'\?"),
        (edited("branches.0", noise_on=...), r"Recipe\.branches\[0\] lacks the field 'noise_on'"),
        (edited("branches.0", noise_on="hiden"), r"noise_on='hiden'.*Did you mean 'hidden'\?"),
        (edited("branches.1", "umd", share=0.4), r"branches of the shares \[0\.5, 0\.4\]; they must sum to 1"),
        (edited(None, branches=[]), r"branches of the shares \[\]; they must sum to 1"),
        (edited(None, branches={}), r"Recipe\.branches is \{\}, but it must be a list"),
        (edited(None, "umd", branches=["umd"]), r"Recipe\.branches\[0\] is 'umd', but it must be a section"),
        (
            edited("branches.1.terms.0", "umd", predict="epsilon"),
            r"Term has predict='epsilon', which does not exist\. Did you mean 'eps'\?",
        ),
        (edited("branches.1.terms.0", "umd", weight="half"), r"branches\[1\]\.terms\[0\]\.weight is 'half'"),
        (edited("branches.1.terms.0", "umd", wait=1), r"Unknown field 'wait' in Recipe\.branches\[1\]\.terms\[0\]\."),
        (
            edited("branches.1.terms.0", "umd", on="hidden"),
            r"predicts 'eps' on hidden tokens.*there is no noise on them",
        ),
        (edited("network", positions="rotery"), r"positions='rotery'.*Did you mean 'rotary'\?"),
        (edited("condition", "umd", time="none"), r"has noise but time='none'"),
        (edited("condition", num_classes=-1), r"num_classes=-1"),
        (edited("training", ema_decay=0.9), r"Unknown field 'ema_decay' in .*training\. Did you mean 'ema_decays'\?"),
        (edited("training", ema_decays=[1.0]), r"ema_decays=\(1\.0,\)"),
        (edited("training", grad_clip=0), r"grad_clip=0"),
        (edited("training", lr_schedule="cosin"), r"lr_schedule='cosin'.*Did you mean 'cosine'\?"),
        (edited("encoder", depth="3"), r"Recipe\.encoder\.depth is '3', but it must be of type int"),
        (edited("encoder", depth=True), r"Recipe\.encoder\.depth is True"),
        (edited("clip", height=15), r"height=15, which patch_size=4 does not divide"),
        (edited(None, clip=3), r"Recipe\.clip is 3, but it must be a section"),
        ({"recipe": "{"}, "cannot read"),
        ({"about": "{}"}, "cannot read"),
        ({"about": json.dumps({**to_dict(ABOUT), "mood": "fine"})}, "mood"),
        ({"about": json.dumps({**to_dict(ABOUT), "ema": True})}, "ema"),
    ],
)
def test_a_header_that_does_not_fit_refuses(weights: Path, header: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(changed(weights, header))
    assert str(weights) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_recipe_survives_its_header() -> None:
    for variant in VARIANTS:
        for recipe in (small_variant(variant), shipped(variant)):
            assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_a_write_that_fails_leaves_the_old_file(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights.read_bytes()

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half of a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        save(weights, build(small(), seed=1))
    assert weights.read_bytes() == before
    assert [p.name for p in weights.parent.iterdir()] == [WEIGHTS]  # and nothing half-written lies about


def test_the_new_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    seen = []

    def write(part: Path) -> None:
        part.write_bytes(b"first half")
        seen.append((path.exists(), part.parent == path.parent))
        part.write_bytes(b"all of it")

    write_atomically(path, write)
    assert seen == [(False, True)]  # in the same directory, because a rename is atomic within a file system only
    assert path.read_bytes() == b"all of it"


# Encoders only


def encoder_only(path: Path, model: MaskedDiffusionAutoencoder, **about: Any) -> Path:
    state = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    save_weights(path, model.recipe, state, dataclasses.replace(ABOUT, parts=("encoder",), **about))
    return path


@pytest.mark.parametrize("name", ["mae", "mae_raw", "diffmae"])
def test_an_encoder_only_file_encodes_as_the_whole_model(tmp_path: Path, name: str) -> None:
    model = build(small(name))
    before = torch.random.get_rng_state()
    loaded, about = load_encoder(encoder_only(tmp_path / WEIGHTS, model))
    assert torch.equal(before, torch.random.get_rng_state())
    assert about.parts == loaded.parts == ("encoder",)
    assert loaded.can == {"represent"}
    assert not loaded.training
    clips = clips_for(model.recipe)
    assert torch.equal(model.encode(clips), loaded.encode(clips))
    assert {n.split(".")[0] for n in loaded.state_dict()} == {"encoder"}


def test_load_encoder_reads_a_whole_file_too(weights: Path) -> None:
    loaded, about = load_encoder(weights)
    clips = clips_for(loaded.recipe)
    assert about.parts == loaded.parts == ()
    assert torch.equal(loaded.encode(clips), load_model(weights)[0].encode(clips))
    assert loaded.can == load_model(weights)[0].can


def test_load_model_refuses_an_encoder_only(tmp_path: Path) -> None:
    path = encoder_only(tmp_path / WEIGHTS, build(small("mae")))
    with pytest.raises(
        ValueError, match=r"holds an encoder only, so it cannot paint or be trained on as it is\. Use it for"
    ):
        load_model(path)


def test_an_encoder_only_refuses_to_paint(tmp_path: Path) -> None:
    model: Any = load_encoder(encoder_only(tmp_path / WEIGHTS, build(small("mae_raw"))))[0]
    clips = clips_for(model.recipe)
    with pytest.raises(ValueError, match="This mae_raw is an encoder only, so it predicts nothing"):
        repaint(model, clips, torch.zeros(2, 1, 16, 16, dtype=torch.bool), num_steps=2)
    with pytest.raises(ValueError, match="This mae_raw is an encoder only, so it predicts nothing"):
        generate(model, range(2), num_steps=2)


@pytest.mark.parametrize(
    "name, parts, message",
    [
        ("umd", ("encoder",), "computes nothing without the model's other parts"),
        ("dit", ("encoder",), "computes nothing without the model's other parts"),
        ("mae", ("decoder",), "A model has parts=('decoder',); that is () for all of it, or ('encoder',)."),
    ],
)
def test_load_encoder_refuses_parts_that_do_not_work(
    tmp_path: Path, name: str, parts: tuple[str, ...], message: str
) -> None:
    model = build(small(name))
    save_weights(tmp_path / WEIGHTS, model.recipe, model.state_dict(), dataclasses.replace(ABOUT, parts=parts))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_encoder(tmp_path)


def test_load_encoder_refuses_tensors_of_a_decoder_in_an_encoder_only(tmp_path: Path) -> None:
    model = build(small("mae"))
    save_weights(tmp_path / WEIGHTS, model.recipe, model.state_dict(), dataclasses.replace(ABOUT, parts=("encoder",)))
    with pytest.raises(ValueError, match=r"tensors that its recipe does not have, as 'decoder\."):
        load_encoder(tmp_path)


def test_info_and_probe_of_an_encoder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = encoder_only(tmp_path / WEIGHTS, build(small("mae", size="Nano/2", channels=1, height=8)))
    main(["info", "--run", str(path)])
    told = capsys.readouterr().out
    assert "parts          the encoder only" in told
    assert "trains on" not in told
    assert "tensors        all there" in told
    main(["probe", "--run", str(path), "--data", "digits:train", "--no-baselines", "--device", "cpu"])
    assert "encoder" in capsys.readouterr().out
