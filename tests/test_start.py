"""Pre-training that starts from other weights: what is taken over, what is drawn, and what is refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small import build, clips_for, small
from torch import Tensor

from unveil.checkpoint import LAST, WEIGHTS, About, load_model, save_weights
from unveil.cli import main
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pretraining import recipe_of
from unveil.recipe import Recipe
from unveil.tasks.pretrain import Pretrain, pretrain

ABOUT = About(step=7, images_seen=99, ema_decay=None, data="photos/", command="unveil pretrain --data photos/")


def digits(name: str = "mae", **fields: Any) -> Recipe:
    """What `unveil pretrain --data digits:test --recipe NAME` makes, with fields of its sections replaced."""
    recipe = recipe_of(Pretrain(data="digits:test", out=Path("x"), recipe=name))  # type: ignore[arg-type]
    sections = {name: dataclasses.replace(getattr(recipe, name), **values) for name, values in fields.items()}
    return dataclasses.replace(recipe, **sections)


def save(path: Path, recipe: Recipe, encoder_only: bool = False) -> tuple[Path, dict[str, Tensor]]:
    state = build(recipe).state_dict()
    if encoder_only:
        state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    about = dataclasses.replace(ABOUT, parts=("encoder",) if encoder_only else ())
    save_weights(path, recipe, state, about)
    return path, state


def go(out: Path, init: Path | None, **options: Any) -> dict[str, Any]:
    given = {"data": "digits:test", "epochs": 1, "blr": 1e-30, "device": "cpu", "recipe": "mae", **options}
    return pretrain(Pretrain(out=out, init=init, **given))


def weights(out: Path) -> dict[str, Tensor]:
    return load_model(out / LAST)[0].state_dict()


def equal_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """After steps of next to no length, and of no decay."""
    return torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("encoder_only", [False, True])
def test_the_run_starts_from_these_weights(tmp_path: Path, encoder_only: bool) -> None:
    path, state = save(tmp_path / "start.safetensors", digits(), encoder_only)
    result = go(tmp_path / "run", path)
    trained = weights(tmp_path / "run")
    assert result["start"] == "mae Nano/2"
    assert (result["loaded"], result["tensors"]) == (len(state), len(trained))
    assert result["dropped"] == []
    assert result["fresh"] == (["decoder", "head"] if encoder_only else [])
    drawn = MaskedDiffusionAutoencoder(digits()).state_dict()
    for name, value in state.items():
        assert equal_but_for_rounding(trained[name], value), name
        assert not equal_but_for_rounding(drawn[name], value), name


def test_another_recipe_takes_the_encoder(tmp_path: Path) -> None:
    """MAE's encoder for DiffMAE, whose decoder and time are its own."""
    path, state = save(tmp_path / "start.safetensors", digits("mae_raw"))
    result = go(tmp_path / "run", path, recipe="diffmae")
    trained = weights(tmp_path / "run")
    of_encoder = [name for name in state if name.startswith("encoder.")]
    assert all(equal_but_for_rounding(trained[name], state[name]) for name in of_encoder)
    assert "condition" in result["fresh"]
    assert "decoder.mask_token" in result["dropped"]


def test_normalisation_eps_and_positions_come_along(tmp_path: Path) -> None:
    origin = digits(network={"norm_eps": 1e-3, "positions": "learned"}, clip={"mean": (0.3,), "std": (0.2,)})
    path, _ = save(tmp_path / "start.safetensors", origin, encoder_only=True)
    result = go(tmp_path / "run", path)
    model, _ = load_model(tmp_path / "run" / LAST)
    assert model.recipe.network == origin.network
    assert model.recipe.clip == origin.clip
    assert "decoder" in result["fresh"]
    started = build(origin)
    clips = clips_for(origin)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(clips), started.encode(clips), rtol=1e-5, atol=1e-5)


def test_fixed_positions_are_made_for_another_grid(tmp_path: Path) -> None:
    path, state = save(tmp_path / "start.safetensors", digits(clip={"height": 16, "width": 16}), encoder_only=True)
    result = go(tmp_path / "run", path)
    assert result["loaded"] == len(state)


def test_another_start_is_another_run(tmp_path: Path) -> None:
    first, _ = save(tmp_path / "first.safetensors", digits())
    second, _ = save(tmp_path / "second.safetensors", digits())
    go(tmp_path / "run", first)
    assert go(tmp_path / "run", first)["steps_now"] == 0
    with pytest.raises(ValueError, match=r"holds another run: start was '.*first.*' and is now '.*second"):
        go(tmp_path / "run", second)
    with pytest.raises(ValueError, match=r"holds another run: start was '.*first.*' and is now None"):
        go(tmp_path / "run", None)


def test_the_command_tells_what_it_started_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = save(tmp_path / WEIGHTS, digits(), encoder_only=True)
    words = f"pretrain --data digits:test --out {tmp_path / 'run'} --recipe mae --epochs 1 --device cpu --init {path}"
    main(words.split())
    told = capsys.readouterr().out
    assert f"Started from mae Nano/2: {len(state)} of" in told
    assert "New, and drawn at random: decoder, head." in told
    main(words.split())
    again = capsys.readouterr().out
    assert "Started from" not in again
    assert "Finished before, so nothing was done" in again


@pytest.mark.parametrize(
    "origin, message",
    [
        (digits(encoder={"embed_dim": 64}), "its encoder has embed_dim=64, but mae Nano/2 has 96"),
        (digits(encoder={"depth": 3}, decoder={"taps": (3,)}), "its encoder has depth=3, but mae Nano/2 has 4"),
        (digits(encoder={"num_heads": 2}), "its encoder has num_heads=2, but mae Nano/2 has 4"),
        (digits(clip={"patch_size": 4}), "its encoder has patch_size=4, but mae Nano/2 has 2"),
        (small("mae"), "its encoder has channels=3, but mae Nano/2 has 1"),
        (digits(clip={"bounded": False}), "its encoder has bounded=False, but mae Nano/2 has True"),
        (digits(network={"mlp": "swiglu"}), "its encoder has mlp='swiglu', but mae Nano/2 has 'gelu'"),
        (digits(network={"norm": "rms"}), "its encoder has norm='rms', but mae Nano/2 has 'layer'"),
        (digits(network={"qk_norm": True}), "its encoder has qk_norm=True, but mae Nano/2 has False"),
        (digits(network={"positions": "rotary"}), "its encoder has rotary positions=True, but mae Nano/2 has False"),
        (
            digits(network={"positions": "learned"}, clip={"height": 12, "width": 12}),
            "its learned positions are of a grid of (1, 6, 6) tokens (time, rows, columns), but here it is (1, 4, 4). Use its "
            "--image-size, 12x12",
        ),
    ],
)
def test_init_refuses(tmp_path: Path, origin: Recipe, message: str) -> None:
    path, _ = save(tmp_path / "start.safetensors", origin)
    with pytest.raises(ValueError, match=re.escape(message)):
        go(tmp_path / "run", path)
    assert not (tmp_path / "run").exists()
