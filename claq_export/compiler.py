"""The compiler: capture -> passes -> calibrate and quantize -> lower -> emit -> verify, data flowing one way.

Each stage is a method of :class:`Compilation`; ``claq_export.export`` and the command line call them in order.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import nn

import claq_export

from .algorithm import ColumnPlan, measure, predict
from .algorithm.budget import Budget, LayerProfile, solve
from .algorithm.settings import LayerSettings
from .cached import lower_with_cache, plan_with_cache
from .calibration.data import (
    Batch,
    batches_from_iterable,
    fingerprint,
    group_equal_shapes,
    iterate_texts,
    read_texts,
    tokenize_texts,
)
from .calibration.peers import Peers
from .calibration.progress import ProgressReporter
from .calibration.sensitivity import output_importance
from .calibration.spill import ActivationSpill
from .calibration.stage import CalibrationStage, QuantizedSite, column_counts
from .calibration.store import LayerStore
from .calibration.tune import TuneResult, TuneSettings, tune
from .calibration.walk import NodeWalk, WalkMaker
from .capture import CapturedModel
from .config import DECODER_OPSET, DEFAULT_CALIBRATION, NO_CALIBRATION, Config
from .deferred import is_deferred, logical_bytes
from .emit.companions import declare_quantized
from .emit.exporter import Artifact, emit_onnx
from .emit.genai import write_genai_config
from .errors import CalibrationError, ConfigError, ModelError, OutputError
from .format import metadata
from .format.checkpoint import quantized_stacks, save_checkpoint
from .format.layer import index_dtype
from .format.packing import WIDTHS
from .inputs import contained
from .passes import Pass, PassContext, Pipeline, Plan, RemoveUnused, ReplaceLinears, planning_pipeline
from .passes.plan import HEAD_ROLE, LINEAR_ROLE
from .passes.select_linears import layer_name
from .preflight import Preflight, predict_resources
from .report import LayerRecord, layer_record

_log = logging.getLogger(__name__)

DEFAULT_TEXT = Path(__file__).parent / "calibration" / "texts" / "state_of_the_union.txt"

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""Small files of a Hugging Face folder that those who load the ONNX file look for beside it."""


_TEXTS_A_SAMPLE = 100
"""Texts of a Python iterable that are read for each calibration sample at most; short ones are joined for decoders."""

_NOT_IN_FINGERPRINT = ("accuracy", "calibration", "device", "tune", "opset")
"""Settings that finished layers do not depend on; calibration data counts by its content, not its file's name."""

_NODE_BYTES = 450
"""What a graph node takes in an ONNX file, names and small constants included, seen on encoders and decoders."""


@dataclass(frozen=True)
class PlannedLayer:
    """What will become of one linear layer (or stack of siblings), before any calibration.

    Attributes:
        name: of the site.
        parts: qualified names of the linears stacked in it.
        out_features, in_features: shape of the weight.
        columns: input features at 4, 3 and 2 bits.
        dense_bytes: of the weight now.
        nbytes, true_bits, nominal_bits: predicted.
        role: ``"linear"``, ``"head"`` or ``"embedding"``, see :class:`~claq_export.passes.LinearSite`.
        tied: it is both an embedding and a linear.
    """

    name: str
    parts: tuple[str, ...]
    out_features: int
    in_features: int
    columns: tuple[int, int, int]
    dense_bytes: int
    nbytes: int
    true_bits: float
    nominal_bits: float
    role: str = LINEAR_ROLE
    tied: bool = False


