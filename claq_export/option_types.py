"""Types of numbers in the options of several commands; argparse reports what is none (exit status 2)."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(text, 1, "a positive number")


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(text, 0, "a whole number, 0 or more")


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def _at_least(text: str, least: int, expected: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")
    return number
