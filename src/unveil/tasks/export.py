"""A model's encoder as a file of another library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unveil.checkpoint import FromRun
from unveil.export import is_whole_mae, write_hf, write_onnx, write_timm
from unveil.recognizer import Recognizer, load_any

SUFFIXES = {"timm": (".safetensors", ".pth"), "hf": ("",), "onnx": (".onnx",)}


@dataclass(frozen=True, kw_only=True)
class Export(FromRun):
    """Write the encoder of a run or a weights file for timm, for Hugging Face's transformers, or as an ONNX graph.

    A whole `mae` goes to Hugging Face with its decoder. See docs/weights.md.

    Example: unveil export --run runs/photos --to timm --out photos_vit.safetensors
    """

    to: Literal["timm", "hf", "onnx"]
    """timm: a state dict for its VisionTransformer. hf: a folder for from_pretrained. onnx: a graph from pixels in [0, 1] to
    tokens and pooled features, with the normalisation inside."""
    out: Path
    """What to write; it must not exist. A .safetensors or .pth for timm (and a .json beside it), a folder for hf, an .onnx."""
    head_classes: int | None = None
    """For timm: classes of a head of zeros, as strict loading asks for one; 0 for none, as for num_classes=0. Default 1000,
    timm's own."""


def _check(options: Export) -> None:
    out = options.out
    if options.to == "hf" and out.suffix in (".safetensors", ".pth", ".onnx"):
        raise ValueError(f"--out {out} names a file, but --to hf writes a folder. Give a name without {out.suffix}.")
    if options.to != "hf" and out.suffix not in SUFFIXES[options.to]:
        raise ValueError(f"--out {out} must end in {' or '.join(SUFFIXES[options.to])} for --to {options.to}.")
    for path in (out, out.with_suffix(".json")) if options.to == "timm" else (out,):
        if path.exists():
            raise ValueError(f"{path} exists already and is not overwritten. Give another --out, or remove it.")
    if options.head_classes is not None and options.to != "timm":
        raise ValueError(f"--head-classes belongs to --to timm, but it is {options.to}. Leave it out.")
    if options.head_classes is not None and options.head_classes < 0:
        raise ValueError(f"--head-classes {options.head_classes}: it is a count, at least 0.")


def _timm_call(config: dict[str, Any], out: Path) -> str:
    """The line of Python that loads the file."""
    arguments = dict(config["model_args"])
    if config["num_classes"] != 1000:
        arguments["num_classes"] = config["num_classes"]
    words = [repr(config["architecture"]), *(f"{name}={value!r}" for name, value in arguments.items())]
    if config["norm_eps"] != 1e-6:
        words.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={config['norm_eps']!r})")
    return f"timm.create_model({', '.join(words)}, checkpoint_path={str(out)!r})"


def export(options: Export) -> dict[str, Any]:
    """Run `unveil export`.

    Returns:
        What was written, how it is loaded, and by what its pixels are normalised.

    Raises:
        ValueError: the encoder has no such form, a library is missing, or the file exists.
    """
    _check(options)
    model, _ = load_any(options.run)
    tuned = isinstance(model, Recognizer)
    if tuned and options.head_classes is not None:
        raise ValueError(
            f"--head-classes {options.head_classes}: {options.run} is fine-tuned and brings its own head. Leave it out."
        )
    clip, notices = model.recipe.clip, list[str]()
    whole = options.to == "hf" and is_whole_mae(model)
    if options.to == "timm":
        config = write_timm(options.out, model, 1000 if options.head_classes is None else options.head_classes)
        load = _timm_call(config, options.out)
        if tuned:
            notices.append(f"Its head tells {', '.join(model.recognition.outputs[:10])}; the .json has all names.")
        elif config["num_classes"]:
            notices.append(f"Its head of {config['num_classes']} classes is zeros: use forward_features.")
    elif options.to == "hf":
        config = write_hf(options.out, model)
        (name,) = config["architectures"]
        pooler = ", add_pooling_layer=False" if name == "ViTModel" else ""
        load = f"transformers.{name}.from_pretrained({str(options.out)!r}{pooler})"
    else:
        write_onnx(options.out, model)
        load = f"onnxruntime.InferenceSession({str(options.out)!r}).run(None, {{'pixels': pixels}})"
        if model.recipe.time_in_encoder:
            notices.append("Its encoder is told the time: the graph says t = 0, a clean picture.")
    inside = options.to == "onnx"
    notices.append(
        f"Pixels in [0, 1] are normalised by mean {clip.mean} and std {clip.std}"
        f"{', inside the graph' if inside else '; do that first'}."
    )
    return {
        "out": str(options.out),
        "to": options.to,
        "recipe": f"{model.recipe.name} {model.recipe.size}",
        "whole": whole,
        "head": list(model.recognition.outputs) if isinstance(model, Recognizer) else None,
        "load": load,
        "mean": list(clip.mean),
        "std": list(clip.std),
        "notices": notices,
    }
