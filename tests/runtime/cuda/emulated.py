"""Runs libclaq's GPU layers on a fake driver whose launches go to Triton's interpreter; prints each case's error as JSON.

A program of its own: the interpreter and the fake driver are for a whole process. Arguments: the built libclaq, and the
folder of the stand-ins (``count_reads.so`` of which is preloaded), which gets the packages of kernels.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from quantized_layers import dense_weight, random_layer

from claq_export.kernels import decoder_ops
from claq_export.kernels.aot.compile import CompiledKernel
from claq_export.kernels.aot.package import write_package
from claq_export.kernels.aot.variants import Variant, variants
from claq_export.kernels.native import DTYPES, describe_layer

POINTERS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u16": torch.uint16,
}
TARGET = 80
HEADS = (4, 2)
ROTARY_DIM = 4
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)

# name, K, N, widths, rows, dtype, outliers, with order, bias, cuBLAS, kernels that must run
CASES: list[tuple[Any, ...]] = [
    ("few", 200, 104, (2,), 1, torch.float16, 0.0, False, True, False, "quantize gemv finish"),
    ("few-outliers", 200, 104, (3,), 3, torch.bfloat16, 0.03, False, True, False, "quantize gemv finish"),
    ("few-mixed", 333, 136, (2, 3, 4), 4, torch.float16, 0.03, True, False, True, "quantize gemv finish"),
    ("few-float32", 96, 40, (4,), 2, torch.float32, 0.05, False, True, True, "quantize gemv finish"),
    ("few-odd", 70, 37, (2, 4), 2, torch.float16, 0.05, True, True, False, "quantize gemv finish"),
    ("slices-float32", 96, 37, (3, 4), 7, torch.float32, 0.03, True, True, False, "quantize gemv finish"),
    ("tens", 200, 104, (4,), 7, torch.float16, 0.0, False, False, False, "scale gemm finish"),
    ("tens-mixed", 130, 70, (2, 3, 4), 20, torch.bfloat16, 0.02, True, True, True, "scale gemm finish"),
    ("many-without-cublas", 64, 36, (2,), 130, torch.float16, 0.02, False, True, False, "scale gemm finish"),
    ("dense", 96, 72, (3,), 130, torch.float16, 0.0, False, True, True, "finish dequantize"),
    ("dense-mixed", 130, 44, (2, 3, 4), 131, torch.bfloat16, 0.02, True, False, True, "finish dequantize outliers"),
    ("dense-float32", 70, 64, (4, 2), 9, torch.float32, 0.03, True, True, True, "finish dequantize outliers"),
]
# What would be a product by cuBLAS: with it less memory is needed than without.
HANDLE_WITHOUT_CUBLAS = ("no-cublas", 64, 36, (2,), 130, torch.float16, 0.02, False, True, True, "scale gemm finish")


# name, K, N, widths, ids, dtype, type of the ids, outliers, a full row of them
LOOKUPS: list[tuple[Any, ...]] = [
    ("gather", 200, 104, (2,), 9, torch.float16, torch.int64, 0.0, False),
    ("gather-outliers", 65, 37, (3,), 5, torch.float32, torch.int32, 0.1, False),
    ("gather-mixed", 333, 136, (2, 3, 4), 6, torch.bfloat16, torch.int64, 0.03, True),
    ("gather-many-columns", 1100, 9, (4, 2), 3, torch.float16, torch.int32, 0.02, True),
    # More than 65536 stored columns and fewer features: `order` has 16 bits, `outlier_index` 32.
    ("gather-two-index-types", 65535, 5, (4, 2), 3, torch.float16, torch.int32, 0.0003, False),
]


# kernel, field of its record, where that is, a value with which nothing can be launched
LAUNCHES: list[tuple[str, str, int, int]] = [
    ("gemv_w432_v1_r1", "tile[0]", 152, 0),
    ("gemv_w432_v1_r1", "tile[2]", 160, 0),
    ("gemv_w432_v1_r1", "most_vectors", 216, 1),
    ("gemm_w432_v1_m16", "tile[1]", 156, 0),
    ("gemm_w432_v1_m16", "most_vectors", 216, 0),
    ("quantize_fp16_u16_o1", "tile[2]", 160, 0),
    ("finish_fp16_u16_m4", "tile[1]", 156, 0),
    ("dequantize_w4_fp16_u16", "tile[0]", 152, 0),
    ("outliers_fp16_u16", "tile[0]", 152, 0),
    ("gather_fp16_u16_i64", "tile[2]", 160, 0),
    ("swiglu_fp16", "tile[0]", 152, 0),
]


def at_address(address: int, kind: str) -> torch.Tensor:
    """A tensor on memory that somebody else owns; the interpreter takes no more of it than the address."""
    dtype = POINTERS[kind.removeprefix("*")]
    if not address:
        return torch.empty(1, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def open_libclaq(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.claq_cuda_workspace.restype = ctypes.c_size_t
    library.claq_cuda_workspace.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.claq_cuda_destroy.argtypes = [ctypes.c_void_p]
    return library


class Interpreter:
    """Runs what the fake driver is asked to launch."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver
        # ctypes keeps no reference to what C is given.
        self._callback = CALLBACK(self.launch)
        driver.fake_on_launch(self._callback)
        self.variants: dict[str, Variant] = {variant.name: variant for variant in variants(TARGET)}
        self.launched: list[str] = []
        self.failure: BaseException | None = None

    def package(self, folder: Path) -> None:
        """Write a package whose images are names."""
        kernels = []
        for variant in self.variants.values():
            names = variant.kernel.arg_names
            parameters = tuple((name, variant.signature[name]) for name in names if name in variant.signature)
            image = b"\x7fELF" + variant.name.encode() + b"\0"
            kernels.append(
                CompiledKernel(
                    variant.name, TARGET, variant.kernel.__name__, variant.num_warps, 0, parameters, variant.tile,
                    variant.weights, variant.most_vectors, variant.programs, image, "",
                )
            )  # fmt: skip
        write_package(kernels, folder / f"claq_sm{TARGET}.kernels")

    def launch(self, name: bytes, grid: Any, threads: int, _shared: int, stream: int, parameters: Any) -> None:
        try:
            variant = self.variants[name.decode()]
            self.launched.append(variant.name.split("_")[0])
            assert threads == 32 * variant.num_warps
            assert stream == 77
            arguments: dict[str, Any] = dict(variant.constants)
            place = 0
            for argument in variant.kernel.arg_names:
                kind = variant.signature.get(argument)
                if kind is None:
                    continue
                if kind.startswith("*"):
                    address = ctypes.cast(parameters[place], ctypes.POINTER(ctypes.c_uint64))[0]
                    assert address % 16 == 0 or argument in variant.unaligned, (
                        f"{variant.name}: {argument} is not aligned"
                    )
                    arguments[argument] = at_address(address, kind)
                else:
                    arguments[argument] = ctypes.cast(parameters[place], ctypes.POINTER(ctypes.c_int32))[0]
                    assert argument not in variant.multiples or arguments[argument] % 16 == 0
                place += 1
            for scratch in (0, 1):
                assert ctypes.cast(parameters[place + scratch], ctypes.POINTER(ctypes.c_uint64))[0] == 0
            variant.kernel[tuple(grid[i] for i in range(3))](**arguments, num_warps=variant.num_warps)
        except BaseException as failure:  # nothing can be thrown through the C frames; the case raises it
            self.failure = self.failure or failure


