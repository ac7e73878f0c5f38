"""Chooses the linears and embeddings to quantize and writes down why every other weight is left alone."""

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
from .constants import is_constant_expression, memory_of, resolve
from .plan import EMBEDDING_ROLE, HEAD_ROLE, LinearSite, Plan, PlanRow, Skipped

__all__ = ["LinearSite", "Plan", "PlanRow", "SelectLinears", "Skipped", "four_bit_bytes"]

_aten = torch.ops.aten
_LOOKUP = _aten.embedding.default
_EMBEDDINGS = {_LOOKUP, _aten.embedding_bag.default, _aten.embedding_bag.padding_idx, _aten._embedding_bag.default}
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
_CLASSIFIER = "classifier head"
_HEAD_TASKS = {
    "text-generation": "language-model head",
    "fill-mask": "masked-LM head",
    "text-classification": _CLASSIFIER,
    "text2text-generation": "language-model head",
    "automatic-speech-recognition": "language-model head",
}
SMALL_TABLE = 0.02
"""An embedding with less than this share of the model's bytes is left alone: positions, token types."""


def four_bit_bytes(out_features: int, in_features: int) -> int:
    """Bytes of a layer with all columns at 4 bits and no reserved weights."""
    nbytes: int = predict(out_features, in_features, (in_features, 0, 0)).nbytes
    return nbytes


class SelectLinears(Pass):
    """Puts a :class:`Plan` into the context; the graph stays as it is.

    A weight is left alone by default when quantizing it would save less than half of its bytes, when it is a small table
    (:data:`SMALL_TABLE`) or the head of a classifier. A table that linears multiply by too (a tied output head) is one
    site with all its uses; it is left alone when something else reads it, because the dense table would have to stay.

    Args:
        include: glob patterns over layer names; empty: all. A small table or a classifier named here is quantized.
        exclude: glob patterns over layer names; wins over ``include``. A pattern also matches everything below the
            module it names, and a tied weight by any of its names.
        embeddings: whether tables are quantized.
        heads: whether the output heads of language models and masked language models are.
        predicted_bytes: ``(N, K)`` -> bytes of the quantized layer; default: 4 bits a weight.
        weight_bytes: bytes of an unquantized weight in the file; None: as the graph holds it.
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
        *,
        embeddings: bool = True,
        heads: bool = True,
        weight_bytes: int | None = None,
    ) -> None:
        self._include = tuple(include)
        self._exclude = tuple(exclude)
        self._predicted_bytes = predicted_bytes
        self._weight_bytes = weight_bytes
        self._largest_share = largest_share
        self._embeddings = embeddings
        self._heads = heads

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        uses = _weight_uses(gm)
        heads = _heads(gm, context.task)
        candidates, both_ways = _candidates(gm)
        names = {site.name: _all_names(site, context) for site in candidates.values()}
        if context.chosen is None:
            self._check_patterns([name for every in names.values() for name in every])
        whole = sum(parameter.numel() * parameter.element_size() for parameter in gm.parameters())
        plan = Plan(predict=self._predicted_bytes)
        for storage, site in candidates.items():
            label = next((heads[node] for node in site.nodes if node in heads), None)
            if label is not None:
                site.role = HEAD_ROLE
            elif not site.nodes:
                site.role = EMBEDDING_ROLE
            if context.chosen is None:
                reason = self._reason(site, names[site.name], label, whole)
            else:
                reason = None if site.name in context.chosen else "left in the graph that is quantized"
            if storage in both_ways:
                reason = "its weight is used both as it is and transposed"
            others = [user for user in uses.get(storage, []) if user not in (*site.nodes, *site.lookups)]
            if reason is None and site.lookups and others:
                reason = f"the embedding's table is also read by {', '.join(sorted({str(u.target) for u in others}))}"
            if reason is None:
                plan.sites.append(site)
            else:
                plan.skipped.append(Skipped(site.name, reason, (site.out_features, site.in_features), site.dense_bytes))
        plan.skipped += _other_weights(gm, uses, set(candidates), context)
        context.plan = plan
        notes = tuple(f"{entry.name} left: {entry.reason}" for entry in plan.skipped)
        return PassResult(gm, False, (f"{len(plan.sites)} layers to quantize", *notes))

    def _reason(self, site: LinearSite, names: Sequence[str], label: str | None, whole: int) -> str | None:
        excluded = next((p for p in self._exclude if any(_match(name, p) for name in names)), None)
        if excluded is not None:
            return f"excluded by the pattern {excluded!r}"
        named = any(_match(name, pattern) for pattern in self._include for name in names)
        if self._include and not named:
            return "not among those included"
        if site.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"weights are {site.dtype}"
        if site.lookups and not self._embeddings:
            return "embeddings are left at full precision" + (", and this linear is tied to one" if site.nodes else "")
        if label == _CLASSIFIER and not named:
            return f"{label}, left at full precision by default (name it in include to quantize it)"
        if label is not None and label != _CLASSIFIER and not self._heads:
            return f"{label}; output heads are left at full precision"
        if site.role == EMBEDDING_ROLE and not named and site.dense_bytes < SMALL_TABLE * whole:
            return (
                f"small table, {100 * site.dense_bytes / whole:.1f} % of the model (name it in include to quantize it)"
            )
        predicted = self._predicted_bytes(site.out_features, site.in_features)
        dense = site.in_features * site.out_features * (self._weight_bytes or site.dtype.itemsize)
        if predicted > self._largest_share * dense:
            return f"too small to gain: {predicted} bytes quantized against {dense}"
        return None

    def _check_patterns(self, names: Sequence[str]) -> None:
        for option, patterns in (("include", self._include), ("exclude", self._exclude)):
            for pattern in patterns:
                if not any(_match(name, pattern) for name in names):
                    some = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
                    raise ConfigError(f"--{option} {pattern!r} matches none of the model's {len(names)} layers: {some}")


def _all_names(site: LinearSite, context: PassContext) -> list[str]:
    """The layer's name and those of the weights that are tied to it."""
    return [site.name, *(layer_name(alias) for alias in context.aliases.get(site.weight_name, ()))]


