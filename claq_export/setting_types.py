"""Settings in the types that a dataclass is annotated with: what fits is converted, anything else refused in words."""

from __future__ import annotations

import contextlib
import operator
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from .errors import ConfigError

_NAMES = {
    bool: ("True or False", "booleans"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
    NoneType: ("None", "None"),
    Any: ("a value", "values"),
}
"""What a type is called, one value and many."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def in_types_of(
    owner: type, values: Mapping[str, Any], expected: Mapping[str, str] | None = None, prefix: str = ""
) -> dict[str, Any]:
    """Settings in the types of a dataclass's fields.

    A number may come from NumPy or be a tensor of one element, a whole number a float without fraction, a path a string, a
    tuple any collection but a string, sets in sorted order. A string is never a boolean or a number, nor is a boolean one.

    Args:
        owner: the dataclass; its annotations may be combined of ``bool``, ``int``, ``float``, ``str``, ``Path``, ``Any``, None,
            ``tuple[X, ...]``, ``dict[X, Y]``, ``Iterable[Any]`` and unions.
        values: by the names of its fields.
        expected: what errors say of single fields in the place of their annotation.
        prefix: of the names in errors.

    Returns:
        the values under the same names.

    Raises:
        ConfigError: a value is of another type; the message has the name, the value and what is expected.
    """
    hints = _hints(owner)
    found = {}
    for name, value in values.items():
        try:
            found[name] = _converted(value, hints[name])
        except TypeError as error:
            wanted = (expected or {}).get(name) or _described(hints[name])
            raise ConfigError(f"{prefix}{name} must be {wanted}, got {' '.join(_repr.repr(value).split())}") from error
    return found


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner)


def _converted(value: Any, hint: Any) -> Any:
    """The value in a type; TypeError if it does not fit."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        for one in arguments:
            with contextlib.suppress(TypeError):
                return _converted(value, one)
    elif kind is Any or (kind is NoneType and value is None) or (kind is str and isinstance(value, str)):
        return value
    elif kind is bool and isinstance(value, (bool, np.bool_)):
        return bool(value)
    elif kind in (int, float) and not isinstance(value, (bool, np.bool_, str)):
        return _whole(value) if kind is int else _number(value)
    elif kind is Path and isinstance(value, (str, os.PathLike)):
        return Path(value)
    elif kind is tuple and isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping)):
        # The order of a set differs from process to process.
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return tuple([_converted(item, arguments[0]) for item in items])
    elif kind is dict and isinstance(value, Mapping):
        return {_converted(key, arguments[0]): _converted(one, arguments[1]) for key, one in value.items()}
    elif kind is Iterable and _can_be_read(value):
        return value
    raise TypeError


def _whole(value: Any) -> int:
    if hasattr(value, "__index__"):
        with contextlib.suppress(TypeError):  # of a tensor with a fraction, which has the method
            return operator.index(value)
    number = _number(value)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    raise TypeError


def _number(value: Any) -> float:
    if isinstance(value, (int, float)):
        return value
    if not hasattr(value, "__float__"):
        raise TypeError
    try:
        return float(value)
    except (ValueError, RuntimeError) as error:  # an array or a tensor of several elements
        raise TypeError from error


def _can_be_read(value: Any) -> bool:
    """Whether there are items in it: a mapping and an array are rather one of these themselves."""
    several = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return several and not isinstance(value, (str, bytes, Mapping, np.ndarray, type))


def _described(hint: Any, many: bool = False) -> str:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return " or ".join(_described(one, many) for one in arguments)
    if kind is tuple:
        return f"a sequence of {_described(arguments[0], many=True)}"
    if kind is dict:
        return f"a dictionary of {_described(arguments[0], many=True)} and {_described(arguments[1], many=True)}"
    if kind is Iterable:
        return "an iterable"
    return _NAMES[kind][many]
