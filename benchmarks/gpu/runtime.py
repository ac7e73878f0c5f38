"""Check and time libclaq's GPU layers: the kernels compiled ahead of time, launched as ONNX Runtime's operator launches them.

    make kernels                                     # on any machine: cubins and PTX into runtime/kernels
    pip install ./runtime --no-build-isolation       # libclaq, without a network: cmake and scikit-build-core at hand
    python benchmarks/gpu/runtime.py [--kernels runtime/kernels] [--library libclaq.so] [--results FOLDER]

Every width and dtype with few and many rows, with and without cuBLAS, against the dense weight in float64, and looked-up
rows bit for bit; the cubins of this GPU and the PTX that any later one would take; a call captured in a CUDA graph; times
beside the just-in-time path and cuBLAS; and, where onnxruntime has its CUDA provider, the logits of a small language model
on CUDA beside PyTorch's (benchmarks/gpu/logits.py). Writes
benchmarks/results/gpu_runtime_<device>.json and .md. Needs torch with CUDA; no Triton but for one column of times.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from layers import arguments, bound_of, copies_of, layer_of, share  # noqa: E402
from machine import REAL, Machine, exact_products, reason_of  # noqa: E402

from claq_export.format.layer import QuantizedLinear  # noqa: E402
from claq_export.kernels.native import DTYPES, describe_layer  # noqa: E402

MAIN = REAL.main
REPEATS = 30


class Runtime:
    """libclaq's C interface for GPU layers on torch's memory and stream."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.claq_cuda_workspace.restype = ctypes.c_size_t
        self.library.claq_cuda_workspace.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.error = ctypes.create_string_buffer(512)
        self.error_size = ctypes.c_size_t(len(self.error))

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(self.error.value.decode())

    def usable(self) -> str:
        self.check(self.library.claq_cuda_usable(self.error, self.error_size))
        return self.error.value.decode()


