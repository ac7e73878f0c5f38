"""Tensors that are not in memory: stand-ins with shape, dtype and layout, whose values are read when they are needed.

A model larger than memory goes through the compiler as a graph whose large tensors are stand-ins. A stand-in is an
ordinary CPU tensor with few stored elements (stride 0 along the last axis), so ``torch.export``, views and transposes
treat it as any weight, also one matrix of a stack of them, as mixtures of experts have; :func:`materialize` reads the values.
Whoever would copy a tensor's values asks :func:`is_deferred` first.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from .format.layer import QuantizedLinear

DEFER_FROM = 1 << 18
"""Bytes from which a tensor is worth a stand-in; smaller ones are simply read. It must be far above what the exporter
folds or merges by value (1024 elements)."""

Load = Callable[[], torch.Tensor]
LoadMatrix = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class _Source:
    """What a stand-in stands for: its shape and strides, and what reads it, or one matrix of a stack."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    load: Load
    load_matrix: LoadMatrix


_loads: dict[int, _Source] = {}


def stand_in(
    shape: Sequence[int], dtype: torch.dtype, load: Load, load_matrix: LoadMatrix | None = None
) -> torch.Tensor:
    """A tensor of that shape and dtype without its values.

    Args:
        shape, dtype: of what ``load`` returns.
        load: reads the values; called at each :func:`materialize`.
        load_matrix: of a tensor of three axes: reads the matrix of that index alone.
    """
    shape = tuple(shape)
    if len(shape) == 3:
        # Matrices are two elements apart, their rows one: each matrix has a place of its own, and looks other than its
        # transpose and than a cut along another axis.
        tensor = torch.zeros(2 * shape[0] + shape[1], dtype=dtype).as_strided(shape, (2, 1, 0))
    else:
        stored = torch.zeros(shape[:1] + (1,) * (len(shape) - 1), dtype=dtype)
        tensor = stored.expand(shape) if len(shape) > 1 else stored[:1].expand(shape)
    key = _key(tensor)
    _loads[key] = _Source(shape, tensor.stride(), load, load_matrix or (lambda index: load()[index]))
    weakref.finalize(tensor.untyped_storage(), _loads.pop, key, None)
    return tensor


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def is_deferred(tensor: object) -> bool:
    """Whether a tensor is a stand-in, or a view of one."""
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and tensor.device.type == "cpu"
        and _key(tensor) in _loads
    )


def materialize(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a stand-in (read anew at each call), of the transpose of one, or of a matrix of a stack or its transpose;
    other tensors as they are.

    Raises:
        RuntimeError: the tensor is another kind of view.
        ClaqError: the values cannot be read.
    """
    if not is_deferred(tensor):
        return tensor
    source = _loads[_key(tensor)]
    layout = (tuple(tensor.shape), tensor.stride())
    if layout == (source.shape, source.stride):
        return source.load()
    if tensor.dim() == 2:
        shape, stride = source.shape[-2:], source.stride[-2:]
        index = tensor.storage_offset() // 2
        turned = layout == (shape[::-1], stride[::-1])
        if turned and len(source.shape) == 2:
            return source.load().T
        if (turned or layout == (shape, stride)) and len(source.shape) == 3 and index < source.shape[0]:
            matrix = source.load_matrix(index)
            return matrix.T if turned else matrix
    raise RuntimeError(
        f"a stand-in of shape {list(source.shape)} was viewed as {list(tensor.shape)}; claq cannot follow that"
    )


class ReadingInterpreter(fx.Interpreter):
    """Runs a graph whose weights may be stand-ins: each is read for the operator that takes it, and let go of after it."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        found = super().fetch_args_kwargs_from_env(n)
        return fx.node.map_aggregate(found, materialize)  # type: ignore[arg-type, return-value]


def concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """``torch.cat`` along the first axis; a stand-in if one of the tensors is."""
    if not any(is_deferred(tensor) for tensor in tensors):
        return torch.cat(list(tensors))
    # Stand-ins are kept alive by what they are loaded for, not by the graph, which drops the parts.
    parts = [tensor.detach() for tensor in tensors]
    rows = sum(part.shape[0] for part in parts)

    def load() -> torch.Tensor:
        whole = torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype)
        start = 0
        for part in parts:
            whole[start : start + part.shape[0]] = materialize(part)
            start += part.shape[0]
        return whole

    return stand_in((rows, *parts[0].shape[1:]), parts[0].dtype, load)


def cast_tensors(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors by name, floating-point ones cast; names of one tensor share the cast one, stand-ins stay stand-ins."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            key = (_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            if key not in made:
                made[key] = _cast(tensor.detach(), dtype)
            tensor = made[key]
        result[name] = tensor
    return result


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not is_deferred(tensor):
        return tensor.to(dtype)
    return stand_in(
        tensor.shape,
        dtype,
        lambda: materialize(tensor).to(dtype),
        lambda index: materialize(tensor[index]).to(dtype),
    )


def logical_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, in memory or not."""
    return math.prod(tensor.shape) * tensor.element_size()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones once."""
    seen: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = logical_bytes(tensor) if is_deferred(tensor) else storage.nbytes()
    return sum(seen.values())


def defer_layer(layer: QuantizedLinear, read: Callable[[str], torch.Tensor]) -> QuantizedLinear:
    """A layer whose large tensors are stand-ins; ``read`` gives each by its name."""
    deferred: dict[str, Any] = {
        name: stand_in(tensor.shape, tensor.dtype, partial(read, name))
        for name, tensor in layer.tensors().items()
        if logical_bytes(tensor) >= DEFER_FROM
    }
    return replace(layer, **deferred)


def materialize_layer(layer: QuantizedLinear) -> QuantizedLinear:
    """The layer with all its values."""
    tensors: dict[str, Any] = {name: materialize(tensor) for name, tensor in layer.tensors().items()}
    return replace(layer, **tensors)
