"""Latency of a sentence encoder in ONNX Runtime: claq beside float32, dynamic int8 and 4-bit MatMulNBits, in one run.

    claq-export FOLDER --bits 4 --out minilm/model.onnx
    python benchmarks/minilm_latency.py --model FOLDER --artifact minilm/model.onnx

The float32 model is exported by PyTorch's own exporter; its peers are made of it by ONNX Runtime's tools: `quantize_dynamic`
(int8 weights and activations) and `MatMulNBitsQuantizer` (4 bits, blocks of 32, accuracy_level 4). All sessions take turns;
medians of processor time are compared, which others' use of the machine inflates less than wall time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from cpu_matmul import cpu_name, report_name
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from transformers import AutoModel

import claq_runtime

BATCHES = ((1, 16), (1, 128), (32, 64))


def export_float(folder: str, path: Path) -> None:
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = torch.ones((2, 8), dtype=torch.int64)
    axes = {0: torch.export.Dim("batch", min=1, max=1024), 1: torch.export.Dim("sequence", min=2, max=512)}
    torch.onnx.export(
        model,
        (),
        str(path),
        kwargs={"input_ids": tokens, "attention_mask": tokens},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        input_names=["input_ids", "attention_mask"],
        dynamo=True,
        external_data=False,
    )


def session(path: Path, threads: int, claq: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if claq:
        claq_runtime.register(options)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sessions(model: str, artifact: Path, threads: int, folder: Path) -> dict[str, onnxruntime.InferenceSession]:
    plain, dynamic, blocks = (folder / name for name in ("float.onnx", "int8.onnx", "nbits.onnx"))
    export_float(model, plain)
    quantize_dynamic(plain, dynamic, weight_type=QuantType.QInt8)
    quantizer = MatMulNBitsQuantizer(onnx.load(plain), block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(blocks), use_external_data_format=False)
    found = {
        "float32": session(plain, threads),
        "dynamic int8": session(dynamic, threads),
        "MatMulNBits, 4 bits": session(blocks, threads),
    }
    for name in ("int8", "fp32"):
        os.environ["CLAQ_ACCURACY"] = name
        found[f"claq, {name}"] = session(artifact, threads, claq=True)
    del os.environ["CLAQ_ACCURACY"]
    return found


def feeds(found: onnxruntime.InferenceSession, batch: int, length: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(1000, 20000, (batch, length))
    values = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    return {value.name: values[value.name] for value in found.get_inputs()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of a BERT sentence encoder")
    parser.add_argument("--artifact", required=True, type=Path, help="the same model, written by claq-export")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="least time for each batch")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report, or -")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = sessions(arguments.model, arguments.artifact, arguments.threads, Path(folder))
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    columns: list[dict[str, float]] = []
    for batch, length in BATCHES:
        inputs = {name: feeds(each, batch, length) for name, each in found.items()}
        times: dict[str, list[float]] = {name: [] for name in found}
        start = time.perf_counter()
        while time.perf_counter() - start < arguments.seconds or len(times["float32"]) < 5:
            for name, each in found.items():
                begin = clock()
                each.run(None, inputs[name])
                times[name].append(clock() - begin)
        columns.append({name: float(np.median(values)) * 1e3 for name, values in times.items()})
    rows = []
    for name in found:
        cells = (f"{column[name]:.2f} ms ({column[name] / column['float32']:.2f})" for column in columns)
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    lines = [
        "# Latency of a sentence encoder",
        "",
        f"Written by `benchmarks/minilm_latency.py` on {datetime.date.today().isoformat()}: {cpu_name()}, "
        f"{arguments.threads} thread(s), load average {load:.1f} at the start, ONNX Runtime {onnxruntime.__version__}, "
        f"claq-runtime {claq_runtime.__version__}. Median of a run; in brackets, relative to float32.",
        "",
        "| | " + " | ".join(f"batch {batch}, {length} tokens" for batch, length in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
        *rows,
        "",
    ]
    print("\n".join(lines))
    if arguments.out != "-":
        target = Path(arguments.out)
        target.mkdir(parents=True, exist_ok=True)
        (target / f"minilm_latency_{report_name()}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