def _match(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


_Key = tuple[int, int]


def _key(tensor: torch.Tensor) -> _Key:
    """Tied weights and a parameter and its transpose have the same key."""
    return memory_of(tensor)


def layer_name(weight_name: str) -> str:
    """Name of the layer a weight belongs to: its module's, or the parameter's own if it is not called ``weight``."""
    return weight_name.removesuffix(".weight")


def _candidates(gm: fx.GraphModule) -> tuple[dict[_Key, LinearSite], set[_Key]]:
    """One site for each weight used by canonical linears and embeddings, by memory, in graph order; and those used in two
    layouts."""
    sites: dict[_Key, LinearSite] = {}
    layouts: dict[_Key, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    both_ways: set[_Key] = set()
    for node in gm.graph.nodes:
        is_lookup = node.target == _LOOKUP and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"
        if not is_lookup and not is_canonical(node):
            continue
        source = node.args[0 if is_lookup else 1]
        weight = get_attribute(gm, str(source.target))
        if weight.dim() != 2:
            continue
        key = _key(weight)
        if key not in sites:
            name, transposed = (str(source.target), False) if is_lookup else weight_origin(node)
            layer = layer_name(name)
            out_features, in_features = weight.shape
            layouts[key] = (tuple(weight.shape), tuple(weight.stride()))
            sites[key] = LinearSite(
                name=layer,
                weight_name=name,
                nodes=[],
                in_features=in_features,
                out_features=out_features,
                dtype=weight.dtype,
                parts=[(layer, out_features)],
                transposed=transposed,
            )
        elif layouts[key] != (tuple(weight.shape), tuple(weight.stride())):
            both_ways.add(key)
        (sites[key].lookups if is_lookup else sites[key].nodes).append(node)
    return sites, both_ways


def _weight_uses(gm: fx.GraphModule) -> dict[_Key, list[fx.Node]]:
    """Storage of each tensor of two or more dimensions -> the nodes that use it, through views."""
    uses: dict[_Key, list[fx.Node]] = {}
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
    # A task's result is the first output; others are keys and values of a cache, straight from a linear where nothing is past.
    stack, seen = list(output.all_input_nodes if label is None else output.all_input_nodes[:1]), set()
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
    gm: fx.GraphModule, uses: dict[_Key, list[fx.Node]], taken: set[_Key], context: PassContext
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
        kinds = ", ".join(sorted(str(target) for target in targets & _EMBEDDINGS))
        return f"embedding table read by {kinds}, of which no rows can be taken one by one"
    if targets & _CONVOLUTIONS:
        return "convolution"
    if LINEAR in targets:
        return "a value that linears read, not a weight of theirs"
    return "not used by a linear layer but by " + ", ".join(sorted(str(target) for target in targets))
