"""Rows of a data set file, each with where it stands, and errors that say so."""

from __future__ import annotations

import base64
import codecs
import gzip
import json
import math
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxrl.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


class BadRow(UserError):
    """One row cannot be used; the others can (skip_bad_rows)."""


def read_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(place, row) for each row of a .jsonl, .jsonl.gz, .json (a list of objects) or .parquet file.

    place: "FILE:LINE", or "FILE: row N" where there are no lines. A row that cannot be read is given as a
    BadRow. Raises UserError for a file that cannot be read at all, or only in part (a truncated gzip).
    """
    name = path.name
    if name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_lines(path, name.endswith(".gz"))
    elif name.endswith(".json"):
        yield from _read_list(path)
    elif name.endswith(".parquet"):
        yield from _read_parquet(path)
    else:
        raise UserError(f"{path}: unknown kind of file; valid: {', '.join(SUFFIXES)}, or a directory of these")


def _read_lines(path: pathlib.Path, zipped: bool) -> Iterator[tuple[str, dict | BadRow]]:
    number = 0
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise UserError(f"{path}: encoded as UTF-16; convert it to UTF-8")
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if raw.strip():
                    place = f"{path}:{number}"
                    yield place, _parse(raw, place)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path}: damaged or truncated gzip after line {number} ({_first_line(e)})") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or _first_line(e)}") from None


def _parse(raw: bytes, place: str) -> dict | BadRow:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        return BadRow(f"{place}: not UTF-8: byte 0x{raw[e.start]:02x} at column {e.start + 1}")
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # half a surrogate pair would fail much later
    except UnicodeEncodeError:
        return BadRow(f"{place}: holds an unpaired surrogate (\\ud800..\\udfff), which no tokenizer accepts")
    except (ValueError, RecursionError) as e:
        return BadRow(f"{place}: not JSON ({_first_line(e)}); each line must be one object")
    if not isinstance(row, dict):
        return BadRow(f"{place}: a JSON {type(row).__name__}, not an object with fields")
    return row


def _read_list(path: pathlib.Path) -> Iterator[tuple[str, dict | BadRow]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not a JSON list of objects in UTF-8 ({_first_line(e)})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}, not a list of objects; one object a line is .jsonl")
    for number, row in enumerate(rows):
        place = f"{path}: row {number}"
        yield place, row if isinstance(row, dict) else BadRow(f"{place}: not an object with fields")


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[str, dict | BadRow]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", plain(row)
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path}: damaged or not parquet, after row {number} ({_first_line(e)})") from None


def plain(value: Any) -> Any:
    """The value as JSON can hold it: times in ISO form, decimals written out, bytes as UTF-8 or else base64.

    Not-a-number becomes null, since tools that write it mean null.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode("ascii")
    if callable(getattr(value, "tolist", None)):  # arrays and numbers of numpy
        return plain(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
