"""Quantized layers inside PyTorch models: the modules, putting them in the place of others, loading a checkpoint."""

from .derived import dense_embedding, hollow_embedding
from .layers import ClaqEmbedding, ClaqLinear
from .loading import load, restore
from .replace import check_replaceable, keep_a_parameter, linear_kind, replace_linears

__all__ = [
    "ClaqEmbedding",
    "ClaqLinear",
    "check_replaceable",
    "dense_embedding",
    "hollow_embedding",
    "keep_a_parameter",
    "linear_kind",
    "load",
    "replace_linears",
    "restore",
]
