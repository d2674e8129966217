"""Which module may import which, and what a config may say: floors, rule of two, round trips, refusals."""

import ast
import dataclasses
import json
import re
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import VARIANTS, shipped

import unveil
from unveil import config, recipes
from unveil.config import Branch, Clip, Decoder, Encoder, Recipe, Schedule, Training, recipe_from_dict, to_dict
from unveil.model import MaskedDiffusionAutoencoder

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
    "recipes": 2,
    "metrics": 2,
    "sampling": 2,
    "cost": 2,
    "encoder": 3,
    "decoder": 3,
    "decoding": 2,
    "sources": 3,
    "data": 4,
    "model": 4,
    "losses": 5,
    "checkpoint": 5,
    "features": 6,
    "pipeline": 6,
    "report": 6,
    "rundir": 6,
    "train": 7,
    "tasks": 8,
    "cli": 9,
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


def sections(recipe: Recipe) -> dict[str, Any]:
    values = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(Recipe)}
    return {type(v).__name__: v for v in values.values() if dataclasses.is_dataclass(v)}


SECTIONS = (Clip, Encoder, Decoder, Schedule, Branch, Training)
FIELDS = [(section, f.name) for section in SECTIONS for f in dataclasses.fields(section)]


@pytest.mark.parametrize(
    "section, name",
    FIELDS,
    ids=[f"{section.__name__}.{name}" for section, name in FIELDS],
)
def test_two_recipes_disagree_about_every_field(section: type, name: str) -> None:
    found = [sections(shipped(v)).get(section.__name__) for v in VARIANTS]
    values = {getattr(s, name) for s in found if s is not None}
    assert len(values) >= 2, f"every recipe has {section.__name__}.{name}={values}"


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
    found = [sections(shipped(v)).get(section.__name__) for v in VARIANTS]
    assert word in {getattr(s, name) for s in found if s is not None}


def test_every_choice_is_a_literal_of_a_section() -> None:
    """Every Literal in config.py stands in a section, so that the rule above sees it."""
    here = {k: v for k, v in vars(config).items() if typing.get_origin(v) is typing.Literal}
    assert {typing.get_args(v) for v in here.values()} == set(LITERALS.values())
    assert len(LITERALS) == 5


def test_the_variants_hold_every_recipe() -> None:
    assert {name for name, _ in VARIANTS.values()} == set(recipes.RECIPES)


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


