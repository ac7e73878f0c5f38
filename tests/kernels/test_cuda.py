"""The check of a CUDA kernel's first call against the reference, on functions that stand for the two (no GPU needed)."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from quantized_layers import dense_weight, random_layer

from claq_export.format.layer import QuantizedLinear
from claq_export.kernels import cuda
from claq_export.kernels.cuda import Sample, checked

RIGHT = torch.tensor([1.0, -2.0, 4.0])
kinds = itertools.count()


def calls_of(result: torch.Tensor | Exception) -> tuple[list[str], object, object, object]:
    """A log of calls, a kernel that gives ``result``, a reference that gives RIGHT, and all of RIGHT as the sample."""
    log: list[str] = []

    def kernel() -> torch.Tensor:
        log.append("kernel")
        if isinstance(result, Exception):
            raise result
        return result

    def reference() -> torch.Tensor:
        log.append("reference")
        return RIGHT

    def sample() -> Sample:
        log.append("sample")
        return Sample(RIGHT, lambda y: y)

    return log, kernel, reference, sample


def test_a_right_kernel_is_checked_once() -> None:
    kind, result = next(kinds), RIGHT + 0.01
    log, *functions = calls_of(result)
    for _ in range(3):
        assert checked(kind, *functions, 0.01) is result
    assert log == ["sample", "kernel", "kernel", "kernel"]


@pytest.mark.parametrize("wrong", [RIGHT + 0.1, RIGHT * torch.nan, RuntimeError("no kernel image is available")])
def test_a_wrong_kernel_is_not_used(wrong: torch.Tensor | Exception) -> None:
    kind = next(kinds)
    log, *functions = calls_of(wrong)
    with pytest.warns(RuntimeWarning, match="differs from the reference|no kernel image"):
        assert checked(kind, *functions, 0.01) is RIGHT
    assert checked(kind, *functions, 0.01) is RIGHT
    assert log == ["sample", "kernel", "reference", "reference"]


def test_values_that_tell_nothing_give_no_verdict() -> None:
    """The kernel runs all the same: one that is first called while a graph is captured could not be loaded there."""
    kind = next(kinds)
    log, kernel, *functions = calls_of(RIGHT)
    untold = [(torch.zeros(3), True), (torch.tensor([1.0, torch.inf]), True), (torch.zeros(0), True), (RIGHT, False)]
    for values, telling in untold:
        sample = Sample(values, lambda y: y, telling)
        assert checked(kind, kernel, lambda v=values: v, lambda s=sample: s, 0.01) is values
    assert log == ["kernel"] * len(untold)
    checked(kind, kernel, *functions, 0.01)
    assert log == ["kernel"] * len(untold) + ["sample", "kernel"]


def test_memory_that_runs_out_says_nothing_of_the_kernel() -> None:
    kind = next(kinds)
    log, *functions = calls_of(torch.OutOfMemoryError("no room"))
    with pytest.raises(torch.OutOfMemoryError):
        checked(kind, *functions, 0.01)
    log, *functions = calls_of(RIGHT)
    assert checked(kind, *functions, 0.01) is RIGHT
    assert log == ["sample", "kernel"]


def test_a_graph_capture_is_not_waited_for() -> None:
    kind = next(kinds)
    log, *functions = calls_of(RIGHT)
    checked(kind, *functions, 0.01, may_wait=False)
    checked(kind, *functions, 0.01)
    assert log == ["kernel", "sample", "kernel"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.Tensor], torch.Tensor]], None]:
    """Puts a function of x in the place of the Triton kernels, which CPU tensors are then given to."""

    def launch(product: Callable[[torch.Tensor], torch.Tensor]) -> None:
        kernels = ModuleType("claq_export.kernels.triton.launch")
        kernels.kernel_for = lambda x, in_features: next(kinds)
        kernels.linear = lambda x, *_: product(x)
        monkeypatch.setitem(sys.modules, kernels.__name__, kernels)

    monkeypatch.setattr(cuda, "_use_kernels", lambda operator: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return launch


def test_what_has_no_elements_needs_no_kernel(launched: Callable[..., None]) -> None:
    layer = random_layer(96, 40, (2, 4))
    launched(lambda x: pytest.fail("not to be called"))
    assert _linear(torch.zeros(0, 3, 96), layer, torch.zeros(40)).shape == (0, 3, 40)
    indices, tensors = torch.zeros(2, 0, dtype=torch.int64), list(layer.tensors().values())
    found = cuda.cuda_embedding(indices, tensors, 96, 40, layer.columns, torch.float16)
    assert (found.shape, found.dtype) == ((2, 0, 96), torch.float16)


def test_the_bias_alone_proves_no_kernel(launched: Callable[..., None], recwarn: pytest.WarningsRecorder) -> None:
    layer, bias = random_layer(96, 40, (2, 4)), torch.randn(40)
    launched(lambda x: bias.expand(3, 40).clone())
    kind = f"the same {next(kinds)}"
    sys.modules["claq_export.kernels.triton.launch"].kernel_for = lambda *_: kind
    assert torch.equal(_linear(torch.zeros(3, 96), layer, bias), bias.expand(3, 40))
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match="differs from the reference"):
        _linear(torch.randn(3, 96), layer, bias)


def test_products_that_may_be_in_tf32_are_compared_by_its_rounding(
    launched: Callable[..., None], recwarn: pytest.WarningsRecorder
) -> None:
    layer, x, none = random_layer(96, 40, (2, 4)), torch.randn(8, 96), torch.zeros(0)
    right = (x.double() @ dense_weight(layer).T).float()
    rounded = right + right.abs().max() * 3e-4
    launched(lambda x: rounded)
    sys.modules["claq_export.kernels.triton.launch"].kernel_for = lambda *_: "dense"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert _linear(x, layer, none) is rounded
        assert not recwarn.list
        torch.set_float32_matmul_precision("highest")
        with pytest.warns(RuntimeWarning, match="differs from the reference"):
            assert _linear(x, layer, none) is not rounded
    finally:
        torch.set_float32_matmul_precision(before)


def _linear(x: torch.Tensor, layer: QuantizedLinear, bias: torch.Tensor) -> torch.Tensor:
    tensors = [*layer.tensors().values(), bias]
    return cuda.cuda_linear(x, tensors, layer.in_features, layer.out_features, layer.columns, 0)


def test_products_in_tf32_do_not_condemn_a_right_kernel(
    launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    layer, x, bias = random_layer(96, 40, (2, 4), outliers=0.05), torch.randn(3, 96), torch.randn(40)
    right = (x.double() @ dense_weight(layer).T + bias.double()).float()
    launched(lambda x: right)
    exact = torch.nn.functional.linear

    def coarse(*operands: torch.Tensor) -> torch.Tensor:
        """What a GPU makes of it under ``torch.set_float32_matmul_precision("high")``."""
        return exact(
            *((o.view(torch.int32) & -8192).view(torch.float32) if o.dtype == torch.float32 else o for o in operands)
        )

    monkeypatch.setattr(torch.nn.functional, "linear", coarse)
    assert _linear(x, layer, bias) is right
    assert not recwarn.list


@pytest.mark.parametrize("wrong", [(0, 0), (699, 89), (699, 0)])
def test_a_large_product_is_compared_in_part(
    launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch, wrong: tuple[int, int]
) -> None:
    layer, x = random_layer(96, 90, (3,), outliers=0.05), torch.randn(7, 100, 96).half()
    right = (x.double() @ dense_weight(layer).T).half()
    decoded, dequantize = [], QuantizedLinear.dequantize

    def noted(self: QuantizedLinear, *arguments: torch.dtype) -> torch.Tensor:
        decoded.append(self.out_features)
        return dequantize(self, *arguments)

    monkeypatch.setattr(cuda, "MOST_WEIGHTS", 1)
    monkeypatch.setattr(QuantizedLinear, "dequantize", noted)
    launched(lambda x: right)
    assert _linear(x, layer, torch.zeros(0)) is right
    assert decoded == [64]
    damaged = right.clone()
    damaged.view(700, 90)[wrong] += right.abs().max()
    launched(lambda x: damaged)
    with pytest.warns(RuntimeWarning, match="differs from the reference"):
        found = _linear(x, layer, torch.zeros(0))
    assert torch.allclose(found.float(), right.float(), atol=float(right.abs().max()) * 2e-3)
