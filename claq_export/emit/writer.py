"""The bytes of ``model.onnx`` and ``model.onnx.data``: layout of external tensors, deterministic serialization."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from claq_export.format.files import StagedFiles

INLINE_BELOW = 1024
"""Tensors smaller than this many bytes stay inside ``model.onnx``."""

ALIGNMENT = 64
"""Offset of every external tensor: a cache line, so that vector loads of mapped memory are aligned."""

PAGE = 4096
"""Offset of external tensors of :data:`PAGE_ALIGNED_FROM` bytes and more, as the ONNX standard advises for mapping."""

PAGE_ALIGNED_FROM = 1 << 20


def _place(offset: int, size: int) -> int:
    unit = PAGE if size >= PAGE_ALIGNED_FROM else ALIGNMENT
    return -(-offset // unit) * unit


def _write_external(model: ir.Model, data_name: str, data: BinaryIO) -> None:
    """Write the large initializers to ``data`` and let the model refer to them."""
    offset = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < INLINE_BELOW:
            continue
        start = _place(offset, tensor.nbytes)
        data.write(b"\0" * (start - offset))
        data.write(tensor.tobytes())
        offset = start + tensor.nbytes
        value.const_value = ir.ExternalTensor(
            location=data_name,
            offset=start,
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
        )


def write_model(model: ir.Model, functions: list[onnx.FunctionProto], path: Path) -> list[Path]:
    """Write ``model`` to ``path`` and its large tensors to ``<path>.data``; ``model`` refers to that file afterwards.

    Args:
        model: the graph, its initializers in memory.
        functions: model-local functions to add; their domains are imported if the graph does not use them.
        path: the ``.onnx`` file.

    Returns:
        the files written: the model, then its data file unless all tensors are small.

    Raises:
        OutputError: the files cannot be written; nothing is left behind then.
    """
    data_path = path.with_name(path.name + ".data")
    external = any(
        value.const_value is not None and value.const_value.nbytes >= INLINE_BELOW
        for value in model.graph.initializers.values()
    )
    with StagedFiles(path.parent) as files:
        if external:
            with files.stage(data_path.name).open("wb") as data:
                _write_external(model, data_path.name, data)
        proto = ir.serde.serialize_model(model)
        imported = {entry.domain for entry in proto.opset_import}
        for function in functions:
            proto.functions.append(function)
            if function.domain not in imported:
                proto.opset_import.append(onnx.helper.make_opsetid(function.domain, 1))
                imported.add(function.domain)
        files.stage(path.name).write_bytes(proto.SerializeToString(deterministic=True))
    return [path, data_path] if external else [path]
