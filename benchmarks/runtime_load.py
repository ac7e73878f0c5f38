"""What loading an artifact costs: resident memory, pages shared by two processes, and session creation time.

    python benchmarks/runtime_load.py               # writes benchmarks/results/runtime_load.md and .json

Artifacts of about 300 MB of codes in ClaqMatMul layers with external data are written to a temporary folder and loaded in fresh
processes. The figures come from /proc/<pid>/smaps_rollup, hence Linux only: Rss is all that a process has in memory, Pss
divides each page by the number of processes that share it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from cpu_matmul import cpu_name, random_claq
from onnx import TensorProto, helper, save_model

import claq_runtime

SIZE, OUT_FEATURES = 4096, 4096
CASES = ((4, 0.005), (4, 0.01), (2, 0.01))  # bits, share of outliers


def write_artifact(folder: Path, layers: int, bits: int, outliers: float) -> Path:
    """A chain of layers as claq-export writes it: tensors of external data start at a page."""
    data = folder / "model.onnx.data"
    nodes, initializers, offset = [], [], 0
    with data.open("wb") as file:
        for i in range(layers):
            tensors, attributes = random_claq(np.random.default_rng(i), SIZE, OUT_FEATURES, bits, outliers)
            names = []
            for name, array in tensors.items():
                names.append(f"{name}{i}")
                dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
                tensor = TensorProto(name=names[-1], dims=array.shape, data_type=dtype)
                if array.nbytes < 1024:
                    tensor.raw_data = array.tobytes()
                else:
                    offset = -(-offset // 4096) * 4096
                    file.seek(offset)
                    file.write(array.tobytes())
                    tensor.data_location = TensorProto.EXTERNAL
                    for key, value in (("location", data.name), ("offset", offset), ("length", array.nbytes)):
                        tensor.external_data.add(key=key, value=str(value))
                    offset += array.nbytes
                initializers.append(tensor)
            nodes.append(
                helper.make_node(
                    "ClaqMatMul", [f"x{i}", *names], [f"x{i + 1}"], domain="com.claq", accuracy_level=4, **attributes
                )
            )
    graph = helper.make_graph(
        nodes,
        "load",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["rows", SIZE])],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ["rows", OUT_FEATURES])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.claq", 1)]
    path = folder / "model.onnx"
    save_model(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def memory() -> dict[str, int]:
    """Bytes of resident memory of this process, by kind."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) * 1024
    return fields


def child(path: str) -> None:
    """Loads and runs the artifact, reports, waits for a line on stdin, and reports its memory again."""
    before = memory()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    claq_runtime.register(options)
    begin = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    created = time.perf_counter() - begin
    session.run(None, {"x0": np.zeros((1, SIZE), np.float32)})
    after = memory()
    print(json.dumps({"seconds": created, "before": before, "after": after}), flush=True)
    sys.stdin.readline()
    print(json.dumps(memory()), flush=True)
    sys.stdin.readline()


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen) -> dict:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def tell(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def read_seconds(path: Path) -> float:
    """Seconds to read the file from the page cache, as a program would that has no use for mapping."""
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    return time.perf_counter() - begin


def measure(megabytes: int, bits: int, outliers: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        layers = max(1, round(megabytes * 1e6 / (SIZE * OUT_FEATURES * bits / 8)))
        path = write_artifact(Path(folder), layers, bits, outliers)
        data = path.with_name("model.onnx.data")
        size = path.stat().st_size + data.stat().st_size
        read = float(np.median([read_seconds(data) for _ in range(5)]))
        creations = []
        for _ in range(5):
            process = start(path)
            creations.append(ask(process)["seconds"])
            tell(process), ask(process), tell(process)
            process.wait()
        first = start(path)
        alone = ask(first)
        second = start(path)
        ask(second)
        tell(first)
        shared = ask(first)
        tell(second), ask(second)
        for process in (first, second):
            tell(process)
            process.wait()
    added = {name: alone["after"][name] - alone["before"][name] for name in ("Rss", "Anonymous", "Pss")}
    return {
        "bits": bits,
        "outliers": outliers,
        "layers": layers,
        "artifact_bytes": size,
        "session_resident_bytes": added["Rss"],
        "session_private_bytes": added["Anonymous"],
        "resident_to_artifact": added["Rss"] / size,
        "one_process_pss_bytes": added["Pss"],
        "two_processes_pss_bytes_each": shared["Pss"] - alone["before"]["Pss"],
        "session_creation_seconds": float(np.median(creations)),
        "read_file_seconds": read,
        "creation_to_read": float(np.median(creations)) / read,
    }


def table(cases: list[dict]) -> list[str]:
    def row(label: str, cell: Callable[[dict], str]) -> str:
        return f"| {label} | " + " | ".join(cell(case) for case in cases) + " |"

    def megabytes(name: str) -> Callable[[dict], str]:
        return lambda case: f"{case[name] / 1e6:.1f} MB"

    return [
        row("", lambda case: f"{case['bits']} bits, {case['outliers']:.1%} outliers"),
        "|---" * (len(cases) + 1) + "|",
        row("layers", lambda case: str(case["layers"])),
        row("artifact", megabytes("artifact_bytes")),
        row(
            "resident memory a session adds, after a run",
            lambda case: f"{case['session_resident_bytes'] / 1e6:.1f} MB = {case['resident_to_artifact']:.3f} x",
        ),
        row("of it not file-backed, hence private", megabytes("session_private_bytes")),
        row("proportional share (Pss), one process", megabytes("one_process_pss_bytes")),
        row("proportional share, each of two processes", megabytes("two_processes_pss_bytes_each")),
        row("session creation, median of 5", lambda case: f"{case['session_creation_seconds']:.3f} s"),
        row("reading the file, median of 5", lambda case: f"{case['read_file_seconds']:.3f} s"),
        row("creation / reading", lambda case: f"{case['creation_to_read']:.2f} x"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report, or -")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    cases = [measure(arguments.megabytes, bits, outliers) for bits, outliers in CASES]
    document = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "kernels": claq_runtime.kernels()[0],
        "onnxruntime": onnxruntime.__version__,
        "cases": cases,
    }
    lines = [
        "# Loading an artifact",
        "",
        f"Written by `benchmarks/runtime_load.py` on {document['date']}: {document['cpu']}, kernels {document['kernels']}, "
        f"ONNX Runtime {document['onnxruntime']}; layers of {SIZE}x{OUT_FEATURES}.",
        "",
        *table(cases),
        "",
    ]
    print("\n".join(lines))
    if arguments.out != "-":
        target = Path(arguments.out)
        target.mkdir(parents=True, exist_ok=True)
        (target / "runtime_load.json").write_text(json.dumps(document, indent=1) + "\n")
        (target / "runtime_load.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