class Layer:
    """A layer on the GPU."""

    def __init__(self, runtime: Runtime, layer: QuantizedLinear, bias: torch.Tensor) -> None:
        self.runtime, self.layer, self.dtype = runtime, layer, bias.dtype
        self.tensors = [*layer.tensors().values(), bias]
        description = describe_layer(self.tensors, layer.columns, layer.in_features, layer.out_features)
        self.handle = ctypes.c_void_p()
        torch.cuda.synchronize()
        status = runtime.library.claq_cuda_create(
            ctypes.byref(description),
            DTYPES[self.dtype],
            ctypes.byref(self.handle),
            runtime.error,
            runtime.error_size,
        )
        runtime.check(status)

    def __call__(self, x: torch.Tensor, cublas: bool = True) -> torch.Tensor:
        y = torch.empty(x.shape[0], self.layer.out_features, dtype=self.dtype, device=x.device)
        size = self.runtime.library.claq_cuda_workspace(self.handle, x.shape[0], int(cublas))
        memory = torch.empty(size, dtype=torch.uint8, device=x.device)
        status = self.runtime.library.claq_cuda_run(
            self.handle,
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(x.shape[0]),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_void_p(memory.data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ctypes.c_void_p(torch.cuda.current_blas_handle() if cublas else None),
            self.runtime.error,
            self.runtime.error_size,
        )
        self.runtime.check(status)
        return y

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        y = torch.empty(ids.numel(), self.layer.in_features, dtype=self.dtype, device=ids.device)
        status = self.runtime.library.claq_cuda_gather(
            self.handle,
            DTYPES[ids.dtype],
            ctypes.c_void_p(ids.data_ptr()),
            ctypes.c_int64(ids.numel()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            self.runtime.error,
            self.runtime.error_size,
        )
        self.runtime.check(status)
        return y

    def __del__(self) -> None:
        if self.handle:
            self.runtime.library.claq_cuda_destroy(self.handle)


def check_all(runtime: Runtime, source: str) -> list[dict[str, Any]]:
    """Errors relative to the largest output, of every combination."""
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []

    def check(what: dict[str, Any], error_and_bound: Callable[[], tuple[float, float]]) -> None:
        entry: dict[str, Any] = {"package": source, **what, "error": float("inf"), "right": False}
        try:
            error, bound = error_and_bound()
            entry |= {"error": error, "right": error <= bound}
        except RuntimeError as reason:  # of libclaq or CUDA: the other checks go on
            entry["failure"] = reason_of(reason)
        found.append(entry)

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for widths in ((2,), (3,), (4,), (2, 3, 4)):
            for in_features, out_features, outliers in ((512, 320, 0.01), (300, 37, 0.0), (97, 44, 0.05)):
                layer = layer_of(in_features, out_features, widths, outliers).to("cuda")
                dense = layer.dequantize().double()
                shape = {"dtype": str(dtype).removeprefix("torch."), "shape": [out_features, in_features]}
                for with_bias in (True, False):
                    bias = torch.randn(out_features if with_bias else 0, dtype=dtype, device="cuda")
                    try:
                        native = Layer(runtime, layer, bias)
                    except RuntimeError as reason:
                        failure = {"error": float("inf"), "right": False, "failure": reason_of(reason)}
                        found.append({"package": source, **shape, "widths": list(widths), "bias": with_bias, **failure})
                        continue
                    if not with_bias:
                        index = torch.int32 if out_features % 2 else torch.int64
                        what = {**shape, "lookup": str(index).removeprefix("torch.")}
                        check(what, partial(_lookup_error, native, index))
                    for rows in (1, 2, 3, 4, 7, 16, 20, 130, 600):
                        x = torch.randn(rows, in_features, dtype=dtype, device="cuda")
                        expected = x.double() @ dense.T + (bias.double() if with_bias else 0)
                        for cublas in (True, False):
                            case = {"widths": list(widths), "outliers": outliers, "bias": with_bias}
                            case |= {"rows": rows, "cublas": cublas}
                            check(
                                {**shape, **case},
                                lambda native=native, x=x, cublas=cublas, expected=expected, dense=dense: (
                                    share(native(x, cublas), expected),
                                    bound_of(x, dense),
                                ),
                            )
    return found


def _lookup_error(native: Layer, index: torch.dtype) -> tuple[float, float]:
    """0 where rows looked up are those of the dense weight bit for bit, else infinity; and the bound."""
    layer = native.layer
    ids = torch.randint(-layer.out_features, layer.out_features, (50,), device="cuda").to(index)
    expected = layer.dequantize().to(native.dtype)[ids.long()]
    return 0.0 if torch.equal(native.gather(ids), expected) else float("inf"), 0.0


def graph_agrees(runtime: Runtime) -> bool:
    """Whether a call captured in a CUDA graph gives the bits of a plain one, also for other activations."""
    native = Layer(runtime, layer_of(512, 320, (2, 4), 0.01).to("cuda"), torch.randn(320, dtype=torch.float16).cuda())
    x = torch.randn(1, 512, dtype=torch.float16, device="cuda")
    replay = Machine().captured(partial(native, x))
    x.copy_(torch.randn_like(x))
    return bool(torch.equal(replay(), native(x)))


def time_all(runtime: Runtime, found: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Append milliseconds a call in a CUDA graph to ``found``, weights rotating: ahead of time, just in time (where Triton
    is), cuBLAS; or why there are none. ``save`` is called after each row."""
    machine = Machine()
    machine.warm_up()
    out_features, in_features = MAIN[1], MAIN[0]
    copies = machine.sizes.copies(2 * in_features * out_features)
    dense = [torch.randn(out_features, in_features, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    jit = None
    if importlib.util.find_spec("triton"):
        from claq_export.kernels.triton.launch import linear as jit

    def milliseconds(calls: list[Callable[[], object]]) -> float | str:
        try:
            return 1e3 * machine.seconds(calls, graph=True, repeats=REPEATS)
        except Exception as failure:  # of libclaq, CUDA or Triton: the other columns go on
            return reason_of(failure)

    for bits in (2, 3, 4):
        layers = copies_of(layer_of(in_features, out_features, (bits,)).to("cuda"), machine.sizes)
        bias = torch.zeros(out_features, dtype=torch.bfloat16, device="cuda")
        natives = [Layer(runtime, layer, bias) for layer in layers]
        for rows in (1, 4, 16, 128, 512):
            x = torch.randn(rows, in_features, dtype=torch.bfloat16, device="cuda")
            row: dict[str, Any] = {"bits": bits, "rows": rows}
            row["ahead"] = milliseconds([partial(native, x) for native in natives])
            row["cublas"] = milliseconds([partial(torch.nn.functional.linear, x, weight) for weight in dense])
            if jit is not None:
                row["just in time"] = milliseconds([partial(jit, *arguments(layer, x)) for layer in layers])
            found.append(row)
            save()


def onnxruntime_agrees(library: str) -> dict[str, Any]:
    """Logits of a small language model in ONNX Runtime on CUDA beside PyTorch's; or why that was not tried."""
    if importlib.util.find_spec("onnxruntime") is None:
        return {"not tried": "onnxruntime is not installed"}
    command = [sys.executable, str(Path(__file__).parent / "logits.py"), "--library", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": done.stderr[-2000:]}


def summary_of_checks(runtime: Runtime, source: str) -> dict[str, Any]:
    """What was found, the checks that failed, and the worst error by dtype."""
    with exact_products():
        checks = check_all(runtime, source)
    worst = {
        dtype: max(row["error"] for row in checks if row["dtype"] == dtype) for dtype in {r["dtype"] for r in checks}
    }
    return {
        "kernels": runtime.usable(),
        "checks": len(checks),
        "wrong": [row for row in checks if not row["right"]],
        "worst": worst,
    }


def checks_of_ptx(kernels: Path, library: str) -> dict[str, Any]:
    """The checks on PTX alone, in a process of its own: one keeps the kernels that it loaded first."""
    with tempfile.TemporaryDirectory() as folder:
        for ptx in kernels.glob("claq_ptx*.kernels"):
            shutil.copy(ptx, folder)
        command = [sys.executable, __file__, "--library", library, "--kernels", folder, "--only-checks"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (
        json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": done.stderr[-2000:], "wrong": ["all"]}
    )


GRAPH = {True: "the same", False: "OTHER", None: "not yet compared"}


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# libclaq on {report['device']}",
        "",
        f"torch {report['torch']}. A call captured in a CUDA graph gives {GRAPH[report['graph']]} bits.",
        f"ONNX Runtime: {json.dumps(report['onnxruntime'])}.",
        "",
        *(f"- FAILED: {failure}" for failure in report["failures"]),
        "",
        "| package | checks | wrong | worst error by dtype |",
        "|---|---|---|---|",
    ]
    for source in ("cubin", "PTX"):
        found = report[source]
        if "failed" in found:
            lines.append(f"| {source} | failed: {found['failed']} | | |")
        else:
            worst = ", ".join(f"{dtype} {error:.1e}" for dtype, error in sorted(found["worst"].items()))
            lines.append(f"| {found['kernels']} | {found['checks']} | {len(found['wrong'])} | {worst} |")
    lines += [
        "",
        f"{MAIN[0]} x {MAIN[1]}, milliseconds a call in a CUDA graph, rotating weights:",
        "",
        "| bits | rows | ahead of time | just in time | cuBLAS bf16 |",
        "|---|---|---|---|---|",
    ]
    for row in report["times"]:
        times = [row.get(column, "") for column in ("ahead", "just in time", "cublas")]
        cells = [time if isinstance(time, str) else f"{time:.4f}" for time in times]
        lines.append(f"| {row['bits']} | {row['rows']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit status is 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=Path, default=ROOT / "runtime" / "kernels")
    parser.add_argument("--library", help="libclaq; that of the installed claq-runtime if left out")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only-checks", action="store_true", help="print the checks' summary as JSON and stop")
    options = parser.parse_args()
    if options.library is None:
        import claq_runtime

        options.library = claq_runtime.library_path()
    os.environ["CLAQ_CUDA_KERNELS"] = str(options.kernels)
    runtime = Runtime(options.library)
    if options.only_checks:
        found = summary_of_checks(runtime, "PTX")
        print(json.dumps(found))
        return int(bool(found["wrong"]))
    device = torch.cuda.get_device_name()
    report: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "cubin": {"failed": "not reached", "wrong": []},
        "PTX": {"failed": "not reached", "wrong": []},
        "graph": None,
        "times": [],
        "onnxruntime": {"failed": "not reached"},
        "failures": [],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    name = "gpu_runtime_" + re.sub(r"\W+", "_", device).strip("_").lower()

    def save() -> None:
        (options.results / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.results / f"{name}.md").write_text(page(report))

    # What takes longest comes last, and whatever is known is written: the caller's time may end in between.
    parts: dict[str, Callable[[], Any]] = {
        "cubin": lambda: summary_of_checks(runtime, "cubin"),
        "graph": lambda: graph_agrees(runtime),
        "onnxruntime": lambda: onnxruntime_agrees(options.library),
        "times": lambda: time_all(runtime, report["times"], save),
        "PTX": lambda: checks_of_ptx(options.kernels, options.library),
    }
    for part, measure in parts.items():
        try:
            found = measure()
            if found is not None:
                report[part] = found
        except Exception as failure:  # of libclaq, CUDA or Triton: the other parts go on
            report["failures"].append(f"{part}: {reason_of(failure)}")
        save()
    print(page(report))
    wrong = [*report["cubin"]["wrong"], *report["PTX"]["wrong"]]
    for row in wrong[:20]:
        print("WRONG", row)
    return int(bool(wrong or report["failures"]) or not report["graph"])


if __name__ == "__main__":
    sys.exit(main())
