"""The plan: which linears and embeddings of a graph are quantized, which are left alone, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from ..deferred import is_deferred
from .attributes import get_attribute, replace_tensor

LINEAR_ROLE, HEAD_ROLE, EMBEDDING_ROLE = "linear", "head", "embedding"


def site_kind(role: str, tied: bool) -> str:
    """A role in words, for people: "embedding", "output head", "output head and embedding"; empty for a linear."""
    named = {EMBEDDING_ROLE: "embedding", HEAD_ROLE: "output head"}.get(role, "")
    return " and ".join(part for part in (named, "embedding" if tied else "") if part)


@dataclass
class LinearSite:
    """A weight to quantize, and the ``aten.linear`` and ``aten.embedding`` nodes that use it.

    An embedding's table is a weight like any other: its vocabulary is N, its columns are K. One that is the output head
    as well (tied) is one site with nodes of both kinds, so that its codes are stored once.

    Attributes:
        name: qualified name of the layer: its module's, or the parameter's own if that is not called ``weight``.
        weight_name: the weight's name in the model's ``state_dict()`` (the first one, for a stacked site).
        nodes: every node that multiplies by this weight, in topological order; none of an embedding's.
        in_features, out_features: K and N.
        dtype: of the weight.
        parts: ``(layer name, rows)`` of what is stacked, in order of rows; a single entry for an ordinary layer.
        transposed: the model stores this weight as ``[K, N]``.
        lookups: every node that takes rows of this weight, in topological order.
        role: ``"linear"``, ``"head"`` (its result is the model's output, a distribution over the vocabulary) or
            ``"embedding"`` (rows are looked up, and it is no head).
    """

    name: str
    weight_name: str
    nodes: list[fx.Node]
    in_features: int
    out_features: int
    dtype: torch.dtype
    parts: list[tuple[str, int]]
    transposed: bool = False
    lookups: list[fx.Node] = field(default_factory=list)
    role: str = LINEAR_ROLE

    @property
    def kind(self) -> str:
        """What the layer is, in words; empty for an ordinary linear."""
        return site_kind(self.role, bool(self.nodes and self.lookups))

    @property
    def node(self) -> fx.Node:
        """The first node that multiplies by the weight."""
        return self.nodes[0]

    @property
    def weight_target(self) -> str:
        """Attribute of the GraphModule that holds the weight as ``[N, K]``."""
        node = self.node.args[1] if self.nodes else self.lookups[0].args[0]
        assert isinstance(node, fx.Node)
        return str(node.target)

    @property
    def bias_target(self) -> str | None:
        """Attribute of the GraphModule that holds the bias of the first node, if it has one."""
        if not self.nodes:
            return None
        bias = self.node.args[2] if len(self.node.args) > 2 else None
        return str(bias.target) if isinstance(bias, fx.Node) else None

    @property
    def inputs(self) -> list[fx.Node]:
        """The value each node reads, in the order of ``nodes``."""
        return [value for node in self.nodes if isinstance(value := node.args[0], fx.Node)]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight before quantization."""
        return self.in_features * self.out_features * self.dtype.itemsize

    def weight(self, gm: fx.GraphModule) -> torch.Tensor:
        """The weight ``[N, K]`` (a view of the model's parameter where that is possible)."""
        value = get_attribute(gm, self.weight_target)
        assert isinstance(value, torch.Tensor)
        return value

    def release_weight(self, gm: fx.GraphModule) -> None:
        """Let go of the weight, unless others in the graph read it. One NaN, expanded, keeps its shape, dtype and device: what is
        computed with it by mistake is seen."""
        sources = {str(node.args[1].target) for node in self.nodes if isinstance(node.args[1], fx.Node)}
        sources |= {str(node.args[0].target) for node in self.lookups if isinstance(node.args[0], fx.Node)}
        own = {*self.nodes, *self.lookups}
        for node in gm.graph.find_nodes(op="get_attr"):
            if not own.issuperset(node.users):
                sources.discard(str(node.target))
        for source in sources:
            weight = get_attribute(gm, source)
            if not is_deferred(weight):
                nothing = weight.detach().new_full((1,), torch.nan).expand(weight.shape)
                replace_tensor(gm, source, torch.nn.Parameter(nothing, requires_grad=False))

    def bias(self, gm: fx.GraphModule) -> torch.Tensor | None:
        """The bias ``[N]`` of the first node, or None."""
        target = self.bias_target
        if target is None:
            return None
        value = get_attribute(gm, target)
        assert isinstance(value, torch.Tensor)
        return value


@dataclass(frozen=True)
class Skipped:
    """A weight that stays as it is.

    Attributes:
        name: qualified name of the layer.
        reason: why, in words.
        shape: of the weight as the model stores it.
        nbytes: of the weight.
    """

    name: str
    reason: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class PlanRow:
    """One line of ``--dry-run``.

    Attributes:
        site: qualified name.
        shape: ``(N, K)`` of a site, the stored shape of a weight left alone.
        parts: names of the layers stacked into the site (one name for an ordinary layer, none for a weight left alone).
        calls: nodes that multiply by the weight or take its rows (0 for a weight left alone).
        role: see :class:`LinearSite`; empty for a weight left alone.
        bias: whether there is one.
        dense_bytes: before quantization.
        predicted_bytes: after it; None for a weight left alone.
        skipped: why it is left alone, or None.
    """

    site: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    calls: int
    bias: bool
    dense_bytes: int
    predicted_bytes: int | None
    skipped: str | None
    role: str = ""


@dataclass
class Plan:
    """What to quantize, in graph order, and what not.

    Attributes:
        sites: the linears and embeddings to quantize.
        skipped: every other weight of two or more dimensions that the graph uses.
        predict: ``(N, K)`` -> bytes after quantization, as the selection rule counts them.
    """

    sites: list[LinearSite] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    predict: Callable[[int, int], int] | None = None

    def __iter__(self) -> Iterator[LinearSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def site(self, name: str) -> LinearSite:
        """The site of that name.

        Raises:
            KeyError: there is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def rows(self) -> list[PlanRow]:
        """The plan as data, sites first."""
        rows = [
            PlanRow(
                site=site.name,
                shape=(site.out_features, site.in_features),
                parts=tuple(name for name, _ in site.parts),
                calls=len(site.nodes) + len(site.lookups),
                bias=site.bias_target is not None,
                dense_bytes=site.dense_bytes,
                predicted_bytes=None if self.predict is None else self.predict(site.out_features, site.in_features),
                skipped=None,
                role=site.role,
            )
            for site in self.sites
        ]
        rows += [
            PlanRow(entry.name, entry.shape, (), 0, False, entry.nbytes, None, entry.reason) for entry in self.skipped
        ]
        return rows
