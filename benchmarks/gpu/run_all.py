"""Check and time the Triton kernels on the GPU of this machine: one command, nothing downloaded, under eight minutes.

    python benchmarks/gpu/run_all.py [--minutes 8] [--tune] [--quick]

First every kernel against the dense weight in float64, then times at rotating copies of the weights (so that the L2 cache
does not hold them), launched one by one and as a CUDA graph, beside cuBLAS bf16 and torch's int4 kernel. Bandwidth is that
of the packed weight, as a share of what a plain copy reaches in the same run. Writes
benchmarks/results/gpu_<device>.json and .md. Needs torch with CUDA, and triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from claq_export.format.layer import QuantizedLinear, index_dtype, storage_order  # noqa: E402

ROTATION_BYTES = 512 << 20
"""Weights that are gone through before one is read again; several times any L2 cache."""

MIXES = {"2": (2,), "3": (3,), "4": (4,), "2+4": (2,) * 9 + (4,)}
MAIN = (4096, 11008)
SHAPES = (MAIN, (4096, 4096), (11008, 4096), (8192, 28672))
VECTORS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 512, 2048)
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}


def layer_of(
    in_features: int, out_features: int, widths: tuple[int, ...], outliers: float = 0.0, full_row: bool = False
) -> QuantizedLinear:
    """A random layer on the CPU; ``outliers`` is their share, ``full_row`` reserves every weight of the last output."""
    bits = torch.tensor(widths)[torch.randint(len(widths), (in_features,))]
    order, columns = storage_order(bits)
    real = order < in_features
    rows = sum(width * count for width, count in zip((4, 3, 2), columns, strict=True)) // 32
    entries = sum(count << width for width, count in zip((4, 3, 2), columns, strict=True))
    reserved = torch.rand(out_features, order.numel()) < outliers
    if full_row:
        reserved[-1] = True
    reserved &= real
    per_row, index = reserved.sum(1), reserved.nonzero()[:, 1]
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), per_row.cumsum(0)]).to(torch.int32)
    layer = QuantizedLinear(
        in_features=in_features,
        out_features=out_features,
        columns=columns,
        codes=torch.randint(-(1 << 31), 1 << 31, (rows, out_features)).to(torch.int32).view(torch.uint32),
        codebook=torch.randint(-128, 128, (entries,), dtype=torch.int8),
        scale=(torch.rand(order.numel()) * 0.002 + 1e-4).to(torch.float16) * real,
        row_scale=(torch.rand(out_features) + 0.5).to(torch.float16),
        order=order.to(torch.int32).to(index_dtype(in_features)),
        outlier_ptr=ptr if index.numel() else ptr[:0],
        outlier_index=index.to(torch.int32).to(index_dtype(order.numel() - 1)),
        outlier_value=(torch.randn(index.numel()) * 100).to(torch.float16),
    )
    layer.validate()
    return layer


def arguments(layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
    """Arguments of claq::linear."""
    empty = x.new_zeros(0) if bias is None else bias
    return (x, *layer.tensors().values(), empty, layer.in_features, layer.out_features, list(layer.columns))


def weight_bytes(layer: QuantizedLinear) -> int:
    """Bytes of the packed weight with all its tables."""
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors().values())


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison with the dense weight."""

    widths: tuple[int, ...]
    vectors: int
    dtype: torch.dtype
    in_features: int = 512
    out_features: int = 320
    outliers: float = 0.0
    full_row: bool = False


def checks() -> list[Check]:
    """All kernels, widths and dtypes; odd shapes; outliers none, some, a full row."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    wanted = []
    for widths in ((2,), (3,), (4,), (2, 3, 4)):
        for vectors in (1, 2, 3, 4, 7, 16, 20, 64, 130):
            wanted.append(Check(widths, vectors, half, outliers=0.01 if vectors % 2 else 0.0))
        for vectors in (1, 2, 130):
            wanted.append(Check(widths, vectors, single, outliers=0.01))
        for vectors in (1, 16, 130):
            wanted.append(Check(widths, vectors, brain, outliers=0.01, full_row=True))
    for in_features, out_features in ((100, 37), (4097, 1002), (33, 1), (1, 5)):
        for vectors in (1, 4, 7, 33, 130):
            wanted.append(Check((2, 3, 4), vectors, half, in_features, out_features, outliers=0.02))
            wanted.append(Check((2, 3, 4), vectors, single, in_features, out_features))
    wanted.append(Check((2, 4), 1, half, *MAIN, outliers=0.005))
    wanted.append(Check((3,), 16, half, *MAIN, outliers=0.005))
    return wanted


def run_checks(wanted: list[Check]) -> list[dict[str, Any]]:
    """Largest error of each check, relative to the largest output; runs in a process of its own."""
    from claq_export.kernels.triton.launch import linear

    results = []
    for check in wanted:
        torch.manual_seed(len(results))
        layer = layer_of(check.in_features, check.out_features, check.widths, check.outliers, check.full_row)
        x = torch.randn(check.vectors, check.in_features, device="cuda").to(check.dtype)
        bias = torch.randn(check.out_features, device="cuda").to(check.dtype)
        torch.backends.cuda.matmul.allow_tf32 = False
        got = linear(*arguments(layer.to("cuda"), x, bias)).double()
        expected = x.double() @ layer.dequantize().to("cuda").double().T + bias.double()
        error = float((got - expected).abs().max() / expected.abs().max())
        text = {**dataclasses.asdict(check), "dtype": str(check.dtype), "error": error}
        results.append({**text, "passed": error <= BOUNDS[check.dtype]})
    return results


def correctness(processes: int = 8) -> list[dict[str, Any]]:
    """Run the checks in several processes, whose time goes mostly into compiling kernels."""
    wanted = checks()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        parts = pool.map(run_checks, [wanted[i::processes] for i in range(processes)])
        return [result for part in parts for result in part]


def seconds(calls: list[Callable[[], object]], graph: bool, repeats: int = 7) -> float:
    """Median time of one call, going round ``calls``; as one CUDA graph or launched one by one."""
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


def copies_of(layer: QuantizedLinear, most: int = 64) -> list[QuantizedLinear]:
    """The layer and clones of it, as many as fill the rotation."""
    count = min(most, max(2, -(-ROTATION_BYTES // weight_bytes(layer))))
    clones = [
        dataclasses.replace(layer, **{name: tensor.clone() for name, tensor in layer.tensors().items()})
        for _ in range(count - 1)
    ]
    return [layer, *clones]


def copy_bandwidth() -> float:
    """Bytes a second of a device copy, reading and writing counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)] * 4, graph=False)


