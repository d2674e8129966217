"""Weights of the networks that metrics look through: what they are called, where they lie, and how they get there."""

import hashlib
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FromWeights:
    """Options of a command whose metrics look through networks that others have trained."""

    weights: Path | None = None
    """Where the metric networks' weights are: a folder of them under their published names, or the file of the one that is
    needed. Default: the folder in which torch keeps what it downloads, ~/.cache/torch/hub/checkpoints."""
    download: bool = False
    """Fetch weights that are missing into that folder. Nothing is ever fetched without it."""


@dataclass(frozen=True)
class Published:
    """A file of weights that others have published.

    network: whose they are. url: where it is fetched. sha256: how its digest begins. megabytes: how large it is.
    also: other names under which the same file is published.
    """

    network: str
    url: str
    sha256: str
    megabytes: int
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Weights:
    """A file of weights that is here. published: whether it is the one that everybody has; sha256: its digest."""

    path: Path
    sha256: str
    published: bool

    def told(self) -> dict[str, str | bool]:
        """For the record of what was measured with it."""
        return {"weights": str(self.path), "sha256": self.sha256, "published": self.published}


class MissingWeights(ValueError):
    """Weights are not where they were looked for; the message says what to fetch from where."""


def usual_folder() -> Path:
    """Where torch, torchvision and torch-fidelity keep what they download."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights_of(published: Published, options: FromWeights) -> Weights:
    """The file of a network's weights, fetched if that was asked for.

    Raises:
        MissingWeights: it is not there and must not be fetched.
        ValueError: --weights does not exist, or the file could not be fetched.
    """
    folder = usual_folder() if options.weights is None else options.weights.expanduser()
    if folder.is_file():
        return _weights(folder, published)
    for name in (published.name, *published.also):
        if (folder / name).is_file():
            return _weights(folder / name, published)
    if options.download:
        return _weights(_fetch(published, folder), published)
    if options.weights is not None and not folder.exists():
        raise ValueError(
            f"--weights {options.weights} does not exist. Name a folder with {published.name}, or that file."
        )
    raise MissingWeights(
        f"{published.network} needs weights that are not here: fetch {published.url} ({published.megabytes} MB) to "
        f"{folder / published.name}, or name the file by --weights, or let --download fetch it."
    )


def _fetch(published: Published, folder: Path) -> Path:
    path = folder / published.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(published.url, str(path), hash_prefix=published.sha256)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{published.url} cannot be fetched ({reason}). Fetch it where there is a network, and put it to {path}."
        ) from None
    except RuntimeError as error:  # what torch makes of a wrong digest
        raise ValueError(f"{published.url} is not what was published ({error}). Fetch it again later.") from None
    return path


def _weights(path: Path, published: Published) -> Weights:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Weights(path, digest, digest.startswith(published.sha256))


def read_state(weights: Weights, network: str) -> dict[str, Tensor]:
    """The tensors of a file of weights, on the CPU.

    Raises:
        ValueError: the file holds something else, or more than tensors.
    """
    try:
        state = torch.load(weights.path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly every type
        reason = (str(error).splitlines() or ["it is empty"])[0][:120]
        raise ValueError(
            f"{weights.path} cannot be read as weights of {network} ({type(error).__name__}: {reason}). Fetch it again."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{weights.path} holds no table of tensors, as weights of {network} are. Fetch it again.")
    return state
