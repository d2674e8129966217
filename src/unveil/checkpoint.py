"""Weights that describe themselves, and loading that says what is missing."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from unveil import __version__
from unveil.finetuning import Recognition
from unveil.hub import download, is_remote
from unveil.model import AnyModel, MaskedDiffusionAutoencoder, model_of
from unveil.recipe import Recipe, recipe_from_dict, section_from_dict, to_dict

FORMAT = "unveil-2"
WEIGHTS, LAST, BEST = "model.safetensors", "last.safetensors", "best.safetensors"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a weights file says of itself beside its recipe.

    ema_decay: of the running average that the weights are; None for weights as trained. data: what it was trained on, as
    given by the user. classes: their names, of a model with classes. num_steps: how many the run is to have; None if not known.
    parts: () if the whole model is in the file; ("encoder",) if nothing else is.
    """

    step: int
    images_seen: int
    ema_decay: float | None
    data: str
    command: str
    classes: tuple[str, ...] = ()
    num_steps: int | None = None
    parts: tuple[str, ...] = ()
    version: str = __version__


@dataclass(frozen=True, kw_only=True)
class FromRun:
    """Options of a command that starts from a model."""

    run: Path
    """A run directory, a weights file, or a model on the Hugging Face hub, as hf:owner/model or hf:owner/model@revision."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write into; it takes the place of `path` at the end, and is removed by an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, write: Any) -> None:
    """Call write(temporary path) and move the result into place, so that a crash leaves the old file or the new."""
    with replacing(path) as part:
        try:
            write(part)
        except (safetensors.SafetensorError, RuntimeError) as error:  # what the writers make of a full disk
            raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}). Is the disk full?") from None


def _described(recipe: Recipe, about: About, recognition: Recognition | None = None) -> dict[str, str]:
    """What a weights file's header says."""
    metadata = {"format": FORMAT, "recipe": json.dumps(to_dict(recipe)), "about": json.dumps(to_dict(about))}
    if recognition is not None:
        metadata["recognition"] = json.dumps(to_dict(recognition))
    return metadata


def weights_bytes(recipe: Recipe, state: dict[str, Tensor], about: About) -> int:
    """The size of the file that `save_weights` would write, from names and shapes alone; the tensors may be on "meta"."""
    header: dict[str, Any] = {"__metadata__": _described(recipe, about)}
    end = 0
    # safetensors lays them out by the size of their type, then by name, and numbers the bytes in that order
    for name, value in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + value.nbytes
        kind = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}[value.dtype]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end  # the header's length, the header filled up with spaces, the values


def save_weights(
    path: Path, recipe: Recipe, state: dict[str, Tensor], about: About, recognition: Recognition | None = None
) -> None:
    """Write tensors with the recipe and what else is known of them as JSON in the file's own header.

    recognition: of a fine-tuned network, which is the recipe's encoder with a head on it.
    """
    metadata = _described(recipe, about, recognition)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomically(path, lambda part: safetensors.torch.save_file(tensors, part, metadata))


def find_weights(path: str | Path) -> Path:
    """The weights file that a user means by a run directory, a file, or a name on the hub, `hf:owner/model`."""
    if is_remote(path):
        return download(str(path), WEIGHTS)
    path = Path(path)
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            below = sorted(str(p.parent) for p in path.glob(f"*/{WEIGHTS}"))
            hint = (
                f"Did you mean {' or '.join(below)}?"
                if below
                else "It is no run directory, or nothing was saved in it yet."
            )
            raise ValueError(f"{path} holds no {WEIGHTS}. {hint}")
        return path / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give a run directory or a .safetensors file.")
    return path


def read_recognition(path: str | Path) -> Recognition | None:
    """What a fine-tuned network's file says of its head; None for a file of another kind, or none."""
    try:
        with safetensors.safe_open(find_weights(path), framework="pt") as file:
            written = (file.metadata() or {}).get("recognition")
    except (safetensors.SafetensorError, OSError):
        return None  # `read_header` says what is wrong with it
    try:
        return None if written is None else section_from_dict(Recognition, json.loads(written))
    except ValueError as error:
        raise ValueError(f"{path} has a header that this version ({__version__}) cannot read: {error}") from None


