"""Quantized layers inside PyTorch models: the modules, putting them in the place of others, loading a checkpoint."""

from .layers import ClaqEmbedding, ClaqLinear
from .loading import load, restore
from .replace import check_replaceable, linear_kind, replace_linears

__all__ = ["ClaqEmbedding", "ClaqLinear", "check_replaceable", "linear_kind", "load", "replace_linears", "restore"]
