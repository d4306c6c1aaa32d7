"""The rows of a file as plain dicts: JSONL, a JSON array, CSV or Parquet, any text of them compressed by gzip or not.

CSV and Parquet are told by the name's end, Parquet by its first bytes, too, and JSON by how it begins. Every row comes
with where it stands, for messages. A table's empty cells are None.
"""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def rows(path: Path, *, what: str, such: str) -> Iterator[tuple[Row, str]]:
    """Yields every row of a file with where it stands; ``what`` they are, and ``such`` what is expected, in words.

    Raises:
        ImportError: a Parquet file, and no polars.
        ValueError: no such file, or no rows in it; a row that is none, with its place.
    """
    if not path.is_file():
        raise ValueError(f"no {what} at {path}: expected a JSONL file (or a JSON array, CSV or Parquet) of {such}")
    with path.open("rb") as file:
        start = file.read(4)
    is_empty = True
    for row in _parquet(path) if start == _PARQUET else _text(path, start, such):
        is_empty = False
        yield row
    if is_empty:
        raise ValueError(f"{path} holds no {what}: expected {such}")


def shown(value: Any) -> str:
    """Returns the beginning of a value as JSON, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(path: Path, start: bytes, such: str) -> Iterator[tuple[Row, str]]:
    is_zipped = start.startswith(_GZIP)
    end = Path(path.stem if is_zipped and path.suffix == ".gz" else path.name).suffix.lower()
    if end in (".parquet", ".pq"):
        raise ValueError(f"{path} is not Parquet: expected a file that begins with PAR1")
    with _opened(path, such, is_zipped=is_zipped) as file:
        if end in _DELIMITERS:
            yield from _csv(file, path, _DELIMITERS[end])
            return
        first = next((letter for letter in iter(lambda: file.read(1), "") if not letter.isspace()), "")
        file.seek(0)
        yield from _array(file, path) if first == "[" else _lines(file, path)


@contextmanager
def _opened(path: Path, such: str, *, is_zipped: bool) -> Iterator[TextIOWrapper]:
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if is_zipped else path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: expected {such}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not whole: gzip says {error}") from error


def _lines(file: TextIOWrapper, path: Path) -> Iterator[tuple[Row, str]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(_decoded(line, where), where), where


def _array(file: TextIOWrapper, path: Path) -> Iterator[tuple[Row, str]]:
    for number, row in enumerate(_decoded(file.read(), str(path)), 1):
        where = f"{path}, row {number}"
        yield _object(row, where), where


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        told = error
        if isinstance(error, json.JSONDecodeError):
            # Of the decoder's own words not the place: every line is the first to it.
            place = f"line {error.lineno}, character {error.colno}"
            told = f"{error.msg} at {place if error.lineno > 1 else f'character {error.pos + 1}'}"
        raise ValueError(f"{where} is not JSON: {told}") from error


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object of columns, such as prompt, got {shown(row)}")
    return row


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """An object whose keys differ: of several of a name json takes the last, whatever the others say."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has {Counter(key for key, _ in pairs).most_common(1)[0][0]} twice, expected once")
    return found


def _csv(file: TextIOWrapper, path: Path, delimiter: str) -> Iterator[tuple[Row, str]]:
    reader, number = csv.reader(file, delimiter=delimiter, strict=True), 0
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := next((name for name, count in Counter(header).items() if count > 1), None):
            raise ValueError(f"{path} has two columns {twice!r}: expected each once")
        for number, cells in enumerate((cells for cells in reader if cells), 1):
            where = f"{path}, row {number}"
            if len(cells) != len(header):
                raise ValueError(f"{where} has {len(cells)} cells, expected {len(header)} as its header")
            yield {name: cell if cell.strip() else None for name, cell in zip(header, cells, strict=True)}, where
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV behind row {number}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[Row, str]]:
    try:
        import polars as pl
    except ImportError as error:
        raise ImportError(f"reading {path} needs polars: pip install '.[report]' in a checkout") from error
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
    for number, row in enumerate(frame.iter_rows(named=True), 1):
        yield row | {name: _inner(row[name]) for name in nested}, f"{path}, row {number}"


def _inner(value: Any) -> Any:
    """A value whose objects, such as turns, are without the fields that another row's have."""
    if isinstance(value, dict):
        return {name: _inner(one) for name, one in value.items() if one is not None}
    return [_inner(one) for one in value] if isinstance(value, list) else value
