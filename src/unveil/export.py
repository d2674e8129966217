"""The encoder of any model for other libraries: as timm's ViT, as Hugging Face's, or as an ONNX graph.

A plain ViT takes positions as one learned table with a row for the class token, and the patch embedding as a convolution.
An encoder that is told the time has no such form; its graph can still be written, at t = 0.
"""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from unveil.checkpoint import write_atomically
from unveil.features import usual_pool
from unveil.foreign import HF_BLOCK
from unveil.model import AnyModel, MaskedDiffusionAutoencoder
from unveil.recognizer import Recognizer, standard_of

# Shapes that timm has a name for; all else is given to its base model as arguments.
TIMM_NAMES = {
    ("Ti/16", 224): "vit_tiny_patch16_224",
    ("S/16", 224): "vit_small_patch16_224",
    ("B/16", 224): "vit_base_patch16_224",
    ("B/32", 224): "vit_base_patch32_224",
    ("L/16", 224): "vit_large_patch16_224",
}
TIMM_BASE = "vit_base_patch16_224"
OPSET = 18
LARGEST_GRAPH = (
    1_500_000_000  # bytes; beyond about this torch writes the weights to a second file, and protobuf ends at 2 GiB
)


def check_plain(model: AnyModel | Recognizer, to: str) -> None:
    """Refuse an encoder that is no plain ViT.

    Raises:
        ValueError: names what the other library's ViT has no place for.
    """
    recipe = model.recipe
    network, clip = recipe.network, recipe.clip
    reasons = {
        "is told the time": recipe.time_in_encoder,
        "has its last norm in the head": recipe.decoder is None and not isinstance(model, Recognizer),
        f"has norm={network.norm!r}": network.norm != "layer",
        f"has mlp={network.mlp!r}": network.mlp != "gelu",
        "normalises queries and keys": network.qk_norm,
        "has rotary positions": network.positions == "rotary",
        f"has {recipe.encoder.num_class_tokens} class tokens": recipe.encoder.num_class_tokens > 1,
        f"sees clips of {clip.frames} frames": clip.frames > 1,
        "has no class token": to == "hf" and not recipe.encoder.num_class_tokens,
        f"sees pictures of {clip.height} x {clip.width}": to == "hf" and clip.height != clip.width,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"--to {to}: the encoder of this {recipe.name} {reason}, which a plain ViT of that library has no place for. "
                "Use --to onnx, which writes the encoder as it is."
            )


def _conv(weight: Tensor, model: AnyModel | Recognizer) -> Tensor:
    """The patch embedding (D, p * p * C) as a convolution's kernel, (D, C, p, p)."""
    clip = model.recipe.clip
    return weight.reshape(-1, clip.patch_size, clip.patch_size, clip.channels).permute(0, 3, 1, 2)


def _table(positions: Tensor, num_class_tokens: int) -> Tensor:
    """(1, R + N, D) with zeros for the class token, which carries its position itself."""
    return torch.cat([positions.new_zeros(num_class_tokens, positions.shape[1]), positions])[None]


LARGE_OFFSET = 1e4  # times its spread; float32 then keeps three digits of what varies


def _head(model: Recognizer) -> dict[str, Tensor]:
    """Weight and bias of a fine-tuned network's last Linear, for numbers in their own units."""
    offset, scale = torch.zeros(1), torch.ones(1)
    if model.recognition.task == "regression":
        offset, scale = standard_of(model.recognition)
        far = (offset.abs() > LARGE_OFFSET * scale).nonzero().flatten().tolist()
        if far:
            raise ValueError(
                f"The number {model.recognition.outputs[far[0]]!r} is about {offset[far[0]]:g} with a spread of "
                f"{scale[far[0]]:.3g}, which a head of float32 would round. Use --to onnx, which tells it in float64."
            )
    return {
        "weight": (model.head.weight * scale[:, None]).float(),
        "bias": (model.head.bias * scale + offset).float(),
    }


