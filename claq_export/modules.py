"""Quantized layers inside PyTorch models: the module ``ClaqLinear``, and loading a checkpoint back into its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from .errors import ModelError
from .format.checkpoint import Checkpoint, load_checkpoint
from .format.layer import TENSOR_NAMES, QuantizedLinear
from .format.rows import slice_rows
from .kernels import ops


class ClaqLinear(nn.Module):
    """A linear layer on quantized weights: ``y = x Wᵀ + b`` through ``claq::linear``, for inference.

    Its tensors are buffers named as in docs/format.md. They keep their dtypes when the module is cast (``.half()``);
    the bias follows.

    Args:
        layer: the quantized weight.
        bias: ``[out_features]``, or None.
        accuracy_level: arithmetic of the native kernels: 0 or 1 = float32, 4 = activations rounded to int8.
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor
    row_scale: torch.Tensor
    order: torch.Tensor
    outlier_ptr: torch.Tensor
    outlier_index: torch.Tensor
    outlier_value: torch.Tensor
    bias: torch.Tensor

    def __init__(self, layer: QuantizedLinear, bias: torch.Tensor | None = None, accuracy_level: int = 0) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (layer.out_features,):
            raise ModelError(f"bias must have shape [{layer.out_features}], got {list(bias.shape)}")
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.columns = layer.columns
        self.accuracy_level = accuracy_level
        for name, tensor in layer.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer(
            "bias",
            torch.zeros(0, device=layer.codes.device) if bias is None else bias.detach(),
            persistent=bias is not None,
        )

    @property
    def layer(self) -> QuantizedLinear:
        """The quantized weight, sharing this module's tensors."""
        return QuantizedLinear(
            in_features=self.in_features,
            out_features=self.out_features,
            columns=self.columns,
            **{name: getattr(self, name) for name in TENSOR_NAMES},
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x[..., in_features]`` of float32, float16 or bfloat16 to ``[..., out_features]`` of the same dtype."""
        return ops.linear(
            x,
            self.codes,
            self.codebook,
            self.scale,
            self.row_scale,
            self.order,
            self.outlier_ptr,
            self.outlier_index,
            self.outlier_value,
            self.bias,
            self.in_features,
            self.out_features,
            list(self.columns),
            self.accuracy_level,
        )

    def extra_repr(self) -> str:
        """Sizes and stored columns a width."""
        widths = ", ".join(
            f"{count} columns of {width} bits" for width, count in zip((4, 3, 2), self.columns, strict=True) if count
        )
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={bool(self.bias.numel())}, {widths}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ClaqLinear:
        dtypes = {name: getattr(self, name).dtype for name in TENSOR_NAMES}
        before = {name: getattr(self, name) for name in TENSOR_NAMES}
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            if getattr(self, name).dtype != dtype:
                # A cast of the model must not reach the format: take the original to the new device instead.
                setattr(self, name, before[name].to(getattr(self, name).device))
        return self


def linear_bias(module: nn.Module) -> torch.Tensor | None:
    """The bias of an ``nn.Linear`` or transformers ``Conv1D``, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, torch.Tensor) and bias.numel() else None


def _features(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a linear module, or None for any other."""
    if isinstance(module, (nn.Linear, ClaqLinear)):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


def replace_linears(
    model: nn.Module,
    layers: Mapping[str, QuantizedLinear],
    *,
    parts: Mapping[str, Sequence[tuple[str, int]]] | None = None,
    accuracy_levels: Mapping[str, int] | None = None,
) -> nn.Module:
    """Put quantized layers in the place of a model's linear modules (``nn.Linear``, transformers ``Conv1D``).

    Args:
        model: changed in place; biases stay.
        layers: name -> quantized layer.
        parts: for stacked layers, the qualified names of their linears and the rows of each; a layer that is not listed
            replaces the module of its own name.
        accuracy_levels: layer -> the operator's ``accuracy_level``, 0 where not listed.

    Returns:
        ``model``.

    Raises:
        ModelError: a module is missing, is not linear, or has another size; the model is unchanged then.
    """
    replacements: dict[str, ClaqLinear] = {}
    for name, layer in layers.items():
        start = 0
        members = (parts or {}).get(name) or ((name, layer.out_features),)
        for target, rows in members:
            try:
                module = model.get_submodule(target)
            except AttributeError:
                raise ModelError(f"the model has no module {target!r}, which layer {name!r} stands for") from None
            found, expected = _features(module), (layer.in_features, rows)
            if found is None:
                raise ModelError(f"module {target!r} is a {type(module).__name__}, not a linear layer")
            if found != expected:
                raise ModelError(
                    f"module {target!r} has {found[0]} input and {found[1]} output features; "
                    f"layer {name!r} holds {expected[0]} and {expected[1]} for it"
                )
            part = layer if rows == layer.out_features else slice_rows(layer, start, start + rows)
            replacements[target] = ClaqLinear(part, linear_bias(module), (accuracy_levels or {}).get(name, 0))
            start += rows
    for target, replacement in replacements.items():
        model.set_submodule(target, replacement)
    return model


def load(folder: Path | str, model: nn.Module, *, strict: bool = True) -> nn.Module:
    """Load a quantized checkpoint into the PyTorch model it was made from.

    Args:
        folder: holds ``claq.safetensors`` and ``claq.json``.
        model: a model of the original architecture, its weights of any value (or on the meta device); changed in place.
        strict: refuse a checkpoint without values for all weights of the model; otherwise those keep their values.

    Returns:
        ``model``, its quantized linears being :class:`ClaqLinear` now and all other weights those of the checkpoint.

    Raises:
        FormatError: the checkpoint is damaged.
        ModelError: the checkpoint is of another architecture; the message names the first module or tensor in question.
    """
    return restore(model, load_checkpoint(folder), strict=strict)


def restore(model: nn.Module, checkpoint: Checkpoint, *, strict: bool = True) -> nn.Module:
    """As :func:`load`, from a checkpoint in memory."""
    state = model.state_dict(keep_vars=True)
    replaced = {f"{part}.weight" for name in checkpoint.layers for part, _ in checkpoint.parts_of(name)}
    needed = [name for name in state if name not in replaced]
    # Tied weights are one object under several names; one of them is enough.
    given = {id(state[name]) for name in checkpoint.tensors if name in state}
    missing = [name for name in needed if id(state[name]) not in given]
    if missing and strict:
        raise ModelError(
            f"the checkpoint has no tensor {missing[0]!r}, which the model has ({len(missing)} in all); "
            "with strict=False such tensors keep the model's values"
        )
    for name, tensor in checkpoint.tensors.items():
        if name not in state:
            continue
        if tuple(tensor.shape) != tuple(state[name].shape):
            raise ModelError(
                f"tensor {name!r} has shape {list(state[name].shape)} in the model, {list(tensor.shape)} here"
            )
    replace_linears(model, checkpoint.layers, parts=checkpoint.parts, accuracy_levels=checkpoint.accuracy_levels)
    # Materialized models keep their own (possibly tied) parameters and take the values; those on meta take the tensors.
    on_meta = any(tensor.is_meta for tensor in state.values())
    values = {name: checkpoint.tensors[name] for name in needed if name in checkpoint.tensors}
    model.load_state_dict(values, strict=False, assign=on_meta)
    tie_weights = getattr(model, "tie_weights", None)
    if on_meta and callable(tie_weights):
        tie_weights()
    return model
