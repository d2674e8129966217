"""Masks that are pictures: one for all, or a folder of them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unveil.decoding import BadPicture
from unveil.holes import NAMED_HOLES
from unveil.originals import read_hole
from unveil.sources import Source, open_source


@dataclass(frozen=True)
class MaskPicture:
    """A mask picture, (H, W) bool; True = repaint. fits: whether it may be stretched over a picture of another size."""

    name: str
    hole: Tensor
    fits: bool


@dataclass(frozen=True)
class MaskFolder:
    """Masks of a folder, nested or flat.

    If some mask has the name of a picture (but for the extension), every picture takes the mask of its name, which must have
    its size. Otherwise picture i takes the mask i modulo their number, stretched.

    Args:
        source: opens them.
        keep_white: white is what to keep, as in RePaint's masks.
        pictures: names of the pictures that masks are asked for, relative to their folder.
    """

    source: Source
    keep_white: bool
    pictures: tuple[str, ...]
    by_name: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        names = {_plain(self.source.where(i)): i for i in range(len(self.source))}
        object.__setattr__(self, "by_name", {p: names[_plain(p)] for p in self.pictures if _plain(p) in names})

    def __len__(self) -> int:
        return len(self.source)

    def number_for(self, index: int, picture: str) -> int:
        """Which mask a picture takes.

        Raises:
            BadPicture: masks go by names, and none has the picture's.
        """
        if not self.by_name:
            return index % len(self.source)
        if picture not in self.by_name:
            raise BadPicture(picture, "no mask has its name, as others do")
        return self.by_name[picture]

    def read(self, number: int) -> MaskPicture:
        """
        Raises:
            BadPicture: it cannot be read.
        """
        where = self.source.where(number)
        data = self.source.encoded(number)
        if data is None:
            raise BadPicture(where, "is no mask picture")
        try:
            hole = _hole(data, where, "the mask", self.keep_white)
            return MaskPicture(_plain(where), hole, fits=not self.by_name)
        except BadPicture:
            raise
        except ValueError as error:
            raise BadPicture(where, str(error)) from None


def _plain(where: str) -> str:
    return Path(where).with_suffix("").as_posix()


def _hole(data: bytes, where: str, name: str, keep_white: bool) -> Tensor:
    hole = torch.from_numpy(read_hole(data, where, name))
    return ~hole if keep_white else hole


def read_mask(path: str, keep_white: bool = False) -> MaskPicture:
    """A mask picture of its picture's size.

    Raises:
        ValueError: there is no such file, or it is no mask.
    """
    name = f"--mask {path!r}"
    try:
        return MaskPicture(Path(path).stem, _hole(Path(path).read_bytes(), path, name, keep_white), fits=False)
    except FileNotFoundError:
        names = ", ".join(f"{known}:SHARE" for known in NAMED_HOLES)
        raise ValueError(
            f"{name} is neither {names}, nor a file or folder that exists. Give one of these, as in random:0.75."
        ) from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read as a picture ({error}).") from None
    except BadPicture as bad:
        raise ValueError(f"{name} cannot be read as a picture ({bad.reason}).") from None


def open_masks(path: str, pictures: Source | None, keep_white: bool = False) -> MaskPicture | MaskFolder:
    """A mask file, or a folder of them, for these pictures; None if names say nothing about what belongs together.

    Raises:
        ValueError: it is none.
    """
    if not Path(path).is_dir():
        return read_mask(path, keep_white)
    names = () if pictures is None else tuple(pictures.where(i) for i in range(len(pictures)))
    return MaskFolder(open_source(path, 1), keep_white, names)
