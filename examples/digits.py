"""The demo: pre-train a small DiffMAE on 1,437 handwritten digits, probe it, repaint held-out digits, write a report.

Run by `make demo`. Three to four minutes on two CPU cores. Everything in it calls what the command line calls.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from unveil.checkpoint import load_model
from unveil.config import Condition, Schedule
from unveil.data import Samples, batches, open_source
from unveil.holes import masked_view, named_holes
from unveil.losses import Draws, Objective, draw
from unveil.model import MaskedDiffusionAutoencoder
from unveil.pipeline import predict, repaint
from unveil.pretraining import RecipeName
from unveil.recipe import Recipe
from unveil.report import Page, contact_sheet, curve, save_png
from unveil.rundir import METRICS, SHEET
from unveil.tasks.evaluate import EvaluateInpainting, evaluate_inpainting
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe
from unveil.train import Progress

OUT = Path("runs/digits")
EPOCHS = 160
SHOWN = 12
RHOS = (1.0, 0.8, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01)


def train_with_bar(name: str, options: Pretrain) -> dict[str, Any]:
    with tqdm(desc=name, unit="step", dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.num_steps
            bar.set_postfix_str(f"loss {progress.loss:.4f}, {progress.images_per_second:.0f} images/s", refresh=False)
            bar.update(progress.step - bar.n)

        return pretrain(options, show)


def losses_of(run: Path) -> tuple[list[float], list[float]]:
    """Images seen and loss, averaged over groups of records so that the line can be read."""
    records = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    group = max(1, len(records) // 60)
    chunks = [records[i : i + group] for i in range(0, len(records), group)]
    return [c[-1]["images_seen"] for c in chunks], [sum(r["loss"] for r in c) / len(c) for c in chunks]


@torch.inference_mode()
def loss_towards_mae(model: MaskedDiffusionAutoencoder, clips: torch.Tensor) -> tuple[list[float], float]:
    """DiffMAE's loss as rho goes to 0 with the noise fixed, and the loss of the MAE that it becomes.

    With one noise patch z for every token, x_t tends to z, so the decoder's input tends to the constant
    noisy_embed(z) + condition(t) at every hidden token: a mask token. The MAE has exactly that mask token and all
    other weights the same.
    """
    recipe, schedule, decoder, t = model.recipe, model.schedule, model.decoder, torch.full((len(clips),), 100)
    assert (
        schedule is not None and model.condition is not None and decoder is not None and decoder.noisy_embed is not None
    )
    z = torch.randn(recipe.clip.token_dim, generator=torch.Generator().manual_seed(0))
    (drawn,) = draw(recipe, schedule, 0, 0, range(len(clips))).branches
    assert drawn is not None and drawn.noise is not None
    fixed = Draws((dataclasses.replace(drawn, t=t, noise=z.expand_as(drawn.noise)),))

    def loss(recipe: Recipe, state: dict[str, torch.Tensor], draws: Draws) -> float:
        other = MaskedDiffusionAutoencoder(recipe)
        other.load_state_dict(state)
        return Objective(other.eval())(clips, draws)[0].item()

    state = model.state_dict()
    diffusion = [
        loss(dataclasses.replace(recipe, schedule=Schedule(kind="linear", rho=rho)), state, fixed) for rho in RHOS
    ]
    token = decoder.noisy_embed(z) + model.condition(schedule.network_time(t[:1]), None)[0]
    shared = {n: v for n, v in state.items() if not n.startswith(("decoder.noisy_embed", "condition."))}
    (branch,) = recipe.branches
    mae = dataclasses.replace(
        recipe, branches=(dataclasses.replace(branch, noise_on="none"),), schedule=None, condition=Condition()
    )
    masked = Draws((dataclasses.replace(drawn, t=None, noise=None),))
    return diffusion, loss(mae, {**shared, "decoder.mask_token": token.reshape(1, 1, -1)}, masked)


def main() -> None:
    begin = time.perf_counter()
    runs: dict[RecipeName, Path] = {"diffmae": OUT / "diffmae", "mae_raw": OUT / "mae_raw"}
    trained = {
        name: train_with_bar(
            name, Pretrain(data="digits:train", out=run, recipe=name, epochs=EPOCHS, decoder="cross_self")
        )
        for name, run in runs.items()
    }
    model, _ = load_model(runs["diffmae"])

    print("Probing the frozen encoder...", file=sys.stderr)
    probes = {
        labels or "all": probe(
            Probe(run=runs["diffmae"], data="digits:train", test_data="digits:test", labels_per_class=labels)
        )["results"]
        for labels in (10, None)
    }
    print("Repainting held-out digits...", file=sys.stderr)
    scores = {
        (name, mask): evaluate_inpainting(
            EvaluateInpainting(run=run, data="digits:test", mask=mask, limit=360, num_steps=50, sampler="ddpm")
        )
        for name, run in runs.items()
        for mask in ("random:0.75", "center:0.25")
    }
    source = open_source("digits:test", 1)
    samples = Samples(source, model.recipe.clip, seed=0, training=None)
    clips = next(iter(batches(samples, 360, 0, 0, shuffle=False, drop_last=False, num_workers=0))).clips()
    holes = named_holes(model.recipe.clip, "random:0.75", list(range(len(clips))), seed=0)
    rhos, rho_mae = loss_towards_mae(model, clips)
    gap = {
        mask: scores["diffmae", mask]["psnr"]["prediction"] - scores["mae_raw", mask]["psnr"]["prediction"]
        for mask in ("random:0.75", "center:0.25")
    }

    page = Page(
        "Unveil on handwritten digits",
        f"A DiffMAE of {sum(p.numel() for p in model.parameters()):,} parameters, pre-trained without labels on 1,437 "
        f"digits of 8 x 8 pixels for {EPOCHS} epochs ({trained['diffmae']['seconds']:.0f} s on this machine), and tested "
        "on the 360 digits that it never saw.",
    )
    page.heading("Repainting")
    shown, shown_holes = clips[:SHOWN], holes[:SHOWN]
    painted = repaint(model, shown, shown_holes, num_steps=50, num_samples=4)
    few = repaint(model, shown, shown_holes, num_steps=10, sampler="ddim")[:, 0]
    rows = [
        ("truth", list(shown)),
        ("input: three quarters are hidden", list(masked_view(shown, shown_holes))),
        ("one-step prediction at t = T: the mean of what could be there", list(predict(model, shown, shown_holes))),
        ("sampled in 10 DDIM steps", list(few)),
        *((f"another sample of the same hole, 50 DDPM steps ({i + 1})", list(painted[:, i])) for i in range(4)),
    ]
    sheet = contact_sheet(rows, cell=64)
    save_png(OUT / "repaint.png", sheet)
    page.picture(sheet, "Held-out digits; the visible pixels are kept exactly")
    page.table(
        ["filling of the hole", "random 75 %, dB", "centre block, dB"],
        [
            [label, *(f"{scores[name, mask]['psnr'][key]:.2f}" for mask in ("random:0.75", "center:0.25"))]
            for label, name, key in (
                ("mean colour of the visible pixels", "diffmae", "mean_fill"),
                ("DiffMAE, one-step prediction", "diffmae", "prediction"),
                ("MAE (raw pixels)", "mae_raw", "prediction"),
                ("DiffMAE, one sample", "diffmae", "sample"),
                ("DiffMAE, mean of 8 samples", "diffmae", "sample_mean"),
            )
        ],
    )
    page.text(
        "PSNR inside the hole, mean over the 360 held-out digits. A single sample is sharper and scores lower: it is one "
        "possible answer, and the mean is the safest one."
    )
    for mask, label in (("random:0.75", "random 75 %"), ("center:0.25", "centre block")):
        s = scores["diffmae", mask]
        page.text(
            f"{label}: 8 samples of one hole differ by {s['std']:.3f} of the range (standard deviation); their sharpness "
            f"(Laplacian energy) is {s['sharpness']:.0%} of the truth's."
        )
    page.heading("Recognition")
    page.table(
        [
            "features",
            "linear, 10 labels per class",
            "linear, all labels",
            "20-NN, 10 labels per class",
            "20-NN, all labels",
        ],
        [
            [name, *(f"{probes[labels][name][kind]:.1f} %" for kind in ("linear", "knn") for labels in (10, "all"))]
            for name in probes["all"]
        ],
    )
    page.text(
        "Accuracy on held-out digits. Raw pixels are strong here: the digits are centred and small. Whichever wins is "
        "printed."
    )
    page.heading("MAE is one step of diffusion")
    page.text(
        f"From one seed, the one-step prediction of DiffMAE at t = T and that of an MAE on raw pixels differ by "
        f"{gap['random:0.75']:+.2f} dB (random) and {gap['center:0.25']:+.2f} dB (centre) inside the hole; positive is in "
        "favour of DiffMAE."
    )
    page.picture(
        curve(
            {"DiffMAE": (RHOS, rhos), "the MAE that it becomes": (RHOS, [rho_mae] * len(RHOS))},
            "rho (exponent on the noise schedule's betas)",
            "loss",
            log_x=True,
        ),
        f"With the noise fixed, DiffMAE's loss becomes MAE's as rho goes to 0: {rhos[-1]:.5f} and {rho_mae:.5f}",
    )
    page.heading("Training")
    page.picture(
        curve({name: losses_of(run) for name, run in runs.items()}, "images seen", "loss"),
        "DiffMAE's loss is lower because at small t most of the answer is visible in its input",
    )
    page.picture((runs["diffmae"] / SHEET).read_bytes(), "The contact sheet that is refreshed while DiffMAE trains")
    report = OUT / "report.html"
    page.save(report)

    print(f"\n{'features':<20}{'10 labels per class':>22}{'all labels':>14}   (linear probe, %)")
    for name in probes["all"]:
        print(f"{name:<20}{probes[10][name]['linear']:>22.1f}{probes['all'][name]['linear']:>14.1f}")
    for labels in (10, "all"):
        winner = max(probes[labels], key=lambda name: probes[labels][name]["linear"])
        print(f"Best with {labels} labels{' per class' if labels == 10 else ''}: {winner}.")
    print(
        f"In the hole: one-step prediction {scores['diffmae', 'random:0.75']['psnr']['prediction']:.2f} dB, mean fill "
        f"{scores['diffmae', 'random:0.75']['psnr']['mean_fill']:.2f} dB (random 75 %)."
    )
    print(f"{time.perf_counter() - begin:.0f} s in all. Open the report: {report.resolve()}")
    (OUT / "report.json").write_text(
        json.dumps(
            {
                "probe": probes,
                "repaint": {f"{n} {m}": s for (n, m), s in scores.items()},
                "gap_db": gap,
                "rho": dict(zip(map(str, RHOS), rhos, strict=True)),
                "rho_mae": rho_mae,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # as a run of other settings in the same place, after the demo itself was changed
        print(f"{error} The demo's runs are in {OUT}; remove that folder to start anew.", file=sys.stderr)
        sys.exit(2)
