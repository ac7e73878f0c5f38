"""Runs the Triton kernels in Triton's interpreter and prints each case's errors as JSON.

A program of its own: the interpreter must be switched on before Triton is first imported, for the whole process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """A layer, an input and the kernel that must take it.

    ``exact``: scales and inputs are such that every activation is represented exactly, so that only the order of
    additions differs from the reference; y is float32 then. ``nan``: the first vector holds a NaN and is left out of the
    comparison. ``magnitude``: of the inputs.
    """

    name: str
    in_features: int
    out_features: int
    widths: tuple[int, ...]
    vectors: int
    dtype: str
    kernel: str
    outliers: float = 0.0
    full_row: bool = False
    bias: bool = True
    exact: bool = False
    nan: bool = False
    magnitude: float = 1.0
    lanes: int = 32
    warps: int = 8
    unroll: int = 1
    programs: int = 2
    columns: int = 16384


CASES = [
    Case("gemv-2", 200, 104, (2,), 1, "float16", "gemv"),
    Case("gemv-3", 200, 104, (3,), 2, "float16", "gemv", outliers=0.02),
    Case("gemv-4", 200, 104, (4,), 1, "float16", "gemv", outliers=0.02, bias=False),
    Case("gemv-432", 333, 136, (2, 3, 4), 4, "float16", "gemv", outliers=0.05, full_row=True, lanes=16, warps=4),
    Case("gemv-bfloat16", 96, 64, (2, 4), 3, "bfloat16", "gemv", outliers=0.02),
    Case("gemv-float32-2", 200, 104, (2,), 2, "float32", "gemv", outliers=0.02),
    Case("gemv-float32-3", 200, 104, (3,), 1, "float32", "gemv"),
    Case("gemv-float32-4", 200, 104, (4,), 1, "float32", "gemv", full_row=True, unroll=2, warps=2),
    Case("gemv-odd", 70, 37, (2, 3, 4), 1, "float32", "gemv", outliers=0.02, warps=2, unroll=2),
    Case("gemv-one-output", 33, 1, (3,), 1, "float32", "gemv", outliers=0.1),
    Case("gemv-one-input", 1, 5, (2,), 2, "float32", "gemv"),
    Case("gemm-2", 200, 104, (2,), 7, "float16", "gemm", outliers=0.02, exact=True),
    Case("gemm-3", 200, 104, (3,), 16, "float16", "gemm", exact=True),
    Case("gemm-4", 200, 104, (4,), 7, "float16", "gemm", full_row=True, exact=True, bias=False),
    Case("gemm-odd", 77, 37, (2, 3, 4), 17, "float16", "gemm", outliers=0.05, exact=True),
    Case("gemm-many-columns", 200, 40, (2, 3), 5, "float16", "gemm", outliers=0.02, exact=True, columns=64),
    Case("gemm-bfloat16", 200, 104, (2, 4), 20, "bfloat16", "gemm", outliers=0.02),
    Case("dense-432", 200, 104, (2, 3, 4), 130, "float16", "dense", outliers=0.02),
    Case("dense-float32", 200, 264, (2, 3), 7, "float32", "dense", outliers=0.02, full_row=True),
    Case("dense-odd", 70, 37, (2, 4), 130, "float32", "dense", outliers=0.02, bias=False),
    Case("gemv-nan", 64, 16, (3,), 2, "float16", "gemv", outliers=0.02, nan=True),
    Case("gemm-nan", 64, 16, (2,), 5, "float16", "gemm", nan=True),
    Case("gemv-tiny", 64, 16, (3,), 2, "bfloat16", "gemv", bias=False, magnitude=1e-33),
    Case("gemm-tiny", 64, 16, (2,), 5, "bfloat16", "gemm", bias=False, magnitude=1e-34),
    Case("gemm-tiny-many-columns", 200, 16, (2,), 5, "bfloat16", "gemm", bias=False, magnitude=1e-34, columns=64),
    Case("no-vectors", 40, 8, (2,), 0, "float16", "gemv"),
]


@dataclass(frozen=True)
class Lookup:
    """A table and how its rows are asked for; ``wrong``: some of the indices are out of range."""

    name: str
    in_features: int
    out_features: int
    widths: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    index: str = "int64"
    outliers: float = 0.0
    full_row: bool = False
    wrong: bool = False
    columns: int = 64


LOOKUPS = [
    Lookup("gather-2", 200, 104, (2,), (9,), "float16"),
    Lookup("gather-3", 200, 104, (3,), (3, 4), "float32", index="int32", outliers=0.02),
    Lookup("gather-4", 96, 31, (4,), (), "bfloat16", outliers=0.1),
    Lookup("gather-432", 333, 136, (2, 3, 4), (17,), "float16", outliers=0.05, full_row=True, columns=512),
    Lookup("gather-432-float32", 65, 7, (2, 3, 4), (40,), "float32", outliers=0.5, full_row=True, columns=32),
    Lookup("gather-exact-row", 70, 37, (4,), (37,), "float16", full_row=True, index="int32"),
    Lookup("gather-one-column", 1, 5, (2,), (6,), "bfloat16"),
    Lookup("gather-one-row", 45, 1, (3, 4), (2, 1, 3), "float32", outliers=0.3),
    Lookup("gather-out-of-range", 70, 37, (2, 4), (12,), "float16", outliers=0.1, wrong=True),
    Lookup("gather-out-of-range-32", 70, 37, (3,), (12,), "float32", index="int32", wrong=True),
    Lookup("gather-nothing", 40, 8, (2,), (0, 3), "float16"),
]


def _look_up(case: Lookup) -> dict[str, object]:
    import torch
    from quantized_layers import dense_weight, random_layer

    from claq_export.kernels.triton import launch
    from claq_export.kernels.triton.dispatch import GatherConfig, dispatch_for

    layer = random_layer(
        case.in_features,
        case.out_features,
        case.widths,
        outliers=case.outliers,
        full_row=case.full_row,
        seed=len(case.name),
    )
    N, dtype = case.out_features, getattr(torch, case.dtype)
    ids = torch.randint(-N, N, case.shape, generator=torch.Generator().manual_seed(2)).to(getattr(torch, case.index))
    known = torch.ones(ids.shape, dtype=torch.bool)
    if case.wrong:
        largest = torch.iinfo(ids.dtype).max
        ids[2:6] = torch.tensor([N, -N - 1, largest, -largest])
        known[2:6] = False
    # A slice: nothing promises that indices begin at a multiple of 16 bytes.
    padded = torch.cat([ids.new_zeros(1), ids.reshape(-1)])[1:].reshape(ids.shape)
    dispatch = dataclasses.replace(dispatch_for(8, 0), gather=GatherConfig(case.columns, 4))
    rows = launch.embedding(
        padded, *layer.tensors().values(), layer.in_features, N, layer.columns, dtype, dispatch=dispatch
    )
    dense = layer.dequantize()
    single = dense[torch.where(known, ids, 0).long()]
    # The interpreter truncates to bfloat16 where a GPU rounds.
    rounded = (single.view(torch.int32) >> 16 << 16).view(torch.float32) if case.dtype == "bfloat16" else single
    expected = rounded.to(dtype)
    exact = dense_weight(layer)
    return {
        "shape": list(rows.shape) == [*case.shape, case.in_features],
        "dtype": rows.dtype == dtype,
        "equal": torch.equal(rows[known], expected[known]),
        "unknown_are_nan": bool(rows[~known].isnan().all()),
        "reference_error": float((dense.double() - exact).abs().max() / exact.abs().max()),
    }


def _run(case: Case) -> dict[str, object]:
    import torch
    from quantized_layers import arguments, dense_weight, random_layer

    from claq_export.kernels.triton import launch
    from claq_export.kernels.triton.dispatch import DenseConfig, Dispatch, GatherConfig, GemmConfig, GemvConfig

    layer = random_layer(
        case.in_features,
        case.out_features,
        case.widths,
        outliers=case.outliers,
        full_row=case.full_row,
        seed=len(case.name),
    )
    torch.manual_seed(1)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.vectors, case.in_features) * case.magnitude
    if case.exact:
        scale = torch.where(layer.scale > 0, 2.0**-7, 0.0).to(torch.float16)
        layer = dataclasses.replace(layer, scale=scale)
        x = torch.randint(-8, 9, x.shape).float()
        x[:, 0] = 16
    x = x.to(dtype)
    if case.nan:
        x[0, 3] = torch.nan
    bias = torch.randn(case.out_features, dtype=dtype) if case.bias else None
    dispatch = Dispatch(
        gemv=GemvConfig(4 if case.kernel == "gemv" else 0, case.lanes, case.warps, case.unroll, case.programs),
        gemm=(GemmConfig(1000, 16, case.lanes, 4, 4, 1, case.programs),) if case.kernel == "gemm" else (),
        dense=DenseConfig(case.lanes, case.warps, 100_000),
        gather=GatherConfig(64, 4),
    )
    launch.MOST_COLUMNS_AT_ONCE = case.columns
    taken, originals = [], {}
    for name in ("_few", "_tens", "_many"):
        original = getattr(launch, name)

        def spy(*rest: object, name: str = name, original: object = original) -> None:
            taken.append({"_few": "gemv", "_tens": "gemm", "_many": "dense"}[name])
            if case.exact:
                rest = (rest[0], rest[1], wide, *rest[3:])
            original(*rest)  # type: ignore[operator]

        setattr(launch, name, spy)
        originals[name] = original
    wide = torch.empty(case.vectors, case.out_features)
    try:
        y = launch.linear(*arguments(layer, x, bias), dispatch=dispatch)  # type: ignore[arg-type]
    finally:
        for name, original in originals.items():
            setattr(launch, name, original)
    expected = x.double() @ dense_weight(layer).T
    if bias is not None:
        expected = expected + bias.double()
    shape, dtype_ok = list(y.shape) == [case.vectors, case.out_features], y.dtype == dtype
    got = wide if case.exact else y
    poisoned = bool(got[:1].isnan().all())
    if case.nan:
        got, expected = got[1:], expected[1:]
    error = float((got.double() - expected).abs().max() / expected.abs().max()) if case.vectors else 0.0
    return {"kernels": taken, "error": error, "shape": shape, "dtype": dtype_ok, "first_is_nan": poisoned}


def main() -> None:
    """Run the cases named on the command line, or all."""
    sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]
    wanted = sys.argv[1:]
    results = {case.name: _run(case) for case in CASES if not wanted or case.name in wanted}
    results |= {case.name: _look_up(case) for case in LOOKUPS if not wanted or case.name in wanted}
    print(json.dumps(results))


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    main()
