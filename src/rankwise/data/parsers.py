"""How each file format becomes columns, rows and line numbers."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import ArtifactError, EnvironmentFault, UserError, gather

__all__ = [
    "Parsed",
    "looks_like_data",
    "parse_csv",
    "parse_json",
    "parse_parquet",
    "parse_text",
    "parse_tsv",
]

# SNLI and MultiNLI end a row with as many single annotators' labels as there are, of five columns.
_ANNOTATOR = re.compile(r"label\d+")

Row = dict[str, Any]
Parsed = tuple[list[str], list[Row], list[int]]


def parse_text(path: str, text: str) -> Parsed:
    """Each line that is not blank is one row with the one column "text"."""
    del path
    kept = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return ["text"], [{"text": line} for _, line in kept], [n for n, _ in kept]


def parse_tsv(path: str, text: str) -> Parsed:
    """Tabs between fields, line ends between rows, nothing quoted."""
    split = ((n, line.split("\t")) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return _delimited(path, split, "TSV")


def parse_csv(path: str, text: str) -> Parsed:
    """RFC 4180 with a comma, or with a semicolon when the header has no comma."""
    header = text.lstrip().partition("\n")[0]
    delimiter = ";" if ";" in header and "," not in header else ","
    limit = csv.field_size_limit(max(len(text), 1))  # a document may be longer than 131072
    try:
        return _delimited(path, _csv_records(path, text, delimiter), "CSV")
    finally:
        csv.field_size_limit(limit)


def _csv_records(path: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) per record, with the line the record starts on."""
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: the quotes of this row do not close properly ({error}). A field "
                'with a quote, a line end or the delimiter in it is written "like ""this""".'
            ) from error
        if any(fields):
            yield line, fields
        line = reader.line_num + 1


def _delimited(path: str, records: Iterator[tuple[int, list[str]]], kind: str) -> Parsed:
    first, columns = next(records)
    columns = [name.strip() for name in columns]
    _check_header(f"{path}:{first}", columns)
    rows: list[Row] = []
    lines: list[int] = []
    problems: list[str] = []
    for line, fields in records:
        left = columns[len(fields) :]
        if left and all(map(_ANNOTATOR.fullmatch, left)):
            fields = [*fields, *[""] * len(left)]
        if len(fields) != len(columns):
            problems.append(f"{path}:{line}: {len(fields)} fields")
            continue
        rows.append(dict(zip(columns, fields, strict=True)))
        lines.append(line)
    gather(
        UserError,
        f"{path} cannot be read as {kind}, because each row needs as many fields as the header, "
        f"{len(columns)}",
        problems,
    )
    return columns, rows, lines


def _check_header(where: str, columns: Sequence[str]) -> None:
    problems = [f"column {n} has no name" for n, name in enumerate(columns, 1) if not name]
    doubled = sorted({name for name in columns if name and columns.count(name) > 1})
    problems += [f"two columns are named '{name}'" for name in doubled]
    hint = " (this line looks like data)" if looks_like_data(columns) else ""
    gather(UserError, f"{where}: the first line must name the columns{hint}", problems)


def looks_like_data(columns: Sequence[str]) -> bool:
    """Whether a header line is likely a row: a name that is a number, or as long as a sentence."""
    return any(name.lstrip("-").replace(".", "", 1).isdigit() or len(name) > 60 for name in columns)


def parse_json(path: str, text: str) -> Parsed:
    """One object per line, or one list of objects."""
    values: list[tuple[int, Any]] = []
    problems: list[str] = []
    read = _json_list if text.lstrip().startswith("[") else _json_lines
    for line, value, problem in read(text):
        if not problem and not isinstance(value, dict):
            problem = f"expected an object such as {{...}}, found {_json_kind(value)}"
        if problem:
            problems.append(f"{path}:{line}: {problem}")
        else:
            values.append((line, value))
    title = f"{path} cannot be read as JSON; it needs one object per line, or one list of objects"
    gather(UserError, title, problems)
    columns = list(dict.fromkeys(name for _, value in values for name in value))
    return columns, [value for _, value in values], [line for line, _ in values]


def _json_lines(text: str) -> Iterator[tuple[int, Any, str]]:
    """(line, value, problem) for each line that is not blank."""
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield n, json.loads(line), ""
            except (ValueError, RecursionError) as error:
                yield n, None, _json_problem(error)


def _json_list(text: str) -> Iterator[tuple[int, Any, str]]:
    """(line, value, problem) for each element of one JSON list; stops at a syntax error."""
    decoder = json.JSONDecoder()
    at = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    if text[at : at + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, None, _json_problem(error)
            return
        yield line, value, ""
        at = _skip_space(text, end)
        mark = text[at : at + 1]
        if mark == "]" and not text[at + 1 :].strip():
            return
        if mark != ",":
            line += text.count("\n", counted, at)
            found = "more after the list" if mark == "]" else f"'{mark}'" if mark else "the end"
            yield line, None, f"not valid JSON: expected ',' or the closing ']', found {found}"
            return
        at = _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "not usable JSON: nested too deeply"
    return f"not usable JSON: {error}"


def _json_kind(value: object) -> str:
    kinds = ((str, "a string"), (list, "a list"), (bool, "a boolean"), (type(None), "null"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "a number")


def parse_parquet(path: str, file: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a Parquet file, through pyarrow.

    Raises:
        EnvironmentFault: pyarrow is not installed.
        ArtifactError: the file is not Parquet or is damaged.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise EnvironmentFault(
            f"Reading {path} needs pyarrow, which is not installed. "
            'Install it with: pip install "rankwise[parquet]"'
        ) from error
    try:
        table = parquet.ParquetFile(file).read()
        columns = [str(name) for name in table.column_names]
        _check_header(path, columns)
        return columns, table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ArtifactError(
            f"{path} cannot be read as Parquet: {reason} Fetch or write it again."
        ) from error
