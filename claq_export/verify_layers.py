"""The functions inside a large file, layer by layer, against the native library.

ONNX Runtime alone folds every layer to a dense matrix when it opens a file, and holds all steps on the way there until it is
done: many times the model. Of a large model the library runs the whole file therefore, and what is left to show is that each
layer's function of standard operators computes what the library computes on the very tensors of the file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from .emit.function import DOMAIN, LAYER_OPERATORS, PRODUCTS
from .emit.translation import ATTRIBUTES, INPUTS
from .errors import VerificationError
from .inputs import OnnxFile
from .onnx_session import EXTERNAL_FOLDER, float32_arithmetic
from .process_memory import trim_freed_memory

FOLDING_BYTES = 24
"""Bytes a weight that ONNX Runtime alone holds while it folds: words, bytes, indices, and the weight in four versions."""

WHOLE_UP_TO = 512 << 20
"""Bytes of folding up to which a file is run as a whole by ONNX Runtime alone."""

PART_BYTES = 128 << 20
"""The same from which a layer's outputs are run in parts: a vocabulary's would be as large as a small model."""

_ROWS = 3


def folding_bytes(model: onnx.ModelProto) -> int:
    """What ONNX Runtime alone holds at the worst moment of opening a file."""
    return FOLDING_BYTES * sum(
        _attribute(node, "in_features") * _attribute(node, "out_features")
        for node in model.graph.node
        if node.domain == DOMAIN and node.op_type in PRODUCTS
    )


def layer_outputs(
    path: Path, library: Path
) -> Iterator[tuple[str, npt.NDArray[np.float32], npt.NDArray[np.float32], float]]:
    """Run each node that holds a layer alone, in float32 arithmetic; a large one as several, each with a part of its outputs.

    Args:
        path: the model file.
        library: the native library.

    Yields:
        the node's name, its result (or a part) by ONNX Runtime alone and by the library on the same random input, and the
        seconds that the first session took to be made.

    Raises:
        VerificationError: ONNX Runtime refuses a node; the message names it.
    """
    file = OnnxFile(path, VerificationError)
    random = np.random.default_rng(0)
    for node in file.model.graph.node:
        if node.domain != DOMAIN or node.op_type not in LAYER_OPERATORS:
            continue
        given = _random_inputs(node, random)
        for outputs in _parts(node):
            model = _alone(file, node, outputs)
            feeds = {value.name: given[value.name] for value in model.graph.input}
            try:
                start = time.perf_counter()
                session = _session(model, path.parent, None)
                seconds = time.perf_counter() - start
                stock = _flat(session.run(None, feeds))
                del session
                with float32_arithmetic():
                    native = _flat(_session(model, path.parent, library).run(None, feeds))
            except Exception as error:
                # ONNX Runtime's exceptions share no base class but Exception.
                raise VerificationError(
                    f"ONNX Runtime {ort.__version__} refuses node {node.name!r} of {path}: {error}"
                ) from error
            yield node.name, stock, native, seconds
        trim_freed_memory()  # a graph that is folded leaves holes between what stays


def _random_inputs(node: onnx.NodeProto, random: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """Values for all inputs of a node that the graph may compute, by their names: a batch of one, or indices."""
    if node.op_type == "ClaqGather":
        return {node.input[0]: random.integers(0, _attribute(node, "out_features"), _ROWS)}
    shapes = {0: (_ROWS, _attribute(node, "in_features"))}
    if node.op_type in ("ClaqMatMulAdd", "ClaqMatMulAddNorm"):
        shapes[len(INPUTS)] = (_ROWS, _attribute(node, "out_features"))
    if node.op_type == "ClaqMatMulRotary":
        rotated = _attribute(node, "rotary_dim") or _attribute(node, "split_0") // _attribute(node, "heads_0")
        shapes |= dict.fromkeys((len(INPUTS), len(INPUTS) + 1), (_ROWS, rotated // 2))
    return {node.input[at]: random.standard_normal((1, *shape), np.float32) for at, shape in shapes.items()}


def _flat(results: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """The results of a node side by side, a row for each of its input."""
    return np.concatenate([result.reshape(_ROWS, result.shape[-1]) for result in results], -1)


def _parts(node: onnx.NodeProto) -> list[range]:
    """The outputs of a node that are run together; a lookup decodes the rows alone that are asked for."""
    out_features = _attribute(node, "out_features")
    most = max(1, PART_BYTES // (FOLDING_BYTES * _attribute(node, "in_features")))
    if node.op_type == "ClaqGather" or out_features <= most:
        return [range(out_features)]
    return [range(first, min(first + most, out_features)) for first in range(0, out_features, most)]


def _part(file: OnnxFile, node: onnx.NodeProto, outputs: range) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """Some outputs of the product of a node, as a ``ClaqMatMul``, and its tensors."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute if attribute.name in ATTRIBUTES}
    own = helper.make_node(
        "ClaqMatMul",
        node.input[: len(INPUTS)],
        node.output[:1],
        node.name,
        domain=DOMAIN,
        **{**attributes, "out_features": len(outputs)},
    )
    names = dict(zip(INPUTS, own.input, strict=True))
    rows = slice(outputs.start, outputs.stop)
    values: dict[str, npt.NDArray[Any]] = {
        part: file.read(name) for part, name in names.items() if name in file.initializers
    }
    values["codes"], values["row_scale"] = values["codes"][:, rows], values["row_scale"][rows]
    pointers = values["outlier_ptr"]
    if len(pointers):
        entries = slice(int(pointers[outputs.start]), int(pointers[outputs.stop]))
        any_left = entries.start < entries.stop
        values["outlier_ptr"] = (
            pointers[outputs.start : outputs.stop + 1] - pointers[outputs.start] if any_left else pointers[:0]
        )
        for part in ("outlier_index", "outlier_value"):
            values[part] = values[part][entries]
    if len(values.get("bias", ())):
        values["bias"] = values["bias"][rows]
    # Of the node's own: the file's names stand for the whole tensors.
    for position, part in enumerate(INPUTS):
        if part in values:
            own.input[position] = part
    return own, [numpy_helper.from_array(np.ascontiguousarray(value), part) for part, value in values.items()]


