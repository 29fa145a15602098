"""A file of rows (CSV, TSV, JSON, Parquet, plain text) as a table that knows its lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data import parsers
from rankwise.errors import ArtifactError, EnvironmentFault, UserError, nearest

__all__ = ["FORMATS", "SUFFIXES", "Table", "format_of", "read_table"]

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
FORMATS = ("csv", "tsv", "jsonl", "parquet", "text")

_TEXT_PARSERS = {
    "csv": parsers.parse_csv,
    "tsv": parsers.parse_tsv,
    "jsonl": parsers.parse_json,
    "text": parsers.parse_text,
}


@dataclass(frozen=True)
class Table:
    """Rows as dictionaries, in file order.

    Attributes:
        path: the file or dataset, as the user wrote it.
        columns: every column's name, in order of first appearance.
        rows: one dictionary per row. A JSON row may lack a column; use ``row.get``.
        lines: for each row the 1-based line of the file it starts on; for Parquet and Hub
            datasets, which have no lines, the 1-based row number.
        named: False when the file names no columns (plain text: the one column is "text").
    """

    path: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    lines: list[int]
    named: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """Where row ``i`` stands, such as ``train.tsv:17``."""
        return f"{self.path}:{self.lines[i]}"


def format_of(path: str | Path) -> str | None:
    """The format a file name's suffix stands for (``.gz`` is looked through), or None."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def read_table(path: str | Path, file_format: str | None = None) -> Table:
    """Read one file of rows.

    Formats, by suffix or by ``file_format``:

    - ``csv``: RFC 4180 quoting; the delimiter is a comma, or a semicolon when the header has
      semicolons and no comma. The first line names the columns.
    - ``tsv``: tabs between fields and nothing else; a quote is a plain character, as in GLUE.
    - ``jsonl``: one JSON object per line, or one JSON list of objects (``.json`` too).
    - ``parquet``: needs the extra ``rankwise[parquet]``.
    - ``text``: every line that is not blank is one row, with one column, "text"; but a file whose
      first line has the columns of SNLI and MultiNLI, which call their tables .txt, is a TSV.

    Text is UTF-8, with or without a byte order mark, or UTF-16 with one; lines may end in LF,
    CRLF or CR; blank lines, and rows of nothing but empty fields, are skipped. A name ending in
    ``.gz`` is decompressed.

    Raises:
        UserError: no such file, a folder, an unknown format, no rows, or rows that cannot be
            read; every bad row is named as ``file:line``.
        ArtifactError: a damaged gzip or Parquet file.
        EnvironmentFault: the file cannot be opened, or pyarrow is missing.
    """
    file = Path(path).expanduser()
    _require_file(path, file)
    kind = _format(path, file_format)
    if kind == "parquet":
        columns, rows = parsers.parse_parquet(str(path), file)
        lines = list(range(1, len(rows) + 1))
    else:
        text = _decode(_read_bytes(path, file), str(path))
        if not text.strip():
            raise UserError(f"{path} is empty. Give a file with at least one row.")
        if file_format is None and kind == "text" and _is_nli(text):
            kind = "tsv"
        columns, rows, lines = _TEXT_PARSERS[kind](str(path), text)
    if not rows:
        raise UserError(
            f"{path} has a header ({_listed(columns)}) and no rows. Give a file with rows."
        )
    return Table(str(path), tuple(columns), rows, lines, named=kind != "text")


def _is_nli(text: str) -> bool:
    """Whether a text begins with the header of an SNLI or MultiNLI table."""
    return {"gold_label", "sentence1", "sentence2"} <= set(text.partition("\n")[0].split("\t"))


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")


def _format(path: str | Path, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in FORMATS:
            raise UserError(
                f"Unknown data format '{wanted}'. Known: {', '.join(FORMATS)}."
                f"{nearest(wanted, FORMATS)}"
            )
        return wanted
    found = format_of(path)
    if found is None:
        raise UserError(
            f"Cannot tell the format of {path} from its name. Use one of the suffixes "
            f"{', '.join(SUFFIXES)} (each also with .gz), or name the format: {', '.join(FORMATS)}."
        )
    return found


def _require_file(path: str | Path, file: Path) -> None:
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if format_of(p) is not None)
        hint = f" It holds {_listed(inside)}." if inside else ""
        raise UserError(f"{path} is a folder. Name one data file in it.{hint}")
    if file.exists():
        return
    folder = file.parent
    if not folder.is_dir():
        raise UserError(f"There is no file {path}: the folder {folder} does not exist.")
    others = sorted(p.name for p in folder.iterdir() if format_of(p) is not None)
    raise UserError(f"There is no file {path}.{nearest(file.name, others)}")


def _read_bytes(path: str | Path, file: Path) -> bytes:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be read: {error.strerror or error}. Check that the file exists and "
            "that you may read it."
        ) from error
    if file.suffix.lower() != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ArtifactError(
            f"{path} is not a whole gzip file ({error}). Fetch or compress it again."
        ) from error


def _decode(raw: bytes, path: str) -> str:
    """Bytes to text with LF line ends only; UTF-8, or UTF-16 where a byte order mark says so."""
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-{16 if wide else 8} text. "
            "Save the file as UTF-8, for example with: iconv -f latin1 -t utf-8"
        ) from error
    nul = text.find("\0")
    if nul >= 0:
        line = text.count("\n", 0, nul) + 1
        raise UserError(
            f"{path}:{line}: a NUL byte ({text.count(chr(0))} in the file), so this is not a text "
            "file or it is damaged. Remove the NUL bytes, for example with: tr -d '\\000'"
        )
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")
