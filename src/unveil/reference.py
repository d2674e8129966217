"""The libraries that published ViTs come from, run beside ours on the same random pictures."""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unveil.foreign import is_hugging_face
from unveil.masking import Mask, gather
from unveil.model import AnyModel

NUM_PICTURES = 2
DECODER = re.compile(r"decoder_|mask_token|head\.")


def library_of(tensors: Mapping[str, Tensor]) -> str:
    """Whose code the names of an image model's or VideoMAE's tensors belong to: "transformers" or "timm"."""
    return "transformers" if is_hugging_face(tensors) else "timm"


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _timm_tokens(model: AnyModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any], x: Tensor) -> Tensor:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    recipe = model.recipe
    e, clip = recipe.encoder, recipe.clip
    named = config.get("architecture") in timm.list_models()
    if named:  # its own code may differ in what no tensor tells
        options = {"num_classes": 0, "img_size": clip.height, "in_chans": clip.channels, **config.get("model_args", {})}
        theirs = timm.create_model(config["architecture"], pretrained=False, **options)
    else:
        theirs = VisionTransformer(
            img_size=clip.height,
            patch_size=clip.patch_size,
            in_chans=clip.channels,
            num_classes=0,
            global_pool="token" if e.num_class_tokens else "avg",
            embed_dim=e.embed_dim,
            depth=e.depth,
            num_heads=e.num_heads,
            class_token=bool(e.num_class_tokens),
            no_embed_class=tensors["pos_embed"].shape[1] == clip.num_tokens,
            fc_norm=False,
        )
    theirs.load_state_dict({name: value for name, value in tensors.items() if not DECODER.match(name)})
    tokens: Tensor = theirs.eval().forward_features(x)  # type: ignore[operator]
    return tokens


def _hf_difference(
    model: AnyModel,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    pictures: Tensor,
    x: Tensor,
) -> float:
    from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    recipe = model.recipe
    clip, e, d = recipe.clip, recipe.encoder, recipe.decoder
    sizes = {
        "hidden_size": e.embed_dim,
        "num_hidden_layers": e.depth,
        "num_attention_heads": e.num_heads,
        "intermediate_size": 4 * e.embed_dim,
        "image_size": clip.height,
        "patch_size": clip.patch_size,
        "num_channels": clip.channels,
        "layer_norm_eps": recipe.network.norm_eps,
        **config,
        "dtype": "float32",
    }
    if model.parts:
        plain = {name.removeprefix("vit."): value.float() for name, value in tensors.items()}
        theirs = ViTModel.from_pretrained(
            None, config=ViTConfig(**sizes), state_dict=plain, add_pooling_layer="pooler.dense.weight" in plain
        )
        return _largest(theirs.eval()(pixel_values=x).last_hidden_state, model.encode(pictures))
    assert d is not None
    decoder = {
        "decoder_hidden_size": d.embed_dim,
        "decoder_num_hidden_layers": d.depth,
        "decoder_num_attention_heads": d.num_heads,
        "decoder_intermediate_size": 4 * d.embed_dim,
    }
    whole = ViTMAEForPreTraining.from_pretrained(
        None,
        config=ViTMAEConfig(**{**decoder, **sizes}),
        state_dict={name: value.float() for name, value in tensors.items()},
    )
    noise = torch.rand(len(x), clip.num_tokens, generator=torch.Generator().manual_seed(1))
    result = whole.eval()(pixel_values=x, noise=noise)
    num_hidden = int(result.mask[0].sum())
    order = noise.argsort(dim=1)
    mask = Mask(order[:, :-num_hidden], order[:, -num_hidden:])
    ours = model(gather(model.tokens(pictures), mask.visible), mask)["hidden"]["x0"]
    return _largest(gather(result.logits, mask.hidden), ours)


def _videomae_tokens(model: AnyModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any], x: Tensor) -> Tensor:
    from transformers import VideoMAEConfig, VideoMAEModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    clip, e = model.recipe.clip, model.recipe.encoder
    sizes = {
        "hidden_size": e.embed_dim,
        "num_hidden_layers": e.depth,
        "num_attention_heads": e.num_heads,
        "intermediate_size": 4 * e.embed_dim,
        "image_size": clip.height,
        "num_frames": clip.frames,
        "tubelet_size": clip.tubelet_size,
        "patch_size": clip.patch_size,
        "num_channels": clip.channels,
        "layer_norm_eps": model.recipe.network.norm_eps,
        **config,
        "dtype": "float32",
        "use_mean_pooling": False,  # or its encoder has no last norm
    }
    theirs = VideoMAEModel.from_pretrained(
        None,
        config=VideoMAEConfig(**sizes),
        state_dict={name.removeprefix("videomae."): value.float() for name, value in tensors.items()},
    )
    tokens: Tensor = theirs.eval()(pixel_values=x.transpose(1, 2)).last_hidden_state
    return tokens


def _largest(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max())


@torch.no_grad()
def largest_difference(model: AnyModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[float, str]:
    """How far ours is from the original's own library on random pictures, and what was compared.

    Args:
        model: converted from the tensors.
        tensors: as the file holds them. config: the file's config.json, or {}.

    Returns:
        The largest absolute difference; and "tokens" of the encoder, or "predictions" of a whole Hugging Face MAE.
    """
    clip = model.recipe.clip
    shape = (NUM_PICTURES, clip.channels, clip.frames, clip.height, clip.width)
    pictures = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    x = (pictures - model.mean) / model.std
    if model.recipe.name == "videomae":
        return _largest(_videomae_tokens(model, tensors, config, x), model.encode(pictures)), "tokens"
    x = x[:, :, 0]
    with torch.random.fork_rng(devices=[]):
        if library_of(tensors) == "transformers":
            what = "tokens" if model.parts else "predictions"
            return _hf_difference(model, tensors, config, pictures, x), what
        return _largest(_timm_tokens(model, tensors, config, x), model.encode(pictures)), "tokens"
