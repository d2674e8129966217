"""Finding what does not belong in a picture, with a model that was trained on normal ones."""

import csv
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unveil import draws
from unveil.anomalies import Usual, ensemble_holes, picture_score, surprise
from unveil.checkpoint import FromRun, load_model, pick_device, write_atomically
from unveil.data import BadPicture, Source, check_pixels, open_source
from unveil.mask_files import MaskFolder
from unveil.model import MaskedDiffusionAutoencoder
from unveil.originals import read_original, save_pixels, stem_of
from unveil.painting import resize, resize_hole
from unveil.report import contact_sheet, heat, save_png
from unveil.sources import files_of

GOOD = "good"  # MVTec's name of the normal pictures
IN_SHEET = 12
SHOWN_SIDE = 512  # of a heat map, at most
SCORES, SHEET = "scores.csv", "sheet.png"  # in --out


@dataclass(frozen=True, kw_only=True)
class Anomaly(FromRun):
    """Score how unusual pictures are, and show where, by hiding parts of them again and again and painting these anew.

    The model must have been pre-trained on normal pictures of the same kind. A folder laid out as MVTec AD's, with train/good,
    test/good, test/DEFECT and perhaps ground_truth/DEFECT/NAME_mask.png, also gives the area under the ROC curve, for pictures
    and for pixels; any other folder of pictures gives scores.

    Example: unveil anomaly --run runs/screws --data mvtec/screw --out screws
    """

    data: str
    """A folder of pictures to score, or one laid out as MVTec's."""
    out: Path
    """Directory for scores.csv, the heat maps and a sheet of the highest scores."""
    normal: str | None = None
    """Normal pictures, which tell how much surprise is usual at each place. Default: train/good of MVTec's layout, otherwise
    none."""
    num_masks: int = 8
    """Masks for each picture; together they hide every patch equally often."""
    mask_ratio: float | None = None
    """Share of the patches that each of them hides. Default: what the model was trained with."""
    num_samples: int = 4
    """Answers to each mask. 1 takes the single prediction, which is several times faster."""
    num_steps: int = 10
    """Sampling steps."""
    limit: int | None = None
    """At most this many pictures, from the first on. Default: all."""
    limit_normal: int = 64
    """At most this many normal pictures."""
    seed: int = 0
    """Draws masks and noise."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


@dataclass(frozen=True)
class _Layout:
    """tests: folder of the pictures to score. normal: of normal ones, or None. truth: of masks, or None. labelled: MVTec's."""

    tests: str
    normal: str | None
    truth: Path | None
    labelled: bool


def _layout(options: Anomaly) -> _Layout:
    root = Path(options.data).expanduser()
    if not (root / "test").is_dir():
        return _Layout(options.data, options.normal, None, False)
    if not (root / "test" / GOOD).is_dir():
        raise ValueError(
            f"{root} has a folder test, as MVTec's layout, but no test/{GOOD}, whose pictures are the normal ones to compare "
            "with. Add it, or name the folder of pictures itself."
        )
    normal = options.normal or (str(root / "train" / GOOD) if (root / "train" / GOOD).is_dir() else None)
    truth = root / "ground_truth"
    return _Layout(str(root / "test"), normal, truth if truth.is_dir() else None, True)


@dataclass(frozen=True)
class _Found:
    """One picture: its place below the folder, the name of its heat map, MVTec's kind or "", the score, the map (T, h, w) that
    it is of, the picture as it is shown (C, T, H, W), and where its defect is (H, W), if that is known."""

    where: str
    file: str
    kind: str
    score: float
    values: Tensor
    clip: Tensor
    truth: Tensor | None


def _check_numbers(options: Anomaly, model: MaskedDiffusionAutoencoder) -> None:
    """Refuse what no picture could be scored with, whether it comes to be used or not."""
    ratio = options.mask_ratio
    if ratio is not None and not 0 < ratio < 1:  # nor nan
        raise ValueError(
            f"--mask-ratio {ratio:g} is no share of the patches to hide. Give one between 0 and 1, as 0.75."
        )
    least = {"num-samples": (options.num_samples, 1), "num-steps": (options.num_steps, 1), "limit": (options.limit, 1)}
    for name, (given, lowest) in {**least, "limit-normal": (options.limit_normal, 2)}.items():
        if given is not None and given < lowest:
            raise ValueError(f"--{name} {given}: ask for at least {lowest}.")
    if model.schedule is not None:
        model.schedule.times(options.num_steps)


