"""Which module may import which, and what a config may say: floors, rule of two, round trips, refusals."""

import ast
import dataclasses
import json
import math
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import EVERY, VARIANTS, shipped
from timm.models.vision_transformer import VisionTransformer

import unveil
from unveil import config, recipes, sizes
from unveil import recipe as recipe_module
from unveil.config import Branch, Clip, Condition, Decoder, Encoder, Network, Schedule, Term, Training
from unveil.convert_vit import Told, from_vit, read_config
from unveil.model import MaskedDiffusionAutoencoder
from unveil.recipe import Recipe, recipe_from_dict, to_dict

SOURCE = Path(unveil.__file__).parent

# The architecture: a module imports only from lower floors.
FLOORS = {
    "__init__": 0,
    "config": 0,
    "schedule": 1,
    "masking": 1,
    "tokens": 1,
    "draws": 1,
    "layers": 2,
    "corruption": 2,
    "transforms": 2,
    "recipe": 1,
    "sizes": 1,
    "finetuning": 1,
    "tables": 2,
    "targets": 5,
    "recipes": 2,
    "metrics": 2,
    "metric_weights": 1,
    "likeness": 3,
    "picture_sets": 5,
    "inception": 6,
    "sampling": 2,
    "cost": 3,
    "encoder": 3,
    "decoder": 3,
    "decoding": 2,
    "reading": 1,
    "shards": 3,
    "packing": 6,
    "sources": 4,
    "digits": 3,
    "parquet": 3,
    "data": 5,
    "model": 4,
    "losses": 5,
    "checkpoint": 5,
    "foreign": 5,
    "classifier": 6,
    "convert": 6,
    "convert_vit": 6,
    "convert_video": 7,
    "reference": 6,
    "features": 6,
    "pipeline": 6,
    "report": 6,
    "rundir": 6,
    "optim": 6,
    "spread": 6,
    "start": 6,
    "hub": 4,
    "pretrained": 7,
    "api": 12,
    "planning": 7,
    "saves": 7,
    "sharding": 3,
    "compiling": 3,
    "contenders": 7,
    "trouble": 6,
    "training_report": 7,
    "online_knn": 7,
    "recognizer": 6,
    "recognition_job": 8,
    "pretraining_job": 8,
    "recognition_report": 7,
    "export": 7,
    "gallery": 7,
    "originals": 6,
    "painting": 7,
    "anomalies": 7,
    "mask_files": 7,
    "inpainting": 8,
    "veil": 1,
    "uploads": 8,
    "page": 8,
    "windows": 2,
    "holes": 2,
    "probing": 7,
    "sheet": 7,
    "hardware": 1,
    "inspection": 5,
    "pretraining": 8,
    "trainer": 9,
    "train": 10,
    "measuring": 10,
    "tasks": 11,
    "cli": 12,
}
# An alias of a type, which is no dependency on what the module does.
ALIASES = {("masking", "tokens"): {"Grid"}}
MODULES = sorted(str(p.relative_to(SOURCE).with_suffix("")) for p in SOURCE.rglob("*.py"))


def floor(module: str) -> int:
    return FLOORS[module.split("/")[0]]


def imports(module: str) -> list[tuple[str, set[str]]]:
    """What a module imports, anywhere in it, with the names that it takes; our own modules as paths."""
    found = []
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = {alias.name for alias in node.names}
            assert node.module is not None
            if node.module in ("unveil", "unveil.tasks"):  # a submodule, or a name of the package itself
                package = SOURCE.joinpath(*node.module.split(".")[1:])
                for name in names:
                    sub = f"{node.module}.{name}"
                    known = (package / f"{name}.py").exists() or (package / name).is_dir()
                    found.append((sub if known else f"{node.module}.__init__", {name}))
            else:
                found.append((node.module, names))
    return found


def our_path(imported: str) -> str | None:
    return "/".join(imported.split(".")[1:]) or "__init__" if imported.split(".")[0] == "unveil" else None


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors(module: str) -> None:
    assert module.split("/")[0] in FLOORS, f"{module} has no floor"
    for imported, names in imports(module):
        target = our_path(imported)
        if target is None or (names <= ALIASES.get((module, target), set()) and names):
            continue
        assert floor(target) < floor(module), f"{module} (floor {floor(module)}) imports {target} ({floor(target)})"


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) <= 1])
def test_the_lowest_floors_need_torch_alone(module: str) -> None:
    for imported, _ in imports(module):
        top = imported.split(".")[0]
        assert top in {"torch", "unveil"} or top in sys.stdlib_module_names, f"{module} imports {imported}"


