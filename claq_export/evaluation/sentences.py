"""Sentence-encoder quality: cosine of the embeddings to the original's, and rank correlation with human similarity
scores (STS)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from .models import EncoderModel, sequence_limit

_LONGEST = 256
"""Tokens of a sentence that are read."""

SENTENCES_AT_ONCE = 16
"""A batch where nothing depends on its size."""

_COLUMNS = ("sentence1", "sentence2", "score")


@dataclass(frozen=True)
class SimilarityPair:
    """Two sentences and what people said of them (STS-B: 0 unrelated to 5 same meaning)."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class SentenceQuality:
    """Quality of embeddings.

    Attributes:
        sentences: how many different sentences were embedded.
        cosine_mean, cosine_min: cosine of each embedding to the original model's; None without a reference.
        spearman: rank correlation of cosine similarity with the human scores, times 100 as papers print it; None
            without scores.
        reference_spearman: the same for the original model.
    """

    sentences: int
    cosine_mean: float | None = None
    cosine_min: float | None = None
    spearman: float | None = None
    reference_spearman: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def padded_batches(tokenizer: Any, sentences: Sequence[str], limit: int | None) -> Iterator[Any]:
    """Tokens and mask of sentences, a few at a time, as the tokenizer gives them.

    Args:
        tokenizer: of transformers.
        sentences: in the order of the batches.
        limit: most tokens that the model takes, None: any number; of a sentence the first 256 are read at most.

    Raises:
        ConfigError: there are no sentences.
    """
    if not sentences:
        raise ConfigError("no sentences to measure")
    longest = min(_LONGEST, limit or _LONGEST)
    for start in range(0, len(sentences), SENTENCES_AT_ONCE):
        texts = list(sentences[start : start + SENTENCES_AT_ONCE])
        yield tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")


def embed(
    model: EncoderModel, tokenizer: Any, sentences: Sequence[str], batch_size: int = 32, max_length: int = _LONGEST
) -> torch.Tensor:
    """Mean-pooled (over real tokens), normalised sentence embeddings: float32 ``[len(sentences), D]``.

    Sentences are sorted by length so that a batch holds little padding; the result is in the given order.
    """
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows: list[torch.Tensor | None] = [None] * len(sentences)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        encoded = tokenizer(
            [sentences[i] for i in members], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        mask = encoded["attention_mask"]
        hidden = model.hidden(encoded["input_ids"], mask)
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        for i, row in zip(members, torch.nn.functional.normalize(pooled, dim=-1), strict=True):
            rows[i] = row
    return torch.stack([row for row in rows if row is not None])


def read_pairs(path: str | Path) -> list[SimilarityPair]:
    """Scored sentence pairs from a file.

    Either STS-B's own form (tab-separated, no quotes, score and sentences in columns 5 to 7), or a CSV file whose
    header names ``sentence1``, ``sentence2`` and ``score``.

    Raises:
        ConfigError: missing, not UTF-8, malformed, or no pair in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"similarity file {str(path)!r} does not exist")
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            head = lines.readline()
            lines.seek(0)
            pairs = list(_tabbed_pairs(lines, path) if head.count("\t") >= 6 else _csv_pairs(lines, path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"similarity file {str(path)!r} is not UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"similarity file {str(path)!r} cannot be read: {error.strerror or error}") from error
    except csv.Error as error:
        raise ConfigError(f"{path} is not a CSV file: {error}") from error
    if not pairs:
        raise ConfigError(f"{path}: no sentence pairs")
    return pairs


def _tabbed_pairs(lines: Iterable[str], path: Path) -> Iterator[SimilarityPair]:
    for line in lines:
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) >= 7:
            yield SimilarityPair(fields[5], fields[6], _score(fields[4], path))


def _csv_pairs(lines: Iterable[str], path: Path) -> Iterator[SimilarityPair]:
    rows = csv.DictReader(lines)
    missing = set(_COLUMNS) - set(rows.fieldnames or ())
    if missing:
        raise ConfigError(f"{path}: no column {sorted(missing)[0]!r} (and not the tab-separated form of STS-B)")
    for row in rows:
        first, second, score = (row[name] for name in _COLUMNS)
        if first is None or second is None or score is None:
            raise ConfigError(f"{path}:{rows.line_num}: a row of fewer fields than the header has")
        yield SimilarityPair(first, second, _score(score, path))


def _score(value: str, path: Path) -> float:
    try:
        score = float(value)
    except ValueError as error:
        raise ConfigError(f"{path}: {value!r} is not a score") from error
    if not math.isfinite(score):
        raise ConfigError(f"{path}: {value!r} is not a score")
    return score


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation, ties given their mean rank; nan where one side is constant or holds what is no number."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")  # sorting would rank NaN as the largest
    x, y = _ranks(first), _ranks(second)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def sentence_quality(
    model: EncoderModel,
    tokenizer: Any,
    *,
    sentences: Sequence[str] = (),
    pairs: Sequence[SimilarityPair] = (),
    reference: EncoderModel | None = None,
    batch_size: int = 32,
    max_length: int = _LONGEST,
) -> SentenceQuality:
    """Embed the sentences and those of the pairs, each once, and compare.

    Args:
        model, tokenizer: under evaluation.
        sentences: for the cosine to the reference.
        pairs: for the rank correlation (their sentences also count for the cosine).
        reference: the original model.
        batch_size: sentences a batch.
        max_length: tokens of a sentence; the rest is left out. Fewer where a model states that it takes fewer
            (:func:`~claq_export.evaluation.models.sequence_limit`).

    Raises:
        ConfigError: nothing to embed, nothing to compare with, or embeddings of another size than the reference's.
    """
    unique = list(dict.fromkeys([*sentences, *(s for p in pairs for s in (p.first, p.second))]))
    if not unique:
        raise ConfigError("no sentences to embed")
    if reference is None and not pairs:
        raise ConfigError("the cosine of embeddings needs a reference model")
    max_length = min(max_length, sequence_limit(model, reference) or max_length)
    vectors = embed(model, tokenizer, unique, batch_size, max_length)
    quality: dict[str, float] = {}
    position = {sentence: i for i, sentence in enumerate(unique)}

    def correlation(of: torch.Tensor) -> float:
        cosines = [float(of[position[p.first]] @ of[position[p.second]]) for p in pairs]
        return 100 * spearman(cosines, [p.score for p in pairs])

    if pairs:
        quality["spearman"] = correlation(vectors)
    if reference is not None:
        original = embed(reference, tokenizer, unique, batch_size, max_length)
        if original.shape != vectors.shape:
            raise ConfigError(
                f"embeddings have {vectors.shape[1]} values, those of the reference {original.shape[1]}; is it the original?"
            )
        cosine = (vectors * original).sum(-1)
        quality |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
        if pairs:
            quality["reference_spearman"] = correlation(original)
    return SentenceQuality(sentences=len(unique), **quality)
