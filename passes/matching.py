"""What the fusing passes share: steps of a pattern that fail with a reason."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .base import PassResult

_aten = torch.ops.aten
_CASTS = {_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten._to_copy.default}
_COPIES = {_aten.contiguous.default, _aten.clone.default, _aten.alias.default}
RESHAPES = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
"""Of a graph with in-place operators, which is functionalized, a reshape is an ``_unsafe_view`` of a clone."""
_SPLITS = {_aten.view.default, _aten.reshape.default, _aten.unflatten.int}


class Mismatch(Exception):
    """A pattern does not fit here; the message is the reason that a pass notes down."""


def rewrite_each(
    gm: fx.GraphModule, rewrites: Mapping[Any, Callable[[fx.Graph, fx.Node], None]], what: str
) -> PassResult:
    """Rewrite every call of some operators, each or leave it with a note.

    Args:
        gm: the graph.
        rewrites: operator -> what rewrites a call of it, or raises :class:`Mismatch`.
        what: the rewritten things, for the note that counts them.
    """
    notes: list[str] = []
    done = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in rewrites:
            continue
        try:
            rewrites[node.target](gm.graph, node)
            done += 1
        except Mismatch as reason:
            notes.append(f"{node.name} left: {reason}")
    if done:
        gm.graph.eliminate_dead_code()
        notes.append(f"{done} {what}")
    return PassResult(gm, bool(done), tuple(notes))


def operand(node: fx.Node, index: int, target: Any, reason: str) -> fx.Node:
    """Argument ``index`` of a node, which must be a call of ``target`` (of anything for None).

    Raises:
        Mismatch: it is not; the message is ``reason``.
    """
    value = node.args[index] if len(node.args) > index else None
    if not isinstance(value, fx.Node) or (target is not None and value.target is not target):
        raise Mismatch(reason)
    return value


def only_user(node: fx.Node) -> fx.Node:
    """The one node that reads a node's value.

    Raises:
        Mismatch: there are more, or none.
    """
    if len(node.users) != 1:
        raise Mismatch(f"{node.name} is used {len(node.users)} times")
    return next(iter(node.users))


def shape_of(node: object) -> tuple[Any, ...]:
    """Sizes of a node's value, numbers or symbols.

    Raises:
        Mismatch: they are not known.
    """
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        raise Mismatch(f"the shape of {node} is not known")
    return tuple(value.shape)


def same_sizes(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether sizes are the same numbers or the same symbols. Symbols that are merely of one size in the example are not."""
    return list(map(str, first)) == list(map(str, second))


def known_size(node: fx.Node, axis: int) -> int:
    """Size of an axis.

    Raises:
        Mismatch: it is not a number.
    """
    size = shape_of(node)[axis]
    if not isinstance(size, int):
        raise Mismatch(f"axis {axis} of {node.name} has no fixed size")
    return size


def skip_casts(node: fx.Node) -> fx.Node:
    """What a node is a cast of, through any number of casts."""
    while node.op == "call_function" and node.target in _CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def skip_copies(node: fx.Node) -> fx.Node:
    """What a node is a copy of, through any number of copies and slices of everything."""
    while node.op == "call_function" and isinstance(node.args[0], fx.Node):
        if node.target not in _COPIES and not (node.target is _aten.slice.Tensor and whole_slice(node)):
            break
        node = node.args[0]
    return node


def slice_bounds(node: fx.Node) -> tuple[int, Any, Any, int]:
    """``(axis, start, end, step)`` of an ``aten.slice`` node with its defaults; the axis counts from the front."""
    given: list[Any] = [0, None, None, 1]
    given[: len(node.args) - 1] = node.args[1:]
    axis, start, end, step = given
    rank = len(shape_of(node))
    assert isinstance(axis, int)
    assert isinstance(step, int)
    return axis % rank, start or 0, sys.maxsize if end is None else end, step


def whole_slice(node: fx.Node) -> bool:
    """Whether an ``aten.slice`` node takes everything."""
    _, start, end, step = slice_bounds(node)
    return start == 0 and end == sys.maxsize and step == 1


def is_transpose(node: object, first: int, second: int) -> bool:
    """Whether a node exchanges two axes of a value of four."""
    if not isinstance(node, fx.Node) or node.target is not _aten.transpose.int:
        return False
    axes = {axis % 4 for axis in node.args[1:] if isinstance(axis, int)}
    return axes == {first, second} and len(shape_of(node)) == 4


def heads_last(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``[batch, sequence, heads * size]`` of a value ``[batch, heads, sequence, size]``: what it was a view of, or a
    transpose and a reshape in front of where the graph inserts. A view that divides sequences too (windows) is none."""
    if is_transpose(node, 1, 2) and isinstance(node.args[0], fx.Node):
        split = skip_copies(node.args[0])
    else:
        split = graph.call_function(_aten.transpose.int, (node, 1, 2))
        split.meta["val"] = node.meta["val"].transpose(1, 2)
    if split.target in _SPLITS and isinstance(split.args[0], fx.Node):
        whole = split.args[0]
        *leading, heads, size = shape_of(split)
        if same_sizes(shape_of(whole), (*leading, heads * size)):
            return whole
    flat = graph.call_function(_aten.flatten.using_ints, (split, 2, 3))
    flat.meta["val"] = split.meta["val"].flatten(2, 3)
    return flat


def heads_first(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """``[batch, heads, sequence, size]`` of a value ``[batch, sequence, heads * size]``."""
    value = node.meta["val"]
    split = graph.call_function(_aten.unflatten.int, (node, -1, [heads, -1]))
    split.meta["val"] = value.unflatten(-1, (heads, -1))
    turned = graph.call_function(_aten.transpose.int, (split, 1, 2))
    turned.meta["val"] = split.meta["val"].transpose(1, 2)
    return turned
