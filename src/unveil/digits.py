"""Samples that need no download: handwritten digits that come with scikit-learn, still or moving."""

import numpy as np
import torch

from unveil import draws
from unveil.decoding import Picture, Skipped, fill_channels, frames_first


def _load_digits(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, (N, 8, 8) uint8, and their labels (N,); the split is 80/20, stratified, and fixed."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError(f"{name!r} comes with scikit-learn. Install it: pip install scikit-learn") from error
    flat, labels = load_digits(return_X_y=True)
    images = np.round(np.asarray(flat).reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    labels = np.asarray(labels)
    if split == "all":
        return images, labels
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=labels)
    rows = np.sort(train if split == "train" else test)
    return images[rows], labels[rows]


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, 0 to 16 stretched to 0 to 255."""

    def __init__(self, name: str, split: str, channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"{name!r} is grey, which cannot fill {channels} channels. Use channels=1 or 3.")
        self.name = name
        self.channels = channels
        self.skipped: list[Skipped] = []
        self.classes: tuple[str, ...] | None = tuple("0123456789")
        self._images, self._labels = _load_digits(name, split)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Picture:
        return Picture(frames_first(fill_channels(self._images[index], self.channels)))

    def encoded(self, index: int) -> bytes | None:
        return None

    def label(self, index: int) -> int | None:
        return int(self._labels[index])

    def where(self, index: int) -> str:
        return f"row {index}"


class MovingDigits(Digits):
    """Clips of one or two digits that move at constant speed and bounce off the walls; the first digit is the label.

    One clip for each digit of the split, made when it is read, from its number alone. A digit is a third of the frame.
    """

    def __init__(self, name: str, split: str, channels: int, frames: int, height: int = 24, width: int = 24) -> None:
        super().__init__(name, split, channels)
        if min(height, width) < 10:
            raise ValueError(f"{name!r} needs room to move, but was given {height}x{width} pixels. Use at least 10x10.")
        self.split, self.frames, self.height, self.width = split, frames, height, width

    def read(self, index: int) -> Picture:
        generator = draws.generator(0, "moving-digits", self.split, index)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        digits = [index] + [draw(0, len(self) - 1)] * draw(0, 1)
        scale = max(1, min(self.height, self.width) // 24)
        clip = np.zeros((self.frames, self.height, self.width), dtype=np.uint8)  # (T, H, W)
        time = np.arange(self.frames)
        for digit in digits:
            image = self._images[digit].repeat(scale, axis=0).repeat(scale, axis=1)
            corners = []
            for side in (self.height, self.width):
                room = side - len(image)
                start, speed = draw(0, room), scale * draw(1, 2) * (2 * draw(0, 1) - 1)
                corners.append(room - np.abs((start + speed * time) % (2 * room) - room))  # there and back again
            for frame, top, left in zip(clip, *corners, strict=True):
                part = frame[top : top + len(image), left : left + len(image)]
                np.maximum(part, image, out=part)
        return Picture(torch.from_numpy(clip)[:, None].repeat(1, self.channels, 1, 1))
