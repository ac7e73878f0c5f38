"""Two builds of libclaq in turns, through the C interface: what a change of a kernel brings.

    python benchmarks/compare_builds.py before/libclaq.so after/libclaq.so
    python benchmarks/compare_builds.py before.so after.so --shapes 1536x576 --rows 1,4 --bits 4 --outliers 0,0.01 --seconds 3
    python benchmarks/compare_builds.py libclaq.so libclaq.so --kernels avx2,avx512vnni       # two families of one build
    cmake -S runtime -B build -DCMAKE_BUILD_TYPE=RelWithDebInfo && cmake --build build -j --target claq     # makes one

A pair is both builds right after each other, who begins alternates, and the figure is the median of the pairs' ratios
(second / first, below 1: the second is faster), with its quartiles: what else the machine does falls on both. Each build has
layers of its own in memory, of one content. One thread, processor time. A build against a copy of itself tells how far the
ratios can be trusted: 1 to 2 % for rows up to 16, more above.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from cpu_matmul import ROWS, SHAPES, random_claq

from claq_export.kernels.native import describe_layer


class Build:
    """One build of libclaq and the family of kernels it is asked for."""

    def __init__(self, path: Path, kernel: str | None) -> None:
        self.library = ctypes.CDLL(str(path))
        self.kernel = kernel
        self.alive: list = []

    def load(self, tensors: dict[str, np.ndarray], attributes: dict[str, int]) -> ctypes.c_void_p:
        """A layer on a copy of the tensors that no other build or layer reads."""
        own = [torch.from_numpy(array.copy()) for array in tensors.values()]
        self.alive.append(own)
        columns = [attributes[f"columns_{bits}"] for bits in (4, 3, 2)]
        desc = describe_layer(own, columns, attributes["in_features"], attributes["out_features"], self.kernel)
        layer, error = ctypes.c_void_p(), ctypes.create_string_buffer(512)
        if self.library.claq_create(ctypes.byref(desc), ctypes.byref(layer), error, ctypes.c_size_t(512)):
            raise SystemExit(f"claq_create: {error.value.decode()}")
        return layer

    def calls(self, layers: list, level: int, x: np.ndarray, y: np.ndarray) -> list:
        """The arguments of claq_run for each layer, converted once: what is timed is the library."""
        return [
            (
                layer,
                ctypes.c_int(1),
                ctypes.c_int32(level),
                ctypes.c_void_p(x.ctypes.data),
                ctypes.c_int64(len(x)),
                ctypes.c_void_p(y.ctypes.data),
                None,
                None,
                None,
                ctypes.c_size_t(0),
            )
            for layer in layers
        ]

    def seconds(self, calls: list) -> float:
        run = self.library.claq_run
        begin = time.thread_time()
        for call in calls:
            if run(*call):
                raise SystemExit("claq_run failed")
        return time.thread_time() - begin


def paired_ratios(builds: list[Build], calls: list[list], seconds: float) -> tuple[list[float], float]:
    """Ratios second / first of the pairs, and the median seconds of the first."""
    for build, own in zip(builds, calls, strict=True):
        build.seconds(own)
    ratios, first = [], []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(ratios) < 6:
        taken = [0.0, 0.0]
        for i in (0, 1) if len(ratios) % 2 else (1, 0):
            taken[i] = builds[i].seconds(calls[i])
        if min(taken) <= 0.0:
            continue  # the clock of the thread did not move
        ratios.append(taken[1] / taken[0])
        first.append(taken[0] / len(calls[0]))
    return ratios, float(np.median(first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs=2, type=Path, metavar="LIBRARY")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="in_features x out_features, separated by commas")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--bits", default="4")
    parser.add_argument("--outliers", default="0", help="shares of the weights, such as 0,0.01")
    parser.add_argument("--accuracy", type=int, default=4, choices=(0, 4), help="4: int8 activations, 0: float32")
    parser.add_argument("--kernels", default="", help="a family of kernels for both, or one for each")
    parser.add_argument("--weights", type=int, default=4, metavar="MILLIONS", help="weights of all layers of a shape")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    arguments = parser.parse_args()
    kernels = arguments.kernels.split(",") if arguments.kernels else [None]
    if len(kernels) > 2:
        parser.error(f"--kernels: {arguments.kernels} names more than two families")
    with tempfile.TemporaryDirectory() as folder:
        builds = []
        for i, path in enumerate(arguments.builds):
            if not path.is_file():
                parser.error(f"{path}: no such file")
            # A copy under another name: one file is loaded once only.
            copy = shutil.copyfile(path, Path(folder) / f"build{i}.so")
            builds.append(Build(copy, kernels[min(i, len(kernels) - 1)]))
        for shape, bits, outliers in itertools.product(
            arguments.shapes.split(","), arguments.bits.split(","), arguments.outliers.split(",")
        ):
            k, n = (int(part) for part in shape.split("x"))
            copies = max(1, arguments.weights * 1_000_000 // (k * n))
            layers: list[list] = [[], []]
            rng = np.random.default_rng(0)
            for _ in range(copies):
                content = random_claq(rng, k, n, int(bits), float(outliers))
                for build, own in zip(builds, layers, strict=True):
                    own.append(build.load(*content))
            for m in (int(part) for part in arguments.rows.split(",")):
                x = rng.normal(size=(m, k)).astype(np.float32)
                results = [np.zeros((m, n), np.float32) for _ in builds]
                calls = [
                    build.calls(own, arguments.accuracy, x, y)
                    for build, own, y in zip(builds, layers, results, strict=True)
                ]
                ratios, first = paired_ratios(builds, calls, arguments.seconds)
                low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
                same = "" if np.array_equal(*results, equal_nan=True) else "  DIFFERENT RESULTS"
                print(
                    f"{shape:>11} {bits} bits, {float(outliers):.1%} outliers, M={m:<4} "
                    f"{first * 1e6:10.1f} us, ratio {middle:.3f} ({low:.3f}-{high:.3f}, {len(ratios)} pairs){same}",
                    flush=True,
                )
            for build, own in zip(builds, layers, strict=True):
                for layer in own:
                    build.library.claq_destroy(layer)
                build.alive.clear()


if __name__ == "__main__":
    main()
