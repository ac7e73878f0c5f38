"""``torch.compile(model, backend="claq")``: Dynamo's graphs on quantized weights, the rest through Inductor.

PyTorch finds :func:`claq` through the entry point ``torch_dynamo_backends``; nothing needs to be imported before.
"""

from __future__ import annotations

from .ahead import weights_in
from .checkpoint import requantize_compiled, save_compiled
from .compile import claq

__all__ = ["claq", "requantize_compiled", "save_compiled", "weights_in"]
