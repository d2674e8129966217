"""Models by name, from folders and the hub and back; the package's front door and the short examples."""

import ast
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small import build, clips_for, small

import unveil
from unveil import hub, recipes
from unveil.checkpoint import WEIGHTS, About, load_model, read_header, save_weights
from unveil.pretrained import (
    SIZES,
    create_model,
    from_pretrained,
    model_card,
    push_to_hub,
    recipe_of_name,
    save_pretrained,
)

ABOUT = About(step=7, images_seen=70, ema_decay=0.5, data="photos/", command="unveil pretrain", classes=("cat", "dog"))
EXAMPLES = Path(__file__).parents[1] / "examples"


def save(run: Path, name: str, **arguments: Any) -> Path:
    model = build(small(name, **arguments))
    save_weights(run / WEIGHTS, model.recipe, model.state_dict(), ABOUT)
    return run


# Names


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("diffmae_vit_base_patch16_224", recipes.diffmae("B/16", height=224)),
        ("umd_vit_small_patch4_64", recipes.umd("S/4", height=64)),
        ("mae_vit_huge_patch14_224", recipes.mae("H/14", height=224)),
        ("dit_vit_xlarge_patch2_32", recipes.dit("XL/2", height=32)),
        ("maskdit_umd_vit_nano_patch2_8", recipes.maskdit_umd("Nano/2", height=8)),
    ],
)
def test_a_name_is_a_recipe(name: str, recipe: Any) -> None:
    assert recipe_of_name(name) == recipe


def test_every_size_has_a_word() -> None:
    assert set(SIZES.values()) == set(recipes.ENCODERS)
    assert recipe_of_name("umd_vit_nano_patch2_8", channels=1).clip.channels == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_base_patch16_224", "There is no model 'vit_base_patch16_224'. Names are recipe_vit_size_patchP_PIXELS"),
        (
            "difmae_vit_base_patch16_224",
            "There is no recipe 'difmae' for 'difmae_vit_base_patch16_224'. Did you mean 'diffmae'?",
        ),
        (
            "diffmae_vit_bas_patch16_224",
            "There is no size 'bas' for 'diffmae_vit_bas_patch16_224'. Did you mean 'base'?",
        ),
        ("diffmae_vit_base_patch16_225", "Clip has height=225, which patch_size=16 does not divide"),
    ],
)
def test_a_name_refuses(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe_of_name(name)


def test_a_created_model_is_drawn_by_its_seed() -> None:
    made = [create_model("diffmae_vit_nano_patch4_16", seed=seed).state_dict() for seed in (1, 1, 2)]
    name = "encoder.blocks.0.attn.qkv.weight"
    assert made[0][name].equal(made[1][name])
    assert not made[0][name].equal(made[2][name])


# Folders


@pytest.mark.parametrize("name", ["mae", "diffmae", "umd", "dit"])
def test_a_saved_model_comes_back(tmp_path: Path, name: str) -> None:
    model, about = load_model(save(tmp_path / "run", name))
    folder = save_pretrained(tmp_path / "new", model, about, license="mit")
    back = from_pretrained(folder)
    for key, value in model.state_dict().items():
        assert value.equal(back.state_dict()[key])
    assert read_header(folder)[1] == about
    assert back.recipe == model.recipe


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    model, about = load_model(save(tmp_path / "run", "mae"))
    for taken in (tmp_path / "run", tmp_path / "run" / WEIGHTS):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            save_pretrained(taken, model, about)


@pytest.mark.parametrize(
    "name, can", [("mae", "represent"), ("diffmae", "repaint, represent"), ("umd", "generate, repaint, represent"),
                  ("diffmae all hidden", "generate, represent")],
)  # fmt: skip
def test_a_card_says_what_it_is_and_its_example_runs(tmp_path: Path, name: str, can: str) -> None:
    arguments = {"mask_ratio": 1.0} if "hidden" in name else {}
    model, about = load_model(save(tmp_path / "run", name.split()[0], **arguments))
    folder = save_pretrained(tmp_path / "new", model, about, license="apache-2.0")
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["library_name"], header["license"]) == ("unveil", "apache-2.0")
    assert f"| can | {can} |" in card
    assert "| trained for | 7 steps, 70 pictures |" in card
    assert "| classes | cat, dog |" in card
    assert "| weights | running average of decay 0.5 |" in card
    code = card.split("```python\n")[1].split("```")[0].replace("num_steps=50", "num_steps=2")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["tokens"].shape == (4, model.recipe.encoder.num_class_tokens + 16, 32)
    assert ("painted" in names) == ("repaint" in can)
    assert "license: " not in model_card(model, about, "x")
    assert "none was chosen" in model_card(model, about, "x")


