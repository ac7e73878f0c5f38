"""Rewrites every spelling of a linear layer as ``aten.linear(x, weight [N, K], bias)``.

A rule looks at one node and either rewrites it or returns the reason it does not; reasons of nodes that look like a
linear layer are kept in ``PassContext.reasons`` and shown in the plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from .attributes import fetch, free_name, get_attribute, set_tensor
from .base import ContractError, Pass, PassContext, PassResult
from .constants import Constant, is_constant_expression, resolve, same_layout
from .matching import RESHAPES

_aten = torch.ops.aten
LINEAR = _aten.linear.default

WEIGHT_KEY = "claq_weight"
"""``get_attr`` node meta of a canonical weight: ``(name in the state_dict, stored transposed)``."""


@dataclass(frozen=True)
class NoMatch:
    """Why a rule does not apply; ``reason`` is None for a node that does not even look like a linear layer."""

    reason: str | None = None


class CanonicalizeLinears(Pass):
    """Finds ``addmm``, ``mm``, ``matmul``, ``bmm``, ``einsum`` with a constant matrix, and biases added after."""

    name = "canonicalize_linears"
    doc = "Rewrites addmm, mm, matmul, bmm and einsum with a constant matrix as aten.linear, and folds biases in."

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        rewriter = _Rewriter(gm)
        notes: list[str] = []
        modified = False
        for node in list(gm.graph.nodes):
            rule = _RULES.get(node.target) if node.op == "call_function" else None
            if rule is None:
                continue
            # Rules erase the node they rewrite; its name and kind are needed afterwards.
            name, kind = node.name, str(node.target)
            outcome = rule(rewriter, node)
            if isinstance(outcome, NoMatch):
                if outcome.reason is not None:
                    context.reasons[name] = outcome.reason
                    notes.append(f"{name} ({kind}) left: {outcome.reason}")
            elif outcome is not node:
                modified = True
                notes.append(f"{name} ({kind}) -> {outcome.name} {weight_origin(outcome)[0]}")
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and node.target in (_aten.add.Tensor, _aten.add_.Tensor):
                fused = rewriter.fold_added_bias(node)
                if fused is not None:
                    modified = True
                    notes.append(f"{node.name} folded into {fused.name} as its bias")
        if modified:
            gm.graph.eliminate_dead_code()
        return PassResult(gm, modified, tuple(notes))

    def ensures(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target is LINEAR and is_canonical(node):
                weight = get_attribute(gm, str(node.args[1].target))
                if weight.dim() != 2:
                    raise ContractError(f"{node.name} has a weight of {weight.dim()} dimensions")


def is_canonical(node: fx.Node) -> bool:
    """Whether a node is ``aten.linear`` of a value, a constant weight and a constant bias or None."""
    if node.op != "call_function" or node.target is not LINEAR or node.kwargs or len(node.args) != 3:
        return False
    weight, bias = node.args[1], node.args[2]
    return (
        isinstance(weight, fx.Node)
        and weight.op == "get_attr"
        and (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr"))
    )


def weight_origin(node: fx.Node) -> tuple[str, bool]:
    """Of a canonical linear: the weight's name in the state_dict, and whether it is stored there as ``[K, N]``."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    transposed: bool = weight.meta.get(WEIGHT_KEY, ("", False))[1]
    return stored_name(weight), transposed


def stored_name(fetched: fx.Node) -> str:
    """The state_dict name behind a ``get_attr`` node: its target's, or that of the parameter it is a view of."""
    name: str = fetched.meta.get(WEIGHT_KEY, (str(fetched.target), False))[0]
    return name


