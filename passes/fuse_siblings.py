"""Stacks linears that read the same value (q/k/v, gate/up) into one, followed by a split of its result."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..deferred import concatenate
from .attributes import fetch, free_name, get_attribute, release, set_tensor
from .base import ContractError, Pass, PassContext, PassResult
from .canonicalize_linears import LINEAR, WEIGHT_KEY, is_canonical, stored_name
from .plan import LINEAR_ROLE, LinearSite, Plan

_aten = torch.ops.aten


class FuseSiblings(Pass):
    """Replaces planned sites that read one value by one stacked site, rows in graph order.

    One pass over the activation and one operator call serve all of them. Their rows share the codebook of each column.
    A site is stacked only if its weight is used once; biases are stacked, zeros standing for absent ones.

    Args:
        weights: False: the stacked weight is a placeholder without memory of its own, for a graph whose linears are
            replaced by quantized layers at once.
    """

    name = "fuse_siblings"
    doc = "Stacks planned linears that read the same value into one linear and a split."

    def __init__(self, weights: bool = True) -> None:
        self._weights = weights

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        plan = context.plan
        if plan is None:
            raise ContractError("there is no plan; select_linears goes first")
        groups: dict[tuple[fx.Node, torch.dtype, bool], list[LinearSite]] = {}
        notes: list[str] = []
        for site in plan.sites:
            if site.lookups or site.role != LINEAR_ROLE:
                continue  # tables and heads have widths of their own
            if len(site.nodes) == 1:
                groups.setdefault((site.inputs[0], site.dtype, site.transposed), []).append(site)
            elif any(other is not site and set(other.inputs) & set(site.inputs) for other in plan.sites):
                notes.append(f"{site.name} is not stacked: its weight is used {len(site.nodes)} times")
        modified = False
        for members in groups.values():
            if len(members) < 2:
                continue
            stacked = _stack(gm, members, self._weights)
            _exchange(plan, members, stacked)
            notes.append(f"{' + '.join(name for name, _ in stacked.parts)} -> {stacked.name}")
            modified = True
        return PassResult(gm, modified, tuple(notes))

    def ensures(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if is_canonical(node) and get_attribute(gm, str(node.args[1].target)).dim() != 2:
                raise ContractError(f"{node.name} has no matrix as its weight")


def stacked_name(names: list[str]) -> str:
    """``a.b.q, a.b.k, a.b.v`` -> ``a.b.q+k+v``."""
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    rest = ["_".join(name.split(".")[len(common) :]) for name in names]
    return ".".join([*common, "+".join(rest)])


def _stack(gm: fx.GraphModule, members: list[LinearSite], weights: bool) -> LinearSite:
    name = free_name(gm, stacked_name([site.name for site in members]))
    first = members[0].node
    with torch.no_grad():
        rows = [site.out_features for site in members]
        stacked = (
            concatenate([site.weight(gm) for site in members])
            if weights
            else members[0].weight(gm).new_zeros(1).expand(sum(rows), members[0].in_features)
        )
        weight = torch.nn.Parameter(stacked, requires_grad=False)
        biases = [site.bias(gm) for site in members]
        bias = None
        if any(part is not None for part in biases):
            like = next(part for part in biases if part is not None)
            bias = torch.nn.Parameter(
                torch.cat(
                    [
                        like.new_zeros(site.out_features) if part is None else part
                        for site, part in zip(members, biases, strict=True)
                    ]
                ),
                requires_grad=False,
            )
    set_tensor(gm, f"{name}.weight", weight)
    weight_node = fetch(gm.graph, f"{name}.weight")
    weight_node.meta[WEIGHT_KEY] = (f"{name}.weight", False)
    bias_node = None
    if bias is not None:
        set_tensor(gm, f"{name}.bias", bias)
        bias_node = fetch(gm.graph, f"{name}.bias")
    with gm.graph.inserting_before(first):
        linear = gm.graph.call_function(LINEAR, (first.args[0], weight_node, bias_node))
        split = gm.graph.call_function(_aten.split_with_sizes.default, (linear, rows, -1))
        pieces = [gm.graph.call_function(operator.getitem, (split, index)) for index in range(len(members))]
    _record_shape(linear, first, sum(rows))
    for site, piece in zip(members, pieces, strict=True):
        node = site.node
        piece.meta = dict(node.meta)
        fetched = [value for value in node.args[1:] if isinstance(value, fx.Node)]
        node.replace_all_uses_with(piece)
        _copy_where_views_cannot_be(piece)
        gm.graph.erase_node(node)
        for value in fetched:
            release(gm, value, stored_name(value))
    return LinearSite(
        name=name,
        weight_name=f"{name}.weight",
        nodes=[linear],
        in_features=members[0].in_features,
        out_features=sum(rows),
        dtype=members[0].dtype,
        parts=[part for site in members for part in site.parts],
        transposed=members[0].transposed,
    )


def _copy_where_views_cannot_be(piece: fx.Node) -> None:
    """Let ``view`` be ``reshape`` in all that shares the memory of a piece.

    The linear's own result lay together, and capture wrote ``view`` for a ``reshape`` of it; a piece of the stacked one does
    not, and a view that joins its rows with other axes fails (Qwen3.5's linear attention).
    """
    reached = [piece]
    for value in reached:
        for user in value.users:
            if user.target is _aten.view.default:
                user.target = _aten.reshape.default
            if user not in reached and _may_alias(user.target):
                reached.append(user)


def _may_alias(target: object) -> bool:
    if target is operator.getitem:
        return True
    return isinstance(target, torch._ops.OpOverload) and any(value.alias_info for value in target._schema.returns)


def _record_shape(linear: fx.Node, first: fx.Node, out_features: int) -> None:
    value = first.meta.get("val")
    if isinstance(value, torch.Tensor):
        linear.meta["val"] = value.new_empty((*value.shape[:-1], out_features))


def _exchange(plan: Plan, members: list[LinearSite], stacked: LinearSite) -> None:
    position = plan.sites.index(members[0])
    for site in members:
        plan.sites.remove(site)
    plan.sites.insert(position, stacked)
