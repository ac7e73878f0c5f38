"""The dense weight of a quantized module, for models that read ``module.weight``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..errors import ModelError
from ..format.layer import QuantizedLinear
from ..kernels import ops


def dense_weight(layer: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that stands for the dense weight ``[out_features, in_features]`` of ``layer``.

    In eager code a :class:`DenseWeight`; while a program is captured the operator ``claq::embedding`` over all rows,
    which captured graphs drop where only the shape, dtype or device of the weight was asked for.
    """
    if torch.compiler.is_compiling():
        return _decode(layer, dtype)
    return DenseWeight(layer, dtype)


def absent_weight(out_features: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """What stands for a weight of which there are no codes yet: a tensor without memory, which may be written to."""
    weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")
    # Transformers initializes weights by name while it loads, and leaves alone what says this.
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


def refusing_negative(indices: torch.Tensor, rows: int) -> torch.Tensor:
    """Indices of which negative ones are out of range, as ``nn.Embedding`` has it; ``claq::embedding`` counts them from the
    end, as ONNX does."""
    return torch.where(indices < 0, rows, indices)


def _decode(layer: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    return _rows(layer, torch.arange(layer.out_features, device=layer.codes.device), dtype)


def _rows(layer: QuantizedLinear, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    device = layer.codes.device
    like = torch.zeros(0, dtype=dtype if dtype in ops.ACTIVATION_DTYPES else torch.float32, device=device)
    rows = ops.embedding(
        indices,
        *layer.tensors().values(),
        like,
        layer.in_features,
        layer.out_features,
        list(layer.columns),
    )
    return rows if rows.dtype == dtype else rows.to(dtype)


class DenseWeight(torch.Tensor):
    """The dense weight of a quantized layer, decoded whenever an operator takes it; it holds no values itself.

    That it has a ``__torch_function__`` (inherited) keeps PyTorch from the fast paths of its transformer modules, which
    take the weights of several modules at once.
    """

    _layer: QuantizedLinear
    # GPT-2 in transformers 5 initializes `c_proj.weight` by name while it loads; this mark makes it leave it alone.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, layer: QuantizedLinear, dtype: torch.dtype) -> DenseWeight:
        """A tensor of the shape, dtype and device of the dense weight."""
        weight = torch.Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=dtype, device=layer.codes.device
        )
        weight._layer = layer
        return weight

    def dequantize(self) -> torch.Tensor:
        """The values, ``[out_features, in_features]``."""
        return _decode(self._layer, self.dtype)

    def is_of(self, layer: QuantizedLinear) -> bool:
        """Whether it stands for the weight of ``layer``: the very same codes."""
        mine, others = self._layer.codes, layer.codes
        return (mine.device, mine.data_ptr(), mine.shape) == (others.device, others.data_ptr(), others.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype, without decoding."""
        return f"DenseWeight({self._layer.out_features} x {self._layer.in_features}, {self.dtype}, decoded when used)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator on the decoded values, of which ``embedding`` decodes the rows asked for alone.

        Raises:
            ModelError: it would write to them.
        """
        kwargs = kwargs or {}
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)]:
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, cls):
                raise ModelError(
                    f"{func} would write to the weight of a quantized layer, which has no dense values to change; "
                    "change the weight before it is quantized"
                )
        if func is torch.ops.aten.embedding.default and isinstance(args[0], cls) and not isinstance(args[1], cls):
            table = args[0]
            return _rows(table._layer, refusing_negative(args[1], table._layer.out_features), table.dtype)
        decode: Callable[[DenseWeight], torch.Tensor] = cls.dequantize
        args, kwargs = tree_map_only(cls, decode, (args, kwargs))
        return func(*args, **kwargs)


def _named(func: Any, kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
