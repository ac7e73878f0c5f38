"""What the preflight predicts of a layer's working memory, against what the system measures."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import ctypes, json, sys
from pathlib import Path
import torch
from torch import fx
from claq_export.algorithm import Hessian, LayerSettings, quantize_layer
from claq_export.passes.plan import LinearSite
from claq_export.preflight import layer_bytes
from claq_export.process_memory import resident_bytes, trim_freed_memory

torch.set_num_threads(1)
# Every block of 64 KiB is mapped by itself: how much of the heap lies free before a layer is chance, some megabytes.
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

found = []
def measure(N, K, tokens):
    trim_freed_memory()
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    hessian = None
    if tokens:
        hessian = Hessian(K)
        for start in range(0, tokens, 512):
            hessian.add(torch.randn(min(512, tokens - start), K))
    weight = torch.randn(N, K)
    quantize_layer(weight, hessian, LayerSettings())
    node = fx.Graph().placeholder("x")
    site = LinearSite("a", "a.weight", [node] if tokens else [], K, N, torch.float32, [("a", N)])
    found.append((layer_bytes(site, tokens, LayerSettings()), peak() - before))

measure(64, 64, 0)
measure(128, 256, 256)  # libraries that the first call loads
measure(*json.loads(sys.argv[1]))
print(json.dumps(found[2]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the peak is read from /proc, and glibc's malloc is told")
def test_a_layer_takes_what_was_predicted() -> None:
    cases = {
        "tall, no calibration": (16384, 512, 0),
        "many inputs": (256, 2048, 1024),
        "few tokens": (4096, 2048, 256),
        "square": (2048, 1536, 1536),
    }
    root = Path(__file__).parents[2]
    for name, case in cases.items():
        # Each in a process of its own: what an earlier one freed would be taken again, and not be seen.
        command = [sys.executable, "-c", MEASURE, json.dumps(case)]
        # MKL would keep buffers of the first product it computes.
        environment = {**os.environ, "MKL_DISABLE_FAST_MM": "1"}
        output = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, env=environment).stdout
        predicted, measured = json.loads(output)
        assert measured <= 1.05 * predicted, name
        assert measured >= 0.5 * predicted, name