def test_every_floor_has_its_module() -> None:
    assert {module.split("/")[0] for module in MODULES} == set(FLOORS)


def test_samplers_see_a_schedule_and_a_callable() -> None:
    """So they cannot learn about masks or encoders."""
    ours = {our_path(imported) for imported, _ in imports("sampling")}
    assert ours == {None, "schedule"}


def test_no_drawers() -> None:
    assert not {"utils", "base", "registry", "helpers", "common"} & {module.split("/")[-1] for module in MODULES}


# Rule of two


SECTIONS = (Clip, Encoder, Decoder, Network, Condition, Schedule, Term, Branch, Training)
FIELDS = [(section, f.name) for section in SECTIONS for f in dataclasses.fields(section)]


def sections(value: Any) -> Iterator[Any]:
    """Every section inside a recipe, those inside tuples and other sections too."""
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        for item in inner if isinstance(inner, tuple) else (inner,):
            if dataclasses.is_dataclass(item):
                yield item
                yield from sections(item)


# Fields that no shipped recipe needs, but weights of others: converting two of them must give two values.
CARRIED = {(Network, "norm_eps")}
SHIPPED = [section for variant in EVERY for section in sections(shipped(variant))]


def converted(tensors: dict[str, torch.Tensor], **said: Any) -> Recipe:
    return from_vit(tensors, kind="vit", given=Told(num_heads=4), config=read_config(said, {}))[0]


VIT = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4, num_classes=0).state_dict()
CONVERTED = [
    section
    for recipe in (converted(VIT), converted(VIT, model_type="vit", layer_norm_eps=1e-12))
    for section in sections(recipe)
]


def test_every_section_is_looked_at() -> None:
    modules = {**vars(config), **vars(recipe_module)}
    here = {v for v in modules.values() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    assert here == {*SECTIONS, Recipe}
    assert {type(section) for section in SHIPPED} == set(SECTIONS)


@pytest.mark.parametrize(
    "section, name",
    FIELDS,
    ids=[f"{section.__name__}.{name}" for section, name in FIELDS],
)
def test_two_recipes_disagree_about_every_field(section: type, name: str) -> None:
    known = [*SHIPPED, *CONVERTED] if (section, name) in CARRIED else SHIPPED
    values = {getattr(s, name) for s in known if isinstance(s, section)}
    assert len(values) >= 2, f"every recipe has {section.__name__}.{name}={values}"


def test_two_recipes_disagree_about_every_section() -> None:
    """What a recipe itself holds, its labels aside."""
    for f in dataclasses.fields(Recipe):
        assert len({getattr(shipped(v), f.name) for v in VARIANTS}) >= 2, f.name


LITERALS = {
    (section, name): typing.get_args(kind)
    for section in SECTIONS
    for name, kind in typing.get_type_hints(section).items()
    if typing.get_origin(kind) is typing.Literal
}


@pytest.mark.parametrize(
    "section, name, word",
    [(section, name, word) for (section, name), words in LITERALS.items() for word in words],
    ids=[f"{section.__name__}.{name}={word}" for (section, name), words in LITERALS.items() for word in words],
)
def test_a_recipe_uses_every_word(section: type, name: str, word: str) -> None:
    assert word in {getattr(s, name) for s in SHIPPED if isinstance(s, section)}


def test_every_choice_is_a_literal_of_a_section() -> None:
    """Every Literal in config.py stands in a section, so that the rule above sees it."""
    here = {k: v for k, v in vars(config).items() if typing.get_origin(v) is typing.Literal}
    assert {typing.get_args(v) for v in here.values()} == set(LITERALS.values())
    assert len(LITERALS) == 16


def test_the_variants_hold_every_recipe() -> None:
    assert {name for name, _ in VARIANTS.values()} == set(recipes.RECIPES)
    generators = {name for name, arguments in VARIANTS.values() if "generator" in arguments}
    assert generators | {"umd", "umd_finetune"} == {n for n in recipes.RECIPES if "mae" not in n or n == "mae_umd"}


# Recipes


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_recipe_builds_and_round_trips(variant: str) -> None:
    recipe = shipped(variant)
    assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert repr(recipe)
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipe)
    assert model.recipe is recipe
    hash(recipe)


