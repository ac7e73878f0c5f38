"""Loads the service before and after its move to claq, on this machine only, and writes the figures into README.md.

    python loadtest.py --model ./all-MiniLM-L6-v2      # a Hugging Face folder; artifacts go to ./service-models once

Each variant runs as its own process on 127.0.0.1. The variants take turns, a round each, so that a busy machine is
busy for all of them. Requests and time are bounded.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import httpx
import numpy as np

HERE = Path(__file__).resolve().parent
START, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
PATIENCE = 60.0
"""Seconds that a service may take to start."""

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


@dataclass
class Service:
    """A running service and what was measured of it."""

    title: str
    file: Path
    url: str
    process: subprocess.Popen[bytes]
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def embed(self, client: httpx.Client, sentences: list[str]) -> np.ndarray:
        start = time.perf_counter()
        response = client.post(f"{self.url}/embed", json={"sentences": sentences})
        response.raise_for_status()
        self.latencies.append(time.perf_counter() - start)
        return np.array(response.json()["embeddings"])

    def memory(self) -> float:
        """Proportional resident memory in MB: pages shared with other processes count in part."""
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e3
        raise RuntimeError("the kernel does not tell a process's proportional memory")


def prepare(model: Path, folder: Path) -> tuple[Path, Path]:
    """The float32 and the claq file of a Hugging Face folder, made once."""
    plain, claq = folder / "float32" / "model.onnx", folder / "claq" / "model.onnx"
    if not claq.is_file():
        import claq_export

        claq_export.export(model, out=claq, config=claq_export.Config(bits=4, accuracy="int8"))
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


@contextmanager
def serving(title: str, app: str, file: Path, threads: int):
    """A service on a free port of 127.0.0.1; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", f"{app}:app", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MODEL": str(file.resolve()), "THREADS": str(threads)}
    process = subprocess.Popen([*command, "--log-level", "warning"], cwd=HERE, env=environment)
    service = Service(title, file, f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                httpx.get(f"{service.url}/health", timeout=1).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{title}: the service did not start") from None
                time.sleep(0.1)
        yield service
    finally:
        process.terminate()
        process.wait(10)


def load(service: Service, requests: int, batch: int, concurrency: int, deadline: float) -> None:
    """Send requests from several clients; none is sent after the deadline."""
    sentences = cycle(SENTENCES)
    bodies = [list(islice(sentences, batch)) for _ in range(requests)]
    start = time.perf_counter()
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(concurrency) as clients:

        def send(body: list[str]) -> None:
            if time.monotonic() < deadline:
                service.embed(client, body)

        list(clients.map(send, bodies))
    service.seconds += time.perf_counter() - start


def table(services: list[Service], vectors: list[np.ndarray], settings: str) -> str:
    """The figures as Markdown."""
    lines = [
        "| | file | memory of the process | p50 | p95 | p99 | requests/s | cosine to the first row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for service, own in zip(services, vectors, strict=True):
        size = sum(path.stat().st_size for path in service.file.parent.glob("model.onnx*")) / 1e6
        steps = statistics.quantiles(service.latencies, n=100, method="inclusive")
        times = " | ".join(f"{1e3 * steps[percent - 1]:.1f} ms" for percent in (50, 95, 99))
        rate, cosine = len(service.latencies) / service.seconds, float((own * vectors[0]).sum(1).mean())
        lines.append(
            f"| {service.title} | {size:.1f} MB | {service.memory():.0f} MB | {times} | {rate:.1f} | {cosine:.4f} |"
        )
    return "\n".join([*lines, "", settings, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of all-MiniLM-L6-v2")
    parser.add_argument("--folder", type=Path, default=Path("service-models"), help="where the ONNX files go")
    parser.add_argument("--requests", type=int, default=60, help="a round and variant (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sentences a request (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=2, help="clients at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each session (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=240.0, help="no request after so long (default: %(default)s)")
    parser.add_argument("--note", default="", help="a word about the machine, for the table")
    parser.add_argument("--readme", type=Path, help="file to write the table into (default: print it only)")
    options = parser.parse_args()

    plain, claq = prepare(options.model, options.folder)
    variants = (
        ("before: float32", "before", plain),
        ("before, claq file (ONNX Runtime alone)", "before", claq),
        ("after: claq file and claq-runtime", "after", claq),
    )
    with ExitStack() as stack:
        services = [stack.enter_context(serving(*variant, options.threads)) for variant in variants]
        with httpx.Client(timeout=60) as client:
            vectors = [service.embed(client, list(SENTENCES)) for service in services]
        for service in services:
            service.latencies.clear()
        deadline = time.monotonic() + options.seconds
        for _ in range(options.rounds):
            for service in services:
                load(service, options.requests, options.batch, options.concurrency, deadline)
        settings = (
            f"{options.batch} sentences a request, {options.concurrency} clients at once, {options.threads} thread(s) a session, "
            f"{len(services[0].latencies)} requests a variant in {options.rounds} interleaved rounds; {platform.machine()}, "
            f"{os.cpu_count()} cores. {options.note}"
        )
        figures = table(services, vectors, settings.strip())
    print(figures)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        head, _, rest = text.partition(START)
        options.readme.write_text(head + START + figures + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
