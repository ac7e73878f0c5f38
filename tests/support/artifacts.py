"""A captured model through the whole compiler and into ONNX Runtime, without the parts that cost tests their time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from claq_export import Config
from claq_export.calibration.progress import ProgressReporter
from claq_export.capture import CapturedModel
from claq_export.compiler import Compilation
from claq_export.verify import VerificationReport, verify_artifact


def quantized_artifact(
    captured: CapturedModel, out: Path, samples: Sequence[dict[str, torch.Tensor]], config: Config
) -> tuple[Compilation, VerificationReport]:
    """Quantize and emit ``captured`` as ``out``, and compare the file with the quantized graph on ``samples``.

    Raises:
        ClaqError: see :mod:`claq_export.errors`; a disagreement of more than the usual tolerance is one.
    """
    compilation = Compilation(captured, config, ProgressReporter(quiet=True))
    compilation.quantize()
    compilation.emit(out)
    return compilation, verify_artifact(out, captured.graph_module, list(samples), rounds=0)
