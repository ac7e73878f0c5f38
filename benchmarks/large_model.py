"""Exports a random-weight Llama that is larger than the memory it may take, and reports what the system measured.

    python benchmarks/large_model.py --folder DIR --gigabytes 0.2 --memory 1GB         # a quick one
    python benchmarks/large_model.py --folder DIR --gigabytes 8 --memory 4GB --calibration none

The model is written shard by shard (float16, random weights), so making it takes little memory too. The export runs in
a process of its own; its peak resident memory is the operating system's (``ru_maxrss`` of the finished child, files
mapped into memory included). With ``--address-space`` the system also refuses it more virtual memory than that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "support")]


def make_model(folder: Path, gigabytes: float, hidden: int, ffn: int, vocabulary_factor: int) -> int:
    """Write a Llama of about ``gigabytes`` of float16 weights, a layer a shard; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from tiny_models import save_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = save_tokenizer(folder)
    vocabulary = max(words, vocabulary_factor * 1000)
    per_layer = 4 * hidden * hidden + 3 * hidden * ffn
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / per_layer))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float32) * shape[-1] ** -0.5).half()

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(value.nbytes for value in tensors.values())

    shard("embed.safetensors", {"model.embed_tokens.weight": tensor(vocabulary, hidden)})
    for i in range(layers):
        prefix = f"model.layers.{i}"
        tensors = {f"{prefix}.self_attn.{part}_proj.weight": tensor(hidden, hidden) for part in "qkvo"}
        tensors |= {f"{prefix}.mlp.{part}_proj.weight": tensor(ffn, hidden) for part in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = tensor(hidden, ffn)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.float16)
        shard(f"layer-{i:03}.safetensors", tensors)
    shard(
        "head.safetensors",
        {"model.norm.weight": torch.ones(hidden, dtype=torch.float16), "lm_head.weight": tensor(vocabulary, hidden)},
    )
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 128),
        "num_key_value_heads": max(1, hidden // 128),
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return total


def export(model: Path, out: Path, memory: str, options: list[str], address_space: int | None) -> dict[str, object]:
    """Run the command line in a child; what it said and what the system measured."""

    def limit() -> None:
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    log = out.parent / "log.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "claq_export", str(model), "--out", str(out), "--memory", memory, "--quiet"]
    command += ["--log", str(log), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    child = subprocess.Popen(command, env=environment, preexec_fn=limit)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    predicted = next((event["predicted"] for event in events if "predicted" in event), {})
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": round(seconds, 1),
        "peak_resident_bytes": usage.ru_maxrss * 1024,
        "predicted": {key: predicted.get(key) for key in ("memory", "disk", "artifact", "seconds")},
        "artifact_bytes": sum(
            p.stat().st_size for p in out.parent.iterdir() if p.name.startswith(out.name + ".") or p == out
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where model and artifact are made")
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32, help="thousands of tokens")
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--address-space", type=int, help="RLIMIT_AS of the export, bytes")
    parser.add_argument("--keep", action="store_true", help="do not delete model and artifact")
    options, rest = parser.parse_known_args()
    model = options.folder / "model"
    nbytes = make_model(model, options.gigabytes, options.hidden, options.ffn, options.vocabulary)
    result = export(model, options.folder / "out" / "model.onnx", options.memory, rest, options.address_space)
    print(json.dumps({"model_bytes": nbytes, "options": rest, **result}))
    if not options.keep:
        shutil.rmtree(model)
        shutil.rmtree(options.folder / "out")
    sys.exit(int(result["status"] != 0))  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
