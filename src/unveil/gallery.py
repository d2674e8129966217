"""Generated samples as files: one each, the classes, a grid, and the array that evaluations read."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unveil.checkpoint import write_atomically
from unveil.config import Clip
from unveil.originals import save_pixels
from unveil.report import contact_sheet, save_png

LINES, FRAMES = 10, 10  # of a grid, and side by side in one of its lines
CLAIM = ".generating"  # lies in the directory while a run writes there


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where samples go and as what."""

    out: Path
    """Directory for the results: a new or an empty one."""
    first: int = 0
    """Number of the first sample: to add to 64 samples, make more of them from --first 64 on, in another directory."""
    files: bool = True
    """Write each sample as NUMBER.png, animated if it is a clip, and the classes as labels.csv. Latents are NUMBER.npy,
    float32 of (height, width, channels)."""
    grid: bool = True
    """Write grid.png, up to 100 samples side by side, by class; not of latents."""
    npz: bool = False
    """Write samples.npz with all samples as arr_0, uint8 (N, H, W, C), and the classes as arr_1: what the evaluation
    scripts of OpenAI's guided-diffusion read."""


def check(options: Files, clip: Clip) -> None:
    """Refuse a directory that holds something, and files that cannot hold the samples or are not wanted at all.

    Raises:
        ValueError: one of these.
    """
    if not (options.files or options.grid or options.npz):
        raise ValueError("--no-files and --no-grid without --npz: nothing would be kept. Leave one of them out.")
    if options.npz and clip.frames > 1:
        raise ValueError(f"--npz holds pictures, but this model makes clips of {clip.frames} frames. Leave it out.")
    if not clip.bounded and (options.npz or not options.files):
        raise ValueError(
            f"This model makes latents of {clip.channels} channels, which only files hold. Leave --npz and --no-files out, "
            "and decode the files by the autoencoder that the latents are of."
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file. Name a directory for the results.")
    inside = sorted(path.name for path in options.out.iterdir()) if options.out.exists() else []
    if CLAIM in inside:
        raise ValueError(
            f"--out {options.out} holds what another run is writing, or left when it was killed. Name a new directory, or "
            "empty this one."
        )
    if inside:
        raise ValueError(f"--out {options.out} is not empty ({inside[0]!r}). Name a new directory, or empty this one.")


def claim(out: Path) -> None:
    """Make the directory this run's own, though another should have found it empty at the same moment.

    Raises:
        ValueError: another has it.
    """
    try:
        (out / CLAIM).touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(f"--out {out} is in use by another run. Wait for it, or name a new directory.") from None


def class_name(label: int, names: Sequence[str]) -> str:
    """What a class is called: its number, if it has no name."""
    return names[label] if names else str(label)


def grid_rows(
    pictures: Sequence[Tensor], labels: Sequence[int] | None, names: Sequence[str], first: int, line: int
) -> list[tuple[str, list[Tensor]]]:
    """Rows of a contact sheet: by class if these are few, else in order under the classes' names.

    Args:
        pictures: (C, T, H, W) each, in [0, 1], no more than a sheet holds.
        labels: of each, or None.
        first: number of the first one.
        line: how many go side by side.
    """
    rows = []
    present = sorted(set(labels)) if labels is not None else []
    if 0 < len(present) <= LINES:
        for label in present:
            assert labels is not None
            mine = [picture for picture, its in zip(pictures, labels, strict=True) if its == label]
            mine = mine[: LINES // len(present) * line]
            for i in range(0, len(mine), line):
                rows.append((class_name(label, names) if i == 0 else "", mine[i : i + line]))
        return rows
    for i in range(0, len(pictures), line):
        some = list(pictures[i : i + line])
        caption = f"samples {first + i} to {first + i + len(some) - 1}"
        if labels is not None:
            caption = ", ".join(class_name(label, names)[:16] for label in labels[i : i + line])
        rows.append((caption, some))
    return rows


def _picture_name(number: int, clip: Clip) -> str:
    return f"{number:05d}" + (".png" if clip.bounded and clip.channels in (1, 3, 4) else ".npy")


def in_line(clip: Clip) -> int:
    """How many samples go side by side in a grid."""
    return max(1, FRAMES // clip.frames)


def _part(rank: int) -> str:
    return f".samples-{rank}.npy"


class Made:
    """What a process keeps of the samples that it has made, as their files are written."""

    def __init__(self, options: Files, clip: Clip, rank: int) -> None:
        self.options, self.clip = options, clip
        self.room = LINES * in_line(clip) if options.grid and clip.bounded else 0
        self.part = options.out / _part(rank)
        self.for_grid: dict[int, Tensor] = {}
        self.arrays: list[np.ndarray] = []

    def add(self, numbers: Sequence[int], clips: Tensor) -> None:
        """Take (B, C, T, H, W) whose place in this call is given."""
        values = (clips.cpu() * 255).round().to(torch.uint8) if self.clip.bounded else clips.cpu()
        for number, value in zip(numbers, values, strict=True):
            if self.options.files:
                pixels = value.permute(1, 2, 3, 0).numpy()
                save_pixels(self.options.out / f"{self.options.first + number:05d}.png", pixels)
            if number < self.room:
                self.for_grid[number] = value
        if self.options.npz:
            self.arrays.append(values[:, :, 0].permute(0, 2, 3, 1).numpy())

    def write_part(self) -> None:
        """Leave the arrays for `write_rest` of the first process."""
        if self.arrays:
            np.save(self.part, np.concatenate(self.arrays))


def write_npz(path: Path, parts: Sequence[Path], num_samples: int, labels: Tensor | None) -> None:
    """One file of the parts that every process has left, sample i in the part i % len(parts)."""
    arrays = None
    for rank, part in enumerate(parts):
        if part.exists():  # more processes than samples leave fewer parts
            theirs = np.load(part)
            arrays = np.empty((num_samples, *theirs.shape[1:]), theirs.dtype) if arrays is None else arrays
            arrays[rank :: len(parts)] = theirs
    assert arrays is not None
    columns: dict[str, Any] = {"arr_0": arrays} | ({} if labels is None else {"arr_1": labels.numpy()})

    def write(part: Path) -> None:
        with part.open("wb") as stream:  # given a name, numpy would add an extension to it
            np.savez(stream, **columns)

    write_atomically(path, write)


def write_rest(
    options: Files,
    clip: Clip,
    num_samples: int,
    classes: Tensor | None,
    names: Sequence[str],
    made: Sequence[Mapping[int, Tensor]],
) -> dict[str, Any]:
    """The files about all samples, once.

    Args:
        classes: (num_samples,), or None. names: what they are called, or nothing.
        made: the `for_grid` of every process.

    Returns:
        "samples", how many have a file of their own; "labels", "grid" and "npz", where these lie.
    """
    labels = None if classes is None else classes.tolist()
    files: dict[str, Any] = {"samples": num_samples if options.files else 0}
    if options.files and labels is not None:
        path = options.out / "labels.csv"

        def write(part: Path) -> None:
            with part.open("w", encoding="utf-8", newline="") as stream:
                lines = csv.writer(stream, lineterminator="\n")
                lines.writerow(["file", "label", "class"])
                for i, label in enumerate(labels):
                    name = _picture_name(options.first + i, clip)
                    lines.writerow([name, label, class_name(label, names)])

        write_atomically(path, write)
        files["labels"] = str(path)
    if options.grid and clip.bounded:
        pictures = {number: value for theirs in made for number, value in theirs.items()}
        shown = [pictures[number].float() / 255 for number in sorted(pictures)]
        theirs = None if labels is None else labels[: len(shown)]
        rows = grid_rows(shown, theirs, names, options.first, in_line(clip))
        path = options.out / "grid.png"
        save_png(path, contact_sheet(rows))
        files["grid"] = str(path)
    if options.npz:
        path = options.out / "samples.npz"
        parts = [options.out / _part(rank) for rank in range(len(made))]
        write_npz(path, parts, num_samples, classes)
        files["npz"] = str(path)
    return files
