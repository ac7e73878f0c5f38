"""Emission: a PyTorch graph with ``claq::linear`` nodes becomes ``model.onnx`` that any ONNX Runtime can run."""

from __future__ import annotations

from .exporter import Artifact, emit_onnx

__all__ = ["Artifact", "emit_onnx"]
