"""How much of a segmentation the frozen patches hold: a linear head on each of them."""

import colorsys
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unveil import draws
from unveil.checkpoint import FromRun, load_encoder, pick_device, write_atomically
from unveil.config import Clip
from unveil.data import Samples, batches, check_pixels, source_for
from unveil.features import encoder_features, extract, untrained
from unveil.metrics import confusion, intersection_over_union
from unveil.probing import IGNORE, DenseProbe
from unveil.report import contact_sheet, save_png
from unveil.sources import Folder
from unveil.transforms import fit

SHOWN = 8  # test pictures of the contact sheet
RESULT, SHEET = "segment.json", "contact_sheet.png"


@dataclass(frozen=True, kw_only=True)
class Segment(FromRun):
    """Measure the frozen patches on label maps: a linear head on each patch, its logits upsampled to pixels.

    A label map is a PNG of one channel (8 bits, or a palette, whose indices count) at the picture's relative path, as
    photos/a/1.jpg and maps/a/1.png, and of its size. A pixel's value is its class; 255 is none, which is neither trained on
    nor scored. Pictures and maps are brought to the model's size alike, and scored there: the mean over classes of
    intersection over union (mIoU), and the share of pixels that are right. The tokens of all pictures are held in memory.

    Example: unveil segment --run runs/photos --data photos/ --labels maps/ --out segmented
    """

    data: str
    """A folder of pictures."""
    labels: Path
    """The folder of their label maps."""
    test_data: str | None = None
    """A folder of test pictures. Default: a random fifth of --data is held out."""
    test_labels: Path | None = None
    """The folder of their label maps."""
    out: Path
    """Directory for segment.json and contact_sheet.png (picture, truth, prediction): a new or an empty one."""
    num_classes: int | None = None
    """How many classes there are, to find maps with others. Default: the largest value in the maps and 1."""
    epochs: int = 50
    """Passes over the training pictures, of the head alone; the pictures are encoded once."""
    time: float = 0.0
    """Put noise of this time on the pictures first, but not for raw pixels."""
    baselines: bool = True
    """Also train a head on the untrained encoder's patches, and on the raw pixels of each patch."""
    seed: int = 0
    """Draws what is held out, the head's start and order, and the untrained encoder."""
    batch_size: int = 16
    """Pictures in a step."""
    workers: int = 0
    """Processes that read pictures."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def _upright_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture as it is decoded; None if its file cannot tell, which reading it will say."""
    try:
        if path.suffix.lower() == ".npy":
            height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
            return width, height
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF's orientation, a quarter turn
            return (image.height, image.width) if turned else image.size
    except Exception:  # a damaged file can make its reader raise anything
        return None


