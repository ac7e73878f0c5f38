"""Every Triton kernel against the dense weight: widths, dtypes, odd shapes, outliers, looked-up rows."""

from __future__ import annotations

import dataclasses
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from layers import BOUNDS, arguments, layer_of
from machine import REAL, Machine, exact_products, reason_of


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


def checks(dry: bool = False) -> list[Check]:
    """All kernels, widths and dtypes; odd shapes; outliers none, some, a full row. A few small ones for a dry run."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    if dry:
        shape = {"in_features": 70, "out_features": 37, "outliers": 0.02}
        wanted = [Check((2, 3, 4), vectors, dtype, **shape) for vectors, dtype in ((1, half), (7, half), (130, half))]
        return [*wanted, Check((2,), 1, single, **shape), Check((2, 3, 4), 5, half, **shape, lookup=True)]
    wanted = []
    for widths in ((2,), (3,), (4,), (2, 3, 4)):
        for vectors in (1, 2, 3, 4, 7, 16, 20, 64, 130):
            wanted.append(Check(widths, vectors, half, outliers=0.01 if vectors % 2 else 0.0))
        for vectors in (1, 2, 130):
            wanted.append(Check(widths, vectors, single, outliers=0.01))
        for vectors in (1, 16, 130):
            wanted.append(Check(widths, vectors, brain, outliers=0.01, full_row=True))
        for dtype in (half, brain, single):
            wanted.append(Check(widths, 33, dtype, outliers=0.01, full_row=True, lookup=True))
    for in_features, out_features in ((100, 37), (4097, 1002), (33, 1), (1, 5)):
        for vectors in (1, 4, 7, 33, 130):
            wanted.append(Check((2, 3, 4), vectors, half, in_features, out_features, outliers=0.02))
            wanted.append(Check((2, 3, 4), vectors, single, in_features, out_features))
        wanted.append(Check((2, 3, 4), 20, half, in_features, out_features, outliers=0.02, lookup=True))
    wanted.append(Check((2, 4), 1, half, *REAL.main, outliers=0.005))
    wanted.append(Check((3,), 16, half, *REAL.main, outliers=0.005))
    return wanted


def error_of(check: Check, machine: Machine) -> float:
    """Largest error relative to the largest output; of a lookup 0 or infinity."""
    from claq_export.kernels.triton.launch import embedding, linear

    layer = layer_of(check.in_features, check.out_features, check.widths, check.outliers, check.full_row)
    there = layer.to(machine.device)
    dispatch = machine.dispatch()
    if check.lookup:
        ids = torch.randint(-check.out_features, check.out_features, (check.vectors,), device=machine.device)
        settings = (check.in_features, check.out_features, layer.columns, check.dtype)
        rows = embedding(ids, *there.tensors().values(), *settings, dispatch=dispatch)
        return 0.0 if torch.equal(rows, layer.dequantize().to(machine.device)[ids].to(check.dtype)) else float("inf")
    x = torch.randn(check.vectors, check.in_features, device=machine.device).to(check.dtype)
    bias = torch.randn(check.out_features, device=machine.device).to(check.dtype)
    got = linear(*arguments(there, x, bias), dispatch=dispatch).double()
    expected = x.double() @ layer.dequantize().to(machine.device).double().T + bias.double()
    return float((got - expected).abs().max() / expected.abs().max())


def _still_works() -> bool:
    """Whether the process can go on using the GPU: after an illegal access every call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_checks(wanted: list[Check], dry: bool, deadline: float) -> list[dict[str, Any]]:
    """Results of checks, in a process of its own; those that ``deadline`` (of ``time.time()``) cuts off are skipped."""
    machine = Machine(dry)
    results = []
    for check in wanted:
        text = {**dataclasses.asdict(check), "dtype": str(check.dtype)}
        if time.time() > deadline:
            results.append({**text, "skipped": "out of time"})
            continue
        try:
            torch.manual_seed(len(results))  # it asks the GPU, too
            with exact_products():
                error = error_of(check, machine)
        except Exception as failure:  # Triton's compiler and launcher raise errors of many types; each is a finding
            results.append({**text, "passed": False, "failure": reason_of(failure)})
            if not dry and not _still_works():
                return results + [
                    {
                        **dataclasses.asdict(left),
                        "dtype": str(left.dtype),
                        "skipped": "the GPU was lost to the check before",
                    }
                    for left in wanted[len(results) :]
                ]
            continue
        results.append({**text, "error": error, "passed": error <= BOUNDS[check.dtype]})
    return results


def correctness(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    """Run the checks in several processes, whose time goes mostly into compiling kernels."""
    wanted, deadline = checks(machine.dry), time.time() + seconds
    if machine.dry:
        return run_checks(wanted, True, deadline)
    processes = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        parts = [wanted[i::processes] for i in range(processes)]
        tasks = [pool.submit(run_checks, part, False, deadline) for part in parts]
        results: list[dict[str, Any]] = []
        for part, task in zip(parts, tasks, strict=True):
            try:
                results += task.result()
            except Exception as failure:  # the process died, or could not begin
                results.append({"checks": len(part), "passed": False, "failure": reason_of(failure)})
        return results