class _Rewriter:
    """Builds canonical linears in one graph; a transposed weight, or a matrix of a stack of matrices (the experts of a
    mixture), is registered once, as a view of its parameter."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.views: dict[tuple[str, int | None, bool], str] = {}

    def resolve(self, value: object) -> Constant | None:
        return resolve(self.gm, value)

    def check_matrix(self, constant: Constant) -> NoMatch | None:
        """Why a constant cannot be a weight, or None if it can: a stored matrix or its transpose, in floating point."""
        tensor = constant.tensor
        if tensor.dim() != 2:
            return NoMatch(f"the constant {constant.target} has {tensor.dim()} dimensions, not 2")
        if not tensor.is_floating_point():
            return NoMatch(f"the constant {constant.target} is {tensor.dtype}, not floating point")
        if _place(get_attribute(self.gm, constant.target), tensor) is None:
            return NoMatch(f"the matrix is not {constant.target} as a whole but a part or a reshape of it")
        return None

    def weight_node(self, constant: Constant) -> fx.Node:
        """A ``get_attr`` node of a matrix that passed :meth:`check_matrix`; each view is registered once."""
        stored = get_attribute(self.gm, constant.target)
        if same_layout(stored, constant.tensor):
            return fetch(self.graph, constant.target)
        place = _place(stored, constant.tensor)
        assert place is not None
        key = (constant.target, *place)
        if key not in self.views:
            index, transposed = place
            which = "" if index is None else f"_{index}"
            target = free_name(self.gm, f"{constant.target}{which}{'_transposed' if transposed else ''}")
            view = constant.tensor.detach()
            is_parameter = isinstance(stored, torch.nn.Parameter)
            set_tensor(self.gm, target, torch.nn.Parameter(view, requires_grad=False) if is_parameter else view)
            self.views[key] = target
        node = fetch(self.graph, self.views[key])
        name = constant.target if place[0] is None else f"{constant.target}.{place[0]}"
        node.meta[WEIGHT_KEY] = (name, place[1])
        return node

    def replace(self, node: fx.Node, x: fx.Node, weight: Constant, bias: fx.Node | None) -> fx.Node:
        """Put ``linear(x, weight, bias)`` in the place of ``node``."""
        weight_node = self.weight_node(weight)
        with self.graph.inserting_before(node):
            linear = self.graph.call_function(LINEAR, (x, weight_node, bias))
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        self.graph.erase_node(node)
        return linear

    def bias_node(self, value: object, out_features: int) -> fx.Node | None:
        """The ``get_attr`` node of a constant ``[N]``, or None if the value is not one."""
        constant = self.resolve(value)
        if constant is None or tuple(constant.tensor.shape) != (out_features,):
            return None
        if same_layout(get_attribute(self.gm, constant.target), constant.tensor):
            return fetch(self.graph, constant.target)
        return None

    def fold_added_bias(self, add: fx.Node) -> fx.Node | None:
        """Turn ``linear(x, W) + b`` into ``linear(x, W, b)`` where the sum is the product's only use."""
        if add.kwargs.get("alpha", 1) != 1 or len(add.args) != 2:
            return None
        for linear, other in (add.args, add.args[::-1]):
            if not isinstance(linear, fx.Node) or not is_canonical(linear) or linear.args[2] is not None:
                continue
            if len(linear.users) != 1 or _dtype(add) != _dtype(linear):
                continue  # under autocast the sum may be of a wider type than the product
            weight = get_attribute(self.gm, str(linear.args[1].target))  # type: ignore[union-attr]
            constant = self.resolve(other)
            if constant is None or constant.tensor.dtype != weight.dtype:
                continue
            bias = self.bias_node(other, weight.shape[0])
            if bias is None:
                continue
            with self.graph.inserting_before(add):
                fused = self.graph.call_function(LINEAR, (linear.args[0], linear.args[1], bias))
            fused.meta = dict(add.meta)
            add.replace_all_uses_with(fused)
            self.graph.erase_node(add)
            self.graph.erase_node(linear)
            return fused
        return None


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


Rule = Callable[[_Rewriter, fx.Node], "fx.Node | NoMatch"]


def _rewrite_linear(rewriter: _Rewriter, node: fx.Node) -> fx.Node | NoMatch:
    """``aten.linear`` whose weight or bias is not a plain attribute, or is given by keyword."""
    named = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    x, weight, bias = named["input"], rewriter.resolve(named["weight"]), named.get("bias")
    if weight is None:
        return NoMatch(_computed(named["weight"]))
    wrong = rewriter.check_matrix(weight)
    if wrong is not None:
        return wrong
    bias_node = None if bias is None else rewriter.bias_node(bias, weight.tensor.shape[0])
    if bias is not None and bias_node is None:
        return NoMatch("the bias is not a plain constant")
    weight_node = rewriter.weight_node(weight)
    if is_canonical(node) and node.args[1:] == (weight_node, bias_node):
        return node
    assert isinstance(x, fx.Node)
    return rewriter.replace(node, x, weight, bias_node)


def _rewrite_product(rewriter: _Rewriter, node: fx.Node) -> fx.Node | NoMatch:
    """``mm``, ``matmul`` and ``bmm``: ``x @ C`` is ``linear(x, Cᵀ)``."""
    x, other = node.args[:2]
    constant = rewriter.resolve(other)
    if constant is None:
        left = rewriter.resolve(x)
        if left is not None and left.tensor.dim() >= 2 and not is_constant_expression(other):
            return NoMatch(f"the constant {left.target} is the left operand")
        return NoMatch()
    if not isinstance(x, fx.Node) or rewriter.resolve(x) is not None:
        return NoMatch("both operands are constants")
    wrong = rewriter.check_matrix(constant)
    if wrong is not None:
        return wrong
    if not _keeps_leading_axes(x, node):
        return NoMatch(f"the product broadcasts over axes that only {constant.target} has")
    return rewriter.replace(node, x, Constant(constant.target, constant.tensor.t()), None)


