"""How good repainting is on held-out data: PSNR, SSIM and LPIPS in the hole and over the whole, diversity and sharpness."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unveil import draws
from unveil.checkpoint import FromRun, load_model, pick_device
from unveil.config import Clip
from unveil.data import Samples, batches, source_for
from unveil.decoding import extensions
from unveil.holes import NAMED_HOLES, named_holes
from unveil.likeness import PSNR, TRUNKS, CannotJudge, Judge, Trunk, check_lpips, lpips_judge, ssim_judge
from unveil.mask_files import read_mask
from unveil.metric_weights import FromWeights, MissingWeights, Weights, find_weights_of
from unveil.metrics import hole_mse, laplacian_energy, mean_interval, psnr
from unveil.model import MaskedDiffusionAutoencoder
from unveil.painting import resize_hole
from unveil.pipeline import Sampler, default_sampler, predict, repaint
from unveil.sources import as_text

FILLINGS = ("mean_fill", "prediction", "sample", "best_sample", "sample_mean")
NAMED = 3  # of the files that could not be used
RESIZE = "antialiased bicubic, so that the picture just covers it, and a centre crop; none if it has that size"


@dataclass(frozen=True, kw_only=True)
class EvaluateInpainting(FromWeights, FromRun):
    """Score repainting on held-out pictures, in the hole and over the whole: the one-step prediction, several samples, the
    best of them, their mean, and the visible pixels' mean colour, by PSNR, SSIM and LPIPS with 95 % confidence intervals.

    SSIM and LPIPS need `pip install "unveil[evaluate]"`, LPIPS also weights, which --download fetches.

    Example: unveil evaluate inpainting --run runs/digits/diffmae --data digits:test --mask random:0.75
    """

    data: str
    """Held-out pictures, as for pretrain. They are scored at the model's size."""
    mask: str = "random:0.75"
    """random:SHARE of the tokens, center:SHARE of the area, block:SHARE of it anywhere, irregular:SHARE of the pixels as
    strokes, tube:SHARE of the places in every frame; or a mask picture, white where it is to be repainted, or a folder of
    them, nested or flat, of which every picture draws one by its number and the seed."""
    lpips: Literal["none", "alex", "vgg", "both"] | None = None
    """By which networks to measure perceptual distance. Default: those whose weights are here."""
    limit: int = 256
    """How many pictures, from the first on."""
    num_samples: int = 8
    """Samples for each hole."""
    num_steps: int = 20
    """Sampling steps."""
    sampler: Sampler | None = None
    """dpmpp, ddim or ddpm, as for inpaint. Default: dpmpp, but ddpm for models that see noise everywhere (dit, umd)."""
    seed: int = 0
    """Draws masks and noise."""
    batch_size: int = 64
    """Pictures at once; no effect on the result."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


@dataclass
class MaskPictures:
    """Mask files, of which picture i draws one by (seed, i), brought to the model's size: a pixel that any pixel of a hole
    falls into is one. What hides nothing is passed over, and if some must be visible, what hides everything.

    passed_over: such files, so far.
    """

    files: list[Path]
    clip: Clip
    some_visible: bool
    passed_over: set[Path] = field(default_factory=set)

    @classmethod
    def below(cls, path: Path, clip: Clip, some_visible: bool) -> "MaskPictures":
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in found if file.suffix.lower() in extensions() - {".npy"} and file.is_file()]
        if not files:
            raise ValueError(
                f"--mask {path} holds no mask picture. Name a picture that is white where it is to be repainted."
            )
        return cls(files, clip, some_visible)

    def _read(self, file: Path) -> Tensor:
        """(H, W) bool at the model's size."""
        return resize_hole(read_mask(str(file)).hole[None], self.clip.height, self.clip.width)[0]

    def _usable(self, hole: Tensor) -> bool:
        return bool(hole.any()) and not (self.some_visible and bool(hole.all()))

    def of(self, index: int, seed: int) -> Tensor:
        """The hole (T, H, W) of the picture of this number."""
        for number in torch.randperm(
            len(self.files), generator=draws.generator(seed, index, "evaluation mask")
        ).tolist():
            hole = self._read(self.files[number])
            if self._usable(hole):
                return hole.expand(self.clip.frames, -1, -1)
            self.passed_over.add(self.files[number])
        raise ValueError(
            f"--mask: none of {len(self.files)} file(s), as {self.files[0]}, can be used at {self.clip.width} x "
            f"{self.clip.height} pixels: each hides nothing, or everything. Give others."
        )