def cublas(in_features: int, out_features: int, vectors: Iterable[int]) -> dict[int, float]:
    """Seconds of a bf16 matrix product by number of vectors, weights rotating."""
    count = max(2, -(-ROTATION_BYTES // (in_features * out_features * 2)))
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(count)]
    times = {}
    for m in vectors:
        x = torch.randn(m, in_features, device="cuda", dtype=torch.bfloat16)
        times[m] = seconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights], graph=True)
    return times


def torch_int4(in_features: int, out_features: int, vectors: Iterable[int]) -> dict[int, float] | str:
    """Seconds of torch's 4-bit kernel (groups of 128), or why there are none."""
    count = max(2, -(-ROTATION_BYTES // (in_features * out_features // 2)))
    try:
        packed = [
            torch.ops.aten._convert_weight_to_int4pack(
                torch.randint(0, 256, (out_features, in_features // 2), device="cuda", dtype=torch.uint8), 8
            )
            for _ in range(count)
        ]
        scales = torch.rand(in_features // 128, out_features, 2, device="cuda", dtype=torch.bfloat16)
        times = {}
        for m in vectors:
            x = torch.randn(m, in_features, device="cuda", dtype=torch.bfloat16)
            calls = [lambda w=w, x=x: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in packed]
            times[m] = seconds(calls, graph=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return times


def kernel_times(calls: list[Callable[[], object]]) -> dict[str, float]:
    """Mean microseconds of each GPU kernel in a call; empty where the profiler has no access to the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        if event.key.startswith("claq_"):
            found[event.key] = event.device_time_total / len(calls)
    return found


def timings(bandwidth: float, deadline: float, quick: bool) -> list[dict[str, Any]]:
    """Times of our kernels and of the others, by shape, mix of widths, outliers and number of vectors."""
    from claq_export.kernels.triton.launch import linear

    rows: list[dict[str, Any]] = []
    for shape in SHAPES[:1] if quick else SHAPES:
        vectors = VECTORS if shape == MAIN else (1, 16, 128)
        dense, int4 = cublas(*shape, vectors), torch_int4(*shape, [m for m in vectors if m <= 128])
        for (name, widths), outliers in product(MIXES.items(), (0.0, 0.005)):
            if outliers and (shape != MAIN or name != "4"):
                continue
            if time.monotonic() > deadline:
                rows.append({"shape": shape, "mix": name, "outliers": outliers, "skipped": "out of time"})
                continue
            layers = copies_of(layer_of(*shape, widths, outliers).to("cuda"))
            size = weight_bytes(layers[0])
            for m in vectors:
                x = torch.randn(m, shape[0], device="cuda", dtype=torch.bfloat16)
                used = layers if m <= 128 else layers[:4]
                calls = [lambda layer=layer, x=x: linear(*arguments(layer, x)) for layer in used]
                row: dict[str, Any] = {"shape": shape, "mix": name, "outliers": outliers, "vectors": m, "bytes": size}
                row["graph_us"] = seconds(calls, graph=True) * 1e6
                row["eager_us"] = seconds(calls, graph=False, repeats=3) * 1e6
                row["copy_bandwidth_percent"] = 100 * size / (row["graph_us"] * 1e-6) / bandwidth
                row["cublas_bf16_us"] = dense[m] * 1e6
                row["int4pack_us"] = int4[m] * 1e6 if isinstance(int4, dict) and m in int4 else None
                if m in (1, 16) and shape == MAIN:
                    row["kernels_us"] = kernel_times(calls)
                rows.append(row)
                print(row, flush=True)
        if isinstance(int4, str):
            rows.append({"shape": shape, "mix": "int4pack", "outliers": 0.0, "skipped": int4})
    return rows


def tune(deadline: float) -> list[dict[str, Any]]:
    """Microseconds of the few-vectors and tensor-core kernels over tile sizes: numbers for kernels/triton/dispatch.json."""
    from claq_export.kernels.triton.dispatch import GemmConfig, GemvConfig, dispatch_for
    from claq_export.kernels.triton.launch import linear

    base = dispatch_for(*torch.cuda.get_device_capability())
    gemv = [GemvConfig(4, *tile) for tile in product((32, 64), (2, 4, 8), (1, 2), (4, 8, 16))]
    gemm = [
        GemmConfig(1 << 30, vectors, 64, blocks, blocks, stages, programs)
        for vectors, blocks, stages, programs in product((16, 32, 64), (4, 8), (1, 2), (1, 2))
    ]
    rows: list[dict[str, Any]] = []
    for name in ("2", "4", "3"):
        layers = copies_of(layer_of(*MAIN, MIXES[name]).to("cuda"))
        for m, configs in ((1, gemv), (16, gemm), (128, gemm)):
            x = torch.randn(m, MAIN[0], device="cuda", dtype=torch.bfloat16)
            for config in configs:
                if time.monotonic() > deadline:
                    return rows
                if isinstance(config, GemvConfig):
                    dispatch = dataclasses.replace(base, gemv=config)
                else:
                    dispatch = dataclasses.replace(base, gemm=(config,))
                calls = [
                    lambda layer=layer, x=x, dispatch=dispatch: linear(*arguments(layer, x), dispatch=dispatch)
                    for layer in layers
                ]
                try:
                    time_us: float | str = seconds(calls, graph=True) * 1e6
                except RuntimeError as error:
                    # A tile that needs more shared memory or registers than there are is an answer, too.
                    time_us = str(error).splitlines()[0]
                rows.append({"mix": name, "vectors": m, "tile": dataclasses.asdict(config), "us": time_us})
                print(rows[-1], flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    failed = [check for check in result["checks"] if not check["passed"]]
    lines = [
        f"# Triton kernels on {result['device']}",
        "",
        f"`benchmarks/gpu/run_all.py`, torch {result['torch']}, triton {result['triton']}; copy bandwidth "
        f"{result['copy_bandwidth'] / 1e12:.2f} TB/s. {len(result['checks']) - len(failed)} of {len(result['checks'])} "
        "comparisons with the dense weight passed.",
        "",
    ]
    lines += [f"- FAILED: {check}" for check in failed]
    lines += [
        "| in x out | mix | outliers | M | graph us | eager us | % of copy | cuBLAS bf16 us | times cuBLAS | int4pack us |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["timings"]:
        head = f"| {row['shape'][0]} x {row['shape'][1]} | {row['mix']} | {row['outliers']:.3f} | "
        if "skipped" in row:
            lines.append(f"{head} not measured: {row['skipped']} |")
            continue
        int4 = f"{row['int4pack_us']:.1f}" if row["int4pack_us"] else ""
        lines.append(
            f"{head}{row['vectors']} | {row['graph_us']:.1f} | {row['eager_us']:.1f} | "
            f"{row['copy_bandwidth_percent']:.0f} | {row['cublas_bf16_us']:.1f} | "
            f"{row['cublas_bf16_us'] / row['graph_us']:.2f} | {int4} |"
        )
    lines += ["", "Kernels of one call, microseconds:", ""]
    for row in result["timings"]:
        if row.get("kernels_us"):
            parts = ", ".join(f"{name} {us:.1f}" for name, us in row["kernels_us"].items())
            lines.append(f"- {row['mix']}, outliers {row['outliers']:.3f}, M = {row['vectors']}: {parts}")
    for name in sorted({(row["mix"], row["vectors"]) for row in result["tuning"]}):
        measured = [row for row in result["tuning"] if (row["mix"], row["vectors"]) == name]
        best = sorted((row for row in measured if isinstance(row["us"], float)), key=lambda row: row["us"])[:3]
        lines += ["", f"Fastest tiles for mix {name[0]}, M = {name[1]}:", ""]
        lines += [f"- {row['us']:.1f} us: {row['tile']}" for row in best]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run everything; the exit status is 1 when a comparison failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting new measurements after this long")
    parser.add_argument("--tune", action="store_true", help="also time other tile sizes")
    parser.add_argument("--quick", action="store_true", help="one shape only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false", file=sys.stderr)
        return 2
    import triton

    deadline = time.monotonic() + 60 * options.minutes - 30
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checks": correctness(),
    }
    for check in result["checks"]:
        if not check["passed"]:
            print("FAILED", check, flush=True)
    result["copy_bandwidth"] = copy_bandwidth()
    result["timings"] = timings(result["copy_bandwidth"], deadline, options.quick)
    result["tuning"] = tune(deadline) if options.tune else []
    name = "gpu_" + re.sub(r"[^a-z0-9]+", "_", result["device"].lower()).strip("_")
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(result))
    print(table(result))
    return 0 if all(check["passed"] for check in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
