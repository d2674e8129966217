"""What a source of pictures holds, and what of it will trouble a training."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unveil.checkpoint import write_atomically
from unveil.data import open_source
from unveil.decoding import BadPicture, header_of
from unveil.inspection import Inspected, Look, inspect, spread_rows
from unveil.planning import parse_image_size
from unveil.pretraining import BUILT_IN
from unveil.sources import Folder, Source, as_text

USUAL_SIDES = (64, 224)  # of what is trained, in pixels
FEW_PICTURES = 1000  # a model learns from thousands
MUCH_LARGER = 2  # times the side that is trained; less is hardly slower to read
NEARLY_ALL = 0.95
UNEVEN = 10  # pictures of the largest class for one of the smallest
DIM_HIGH, FLAT_STD, FAR_MEAN = 0.25, 0.1, 0.3  # of values in [0, 1]; the recipes' mean is 0.5


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Look at every picture of a data source before anything is trained: formats, sizes, damage, duplicates, colours.

    Every picture is read as pretrain reads it, so what is told here as unusable is what a training skips. Mean and std are of
    values in [0, 1], and every picture counts the same, however large.

    Example: unveil doctor --data photos/ --test-data others/
    """

    data: str
    """Pictures or clips, as for pretrain; labels are not needed."""
    test_data: str | None = None
    """More pictures, to find those that are in both: whoever is tested on them was trained on them."""
    image_size: str | None = None
    """Height and width in pixels that are to be trained, one number or 64x48: what is smaller or much larger is told. Default
    224; 8 for digits, 24 for moving-digits."""
    channels: int | None = None
    """Channels that pictures are read with, as for pretrain. Default: 1 for the digits, those of the first .npy array, else
    3."""
    workers: int | None = None
    """Processes that read pictures. Default: one for each core; 0 to read in this one."""
    limit: int | None = None
    """Look at so many pictures only, at equal distances over all of them. Default: all."""
    out: Path | None = None
    """A .json file for everything that was found, with every name; one that exists is not overwritten."""


def _channels_of(options: Doctor) -> int:
    """Given, or what the data have: arrays say it themselves."""
    if options.channels is not None:
        return options.channels
    built_in = BUILT_IN.get(options.data.partition(":")[0])
    if built_in:
        return built_in["channels"]
    source = open_source(options.data, 3)
    if isinstance(source, Folder):
        for where in source.paths:
            if not where.lower().endswith(".npy"):
                break
            try:
                with open(source.root / where, "rb") as stream:
                    return int(header_of(stream, where).mode.split()[0])
            except (OSError, BadPicture):  # told when it is its turn
                continue
    return 3


def _open(data: str, channels: int) -> Source:
    built_in = BUILT_IN.get(data.partition(":")[0], {})
    return open_source(data, channels, built_in.get("frames", 1))


