"""How measures are printed: as JSON, or in tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def json_text(values: Mapping[str, Any]) -> str:
    """Values as JSON, by the rule of :func:`json_value`."""
    return json.dumps(json_value(values), indent=1, allow_nan=False)


def json_value(value: Any) -> Any:
    """A value without what JSON does not have: infinities and NaN become the strings ``inf``, ``-inf`` and ``nan``."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: json_value(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_value(inner) for inner in value]
    return value


def print_table(title: str, table: Table) -> Console:
    """Print a table below its title; names and paths stand as they are, whatever brackets or colons they have.

    Returns:
        where they are printed, for further tables.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    # Not as the table's own title, which is broken to the width of the table: a path could not be copied any more.
    console.print(title, style="table.title", highlight=False, soft_wrap=True)
    console.print(table)
    return console
