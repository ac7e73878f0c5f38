"""A model in the dtype of the graph that goes into the file, and whether its values fit there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..deferred import ReadingInterpreter, materialize
from ..errors import CaptureError, ModelError
from .captured import CapturedModel

_VALUES_AT_ONCE = 1 << 20


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself if its parameters have that dtype already, else a copy with parameters and saved buffers cast.

    Buffers outside the ``state_dict()`` keep their dtype, as ``from_pretrained(dtype=...)`` of transformers keeps them:
    they are computed tables, such as the frequencies of rotary positions, which 11 bits would spoil.

    Raises:
        CaptureError: the module cannot be copied.
    """
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if all(parameter.dtype == dtype for parameter in floating):
        return model
    try:
        converted = copy.deepcopy(model)
    except Exception as error:  # a module's own __deepcopy__ or __reduce__ may raise anything; it is the reason
        raise CaptureError(
            f"{type(model).__name__} cannot be copied to {name_of(dtype)}: {error}; give it in float32, or a folder"
        ) from error
    for module in converted.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            saved = name not in module._non_persistent_buffers_set
            if buffer is not None and saved and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return converted


def inputs_in_dtype(example: Any, dtype: torch.dtype) -> Any:
    """Example inputs, nested as they are, floating-point tensors cast."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, example)


def check_present(model: nn.Module, title: str) -> None:
    """See that all parameters and buffers have values.

    Raises:
        ModelError: one is on the meta device, or of a lazy module that was never called; the message names ``title``, the
            model, and the tensors.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"{title} has lazy modules that were never called, so {_some(lazy)} have no shape; call it on an example first"
        )
    absent = [name for name, tensor in tensors if tensor.is_meta]
    if absent:
        raise ModelError(
            f"{title} is on the meta device: {_some(absent)} have no values; load its weights first (to_empty, then "
            "load_state_dict)"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_weights(model: nn.Module, title: str) -> None:
    """See that no parameter is NaN or infinite and no buffer NaN (a mask may hold infinities).

    Raises:
        ModelError: one is, or has no values; the message names ``title``, the model, and the tensors.
    """
    check_present(model, title)
    bad = [name for name, weight in model.named_parameters() if not _all_finite(weight.detach())]
    bad += [name for name, buffer in model.named_buffers() if buffer.is_floating_point() and buffer.isnan().any()]
    if bad:
        raise ModelError(f"{title} has NaN or infinite weights in {_some(bad)}")


def _all_finite(tensor: torch.Tensor) -> bool:
    # What the check makes of a table of half a gigabyte takes more memory than the table.
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(_VALUES_AT_ONCE))


def check_range(model: nn.Module, dtype: torch.dtype) -> None:
    """See that the weights and biases of a model are finite in a narrower dtype.

    Weights that are not in memory (:mod:`claq_export.deferred`) are read one by one: hours later would be too late.

    Raises:
        ModelError: a value is beyond the dtype's largest number; the message names tensors and values.
    """
    largest = torch.finfo(dtype).max
    beyond = []
    for name, tensor in (*model.named_parameters(), *_saved_buffers(model)):
        if tensor.is_floating_point() and tensor.numel():
            magnitude = float(materialize(tensor.detach()).abs().max())
            if magnitude > largest:
                beyond.append(f"{name} ({magnitude:.4g})")
    if beyond:
        raise ModelError(
            f"{name_of(dtype)} ends at {largest:.5g}, beyond which lie values of {_some(beyond)}; {advice(dtype)}"
        )


def check_finite(captured: CapturedModel, outputs: tuple[torch.Tensor, ...], inputs: dict[str, torch.Tensor]) -> None:
    """See that a run of a graph in a narrower dtype overflowed nowhere that reaches an output.

    Args:
        captured: the graph.
        outputs: what it returned for ``inputs``.
        inputs: by name.

    Raises:
        ModelError: an output has a NaN or +infinity; the message names the first operator that made one.
    """
    if not any(_overflowed(output) for output in outputs):
        return
    dtype = next(output.dtype for output in outputs if _overflowed(output))
    tracer = _FirstOverflow(captured.graph_module)
    with torch.no_grad():
        tracer.run(*inputs.values())
    where = f" first in {tracer.found}" if tracer.found else ""
    raise ModelError(f"the model's activations overflow {name_of(dtype)},{where}; {advice(dtype)}")


def check_cache_range(captured: CapturedModel, outputs: tuple[torch.Tensor, ...]) -> None:
    """See that the keys and values that a graph returned fit into a cache that is narrower than its arithmetic.

    Raises:
        ModelError: one does not; the message names it.
    """
    for name, output in zip(captured.output_names, outputs, strict=True):
        if output.dtype == captured.cache_dtype != captured.dtype and not bool(output.isfinite().all()):
            raise ModelError(
                f"{captured.file_names.get(name, name)} of the model overflows a cache in {name_of(output.dtype)}; "
                "leave --cache-dtype out"
            )


def advice(dtype: torch.dtype) -> str:
    """What to do about a value that a dtype cannot hold."""
    if dtype == torch.float16:
        return "bfloat16 has the range of float32 (--dtype bfloat16), or leave the graph in float32"
    return "leave the graph in float32"


def name_of(dtype: torch.dtype) -> str:
    """``"float16"`` of ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _overflowed(value: object) -> bool:
    """A NaN or +infinity; minus infinity is what masks are made of."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return bool((value.isnan() | value.isposinf()).any())


class _FirstOverflow(ReadingInterpreter):
    """Runs a graph and notes the first operator that makes a NaN or +infinity."""

    found = ""

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if not self.found and n.op == "call_function" and any(map(_overflowed, pytree.tree_leaves(result))):
            weights = [str(value.target) for value in n.all_input_nodes if value.op == "get_attr"]
            self.found = f"{n.target} ({n.name}{', on ' + weights[0] if weights else ''})"
        return result
