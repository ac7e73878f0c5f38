"""The modules :class:`ClaqLinear` and :class:`ClaqEmbedding`: a linear layer and an embedding on a quantized weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..format.layer import TENSOR_NAMES, QuantizedLinear
from ..kernels import ops
from .signs import signed, unsigned
from .weight import DenseWeight, absent_weight, dense_weight, refusing_negative


class QuantizedModule(nn.Module):
    """What both have: the tensors of a quantized weight as buffers named as in docs/format.md, dtypes kept in any cast."""

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor
    row_scale: torch.Tensor
    order: torch.Tensor
    outlier_ptr: torch.Tensor
    outlier_index: torch.Tensor
    outlier_value: torch.Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        nn.Module.__init__(self)  # not the next class in line, which may be a model's own
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.columns = layer.columns
        for name, tensor in layer.tensors().items():
            self.register_buffer(name, _own_if_empty(tensor))

    def empty_until_filled(self) -> None:
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
            setattr(self, name, _own_if_empty(tensor).to(getattr(self, name).device))
        self._non_persistent_buffers_set.difference_update(TENSOR_NAMES)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight ``[out_features, in_features]``, for models that read it beside calling the module.

        It has shape, dtype and device of the dense weight and is decoded anew whenever something is computed with it,
        never kept; it cannot be written to. Heads that multiply by their embedding's table work with it, at the cost of
        the dense table while they do.
        """
        if not self.codes.numel():
            return absent_weight(self.out_features, self.in_features, self._dtype())
        return dense_weight(self.layer, self._dtype())

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        """Accept the weight that the module has, as from code that ties modules once more, and nothing else.

        Raises:
            ModelError: it is another weight.
        """
        if self.codes.numel() and not (isinstance(value, DenseWeight) and value.is_of(self.layer)):
            raise ModelError(
                f"the weight of a {type(self).__name__} cannot be replaced; put another module in its place, or start "
                "from the model before it was quantized"
            )

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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        dtypes = {name: getattr(self, name).dtype for name in TENSOR_NAMES}
        before = {name: getattr(self, name) for name in TENSOR_NAMES}
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            if getattr(self, name).dtype != dtype:
                # A cast of the model must not reach the format: take the original to the new device instead.
                setattr(self, name, before[name].to(getattr(self, name).device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What pickles hold: integers without sign, which PyTorch cannot pickle plainly, as those with one."""
        state = self.__dict__.copy()
        state["_buffers"] = {
            name: tensor if tensor is None else signed(tensor) for name, tensor in self._buffers.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__getstate__`."""
        buffers = {
            name: unsigned(tensor)
            if tensor is not None and name in TENSOR_NAMES and (name == "codes" or tensor.dtype == torch.int16)
            else tensor
            for name, tensor in state["_buffers"].items()
        }
        super().__setstate__({**state, "_buffers": buffers})


def _own_if_empty(tensor: torch.Tensor) -> torch.Tensor:
    """Empty tensors with memory of their own: those that were cut from others, or read from a file, name memory that
    programs captured by ``torch.export`` cannot be saved with."""
    return tensor if tensor.numel() else torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def no_tensors(in_features: int, out_features: int, columns: tuple[int, int, int]) -> QuantizedLinear:
    """A weight whose tensors are not there yet."""
    return QuantizedLinear(
        in_features, out_features, columns, **{name: torch.zeros(0, device="cpu") for name in TENSOR_NAMES}
    )


class ClaqLinear(QuantizedModule):
    """A linear layer on quantized weights: ``y = x Wᵀ + b`` through ``claq::linear``, for inference.

    Its tensors are buffers named as in docs/format.md. They keep their dtypes when the module is cast (``.half()``);
    the bias follows.

    Args:
        layer: the quantized weight.
        bias: ``[out_features]``, or None.
        accuracy_level: arithmetic of the native kernels: 0 or 1 = float32, 4 = activations rounded to int8.

    Attributes:
        transposed: the dense module in whose place it stands holds its weight as ``[in_features, out_features]``
            (transformers' ``Conv1D``).
    """

    bias: torch.Tensor
    transposed: bool = False

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
        module = cls(no_tensors(in_features, out_features, columns), bias, accuracy_level)
        module.empty_until_filled()
        return module

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added; the buffer is empty, or zero where a model filled it up, without one."""
        return "bias" not in self._non_persistent_buffers_set

    def _dtype(self) -> torch.dtype:
        return self.bias.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x[..., in_features]`` of float32, float16 or bfloat16 to ``[..., out_features]`` of the same dtype."""
        return ops.call_linear(
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
        return f"{sizes}, bias={self.has_bias}, {self._widths()}"


class ClaqEmbedding(QuantizedModule):
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

    def _dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, as ``nn.Embedding`` calls them.

        Raises:
            ModelError: another number is assigned; the table cannot be resized.
        """
        return self.out_features

    @num_embeddings.setter
    def num_embeddings(self, value: int) -> None:
        if value != self.out_features:
            raise ModelError(
                f"a quantized embedding of {self.out_features} rows cannot be resized to {value}; resize the model "
                "before it is quantized"
            )

    @property
    def embedding_dim(self) -> int:
        """Columns of the table, as ``nn.Embedding`` calls them."""
        return self.in_features

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """``indices`` (int32 or int64, any shape) to rows ``[*indices.shape, embedding_dim]``.

        Raises:
            IndexError: an index is out of range, as it is below zero; the message then names ``num_embeddings`` instead. (On
                CUDA its row is NaN.)
            ModelError: the module was cast to a dtype that rows cannot have.
        """
        if self.like.dtype not in ops.ACTIVATION_DTYPES:
            raise ModelError(
                f"a quantized embedding gives rows of float32, float16 or bfloat16, and the model was cast to "
                f"{self.like.dtype}; cast it to one of those, for example with model.float()"
            )
        return ops.embedding(
            # A file gets no node for it.
            indices if torch.compiler.is_exporting() else refusing_negative(indices, self.out_features),
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
