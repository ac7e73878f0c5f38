"""Load ahead-of-time packages through the CUDA driver and compare them with the reference: what a C++ runtime will do.

    python -m claq_export.kernels.aot --targets sm_90 --out claq-kernels
    python benchmarks/gpu/packages.py claq-kernels

takes the cubins that fit this machine's GPU and the PTX for any, and runs a layer of every width with one and with twenty
vectors through them. Needs torch with CUDA (for memory and streams) but, past the first command, no Triton.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from run_all import layer_of  # noqa: E402

from claq_export.format.layer import QuantizedLinear  # noqa: E402
from claq_export.kernels.aot.package import read_package  # noqa: E402

MAX_DYNAMIC_SHARED = 8
WITHOUT_ATTRIBUTE = 48 << 10


class Driver:
    """Launches kernels of one package with the CUDA driver's C interface."""

    def __init__(self, package: Path) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.kernels = read_package(package)
        self.functions: dict[str, ctypes.c_void_p] = {}

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{what}: {text.value.decode() if text.value else status}")

    def function(self, name: str) -> ctypes.c_void_p:
        """The loaded function of a kernel."""
        if name not in self.functions:
            kernel, module, function = self.kernels[name], ctypes.c_void_p(), ctypes.c_void_p()
            self._check(self.cuda.cuModuleLoadData(ctypes.byref(module), kernel["image"]), f"load {name}")
            entry = kernel["entry"].encode()
            self._check(self.cuda.cuModuleGetFunction(ctypes.byref(function), module, entry), f"find {name}")
            if kernel["shared"] > WITHOUT_ATTRIBUTE:
                status = self.cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, kernel["shared"])
                self._check(status, f"shared memory of {name}")
            self.functions[name] = function
        return self.functions[name]

    def launch(self, name: str, grid: tuple[int, int, int], *arguments: torch.Tensor | int) -> None:
        """Launch on torch's current stream."""
        kernel = self.kernels[name]
        values: list[Any] = []
        for letter, argument in zip(kernel["parameters"], arguments, strict=True):
            pointer = isinstance(argument, torch.Tensor)
            assert pointer == (letter == "p"), f"{name}: {kernel['parameters']}"
            values.append(ctypes.c_void_p(argument.data_ptr()) if pointer else ctypes.c_int32(argument))
        values += [ctypes.c_void_p(0), ctypes.c_void_p(0)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (32 * kernel["num_warps"], 1, 1)
        status = self.cuda.cuLaunchKernel(self.function(name), *grid, *block, kernel["shared"], stream, pointers, None)
        self._check(status, f"launch {name}")


def linear(driver: Driver, layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x Wᵀ + b`` for float16 x of 1 to 4 or of more vectors."""
    M, K, N, P = x.shape[0], layer.in_features, layer.out_features, layer.stored_columns
    blocks = [count // 32 for count in layer.columns]
    present = [width for width, count in zip((4, 3, 2), blocks, strict=True) if count]
    mix = f"w{present[0]}_v1" if len(present) == 1 and N % 4 == 0 else f"w432_v{int(N % 4 == 0)}"
    order = {torch.uint16: "u16", torch.int32: "i32"}[layer.order.dtype]
    index = {torch.uint16: "u16", torch.int32: "i32"}[layer.outlier_index.dtype] if layer.outliers else "none"
    xf = torch.empty(P, M, device=x.device)
    y = torch.empty(M, N, device=x.device, dtype=torch.float16)
    gather = f"fp16_{order}_o{int(layer.outliers > 0)}"
    if M <= 4:
        xq = torch.empty(M, P, dtype=torch.int16, device=x.device)
        xs = torch.empty(M, P // 32, device=x.device)
        grid = (-(-P // 256), M, 1)
        driver.launch(f"quantize_{gather}", grid, x, layer.order, layer.scale, xq, xs, xf, M, K, P, *blocks[:2])
        name, activations, last = f"gemv_{mix}_r{M}", [xq, xs], []
    else:
        xh = torch.empty(M, P, dtype=torch.float16, device=x.device)
        xs = torch.empty(M, device=x.device)
        columns = 4096 if P <= 4096 else 16384 if P <= 16384 else 0
        driver.launch(
            f"scale_{gather}_c{columns}", (M, 1, 1), x, layer.order, layer.scale, xh, xs, xf, M, K, P, *blocks[:2]
        )
        name, activations, last = f"gemm_{mix}_m16", [xh], [M]
    features, vectors, step = driver.kernels[name]["tile"]
    splits = min(4, sum(-(-count // step) for count in blocks))
    part = torch.empty(splits, M, N, device=x.device)
    grid = (-(-N // features), splits, 1) if M <= 4 else (-(-N // features), -(-M // vectors), splits)
    driver.launch(name, grid, layer.codes, layer.codebook, *activations, part, *last, N, P, *blocks, splits)
    finish = f"finish_fp16_{index}_m{1 if M == 1 else 4 if M <= 4 else 16}"
    features, vectors, _ = driver.kernels[finish]["tile"]
    outliers = (layer.outlier_ptr, layer.outlier_index, layer.outlier_value)
    grid = (-(-N // features), -(-M // vectors), 1)
    driver.launch(finish, grid, part, xs, xf, layer.row_scale, *outliers, bias, y, M, N, splits)
    return y


def main() -> int:
    """Check every package that this GPU can run; the exit status is 1 when a result is wrong."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "claq-kernels")
    major, minor = torch.cuda.get_device_capability()
    wrong = 0
    for name in (f"claq_sm{major}{minor}.kernels", "claq_ptx80.kernels"):
        if not (folder / name).exists():
            print(f"{name}: not in {folder}")
            continue
        driver = Driver(folder / name)
        for widths in ((2,), (3,), (4,), (2, 3, 4)):
            for in_features, out_features, outliers in ((512, 320, 0.01), (300, 37, 0.0)):
                for vectors in (1, 3, 20):
                    layer = layer_of(in_features, out_features, widths, outliers)
                    x = torch.randn(vectors, in_features, dtype=torch.float16, device="cuda")
                    bias = torch.randn(out_features, dtype=torch.float16, device="cuda")
                    y = linear(driver, layer.to("cuda"), x, bias).double().cpu()
                    expected = x.double().cpu() @ layer.dequantize().double().T + bias.double().cpu()
                    error = float((y - expected).abs().max() / expected.abs().max())
                    wrong += error > 1e-3
                    print(f"{name} widths {widths}, {in_features} x {out_features}, M = {vectors}: {error:.1e}")
    print("all right" if not wrong else f"{wrong} WRONG")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
