"""emit_onnx: names, axes, layout of the files, determinism, tied weights, and what happens when writing fails."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from full_disk import files_limited_to
from onnx_models import OLD_PYTHON, run_elsewhere, stock_session
from quantized_layers import random_layer

import claq_export
from claq_export.emit import Artifact, emit_onnx
from claq_export.errors import CaptureError, OutputError
from claq_export.modules import ClaqLinear

AXES = {"input_ids": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"}}


class Encoder(torch.nn.Module):
    """Embedding, norm, a quantized and a dense layer, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(200, 48)
        self.norm = torch.nn.LayerNorm(48)
        self.up = ClaqLinear(random_layer(48, 96, (4, 2), outliers=0.01), torch.randn(96))
        self.down = ClaqLinear(random_layer(96, 48, (3,), seed=1))
        self.dense = torch.nn.Linear(48, 40)
        self.head = torch.nn.Linear(48, 200, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.norm(self.embed(input_ids)) * mask[..., None]
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        return self.head(hidden), self.dense(hidden).mean(1)


def inputs(batch: int, sequence: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + sequence)
    return {
        "input_ids": torch.randint(0, 200, (batch, sequence), generator=generator),
        "mask": torch.rand(batch, sequence, generator=generator).to(dtype),
    }


def emit(model: torch.nn.Module, path: Path, dtype: torch.dtype = torch.float32, **options: object) -> Artifact:
    settings = {"dynamic_shapes": AXES, "output_names": ["logits", "pooled"], **options}
    return emit_onnx(model, inputs(2, 5, dtype), path, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("artifact") / "model.onnx"
    return emit(Encoder().eval(), path, metadata={"claq.true_bits": "3.5", "claq.config": "{}"})


def assert_agrees(path: Path, model: torch.nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    session = stock_session(path)
    for batch, sequence in ((1, 1), (2, 5), (3, 17), (130, 1)):
        given = inputs(batch, sequence, dtype)
        with torch.no_grad():
            wanted = model(**given)
        got = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        for left, right in zip(got, wanted, strict=True):
            assert left.dtype == right.numpy().dtype
            assert np.abs(left - right.numpy()).max() <= tolerance * right.abs().max()


def test_stock_onnxruntime_agrees_at_every_size(artifact: Artifact) -> None:
    assert_agrees(artifact.path, Encoder().eval(), torch.float32, 1e-5)


def test_float16(tmp_path: Path) -> None:
    model = Encoder().eval().half()
    assert model.up.scale.dtype == torch.float16
    assert model.up.bias.dtype == torch.float16
    result = emit(model, tmp_path / "half.onnx", torch.float16)
    onnx.checker.check_model(str(result.path), full_check=True)
    assert_agrees(result.path, model, torch.float16, 5e-3)


def test_the_file_says_what_it_is(artifact: Artifact) -> None:
    onnx.checker.check_model(str(artifact.path), full_check=True)
    model = onnx.load(artifact.path, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18, "com.claq": 1}
    assert [(f.domain, f.name) for f in model.functions] == [("com.claq", "ClaqMatMul")]
    assert (model.producer_name, model.producer_version) == ("claq-export", claq_export.__version__)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"claq.true_bits": "3.5", "claq.config": "{}"}
    assert artifact.layers == ("up", "down")
    nodes = {node.name: node for node in model.graph.node if node.domain == "com.claq"}
    assert set(nodes) == {"up", "down"}
    attributes = {attribute.name: attribute.i for attribute in nodes["down"].attribute}
    assert attributes == {**random_layer(96, 48, (3,), seed=1).attributes(), "accuracy_level": 0}


def test_inputs_outputs_and_axes_have_the_given_names(artifact: Artifact) -> None:
    graph = onnx.load(artifact.path, load_external_data=False).graph

    def signature(values: object) -> dict[str, list[str | int]]:
        return {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in values  # type: ignore[attr-defined]
        }

    assert signature(graph.input) == {"input_ids": ["batch", "sequence"], "mask": ["batch", "sequence"]}
    assert signature(graph.output) == {"logits": ["batch", "sequence", 200], "pooled": ["batch", 40]}
    symbols = {dim for axes in signature(graph.value_info).values() for dim in axes if isinstance(dim, str)}
    assert symbols == {"batch", "sequence"}


def test_initializers_are_named_after_their_layers(artifact: Artifact) -> None:
    graph = onnx.load(artifact.path, load_external_data=False).graph
    names = {initializer.name for initializer in graph.initializer}
    for layer in ("up", "down"):
        for name in (
            "codes",
            "codebook",
            "scale",
            "row_scale",
            "order",
            "outlier_ptr",
            "outlier_index",
            "outlier_value",
        ):
            assert f"{layer}.{name}" in names
    assert {"up.bias", "down.bias", "norm.weight", "dense.bias", "dense.weight.transposed"} <= names


def test_a_small_linear_that_is_called_twice(tmp_path: Path) -> None:
    """Its transposed weight is folded once for each call."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = torch.nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.router(x) + self.router(x.relu()).exp()

    model, x = Twice(), torch.randn(2, 3, 16)
    path = tmp_path / "model.onnx"
    emit_onnx(model, {"x": x}, path)
    with torch.no_grad():
        expected = model(x)
    (found,) = stock_session(path).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_tied_weight_is_stored_once(artifact: Artifact) -> None:
    graph = onnx.load(artifact.path).graph
    large = [i for i in graph.initializer if np.prod(i.dims) == 200 * 48]
    assert len(large) == 1
    assert sum(large[0].name in node.input for node in graph.node) == 2


def test_layout_of_the_data_file(artifact: Artifact) -> None:
    assert artifact.files[0].name == "model.onnx"
    digest = hashlib.sha256(artifact.files[1].read_bytes()).hexdigest()[:16]
    assert artifact.files[1].name == f"model.onnx.{digest}.data"
    assert artifact.bytes == sum(path.stat().st_size for path in artifact.files)
    end = 0
    for initializer in onnx.load(artifact.path, load_external_data=False).graph.initializer:
        external = {entry.key: entry.value for entry in initializer.external_data}
        size = int(np.prod(initializer.dims)) * onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type).itemsize
        assert bool(external) == (size >= 1024)
        if external:
            assert external["location"] == artifact.files[1].name
            assert int(external["length"]) == size
            assert int(external["offset"]) % 64 == 0
            assert end <= int(external["offset"]) < end + 64
            end = int(external["offset"]) + size
    assert artifact.files[1].stat().st_size == end


def test_large_tensors_start_on_pages(tmp_path: Path) -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = torch.nn.Parameter(torch.randn(300))
            self.large = torch.nn.Parameter(torch.randn(1 << 18))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, None] * self.small + self.large[:300]

    path = emit_onnx(Table(), {"x": torch.randn(3)}, tmp_path / "table.onnx").path
    offsets = {
        initializer.name: int({entry.key: entry.value for entry in initializer.external_data}["offset"])
        for initializer in onnx.load(path, load_external_data=False).graph.initializer
        if initializer.external_data
    }
    assert offsets["large"] % 4096 == 0
    assert offsets["large"] > 0


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    layer = ClaqLinear(random_layer(8, 4))
    result = emit_onnx(layer, {"x": torch.randn(2, 8)}, tmp_path / "small.onnx", output_names=["y"])
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    assert result.files == (tmp_path / "small.onnx",)
    x = torch.randn(2, 8)
    (y,) = stock_session(result.path).run(["y"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x))


def test_moved_files_still_load(artifact: Artifact, tmp_path: Path) -> None:
    for path in artifact.files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert_agrees(tmp_path / "model.onnx", Encoder().eval(), torch.float32, 1e-5)


_EMIT_AGAIN = """
import sys
from pathlib import Path
from test_exporter import Encoder, emit
emit(Encoder().eval(), Path(sys.argv[1]), metadata={"claq.true_bits": "3.5", "claq.config": "{}"})
"""


def test_same_input_same_bytes_in_another_process(artifact: Artifact, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *(entry or "." for entry in sys.path)]),
        "PYTHONHASHSEED": "7",
    }
    command = [sys.executable, "-c", _EMIT_AGAIN, str(tmp_path / "model.onnx")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    for path in artifact.files:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_file_tells_nothing_about_the_machine(artifact: Artifact) -> None:
    content = artifact.path.read_bytes()
    for trace in (
        str(Path(__file__).parents[1]),
        str(artifact.path.parent),
        ".py",
        "stack_trace",
        "pkg.torch",
        "Traceback",
    ):
        assert trace.encode() not in content, trace


def test_graph_module_and_exported_program_give_the_same_file(artifact: Artifact, tmp_path: Path) -> None:
    model = Encoder().eval()
    dim = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dim, 1: dim} for name in AXES}
    program = torch.export.export(model, (), kwargs=inputs(2, 5), dynamic_shapes=shapes)
    for name, source in (("program", program), ("graph", program.module())):
        (tmp_path / name).mkdir()
        result = emit(source, tmp_path / name / "model.onnx", metadata={"claq.true_bits": "3.5", "claq.config": "{}"})
        assert result.files[1].read_bytes() == artifact.files[1].read_bytes(), name
        assert_agrees(result.path, model, torch.float32, 1e-5)


def test_named_dims_name_the_axes(tmp_path: Path) -> None:
    rows = torch.export.Dim("rows")
    path = emit_onnx(
        ClaqLinear(random_layer(8, 4)), {"x": torch.randn(2, 8)}, tmp_path / "m.onnx", dynamic_shapes={"x": {0: rows}}
    ).path
    graph = onnx.load(path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "rows"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "rows"


def test_a_layer_used_twice_is_stored_once(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ClaqLinear(random_layer(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x)))

    result = emit_onnx(Twice(), {"x": torch.randn(2, 32)}, tmp_path / "twice.onnx")
    assert result.layers == ("layer", "layer#2")
    names = [initializer.name for initializer in onnx.load(result.path).graph.initializer]
    assert names.count("layer.codes") == 1


@pytest.mark.skipif(OLD_PYTHON is None, reason="CLAQ_ORT120_PYTHON is not set")
def test_older_onnxruntime(artifact: Artifact, tmp_path: Path) -> None:
    for path in artifact.files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    given = inputs(3, 17)
    np.savez(tmp_path / "model.in.npz", **{name: tensor.numpy() for name, tensor in given.items()})
    assert OLD_PYTHON is not None
    assert run_elsewhere(OLD_PYTHON, tmp_path).startswith("1.20.")
    with torch.no_grad():
        wanted = Encoder().eval()(**given)
    with np.load(tmp_path / "model.out.npz") as outputs:
        for name, right in zip(("arr_0", "arr_1"), wanted, strict=True):
            assert np.abs(outputs[name] - right.numpy()).max() <= 1e-5 * right.abs().max()


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    with torch.library._scoped_library("claq_test", "DEF") as library:
        library.define("unknown(Tensor x) -> Tensor")
        library.impl("unknown", torch.clone, "CompositeExplicitAutograd")
        torch.library.register_fake("claq_test::unknown", torch.empty_like, lib=library)

        class Model(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.ops.claq_test.unknown(x)

        with pytest.raises(CaptureError, match=r"claq_test\.unknown"):
            emit_onnx(Model(), {"x": torch.randn(2)}, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_axis_that_cannot_be_dynamic_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"inputs\['x'\]\.shape\[0\]"):
        emit_onnx(
            ClaqLinear(random_layer(8, 4)),
            {"x": torch.randn(1, 8)},
            tmp_path / "m.onnx",
            dynamic_shapes={"x": {0: "n"}},
        )


def test_wrong_number_of_output_names(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="the graph has 1 outputs, got 2 names: a, b"):
        emit_onnx(
            ClaqLinear(random_layer(8, 4)), {"x": torch.randn(2, 8)}, tmp_path / "m.onnx", output_names=["a", "b"]
        )
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"), files_limited_to(4096):
        emit(Encoder().eval(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(OutputError, match="cannot write"), files_limited_to(4096):
        emit(Encoder().eval(), tmp_path / "model.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "model.onnx": b"old",
        "model.onnx.data": b"old",
    }


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    layer, example = ClaqLinear(random_layer(8, 4)), {"x": torch.randn(2, 8)}
    with pytest.raises(OutputError, match="no such folder"):
        emit_onnx(layer, example, tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        emit_onnx(layer, example, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
