"""Chooses the linears to quantize and writes down why every other weight is left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx

from ..algorithm.accounting import predict
from ..errors import ConfigError
from .attributes import get_attribute
from .base import Pass, PassContext, PassResult
from .canonicalize_linears import LINEAR, is_canonical, weight_origin
from .constants import is_constant_expression, resolve
from .plan import LinearSite, Plan, PlanRow, Skipped

__all__ = ["LinearSite", "Plan", "PlanRow", "SelectLinears", "Skipped", "four_bit_bytes"]

_aten = torch.ops.aten
_EMBEDDINGS = {_aten.embedding.default, _aten.embedding_bag.default, _aten._embedding_bag.default}
_CONVOLUTIONS = {
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv1d.padding,
    _aten.conv2d.padding,
    _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input,
    _aten.convolution.default,
}
# What may stand between a head and the model's output.
_AFTER_HEAD = {
    _aten.to.dtype,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.view.default,
    _aten.reshape.default,
    _aten.squeeze.dim,
    _aten.squeeze.default,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.add.Tensor,
    _aten.tanh.default,
    _aten.index.Tensor,
}
_HEAD_TASKS = {
    "text-generation": "language-model head",
    "fill-mask": "masked-LM head",
    "text-classification": "classifier head",
}


def four_bit_bytes(out_features: int, in_features: int) -> int:
    """Bytes of a layer with all columns at 4 bits and no reserved weights."""
    nbytes: int = predict(out_features, in_features, (in_features, 0, 0)).nbytes
    return nbytes


class SelectLinears(Pass):
    """Puts a :class:`Plan` into the context; the graph stays as it is.

    A weight is left alone by default when quantizing it would save less than half of its bytes, when an embedding uses
    it too (its table stays, so the file would grow), or when it is the output head of the model's task.

    Args:
        include: glob patterns over layer names; empty: all. A layer named here is quantized even if it is a head.
        exclude: glob patterns over layer names; wins over ``include``. A pattern also matches everything below the
            module it names.
        predicted_bytes: ``(N, K)`` -> bytes of the quantized layer; default: 4 bits a weight.
        largest_share: a layer is quantized if its predicted bytes are at most this share of its present ones.
    """

    name = "select_linears"
    doc = "Plans which linears to quantize; everything else is listed with the reason."

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        predicted_bytes: Callable[[int, int], int] = four_bit_bytes,
        largest_share: float = 0.5,
    ) -> None:
        self._include = tuple(include)
        self._exclude = tuple(exclude)
        self._predicted_bytes = predicted_bytes
        self._largest_share = largest_share

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        uses = _weight_uses(gm)
        heads = _heads(gm, context.task)
        candidates, both_ways = _candidates(gm)
        self._check_patterns([site.name for site in candidates.values()])
        plan = Plan(predict=self._predicted_bytes)
        for storage, site in candidates.items():
            reason = self._reason(site, uses.get(storage, []), heads)
            if storage in both_ways:
                reason = "its weight is used both as it is and transposed"
            if reason is None:
                plan.sites.append(site)
            else:
                plan.skipped.append(Skipped(site.name, reason, (site.out_features, site.in_features), site.dense_bytes))
        plan.skipped += _other_weights(gm, uses, set(candidates), context)
        context.plan = plan
        notes = tuple(f"{entry.name} left: {entry.reason}" for entry in plan.skipped)
        return PassResult(gm, False, (f"{len(plan.sites)} linears to quantize", *notes))

    def _reason(self, site: LinearSite, users: Sequence[fx.Node], heads: dict[fx.Node, str]) -> str | None:
        excluded = next((pattern for pattern in self._exclude if _match(site.name, pattern)), None)
        if excluded is not None:
            return f"excluded by the pattern {excluded!r}"
        named = any(_match(site.name, pattern) for pattern in self._include)
        if self._include and not named:
            return "not among those included"
        if site.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"weights are {site.dtype}"
        if any(user.target in _EMBEDDINGS for user in users) and not named:
            return "tied to the embedding, whose table stays as it is"
        head = next((heads[node] for node in site.nodes if node in heads), None)
        if head is not None and not named:
            return f"{head}, left at full precision by default (name it in include to quantize it)"
        predicted = self._predicted_bytes(site.out_features, site.in_features)
        if predicted > self._largest_share * site.dense_bytes:
            return f"too small to gain: {predicted} bytes quantized against {site.dense_bytes}"
        return None

    def _check_patterns(self, names: Sequence[str]) -> None:
        for option, patterns in (("include", self._include), ("exclude", self._exclude)):
            for pattern in patterns:
                if not any(_match(name, pattern) for name in names):
                    some = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
                    raise ConfigError(
                        f"--{option} {pattern!r} matches none of the model's {len(names)} linears: {some}"
                    )


def _match(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _key(tensor: torch.Tensor) -> int:
    """Tied weights and a parameter and its transpose have the same key."""
    return tensor.data_ptr()


def layer_name(weight_name: str) -> str:
    """Name of the layer a weight belongs to: its module's, or the parameter's own if it is not called ``weight``."""
    return weight_name.removesuffix(".weight")


def _candidates(gm: fx.GraphModule) -> tuple[dict[int, LinearSite], set[int]]:
    """One site for each weight used by canonical linears, by memory, in graph order; and those used in both layouts."""
    sites: dict[int, LinearSite] = {}
    both_ways: set[int] = set()
    for node in gm.graph.nodes:
        if not is_canonical(node):
            continue
        weight = get_attribute(gm, str(node.args[1].target))
        key = _key(weight)
        if key in sites:
            sites[key].nodes.append(node)
            if get_attribute(gm, sites[key].weight_target).stride() != weight.stride():
                both_ways.add(key)
            continue
        name, transposed = weight_origin(node)
        layer = layer_name(name)
        out_features, in_features = weight.shape
        sites[key] = LinearSite(
            name=layer,
            weight_name=name,
            nodes=[node],
            in_features=in_features,
            out_features=out_features,
            dtype=weight.dtype,
            parts=[(layer, out_features)],
            transposed=transposed,
        )
    return sites, both_ways


def _weight_uses(gm: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """Storage of each tensor of two or more dimensions -> the nodes that use it, through views."""
    uses: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        for argument in node.all_input_nodes:
            constant = resolve(gm, argument)
            if constant is not None and get_attribute(gm, constant.target).dim() >= 2 and resolve(gm, node) is None:
                uses.setdefault(_key(constant.tensor), []).append(node)
    return uses


def _heads(gm: fx.GraphModule, task: str | None) -> dict[fx.Node, str]:
    """Linears whose result is the model's output but for slicing, scaling and the like, for tasks that have a head.

    In a module without a task, such a linear is a head if it has a row for each row of an embedding.
    """
    label = _HEAD_TASKS.get(task or "")
    if label is None and task is not None:
        return {}
    vocabularies = {table.shape[0] for table in _embedding_tables(gm)}
    heads: dict[fx.Node, str] = {}
    output = next(node for node in gm.graph.nodes if node.op == "output")
    stack, seen = list(output.all_input_nodes), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_canonical(node):
            if label is not None:
                heads[node] = label
            elif get_attribute(gm, str(node.args[1].target)).shape[0] in vocabularies:
                heads[node] = _HEAD_TASKS["text-generation"]
        elif node.target in _AFTER_HEAD and isinstance(node.args[0], fx.Node):
            stack.append(node.args[0])
    return heads


def _embedding_tables(gm: fx.GraphModule) -> list[torch.Tensor]:
    tables = [resolve(gm, node.args[0]) for node in gm.graph.nodes if node.target in _EMBEDDINGS]
    return [table.tensor for table in tables if table is not None]


def _other_weights(
    gm: fx.GraphModule, uses: dict[int, list[fx.Node]], taken: set[int], context: PassContext
) -> list[Skipped]:
    """Every used floating-point weight of two or more dimensions that is no candidate, with the reason."""
    skipped: list[Skipped] = []
    seen = set(taken)
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = get_attribute(gm, str(node.target))
        if not isinstance(tensor, torch.nn.Parameter) or tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        if _key(tensor) in seen:
            continue
        seen.add(_key(tensor))
        users = uses.get(_key(tensor), [])
        nbytes = tensor.numel() * tensor.element_size()
        skipped.append(Skipped(layer_name(str(node.target)), _use(users, context), tuple(tensor.shape), nbytes))
    return skipped


def _use(users: Sequence[fx.Node], context: PassContext) -> str:
    reached = list(users)
    for user in reached:
        if user.name in context.reasons:
            return context.reasons[user.name]
        if is_constant_expression(user):
            reached += [later for later in user.users if later not in reached]
    targets = {user.target for user in users}
    if targets & _EMBEDDINGS:
        return "embedding table"
    if targets & _CONVOLUTIONS:
        return "convolution"
    if LINEAR in targets:
        return "a value that linears read, not a weight of theirs"
    return "not used by a linear layer but by " + ", ".join(sorted(str(target) for target in targets))
