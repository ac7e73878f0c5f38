"""JSON objects from files, within limits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ClaqError

JSON_LIMIT = 256 << 20
"""Bytes of a JSON file; the index of a model of a hundred thousand layers has 30 MB."""


_HALF = re.compile("[\\ud800-\\udfff]")
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def is_text(value: str) -> bool:
    """Whether a string is Unicode text. JSON can spell half of a surrogate pair, which no encoding has and no tokenizer takes."""
    return _HALF.search(value) is None


def read_json_object(path: Path, error: type[ClaqError], limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: the file is missing, unreadable, larger than ``limit`` bytes, or no JSON object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from None
    if len(content) > limit:
        raise error(f"{path} has more than the {limit} bytes accepted")
    return parse_json_object(content, str(path), error)


def parse_json_object(content: bytes, where: str, error: type[ClaqError]) -> dict[str, Any]:
    """The JSON object that ``content`` is; a name may occur once in each object.

    Raises:
        error: it is none, names ``where``.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        if _ESCAPED_HALF.search(content) and not is_text(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half of a surrogate pair")
    except RecursionError:
        raise error(f"{where} cannot be read as JSON: nested too deeply") from None
    except ValueError as problem:  # JSONDecodeError, UnicodeDecodeError, a number too long, a repeated name
        raise error(f"{where} cannot be read as JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{where} must hold a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {repeated[:80]!r} occurs twice in one object")
    return result
