"""What a process of its own looks at: the operators, or small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from machine import Machine
from models import models
from operators import find, operators


@dataclass(frozen=True)
class Part:
    """``name``: operators or models; findings that ``deadline`` (of ``time.monotonic()``) cuts off are left out."""

    name: str
    dry: bool
    deadline: float


def find_all(part: Part, report: Callable[[dict[str, Any]], None]) -> None:
    """Report every finding of the part."""
    machine = Machine(part.dry)
    findings = {"operators": operators, "models": models}[part.name](machine)
    find(findings, report, part.deadline, machine.usable)
