"""What processes of their own look at: the kernels, shared out among several, the operators, or small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checks import checks
from findings import find
from machine import Machine
from models import models
from operators import operators


@dataclass(frozen=True)
class Part:
    """``name``: checks, operators or models; findings that ``deadline`` (of ``time.monotonic()``) cuts off are left out.
    ``of`` processes share the findings out; this is the one that begins with number ``first``."""

    name: str
    dry: bool
    deadline: float
    first: int = 0
    of: int = 1


def look(part: Part, report: Callable[[dict[str, Any]], None]) -> None:
    """Report every finding of the part."""
    machine = Machine(part.dry)
    findings = list({"checks": checks, "operators": operators, "models": models}[part.name](machine))
    find(findings[part.first :: part.of], report, part.deadline, machine.usable)