def run(library: ctypes.CDLL, gpu: Interpreter, case: tuple[Any, ...]) -> dict[str, Any]:
    _, K, N, widths, rows, dtype, outliers, ordered, with_bias, with_blas, _ = case
    layer = random_layer(K, N, widths, outliers=outliers, seed=K + N + rows)
    generator = torch.Generator().manual_seed(rows)
    bias = torch.randn(N, generator=generator).to(dtype) if with_bias else torch.empty(0, dtype=dtype)
    tensors = {name: tensor.contiguous() for name, tensor in layer.tensors().items()} | {"bias": bias}
    assert (layer.order.numel() > 0) == ordered
    description = describe_layer(list(tensors.values()), layer.columns, K, N)
    error = ctypes.create_string_buffer(512)
    handle = ctypes.c_void_p()
    gpu.launched, gpu.failure = [], None
    if library.claq_cuda_create(ctypes.byref(description), DTYPES[dtype], ctypes.byref(handle), error, len(error)):
        raise RuntimeError(error.value.decode())
    x = torch.randn(rows, K, generator=generator).to(dtype)
    y = torch.full((rows + 1, N), 7.0, dtype=dtype)
    size = library.claq_cuda_workspace(handle, rows, int(with_blas))
    workspace = torch.zeros(size + 512, dtype=torch.uint8)
    start = -workspace.data_ptr() % 256
    cublas = ctypes.c_void_p(99) if with_blas else None
    waits = gpu.driver.fake_waits()
    if library.claq_cuda_run(
        handle, ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(rows), ctypes.c_void_p(y.data_ptr()),
        ctypes.c_void_p(workspace.data_ptr() + start), ctypes.c_void_p(77), cublas, error, len(error),
    ):  # fmt: skip
        raise RuntimeError(error.value.decode())
    waits = gpu.driver.fake_waits() - waits
    library.claq_cuda_destroy(handle)
    if gpu.failure:
        raise gpu.failure
    expected = x.double() @ dense_weight(layer).T + (bias.double() if with_bias else 0)
    return {
        "error": ((y[:rows].double() - expected).abs().max() / expected.abs().max()).item(),
        "kernels": " ".join(dict.fromkeys(gpu.launched)),
        "inside": bool((y[rows] == 7).all()) and bool((workspace[start + size :] == 0).all()),
        "waits": waits,
    }


