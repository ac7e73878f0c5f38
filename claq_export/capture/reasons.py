"""Turns what ``torch.export`` raises into the one or two lines a user can act on."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

_TORCH = Path(torch.__file__).resolve().parent
_OURS = Path(__file__).resolve().parents[1]
_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_FIXED = re.compile(r"You marked (axis \d+ of \w+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_NOISE = re.compile(r"\x1b\[[0-9;]*m")


def user_frame(error: BaseException) -> str | None:
    """``file:line: source`` of the innermost frame that is the model's own code, if the error passed through any."""
    found = None
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        for frame in traceback.extract_tb(current.__traceback__):
            path = Path(frame.filename)
            if not path.is_file() or path.is_relative_to(_TORCH) or path.is_relative_to(_OURS):
                continue
            if "<frozen" in frame.filename or "contextlib" in path.name:
                continue
            found = f"{path.name}:{frame.lineno}: `{(frame.line or '').strip()}`"
        if found is not None:
            return found
        current = current.__cause__ or current.__context__
    return None


def explain(error: BaseException, model_name: str, input_names: Sequence[str]) -> str:
    """Why ``model_name`` cannot be captured, in at most two lines, with the source line at fault when it is known."""
    where = user_frame(error)
    at = f" at {where}" if where else ""
    text = _NOISE.sub("", str(error)).strip()
    text = _SIZE.sub(lambda match: f"axis {match[2]} of {input_names[int(match[1])]}", text)
    kind = type(error).__name__
    if "data-dependent" in text or "GuardOnDataDependent" in kind or "DataDependentOutput" in kind:
        return (
            f"cannot capture {model_name}: its control flow depends on tensor values{at}.\n"
            "Decide by shapes or settings instead, or use torch.where / torch.cond."
        )
    fixed = _FIXED.search(text)
    if fixed is not None:
        return f"cannot capture {model_name}: {fixed[1]} cannot be dynamic, the model needs it to be {fixed[2]}{at}"
    if "Constraints violated" in text or "ConstraintViolation" in kind:
        details = [line.strip(" -") for line in text.splitlines() if line.strip().startswith("-")]
        reason = _first_sentence(details[0] if details else text)
        return f"cannot capture {model_name} with the dynamic axes asked for: {reason}"
    if "DynamicOutputShape" in kind:
        return f"cannot capture {model_name}: the shape of a result depends on tensor values{at}"
    return f"cannot capture {model_name}: {_first_sentence(text) or kind}{' (' + kind + ')' if text else ''}{at}"


def _first_sentence(text: str, limit: int = 240) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= limit else line[: limit - 1] + "…"