def _rewrite_addmm(rewriter: _Rewriter, node: fx.Node) -> fx.Node | NoMatch:
    """``addmm(b, x, C)`` (transformers' Conv1D); views that only flatten go too, where the shapes prove it."""
    addend, x, other = node.args[:3]
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 3:
        return NoMatch("alpha or beta is not 1")
    constant = rewriter.resolve(other)
    if constant is None:
        left = rewriter.resolve(x)
        return NoMatch(f"the constant {left.target} is the left operand" if left is not None else None)
    if not isinstance(x, fx.Node) or rewriter.resolve(x) is not None:
        return NoMatch("both operands are constants")
    wrong = rewriter.check_matrix(constant)
    if wrong is not None:
        return wrong
    bias = rewriter.bias_node(addend, constant.tensor.shape[1])
    if bias is None:
        return NoMatch("what is added is not a constant of one dimension")
    linear = rewriter.replace(node, x, Constant(constant.target, constant.tensor.t()), bias)
    return _unflatten(rewriter, linear)


def _unflatten(rewriter: _Rewriter, linear: fx.Node) -> fx.Node:
    """``view(linear(view(x, [-1, K])), [*, N])`` -> ``linear(x)`` where the recorded shapes prove it equal."""
    flat = linear.args[0]
    assert isinstance(flat, fx.Node)
    if flat.target not in RESHAPES or len(linear.users) != 1:
        return linear
    restore = next(iter(linear.users))
    x = flat.args[0]
    if restore.target not in RESHAPES or not isinstance(x, fx.Node):
        return linear
    outer, inner = restore.meta.get("val"), x.meta.get("val")
    product, flattened = linear.meta.get("val"), flat.meta.get("val")
    if not (_is_tensor(outer) and _is_tensor(inner) and _is_tensor(product) and _is_tensor(flattened)):
        return linear
    if [str(size) for size in outer.shape] != [*(str(size) for size in inner.shape[:-1]), str(product.shape[-1])]:
        return linear
    if str(inner.shape[-1]) != str(flattened.shape[-1]):
        return linear
    linear.args = (x, *linear.args[1:])
    linear.meta = dict(restore.meta)
    restore.replace_all_uses_with(linear)
    rewriter.graph.erase_node(restore)
    if not flat.users:
        rewriter.graph.erase_node(flat)
    return linear


def _rewrite_einsum(rewriter: _Rewriter, node: fx.Node) -> fx.Node | NoMatch:
    """``einsum("...k,nk->...n")`` with a constant matrix, in either order of operands and of the matrix's axes."""
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return NoMatch()
    constants = [rewriter.resolve(operand) for operand in operands]
    if (constants[0] is None) == (constants[1] is None):
        return NoMatch()
    which = 0 if constants[0] is not None else 1
    constant, x = constants[which], operands[1 - which]
    assert constant is not None
    assert isinstance(x, fx.Node)
    wrong = rewriter.check_matrix(constant)
    if wrong is not None:
        return wrong
    match = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z.]+)->([a-zA-Z.]+)", equation.replace(" ", ""))
    if match is None:
        return NoMatch(f"einsum {equation!r} has no explicit result")
    terms, result = [match[1], match[2]], match[3]
    matrix, value = terms[which], terms[1 - which]
    if len(matrix) != 2 or "." in matrix or len(set(matrix)) != 2:
        return NoMatch(f"einsum {equation!r} does not use both axes of {constant.target}")
    contracted, free = value[-1], result[-1]
    if {contracted, free} != set(matrix) or contracted in result or free in value or value[:-1] != result[:-1]:
        return NoMatch(f"einsum {equation!r} is not a product over the last axis")
    weight = constant.tensor if matrix == free + contracted else constant.tensor.t()
    return rewriter.replace(node, x, Constant(constant.target, weight), None)


def _place(stored: torch.Tensor, matrix: torch.Tensor) -> tuple[int | None, bool] | None:
    """Which matrix of ``stored`` (None for a matrix itself, an index for a stack of them), and whether transposed.

    None if it is no whole matrix of it.
    """
    if stored.dim() == 2:
        candidates: list[tuple[int | None, torch.Tensor]] = [(None, stored)]
    elif stored.dim() == 3 and stored.stride(0) > 0:
        nth = (matrix.storage_offset() - stored.storage_offset()) // stored.stride(0)
        candidates = [(nth, stored[nth])] if 0 <= nth < stored.shape[0] else []
    else:
        candidates = []
    for index, whole in candidates:
        for transposed, view in ((False, whole), (True, whole.t())):
            if same_layout(view, matrix):
                return index, transposed
    return None


def _keeps_leading_axes(x: fx.Node, product: fx.Node) -> bool:
    """Whether a product has the leading axes of ``x``, by the recorded shapes."""
    before, after = x.meta.get("val"), product.meta.get("val")
    if not _is_tensor(before) or not _is_tensor(after):
        return False
    return [str(size) for size in before.shape[:-1]] == [str(size) for size in after.shape[:-1]]


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def _computed(value: object) -> str:
    made_by = value.target if isinstance(value, fx.Node) else type(value).__name__
    return f"the weight is computed in the graph (by {made_by})"


_RULES: dict[Any, Rule] = {
    _aten.linear.default: _rewrite_linear,
    _aten.mm.default: _rewrite_product,
    _aten.matmul.default: _rewrite_product,
    _aten.bmm.default: _rewrite_product,
    _aten.addmm.default: _rewrite_addmm,
    _aten.einsum.default: _rewrite_einsum,
}
