"""Compile many kernel variants in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from .compile import CompiledKernel, compile_variant
from .variants import variants


def _compile(job: tuple[int, str]) -> CompiledKernel:
    target, name = job
    return compile_variant(next(variant for variant in variants(target) if variant.name == name), target)


def compile_all(jobs: Sequence[tuple[int, str]], processes: int) -> list[CompiledKernel]:
    """Compile (target, name of a variant) pairs, in their order.

    Raises:
        KernelBuildError: one of them failed.
    """
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, jobs))
