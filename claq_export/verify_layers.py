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
from onnx import TensorProto, helper

from .emit.function import DOMAIN
from .errors import VerificationError
from .inputs import OnnxFile
from .onnx_session import EXTERNAL_FOLDER, float32_arithmetic

FOLDING_BYTES = 24
"""Bytes a weight that ONNX Runtime alone holds while it folds: words, bytes, indices, and the weight in four versions."""

WHOLE_UP_TO = 512 << 20
"""Bytes of folding up to which a file is run as a whole by ONNX Runtime alone."""

_ROWS = 3


def folding_bytes(model: onnx.ModelProto) -> int:
    """What ONNX Runtime alone holds at the worst moment of opening a file."""
    return FOLDING_BYTES * sum(
        _attribute(node, "in_features") * _attribute(node, "out_features")
        for node in model.graph.node
        if node.op_type == "ClaqMatMul"
    )


def layer_outputs(
    path: Path, library: Path
) -> Iterator[tuple[str, npt.NDArray[np.float32], npt.NDArray[np.float32], float]]:
    """Run each node of claq alone, in float32 arithmetic.

    Args:
        path: the model file.
        library: the native library.

    Yields:
        the node's name, its result by ONNX Runtime alone and by the library on the same random input, and the seconds that
        the first session took to be made.

    Raises:
        VerificationError: ONNX Runtime refuses a node; the message names it.
    """
    file = OnnxFile(path, VerificationError)
    random = np.random.default_rng(0)
    for node in file.model.graph.node:
        if node.domain != DOMAIN:
            continue
        model = _alone(file, node)
        if node.op_type == "ClaqGather":
            given: npt.NDArray[Any] = random.integers(0, _attribute(node, "out_features"), _ROWS)
        else:
            given = random.standard_normal((_ROWS, _attribute(node, "in_features")), np.float32)
        try:
            start = time.perf_counter()
            session = _session(model, path.parent, None)
            seconds = time.perf_counter() - start
            (stock,) = session.run(None, {node.input[0]: given})
            del session
            with float32_arithmetic():
                (native,) = _session(model, path.parent, library).run(None, {node.input[0]: given})
        except Exception as error:
            # ONNX Runtime's exceptions share no base class but Exception.
            raise VerificationError(
                f"ONNX Runtime {ort.__version__} refuses node {node.name!r} of {path}: {error}"
            ) from error
        yield node.name, stock, native, seconds


def _alone(file: OnnxFile, node: onnx.NodeProto) -> onnx.ModelProto:
    """A model of one node, with float32 activations and the file's tensors."""
    node_alone = onnx.NodeProto()
    node_alone.CopyFrom(node)
    kind = TensorProto.INT64 if node.op_type == "ClaqGather" else TensorProto.FLOAT
    initializers = []
    for position, name in enumerate(node.input):
        last = position == len(node.input) - 1
        if last and (node.op_type == "ClaqGather" or name not in file.initializers):
            # What says the type of rows, or a bias that is computed: none here.
            node_alone.input[position] = "empty"
            initializers.append(helper.make_tensor("empty", TensorProto.FLOAT, [0], []))
        elif position:
            if name not in file.initializers:
                raise VerificationError(
                    f"input {name!r} of node {node.name!r} of {file.path} is not stored in the file"
                )
            initializers.append(file.initializers[name])
    graph = helper.make_graph(
        [node_alone],
        "layer",
        [
            helper.make_tensor_value_info(
                node.input[0], kind, [_ROWS, "features"][: 1 if kind == TensorProto.INT64 else 2]
            )
        ],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
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