def read_header(path: str | Path) -> tuple[Recipe, About, dict[str, tuple[int, ...]]]:
    """Recipe, description and tensor shapes of a weights file, without reading the tensors."""
    path = find_weights(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}). Is the file whole?") from None
    if metadata.get("format") == "unveil-1":
        raise ValueError(
            f"{path} was written by Unveil 0.1, whose models had other parts. Train it again, or read it with that version."
        )
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} does not describe itself as {FORMAT} (format={metadata.get('format')!r}), so its recipe is unknown."
        )
    try:
        recipe = recipe_from_dict(json.loads(metadata["recipe"]))
        described = json.loads(metadata["about"])
        lists = {name: tuple(described.get(name, ())) for name in ("classes", "parts")}
        about = About(**{**described, **lists})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a header that this version ({__version__}) cannot read: {error}") from None
    return recipe, about, shapes


def check_tensors(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Refuse a file that lacks tensors, holds others, or holds them in another shape, and say which."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        parts = sorted({name.split(".")[0] for name in missing})
        under = f"all under {parts[0] + '.'!r}" if len(parts) == 1 else f"the first is {missing[0]!r}"
        whole = {name for name in expected if name.split(".")[0] in parts} == set(missing)
        hint = (
            f"it lacks the whole {' and '.join(parts)}; only a file with all parts can be loaded."
            if whole
            else "the file is damaged or was written by other code; take another copy."
        )
        raise ValueError(f"Checkpoint {path} lacks {len(missing)} of {len(expected)} tensors ({under}): {hint}")
    if extra:
        raise ValueError(
            f"Checkpoint {path} holds {len(extra)} tensors that its recipe does not have, as {extra[0]!r}."
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"Checkpoint {path} holds {name!r} as {found[name]}, but its recipe makes it {shape}.")


def pick_device(device: str | None) -> str:
    """The device that was asked for, if it can be used; otherwise CUDA if there is one, else the CPU."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("meta"):
        raise ValueError(f"--device {device} computes nothing. Use cpu, or cuda.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[MaskedDiffusionAutoencoder, About]:
    """Build the model that a weights file describes and fill it; every tensor must be there and fit.

    Raises:
        ValueError: the file does not fit its own description, or holds an encoder only.
    """
    _, about, _ = read_header(path)
    if about.parts:
        raise ValueError(
            f"{find_weights(path)} holds an encoder only, so it cannot paint or be trained on as it is. Use it for probe or "
            "embed, or start a pre-training from it with `unveil pretrain --init`."
        )
    model, about = load_encoder(path, device)
    assert isinstance(model, MaskedDiffusionAutoencoder)
    return model, about


def fill(model: nn.Module, file: Path, found: dict[str, tuple[int, ...]]) -> None:
    """Load a file's tensors, of which `read_header` found these; every one must be there, fit, and hold numbers.

    Raises:
        ValueError: names the first that does not.
    """
    check_tensors(file, {name: tuple(value.shape) for name, value in model.state_dict().items()}, found)
    tensors = safetensors.torch.load_file(file)
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(
                f"Checkpoint {file} has values in {name!r} that are no numbers: it is damaged; take another copy."
            )
    model.load_state_dict(tensors)


def load_encoder(path: str | Path, device: torch.device | str = "cpu") -> tuple[AnyModel, About]:
    """As `load_model`, for who asks nothing of the model but `encode`: the file may hold an encoder only."""
    recipe, about, found = read_header(path)
    file = find_weights(path)
    recognition = read_recognition(path)
    if recognition is not None:
        raise ValueError(
            f"{file} holds a network fine-tuned for {len(recognition.outputs)} outputs: an encoder with a head, "
            "and nothing that could paint, generate or be pre-trained on. Use it for predict, probe, embed, finetune or "
            "export, or give the pre-trained run."
        )
    with torch.random.fork_rng(
        devices=[]
    ):  # its first weights are thrown away, so nobody's draws shall change for them
        model = model_of(recipe, about.parts)
    fill(model, file, found)
    return model.to(device).eval(), about
