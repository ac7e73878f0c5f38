"""Quantized layers inside PyTorch models: the modules ``ClaqLinear`` and ``ClaqEmbedding``, and loading a checkpoint back
into its model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from .errors import ModelError
from .experts import split_experts
from .format.checkpoint import Checkpoint, load_checkpoint
from .format.layer import TENSOR_NAMES, QuantizedLinear
from .format.rows import slice_rows
from .kernels import ops


class _QuantizedModule(nn.Module):
    """The tensors of a quantized weight as buffers named as in docs/format.md, which keep their dtypes in any cast."""

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor
    row_scale: torch.Tensor
    order: torch.Tensor
    outlier_ptr: torch.Tensor
    outlier_index: torch.Tensor
    outlier_value: torch.Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.columns = layer.columns
        for name, tensor in layer.tensors().items():
            self.register_buffer(name, tensor)

    def _empty_until_filled(self) -> None:
        """Leave the tensors out of the ``state_dict()`` until :meth:`fill`."""
        self._non_persistent_buffers_set.update(TENSOR_NAMES)

    def fill(self, layer: QuantizedLinear) -> None:
        """Take the tensors of ``layer``, moved to the device of this module's.

        Raises:
            ModelError: the layer is of another size.
        """
        if (layer.in_features, layer.out_features) != (self.in_features, self.out_features):
            raise ModelError(
                f"a layer of {layer.in_features} to {layer.out_features} features does not fit a module of "
                f"{self.in_features} to {self.out_features}"
            )
        self.columns = layer.columns
        for name, tensor in layer.tensors().items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        self._non_persistent_buffers_set.difference_update(TENSOR_NAMES)

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in of one element that has the shape, dtype and device of the dense weight; every value is NaN.

        Models ask a linear module for these (T5, for the dtype of its activations); the values are in :attr:`layer`.
        A model that computes with the weight itself gets NaN. (On the device ``meta`` it would get whatever lies in
        memory: PyTorch multiplies a CPU tensor by a meta tensor without an error.)
        """
        absent = torch.full((1, 1), torch.nan, dtype=self._dtype(), device=self.codes.device)
        stand_in = absent.expand(self.out_features, self.in_features)
        # GPT-2 in transformers 5 initializes `c_proj.weight` by name while it loads; this mark makes it leave it alone.
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def _dtype(self) -> torch.dtype:
        """Dtype of the dense weight this module stands for; it follows casts of the model."""
        raise NotImplementedError

    @property
    def layer(self) -> QuantizedLinear:
        """The quantized weight, sharing this module's tensors."""
        return QuantizedLinear(
            in_features=self.in_features,
            out_features=self.out_features,
            columns=self.columns,
            **{name: getattr(self, name) for name in TENSOR_NAMES},
        )

    def _widths(self) -> str:
        return ", ".join(
            f"{count} columns of {width} bits" for width, count in zip((4, 3, 2), self.columns, strict=True) if count
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _QuantizedModule:
        dtypes = {name: getattr(self, name).dtype for name in TENSOR_NAMES}
        before = {name: getattr(self, name) for name in TENSOR_NAMES}
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            if getattr(self, name).dtype != dtype:
                # A cast of the model must not reach the format: take the original to the new device instead.
                setattr(self, name, before[name].to(getattr(self, name).device))
        return self


def _no_tensors(in_features: int, out_features: int, columns: tuple[int, int, int]) -> QuantizedLinear:
    """A weight whose tensors are not there yet."""
    return QuantizedLinear(
        in_features, out_features, columns, **{name: torch.zeros(0, device="cpu") for name in TENSOR_NAMES}
    )


class ClaqLinear(_QuantizedModule):
    """A linear layer on quantized weights: ``y = x Wᵀ + b`` through ``claq::linear``, for inference.

    Its tensors are buffers named as in docs/format.md. They keep their dtypes when the module is cast (``.half()``);
    the bias follows.

    Args:
        layer: the quantized weight.
        bias: ``[out_features]``, or None.
        accuracy_level: arithmetic of the native kernels: 0 or 1 = float32, 4 = activations rounded to int8.
    """

    bias: torch.Tensor

    def __init__(self, layer: QuantizedLinear, bias: torch.Tensor | None = None, accuracy_level: int = 0) -> None:
        super().__init__(layer)
        if bias is not None and tuple(bias.shape) != (layer.out_features,):
            raise ModelError(f"bias must have shape [{layer.out_features}], got {list(bias.shape)}")
        self.accuracy_level = accuracy_level
        self.register_buffer(
            "bias",
            torch.zeros(0, device=layer.codes.device) if bias is None else bias.detach(),
            persistent=bias is not None,
        )

    @classmethod
    def hollow(
        cls,
        in_features: int,
        out_features: int,
        columns: tuple[int, int, int],
        bias: torch.Tensor | None = None,
        accuracy_level: int = 0,
    ) -> ClaqLinear:
        """A module whose tensors are empty until :meth:`fill`, and absent from its ``state_dict()`` until then."""
        module = cls(_no_tensors(in_features, out_features, columns), bias, accuracy_level)
        module._empty_until_filled()
        return module

    def _dtype(self) -> torch.dtype:
        return self.bias.dtype

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
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={bool(self.bias.numel())}, {self._widths()}"


class ClaqEmbedding(_QuantizedModule):
    """An embedding on a quantized table, through ``claq::embedding``, for inference.

    Its tensors are buffers named as in docs/format.md, the vocabulary being the output features of the weight. They
    keep their dtypes when the module is cast; the rows it returns follow the cast.

    Args:
        layer: the quantized table.
        dtype: of the rows: float32, float16 or bfloat16.
    """

    like: torch.Tensor

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(layer)
        self.register_buffer("like", torch.zeros(0, dtype=dtype, device=layer.codes.device), persistent=False)

    @classmethod
    def hollow(
        cls, in_features: int, out_features: int, columns: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> ClaqEmbedding:
        """A module whose tensors are empty until :meth:`fill`, and absent from its ``state_dict()`` until then."""
        module = cls(_no_tensors(in_features, out_features, columns), dtype)
        module._empty_until_filled()
        return module

    def _dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, as ``nn.Embedding`` calls them."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Columns of the table, as ``nn.Embedding`` calls them."""
        return self.in_features

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """``indices`` (int32 or int64, any shape) to rows ``[*indices.shape, embedding_dim]``.

        Raises:
            IndexError: an index is out of range.
        """
        return ops.embedding(
            indices,
            self.codes,
            self.codebook,
            self.scale,
            self.row_scale,
            self.order,
            self.outlier_ptr,
            self.outlier_index,
            self.outlier_value,
            self.like,
            self.in_features,
            self.out_features,
            list(self.columns),
        )

    def extra_repr(self) -> str:
        """Sizes and stored columns a width."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._widths()}"


def replace_linears(
    model: nn.Module,
    layers: Mapping[str, QuantizedLinear],
    *,
    parts: Mapping[str, Sequence[tuple[str, int]]] | None = None,
    accuracy_levels: Mapping[str, int] | None = None,
    transposed: Collection[str] = (),
    tied: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Put quantized layers in the place of a model's linear and embedding modules (``nn.Linear``, transformers
    ``Conv1D``, ``nn.Embedding``).

    Modules that share a weight share the quantized tensors. A weight that belongs to another kind of module, which may
    use it in its own way (``nn.MultiheadAttention``, for example), is overwritten with the dequantized one instead.

    Args:
        model: changed in place; biases stay. Expert weights stored in one tensor become a module an expert.
        layers: name -> quantized layer.
        parts: for stacked layers, the names of their linears and the rows of each; a layer that is not listed has the
            linear of its own name as its only part. A name is that of a module with a ``weight``, or of a parameter.
        accuracy_levels: layer -> the operator's ``accuracy_level``, 0 where not listed.
        transposed: layers whose weight the model stores as ``[in_features, out_features]``; it need not be said of
            linear modules, whose class tells.
        tied: layer -> further modules with its weight, besides those that share the parameter in ``model``.

    Returns:
        ``model``.

    Raises:
        ModelError: a weight is missing or has another size; the model is unchanged then.
    """
    split_experts(model, [target for name in layers for target, _ in (parts or {}).get(name) or ((name, 0),)])
    sharing = _modules_by_weight(model)
    modules: dict[str, ClaqLinear | ClaqEmbedding] = {}
    dense: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, layer in layers.items():
        start = 0
        for target, rows in (parts or {}).get(name) or ((name, layer.out_features),):
            _, weight = _weight_of(model, target, name)
            part = layer if rows == layer.out_features else slice_rows(layer, start, start + rows)
            start += rows
            others = [*sharing.get(id(weight), ()), *(tied or {}).get(name, ())]
            for every in dict.fromkeys([target, *others]):
                owner, weight = _weight_of(model, every, name)
                kind = linear_kind(owner)
                flipped = kind == "Conv1D" if kind else name in transposed
                shape = (layer.in_features, rows) if flipped else (rows, layer.in_features)
                if tuple(weight.shape) != shape:
                    raise ModelError(
                        f"the weight of {every!r} has shape {list(weight.shape)}, layer {name!r} is for {list(shape)}"
                    )
                if kind == "Embedding":
                    modules[every] = ClaqEmbedding(part, weight.dtype)
                elif kind:
                    bias = getattr(owner, "bias", None)
                    modules[every] = ClaqLinear(part, bias, (accuracy_levels or {}).get(name, 0))
                else:
                    value = part.dequantize(weight.dtype)
                    dense.append((weight, value.T if flipped else value))
    for target, module in modules.items():
        model.set_submodule(target, module)
    with torch.no_grad():
        for weight, value in dense:
            weight.copy_(value)
    return model


def linear_kind(module: nn.Module | None) -> str | None:
    """``"Linear"`` or ``"Conv1D"`` for modules that do nothing but multiply by their weight, ``"Embedding"`` for those
    that do nothing but take its rows, else None."""
    if type(module) is nn.Linear:  # subclasses may do anything
        return "Linear"
    if type(module) is nn.Embedding and module.max_norm is None:
        return "Embedding"
    name, home = type(module).__name__, type(module).__module__
    return "Conv1D" if name == "Conv1D" and home.startswith("transformers.") else None


def _modules_by_weight(model: nn.Module) -> dict[int, list[str]]:
    """Identity of each weight -> names of the modules that have it as their ``weight``."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = None if isinstance(module, _QuantizedModule) else getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            found.setdefault(id(weight), []).append(name)
    return found


def _weight_of(model: nn.Module, target: str, layer: str) -> tuple[nn.Module | None, torch.Tensor]:
    """The module ``target`` and its weight, or None and the parameter ``target``."""
    try:
        module = model.get_submodule(target)
    except AttributeError:
        module = None
    if isinstance(module, ClaqLinear):
        raise ModelError(f"{target!r} is quantized already; start from the original model")
    weight = getattr(module, "weight", None) if module is not None else None
    if isinstance(weight, torch.Tensor):
        return module, weight
    try:
        return None, model.get_parameter(target)
    except AttributeError:
        raise ModelError(f"the model has no linear layer {target!r}, which layer {layer!r} stands for") from None


def load(folder: Path | str, model: nn.Module, *, strict: bool = True) -> nn.Module:
    """Load a quantized checkpoint into the PyTorch model it was made from.

    Args:
        folder: holds ``claq.safetensors`` and ``claq.json``.
        model: a model of the original architecture, its weights of any value; changed in place.
        strict: refuse a checkpoint without values for all weights of the model; otherwise those keep their values.

    Returns:
        ``model``, its quantized layers being :class:`ClaqLinear` and :class:`ClaqEmbedding` now and all other weights
        those of the checkpoint.

    Raises:
        FormatError: the checkpoint is damaged.
        ModelError: the checkpoint is of another architecture; the message names the first module or tensor in question.
    """
    return restore(model, load_checkpoint(folder), strict=strict)


def restore(model: nn.Module, checkpoint: Checkpoint, *, strict: bool = True) -> nn.Module:
    """As :func:`load`, from a checkpoint in memory."""
    split_experts(model, [part for name in checkpoint.layers for part, _ in checkpoint.parts_of(name)])
    state = model.state_dict(keep_vars=True)
    parts = [part for name in checkpoint.layers for part, _ in checkpoint.parts_of(name)]
    parts += [other for names in checkpoint.tied.values() for other in names]
    quantized = {f"{part}.weight" for part in parts} | set(parts)
    weights = {id(state[name]) for name in quantized if name in state}
    needed = [name for name in state if name not in quantized and id(state[name]) not in weights]
    # Tied weights are one object under several names; one of them is enough.
    given = {id(state[name]) for name in checkpoint.tensors if name in state}
    missing = [name for name in needed if id(state[name]) not in given]
    if missing and strict:
        raise ModelError(
            f"the checkpoint has no tensor {missing[0]!r}, which the model has ({len(missing)} in all); "
            "with strict=False such tensors keep the model's values"
        )
    values = {name: checkpoint.tensors[name] for name in needed if name in checkpoint.tensors}
    for name, tensor in values.items():
        if tuple(tensor.shape) != tuple(state[name].shape):
            raise ModelError(
                f"tensor {name!r} has shape {list(state[name].shape)} in the model, {list(tensor.shape)} here"
            )
    replace_linears(
        model,
        checkpoint.layers,
        parts=checkpoint.parts,
        accuracy_levels=checkpoint.accuracy_levels,
        transposed=checkpoint.transposed,
        tied=checkpoint.tied,
    )
    model.load_state_dict(values, strict=False)
    return model
