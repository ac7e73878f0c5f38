"""The calibration stage of the compiler: every planned linear of a captured graph becomes a quantized layer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..algorithm import Bits, Hessian, LayerSettings, measure, plan_columns, quantize_layer
from ..algorithm.precision import spread_counts
from ..errors import ClaqError
from ..format.layer import QuantizedLinear
from ..passes import LinearSite
from .data import Batch
from .progress import ProgressReporter
from .store import LayerStore
from .walk import NodeWalk


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
        token_clip: see :class:`~claq_export.algorithm.hessian.Hessian`.
        device: where layers are quantized.
        reporter: told of every layer.
        store: finished layers of an interrupted run; None = start afresh and keep nothing.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        sites: Sequence[LinearSite],
        *,
        settings: LayerSettings,
        token_clip: float | None,
        device: str,
        reporter: ProgressReporter,
        store: LayerStore | None = None,
    ) -> None:
        self._module = graph_module
        self._sites = list(sites)
        self._settings = settings
        self._counts = dict(zip((site.name for site in self._sites), column_counts(self._sites, settings), strict=True))
        self._token_clip = token_clip
        self._device = torch.device(device)
        self._reporter = reporter
        self._store = store
        self._finished: dict[str, QuantizedSite] = {}

    def run(self, batches: Sequence[Batch] | None) -> dict[str, QuantizedSite]:
        """Quantize every site.

        Args:
            batches: model inputs to calibrate on; None = no calibration (plain column k-means, no error feedback).

        Returns:
            the finished layers by site name, in the order of the sites.

        Raises:
            ClaqError: a layer cannot be quantized; the message names it.
        """
        self._reporter.start_layers(len(self._sites))
        try:
            if batches is None:
                for site in self._sites:
                    self._quantize(site, None, time.perf_counter())
            elif self._sites:
                self._walk(batches)
        finally:
            self._reporter.finish_layers()
        return {site.name: self._finished[site.name] for site in self._sites}

    def _walk(self, batches: Sequence[Batch]) -> None:
        site_of = {node: site for site in self._sites for node in site.nodes}
        pooled = self._pool_shared_sites(batches)
        hessians: dict[fx.Node, Hessian] = {}
        readers = self._readers_left()

        def visit(node: fx.Node, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
            site, source = site_of[node], node.args[0]
            assert isinstance(source, fx.Node)
            if site.name not in self._finished:
                start = time.perf_counter()
                stored = self._restore(site)
                if stored is not None:
                    return stored
                if site.name in pooled:
                    hessian = pooled.pop(site.name)
                else:
                    if source not in hessians:
                        hessians[source] = self._hessian(site.in_features)
                        _accumulate(hessians[source], inputs)
                    hessian = hessians[source]
                self._quantize(site, hessian, start)
            readers[source] -= 1
            if not readers[source]:
                # K x K floats a value: not to be kept for the rest of the walk.
                hessians.pop(source, None)
            return self._finished[site.name].layer.dequantize().cpu()

        NodeWalk(self._module, batches, list(site_of)).run(visit)

    def _readers_left(self) -> dict[fx.Node, int]:
        readers: dict[fx.Node, int] = {}
        for site in self._sites:
            for node in site.nodes:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                readers[source] = readers.get(source, 0) + 1
        return readers

    def _pool_shared_sites(self, batches: Sequence[Batch]) -> dict[str, Hessian]:
        """Hessians over all uses of weights that stand at several places (layers shared across depth).

        Such a weight is quantized at its first use, before the walk reaches the others, so their inputs are taken from a walk
        with the unquantized weights.
        """
        shared = [site for site in self._sites if len(site.nodes) > 1]
        if not shared:
            return {}
        site_of = {node: site for site in shared for node in site.nodes}
        pooled = {site.name: self._hessian(site.in_features) for site in shared}

        def visit(node: fx.Node, inputs: Sequence[torch.Tensor]) -> None:
            _accumulate(pooled[site_of[node].name], inputs)

        NodeWalk(self._module, batches, list(site_of)).run(visit)
        return pooled

    def _hessian(self, in_features: int) -> Hessian:
        return Hessian(in_features, token_clip=self._token_clip, device=self._device)

    def _restore(self, site: LinearSite) -> torch.Tensor | None:
        """The weight of a layer finished by an earlier run."""
        found = self._store.load(site.name) if self._store is not None else None
        if found is None:
            return None
        layer, extra = found
        self._finish(QuantizedSite(site, layer, extra["error"], measure(layer), 0.0), restored=True)
        return layer.dequantize()

    def _quantize(self, site: LinearSite, hessian: Hessian | None, start: float) -> None:
        if hessian is None and self._restore(site) is not None:
            return
        weight = site.weight(self._module).detach().to(device=self._device, dtype=torch.float32)
        try:
            plan = plan_columns(weight, hessian, self._settings, self._counts[site.name])
            result = quantize_layer(weight, hessian, self._settings, plan=plan)
        except ClaqError as error:
            raise type(error)(f"layer {site.name}: {error}") from error
        layer = result.layer.to("cpu")
        if self._store is not None:
            self._store.save(site.name, layer, {"error": result.error})
        steps = {key: round(value, 4) for key, value in result.seconds.items()}
        self._finish(QuantizedSite(site, layer, result.error, measure(layer), time.perf_counter() - start), steps=steps)

    def _finish(self, done: QuantizedSite, **fields: Any) -> None:
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


def column_counts(sites: Sequence[LinearSite], settings: LayerSettings) -> list[tuple[int, ...]]:
    """Columns of each width of ``settings.mix()`` for each site, so that the mean over the model is what was asked for."""
    _, shares = settings.mix()
    return spread_counts([site.in_features for site in sites], [site.out_features for site in sites], shares)


def _accumulate(hessian: Hessian, inputs: Sequence[torch.Tensor]) -> None:
    for x in inputs:
        hessian.add(x)
