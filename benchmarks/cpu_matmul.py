"""ClaqMatMul against ONNX Runtime's MatMulNBits (accuracy_level 4) and float32 MatMul, interleaved in one run.

    python benchmarks/cpu_matmul.py                 # everything; writes benchmarks/results/cpu_matmul_KERNEL.md and .json
    python benchmarks/cpu_matmul.py --shapes 4096x11008 --rows 1,16 --threads 1 --out -
    python benchmarks/cpu_matmul.py --weights 64 --shapes 1536x576,576x1536,384x1536 --rows 1,4,16     # narrow layers in a model

KERNEL is the family of kernels, so that the results of different machines stand side by side. hide_cpu_features.py makes
claq and ONNX Runtime do without some instructions of this machine; KERNEL then ends with what was hidden.
A shape is KxN (in_features x out_features). Every operator of a row of the table runs in turn, many times, and the
medians are compared, so that whatever else the machine does falls on all of them alike. With one thread the times are
processor times of that thread, which others' use of the machine inflates less than wall times. Small layers are run
several times within one session run, each with weights of its own, because a session run has a fixed cost. With the 4
million weights of the default they stay in a second-level cache, and on two threads the first operators wait for the
second thread to wake: with 64 million, as many as a small model has, most weights come from beyond and both threads are
awake. Such a report is cpu_matmul_KERNEL_64m.

With --awake an operator runs again and again for a turn, the beginning of which is not timed, and its session's threads spin
between runs as they do by default: nothing waits for a thread to wake, as between the operators of a model that runs. Such a
report is cpu_matmul_KERNEL_awake; it has no swept caches.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from hide_cpu_features import hidden_features
from onnx import TensorProto, helper, numpy_helper
from settled import settled_turn

import claq_runtime

SHAPES = ["4096x4096", "4096x11008", "11008x4096", "1536x576", "576x1536", "384x1536"]
ROWS = [1, 4, 16, 128, 512]
# (operator, bits, variant): the variant of MatMulNBits is its block, of ClaqMatMul its accuracy level.
PEERS = {4: [("nbits", 4, 32), ("nbits", 4, 128)], 2: [("nbits", 2, 32), ("nbits", 2, 128)]}
PEER_BITS = {2: 2, 3: 4, 4: 4}
MILLIONS_IN_SESSION = 4


def random_claq(rng: np.random.Generator, k: int, n: int, bits: int, outliers: float) -> tuple[dict, dict]:
    """Tensors and attributes of a layer with random codes; times do not depend on their values."""
    columns = -(-k // 32) * 32
    index_dtype = np.uint16 if columns <= 65535 else np.int32
    order = np.concatenate([rng.permutation(k), np.full(columns - k, k)]).astype(index_dtype)
    scale = np.where(order < k, 0.001, 0.0).astype(np.float16)
    ptr, index, value = np.zeros(0, np.int32), np.zeros(0, index_dtype), np.zeros(0, np.float16)
    if outliers:
        # Each output has another number of them, as in a quantized layer: what is left over by vectors is not foreseen.
        reserved = (rng.random((n, columns), dtype=np.float32) < outliers) & (order < k)
        index = np.nonzero(reserved)[1].astype(index_dtype)
        ptr = np.concatenate([[0], reserved.sum(1).cumsum()]).astype(np.int32)
        value = rng.normal(size=len(index)).astype(np.float16)
    tensors = {
        "codes": rng.integers(0, 2**32, (bits * columns // 32, n), dtype=np.uint32),
        "codebook": rng.integers(-127, 128, columns * 2**bits).astype(np.int8),
        "scale": scale,
        "row_scale": np.ones(n, np.float16),
        "order": order,
        "outlier_ptr": ptr,
        "outlier_index": index,
        "outlier_value": value,
        "bias": np.zeros(0, np.float32),
    }
    attributes = {"in_features": k, "out_features": n, "columns_4": 0, "columns_3": 0, "columns_2": 0}
    attributes[f"columns_{bits}"] = columns
    return tensors, attributes


def build_session(
    kind: tuple, k: int, n: int, copies: int, threads: int, seed: int = 0, awake: bool = False
) -> tuple[onnxruntime.InferenceSession, float]:
    """A session of `copies` operators on one input, and the bytes of one operator's weights."""
    rng = np.random.default_rng(seed)
    nodes, initializers, outputs = [], [], []
    for i in range(copies):
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", n]))
        if kind[0] == "matmul":
            tensors = {"weight": rng.normal(size=(k, n)).astype(np.float32)}
            node = helper.make_node("MatMul", ["x", f"weight{i}"], [f"y{i}"])
        elif kind[0] == "nbits":
            _, bits, block = kind
            blocks = -(-k // block)
            tensors = {
                "weight": rng.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8),
                "scales": rng.uniform(0.01, 0.02, (n, blocks)).astype(np.float32),
            }
            node = helper.make_node(
                "MatMulNBits",
                ["x", f"weight{i}", f"scales{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                K=k,
                N=n,
                bits=bits,
                block_size=block,
                accuracy_level=4,
            )
        else:
            _, bits, level, outliers = kind
            tensors, attributes = random_claq(rng, k, n, bits, outliers)
            names = [f"{name}{i}" for name in tensors]
            node = helper.make_node(
                "ClaqMatMul", ["x", *names], [f"y{i}"], domain="com.claq", accuracy_level=level, **attributes
            )
        nodes.append(node)
        initializers += [numpy_helper.from_array(array, f"{name}{i}") for name, array in tensors.items()]
    graph = helper.make_graph(
        nodes, "bench", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])], outputs, initializers
    )
    opsets = [
        helper.make_opsetid(domain, version) for domain, version in (("", 18), ("com.microsoft", 1), ("com.claq", 1))
    ]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not awake:  # a session's idle threads spin for a while: the next session would find its cores taken
        options.add_session_config_entry("session.force_spinning_stop", "1")
    claq_runtime.register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, sum(array.nbytes for array in tensors.values())


