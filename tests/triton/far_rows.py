"""Runs a Triton kernel in the interpreter on matrices whose rows begin beyond 2**31 elements; prints whether it is right.

The matrices are address space: only the pages that a kernel touches become memory. Grids are as small as the rows and columns
that are looked at. A program of its own for each case: an address that wraps may end the process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys

import torch
from quantized_layers import random_layer

from claq_export.kernels.triton.activations import claq_quantize_activations, claq_scale_activations
from claq_export.kernels.triton.epilogue import claq_finish
from claq_export.kernels.triton.gemm import claq_gemm

FAR = 1 << 30
"""Elements of a row: the third row begins where 32 bits end."""

NO_RESERVE = 0x4000


class Matrix:
    """Zeros ``[rows, columns]`` of which nothing is in memory yet."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.columns, self.dtype = columns, dtype
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        self.memory = mmap.mmap(-1, rows * columns * dtype.itemsize, flags=flags)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def at(self, row: int, count: int) -> torch.Tensor:
        """The first values of a row."""
        offset = row * self.columns * self.dtype.itemsize
        return torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=offset)

    @property
    def start(self) -> torch.Tensor:
        """What a kernel gets: the interpreter takes no more of a tensor than its address."""
        return self.at(0, 1)


def finish(residual: bool) -> bool:
    """Partial sums and y of three rows."""
    parts = 2 if residual else 1
    part, y = Matrix(3 * parts, FAR, torch.float32), Matrix(3, FAR, torch.float16)
    values = torch.arange(64.0)
    for row in range(parts):
        part.at(2 * parts + row, 64).copy_(values)
    scale, bias = torch.full((64,), 0.5).half(), torch.ones(64).half()
    nothing = torch.zeros(1, dtype=torch.int32)
    claq_finish[(1, 1)](
        part.start, part.start, part.start, scale, nothing, nothing, scale, bias, y.start, 3, FAR, 1,
        SCALED=0, RESIDUAL=int(residual), HAS_OUTLIERS=0, HAS_BIAS=1, FEATURES=64, VECTORS=4, ENTRIES=4, SPLITS=4,
    )  # fmt: skip
    return torch.equal(y.at(2, 64).float(), parts * values * 0.5 + 1)


def finish_outliers() -> bool:
    """An outlier in column 63 of activations ``[64, M]``."""
    M = 1 << 26
    activations, y = Matrix(64, M, torch.float32), Matrix(16, 16, torch.float32)
    values = torch.arange(16.0)
    activations.at(63, 16).copy_(values)
    ones = torch.ones(16).half()
    pointers, columns = torch.arange(17, dtype=torch.int32), torch.full((16,), 63, dtype=torch.uint16)
    claq_finish[(1, 1)](
        y.start, y.start, activations.start, ones, pointers, columns, 2 * ones, ones, y.start, M, 16, 0,
        SCALED=0, RESIDUAL=0, HAS_OUTLIERS=1, HAS_BIAS=0, FEATURES=16, VECTORS=16, ENTRIES=1, SPLITS=1,
    )  # fmt: skip
    return all(torch.equal(y.at(m, 16), torch.full((16,), 2.0 * m)) for m in range(16))


def scale_activations(whole: bool) -> bool:
    """x and the activations made of it, three rows; for the outliers, columns of many vectors."""
    M, P = 1 << 26, FAR if whole else 64
    x, activations = Matrix(3, FAR, torch.float16), Matrix(3, P, torch.float16)
    gathered = Matrix(64, M, torch.float32)
    values = torch.randn(64).half()
    x.at(2, 64).copy_(values)
    scales = torch.zeros(3)
    claq_scale_activations[(3,)](
        x.start, torch.zeros(1, dtype=torch.uint16), torch.ones(64).half(), activations.start, scales, gathered.start,
        M, FAR, P, 0, 0, HAS_ORDER=0, HAS_OUTLIERS=1, COLUMNS=64, WHOLE=int(whole),
    )  # fmt: skip
    # Slots of two bits are columns 0, 2, 1, 3 of each four.
    found = activations.at(2, 64).float().reshape(-1, 2, 2).transpose(1, 2).reshape(-1) * scales[2]
    columns = torch.stack([gathered.at(p, 3)[2] for p in range(64)])
    return torch.allclose(found, values.float(), rtol=1e-3, atol=1e-3) and torch.equal(columns, values.float())


def quantize_activations() -> bool:
    """Three rows of x."""
    x, values = Matrix(3, FAR, torch.float16), torch.randn(256).half()
    x.at(2, 256).copy_(values)
    quantized, scales, gathered = torch.zeros(3, 256, dtype=torch.int16), torch.zeros(3, 8), torch.zeros(256, 3)
    claq_quantize_activations[(1, 3)](
        x.start, torch.zeros(1, dtype=torch.uint16), torch.ones(256).half(), quantized, scales, gathered,
        3, FAR, 256, 0, 0, HAS_ORDER=0, HAS_OUTLIERS=1, RESIDUAL=0, BLOCKS=8,
    )  # fmt: skip
    return torch.equal(gathered[:, 2], values.float()) and bool(quantized[2].any())


def gemm() -> bool:
    """Activations and partial sums of the third tile of eight rows; the first of many splits, which has 64 columns."""
    layer, row, size = random_layer(64, 64, (2,), seed=1), torch.randn(64).half(), FAR // 8
    words, codebook = layer.codes.view(torch.int32), layer.codebook.contiguous().view(torch.int32)
    constants = {"WIDTHS": 2, "VECTOR": 1, "LANES": 16, "VECTORS": 8, "BLOCKS": 2, "STAGES": 1}
    near = torch.zeros(1, 64)
    claq_gemm[(1, 1, 1)](
        words.contiguous().view(torch.int64), codebook, row, near, 1, 64, 64, 0, 0, 2, 1, **constants
    )  # fmt: skip
    codes = Matrix(len(words), size, torch.int32)
    for i, line in enumerate(words):
        codes.at(i, 64).copy_(line)
    x, part = Matrix(17, size, torch.float16), Matrix(17, size, torch.float32)
    x.at(16, 64).copy_(row)
    blocks = size // 32
    wide = codes.at(0, 2).view(torch.int64)
    claq_gemm[(1, 3, 1)](
        wide, codebook, x.start, part.start, 17, size, size, 0, 0, blocks, blocks // 2, **constants
    )  # fmt: skip
    return bool(near.any()) and torch.equal(part.at(16, 64), near[0])


CASES = {
    "finish": lambda: finish(residual=False),
    "finish of float32": lambda: finish(residual=True),
    "finish with outliers": finish_outliers,
    "scale": lambda: scale_activations(whole=False),
    "scale at once": lambda: scale_activations(whole=True),
    "quantize": quantize_activations,
    "gemm": gemm,
}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]]()))
