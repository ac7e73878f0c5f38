"""One quantized layer in the format of ``docs/format.md``: its tensors, their rules, and the weight they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from ..errors import FormatError
from .packing import BLOCK, WIDTHS, columns_at_once, pack_group, unpack_group

TENSOR_NAMES = (
    "codes",
    "codebook",
    "scale",
    "row_scale",
    "order",
    "outlier_ptr",
    "outlier_index",
    "outlier_value",
)
"""Tensors of a layer in operator-input order, without the bias (which is not part of the weight)."""

_FLOAT16_MAX = 65504.0


def index_dtype(limit: int) -> torch.dtype:
    """The narrowest dtype of ``order``/``outlier_index`` whose largest value is ``limit``."""
    return torch.uint16 if limit <= 65535 else torch.int32


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer ``y = x Wᵀ + b`` with column codebooks; see ``docs/format.md`` for every tensor's meaning.

    Attributes:
        in_features, out_features: K and N of ``W[N, K]``.
        columns: stored columns of width 4, 3 and 2, each a multiple of 32.
        codes: uint32 ``[R, N]``.
        codebook: int8, ``2**b`` centroids a stored column.
        scale: float16 ``[P]``.
        row_scale: float16 ``[N]``.
        order: uint16 or int32 ``[P]``, or empty for the identity.
        outlier_ptr, outlier_index, outlier_value: reserved weights as CSR by output row, or empty.
    """

    in_features: int
    out_features: int
    columns: tuple[int, int, int]
    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor
    row_scale: torch.Tensor
    order: torch.Tensor
    outlier_ptr: torch.Tensor
    outlier_index: torch.Tensor
    outlier_value: torch.Tensor

    @property
    def stored_columns(self) -> int:
        """P: the stored columns, padding included."""
        return sum(self.columns)

    @property
    def outliers(self) -> int:
        """Number of reserved weights."""
        return self.outlier_index.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The layer's tensors by name, in operator-input order."""
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    def attributes(self) -> dict[str, int]:
        """The integers that go with the tensors (operator attributes, JSON entries)."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "columns_4": self.columns[0],
            "columns_3": self.columns[1],
            "columns_2": self.columns[2],
        }

    @classmethod
    def from_parts(cls, attributes: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> QuantizedLinear:
        """Rebuild a layer from :meth:`attributes` and :meth:`tensors`, and validate it.

        Raises:
            FormatError: a part is missing, or breaks a rule of the format.
        """
        for key in ("in_features", "out_features", "columns_4", "columns_3", "columns_2"):
            if not isinstance(attributes.get(key), int) or isinstance(attributes.get(key), bool):
                raise FormatError(f"attribute {key!r} must be an integer, got {attributes.get(key)!r}")
        missing = [name for name in TENSOR_NAMES if name not in tensors]
        if missing:
            raise FormatError(f"tensor {missing[0]!r} is missing")
        layer = cls(
            in_features=attributes["in_features"],
            out_features=attributes["out_features"],
            columns=(attributes["columns_4"], attributes["columns_3"], attributes["columns_2"]),
            **{name: tensors[name] for name in TENSOR_NAMES},
        )
        layer.validate()
        return layer

    def validate(self) -> None:
        """Check every rule of ``docs/format.md``.

        Raises:
            FormatError: names the tensor, what was expected and what was found.
        """
        K, N, P = self.in_features, self.out_features, self.stored_columns
        if K < 1 or N < 1:
            raise FormatError(f"in_features and out_features must be positive, got {K} and {N}")
        for width, count in zip(WIDTHS, self.columns, strict=True):
            if count < 0 or count % BLOCK:
                raise FormatError(f"columns_{width} must be a non-negative multiple of {BLOCK}, got {count}")
        if P < K:
            raise FormatError(f"columns_4 + columns_3 + columns_2 = {P} is less than in_features = {K}")
        rows = sum(width * count for width, count in zip(WIDTHS, self.columns, strict=True)) // 32
        entries = sum((1 << width) * count for width, count in zip(WIDTHS, self.columns, strict=True))
        self._expect("codes", torch.uint32, (rows, N))
        self._expect("codebook", torch.int8, (entries,))
        self._expect("scale", torch.float16, (P,))
        self._expect("row_scale", torch.float16, (N,))
        if not torch.isfinite(self.scale).all() or (self.scale < 0).any():
            raise FormatError("scale must be finite and not negative")
        if not torch.isfinite(self.row_scale).all():
            raise FormatError("row_scale must be finite")
        order = self._validate_order()
        if (self.scale[order >= K] != 0).any():
            raise FormatError("scale must be 0 for padding columns")
        self._validate_outliers(order)

    def _expect(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        tensor = getattr(self, name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise FormatError(
                f"{name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} of shape {list(tensor.shape)}"
            )

    def _validate_order(self) -> torch.Tensor:
        K, P = self.in_features, self.stored_columns
        if self.order.numel() == 0:
            self._expect("order", self.order.dtype, (0,))
            return torch.arange(P, device=self.scale.device)
        self._expect("order", index_dtype(K), (P,))
        order = self.order.to(torch.int64)
        if int(order.min()) < 0 or int(order.max()) > K:
            raise FormatError(f"order must hold values in 0..{K}, got {int(order.min())}..{int(order.max())}")
        counts = torch.bincount(order, minlength=K + 1)
        wrong = torch.nonzero(counts[:K] != 1)
        if wrong.numel():
            feature = int(wrong[0])
            raise FormatError(
                f"order must hold every input feature once; feature {feature} occurs {int(counts[feature])} times"
            )
        return order

    def _validate_outliers(self, order: torch.Tensor) -> None:
        N, P, nnz = self.out_features, self.stored_columns, self.outlier_index.numel()
        if self.outlier_ptr.numel() == 0:
            for name in ("outlier_ptr", "outlier_index", "outlier_value"):
                self._expect(name, getattr(self, name).dtype, (0,))
            return
        self._expect("outlier_ptr", torch.int32, (N + 1,))
        self._expect("outlier_index", index_dtype(P - 1), (nnz,))
        self._expect("outlier_value", torch.float16, (nnz,))
        ptr = self.outlier_ptr.to(torch.int64)
        if int(ptr[0]) != 0 or int(ptr[-1]) != nnz or (ptr[1:] < ptr[:-1]).any():
            raise FormatError(f"outlier_ptr must rise from 0 to the number of outliers, {nnz}")
        index = self.outlier_index.to(torch.int64)
        if nnz == 0:
            raise FormatError("outlier_ptr must be empty when there are no outliers")
        if int(index.min()) < 0 or int(index.max()) >= P:
            raise FormatError(
                f"outlier_index must hold values in 0..{P - 1}, got {int(index.min())}..{int(index.max())}"
            )
        first_of_row = torch.zeros(nnz + 1, dtype=torch.bool, device=ptr.device)
        first_of_row[ptr] = True
        if ((index[1:] <= index[:-1]) & ~first_of_row[1:nnz]).any():
            raise FormatError("outlier_index must be strictly ascending within a row")
        if (order[index] >= self.in_features).any():
            raise FormatError("outlier_index must not name a padding column")
        if not torch.isfinite(self.outlier_value).all():
            raise FormatError("outlier_value must be finite")

    def codes_by_column(self) -> torch.Tensor:
        """Unpacked codes: uint8 ``[P, N]``, rows in stored-column order."""
        parts, row = [], 0
        for width, count in zip(WIDTHS, self.columns, strict=True):
            rows = count * width // 32
            parts.append(unpack_group(self.codes[row : row + rows], width))
            row += rows
        return torch.cat(parts)

    def feature_of_column(self) -> torch.Tensor:
        """int64 ``[P]``: the input feature of each stored column; values >= in_features mark padding."""
        if self.order.numel() == 0:
            return torch.arange(self.stored_columns, device=self.scale.device)
        return self.order.to(torch.int64)

    def column_bits(self) -> torch.Tensor:
        """uint8 ``[K]``: the code width of each input feature."""
        stored = torch.repeat_interleave(torch.tensor(WIDTHS, dtype=torch.uint8), torch.tensor(self.columns))
        bits = torch.zeros(self.in_features, dtype=torch.uint8)
        feature = self.feature_of_column().cpu()
        real = feature < self.in_features
        bits[feature[real]] = stored[real]
        return bits

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight ``W[N, K]`` this layer stands for, computed in float32 and rounded to ``dtype``."""
        N = self.out_features
        device = self.codes.device
        scale, row_scale = self.scale.to(torch.float32)[:, None], self.row_scale.to(torch.float32)
        feature = self.feature_of_column() if self.order.numel() else None
        if self.outliers:
            per_row = self.outlier_ptr.to(torch.int64).diff()
            outlier_row = torch.repeat_interleave(torch.arange(N, device=device), per_row)
            outlier_column = self.outlier_index.to(torch.int64)
        weight = torch.empty(N, self.in_features, dtype=torch.float32, device=device)
        column = row = entry = 0
        for width, count in zip(WIDTHS, self.columns, strict=True):
            # Some columns at a time: all of them as int64 indices would take twice the layer in float32.
            for start in range(column, column + count, columns_at_once(N)):
                end = min(column + count, start + columns_at_once(N))
                rows, entries = (end - start) * width // 32, (end - start) << width
                codes = unpack_group(self.codes[row : row + rows], width, torch.int64)
                table = self.codebook[entry : entry + entries].reshape(end - start, 1 << width).to(torch.float32)
                stored = torch.gather(table, 1, codes)
                if self.outliers:
                    here = (outlier_column >= start) & (outlier_column < end)
                    place = (outlier_column[here] - start, outlier_row[here])
                    stored[place] += self.outlier_value[here].to(torch.float32)
                stored *= scale[start:end]
                stored *= row_scale
                if feature is None:
                    real_columns = max(min(end, self.in_features) - start, 0)
                    weight[:, start : start + real_columns] = stored[:real_columns].T
                else:
                    real = feature[start:end] < self.in_features
                    weight[:, feature[start:end][real]] = stored[real].T
                row, entry = row + rows, entry + entries
            column += count
        return weight.to(dtype)

    def to(self, device: torch.device | str) -> QuantizedLinear:
        """The same layer with its tensors on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved.update({name: tensor.to(device) for name, tensor in self.tensors().items()})
        return QuantizedLinear(**moved)


def storage_order(bits: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Where each input feature is stored, given its code width.

    Args:
        bits: K code widths, each 4, 3 or 2.

    Returns:
        ``(order, columns)``: int64 ``[P]`` input feature of each stored column (K for padding), widths descending and
        features ascending within a width; and the stored columns of width 4, 3 and 2.

    Raises:
        ValueError: a width other than 4, 3, 2.
    """
    width = torch.as_tensor(bits).cpu().to(torch.int64)
    features = width.numel()
    parts, columns = [], []
    for b in WIDTHS:
        members = torch.nonzero(width == b).flatten()
        padding = -members.numel() % BLOCK
        parts += [members, torch.full((padding,), features, dtype=torch.int64)]
        columns.append(members.numel() + padding)
    if sum(int((width == b).sum()) for b in WIDTHS) != features:
        raise ValueError(f"every width must be one of {WIDTHS}")
    return torch.cat(parts), (columns[0], columns[1], columns[2])