def read_label_map(path: Path) -> Tensor:
    """A label map's values, (H, W) uint8; of a picture with a palette, the indices.

    Raises:
        ValueError: it cannot be read, or has more than one channel of 8 bits.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except Exception as error:  # a damaged file can make its reader raise anything
        raise ValueError(f"The label map {path} cannot be read ({type(error).__name__}: {error}).") from None
    if mode not in ("L", "P"):
        raise ValueError(
            f"The label map {path} is {mode}, but a map has one channel of 8 bits whose values are the classes. Write it as "
            "gray (L) or with a palette (P)."
        )
    return torch.from_numpy(values)


def _labelled(data: str, labels: Path, clip: Clip, num_classes: int | None) -> tuple[Samples, Tensor]:
    """Pictures, and their label maps at the model's size, (n, H, W) uint8.

    Raises:
        ValueError: no folder of pictures, or a map is missing, of another size, or has a value that is no class.
    """
    check_pixels(data, clip)
    if not Path(data).expanduser().is_dir():
        raise ValueError(f"{data!r} is no folder; label maps are found by the paths of pictures in one. Name a folder.")
    if not labels.is_dir():
        raise ValueError(f"{str(labels)!r} is no folder. Name the folder that holds the label maps of {data}.")
    root = Path(data).expanduser().resolve()
    if root in (labels.resolve(), *labels.resolve().parents):
        raise ValueError(f"{str(labels)!r} lies in {data}, so that its maps would be read as pictures. Move it out.")
    source = source_for(data, clip)
    if not isinstance(source, Folder):
        raise ValueError(
            f"{data!r} holds parquet files or tar shards; label maps are found by the paths of pictures. Name a folder."
        )
    maps, of = [], dict[Path, str]()
    for where in source.paths:
        path = (labels / where).with_suffix(".png")
        if of.setdefault(path, where) != where:
            raise ValueError(f"{of[path]} and {where} of {data} would share the label map {path}. Rename one of them.")
        if not path.is_file():
            raise ValueError(
                f"{where} of {data} has no label map: there is no {path}. Add it, or take the picture out."
            )
        values = read_label_map(path)
        size, (height, width) = _upright_size(source.root / where), values.shape
        if size not in (None, (width, height)):
            raise ValueError(
                f"The label map {path} is {width} x {height} pixels, but {where} is {size[0]} x {size[1]}. Make them the "
                "same size."
            )
        if num_classes is not None:
            wrong = values[(values >= num_classes) & (values != IGNORE)]
            if len(wrong):
                raise ValueError(
                    f"The label map {path} has a value {wrong.max()}, but --num-classes {num_classes} are the values 0 to "
                    f"{num_classes - 1}, and {IGNORE} for none. Give more, or mend the map."
                )
        maps.append(fit(values[None, None], clip.height, clip.width, nearest=True)[0, 0])
    return Samples(source, clip, seed=0, training=None), torch.stack(maps)


def _check(options: Segment) -> None:
    if (options.test_data is None) != (options.test_labels is None):
        raise ValueError("--test-data and --test-labels belong together. Give both, or neither.")
    if options.num_classes is not None and not 2 <= options.num_classes <= IGNORE:
        raise ValueError(f"--num-classes {options.num_classes}: use 2 to {IGNORE}.")
    if options.epochs < 1:
        raise ValueError(f"--epochs {options.epochs}: train for at least one.")
    out = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file. Name a directory for the results.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty. Name a new directory, or empty this one.")
    for folder in (options.data, options.test_data):
        if folder is not None and Path(folder).expanduser().resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"--out {out} lies in {folder}, where it would be read as a picture. Choose another.")


def palette(num_classes: int) -> Tensor:
    """A colour for each value of a label map, (256, 3) in [0, 1]; black for those that are no class."""
    colours = torch.zeros(256, 3)
    for label in range(num_classes):
        # steps of the golden ratio around the circle of hues: neighbours differ, however many there are
        colours[label] = torch.tensor(colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.75, 0.95 - 0.25 * (label % 2)))
    return colours


def _painted(label_map: Tensor, colours: Tensor) -> Tensor:
    """A label map (H, W) as a clip (3, 1, H, W)."""
    return colours[label_map.long()].permute(2, 0, 1)[:, None]


def _scores(predictions: Tensor, truth: Tensor, num_classes: int) -> dict[str, Any]:
    counts = confusion(predictions, truth, num_classes, IGNORE)
    iou = intersection_over_union(counts)
    return {
        "miou": 100 * iou.nanmean().item(),
        "pixel_accuracy": 100 * (counts.diagonal().sum() / counts.sum()).item(),
        "iou": [None if value != value else 100 * value for value in iou.tolist()],
    }


def segment(options: Segment, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil segment`; on_progress is told the pictures encoded and their number.

    Returns:
        "results": for each kind of features "miou" over the classes that the test maps have, "pixel_accuracy", and "iou" of
        each class, None where the test maps have it not; all in percent. "most_common", the share of the test pixels that
        the class of most of them has. The numbers of pictures, classes and steps, "problems" and "out".

    Raises:
        ValueError: a map is missing or wrong, or no pixel has a class. Maps are read before anything is encoded.
    """
    _check(options)
    device = pick_device(options.device)
    model, _ = load_encoder(options.run, device)
    clip = model.recipe.clip
    functions = {"encoder": encoder_features(model, "patches", options.time, options.seed)}
    if options.baselines:
        at_start = untrained(model.recipe, options.seed, device)
        functions["untrained encoder"] = encoder_features(at_start, "patches", options.time, options.seed)
        functions["raw pixels"] = lambda clips, indices: model.tokens(clips)
    sets = [_labelled(options.data, options.labels, clip, options.num_classes)]
    if options.test_data is not None and options.test_labels is not None:
        sets.append(_labelled(options.test_data, options.test_labels, clip, options.num_classes))
    values = torch.cat([maps[maps != IGNORE] for _, maps in sets])
    if not len(values):
        raise ValueError(f"No pixel of the label maps in {options.labels} has a class: all are {IGNORE}.")
    num_classes = options.num_classes or int(values.max()) + 1
    if num_classes == 1:
        raise ValueError(
            f"Every pixel of the label maps in {options.labels} is of class 0, so there is nothing to tell apart."
        )
    total, encoded = sum(len(samples) for samples, _ in sets), 0

    def count(num_samples: int) -> None:
        nonlocal encoded
        encoded += num_samples
        if on_progress is not None:
            on_progress(encoded, total)

    problems = [problem for samples, _ in sets for problem in samples.source.skipped]

    def encode(samples: Samples) -> tuple[list[Tensor], Tensor]:
        loader = batches(samples, options.batch_size, 0, 0, shuffle=False, drop_last=False, num_workers=options.workers)

        def noted() -> Any:
            for batch in loader:
                problems.extend(batch.problems)
                yield batch

        features, _, indices = extract(noted(), *functions.values(), device=device, on_batch=count)
        return features, indices

    (samples, maps), (test_samples, test_maps) = sets[0], sets[-1]
    train, rows = encode(samples)
    if len(sets) == 1:
        order = torch.randperm(len(rows), generator=draws.generator(options.seed, "held out"))
        held, kept = order[: len(rows) // 5].sort().values, order[len(rows) // 5 :].sort().values
        if not len(held):
            raise ValueError(f"{options.data} has {len(rows)} pictures, too few to hold some out. Give --test-data.")
        test, test_rows = [x[held] for x in train], rows[held]
        train, rows = [x[kept] for x in train], rows[kept]
    else:
        test, test_rows = encode(test_samples)
    truth = test_maps[test_rows]
    for what, found in (("training", maps[rows]), ("test", truth)):
        if (found == IGNORE).all():
            raise ValueError(f"No pixel of the {what} pictures' label maps has a class: all are {IGNORE}.")
    results, predictions, num_steps = {}, [], 0
    for name, x, z in zip(functions, train, test, strict=True):
        probe = DenseProbe(
            x.shape[-1],
            num_classes,
            clip.grid[1:],
            (clip.height, clip.width),
            batch_size=options.batch_size,
            seed=options.seed,
            device=device,
        )
        num_steps = probe.fit(x, maps[rows], options.epochs)
        predictions.append(probe.predict(z))
        results[name] = _scores(predictions[-1], truth, num_classes)
    known = truth[truth != IGNORE]
    result = {
        "results": results,
        "most_common": 100 * known.long().bincount().max().item() / len(known),
        "train_pictures": len(rows),
        "test_pictures": len(truth),
        "num_classes": num_classes,
        "epochs": options.epochs,
        "steps": num_steps,
        "time": options.time,
        "problems": [{"where": problem.where, "what": problem.reason} for problem in problems],
        "out": str(options.out),
    }
    colours = palette(num_classes)
    shown = (
        torch.linspace(0, len(truth) - 1, min(SHOWN, len(truth))).round().long()
    )  # of the whole folder, not its first class
    pictures = [test_samples[0, i, i].clip for i in test_rows[shown].tolist()]
    sheet = [
        ("pictures", [picture for picture in pictures if picture is not None]),
        ("truth; black has no class", [_painted(label_map, colours) for label_map in truth[shown]]),
        (
            "prediction from the encoder's patches",
            [_painted(label_map, colours) for label_map in predictions[0][shown]],
        ),
    ]
    save_png(options.out / SHEET, contact_sheet(sheet))
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(options.out / RESULT, lambda part: part.write_text(text, encoding="utf-8"))
    return result
