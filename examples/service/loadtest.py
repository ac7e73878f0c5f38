"""Loads the service before and after its move to claq, on this machine only, and writes the figures into README.md.

    python loadtest.py --model ./all-MiniLM-L6-v2 --generator ./SmolLM2-135M    # Hugging Face folders

The ONNX files go to ./service-models once.

Each variant runs as its own process on 127.0.0.1. The variants take turns, a round each, so that a busy machine is
busy for all of them. Requests and time are bounded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import httpx
import numpy as np

HERE = Path(__file__).resolve().parent
START, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
PATIENCE = 300.0
"""Seconds that a service may take to start: ONNX Runtime alone unpacks all weights first."""

SENTENCES = (
    "The committee will meet again on Thursday to discuss the budget for the coming year.",
    "Rain fell all night, and by morning the lower fields were under water.",
    "How do I change the delivery address of an order that has been paid already?",
    "She had never seen the sea before, and for a long while she said nothing at all, only listening to the waves.",
    "The engine does not start when it is cold.",
    "Shares lost much of their value at the start of the week, before recovering on Wednesday.",
    "A cat sleeps on the warm windowsill.",
    "The patient reports headaches in the morning that go away after breakfast.",
)

PROMPTS = (
    "Once upon a time, in a small village by the sea, there lived an old man who",
    "The three most important things to know about the history of the railway are",
    "Question: Why does ice float on water? Answer:",
    "Dear customer, we are sorry to hear that your order has not arrived. We",
)


@dataclass
class Variant:
    """A service to measure: which program on which files."""

    title: str
    app: str
    encoder: Path
    generator: Path

    @property
    def bytes(self) -> int:
        """Size of both models' files."""
        files = (path for file in (self.encoder, self.generator) for path in file.parent.glob("model.onnx*"))
        return sum(path.stat().st_size for path in files)


