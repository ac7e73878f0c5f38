"""The bytes of ``model.onnx`` and its data file: layout of external tensors, deterministic serialization.

The data file is called ``model.onnx.<digest of its content>.data``. A model file therefore never finds the data of
another export under the name it refers to, whatever moment an export over an existing artifact dies at: until the
model file is replaced, in one step, the old pair is whole, and from then on the new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
import torch

from claq_export.deferred import is_deferred, materialize
from claq_export.format.files import StagedFiles, open_for_weights

from .artifact import DIGEST_CHARACTERS, SharedData, data_files

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


def _write_external(model: ir.Model, names: Sequence[str], data: BinaryIO) -> tuple[dict[str, int], str]:
    """Write initializers to ``data``; returns the offset of each and the digest of all."""
    offset = 0
    offsets: dict[str, int] = {}
    digest = hashlib.sha256()
    for name in names:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        start = _place(offset, tensor.nbytes)
        for content in (b"\0" * (start - offset), _content(tensor)):
            data.write(content)
            digest.update(content)
        offset = start + tensor.nbytes
        offsets[name] = start
    return offsets, digest.hexdigest()[:DIGEST_CHARACTERS]


def _content(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """A tensor's bytes, without a second copy where PyTorch holds or has just read it."""
    raw = getattr(tensor, "raw", None)
    if is_deferred(raw):
        assert isinstance(raw, torch.Tensor)
        values = materialize(raw).contiguous()
        return memoryview(values.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return tensor.tobytes()


def _refer_to(model: ir.Model, places: Mapping[str, tuple[str, int]]) -> None:
    for name, (data_name, start) in places.items():
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            location=data_name,
            offset=start,
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
        )


def write_model(
    model: ir.Model, functions: list[onnx.FunctionProto], path: Path, shared: SharedData | None = None
) -> list[Path]:
    """Write ``model`` to ``path`` and its large tensors beside it; ``model`` refers to the data file afterwards.

    Data files of earlier exports to ``path`` are deleted last.

    Args:
        model: the graph, its initializers in memory.
        functions: model-local functions to add; their domains are imported if the graph does not use them.
        path: the ``.onnx`` file.
        shared: what data files of other models in the folder hold; it is referred to, and the rest of this one's is added.

    Returns:
        the files written: the model, then its data file unless all tensors are small or shared.

    Raises:
        OutputError: the files cannot be written; nothing is left behind then.
    """
    data_path = None
    external = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= INLINE_BELOW
    }
    digests: dict[str, bytes] = {}
    if shared is not None:
        digests = {name: hashlib.sha256(_content(tensor)).digest() for name, tensor in external.items()}
    places = {name: shared[digest] for name, digest in digests.items() if shared is not None and digest in shared}
    own = [name for name in external if name not in places]
    with StagedFiles(path.parent) as files:
        if own:
            staged = files.stage(f"{path.name}.data")
            with open_for_weights(staged) as data:
                offsets, digest = _write_external(model, own, data)
            data_path = files.rename(staged, f"{path.name}.{digest}.data")
            places |= {name: (data_path.name, start) for name, start in offsets.items()}
            if shared is not None:
                shared.update({digests[name]: places[name] for name in own})
        _refer_to(model, places)
        proto = ir.serde.serialize_model(model)
        imported = {entry.domain for entry in proto.opset_import}
        for function in functions:
            proto.functions.append(function)
            if function.domain not in imported:
                proto.opset_import.append(onnx.helper.make_opsetid(function.domain, 1))
                imported.add(function.domain)
        files.stage(path.name).write_bytes(proto.SerializeToString(deterministic=True))
    for earlier in data_files(path):
        if earlier != data_path:
            earlier.unlink(missing_ok=True)
    return [path] if data_path is None else [path, data_path]
