"""From a pre-trained model to a class-conditional generator."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unveil.checkpoint import FromRun, load_model
from unveil.data import source_for
from unveil.planning import TrainingOptions, planned, prepare
from unveil.recipe import Recipe
from unveil.recipes import generator
from unveil.start import carry_over
from unveil.train import Progress, train


@dataclass(frozen=True, kw_only=True)
class FinetuneGenerator(TrainingOptions, FromRun):
    """Train a pre-trained model on labelled pictures until it generates them by class: UMD's published fine-tuning.

    For umd, umd_flow, dit, maskdit, and dit_umd, maskdit_umd, mae_umd. All weights are trained on. The image size, the
    normalisation and the network are the pre-trained model's.

    Example: unveil finetune-generator --run runs/photos --data photos/ --out runs/photos-by-class
    """

    clean_share: float | None = None
    """Share of the clips that is clean and three quarters hidden, as in pre-training; 0 for none. Default: 0.05 for a
    model that was pre-trained with such clips, else none."""
    label_dropout: float | None = None
    """Share of the labels that is replaced by "no class", which guidance needs. Default 0.1."""


def with_clean_share(recipe: Recipe, share: float) -> Recipe:
    """A generator's recipe with another share of clean clips; 0 removes the branch.

    Raises:
        ValueError: the share is out of its range, or the recipe has no clean branch to give it to.
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"--clean-share {share:g}: it is a share of the clips, at least 0 and below 1, for the others are what the "
            "generator learns from."
        )
    clean, noisy = recipe.branch_on("none"), recipe.branch_on("visible")
    assert noisy is not None
    if share and clean is None:
        raise ValueError(
            f"--clean-share {share:g}, but this model was pre-trained without clean clips, so {recipe.name} has no branch for "
            "them. Leave it out, or start from a umd, umd_flow or mae_umd."
        )
    kept = (dataclasses.replace(clean, share=share),) if clean and share else ()
    return dataclasses.replace(recipe, branches=(*kept, dataclasses.replace(noisy, share=1 - share)))


def finetune_generator(
    options: FinetuneGenerator, on_progress: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Run `unveil finetune-generator`; see `FinetuneGenerator` for the options and `train` for what is returned, and:

    Returns:
        "start", the pre-trained model's recipe; "loaded" of "tensors", how many of the new model's tensors are its; "fresh"
        and "dropped", the modules that only the new model has, and those that only the old one had.

    Raises:
        ValueError: the model cannot become a generator, the data has no labels or does not fit it, or an option is out of
            its range.
    """
    model, about = load_model(options.run)
    clip = model.recipe.clip
    source = source_for(options.data, clip, labelled=True)
    classes = tuple(source.classes or ())
    recipe = generator(model.recipe, num_classes=len(classes))
    if options.clean_share is not None:
        recipe = with_clean_share(recipe, options.clean_share)
    training = planned(recipe.training, options)
    if options.label_dropout is not None:
        training = dataclasses.replace(training, label_dropout=options.label_dropout)
    recipe = dataclasses.replace(recipe, training=training)

    initial, report = carry_over(model, recipe, about.classes in ((), classes))
    clean = recipe.branch_on("none")
    if clean is not None and clean.share * min(training.batch_size, len(source)) < 1:
        raise ValueError(
            f"A batch of {min(training.batch_size, len(source))} is too small for the {clean.share:.0%} of it that should be "
            "clean pictures. Give a larger --batch-size or more pictures, or --clean-share 0."
        )
    recipe, samples, run = prepare(recipe, source, options, classes, start=str(options.run))
    outcome = train(recipe, samples, run, on_progress, initial)
    if "rank" in outcome:
        return outcome
    return {
        **outcome,
        "start": f"{model.recipe.name} {model.recipe.size}",
        "num_classes": len(classes),
        **report,
    }
