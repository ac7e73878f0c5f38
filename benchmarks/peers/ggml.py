"""GGUF's K-quants, by llama.cpp's own code (``ggml_quantize_chunk`` of libggml, decoded by the package gguf).

libggml comes with llama-cpp-python or pywhispercpp, or its path is given. K-quants need rows of a multiple of 256
weights; llama.cpp falls back to other types where that does not hold (576 in SmolLM2-135M). Here four rows run together
as one, so that the type itself is measured. With an importance matrix (mean squared activation), as ``llama-quantize
--imatrix`` does.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import torch

from .common import Quantized

TOGETHER = 4
TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12}


def find_library(given: str | None = None) -> Path | None:
    """libggml-base: the given path, or that of an installed llama-cpp-python or pywhispercpp."""
    if given:
        return Path(given)
    for package, pattern in (
        ("llama_cpp", "lib/libggml-base*.so*"),
        ("pywhispercpp", "../pywhispercpp.libs/libggml-base*.so*"),
    ):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found = sorted(Path(folder).glob(pattern))
            if found:
                return found[0]
    return None


def k_quant(weight: torch.Tensor, importance: torch.Tensor | None, kind: str, library: Path) -> Quantized:
    """Quantize ``weight [N, K]`` as type ``kind``; ``importance``: mean squared input ``[K]``."""
    from gguf import GGMLQuantizationType, dequantize

    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_row_size.restype = ctypes.c_size_t
    N, K = weight.shape
    if N % TOGETHER or (TOGETHER * K) % 256:
        raise ValueError(f"a weight of {N} x {K} does not divide into blocks of 256")
    rows, width = N // TOGETHER, TOGETHER * K
    source = np.ascontiguousarray(weight.numpy(), np.float32)
    size = ggml.ggml_row_size(ctypes.c_int(TYPES[kind]), ctypes.c_int64(width))
    target = np.zeros(rows * size, np.uint8)
    matrix = (
        None if importance is None else np.ascontiguousarray(np.tile(importance.numpy().astype(np.float32), TOGETHER))
    )
    written = ggml.ggml_quantize_chunk(
        ctypes.c_int(TYPES[kind]),
        source.ctypes.data_as(ctypes.c_void_p),
        target.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        None if matrix is None else matrix.ctypes.data_as(ctypes.c_void_p),
    )
    if written != target.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes, expected {target.nbytes}")
    decoded = dequantize(target.reshape(rows, size), GGMLQuantizationType[kind])
    return Quantized(torch.from_numpy(decoded.reshape(N, K).copy()), 8.0 * target.nbytes)
