"""What is done to a model's blocks from outside: compiled, or computed again in the backward pass."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small import batch_for, networks, small_variant
from test_train import go, photo_recipe, write_pictures
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from unveil.checkpoint import WEIGHTS
from unveil.compiling import compile_blocks
from unveil.layers import blocks_of
from unveil.losses import Objective


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 12, classes=2)


def gradients(objective: Objective, *inputs: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Of a training step, by name; and the bytes that its forward pass kept."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    objective.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = objective.train()(*inputs)
        before = kept
    loss.backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}, before


@pytest.mark.parametrize("variant", networks())
def test_checkpointing_changes_no_gradient_and_keeps_less(variant: str) -> None:
    objective, clips, drawn = batch_for(small_variant(variant))
    plain, much = gradients(objective, clips, drawn)
    for block in blocks_of(objective):
        block.recompute = True
    again, little = gradients(objective, clips, drawn)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
    assert little < much / 2


def test_a_run_is_told_to_checkpoint(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights bit for bit, and every block asked to."""
    asked = []
    monkeypatch.setattr(
        "unveil.layers.checkpoint", lambda compute, *inputs, **named: asked.append(named) or compute(*inputs)
    )
    go(tmp_path / "plain", pictures)
    assert not asked
    go(tmp_path / "less", pictures, gradient_checkpointing=True)
    assert asked == [{"use_reentrant": False}] * len(asked)
    assert asked
    ours, theirs = (safetensors.torch.load_file(tmp_path / out / WEIGHTS) for out in ("plain", "less"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_machine_that_cannot_compile_says_so_and_trains(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("\nFailed to find C++ compiler. Please specify one.\nAnd many more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    told: list[str] = []
    recipe = photo_recipe(epochs=1)
    outcome = go(tmp_path / "run", pictures, recipe, lambda p: told.append(p.setup), compile=True)
    assert outcome["finished"]
    assert told[0].endswith("; not compiled, as this machine cannot: Failed to find C++ compiler. Please specify one.")
    assert len(told[0].splitlines()) == 1
    go(tmp_path / "eager", pictures, recipe)
    ours, theirs = (safetensors.torch.load_file(tmp_path / out / WEIGHTS) for out in ("run", "eager"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_run_is_told_to_compile(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, when it is trained; not when the run's sheet is painted."""
    compiled, called = [], set()

    def note(compute: Any) -> Any:
        compiled.append(compute)

        def call(*inputs: Any) -> Any:
            assert torch.is_grad_enabled()
            called.add(compute)
            return compute(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", note)
    recipe = photo_recipe()
    assert recipe.decoder is not None
    go(tmp_path / "run", pictures, recipe, compile=True)
    assert len(compiled) == 1 + recipe.encoder.depth + recipe.decoder.depth  # the first is the trial
    assert called == set(compiled)


def test_a_block_that_cannot_be_compiled_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trial did not show: one line for each such block, and the same numbers."""

    compiled: list[Any] = []

    def fails_later(compute: Any) -> Any:
        compiled.append(compute)

        def call(*inputs: Any) -> Any:
            if compute is compiled[0]:  # the trial's
                return compute(*inputs)
            raise TorchDynamoException("No room for its shared memory\nand more")

        return call

    objective, clips, drawn = batch_for(small_variant("diffmae"))
    plain, _ = gradients(objective, clips, drawn)
    monkeypatch.setattr(torch, "compile", fails_later)
    assert compile_blocks(objective.model, "cpu", bf16=False) is None
    with pytest.warns(UserWarning, match="Block stays uncompiled: No room for its shared memory$"):
        again, _ = gradients(objective, clips, drawn)
    assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())
    assert all(block.compiled is None for block in blocks_of(objective))


@pytest.mark.slow
def test_what_is_compiled_computes_the_same() -> None:
    objective, clips, drawn = batch_for(small_variant("diffmae"))
    plain, _ = gradients(objective, clips, drawn)
    counters.clear()
    assert compile_blocks(objective.model, "cpu", bf16=False) is None
    for block in blocks_of(objective):
        block.recompute = True
    compiled, _ = gradients(objective, clips, drawn)
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] < len(blocks_of(objective))  # one for each kind and shape
