"""Measures models: perplexity, KL divergence to the original, sentence similarity, LAMBADA, lm-evaluation-harness
tasks."""

from .lambada import LambadaQuality, lambada_quality, read_passages
from .language import LanguageQuality, language_quality, read_text, token_windows
from .models import (
    EncoderModel,
    LogitsModel,
    OnnxModel,
    TorchModel,
    open_model,
    open_tokenizer,
    runtime_library,
    sequence_limit,
)
from .sentences import SentenceQuality, SimilarityPair, embed, read_pairs, sentence_quality, spearman

__all__ = [
    "EncoderModel",
    "LambadaQuality",
    "LanguageQuality",
    "LogitsModel",
    "OnnxModel",
    "SentenceQuality",
    "SimilarityPair",
    "TorchModel",
    "embed",
    "lambada_quality",
    "language_quality",
    "open_model",
    "open_tokenizer",
    "read_pairs",
    "read_passages",
    "read_text",
    "runtime_library",
    "sentence_quality",
    "sequence_limit",
    "spearman",
    "token_windows",
]
