"""Samples from parquet files of encoded pictures."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unveil.decoding import BadPicture, Picture, Skipped, decode


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """The label names that Hugging Face datasets writes into a parquet file's schema."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return None


class Parquet:
    """Rows of parquet files: `image`, encoded bytes or a struct of bytes and path, and perhaps an integer `label`.

    The encoded bytes stay in memory; a row is decoded when it is read. A label that is null or negative is none.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        skipped: list[Skipped],
        channels: int,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        if channels not in (1, 3, 4):
            raise ValueError(
                f"{name!r} holds encoded pictures, which cannot fill {channels} channels. Use 1, 3 or 4, or .npy."
            )
        self.name = name
        self.skipped = skipped
        self.channels, self.height, self.width = channels, height, width
        self._images: list[Any] = []  # one chunked array of bytes for each file
        self._starts = [0]
        self._names = [path.name for path in paths]
        self._labels: list[int] | None = []
        names = None
        for path in paths:
            images, labels, metadata = self._open(path)
            self._images.append(images)
            self._starts.append(self._starts[-1] + len(images))
            if labels is None or self._labels is None:
                self._labels = None
            else:
                self._labels += [-1 if label is None or label < 0 else label for label in labels]
            names = names or _class_names(metadata)
        if not len(self):
            raise ValueError(f"{name!r} has no rows. Name a parquet file that has some.")
        self.classes: tuple[str, ...] | None = None
        if self._labels and max(self._labels) >= 0:
            highest = max(self._labels)
            if highest >= 1_000_000:
                raise ValueError(f"{name!r} has a label {highest}; labels number the classes from 0. Number them anew.")
            self.classes = names or tuple(str(label) for label in range(highest + 1))
            if highest >= len(self.classes):
                raise ValueError(
                    f"{name!r} has a label {highest} but its schema names {len(self.classes)} classes. Write it anew."
                )

    @staticmethod
    def _open(path: Path) -> tuple[Any, list[int | None] | None, dict[bytes, bytes] | None]:
        try:
            import pyarrow as pa
            import pyarrow.compute as pc
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ValueError(
                f"{path.name} is a parquet file, which needs pyarrow. Install it: pip install pyarrow"
            ) from error
        try:
            schema = pq.read_schema(path)
            columns = [name for name in ("image", "label") if name in schema.names]
            table = pq.ParquetFile(path).read(columns=columns) if columns else None
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet ({error}). Write or download it again.") from error
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        if table is None or "image" not in columns:
            raise ValueError(
                f"{path} has no column 'image', only {found or 'no columns'}. Rename the one with pictures."
            )
        images = table.column("image")
        if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
            images = pc.call_function(
                "struct_field", [images], pc.StructFieldOptions([images.type.get_field_index("bytes")])
            )
        if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
            raise ValueError(
                f"{path} has an 'image' of type {images.type}. It must be binary, or a struct with 'bytes'."
            )
        labels = None
        if "label" in columns:
            if not pa.types.is_integer(table.column("label").type):
                raise ValueError(f"{path} has a 'label' that is not an integer (columns: {found}). Number the classes.")
            labels = table.column("label").to_pylist()
        return images, labels, schema.metadata

    def __len__(self) -> int:
        return self._starts[-1]

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def encoded(self, index: int) -> bytes:
        """The file of a sample; raises BadPicture."""
        file = self._file(index)
        encoded = self._images[file][index - self._starts[file]].as_py()
        if not encoded:
            raise BadPicture(self.where(index), "no bytes in this row (0 bytes, or a path only)")
        return encoded

    def read(self, index: int) -> Picture:
        stream = io.BytesIO(self.encoded(index))
        return decode(stream, self.where(index), self.channels, self.height, self.width)

    def label(self, index: int) -> int | None:
        return self._labels[index] if self._labels and self._labels[index] >= 0 else None

    def where(self, index: int) -> str:
        file = self._file(index)
        row = f"row {index - self._starts[file]}"
        return row if len(self._names) == 1 else f"{self._names[file]} {row}"
