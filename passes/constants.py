"""Follows a value back through views to the parameter it is made of, without copying it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .attributes import get_attribute

_aten = torch.ops.aten

# The result equals the argument in value; only memory layout or autograd state differ.
_SAME_VALUE = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.contiguous.default,
    _aten.clone.default,
    _aten.lift_fresh_copy.default,
}
# A change of dtype or device; followed only when it changes neither.
_CASTS = {_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten._to_copy.default}


@dataclass(frozen=True)
class Constant:
    """A value made of one parameter by views.

    Attributes:
        target: attribute of the GraphModule that holds the parameter.
        tensor: the value; shares memory with the parameter.
    """

    target: str
    tensor: torch.Tensor


def resolve(gm: fx.GraphModule, value: object) -> Constant | None:
    """The constant a node stands for, or None if it depends on an input or is computed from parameters.

    An ``expand`` over leading dimensions (a weight repeated for a batched product) is taken as the unexpanded value.
    """
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        tensor = get_attribute(gm, str(value.target))
        return Constant(str(value.target), tensor) if isinstance(tensor, torch.Tensor) else None
    if value.op != "call_function" or not value.args:
        return None
    source = resolve(gm, value.args[0])
    if source is None:
        return None
    target: Any = value.target
    if target in _SAME_VALUE:
        return source
    if target in _CASTS:
        return source if _casts_to_itself(value, source.tensor) else None
    if target is _aten.expand.default:
        return _unexpanded(source, value)
    if not getattr(target, "is_view", False) or len(value.all_input_nodes) > 1:
        return None
    if _is_unexpanded(source, value.args[0]):
        return None  # the view's axes are those of the expanded value
    with torch.no_grad():
        viewed = target(source.tensor, *value.args[1:], **value.kwargs)
    if not isinstance(viewed, torch.Tensor):
        return None
    if memory_of(viewed)[0] != memory_of(source.tensor)[0]:
        return None
    return Constant(source.target, viewed)


def _is_unexpanded(source: Constant, value: object) -> bool:
    """Whether a constant has another shape than the value that it stands for."""
    whole = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(whole, torch.Tensor) and tuple(whole.shape) != tuple(source.tensor.shape)


def _casts_to_itself(cast: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether a cast changes neither dtype nor device: by the recorded values, else by doing it."""
    assert isinstance(cast.args[0], fx.Node)
    before, after = cast.args[0].meta.get("val"), cast.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        target: Any = cast.target
        before, after = tensor, target(tensor, *cast.args[1:], **cast.kwargs)
    return bool(before.dtype == after.dtype and before.device == after.device)


def memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Which storage a tensor lies in and where; tells tensors without data apart too (``meta`` device, freed memory)."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _unexpanded(source: Constant, value: fx.Node) -> Constant | None:
    """The constant before an ``expand`` that only repeats leading axes, those of size 1 taken off."""
    sizes = value.args[1]
    assert isinstance(sizes, (list, tuple))
    kept = list(sizes[len(sizes) - source.tensor.dim() :])
    tensor = source.tensor
    while tensor.dim() > 2 and tensor.shape[0] == 1:
        tensor, kept = tensor[0], kept[1:]
    if any(size not in (-1, have) for size, have in zip(kept, tensor.shape, strict=True)):
        return None
    return Constant(source.target, tensor)


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same elements in the same arrangement of the same memory."""
    arrangement = [(memory_of(t), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return arrangement[0] == arrangement[1]


def is_constant_expression(value: object) -> bool:
    """Whether a value depends on no input of the graph."""
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        if isinstance(node, fx.Node) and node not in seen:
            if node.op == "placeholder":
                return False
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return True
