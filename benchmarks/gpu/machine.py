"""Where the GPU benchmarks run and how they take times: on a GPU, or in Triton's interpreter to try the scripts."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch


def reason_of(failure: BaseException) -> str:
    """An error on one line: on a GPU each is a finding, and must not take the other findings with it."""
    return f"{type(failure).__name__}: {failure}".replace("\n", " ")[:500]


@contextmanager
def exact_products() -> Iterator[None]:
    """PyTorch's own products as exact as they can be while results are compared: cuBLAS sums in float32, without TF32."""
    settings, before = torch.backends.cuda.matmul, {}
    for name in (
        "allow_tf32",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    ):
        before[name] = getattr(settings, name)
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


@dataclass(frozen=True)
class Sizes:
    """How large things are.

    Attributes:
        main: in and out features of the shape that is measured most.
        shapes: all shapes of products.
        vectors: numbers of vectors at the main shape; the others take ``few_vectors``.
        table: rows and columns of an embedding.
        tokens: rows looked up at a time.
        rotation: bytes of weights that are gone through before one is read again, at least; see :func:`rotation_of`.
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

    def copies(self, size: int) -> int:
        """How many copies of a weight of ``size`` bytes are gone through."""
        return max(2, -(-self.rotation // size))


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


def rotation_of(cache: int, free: int) -> int:
    """Bytes of weights to go through, so that an L2 cache of ``cache`` bytes holds none of them when its turn comes again.

    Three times the cache at least. Our weights and those of three others are held at once, and need room for results
    beside them: never more than an eighth of the ``free`` memory.
    """
    return min(max(REAL.rotation, 3 * cache), free // 8)


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
        if dry:
            self.sizes = TINY
        else:
            cache = torch.cuda.get_device_properties().L2_cache_size
            self.sizes = replace(REAL, rotation=rotation_of(cache, torch.cuda.mem_get_info()[0]))

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

    def usable(self) -> bool:
        """Whether this process can go on using the GPU: after an illegal access every call fails."""
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def warm_up(self, seconds: float = 0.3) -> None:
        """Work until the clocks have risen: an idle GPU runs slowly at first."""
        side = 16 if self.dry else 4096
        x = torch.zeros(side, side, device=self.device)
        end = time.perf_counter() + (0.0 if self.dry else seconds)
        while time.perf_counter() < end:
            for _ in range(8):
                torch.mm(x, x)
            self.synchronize()

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph: each replay returns the captured call's result, which it has written anew."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # kernels are compiled and checked outside of the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> object:
            graph.replay()
            return result

        return replay

    def seconds(self, calls: list[Callable[[], object]], graph: bool, repeats: int = 7) -> float:
        """Median time of one call, going round ``calls``; as one CUDA graph or launched one by one."""

        def everything() -> None:
            for call in calls:
                call()

        if self.dry:
            return self._once(everything) / len(calls)
        turn = self.captured(everything) if graph else everything
        turn()
        self.warm_up(0.05)  # making the weights has left the GPU idle
        return statistics.median(self._once(turn, queued=graph) for _ in range(repeats)) / len(calls)

    def interleaved(
        self, calls: Mapping[str, Callable[[], object]], graph: bool, repeats: int = 31
    ) -> dict[str, float]:
        """Median time of each call (a CUDA graph's replay or not), taken in turns: whatever slows the machine slows all
        of them."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        self.warm_up(0.05)
        for _ in range(2 if self.dry else repeats):
            for name, call in calls.items():
                self.synchronize()
                times[name].append(self._once(call, queued=graph))
        return {name: statistics.median(found) for name, found in times.items()}

    def _once(self, call: Callable[[], object], queued: bool = False) -> float:
        """Seconds between two events around the call; ``queued``: behind some work, so that the launch of a graph from the
        CPU, 5 to 10 microseconds, is over when the first event comes."""
        if self.dry:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if queued:
            torch.cuda._sleep(200_000)  # clock cycles
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes a second of a device copy, reading and writing counted."""
        self.warm_up()
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
