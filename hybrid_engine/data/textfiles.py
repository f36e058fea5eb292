"""Text files as random-access rows: an index of byte ranges is kept, never the text.

One pass finds where every record starts; a record is then read with ``pread``, which needs no
seek and so is safe after a fork. JSON Lines, JSON arrays and CSV differ only in how records are
found and parsed.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hybrid_engine.data.records import BadRow, Origin
from hybrid_engine.errors import UserError

Row = dict[str, Any]
BOM = b"\xef\xbb\xbf"
LONGEST_CSV_FIELD = 2**31 - 1  # the csv module refuses fields over 128 KiB unless told otherwise


class TextRows:
    """Rows of one file. ``spans`` holds (first byte, end byte, line) of every record, flattened."""

    def __init__(self, path: Path, spans: array[int], parse: Callable[[str], Any]) -> None:
        self.name = str(path)
        self._spans = spans
        self._parse = parse
        self._file = open(path, "rb")  # noqa: SIM115 - stays open as long as the rows are in use

    def __len__(self) -> int:
        return len(self._spans) // 3

    def origin(self, row: int) -> Origin:
        return Origin(self.name, self._spans[3 * row + 2])

    def read(self, row: int) -> Row:
        """The raw fields of a row; raises BadRow when the text does not parse."""
        start, end, _ = self._spans[3 * row : 3 * row + 3]
        raw = os.pread(self._file.fileno(), end - start, start)
        try:
            value = self._parse(raw.decode())
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte {error.start} of the row); save the file as UTF-8"
            raise BadRow(reason) from None
        if not isinstance(value, dict):
            raise BadRow(
                f"not a JSON object but {describe(value)}; "
                'write each row as {"column": value, ...}'
            )
        return value

    def scan(self) -> Iterator[tuple[int, Row | BadRow]]:
        """Every row in order; an unreadable one as its BadRow."""
        for row in range(len(self)):
            try:
                yield row, self.read(row)
            except BadRow as error:
                yield row, error


def describe(value: Any) -> str:
    """A value's type, in words a data author uses."""
    names = {
        str: "a string",
        list: "a list",
        dict: "an object",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else type(value).__name__
    )


def parse_json(text: str) -> Any:
    try:
        return json.loads(text.rstrip())  # so that an error stays on the line
    except json.JSONDecodeError as error:
        raise BadRow(
            f"bad JSON: {error.msg} (column {error.colno}); mend or remove the row"
        ) from None


def open_jsonl(path: Path) -> TextRows:
    """JSON Lines: one object a line; blank lines are skipped."""
    spans = array("Q")
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            start = offset + (len(BOM) if number == 1 and line.startswith(BOM) else 0)
            offset += len(line)
            if line.strip():
                spans.extend((start, offset, number))
    return TextRows(path, spans, parse_json)


def open_json(path: Path) -> TextRows:
    """A JSON file that holds one array of objects.

    The text is in memory while it is indexed, not after.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    first_byte = path.stat().st_size - len(text.encode())  # 3 with a byte-order mark
    spans = array("Q")
    done, byte, line = 0, first_byte, 1
    for start, end in json_elements(text, str(path)):
        byte += len(text[done:start].encode())
        line += text.count("\n", done, start)
        size = len(text[start:end].encode())
        spans.extend((byte, byte + size, line))
        done, byte, line = end, byte + size, line + text.count("\n", start, end)
    return TextRows(path, spans, parse_json)


def json_elements(text: str, name: str) -> Iterator[tuple[int, int]]:
    """Character ranges of the elements of the array that ``text`` holds."""
    decoder = json.JSONDecoder()
    at = skip_space(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        raise UserError(
            f"{name}:{line_of(text, at)}: a .json file must hold a list of objects, [{{...}}, "
            f"{{...}}]; "
            "for one object a line, name it .jsonl"
        )
    at = skip_space(text, at + 1)
    while text[at : at + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}:{error.lineno}: bad JSON: {error.msg} (column {error.colno})"
            ) from None
        yield at, end
        at = skip_space(text, end)
        if text[at : at + 1] == ",":
            at = skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise UserError(
                f"{name}:{line_of(text, at)}: bad JSON: expected ',' or ']' after an element"
            )
    rest = skip_space(text, at + 1)
    if rest < len(text):
        raise UserError(f"{name}:{line_of(text, rest)}: bad JSON: text after the closing ']'")


def skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def open_csv(path: Path) -> TextRows:
    """CSV with a header line; quoted fields may span lines."""
    csv.field_size_limit(LONGEST_CSV_FIELD)
    spans = array("Q")
    with open(path, "rb") as file:
        lines = CountedLines(file, str(path))
        reader = csv.reader(lines, strict=True)
        header = next_csv_record(reader, lines)
        while header is not None:
            start, line = lines.offset, lines.number + 1
            record = next_csv_record(reader, lines)
            if record is None:
                break
            if record:
                spans.extend((start, lines.offset, line))
    names = header or []
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(
            f"{path}:1: the header names column {repeated[0]!r} twice; rename one of them"
        )
    return TextRows(path, spans, lambda text: parse_csv_record(text, names))


class CountedLines:
    """Decoded lines of a binary file, counting the bytes and lines handed out."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name
        self.offset = 0
        self.number = 0

    def __iter__(self) -> CountedLines:
        return self

    def __next__(self) -> str:
        raw = self._file.readline()
        if not raw:
            raise StopIteration
        self.offset += len(raw)
        self.number += 1
        try:
            return raw.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise self.error("not UTF-8; save the file as UTF-8") from None

    def error(self, reason: str) -> UserError:
        return UserError(f"{self._name}:{self.number}: {reason}")


def next_csv_record(reader: Iterator[list[str]], lines: CountedLines) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise lines.error(f"bad CSV: {error}; check the quotes of the row that ends here") from None


def parse_csv_record(text: str, names: list[str]) -> Row:
    values = next(csv.reader([text], strict=True))
    if len(values) != len(names):
        raise BadRow(
            f"{len(values)} fields where the header has {len(names)} ({', '.join(names)}); "
            "quote fields that contain commas"
        )
    return dict(zip(names, values, strict=True))
