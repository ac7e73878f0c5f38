"""The operators that users call, ``torch.ops.claq.linear`` and ``torch.ops.claq.embedding``, against the dense weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from findings import Finding
from layers import arguments, bound_of, layer_of, share
from machine import Machine

import claq_export.kernels.ops  # noqa: F401
from claq_export.format.layer import QuantizedLinear
from claq_export.kernels.cuda import COARSE_BOUNDS


def operators(machine: Machine) -> Iterator[Finding]:
    """Both operators over dtypes, numbers of rows, biases and outliers; PyTorch's own checks of their registration."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    rows = (1, 5) if machine.dry else (1, 8, 64, 600)
    for dtype, vectors, bias, outliers in product(dtypes, rows, (False, True), (0.0, 0.01)):
        kinds = f"{'a' if bias else 'no'} bias, {outliers:.0%} outliers"
        yield f"claq::linear, {dtype}, {vectors} rows, {kinds}", _product(machine, dtype, vectors, bias, outliers)
    for dtype in dtypes:
        yield f"claq::embedding, {dtype}", _lookup(machine, dtype)
    yield "claq::linear, torch.float32, 8 rows, TF32 allowed", _product_in_tf32(machine)
    yield "opcheck of both operators", _registration(machine)


def _layer(machine: Machine, outliers: float) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer and its dense weight in float64, both on the device."""
    features = (70, 37) if machine.dry else (512, 320)  # as in checks.py: most kernels are compiled already
    layer = layer_of(*features, (2, 3, 4), outliers)
    return layer.to(machine.device), layer.dequantize().to(machine.device).double()


def _twice(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of a call, which inference mode must not change.

    Raises:
        AssertionError: it does.
    """
    plain = call()
    with torch.inference_mode():
        inferred = call()
    if not torch.equal(plain, inferred):
        raise AssertionError("inference mode gives other values")
    return plain


def _product(
    machine: Machine, dtype: torch.dtype, vectors: int, with_bias: bool, outliers: float
) -> Callable[[], tuple[float, float]]:
    def error() -> tuple[float, float]:
        layer, dense = _layer(machine, outliers)
        x = torch.randn(vectors, layer.in_features, device=machine.device).to(dtype)
        bias = torch.randn(layer.out_features if with_bias else 0, device=machine.device).to(dtype)
        got = _twice(lambda: torch.ops.claq.linear(*arguments(layer, x, bias), 0))
        expected = x.double() @ dense.T
        return share(got, expected + bias.double() if with_bias else expected), bound_of(x, dense)

    return error


def _product_in_tf32(machine: Machine) -> Callable[[], tuple[float, float]]:
    """That a product which cuBLAS makes in TF32 is not taken for a wrong kernel, which a warning would say."""

    def error() -> tuple[float, float]:
        layer, dense = _layer(machine, 0.0)
        x, none = torch.randn(8, layer.in_features, device=machine.device), torch.zeros(0, device=machine.device)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                got = torch.ops.claq.linear(*arguments(layer, x, none), 0)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        return share(got, x.double() @ dense.T), COARSE_BOUNDS[torch.float32]

    return error


def _lookup_arguments(machine: Machine, layer: QuantizedLinear, dtype: torch.dtype) -> tuple[Any, ...]:
    ids = torch.randint(-layer.out_features, layer.out_features, (3, 7), device=machine.device)
    like = torch.zeros(0, dtype=dtype, device=machine.device)
    return (ids, *layer.tensors().values(), like, layer.in_features, layer.out_features, list(layer.columns))


def _lookup(machine: Machine, dtype: torch.dtype) -> Callable[[], tuple[float, float]]:
    def error() -> tuple[float, float]:
        layer, dense = _layer(machine, 0.01)
        wanted = _lookup_arguments(machine, layer, dtype)
        rows = _twice(lambda: torch.ops.claq.embedding(*wanted))
        return (0.0 if torch.equal(rows, dense.float()[wanted[0]].to(dtype)) else float("inf")), 0.0

    return error


def _registration(machine: Machine) -> Callable[[], tuple[float, float]]:
    def error() -> tuple[float, float]:
        layer, _dense = _layer(machine, 0.01)
        x = torch.randn(5, layer.in_features, device=machine.device)
        torch.library.opcheck(torch.ops.claq.linear.default, (*arguments(layer, x), 0))
        torch.library.opcheck(torch.ops.claq.embedding.default, _lookup_arguments(machine, layer, x.dtype))
        return 0.0, 0.0

    return error
