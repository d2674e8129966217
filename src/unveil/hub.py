"""Weights on the Hugging Face hub: a name `hf:owner/model` or `hf:owner/model@revision` as a local file."""

from pathlib import Path

PREFIX = "hf:"
INSTALL = "Run pip install 'unveil[hub]'."


def is_remote(name: str | Path) -> bool:
    return str(name).startswith(PREFIX)


def parse(name: str) -> tuple[str, str | None]:
    """The repository and the revision, if one is given.

    Raises:
        ValueError: the name is not of that form.
    """
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    owner, slash, model = repo.partition("/")
    if not slash or not owner or not model or "/" in model:
        raise ValueError(f"{name!r} is no name on the hub: write hf:owner/model, or hf:owner/model@revision.")
    return repo, revision or None


def download(name: str, file: str) -> Path:
    """One file of a repository, from the local cache if it is there; HF_HUB_OFFLINE=1 asks nothing of the network.

    Raises:
        ValueError: the library is missing, the name is malformed, or the file cannot be had.
    """
    repo, revision = parse(name)
    try:
        from huggingface_hub import hf_hub_download
    except Exception:  # a broken installation too
        raise ValueError(f"{name} is on the Hugging Face hub, which needs huggingface_hub. {INSTALL}") from None
    try:
        return Path(hf_hub_download(repo, file, revision=revision, library_name="unveil"))
    except Exception as error:  # the library's own, of requests, and of the file system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: {file} cannot be had from the hub ({reason}). Is the name right, and is there a network? A local run "
            "directory or .safetensors file needs none."
        ) from None
