"""One graph of Dynamo's as ATen operators: planned by the compiler's passes, rewritten to look its weights up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from ..capture import CapturedModel, Source
from ..config import Config
from ..passes import FuseSiblings, LinearSite, Pass, PassContext, PassResult, Pipeline, RemoveUnused, planning_pipeline
from ..passes.attributes import delete_attribute, has_attribute, set_tensor
from ..passes.base import ContractError
from ..passes.canonicalize_linears import WEIGHT_KEY
from ..passes.select_linears import layer_name
from .dynamo import GraphParameters
from .operators import embedding_of, linear_of

_aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """A graph whose planned layers are ``claq::linear_of`` and ``claq::embedding_of``; inputs as before.

    Attributes:
        module: the graph.
        weights: positions of the inputs that are weights of these operators, in graph order.
        biases: positions of the inputs that are biases of theirs.
        freeable: those of ``weights`` that nothing else in the graph reads.
        notes: why other weights are left alone.
    """

    module: fx.GraphModule
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    freeable: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SavedGraph:
    """What a graph that was loaded from disk knows of its parameters; it cannot be planned or walked again.

    Attributes:
        names: position of an input -> name of the parameter it is.
    """

    names: dict[int, str]


class DynamoGraph:
    """A graph as Dynamo handed it over, traced to ATen.

    Args:
        aten: the traced graph; it is left as it is.
        functional: the same without in-place operators, for calibration.
        parameters: which of its inputs are parameters.
        example_inputs: as Dynamo gave them.
    """

    def __init__(
        self,
        aten: fx.GraphModule,
        functional: fx.GraphModule,
        parameters: GraphParameters,
        example_inputs: Sequence[Any],
    ) -> None:
        self._aten, self._functional = aten, functional
        self.names = dict(parameters.names)
        self.root = parameters.root
        self._shapes = {i: example_inputs[i] for i in self.names}
        self._shapes = {i: nn.Parameter(torch.empty_like(p, device="meta"), False) for i, p in self._shapes.items()}
        self._positions = {name: position for position, name in self.names.items()}

    @property
    def inputs(self) -> list[int]:
        """Positions of the inputs that are no parameters."""
        count = sum(node.op == "placeholder" for node in self._aten.graph.nodes)
        return [position for position in range(count) if position not in self.names]

    def settings(self, config: Config) -> Config:
        """``config`` without name patterns that concern other graphs of the model."""
        layers = [layer_name(name) for name in self.names.values()]

        def concerns(pattern: str) -> bool:
            return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in layers)

        return replace(
            config,
            include=tuple(pattern for pattern in config.include if concerns(pattern)),
            exclude=tuple(pattern for pattern in config.exclude if concerns(pattern)),
        )

    def captured(self, args: Sequence[Any]) -> CapturedModel:
        """The functional graph with the parameters among ``args`` as its own, as the compiler takes it; each call makes a new
        one."""
        parameters = {position: args[position] for position in self.names}
        module = self._with_parameters(self._functional, parameters, keep_inputs=False)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        examples = {node.name: args[i] for node, i in zip(placeholders, self.inputs, strict=True)}
        return CapturedModel(
            graph_module=module,
            example_inputs=examples,
            dynamic_axes={},
            output_names=(),
            task=None,
            source=Source("torch.compile", ""),
        )

    def rewrite(self, config: Config, store: str) -> Rewritten:
        """Plan the graph and put the operators of compiled graphs in; no weight's values are read."""
        if config.include and not (config := self.settings(config)).include:
            return Rewritten(self._aten, (), (), (), ("none of the layers included is in this graph",))
        config = self.settings(config)
        module = self._with_parameters(self._aten, self._shapes, keep_inputs=True)
        context = PassContext()
        planning_pipeline(
            config.include,
            config.exclude,
            fuse_siblings=False,
            embeddings=config.embeddings,
            heads=config.heads,
        ).run(module, context)
        assert context.plan is not None
        sources = {site.name: (site.weight_name, site.bias_target) for site in context.plan}
        notes = tuple(f"{entry.name}: {entry.reason}" for entry in context.plan.skipped)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        inputs = {name: placeholders[position] for name, position in self._positions.items()}
        last: list[Pass] = [FuseSiblings(weights=False)] if config.fuse_siblings else []
        last += [_LookUpWeights(sources, inputs, store), RemoveUnused(), _ParametersAsInputs(inputs)]
        Pipeline(last).run(module, context)
        return self._result(module, placeholders, notes)

    def _result(self, module: fx.GraphModule, placeholders: Sequence[fx.Node], notes: tuple[str, ...]) -> Rewritten:
        position = {node: index for index, node in enumerate(placeholders)}
        weights: dict[int, None] = {}
        biases: dict[int, None] = {}
        for node in module.graph.nodes:
            if node.target is linear_of:
                weights |= dict.fromkeys(position[weight] for weight in node.args[1])
                biases |= dict.fromkeys(position[bias] for bias in node.args[2] if bias is not None)
            elif node.target is embedding_of:
                weights |= dict.fromkeys([position[node.args[1]]])
        ours = (linear_of, embedding_of)
        freeable = tuple(i for i in weights if all(user.target in ours for user in placeholders[i].users))
        return Rewritten(module, tuple(weights), tuple(biases), freeable, notes)

    def _with_parameters(
        self, source: fx.GraphModule, values: Mapping[int, torch.Tensor], keep_inputs: bool
    ) -> fx.GraphModule:
        """A copy of a graph whose parameters are attributes under their names."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(source.graph, copies))
        module = fx.GraphModule(source, graph)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        last = placeholders[-1]
        for position, value in values.items():
            node, name = placeholders[position], self.names[position]
            set_tensor(module, name, value)
            with graph.inserting_after(last):
                fetched = graph.get_attr(name)
            fetched.meta = dict(node.meta)
            node.replace_all_uses_with(fetched)
            last = fetched
            if not keep_inputs:
                graph.erase_node(node)
        module.recompile()
        return module


class _LookUpWeights(Pass):
    """Rewrites planned sites; their parameters are inputs of the graph again.

    Args:
        sources: unstacked layer -> name of its weight, and attribute of its bias or None.
        inputs: parameter -> placeholder.
        store: key of the store the operators look into.
    """

    name = "look_up_weights"
    doc = "Replaces planned linears and embeddings by operators that look up what stands for the parameter."

    def __init__(
        self, sources: Mapping[str, tuple[str, str | None]], inputs: Mapping[str, fx.Node], store: str
    ) -> None:
        self._sources = sources
        self._inputs = inputs
        self._store = store

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        if context.plan is None:
            raise ContractError("there is no plan; select_linears goes first")
        for site in context.plan:
            self._replace(gm, site)
        return PassResult(gm, bool(context.plan.sites))

    def _replace(self, gm: fx.GraphModule, site: LinearSite) -> None:
        weights = [self._inputs[self._sources[name][0]] for name, _ in site.parts]
        biases = [self._bias(self._sources[name][1]) for name, _ in site.parts]
        for node in site.nodes:
            # A weight used twice may have a bias at one place only.
            own = biases if len(site.parts) > 1 else [self._bias(_target(node.args[2]))]
            if not any(own):
                own = []
            with gm.graph.inserting_before(node):
                call = gm.graph.call_function(linear_of, (node.args[0], weights, own, site.transposed, self._store))
            _exchange(gm.graph, node, call)
        for node in site.lookups:
            with gm.graph.inserting_before(node):
                call = gm.graph.call_function(embedding_of, (node.args[1], weights[0], self._store))
            _exchange(gm.graph, node, call)

    def _bias(self, target: str | None) -> fx.Node | None:
        return None if target is None else self._inputs[target]


class _ParametersAsInputs(Pass):
    """Fetches of parameters become the graph's inputs again, in their old places."""

    name = "parameters_as_inputs"
    doc = "Makes parameters inputs of the graph again."

    def __init__(self, inputs: Mapping[str, fx.Node]) -> None:
        self._inputs = inputs

    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        modified = False
        for node in list(gm.graph.nodes):
            if node.op != "get_attr":
                continue
            target = str(node.target)
            name, transposed = node.meta.get(WEIGHT_KEY, (target, False))
            if name not in self._inputs:
                continue
            value = self._inputs[name]
            if transposed:
                with gm.graph.inserting_before(node):
                    value = gm.graph.call_function(_aten.t.default, (value,))
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
            if has_attribute(gm, target):
                delete_attribute(gm, target)
            modified = True
        return PassResult(gm, modified)


def _target(value: object) -> str | None:
    return str(value.target) if isinstance(value, fx.Node) else None


def _exchange(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
