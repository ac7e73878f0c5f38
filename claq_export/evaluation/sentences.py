"""Sentence-encoder quality: cosine of the embeddings to the original's, and rank correlation with human similarity
scores (STS)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from .models import EncoderModel


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


def embed(
    model: EncoderModel, tokenizer: Any, sentences: Sequence[str], batch_size: int = 32, max_length: int = 256
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
        ConfigError: missing, or no pair in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"similarity file {str(path)!r} does not exist")
    with path.open(encoding="utf-8", newline="") as lines:
        head = lines.readline()
        lines.seek(0)
        if head.count("\t") >= 6:
            fields = (line.rstrip("\r\n").split("\t") for line in lines)
            pairs = [SimilarityPair(f[5], f[6], _score(f[4], path)) for f in fields if len(f) >= 7]
        else:
            rows = csv.DictReader(lines)
            missing = {"sentence1", "sentence2", "score"} - set(rows.fieldnames or ())
            if missing:
                raise ConfigError(f"{path}: no column {sorted(missing)[0]!r} (and not the tab-separated form of STS-B)")
            pairs = [SimilarityPair(r["sentence1"], r["sentence2"], _score(r["score"], path)) for r in rows]
    if not pairs:
        raise ConfigError(f"{path}: no sentence pairs")
    return pairs


def _score(value: str, path: Path) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{path}: {value!r} is not a score") from error


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation, ties given their mean rank; nan where one side is constant."""
    x, y = _ranks(np.asarray(a, np.float64)), _ranks(np.asarray(b, np.float64))
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
) -> SentenceQuality:
    """Embed the sentences and those of the pairs, each once, and compare.

    Args:
        model, tokenizer: under evaluation.
        sentences: for the cosine to the reference.
        pairs: for the rank correlation (their sentences also count for the cosine).
        reference: the original model.
        batch_size: sentences a batch.

    Raises:
        ConfigError: nothing to embed, or nothing to compare with.
    """
    unique = list(dict.fromkeys([*sentences, *(s for p in pairs for s in (p.first, p.second))]))
    if not unique:
        raise ConfigError("no sentences to embed")
    if reference is None and not pairs:
        raise ConfigError("the cosine of embeddings needs a reference model")
    vectors = embed(model, tokenizer, unique, batch_size)
    quality: dict[str, float] = {}
    position = {sentence: i for i, sentence in enumerate(unique)}

    def correlation(of: torch.Tensor) -> float:
        cosines = [float(of[position[p.first]] @ of[position[p.second]]) for p in pairs]
        return 100 * spearman(cosines, [p.score for p in pairs])

    if pairs:
        quality["spearman"] = correlation(vectors)
    if reference is not None:
        original = embed(reference, tokenizer, unique, batch_size)
        cosine = (vectors * original).sum(-1)
        quality |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
        if pairs:
            quality["reference_spearman"] = correlation(original)
    return SentenceQuality(sentences=len(unique), **quality)
