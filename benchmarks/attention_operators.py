"""Attention to a cache: ``ClaqCachedAttention`` of claq-runtime beside ONNX Runtime's ``Attention`` of opset 23 and
``GroupQueryAttention``; the cache is copied or, where the operator can, in place, and in claq's case in float16.

    python benchmarks/attention_operators.py [--threads 2] [--out -]

A session of eight layers a variant, heads as in SmolLM2-135M (9 for queries, 3 for keys, of size 64), io binding, runs in
turns. The figure is the tenth percentile: what a layer takes while nothing else runs, also on a machine with other work.
In place, past and present are one buffer of 8,192 tokens; then the new token alone is written, where the others copy the
whole cache at each step.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from cpu_matmul import cpu_name
from onnx import TensorProto, helper
from settled import settled_turn

import claq_runtime

HEADS, KV_HEADS, SIZE, LAYERS, CAPACITY = 9, 3, 64, 8, 8192
LENGTHS = ((1, 16), (1, 64), (1, 512), (1, 2000), (1, 8000), (512, 0))
"""New tokens and cached tokens."""


def model(kind: str, cache: type[Any] = np.float32) -> onnx.ModelProto:
    """Attentions in a row, each with a cache of its own; keys and values are the same for all."""
    cache_type = helper.np_dtype_to_tensor_dtype(np.dtype(cache))

    def value(name: str, *shape: str | int, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [
        value("q", 1, "s", HEADS * SIZE),
        value("k", 1, "s", KV_HEADS * SIZE),
        value("v", 1, "s", KV_HEADS * SIZE),
    ]
    if kind == "GroupQueryAttention":
        inputs += [value("seqlens", 1, kind=TensorProto.INT32), value("total", kind=TensorProto.INT32)]
    else:
        inputs.append(value("mask", 1, 1, "s", "t"))
    nodes, outputs, query = [], [], "q"
    for layer in range(LAYERS):
        past, present = [f"past_k{layer}", f"past_v{layer}"], [f"present_k{layer}", f"present_v{layer}"]
        inputs += [value(name, 1, KV_HEADS, "p", SIZE, kind=cache_type) for name in past]
        outputs += [value(name, 1, KV_HEADS, "t", SIZE, kind=cache_type) for name in present]
        result = [f"y{layer}", *present]
        operands = [query, "k", "v", *past, "seqlens", "total"]
        settings: dict[str, Any] = {"domain": "com.microsoft", "num_heads": HEADS, "kv_num_heads": KV_HEADS}
        if kind != "GroupQueryAttention":
            operands = [query, "k", "v", "mask", *past]
            settings = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": SIZE**-0.5}
            if kind == "ClaqCachedAttention":
                settings["domain"] = "com.claq"
        nodes.append(helper.make_node(kind, operands, result, **settings))
        query = result[0]
    outputs.append(value(query, 1, "s", HEADS * SIZE))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("com.claq", 1)]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Numbers that float16 expresses, so that a cache in it holds the same ones as the others."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def tensor(*shape: int) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(numbers(0, *shape).astype(np.float32))


def step(session: ort.InferenceSession, new: int, cached: int, shared: bool) -> Callable[[], np.ndarray]:
    """A run of the session on bound inputs; returns what the last layer makes."""
    binding = session.io_binding()
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        binding.bind_ortvalue_input(name, tensor(1, new, heads * SIZE))
    types = {value.name: value.type for value in session.get_inputs()}
    if "mask" in types:
        later = np.arange(cached + new)[None] > np.arange(cached, cached + new)[:, None]
        binding.bind_cpu_input("mask", np.where(later, np.finfo(np.float32).min / 2, np.float32(0))[None, None])
    else:
        binding.bind_cpu_input("seqlens", np.array([cached + new - 1], np.int32))
        binding.bind_cpu_input("total", np.array(cached + new, np.int32))
    for name in sorted(name for name in types if name.startswith("past")):
        kind = np.float16 if "float16" in types[name] else np.float32
        content = np.zeros((1, KV_HEADS, CAPACITY if shared else cached, SIZE), kind)
        content[:, :, :cached] = numbers(1, 1, KV_HEADS, cached, SIZE)
        buffer = ort.OrtValue.ortvalue_from_numpy(content)
        binding.bind_ortvalue_input(name, buffer)
        if shared:
            binding.bind_ortvalue_output(name.replace("past", "present"), buffer)
    fresh = [value.name for value in session.get_outputs() if not shared or value.name.startswith("y")]

    def run() -> np.ndarray:
        for name in fresh:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[len(session.get_outputs()) - 1].numpy()

    return run


def measure(threads: int, seconds: float) -> list[str]:
    """Rows of the table."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    claq_runtime.register(options)
    claq, plain, grouped = (
        ort.InferenceSession(model(kind).SerializeToString(), options)
        for kind in ("ClaqCachedAttention", "Attention", "GroupQueryAttention")
    )
    narrow = ort.InferenceSession(model("ClaqCachedAttention", np.float16).SerializeToString(), options)
    rows = []
    for new, cached in LENGTHS:
        runs = {
            "ClaqCachedAttention": step(claq, new, cached, False),
            "ClaqCachedAttention, in place": step(claq, new, cached, True),
            "ClaqCachedAttention, in place, float16": step(narrow, new, cached, True),
            "Attention": step(plain, new, cached, False),
            "GroupQueryAttention": step(grouped, new, cached, False),
            "GroupQueryAttention, in place": step(grouped, new, cached, True),
        }
        first, *others = [run() for run in runs.values()]
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-3, atol=1e-4)
        times: dict[str, list[float]] = {name: [] for name in runs}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times["Attention"]) < 20:
            for name, run in runs.items():
                times[name] += settled_turn(run)
        cells = [sorted(values)[len(values) // 10] / LAYERS * 1e6 for values in times.values()]
        rows.append(f"| {new}, {cached} | " + " | ".join(f"{cell:,.0f} µs" for cell in cells) + " |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "attention_operators.md"), help="or -")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = measure(options.threads, options.seconds)
    text = "\n".join(
        [
            "# Attention operators",
            "",
            f"Written by `benchmarks/attention_operators.py` on {datetime.date.today().isoformat()}: {cpu_name()}, ONNX "
            f"Runtime {ort.__version__}, {options.threads} threads, load average {load:.0f} at the start. Time of a "
            "layer, tenth percentile.",
            "",
            "| new, cached | ClaqCachedAttention | cache in place | in float16 "
            "| Attention (opset 23) | GroupQueryAttention | cache in place |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    if options.out != "-":
        Path(options.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
