"""The libraries that published ViTs come from, run beside ours on the same random pictures."""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unveil.foreign import Kind, is_hugging_face
from unveil.masking import Mask, gather
from unveil.model import AnyModel, MaskedDiffusionAutoencoder
from unveil.tokens import patchify, unpatchify

NUM_PICTURES = 2
DECODER = re.compile(r"decoder_|mask_token|head\.")


def library_of(kind: Kind, tensors: Mapping[str, Tensor]) -> str | None:
    """Which library runs these tensors: "transformers", "timm", "diffusers" (DiT), or none that is known."""
    if kind in ("umd", "mae_st"):
        return None
    if kind == "dit":
        return "diffusers"
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


def _hf_sizes(model: AnyModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Hugging Face config. Turns off its bars and warnings: what is left of a file is told here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    clip, e = model.recipe.clip, model.recipe.encoder
    return {
        "hidden_size": e.embed_dim,
        "num_hidden_layers": e.depth,
        "num_attention_heads": e.num_heads,
        "intermediate_size": 4 * e.embed_dim,
        "image_size": clip.height,
        "patch_size": clip.patch_size,
        "num_channels": clip.channels,
        "layer_norm_eps": model.recipe.network.norm_eps,
        **config,
        "dtype": "float32",
    }


def _hf_difference(
    model: AnyModel,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    pictures: Tensor,
    x: Tensor,
) -> float:
    from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

    recipe = model.recipe
    clip, d = recipe.clip, recipe.decoder
    sizes = _hf_sizes(model, config)
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

    clip = model.recipe.clip
    sizes = {
        "num_frames": clip.frames,
        "tubelet_size": clip.tubelet_size,
        **_hf_sizes(model, config),
        "use_mean_pooling": False,  # or its encoder has no last norm
    }
    theirs = VideoMAEModel.from_pretrained(
        None,
        config=VideoMAEConfig(**sizes),
        state_dict={name.removeprefix("videomae."): value.float() for name, value in tensors.items()},
    )
    tokens: Tensor = theirs.eval()(pixel_values=x.transpose(1, 2)).last_hidden_state
    return tokens


# diffusers' names of DiT's blocks, and DiT's own.
DIFFUSERS_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def _dit_difference(model: AnyModel, tensors: Mapping[str, Tensor]) -> float:
    """Of the predictions for noisy clips at three times, with a class and without."""
    from diffusers import DiTTransformer2DModel  # type: ignore[attr-defined]

    assert isinstance(model, MaskedDiffusionAutoencoder)
    recipe = model.recipe
    clip, e, num_classes = recipe.clip, recipe.encoder, recipe.condition.num_classes
    theirs = DiTTransformer2DModel(
        num_attention_heads=e.num_heads,
        attention_head_dim=e.embed_dim // e.num_heads,
        in_channels=clip.channels,
        out_channels=clip.channels * len(recipe.heads),
        num_layers=e.depth,
        sample_size=clip.height,
        patch_size=clip.patch_size,
        num_embeds_ada_norm=num_classes,
        norm_eps=recipe.network.norm_eps,
    )
    state: dict[str, Tensor] = {}

    def take(ours: str, name: str, wanted: slice = slice(None)) -> None:
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = tensors[f"{name}.{kind}"][wanted].float()

    D = e.embed_dim
    take("pos_embed.proj", "x_embedder.proj")
    take("proj_out_1", "final_layer.adaLN_modulation.1")
    take("proj_out_2", "final_layer.linear")
    for i in range(e.depth):
        block = f"transformer_blocks.{i}"
        for name, original in DIFFUSERS_BLOCK.items():
            take(f"{block}.{name}", f"blocks.{i}.{original}")
        for j, name in enumerate("qkv"):
            take(f"{block}.attn1.to_{name}", f"blocks.{i}.attn.qkv", slice(j * D, (j + 1) * D))
        for j, name in ((0, "linear_1"), (2, "linear_2")):
            take(f"{block}.norm1.emb.timestep_embedder.{name}", f"t_embedder.mlp.{j}")
        table = tensors["y_embedder.embedding_table.weight"].float()
        state[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = table
    theirs.load_state_dict(state)
    theirs.eval()
    for block in theirs.transformer_blocks:
        # theirs end the frequencies of time at 1/10000 exactly, the original's one step before it
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # type: ignore[union-attr]

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, clip.channels, clip.height, clip.width, generator=generator)
    k, labels = torch.tensor([0, 10, 999]), torch.tensor([0, num_classes - 1, num_classes])
    expected = theirs(x, timestep=k, class_labels=labels).sample[:, :, None]
    places_of_all = torch.arange(clip.num_tokens).expand(len(x), -1)
    everything = Mask(places_of_all, places_of_all[:, :0])
    # they count noisy times from 0
    predictions = model(patchify(x[:, :, None], clip.patch_size), everything, None, k + 1, labels, on=("visible",))[
        "visible"
    ]
    ours = [unpatchify(predictions[name], clip.grid, clip.patch_size) for name in recipe.heads]
    return _largest(expected, torch.cat(ours, dim=1))


def _largest(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max())


@torch.no_grad()
def largest_difference(
    kind: Kind, model: AnyModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[float, str]:
    """How far ours is from the original's own library on random pictures, and what was compared.

    Args:
        model: converted from the tensors.
        tensors: as the file holds them. config: the file's config.json, or {}.

    Returns:
        The largest absolute difference; and "tokens" of the encoder, or "predictions" of a DiT or a whole Hugging Face MAE.
    """
    if kind == "dit":
        with torch.random.fork_rng(devices=[]):
            return _dit_difference(model, tensors), "predictions"
    clip = model.recipe.clip
    shape = (NUM_PICTURES, clip.channels, clip.frames, clip.height, clip.width)
    pictures = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    x = (pictures - model.mean) / model.std
    if kind == "videomae":
        with torch.random.fork_rng(devices=[]):
            return _largest(_videomae_tokens(model, tensors, config, x), model.encode(pictures)), "tokens"
    x = x[:, :, 0]
    with torch.random.fork_rng(devices=[]):
        if library_of(kind, tensors) == "transformers":
            what = "tokens" if model.parts else "predictions"
            return _hf_difference(model, tensors, config, pictures, x), what
        return _largest(_timm_tokens(model, tensors, config, x), model.encode(pictures)), "tokens"
