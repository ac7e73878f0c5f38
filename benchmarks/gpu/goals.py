"""The goals for a GPU, and whether measured rows reach them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHARE_OF_COPY = {"4": 60, "3": 50, "2": 45}
"""Percent of the copy bandwidth that one vector is to reach, by bits, where the weights are not in the L2 cache."""

TIMES_CUBLAS = {"4": 3.0, "2": 4.5}
"""How many times as fast as cuBLAS in bf16 one vector is to be."""

SIXTEEN_TO_ONE = 1.4
"""Most that 16 vectors may take, as a multiple of one."""

MANY_TO_CUBLAS = 1.15
"""Most that 512 and more vectors may take, as a multiple of cuBLAS."""


def goals(rows: Sequence[dict[str, Any]], smallest: int) -> list[dict[str, Any]]:
    """Each goal with the measured value that decides it, the worst of the shapes it holds for.

    Args:
        rows: of :func:`run_all.timings`; products without outliers count, rows that were skipped do not.
        smallest: weights of the smallest shape that the goals for one vector are meant for.
    """
    measured = [row for row in rows if "skipped" not in row and not row["outliers"]]
    one = [row for row in measured if row["vectors"] == 1 and row["shape"][0] * row["shape"][1] >= smallest]
    found = []
    for bits, share in SHARE_OF_COPY.items():
        values = [row["copy_bandwidth_percent"] for row in one if row["mix"] == bits]
        found.append(_goal(f"{bits} bits, M = 1: percent of copy bandwidth", values, share, least=True))
    for bits, times in TIMES_CUBLAS.items():
        values = [row["cublas_bf16_us"] / row["graph_us"] for row in one if row["mix"] == bits]
        found.append(_goal(f"{bits} bits, M = 1: times as fast as cuBLAS bf16", values, times, least=True))
    by_place = {(tuple(row["shape"]), row["mix"], row["vectors"]): row["graph_us"] for row in measured}
    for bits in ("4", "3", "2"):
        values = [
            us / by_place[shape, mix, 1]
            for (shape, mix, vectors), us in by_place.items()
            if mix == bits and vectors == 16 and (shape, mix, 1) in by_place
        ]
        found.append(_goal(f"{bits} bits: M = 16 as a multiple of M = 1", values, SIXTEEN_TO_ONE, least=False))
        values = [
            row["graph_us"] / row["cublas_bf16_us"] for row in measured if row["mix"] == bits and row["vectors"] >= 512
        ]
        found.append(_goal(f"{bits} bits: M >= 512 as a multiple of cuBLAS bf16", values, MANY_TO_CUBLAS, least=False))
    return found


def _goal(name: str, values: Sequence[float], bound: float, least: bool) -> dict[str, Any]:
    if not values:
        return {"goal": name, "bound": bound, "value": None, "met": None}
    worst = min(values) if least else max(values)
    return {"goal": name, "bound": bound, "value": worst, "met": worst >= bound if least else worst <= bound}
