"""Exports a random-weight Llama that is larger than the memory it may take, kills the export half-way, resumes it, opens the
artifact, and reports what the system measured.

    python benchmarks/large_model.py --folder DIR                        # about 8 GB of float16 under 4 GB
    python benchmarks/large_model.py --folder DIR --gigabytes 0.2 --hidden 1024 --ffn 2752 --memory 2GB       # a quick one
    python benchmarks/large_model.py --folder DIR --gigabytes 0.4 --hidden 1024 --ffn 2752 --memory 2GB --kills 8 \
        --steps make,whole,kill,export,open,write,clean --results large_model_killed

The model is written shard by shard (random weights of a Llama 2 7B's shapes, fewer layers), so making it takes little memory
too. Every step runs in a process of its own, whose peak resident memory is the operating system's (``ru_maxrss`` of the
finished child, files mapped into memory included). With ``--address-space`` the system also refuses the export more virtual
memory than that. With ``--kills N`` it is killed N times at random moments, drawn from the time that an export nobody kills
takes (the step ``whole``); every file of the artifact must then have the bytes of that one's. Steps can be run one by one
(``--steps``); what they measured is kept in ``DIR/record.json``.

What the command does not know it passes on to claq-export, in the place of ``--samples 8 --sequence-length 64``.
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "support")]

STEPS = ("make", "kill", "export", "open", "write", "clean")
MORE_STEPS = ("whole",)
CALIBRATION = ["--samples", "8", "--sequence-length", "64"]


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


def start_export(
    folder: Path, out: Path, memory: str, options: list[str], log: Path, address_space: int | None
) -> subprocess.Popen[bytes]:
    """The command line in a child."""

    def limit() -> None:
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "claq_export", str(folder / "model"), "--out", str(out), "--memory", memory]
    command += ["--quiet", "--log", str(log), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, env=environment, preexec_fn=limit)


def read_log(log: Path) -> list[dict[str, Any]]:
    """The events written so far; a line that a killed process left unfinished is dropped."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [json.loads(line) for line in lines]


def layers_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "layer"]


def has_ended(child: int) -> bool:
    """Whether a child process has ended; what the system measured of it is still to be had."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def export(
    folder: Path,
    memory: str,
    options: list[str],
    address_space: int | None,
    *,
    out: str = "out",
    kill_after_layers: int | None = None,
    kill_after_seconds: float | None = None,
) -> dict[str, Any]:
    """Run the command line, killed by SIGKILL once so many layers are finished or so many seconds have passed; what it said
    and what the system measured."""
    log = folder / f"log-{time.time():.0f}.jsonl"
    start = time.perf_counter()
    child = start_export(folder, folder / out / "model.onnx", memory, options, log, address_space)
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        os.kill(child.pid, signal.SIGKILL)  # nothing happens to one that has ended
    while kill_after_layers is not None and not has_ended(child.pid):
        time.sleep(1)
        if len(layers_of(read_log(log))) >= kill_after_layers:
            os.kill(child.pid, signal.SIGKILL)
            break
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    events = read_log(log)
    layers = layers_of(events)
    found = {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": round(seconds),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_resident_bytes": usage.ru_maxrss * 1024,
        "predicted": next((event["predicted"] for event in events if "predicted" in event), None),
        "layers": len(layers),
        "layers_resumed": sum(bool(event.get("restored")) for event in layers),
        "steps": next((e for e in events if e["event"] == "time"), None),
        "stages": [
            {"seconds": event["seconds"], "message": event["message"].replace(f"{folder}/", "")}
            for event in events
            if event["event"] == "stage"
        ],
        "disk_bytes": sum(path.stat().st_size for path in (folder / out).rglob("*") if path.is_file()),
    }
    return found


def open_artifact(path: Path, tokens: int) -> dict[str, Any]:
    """In a child: a session with claq's operators, some greedy tokens; what the system measured."""
    command = [sys.executable, __file__, "--folder", str(path.parent), "--steps", "generate", "--tokens", str(tokens)]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"the artifact cannot be opened: exit status {os.waitstatus_to_exitcode(status)}")
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return {
        **found,
        "seconds": round(time.perf_counter() - start),
        "peak_resident_bytes": usage.ru_maxrss * 1024,
    }


