"""Emission: a PyTorch graph with ``claq::linear`` nodes becomes ``model.onnx`` that any ONNX Runtime can run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .artifact import Artifact

if TYPE_CHECKING:
    from .exporter import emit_onnx

__all__ = ["Artifact", "emit_onnx"]


def __getattr__(name: str) -> Any:
    # The libraries that make ONNX take 60 MB: not while the model is loaded, which is when an export is largest.
    if name == "emit_onnx":
        from .exporter import emit_onnx

        return emit_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
