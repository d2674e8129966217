"""Tables of files and what is known of them: a .csv, or a .parquet with a column `path`."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = "path"


@dataclass(frozen=True)
class Table:
    """Columns of a table by name, the values of each row as they are written: strings of a .csv, and what a .parquet holds."""

    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.columns[PATH])


def is_table(path: Path) -> bool:
    """Whether a file is a table of paths; a .parquet without such a column holds the pictures themselves."""
    if path.suffix.lower() == ".csv":
        return True
    if path.suffix.lower() != ".parquet":
        return False
    try:
        import pyarrow.parquet as pq

        names = pq.read_schema(path).names
    except Exception:  # not installed, or no parquet: who reads pictures from it says which
        return False
    return PATH in names and "image" not in names


def _read_csv(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = [row for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table ({error}). Write it as UTF-8 text with commas.") from None
    header = [name.strip() for name in header]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has several columns {twice[0]!r}. Rename all but one.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(
                f"{path} has {len(header)} columns, but row {number} has {len(row)} values. Put values with commas in quotes."
            )
    return {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}


def read_table(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: it cannot be read, has no column `path` or no rows, or a row has no path.
    """
    if path.suffix.lower() == ".csv":
        columns = _read_csv(path)
    else:
        import pyarrow.parquet as pq

        try:
            columns = pq.read_table(path).to_pydict()
        except (OSError, ValueError) as error:  # pyarrow's own are of these
            raise ValueError(f"{path} cannot be read as a table ({error}). Is the file whole?") from None
    if PATH not in columns:
        raise ValueError(
            f"{path} has no column {PATH!r}, only {', '.join(columns) or 'nothing'}. Its first line must name the columns."
        )
    table = Table(columns)
    if not len(table):
        raise ValueError(f"{path} has no rows. Name a table that has some.")
    empty = [i for i, value in enumerate(columns[PATH]) if not isinstance(value, str) or not value]
    if empty:
        raise ValueError(
            f"{path} has no path in its row {empty[0] + 1} of {len(table)}. Fill it in, or remove the row."
        )
    return table