def assemble(
    codes: torch.Tensor,
    centroids: Sequence[torch.Tensor] | torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor,
    bits: torch.Tensor,
    outliers: torch.Tensor | None = None,
) -> QuantizedLinear:
    """Build a layer from per-feature results (input-feature order; sorting, padding and packing happen here).

    Args:
        codes: integer ``[K, N]``; row k is < ``2**bits[k]``.
        centroids: int8 ``[K, 16]`` (entries past ``2**bits[k]`` are ignored) or K int8 vectors of ``2**bits[k]``.
        scale: float16 ``[K]``, of each column.
        row_scale: float16 ``[N]``.
        bits: integer ``[K]`` of 4, 3 or 2.
        outliers: float ``[N, K]``, dense or sparse COO, zero where there is none: what is added to the centroid, in
            units of the column's scale; rounded to float16 here.

    Returns:
        a validated :class:`QuantizedLinear`, tensors on the device of ``codes``.

    Raises:
        FormatError: the parts do not fit together or a value cannot be stored.
    """
    K, N = codes.shape
    device = codes.device
    order, columns = storage_order(bits)
    order = order.to(device)
    P = order.numel()
    real = order < K
    stored_scale = torch.zeros(P, dtype=torch.float16, device=device)
    stored_scale[real] = scale.to(device=device, dtype=torch.float16)[order[real]]

    words, tables, column = [], [], 0
    for width, count in zip(WIDTHS, columns, strict=True):
        members = order[column : column + count]
        words.append(_pack_columns(codes, members, width))
        table = torch.zeros(count, 1 << width, dtype=torch.int8, device=device)
        if isinstance(centroids, torch.Tensor):
            table[members < K] = centroids.to(device)[members[members < K], : 1 << width]
        else:
            for row, feature in enumerate(members.tolist()):
                if feature < K:
                    table[row] = centroids[feature].to(device)
        tables.append(table.reshape(-1))
        column += count

    identity = torch.equal(order[real], torch.arange(K, device=device)) and bool(real[:K].all())
    ptr, index, value = _outliers_to_csr(outliers, order, K, device)
    layer = QuantizedLinear(
        in_features=K,
        out_features=N,
        columns=columns,
        codes=torch.cat(words),
        codebook=torch.cat(tables),
        scale=stored_scale,
        row_scale=row_scale.to(device=device, dtype=torch.float16),
        order=torch.zeros(0, dtype=index_dtype(K), device=device)
        if identity
        else order.to(torch.int32).to(index_dtype(K)),
        outlier_ptr=ptr,
        outlier_index=index,
        outlier_value=value,
    )
    layer.validate()
    return layer