@pytest.mark.parametrize("size", [*(f"{name}/16" for name in sizes.ENCODERS), "H/14"])
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_size_builds(name: str, size: str) -> None:
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipes.RECIPES[name](size, height=224))
    assert model.encoder.positions.table().shape[0] == model.recipe.clip.grid[0] * (224 // int(size.split("/")[1])) ** 2
    assert len(model.encoder.blocks) == sizes.ENCODERS[size.split("/")[0]].depth


def parameters(recipe: Recipe) -> float:
    """Millions of them."""
    with torch.device("meta"):
        return sum(p.numel() for p in MaskedDiffusionAutoencoder(recipe).parameters()) / 1e6


def test_vit_large_has_the_papers_parameters() -> None:
    """304 M in the encoder of ViT-L/16, to the million."""
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipes.diffmae("L/16"))
    positions = 197 * 1024  # which the count of the papers includes and which are not parameters here
    assert round((sum(p.numel() for p in model.encoder.parameters()) + positions) / 1e6) in (303, 304)


LATENT = {"channels": 4, "height": 32}


@pytest.mark.parametrize(
    "size, shape, with_adaln, without",
    [
        ("S/4", {}, 43.7, 29.2),
        ("B/4", {}, 174.2, 116.3),
        ("L/2", LATENT, 611.5, 407.9),
        ("L/16", {"height": 256}, 613.8, 410.2),
    ],
)
def test_umds_parameters(size: str, shape: dict[str, int], with_adaln: float, without: float) -> None:
    """Counted from the authors' code (spec/umd.md, section 1), with both predictions, to the last digit given."""
    assert parameters(recipes.umd(size, **shape)) == pytest.approx(with_adaln, abs=0.051)
    assert parameters(recipes.mae_umd(size, faithful=True, **shape)) == pytest.approx(without, abs=0.051)
    one_prediction = recipes.mae_umd(size, **shape)
    missing = (one_prediction.clip.token_dim * (one_prediction.encoder.embed_dim + 1)) / 1e6
    assert parameters(one_prediction) + missing == pytest.approx(
        parameters(recipes.mae_umd(size, faithful=True, **shape))
    )


def test_adaln_is_a_third_of_umds_blocks_and_classes_three_million() -> None:
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipes.umd())
    assert model.decoder is not None
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    of_adaln = sum(p.numel() for block in blocks for p in block.modulation.parameters())
    assert of_adaln / sum(p.numel() for block in blocks for p in block.parameters()) == pytest.approx(1 / 3, abs=1e-3)
    assert parameters(recipes.umd_finetune()) - parameters(recipes.umd()) == pytest.approx(3.1, abs=0.051)


