"""LAMBADA: does the model predict the last word of a passage that only the whole passage gives away?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..inputs import parse_json_object
from .models import LogitsModel


@dataclass(frozen=True)
class LambadaQuality:
    """Last-word prediction, as lm-evaluation-harness's ``lambada_openai`` counts it.

    Attributes:
        accuracy: share of passages whose every last-word token is ranked first given the tokens before it.
        perplexity: exp of the mean negative log-likelihood of the last word.
        passages: how many.
    """

    accuracy: float
    perplexity: float
    passages: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_passages(path: str | Path, limit: int | None = None) -> list[str]:
    """Passages of a JSONL file with a ``text`` field.

    Raises:
        ConfigError: missing or malformed; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"LAMBADA file {str(path)!r} does not exist")
    passages: list[str] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(passages) == limit:
                break
            text = parse_json_object(line, f"{path}:{number}", ConfigError).get("text")
            if not isinstance(text, str):
                raise ConfigError(f"{path}:{number}: not a JSON object with a 'text' field")
            if len(text.split()) < 2:
                raise ConfigError(f"{path}:{number}: a passage needs at least two words")
            passages.append(text)
    if not passages:
        raise ConfigError(f"{path}: no passages")
    return passages


def lambada_quality(
    model: LogitsModel, tokenizer: Any, passages: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> LambadaQuality:
    """Score each passage with one forward pass over it; the last word is what follows its last space."""
    hits, losses = 0, []
    for number, passage in enumerate(passages):
        context, word = passage.rstrip().rsplit(" ", 1)
        given = tokenizer(context, add_special_tokens=False)["input_ids"]
        tokens = tokenizer(f"{context} {word}", add_special_tokens=False)["input_ids"]
        target = torch.tensor(tokens[len(given) :])
        logits = model.logits(torch.tensor([tokens[:-1]]))[0, -len(target) :].float().cpu()
        hits += bool((logits.argmax(-1) == target).all())
        losses.append(float(torch.nn.functional.cross_entropy(logits, target, reduction="sum")))
        if progress is not None:
            progress(number + 1, len(passages))
    return LambadaQuality(hits / len(passages), math.exp(sum(losses) / len(losses)), len(passages))
