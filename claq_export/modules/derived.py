"""Quantized embeddings that stay of the model's own class.

Some models take rows of a table through a class of their own: transformers' ``Gemma3TextScaledWordEmbedding`` multiplies
them, ``OPTLearnedPositionalEmbedding`` moves the indices. Such a class does the rest in its ``forward`` and leaves the rows
to ``nn.Embedding``; here they come from a quantized table instead. A class that reads ``self.weight`` itself gets the
stand-in of :mod:`.weight`, decoded whenever something is computed with it: right, but slow.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..format.layer import TENSOR_NAMES, QuantizedLinear
from .layers import ClaqEmbedding, no_tensors


class _Base(ClaqEmbedding, nn.Embedding):  # type: ignore[override]
    """:class:`ClaqEmbedding` where a class derived from ``nn.Embedding`` looks for what it calls ``super()``."""


def is_embedding(module: nn.Module) -> bool:
    """Whether a quantized table can take the place of a module's: an ``nn.Embedding`` or a class derived from it whose weight
    is a parameter and whose rows are not rescaled when they are read (``max_norm``)."""
    return (
        isinstance(module, nn.Embedding)
        and module.max_norm is None
        and module._parameters.get("weight") is not None  # parametrized ones are computed
    )


def embedding_in_place_of(dense: nn.Embedding, layer: QuantizedLinear) -> ClaqEmbedding:
    """A quantized table for the rows of ``dense``, of its class where that is not ``nn.Embedding`` itself; its other
    tensors and attributes are shared with it."""
    weight = dense.weight
    if type(dense) is nn.Embedding:
        return ClaqEmbedding(layer, weight.dtype)
    module = _blank(type(dense))
    ClaqEmbedding.__init__(module, layer, weight.dtype)
    _take(module, dense, without={"weight"})
    return module


def hollow_embedding(dense: nn.Embedding, columns: tuple[int, int, int]) -> ClaqEmbedding:
    """:func:`embedding_in_place_of`, its tensors empty until :meth:`~ClaqEmbedding.fill` and absent from its
    ``state_dict()`` until then."""
    rows, in_features = dense.weight.shape
    module = embedding_in_place_of(dense, no_tensors(in_features, rows, columns))
    module.empty_until_filled()
    return module


def dense_embedding(module: ClaqEmbedding, weight: nn.Parameter) -> nn.Embedding:
    """The module in whose place ``module`` stands, on the dense ``weight [num_embeddings, embedding_dim]``."""
    dense = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
    if isinstance(module, _Base):
        own: Any = type(module).__mro__[1]
        dense = own.__new__(own)
        nn.Module.__init__(dense)
        _take(dense, module, without={*TENSOR_NAMES, "like", "in_features", "out_features", "columns"})
        dense.num_embeddings, dense.embedding_dim = module.num_embeddings, module.embedding_dim
    dense.weight = weight
    return dense


_OF_MODULES = frozenset(vars(nn.Module()))
# What nn.Embedding calls its sizes are properties here; accelerate's hooks are bound to the module they were made for.
_LEFT = frozenset({"num_embeddings", "embedding_dim", "forward", "_old_forward", "_hf_hook"})


def _take(module: nn.Module, other: nn.Module, without: set[str]) -> None:
    """Give ``module`` the tensors and attributes of ``other`` but those in ``without``; hooks are left where they are."""
    for store in ("_parameters", "_buffers", "_modules"):
        vars(module)[store].update({name: value for name, value in vars(other)[store].items() if name not in without})
    module._non_persistent_buffers_set.update(other._non_persistent_buffers_set - without)
    for name, value in vars(other).items():
        if name not in _OF_MODULES and name not in _LEFT and name not in without:
            vars(module)[name] = value


@functools.cache
def _derived(own: Any) -> type[ClaqEmbedding]:
    """A class that is ``own`` with the rows of :class:`ClaqEmbedding`."""
    return type(f"Claq{own.__name__}", (own, _Base), {"__module__": __name__, "__reduce_ex__": _reduce})


def _blank(own: Any) -> Any:
    """An object of the derived class without a state; pickles name this function, as they cannot name such a class."""
    made: Any = _derived(own)
    return made.__new__(made)


def _reduce(module: Any, _protocol: int) -> tuple[Any, ...]:
    return _blank, (type(module).__mro__[1],), module.__getstate__()
