"""Finds rotary position embedding: ``x * cos + cat(-x2, x1) * sin``, of whole heads or of their first part."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels import decoder_ops
from .base import Pass, PassContext, PassResult
from .matching import Mismatch, heads_first, heads_last, known_size, operand, shape_of, skip_casts, slice_bounds

_aten = torch.ops.aten
_ELEMENTWISE = {_aten.mul.Tensor, _aten.cos.default, _aten.sin.default}


class FuseRotary(Pass):
    """Rewrites the rotation of ``x[batch, heads, sequence, head]`` as ``claq::rotary``, which reads it heads last.

    The tables must be two equal halves (``cat(f, f)`` behind the cosine); the operator takes one half of each.
    """

    name = "fuse_rotary"
    doc = "Rewrites rotary position embedding as one operator."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        notes: list[str] = []
        halves: dict[fx.Node, fx.Node] = {}
        fused = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target is not _aten.neg.default:
                continue
            try:
                result, x, cos, sin = _match(node)
                heads = known_size(x, 1)
                known_size(x, 3)
            except Mismatch as reason:
                notes.append(f"{node.name} left: {reason}")
                continue
            tables = [_half(gm.graph, table, halves) for table in (cos, sin)]
            with gm.graph.inserting_before(result):
                flat = heads_last(gm.graph, x)
                call = gm.graph.call_function(decoder_ops.rotary, (flat, *tables, heads))
                call.meta["val"] = flat.meta["val"]
                turned = heads_first(gm.graph, call, heads)
            result.replace_all_uses_with(turned)
            fused += 1
        if fused:
            gm.graph.eliminate_dead_code()
            notes.append(f"{fused} rotations")
        return PassResult(gm, bool(fused), tuple(notes))


def _match(neg: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """The node to replace, x ``[batch, heads, sequence, head]``, and the tables ``[batch, sequence, rotated]``."""
    swapped = _user(neg, _aten.cat.default, "the negated half is not joined with the other one")
    parts, axis = swapped.args[0], swapped.args[1] if len(swapped.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or parts[0] is not neg or axis not in (-1, 3):
        raise Mismatch("the negated half is not joined with the other one")
    second = operand(neg, 0, _aten.slice.Tensor, "what is negated is not a half of the heads")
    first = parts[1]
    if not isinstance(first, fx.Node) or first.target is not _aten.slice.Tensor or first.args[0] is not second.args[0]:
        raise Mismatch("what is joined is not two halves of one value")
    rotated = operand(second, 0, None, "")
    size = known_size(rotated, -1)
    if len(shape_of(rotated)) != 4 or size % 2:
        raise Mismatch("the halves are not of heads")
    if slice_bounds(first) != (3, 0, size // 2, 1) or slice_bounds(second)[:2] != (3, size // 2):
        raise Mismatch("the halves are interleaved, or not equal")
    with_sine = _user(swapped, _aten.mul.Tensor, "the swapped halves are not multiplied by a sine")
    sine = with_sine.args[1] if with_sine.args[0] is swapped else with_sine.args[0]
    total = _user(with_sine, _aten.add.Tensor, "the two products are not added")
    with_cosine: Any = total.args[0] if total.args[1] is with_sine else total.args[1]
    if (
        not isinstance(with_cosine, fx.Node)
        or with_cosine.target is not _aten.mul.Tensor
        or rotated not in with_cosine.args
    ):
        raise Mismatch("the other product is not that of the same value and a cosine")
    cosine = with_cosine.args[1] if with_cosine.args[0] is rotated else with_cosine.args[0]
    tables = [_table(table, size) for table in (cosine, sine)]
    if rotated.target is not _aten.slice.Tensor:
        return total, rotated, tables[0], tables[1]
    # Only the first part of each head is turned, the rest is joined to it again.
    x = operand(rotated, 0, None, "")
    joined = _user(total, _aten.cat.default, "the turned part of the heads is not joined with the rest")
    rest = joined.args[0][1] if isinstance(joined.args[0], (list, tuple)) and len(joined.args[0]) == 2 else None
    if (
        slice_bounds(rotated) != (3, 0, size, 1)
        or not isinstance(rest, fx.Node)
        or rest.target is not _aten.slice.Tensor
        or rest.args[0] is not x
        or slice_bounds(rest)[:2] != (3, size)
        or joined.args[0][0] is not total  # type: ignore[index]
    ):
        raise Mismatch("the turned part of the heads is not their beginning")
    return joined, x, tables[0], tables[1]


def _table(node: object, size: int) -> fx.Node:
    """``[batch, sequence, size]`` behind a table ``[batch, 1, sequence, size]`` whose halves are equal."""
    if not isinstance(node, fx.Node) or node.target is not _aten.unsqueeze.default or node.args[1] not in (1, -3):
        raise Mismatch("the tables do not broadcast over heads")
    table = operand(node, 0, None, "")
    if len(shape_of(table)) != 3 or shape_of(table)[-1] != size:
        raise Mismatch(f"the tables are not [batch, sequence, {size}]")
    source = skip_casts(table)
    while source.target in _ELEMENTWISE:
        if len(source.args) > 1 and isinstance(source.args[1], fx.Node):
            raise Mismatch("the tables are scaled by more than a number")
        source = skip_casts(operand(source, 0, None, ""))
    halves = source.args[0] if source.target is _aten.cat.default else None
    if not isinstance(halves, (list, tuple)) or len(halves) != 2 or halves[0] is not halves[1]:
        raise Mismatch("the two halves of the tables are not seen to be equal")
    return table


def _half(graph: fx.Graph, table: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    if table not in made:
        with graph.inserting_after(table):
            half = graph.call_function(_aten.slice.Tensor, (table, 2, 0, known_size(table, 2) // 2))
        half.meta["val"] = table.meta["val"][..., : known_size(table, 2) // 2]
        made[table] = half
    return made[table]


def _user(node: fx.Node, target: Any, reason: str) -> fx.Node:
    users = [user for user in node.users if user.target is target]
    if len(node.users) != 1 or len(users) != 1:
        raise Mismatch(reason)
    return users[0]
