"""The three ways to calibrate the weights of compiled graphs, all on the compiler's own stages.

- *Data*: the module that Dynamo compiles is captured by ``torch.export`` and goes through the stages of an export, so its
  layers are those of the artifact.
- *Observation*: the inputs of the first calls are kept, and Dynamo's own graphs are walked with them, all graphs that share
  weights at once. That is the export's algorithm too: every layer sees inputs computed by quantized layers.
- *None*: plain column k-means.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..api import capture
from ..calibration.data import Batch
from ..calibration.progress import ProgressReporter
from ..calibration.walk import JointWalk, NodeWalk, RowLookup
from ..capture import CapturedModel, TaskModel
from ..capture.tasks import infer_task
from ..compiler import Compilation
from ..config import DEFAULT_SAMPLES, Config
from ..errors import CalibrationError, ModelError
from ..passes import LinearSite
from .graph import DynamoGraph
from .options import CompileOptions
from .store import Stack, WeightStore, version_of


class Recording:
    """Calls of one graph with one set of weights; when the first of these is gone, what was kept goes, too.

    Args:
        graph: the graph.
        args: inputs of the first call, the parameters among them.
        batches: inputs of each call kept, parameters left out; None without calibration.

    Attributes:
        nbytes: of the batches.
    """

    def __init__(self, graph: DynamoGraph, args: Sequence[Any], batches: list[Batch] | None) -> None:
        self.graph, self.batches, self.nbytes = graph, batches, 0
        # A session lives as long as the process, and must not keep a model alive that is never called again.
        self._args: list[Any] = [weakref.ref(arg) if i in graph.names else arg for i, arg in enumerate(args)]
        self._missing: list[weakref.ref[torch.Tensor]] = []
        self._last: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        if graph.names:
            weakref.finalize(args[min(graph.names)], _forget, weakref.ref(self)).atexit = False

    @property
    def alive(self) -> bool:
        """Whether all parameters still are there."""
        return all(self._args[position]() is not None for position in self.graph.names)

    @property
    def args(self) -> tuple[Any, ...]:
        """As they were given."""
        return tuple(arg() if i in self.graph.names else arg for i, arg in enumerate(self._args))

    @property
    def missing(self) -> list[torch.Tensor]:
        """Parameters that are not quantized yet."""
        return [weight for ref in self._missing if (weight := ref()) is not None]

    @missing.setter
    def missing(self, weights: Sequence[torch.Tensor]) -> None:
        self._missing = [weakref.ref(weight) for weight in weights]

    def forget(self) -> None:
        """Let go of all inputs."""
        if self.batches is not None:
            self.batches.clear()
        self._args = [arg if i in self.graph.names else None for i, arg in enumerate(self._args)]
        self._last.clear()
        self.nbytes = 0

    def add(self, args: Sequence[Any], room: int) -> None:
        """Keep the inputs of a call unless they take more than ``room`` bytes; the first call is always kept."""
        assert self.batches is not None
        copies: dict[int, torch.Tensor] = {}
        nbytes = 0
        for position in self.graph.inputs:
            value = args[position]
            if isinstance(value, torch.Tensor) and self._seen(position, value) is None:
                nbytes += value.numel() * value.element_size()
        if self.batches and nbytes > room:
            return
        for position in self.graph.inputs:
            value = args[position]
            if isinstance(value, torch.Tensor):
                copy = self._seen(position, value)
                if copy is None:
                    # Caches are written to in place by the call itself.
                    copy = value.detach().clone()
                    self._last[position] = (weakref.ref(value), version_of(value), copy)
                value = copy
            copies[position] = value
        self.nbytes += nbytes
        self.batches.append({str(position): value for position, value in copies.items()})

    def _seen(self, position: int, value: torch.Tensor) -> torch.Tensor | None:
        """The copy of an input that has not changed since the last call (a table, a mask)."""
        last = self._last.get(position)
        if last is None or last[0]() is not value or last[1] != version_of(value) or value.is_inference():
            return None
        return last[2]

    def parameter(self, layer: str) -> torch.Tensor:
        """The weight of a layer, by the layer's name."""
        args = self.args
        return _weight_of(layer, {name: args[position] for position, name in self.graph.names.items()})


def _forget(recording: weakref.ref[Recording]) -> None:
    if (one := recording()) is not None:
        one.forget()


def quantize_recordings(
    recordings: Sequence[Recording], config: Config, store: WeightStore, reporter: ProgressReporter
) -> None:
    """Quantize the weights of graphs that share them.

    Raises:
        ClaqError: a layer cannot be quantized.
    """
    by_size = sorted(recordings, key=lambda one: (-len(one.graph.names), -len(one.batches or ())))
    for recording in by_size:
        settings = recording.graph.settings(config)
        captured = recording.graph.captured(recording.args)
        compilation = Compilation(captured, settings, reporter, _batches=recording.batches)
        sites = compilation.plan.sites
        sites[:] = [
            site for site in sites if any(store.find(recording.parameter(part)) is None for part, _ in site.parts)
        ]
        if not sites:
            continue
        others = [other for other in by_size if other is not recording]
        if others:
            compilation.walk = _joint_walk(recording, sites, others, config, reporter)
        _quantize(compilation, {part: recording.parameter(part) for site in sites for part, _ in site.parts}, store)


