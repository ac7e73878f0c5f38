"""verify_artifact: agreement is measured, disagreement and refused files are errors that name the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from quantized_layers import random_layer

from claq_export.emit import emit_onnx
from claq_export.emit.writer import data_files
from claq_export.errors import VerificationError
from claq_export.kernels.native import native_available
from claq_export.modules import ClaqLinear
from claq_export.verify import INT8_TOLERANCE, Deviation, verify_artifact
from claq_export.verify_layers import FOLDING_BYTES, layer_outputs

NATIVE = native_available()
needs_native = pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])


class Pair(torch.nn.Module):
    """Two outputs: a quantized layer's, and integers."""

    def __init__(self, accuracy_level: int = 0) -> None:
        super().__init__()
        layer = random_layer(64, 32, (4, 2), outliers=0.02)
        self.layer = ClaqLinear(layer, torch.arange(32.0), accuracy_level)
        self.dense = torch.nn.Linear(64, 32)
        with torch.no_grad():
            self.dense.weight.copy_(layer.dequantize() * 1.25)
            self.dense.bias.copy_(torch.arange(32.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.layer(x)
        return y, y.argmax(-1)


class Original(torch.nn.Module):
    """The unquantized counterpart of :class:`Pair`, whose weights are a quarter larger."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.dense = pair.dense

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.dense(x)
        return {"y": y, "top": y.argmax(-1)}


def emit(folder: Path, model: torch.nn.Module, name: str = "model.onnx") -> Path:
    return emit_onnx(
        model,
        {"x": torch.randn(2, 64)},
        folder / name,
        dynamic_shapes={"x": {0: "rows"}},
        output_names=["y", "top"],
    ).path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pair]:
    torch.manual_seed(0)
    pair = Pair().eval()
    return emit(tmp_path_factory.mktemp("verify"), pair), pair


SAMPLES = [{"x": torch.randn(5, 64)}, {"x": torch.randn(1, 64)}]


def test_report_without_the_library(written: tuple[Path, Pair]) -> None:
    path, pair = written
    report = verify_artifact(path, pair, SAMPLES, library=False, rounds=3)
    assert set(report.runs) == {"stock"}
    assert report.note == "not asked for"
    stock = report.runs["stock"]
    assert stock.deviations["y"].maximum < 1e-5
    assert stock.deviations["y"].cosine == pytest.approx(1, abs=1e-6)
    assert stock.deviations["top"] == Deviation(0.0, 0.0, pytest.approx(1))
    assert stock.latency_ms > 0
    assert stock.load_seconds > 0
    assert report.fidelity == {}


@needs_native
def test_report_with_the_library_and_the_original(written: tuple[Path, Pair], tmp_path: Path) -> None:
    path, pair = written
    original = Original(pair).eval()
    report = verify_artifact(
        path, pair, SAMPLES, unquantized=original, original_path=emit(tmp_path, original), library=True, rounds=3
    )
    assert set(report.runs) == {"stock", "runtime", "original"}
    assert report.runs["runtime"].deviations["y"].maximum < 1e-5
    assert report.runs["original"].deviations == {}
    assert all(run.latency_ms > 0 for run in report.runs.values())
    with torch.no_grad():
        wanted = max(float((pair(**s)[0] - original(**s)["y"]).norm() / original(**s)["y"].norm()) for s in SAMPLES)
    assert report.fidelity["y"].rms == pytest.approx(wanted, rel=1e-5)
    assert 0.5 < report.fidelity["y"].cosine < 1


@needs_native
def test_int8_activations_have_their_own_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Pair(accuracy_level=4).layer
    path = emit_onnx(layer, SAMPLES[0], tmp_path / "m.onnx", dynamic_shapes={"x": {0: "rows"}}).path
    report = verify_artifact(path, layer, SAMPLES, library=True, rounds=0)
    (deviation,) = report.runs["runtime, fp32"].deviations.values()
    assert deviation.maximum < 1e-5
    (deviation,) = report.runs["runtime"].deviations.values()
    assert 1e-4 < deviation.rms < INT8_TOLERANCE
    assert math.isnan(report.runs["runtime"].latency_ms)
    with pytest.raises(VerificationError, match=r"^runtime: output '\w+' of"):
        verify_artifact(path, layer, SAMPLES, library=True, library_tolerance=1e-5, rounds=0)
    monkeypatch.setattr("claq_export.verify.INT8_TOLERANCE", 1e-5)
    with pytest.raises(VerificationError, match=r"rounded to int8 output '\w+' .* export with --accuracy fp32"):
        verify_artifact(path, layer, SAMPLES, library=True, rounds=0)


@needs_native
def test_a_large_file_is_verified_layer_by_layer(
    written: tuple[Path, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pair = written
    monkeypatch.setattr("claq_export.verify.WHOLE_UP_TO", 0)
    report = verify_artifact(path, pair, SAMPLES, library=True, rounds=2)
    assert set(report.runs) == {"stock", "runtime"}
    assert 0 < report.runs["stock"].deviations["layers"].maximum < 1e-5
    assert math.isnan(report.runs["stock"].latency_ms)
    assert report.runs["runtime"].latency_ms > 0
    assert "layers one by one" in report.note

    other = onnx.load(str(path))
    (function,) = other.functions
    adding = next(node for node in reversed(function.node) if node.op_type == "Add")
    adding.op_type = "Sub"  # the bias
    onnx.save(other, str(tmp_path / "wrong.onnx"))
    with pytest.raises(VerificationError, match=r"stock: layer 'layer' of .* deviates from claq-runtime by \d"):
        verify_artifact(tmp_path / "wrong.onnx", pair, SAMPLES, library=True)


@needs_native
def test_a_large_layer_runs_in_parts(written: tuple[Path, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path(pytest.importorskip("claq_runtime").library_path())
    ((name, whole, _, _),) = layer_outputs(written[0], library)
    monkeypatch.setattr("claq_export.verify_layers.PART_BYTES", FOLDING_BYTES * 64 * 5)
    found = list(layer_outputs(written[0], library))
    assert [part.shape for _, part, _, _ in found] == [(3, 5)] * 6 + [(3, 2)]
    assert {other for other, *_ in found} == {name}
    for parts in ([stock for _, stock, _, _ in found], [native for _, _, native, _ in found]):
        np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5 * float(np.abs(whole).max()))


def test_another_model_is_noticed(written: tuple[Path, Pair]) -> None:
    path, pair = written
    with pytest.raises(
        VerificationError, match=r"stock: output 'y' of .* deviates from the quantized PyTorch model by 0\.\d+"
    ):
        verify_artifact(path, Original(pair), SAMPLES, library=False)


def test_tolerance_can_be_set(written: tuple[Path, Pair]) -> None:
    path, pair = written

    def shifted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, top = pair(x)
        return y * 1.01, top

    with pytest.raises(VerificationError, match=r"at most 0\.0001 is expected"):
        verify_artifact(path, shifted, SAMPLES, library=False)
    verify_artifact(path, shifted, SAMPLES, library=False, tolerance=0.02, rounds=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, top: (y[:, :-1], top), r"output 'y' of .* has shape \[5, 32\], the PyTorch model's has \[5, 31\]"),
        (lambda y, top: (y,), "has 2 outputs, the PyTorch model returns 1"),
        (lambda y, top: (torch.full_like(y, math.nan), top), "deviates .* by inf"),
        (lambda y, top: (y, top + 1), "output 'top' of .* deviates"),
    ],
    ids=["shape", "count", "nan", "integers"],
)
def test_wrong_outputs(written: tuple[Path, Pair], change: Callable[..., object], message: str) -> None:
    path, pair = written
    with pytest.raises(VerificationError, match=message):
        verify_artifact(path, lambda x: change(*pair(x)), SAMPLES, library=False)


def test_equal_infinities_agree(tmp_path: Path) -> None:
    """Masked scores are -inf on both sides."""

    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x > 0, x, -math.inf)

    path = emit_onnx(Masked(), SAMPLES[0], tmp_path / "m.onnx", dynamic_shapes={"x": {0: "rows"}}).path
    report = verify_artifact(path, Masked(), SAMPLES, library=False, rounds=0)
    (deviation,) = report.runs["stock"].deviations.values()
    assert deviation.maximum == 0


def damage(path: Path, folder: Path, name: str, value: np.ndarray) -> Path:
    """A copy of a model whose initializer ``name`` is ``value``, all tensors inline."""
    model = onnx.load(path)
    for initializer in model.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(model, folder / "damaged.onnx")
    return folder / "damaged.onnx"


DAMAGED = {
    "codes": np.zeros((1, 32), np.uint32),
    "order": np.full(96, 65000, np.uint16),
    "row_scale": np.zeros(31, np.float16),
    "outlier_index": np.full(1, 65000, np.uint16),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_artifact(written: tuple[Path, Pair], tmp_path: Path, name: str) -> None:
    path, pair = written
    broken = damage(path, tmp_path, f"layer.{name}", DAMAGED[name])
    with pytest.raises(VerificationError, match=r"damaged\.onnx"):
        verify_artifact(broken, pair, SAMPLES, library=False)


@needs_native
@pytest.mark.parametrize("name", DAMAGED)
def test_the_library_names_the_damaged_tensor(written: tuple[Path, Pair], tmp_path: Path, name: str) -> None:
    import onnxruntime

    import claq_runtime

    broken = damage(written[0], tmp_path, f"layer.{name}", DAMAGED[name])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    claq_runtime.register(options)
    with pytest.raises(Exception, match=name):
        onnxruntime.InferenceSession(str(broken), options)


def test_truncated_data(written: tuple[Path, Pair], tmp_path: Path) -> None:
    path, pair = written
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    (data,) = data_files(path)
    (tmp_path / data.name).write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(VerificationError, match=r"model\.onnx"):
        verify_artifact(tmp_path / "model.onnx", pair, SAMPLES, library=False)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" * 50])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(VerificationError, match=r"model\.onnx is not a valid ONNX model"):
        verify_artifact(tmp_path / "model.onnx", torch.relu, SAMPLES, library=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"model\.onnx is not a valid ONNX model"):
        verify_artifact(tmp_path / "model.onnx", torch.relu, SAMPLES, library=False)


def test_an_operator_nobody_knows(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", 64])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", 64])
    graph = helper.make_graph([helper.make_node("Unknown", ["x"], ["y"], domain="elsewhere")], "g", [value], [output])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("elsewhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(VerificationError, match=r"stock: ONNX Runtime .* refuses .*m\.onnx"):
        verify_artifact(tmp_path / "m.onnx", torch.relu, SAMPLES, library=False)


def test_a_library_that_does_not_exist(written: tuple[Path, Pair], tmp_path: Path) -> None:
    path, pair = written
    with pytest.raises(VerificationError, match=r"runtime: ONNX Runtime .*nothing\.so"):
        verify_artifact(path, pair, SAMPLES, library=tmp_path / "nothing.so")


def test_no_inputs(written: tuple[Path, Pair]) -> None:
    with pytest.raises(ValueError, match="at least one set of sample inputs"):
        verify_artifact(written[0], written[1], [])


def test_nan_agrees_with_nan_of_the_unquantized_model_alone(tmp_path: Path) -> None:
    class Broken(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, where: float) -> None:
            super().__init__()
            self.model, self.where = model, where

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = tuple(self.model(x).values()) if isinstance(self.model, Original) else self.model(x)
            return torch.where(x[:, :1] > self.where, torch.nan, y[0]), y[1]

    pair = Pair()
    inputs = {"x": torch.tensor([[-1.0], [1.0]]) * torch.ones(64)}
    for where, nan in ((-2.0, 64), (0.0, 32)):
        path = emit(tmp_path, Broken(pair, where), f"{nan}.onnx")
        with pytest.raises(
            VerificationError, match="NaN in the quantized PyTorch model, and not in the unquantized one"
        ):
            verify_artifact(path, Broken(pair, where), inputs, unquantized=Original(pair), library=False, rounds=0)
        report = verify_artifact(
            path, Broken(pair, where), inputs, unquantized=Broken(Original(pair), where), library=False, rounds=0
        )
        assert [warning.split(" are NaN")[0] for warning in report.warnings] == [f"{nan} of 64 values of output 'y'"]
    path = emit(tmp_path, Broken(pair, -2.0))
    with pytest.raises(VerificationError, match=r"NaN in the quantized PyTorch model$"):
        verify_artifact(path, Broken(pair, -2.0), inputs, library=False, rounds=0)


def test_what_fusing_changed_is_named(written: tuple[Path, Pair]) -> None:
    path, pair = written
    report = verify_artifact(path, pair, SAMPLES, unfused=pair, library=False, rounds=0)
    assert report.runs["stock"].deviations["y"].maximum < 1e-5

    def other(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, top = pair(x)
        return y * 1.001, top

    def flat(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, top = pair(x)
        return y.flatten(), top

    with pytest.raises(VerificationError, match=r"fusing operators changed output 'y' of .* by 0\.000999 .* 0\.0001"):
        verify_artifact(path, pair, SAMPLES, unfused=other, library=False, rounds=0)
    with pytest.raises(VerificationError, match=r"made output 'y' of .* \[5, 32\]; the quantized model's has \[160\]"):
        verify_artifact(path, pair, SAMPLES, unfused=flat, library=False, rounds=0)
