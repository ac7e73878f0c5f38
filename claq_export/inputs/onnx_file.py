"""ONNX files read for inspection: the graph without its external data, and single tensors from there on demand."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from ..errors import ClaqError
from .paths import contained

GRAPH_LIMIT = (1 << 31) - 1
"""Bytes of a model file, the limit of the protobuf format."""

RANK_LIMIT = 64
_LARGEST = 1 << 62


class OnnxFile:
    """An ONNX model whose initializers are checked when they are read.

    Args:
        path: the ``.onnx`` file.
        error: raised for a damaged file.

    Raises:
        error: the file is missing, larger than :data:`GRAPH_LIMIT` or no ONNX model; an external tensor lies outside
            the model's folder, or its file is missing or ends before it.
    """

    def __init__(self, path: Path, error: type[ClaqError]) -> None:
        self.path = path
        self._error = error
        try:
            if path.stat().st_size > GRAPH_LIMIT:
                raise error(f"{path} has {path.stat().st_size} bytes; an ONNX graph has at most {GRAPH_LIMIT}")
            content = path.read_bytes()
        except FileNotFoundError:
            raise error(f"{path} does not exist") from None
        except OSError as problem:
            raise error(f"{path} cannot be read: {problem.strerror or problem}") from None
        try:
            self.model = onnx.load_model_from_string(content)
        except Exception as problem:  # protobuf's DecodeError is another class in each of its implementations
            raise error(f"{path} is not an ONNX model: {problem}") from None
        if not self.model.HasField("graph"):
            raise error(f"{path} is not an ONNX model: it has no graph")
        self._check_text()
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for tensor in self.initializers.values():
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                self._check_length(tensor)

    @property
    def metadata(self) -> dict[str, str]:
        """The file's ``metadata_props``."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """The initializer of that name.

        Raises:
            error: there is none, or its type, shape or bytes do not fit together.
        """
        tensor = self.initializers.get(name)
        if tensor is None:
            raise self._error(f"{self.path}: initializer {name!r} is missing")
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        except (KeyError, ValueError, TypeError):
            dtype = None
        shape = tuple(tensor.dims)
        if (
            dtype is None
            or dtype.hasobject
            or any(not 0 <= size < _LARGEST for size in shape)
            or len(shape) > RANK_LIMIT
        ):
            raise self._error(
                f"{self.path}: initializer {name!r} has type {tensor.data_type} and shape {list(shape)[:8]}"
            )
        wanted = math.prod(shape) * dtype.itemsize
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            try:
                return onnx.numpy_helper.to_array(tensor)
            except (ValueError, TypeError) as problem:
                raise self._error(f"{self.path}: initializer {name!r} is damaged: {problem}") from None
        path, offset, length = self._external(tensor)
        if length is not None and length != wanted:
            raise self._error(
                f"{self.path}: initializer {name!r} takes {length} external bytes, its shape {list(shape)} {wanted}"
            )
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if offset + wanted > size:
                    raise self._error(
                        f"{path} is truncated: initializer {name!r} ends at {offset + wanted}, the file at {size}"
                    )
                file.seek(offset)
                return np.frombuffer(file.read(wanted), dtype=dtype).reshape(shape)
        except OSError as problem:
            raise self._error(f"{path} cannot be read: {problem.strerror or problem}") from None

    def _check_text(self) -> None:
        """protobuf hands out text that is not UTF-8 as bytes, which nobody expects where a name should be."""
        graph = self.model.graph
        texts = [tensor.name for tensor in graph.initializer]
        texts += [text for entry in self.model.metadata_props for text in (entry.key, entry.value)]
        for node in graph.node:
            texts += [node.name, node.op_type, node.domain, *node.input]
            texts += [attribute.name for attribute in node.attribute]
        wrong: list[object] = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise self._error(f"{self.path} has a name that is not UTF-8 text: {str(wrong[0])[:80]}")

    def _check_length(self, tensor: onnx.TensorProto) -> None:
        path, offset, length = self._external(tensor)
        try:
            size = path.stat().st_size
        except OSError as problem:
            raise self._error(
                f"{path}, the data of {self.path}, cannot be read: {problem.strerror or problem}"
            ) from None
        if offset + (length or 0) > size:
            raise self._error(
                f"{path} is truncated: initializer {tensor.name[:200]!r} ends at {offset + (length or 0)}, the file at {size}"
            )

    def _external(self, tensor: onnx.TensorProto) -> tuple[Path, int, int | None]:
        """File, offset and length of external data, all believable."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        where = f"{self.path}: initializer {tensor.name[:200]!r}"
        path = contained(self.path.parent, entries.get("location"), self._error, where)
        numbers: list[int | None] = []
        for key in ("offset", "length"):
            text = entries.get(key)
            if text is not None and not (text.isascii() and text.isdigit() and len(text) < 19):
                raise self._error(f"{where}: external {key} is {text[:40]!r}, expected a number of bytes")
            numbers.append(None if text is None else int(text))
        return path, numbers[0] or 0, numbers[1]
