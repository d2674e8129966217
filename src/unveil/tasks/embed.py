"""Features of a source as a file: what other programs cluster, search and classify by."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unveil.checkpoint import FromRun, find_weights, pick_device, replacing
from unveil.data import Batch, Samples, Skipped, Source, batches, source_for
from unveil.features import Features, Kept, encoder_features, usual_pool
from unveil.model import AnyModel
from unveil.recognizer import Recognizer, load_any, tuned_features
from unveil.sources import as_text

ROW_GROUP = 64 * 2**20  # bytes of features that are held before they are written to a parquet file


@dataclass(frozen=True, kw_only=True)
class Embed(FromRun):
    """Write the frozen encoder's features of pictures or clips, with the path of each, to a .parquet or .npz file.

    Pictures are scaled until they just cover the model's size, and their centre is cut; nothing is masked or drawn. Columns or
    arrays: path, strings; label, int64, -1 where there is none, if the data has labels; features, float32. In parquet,
    features are fixed-size lists of D, or of N patches each of which is a list of D, and the schema's metadata has a JSON
    object under `unveil`; in .npz they are (n, D) or (n, N, D), and that JSON is the array `metadata`. It names the model
    file, the recipe, its size, how features were made, and the classes.

    Example: unveil embed --run runs/photos --data photos/ --out photos.parquet
    """

    data: str
    """Pictures or clips, as for pretrain; labels are not needed."""
    out: Path
    """The file to write, .parquet or .npz; one that exists is not overwritten. Parquet is written as features come, an .npz
    at once, so that its features must fit into memory."""
    pool: Kept | None = None
    """mean of the patch tokens, or of the class tokens, or patches: a vector for every patch. Default: what the recipe
    trains, class for UMD's family, else mean."""
    time: float = 0.0
    """Put noise of this time on the pictures first, for models that only ever saw noise (DiT, MaskDiT)."""
    seed: int = 0
    """Draws the noise, if --time is given."""
    batch_size: int = 256
    """Clips encoded at once; no effect on the result."""
    workers: int = 0
    """Processes that read data."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


@dataclass(frozen=True)
class Part:
    """Features of some samples in a row; labels None if the data has none."""

    paths: list[str]
    labels: Tensor | None
    features: Tensor


def _check_out(out: Path) -> None:
    if out.suffix not in (".parquet", ".npz"):
        raise ValueError(f"--out {out} is of no known type. Give a name that ends in .parquet or .npz.")
    if out.exists():
        raise ValueError(f"--out {out} exists already and is not overwritten. Give another name, or remove it.")


def _parts(batches: Iterator[Batch], source: Source, function: Features, device: str) -> Iterator[Part]:
    for batch in batches:
        if batch.values is None:
            continue
        paths = [as_text(source.where(i)) for i in batch.indices.tolist()]
        features = function(batch.clips(device), batch.indices).float().cpu()
        yield Part(paths, batch.labels if source.classes else None, features)


def write_parquet(file: Path, parts: Iterator[Part], shape: tuple[int, ...], labelled: bool, about: str) -> None:
    """Write parts as they come, a row group whenever enough is held.

    Args:
        shape: of one sample's features, (D,) or (N, D).
        about: JSON, for the schema's metadata under `unveil`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind: Any = pa.float32()
    for length in reversed(shape):
        kind = pa.list_(kind, length)
    columns = [("path", pa.string()), *([("label", pa.int64())] if labelled else []), ("features", kind)]
    schema = pa.schema(columns, {"unveil": about})
    held: list[Any] = []
    with pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for part in parts:
            values: Any = pa.array(part.features.numpy().reshape(-1))
            for length in reversed(shape):
                values = pa.FixedSizeListArray.from_arrays(values, length)
            labels = [] if part.labels is None else [pa.array(part.labels.numpy())]
            held.append(pa.record_batch([pa.array(part.paths, pa.string()), *labels, values], schema=schema))
            if sum(rows.nbytes for rows in held) >= ROW_GROUP:
                writer.write_table(pa.Table.from_batches(held))
                held = []
        if held:
            writer.write_table(pa.Table.from_batches(held))


