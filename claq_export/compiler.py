"""The compiler: capture -> passes -> calibrate and quantize -> lower -> emit -> verify, data flowing one way.

Each stage is a method of :class:`Compilation`; ``claq_export.export`` and the command line call them in order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx, nn

import claq_export

from .algorithm import REVISION, measure
from .algorithm.budget import Budget, LayerProfile
from .calibration.data import Batch, fingerprint
from .calibration.loading import load_calibration
from .calibration.peers import Peers
from .calibration.progress import ProgressReporter
from .calibration.sensitivity import Guidance, Importance, guidance, output_importance
from .calibration.spill import ActivationSpill, usual_budget
from .calibration.stage import CalibrationStage, QuantizedSite
from .calibration.store import LayerStore
from .calibration.tune import TuneResult, TuneSettings, tune
from .calibration.vocabulary import exact_rows, token_frequency
from .calibration.walk import NodeWalk, WalkMaker
from .capture import CACHED_TASK, CapturedModel, graph_digest, restore_weights
from .config import DECODER_OPSET, NO_CALIBRATION, Config
from .deferred import cast_tensors, weight_bytes
from .emit.artifact import Artifact, SharedData, part_path, together
from .emit.companions import companion_digests, copy_companions, declare_quantized
from .emit.genai import write_genai_config
from .errors import CalibrationError, ConfigError
from .file_graph import lower_file_graph, plan_file_graphs, release_weights, share_stacked_weights
from .format import metadata
from .format.checkpoint import quantized_stacks, save_checkpoint
from .format.files import check_writable
from .lowering import before_fusing, layers_in, lower
from .passes import PassContext, Pipeline, Plan, planning_pipeline, takes_buffers
from .passes.select_linears import layer_name
from .preflight import Preflight, predict_resources
from .process_memory import collect_garbage
from .report import LayerRecord, layer_record
from .sizing import PlannedLayer, Sizing

_log = logging.getLogger(__name__)

_Found = TypeVar("_Found", Guidance, Importance)

_NOT_IN_FINGERPRINT = ("accuracy", "calibration", "tune", "opset", "last_logits", "cache_dtype", "dtype")
"""Settings that finished layers do not depend on, or not always; calibration data counts by its content, not its file's name."""


