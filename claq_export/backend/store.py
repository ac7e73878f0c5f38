"""Quantized weights by the identity of the parameters they stand for: each is quantized once, whatever is recompiled."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from ..format.layer import QuantizedLinear
from ..format.rows import slice_rows
from ..kernels import ops
from ..kernels.cpu import backend
from ..kernels.native import NativeLinear, native_available
from .release import is_released

Product = Callable[[torch.Tensor], torch.Tensor]

State = tuple[int, StorageWeakRef, int, torch.dtype]
"""What changes when a tensor gets other values, as far as PyTorch tells: its version counter; its memory, where that is, and
its type, which assigning to ``.data`` changes (``module.half()``, ``module.to(device)`` do that)."""


@dataclass(frozen=True)
class Stack:
    """A quantized layer and the parameters whose rows it holds.

    Attributes:
        name: of the layer.
        layer: its tensors.
        rows: of each parameter, in the order of the layer's rows.
        transposed: the parameters are stored as ``[in_features, out_features]``.
        accuracy_level: arithmetic of the native kernels.
    """

    name: str
    layer: QuantizedLinear
    rows: tuple[int, ...]
    transposed: bool
    accuracy_level: int


@dataclass(frozen=True)
class Entry:
    """What is known of one parameter.

    Attributes:
        ref: the parameter.
        state: when it was quantized.
        stack: where its quantized rows are; None for a parameter that stays as it is.
        part: which part of the stack it is.
    """

    ref: weakref.ref[torch.Tensor]
    state: State
    stack: Stack | None
    part: int

    @property
    def layer(self) -> QuantizedLinear:
        """The rows of this parameter alone."""
        assert self.stack is not None
        start = sum(self.stack.rows[: self.part])
        whole = self.stack.layer
        rows = self.stack.rows[self.part]
        return whole if rows == whole.out_features else slice_rows(whole, start, start + rows)


@dataclass(frozen=True)
class _Cached:
    refs: tuple[weakref.ref[torch.Tensor] | None, ...]
    run: Product

    def serves(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        if len(tensors) != len(self.refs):
            return False
        for ref, tensor in zip(self.refs, tensors, strict=True):  # noqa: SIM110 - called for every layer of every token
            if (ref() if ref is not None else None) is not tensor:
                return False
        return True

    def reads(self, identities: Collection[int]) -> bool:
        """Whether one of these tensors is among those it was prepared from; of those that are gone nothing is known."""
        return any(ref is not None and ((tensor := ref()) is None or id(tensor) in identities) for ref in self.refs)


def version_of(tensor: torch.Tensor) -> int:
    """Counts changes in place; tensors made in inference mode have no counter and cannot be changed outside of it."""
    return 0 if tensor.is_inference() else tensor._version


def state_of(tensor: torch.Tensor) -> State:
    """See :data:`State`."""
    return version_of(tensor), StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr(), tensor.dtype


class KnownStates:
    """Weights and biases of a call, and their states then: asked at every call, hence by few passes over all of them."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.refs = [weakref.ref(tensor) for tensor in tensors]
        self.counted = not any(tensor.is_inference() for tensor in tensors)
        self.versions = [version_of(tensor) for tensor in tensors]
        self.pointers = [tensor.data_ptr() for tensor in tensors]
        self.memories = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors as they were."""
        if not all(map(operator.is_, [ref() for ref in self.refs], tensors)):
            return False
        versions = (
            [tensor._version for tensor in tensors] if self.counted else [version_of(tensor) for tensor in tensors]
        )
        if versions != self.versions or [tensor.data_ptr() for tensor in tensors] != self.pointers:
            return False
        # Other memory may lie where the first did, once that was freed.
        return True not in [memory.expired() for memory in self.memories]


class WeightStore:
    """The quantized weights of one set of options.

    Args:
        key: name of the store among :data:`STORES`; graphs carry it as a constant.

    Attributes:
        saved_in: folder that holds all that is in the store, if it was saved and nothing was put in since.
        generation: counts what was forgotten or took the place of something else; what calls remember is no longer so then.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.saved_in: Path | None = None
        self.generation = 0
        self._entries: dict[int, Entry] = {}
        # A shared weight may be used with a bias and without, alone and beside others.
        self._products: dict[tuple[int, int, tuple[bool, ...]], _Cached] = {}
        self._rows: dict[int, _Cached] = {}
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], State]] = {}

    def find(self, weight: torch.Tensor) -> Entry | None:
        """The entry of a parameter; None if it is unknown or was changed since it was quantized."""
        entry = self._entries.get(id(weight))
        if entry is None or entry.ref() is not weight:
            return None
        # A weight that was released has given its memory up, and nothing can have changed it since.
        return entry if entry.state == state_of(weight) or is_released(weight) else None

    def entries(self) -> Iterator[tuple[torch.Tensor, Entry]]:
        """Every living parameter with its entry."""
        for entry in list(self._entries.values()):
            weight = entry.ref()
            if weight is not None:
                yield weight, entry

    def add(self, weights: Sequence[torch.Tensor], stack: Stack) -> None:
        """Put a quantized layer in for the parameters whose rows it holds, in order."""
        for part, weight in enumerate(weights):
            self.put(weight, stack, part)

    def leave(self, weight: torch.Tensor) -> None:
        """Note that a parameter stays as it is."""
        self.put(weight, None, 0)

    def forget(self, weights: Iterable[torch.Tensor]) -> bool:
        """Forget what stands for parameters, so that the next call quantizes them anew; returns whether there was anything."""
        found = [weight for weight in weights if self._entries.pop(id(weight), None) is not None]
        if found:
            self.generation += 1
            self.refresh()
        return bool(found)

    def refresh(self) -> None:
        """Forget what was prepared from weights and biases."""
        self._products.clear()
        self._rows.clear()

    def use(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note the weights and biases of a call; what was prepared from one that has changed since its last is forgotten."""
        changed = set()
        for tensor in tensors:
            known, state = self._used.get(id(tensor)), state_of(tensor)
            if known is None or known[0]() is not tensor or known[1] != state:
                changed.add(id(tensor))
                gone = partial(_gone, weakref.ref(self), id(tensor))
                self._used[id(tensor)] = (weakref.ref(tensor, gone), state)
        if changed:
            self._drop(changed)

    def _drop(self, changed: Collection[int]) -> None:
        """Forget what was prepared from changed tensors, or from such as are gone."""
        # Other threads' graphs put theirs in meanwhile.
        self._products = {key: one for key, one in list(self._products.items()) if not one.reads(changed)}
        self._rows = {key: one for key, one in list(self._rows.items()) if not one.reads(changed)}

    def put(self, weight: torch.Tensor, stack: Stack | None, part: int) -> None:
        """Put in what stands for one parameter: a part of a stack, or None where it stays as it is."""
        identity = id(weight)
        entries = self._entries

        def forget(ref: weakref.ref[torch.Tensor]) -> None:
            if (entry := entries.get(identity)) is not None and entry.ref is ref:
                del entries[identity]

        self.saved_in = None
        if identity in entries:
            self.generation += 1
        entries[identity] = Entry(weakref.ref(weight, forget), state_of(weight), stack, part)
        self.refresh()

    def product(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], transposed: bool
    ) -> Product:
        """``x -> x Wᵀ + b`` with the parameters stacked, on their quantized rows where there are any.

        Args:
            weights: the parameters.
            biases: one a parameter or None; empty: none at all.
            transposed: the parameters are stored as ``[in_features, out_features]``.
        """
        tensors = (*weights, *biases)
        key = (id(weights[0]), len(weights), tuple([bias is None for bias in biases]))
        cached = self._products.get(key)
        if cached is None or not cached.serves(tensors):
            cached = _Cached(_references(tensors), self._build(weights, biases or [None] * len(weights), transposed))
            self._products[key] = cached
        return cached.run

    def _build(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], transposed: bool
    ) -> Product:
        entries = [self.find(weight) for weight in weights]
        stack = entries[0].stack if entries[0] is not None else None
        if (
            stack is not None
            and len(stack.rows) == len(weights)
            and all(e is not None and e.stack is stack and e.part == i for i, e in enumerate(entries))
        ):
            return _quantized(stack.layer, _joined(biases, stack.rows), stack.accuracy_level)
        parts = [
            _dense(weight, bias, transposed)
            if entry is None or entry.stack is None
            else _quantized(entry.layer, bias, entry.stack.accuracy_level)
            for weight, bias, entry in zip(weights, biases, entries, strict=True)
        ]
        return parts[0] if len(parts) == 1 else lambda x: torch.cat([part(x) for part in parts], -1)

    def rows(self, weight: torch.Tensor) -> Product:
        """``indices -> rows of the parameter``, quantized where they are."""
        cached = self._rows.get(id(weight))
        if cached is None or not cached.serves((weight,)):
            entry = self.find(weight)
            run = _dense_rows(weight) if entry is None or entry.stack is None else _rows_of(entry.layer, weight.dtype)
            cached = _Cached(_references((weight,)), run)
            self._rows[id(weight)] = cached
        return cached.run


def _gone(store: weakref.ref[WeightStore], identity: int, ref: weakref.ref[torch.Tensor]) -> None:
    """A weight or bias is gone: so is what was prepared from it, which holds quantized tensors and biases."""
    if (one := store()) is not None:
        if identity in one._used and one._used[identity][0] is ref:
            del one._used[identity]
        one._drop(())


STORES: dict[str, WeightStore] = {}
"""All stores by key; the operators of compiled graphs look their weights up here."""


def all_stores() -> list[WeightStore]:
    """Each store once; one has a second name when a graph was compiled ahead of time."""
    return list({id(store): store for store in STORES.values()}.values())


_keys: dict[str, str] = {}


def store_for(settings: str) -> WeightStore:
    """The store of these settings, made at the first call.

    Its key, which is part of compiled graphs, is a number: Inductor's cache on disk then knows the graph again whatever
    the settings are.
    """
    if settings not in _keys:
        _keys[settings] = str(len(_keys))
        STORES[_keys[settings]] = WeightStore(_keys[settings])
    return STORES[_keys[settings]]


def _references(tensors: Sequence[torch.Tensor | None]) -> tuple[weakref.ref[torch.Tensor] | None, ...]:
    return tuple(None if tensor is None else weakref.ref(tensor) for tensor in tensors)


def _joined(biases: Sequence[torch.Tensor | None], rows: Sequence[int]) -> torch.Tensor | None:
    """One bias for a stack, zeros standing for absent ones."""
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return torch.cat([like.new_zeros(n) if bias is None else bias for bias, n in zip(biases, rows, strict=True)])


def _quantized(layer: QuantizedLinear, bias: torch.Tensor | None, accuracy_level: int) -> Product:
    tensors = tuple(layer.tensors().values())
    device = tensors[0].device
    offset = torch.zeros(0, device=device) if bias is None else bias.detach()
    if device.type == "cpu" and backend() != "reference" and native_available()[0]:
        native = NativeLinear(
            *tensors, offset, columns=layer.columns, in_features=layer.in_features, out_features=layer.out_features
        )
        return lambda x: native(x, accuracy_level)
    settings = (layer.in_features, layer.out_features, list(layer.columns), accuracy_level)
    return lambda x: ops.linear(x, *tensors, offset, *settings)


def _dense(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> Product:
    reference = weakref.ref(weight)

    def product(x: torch.Tensor) -> torch.Tensor:
        value = reference()
        assert value is not None
        value = value.detach().to(x.dtype)  # under autocast x may be of a lower precision
        return functional.linear(x, value.t() if transposed else value, None if bias is None else bias.to(x.dtype))

    return product


def _rows_of(layer: QuantizedLinear, dtype: torch.dtype) -> Product:
    tensors = tuple(layer.tensors().values())
    like = torch.zeros(0, dtype=dtype, device=tensors[0].device)
    settings = (layer.in_features, layer.out_features, list(layer.columns))
    return lambda indices: ops.embedding(indices, *tensors, like, *settings)


def _dense_rows(weight: torch.Tensor) -> Product:
    reference = weakref.ref(weight)

    def rows(indices: torch.Tensor) -> torch.Tensor:
        value = reference()
        assert value is not None
        return functional.embedding(indices, value.detach())

    return rows


def named_parameters(module: nn.Module) -> dict[int, str]:
    """Identity -> first name of every parameter."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    return names
