"""Looking at one thing after another: each is right, wrong, left out or a failure, and none takes the others along."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from machine import exact_products, reason_of

Finding = tuple[str | dict[str, Any], Callable[[], tuple[float, float]]]
"""What is looked at, in words or by fields, and how: largest error, and its bound."""

FELL_BACK = "a CUDA kernel of claq is not used"
"""How the warning begins with which an operator takes the reference in place of a kernel; a right result hides that."""


class NotHere(Exception):
    """This cannot be looked at on this machine."""


def find(
    findings: Iterable[Finding], report: Callable[[dict[str, Any]], None], deadline: float, usable: Callable[[], bool]
) -> None:
    """Report every finding. An error is one, too; once the GPU is not ``usable`` any more, the others are left out."""
    lost = False
    for what, error in findings:
        entry: dict[str, Any] = {"what": what} if isinstance(what, str) else dict(what)
        try:
            if lost:
                raise NotHere("the GPU was lost to a finding before")
            if time.monotonic() > deadline:
                raise NotHere("out of time")
            torch.manual_seed(0)  # it asks the GPU, too
            with warnings.catch_warnings(record=True) as given, exact_products():
                warnings.simplefilter("always")
                largest, bound = error()
            entry |= {"error": largest, "bound": bound, "passed": largest <= bound}
            fallen = [str(warning.message) for warning in given if str(warning.message).startswith(FELL_BACK)]
            if fallen:
                entry |= {"passed": False, "failure": "; ".join(fallen)}
        except NotHere as reason:
            entry["skipped"] = str(reason)
        except Exception as failure:  # of CUDA, Triton, Dynamo or Inductor
            entry |= {"passed": False, "failure": reason_of(failure)}
            lost = not usable()
        report(entry)
