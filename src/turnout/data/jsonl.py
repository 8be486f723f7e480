"""JSON lines -> rows, each with its line number for error texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turnout.data.utf8 import InvalidUtf8, decode_utf8, require_encodable
from turnout.errors import DataError
from turnout.registry import nearest


def read_jsonl(
    path: Path, text_field: str, invalid: InvalidUtf8 = "error"
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line number, text, whole row) of every line that is not blank; text is "" where `invalid="skip"` says so.

    Raises: DataError with file:line for a line that is not a JSON object or lacks a text in `text_field`.
    """
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}:{number}"
            line = decode_utf8(raw, where, invalid)
            if raw.strip():
                row = _parse(line, where) if line else {text_field: ""}
                yield number, require_encodable(_text(row, text_field, where), where, invalid), row


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); every line must be one object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, not an object; every line must be one object")
    return row


def _text(row: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        raise DataError(
            f"{where}: no field {text_field!r}; this line has: {', '.join(row) or 'nothing'}"
            f"{nearest(text_field, list(row))}; set data.text_field"
        )
    if not isinstance(row[text_field], str):
        raise DataError(f"{where}: field {text_field!r} is a {type(row[text_field]).__name__}, not a string")
    return row[text_field]