def _pack_columns(codes: torch.Tensor, members: torch.Tensor, width: int) -> torch.Tensor:
    """Words of the features ``members`` (K for padding) of codes ``[K, N]``, some columns at a time."""
    K, N = codes.shape
    words = torch.empty(len(members) * width // 32, N, dtype=torch.int32, device=codes.device)
    for start in range(0, len(members), columns_at_once(N)):
        part = members[start : start + columns_at_once(N)]
        stored = codes[part.clamp(max=K - 1)].to(torch.uint8)
        stored[part == K] = 0
        words[start * width // 32 : (start + len(part)) * width // 32] = pack_group(stored, width).view(torch.int32)
    return words.view(torch.uint32)


def _outliers_to_csr(
    outliers: torch.Tensor | None, order: torch.Tensor, K: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CSR parts over stored columns of a dense or COO ``[N, K]`` tensor of outliers in input-feature order."""
    dtype = index_dtype(order.numel() - 1)
    sparse = None if outliers is None else outliers.to(device).to_sparse().coalesce()
    if sparse is None or sparse.values().numel() == 0:
        return (
            torch.zeros(0, dtype=torch.int32, device=device),
            torch.zeros(0, dtype=dtype, device=device),
            torch.zeros(0, dtype=torch.float16, device=device),
        )
    rows, features = sparse.indices()
    values = sparse.values().to(torch.float32)
    if not torch.isfinite(values).all() or float(values.abs().max()) > _FLOAT16_MAX:
        raise FormatError("outlier_value does not fit float16; raise the column's scale")
    position = torch.empty(K, dtype=torch.int64, device=device)
    real = torch.nonzero(order < K).flatten()
    position[order[real]] = real
    stored = position[features]
    by_row = torch.argsort(rows * order.numel() + stored)
    ptr = torch.zeros(outliers.shape[0] + 1, dtype=torch.int64, device=device)  # type: ignore[union-attr]
    ptr[1:] = torch.bincount(rows, minlength=outliers.shape[0]).cumsum(0)  # type: ignore[union-attr]
    return ptr.to(torch.int32), stored[by_row].to(torch.int32).to(dtype), values[by_row].to(torch.float16)