@dataclass
class Compilation:
    """One model on its way from a captured graph to an artifact.

    Args:
        captured: the graph; it is rewritten in place.
        config: the settings.
        reporter: told of stages and layers.
        keep_records: collect what a report shows of each layer (histograms of columns need the original weights).
        peers: the processes that share calibration and quantization.
        memory: bytes of resident memory the run may take; None = as much as it likes.
        state: every tensor of the original model by its ``state_dict()`` name, for the PyTorch checkpoint.
        walk: makes the calibration's walk over the graph.
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
    peers: Peers = field(default_factory=Peers)
    records: list[LayerRecord] = field(default_factory=list)
    walk: WalkMaker = NodeWalk
    _context: PassContext | None = None
    _plan_with_cache: Plan | None = None
    _preflight: Preflight | None = None
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
                if self.captured.with_cache is not None:
                    assert context.plan is not None
                    planning = self._planning(fuse_siblings=False)
                    self._plan_with_cache = plan_with_cache(
                        self.captured.with_cache, context.plan, planning, fuse=self.config.opset >= DECODER_OPSET
                    )
        assert self._context.plan is not None
        return self._context.plan

    def _planning(self, fuse_siblings: bool) -> Pipeline:
        return planning_pipeline(
            self.config.include,
            self.config.exclude,
            fuse_siblings=fuse_siblings,
            embeddings=self.config.embeddings,
            heads=self.config.heads,
        )

    def predicted_layers(self) -> list[PlannedLayer]:
        """The plan with its predicted sizes, for ``--dry-run``.

        With a budget, which layer gets which columns is known after calibration only: the prediction gives each the
            same mix.
        """
        settings = self.config.layer_settings()
        if not self.config.budgeted:
            return self._predict(settings, self._table_settings())
        for most in self._table_widths():
            planned = self._predict_budget(settings, self._table_settings(most))
            if 8 * sum(layer.nbytes for layer in planned) <= self._target_bits() * 1.01 * self._weights():
                break
        return planned

    def preflight(self) -> Preflight:
        """What the run will need; measured and predicted once."""
        if self._preflight is None:
            assert self.memory is not None
            self._preflight = predict_resources(
                self.captured.graph_module,
                self.plan.sites,
                self.batches(),
                self.config.layer_settings(),
                sum(layer.nbytes for layer in self.predicted_layers()),
                self._unquantized_bytes(),
                self.memory,
            )
        return self._preflight

    def _weights(self) -> int:
        """Number of weights that are to be quantized."""
        return sum(site.in_features * site.out_features for site in self.plan.sites)

    def _target_bits(self) -> float:
        """The budget in true bits a weight."""
        if self.config.size is None:
            return float(self.config.bits)
        return 8 * (self.config.size - self._unquantized_bytes()) / max(self._weights(), 1)

    def _table_widths(self) -> list[int]:
        """With a budget, the widths of tables to try: the next whole one above the budget, then smaller ones."""
        first = min(max(math.ceil(self._target_bits()), min(WIDTHS)), max(WIDTHS))
        return [width for width in WIDTHS if width <= first]

    def _table_settings(self, most: int = max(WIDTHS)) -> dict[str, LayerSettings]:
        """Settings of tables and heads by name; ``most`` is their width where the configuration gives none."""
        chosen = {}
        for site in self.plan.sites:
            if site.role != LINEAR_ROLE or site.lookups:
                width = self.config.table_bits(head=site.role == HEAD_ROLE, embedding=bool(site.lookups)) or most
                settings = self.config.layer_settings()
                chosen[site.name] = replace(
                    settings, bits=float(width), widths=None, shares=None, exact_rows=self._exact_tokens()
                )
        return chosen

    def _predict_budget(self, settings: LayerSettings, tables: dict[str, LayerSettings]) -> list[PlannedLayer]:
        """All layers at the nominal width at which they take the budget together; tables at theirs."""
        target, low, high = self._target_bits(), 2.0, 4.0
        for _ in range(12):
            middle = (low + high) / 2
            size = sum(layer.nbytes for layer in self._predict(replace(settings, bits=middle), tables))
            low, high = (middle, high) if 8 * size / self._weights() < target else (low, middle)
        planned = self._predict(replace(settings, bits=low), tables)
        share = 0.0
        for _ in range(2 if high == 4.0 else 0):
            # Above the widest code a budget is spent on outliers of 32 bits; the second round knows their row pointers.
            missing = target - 8 * sum(layer.nbytes for layer in planned) / self._weights()
            share = min(max(share + missing / 32, 0.0), 0.25)
            planned = self._predict(replace(settings, bits=4.0, outliers=share), tables)
        return planned

    def _predict(self, settings: LayerSettings, tables: Mapping[str, LayerSettings]) -> list[PlannedLayer]:
        ordinary = [site for site in self.plan.sites if site.name not in tables]
        shared = dict(zip((site.name for site in ordinary), column_counts(ordinary, settings), strict=True))
        planned = []
        for site in self.plan.sites:
            own = tables.get(site.name, settings)
            widths, _ = own.mix()
            counts = shared.get(site.name) or column_counts([site], own)[0]
            by_width = dict(zip(widths, counts, strict=True))
            columns = tuple(by_width.get(width, 0) for width in WIDTHS)
            weights = site.in_features * site.out_features
            exact = round(own.exact_rows * site.out_features)
            outliers = [round(own.outliers * weights * count / site.in_features) + exact * count for count in columns]
            bits = predict(site.out_features, site.in_features, columns, outliers)
            planned.append(
                PlannedLayer(
                    name=site.name,
                    parts=tuple(name for name, _ in site.parts),
                    out_features=site.out_features,
                    in_features=site.in_features,
                    columns=(columns[0], columns[1], columns[2]),
                    dense_bytes=site.dense_bytes,
                    nbytes=bits.nbytes,
                    true_bits=bits.true_bits,
                    nominal_bits=bits.nominal_bits,
                    role=site.role,
                    tied=bool(site.nodes and site.lookups),
                )
            )
        return planned

    def batches(self) -> list[Batch] | None:
        """Calibration batches as the settings say; None for ``calibration="none"``.

        Raises:
            CalibrationError: the data cannot be read, is not enough, or does not fit the model.
        """
        if self._batches is None and self.config.calibration != NO_CALIBRATION:
            with self.timed("calibration data"):
                self._batches = load_calibration(self.captured, self.config)
        return self._batches

    def quantize(self, work: Path | None = None, resume: bool | None = None) -> None:
        """Calibrate, quantize, tune if asked for, and put the quantized operators into the graph.

        Args:
            work, resume: see :meth:`quantize_sites`.
        """
        self.quantize_sites(work, resume)
        if self.config.tune is not None:
            self.tune()
        if self.keep_records:
            self.records = [self._record(done) for done in self.sites.values()]
        with self.timed("passes"):
            self._lower()

    def quantize_sites(self, work: Path | None = None, resume: bool | None = None) -> None:
        """Calibrate and quantize; the graph keeps its original weights.

        Args:
            work: folder for finished layers, so that an interrupted run can go on; None = keep nothing.
            resume: False: discard a ``work`` folder of another run; otherwise it is refused, and what changed named.
        """
        plan = self.plan
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
            if self.memory is not None:
                assert work is not None
                spill = stack.enter_context(ActivationSpill(self.preflight().activations, work))
            stack.enter_context(self.timed("quantization"))
            stage = CalibrationStage(
                self.captured.graph_module,
                plan.sites,
                settings=self.config.layer_settings(),
                table_settings=self._table_settings(),
                token_clip=self.config.hessian_clip,
                device=self.config.device,
                reporter=self.reporter,
                store=self.store,
                walk=self.walk if spill is None else partial(NodeWalk, spill=spill),
                release=self.memory is not None,
                peers=self.peers,
            )
            plans = None
            if self.config.budgeted:
                plans = None if self.store is None else self.store.load_plans()
                # A budget is solved by all processes or by none.
                if self.peers.size > 1 or plans is None:
                    plans = self._solve_budget(self.profiles(stage, batches))
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

    def profiles(self, stage: CalibrationStage, batches: Sequence[Batch] | None) -> list[LayerProfile]:
        """What every column of every linear would gain from bits and outliers; the same for all budgets."""
        return stage.profile(batches, self._importance(batches))

    def _importance(self, batches: Sequence[Batch] | None) -> dict[str, torch.Tensor] | None:
        """What an error of each layer's outputs counts, by gradients; None where they are not wanted or not to be had."""
        # Gradients need the whole model in memory.
        if batches is None or not self.config.importance or self.memory is not None:
            return None
        try:
            with self.timed("importance"):
                return output_importance(
                    self.captured.graph_module,
                    [site for site in self.plan.sites if site.nodes],
                    batches,
                    task=self.captured.task,
                    seed=self.config.seed,
                    reporter=self.reporter,
                )
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

    def _solve_budget(self, profiles: Sequence[LayerProfile]) -> dict[str, ColumnPlan]:
        """Widths and outliers of all columns by layer; embeddings have one width each, which is counted."""
        floors: dict[str, int] = {}
        for pattern, width in self.config.floors.items():
            matching = [p.name for p in profiles if fnmatchcase(p.name, pattern)]
            if not matching:
                raise ConfigError(f"--floor {pattern}={width}: no layer to quantize matches")
            floors.update({name: max(width, floors.get(name, 0)) for name in matching})
        if self.config.size is not None and self.config.size <= (others := self._unquantized_bytes()):
            raise ConfigError(
                f"a size of {self.config.size:,} bytes cannot be met: what is not quantized takes {others:,} already"
            )
        refused: ConfigError | None = None
        for most in self._table_widths():
            tables = self._table_settings(most)
            embeddings = {
                site.name: ColumnPlan(
                    torch.full((site.in_features,), int(tables[site.name].bits), dtype=torch.uint8),
                    torch.zeros(site.in_features, dtype=torch.int64),
                )
                for site in self.plan.sites
                if not site.nodes
            }
            heads = {p.name: max(floors.get(p.name, 0), int(tables[p.name].bits)) for p in profiles if p.name in tables}
            room = int(self._target_bits() * self._weights() / 8)
            room -= sum(plan.predict(self.plan.site(name).out_features).nbytes for name, plan in embeddings.items())
            room -= sum(self._exact_bytes(name, settings) for name, settings in tables.items())
            try:
                if room <= 0:
                    raise ConfigError("the budget cannot be met: tables alone take more")
                self.budget = self._solve_with_pointers(profiles, room, {**floors, **heads}, heads)
            except ConfigError as error:
                refused = error
                continue
            self.reporter.event("budget", **self.budget.to_json())
            return {**self.budget.plans, **embeddings}
        assert refused is not None
        if not self._table_settings():
            raise refused
        exact = ", --exact-tokens 0" if self._exact_tokens() else ""
        raise ConfigError(
            f"{refused}; embeddings and heads are counted: give more, or narrow them (--embedding-bits, --head-bits{exact})"
        ) from refused

    def _solve_with_pointers(
        self, profiles: Sequence[LayerProfile], room: int, floors: Mapping[str, int], heads: Iterable[str]
    ) -> Budget:
        """Solve so that the row pointers of exact rows fit in too, where a head reserves nothing else that needs them."""
        pointers = {name: 4 * (self.plan.site(name).out_features + 1) for name in heads if self._exact_tokens()}
        budget = solve(profiles, nbytes=room, floors=floors)
        missing = sum(size for name, size in pointers.items() if not budget.plans[name].reserve.any())
        return budget if not missing else solve(profiles, nbytes=room - sum(pointers.values()), floors=floors)

    def _exact_tokens(self) -> float:
        """Share of a vocabulary's rows that is stored exactly; which ones is known from calibration data alone."""
        return 0.0 if self.config.calibration == NO_CALIBRATION else self.config.exact_tokens

    def _exact_bytes(self, name: str, settings: LayerSettings) -> int:
        """What the exact rows of a table take; of an embedding with their row pointers."""
        site = self.plan.site(name)
        rows = round(settings.exact_rows * site.out_features)
        entry = 2 + index_dtype(site.in_features).itemsize
        return rows * site.in_features * entry + (4 * (site.out_features + 1) if rows and not site.nodes else 0)

    def _unquantized_bytes(self) -> int:
        """Bytes of the artifact beside the quantized layers: tensors left alone, and the graph itself (estimated)."""
        graph = self.captured.graph_module
        planned = sum(site.dense_bytes for site in self.plan.sites)
        return weight_bytes(graph) - planned + _NODE_BYTES * len(graph.graph.nodes)

    def _lower(self) -> None:
        layers = {name: done.layer for name, done in self.sites.items()}
        # The checkpoint leaves these out anyway; dropped here, the dense weights leave memory before emission.
        for site in self.plan.sites:
            for part, _ in site.parts:
                for name in (part, f"{part}.weight"):
                    for tied in (name, *self.captured.aliases.get(name, ())):
                        self.state.pop(tied, None)
        for stack in quantized_stacks(self.state, {part for site in self.plan.sites for part, _ in site.parts}):
            del self.state[stack]
        lowering: list[Pass] = [ReplaceLinears(layers, self.config.accuracy_level), RemoveUnused()]
        assert self._context is not None
        Pipeline(lowering).run(self.captured.graph_module, self._context)
        if self._plan_with_cache is not None:
            assert self.captured.with_cache is not None
            lower_with_cache(self.captured.with_cache, self._plan_with_cache, layers, self.config.accuracy_level)

    def _fingerprint(self, batches: Sequence[Batch] | None) -> dict[str, str]:
        settings = {key: value for key, value in self.config.to_json().items() if key not in _NOT_IN_FINGERPRINT}
        return {
            **{f"setting {name}": json.dumps(value, sort_keys=True) for name, value in settings.items()},
            "claq version": claq_export.__version__,
            "torch version": torch.__version__,
            "model": self.captured.source.sha256,
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

    def metadata(self) -> dict[str, str]:
        """What the ONNX file says about itself."""
        return {
            "claq.version": claq_export.__version__,
            "claq.config": json.dumps(self.config.to_json(), sort_keys=True),
            "claq.true_bits": f"{self.true_bits:.4f}",
            "claq.nominal_bits": f"{self.nominal_bits:.4f}",
            "claq.source": Path(self.captured.source.path).name,
            "claq.source_sha256": self.captured.source.sha256,
            metadata.TASK: self.emitted.task or "",
            metadata.PARTS: json.dumps({name: d.site.parts for name, d in self.sites.items() if len(d.site.parts) > 1}),
        }

    @property
    def emitted(self) -> CapturedModel:
        """The graph that goes into the file: the one with a cache if there is one."""
        return self.captured.with_cache or self.captured

    def emit(self, out: Path) -> Artifact:
        """Write ``out``, its external data, ``claq.safetensors`` and ``claq.json``, and what a loader looks for
        beside them.

        Raises:
            OutputError: a file cannot be written.
        """
        check_writable(out)
        with self.timed("emission"):
            artifact = emit_captured(self.emitted, out, self.metadata())
            save_checkpoint(
                out.parent,
                {name: done.layer for name, done in self.sites.items()},
                self.state,
                self.config.to_json(),
                parts={name: done.site.parts for name, done in self.sites.items()},
                accuracy_level=self.config.accuracy_level,
                transposed=self.transposed,
                tied=self.tied,
            )
            if copy_companions(Path(self.captured.source.path), out.parent):
                floating = next((t.dtype for t in self.state.values() if t.is_floating_point()), torch.float32)
                declare_quantized(out.parent, self.true_bits, floating)
            if self.captured.with_cache is not None:
                write_genai_config(out.parent, out.name, self.captured.with_cache.file_shapes)
        return artifact


def emit_captured(captured: CapturedModel, out: Path, metadata: Mapping[str, str] | None = None) -> Artifact:
    """Write a captured graph as ONNX, inputs and outputs under the names they have in files."""
    names = captured.file_names
    return emit_onnx(
        captured.graph_module,
        captured.example_inputs,
        out,
        dynamic_shapes=captured.dynamic_shapes,
        input_names=[names.get(name, name) for name in captured.input_names],
        output_names=[names.get(name, name) for name in captured.output_names],
        metadata=metadata,
    )


def load_calibration(captured: CapturedModel, config: Config) -> list[Batch]:
    """The calibration batches ``config`` asks for.

    Raises:
        CalibrationError: the data cannot be read, is not enough, or does not fit the model.
    """
    source = config.calibration
    if not isinstance(source, (str, Path)):
        # A stream may never end: no more is taken than the samples can be drawn from.
        items = iter(source)
        first = list(islice(items, 1))
        if first and isinstance(first[0], str):
            texts = iterate_texts(chain(first, islice(items, _TEXTS_A_SAMPLE * config.samples)))
            return _batches_of_texts(texts, captured, config)
        return batches_from_iterable(chain(first, items), captured.input_names, captured.example_inputs, config.samples)
    return _batches_of_texts(read_texts(DEFAULT_TEXT if source == DEFAULT_CALIBRATION else source), captured, config)


def default_sequence_length(captured: CapturedModel) -> int:
    """Tokens a calibration sample: 1024 for decoders, 128 for the rest, if the model takes as many."""
    wanted = 1024 if captured.task == "text-generation" else 128
    return min(wanted, captured.max_sequence or wanted)


def _batches_of_texts(texts: Iterable[str], captured: CapturedModel, config: Config) -> list[Batch]:
    if captured.tokenizer is None:
        raise CalibrationError(
            "the model has no tokenizer, so text cannot calibrate it; pass calibration batches from Python, or "
            "--calibration none"
        )
    length = config.sequence_length or default_sequence_length(captured)
    if captured.max_sequence is not None and length > captured.max_sequence:
        raise CalibrationError(f"sequence length {length} is more than the model takes, {captured.max_sequence}")
    samples = tokenize_texts(
        texts,
        captured.tokenizer,
        input_names=captured.input_names,
        samples=config.samples,
        sequence_length=length,
        seed=config.seed,
        whole_documents=captured.task != "text-generation",
    )
    return group_equal_shapes(samples, config.batch_size)


def check_writable(out: Path) -> None:
    """Make the folder of ``out`` and see that a file can be made in it.

    Raises:
        OutputError: it cannot.
    """
    if out.is_dir():
        raise OutputError(
            f"{str(out)!r} is a folder; --out names the file to write, for example {str(out / 'model.onnx')!r}"
        )
    probe = out.parent / f".{out.name}.probe"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"output folder {str(out.parent)!r} is not writable: {error.strerror or error}") from error


def copy_companions(source: Path, folder: Path) -> list[Path]:
    """Copy configuration and tokenizer files from a Hugging Face folder; none if the source is not a folder."""
    copied = []
    if source.is_dir() and source.resolve() != folder.resolve():
        for name in _COMPANIONS:
            if (source / name).is_file():
                # A link would copy a file of this machine into what is going to be published.
                origin = contained(source, name, ModelError)
                try:
                    copied.append(Path(shutil.copyfile(origin, folder / name)))
                except OSError as error:
                    raise OutputError(
                        f"{name} cannot be copied to {str(folder)!r}: {error.strerror or error}"
                    ) from error
    return copied


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones once."""
    seen: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = logical_bytes(tensor) if is_deferred(tensor) else storage.nbytes()
    return sum(seen.values())


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
