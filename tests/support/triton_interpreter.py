"""Whether Triton's interpreter works with the packages at hand."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec


def problem() -> str | None:
    """Why it does not, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install claq-export[gpu])"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return f"the interpreter of Triton {version('triton')} fails with NumPy {version('numpy')} (it needs one below 2.4)"
    return None


def _release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)