def bound_inputs(sessions: dict, x: np.ndarray) -> dict:
    """A binding for each session, run once."""
    bindings = {}
    for kind, session in sessions.items():
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
        for output in session.get_outputs():
            n = output.shape[1]
            y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((x.shape[0], n), np.float32))
            binding.bind_ortvalue_output(output.name, y)
        bindings[kind] = binding
        session.run_with_iobinding(binding)
    return bindings


def awake_medians(
    sessions: dict, x: np.ndarray, copies: int, seconds: float, threads: int, least_rounds: int = 5
) -> tuple[dict, dict]:
    """Median seconds of one operator in each session, in settled turns; nothing is known of swept caches."""
    bindings = bound_inputs(sessions, x)
    times: dict = {kind: [] for kind in sessions}
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or rounds < least_rounds:
        rounds += 1
        for kind, session in sessions.items():
            times[kind] += settled_turn(lambda session=session, kind=kind: session.run_with_iobinding(bindings[kind]))
    return {kind: float(np.median(values)) / copies for kind, values in times.items()}, {}


def interleaved_medians(
    sessions: dict, x: np.ndarray, copies: int, seconds: float, threads: int, least_rounds: int = 5
) -> tuple[dict, dict]:
    """Median seconds of one operator in each session: warm, and cold (after all the others have run).

    In a turn an operator runs once cold and, with few rows, twice warm.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    warm_runs = 2 if x.shape[0] <= 16 else 0
    bindings = bound_inputs(sessions, x)
    warm: dict = {kind: [] for kind in sessions}
    cold: dict = {kind: [] for kind in sessions}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(cold.values()))) < least_rounds:
        for kind, session in sessions.items():
            for i in range(1 + warm_runs):
                begin = clock()
                session.run_with_iobinding(bindings[kind])
                elapsed = (clock() - begin) / copies
                (warm if i or not warm_runs else cold)[kind].append(elapsed)
            if not warm_runs:
                cold[kind].append(elapsed)
    return tuple({kind: float(np.median(values)) for kind, values in times.items()} for times in (warm, cold))


def copy_bandwidth(threads: int) -> float:
    """Bytes per second that are read (and as many written) when copying memory far larger than the caches."""
    import concurrent.futures

    source = np.ones((threads, 128 << 20), np.uint8)
    target = np.zeros_like(source)
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            begin = time.perf_counter()
            list(pool.map(lambda i: np.copyto(target[i], source[i]), range(threads)))
            best = max(best, source.nbytes / (time.perf_counter() - begin))
    return best


def kernel_name() -> str:
    """The family of kernels that is measured."""
    return os.environ.get("CLAQ_KERNEL") or claq_runtime.kernels()[0]


def report_name() -> str:
    """What tells reports of different machines apart."""
    hidden = hidden_features()
    return "_".join([kernel_name(), "without", *hidden]) if hidden else kernel_name()


def cpu_name() -> str:
    hidden = hidden_features()
    return f"{processor_name()} ({', '.join(hidden)} hidden from all that was measured)" if hidden else processor_name()


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def measure(
    shape: str, threads: int, rows: list[int], seconds: float, bandwidth: float, millions: int, awake: bool
) -> list[dict]:
    k, n = (int(part) for part in shape.split("x"))
    copies = max(1, millions * 1_000_000 // (k * n))
    kinds = [("matmul",), *PEERS[4], *PEERS[2]]
    kinds += [("claq", bits, level, 0.0) for bits in (4, 3, 2) for level in (4, 0)]
    kinds += [("claq", bits, 4, 0.01) for bits in (4, 3, 2)]
    sessions, sizes = {}, {}
    for kind in kinds:
        sessions[kind], sizes[kind] = build_session(kind, k, n, copies, threads, awake=awake)
    timing = awake_medians if awake else interleaved_medians
    results = []
    for m in rows:
        x = np.random.default_rng(m).normal(size=(m, k)).astype(np.float32)
        medians, cold = timing(sessions, x, copies, seconds, threads)
        for bits in (4, 3, 2):
            peers = PEERS[PEER_BITS[bits]]
            best = min(peers, key=lambda kind: medians[kind])
            int8, exact = medians[("claq", bits, 4, 0.0)], medians[("claq", bits, 0, 0.0)]
            # Between two sessions alone: a tenth of the time is asked about, and of many sessions few rounds fit into it.
            pair = {outliers: sessions[("claq", bits, 4, outliers)] for outliers in (0.0, 0.01)}
            plain, reserved = timing(pair, x, copies, seconds / 4, threads, least_rounds=9)[0].values()
            results.append(
                {
                    "shape": shape,
                    "threads": threads,
                    "rows": m,
                    "bits": bits,
                    "claq_ms": int8 * 1e3,
                    "nbits_ms": {f"{kind[1]} bits, block {kind[2]}": medians[kind] * 1e3 for kind in peers},
                    "matmul_ms": medians[("matmul",)] * 1e3,
                    "claq_float_ms": exact * 1e3,
                    "ratio_to_nbits": int8 / medians[best],
                    "ratio_to_matmul": int8 / medians[("matmul",)],
                    "float_ratio_to_matmul": exact / medians[("matmul",)],
                    "outlier_cost": reserved / plain - 1,
                }
            )
            swept = ""
            if cold:
                own = cold[("claq", bits, 4, 0.0)]
                results[-1]["cold_ratio_to_nbits"] = own / min(cold[kind] for kind in peers)
                results[-1]["percent_of_copy_bandwidth"] = 100 * sizes[("claq", bits, 4, 0.0)] / own / bandwidth
                swept = f" (cold {results[-1]['cold_ratio_to_nbits']:.2f})"
            print(
                f"{shape:>11} threads {threads} M={m:<4} {bits} bits: claq {int8 * 1e3:8.3f} ms, "
                f"nbits {medians[best] * 1e3:8.3f} ms, ratio {results[-1]['ratio_to_nbits']:.2f}{swept}; "
                f"float32: claq {exact * 1e3:8.3f}, matmul {medians[('matmul',)] * 1e3:8.3f}, "
                f"ratio {results[-1]['float_ratio_to_matmul']:.2f}; outliers {results[-1]['outlier_cost']:+.0%}",
                flush=True,
            )
    return results


def table(results: list[dict], rows: list[int], threads: int, bits: int, value: str, form: str) -> list[str]:
    lines = ["| in x out | " + " | ".join(f"M={m}" for m in rows) + " |", "|---|" + "---|" * len(rows)]
    for shape in dict.fromkeys(entry["shape"] for entry in results):
        cells = []
        for m in rows:
            found = [
                entry
                for entry in results
                if (entry["shape"], entry["threads"], entry["rows"], entry["bits"]) == (shape, threads, m, bits)
            ]
            cells.append(form.format(found[0][value]) if found else "")
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return lines


def summary(results: list[dict], rows: list[int], threads: int) -> list[str]:
    """Geometric means and ranges over the shapes, for each number of rows."""
    lines = [f"## Over all shapes, {threads} thread{'s' if threads > 1 else ''}", ""]
    lines += ["| geometric mean (range) | " + " | ".join(f"M={m}" for m in rows) + " |", "|---|" + "---|" * len(rows)]
    for bits in (4, 3, 2):
        for title, value, offset in (
            ("time / MatMulNBits", "ratio_to_nbits", 0.0),
            ("the same, swept caches", "cold_ratio_to_nbits", 0.0),
            ("float32: time / MatMul", "float_ratio_to_matmul", 0.0),
            ("time with 1 % outliers / without", "outlier_cost", 1.0),
        ):
            if not all(value in entry for entry in results):
                continue
            cells = []
            for m in rows:
                found = [
                    entry[value] + offset
                    for entry in results
                    if (entry["threads"], entry["rows"], entry["bits"]) == (threads, m, bits)
                ]
                mean = f"{np.exp(np.mean(np.log(found))):.2f} ({min(found):.2f}-{max(found):.2f})" if found else ""
                cells.append(mean)
            lines.append(f"| {bits} bits, {title} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def report(document: dict) -> str:
    results, rows = document["results"], document["rows"]
    lines = [
        "# CPU matrix multiplication",
        "",
        f"Written by `benchmarks/cpu_matmul.py` on {document['date']}: {document['cpu']}, {document['cores']} cores "
        f"(load average {document['load']:.1f} at the start, this benchmark not counted), "
        f"ONNX Runtime {document['onnxruntime']}, claq-runtime {document['claq_runtime']}, kernels "
        f"{document['kernel']}. Times are medians of interleaved runs; a ratio below 1 means that claq is faster. "
        "MatMulNBits is the faster of block 32 and 128 at accuracy_level 4; 3 bits are compared with its 4 bits. "
        f"A session has {document['millions']} million weights, or one operator if that has more."
        + (" Threads are awake, as in a model that runs." if document["awake"] else ""),
        "",
    ]
    for threads in document["threads"]:
        lines += summary(results, rows, threads)
        for bits in (4, 3, 2):
            lines += [f"## {bits} bits, {threads} thread{'s' if threads > 1 else ''}", ""]
            for title, value, form in (
                ("Time of ClaqMatMul (int8) / MatMulNBits:", "ratio_to_nbits", "{:.2f}"),
                ("The same, caches swept by other operators before each run:", "cold_ratio_to_nbits", "{:.2f}"),
                ("Time of ClaqMatMul (int8), ms:", "claq_ms", "{:.3f}"),
                ("Time of ClaqMatMul (int8) / float32 MatMul:", "ratio_to_matmul", "{:.2f}"),
                ("Time of ClaqMatMul (float32) / float32 MatMul:", "float_ratio_to_matmul", "{:.2f}"),
                ("Added time of 1 % outliers (int8):", "outlier_cost", "{:+.0%}"),
            ):
                if all(value in entry for entry in results):
                    lines += [title, "", *table(results, rows, threads, bits, value, form), ""]
            if 1 in rows and not document["awake"]:
                lines += [
                    f"Weights read per second at M=1 with swept caches, as percent of the copy bandwidth "
                    f"({document['copy_bandwidth'][str(threads)] / 1e9:.1f} GB/s):",
                    "",
                    *table(results, [1], threads, bits, "percent_of_copy_bandwidth", "{:.0f} %"),
                    "",
                ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="least time for each shape, number of rows and threads"
    )
    parser.add_argument(
        "--weights", type=int, default=MILLIONS_IN_SESSION, metavar="MILLIONS", help="weights in a session, in millions"
    )
    parser.add_argument("--awake", action="store_true", help="time operators while their session's threads are awake")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report, or -")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep what the report has of other numbers of threads (the same rows and kernels)",
    )
    arguments = parser.parse_args()
    rows = [int(m) for m in arguments.rows.split(",")]
    threads = [int(t) for t in arguments.threads.split(",")]
    bandwidth = {t: copy_bandwidth(t) for t in threads}
    for t in threads:
        print(f"copy bandwidth, {t} threads: {bandwidth[t] / 1e9:.1f} GB/s")
    document: dict = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "onnxruntime": onnxruntime.__version__,
        "claq_runtime": claq_runtime.__version__,
        "kernel": kernel_name(),
        "millions": arguments.weights,
        "awake": arguments.awake,
        "rows": rows,
        "threads": threads,
        "copy_bandwidth": {str(t): bandwidth[t] for t in threads},
        "results": [],
    }
    suffix = "" if arguments.weights == MILLIONS_IN_SESSION else f"_{arguments.weights}m"
    suffix += "_awake" if arguments.awake else ""
    path = Path(arguments.out) / f"cpu_matmul_{report_name()}{suffix}.json"
    if arguments.keep:
        before = json.loads(path.read_text())
        document["results"] = [entry for entry in before["results"] if entry["threads"] not in threads]
        document["threads"] = sorted({*before["threads"], *threads})
        document["copy_bandwidth"] = {**before["copy_bandwidth"], **document["copy_bandwidth"]}
    for t in threads:
        for shape in arguments.shapes.split(","):
            document["results"] += measure(
                shape, t, rows, arguments.seconds, bandwidth[t], arguments.weights, arguments.awake
            )
            # Written after each shape: a run of all of them takes long.
            if arguments.out != "-":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(document, indent=1) + "\n")
                path.with_suffix(".md").write_text(report(document))


if __name__ == "__main__":
    sys.exit(main())
