"""Models by name, from a folder, a file or the hub, and back to a folder or the hub with a card that writes itself."""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from unveil import recipes
from unveil.checkpoint import WEIGHTS, About, save_weights, write_atomically
from unveil.config import nearest
from unveil.cost import masked_step
from unveil.model import AnyModel, MaskedDiffusionAutoencoder
from unveil.recipe import Recipe
from unveil.recognizer import Recognizer, load_any

# timm's words for sizes.
SIZES = {
    "nano": "Nano",
    "micro": "Micro",
    "tiny": "Ti",
    "small": "S",
    "base": "B",
    "large": "L",
    "huge": "H",
    "xlarge": "XL",
}
CARD = "README.md"


def recipe_of_name(name: str, **fields: Any) -> Recipe:
    """The recipe that a name in timm's manner stands for, as diffmae_vit_base_patch16_224 or umd_vit_small_patch4_64.

    Args:
        name: recipe, size, patch size and picture size.
        fields: what the recipe's function takes beside these, as channels=1.

    Raises:
        ValueError: there is no such name.
    """
    match = re.fullmatch(r"([a-z_]+)_vit_([a-z]+)_patch(\d+)_(\d+)", name)
    if match is None:
        raise ValueError(
            f"There is no model {name!r}. Names are recipe_vit_size_patchP_PIXELS, as diffmae_vit_base_patch16_224."
        )
    recipe, size, patch, pixels = match.groups()
    if recipe not in recipes.RECIPES:
        raise ValueError(f"There is no recipe {recipe!r} for {name!r}. {nearest(recipe, recipes.RECIPES)}")
    if size not in SIZES:
        raise ValueError(f"There is no size {size!r} for {name!r}. {nearest(size, SIZES)}")
    return recipes.RECIPES[recipe](f"{SIZES[size]}/{patch}", height=int(pixels), **fields)


