"""Runs products of more rows than the grid of one launch has room for; prints what was launched and computed as JSON.

A program of its own, as ``emulated.py``, with its arguments. The kernels that take every row are too slow for the
interpreter: the bias is set here, and launches of the tensor-core path are noted.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from emulated import Interpreter, open_libclaq
from quantized_layers import dense_weight, random_layer

from claq_export.kernels.native import DTYPES, describe_layer

K, N = 32, 4
DTYPE = torch.float16
ITEM = 2
MOST_TILES = 65535
DENSE_ROWS = 4 * MOST_TILES + 9
TENS_ROWS = 16 * MOST_TILES + 9


class Slices(Interpreter):
    """Notes launches by kernel: grid, rows and where x or y begins."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        super().__init__(driver)
        self.noted: dict[str, list[tuple[tuple[int, ...], int, int]]] = {}

    def launch(self, name: bytes, grid: Any, threads: int, shared: int, stream: int, parameters: Any) -> None:
        variant = self.variants[name.decode()]
        if (kind := name.decode().split("_")[0]) == "dequantize":
            return super().launch(name, grid, threads, shared, stream, parameters)
        names = [argument for argument in variant.kernel.arg_names if argument in variant.signature]
        types = [
            ctypes.c_uint64 if variant.signature[argument].startswith("*") else ctypes.c_int32 for argument in names
        ]
        values = {
            argument: ctypes.cast(parameters[place], ctypes.POINTER(of))[0]
            for place, (argument, of) in enumerate(zip(names, types, strict=True))
        }
        address = values["y_ptr" if kind == "finish" else "part_ptr" if kind == "gemm" else "x_ptr"]
        self.noted.setdefault(kind, []).append((tuple(grid[i] for i in range(3)), values["M"], address))
        if kind == "finish" and values["splits"] == 0:
            assert grid[1] * variant.tile[1] >= values["M"]
            at(address, values["M"], N).copy_(at(values["bias_ptr"], 1, N))


def at(address: int, rows: int, columns: int) -> torch.Tensor:
    memory = (ctypes.c_char * (rows * columns * ITEM)).from_address(address)
    return torch.frombuffer(memory, dtype=DTYPE).view(rows, columns)


def product(
    library: ctypes.CDLL, gpu: Slices, x: torch.Tensor, cublas: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The computed product of float16 ``x [rows, K]`` with a layer, and the weight of the layer with its bias ``[N, K + 1]``."""
    layer = random_layer(K, N, (2,), seed=1)
    bias = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=DTYPE)
    tensors = [*(tensor.contiguous() for tensor in layer.tensors().values()), bias]
    description = describe_layer(tensors, layer.columns, K, N)
    handle, error = ctypes.c_void_p(), ctypes.create_string_buffer(512)
    if library.claq_cuda_create(ctypes.byref(description), DTYPES[DTYPE], ctypes.byref(handle), error, len(error)):
        raise RuntimeError(error.value.decode())
    y = torch.zeros(len(x), N, dtype=DTYPE)
    size = library.claq_cuda_workspace(handle, len(x), int(cublas is not None))
    workspace = torch.empty(size + 256, dtype=torch.uint8)
    gpu.noted, gpu.failure = {}, None
    status = library.claq_cuda_run(
        handle, ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), ctypes.c_void_p(y.data_ptr()),
        ctypes.c_void_p(workspace.data_ptr() + -workspace.data_ptr() % 256), ctypes.c_void_p(77), ctypes.c_void_p(cublas),
        error, len(error),
    )  # fmt: skip
    if gpu.failure:
        raise gpu.failure
    if status:
        raise RuntimeError(error.value.decode())
    library.claq_cuda_destroy(handle)
    return y, torch.cat([dense_weight(layer), bias.double()[:, None]], 1)


def noted(gpu: Slices, kind: str, start: torch.Tensor) -> dict[str, Any]:
    """Rows of each launch, and the row of ``start`` at which each begins."""
    width = start.shape[1] * ITEM
    launches = gpu.noted[kind]
    return {
        "rows": [rows for _, rows, _ in launches],
        "begin": [(address - start.data_ptr()) / width for *_, address in launches],
    }


def main() -> None:
    case, path, built = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    folder = built / case
    folder.mkdir()
    os.environ["CLAQ_CUDA_KERNELS"] = str(folder)
    gpu = Slices(ctypes.CDLL(str(built / "libcuda.so.1")))
    gpu.package(folder)
    library = open_libclaq(path)
    if case == "dense":
        ctypes.CDLL(str(built / "libcublas.so.12"))
        x = torch.randn(DENSE_ROWS, K, generator=torch.Generator().manual_seed(0)).to(DTYPE)
        y, weight = product(library, gpu, x, 99)
        expected = torch.addmm(weight[:, -1], x.double(), weight[:, :-1].T)
        error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
        found = {"total": DENSE_ROWS, "error": error, "finish": noted(gpu, "finish", y)}
    else:
        x = torch.zeros(TENS_ROWS, K, dtype=DTYPE)
        y, _ = product(library, gpu, x, None)
        found = {"total": TENS_ROWS, "finish": noted(gpu, "finish", y), "scale": noted(gpu, "scale", x)}
        found["gemm rows"] = [rows for _, rows, _ in gpu.noted["gemm"]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
