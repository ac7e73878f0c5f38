"""The operators of compiled graphs: products with, and rows of, whatever stands for a parameter at the time of the call.

A graph that Dynamo compiled outlives the moment its weights are quantized, and may serve other parameters at the next call
(layers of one class share it). These operators therefore take the *parameters*, which Dynamo passes as inputs anyway,
and look up the quantized layer by the parameter's identity: nothing is compiled again when weights are swapped, and one
operator costs one lookup and one native call. Until a parameter is quantized the operator computes with its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.ops import register_autocast
from .store import STORES

LINEAR_SCHEMA = "linear_of(Tensor x, Tensor[] weights, Tensor?[] biases, bool transposed, str store) -> Tensor"
EMBEDDING_SCHEMA = "embedding_of(Tensor indices, Tensor weight, str store) -> Tensor"

_library = torch.library.Library("claq", "FRAGMENT")
_library.define(LINEAR_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
_library.define(EMBEDDING_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def _linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    transposed: bool,
    store: str,
) -> torch.Tensor:
    return STORES[store].product(weights, biases, transposed)(x)


def _linear_fake(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    transposed: bool,
    store: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[1 if transposed else 0] for weight in weights)))


def _embedding(indices: torch.Tensor, weight: torch.Tensor, store: str) -> torch.Tensor:
    # As nn.Embedding does, while claq::embedding counts from the end; to look would mean to wait for a GPU.
    if indices.is_cpu and indices.numel() and (lowest := int(indices.min())) < 0:
        raise IndexError(f"index {lowest} is out of range: the embedding has rows 0 to {weight.shape[0] - 1}")
    return STORES[store].rows(weight)(indices)


def _embedding_fake(indices: torch.Tensor, weight: torch.Tensor, store: str) -> torch.Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _backward(_ctx: Any, *_gradients: torch.Tensor) -> None:
    raise RuntimeError(
        "a graph compiled with backend='claq' is for inference and has no gradient: call it under torch.no_grad()"
    )


for _name, _kernel, _shape in (
    ("linear_of", _linear, _linear_fake),
    ("embedding_of", _embedding, _embedding_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"claq::{_name}", _shape, lib=_library)
    torch.library.register_autograd(f"claq::{_name}", _backward, lib=_library)

register_autocast(_library, "linear_of", torch.ops.claq.linear_of.default)

linear_of = torch.ops.claq.linear_of.default
"""``x[..., K]`` to ``[..., N]``: the product with the stacked parameters ``weights`` (each ``[N_i, K]``, or ``[K, N_i]``
if ``transposed``) plus ``biases``, one a parameter or None (an empty list: none), in the dtype of ``x`` or, under autocast,
of autocast. ``store`` is the key of a :class:`~claq_export.backend.store.WeightStore`."""

embedding_of = torch.ops.claq.embedding_of.default
"""Rows ``[*indices.shape, K]`` of the parameter ``weight[N, K]``, in its dtype; on the CPU an index below zero is an
``IndexError``."""