def generate(folder: Path, tokens: int) -> dict[str, Any]:
    """Load ``folder/model.onnx`` with claq-runtime and generate; fails if a logit is not finite."""
    import numpy as np

    import claq_runtime
    from claq_export.generation import Generator

    start = time.perf_counter()
    generator = Generator(folder / "model.onnx", Path(claq_runtime.library_path()), threads=2)
    loaded = time.perf_counter() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    new, past, length, made = [5, 7, 11, 13], generator.empty_cache(), 0, []
    for _ in range(tokens):
        logits, past = generator.step(np.array([new], np.int64), length, past)
        if not np.isfinite(logits).all():
            sys.exit("a logit is not finite")
        length += len(new)
        new = [int(logits[0, -1].argmax())]
        made.append(new[0])
    seconds = time.perf_counter() - start - loaded
    return {
        "load_seconds": round(loaded, 2),
        "resident_after_load_bytes": resident,
        "generate_seconds": round(seconds, 2),
        "tokens": made,
    }


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all(
        filecmp.cmp(a / name, b / name, shallow=False) for name in names
    )


def measured_artifact(folder: Path) -> int:
    """Bytes of the ONNX file and its data."""
    return sum(path.stat().st_size for path in (folder / "out").glob("model.onnx*") if path.is_file())


def quantization_minutes(record: dict[str, Any]) -> str:
    """How long quantization took where one process did all of it."""
    run = record.get("whole") or (record["export"] if not record.get("kills") else None)
    if run is None or not run["steps"]:
        return "see the table of processes"
    return f"{sum(value for key, value in run['steps'].items() if key not in ('event', 'seconds')) / 60:.1f} min"


