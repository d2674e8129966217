"""Unveil: masked diffusion auto-encoders for images and video.

The names below are the package's front door; each is loaded when it is first asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Each public name and its home; __init__.pyi says the same to type checkers.
_HOMES = {
    "create_model": "pretrained",
    "from_pretrained": "pretrained",
    "save_pretrained": "pretrained",
    "push_to_hub": "pretrained",
    "load_model": "checkpoint",
    "InpaintPipeline": "inpainting",
    "repaint": "pipeline",
    "generate": "pipeline",
    "pretrain": "api",
    "finetune": "api",
    "probe": "api",
    "embed": "api",
    "predict": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unveil' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unveil.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
