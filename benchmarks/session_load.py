"""What it costs a service to open an artifact: session creation time and memory, with and without the native library.

    python benchmarks/session_load.py                      # layers of 2048 x 8192, 4 bits
    python benchmarks/session_load.py --model model.onnx   # a file of your own

Each session is made in a fresh process, in turns, and the medians are printed. Memory is what the process gained:
anonymous memory belongs to it alone, file-backed memory is shared by all processes that map the same file.

With ``--validation`` the share of the time that checking the layers takes is measured: every layer of the file is made
through the C interface, which validates it and copies its small tensors, and the sum is set against the creation of a
session. It is an upper bound, taken with the files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = """
import json, re, sys, time
import onnxruntime
def memory():
    status = open("/proc/self/status").read()
    return [int(re.search(key + r":\\s+(\\d+)", status)[1]) / 1024 for key in ("RssAnon", "RssFile")]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
if sys.argv[2] == "runtime":
    import claq_runtime
    claq_runtime.register(options)
before, start = memory(), time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
seconds, after = time.perf_counter() - start, memory()
print(json.dumps([seconds, after[0] - before[0], after[1] - before[1]]))
"""


def make_model(folder: Path, layers: int, out_features: int, in_features: int, bits: int) -> Path:
    """A chain of random layers, alternately ``in -> out`` and ``out -> in``."""
    import torch

    from claq_export.emit import emit_onnx
    from claq_export.format.layer import assemble
    from claq_export.modules import ClaqLinear

    generator = torch.Generator().manual_seed(0)

    def layer(n: int, k: int) -> ClaqLinear:
        codes = torch.randint(0, 2**bits, (k, n), generator=generator)
        centroids = torch.randint(-127, 128, (k, 16), dtype=torch.int8, generator=generator)
        scale, row_scale = torch.full((k,), 1e-3), torch.ones(n)
        return ClaqLinear(assemble(codes, centroids, scale, row_scale, torch.full((k,), bits)))

    sizes = [(out_features, in_features) if i % 2 == 0 else (in_features, out_features) for i in range(layers)]
    model = torch.nn.Sequential(*(layer(n, k) for n, k in sizes))
    example = {"input": torch.zeros(2, in_features)}
    return emit_onnx(model.eval(), example, folder / "model.onnx", dynamic_shapes={"input": {0: "rows"}}).path


_VALIDATION_CHILD = """
import json, sys, time
from pathlib import Path
import onnxruntime, claq_runtime, torch
from claq_export.evaluation.layers import artifact_layers
from claq_export.kernels.native import NativeLinear
arguments = []
for entry in artifact_layers(Path(sys.argv[1])):
    layer = entry.layer
    bias = torch.zeros(0)
    sizes = {"columns": layer.columns, "in_features": layer.in_features, "out_features": layer.out_features}
    arguments.append(((*layer.tensors().values(), bias), sizes))
made, sessions = [], []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    layers = [NativeLinear(*values, **sizes) for values, sizes in arguments]
    made.append(time.perf_counter() - start)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    claq_runtime.register(options)
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    sessions.append(time.perf_counter() - start)
print(json.dumps([sorted(made)[len(made) // 2], sorted(sessions)[len(sessions) // 2]]))
"""


def validation_share(path: Path, rounds: int) -> tuple[float, float]:
    """Median seconds of making all layers of a file through the C interface, and of creating a session."""
    child = [sys.executable, "-c", _VALIDATION_CHILD, str(path), str(rounds)]
    output = subprocess.run(child, capture_output=True, text=True, check=True).stdout
    made, session = json.loads(re.findall(r"\[.*\]", output)[-1])
    return made, session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an .onnx file; by default one is made from the options below")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out-features", type=int, default=8192)
    parser.add_argument("--in-features", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--validation", action="store_true", help="measure what checking the layers takes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or make_model(
            Path(folder), options.layers, options.out_features, options.in_features, options.bits
        )
        files = [path, *path.parent.glob(path.name + "*.data")]
        print(f"files: {sum(file.stat().st_size for file in files if file.is_file()) / 1e6:.1f} MB")
        if options.validation:
            made, session = validation_share(path, options.rounds)
            share = 100 * made / session
            print(f"layers checked and made in {1e3 * made:.2f} ms, session in {1e3 * session:.2f} ms: {share:.1f} %")
            return
        results: dict[str, list[list[float]]] = {"stock": [], "runtime": []}
        for _ in range(options.rounds):
            for name, runs in results.items():
                child = [sys.executable, "-c", _CHILD, str(path), name]
                output = subprocess.run(child, capture_output=True, text=True, check=True).stdout
                runs.append(json.loads(re.findall(r"\[.*\]", output)[-1]))
    print("| session | created in | own memory | shared memory |\n|---|---|---|---|")
    for name, runs in results.items():
        seconds, own, shared = (statistics.median(run[i] for run in runs) for i in range(3))
        print(f"| {name} | {seconds:.2f} s | {own:.0f} MB | {shared:.0f} MB |")


if __name__ == "__main__":
    main()