@pytest.mark.parametrize("size", [*(f"{name}/16" for name in recipes.ENCODERS), "H/14"])
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_size_builds(name: str, size: str) -> None:
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipes.RECIPES[name](size))
    assert model.encoder.pos_embed.shape[0] == (224 // int(size.split("/")[1])) ** 2


def test_vit_large_has_the_papers_parameters() -> None:
    """304 M in the encoder of ViT-L/16, to the million."""
    with torch.device("meta"):
        model = MaskedDiffusionAutoencoder(recipes.diffmae("L/16"))
    positions = 197 * 1024  # which the count of the papers includes and which are not parameters here
    assert round((sum(p.numel() for p in model.encoder.parameters()) + positions) / 1e6) in (303, 304)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        shipped("diffmae").branch.mask_ratio = 0.5  # type: ignore[misc]


def test_lr_scales_with_the_batch() -> None:
    training = Training(epochs=1, batch_size=4096, base_lr=1.5e-4, warmup_epochs=0)
    assert training.lr == pytest.approx(2.4e-3)


def test_an_integer_may_stand_for_a_float() -> None:
    values = to_dict(shipped("diffmae all hidden"))
    values["branch"]["mask_ratio"] = 1
    assert recipe_from_dict(values) == shipped("diffmae all hidden")


# Refusals

CLIP = {"channels": 3, "height": 32, "width": 48, "patch_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
ENCODER = {"embed_dim": 32, "depth": 4, "num_heads": 4}
DECODER = {"kind": "joint", "embed_dim": 32, "depth": 2, "num_heads": 4, "taps": (4,)}
BRANCH = {"mask_ratio": 0.75, "noise_on": "hidden"}
TRAINING = {"epochs": 1, "batch_size": 8, "base_lr": 1e-3, "warmup_epochs": 0}


def changed(variant: str, **fields: Any) -> Callable[[], object]:
    return lambda: dataclasses.replace(shipped(variant), **fields)


def read(change: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
    """Read a diffmae from JSON with something changed in it."""

    def attempt() -> object:
        values = json.loads(json.dumps(to_dict(shipped("diffmae"))))
        change(values)
        return recipe_from_dict(values)

    return attempt


REFUSALS: list[tuple[Callable[[], object], str]] = [
    *[
        (lambda name=name: Clip(**{**CLIP, name: 0}), f"Clip has {name}=0; it must be at least 1.")
        for name in ("channels", "frames", "height", "width", "patch_size", "tubelet_size")
    ],
    (lambda: Clip(**{**CLIP, "height": 30}), "height=30, which patch_size=16 does not divide. Use 16 or 32,"),
    (
        lambda: Clip(**{**CLIP, "width": 9}),
        "width=9, which patch_size=16 does not divide. Use 16, or another patch size.",
    ),
    (
        lambda: Clip(**CLIP, frames=5, tubelet_size=2),
        "frames=5, which tubelet_size=2 does not divide. Use a multiple of 2",
    ),
    (lambda: Clip(**{**CLIP, "mean": (0.5,)}), "Clip has 1 values of mean for 3 channels; give one for each."),
    (lambda: Clip(**{**CLIP, "std": (0.5,) * 4}), "Clip has 4 values of std for 3 channels; give one for each."),
    (lambda: Clip(**{**CLIP, "std": (0.5, 0.0, 0.5)}), "every value must be above 0."),
    (lambda: Encoder(**{**ENCODER, "depth": 0}), "Encoder has depth=0 and num_heads=4; both must be at least 1."),
    (lambda: Decoder(**{**DECODER, "num_heads": 0}), "Decoder has depth=2 and num_heads=0; both must be at least 1."),
    (lambda: Encoder(**{**ENCODER, "embed_dim": 30}), "Encoder has embed_dim=30; sin-cos positions in two directions"),
    (lambda: Encoder(**{**ENCODER, "embed_dim": 0}), "Encoder has embed_dim=0; sin-cos positions in two directions"),
    (lambda: Encoder(**{**ENCODER, "num_heads": 5}), "Encoder has embed_dim=32, which num_heads=5 does not divide."),
    (
        lambda: Decoder(**{**DECODER, "kind": "cross-self"}),
        "kind='cross-self', which does not exist. Did you mean 'cross_s",
    ),
    (lambda: Decoder(**{**DECODER, "kind": "none"}), "Choose from cross, cross_self, joint."),
    (
        lambda: Decoder(**{**DECODER, "taps": (4, 2)}),
        "kind='joint' with depth=2 reads 1 encoder block(s), but taps=(4, 2).",
    ),
    (
        lambda: Decoder(**{**DECODER, "kind": "cross"}),
        "kind='cross' with depth=2 reads 2 encoder block(s), but taps=(4,).",
    ),
    (lambda: Decoder(**{**DECODER, "kind": "cross", "taps": (2, 4)}), "taps=(2, 4); write them deepest first."),
    (lambda: Schedule(kind="cosin"), "kind='cosin', which does not exist. Did you mean 'cosine'?"),
    (lambda: Schedule(kind="linear", rho=0.0), "Schedule has rho=0.0; it must be above 0"),
    (lambda: Branch(**BRANCH, masking="tubes"), "masking='tubes', which does not exist. Did you mean 'tube'?"),
    (
        lambda: Branch(mask_ratio=0.5, noise_on="hiden"),
        "noise_on='hiden', which does not exist. Did you mean 'hidden'?",
    ),
    (lambda: Branch(**BRANCH, target="v"), "target='v', which does not exist. Choose from eps, x0."),
    (lambda: Branch(**{**BRANCH, "mask_ratio": 1.5}), "Branch has mask_ratio=1.5; it is a share, between 0 and 1."),
    (lambda: Branch(**{**BRANCH, "mask_ratio": -0.1}), "Branch has mask_ratio=-0.1; it is a share, between 0 and 1."),
    (lambda: Branch(**{**BRANCH, "mask_ratio": float("nan")}), "it is a share, between 0 and 1."),
    (lambda: Branch(mask_ratio=0.5, noise_on="none", target="eps"), "there is no noise to predict. Use target='x0'."),
    (lambda: Branch(**BRANCH, patch_norm=True), "patch_norm=True with noise_on='hidden'"),
    (lambda: Branch(mask_ratio=0.5, noise_on="visible"), "only mask_ratio=0 is defined"),
    (lambda: Branch(mask_ratio=0.0, noise_on="hidden"), "nothing would be hidden, so nothing predicted."),
    (lambda: Training(**{**TRAINING, "epochs": 0}), "Training has epochs=0 and batch_size=8; both must be at least 1."),
    (
        lambda: Training(**{**TRAINING, "batch_size": 0}),
        "Training has epochs=1 and batch_size=0; both must be at least 1.",
    ),
    (lambda: Training(**{**TRAINING, "base_lr": 0.0}), "Training has base_lr=0.0; it must be a number above 0."),
    (lambda: Training(**TRAINING, crop_scale=0.0), "crop_scale=0.0; it is a share of the area, above 0 and at most 1."),
    (lambda: Training(**TRAINING, crop_scale=1.1), "crop_scale=1.1; it is a share of the area, above 0 and at most 1."),
    (lambda: Training(**TRAINING, ema_decay=1.0), "ema_decay=1.0; it must be at least 0 and below 1."),
    (lambda: Training(**{**TRAINING, "warmup_epochs": -1.0}), "warmup_epochs=-1.0; it must be a number, at least 0."),
    (changed("diffmae", schedule=None), "a schedule belongs to a recipe with noise, and only to one."),
    (changed("mae", schedule=Schedule(kind="linear")), "a schedule belongs to a recipe with noise, and only to one."),
    (
        changed("diffmae", decoder=None),
        "so it cannot predict the 147 hidden of 196 tokens. Use mask_ratio=0 or a decoder.",
    ),
    (
        changed("diffmae nothing hidden", decoder=Decoder(**{**DECODER, "taps": (12,)})),
        "hides nothing, so a decoder",
    ),
    (
        changed("diffmae joint", decoder=Decoder(**{**DECODER, "taps": (11,)})),
        "the first must be 12, so that the whole",
    ),
    (changed("diffmae joint", decoder=Decoder(**{**DECODER, "taps": (13,)})), "taps=(13,) of an encoder of 12 blocks"),
    (changed("diffmae", decoder=Decoder(**{**DECODER, "kind": "cross", "taps": (12, 0)})), "none may be below 1."),
    (read(lambda v: v.update(brunch=1)), "Unknown field 'brunch' in Recipe. Did you mean 'branch'?"),
    (
        read(lambda v: v["branch"].update(mask_ration=0.5)),
        "'mask_ration' in Recipe.branch. Did you mean 'mask_ratio'?",
    ),
    (
        read(lambda v: v["branch"].update(zzz=0.5)),
        "Unknown field 'zzz' in Recipe.branch. Choose from mask_ratio, masking,",
    ),
    (read(lambda v: v["encoder"].pop("depth")), "Recipe.encoder lacks the field 'depth'."),
    (read(lambda v: v.update(encoder=3)), "Recipe.encoder is 3, but it must be a section with fields."),
    (read(lambda v: v["encoder"].update(depth="4")), "Recipe.encoder.depth is '4', but it must be of type int."),
    (read(lambda v: v["encoder"].update(depth=True)), "Recipe.encoder.depth is True, but it must be of type int."),
    (read(lambda v: v["training"].update(flip=1)), "Recipe.training.flip is 1, but it must be of type bool."),
    (read(lambda v: v["branch"].update(target=None)), "Recipe.branch.target is None, but it must be of type str."),
    (
        read(lambda v: v["branch"].update(mask_ratio=True)),
        "Recipe.branch.mask_ratio is True, but it must be of type float.",
    ),
    (lambda: recipe_from_dict([]), "Recipe is [], but it must be a section with fields."),  # type: ignore[arg-type]
    (read(lambda v: v["branch"].update(target="v")), "target='v', which does not exist."),
]


@pytest.mark.parametrize("attempt, message", REFUSALS, ids=[re.sub(r"\W+", "-", m)[:50] for _, m in REFUSALS])
def test_config_refuses(attempt: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attempt()


def test_every_refusal_of_the_config_has_a_case() -> None:
    """Each `raise` of config.py is reached by one of the cases above."""
    path = Path(config.__file__)
    raises = {node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)}
    reached = set()
    for attempt, _ in REFUSALS:
        try:
            attempt()
        except ValueError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert Path(last.filename) == path
            reached |= {line for line in raises if line <= last.lineno <= line + 8}
    assert reached == raises


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