def look_up(library: ctypes.CDLL, gpu: Interpreter, case: tuple[Any, ...]) -> dict[str, Any]:
    _, K, N, widths, count, dtype, index, outliers, full_row = case
    layer = random_layer(K, N, widths, outliers=outliers, full_row=full_row, seed=K + N)
    tensors = {**layer.tensors(), "bias": torch.empty(0, dtype=dtype)}
    description = describe_layer([t.contiguous() for t in tensors.values()], layer.columns, K, N)
    error, handle = ctypes.create_string_buffer(512), ctypes.c_void_p()
    if library.claq_cuda_create(ctypes.byref(description), DTYPES[dtype], ctypes.byref(handle), error, len(error)):
        raise RuntimeError(error.value.decode())
    gpu.launched, gpu.failure = [], None
    # Neither array begins at a multiple of 16 bytes.
    ids = torch.randint(-N, N, (count + 1,), generator=torch.Generator().manual_seed(K)).to(index)
    ids[1], ids[2] = N, -N - 1
    y = torch.full((count * K + 2,), 7.0, dtype=dtype)
    if library.claq_cuda_gather(
        handle, DTYPES[index], ctypes.c_void_p(ids[1:].data_ptr()), ctypes.c_int64(count),
        ctypes.c_void_p(y[1:].data_ptr()), ctypes.c_void_p(77), error, len(error),
    ):  # fmt: skip
        raise RuntimeError(error.value.decode())
    library.claq_cuda_destroy(handle)
    if gpu.failure:
        raise gpu.failure
    rows = y[1:-1].reshape(count, K)
    dense = layer.dequantize()
    if dtype == torch.bfloat16:  # the interpreter truncates
        dense = (dense.view(torch.int32) >> 16 << 16).view(torch.float32)
    return {
        "equal": torch.equal(rows[2:], dense.to(dtype)[ids[3:].long()]),
        "unknown_are_nan": bool(rows[:2].isnan().all()),
        "kernels": " ".join(dict.fromkeys(gpu.launched)),
        "inside": bool((y[[0, -1]] == 7).all()),
    }


class FakeTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


def fake_tensor(tensor: torch.Tensor) -> FakeTensor:
    shape = (ctypes.c_int64 * max(1, tensor.dim()))(*tensor.shape)
    return FakeTensor(tensor.data_ptr() or None, shape, tensor.dim(), DTYPES[tensor.dtype])


def run_node(
    ort: ctypes.CDLL,
    operator: str,
    layer: Any,
    first: torch.Tensor,
    last: Sequence[torch.Tensor],
    y: Sequence[torch.Tensor],
) -> str:
    """Run a node of the CUDA provider; returns the message of a failure, or nothing."""
    tensors = [first, *(tensor.contiguous() for tensor in layer.tensors().values()), *last]
    split = [part.shape[-1] for part in y] if len(y) == 3 else [0, 0, 0]
    sizes = (layer.in_features, layer.out_features, *layer.columns, *split, *HEADS, ROTARY_DIM)
    attributes = (ctypes.c_int64 * len(sizes))(*sizes)
    error = ctypes.create_string_buffer(512)
    status = ort.fake_ort_run(
        operator.encode(), attributes, len(tensors), (FakeTensor * len(tensors))(*map(fake_tensor, tensors)),
        (ctypes.c_void_p * len(y))(*(part.data_ptr() or None for part in y)),
        ctypes.c_void_p(77), None, error, ctypes.c_size_t(len(error)),
    )  # fmt: skip
    return error.value.decode() if status else ""


def fused(ort: ctypes.CDLL, gpu: Interpreter, dtype: torch.dtype) -> dict[str, Any]:
    """The operators that do more than multiply: messages, errors relative to the largest value, kernels."""
    torch.manual_seed(0)
    # Of float32 some results take more than one of their kernel's blocks.
    N, parts = (2080, [1400, 500, 180]) if dtype == torch.float32 else (44, [25, 12, 7])
    layer = random_layer(33, N, (4,), outliers=0.03, seed=6)
    x, bias = torch.randn(2, 1, 33).to(dtype), torch.randn(N).to(dtype)
    product = x.double() @ dense_weight(layer).T + bias.double()
    residual, weight = torch.randn(2, 1, N).to(dtype), torch.rand(N).to(dtype)
    total = product + residual.double()
    normalized = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    gate, up = product.chunk(2, -1)
    cos, sin = torch.randn(2, 1, 2).to(dtype), torch.randn(2, 1, 2).to(dtype)
    query, key, value = product.split([1200, 800, 80] if N > 44 else [20, 12, 12], -1)
    cases = {
        "ClaqMatMulAdd": ([bias, residual], [total]),
        "ClaqMatMulAddNorm": ([bias, residual, weight], [total, normalized]),
        "ClaqMatMulSwiGLU": ([bias], [torch.nn.functional.silu(gate) * up]),
        "ClaqMatMulRotary": (
            [bias, cos, sin],
            [decoder_ops.rotary(part, cos.double(), sin.double(), heads) for part, heads in ((query, 4), (key, 2))]
            + [value],
        ),
        "ClaqMatMulSplit": ([bias], list(product.split(parts, -1))),
        "ClaqMatMulSplit of two": ([bias], list(product.split([parts[0], N - parts[0], 0], -1))),
    }
    found = {}
    for name, (last, expected) in cases.items():
        gpu.launched, gpu.failure = [], None
        y = [torch.zeros_like(part, dtype=dtype) for part in expected]
        message = run_node(ort, name.split()[0], layer, x, last, y)
        if gpu.failure:
            raise gpu.failure
        wanted = torch.cat(expected, -1)
        error = ((torch.cat(y, -1).double() - wanted).abs().max() / wanted.abs().max()).item()
        found[name] = {"message": message, "error": error, "kernels": " ".join(dict.fromkeys(gpu.launched))}
    found["odd message"] = run_node(ort, "ClaqMatMulSwiGLU", random_layer(33, 5, (4,), seed=1), x, [bias[:5]], [x])
    wide = torch.randn(2, 1, 3).to(dtype)
    turned = [torch.zeros_like(part, dtype=dtype) for part in (query, key, value)]
    found["wide message"] = run_node(ort, "ClaqMatMulRotary", layer, x, [bias, wide, wide], turned)
    found["short message"] = run_node(ort, "ClaqMatMulSplit", layer, x, [bias], [y[0], y[2], y[2]])
    return found


