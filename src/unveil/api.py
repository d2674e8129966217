"""The commands as functions with the same words: `unveil pretrain --data photos/` is unveil.pretrain(data="photos/", ...)."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unveil.tasks.embed import Embed
from unveil.tasks.embed import embed as run_embed
from unveil.tasks.finetune import Finetune
from unveil.tasks.finetune import finetune as run_finetune
from unveil.tasks.predict import Predict
from unveil.tasks.predict import predict as run_predict
from unveil.tasks.pretrain import Pretrain
from unveil.tasks.pretrain import pretrain as run_pretrain
from unveil.tasks.probe import Probe
from unveil.tasks.probe import probe as run_probe
from unveil.train import Progress


def _paths(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the commands have them; paths may be strings, and data may be paths."""

    def one(name: str, value: Any) -> Any:
        if name in ("run", "out", "init") and isinstance(value, str):
            return Path(value)
        return str(value) if isinstance(value, Path) and name in ("data", "test_data") else value

    return {name: one(name, value) for name, value in options.items()}


def pretrain(*, on_progress: Callable[[Progress], None] | None = None, **options: Any) -> dict[str, Any]:
    """`unveil pretrain`; options as there, see `unveil.tasks.pretrain.Pretrain`."""
    return run_pretrain(Pretrain(**_paths(options)), on_progress)


def finetune(*, on_progress: Callable[[Progress], None] | None = None, **options: Any) -> dict[str, Any]:
    """`unveil finetune`; options as there, see `unveil.tasks.finetune.Finetune`."""
    return run_finetune(Finetune(**_paths(options)), on_progress)


def probe(*, on_progress: Callable[[int, int], None] | None = None, **options: Any) -> dict[str, Any]:
    """`unveil probe`; options as there, see `unveil.tasks.probe.Probe`."""
    return run_probe(Probe(**_paths(options)), on_progress)


def embed(*, on_progress: Callable[[int, int], None] | None = None, **options: Any) -> dict[str, Any]:
    """`unveil embed`; options as there, see `unveil.tasks.embed.Embed`."""
    return run_embed(Embed(**_paths(options)), on_progress)


def predict(*, on_progress: Callable[[int, int], None] | None = None, **options: Any) -> dict[str, Any]:
    """`unveil predict`; options as there, see `unveil.tasks.predict.Predict`."""
    return run_predict(Predict(**_paths(options)), on_progress)


for _function, _options in (
    (pretrain, Pretrain),
    (finetune, Finetune),
    (probe, Probe),
    (embed, Embed),
    (predict, Predict),
):
    # what help() and notebooks show: the options with their types and defaults
    _shown = inspect.signature(_options).parameters.values()
    _last = inspect.signature(_function).parameters["on_progress"]
    _function.__signature__ = inspect.Signature([*_shown, _last])  # type: ignore[attr-defined]
