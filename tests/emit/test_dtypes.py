"""Operators of claq in float16 and bfloat16 graphs: every path, by ONNX Runtime alone and with the library; wide copies."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from quantized_layers import random_layer
from torch import nn

from claq_export.emit.exporter import emit_onnx
from claq_export.errors import VerificationError
from claq_export.modules import ClaqEmbedding, ClaqLinear
from claq_export.onnx_session import open_session, uses_bfloat16, widened
from claq_export.verify import verify_artifact

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
N, K = 70, 96
CASES = {
    # name: widths, outliers, full row, bias, accuracy level
    "plain": ((4,), 0.0, False, False, 0),
    "mixed": ((2, 3, 4), 0.02, False, True, 0),
    "full_row": ((3,), 0.02, True, True, 0),
    "int8": ((4, 2), 0.0, False, True, 4),
    "int8_outliers": ((2, 3, 4), 0.05, True, True, 4),
}


class Operators(nn.Module):
    """One linear a case, and an embedding, side by side on the same input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.linears = nn.ModuleDict()
        for seed, (name, (widths, outliers, full_row, bias, level)) in enumerate(CASES.items()):
            layer = random_layer(K, N, widths, outliers=outliers, full_row=full_row, seed=seed)
            values = torch.randn(N, generator=generator).to(dtype) if bias else torch.zeros(0, dtype=dtype)
            self.linears[name] = ClaqLinear(layer, values if bias else None, level).to(dtype)
        self.table = ClaqEmbedding(random_layer(K, N, (2, 4), outliers=0.02, seed=9), dtype)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*(linear(x) for linear in self.linears.values()), self.table(ids))


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def operators(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Operators]:
    model = Operators(request.param).eval()
    path = tmp_path_factory.mktemp("dtypes") / "model.onnx"
    inputs = {"x": torch.zeros(2, 5, K, dtype=request.param), "ids": torch.zeros(2, 3, dtype=torch.int64)}
    axes = {"x": {0: "batch", 1: "sequence"}, "ids": {1: "lookups"}}
    emit_onnx(model, inputs, path, dynamic_shapes=axes, output_names=[*CASES, "rows"])
    onnx.checker.check_model(str(path), full_check=True)
    return path, model


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("with_library", [False, True], ids=["stock", "runtime"])
def test_every_path_is_exact_to_one_rounding(operators: tuple[Path, Operators], with_library: bool, rows: int) -> None:
    """The oracle is the dense weight in float64; what is added is the rounding of the result (and of int8 activations)."""
    path, model = operators
    dtype = model.table.like.dtype
    library = pytest.importorskip("claq_runtime").library_path() if with_library else None
    session = open_session(path, library)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, K, generator=generator).to(dtype)
    ids = torch.randint(-N, N, (2, rows), generator=generator)
    x_fed = x.float().numpy() if dtype == torch.bfloat16 else x.numpy()
    *found, looked_up = session.run(None, {"x": x_fed, "ids": ids.numpy()})
    for (name, case), y in zip(CASES.items(), found, strict=True):
        linear = model.linears[name]
        wanted = x.double() @ linear.layer.dequantize(torch.float64).T
        if linear.bias.numel():
            wanted = wanted + linear.bias.double()
        error = (torch.from_numpy(y).double() - wanted).abs().max() / wanted.abs().max()
        limit = 1.01 * ROUNDING[dtype] + (0.02 if with_library and case[-1] == 4 else 1e-6)
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"
    exact = model.table.layer.dequantize(torch.float32)[ids].to(dtype).float()
    np.testing.assert_array_equal(looked_up.astype(np.float32), exact.numpy())


def test_verification_measures_by_the_rounding(operators: tuple[Path, Operators]) -> None:
    """PyTorch in the file's dtype says how far rounding takes an output; a wrong weight is seen all the same."""
    path, model = operators
    dtype = model.table.like.dtype
    generator = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(2, 6, K, generator=generator).to(dtype), "ids": torch.arange(6).reshape(2, 3)}
    wide = Operators(torch.float32).eval()
    for name, linear in model.linears.items():
        wide.linears[name].bias = linear.bias.float()
    report = verify_artifact(path, model, inputs, exact=wide, rounds=0)
    assert set(report.rounding) == {*CASES, "rows"}
    assert 0 < report.rounding["mixed"].maximum < 2 * ROUNDING[dtype]
    assert ("bfloat16" in report.note) == (dtype == torch.bfloat16)
    # The file is wrong (the two PyTorch models agree), then the float32 model is.
    largest = wide.linears["mixed"](inputs["x"].float()).abs().max()
    other = copy.deepcopy(model)
    shift = 12 * ROUNDING[dtype] * largest
    for changed in (other, wide):
        changed.linears["mixed"].bias = changed.linears["mixed"].bias + shift.to(changed.linears["mixed"].bias.dtype)
    with pytest.raises(VerificationError, match=r"stock: output 'mixed' .* deviates"):
        verify_artifact(path, other, inputs, exact=wide, rounds=0)
    wide.linears["mixed"].bias = wide.linears["mixed"].bias + 0.5 * largest
    with pytest.raises(VerificationError, match=r"PyTorch's output 'mixed' is .* away from the float32 model's"):
        verify_artifact(path, other, inputs, exact=wide, rounds=0)


def test_verification_looks_at_types(operators: tuple[Path, Operators]) -> None:
    path, _ = operators
    inputs = {"x": torch.ones(2, 6, K), "ids": torch.arange(6).reshape(2, 3)}
    with pytest.raises(
        VerificationError, match=r"output 'plain' .* is B?FLOAT16, the PyTorch model's is torch.float32"
    ):
        verify_artifact(path, Operators(torch.float32).eval(), inputs, rounds=0)


def small_bfloat16_graph() -> onnx.ModelProto:
    """``y = softmax(x w) + x`` and ``z = x w``, which is read inside and outside, in bfloat16."""
    kind = TensorProto.BFLOAT16
    values = [helper.make_tensor_value_info(name, kind, [3, 4]) for name in ("x", "y", "z")]
    weight = helper.make_tensor("w", kind, [4, 4], np.linspace(-1, 1, 16).tolist())
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("Softmax", ["z"], ["s"]),
        helper.make_node("Transpose", ["s"], ["t"], perm=[1, 0]),
        helper.make_node("Transpose", ["t"], ["u"], perm=[1, 0]),
        helper.make_node("Add", ["u", "x"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_wide_copies_round_every_result(tmp_path: Path) -> None:
    model = small_bfloat16_graph()
    path = tmp_path / "small.onnx"
    onnx.save(model, str(path))
    assert uses_bfloat16(path)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    w = torch.linspace(-1, 1, 16).bfloat16().reshape(4, 4)
    z = (x.float() @ w.float()).bfloat16()
    y = (z.float().softmax(-1).bfloat16().float() + x.float()).bfloat16()
    found = open_session(path).run(None, {"x": x.float().numpy()})
    np.testing.assert_array_equal(found[1], z.float().numpy())
    np.testing.assert_array_equal(found[0], y.float().numpy())
    wide = widened(model)
    onnx.checker.check_model(wide, full_check=True)
    moved = [node for node in wide.graph.node if node.op_type == "Transpose"]
    assert [list(node.input) for node in moved] == [["s"], ["t"]], "what only moves values is left in bfloat16"
    assert model.graph.node[0].input[0] == "x", "the model itself is not changed"