def nodes(library: ctypes.CDLL, ort: ctypes.CDLL, gpu: Interpreter) -> dict[str, Any]:
    """The operators of the CUDA provider, made, run and destroyed as ONNX Runtime does it."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"operators": ort.fake_ort_register(library.RegisterCustomOps)}
    layer = random_layer(70, 40, (4, 2), outliers=0.03, seed=5)
    gpu.launched, gpu.failure = [], None
    x, y = torch.randn(2, 3, 70, dtype=torch.float32), torch.zeros(2, 3, 40)
    found["ClaqMatMul message"] = run_node(ort, "ClaqMatMul", layer, x, [torch.zeros(0)], [y])
    expected = x.double() @ dense_weight(layer).T
    found["ClaqMatMul error"] = ((y - expected).abs().max() / expected.abs().max()).item()
    ids, rows = torch.tensor([[3, -1], [39, 0]], dtype=torch.int32), torch.zeros(2, 2, 70, dtype=torch.float16)
    found["ClaqGather message"] = run_node(ort, "ClaqGather", layer, ids, [torch.zeros(0, dtype=torch.float16)], [rows])
    found["ClaqGather equal"] = torch.equal(rows, layer.dequantize(torch.float16)[ids.long()])
    found["kernels"] = " ".join(dict.fromkeys(gpu.launched))
    damaged = dataclasses.replace(layer, order=torch.full_like(layer.order.int(), 99).to(layer.order.dtype))
    for operator, first, last in (("ClaqMatMul", x, torch.zeros(0)), ("ClaqGather", ids, torch.zeros(0))):
        found[f"damaged {operator}"] = run_node(ort, operator, damaged, first, [last], [y])
    if gpu.failure:
        raise gpu.failure
    found["fused"] = {str(dtype).removeprefix("torch."): fused(ort, gpu, dtype) for dtype in ACTIVATIONS}
    return found


def two_hosts(library: ctypes.CDLL, first: ctypes.CDLL, second: ctypes.CDLL) -> dict[str, Any]:
    """A node of a second ONNX Runtime in the process, after the first has registered the operators."""
    layer, x, y = random_layer(70, 40, (4, 2), seed=5), torch.randn(1, 70), torch.zeros(1, 40)
    operators, before = second.fake_ort_register(library.RegisterCustomOps), first.fake_ort_calls()
    message = run_node(second, "ClaqMatMul", layer, x, [torch.zeros(0)], [y])
    return {
        "operators": operators,
        "message": message,
        "calls": [first.fake_ort_calls() - before, second.fake_ort_calls()],
    }


def reads_of_packages(library: ctypes.CDLL, reads: ctypes.CDLL, operators: Path, package: Path) -> dict[str, int]:
    """How often the package is read from disk, by what happens; every folder is a package of its own."""
    import onnxruntime

    def in_folder(name: str) -> None:
        folder = package.parent / name
        folder.mkdir()
        (folder / package.name).write_bytes(package.read_bytes())
        os.environ["CLAQ_CUDA_KERNELS"] = str(folder)
        reads.counted_reads()

    def usable(_: int) -> int:
        text = ctypes.create_string_buffer(512)
        return library.claq_cuda_usable(text, len(text))

    found = {}
    in_folder("many sessions")
    for _ in range(4):
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(operators))
        usable(0)
    found["many sessions"] = reads.counted_reads()
    in_folder("many threads")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(usable, range(64))) == [0] * 64
    found["many threads"] = reads.counted_reads()
    return found


def small_layer() -> dict[str, torch.Tensor]:
    """Tensors of a layer of 64 inputs and 32 outputs."""
    layer = random_layer(64, 32, (4, 2), outliers=0.05)
    tensors = {name: tensor.contiguous() for name, tensor in layer.tensors().items()}
    return {**tensors, "bias": torch.zeros(32, dtype=torch.float16)}


def create_small(library: ctypes.CDLL, tensors: dict[str, torch.Tensor]) -> tuple[int, str, ctypes.c_void_p]:
    """Status, message and handle of :func:`small_layer`'s layer."""
    description = describe_layer(list(tensors.values()), random_layer(64, 32, (4, 2), outliers=0.05).columns, 64, 32)
    error, handle = ctypes.create_string_buffer(512), ctypes.c_void_p()
    status = library.claq_cuda_create(ctypes.byref(description), 10, ctypes.byref(handle), error, len(error))
    return status, error.value.decode(), handle


