"""LAMBADA: does the model predict the last word of a passage that only the whole passage gives away?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..inputs import parse_json_object
from .harness import continuation_likelihood
from .language import perplexity_of
from .models import LogitsModel, sequence_limit


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
        ConfigError: missing or malformed, or a passage without a space before its last word; the message names the line.
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
            if not text.rstrip().rpartition(" ")[0].strip():
                raise ConfigError(f"{path}:{number}: a passage needs at least two words, with a space before the last")
            passages.append(text)
    if not passages:
        raise ConfigError(f"{path}: no passages")
    return passages


def lambada_quality(
    model: LogitsModel, tokenizer: Any, passages: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> LambadaQuality:
    """Score each passage with one forward pass over it; the last word is what follows its last space.

    White space at a passage's end is left out. Of a passage longer than the model takes
    (:func:`~claq_export.evaluation.models.sequence_limit`) the end is read.

    Raises:
        ConfigError: a passage without a token before its last word, or without one in it; or a last word that is longer than
            what the model takes.
    """
    limit = sequence_limit(model)
    hits, losses = 0, []
    for number, passage in enumerate(passages):
        whole = passage.rstrip()
        # Spaces before the last word are its own, as the harness has it.
        given = tokenizer(whole.rpartition(" ")[0].rstrip(), add_special_tokens=False)["input_ids"]
        tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
        target = tokens[len(given) :]
        if not given or not target:
            raise ConfigError(f"the tokenizer finds no last word after other tokens in the passage {passage[:80]!r}")
        if limit is not None and len(target) > limit:
            raise ConfigError(
                f"the last word of the passage {passage[:80]!r} has {len(target)} tokens; the model takes {limit}"
            )
        likelihood, hit = continuation_likelihood(model, tokens[: len(given)], target, limit or len(tokens))
        hits += hit
        losses.append(-likelihood)
        if progress is not None:
            progress(number + 1, len(passages))
    return LambadaQuality(hits / len(passages), perplexity_of(sum(losses) / len(losses)), len(passages))
