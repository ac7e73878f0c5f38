"""Which cuBLAS libclaq's GPU layers use, by what the process has loaded; prints what was found as JSON.

A program of its own for each case: a library that was found stays loaded. Arguments: the case, the built libclaq, the folder
of the stand-ins. Launches are noted, not computed.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from emulated import Interpreter, open_libclaq
from quantized_layers import random_layer

from claq_export.kernels.native import DTYPES, describe_layer

ROWS, K, N = 130, 512, 1024
"""A product for which decoding the weight takes more memory than the kernels without cuBLAS do."""


class Recorder(Interpreter):
    def launch(self, name: bytes, *_: Any) -> None:
        self.launched.append(name.decode().split("_")[0])


class Layer:
    def __init__(self, library: ctypes.CDLL, gpu: Recorder) -> None:
        self.library, self.gpu = library, gpu
        layer = random_layer(K, N, (2,), seed=1)
        bias = torch.zeros(0, dtype=torch.float16)
        self.tensors = [*(tensor.contiguous() for tensor in layer.tensors().values()), bias]
        description = describe_layer(self.tensors, layer.columns, K, N)
        self.handle, error = ctypes.c_void_p(), ctypes.create_string_buffer(512)
        dtype = DTYPES[torch.float16]
        if library.claq_cuda_create(ctypes.byref(description), dtype, ctypes.byref(self.handle), error, len(error)):
            raise RuntimeError(error.value.decode())

    def workspace(self, has_cublas: bool) -> int:
        return self.library.claq_cuda_workspace(self.handle, ROWS, int(has_cublas))

    def run(self) -> str:
        """The kernels of a run with a handle."""
        self.gpu.launched = []
        x, y = torch.zeros(ROWS, K, dtype=torch.float16), torch.zeros(ROWS, N, dtype=torch.float16)
        workspace, error = torch.zeros(1 << 22, dtype=torch.uint8), ctypes.create_string_buffer(512)
        start = workspace.data_ptr() + -workspace.data_ptr() % 256
        if self.library.claq_cuda_run(
            self.handle, ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(ROWS), ctypes.c_void_p(y.data_ptr()),
            ctypes.c_void_p(start), ctypes.c_void_p(77), ctypes.c_void_p(99), error, len(error),
        ):  # fmt: skip
            raise RuntimeError(error.value.decode())
        return " ".join(dict.fromkeys(self.gpu.launched))


def several(load: Callable[[str], ctypes.CDLL], make: Callable[[], Layer]) -> dict[str, Any]:
    libraries = [load(f"libcublas.so.{version}") for version in (11, 12)]
    layer = make()
    sizes = [layer.workspace(has_cublas) for has_cublas in (False, True)]
    return {"sizes": sizes, "kernels": layer.run(), "calls": [library.fake_cublas_calls() for library in libraries]}


def provider(load: Callable[[str], ctypes.CDLL], make: Callable[[], Layer]) -> dict[str, Any]:
    other = load("libcublas.so.12")
    load("libonnxruntime_providers_cuda.so")
    own = load("libcublas.so.11")
    kernels = make().run()
    return {"kernels": kernels, "calls": [own.fake_cublas_calls(), other.fake_cublas_calls()]}


def later(load: Callable[[str], ctypes.CDLL], make: Callable[[], Layer]) -> dict[str, Any]:
    layer = make()
    without, reserved = layer.workspace(False), layer.workspace(True)
    load("libcublas.so.12")
    kernels, needed = layer.run(), layer.workspace(True)
    load("libcublas.so.11")
    # What the layer has found stays; another one would have to choose.
    stays = [layer.workspace(True), layer.run()]
    return {"sizes": [without, needed, reserved], "kernels": kernels, "stays": stays, "new": make().run()}


def main() -> None:
    case, path, built = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    folder = built / case
    folder.mkdir()
    os.environ["CLAQ_CUDA_KERNELS"] = str(folder)
    # One case is on a driver that has no numbers of contexts.
    gpu = Recorder(ctypes.CDLL(str(built / ("older/libcuda.so.1" if case == "several" else "libcuda.so.1"))))
    gpu.package(folder)
    library = open_libclaq(path)
    cases = {"several": several, "provider": provider, "later": later}
    print(json.dumps(cases[case](lambda name: ctypes.CDLL(str(built / name)), lambda: Layer(library, gpu))))


if __name__ == "__main__":
    main()