def write_npz(file: Path, parts: Iterator[Part], about: str) -> None:
    """Write all parts at once; about is JSON, for the array `metadata`."""
    every = list(parts)
    arrays = {"path": np.array([path for part in every for path in part.paths])}
    labels = [part.labels.numpy() for part in every if part.labels is not None]
    if labels:
        arrays["label"] = np.concatenate(labels)
    arrays["features"] = np.concatenate([part.features.numpy() for part in every])
    with open(file, "wb") as stream:  # by a name, numpy would add .npz to it
        np.savez(stream, allow_pickle=False, metadata=np.array(about), **arrays)


def _about(options: Embed, model: AnyModel | Recognizer, source: Source) -> dict[str, Any]:
    """What a file says of its features."""
    recipe, clip = model.recipe, model.recipe.clip
    return {
        "model": str(find_weights(options.run)),
        "recipe": recipe.name,
        "size": recipe.size,
        "data": options.data,
        "pool": model.recognition.pool if isinstance(model, Recognizer) else options.pool or usual_pool(recipe),
        "time": options.time,
        "seed": options.seed,
        "channels": clip.channels,
        "frames": clip.frames,
        "image_size": [clip.height, clip.width],
        "grid": list(clip.grid),  # of the patches: frames, rows, columns
        "mean": list(clip.mean),
        "std": list(clip.std),
        "classes": None if source.classes is None else [as_text(name) for name in source.classes],
    }


def embed(options: Embed, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run `unveil embed`; on_progress is told the samples done and their number.

    Returns:
        "out"; "samples" and "shape", of one sample's features; what the file's metadata says; "problems", the files that
        could not be used and why; "converted", the number of pictures for each conversion.

    Raises:
        ValueError: the file exists or is of no known type, the model has no such features, or no sample can be read. No
            file is left then.
    """
    _check_out(options.out)
    device = pick_device(options.device)
    model, _ = load_any(options.run, device)
    source = source_for(options.data, model.recipe.clip)
    if isinstance(model, Recognizer):
        function = tuned_features(model, options.pool, options.time)
    else:
        function = encoder_features(model, options.pool, options.time, options.seed)
    samples = Samples(source, model.recipe.clip, seed=0, training=None)
    loader = batches(samples, options.batch_size, 0, 0, shuffle=False, drop_last=False, num_workers=options.workers)
    about = _about(options, model, source)
    shape = (model.recipe.encoder.embed_dim,)
    if about["pool"] == "patches":
        shape = (model.recipe.clip.num_tokens, *shape)
    problems: list[Skipped] = list(source.skipped)
    converted: Counter[str] = Counter()
    done = written = 0

    def counted() -> Iterator[Batch]:
        nonlocal done, written
        for batch in loader:
            problems.extend(batch.problems)
            converted.update(note for _, note in batch.notes)
            written += len(batch.indices)
            yield batch
            done += len(batch.indices) + len(batch.problems)
            if on_progress is not None and written:
                on_progress(done, len(samples))
        if not written:
            first = f"{problems[0].where}: {problems[0].reason}"
            raise ValueError(
                f"None of the {len(samples)} samples of {options.data!r} can be read; the first problem: {first}."
            )

    parts = _parts(counted(), source, function, device)
    with replacing(options.out) as file:  # made before the long part, which may find that nothing can be written here
        if options.out.suffix == ".parquet":
            write_parquet(file, parts, shape, bool(source.classes), json.dumps(about))
        else:
            write_npz(file, parts, json.dumps(about))
    return {
        "out": str(options.out),
        "samples": written,
        "shape": list(shape),
        **about,
        "problems": [{"where": as_text(problem.where), "what": problem.reason} for problem in problems],
        "converted": dict(converted),
    }
