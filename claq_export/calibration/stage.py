"""The calibration stage of the compiler: every planned linear and embedding of a captured graph becomes a quantized layer.

Embeddings come first: the walk takes their quantized rows, so that every layer after them is calibrated on what it will
see. A table that is the output head as well (tied) is used at both ends of the graph; its Hessian is that of the head's
input in the unquantized model, because the errors of a head go straight to the logits and those of a few looked-up rows
do not. An embedding that no linear shares has no Hessian: each column gets plain k-means.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx
from torch.nn.functional import embedding

from ..algorithm import Bits, ColumnPlan, Hessian, LayerResult, LayerSettings, measure, plan_columns, quantize_layer
from ..algorithm.budget import LayerProfile, Lookups, per_token_of_text, profile_layer
from ..algorithm.precision import spread_counts
from ..algorithm.vocabulary import token_probability
from ..deferred import defer_layer, materialize, materialize_layer
from ..errors import ClaqError
from ..format.layer import QuantizedLinear
from ..kernels import ops
from ..passes import LinearSite
from ..process_memory import trim_freed_memory
from .data import Batch
from .devices import Devices
from .padding import real_rows, real_tokens
from .peers import Peers
from .progress import ProgressReporter
from .sensitivity import Guidance, Importance
from .store import LayerStore
from .vocabulary import exact_rows, token_frequency
from .walk import NodeWalk, RowLookup, WalkMaker, ancestors

_Result = TypeVar("_Result")

_STEPS = {"cholesky": "Cholesky", "kmeans": "k-means", "feedback": "feedback", "descent": "descent"}

_TOKENS_AT_ONCE = 4096
"""Tokens a product of the Hessian takes at least, while there are as many."""


@dataclass(frozen=True)
class QuantizedSite:
    """A finished layer and what is known about it.

    Attributes:
        site: where it stands in the graph.
        layer: its tensors.
        error: relative layer error tr(dW H dWᵀ) / tr(W H Wᵀ); without calibration H is the identity.
        bits: bytes, true bits and nominal bits.
        seconds: time it took, the Hessian included; 0 if it came from an earlier, interrupted run.
    """

    site: LinearSite
    layer: QuantizedLinear
    error: float
    bits: Bits
    seconds: float


class CalibrationStage:
    """Quantizes the sites of a graph, in topological order.

    Args:
        graph_module: captured graph after the passes, its linears canonical.
        sites: what to quantize.
        settings: the algorithm's switches.
        table_settings: those of single sites (tables and heads), by name, in the place of ``settings``.
        token_clip: see :class:`~claq_export.algorithm.hessian.Hessian`.
        devices: where layers are quantized; Hessians are summed up on the first.
        reporter: told of every layer.
        store: finished layers of an interrupted run; None = start afresh and keep nothing.
        walk: makes the walk over the graph, which may take others along.
        peers: the processes that share the work; None = this one alone.
        guidance: what each calibration token counts in the Hessian of a site's input, in the place of ``token_clip``, and each
            of its outputs in the k-means; None: tokens alike, clipped, as for a site that it says nothing of, or one that does
            not read one row a token; outputs alike. For a process alone.
        release: leave finished layers in ``store`` and keep stand-ins of their large tensors.
        keep_dense: keep the graph's weights; False: let go of each when its layer is finished and no walk needs it.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        sites: Sequence[LinearSite],
        *,
        settings: LayerSettings,
        table_settings: Mapping[str, LayerSettings] | None = None,
        token_clip: float | None,
        devices: Sequence[str],
        reporter: ProgressReporter,
        store: LayerStore | None = None,
        walk: WalkMaker = NodeWalk,
        release: bool = False,
        keep_dense: bool = True,
        peers: Peers | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self._module = graph_module
        self._new_walk = walk
        self._sites = list(sites)
        self._settings = settings
        self._table_settings = dict(table_settings or {})
        ordinary = [site for site in self._sites if site.name not in self._table_settings]
        self._counts = dict(zip((site.name for site in ordinary), column_counts(ordinary, settings), strict=True))
        self._token_clip = token_clip
        self._devices = Devices(devices)
        self._reporter = reporter
        self._store = store
        self._release = release
        self._keep_dense = keep_dense
        self._peers = peers or Peers()
        self._token_importance = {} if guidance is None else guidance.tokens
        self._row_importance = {} if guidance is None else guidance.importance.rows
        self._readers: defaultdict[fx.Node, list[LinearSite]] = defaultdict(list)
        for site in self._sites:
            for node in site.nodes:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                self._readers[source].append(site)
        self._plans: Mapping[str, ColumnPlan] = {}
        self._pooled: dict[str, Hessian] = {}
        self._real: list[torch.Tensor | None] = []
        self._frequency: dict[int, torch.Tensor] = {}
        self._finished: dict[str, QuantizedSite] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def profile(self, batches: Sequence[Batch] | None, importance: Importance | None = None) -> list[LayerProfile]:
        """Measure, in the unquantized model, what each column of each layer would gain from bits and outliers.

        Args:
            batches: as for :meth:`run`.
            importance: of each layer's outputs, and of what is looked up in tables: a layer's error is then that of all rows
                it reads, for each token of the calibration data; None: each layer's error counts relative to its output.

        Returns:
            one profile a layer, in the order of the sites.
        """
        profiles: dict[str, LayerProfile] = {}
        linears = [site for site in self._sites if site.nodes]
        self._frequency = token_frequency(self._module, self._sites, batches or [])
        exact = exact_rows(self._sites, self._frequency, self._table_settings)
        text = 0

        def measure_site(site: LinearSite, hessian: Hessian | None) -> None:
            weight = self._weight(site, self._devices.first)
            measure_it = partial(
                profile_layer,
                site.name,
                weight,
                hessian,
                self._settings,
                row_importance=None if importance is None else importance.rows.get(site.name),
                lookups=self._lookups(site, importance, text if hessian is None else None),
                exact_rows=exact.get(site.name),
            )
            with self._timed("bit budget"), _full_precision(self._devices.first):
                profiles[site.name] = _naming(site, measure_it)
            if hessian is not None and _is_pooled(site):
                self._pooled[site.name] = hessian  # the same as from another walk
            self._reporter.layer(site.name, phase="profile")

        self._reporter.start_layers(len(self._sites), "measuring")
        try:
            if batches is not None and linears:
                self._visit_sites(batches, measure_site, linears)
                text = max(profiles[site.name].tokens // len(site.nodes) for site in linears)
            for site in self._sites:
                if site.name not in profiles:
                    measure_site(site, None)
        finally:
            self._reporter.finish_layers()
        found = [profiles[site.name] for site in self._sites]
        if batches is None or importance is None:
            return found
        return per_token_of_text(found, {site.name: len(site.nodes or site.lookups) for site in self._sites})

    def _lookups(self, site: LinearSite, importance: Importance | None, text: int | None) -> Lookups | None:
        """How the rows of a table are looked up by the calibration data, of ``text`` tokens.

        Which rows is known where the indices are an input of the model: of what a graph computes nothing is, and all are alike.
        """
        if not site.lookups:
            return None
        counted = self._frequency.get(site.out_features, torch.zeros(site.out_features, dtype=torch.int64))
        return Lookups(
            token_probability(counted),
            int(counted.sum()) or text,
            None if importance is None else importance.columns[site.name],
        )

    def run(
        self, batches: Sequence[Batch] | None, plans: Mapping[str, ColumnPlan] | None = None
    ) -> dict[str, QuantizedSite]:
        """Quantize every site.

        Args:
            batches: model inputs to calibrate on; None = no calibration (plain column k-means, no error feedback).
            plans: widths and outliers of each site's columns, by name; None = as the settings say.

        Returns:
            the finished layers by site name, in the order of the sites.

        Raises:
            ClaqError: a layer cannot be quantized; the message names it.
        """
        self._plans = plans or {}
        self._frequency = token_frequency(self._module, self._sites, batches or [])
        self._reporter.start_layers(len(self._sites), "quantizing")
        try:
            independent = [site for site in self._sites if batches is None or not site.nodes]
            self._quantize_together([(site, None) for site in independent if self._restore(site) is None])
            if batches is not None and any(site.nodes for site in self._sites):
                self._walk(batches)
        finally:
            self._reporter.finish_layers()
        return {site.name: self._finished[site.name] for site in self._sites}

    def _walk(self, batches: Sequence[Batch]) -> None:
        site_of = {node: site for site in self._sites for node in site.nodes}
        pooled = self._pool_shared_sites(batches)
        for site in self._sites:
            if site.lookups and site.name not in self._finished and self._restore(site) is None:
                self._quantize_together([(site, pooled.pop(site.name))])
        # From here on there is no walk with the unquantized weights.
        for done in self._finished.values():
            self._release_dense(done.site)
        hessians: dict[fx.Node, Hessian] = {}
        readers = self._readers_left()

        def visit(node: fx.Node, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
            site, source = site_of[node], node.args[0]
            assert isinstance(source, fx.Node)
            if site.name not in self._finished and self._restore(site) is None:
                start = time.perf_counter()
                if site.name in pooled:
                    hessian = pooled.pop(site.name)
                else:
                    if source not in hessians:
                        real = self._real_rows(inputs)
                        weights = self._token_weights(source, inputs, real)
                        hessians[source] = self._hessian(site.in_features, clipped=weights is None)
                        with self._timed("Hessian"):
                            self._accumulate(hessians[source], inputs, real, weights)
                            self._peers.add_up(hessians[source])
                    hessian = hessians[source]
                shared_out = self._peers.size > 1 or len(self._devices.all) > 1
                together = self._siblings(site, source) if shared_out and not _is_pooled(site) else [site]
                self._quantize_together([(member, hessian) for member in together], start)
            readers[source] -= 1
            if not readers[source]:
                # K x K floats a value: not to be kept for the rest of the walk.
                hessians.pop(source, None)
            self._release_dense(site)
            return materialize_layer(self._finished[site.name].layer).dequantize()

        lookups = {node: self._rows_of(site) for site in self._sites for node in site.lookups}
        with self._timed("forward"):
            self._new_walk(self._module, self._share(batches), list(site_of), lookups).run(visit)

    def _share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This process's batches; notes which of their tokens are padding."""
        share = self._peers.share(batches, _TOKENS_AT_ONCE)
        self._real = [real_tokens(batch) for batch in share]
        return share

    def _real_rows(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Which rows of each batch's value are no padding; None: all of them."""
        # A walk of several graphs has inputs of other batches too, whose order is the walk's own.
        if not any(real is not None for real in self._real) or len(inputs) != len(self._real):
            return [None] * len(inputs)
        return [real_rows(x.shape, real) for x, real in zip(inputs, self._real, strict=True)]

    def _siblings(self, site: LinearSite, source: fx.Node) -> list[LinearSite]:
        """Sites that read the same value and wait to be quantized: different processes and devices can take them."""
        return [site] + [
            other
            for other in self._sites
            if other is not site
            and other.name not in self._finished
            and not _is_pooled(other)
            and any(node.args[0] is source for node in other.nodes)
            and self._restore(other) is None
        ]

    def _stored_rows_of(self, site: LinearSite) -> RowLookup:
        """Rows of the unquantized table, in memory or not."""
        table = site.weight(self._module).detach()
        return lambda indices: embedding(indices.to(table.device), materialize(table)).to(indices.device)

    def _rows_of(self, site: LinearSite) -> RowLookup:
        layer = materialize_layer(self._finished[site.name].layer)
        like = torch.zeros(0, dtype=site.dtype)
        arguments = (*layer.tensors().values(), like, layer.in_features, layer.out_features, list(layer.columns))
        # The tensors stay in the host's memory, wherever the walk is.
        return lambda indices: ops.embedding(indices.cpu(), *arguments).to(indices.device)

    def _release_dense(self, site: LinearSite) -> None:
        if not self._keep_dense:
            site.release_weight(self._module)

    def _readers_left(self) -> dict[fx.Node, int]:
        return {source: len(sites) for source, sites in self._readers.items()}

    def _pool_shared_sites(self, batches: Sequence[Batch]) -> dict[str, Hessian]:
        """Hessians over all products of weights that stand at several places (layers shared across depth, tied heads).

        Such a weight is quantized at its first use, before the walk reaches the others, so their inputs are taken from
        a walk with the unquantized weights.
        """
        pooled, self._pooled = self._pooled, {}
        shared = [site for site in self._sites if _is_pooled(site) and site.name not in pooled]
        if shared:
            self._visit_sites(batches, lambda site, hessian: pooled.update({site.name: hessian}), shared)
        return pooled

    def _visit_sites(
        self,
        batches: Sequence[Batch],
        handle: Callable[[LinearSite, Hessian], None],
        sites: Sequence[LinearSite] | None = None,
    ) -> None:
        """Walk the unquantized graph; ``handle`` gets each site with the Hessian over all its uses, after the last of
        them.

        The walk stops at all linears on the way, so that no more than one weight at a time is read from disk.
        """
        sites = self._sites if sites is None else sites
        site_of = {node: site for site in sites for node in site.nodes}
        passed = ancestors(list(site_of))
        stops = [node for site in self._sites for node in site.nodes if node in passed]
        hessians: dict[str, Hessian] = {}
        uses = {site.name: len(site.nodes) for site in sites}

        def visit(node: fx.Node, inputs: Sequence[torch.Tensor]) -> None:
            site, source = site_of.get(node), node.args[0]
            if site is None:
                return
            assert isinstance(source, fx.Node)
            real = self._real_rows(inputs)
            weights = self._token_weights(source, inputs, real)
            if site.name not in hessians:
                hessians[site.name] = self._hessian(site.in_features, clipped=weights is None)
            hessian = hessians[site.name]
            with self._timed("Hessian"):
                self._accumulate(hessian, inputs, real, weights)
            uses[site.name] -= 1
            if not uses[site.name]:
                self._peers.add_up(hessian)
                handle(site, hessians.pop(site.name))

        lookups = {node: self._stored_rows_of(site) for site in self._sites for node in site.lookups}
        with self._timed("forward"):
            self._new_walk(self._module, self._share(batches), stops, lookups).run(visit)

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time of all walks went: forward passes, Hessians, Cholesky factors, k-means, error feedback, ..."""
        return {step: spent for step, spent in sorted(self._seconds.items(), key=lambda item: -item[1]) if spent > 0}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Count the time spent inside as that of ``step``, less what steps inside it count as theirs."""
        start, before = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
        finally:
            inside = sum(self._seconds.values()) - before
            self._seconds[step] += time.perf_counter() - start - inside

    def _weight(self, site: LinearSite, device: torch.device) -> torch.Tensor:
        return materialize(site.weight(self._module).detach()).to(device=device, dtype=torch.float32)

    def _hessian(self, in_features: int, clipped: bool = True) -> Hessian:
        return Hessian(in_features, token_clip=self._token_clip if clipped else None, device=self._devices.first)

    def _token_weights(
        self, source: fx.Node, inputs: Sequence[torch.Tensor], real: Sequence[torch.Tensor | None]
    ) -> torch.Tensor | None:
        """What the tokens of a value count for the linears that read it, 1 on average, padding left out; None: nothing is
        known."""
        readers = self._readers[source]
        if any(site.name not in self._token_importance for site in readers):
            return None
        outputs = sum(site.out_features for site in readers)
        total = sum(self._token_importance[site.name] * (site.out_features / outputs) for site in readers)
        assert isinstance(total, torch.Tensor)
        rows = (
            x.numel() // x.shape[-1] if counted is None else int(counted.sum())
            for x, counted in zip(inputs, real, strict=True)
        )
        if len(total) != sum(rows):
            return None
        return total / total.mean()

    def _accumulate(
        self,
        hessian: Hessian,
        inputs: Sequence[torch.Tensor],
        real: Sequence[torch.Tensor | None],
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add all batches; groups of tokens are spread over the devices and their sums added in order.

        ``real``: which rows of each batch count, None: all. ``weights`` ``[T]``: how much each of those does, in order.
        """
        if len(self._devices.all) == 1:
            with _full_precision(self._devices.first):
                for rows, counts in _groups(inputs, real, weights):
                    hessian.add(rows, counts)
            return

        def part(group: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> Hessian:
            own = Hessian(hessian.in_features, token_clip=hessian.token_clip, device=device)
            own.add(*group)
            return own

        for own in self._devices.map(part, _groups(inputs, real, weights)):
            hessian.merge(own)

    def _restore(self, site: LinearSite) -> QuantizedSite | None:
        """A layer finished by an earlier run."""
        found = self._peers.hand_round(self._store.load(site.name) if self._store is not None else None, 0)
        if found is None:
            return None
        layer, extra = found
        return self._finish(QuantizedSite(site, layer, extra["error"], measure(layer), 0.0), restored=True)

    def _quantize_together(self, work: Sequence[tuple[LinearSite, Hessian | None]], start: float | None = None) -> None:
        """Quantize layers that do not depend on one another, on all devices; with peers each takes its share and hands it
        round."""
        peers = self._peers
        trim_freed_memory()

        def quantize(
            item: tuple[LinearSite, Hessian | None], device: torch.device
        ) -> tuple[QuantizedLinear, dict[str, Any]]:
            return self._quantize(*item, device, time.perf_counter() if start is None else start)

        with self._timed("other"):
            began = time.perf_counter()
            steps: list[dict[str, float]] = []
            if peers.size == 1:
                for number, (layer, record) in self._devices.each(quantize, work):
                    steps.append(record["steps"])
                    self._keep(work[number][0], layer, record)
            else:
                mine = dict(self._devices.each(quantize, work[peers.rank :: peers.size]))
                steps += [record["steps"] for _, record in mine.values()]
                for number, (site, _) in enumerate(work):
                    handed = peers.hand_round(mine.get(number // peers.size), number % peers.size)
                    assert handed is not None
                    self._keep(site, *handed)
            self._count(steps, time.perf_counter() - began)

    def _count(self, steps: Sequence[Mapping[str, float]], elapsed: float) -> None:
        """Count the steps of layers that took ``elapsed`` seconds together; those done at once share the time by their
        own lengths."""
        spent = sum(layer["total"] for layer in steps)
        share = min(1.0, elapsed / spent) if spent else 0.0
        for layer in steps:
            for step, label in _STEPS.items():
                self._seconds[label] += share * layer[step]

    def _quantize(
        self, site: LinearSite, hessian: Hessian | None, device: torch.device, start: float
    ) -> tuple[QuantizedLinear, dict[str, Any]]:
        """A finished layer, its error, and the seconds it took by step; changes nothing, for any thread."""
        weight = self._weight(site, device)
        settings = self._table_settings.get(site.name, self._settings)

        def quantize() -> LayerResult:
            plan = self._plans.get(site.name)
            if plan is None:
                plan = plan_columns(weight, hessian, settings, self._counts.get(site.name))
            # A linear may happen to have as many outputs as the vocabulary has rows.
            table = site.name in self._table_settings
            frequency = self._frequency.get(site.out_features) if table else None
            importance = None if table else self._row_importance.get(site.name)
            return quantize_layer(
                weight, hessian, settings, plan=plan, row_importance=importance, row_frequency=frequency
            )

        with _full_precision(device):
            result = _naming(site, quantize)
        steps = {key: round(value, 4) for key, value in result.seconds.items()}
        record = {"error": result.error, "seconds": time.perf_counter() - start, "steps": steps}
        return result.layer.to("cpu"), record

    def _keep(self, site: LinearSite, layer: QuantizedLinear, record: Mapping[str, Any]) -> None:
        if self._store is not None:
            self._store.save(site.name, layer, {"error": record["error"]})
        done = QuantizedSite(site, layer, record["error"], measure(layer), record["seconds"])
        self._finish(done, steps=record["steps"])

    def _finish(self, done: QuantizedSite, **fields: Any) -> QuantizedSite:
        if self._release and self._store is not None:
            store, name = self._store, done.site.name
            done = replace(done, layer=defer_layer(done.layer, lambda tensor: store.read(name, tensor)))
        self._finished[done.site.name] = done
        self._reporter.layer(
            done.site.name,
            in_features=done.layer.in_features,
            out_features=done.layer.out_features,
            true_bits=round(done.bits.true_bits, 4),
            nominal_bits=round(done.bits.nominal_bits, 4),
            error=done.error,
            layer_seconds=round(done.seconds, 3),
            **fields,
        )
        return done


def _is_pooled(site: LinearSite) -> bool:
    """Whether a weight is quantized before all of its products are reached."""
    return len(site.nodes) > 1 or bool(site.nodes and site.lookups)


def column_counts(sites: Sequence[LinearSite], settings: LayerSettings) -> list[tuple[int, ...]]:
    """Columns of each width of ``settings.mix()`` for each site, so that the mean over the model is what was asked
    for."""
    _, shares = settings.mix()
    return spread_counts([site.in_features for site in sites], [site.out_features for site in sites], shares)


def _groups(
    inputs: Sequence[torch.Tensor], real: Sequence[torch.Tensor | None], weights: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The tokens of all batches without padding, ``[T, K]``, and their weights, several batches at a time: a product of few
    tokens costs as much as its K x K result, not as its tokens."""
    rows: list[torch.Tensor] = []
    tokens = done = 0
    for number, (x, counted) in enumerate(zip(inputs, real, strict=True), 1):
        every = x.reshape(-1, x.shape[-1])
        rows.append(every if counted is None else every[counted.to(every.device)])
        # Padding ends a group as tokens do: processes share batches out in the same groups, before there are any rows.
        tokens += every.shape[0]
        if tokens >= _TOKENS_AT_ONCE or number == len(inputs):
            group = torch.cat(rows)
            if len(group):
                yield group, None if weights is None else weights[done : done + len(group)]
            done, rows, tokens = done + len(group), [], 0


def _full_precision(device: torch.device) -> torch.autocast:
    """Not under the autocast of who calls a compiled model that is being calibrated: Hessians would be of 16 bits."""
    return torch.autocast(device.type, enabled=False)


def _naming(site: LinearSite, work: Callable[[], _Result]) -> _Result:
    """Do ``work``; an error it raises names the layer."""
    try:
        return work()
    except ClaqError as error:
        raise type(error)(f"layer {site.name}: {error}") from error