def create_model(name: str, *, seed: int | None = None, **fields: Any) -> MaskedDiffusionAutoencoder:
    """A model with drawn weights, by name; see `recipe_of_name`.

    Args:
        seed: of the weights; torch's global generator if not given.
    """
    recipe = recipe_of_name(name, **fields)
    if seed is None:
        return MaskedDiffusionAutoencoder(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedDiffusionAutoencoder(recipe)


def from_pretrained(name: str | Path, device: torch.device | str = "cpu") -> AnyModel | Recognizer:
    """The model of a run directory, a weights file, or of `hf:owner/model` on the hub, ready for use.

    An encoder-only file gives a model that can `encode` alone, and one of `unveil finetune` a network that can `predict`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    return load_any(name, device)[0]


def _snippet(model: AnyModel | Recognizer, name: str) -> str:
    clip = model.recipe.clip
    lines = [
        "import torch",
        "import unveil",
        "",
        f"model = unveil.from_pretrained({name!r})",
        f"clips = torch.rand(4, {clip.channels}, {clip.frames}, {clip.height}, {clip.width})"
        + ("  # your pictures in [0, 1]" if clip.bounded else ""),
        "with torch.inference_mode():",
        "    tokens = model.encode(clips)  # (4, class tokens + patches, width)",
    ]
    if isinstance(model, Recognizer):
        what = {
            "single": "probabilities of the classes",
            "multi": "probabilities of the labels",
            "regression": "numbers",
        }
        lines.append(
            f"told = model.predict(clips)  # (4, {len(model.recognition.outputs)}), {what[model.recognition.task]}"
        )
    elif "repaint" in model.can:
        lines += [
            f"holes = torch.zeros(4, {clip.frames}, {clip.height}, {clip.width}, dtype=torch.bool)",
            f"holes[..., {clip.height // 4} : {3 * clip.height // 4}, {clip.width // 4} : {3 * clip.width // 4}] = True",
            "painted = unveil.repaint(model, clips, holes, num_steps=50)",
        ]
    elif "generate" in model.can:
        lines.append("made = unveil.generate(model, range(4), num_steps=50)")
    return "\n".join(lines)


def model_card(model: AnyModel | Recognizer, about: About, name: str, license: str | None = None) -> str:
    """A README for weights: what they are, what they can, what they saw, how they are used. As Markdown with a YAML header.

    Args:
        name: by which they are loaded, in the example.
        license: of the weights, as the hub spells it ("apache-2.0"); without one the card says that none was chosen.
    """
    recipe = model.recipe
    clip = recipe.clip
    tags = ["masked-auto-encoder", "diffusion", "self-supervised", recipe.name]
    tuned = isinstance(model, Recognizer)
    parts, can = ((), {"recognise"}) if tuned else (model.parts, model.can)
    task = "unconditional-image-generation" if "generate" in can else "image-feature-extraction"
    if tuned:
        task = "image-classification"
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(f"license={license!r} is no name of one; write it as the hub does, as in 'apache-2.0'.")
    header = ["---", "library_name: unveil", f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in tags)]
    header += ([f"license: {license}"] if license else []) + ["---"]
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "recipe": f"`{recipe.name}` `{recipe.size}`" + (", the encoder only" if parts else ""),
        "can": ", ".join(sorted(can)),
        "input": f"{clip.channels} channels, {clip.frames} frame(s), {clip.height} x {clip.width}, "
        + (f"in [0, 1], normalised inside by mean {clip.mean} and std {clip.std}" if clip.bounded else "latents"),
        "parameters": f"{parameters:,}",
        "trained on": f"`{about.data}`",
        "trained for": f"{about.step:,} steps, {about.images_seen:,} pictures" if about.step else "not told",
        "weights": "as trained" if about.ema_decay is None else f"running average of decay {about.ema_decay:g}",
        "command": f"`{about.command}`",
        "Unveil": about.version,
        "license": license or "none was chosen: ask the author before you use them",
    }
    if about.classes:
        facts["classes"] = ", ".join(about.classes[:20]) + (" ..." if len(about.classes) > 20 else "")
    if isinstance(model, Recognizer):
        told = model.recognition
        facts["tells"] = ", ".join(told.outputs[:20]) + (" ..." if len(told.outputs) > 20 else "") + f" ({told.task})"
    elif not parts:
        facts["multiply-adds"] = f"{masked_step(recipe).forward / 1e6:,.1f} million for one masked clip, forward"
    table = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items())
    return (
        "\n".join(header)
        + f"\n\n# {recipe.name} {recipe.size}\n\nA masked diffusion auto-encoder, trained with Unveil.\n\n| | |\n|---|---|\n"
        + f"{table}\n\n```python\n{_snippet(model, name)}\n```\n"
    )


def save_pretrained(
    folder: str | Path,
    model: AnyModel | Recognizer,
    about: About,
    *,
    name: str | None = None,
    license: str | None = None,
) -> Path:
    """Write a model and its card into a new or empty folder, from which `from_pretrained` and every command read it.

    Args:
        about: of the file that it was loaded from, see `unveil.checkpoint.load_model`.
        name: by which others load it, for the card; the folder's if not given.
        license: see `model_card`.

    Raises:
        ValueError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder. Give another, or empty it.")
    recognition = model.recognition if isinstance(model, Recognizer) else None
    about = dataclasses.replace(about, parts=() if isinstance(model, Recognizer) else model.parts)
    card = model_card(model, about, name or str(folder), license)
    save_weights(folder / WEIGHTS, model.recipe, model.state_dict(), about, recognition)
    write_atomically(folder / CARD, lambda part: part.write_text(card, encoding="utf-8"))
    return folder


def push_to_hub(
    repo: str,
    model: AnyModel | Recognizer,
    about: About,
    *,
    license: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a model and its card to the Hugging Face hub, from where `from_pretrained("hf:owner/model")` loads it.

    Args:
        repo: owner/model; made if it is not there.
        token: of your account; the one that `hf auth login` kept if not given.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the library is missing, the name is malformed, or the hub refuses.
    """
    from unveil import hub

    repo, _ = hub.parse(repo)
    try:
        from huggingface_hub import HfApi
    except Exception:  # a broken installation too
        raise ValueError(f"Uploading needs huggingface_hub. {hub.INSTALL}") from None
    api = HfApi(token=token, library_name="unveil")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, model, about, name=f"{hub.PREFIX}{repo}", license=license)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"{model.recipe.name} by Unveil"
            )
        except Exception as error:  # the library's own, and those of the network
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{repo} was not uploaded ({reason}). Are you logged in (hf auth login)?") from None
    return str(commit.commit_url)