@dataclass
class Service:
    """A running service and what was measured of it, in seconds.

    Attributes:
        latencies: of whole requests for embeddings; ``embed_seconds`` passed meanwhile.
        first, later: until a text's first token, and from each token to the next; ``generate_seconds`` passed meanwhile.
    """

    variant: Variant
    url: str
    process: subprocess.Popen[bytes]
    latencies: list[float] = field(default_factory=list)
    embed_seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    generate_seconds: float = 0.0

    def embed(self, client: httpx.Client, sentences: list[str]) -> np.ndarray:
        start = time.perf_counter()
        response = client.post(f"{self.url}/embed", json={"sentences": sentences})
        response.raise_for_status()
        self.latencies.append(time.perf_counter() - start)
        return np.array(response.json()["embeddings"])

    def generate(self, client: httpx.Client, prompt: str, count: int) -> list[int]:
        last, tokens = time.perf_counter(), []
        body = {"prompt": prompt, "max_new_tokens": count}
        with client.stream("POST", f"{self.url}/generate", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                now = time.perf_counter()
                (self.later if tokens else self.first).append(now - last)
                last = now
                tokens.append(json.loads(line)["token"])
        return tokens

    def clear(self) -> None:
        """Forget what was measured so far."""
        for times in (self.latencies, self.first, self.later):
            times.clear()
        self.embed_seconds = self.generate_seconds = 0.0

    def memory(self) -> float:
        """Proportional resident memory in MB: pages shared with other processes count in part."""
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e3
        raise RuntimeError("the kernel does not tell a process's proportional memory")


def prepare_encoder(model: Path, folder: Path) -> tuple[Path, Path]:
    """The float32 and the claq file of a sentence encoder's folder, made once."""
    plain, claq = folder / "float32" / "model.onnx", folder / "claq" / "model.onnx"
    if not claq.is_file():
        import claq_export

        claq_export.export(model, out=claq, config=claq_export.Config(bits=4))
    if not plain.is_file():
        from claq_export.capture import capture_pretrained
        from claq_export.emit.exporter import emit_onnx

        plain.parent.mkdir(parents=True, exist_ok=True)
        captured = capture_pretrained(model)
        emit_onnx(
            captured.graph_module,
            captured.example_inputs,
            plain,
            dynamic_shapes=captured.dynamic_shapes,
            output_names=captured.output_names,
        )
        (plain.parent / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    return plain, claq


def prepare_generator(model: Path, folder: Path) -> tuple[Path, Path]:
    """The float32 and the claq file of a language model's folder, made once, with equally few operators."""
    plain, claq = folder / "float32-generator" / "model.onnx", folder / "claq-generator" / "model.onnx"
    if not claq.is_file():
        import claq_export

        config = claq_export.Config(bits=4, samples=32, sequence_length=512, last_logits=True)
        claq_export.export(model, out=claq, config=config)
    if not plain.is_file():
        from claq_export.capture import capture_decoder, load_pretrained
        from claq_export.compiler import emit_captured
        from claq_export.emit.companions import copy_companions
        from claq_export.passes import (
            AdditiveMasks,
            CanonicalizeLinears,
            LastLogits,
            PassContext,
            Pipeline,
            RemoveNoops,
            decoder_pipeline,
        )

        plain.parent.mkdir(parents=True, exist_ok=True)
        captured, context = capture_decoder(load_pretrained(model)[0]), PassContext(task="text-generation")
        single = Pipeline([AdditiveMasks(), RemoveNoops(), CanonicalizeLinears(), LastLogits()])
        for passes in (single, decoder_pipeline()):
            passes.run(captured.graph_module, context)
        emit_captured(captured, plain)
        copy_companions(model, plain.parent)
    return plain, claq


@contextmanager
def serving(variant: Variant, threads: int):
    """A service on a free port of 127.0.0.1; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", f"{variant.app}:app", "--host", "127.0.0.1", "--port", str(port)]
    files = {"MODEL": str(variant.encoder.resolve()), "GENERATOR": str(variant.generator.resolve())}
    environment = {**os.environ, **files, "THREADS": str(threads)}
    process = subprocess.Popen([*command, "--log-level", "warning"], cwd=HERE, env=environment)
    service = Service(variant, f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                httpx.get(f"{service.url}/health", timeout=1).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{variant.title}: the service did not start") from None
                time.sleep(0.1)
        yield service
    finally:
        process.terminate()
        process.wait(10)


def at_once(clients: int, deadline: float, jobs: Iterable[Callable[[], object]]) -> float:
    """Run jobs from several clients, none after the deadline; the seconds it took."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda job: time.monotonic() < deadline and job(), jobs))
    return time.perf_counter() - start


def load(service: Service, options: argparse.Namespace, deadline: float) -> None:
    """One round of requests of both kinds."""
    sentences = cycle(SENTENCES)
    bodies = [list(islice(sentences, options.batch)) for _ in range(options.requests)]
    prompts = list(islice(cycle(PROMPTS), options.texts))
    with httpx.Client(timeout=60) as client:
        jobs = [partial(service.embed, client, body) for body in bodies]
        service.embed_seconds += at_once(options.concurrency, deadline, jobs)
        jobs = [partial(service.generate, client, prompt, options.new_tokens) for prompt in prompts]
        service.generate_seconds += at_once(options.concurrency, deadline, jobs)


def percentiles(times: list[float]) -> str:
    """Cells of the median and of two percentiles, in milliseconds."""
    steps = statistics.quantiles(times, n=100, method="inclusive")
    return " | ".join(f"{1e3 * steps[percent - 1]:.1f} ms" for percent in (50, 95, 99))


def tables(services: list[Service], vectors: list[np.ndarray], settings: str) -> str:
    """The figures as Markdown: files and memory, embeddings, texts."""
    lines = ["| | files of both models | memory of the process |", "|---|---|---|"]
    for service in services:
        lines.append(f"| {service.variant.title} | {service.variant.bytes / 1e6:.1f} MB | {service.memory():.0f} MB |")
    lines += ["", "| `/embed` | p50 | p95 | p99 | requests/s | cosine to the first row |", "|---|---|---|---|---|---|"]
    for service, own in zip(services, vectors, strict=True):
        rate, cosine = len(service.latencies) / service.embed_seconds, float((own * vectors[0]).sum(1).mean())
        lines.append(f"| {service.variant.title} | {percentiles(service.latencies)} | {rate:.1f} | {cosine:.4f} |")
    lines += ["", "| `/generate` | first token p50 | p95 | p99 | each further token p50 | p95 | p99 | tokens/s |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for service in services:
        rate = (len(service.first) + len(service.later)) / service.generate_seconds
        times = f"{percentiles(service.first)} | {percentiles(service.later)}"
        lines.append(f"| {service.variant.title} | {times} | {rate:.1f} |")
    return "\n".join([*lines, "", settings, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of all-MiniLM-L6-v2")
    parser.add_argument("--generator", type=Path, required=True, help="Hugging Face folder of a causal language model")
    parser.add_argument("--folder", type=Path, default=Path("service-models"), help="where the ONNX files go")
    parser.add_argument(
        "--requests", type=int, default=60, help="embeddings, a round and variant (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=4, help="sentences a request (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=8, help="texts, a round and variant (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=2, help="clients at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each session (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=240.0, help="no request after so long (default: %(default)s)")
    parser.add_argument("--note", default="", help="a word about the machine, for the tables")
    parser.add_argument("--readme", type=Path, help="file to write the tables into (default: print them only)")
    options = parser.parse_args()

    encoders = prepare_encoder(options.model, options.folder)
    generators = prepare_generator(options.generator, options.folder)
    (plain, claq) = zip(encoders, generators, strict=True)
    variants = (
        Variant("before: float32", "before", *plain),
        Variant("before, claq files (ONNX Runtime alone)", "before", *claq),
        Variant("after: claq files and claq-runtime", "after", *claq),
    )
    with ExitStack() as stack:
        services = [stack.enter_context(serving(variant, options.threads)) for variant in variants]
        with httpx.Client(timeout=60) as client:
            vectors = [service.embed(client, list(SENTENCES)) for service in services]
            texts = [service.generate(client, PROMPTS[0], options.new_tokens) for service in services]
        for service in services:
            service.clear()
        deadline = time.monotonic() + options.seconds
        for _ in range(options.rounds):
            for service in services:
                load(service, options, deadline)
        settings = (
            f"{options.batch} sentences a request; texts of {options.new_tokens} tokens after prompts of 10 to 20; "
            f"{options.concurrency} clients at once, {options.threads} thread(s) a session, {len(services[0].latencies)} "
            f"requests for embeddings and {len(services[0].first)} texts a variant in {options.rounds} interleaved rounds; "
            f"{platform.machine()}, {os.cpu_count()} cores. {options.note}"
        )
        figures = tables(services, vectors, settings.strip())
    for service, tokens in zip(services, texts, strict=True):
        print(f"{service.variant.title}: {tokens}")
    print(figures)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        head, _, rest = text.partition(START)
        options.readme.write_text(head + START + figures + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
