"""Every Triton kernel against the dense weight: widths, dtypes, odd shapes, outliers, looked-up rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from findings import Finding
from layers import arguments, bound_of, layer_of, share
from machine import REAL, Machine


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison with the dense weight; ``lookup``: of rows, which must be equal bit for bit."""

    widths: tuple[int, ...]
    vectors: int
    dtype: torch.dtype
    in_features: int = 512
    out_features: int = 320
    outliers: float = 0.0
    full_row: bool = False
    lookup: bool = False


def wanted(dry: bool) -> list[Check]:
    """All kernels, widths and dtypes; odd shapes; outliers none, some, a full row. A few small ones for a dry run."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    if dry:
        shape = {"in_features": 70, "out_features": 37, "outliers": 0.02}
        few = [Check((2, 3, 4), vectors, dtype, **shape) for vectors, dtype in ((1, half), (7, half), (130, half))]
        return [*few, Check((2,), 1, single, **shape), Check((2, 3, 4), 5, half, **shape, lookup=True)]
    every = []
    for widths in ((2,), (3,), (4,), (2, 3, 4)):
        for vectors in (1, 2, 3, 4, 7, 16, 20, 64, 130):
            every.append(Check(widths, vectors, half, outliers=0.01 if vectors % 2 else 0.0))
        for vectors in (1, 2, 130):
            every.append(Check(widths, vectors, single, outliers=0.01))
        for vectors in (1, 16, 130):
            every.append(Check(widths, vectors, brain, outliers=0.01, full_row=True))
        for dtype in (half, brain, single):
            every.append(Check(widths, 33, dtype, outliers=0.01, full_row=True, lookup=True))
    for in_features, out_features in ((100, 37), (4097, 1002), (33, 1), (1, 5)):
        for vectors in (1, 4, 7, 33, 130):
            every.append(Check((2, 3, 4), vectors, half, in_features, out_features, outliers=0.02))
            every.append(Check((2, 3, 4), vectors, single, in_features, out_features))
        every.append(Check((2, 3, 4), 20, half, in_features, out_features, outliers=0.02, lookup=True))
    every.append(Check((2, 4), 1, half, *REAL.main, outliers=0.005))
    every.append(Check((3,), 16, half, *REAL.main, outliers=0.005))
    return every


def error_of(check: Check, machine: Machine) -> tuple[float, float]:
    """Largest error relative to the largest output, and its bound; of a lookup 0 or infinity."""
    from claq_export.kernels.triton.launch import embedding, linear

    layer = layer_of(check.in_features, check.out_features, check.widths, check.outliers, check.full_row)
    there = layer.to(machine.device)
    dispatch = machine.dispatch()
    if check.lookup:
        ids = torch.randint(-check.out_features, check.out_features, (check.vectors,), device=machine.device)
        settings = (check.in_features, check.out_features, layer.columns, check.dtype)
        rows = embedding(ids, *there.tensors().values(), *settings, dispatch=dispatch)
        right = torch.equal(rows, layer.dequantize().to(machine.device)[ids].to(check.dtype))
        return 0.0 if right else float("inf"), 0.0
    x = torch.randn(check.vectors, check.in_features, device=machine.device).to(check.dtype)
    bias = torch.randn(check.out_features, device=machine.device).to(check.dtype)
    got = linear(*arguments(there, x, bias), dispatch=dispatch)
    dense = layer.dequantize().to(machine.device).double()
    return share(got, x.double() @ dense.T + bias.double()), bound_of(x, dense)


def checks(machine: Machine) -> Iterator[Finding]:
    """Every comparison with the dense weight, by the fields of :class:`Check`."""

    def seeded(number: int, check: Check) -> tuple[float, float]:
        torch.manual_seed(number)
        return error_of(check, machine)

    for number, check in enumerate(wanted(machine.dry)):
        yield {**dataclasses.asdict(check), "dtype": str(check.dtype)}, partial(seeded, number, check)
