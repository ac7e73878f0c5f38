"""Where the GPU benchmarks run and how they take times: on a GPU, or in Triton's interpreter to try the scripts."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def reason_of(failure: BaseException) -> str:
    """An error on one line: on a GPU each is a finding, and must not take the other findings with it."""
    return f"{type(failure).__name__}: {failure}".replace("\n", " ")[:500]


@dataclass(frozen=True)
class Sizes:
    """How large things are.

    Attributes:
        main: in and out features of the shape that is measured most.
        shapes: all shapes of products.
        vectors: numbers of vectors at the main shape; the others take ``few_vectors``.
        table: rows and columns of an embedding.
        tokens: rows looked up at a time.
        rotation: bytes of weights that are gone through before one is read again; several times any L2 cache.
        copied: bytes of the copy whose bandwidth is the yardstick.
    """

    main: tuple[int, int]
    shapes: tuple[tuple[int, int], ...]
    vectors: tuple[int, ...]
    few_vectors: tuple[int, ...]
    table: tuple[int, int]
    tokens: tuple[int, ...]
    rotation: int
    copied: int


REAL = Sizes(
    main=(4096, 11008),
    shapes=((4096, 11008), (4096, 4096), (11008, 4096), (8192, 28672)),
    vectors=(1, 2, 3, 4, 8, 16, 32, 64, 128, 512, 2048),
    few_vectors=(1, 16, 128),
    table=(128256, 4096),
    tokens=(1, 16, 512),
    rotation=512 << 20,
    copied=1 << 30,
)
TINY = Sizes(
    main=(96, 72),
    shapes=((96, 72),),
    vectors=(1, 16),
    few_vectors=(1,),
    table=(50, 64),
    tokens=(1, 3),
    rotation=1,
    copied=1 << 16,
)


class Machine:
    """A GPU, or the interpreter that stands for one in a dry run.

    Args:
        dry: run the kernels in Triton's interpreter on CPU tensors, at tiny sizes; times mean nothing then. Has to be
            decided before Triton is imported: the variable TRITON_INTERPRET is set.
    """

    def __init__(self, dry: bool = False) -> None:
        self.dry = dry
        if dry:
            os.environ["TRITON_INTERPRET"] = "1"
        self.device = "cpu" if dry else "cuda"
        self.sizes = TINY if dry else REAL

    @property
    def name(self) -> str:
        """What results are filed under."""
        return "dry run" if self.dry else torch.cuda.get_device_name()

    def dispatch(self) -> Any:
        """The tile sizes of this GPU; small ones for the interpreter."""
        from claq_export.kernels.triton.dispatch import (
            DenseConfig,
            Dispatch,
            GatherConfig,
            GemmConfig,
            GemvConfig,
            dispatch_for,
        )

        if not self.dry:
            return dispatch_for(*torch.cuda.get_device_capability())
        return Dispatch(
            gemv=GemvConfig(4, 32, 4, 1, 2),
            gemm=(GemmConfig(128, 16, 32, 4, 4, 1, 2),),
            dense=DenseConfig(32, 4, 100_000),
            gather=GatherConfig(64, 4),
        )

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, calls: list[Callable[[], object]], graph: bool, repeats: int = 7) -> float:
        """Median time of one call, going round ``calls``; as one CUDA graph or launched one by one."""
        if self.dry:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()

        def everything() -> None:
            for call in calls:
                call()

        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                everything()
            turn = captured.replay
        else:
            turn = everything
        turn()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            turn()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(times)

    def copy_bandwidth(self) -> float:
        """Bytes a second of a device copy, reading and writing counted."""
        source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds([lambda: target.copy_(source)] * 4, graph=False)

    def kernel_times(self, calls: list[Callable[[], object]]) -> dict[str, float]:
        """Mean microseconds of each of our GPU kernels in a call; empty where the profiler has no access to the GPU."""
        if self.dry:
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for call in calls:
                call()
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for event in profile.key_averages():
            if event.key.startswith("claq_"):
                found[event.key] = event.device_time_total / len(calls)
        return found