@pytest.mark.parametrize("size, published", [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_dits_parameters(size: str, published: int) -> None:
    """Peebles & Xie 2023, table 4, for latents of 32 x 32 x 4 and 1,000 classes; fixed positions are counted there."""
    recipe = recipes.dit(size, num_classes=1000, **LATENT)
    positions = 256 * recipe.encoder.embed_dim / 1e6
    assert round(parameters(recipe) + positions) in (published, published + 1)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        shipped("diffmae").branches[0].mask_ratio = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    "variant, can, by",
    [
        ("mae", "represent", ()),
        ("mae_raw", "repaint represent", ()),
        ("diffmae", "repaint represent", ("x0",)),
        ("diffmae eps", "repaint represent", ("eps",)),
        ("diffmae all hidden", "generate represent", ("x0",)),
        ("diffmae nothing hidden", "generate repaint represent", ("x0",)),
        ("dit", "generate repaint represent", ("eps",)),
        ("maskdit", "generate repaint represent", ("eps",)),
        ("umd", "generate repaint represent", ("eps",)),
        ("umd_finetune", "generate repaint represent", ("eps", "x0")),
        ("umd_flow", "generate repaint represent", ("x0",)),
        ("umd_flow generator", "generate repaint represent", ("x0",)),
        ("dit_umd", "generate repaint represent", ("eps", "x0")),
        ("maskdit_umd", "generate repaint represent", ("eps",)),
        ("mae_umd", "repaint represent", ()),
        ("mae_umd generator", "generate repaint represent", ("eps", "x0")),
    ],
)
def test_what_a_model_can_and_what_it_is_sampled_by(variant: str, can: str, by: tuple[str, ...]) -> None:
    """By predictions for tokens that carry noise, the usual one first: UMD's x0 was never trained there."""
    recipe = shipped(variant)
    with torch.device("meta"):
        assert sorted(MaskedDiffusionAutoencoder(recipe).can) == can.split()
    assert recipe.samplers_heads == by


def test_lr_scales_with_the_batch() -> None:
    training = Training(epochs=1, batch_size=4096, base_lr=1.5e-4, warmup_epochs=0)
    assert training.lr == pytest.approx(2.4e-3)


def test_an_integer_may_stand_for_a_float() -> None:
    values = to_dict(shipped("diffmae all hidden"))
    values["branches"][0]["mask_ratio"] = 1
    assert recipe_from_dict(values) == shipped("diffmae all hidden")


# Refusals

CLIP = {"channels": 3, "height": 32, "width": 48, "patch_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
ENCODER = {"embed_dim": 32, "depth": 4, "num_heads": 4}
DECODER = {"kind": "joint", "embed_dim": 32, "depth": 2, "num_heads": 4, "taps": (4,)}
X0, EPS = Term(predict="x0", on="hidden"), Term(predict="eps", on="visible")
BRANCH = {"mask_ratio": 0.75, "noise_on": "hidden", "terms": (X0,)}
NOISY = {"mask_ratio": 0.5, "noise_on": "visible", "terms": (EPS,)}
CLEAN = {"mask_ratio": 0.5, "noise_on": "none", "terms": (X0,)}
TRAINING = {"epochs": 1, "batch_size": 8, "base_lr": 1e-3, "warmup_epochs": 0}


def changed(variant: str, **fields: Any) -> Callable[[], object]:
    return lambda: dataclasses.replace(shipped(variant), **fields)


def built(section: type, given: dict[str, Any], **fields: Any) -> Callable[[], object]:
    return lambda: section(**{**given, **fields})


def term(**fields: Any) -> Callable[[], object]:
    return built(Term, {"predict": "x0", "on": "hidden"}, **fields)


def branch(given: dict[str, Any], *terms: Term) -> Callable[[], object]:
    return built(Branch, given, terms=terms)


def read(change: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
    """Read a diffmae from JSON with something changed in it."""

    def attempt() -> object:
        values = json.loads(json.dumps(to_dict(shipped("diffmae"))))
        change(values)
        return recipe_from_dict(values)

    return attempt


REFUSALS: list[tuple[Callable[[], object], str]] = [
    *[
        (built(Clip, CLIP, **{name: 0}), f"Clip has {name}=0; it must be at least 1.")
        for name in ("channels", "frames", "height", "width", "patch_size", "tubelet_size")
    ],
    (built(Clip, CLIP, height=30), "height=30, which patch_size=16 does not divide. Use 16 or 32,"),
    (built(Clip, CLIP, width=9), "width=9, which patch_size=16 does not divide. Use 16, or another patch size."),
    (
        built(Clip, CLIP, frames=5, tubelet_size=2),
        "frames=5, which tubelet_size=2 does not divide. Use a multiple of 2",
    ),
    (built(Clip, CLIP, mean=(0.5,)), "Clip has 1 values of mean for 3 channels; give one for each."),
    (built(Clip, CLIP, std=(0.5,) * 4), "Clip has 4 values of std for 3 channels; give one for each."),
    (built(Clip, CLIP, std=(0.5, 0.0, 0.5)), "every value must be above 0."),
    (built(Encoder, ENCODER, depth=0), "Encoder has depth=0 and num_heads=4; both must be at least 1."),
    (built(Decoder, DECODER, num_heads=0), "Decoder has depth=2 and num_heads=0; both must be at least 1."),
    (built(Encoder, ENCODER, embed_dim=30), "Encoder has embed_dim=30; sin-cos positions in two directions"),
    (built(Encoder, ENCODER, embed_dim=0), "Encoder has embed_dim=0; sin-cos positions in two directions"),
    (built(Encoder, ENCODER, num_heads=5), "Encoder has embed_dim=32, which num_heads=5 does not divide."),
    (built(Encoder, ENCODER, num_class_tokens=-1), "Encoder has num_class_tokens=-1; it is a count, at least 0."),
    (
        built(Encoder, ENCODER, class_token_init="zero"),
        "class_token_init='zero', which does not exist. Did you mean 'z",
    ),
    (built(Decoder, DECODER, kind="cross-self"), "kind='cross-self', which does not exist. Did you mean 'cross_s"),
    (built(Decoder, DECODER, kind="none"), "Choose from cross, cross_self, joint."),
    (built(Decoder, DECODER, summary="sum"), "summary='sum', which does not exist."),
    (built(Decoder, DECODER, taps=(4, 2)), "kind='joint' with depth=2 reads 1 encoder block(s), but taps=(4, 2)."),
    (built(Decoder, DECODER, kind="cross"), "kind='cross' with depth=2 reads 2 encoder block(s), but taps=(4,)."),
    (built(Decoder, DECODER, kind="cross", taps=(2, 4)), "taps=(2, 4); write them deepest first."),
    (
        built(Decoder, DECODER, kind="cross", taps=(4, 2), summary="mean"),
        "summary='mean' with kind='cross', which reads",
    ),
    (built(Network, {}, norm="batch"), "Network has norm='batch', which does not exist."),
    *[
        (built(Network, {}, norm_eps=eps), f"Network has norm_eps={eps}; it must be above 0, and below 1.")
        for eps in (0.0, -1e-6, 1.0, math.nan)
    ],
    (built(Network, {}, mlp="relu"), "Network has mlp='relu', which does not exist."),
    (built(Network, {}, positions="rotatory"), "positions='rotatory', which does not exist. Did you mean 'rotary'?"),
    (built(Network, {}, head_init="zero"), "head_init='zero', which does not exist. Did you mean 'zeros'?"),
    (built(Condition, {}, time="adaLN"), "Condition has time='adaLN', which does not exist. Did you mean 'adaln'?"),
    (built(Condition, {}, trunk="deep"), "Condition has trunk='deep', which does not exist."),
    (built(Condition, {}, num_classes=-1), "Condition has num_classes=-1 and label_tokens=0; both are counts."),
    (
        built(Condition, {}, time="add", label_tokens=-2),
        "Condition has num_classes=0 and label_tokens=-2; both are counts.",
    ),
    (built(Condition, {}, num_classes=10), "num_classes=10 with time='none', so a class could not enter."),
    (built(Schedule, {}, kind="cosin"), "kind='cosin', which does not exist. Did you mean 'cosine'?"),
    (built(Schedule, {}, kind="linear", rho=0.0), "Schedule has rho=0.0; it must be above 0"),
    (built(Schedule, {}, kind="linear", rho=2.1), "Schedule has rho=2.1; it must be above 0"),
    (built(Schedule, {}, kind="linear", rho=math.nan), "Schedule has rho=nan; it must be above 0"),
    (built(Schedule, {}, kind="flow", rho=0.8), "rho=0.8 with kind='flow', which has no betas. Use rho=1."),
    (term(predict="v"), "predict='v', which does not exist. Choose from eps, noisy, variance, x0."),
    (term(on="hiden"), "Term has on='hiden', which does not exist. Did you mean 'hidden'?"),
    (term(space="velocity"), "Term has space='velocity', which does not exist."),
    *[
        (term(weight=weight), f"Term has weight={weight}; it must be a number above 0.")
        for weight in (0.0, -1.0, math.inf, math.nan)
    ],
    (term(predict="eps", patch_norm=True), "patch_norm=True with predict='eps'; only values of a clip have it."),
    (term(predict="eps", space="v"), "space='v' with predict='eps'. Use predict='x0', or space='plain'."),
    (built(Branch, BRANCH, masking="tubes"), "masking='tubes', which does not exist. Did you mean 'tube'?"),
    (built(Branch, BRANCH, noise_on="hiden"), "noise_on='hiden', which does not exist. Did you mean 'hidden'?"),
    *[
        (built(Branch, BRANCH, share=share), f"Branch has share={share}; it is a share of the clips")
        for share in (0.0, 1.1, math.nan)
    ],
    *[
        (built(Branch, BRANCH, mask_ratio=ratio), f"Branch has mask_ratio={ratio}; it is a share, between 0 and 1.")
        for ratio in (1.5, -0.1, math.nan)
    ],
    (branch(BRANCH), "Branch has the terms []; give at least one, and none twice."),
    (
        branch(BRANCH, X0, dataclasses.replace(X0, weight=2.0)),
        "[('x0', 'hidden'), ('x0', 'hidden')]; give at least one",
    ),
    (built(Branch, CLEAN, mask_ratio=1.0), "mask_ratio=1 with noise_on='none': with nothing visible and no noise"),
    (built(Branch, BRANCH, mask_ratio=0.0), "mask_ratio=0 with noise_on='hidden': nothing would be hidden"),
    (built(Branch, CLEAN, mask_ratio=0.0), "mask_ratio=0 with noise_on='none': nothing would be hidden"),
    (
        built(Branch, NOISY, mask_ratio=1.0),
        "mask_ratio=1 with noise_on='visible': no token is left to carry the noise.",
    ),
    (built(Branch, NOISY, mask_ratio=0.0, terms=(X0,)), "and mask_ratio=0: nothing is hidden. Use on='visible'"),
    (branch(BRANCH, Term(predict="x0", on="visible")), "the encoder sees these tokens as they are. Use on='hidden'."),
    (branch(CLEAN, Term(predict="x0", on="visible")), "the encoder sees these tokens as they are. Use on='hidden'."),
    *[
        (branch(given, wrong), "there is no noise on them to predict or to measure by. Use predict='x0'.")
        for given, wrong in (
            (CLEAN, Term(predict="eps", on="hidden")),
            (NOISY, Term(predict="eps", on="hidden")),
            (NOISY, Term(predict="variance", on="hidden")),
            (NOISY, Term(predict="x0", on="hidden", space="v")),
            (CLEAN, Term(predict="x0", on="hidden", space="v")),
        )
    ],
    *[
        (branch(given, Term(predict="noisy", on=on)), "noisy values are a target for hidden tokens of a clip whose")
        for given, on in ((NOISY, "visible"), (BRANCH, "hidden"), (CLEAN, "hidden"))
    ],
    (
        branch(NOISY, Term(predict="variance", on="visible")),
        "but not 'eps', whose error the variance describes. Add that term.",
    ),
    *[
        (branch(given, Term(predict="x0", on=on, patch_norm=True)), "a patch-normalised prediction cannot be put back")
        for given, on in ((BRANCH, "hidden"), (NOISY, "hidden"), (NOISY, "visible"))
    ],
    (built(Training, TRAINING, epochs=0), "Training has epochs=0 and batch_size=8; both must be at least 1."),
    (built(Training, TRAINING, batch_size=0), "Training has epochs=1 and batch_size=0; both must be at least 1."),
    (
        built(Training, TRAINING, lr_schedule="cosin"),
        "lr_schedule='cosin', which does not exist. Did you mean 'cosine'?",
    ),
    *[
        (built(Training, TRAINING, base_lr=lr), f"Training has base_lr={lr}; it must be a number above 0.")
        for lr in (0.0, math.inf, math.nan)
    ],
    *[
        (built(Training, TRAINING, crop_scale=s), f"crop_scale={s}; it is a share of the area, above 0 and at most 1.")
        for s in (0.0, 1.1)
    ],
    *[
        (built(Training, TRAINING, **{name: value}), f"Training has {name}={value}; it must be at least 0 and below 1.")
        for name in ("beta2", "label_dropout")
        for value in (-0.1, 1.0)
    ],
    *[
        (
            built(Training, TRAINING, ema_decays=decays),
            f"ema_decays={decays}; each must be at least 0 and below 1, and none",
        )
        for decays in ((1.0,), (0.9, -0.1), (0.9, 0.9))
    ],
    *[
        (built(Training, TRAINING, **{name: v}), f"Training has {name}={v}; it must be a number, at least 0.")
        for name in ("weight_decay", "warmup_epochs")
        for v in (-1.0, math.inf, math.nan)
    ],
    *[
        (built(Training, TRAINING, grad_clip=v), f"Training has grad_clip={v}; it must be a number above 0, or None.")
        for v in (0.0, math.inf, math.nan)
    ],
    (changed("diffmae", branches=()), "has branches of the shares []; they must sum to 1."),
    (
        changed("diffmae", branches=(Branch(**BRANCH, share=0.5),)),
        "has branches of the shares [0.5]; they must sum to 1.",
    ),
    (
        changed("diffmae joint", branches=(Branch(**BRANCH, share=0.5), Branch(**NOISY, share=0.5))),
        "has noise on hidden tokens in one branch and on visible ones in another",
    ),
    (changed("diffmae", schedule=None), "a schedule belongs to a recipe with noise, and only to one."),
    (changed("mae", schedule=Schedule(kind="linear")), "a schedule belongs to a recipe with noise, and only to one."),
    (
        changed("umd", branches=(Branch(**NOISY, share=0.5), Branch(**NOISY, share=0.5))),
        "noise_on=['visible', 'visible']: two branches with the same noise could not be told apart.",
    ),
    *[
        (changed("diffmae joint", condition=Condition(time=time)), "runs once for all times, so it cannot be told one.")
        for time in ("token", "adaln")
    ],
    (changed("mae_umd", condition=Condition(time="add")), "has time='add' but no noise, so there is no time to add."),
    (
        changed("diffmae", condition=Condition(time="add", num_classes=10, label_tokens=4)),
        "has label_tokens=4, but an encoder that is not told the class. Use label_tokens=0.",
    ),
    (changed("dit", schedule=Schedule(kind="flow")), "predicts 'variance' on a flow, whose steps have none."),
    (
        changed("maskdit", schedule=Schedule(kind="flow")),
        "predicts 'eps' on a flow, whose last time has no clean value",
    ),
    (changed("diffmae", condition=Condition()), "has noise but time='none'. Use time='add', 'token' or 'adaln'."),
    (
        changed("mae_umd", condition=Condition(time="token", trunk="wide", num_classes=10)),
        "has num_classes=10, but no noise: clean clips are never labelled",
    ),
    *[
        (
            changed("umd_flow", condition=Condition(time="adaln", trunk="wide", label_tokens=8, label_tokens_from=at)),
            f"has label_tokens_from={at} of 12 encoder blocks. Use 1 to 12.",
        )
        for at in (0, 13)
    ],
    (
        changed("umd_flow", encoder=Encoder(embed_dim=36, depth=12, num_heads=6)),
        "positions='rotary', which needs a multiple of 4 values in each head.",
    ),
    (
        changed("umd_flow", decoder=Decoder(**{**DECODER, "embed_dim": 36, "num_heads": 6, "taps": (12,)})),
        "positions='rotary', which needs a multiple of 4 values in each head.",
    ),
    (
        changed("diffmae", decoder=None),
        "so it cannot predict the 147 hidden of 196 tokens. Use mask_ratio=0 or a decoder.",
    ),
    (
        changed("diffmae joint", decoder=Decoder(**{**DECODER, "taps": (11,)})),
        "the first must be 12, so that the whole",
    ),
    (changed("diffmae joint", decoder=Decoder(**{**DECODER, "taps": (13,)})), "taps=(13,) of an encoder of 12 blocks"),
    (changed("diffmae", decoder=Decoder(**{**DECODER, "kind": "cross", "taps": (12, 0)})), "none may be below 1."),
    (
        changed("umd", encoder=Encoder(embed_dim=768, depth=12, num_heads=12, num_class_tokens=0)),
        "has summary='mean', but its encoder has no class tokens to take the mean of.",
    ),
    *[
        (changed("diffmae", **fields), "decoders that cross are built of plain ViT blocks.")
        for fields in (
            {"network": Network(norm="rms")},
            {"network": Network(qk_norm=True)},
            {"network": Network(mlp="swiglu")},
            {"network": Network(positions="rotary")},
        )
    ],
    *[
        (
            changed("mae cross_self", condition=Condition(time=time)),
            "decoders that cross are built of plain ViT blocks.",
        )
        for time in ("token", "adaln")
    ],
    (
        changed("diffmae cross", branches=(Branch(**NOISY),)),
        "with noise_on='visible': decoders that cross return hidden tokens only. Use kind='joint'.",
    ),
    *[
        (
            changed("mae_umd faithful", **fields),
            f"time={time!r} in an encoder of embed_dim=768 and a decoder of 32; the time has one width.",
        )
        for time in ("token", "add")
        for fields in ({"decoder": Decoder(**{**DECODER, "taps": (12,)}), "condition": Condition(time=time)},)
    ],
    (lambda: recipes.diffmae("Nano/4", num_draws=0), "num_draws=0 and decode_share=1.0; draws are at least 1"),
    (lambda: recipes.diffmae("Nano/4", num_draws=2, mask_ratio=0.0), "only a decoder of noisy hidden tokens"),
    (lambda: recipes.diffmae("Nano/4", decode_share=0.5), "whose hidden tokens see each other"),
    (read(lambda v: v.update(brunches=1)), "Unknown field 'brunches' in Recipe. Did you mean 'branches'?"),
    (
        read(lambda v: v["branches"][0].update(mask_ration=0.5)),
        "'mask_ration' in Recipe.branches[0]. Did you mean 'mask_ratio'?",
    ),
    (
        read(lambda v: v["branches"][0].update(zzz=0.5)),
        "Unknown field 'zzz' in Recipe.branches[0]. Choose from decode_share, mask_ratio, masking,",
    ),
    (
        read(lambda v: v["branches"][0]["terms"][0].update(wait=0.5)),
        "'wait' in Recipe.branches[0].terms[0]. Did you mean 'weight'?",
    ),
    (read(lambda v: v["encoder"].pop("depth")), "Recipe.encoder lacks the field 'depth'."),
    (read(lambda v: v["branches"][0].pop("terms")), "Recipe.branches[0] lacks the field 'terms'."),
    (read(lambda v: v.pop("condition")), "Recipe lacks the field 'condition'."),
    (read(lambda v: v.update(encoder=3)), "Recipe.encoder is 3, but it must be a section with fields."),
    (read(lambda v: v.update(branches=[3])), "Recipe.branches[0] is 3, but it must be a section with fields."),
    (read(lambda v: v.update(branches=3)), "Recipe.branches is 3, but it must be a list."),
    (read(lambda v: v["encoder"].update(depth="4")), "Recipe.encoder.depth is '4', but it must be of type int."),
    (read(lambda v: v["encoder"].update(depth=True)), "Recipe.encoder.depth is True, but it must be of type int."),
    (read(lambda v: v["training"].update(flip=1)), "Recipe.training.flip is 1, but it must be of type bool."),
    (
        read(lambda v: v["training"].update(grad_clip="1")),
        "Recipe.training.grad_clip is '1', but it must be of type float.",
    ),
    (
        read(lambda v: v["training"].update(ema_decays=["a"])),
        "Recipe.training.ema_decays[0] is 'a', but it must be of type float.",
    ),
    (
        read(lambda v: v["branches"][0]["terms"][0].update(predict=None)),
        "Recipe.branches[0].terms[0].predict is None, but it must be of type str.",
    ),
    (
        read(lambda v: v["branches"][0].update(mask_ratio=True)),
        "Recipe.branches[0].mask_ratio is True, but it must be of type float.",
    ),
    (lambda: recipe_from_dict([]), "Recipe is [], but it must be a section with fields."),  # type: ignore[arg-type]
    (read(lambda v: v["branches"][0]["terms"][0].update(predict="v")), "predict='v', which does not exist."),
]


@pytest.mark.parametrize("attempt, message", REFUSALS, ids=[re.sub(r"\W+", "-", m)[:50] for _, m in REFUSALS])
def test_config_refuses(attempt: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attempt()


def test_every_refusal_of_the_config_has_a_case() -> None:
    """Each `raise` of config.py and recipe.py is reached by one of the cases above."""
    raises = {
        (module.__file__, node.lineno): node.end_lineno or node.lineno
        for module in (config, recipe_module)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.Raise)
    }
    reached: set[tuple[str, int]] = set()
    for attempt, _ in REFUSALS:
        try:
            attempt()
        except ValueError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert last.filename in (config.__file__, recipe_module.__file__)
            reached |= {
                (file, line)
                for (file, line), end in raises.items()
                if file == last.filename and line <= last.lineno <= end
            }
    assert reached == set(raises)


@pytest.mark.parametrize(
    "size, message",
    [
        ("X/16", "Unknown size 'X/16'"),
        ("Mikro/8", "Did you mean 'Micro'?"),
        ("B", "Size 'B' lacks its patch size in pixels: write it as in 'B/16'."),
        ("B/0", "lacks its patch size"),
        ("B/x", "lacks its patch size"),
    ],
)
def test_size_refuses(size: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        recipes.mae(size)


@pytest.mark.parametrize("name", ["mae", "mae_raw", "diffmae"])
def test_generator_refuses_what_is_told_no_time(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot become a generator: .* Pre-train umd"):
        recipes.generator(recipes.RECIPES[name](), 10)


def test_generator_refuses_no_class() -> None:
    with pytest.raises(ValueError, match="num_classes=0; a class-conditional generator has at least one class"):
        recipes.generator(recipes.umd(), 0)
