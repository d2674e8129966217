"""Samples and batches for training and evaluation: the same ones for every number of workers and every batch size.

source = open_source("digits:train", channels=1)
loader = batches(Samples(source, recipe.clip, seed, recipe.training), 256, epoch=0, seed=seed, ...)
for epoch in range(epochs):
    loader.batch_sampler.epoch = epoch
    for batch in loader: ...
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from unveil import draws
from unveil.config import Clip, Training
from unveil.finetuning import FineTuning
from unveil.hardware import onto
from unveil.shards import Shards
from unveil.sources import BadPicture, Picture, Skipped, Source, open_source
from unveil.transforms import Crop, augment, cut, cut_together, draw_crop, erase, fit

__all__ = [
    "BadPicture",
    "Batch",
    "Key",
    "Order",
    "Picture",
    "Sample",
    "Samples",
    "Skipped",
    "Source",
    "batches",
    "chosen_batches",
    "collate",
    "decoded_bytes",
    "open_source",
    "to_clips",
]


Key = tuple[int, int, int]  # epoch, place in its order, number of the sample

WINDOW = 65_536  # samples of sharded data that are shuffled together
SMALL = 128 * 128  # pixels of a picture that is sent to a device as a whole, to be cut there


@dataclass(frozen=True)
class Sample:
    """One clip ready for a batch, or the reason why there is none.

    place: in the epoch's order. values: (T, C, H, W), uint8, or float32 in [0, 1]; None if it could not be read.
    label: class number, or -1. crop: of the values, uint8, with the clip's height and width; None if they are the clip.
    """

    index: int
    place: int
    values: Tensor | None
    label: int
    problem: Skipped | None = None
    note: str | None = None
    crop: tuple[Crop, int, int] | None = None

    @property
    def cropped(self) -> Tensor | None:
        """The values, cropped: (T, C, H, W) of the clip."""
        return self.values if self.values is None or self.crop is None else cut(self.values, *self.crop)

    @property
    def clip(self) -> Tensor | None:
        """(C, T, H, W), float32 in [0, 1]."""
        values = self.cropped
        return None if values is None else to_clips(values[None])[0]


class Crops(NamedTuple):
    """Of a batch of pictures: a `Crop` in each row, (B, 5), int64, and the clip's height and width."""

    boxes: Tensor
    height: int
    width: int