def _alone(file: OnnxFile, node: onnx.NodeProto, outputs: range) -> onnx.ModelProto:
    """A model of one node, or of some of its outputs, with float32 activations and the file's tensors."""
    stored = file.initializers
    if len(outputs) < _attribute(node, "out_features"):
        node, own = _part(file, node, outputs)
        stored = {tensor.name: tensor for tensor in own}
    node_alone = onnx.NodeProto()
    node_alone.CopyFrom(node)
    kind = TensorProto.INT64 if node.op_type == "ClaqGather" else TensorProto.FLOAT
    initializers, fed = [], []
    for position, name in enumerate(node.input):
        last = position == len(INPUTS) - 1
        if position == 0 or (position >= len(INPUTS) and name not in stored):
            fed.append(name)
        elif last and (node.op_type == "ClaqGather" or name not in stored):
            # What says the type of rows, or a bias that is computed: none here.
            node_alone.input[position] = "empty"
            initializers.append(helper.make_tensor("empty", TensorProto.FLOAT, [0], []))
        elif name not in stored:
            raise VerificationError(f"input {name!r} of node {node.name!r} of {file.path} is not stored in the file")
        else:
            initializers.append(stored[name])
    graph = helper.make_graph(
        [node_alone],
        "layer",
        [helper.make_tensor_value_info(name, kind, None) for name in fed],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output],
        # The same tensor may stand at two places, as zero-length ones do.
        list({tensor.name: tensor for tensor in initializers}.values()),
    )
    whole = file.model
    return helper.make_model(
        graph, functions=whole.functions, opset_imports=whole.opset_import, ir_version=whole.ir_version
    )


def _session(model: onnx.ModelProto, folder: Path, library: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # an arena keeps what folding took
    options.add_session_config_entry(EXTERNAL_FOLDER, str(folder.resolve()))
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return int(next(attribute.i for attribute in node.attribute if attribute.name == name))
