"""The Hugging Face configuration beside an artifact, so that transformers loads the folder as a quantized model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import OutputError
from ..format.checkpoint import TENSORS_FILE, VERSION

CONFIG = "config.json"


def declare_quantized(folder: Path, true_bits: float, dtype: torch.dtype) -> Path | None:
    """Write into a folder's ``config.json`` how transformers finds and reads the quantized weights.

    Other readers of the file (ONNX tools, tokenizers) look at other keys and see the model they saw before.

    Args:
        folder: holds ``claq.safetensors`` and a copy of the model's ``config.json``; nothing is done without the latter.
        true_bits: a weight, over all quantized layers; for information.
        dtype: of the unquantized tensors.

    Returns:
        the file, or None.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["transformers_weights"] = TENSORS_FILE
    settings["quantization_config"] = {"quant_method": "claq", "version": VERSION, "true_bits": round(true_bits, 4)}
    try:
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