# The hub


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub in a folder, in place of the network; notes what was asked."""
    huggingface_hub = importlib.import_module("huggingface_hub")
    asked: dict[str, Any] = {"downloads": []}
    store = tmp_path / "hub"

    class HfApi:
        def __init__(self, **options: Any) -> None:
            asked["options"] = options

        def create_repo(self, repo: str, **options: Any) -> None:
            asked["created"] = (repo, options)
            (store / repo).mkdir(parents=True)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
            for file in Path(folder_path).iterdir():
                (store / repo_id / file.name).write_bytes(file.read_bytes())
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def hf_hub_download(repo: str, file: str, revision: str | None, library_name: str) -> str:
        asked["downloads"].append((repo, file, revision))
        if not (store / repo / file).exists():
            raise OSError("404: not there")
        return str(store / repo / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


def test_to_the_hub_and_back(tmp_path: Path, on_the_hub: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, about = load_model(save(tmp_path / "run", "diffmae"))
    address = push_to_hub("me/mine", model, about, license="mit", private=True, token="secret")
    assert address == "https://hub/me/mine/commit/1"
    assert on_the_hub["created"] == ("me/mine", {"private": True, "exist_ok": True})
    assert on_the_hub["options"]["token"] == "secret"
    back = from_pretrained("hf:me/mine@v1")
    assert on_the_hub["downloads"][-1] == ("me/mine", WEIGHTS, "v1")
    clips = clips_for(model.recipe)
    assert back.encode(clips).equal(model.encode(clips))
    assert "from_pretrained('hf:me/mine')" in (tmp_path / "hub/me/mine/README.md").read_text()
    from unveil import cli

    cli.main(["info", "--run", "hf:me/mine"])  # every command takes such a name
    assert "diffmae" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hf:mine", "hf:", "hf:/mine", "hf:me/", "hf:me/my/own"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name on the hub: write hf:owner/model"):
        hub.parse(name)


def test_what_is_not_there_is_told(on_the_hub: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"hf:me/none: model.safetensors cannot be had from the hub \(404: not there\)"
    ):
        from_pretrained("hf:me/none")


def test_without_a_network_a_sentence() -> None:
    code = "import unveil\ntry: unveil.from_pretrained('hf:me/none')\nexcept ValueError as error: print(error)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert "hf:me/none: model.safetensors cannot be had from the hub" in run.stdout, run.stderr
    assert run.stdout.count("\n") == 1


def test_without_the_library_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"which needs huggingface_hub\. Run pip install 'unveil\[hub\]'"):
        from_pretrained("hf:me/mine")
    model, about = load_model(save(tmp_path / "run", "mae"))
    with pytest.raises(ValueError, match=r"Uploading needs huggingface_hub\. Run pip install 'unveil\[hub\]'"):
        push_to_hub("me/mine", model, about)


# The front door


def test_the_front_door_is_what_type_checkers_are_told() -> None:
    stub = ast.parse(Path(unveil.__file__).with_suffix(".pyi").read_text())
    told = {
        alias.asname: f"{node.module}" for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: f"unveil.{home}" for name, home in unveil._HOMES.items()} == told
    assert len(told) == 13
    for name in told:
        assert callable(getattr(unveil, name))
        assert name in dir(unveil)
    with pytest.raises(AttributeError, match="module 'unveil' has no attribute 'nothing'"):
        unveil.nothing  # type: ignore[attr-defined] # noqa: B018


def test_importing_the_package_is_light() -> None:
    code = "import sys, unveil; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            values = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def example(name: str, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_short_examples_are_short_and_run(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    real = unveil.pretrain

    def fewer(**options: Any) -> dict[str, Any]:
        given.update(options)
        return real(**{**options, "size": "Nano/8", "epochs": 1})

    monkeypatch.setitem(vars(unveil), "pretrain", fewer)
    example("train_on_your_folder.py", photos, tmp_path / "run", monkeypatch=monkeypatch)
    assert (given["epochs"], given["size"]) == (200, "Micro/8")
    assert "20 pictures seen; look at " in capsys.readouterr().out
    example(
        "repaint_a_photo.py", tmp_path / "run", photos / "a/0.png", tmp_path / "painted.png", monkeypatch=monkeypatch
    )
    with Image.open(tmp_path / "painted.png") as painted:
        assert painted.size == (5 * 64, 64)
    example("probe_your_folder.py", tmp_path / "run", photos, monkeypatch=monkeypatch)
    assert "raw pixels: linear " in capsys.readouterr().out
    with np.load(tmp_path / "features.npz") as features:
        assert features["features"].shape == (20, 96)
    for name in ("train_on_your_folder.py", "repaint_a_photo.py", "probe_your_folder.py"):
        assert len((EXAMPLES / name).read_text().splitlines()) <= 60
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(SystemExit, match="python examples/"):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_functions_take_the_commands_words(tmp_path: Path, photos: Path) -> None:
    run = save(tmp_path / "run", "diffmae", channels=3)
    result = unveil.finetune(run=str(run), data=str(photos), out=str(tmp_path / "out"), epochs=1, device="cpu")
    assert (result["task"], result["finished"]) == ("single", True)
    made = unveil.predict(run=str(tmp_path / "out"), data=str(photos), out=str(tmp_path / "told.csv"), device="cpu")
    assert made["samples"] == 20
    with pytest.raises(TypeError, match="epoch"):
        unveil.finetune(run=str(run), data=str(photos), out=str(tmp_path / "other"), epoch=1)


def test_the_encoder_of_the_whole_model_is_that_of_the_front_door(tmp_path: Path) -> None:
    run = save(tmp_path / "run", "mae")
    model = unveil.from_pretrained(str(run))
    clips = clips_for(model.recipe)
    assert torch.equal(model.encode(clips), unveil.load_model(run)[0].encode(clips))
