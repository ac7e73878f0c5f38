"""Generation with an exported language model: equal tokens, decode and prefill speed beside MatMulNBits and llama.cpp.

    claq-export SMOLLM2 --out smol/model.onnx --last-logits
    python benchmarks/decoder.py smol [--threads 2] [--gguf Q4_K_M.gguf Q4_0.gguf] [--json results.json]

All runtimes take turns in one process, so that a busy machine slows them alike: compare the ratios. The peer
``MatMulNBits`` is the same graph with each claq layer replaced by ONNX Runtime's 4-bit operator (blocks of 32, accuracy
level 4), made from the dequantized weight, and what claq's operators do beside multiplying by plain operators, attention
included; sibling linears are stacked as in the artifact, or not, as most tools leave them. The third such graph keeps claq's
attention: what it and claq differ in is the linears. llama.cpp runs where llama-cpp-python is installed
and a file given. It computes the logits of a prompt's last token alone; with ``--last-logits`` the others do so too.

All read copies of their files that were written in one go: Linux keeps a file in memory in the pieces it was written in,
and weights that are mapped in pages of 4 KiB are read more slowly than those in pages of megabytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from cpu_matmul import cpu_name
from onnx import numpy_helper

import claq_export
import claq_runtime
from claq_export.emit.function import CACHED_ATTENTION
from claq_export.format import metadata
from claq_export.format.checkpoint import load_checkpoint
from claq_export.generation import Generator
from claq_export.modules import ClaqLinear
from claq_export.onnx_session import float32_arithmetic

BLOCK = 32


def written_at_once(source: Path, folder: Path) -> Path:
    """A copy of a file in ``folder``, in memory in pages as large as the file system has."""
    target = folder / source.name
    target.write_bytes(source.read_bytes())
    return target


def with_accuracy(source: Path, target: Path, level: int) -> Path:
    """The artifact with another ``accuracy_level``; it shares the data file."""
    model = onnx.load(str(source), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    target.write_bytes(model.SerializeToString())
    return target


def four_bit_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``MatMulNBits`` operands of ``weight[N, K]``: symmetric 4-bit codes and a scale a block of 32 inputs."""
    n, k = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -k % BLOCK))).reshape(n, -1, BLOCK)
    scale = np.abs(padded).max(-1, keepdims=True) / 7
    codes = np.clip(np.rint(padded / np.where(scale == 0, 1, scale)) + 8, 0, 15).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale[..., 0].astype(np.float32)


