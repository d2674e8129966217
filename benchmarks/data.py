"""Pictures a second that one core reads for training: prepared shards beside torchvision's ImageFolder on the originals.

    python benchmarks/data.py --data photos/ --out data.json          # a folder for each class, of your own photos
    python benchmarks/data.py --made 24 --out data.json               # or photos made here, of 12 megapixels each

Both give batches (B, 3, H, W) of random crops with an aspect of 3/4 to 4/3, mirrored at random, float32 in [0, 1]: ImageFolder
with RandomResizedCrop as everyone writes it, Unveil as `unveil pretrain` reads. They take turns, one batch each, in one process
of one thread, so that whatever else the machine does falls on both; medians and their ratio are what counts. Files are read
once before, so that the disk's speed is left out. The profile says where Unveil's time goes.
"""

import cProfile
import json
import platform
import pstats
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from unveil.config import Clip, Training
from unveil.data import Samples, batches, open_source
from unveil.tasks.prepare import Prepare, prepare


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path
    """The file to write, .json."""
    data: Path | None = None
    """A folder with a folder for each class."""
    made: int = 24
    """Without --data: how many photos to make."""
    megapixels: float = 12.0
    """Of each photo that is made."""
    image_size: int = 224
    """Of the crops."""
    short_side: int = 256
    """Of the prepared pictures."""
    crop_scale: float = 0.2
    """Smallest share of the area."""
    batch_size: int = 16
    rounds: int = 12


def photos(folder: Path, number: int, megapixels: float) -> Path:
    """JPEGs of a camera's size and bytes: coarse noise for shapes, with fine noise on it."""
    rng = np.random.default_rng(0)
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(height * 4 / 3)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 100, width // 100, 3), dtype=np.uint8))
        values = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        values = (values + rng.normal(0, 6, values.shape).astype(np.int16)).clip(0, 255).astype(np.uint8)
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / f"class{i % 2}" / f"{i}.jpg", quality=90)
    return folder


def theirs(folder: Path, options: Options) -> DataLoader[Any]:
    """ImageFolder as in torchvision's and MAE's training scripts."""
    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                options.image_size,
                scale=(options.crop_scale, 1.0),
                interpolation=transforms.InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    return DataLoader(ImageFolder(str(folder), change), batch_size=options.batch_size, shuffle=True, drop_last=True)


def ours(data: Path, options: Options) -> DataLoader[Any]:
    side = options.image_size
    clip = Clip(channels=3, frames=1, height=side, width=side, patch_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    training = Training(
        epochs=1,
        batch_size=options.batch_size,
        base_lr=1e-3,
        warmup_epochs=0,
        crop_scale=options.crop_scale,
        flip=True,
    )
    samples = Samples(open_source(str(data), 3, 1, side, side), clip, 0, training)
    return batches(samples, options.batch_size, 0, 0, shuffle=True, drop_last=True, num_workers=0)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def shape_of(batch: Any) -> tuple[int, ...]:
    """(B, 3, H, W) of either kind of batch."""
    clips = batch[0] if isinstance(batch, list) else batch.clips()[:, :, 0]
    assert clips.dtype == torch.float32
    return tuple(clips.shape)


def speeds(loaders: dict[str, DataLoader[Any]], options: Options) -> dict[str, dict[str, Any]]:
    """Median pictures a second of each loader with the quartiles, and all compared with the first."""
    wanted = (options.batch_size, 3, options.image_size, options.image_size)
    passes = {name: endless(loader) for name, loader in loaders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for round_number in range(options.rounds + 1):
        for name, batches_of in passes.items():
            begin = time.perf_counter()
            batch = next(batches_of)
            if round_number:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begin)
            assert shape_of(batch) == wanted
    medians = {name: options.batch_size / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    return {
        name: {
            "pictures_per_second": round(median, 1),
            "quartiles": [
                round(options.batch_size / t, 1) for t in reversed(statistics.quantiles(seconds[name], n=4)[::2])
            ],
            "ratio": round(median / first, 2),
        }
        for name, median in medians.items()
    }


def profile(run: Callable[[], Any]) -> list[str]:
    """The functions in which most time is spent themselves, with their share in percent."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    rows: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    total = sum(row[2] for row in rows.values())
    most = sorted(rows.items(), key=lambda row: -row[1][2])[:12]
    return [f"{100 * row[2] / total:.1f} % {Path(file).name} {name}" for (file, _, name), row in most]


def main(options: Options) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or photos(Path(folder) / "photos", options.made, options.megapixels)
        begin = time.perf_counter()
        made = prepare(Prepare(data=str(data), out=Path(folder) / "prepared", image_size=options.short_side, workers=1))
        prepared_in = time.perf_counter() - begin
        prepared = ours(Path(folder) / "prepared", options)
        loaders = {"ImageFolder": theirs(data, options), "originals": ours(data, options), "prepared": prepared}
        result = {
            "options": {
                **{name: str(value) for name, value in vars(options).items()},
                "data": options.data and options.data.name,
            },
            "originals_bytes": sum(path.stat().st_size for path in data.rglob("*") if path.is_file()),
            "prepared_bytes": made["bytes"],
            "prepare_pictures_per_second": round((made["samples"] + made["skipped"]) / prepared_in, 1),
            "loaders": speeds(loaders, options),
            "profile": profile(lambda: [next(endless(prepared)) for _ in range(options.rounds)]),
            "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        }
    text = json.dumps(result, indent=2)
    print(text)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
