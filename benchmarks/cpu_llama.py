"""ClaqMatMul against ggml's (llama.cpp's) matrix product with Q4_K and Q2_K weights, same shapes, interleaved in one run.

    python benchmarks/cpu_llama.py --ggml BUILD       # folder with libggml-base.so and libggml-cpu.so; writes cpu_llama_KERNEL.md
    # where that comes from: pip download llama-cpp-python --no-deps --no-binary :all:, unpack, and in vendor/llama.cpp
    # cmake -B BUILD -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_{TESTS,EXAMPLES,TOOLS,SERVER}=OFF -DBUILD_SHARED_LIBS=ON
    #       -DGGML_NATIVE=ON -DGGML_OPENMP=OFF && cmake --build BUILD --target ggml

One thread, processor time of that thread, medians. Q4_K is 4.5 bits a weight, Q2_K is 2.625; both quantize activations to int8 in
blocks of 256, and both operators here do that within the time that is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import time
from pathlib import Path

import numpy as np
import onnxruntime
from cpu_matmul import ROWS, SHAPES, build_session, cpu_name, kernel_name, report_name

import claq_runtime

GGML_F32 = 0
TYPES = {4: ("Q4_K", 12), 2: ("Q2_K", 10)}
BLOCK = 256  # of the K-quants: in_features must be a multiple


class InitParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The few functions of ggml's C interface that one product needs."""

    def __init__(self, folder: Path) -> None:
        names = {name: next(folder.rglob(f"lib{name}.so"), None) for name in ("ggml-base", "ggml-cpu")}
        missing = [name for name, path in names.items() if path is None]
        if missing:
            raise SystemExit(f"{folder}: no lib{missing[0]}.so in it")
        self.base = ctypes.CDLL(str(names["ggml-base"]), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(names["ggml-cpu"]))
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        for library, name, result, arguments in (
            (self.base, "ggml_init", pointer, [InitParams]),
            (self.base, "ggml_new_tensor_2d", pointer, [pointer, integer, size, size]),
            (self.base, "ggml_get_data", pointer, [pointer]),
            (self.base, "ggml_nbytes", ctypes.c_size_t, [pointer]),
            (self.base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            (self.base, "ggml_new_graph", pointer, [pointer]),
            (self.base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (self.base, "ggml_quantize_chunk", ctypes.c_size_t, [integer, pointer, pointer, size, size, size, pointer]),
            (self.base, "ggml_free", None, [pointer]),
            (self.cpu, "ggml_graph_compute_with_ctx", integer, [pointer, pointer, integer]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.cpu.ggml_cpu_init()

    def products(self, kind: int, k: int, n: int, m: int, copies: int) -> Product:
        return Product(self, kind, k, n, m, copies)


class Product:
    """`copies` products x W^T with weights of their own; a call computes them all on one thread."""

    def __init__(self, ggml: Ggml, kind: int, k: int, n: int, m: int, copies: int) -> None:
        self.ggml = ggml
        # Every call takes its work space out of the context anew; what is never touched costs no memory.
        room = copies * (k * n + 4 * m * n) + 16 * m * k + (2 << 30)
        self.context = ggml.base.ggml_init(InitParams(room, None, False))
        rng = np.random.default_rng(0)
        x = ggml.base.ggml_new_tensor_2d(self.context, GGML_F32, k, m)
        values = rng.normal(size=(m, k)).astype(np.float32)
        ctypes.memmove(ggml.base.ggml_get_data(x), values.ctypes.data, values.nbytes)
        weights = rng.normal(size=(n, k)).astype(np.float32)
        self.graph = ggml.base.ggml_new_graph(self.context)
        first = None
        for _ in range(copies):
            w = ggml.base.ggml_new_tensor_2d(self.context, kind, k, n)
            if first is None:
                ggml.base.ggml_quantize_chunk(kind, weights.ctypes.data, ggml.base.ggml_get_data(w), 0, n, k, None)
                first = w
            else:
                ctypes.memmove(ggml.base.ggml_get_data(w), ggml.base.ggml_get_data(first), ggml.base.ggml_nbytes(first))
            y = ggml.base.ggml_mul_mat(self.context, w, x)
            ggml.base.ggml_build_forward_expand(self.graph, y)
        self()
        got = np.ctypeslib.as_array(ctypes.cast(ggml.base.ggml_get_data(y), ctypes.POINTER(ctypes.c_float)), (m, n))
        error = np.linalg.norm(got - values @ weights.T) / np.linalg.norm(values @ weights.T)
        if not error < 0.5:
            raise SystemExit(f"ggml computes something else: relative error {error:.2f}")

    def __call__(self) -> None:
        if self.ggml.cpu.ggml_graph_compute_with_ctx(self.context, self.graph, 1):
            raise SystemExit("ggml_graph_compute_with_ctx failed")

    def free(self) -> None:
        self.ggml.base.ggml_free(self.context)


def measure(ggml: Ggml, shape: str, rows: list[int], seconds: float) -> list[dict]:
    k, n = (int(part) for part in shape.split("x"))
    copies = max(1, 4_000_000 // (k * n))
    sessions = {bits: build_session(("claq", bits, 4, 0.0), k, n, copies, 1)[0] for bits in TYPES}
    results = []
    for m in rows:
        x = onnxruntime.OrtValue.ortvalue_from_numpy(np.random.default_rng(m).normal(size=(m, k)).astype(np.float32))
        calls, peers = {}, []
        for bits, session in sessions.items():
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", x)
            for output in session.get_outputs():
                y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((m, n), np.float32))
                binding.bind_ortvalue_output(output.name, y)
            calls["claq", bits] = lambda session=session, binding=binding: session.run_with_iobinding(binding)
            peers.append(ggml.products(TYPES[bits][1], k, n, m, copies))
            calls["ggml", bits] = peers[-1]
        times: dict = {key: [] for key in calls}
        start = time.perf_counter()
        while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < 5:
            for key, call in calls.items():
                call()  # brings its weights into the caches as far as they fit
                begin = time.thread_time()
                call()
                times[key].append((time.thread_time() - begin) / copies)
        for bits, (name, _) in TYPES.items():
            claq, other = (float(np.median(times[key, bits])) for key in ("claq", "ggml"))
            results.append(
                {
                    "shape": shape,
                    "rows": m,
                    "bits": bits,
                    "peer": name,
                    "claq_ms": claq * 1e3,
                    "ggml_ms": other * 1e3,
                    "ratio": claq / other,
                }
            )
            print(
                f"{shape:>11} M={m:<4} {bits} bits: claq {claq * 1e3:.3f} ms, "
                f"{name} {other * 1e3:.3f} ms, ratio {claq / other:.2f}",
                flush=True,
            )
        for peer in peers:
            peer.free()
    return results


def report(document: dict) -> str:
    rows = document["rows"]
    lines = [
        "# ClaqMatMul and ggml (llama.cpp)",
        "",
        f"Written by `benchmarks/cpu_llama.py` on {document['date']}: {document['cpu']}, load average "
        f"{document['load']:.1f} at the start, one thread, claq-runtime {document['claq_runtime']} "
        f"(int8, kernels {document['kernel']}), {document['ggml']}. Time of ClaqMatMul divided by ggml's; below 1 claq is "
        "faster. Shapes whose in_features are no multiple of 256 do not exist as K-quants.",
    ]
    for bits, (name, _) in TYPES.items():
        lines += ["", f"## {bits} bits against {name}", ""]
        lines += ["| in x out | " + " | ".join(f"M={m}" for m in rows) + " |", "|---|" + "---|" * len(rows)]
        for shape in dict.fromkeys(entry["shape"] for entry in document["results"]):
            found = {
                entry["rows"]: entry
                for entry in document["results"]
                if (entry["shape"], entry["bits"]) == (shape, bits)
            }
            cells = [f"{found[m]['ratio']:.2f} ({found[m]['claq_ms']:.3f} ms)" if m in found else "" for m in rows]
            lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", required=True, help="folder in which ggml was built")
    parser.add_argument("--name", default="ggml", help="version of ggml, for the report")
    parser.add_argument("--shapes", default=",".join(s for s in SHAPES if int(s.split("x")[0]) % BLOCK == 0))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each shape and number of rows")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report, or -")
    arguments = parser.parse_args()
    ggml = Ggml(Path(arguments.ggml))
    document: dict = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "load": os.getloadavg()[0],
        "claq_runtime": claq_runtime.__version__,
        "kernel": kernel_name(),
        "ggml": arguments.name,
        "rows": [int(m) for m in arguments.rows.split(",")],
        "results": [],
    }
    for shape in arguments.shapes.split(","):
        document["results"] += measure(ggml, shape, document["rows"], arguments.seconds)
        if arguments.out != "-":
            folder = Path(arguments.out)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"cpu_llama_{report_name()}.json").write_text(json.dumps(document, indent=1) + "\n")
            (folder / f"cpu_llama_{report_name()}.md").write_text(report(document))


if __name__ == "__main__":
    main()
