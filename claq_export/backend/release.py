"""Frees the original weights once quantized ones serve in their place."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

_released: dict[int, weakref.ref[torch.Tensor]] = {}
_hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_saving: ContextVar[bool] = ContextVar("claq_saving", default=False)


def is_released(weight: torch.Tensor) -> bool:
    """Whether the values of a parameter have been freed."""
    ref = _released.get(id(weight))
    return ref is not None and ref() is weight and weight.untyped_storage().nbytes() == 0


def release(weights: Sequence[torch.Tensor]) -> None:
    """Free the memory of parameters; they keep shape, dtype and identity, which Dynamo's guards check.

    ``state_dict()`` and ``load_state_dict()`` of the modules that own them, copying and pickling say what happened. What
    PyTorch views first, a product among it, is an error of PyTorch's (of a "storage of size 0"). Kernels that read at once
    (``clone()``, ``sum()``) do not look, and may end the process: such a parameter is not to be read.
    """
    fresh = [weight for weight in weights if not is_released(weight)]
    for weight in fresh:
        empty = torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype, device=weight.device)
        empty.untyped_storage().resize_(0)
        weight.data = empty
        weight.__dict__.update(__deepcopy__=_refuse_copy, __reduce_ex__=_refuse_copy)  # looked for on the instance
        _released[id(weight)] = weakref.ref(weight, partial(_forget, id(weight)))
    if fresh:
        _warn_owners({id(weight) for weight in fresh})


def _refuse_copy(*_: Any) -> None:
    raise ModelError(
        "the original weights of this model were released (release_weights=True), so it can be neither copied nor pickled; "
        "claq_export.save_compiled(model, folder) saves the quantized ones"
    )


def _forget(identity: int, _ref: weakref.ref[torch.Tensor]) -> None:
    _released.pop(identity, None)


def check_not_released(weights: Sequence[torch.Tensor]) -> None:
    """Raise where a parameter's values are needed and gone.

    Raises:
        ModelError: one has been released.
    """
    if any(is_released(weight) for weight in weights):
        raise ModelError(
            "the weights of this model were released when it was compiled with release_weights=True, so they cannot be "
            "quantized again with other settings: load the model anew"
        )


@contextmanager
def saving() -> Iterator[None]:
    """Inside, ``state_dict()`` may be asked of modules whose weights are released (for what else it holds)."""
    token = _saving.set(True)
    try:
        yield
    finally:
        _saving.reset(token)


def _warn_owners(identities: set[int]) -> None:
    """Hook the modules that own the parameters; Dynamo tells of parameters only, so they are looked for among all."""
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), nn.Module) or candidate in _hooked:
            continue
        own = candidate.__dict__.get("_parameters") or {}
        if any(id(parameter) in identities for parameter in own.values()):
            candidate.register_state_dict_pre_hook(_refuse_state)
            candidate.register_load_state_dict_pre_hook(_refuse_loading)
            _hooked.add(candidate)


def _refuse_state(module: nn.Module, prefix: str, _keep_vars: bool) -> None:
    if not _saving.get():
        raise ModelError(
            f"the original weights of {prefix.rstrip('.') or type(module).__name__} were released (release_weights=True); "
            "claq_export.save_compiled(model, folder) saves the quantized ones"
        )


def _refuse_loading(module: nn.Module, _state: Any, prefix: str, *_rest: Any) -> None:
    raise ModelError(
        f"weights cannot be loaded into {prefix.rstrip('.') or type(module).__name__}: its original ones were released "
        "(release_weights=True); make the model anew"
    )