def contexts(library: ctypes.CDLL, driver: ctypes.CDLL) -> dict[str, Any]:
    """Layers made and destroyed while contexts come and go."""
    tensors = {**small_layer(), "bias": torch.zeros(0, dtype=torch.float16)}  # a bias of zeros is allocated

    def create() -> ctypes.c_void_p:
        status, message, handle = create_small(library, tensors)
        assert status == 0, message
        return handle

    driver.fake_set_context(30)
    loads, held, waits = [driver.fake_loads()], driver.fake_memory_held(), driver.fake_waits()
    layers = [create()]
    found: dict[str, Any] = {"waited for the weights": driver.fake_waits() > waits}
    loads.append(driver.fake_loads())
    layers.append(create())
    loads.append(driver.fake_loads())
    found["allocated"] = driver.fake_memory_held() > held
    driver.fake_set_context(0)
    for layer in layers:
        library.claq_cuda_destroy(layer)
    found["kept"] = driver.fake_memory_held() - held
    found["context of the thread"] = driver.fake_context()
    driver.fake_set_context(30)
    driver.fake_renew_context()
    layer = create()
    loads.append(driver.fake_loads())
    found["kernels loaded"] = [after - before for before, after in itertools.pairwise(loads)]
    driver.fake_set_context(31)
    driver.fake_end_context(30)
    library.claq_cuda_destroy(layer)
    found["context after one that is gone"] = driver.fake_context()
    return found


def changed_record(package: bytes, name: str, offset: int, value: bytes) -> bytes:
    """The package with other bytes at that place of a kernel's record."""
    record = package.index(name.encode() + b"\0")
    return package[: record + offset] + value + package[record + offset + len(value) :]