def _joint_walk(
    first: Recording,
    sites: Sequence[LinearSite],
    others: Sequence[Recording],
    config: Config,
    reporter: ProgressReporter,
) -> Any:
    """What walks the first recording's graph together with the others, layer by layer."""
    ours = {tuple(id(first.parameter(part)) for part, _ in site.parts): site.nodes for site in sites}
    further: list[tuple[fx.GraphModule, list[Batch], dict[fx.Node, fx.Node]]] = []
    for other in others:
        compilation = Compilation(other.graph.captured(other.args), other.graph.settings(config), reporter)
        same: dict[fx.Node, fx.Node] = {}
        for site in compilation.plan.sites:
            nodes = ours.get(tuple(id(other.parameter(part)) for part, _ in site.parts), [])
            same |= dict(zip(site.nodes, nodes, strict=False))
        if same and other.batches:
            further.append((compilation.captured.graph_module, other.batches, same))

    def walk(
        module: fx.GraphModule,
        batches: Sequence[Batch],
        stop_at: Sequence[fx.Node],
        lookups: Mapping[fx.Node, RowLookup],
    ) -> JointWalk:
        walks = [NodeWalk(module, batches, stop_at, lookups)]
        every: dict[fx.Node, fx.Node] = {}
        for theirs, own_batches, same in further:
            nodes = [node for node, ours in same.items() if ours in stop_at]
            if nodes:
                walks.append(NodeWalk(theirs, own_batches, nodes))
                every |= same
        return JointWalk(walks, every)

    return walk


def quantize_on_data(
    root: nn.Module | None,
    named: Mapping[str, torch.Tensor],
    options: CompileOptions,
    store: WeightStore,
    reporter: ProgressReporter,
) -> None:
    """Quantize the module that is being compiled on calibration data, as an export does.

    Args:
        root: the module.
        named: weights of the present graph, by name.

    Raises:
        CalibrationError: there is no module to run the data through, or the data does not fit it.
        ClaqError: see :mod:`claq_export.errors`.
    """
    if root is None:
        raise CalibrationError(
            "calibration data needs a module to run through, and the compiled function is not the forward of one: compile "
            f"the module itself, or calibrate by observation (options={{'observe': 16}}); weights: {', '.join(list(named)[:3])}"
        )
    reporter.stage("claq: capturing the model for calibration")
    # The module's own forward may be what is being compiled.
    with torch.compiler.set_stance("force_eager"):
        captured, config = _capture(root, options)
    compilation = Compilation(captured, config, reporter)
    reporter.stage(f"claq: quantizing {len(compilation.plan.sites)} layers on calibration data")
    parameters = dict(root.named_parameters(remove_duplicate=False))
    layers = [part for site in compilation.plan.sites for part, _ in site.parts]
    _quantize(compilation, {layer: _weight_of(layer, parameters) for layer in layers}, store)
    for parameter in parameters.values():
        if store.find(parameter) is None:
            store.leave(parameter)


def _capture(root: nn.Module, options: CompileOptions) -> tuple[CapturedModel, Config]:
    """The module as a graph, and the settings with data that can be read once more."""
    config = options.config
    if hasattr(getattr(root, "config", None), "model_type"):
        task = infer_task([type(root).__name__])
        model = TaskModel(root, task.name)
        axes = {name: {0: "batch", 1: "sequence"} for name in model.input_names}
        captured, _ = capture(model, dynamic_shapes=axes, tokenizer=options.tokenizer)
        return captured, config
    if isinstance(config.calibration, (str, Path)):
        raise CalibrationError(
            f"calibration on text needs a transformers model; give batches of inputs for {type(root).__name__}"
        )
    items = list(islice(config.calibration, config.samples or DEFAULT_SAMPLES))
    if not items:
        raise CalibrationError("the calibration iterable is empty")
    first = items[0]
    example = first if isinstance(first, (tuple, list, Mapping)) else (first,)
    captured, _ = capture(root, example, tokenizer=options.tokenizer)
    return captured, replace(config, calibration=items)


def _quantize(compilation: Compilation, parameters: Mapping[str, torch.Tensor], store: WeightStore) -> None:
    """Run the compiler's stages; ``parameters`` are the weights of the planned layers by the layers' names."""
    compilation.quantize()
    for name, done in compilation.sites.items():
        weights = [parameters[part] for part, _ in done.site.parts]
        store.add(
            weights,
            Stack(
                name=name,
                layer=done.layer.to(str(weights[0].device)),
                rows=tuple(rows for _, rows in done.site.parts),
                transposed=done.site.transposed,
                accuracy_level=compilation.config.torch_accuracy_level,
            ),
        )


def _weight_of(layer: str, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight of a layer: named after its module, or the parameter itself."""
    for name in (f"{layer}.weight", layer):
        if name in parameters:
            return parameters[name]
    raise ModelError(f"the module has no weight for layer {layer!r}")