def _check_out(options: Anomaly, layout: _Layout, sources: list[Source], names: list[str]) -> None:
    """Refuse a directory in which what is read would be overwritten, or be read as a picture the next time; then make it, and
    see that it takes a file.

    Args:
        names: of the files that will be written.
    """
    out = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file. Name a directory for the results.")
    real = out.resolve()
    given = [(options.data, "pictures"), *([] if layout.normal is None else [(layout.normal, "normal pictures")])]
    for data, what in given:
        folder = Path(data).expanduser().resolve()
        if folder.is_dir() and folder in (real, *real.parents):
            raise ValueError(
                f"--out {out} lies in the folder of {what}, and would be read as one of them. Choose another."
            )
    read = {os.path.realpath(Path(data).expanduser()) for data, _ in given}
    read.update(*map(files_of, sources))
    for name in names:
        if os.path.realpath(out / name) in read:
            raise ValueError(
                f"--out {out}: its {name} is read here, and would be overwritten. Choose another directory."
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(
            f"--out {out}: no file can be written there ({error.strerror or error}). Choose another directory."
        ) from None


class _Scorer:
    """Makes maps of pictures of any size, all seen at the model's."""

    def __init__(self, options: Anomaly, model: MaskedDiffusionAutoencoder) -> None:
        self.options, self.model = options, model
        ratio = options.mask_ratio
        if ratio is None:
            ratio = next((b.mask_ratio for b in model.recipe.branches if 0 < b.mask_ratio < 1), 0.75)
        self.mask_ratio = ratio
        ensemble_holes(model.recipe.clip, options.num_masks, ratio, options.seed)  # so that it refuses before any work

    def map_of(self, clip: Tensor, index: int, part: str) -> Tensor:
        """(C, T, H, W) of any size to (T, h, w) of the model's."""
        options, sizes = self.options, self.model.recipe.clip
        seed = draws.key(options.seed, part, index)
        holes = ensemble_holes(sizes, options.num_masks, self.mask_ratio, seed)
        clip = clip if clip.shape[-2:] == (sizes.height, sizes.width) else resize(clip, sizes.height, sizes.width)
        return surprise(
            self.model, clip, holes, num_samples=options.num_samples, num_steps=options.num_steps, seed=seed
        )

    def pictures(self, source: Source, limit: int | None, notices: list[str]) -> Iterator[tuple[int, Tensor]]:
        """Those that can be read, as (C, T, H, W), with their index."""
        notices += [f"Skipped {s.where}: {s.reason}." for s in source.skipped]
        channels = self.model.recipe.clip.channels
        for index in range(len(source) if limit is None else min(len(source), limit)):
            try:
                data = source.encoded(index)
                if data is None:
                    yield index, source.read(index).values.transpose(0, 1).float()
                else:
                    yield index, read_original(data, source.where(index)).seen(channels)
            except BadPicture as bad:
                notices.append(f"Skipped {bad.where}: {bad.reason}.")
            except ValueError as error:
                notices.append(f"Skipped {source.where(index)}: {error}")


def _area(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """Under the ROC curve, in percent; None if there is only one kind."""
    from sklearn.metrics import roc_auc_score

    return None if truth.all() or not truth.any() else 100 * float(roc_auc_score(truth, scores))


def _over(values: Tensor, low: float, high: float, clip: Tensor) -> Tensor:
    """A map (T, h, w) over its picture (C, T, H, W), from low to high as no colour to yellow: (3, T, H, W)."""
    scaled = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    scaled = F.interpolate(scaled[None], clip.shape[-2:], mode="bilinear", align_corners=False)[0]
    grey = clip[:3].mean(0, keepdim=True).expand(3, -1, -1, -1)
    return torch.lerp(grey, heat(scaled), 0.2 + 0.7 * scaled)


def _shown(clip: Tensor) -> Tensor:
    scale = SHOWN_SIDE / max(clip.shape[-2:])
    return clip if scale >= 1 else resize(clip, *(max(1, round(side * scale)) for side in clip.shape[-2:]))


def _truth_masks(layout: _Layout) -> dict[str, Tensor]:
    """By the picture's place below test, without extension: (H, W) bool."""
    if layout.truth is None:
        return {}
    folder = MaskFolder(open_source(str(layout.truth), 1), False, ())
    found = {}
    for i in range(len(folder)):
        mask = folder.read(i)
        found[mask.name.removesuffix("_mask")] = mask.hole
    return found


def anomaly(options: Anomaly, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil anomaly`; on_progress is told the pictures done and their number.

    Returns:
        "pictures": each one's name, score and, of MVTec's layout, its kind; "auroc", in percent: "pictures", of all kinds
        together and of each, and "pixels", if there are masks of them; "scores" and "sheet", files; "calibrated", by how
        many normal pictures; "notices".

    Raises:
        ValueError: no picture can be read, or the masks do not fit the model.
    """
    model, _ = load_model(options.run, pick_device(options.device))
    _check_numbers(options, model)
    layout, scorer = _layout(options), _Scorer(options, model)
    sizes = model.recipe.clip
    check_pixels(layout.tests, sizes)
    source = open_source(layout.tests, sizes.channels, sizes.frames)
    normal = None if layout.normal is None else open_source(layout.normal, sizes.channels, sizes.frames)
    total = len(source) if options.limit is None else min(len(source), options.limit)
    stems: set[str] = set()
    files = [f"{stem_of(source.where(index), stems)}_heat.png" for index in range(total)]
    _check_out(options, layout, [source] if normal is None else [source, normal], [SCORES, SHEET, *files])
    notices: list[str] = []
    usual_maps: list[Tensor] = []
    usual = None
    if normal is not None:
        for index, clip in scorer.pictures(normal, options.limit_normal, notices):
            usual_maps.append(scorer.map_of(clip, index, "normal"))
        if len(usual_maps) < 2:
            raise ValueError(f"{layout.normal} has {len(usual_maps)} normal pictures to read; two at least are needed.")
        usual = Usual.of(torch.stack(usual_maps))
    truths = _truth_masks(layout)
    found: list[_Found] = []
    for index, clip in scorer.pictures(source, options.limit, notices):
        where = source.where(index)
        values = scorer.map_of(clip, index, "test")
        values = values if usual is None else usual.excess(values)
        kind = Path(where).parts[0] if layout.labelled and len(Path(where).parts) > 1 else ""
        truth = truths.get(Path(where).with_suffix("").as_posix())
        if truth is None and layout.labelled and kind == GOOD and truths:
            truth = torch.zeros(clip.shape[-2:], dtype=torch.bool)
        found.append(_Found(where, files[index], kind, picture_score(values), values, _shown(clip), truth))
        if on_progress is not None:
            on_progress(index + 1, total)
    if not found:
        raise ValueError(f"No picture of {options.data} could be read. {' '.join(notices)}")
    result: dict[str, Any] = {
        "out": str(options.out),
        "pictures": [
            {"picture": one.where, "score": one.score, **({"kind": one.kind} if layout.labelled else {})}
            for one in found
        ],
        "calibrated": len(usual_maps),
        "mask_ratio": scorer.mask_ratio,
        **_written(options.out, found),
        "notices": notices,
    }
    if layout.labelled:
        result["auroc"] = _areas(found)
    return result


def _areas(found: list[_Found]) -> dict[str, float | dict[str, float | None] | None]:
    kinds = [one.kind for one in found]
    scores, bad = np.array([one.score for one in found]), np.array([kind != GOOD for kind in kinds])
    each = {}
    for kind in sorted(set(kinds) - {GOOD}):
        rows = np.array([k in (kind, GOOD) for k in kinds])
        each[kind] = _area(bad[rows], scores[rows])
    areas: dict[str, float | dict[str, float | None] | None] = {"pictures": _area(bad, scores), "by_kind": each}
    # only of pictures whose defects are marked, and of good ones, at the model's size
    marked = [(one.values, one.truth) for one in found if one.truth is not None]
    pairs = [(values, resize_hole(truth[None], *values.shape[-2:])) for values, truth in marked]
    if pairs:
        values, truth = (torch.stack(list(part)).numpy().ravel() for part in zip(*pairs, strict=True))
        areas["pixels"] = _area(truth, values)
    return areas


def _written(out: Path, found: list[_Found]) -> dict[str, str]:
    """scores.csv, the highest first; a heat map for each picture, all on one scale; and a sheet of the first."""
    order = sorted(found, key=lambda one: -one.score)

    def write(part: Path) -> None:
        with open(part, "w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["path", "score"])
            table.writerows([one.where, f"{one.score:.6g}"] for one in order)

    write_atomically(out / SCORES, write)
    low = statistics.median(one.values.median().item() for one in found)
    high = max(one.values.max().item() for one in found)
    shown: dict[str, tuple[Tensor, Tensor]] = {}
    for one in order:
        seen = _over(one.values, low, high, one.clip)
        save_pixels(out / one.file, (seen.permute(1, 2, 3, 0) * 255).round().byte().numpy())
        if len(shown) < IN_SHEET:
            shown[one.file] = (resize(one.clip, 128, 128), resize(seen, 128, 128))
    rows = [("the highest scores", [pair[0] for pair in shown.values()]), ("where", [p[1] for p in shown.values()])]
    save_png(out / SHEET, contact_sheet(rows))
    return {"scores": str(out / SCORES), "sheet": str(out / SHEET)}