@dataclass
class Compilation:
    """One model on its way from a captured graph to an artifact.

    Args:
        captured: the graph; it is rewritten in place.
        config: the settings.
        reporter: told of stages and layers.
        keep_records: collect what a report shows of each layer (histograms of columns need the original weights).
        peers: the processes that share calibration and quantization.
        memory: bytes of resident memory the run may take; None = what follows from the model's size.
        scratch: folder that large activations may go to; None = they all stay in memory, unless ``memory`` says otherwise.
        state: every tensor of the original model by its ``state_dict()`` name, for the PyTorch checkpoint.
        walk: makes the calibration's walk over the graph; None: one over this graph alone, on the first device.
        keep_unfused: keep a copy of the file's graph as it is before operators are fused, for :attr:`unfused`.
    """

    captured: CapturedModel
    config: Config
    reporter: ProgressReporter
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    quantization_seconds: dict[str, float] = field(default_factory=dict)
    sites: dict[str, QuantizedSite] = field(default_factory=dict)
    store: LayerStore | None = None
    budget: Budget | None = None
    tuning: TuneResult | None = None
    keep_records: bool = False
    memory: int | None = None
    scratch: Path | None = None
    peers: Peers = field(default_factory=Peers)
    records: list[LayerRecord] = field(default_factory=list)
    walk: WalkMaker | None = None
    keep_unfused: bool = False
    _context: PassContext | None = None
    _unfused: list[fx.Graph | None] = field(default_factory=list)
    _file_plans: list[Plan] = field(default_factory=list)
    _preflight: Preflight | None = None
    _predicted: list[PlannedLayer] | None = None
    _batches: list[Batch] | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def plan(self) -> Plan:
        """The linears to quantize and those left alone; runs the planning passes at the first call."""
        if self._context is None:
            with self.timed("passes"):
                context = PassContext(task=self.captured.task, aliases=self.captured.aliases)
                for record in self._planning(self.config.fuse_siblings).run(self.captured.graph_module, context):
                    self.reporter.event("pass", name=record.name, modified=record.modified, nodes=record.nodes_after)
                self._context = context
                assert context.plan is not None
                if self.captured.file_graphs:
                    self._file_plans = plan_file_graphs(
                        self.captured.file_graphs,
                        context.plan,
                        self._planning(fuse_siblings=False),
                        fuse=self.config.opset >= DECODER_OPSET,
                        last_logits=self.config.last_logits,
                        cache_dtype=torch.float16 if self.config.narrow_cache else None,
                    )
                for graph, plan in self._planned_files():
                    share_stacked_weights(graph, plan, context.plan, self.captured.graph_module)
                self._forget_dense_state(context.plan)
        assert self._context.plan is not None
        return self._context.plan

    def _planned_files(self) -> Iterator[tuple[CapturedModel, Plan]]:
        """The files' graphs that are not the quantized one, each with its plan."""
        return zip(self.captured.file_graphs, self._file_plans, strict=True)

    def _planning(self, fuse_siblings: bool) -> Pipeline:
        return planning_pipeline(
            self.config.include,
            self.config.exclude,
            fuse_siblings=fuse_siblings,
            embeddings=self.config.embeddings,
            heads=self.config.heads,
            weight_bytes=min(self.config.torch_dtype.itemsize, self.captured.dtype.itemsize),
        )

    @property
    def sizing(self) -> Sizing:
        """Predicted sizes of the plan's layers, and what a bit budget makes of them."""
        return Sizing(self.plan, self.captured.graph_module, self.config)

    def predicted_layers(self) -> list[PlannedLayer]:
        """What :meth:`Sizing.predicted_layers` says of the plan; predicted once."""
        if self._predicted is None:
            self._predicted = self.sizing.predicted_layers()
        return self._predicted

    def preflight(self) -> Preflight:
        """What the run will need; measured and predicted once."""
        if self._preflight is None:
            assert self.memory is not None
            self._preflight = predict_resources(
                self.captured.graph_module,
                self.plan.sites,
                self.batches(),
                self.config.layer_settings(),
                self.predicted_layers(),
                self.sizing.unquantized_bytes(),
                self.memory,
            )
        return self._preflight

    def batches(self) -> list[Batch] | None:
        """Calibration batches as the settings say; None for ``calibration="none"``.

        Raises:
            CalibrationError: the data cannot be read, is not enough, or does not fit the model.
        """
        if self._batches is None and self.config.calibration != NO_CALIBRATION:
            with self.timed("calibration data"):
                self._batches = load_calibration(
                    self.captured, self.config, self.reporter, whole=self.memory is None, guided=self._guides()
                )
        return self._batches

    def quantize(self, work: Path | None = None, resume: bool | None = None) -> None:
        """Calibrate, quantize, tune if asked for, and put the quantized operators into the graph.

        Args:
            work, resume: see :meth:`quantize_sites`.
        """
        for graph, plan in self._planned_files():
            release_weights(graph, plan)  # nothing reads them from here on
        collect_garbage()
        self.quantize_sites(work, resume, keep_dense=self.keep_records or self.config.tune is not None)
        if self.config.tune is not None:
            self.tune()
        if self.keep_records:
            self.records = [self._record(done) for done in self.sites.values()]
        with self.timed("passes"):
            self._lower()
        if self.memory is None:
            restore_weights([graph.graph_module for graph in self.captured.graphs])

    def quantize_sites(self, work: Path | None = None, resume: bool | None = None, *, keep_dense: bool = True) -> None:
        """Calibrate and quantize; nothing is lowered.

        Args:
            work: folder for finished layers, so that an interrupted run can go on; None = keep nothing.
            resume: False: discard what an earlier run left in ``work``; otherwise go on with it, and refuse that of another
                run, with what changed.
            keep_dense: keep the graph's unquantized weights (for tuning, records, comparisons); False: let go of each with
                its layer.
        """
        plan = self.plan
        if self.config.budgeted:
            self.predicted_layers()  # refuses a budget that nothing can meet, before the first batch
        batches = self.batches()
        if batches is None:
            self.reporter.warn(
                "no calibration: every column gets plain k-means, without error feedback; "
                "a calibration text lowers the error a lot"
            )
        if work is not None and self.peers.rank == 0:
            self.store = LayerStore(work, self._fingerprint(batches), resume)
        with contextlib.ExitStack() as stack:
            spill = None
            devices = self.peers.devices(self.config.devices)
            on_cpu = torch.device(devices[0]).type == "cpu"
            if self.memory is not None:
                assert work is not None
                spill = stack.enter_context(ActivationSpill(self.preflight().activations, work))
                on_cpu = True  # the model runs where activations can go to disk from
            elif self.scratch is not None and on_cpu:
                budget = usual_budget(weight_bytes(self.captured.graph_module))
                spill = stack.enter_context(ActivationSpill(budget, self.scratch))
            stack.enter_context(self.timed("quantization"))
            walk = self.walk or partial(NodeWalk, spill=spill, device=None if on_cpu else torch.device(devices[0]))
            guide = None if batches is None else self._guidance(batches)
            stage = CalibrationStage(
                self.captured.graph_module,
                plan.sites,
                settings=self.config.layer_settings(),
                table_settings=self.sizing.table_settings(),
                token_clip=self.config.hessian_clip,
                devices=devices,
                reporter=self.reporter,
                store=self.store,
                walk=walk,
                release=self.memory is not None,
                keep_dense=keep_dense,
                peers=self.peers,
                guidance=guide,
            )
            plans = None
            if self.config.budgeted:
                plans = None if self.store is None else self.store.load_plans()
                # A budget is solved by all processes or by none.
                if self.peers.size > 1 or plans is None:
                    self.budget = self.sizing.solve_budget(self.profiles(stage, batches, guide))
                    plans = self.budget.plans
                    self.reporter.event("budget", **self.budget.to_json())
                    if self.store is not None:
                        self.store.save_plans(plans)
            self.sites = stage.run(batches, plans)
        self.quantization_seconds = stage.seconds
        self.reporter.event("time", **{step: round(spent, 3) for step, spent in stage.seconds.items()})

    def tune(self, batches: Sequence[Batch] | None = None, settings: TuneSettings | None = None) -> TuneResult:
        """Tune the quantized layers by gradient against the model's original weights (before they leave the graph).

        Args:
            batches: to tune on; None: those that calibrated.
            settings: None: as the configuration says.

        Raises:
            CalibrationError: there is no calibration data, or the model has no gradient.
        """
        batches = self.batches() if batches is None else batches
        if batches is None:
            raise CalibrationError("tuning needs calibration data; it was switched off")
        if self.memory is not None:
            raise ConfigError("tuning needs the whole model in memory, twice over; leave out --tune or --memory")
        with self.timed("tuning"):
            result = tune(
                self.captured.graph_module,
                [done.site for done in self.sites.values()],
                {name: done.layer for name, done in self.sites.items()},
                batches,
                task=self.captured.task,
                settings=settings or TuneSettings(minutes=self.config.tune or None),
                seed=self.config.seed,
                reporter=self.reporter,
            )
        if result.after >= result.before:
            self.reporter.warn(
                f"tuning brought no gain on held-out samples (loss {result.before:.4g}); the layers stay as they were"
            )
        self.sites = {
            name: replace(done, layer=result.layers[name], bits=measure(result.layers[name]))
            for name, done in self.sites.items()
        }
        self.tuning = result
        return result

    def profiles(
        self, stage: CalibrationStage, batches: Sequence[Batch] | None, guide: Guidance | None = None
    ) -> list[LayerProfile]:
        """What every column of every layer would gain from bits and outliers; the same for all budgets."""
        importance = self._importance(batches) if guide is None or not self.config.importance else guide.importance
        return stage.profile(batches, importance)

    def _gradients(self, take: Callable[..., _Found], batches: Sequence[Batch]) -> _Found:
        """What ``take`` (:func:`guidance` or :func:`output_importance`) finds in this model.

        Raises:
            CalibrationError: the model has no gradient.
        """
        graph_module, sites = self.captured.graph_module, self.plan.sites
        frequency = token_frequency(graph_module, sites, batches)
        return take(
            graph_module,
            sites,
            batches,
            task=self.captured.task,
            seed=self.config.seed,
            reporter=self.reporter,
            exact=exact_rows(sites, frequency, self.sizing.table_settings()),
        )

    def settings(self) -> dict[str, Any]:
        """The configuration as JSON values, with what was decided where it leaves that open."""
        return {**self.config.to_json(), "guided": self._guides()}

    @property
    def _alone(self) -> bool:
        """Whether this process has the whole model and all calibration data, as gradients need them."""
        return self.memory is None and self.peers.size == 1

    @property
    def _guidable(self) -> bool:
        """Whether this is a model that gradients guide where nothing is said."""
        calibrated = self.config.calibration != NO_CALIBRATION
        return calibrated and self.captured.task is not None and self.config.preset is None

    def _guides(self) -> bool:
        """Whether gradients of all calibration tokens are to be taken."""
        return self._alone and self._guidable if self.config.guided is None else self.config.guided

    def _guidance(self, batches: Sequence[Batch]) -> Guidance | None:
        """Gradients of all calibration tokens; None where they are not wanted, or neither asked for nor to be had.

        Raises:
            ConfigError: they are asked for, and the model is not in memory as a whole, or tokens are shared out over processes.
            CalibrationError: they are asked for, and the model has none.
        """
        asked = self.config.guided
        if not self._guides():
            if asked is None and self._guidable:
                self.reporter.warn(
                    "with a limit on memory, or with several processes, calibration tokens count by their norms, not by "
                    "gradients; --no-guided asks for the same"
                )
            return None
        if not self._alone:
            raise ConfigError(
                "--guided needs the whole model in memory and one process; leave it out with --memory or torchrun"
            )
        found = None if self.store is None else self.store.load_guidance()
        if found is not None:
            return found
        try:
            with self.timed("gradients"):
                found = self._gradients(guidance, batches)
        except CalibrationError as error:
            if asked:
                raise
            self.reporter.warn(f"calibration tokens count by their norms, not by gradients: {error}")
            return None
        if self.store is not None:
            self.store.save_guidance(found)
        return found

    def _importance(self, batches: Sequence[Batch] | None) -> Importance | None:
        """What an error of each layer's outputs counts, by gradients; None where they are not wanted or not to be had."""
        if batches is None or not self.config.importance:
            return None
        if self.memory is not None:
            self.reporter.warn(
                "with a limit on memory the budget weighs each layer's error relative to its own output: gradients need the "
                "whole model in memory; --no-importance asks for the same"
            )
            return None
        try:
            with self.timed("importance"):
                return self._gradients(output_importance, batches)
        except CalibrationError as error:
            self.reporter.warn(f"the budget weighs each layer's error relative to its own output: {error}")
            return None

    def _record(self, done: QuantizedSite) -> LayerRecord:
        return layer_record(
            done.site.name,
            done.layer,
            done.site.weight(self.captured.graph_module).detach(),
            nominal_bits=done.bits.nominal_bits,
            error=done.error,
            seconds=done.seconds,
            parts=[name for name, _ in done.site.parts] if len(done.site.parts) > 1 else (),
            kind=done.site.kind,
        )

    def _forget_dense_state(self, plan: Plan) -> None:
        """Drop what the checkpoint leaves out anyway: the graph alone keeps the weights that are to be quantized."""
        for site in plan.sites:
            for part, _ in site.parts:
                for name in (part, f"{part}.weight"):
                    for tied in (name, *self.captured.aliases.get(name, ())):
                        self.state.pop(tied, None)
        for stack in quantized_stacks(self.state, {part for site in plan.sites for part, _ in site.parts}):
            del self.state[stack]

    def _lower(self) -> None:
        layers = {name: done.layer for name, done in self.sites.items()}
        assert self._context is not None
        level, keep = self.config.accuracy_level, self.keep_unfused
        into_file = not self._file_plans
        self._unfused = [
            lower(self.captured.graph_module, self._context, layers, level, fuse=into_file, keep_unfused=keep)
        ]
        if self._file_plans:
            self._unfused = [
                lower_file_graph(graph, plan, layers, level, keep_unfused=keep) for graph, plan in self._planned_files()
            ]

    def _fingerprint(self, batches: Sequence[Batch] | None) -> dict[str, str]:
        settings = {key: value for key, value in self.settings().items() if key not in _NOT_IN_FINGERPRINT}
        # Without a budget importance has no effect, and neither with a limit on memory.
        settings["importance"] = self.config.budgeted and self.config.importance and self.memory is None
        if self.config.size is not None:
            settings["dtype"] = self.config.dtype  # of what is not quantized, which is counted
        layers = [(site.name, site.parts, site.in_features) for site in self.plan.sites]
        return {
            **{f"setting {name}": json.dumps(value, sort_keys=True) for name, value in settings.items()},
            "device": torch.device(self.config.devices[0]).type,
            "claq version": claq_export.__version__,
            "revision of the algorithm": REVISION,
            "torch version": torch.__version__,
            "model": self.captured.source.sha256,
            "model's graph": graph_digest(self.captured.graph_module),
            "layers to quantize": hashlib.sha256(json.dumps(layers).encode()).hexdigest(),
            "calibration data": fingerprint(batches or []),
        }

    @property
    def true_bits(self) -> float:
        """True bits a weight over all quantized layers."""
        weights = self.quantized_weights
        return 8 * sum(done.bits.nbytes for done in self.sites.values()) / weights if weights else 0.0

    @property
    def nominal_bits(self) -> float:
        """The paper's bits a weight over all quantized layers."""
        weights = self.quantized_weights
        total = sum(d.bits.nominal_bits * d.layer.in_features * d.layer.out_features for d in self.sites.values())
        return total / weights if weights else 0.0

    @property
    def quantized_weights(self) -> int:
        """Number of weights in quantized layers."""
        return sum(done.layer.in_features * done.layer.out_features for done in self.sites.values())

    @property
    def transposed(self) -> set[str]:
        """Layers whose weight the model stores as ``[in_features, out_features]``."""
        return {name for name, done in self.sites.items() if done.site.transposed}

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """Layer -> further modules with the same weight."""
        found = {}
        for name, done in self.sites.items():
            others = self.captured.aliases.get(done.site.weight_name, ())
            if others:
                found[name] = tuple(layer_name(other) for other in others)
        return found

    def metadata(self, graph: CapturedModel) -> dict[str, str]:
        """What the ONNX file of a graph says about itself."""
        held = layers_in(graph)
        parts = {
            name: done.site.parts for name, done in self.sites.items() if name in held and len(done.site.parts) > 1
        }
        return {
            "claq.version": claq_export.__version__,
            "claq.config": json.dumps(self.settings(), sort_keys=True),
            "claq.true_bits": f"{self.true_bits:.4f}",
            "claq.nominal_bits": f"{self.nominal_bits:.4f}",
            "claq.source": Path(self.captured.source.path).name,
            "claq.source_sha256": self.captured.source.sha256,
            metadata.TASK: graph.task or "",
            metadata.PARTS: json.dumps(parts),
            metadata.TRANSPOSED: json.dumps(sorted(self.transposed & held)),
        } | ({metadata.CACHE_BUFFERS: "1"} if self._takes_buffers(graph) else {})

    def _takes_buffers(self, graph: CapturedModel) -> bool:
        """In 16 bits attention is ONNX's own operator, which makes a longer cache at each step."""
        return graph.dtype == torch.float32 and takes_buffers(graph.graph_module.graph)

    @property
    def emitted(self) -> tuple[CapturedModel, ...]:
        """The graphs that go into files."""
        return self.captured.emitted

    @property
    def unfused(self) -> list[CapturedModel | None]:
        """The same as they were before operators were fused; None before they are lowered, and where ``keep_unfused`` is off."""
        before = self._unfused or [None] * len(self.emitted)
        return [
            None if unfused is None else before_fusing(graph, unfused)
            for graph, unfused in zip(self.emitted, before, strict=True)
        ]

    @property
    def cached(self) -> bool:
        """Whether the files' graphs have a key/value cache."""
        return self.emitted[0].cached

    @property
    def dtype(self) -> torch.dtype:
        """Of the files' graphs."""
        return self.emitted[0].dtype

    def emit(self, out: Path, place: Path | None = None) -> Artifact:
        """Write ``out``, its external data, ``claq.safetensors`` and ``claq.json``, and what a loader looks for
        beside them.

        Args:
            out: the model file.
            place: the folder that all files are moved to afterwards; None: they stay in that of ``out``. In the model's
                own folder its configuration and tokenizer are left as they are.

        Raises:
            OutputError: a file cannot be written.
        """
        check_writable(out)
        source = self.captured.source.folder
        at_home = source is not None and source.resolve() == (place or out.parent).resolve()
        with self.timed("emission"):
            shared: SharedData | None = {} if len(self.emitted) > 1 else None
            artifact = together(
                [
                    emit_captured(graph, part_path(out, graph.part), self.metadata(graph), shared)
                    for graph in self.emitted
                ]
            )
            state = cast_tensors(self.state, self.dtype)
            companions = [] if source is None or at_home else copy_companions(source, out.parent)
            if companions:
                floating = next((t.dtype for t in state.values() if t.is_floating_point()), self.dtype)
                declare_quantized(out.parent, self.true_bits, floating)
            if self.emitted[0].task == CACHED_TASK:
                genai = write_genai_config(
                    out.parent, out.name, self.emitted[0].file_shapes, source if at_home else None
                )
                companions += [genai] if genai else []
            save_checkpoint(
                out.parent,
                {name: done.layer for name, done in self.sites.items()},
                state,
                {**self.settings(), "task": self.emitted[0].task or ""},
                parts={name: done.site.parts for name, done in self.sites.items()},
                accuracy_level=self.config.torch_accuracy_level,
                transposed=self.transposed,
                tied=self.tied,
                files=companion_digests(out.parent, companions),
            )
        return artifact


def emit_captured(
    captured: CapturedModel,
    out: Path,
    metadata: Mapping[str, str] | None = None,
    shared: SharedData | None = None,
) -> Artifact:
    """Write a captured graph as ONNX, inputs and outputs under the names they have in files; ``shared`` as
    :func:`~claq_export.emit.emit_onnx` has it."""
    from .emit.exporter import emit_onnx

    names = captured.file_names
    return emit_onnx(
        captured.graph_module,
        captured.example_inputs,
        out,
        dynamic_shapes=captured.dynamic_shapes,
        input_names=[names.get(name, name) for name in captured.input_names],
        output_names=[names.get(name, name) for name in captured.output_names],
        metadata=metadata,
        shared=shared,
    )


def used_state(model: nn.Module, captured: CapturedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model's ``state_dict()`` that its captured graph reads, for the PyTorch checkpoint.

    A module may hold more: a pooler that the task does not use, which its checkpoint need not even have.
    """
    graph = captured.graph_module
    read = {name for name, _ in (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers())}
    return {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and (name in read or read.intersection(captured.aliases.get(name, ())))
    }