class Batch(NamedTuple):  # a named tuple, so that a DataLoader can pin it
    """The readable samples of a batch, and what happened to the others.

    indices, places: of the samples, and theirs in the epoch's order, (B,), int64. values: (B, T, C, H, W), uint8, or float32
    in [0, 1] if one of the samples is not of bytes; None if no sample was readable. labels: (B,), int64, -1 where there is
    none. problems: the unreadable ones. notes: (index, what was converted) of the readable ones that needed it. crops: of
    the values, which are whole pictures of one size then; None if they are the clips.
    """

    indices: Tensor
    places: Tensor
    values: Tensor | None
    labels: Tensor
    problems: list[Skipped]
    notes: list[tuple[int, str]]
    crops: Crops | None = None

    def clips(self, device: torch.device | str = "cpu") -> Tensor:
        """The readable samples on a device, (B, C, T, H, W), float32 in [0, 1]. There must be some.

        They are the same on every device; but what is cropped there may differ by a level in a pixel here and there.
        """
        assert self.values is not None
        if self.crops is None:
            return to_clips(self.values, device)
        boxes, height, width = self.crops
        return to_clips(cut_together(onto(device, self.values), onto(device, boxes), height, width), device)

    def part(self, begin: int, end: int) -> "Batch":
        """Some of the readable samples, of which there must be some."""
        assert self.values is not None
        crops = None if self.crops is None else self.crops._replace(boxes=self.crops.boxes[begin:end])
        indices, places, values, labels = (x[begin:end] for x in (self.indices, self.places, self.values, self.labels))
        return Batch(indices, places, values, labels, [], [], crops)

    def pieces(self, number: int) -> "list[Batch]":
        """The readable samples in so many parts, of sizes that differ by one at most; one for each if there are fewer."""
        number = min(number, len(self.indices))
        cuts = [len(self.indices) * i // number for i in range(number + 1)] if number else []
        return [self.part(begin, end) for begin, end in itertools.pairwise(cuts)]


def check_pixels(data: str, clip: Clip) -> None:
    """Refuse pictures for a model of latents.

    Raises:
        ValueError: the model's clips are unbounded.
    """
    if not clip.bounded:
        raise ValueError(
            f"This model works on latents of {clip.channels} channels, as an autoencoder makes them, but {data} holds "
            "values in [0, 1]. Give a model of pixels; from latents you can `unveil generate`, or train in Python."
        )


def source_for(data: str, clip: Clip, labelled: bool = False) -> Source:
    """What `--data` names, opened for clips like these; labelled if it must have classes.

    Raises:
        ValueError: there is no such source, it does not fit the clips, or it has no labels.
    """
    check_pixels(data, clip)
    source = open_source(data, clip.channels, clip.frames, clip.height, clip.width)
    if labelled and not source.classes:
        raise ValueError(
            f"{data} has no labels: sort the pictures into a folder for each class, or give a column `label`."
        )
    return source


class Samples(Dataset[Sample]):
    """The samples of a source at a clip's size, read by (epoch, place in its order, index).

    Args:
        training: how to augment; None for evaluation, which centres and never draws.
        cache: keep decoded pictures. Every worker process keeps its own, so it is meant for num_workers=0.
        crop_later: leave the random crops of small pictures to `Batch.clips`, which cuts them on its device all together.
    """

    def __init__(
        self,
        source: Source,
        clip: Clip,
        seed: int,
        training: Training | None,
        cache: bool = False,
        crop_later: bool = False,
    ) -> None:
        self.source = source
        self.clip = clip
        self.seed = seed
        self.training = training
        self.cache = cache
        self.crop_later = crop_later
        self._cached: dict[int, Picture] = {}

    def __len__(self) -> int:
        return len(self.source)

    def _read(self, index: int) -> Picture:
        picture = self._cached.get(index)
        if picture is None:
            picture = self.source.read(index)
            shape, wanted = tuple(picture.values.shape[:2]), (self.clip.frames, self.clip.channels)
            if shape != wanted:
                raise ValueError(
                    f"{self.source.name!r} gives (frames, channels)={shape}, but the clip has {wanted}. "
                    "Open the source with the clip's channels and frames."
                )
            if self.cache:
                self._cached[index] = picture
        return picture

    def __getitem__(self, key: Key) -> Sample:
        epoch, place, index = key
        label = self.source.label(index)
        label = -1 if label is None else label
        try:
            picture = self._read(index)
        except BadPicture as bad:
            return Sample(index, place, None, label, problem=Skipped(bad.where, bad.reason))
        height, width, training = self.clip.height, self.clip.width, self.training
        if training is None:
            return Sample(index, place, fit(picture.values, height, width), label, note=picture.note)
        strong = training if isinstance(training, FineTuning) else None
        drawn = height, width, training.crop_scale, training.flip, draws.key(self.seed, epoch, index, "augment")
        small = picture.values.dtype == torch.uint8 and picture.values.shape[-2:].numel() <= SMALL
        if self.crop_later and small and not strong and training.crop_scale < 1:
            crop = draw_crop(picture.values, *drawn)
            return Sample(index, place, picture.values, label, note=picture.note, crop=(crop, height, width))
        values = augment(
            picture.values,
            *drawn,
            num_ops=strong.randaugment_ops if strong else 0,
            magnitude=strong.randaugment_magnitude if strong else 0,
            fill=self.clip.mean,
        )
        if strong and strong.erase:
            mean, std = (torch.tensor(x).reshape(-1, 1, 1, 1) for x in (self.clip.mean, self.clip.std))
            clip = to_clips(values[None])[0]
            values = erase(clip, strong.erase, mean, std, draws.key(self.seed, epoch, index, "erase")).transpose(0, 1)
        return Sample(index, place, values, label, note=picture.note)


def to_clips(values: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Values of samples, (B, T, C, H, W), uint8 or in [0, 1], as clips on a device, (B, C, T, H, W), float32 in [0, 1]."""
    values = onto(device, values).transpose(1, 2).contiguous()
    if values.dtype != torch.uint8:
        return values.float()
    # By a tensor of the device: by a number a GPU divides as it multiplies, by 1 / 255, which is rounded.
    return values.float().div_(torch.full((), 255.0, device=values.device))


def _stack(values: list[Tensor]) -> Tensor:
    """(T, C, H, W) of each sample as (B, T, C, H, W): as bytes, a quarter of the memory, if all of them are."""
    if any(each.dtype != torch.uint8 for each in values):
        values = [to_clips(each[None])[0].transpose(0, 1) for each in values]
    return torch.stack(values)


def _crops_of(samples: list[Sample]) -> Crops | None:
    """Crops to be cut together, if all samples have one and are of one size."""
    crops = [sample.crop for sample in samples if sample.crop is not None]
    if (
        not crops
        or len(crops) < len(samples)
        or len({sample.values.shape for sample in samples if sample.values is not None}) > 1
    ):
        return None
    (_, height, width), *_ = crops
    return Crops(torch.tensor([crop for crop, _, _ in crops], dtype=torch.int64), height, width)


def decoded_bytes(source: Source, num_tried: int = 16) -> int:
    """Roughly how many bytes the decoded source takes, from its first readable samples; 0 if none of them is."""
    sizes = []
    for index in range(min(num_tried, len(source))):
        try:
            sizes.append(source.read(index).values.nbytes)
        except BadPicture:
            continue
    return len(source) * sum(sizes) // len(sizes) if sizes else 0


def collate(samples: list[Sample]) -> Batch:
    """Stack the readable samples; the others are listed in `problems`."""
    good = [sample for sample in samples if sample.values is not None]
    crops = _crops_of(good)
    values = [sample.cropped if crops is None else sample.values for sample in good]
    return Batch(
        indices=torch.tensor([sample.index for sample in good], dtype=torch.int64),
        places=torch.tensor([sample.place for sample in good], dtype=torch.int64),
        values=_stack([each for each in values if each is not None]) if good else None,
        labels=torch.tensor([sample.label for sample in good], dtype=torch.int64),
        problems=[sample.problem for sample in samples if sample.problem is not None],
        notes=[(sample.index, sample.note) for sample in good if sample.note is not None],
        crops=crops,
    )


class Order(Sampler[list[Key]]):
    """Which samples make which batch in an epoch, as (epoch, place, index); set `epoch` before each pass.

    It depends on the seed and the epoch alone, so that a resumed run has nothing to restore: `first_batch` skips the batches
    before it, to go on in the middle of an epoch.

    Samples are drawn from all, or, of shards, from a window of some of them: the shards' order is drawn, as many of them as
    make WINDOW samples come together, and theirs are shuffled. So few files are read at a time, and no order of a million
    samples is held. Data of fewer samples is shuffled as a whole.

    The last batch is dropped only if there is a whole one before it.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        epoch: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        *,
        starts: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """
        Args:
            batch_size: over all processes.
            starts: the first sample of each shard, and num_samples; None for data without shards.
            rank, world: this process and how many there are. Each has its piece of every batch, in the order of their
                ranks, with the places that one process alone would see.

        Raises:
            ValueError: a batch has fewer samples than there are processes.
        """
        self.num_samples, self.batch_size, self.epoch, self.seed = num_samples, batch_size, epoch, seed
        self.shuffle = shuffle
        self.first_batch = 0
        self.drop_last = drop_last and num_samples >= batch_size
        self.rank, self.world = rank, world
        if batch_size < world:
            raise ValueError(
                f"A batch of {batch_size} cannot be split over {world} processes. Use --batch-size {world} or more."
            )
        self.starts = torch.as_tensor(starts) if starts is not None and num_samples > WINDOW else None

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def _stretches(self, epoch: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """The epoch's order in stretches: how many samples, and what gives their numbers."""
        if not self.shuffle:
            yield self.num_samples, lambda: torch.arange(self.num_samples)
            return
        drawn = draws.generator(self.seed, epoch, "order")
        if self.starts is None:
            yield self.num_samples, lambda: torch.randperm(self.num_samples, generator=drawn)
            return
        sizes = self.starts.diff()
        shards = torch.randperm(len(sizes), generator=drawn)
        # Windows of about equal size: the last shards would otherwise be left to a small one.
        ends = sizes[shards].cumsum(0)
        windows = max(1, self.num_samples // WINDOW)
        window = (ends - 1) * windows // self.num_samples  # of each shard in the drawn order; it never falls
        names, lengths = window.unique_consecutive(return_counts=True)
        for number, chosen in zip(names.tolist(), shards.split(lengths.tolist()), strict=True):

            def numbers(chosen: Tensor = chosen, number: int = number) -> Tensor:
                assert self.starts is not None
                begins, ends = self.starts[chosen].tolist(), self.starts[chosen + 1].tolist()
                every = torch.cat([torch.arange(a, b) for a, b in zip(begins, ends, strict=True)])
                return every[torch.randperm(len(every), generator=draws.generator(self.seed, epoch, "window", number))]

            yield int(sizes[chosen].sum()), numbers

    def _places(self, epoch: int, first: int) -> Iterator[tuple[int, int]]:
        """Places of an epoch's order from the first on, with the samples that stand there."""
        place = 0
        for length, numbers in self._stretches(epoch):
            if place + length > first:
                yield from enumerate(numbers()[max(0, first - place) :].tolist(), start=max(place, first))
            place += length

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        places = self._places(epoch, self.first_batch * self.batch_size)
        for _ in range(self.first_batch, len(self)):
            batch = [(epoch, place, index) for place, index in itertools.islice(places, self.batch_size)]
            begin, end = (len(batch) * rank // self.world for rank in (self.rank, self.rank + 1))
            yield batch[begin:end]


def chosen_batches(
    samples: Samples, indices: Sequence[int], batch_size: int, epoch: int, num_workers: int
) -> DataLoader[Any]:
    """A loader of `Batch` over these samples alone, in their order, as they are in that epoch."""
    keys = [(epoch, place, index) for place, index in enumerate(indices)]
    return DataLoader(
        samples,
        batch_sampler=[keys[i : i + batch_size] for i in range(0, len(keys), batch_size)],
        num_workers=num_workers,
        collate_fn=collate,
        generator=draws.generator(samples.seed, "workers"),  # as in `batches`
    )


def batches(
    samples: Samples,
    batch_size: int,
    epoch: int,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    num_workers: int,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[Any]:
    """A loader of `Batch`. For another epoch, set `loader.batch_sampler.epoch` and iterate again; workers stay alive.

    Args:
        batch_size: over all processes; rank and world are as in `Order`.

    Raises:
        ValueError: a batch size below 1 or the number of processes, or a number of workers that is negative or above the
            number of samples.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} was given; a batch has at least 1 sample.")
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} was given; use 0 to read in the main process, or more.")
    if num_workers > len(samples):
        raise ValueError(
            f"{num_workers} workers for {len(samples)} samples leaves some with nothing to do. "
            f"Use --workers {len(samples)} or fewer."
        )
    return DataLoader(
        samples,
        batch_sampler=Order(
            len(samples),
            batch_size,
            epoch,
            seed,
            shuffle,
            drop_last,
            starts=samples.source.starts.tolist() if isinstance(samples.source, Shards) else None,
            rank=rank,
            world=world,
        ),
        num_workers=num_workers,  # each runs torch on one thread, which is DataLoader's default
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        # Otherwise every pass would draw a base seed for workers from the global generator.
        generator=draws.generator(seed, "workers"),
    )