def as_nbits(folder: Path, target: Path, stacked: bool, keep_attention: bool = False) -> Path:
    """The same graph with ``MatMulNBits`` and plain operators in the place of every product by a claq layer.

    Args:
        folder: the artifact.
        target: file to write.
        stacked: one product for sibling linears and a ``Split``, as claq has it; False: a product each.
        keep_attention: claq's operator; False: ``Attention`` of ONNX Runtime.
    """
    model = onnx.load(str(folder / "model.onnx"))
    layers = load_checkpoint(folder).layers
    constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()

    def add(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> list[str]:
        nodes.append(onnx.helper.make_node(operator, inputs, outputs, f"{outputs[0]}.{operator}", **attributes))
        return outputs

    def constant(name: str, value: np.ndarray) -> str:
        if name not in done:
            done.add(name)
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def product(node: onnx.NodeProto, rows: slice, part: str, output: str) -> str:
        layer = layers[node.name.split("#")[0]]
        codes, scale = four_bit_blocks(layer.dequantize(torch.float32).numpy()[rows])
        inputs = [node.input[0], constant(f"{part}.nbits", codes), constant(f"{part}.nbits_scale", scale.reshape(-1))]
        bias = constants[node.input[9]]
        if bias.size:
            inputs += ["", "", constant(f"{part}.bias", bias[rows])]
        attributes = {"K": layer.in_features, "N": len(codes), "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return add("MatMulNBits", inputs, [output], domain="com.microsoft", **attributes)[0]

    def parts_of(node: onnx.NodeProto, sizes: list[int], outputs: list[str]) -> list[str]:
        if stacked:
            whole = product(node, slice(None), node.name, f"{node.name}.product")
            return add("Split", [whole, constant(f"{node.name}.sizes", np.array(sizes, np.int64))], outputs, axis=-1)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        pieces = zip(starts, sizes, outputs, strict=True)
        return [product(node, slice(start, start + size), name, name) for start, size, name in pieces]

    for node in model.graph.node:
        given = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "ClaqMatMul":
            product(node, slice(None), node.name, node.output[0])
        elif node.op_type == "ClaqMatMulAdd":
            linear = product(node, slice(None), node.name, f"{node.name}.product")
            add("Add", [linear, node.input[10]], [node.output[0]])
        elif node.op_type == "ClaqMatMulAddNorm":
            linear = product(node, slice(None), node.name, f"{node.name}.product")
            epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
            (total,) = add("Add", [linear, node.input[10]], [node.output[0]])
            add("RMSNormalization", [total, node.input[11]], [node.output[1]], axis=-1, epsilon=epsilon)
        elif node.op_type in ("ClaqMatMulSplit", "ClaqMatMulRotary"):
            sizes = [given[f"split_{index}"] for index in range(3) if given[f"split_{index}"]]
            names = list(node.output[: len(sizes)])
            if node.op_type == "ClaqMatMulSplit":
                parts_of(node, sizes, names)
                continue
            pieces = parts_of(node, sizes, [f"{node.name}.{index}" for index in range(2)] + names[2:])
            for index in range(2):
                settings = {"num_heads": given[f"heads_{index}"], "rotary_embedding_dim": given["rotary_dim"]}
                add("RotaryEmbedding", [pieces[index], *node.input[10:12]], [names[index]], **settings)
        elif node.op_type == "ClaqMatMulSwiGLU":
            half = given["out_features"] // 2
            gate, up = parts_of(node, [half, half], [f"{node.name}.gate", f"{node.name}.up"])
            (sigmoid,) = add("Sigmoid", [gate], [f"{node.name}.sigmoid"])
            (activated,) = add("Mul", [gate, sigmoid], [f"{node.name}.silu"])
            add("Mul", [activated, up], [node.output[0]])
        elif node.op_type == CACHED_ATTENTION and not keep_attention:
            settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            add("Attention", list(node.input), list(node.output), **settings)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if not keep_attention:  # ONNX's operator takes no buffers
        properties = {prop.key: prop.value for prop in model.metadata_props if prop.key != metadata.CACHE_BUFFERS}
        onnx.helper.set_model_props(model, properties)
    used = {name for node in nodes for name in node.input}
    kept = [value for value in model.graph.initializer if value.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    with tempfile.TemporaryDirectory(dir=target.parent) as pieces:
        onnx.save(model, f"{pieces}/{target.name}", save_as_external_data=True, location=f"{target.name}.data")
        for file in Path(pieces).iterdir():
            written_at_once(file, target.parent)
    return target


def torch_model(folder: Path) -> Any:
    """The artifact's quantized model in PyTorch, in float32 arithmetic whatever the artifact asks for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = claq_export.load(folder, AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
    for module in model.modules():
        if isinstance(module, ClaqLinear):
            module.accuracy_level = 0
    return model


def agreement(folder: Path, prompt: list[int], count: int, threads: int) -> dict[str, Any]:
    """Greedy tokens and logits of ONNX Runtime with claq-runtime in float32 against the quantized PyTorch model."""
    model = torch_model(folder)
    with float32_arithmetic():
        generator = Generator(folder, Path(claq_runtime.library_path()), threads)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        logits = model(ids).logits.numpy()
    found, _ = generator.step(ids.numpy(), 0, generator.empty_cache())
    logits = logits[:, -found.shape[1] :]
    error = float(np.abs(found - logits).max() / np.abs(logits).max())
    return {"equal_tokens": list(generator.tokens(prompt, count)) == wanted, "tokens": count, "logits_error": error}


Run = Callable[[], list[float]]


def turns(names: Sequence[str], count: int) -> Iterator[tuple[int, str]]:
    """All names ``count`` times over, with the number of the turn; each turn begins with another."""
    for turn in range(count):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            yield turn, name


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """What each run returns (seconds a step), sorted; runs take turns, the first of which warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn, name in turns(list(runs), rounds + 1):
        seconds = runs[name]()
        if turn:
            times[name] += seconds
    return {name: sorted(values) for name, values in times.items()}


def fastest_tenth(times: list[float]) -> float:
    """The slowest of the fastest tenth: what a step takes while nothing else runs, also on a machine with other work."""
    return times[len(times) // 10]


def each(values: Iterable[object]) -> list[float]:
    """Seconds that each value of an iterator took."""
    times, last = [], time.perf_counter()
    for _ in values:
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times


def llama_tokens(path: Path, room: int, batch: int, threads: int) -> Callable[[list[int], int], Iterator[int]]:
    """llama.cpp's likeliest tokens after a prompt, as a function; at most ``room`` tokens, a prompt in pieces of ``batch``."""
    from llama_cpp import Llama, llama_get_logits_ith

    model = Llama(str(path), n_ctx=room, n_threads=threads, n_threads_batch=threads, n_batch=batch, verbose=False)

    def likeliest() -> int:
        # As the other runtimes are asked for it; llama.cpp's chain of samplers would take longer.
        return int(np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).argmax())

    def tokens(start: list[int], count: int) -> Iterator[int]:
        model.reset()
        new = start
        for _ in range(count):
            model.eval(new)
            new = [likeliest()]
            yield new[0]

    return tokens


def llama_runs(path: Path, prompt: list[int], long: list[int], count: int, threads: int) -> tuple[Run, Run]:
    """Decode and prefill of llama.cpp, in seconds a step, as functions."""
    tokens = llama_tokens(path, 1024, len(long), threads)
    return lambda: each(tokens(prompt, count))[1:], lambda: each(tokens(long, 1))


def operator_times(path: Path, prompt: list[int], count: int, threads: int) -> dict[str, float]:
    """Share of the time of each operator kind in decoding, from ONNX Runtime's profile."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = str(Path(scratch) / "profile")
        claq_runtime.register(options)
        generator = Generator(path, Path(claq_runtime.library_path()), threads)
        generator.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        list(generator.tokens(prompt, count))
        events = json.loads(Path(generator.session.end_profiling()).read_text())
    runs = [event for event in events if event["name"] == "model_run"]
    begin = runs[0]["ts"] + runs[0]["dur"]
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] > begin:
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    return {name: value / total for name, value in spent.most_common(12)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a language model exported by claq-export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="llama.cpp files of the same model")
    parser.add_argument("--skip-agreement", action="store_true", help="timings only")
    parser.add_argument("--note", default="", help="written into the results")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    vocabulary = json.loads((options.folder / "config.json").read_text())["vocab_size"]
    draw = np.random.default_rng(0).integers(3, vocabulary, options.prefill).tolist()
    prompt = draw[:16]
    results: dict[str, Any] = {
        "note": options.note,
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "load": os.getloadavg()[0],
        "threads": options.threads,
        "onnxruntime": ort.__version__,
        "artifact_bytes": sum(p.stat().st_size for p in options.folder.glob("model.onnx*") if p.is_file()),
    }
    if not options.skip_agreement:
        results["agreement"] = agreement(options.folder, prompt, options.new_tokens, options.threads)
        print(json.dumps(results["agreement"]))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for file in options.folder.glob("model.onnx*"):
            written_at_once(file, work)
        int8, fp32 = (
            with_accuracy(work / "model.onnx", work / f"{name}.onnx", level)
            for name, level in (("int8", 4), ("fp32", 0))
        )
        stacked = as_nbits(options.folder, work / "stacked.onnx", True)
        single = as_nbits(options.folder, work / "single.onnx", False)
        kept = as_nbits(options.folder, work / "kept.onnx", True, keep_attention=True)
        library = Path(claq_runtime.library_path())
        paths = {
            "claq int8": int8,
            "claq fp32": fp32,
            "MatMulNBits": stacked,
            "MatMulNBits, not stacked": single,
            "MatMulNBits, claq's attention": kept,
        }
        generators = {name: Generator(path, library, options.threads) for name, path in paths.items()}
        decode: dict[str, Run] = {}
        prefill: dict[str, Run] = {}
        for name, generator in generators.items():

            def run_decode(generator: Generator = generator) -> list[float]:
                return each(generator.tokens(prompt, options.new_tokens))[1:]

            def run_prefill(generator: Generator = generator) -> list[float]:
                return each(generator.tokens(draw, 1))

            decode[name], prefill[name] = run_decode, run_prefill
        for path in options.gguf:
            name = f"llama.cpp {path.stem}"
            results[f"bytes of {name}"] = path.stat().st_size
            decode[name], prefill[name] = llama_runs(
                written_at_once(path, work), prompt, draw, options.new_tokens, options.threads
            )
        steps, prompts = interleaved(decode, options.rounds), interleaved(prefill, max(options.rounds, 5))
        results["decode_tokens_per_second"] = {
            name: {"median": 1 / statistics.median(times), "fastest tenth": 1 / fastest_tenth(times)}
            for name, times in steps.items()
        }
        results["prefill_seconds"] = {
            name: {"median": statistics.median(times), "fastest": times[0]} for name, times in prompts.items()
        }
        for name in ("claq int8", "MatMulNBits"):
            results[f"operators of {name}"] = operator_times(paths[name], prompt, 32, options.threads)
    rates, seconds = results["decode_tokens_per_second"], results["prefill_seconds"]
    print(f"\n{'':30} tokens/s: median, of MatMulNBits; fastest tenth, of MatMulNBits    prefill: median, fastest")
    for name, rate in rates.items():
        shares = {kind: rate[kind] / rates["MatMulNBits"][kind] for kind in rate}
        print(
            f"{name:30} {rate['median']:16.1f} {shares['median']:15.2f} {rate['fastest tenth']:15.1f} "
            f"{shares['fastest tenth']:15.2f} {seconds[name]['median']:19.3f} s {seconds[name]['fastest']:.3f} s"
        )
    for name in ("claq int8", "MatMulNBits"):
        shares = ", ".join(f"{op} {share:.1%}" for op, share in results[f"operators of {name}"].items())
        print(f"time of {name} in decoding: {shares}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
