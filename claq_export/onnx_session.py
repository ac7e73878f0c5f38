"""Sessions of ONNX Runtime on the CPU, also for bfloat16 graphs, for which its CPU provider lacks most kernels.

Of such a graph a wide copy runs, made in memory: every operator without a kernel computes in float32 between casts, so that
each result is rounded to bfloat16 as in the graph itself; inputs and outputs are float32, because NumPy has no bfloat16.
Operators of claq and those that only move values stay in bfloat16. The file is not changed: it is meant for providers with
bfloat16 kernels (CUDA).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from .errors import ConfigError, ModelError

BFLOAT16_KERNELS = frozenset(
    (
        "Cast",
        "CastLike",
        "Concat",
        "Gather",
        "Identity",
        "Reshape",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
"""Operators that ONNX Runtime 1.31 runs in bfloat16 on the CPU (tried one by one) and that compute nothing."""

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
"""Setting of a session that is made from bytes: where the data files are."""


@contextmanager
def float32_arithmetic() -> Iterator[None]:
    """Sessions made inside run the library's operators in float32, whatever their ``accuracy_level``."""
    before = os.environ.get("CLAQ_ACCURACY")
    os.environ["CLAQ_ACCURACY"] = "fp32"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CLAQ_ACCURACY"]
        else:
            os.environ["CLAQ_ACCURACY"] = before


def check_threads(threads: int) -> None:
    """Refuse a number that ONNX Runtime would take for something else.

    Raises:
        ConfigError: it is negative.
    """
    if threads < 0:
        raise ConfigError(f"threads must be 0 (ONNX Runtime's choice) or a positive number, got {threads}")


def open_session(path: Path | str, library: Path | str | None = None, threads: int = 0) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        path: the model file.
        library: of custom operators to register; None = ONNX Runtime alone.
        threads: intra-op threads; 0 = ONNX Runtime's default.

    Raises:
        Exception: whatever ONNX Runtime raises; its exceptions share no other base class.
    """
    path = Path(path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    source: str | bytes = str(path)
    if uses_bfloat16(path):
        source = widened(onnx.load(str(path), load_external_data=False)).SerializeToString()
        options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent.resolve()))
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def load_session(path: Path | str, library: Path | str | None = None, threads: int = 0) -> ort.InferenceSession:
    """The same for a file that a user gave.

    Raises:
        ModelError: ONNX Runtime refuses it.
    """
    try:
        return open_session(path, library, threads)
    except Exception as error:  # onnxruntime's exception classes have no public common base
        raise ModelError(f"ONNX Runtime {ort.__version__} cannot load {str(path)!r}: {error}") from error


def uses_bfloat16(path: Path | str) -> bool:
    """Whether an ONNX file computes in bfloat16."""
    graph = onnx.load(str(path), load_external_data=False).graph
    types = {tensor.data_type for tensor in graph.initializer}
    types.update(value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info))
    return TensorProto.BFLOAT16 in types


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every operator that has no bfloat16 kernel on the CPU in float32, between casts.

    Args:
        model: without subgraphs that compute in bfloat16; external data may be absent.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    narrow = {value.name for value in (*inferred.input, *inferred.value_info, *inferred.output) if _is_bfloat16(value)}
    narrow |= {tensor.name for tensor in inferred.initializer if tensor.data_type == TensorProto.BFLOAT16}
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    del graph.node[:], graph.value_info[:]
    outside = {value.name for value in (*graph.input, *graph.output) if value.name in narrow}
    for value in (*graph.input, *graph.output):
        if value.name in outside:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    # Values that are float32 outside have their bfloat16 form under another name.
    inner = {name: f"{name}/bfloat16" if name in outside else name for name in narrow}
    for value in graph.input:
        if value.name in outside:
            graph.node.append(_cast(value.name, inner[value.name], TensorProto.BFLOAT16))
    widths: dict[str, str] = {}
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        keeps = node.domain not in ("", "ai.onnx") or node.op_type in BFLOAT16_KERNELS
        results = []
        for index, name in enumerate(node.input):
            if name in narrow and not keeps and name not in widths:
                widths[name] = f"{name}/float32"
                graph.node.append(_cast(inner[name], widths[name], TensorProto.FLOAT))
            if name in narrow:
                node.input[index] = inner[name] if keeps else widths[name]
        for index, name in enumerate(node.output):
            if name in narrow and keeps:
                node.output[index] = inner[name]
            elif name in narrow:
                node.output[index] = f"{name}/unrounded"
                results.append(_cast(node.output[index], inner[name], TensorProto.BFLOAT16))
        graph.node.append(node)
        graph.node.extend(results)
    for value in graph.output:
        if value.name in outside:
            graph.node.append(_cast(inner[value.name], value.name, TensorProto.FLOAT))
    return wide


def _is_bfloat16(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.BFLOAT16)


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=kind)
