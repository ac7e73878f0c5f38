"""The calibration walk: from linear layer to linear layer, all batches up to the same point before the next step.

When the walk reaches a linear layer its inputs for all batches are at hand, computed by layers that are quantized already
(GPTQ's "true sequential"); what the visitor returns as its weight is what the rest of the graph sees. No architecture needs a
class of its own, and every operator runs exactly once a batch.

Between two linears the batches run one after another, so that only what is still needed later is kept for all of them: the
residual stream and the next linear's input, not the wide values in between. A value that depends on inputs which several
batches share (a mask of ones, a position table) is computed once for these batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, overload

import torch
from torch import fx

from ..deferred import is_deferred, materialize
from ..errors import CalibrationError
from ..passes.attributes import get_attribute
from ..process_memory import trim_freed_memory
from .data import Batch
from .operators import faster
from .spill import ActivationSpill, Spilled, is_large

LinearVisitor = Callable[[fx.Node, Sequence[torch.Tensor]], torch.Tensor | None]
"""Called with a linear node and its input for each batch; returns the weight ``[N, K]`` to go on with, None to keep
it."""

Stop = tuple[fx.Node, Sequence[torch.Tensor]]
"""A linear node and its input for each batch."""


RowLookup = Callable[[torch.Tensor], torch.Tensor]
"""Rows of a table for indices of any shape."""


def ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and everything they depend on."""
    needed: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def _in_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Nodes of a graph in an order to run them in: what fetches a tensor comes right before its first reader, so that weights
    that have to be read for it are not all in memory from the start."""
    order: dict[fx.Node, None] = {}
    for node in nodes:
        if node.op != "get_attr":
            order.update(dict.fromkeys(value for value in node.all_input_nodes if value.op == "get_attr"))
            order[node] = None
    return list(order)


_Signature = frozenset[Any]
"""What a value depends on: identities of input tensors, and plain numbers such as sizes."""


class NodeWalk:
    """One walk over a graph module of ATen operators, for a list of batches.

    Args:
        graph_module: unlifted graph (parameters are ``get_attr`` nodes) whose operators write into none of their arguments.
        batches: inputs by name; their order is that of the graph's placeholders.
        stop_at: linear nodes the visitor is called for; nothing that they do not depend on is computed.
        lookups: embedding nodes -> what gives the rows for their indices, in the place of the table in the graph.
        spill: where activations go past a budget; None = all stay in memory.
        device: where the operators run; inputs and weights are copied there as they are needed, each weight once. None:
            wherever the graph's tensors are.

    Raises:
        CalibrationError: the batches do not have the graph's inputs, or an operator fails on them.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        batches: Sequence[Batch],
        stop_at: Sequence[fx.Node],
        lookups: Mapping[fx.Node, RowLookup] | None = None,
        spill: ActivationSpill | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._module = graph_module
        self._spill = spill
        self._device = device
        self._held = [0] * len(batches)
        # What was read from disk again and is still needed later keeps its file.
        self._files: list[dict[fx.Node, Spilled]] = [{} for _ in batches]
        self._batches = batches
        self._lookups = dict(lookups or {})
        self._linears = set(stop_at)
        needed = ancestors(stop_at)
        self._nodes = _in_order(node for node in graph_module.graph.nodes if node in needed)
        self._last_use = self._find_last_uses()
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        names = list(batches[0]) if batches else []
        if len(names) != len(placeholders):
            raise CalibrationError(
                f"the model takes {len(placeholders)} inputs, the calibration batches have {len(names)}: "
                f"{', '.join(names)}"
            )
        self._input_name = dict(zip(placeholders, names, strict=True))
        uses = Counter(id(tensor) for batch in batches for tensor in batch.values())
        self._shared_inputs = {identity for identity, count in uses.items() if count > 1}
        self._values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self._signatures: list[dict[fx.Node, _Signature]] = [{} for _ in batches]
        self._shared: dict[fx.Node, dict[_Signature, Any]] = {}
        self._weights: dict[fx.Node, torch.Tensor | None] = {}

    def _find_last_uses(self) -> Mapping[fx.Node, list[fx.Node]]:
        """For each node, the values that nothing after it needs."""
        dead_after: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self._nodes):
            for argument in (node, *node.all_input_nodes):
                if argument not in seen:
                    seen.add(argument)
                    dead_after.setdefault(node, []).append(argument)
        return dead_after

    def _segments(self) -> Iterator[tuple[list[fx.Node], fx.Node]]:
        """The nodes between two linears, and the linear after them, which itself begins the next segment."""
        nodes: list[fx.Node] = []
        for node in self._nodes:
            if node in self._linears:
                yield nodes, node
                nodes = []
            nodes.append(node)

    @property
    def linears(self) -> list[fx.Node]:
        """The nodes the walk stops at, in order."""
        return [node for node in self._nodes if node in self._linears]

    def run(self, visit: LinearVisitor) -> None:
        """Walk the graph, calling ``visit`` at each linear node of ``stop_at`` in topological order."""
        steps = self.steps()
        stop = next(steps, None)
        while stop is not None:
            stop = _resume(steps, visit(*stop))

    def steps(self) -> Generator[Stop, torch.Tensor | None, None]:
        """The walk as a generator: yields each stop, takes the weight to go on with (None: the present one)."""
        for nodes, linear in self._segments():
            self._run_batches(nodes)
            source = linear.args[0]
            assert isinstance(source, fx.Node)
            trim_freed_memory()  # of blocks between activations that stay: they add up to hundreds of megabytes
            weight = yield linear, _Inputs(self._values, source)
            with torch.no_grad():
                self._weights[linear] = self._present_weight(linear) if weight is None else self._here(weight)
            del weight  # dense: it would stay in memory while the next layer is quantized

    # Not around the generator: what decorates one keeps the last value that was sent.
    @torch.no_grad()
    def _run_batches(self, nodes: Sequence[fx.Node]) -> None:
        read = {argument for node in nodes for argument in node.all_input_nodes}
        for index in range(len(self._batches)):
            self._fetch_batch(index, read)
            self._run_segment(nodes, index)
            self._spill_batch(index)
        for node in nodes:
            for dead in self._last_use.get(node, ()):
                self._shared.pop(dead, None)

    def _fetch_batch(self, index: int, wanted: Set[fx.Node]) -> None:
        """Read those of a batch's values from disk that are wanted now."""
        values = self._values[index]
        for node, value in values.items():
            if isinstance(value, Spilled) and node in wanted:
                values[node], self._files[index][node] = value.read(), value

    def _spill_batch(self, index: int) -> None:
        """Move a batch's large values to disk if those of all batches are more than the budget."""
        if self._spill is None:
            return
        values = self._values[index]
        shared = {id(value) for known in self._shared.values() for value in known.values()}
        large = {
            node: value
            for node, value in values.items()
            if is_large(value) and id(value) not in shared and node.op == "call_function"
        }
        self._held[index] = sum(value.nbytes for value in large.values())
        if sum(self._held) > self._spill.budget:
            for node, value in large.items():
                values[node] = self._files[index].pop(node, None) or self._spill.put(value)
            self._held[index] = 0

    def _run_segment(self, nodes: Sequence[fx.Node], index: int) -> None:
        values, signatures = self._values[index], self._signatures[index]
        for node in nodes:
            signature = self._signature(node, index)
            shareable = bool(self._shared_inputs.issuperset(item[1] for item in signature if item[0] == "input"))
            if shareable and signature in self._shared.get(node, ()):
                value = self._shared[node][signature]
            else:
                value = self._evaluate(node, index)
                if shareable and (node.op == "call_function" or self._is_copied(node)):
                    self._shared.setdefault(node, {})[signature] = value
            values[node], signatures[node] = value, signature
            for dead in self._last_use.get(node, ()):
                del values[dead], signatures[dead]
                self._files[index].pop(dead, None)
        if nodes and nodes[0] in self._linears and index == len(self._batches) - 1:
            self._weights.pop(nodes[0])

    def _signature(self, node: fx.Node, index: int) -> _Signature:
        if node.op == "placeholder":
            return frozenset({("input", id(self._batches[index][self._input_name[node]]))})
        signature: set[Any] = set()
        for argument in node.all_input_nodes:
            value = self._values[index][argument]
            # A size is a number like any other: what depends on sizes alone is the same for equal sizes.
            plain = isinstance(value, (int, float, bool))
            signature |= {("number", argument, value)} if plain else self._signatures[index][argument]
        return frozenset(signature)

    def _evaluate(self, node: fx.Node, index: int) -> Any:
        if node.op == "placeholder":
            return self._here(self._batches[index][self._input_name[node]])
        if node.op == "get_attr":
            # The weights of the linears where the walk stops are read there, once, and not for every batch; those of tables
            # whose rows come from elsewhere never.
            unread = all(
                (user in self._linears and user.args[1] is node) or (user in self._lookups and user.args[0] is node)
                for user in node.users
            )
            return self._stored(node) if unread else self._here(materialize(self._stored(node)))
        args, kwargs = self._arguments(node, index)
        if node in self._linears:
            weight = self._weights[node]
            if weight is not None:
                args = (args[0], weight.to(args[0]), *args[2:])
        try:
            if node in self._lookups:
                return self._here(self._lookups[node](args[1]))
            return self._callable(node)(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            raise CalibrationError(f"operator {node.name} fails on calibration batch {index}: {error}") from error

    def _stored(self, node: fx.Node) -> Any:
        """What a ``get_attr`` node fetches, a stand-in as it is; None for other nodes."""
        return get_attribute(self._module, str(node.target)) if node.op == "get_attr" else None

    def _here(self, value: Any) -> Any:
        """A tensor on the walk's device; anything else as it is."""
        return value.to(self._device) if self._device is not None and isinstance(value, torch.Tensor) else value

    def _is_copied(self, node: fx.Node) -> bool:
        """Whether what a ``get_attr`` node gives is another tensor than the graph's: one that is worth keeping."""
        stored = self._stored(node)
        elsewhere = self._device is not None and isinstance(stored, torch.Tensor) and stored.device != self._device
        return stored is not None and (is_deferred(stored) or elsewhere)

    def _present_weight(self, linear: fx.Node) -> torch.Tensor | None:
        """The unquantized weight of a linear where it has to be read or copied first; None where the graph holds it."""
        weight = linear.args[1]
        if not isinstance(weight, fx.Node) or not self._is_copied(weight):
            return None
        return self._here(materialize(self._stored(weight)))  # type: ignore[no-any-return]

    def _callable(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_function" and callable(node.target):
            return faster(node.target)
        if node.op == "call_module":
            return self._module.get_submodule(str(node.target))
        raise CalibrationError(f"graph node {node.format_node()} is not an operator of a captured graph")

    def _arguments(self, node: fx.Node, index: int) -> tuple[Any, Any]:
        values = self._values[index]

        def given(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return values[argument]
            # A graph that was captured on the CPU makes its constants there.
            return self._device if self._device is not None and isinstance(argument, torch.device) else argument

        return fx.node.map_aggregate(node.args, given), fx.node.map_aggregate(node.kwargs, given)


class JointWalk:
    """Several graphs of one model walked together, such as prompt and single-token step of a decoder.

    A layer is visited once all graphs that read its weight stand at it, with the inputs of all their batches.

    Args:
        walks: one a graph, each with its own batches; the first names the layers.
        same: linear node of a further graph -> node of the first graph that multiplies by the same weight.
    """

    def __init__(self, walks: Sequence[NodeWalk], same: Mapping[fx.Node, fx.Node]) -> None:
        self._walks = walks
        self._same = same

    def run(self, visit: LinearVisitor) -> None:
        """Walk all graphs, calling ``visit`` with nodes of the first one."""
        ahead = [Counter(self._key(node) for node in walk.linears) for walk in self._walks]
        steps = [walk.steps() for walk in self._walks]
        stops = [next(step, None) for step in steps]
        while any(stop is not None for stop in stops):
            keys = [None if stop is None else self._key(stop[0]) for stop in stops]
            waiting = [key for key in keys if key is not None]
            # Graphs that come to two layers in different orders would wait for one another for ever: the first goes on.
            key = next(
                (k for k in waiting if all(at is k or not left[k] for at, left in zip(keys, ahead, strict=True))),
                waiting[0],
            )
            standing = [index for index, at in enumerate(keys) if at is key]
            weight = visit(key, [x for index in standing for x in stops[index][1]])  # type: ignore[index]
            for index in standing:
                ahead[index][key] -= 1
                stops[index] = _resume(steps[index], weight)
            del weight

    def _key(self, node: fx.Node) -> fx.Node:
        return self._same.get(node, node)


WalkMaker = Callable[
    [fx.GraphModule, Sequence[Batch], Sequence[fx.Node], Mapping[fx.Node, RowLookup]], NodeWalk | JointWalk
]
"""Makes a walk over a graph for batches that stops at the given linear nodes and takes rows from the given tables."""


def _resume(steps: Generator[Stop, torch.Tensor | None, None], weight: torch.Tensor | None) -> Stop | None:
    """The walk's next stop, None at its end."""
    try:
        return steps.send(weight)
    except StopIteration:
        return None


class _Inputs(Sequence[torch.Tensor]):
    """A linear's input for each batch; one that was spilled is read when it is asked for, and not kept."""

    def __init__(self, values: Sequence[Mapping[fx.Node, Any]], source: fx.Node) -> None:
        self._values = [value[source] for value in values]

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        value = self._values[index]
        return value.read() if isinstance(value, Spilled) else value
