"""Lets a quantized linear do to its own result what else would take operators of their own: split, turn, gate, add,
normalize."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx

from ..kernels import decoder_ops, fused_ops, ops
from .base import Pass, PassContext, PassResult
from .matching import Mismatch, same_sizes, shape_of, slice_bounds

_aten = torch.ops.aten
_MOST_PARTS = 3


class FuseEpilogues(Pass):
    """Rewrites a ``claq::linear`` whose result has one use, of three kinds.

    - ``silu(gate) * up``, where ``gate`` and ``up`` are its two halves: ``claq::linear_swiglu``;
    - two or three parts side by side (``split``, ``chunk`` or slices that cover it): ``claq::linear_split``; if ``claq::rotary``
      turns the first two of three by the same angles, and nothing else reads them, ``claq::linear_rotary``;
    - an addition of a value of the same shape: ``claq::linear_add``; if the sum is normalized by ``claq::rms_norm`` (and read
      elsewhere or not), ``claq::linear_add_norm``.

    A row of a decoder passes so many small operators that running them, not their arithmetic, is what takes time.
    """

    name = "fuse_epilogues"
    doc = "Lets quantized linears split, turn, gate, add to or normalize their own results."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        counts: dict[str, int] = {}
        for linear in list(gm.graph.nodes):
            if linear.target is not ops.linear:
                continue
            for fuse in (_split, _add):
                try:
                    done = fuse(gm.graph, linear)
                except Mismatch:
                    continue
                counts[done] = counts.get(done, 0) + 1
                break
        if counts:
            gm.graph.eliminate_dead_code()
        notes = tuple(f"{count} {name}" for name, count in sorted(counts.items()))
        return PassResult(gm, bool(counts), notes)


def _split(graph: fx.Graph, linear: fx.Node) -> str:
    """Split the result, and gate its halves if that is what they are for."""
    parts = _parts(linear)
    sizes = [size for size, _ in parts]
    halves = [uses[0] if len(uses) == 1 else None for _, uses in parts]
    product = _gated(*halves) if len(parts) == 2 and sizes[0] == sizes[1] else None
    if product is not None:
        with graph.inserting_before(linear):
            call = graph.call_function(fused_ops.linear_swiglu, linear.args)
        call.meta = dict(product.meta)
        product.replace_all_uses_with(call)
        return "linear_swiglu"
    sizes += [0] * (_MOST_PARTS - len(sizes))
    value = linear.meta["val"]
    turned = _turned(linear, [uses for _, uses in parts])
    with graph.inserting_before(linear):
        if turned:
            angles, heads = turned[0].args[1:3], [node.args[3] for node in turned]
            call = graph.call_function(fused_ops.linear_rotary, (*linear.args, sizes, *angles, *heads))
        else:
            call = graph.call_function(fused_ops.linear_split, (*linear.args, sizes))
        call.meta["val"] = tuple(value.new_empty((*value.shape[:-1], size)) for size in sizes)
        for index, (_, uses) in enumerate(parts):
            piece = graph.call_function(operator.getitem, (call, index))
            piece.meta["val"] = call.meta["val"][index]
            for use in [turned[index]] if index < len(turned) else uses:
                use.replace_all_uses_with(piece)
    return "linear_rotary" if turned else "linear_split"


def _turned(linear: fx.Node, parts: list[list[fx.Node]]) -> list[fx.Node]:
    """The nodes that turn the first two of three parts, by angles that are known where the product is made; else none."""
    if len(parts) != _MOST_PARTS or any(len(uses) != 1 or len(uses[0].users) != 1 for uses in parts[:2]):
        return []
    first, second = (next(iter(uses[0].users)) for uses in parts[:2])
    if (
        first.target is not decoder_ops.rotary
        or second.target is not decoder_ops.rotary
        or first.args[1:3] != second.args[1:3]
    ):
        return []
    order = {node: index for index, node in enumerate(linear.graph.nodes)}
    if any(order[angle] > order[linear] for angle in first.args[1:3] if isinstance(angle, fx.Node)):
        return []
    return [first, second]


def _parts(linear: fx.Node) -> list[tuple[int, list[fx.Node]]]:
    """Sizes of the parts that a result is split into, and the nodes that take each.

    Raises:
        Mismatch: it is not split into two or three, or read as a whole too.
    """
    shape = shape_of(linear)
    users = list(linear.users)
    bounds: dict[tuple[int, int], list[fx.Node]] = {}
    if len(users) == 1 and users[0].target in (_aten.split_with_sizes.default, _aten.split.Tensor, _aten.chunk.default):
        pieces = [node for node in users[0].users if node.target is operator.getitem]
        if len(pieces) != len(users[0].users) or not _last_axis(users[0], 2, len(shape)):
            raise Mismatch("it is not split at its last axis")
        sizes = [_fixed(value.shape[-1]) for value in _values(users[0])]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        bounds = {(start, start + size): [] for start, size in zip(starts, sizes, strict=True)}
        for node in pieces:
            index: Any = node.args[1]
            bounds[starts[index], starts[index] + sizes[index]].append(node)
    else:
        for node in users:
            if node.target is not _aten.slice.Tensor:
                raise Mismatch("its result is not split")
            axis, start, end, step = slice_bounds(node)
            if axis != len(shape) - 1 or step != 1 or not isinstance(start, int) or not isinstance(end, int):
                raise Mismatch("its result is not cut into parts of its last axis")
            width = _fixed(shape[-1])
            end = width if end == sys.maxsize else end
            bounds.setdefault((start % width, end if end >= 0 else end + width), []).append(node)
    ordered = sorted(bounds)
    ends = [0, *(end for _, end in ordered)]
    if not 2 <= len(ordered) <= _MOST_PARTS or ends[:-1] != [start for start, _ in ordered] or ends[-1] != shape[-1]:
        raise Mismatch("the parts do not cover its result")
    return [(end - start, bounds[start, end]) for start, end in ordered]


def _values(split: fx.Node) -> list[Any]:
    """What a split gives, from the numbers of the node where it has not been run."""
    value = split.meta.get("val")
    if isinstance(value, (list, tuple)):
        return list(value)
    source: Any = split.args[0]
    return list(split.target(source.meta["val"], *split.args[1:]))  # type: ignore[operator]


def _last_axis(node: fx.Node, position: int, rank: int) -> bool:
    axis = node.args[position] if len(node.args) > position else 0
    return isinstance(axis, int) and axis % rank == rank - 1


def _fixed(size: Any) -> int:
    if not isinstance(size, int):
        raise Mismatch("a part has no fixed size")
    return size


def _gated(gate: fx.Node | None, up: fx.Node | None) -> fx.Node | None:
    """``silu(gate) * up``, if both are for nothing else."""
    if gate is None or up is None or len(gate.users) != 1 or len(up.users) != 1:
        return None
    activated = next(iter(gate.users))
    if activated.target is not _aten.silu.default or len(activated.users) != 1:
        return None
    product = next(iter(activated.users))
    if product.target is not _aten.mul.Tensor or set(product.args) != {activated, up}:
        return None
    return product


def _add(graph: fx.Graph, linear: fx.Node) -> str:
    total = next(iter(linear.users), None)
    if total is None or len(linear.users) != 1 or total.target is not _aten.add.Tensor or total.kwargs:
        raise Mismatch("nothing is added to its result")
    others = [value for value in total.args if value is not linear]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or not _alike(others[0], linear, total):
        raise Mismatch("what is added to its result is of another shape or type")
    norm = next((node for node in total.users if _stored_norm(node, total)), None)
    with graph.inserting_before(total):
        if norm is None:
            call = graph.call_function(fused_ops.linear_add, (*linear.args, others[0]))
            call.meta = dict(total.meta)
            total.replace_all_uses_with(call)
            return "linear_add"
        stored, epsilon = norm.args[1:]
        assert isinstance(stored, fx.Node)
        weight = graph.get_attr(str(stored.target))  # the norm's own may stand behind the sum
        weight.meta = dict(stored.meta)
        call = graph.call_function(fused_ops.linear_add_norm, (*linear.args, others[0], weight, epsilon))
        call.meta["val"] = (total.meta["val"], norm.meta["val"])
        results = [graph.call_function(operator.getitem, (call, index)) for index in range(2)]
    for old, new in ((total, results[0]), (norm, results[1])):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    return "linear_add_norm"


def _stored_norm(node: fx.Node, total: fx.Node) -> bool:
    """Whether a node is the normalization of a sum, by a weight of the same type that is stored."""
    if node.target is not decoder_ops.rms_norm or node.args[0] is not total:
        return False
    weight = node.args[1]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) and weight.op == "get_attr" else None
    return isinstance(value, torch.Tensor) and value.dtype == total.meta["val"].dtype


def _alike(*nodes: fx.Node) -> bool:
    first, *others = [node.meta.get("val") for node in nodes]
    return isinstance(first, torch.Tensor) and all(
        isinstance(value, torch.Tensor) and value.dtype == first.dtype and same_sizes(value.shape, first.shape)
        for value in others
    )