def write_results(record: dict[str, Any], folder: Path, name: str) -> None:
    """``results/NAME.json`` and ``.md``."""
    machine = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown",
    )
    record |= {"date": datetime.date.today().isoformat(), "machine": f"{machine}, {os.cpu_count()} cores"}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    made, done = record["make"], record["export"]
    predicted = done["predicted"]
    lines = [
        f"# {made['bytes'] / 1e9:.2f} GB of float16 weights under `--memory {record['memory']}`",
        "",
        f"{record['date']}, {record['machine']}. A random-weight Llama: hidden {made['hidden']}, feed-forward {made['ffn']}, "
        f"{made['layers']} layers, vocabulary {made['vocabulary']:,}; `claq-export MODEL --memory {record['memory']} "
        f"{' '.join(record['options'])}`, {record['threads']} threads. {record['note']}".rstrip(),
        "",
        "| process | peak resident memory | wall time | processor time | layers finished |",
        "|---|---|---|---|---|",
    ]
    runs = [("killed by SIGKILL", run) for run in record.get("kills", [])]
    runs.append(("resumed" if runs else "export", done))
    if "whole" in record:
        runs.insert(0, ("not killed, in another folder", record["whole"]))
    for label, run in runs:
        lines.append(
            f"| {label} | {run['peak_resident_bytes'] / 1e9:.2f} GB | "
            f"{run['seconds'] / 60:.1f} min | {run['processor_seconds'] / 60:.1f} min | "
            f"{run['layers'] - run['layers_resumed']} ({run['layers_resumed']} from before) |"
        )
    if "whole" in record:
        lines += ["", "Every file of the artifact has the bytes of that of the export that nobody killed."]
    lines += [
        "",
        "| | predicted | measured |",
        "|---|---|---|",
        f"| peak memory | {predicted['memory'] / 1e9:.2f} GB | {done['peak_resident_bytes'] / 1e9:.2f} GB |",
        f"| artifact | {predicted['artifact'] / 1e9:.3f} GB | {record['artifact_bytes'] / 1e9:.3f} GB |",
        f"| disk while it runs | {predicted['disk'] / 1e9:.2f} GB | {done['disk_bytes'] / 1e9:.2f} GB left in the folder at "
        "the end, the work folder gone |",
        f"| time of quantization, wall | {predicted['seconds'] / 60:.1f} min | {quantization_minutes(record)} |",
        "",
    ]
    if done["steps"]:
        steps = {key: value for key, value in done["steps"].items() if key not in ("event", "seconds")}
        lines += [
            f"Seconds of the last process's quantization: {', '.join(f'{k} {v:.0f}' for k, v in steps.items())}.",
            "",
        ]
    opened = record.get("open")
    if opened:
        lines += [
            f"Opened with claq-runtime: loaded in {opened['load_seconds']} s, {opened['resident_after_load_bytes'] / 1e9:.2f} "
            f"GB resident then, {opened['peak_resident_bytes'] / 1e9:.2f} GB at the peak of generating "
            f"{len(opened['tokens'])} tokens in {opened['generate_seconds']} s, all logits finite.",
            "",
        ]
    (folder / f"{name}.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where model and artifact are made")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32, help="thousands of tokens")
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--address-space", type=int, help="RLIMIT_AS of the export, bytes")
    parser.add_argument(
        "--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)} (default: these) and {', '.join(MORE_STEPS)}"
    )
    parser.add_argument("--kills", type=int, default=0, help="times that step kill kills it at a random moment")
    parser.add_argument("--seed", type=int, default=0, help="of these moments")
    parser.add_argument("--results", default="large_model", help="name of the page and the record in results/")
    parser.add_argument(
        "--kill-at", type=float, default=0.5, help="share of the layers after which the export is killed"
    )
    parser.add_argument("--tokens", type=int, default=4, help="to generate with the artifact")
    parser.add_argument("--note", default="", help="about the machine, for the page")
    options, rest = parser.parse_known_args()
    rest = rest or CALIBRATION
    steps = options.steps.split(",")
    folder: Path = options.folder
    if steps == ["generate"]:
        print(json.dumps(generate(folder, options.tokens)))
        return
    kept = folder / "record.json"
    record: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    record |= {"memory": options.memory, "options": rest, "threads": threads, "note": options.note}
    for step in steps:
        if step == "make":
            start = time.perf_counter()
            nbytes = make_model(folder / "model", options.gigabytes, options.hidden, options.ffn, options.vocabulary)
            record["make"] = {"bytes": nbytes, "seconds": round(time.perf_counter() - start)}
        elif step == "whole":
            record["whole"] = run = export(folder, options.memory, rest, options.address_space, out="whole")
            if run["status"]:
                sys.exit(f"the export failed with status {run['status']}")
        elif step == "kill" and options.kills:
            rng = random.Random(options.seed)
            for _ in range(options.kills):
                moment = rng.uniform(0, record["whole"]["seconds"])
                run = export(folder, options.memory, rest, options.address_space, kill_after_seconds=moment)
                record.setdefault("kills", []).append(run)
        elif step == "kill":
            config = json.loads((folder / "model" / "config.json").read_text())
            half = int(4 * config["num_hidden_layers"] * options.kill_at)
            run = export(folder, options.memory, rest, options.address_space, kill_after_layers=half)
            record.setdefault("kills", []).append(run)
        elif step == "export":
            record["export"] = run = export(folder, options.memory, rest, options.address_space)
            if run["status"]:
                sys.exit(f"the export failed with status {run['status']}")
            record["artifact_bytes"] = measured_artifact(folder)
            if "whole" in record and not same_files(folder / "whole", folder / "out"):
                sys.exit("the artifact differs from that of an export that nobody killed")
        elif step == "open":
            record["open"] = open_artifact(folder / "out" / "model.onnx", options.tokens)
        elif step == "write":
            config = json.loads((folder / "model" / "config.json").read_text())
            record["make"] |= {
                "hidden": config["hidden_size"],
                "ffn": config["intermediate_size"],
                "layers": config["num_hidden_layers"],
                "vocabulary": config["vocab_size"],
            }
            write_results(record, HERE / "results", options.results)
        elif step == "clean":
            shutil.rmtree(folder / "model")
            shutil.rmtree(folder / "out")
            shutil.rmtree(folder / "whole", ignore_errors=True)
            kept.unlink()
            continue
        else:
            parser.error(f"no step {step!r}; there are {', '.join((*STEPS, *MORE_STEPS))}")
        kept.write_text(json.dumps(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