def _timm_head(model: Recognizer) -> tuple[dict[str, Tensor], str]:
    """Norm and head of a fine-tuned network under timm's names, and timm's pool."""
    mean = model.recognition.pool == "mean"
    norm = "fc_norm" if mean else "norm"
    state = {f"{norm}.{name}": value for name, value in model.fc_norm.state_dict().items()}
    state |= {f"head.{name}": value for name, value in _head(model).items()}
    return state, "avg" if mean else "token"


def to_timm(model: AnyModel | Recognizer, head_classes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict for timm's VisionTransformer, and what its config.json would say: architecture, model_args, mean and std.

    Args:
        model: a fine-tuned network goes with its head.
        head_classes: rows of a head of zeros, which strict loading of a model with classes asks for; 0 for none. Of no
            meaning for a fine-tuned network.

    Raises:
        ValueError: the encoder is no plain ViT.
    """
    check_plain(model, "timm")
    recipe = model.recipe
    e, clip = recipe.encoder, recipe.clip
    state = {
        name.removeprefix("encoder."): value
        for name, value in model.state_dict().items()
        if name.startswith("encoder.") and not name.startswith("encoder.positions.")
    }
    state["patch_embed.proj.weight"] = _conv(state["patch_embed.proj.weight"], model)
    state["pos_embed"] = _table(model.encoder.positions.table(), e.num_class_tokens)
    if isinstance(model, Recognizer):
        tuned, pool = _timm_head(model)
        state |= tuned
        head_classes = len(model.recognition.outputs)
    elif head_classes:
        state["head.weight"] = torch.zeros(head_classes, e.embed_dim)
        state["head.bias"] = torch.zeros(head_classes)
    size = clip.height if clip.height == clip.width else 0
    name = TIMM_NAMES.get((recipe.size, size)) if clip.channels == 3 and e.num_class_tokens else None
    arguments: dict[str, Any] = {}
    if name is None:
        arguments = {
            "img_size": [clip.height, clip.width],
            "patch_size": clip.patch_size,
            "in_chans": clip.channels,
            "embed_dim": e.embed_dim,
            "depth": e.depth,
            "num_heads": e.num_heads,
        }
        if not e.num_class_tokens:
            arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if isinstance(model, Recognizer):
        arguments |= {"global_pool": pool}
        arguments.pop("fc_norm", None)
    return state, {
        "architecture": name or TIMM_BASE,
        "num_classes": head_classes,
        "num_features": e.embed_dim,
        "model_args": arguments,
        "norm_eps": recipe.network.norm_eps,
        **({"outputs": list(model.recognition.outputs)} if isinstance(model, Recognizer) else {}),
        "pretrained_cfg": {
            "input_size": [clip.channels, clip.height, clip.width],
            "mean": list(clip.mean),
            "std": list(clip.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": head_classes,
        },
    }


def _hf_blocks(state: dict[str, Tensor], ours: str, theirs: str, depth: int) -> dict[str, Tensor]:
    renamed = {}
    for i in range(depth):
        for kind in ("weight", "bias"):
            for name, part in HF_BLOCK.items():
                renamed[f"{theirs}.{i}.{name}.{kind}"] = state[f"{ours}.{i}.{part}.{kind}"]
            qkv = state[f"{ours}.{i}.attn.qkv.{kind}"].chunk(3)
            for name, value in zip(("query", "key", "value"), qkv, strict=True):
                renamed[f"{theirs}.{i}.attention.attention.{name}.{kind}"] = value
    return renamed


# What Hugging Face's ViT for classification is trained by, and so what its logits mean.
HF_PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


def is_whole_mae(model: AnyModel | Recognizer) -> bool:
    """Whether Hugging Face's ViTMAEForPreTraining is the same model, decoder and all."""
    if isinstance(model, Recognizer):
        return False
    recipe = model.recipe
    d = recipe.decoder
    masked_only = len(recipe.branches) == 1 and recipe.noise_on == "none" and recipe.heads == ("x0",)
    return not model.parts and d is not None and d.kind == "joint" and d.summary == "tokens" and masked_only


def to_hf(model: AnyModel | Recognizer) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config.json and preprocessor_config.json of a ViTMAEForPreTraining for a whole MAE, of a
    ViTForImageClassification for a fine-tuned network, and else of a ViTModel.

    Raises:
        ValueError: the encoder is no plain ViT, or its head reads the patches.
    """
    check_plain(model, "hf")
    recipe, state = model.recipe, model.state_dict()
    e, d, clip, whole = recipe.encoder, recipe.decoder, recipe.clip, is_whole_mae(model)
    tuned = isinstance(model, Recognizer)
    if tuned and model.recognition.pool != "class":
        raise ValueError(
            "--to hf: Hugging Face's ViT for classification reads the class token, and this network the mean of its patches. "
            "Use --to timm or --to onnx, or fine-tune with --pool class."
        )
    prefix = "vit." if whole or tuned else ""
    norm = "fc_norm" if tuned else "encoder.norm"
    tensors = {
        f"{prefix}embeddings.cls_token": state["encoder.cls_token"],
        f"{prefix}embeddings.position_embeddings": _table(model.encoder.positions.table(), 1),
        f"{prefix}embeddings.patch_embeddings.projection.weight": _conv(
            state["encoder.patch_embed.proj.weight"], model
        ),
        f"{prefix}embeddings.patch_embeddings.projection.bias": state["encoder.patch_embed.proj.bias"],
        f"{prefix}layernorm.weight": state[f"{norm}.weight"],
        f"{prefix}layernorm.bias": state[f"{norm}.bias"],
        **_hf_blocks(state, "encoder.blocks", f"{prefix}encoder.layer", e.depth),
    }
    config: dict[str, Any] = {
        "architectures": ["ViTMAEForPreTraining" if whole else "ViTForImageClassification" if tuned else "ViTModel"],
        "model_type": "vit_mae" if whole else "vit",
        "hidden_size": e.embed_dim,
        "num_hidden_layers": e.depth,
        "num_attention_heads": e.num_heads,
        "intermediate_size": 4 * e.embed_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": recipe.network.norm_eps,
        "image_size": clip.height,
        "patch_size": clip.patch_size,
        "num_channels": clip.channels,
        "qkv_bias": True,
    }
    if tuned:
        names = model.recognition.outputs
        tensors |= {f"classifier.{name}": value for name, value in _head(model).items()}
        config |= {
            "problem_type": HF_PROBLEMS[model.recognition.task],
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    if whole:
        assert isinstance(model, MaskedDiffusionAutoencoder) and d is not None and model.decoder is not None
        branch = recipe.branches[0]
        config |= {
            "decoder_hidden_size": d.embed_dim,
            "decoder_num_hidden_layers": d.depth,
            "decoder_num_attention_heads": d.num_heads,
            "decoder_intermediate_size": 4 * d.embed_dim,
            "mask_ratio": branch.mask_ratio,
            "norm_pix_loss": branch.terms[0].patch_norm,
        }
        tensors |= {
            "decoder.mask_token": state["decoder.mask_token"],
            "decoder.decoder_pos_embed": _table(model.decoder.positions.table(), 1),
            # ours has no map between equal widths, and the identity computes the same
            "decoder.decoder_embed.weight": state.get("decoder.embed.weight", torch.eye(d.embed_dim)),
            "decoder.decoder_embed.bias": state.get("decoder.embed.bias", torch.zeros(d.embed_dim)),
            "decoder.decoder_norm.weight": state["head.norm.weight"],
            "decoder.decoder_norm.bias": state["head.norm.bias"],
            "decoder.decoder_pred.weight": state["head.pred.x0.weight"],
            "decoder.decoder_pred.bias": state["head.pred.x0.bias"],
            **_hf_blocks(state, "decoder.blocks", "decoder.decoder_layers", d.depth),
        }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": clip.height},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": clip.height, "width": clip.width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(clip.mean),
        "image_std": list(clip.std),
    }
    return tensors, config, preprocessor


class RecognizerGraph(nn.Module):
    """Pixels to what a fine-tuned network tells: probabilities, or numbers; and the features that its head reads."""

    def __init__(self, model: Recognizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), or (B, C, T, H, W) of a model of clips, to (B, K) and (B, D)."""
        pooled = self.model.pooled(pixels if self.model.recipe.clip.frames > 1 else pixels[:, :, None])
        return self.model.tell(self.model.head(pooled)), pooled


class EncoderGraph(nn.Module):
    """Pixels to features, with all that the model does to them inside: normalisation, patches, t = 0 if it is told a time."""

    def __init__(self, model: AnyModel) -> None:
        super().__init__()
        self.model, self.pool = model, usual_pool(model.recipe)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), or (B, C, T, H, W) of a model of clips, to tokens (B, R + N, D) and their mean (B, D).

        The mean is over what `usual_pool` says: the patch tokens, or the class tokens.
        """
        clip = pixels if self.model.recipe.clip.frames > 1 else pixels[:, :, None]
        tokens = self.model.encode(clip)
        num_class_tokens = self.model.recipe.encoder.num_class_tokens
        pooled = tokens[:, num_class_tokens:] if self.pool == "mean" else tokens[:, :num_class_tokens]
        return tokens, pooled.mean(1)


def write_onnx(path: Path, model: AnyModel | Recognizer) -> None:
    """The encoder as a graph: pixels -> tokens, pooled; any batch size. mean, std and recipe stand in its metadata.

    Of a fine-tuned network: pixels -> told, pooled, and the names of what is told in the metadata.

    Raises:
        ValueError: the libraries for it are not installed.
    """
    for library in ("onnx", "onnxscript"):
        if not importlib.util.find_spec(library):
            raise ValueError(f"--to onnx needs {library}, which is not installed. Run pip install 'unveil[export]'.")
    num_bytes = sum(4 * parameter.numel() for parameter in model.encoder.parameters())
    if num_bytes > LARGEST_GRAPH:
        raise ValueError(
            f"--to onnx: the encoder's weights are {num_bytes / 1e9:.1f} GB, and one file holds {LARGEST_GRAPH / 1e9:.1f} GB "
            "of them. Use --to timm or --to hf."
        )
    clip = model.recipe.clip
    frames = (clip.frames,) if clip.frames > 1 else ()
    pixels = torch.rand(2, clip.channels, *frames, clip.height, clip.width)
    tuned = isinstance(model, Recognizer)
    program = torch.onnx.export(
        (RecognizerGraph(model) if tuned else EncoderGraph(model)).eval(),
        (pixels,),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=["told" if tuned else "tokens", "pooled"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    program.model.metadata_props.update(
        {
            "mean": json.dumps(clip.mean),
            "std": json.dumps(clip.std),
            "normalised": "inside the graph; pixels go in as numbers in [0, 1]",
            "recipe": f"{model.recipe.name} {model.recipe.size}",
            "pooled": model.recognition.pool if tuned else usual_pool(model.recipe),
            **({"task": model.recognition.task, "outputs": json.dumps(model.recognition.outputs)} if tuned else {}),
        }
    )
    write_atomically(path, lambda part: program.save(part))


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def write_timm(path: Path, model: AnyModel | Recognizer, head_classes: int) -> dict[str, Any]:
    """A .safetensors or .pth for timm, and a .json beside it, which is returned: architecture, arguments, mean and std."""
    state, config = to_timm(model, head_classes)
    tensors = _contiguous(state)
    metadata = {"format": "pt", **{name: json.dumps(config["pretrained_cfg"][name]) for name in ("mean", "std")}}

    def write(part: Path) -> None:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, part, metadata)
        else:
            torch.save(tensors, part)

    write_atomically(path, write)
    try:
        write_atomically(path.with_suffix(".json"), lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))
    except BaseException:  # both or none
        path.unlink()
        raise
    return config


def write_hf(folder: Path, model: AnyModel | Recognizer) -> dict[str, Any]:
    """A folder for from_pretrained, which appears whole or not at all; returns its config.json."""
    tensors, config, preprocessor = to_hf(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        part.chmod(0o755)
        metadata = {"format": "pt"}
        write_atomically(
            part / "model.safetensors", lambda file: safetensors.torch.save_file(_contiguous(tensors), file, metadata)
        )
        for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
            (part / name).write_text(json.dumps(content, indent=2) + "\n")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return config
