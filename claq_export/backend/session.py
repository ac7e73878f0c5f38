"""What the compiled graphs of one set of options have in common: their weights, and how these are calibrated."""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..calibration.progress import ProgressReporter
from ..config import NO_CALIBRATION
from ..errors import CalibrationError, ModelError
from .calibrate import Recording, quantize_on_data, quantize_recordings
from .checkpoint import load_weights
from .graph import DynamoGraph, Rewritten, SavedGraph
from .options import CompileOptions
from .release import check_not_released, release
from .store import KnownStates, WeightStore, store_for

_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)
"""Skips the autograd layer of every operator inside; it would call into Python once more for each of ours."""


_ATTEMPTS = 3
"""How often weights are observed anew after what was observed could not be calibrated on."""


class CompiledGraph:
    """One of Dynamo's graphs, compiled: sees to it that the weights of each call are quantized, and runs it.

    Args:
        graph: as traced, or what is known of it after loading.
        rewritten: with the operators of this room.
        run: compiled from ``rewritten``.
        session: of the options.
    """

    def __init__(
        self, graph: DynamoGraph | SavedGraph, rewritten: Rewritten, run: Callable[..., Any], session: Session
    ) -> None:
        self.graph = graph
        self.rewritten = rewritten
        self.session = session
        self._run = run
        self._watched = (*rewritten.weights, *rewritten.biases)
        self._pick = operator.itemgetter(*self._watched) if len(self._watched) > 1 else None
        # By identity of the first: layers of one class share this graph, and each has weights of its own.
        self._known: dict[int, KnownStates] = {}
        self._generation = session.store.generation

    def __call__(self, *args: Any) -> Any:
        """Run the graph on its inputs, as Dynamo passes them.

        Raises:
            ClaqError: the weights cannot be quantized with these options.
        """
        observed = None
        if not self._served(args):
            observed = self.session.prepare(self, args)
        with _below_autograd():
            result = self._run(*args)
        if observed is not None:
            self.session.observed(observed)
        return result

    def weights(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The parameters among ``args`` that are to be quantized."""
        return [args[position] for position in self.rewritten.weights]

    def watched(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """Those, and the biases beside them."""
        return [args[position] for position in self._watched]

    def remember(self, args: Sequence[Any]) -> None:
        """Note that the weights of this call have been seen to; the next call with the same ones asks no more."""
        first = id(args[self._watched[0]])
        if first not in self._known:
            self._known = {key: one for key, one in list(self._known.items()) if one.refs[0]() is not None}
        self._known[first] = KnownStates(self.watched(args))

    def _served(self, args: Sequence[Any]) -> bool:
        if self._generation != self.session.store.generation:
            self._generation = self.session.store.generation
            self._known = {}
        tensors: Sequence[Any] = self._pick(args) if self._pick is not None else (args[self._watched[0]],)
        known = self._known.get(id(tensors[0]))
        return known is not None and known.holds(tensors)


@dataclass
class Session:
    """The options, the store of quantized weights, and the inputs observed so far."""

    options: CompileOptions
    store: WeightStore
    _recordings: list[Recording] = field(default_factory=list)
    _calls: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # observed, of each weight
    _failures: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def prepare(self, compiled: CompiledGraph, args: Sequence[Any]) -> Recording | None:
        """See to it that the weights of a call are quantized.

        Returns:
            None when they are; where calls are observed first, the recording this call's inputs went into.

        Raises:
            ClaqError: they cannot be quantized with these options.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.store.use(compiled.watched(args))
            weights = compiled.weights(args)
            missing = [weight for weight in weights if self.store.find(weight) is None]
            if missing:
                check_not_released(missing)
                if self.options.observe:
                    return self._record(compiled, args, missing)
                self._quantize(compiled, args, missing)
            self._finish(compiled, args)
            return None

    def _quantize(self, compiled: CompiledGraph, args: Sequence[Any], missing: Sequence[torch.Tensor]) -> None:
        graph, options = compiled.graph, self.options
        named = {graph.names[i]: args[i] for i in compiled.rewritten.weights}
        with self._reporter() as reporter:
            if options.weights is not None:
                load_weights(options.weights, named, self.store)
            elif isinstance(graph, SavedGraph):
                raise ModelError("a loaded graph takes its quantized weights from a folder, and was given none")
            elif options.config.calibration == NO_CALIBRATION:
                quantize_recordings([Recording(graph, tuple(args), None)], options.config, self.store, reporter)
            else:
                root = graph.root() if graph.root is not None else None
                quantize_on_data(root, named, options, self.store, reporter)
        for weight in missing:
            if self.store.find(weight) is None:
                self.store.leave(weight)

    def _finish(self, compiled: CompiledGraph, args: Sequence[Any]) -> None:
        if self.options.release_weights:
            candidates = [args[i] for i in compiled.rewritten.freeable]
            release([w for w in candidates if (e := self.store.find(w)) is not None and e.stack is not None])
            self.store.use(compiled.watched(args))
        compiled.remember(args)

    def _record(self, compiled: CompiledGraph, args: Sequence[Any], missing: Sequence[torch.Tensor]) -> Recording:
        assert isinstance(compiled.graph, DynamoGraph), "loaded graphs are not observed"
        self._recordings = [one for one in self._recordings if one.alive]
        for recording in self._recordings:
            known = recording.args
            if recording.graph is compiled.graph and all(known[i] is args[i] for i in compiled.rewritten.weights):
                break
        else:
            recording = Recording(compiled.graph, tuple(args), [])
            self._recordings.append(recording)
            if len(self._recordings) == 1:
                with self._reporter() as reporter:
                    reporter.stage(
                        f"claq: the first {self.options.observe} calls run in full precision and are observed; "
                        "then the weights are quantized"
                    )
        used = sum(one.nbytes for one in self._recordings)
        recording.add(args, self.options.observe_bytes - used)
        recording.missing = list(missing)
        return recording

    def observed(self, recording: Recording) -> None:
        """A call whose inputs were recorded is over; quantize when there have been enough.

        Where that fails for what was observed (an activation that is not finite, in one call of many), the model goes on in
        full precision, a warning says why, and calls are observed anew, a few times.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if recording not in self._recordings:
                return  # another thread's call has been the last one
            if _counted(self._calls, recording.missing) < self.options.observe:
                return
            together = self._related(recording)
            weights = list({id(weight): weight for one in together for weight in one.missing}.values())
            with self._reporter() as reporter:
                reporter.stage(f"claq: {self.options.observe} calls observed, quantizing the weights")
                try:
                    quantize_recordings(together, self.options.config, self.store, reporter)
                except CalibrationError as error:
                    settled = self._failed(error, weights)
                else:
                    reporter.stage("claq: quantized weights are in use from the next call on")
                    settled = True
                finally:
                    self._recordings = [one for one in self._recordings if one not in together]
                    for weight in weights:
                        self._calls.pop(weight, None)
            for weight in weights if settled else ():
                if self.store.find(weight) is None:
                    self.store.leave(weight)

    def _failed(self, error: CalibrationError, weights: Sequence[torch.Tensor]) -> bool:
        """Warn that weights could not be quantized; returns whether that was the last attempt."""
        number = _counted(self._failures, weights)
        then = "and is observed anew" if number < _ATTEMPTS else f"for good: that was attempt {number}"
        warnings.warn(f"backend='claq': {error}; the model goes on unquantized {then}", stacklevel=3)
        return number >= _ATTEMPTS

    def _related(self, recording: Recording) -> list[Recording]:
        """The recordings that share weights with one, directly or through others; it comes first."""
        found, left = [recording], [one for one in self._recordings if one is not recording]
        for one in found:
            identities = {id(weight) for weight in one.missing}
            near = [other for other in left if identities.intersection(id(weight) for weight in other.missing)]
            found += near
            left = [other for other in left if other not in near]
        return found

    def _reporter(self) -> ProgressReporter:
        return ProgressReporter(quiet=not self.options.progress)


def _counted(counts: WeakTensorKeyDictionary, weights: Sequence[torch.Tensor]) -> int:
    """Count one more of each weight; returns the largest count among them."""
    for weight in weights:
        counts[weight] = counts.get(weight, 0) + 1
    return max(counts[weight] for weight in weights)


_sessions: dict[tuple[object, ...], Session] = {}


def session_for(options: CompileOptions) -> Session:
    """The session of these options, made at the first call; options that do not concern the weights share a store."""
    key = (options.key, options.observe_bytes, options.release_weights, options.progress)
    return _sessions.setdefault(key, Session(options, store_for(options.key)))