def score(
    model: MaskedDiffusionAutoencoder,
    clips: Tensor,
    holes: Tensor,
    *,
    num_samples: int,
    num_steps: int,
    sampler: Sampler,
    seed: int,
    indices: Sequence[int] | None = None,
    reimpose_known: bool = True,
    judges: Sequence[Judge] = (),
) -> dict[str, Tensor]:
    """Per-picture figures of one batch, (B,) each; MSE in the hole, values in [0, 1].

    mean_fill: the hole filled with the visible pixels' mean colour. prediction: the single one at t = T.
    sample: mean over samples of their MSE. sample_mean: MSE of the samples' mean. std: deviation between samples.
    sharpness: the samples' Laplacian energy over the truth's, both summed by the caller.
    And what the judges say of each filling, as "JUDGE hole FILLING" and "JUDGE whole FILLING".
    """
    inside = holes[:, None].expand_as(clips)
    fillings = {"prediction": predict(model, clips, holes, seed=seed, indices=indices)}
    if not holes.flatten(1).all(1).any():  # otherwise there is no visible colour to fill with
        visible_mean = clips.masked_fill(inside, 0).sum((2, 3, 4)) / (~inside).sum((2, 3, 4))
        fillings["mean_fill"] = torch.where(inside, visible_mean[:, :, None, None, None], clips)
    samples = None
    if model.schedule is not None:
        samples = repaint(
            model,
            clips,
            holes,
            num_steps=num_steps,
            sampler=sampler,
            num_samples=num_samples,
            seed=seed,
            indices=indices,
            reimpose_known=reimpose_known,
        )
        fillings["sample_mean"] = samples.mean(1)
    figures = {name: hole_mse(filling, clips, holes) for name, filling in fillings.items()}
    figures["laplacian_truth"] = laplacian_energy(clips, holes)
    if samples is not None:
        each = torch.stack([hole_mse(samples[:, s], clips, holes) for s in range(num_samples)])
        figures["each_sample"] = each.T
        figures["sample"] = each.mean(0)
        figures["best_sample"] = each.amin(0)
        figures["laplacian_samples"] = torch.stack(
            [laplacian_energy(samples[:, s], holes) for s in range(num_samples)]
        ).mean(0)
        deviation = samples.std(1, unbiased=True) if num_samples > 1 else torch.zeros_like(clips)
        figures["std"] = (deviation * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
    for judge in judges:
        figures |= _judged(judge, fillings, samples, clips, holes)
    return {name: value.double().cpu() for name, value in figures.items()}


def _judged(
    judge: Judge, fillings: dict[str, Tensor], samples: Tensor | None, clips: Tensor, holes: Tensor
) -> dict[str, Tensor]:
    """What a judge says of each filling (B, C, T, H, W), of the samples (B, S, C, T, H, W) on the mean, and of the best."""
    figures = {}
    for name, filling in fillings.items():
        for region, values in zip(("hole", "whole"), judge.compare(filling, clips, holes), strict=True):
            figures[f"{judge.name} {region} {name}"] = judge.told(values)
    if samples is not None:
        compared = [judge.compare(samples[:, s], clips, holes) for s in range(samples.shape[1])]
        for region, values in zip(("hole", "whole"), zip(*compared, strict=True), strict=True):
            each = torch.stack(values)
            best = each.amax(0) if judge.more_is_better else each.amin(0)
            figures[f"{judge.name} {region} sample"] = judge.told(each.mean(0))
            figures[f"{judge.name} {region} best_sample"] = judge.told(best)
    return figures


def judges_for(
    options: EvaluateInpainting, clip: Clip, device: str
) -> tuple[list[Judge], dict[str, Weights], list[str]]:
    """Who judges pictures of this size: PSNR always, SSIM and LPIPS as far as they can, and what is asked for by name.

    Returns:
        The judges, the weights that they look through, and for people why some are missing.

    Raises:
        ValueError: --lpips names a network that cannot judge here.
    """
    judges, looked_through, notices = [PSNR], {}, []
    try:
        judges.append(ssim_judge(clip.height, clip.width))
    except CannotJudge as error:
        notices.append(f"Left out: {error}")
    asked: tuple[Trunk, ...] = tuple(name for name in TRUNKS if options.lpips in (None, name, "both"))
    if len(asked) > 1 and options.weights is not None and options.weights.expanduser().is_file():
        raise ValueError(
            f"--weights {options.weights} is one file. Say whose by --lpips alex or vgg, or name a folder of both."
        )
    for name in asked:
        try:
            check_lpips(name, clip.channels, clip.height, clip.width)
            weights = find_weights_of(TRUNKS[name], options)
        except (CannotJudge, MissingWeights) as error:
            if options.lpips is not None:
                raise
            notices.append(f"Left out: {error}")
            continue
        judges.append(lpips_judge(name, weights, clip.channels, clip.height, clip.width, device))
        looked_through[f"lpips_{name}"] = weights
        if not weights.published:
            notices.append(
                f"{weights.path} is not the file that everybody has (sha256 {TRUNKS[name].sha256}...), so LPIPS {name} "
                "compares among these numbers alone."
            )
    return judges, looked_through, notices


def evaluate_inpainting(
    options: EvaluateInpainting, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Run `unveil evaluate inpainting`; on_progress is told the pictures done and their number.

    Returns:
        "scores": by metric ("psnr" in dB, "ssim", "lpips_alex", "lpips_vgg"), region ("hole", "whole") and filling
        ("mean_fill", "prediction", "sample", the mean over samples, "best_sample", each picture's best by this metric and
        region, "sample_mean"), "mean" over pictures with "low" and "high", its 95 % confidence interval. A picture's PSNR of
        "sample" is that of its samples' mean squared error. "psnr": the means of the PSNR in the hole, as in "scores"; "std",
        the deviation between samples in units of the range; "sharpness", Laplacian energy of the samples over the truth's;
        "psnr_of_each_sample", the mean PSNR of first samples, second ones, and so on; "mean_beats_all", the share of
        pictures whose samples' mean has a smaller error than every one of the samples. And what these belong to: "pictures",
        "mask", "num_samples", "num_steps", "sampler", "seed", "size" (height, width), "resize", "extractors" (weights, sha256,
        whether it is the published file), "interval", and "mask_files" if masks are pictures; "notices".
    """
    if options.limit < 1:
        raise ValueError(f"--limit {options.limit}: ask for at least one picture.")
    device = pick_device(options.device)
    model, about = load_model(options.run, device)
    clip = model.recipe.clip
    source = source_for(options.data, clip)
    masks = None
    if options.mask.partition(":")[0] not in NAMED_HOLES and (path := Path(options.mask).expanduser()).exists():
        masks = MaskPictures.below(path, clip, some_visible="generate" not in model.can)
    judges, looked_through, notices = judges_for(options, clip, device)
    sampler = options.sampler or default_sampler(model)
    samples = Samples(source, clip, seed=0, training=None)
    loader = batches(samples, options.batch_size, 0, 0, shuffle=False, drop_last=False, num_workers=0)
    parts: list[dict[str, Tensor]] = []
    skipped = list(source.skipped)
    done = 0
    for batch in loader:
        skipped += batch.problems
        if batch.values is None:
            continue
        take = min(len(batch.indices), options.limit - done)
        indices = batch.indices[:take].tolist()
        if masks is None:
            holes = named_holes(clip, options.mask, indices, options.seed).to(device)
        else:
            holes = torch.stack([masks.of(i, options.seed) for i in indices]).to(device)
        if not holes.any():
            raise ValueError(f"--mask {options.mask} hides nothing, so there is nothing to score. Use a larger share.")
        parts.append(
            score(
                model,
                batch.clips(device)[:take],
                holes,
                num_samples=options.num_samples,
                num_steps=options.num_steps,
                sampler=sampler,
                seed=options.seed,
                indices=indices,
                judges=judges,
            )
        )
        done += take
        if on_progress is not None:
            on_progress(done, min(options.limit, len(samples)))
        if done >= options.limit:
            break
    if skipped:
        some = "; ".join(f"{as_text(bad.where)}: {bad.reason}" for bad in skipped[:NAMED])
        notices.append(f"Files of {options.data} that could not be used: {len(skipped)}, as {some}.")
    if not done:
        told = " ".join(notices[-1:] if skipped else [])
        raise ValueError(f"No picture of {options.data} can be read, so there is nothing to score. {told}".rstrip())
    figures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    fillings = [name for name in FILLINGS if name in figures]
    result: dict[str, Any] = {"pictures": done, "mask": options.mask, "num_samples": options.num_samples}
    result["psnr"] = {name: psnr(figures[name]).mean().item() for name in fillings}
    result["scores"] = {
        judge.name: {
            region: {name: mean_interval(figures[f"{judge.name} {region} {name}"]) for name in fillings}
            for region in ("hole", "whole")
        }
        for judge in judges
    }
    result |= {"seed": options.seed, "size": [clip.height, clip.width], "resize": RESIZE}
    result["interval"] = "95 %, of the mean over pictures, by Student's t"
    result["extractors"] = {name: weights.told() for name, weights in looked_through.items()}
    if masks is not None:
        result["mask_files"] = len(masks.files)
        if masks.passed_over:
            notices.append(
                f"Masks of {options.mask} that were passed over: {len(masks.passed_over)}, as {min(masks.passed_over)}. At "
                f"{clip.width} x {clip.height} pixels they hide nothing, or everything."
            )
    result["notices"] = notices
    if about.data == options.data:
        notices.append(f"{options.data} is what this model was trained on; held-out pictures would say more.")
    if result["psnr"]["prediction"] < result["psnr"].get("mean_fill", -100):
        notices.append("The prediction is worse than a flat colour: the model has learned too little yet.")
    if "std" in figures:
        result["std"] = figures["std"].mean().item()
        result["sharpness"] = (figures["laplacian_samples"].sum() / figures["laplacian_truth"].sum()).item()
        result["psnr_of_each_sample"] = psnr(figures["each_sample"]).mean(0).tolist()
        result["mean_beats_all"] = (figures["sample_mean"] < figures["best_sample"]).double().mean().item()
        result["num_steps"], result["sampler"] = options.num_steps, sampler
    return result