def _size(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _groups(looked: Iterable[tuple[str, Any]]) -> list[list[str]]:
    """Names that have the same key, several at least, in the order in which they came."""
    by_key: defaultdict[Any, list[str]] = defaultdict(list)
    for name, key in looked:
        by_key[key].append(name)
    return [names for names in by_key.values() if len(names) > 1]


def _color(looks: Sequence[Look]) -> dict[str, Any]:
    """Mean and std of each channel; every picture counts the same, as each is trained at one size."""
    number, channels = len(looks), range(len(looks[0].mean))
    mean = [sum(look.mean[c] for look in looks) / number for c in channels]
    square = [sum(look.square[c] for look in looks) / number for c in channels]
    std = [max(0.0, s - m * m) ** 0.5 for m, s in zip(mean, square, strict=True)]
    low, high = min(look.low for look in looks), max(look.high for look in looks)
    return {"pictures": number, "mean": mean, "std": std, "low": low, "high": high}


def _sizes(looks: Sequence[Look], sides: Iterable[int]) -> dict[str, Any]:
    heights, widths = [look.height for look in looks], [look.width for look in looks]
    common = Counter(zip(heights, widths, strict=True))
    return {
        "height": _size(heights),
        "width": _size(widths),
        "short_side": _size([min(h, w) for h, w in zip(heights, widths, strict=True)]),
        "different": len(common),
        "commonest": [{"height": h, "width": w, "pictures": n} for (h, w), n in common.most_common(5)],
        "not_square": sum(h != w for h, w in zip(heights, widths, strict=True)),
        "smaller_than": {
            str(side): sum(min(h, w) < side for h, w in zip(heights, widths, strict=True))
            for side in sorted({*USUAL_SIDES, *sides})
        },
    }


def _classes(source: Source) -> dict[str, Any] | None:
    """How many samples each class has, of all, looked at or not; None without labels."""
    if not source.classes:
        return None
    counts = Counter(source.label(i) for i in range(len(source)))
    empty = [as_text(name) for name in source.empty_classes] if isinstance(source, Folder) else []
    return {
        "counts": {as_text(name): counts[label] for label, name in enumerate(source.classes)},
        "unlabelled": counts[None],
        "empty": empty,
    }


def _advice(report: dict[str, Any], options: Doctor, side: int) -> list[str]:
    """What to do about it, most important first; every line names an option or a command where there is one."""
    lines = []
    number, problems, both = report["readable"], report["problems"], report["in_both"]
    if both:
        lines.append(
            f"Test pictures that are in {options.data} too: {len(both):,}. Scores on them flatter; remove them from one of "
            "the two."
        )
    if not number:
        return [*lines, "No picture can be read, so there is nothing to train on. The reasons are above."]
    sizes, color, modes = report["sizes"], report["color"], report["modes"]
    if problems:
        lines.append(
            f"Files that cannot be used: {len(problems):,}. Training skips them too, and lists them in its run."
        )
    if any(p["where"].lower().endswith((".tif", ".tiff")) for p in problems):
        lines.append(
            "TIFFs of more than four bands are not read. Save arrays of (height, width, channels) with numpy.save and give "
            "pretrain --channels."
        )
    if number < FEW_PICTURES and report["limit"] is None:
        lines.append(
            f"{number:,} is few to learn from; thousands are usual. Start from trained weights with `unveil pretrain "
            "--init`, and look at `unveil plan`."
        )
    kept = side * 8 // 7  # as 256 is to 224
    if sizes["short_side"]["median"] >= MUCH_LARGER * side:
        lines.append(
            f"Half of the pictures are {sizes['short_side']['median'] / side:.1f} times as large as {side} pixels or more, and "
            f"reading them may take most of the time. `unveil prepare --data {report['data']} --out prepared/ "
            f"--image-size {kept}` shrinks them once."
        )
    smaller = sizes["smaller_than"][str(side)]
    if smaller > number / 5:
        fits = max(8, int(sizes["short_side"]["median"]) // 8 * 8)
        lines.append(
            f"{smaller / number:.0%} of the pictures are smaller than {side} pixels and would be enlarged. Give pretrain "
            f"--image-size {fits}" + (", and a smaller patch, as --size Micro/8." if fits < 128 else ".")
        )
    grey = report["grey_as_colour"] + report["grey"]
    if len(color["mean"]) == 3 and grey >= NEARLY_ALL * number:
        stored = f", {report['grey_as_colour']:,} of them stored as colour" if report["grey_as_colour"] else ""
        lines.append(
            f"{grey / number:.0%} of the pictures are grey{stored}. --channels 1 trains on a third of the values."
        )
    if any("16-bit colour" in note for note in report["converted"]):
        lines.append(
            "16-bit colour is read as 8-bit. To keep it, save uint16 arrays of (height, width, 3) with numpy.save and give "
            "pretrain --channels 3."
        )
    if any(mode.endswith("16-bit") for mode in modes) and color["high"] <= DIM_HIGH:
        lines.append(
            f"16-bit values reach only {color['high']:.1%} of their range, as 12-bit data do. Stretch them: multiply by "
            f"{int(1 / color['high']) if color['high'] else 1}."
        )
    elif max(color["std"]) < FLAT_STD or any(abs(mean - 0.5) > FAR_MEAN for mean in color["mean"]):
        lines.append(
            "Mean and std are far from what the recipes normalise by (0.5 and 0.5, or ImageNet's): pictures are "
            + ("very dark." if max(color["mean"]) < 0.5 - FAR_MEAN else "pale or very bright.")
            + " Stretch their contrast if it says nothing, and look at a low --blr if the loss does not fall."
        )
    if report["animated"]:
        lines.append(f"Films, of which the first frame is used: {report['animated']:,}.")
    if report["constant"]:
        lines.append(f"Pictures of a single colour, which teach nothing: {len(report['constant']):,}. Remove them.")
    if report["duplicates"]["extra"]:
        lines.append(
            f"Pictures that are there again: {report['duplicates']['extra']:,}. They count twice, or land in training "
            "and test. Keep one of each."
        )
    classes = report["classes"]
    if classes:
        counts = [count for count in classes["counts"].values() if count]
        if max(counts) >= UNEVEN * min(counts):
            lines.append(
                f"Classes have from {min(counts):,} to {max(counts):,} pictures. Judge `unveil finetune` by the mean over "
                "classes."
            )
        if classes["empty"]:
            lines.append(
                f"The folder {classes['empty'][0]!r} has no picture that can be used; `unveil finetune` refuses it."
            )
    return lines


def doctor(options: Doctor, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil doctor`; on_progress is told the pictures looked at and their number.

    Returns:
        "data", "test_data", "channels", "limit"; "files", all that were found, "looked_at" and "readable", how many;
        "problems", the others, with the reason; "formats", "modes", "converted" and "turned", "animated", "grey",
        "grey_as_colour": numbers of readable pictures; "bytes" and "decoded_bytes"; "sizes", in pixels, upright; "color", in
        [0, 1]; "constant", names; "duplicates": "groups" of names with equal pixels, "extra" pictures in them and how many of
        those are equal "files"; "in_both", pairs of names; "classes", or None; "advice", sentences; "out".
        sizes and color are None if nothing is readable.

    Raises:
        ValueError: there is no such data, or an option cannot be.
    """
    if options.out is not None:
        if options.out.suffix != ".json":
            raise ValueError(f"--out {options.out} is of no known type. Give a name that ends in .json.")
        if options.out.exists():
            raise ValueError(
                f"--out {options.out} exists already and is not overwritten. Give another name, or remove it."
            )
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit}: look at 1 picture at least.")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers {options.workers}: use 0 to read in this process, or more.")
    built_in = BUILT_IN.get(options.data.partition(":")[0], {})
    side = max(parse_image_size(options.image_size or built_in.get("image_size", "224")))
    channels = _channels_of(options)
    source = _open(options.data, channels)
    test = None if options.test_data is None else _open(options.test_data, channels)
    sources = [source] if test is None else [source, test]
    rows = [spread_rows(len(one), options.limit) for one in sources]
    total, done = sum(len(some) for some in rows), 0
    workers = torch.get_num_threads() if options.workers is None else options.workers
    found: list[list[Inspected]] = []
    for one, some in zip(sources, rows, strict=True):
        found.append([])
        for inspected in inspect(one, some, min(workers, len(some))):
            found[-1].append(inspected)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    report = {**_report(source, found[0], side), "limit": options.limit}
    report = {"data": options.data, "test_data": options.test_data, "channels": channels, **report, "in_both": []}
    if test is not None:
        names = {i.look.pixel_digest: i.where for i in found[0] if i.look is not None}
        pairs = [(names.get(i.look.pixel_digest), i.where) for i in found[1] if i.look is not None]
        report["in_both"] = [{"data": ours, "test_data": theirs} for ours, theirs in pairs if ours is not None]
        report["test_looked_at"] = len(found[1])
        report["test_problems"] = _problems(test, found[1])
    report["advice"] = _advice(report, options, side)
    report["out"] = None if options.out is None else str(options.out)
    if options.out is not None:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_atomically(options.out, lambda part: part.write_text(text, encoding="utf-8"))
    return report


def _problems(source: Source, found: Sequence[Inspected]) -> list[dict[str, str]]:
    """What opening the source skipped, and what could not be read."""
    skipped = [{"where": as_text(bad.where), "what": bad.reason} for bad in source.skipped]
    return [*skipped, *({"where": i.where, "what": i.problem} for i in found if i.problem is not None)]


def _report(source: Source, found: Sequence[Inspected], side: int) -> dict[str, Any]:
    """What one source is by what was found in it."""
    seen = [(i.where, i.look) for i in found if i.look is not None]
    looks = [look for _, look in seen]
    headers = [look.header for look in looks if look.header is not None]
    groups = _groups((where, look.pixel_digest) for where, look in seen)
    same_files = _groups((where, look.file_digest) for where, look in seen if look.file_digest is not None)
    return {
        "files": len(source) + len(source.skipped),
        "looked_at": len(found),
        "readable": len(looks),
        "problems": _problems(source, found),
        "formats": dict(Counter(header.format for header in headers).most_common()),
        "modes": dict(Counter(f"{header.mode}, {header.bits}-bit" for header in headers).most_common()),
        "converted": dict(Counter(look.note for look in looks if look.note is not None).most_common()),
        "turned": sum(header.turned for header in headers),
        "animated": sum(header.frames > 1 for header in headers),
        "grey": sum(header.grey for header in headers),
        "grey_as_colour": sum(look.grey and look.header is not None and not look.header.grey for look in looks),
        "bytes": sum(look.encoded_bytes for look in looks),
        "decoded_bytes": sum(look.decoded_bytes for look in looks),
        "sizes": _sizes(looks, [side]) if looks else None,
        "color": _color(looks) if looks else None,
        "constant": [where for where, look in seen if look.constant],
        "duplicates": {
            "extra": sum(len(group) - 1 for group in groups),
            "files": sum(len(group) - 1 for group in same_files),
            "groups": groups,
        },
        "classes": _classes(source),
    }
