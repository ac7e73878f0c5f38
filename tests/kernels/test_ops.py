"""claq::linear against weights read one by one from the format, under every way PyTorch calls an operator."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_layers import arguments, dense_weight, layers, random_layer

from claq_export.errors import FormatError
from claq_export.format.layer import QuantizedLinear
from claq_export.kernels import backend, cpu, linear, ops, use_backend
from claq_export.kernels.native import native_available
from claq_export.modules.layers import ClaqLinear

NATIVE = native_available()
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])),
]
LEADING = [(), (0,), (1,), (7,), (130,), (2, 3), (2, 0, 3)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def expected(layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.to(torch.float64) @ dense_weight(layer).T
    return y if bias is None else y + bias.to(torch.float64)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    if got.numel():
        assert (got.to(torch.float64) - wanted).abs().max() <= TOLERANCE[dtype] * max(float(wanted.abs().max()), 1e-6)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    layer=layers(),
    leading=st.sampled_from(LEADING),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    with_bias=st.booleans(),
)
def test_any_layer(
    name: str, layer: QuantizedLinear, leading: tuple[int, ...], dtype: torch.dtype, with_bias: bool
) -> None:
    x = torch.randn(*leading, layer.in_features).to(dtype)
    bias = torch.randn(layer.out_features).to(dtype) if with_bias else None
    with use_backend(name):
        y = linear(*arguments(layer, x, bias))
    assert_close(y, expected(layer, x, bias), dtype)
    assert y.is_contiguous()


@pytest.mark.parametrize("name", BACKENDS)
def test_activations_that_are_not_contiguous(name: str) -> None:
    layer = random_layer(48, 16, (3, 2), outliers=0.1)
    x = torch.randn(48, 5, 3).permute(2, 1, 0)
    with use_backend(name):
        assert_close(linear(*arguments(layer, x)), expected(layer, x, None), torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str))
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_opcheck(name: str, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    layer = random_layer(40, 24, (4, 2), outliers=0.05)
    with use_backend(name):
        torch.library.opcheck(linear, arguments(layer, torch.randn(*leading, 40).to(dtype), torch.randn(24).to(dtype)))


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = random_layer(40, 24, (4, 3)), random_layer(24, 8, (2,), outliers=0.1)
        for prefix in "ab":
            for name, tensor in getattr(self, prefix).tensors().items():
                self.register_buffer(f"{prefix}_{name}", tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for prefix in "ab":
            layer = getattr(self, prefix)
            parts = [getattr(self, f"{prefix}_{name}") for name in layer.tensors()]
            x = torch.relu(
                linear(x, *parts, x.new_zeros(0), layer.in_features, layer.out_features, list(layer.columns), 0)
            )
        return x


def test_export_keeps_one_node_a_layer_and_dynamic_axes() -> None:
    model = TwoLayers()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 3, 40),), dynamic_shapes=(dynamic,))
    assert sum(node.target is linear for node in program.graph.nodes) == 2
    for shape in ((1, 1), (5, 2), (2, 9)):
        x = torch.randn(*shape, 40)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(compiler: str) -> None:
    torch._dynamo.reset()
    model = TwoLayers()
    compiled = torch.compile(model, fullgraph=True, backend=compiler, dynamic=True)
    with torch.no_grad():
        for rows in (1, 4, 6):
            x = torch.randn(rows, 40)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_is_that_of_linear(lower: torch.dtype) -> None:
    layer, bias = random_layer(40, 24, (4, 2), outliers=0.05), torch.randn(24)
    for x in (torch.randn(3, 40), torch.randn(3, 40).to(lower)):
        with torch.autocast("cpu", lower):
            y = linear(*arguments(layer, x, bias))
            assert torch.nn.functional.linear(x, torch.randn(24, 40)).dtype == y.dtype
            torch.library.opcheck(linear, arguments(layer, x, bias))
        assert_close(y, expected(layer, x.to(lower), bias), lower)
    with torch.autocast("cpu", lower), pytest.raises(RuntimeError, match="float64"):
        linear(*arguments(layer, torch.randn(3, 40, dtype=torch.float64), bias))


def test_autocast_in_compiled_and_exported_graphs() -> None:
    torch._dynamo.reset()
    model, x = TwoLayers(), torch.randn(3, 40)
    program = torch.export.export(model, (x,)).module()
    for enabled in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            wanted = model(x)
            assert wanted.dtype == (torch.bfloat16 if enabled else torch.float32)
            for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), program):
                torch.testing.assert_close(run(x), wanted)


class Reached(Exception):
    """The dispatcher was asked."""


def asks_the_dispatcher(x: torch.Tensor, layer: QuantizedLinear) -> bool:
    def reached(*_arguments: object) -> torch.Tensor:
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "linear", reached)
        try:
            ops.call_linear(*arguments(layer, x))
        except Reached:
            return True
    return False


def test_modules_leave_the_dispatcher_out_where_it_does_nothing() -> None:
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dispatching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    layer, x = random_layer(8, 4), torch.randn(2, 8)
    wants_gradient = x.clone().requires_grad_()
    for plain in (x, x.half(), x[:, :0].new_zeros(0, 8)):
        assert not asks_the_dispatcher(plain, layer)
        assert torch.equal(ops.call_linear(*arguments(layer, plain)), linear(*arguments(layer, plain)))
    assert asks_the_dispatcher(wants_gradient, layer)
    with torch.no_grad():
        assert not asks_the_dispatcher(wants_gradient, layer)
    with torch.inference_mode():
        assert not asks_the_dispatcher(torch.randn(2, 8), layer)
    negative, zeros = torch.complex(x, x).conj().imag, torch._efficientzerotensor((2, 8))
    for odd in (x.to("meta"), negative, zeros, x.to_sparse(), x.to_mkldnn()):
        assert asks_the_dispatcher(odd, layer)
    for odd in (negative, zeros):
        assert torch.equal(ops.call_linear(*arguments(layer, odd)), linear(*arguments(layer, odd.clone())))
    assert asks_the_dispatcher(torch.nn.Buffer(x).as_subclass(torch.nn.Parameter), layer)
    for around in (
        torch.autocast("cpu", torch.bfloat16),
        Dispatching(),
        torch.device("cpu"),  # a mode for functions
        torch.profiler.profile(),
        forward_ad.dual_level(),
    ):
        with around:
            assert asks_the_dispatcher(x, layer), around
        assert not asks_the_dispatcher(x, layer)
    asked: list[bool] = []
    torch.vmap(lambda row: (asked.append(asks_the_dispatcher(row, layer)), row)[1])(x)
    assert asked == [True]


def test_programs_and_profiles_have_the_operator_of_a_module() -> None:
    module, x = ClaqLinear(random_layer(8, 4)).eval(), torch.randn(2, 8)
    traced = torch.fx.experimental.proxy_tensor.make_fx(module)(x)
    compiled: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    torch.compile(module, backend=note, fullgraph=True)(x)
    programs = (torch.export.export(module, (x,), strict=strict).graph_module for strict in (False, True))
    for graph in (traced, *compiled, *programs):
        assert linear in [node.target for node in graph.graph.nodes]
    assert "claq::linear" in torch.jit.trace(module, x).graph.str()
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x)
    assert "claq::linear" in {event.key for event in profile.key_averages()}


def test_gradients_are_refused_at_backward_only() -> None:
    layer = random_layer(8, 4)
    y = linear(*arguments(layer, torch.randn(2, 8, requires_grad=True)))
    with pytest.raises(RuntimeError, match="claq::linear, claq::embedding"):
        y.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 9), None, "last dimension of x must be in_features = 8, got 9"),
        (torch.tensor(1.0), None, "at least one dimension"),
        (torch.zeros(2, 8, dtype=torch.float64), None, "must be float32, float16 or bfloat16, got torch.float64"),
        (torch.zeros(2, 8), torch.zeros(3), "bias must have out_features = 4 values or none, got 3"),
    ],
)
def test_wrong_arguments(name: str, x: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    layer = random_layer(8, 4)
    with use_backend(name), pytest.raises(RuntimeError, match=message):
        linear(*arguments(layer, x, bias))


@pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])
class TestNativeCache:
    def test_it_is_freed_with_the_weights(self) -> None:
        gc.collect()
        before = len(cpu._layers)
        layer = random_layer(64, 8)
        call = arguments(layer, torch.randn(1, 64))
        for _ in range(3):
            linear(*call)
        assert len(cpu._layers) == before + 1
        del layer, call
        gc.collect()
        assert len(cpu._layers) == before

    def test_it_follows_changes_in_place(self) -> None:
        layer, other = random_layer(64, 8, seed=1), random_layer(64, 8, seed=2)
        x = torch.randn(3, 64)
        linear(*arguments(layer, x))
        for tensor, value in zip(layer.tensors().values(), other.tensors().values(), strict=True):
            tensor.copy_(value)
        assert_close(linear(*arguments(layer, x)), expected(other, x, None), torch.float32)

    def test_a_broken_layer_is_refused_by_name(self) -> None:
        layer = random_layer(64, 8)
        layer.scale[3] = float("nan")
        with pytest.raises(FormatError, match="scale"):
            linear(*arguments(layer, torch.randn(1, 64)))


def test_backend_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="backend must be one of auto, native, reference, got 'fast'"),
        use_backend("fast"),
    ):
        pass
    monkeypatch.setenv("CLAQ_BACKEND", "fast")
    with pytest.raises(ValueError, match="CLAQ_BACKEND must be one of auto, native, reference, got 'fast'"):
        backend()


def test_native_backend_without_the_library_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['claq_runtime'] = None\n"
        "import torch\n"
        "from claq_export.kernels import linear, use_backend\n"
        "from quantized_layers import arguments, random_layer\n"
        "call = arguments(random_layer(8, 4), torch.randn(2, 8))\n"
        "assert linear(*call).shape == (2, 4)\n"
        "with use_backend('native'):\n"
        "    linear(*call)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=False
    )
    assert result.returncode == 1
    assert "claq::linear cannot use its native kernel: the distribution claq-runtime is not installed" in result.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
