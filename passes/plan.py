"""The plan: which linears of a graph are quantized, which are left alone, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from .attributes import get_attribute


@dataclass
class LinearSite:
    """A weight to quantize and the ``aten.linear`` nodes that use it.

    Attributes:
        name: qualified name of the layer: its module's, or the parameter's own if that is not called ``weight``.
        weight_name: the weight's name in the model's ``state_dict()`` (the first one, for a stacked site).
        nodes: every node that multiplies by this weight, in topological order.
        in_features, out_features: K and N.
        dtype: of the weight.
        parts: ``(layer name, rows)`` of what is stacked, in order of rows; a single entry for an ordinary layer.
        transposed: the model stores this weight as ``[K, N]``.
    """

    name: str
    weight_name: str
    nodes: list[fx.Node]
    in_features: int
    out_features: int
    dtype: torch.dtype
    parts: list[tuple[str, int]]
    transposed: bool = False

    @property
    def node(self) -> fx.Node:
        """The first node."""
        return self.nodes[0]

    @property
    def weight_target(self) -> str:
        """Attribute of the GraphModule that holds the weight as ``[N, K]``."""
        node = self.node.args[1]
        assert isinstance(node, fx.Node)
        return str(node.target)

    @property
    def bias_target(self) -> str | None:
        """Attribute of the GraphModule that holds the bias of the first node, if it has one."""
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
        calls: nodes that use the weight (0 for a weight left alone).
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


@dataclass
class Plan:
    """What to quantize, in graph order, and what not.

    Attributes:
        sites: the linears to quantize.
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
                calls=len(site.nodes),
                bias=site.bias_target is not None,
                dense_bytes=site.dense_bytes,
                predicted_bytes=None if self.predict is None else self.predict(site.out_features, site.in_features),
                skipped=None,
            )
            for site in self.sites
        ]
        rows += [
            PlanRow(entry.name, entry.shape, (), 0, False, entry.nbytes, None, entry.reason) for entry in self.skipped
        ]
        return rows