def refusals(library: ctypes.CDLL, driver: ctypes.CDLL, package: Path) -> dict[str, list[Any]]:
    """Status and message of what must be refused."""
    tensors = small_layer()

    def create(changed: dict[str, torch.Tensor] | None = None) -> list[Any]:
        status, message, handle = create_small(library, {**tensors, **(changed or {})})
        return [status, message, bool(handle)]

    def usable() -> list[Any]:
        text = ctypes.create_string_buffer(512)
        return [library.claq_cuda_usable(text, len(text)), text.value.decode()]

    found: dict[str, list[Any]] = {}
    driver.fake_set_context(0)
    found["no context"] = create()
    good = package.read_bytes()
    packages = {
        "no package": None,
        "empty package": b"",
        "another file": b"x" * 1000,
        "truncated package": good[: len(good) // 2],
        "record without end": good[:16] + b"g" * 64 + good[80:],
        "damaged image": good.replace(b"\x7fELF", b"\x7fELG"),
        "no such entry": changed_record(good, "quantize_fp16_u16_o1", 64, b"other\0"),
        **{
            f"{name} {field}": changed_record(good, name, offset, value.to_bytes(4, "little"))
            for name, field, offset, value in LAUNCHES
        },
        "good": good,
    }
    for number, (name, data) in enumerate(packages.items(), 40):
        folder = package.parent / str(number)
        folder.mkdir()
        if data is not None:
            (folder / package.name).write_bytes(data)
        os.environ["CLAQ_CUDA_KERNELS"] = str(folder)
        driver.fake_set_context(number)  # kernels are kept by context
        modules = driver.fake_modules()
        found[name] = [*create(), driver.fake_modules() - modules]
    found["order out of range"] = create({"order": torch.full_like(tensors["order"], 65)})
    found["codes too short"] = create({"codes": tensors["codes"][1:].contiguous()})
    found["bias of another type"] = create({"bias": torch.zeros(32)})
    found["unaligned"] = create({"bias": torch.zeros(33, dtype=torch.float16)[1:]})
    driver.fake_refuse_memory(1)
    found["no memory"] = create({"bias": torch.zeros(0, dtype=torch.float16)})
    driver.fake_refuse_memory(0)
    os.environ["FAKE_CAPABILITY"] = "75"
    found["old GPU"] = usable()
    os.environ["FAKE_CAPABILITY"] = "86"
    found["fits a later chip"] = usable()
    driver.fake_set_devices(0)
    found["no GPU"] = usable()
    return found


def session_on_the_cpu(operators: str) -> float:
    """Error of a session of the real ONNX Runtime on the CPU, with operators from that library."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    layer = random_layer(64, 32, (4, 2), outliers=0.05)
    parts = {name: tensor.numpy() for name, tensor in layer.tensors().items()} | {"bias": np.zeros(0, np.float32)}
    attributes = dict(zip(("columns_4", "columns_3", "columns_2"), layer.columns, strict=True))
    node = helper.make_node(
        "ClaqMatMul", ["x", *parts], ["y"], domain="com.claq", in_features=64, out_features=32, **attributes
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 32])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in parts.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.claq", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(operators)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    expected = x.astype(np.float64) @ dense_weight(layer).numpy().T
    return float(np.abs(session.run(None, {"x": x})[0] - expected).max() / np.abs(expected).max())


def main() -> None:
    path, built = sys.argv[1], Path(sys.argv[2])
    driver = ctypes.CDLL(str(built / "libcuda.so.1"))  # by its soname libclaq finds it loaded
    gpu = Interpreter(driver)
    folder = built / "kernels"
    folder.mkdir()
    gpu.package(folder)
    package = folder / f"claq_sm{TARGET}.kernels"
    library = open_libclaq(path)
    text = ctypes.create_string_buffer(512)
    os.environ |= {"CLAQ_CUDA_KERNELS": str(folder / "nowhere"), "CLAQ_LIBRARY": path}
    status = library.claq_cuda_usable(text, len(text))
    results: dict[str, Any] = {"no kernels": [status, text.value.decode(), driver.fake_started()]}
    os.environ["CLAQ_CUDA_KERNELS"] = str(folder)
    results["no provider"] = {"error": session_on_the_cpu(path), "started": driver.fake_started()}
    results["handle without cuBLAS"] = run(library, gpu, HANDLE_WITHOUT_CUBLAS)
    cublas = ctypes.CDLL(str(built / "libcublas.so.12"))  # found loaded, like the driver
    results |= {case[0]: {**run(library, gpu, case), "compute": cublas.fake_cublas_compute()} for case in CASES}
    results |= {case[0]: look_up(library, gpu, case) for case in LOOKUPS}
    ort = ctypes.CDLL(str(built / "fake_ort.so"))
    results["nodes"] = nodes(library, ort, gpu)
    results["two hosts"] = two_hosts(library, ort, ctypes.CDLL(str(built / "second_ort.so")))
    pretending = built / "pretend_cuda.so"
    results["provider"] = {"error": session_on_the_cpu(str(pretending))}
    results["reads"] = reads_of_packages(library, ctypes.CDLL(str(built / "count_reads.so")), pretending, package)
    os.environ["CLAQ_CUDA_KERNELS"] = str(folder)
    results["contexts"] = contexts(library, driver)
    results["refusals"] = refusals(library, driver, package)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
