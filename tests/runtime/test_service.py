"""libclaq in a service: concurrency, session churn, forks, double loading, little memory, signals; each in a process of its
own. ``CLAQ_ORT120_PYTHON`` (see the README of the tests' support) repeats the concurrent ones on ONNX Runtime 1.20."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from runtime_layers import make_layer, make_model

import claq_runtime

PROGRAM = Path(__file__).with_name("service_stress.py")
CHECKS = (
    "threads",
    "churn",
    "memory_of_runs",
    "two_models",
    "fork_session",
    "fork_library",
    "twice",
    "little_memory",
    "signals",
)


def write_models(folder: Path) -> None:
    """Two models of one layer each: mixed widths with outliers and int8 arithmetic, and 2 bits in float32."""
    for name, (features, widths, level) in {"a": (192, {4: 64, 3: 64, 2: 64}, 4), "b": (128, {2: 128}, 0)}.items():
        layer = make_layer(96, features, widths, ordered=True, outliers=0.01, bias=True)
        onnx.save(make_model(layer, accuracy_level=level), folder / f"{name}.onnx")
        if name == "a":
            np.savez(folder / "layer.npz", **layer.tensors, **layer.attributes)
        rng = np.random.default_rng(0)
        inputs = {
            f"x{i}": rng.normal(size=(1, rows, features)).astype(np.float32) for i, rows in enumerate((1, 3, 9, 40))
        }
        np.savez(folder / f"{name}.npz", **inputs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    write_models(folder)
    return folder


def run_check(python: str, folder: Path, check: str, *options: str) -> dict:
    environment = {key: value for key, value in os.environ.items() if python == sys.executable or key[:6] != "PYTHON"}
    result = subprocess.run(
        [python, PROGRAM, folder, claq_runtime.library_path(), check, *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_holds(models, check):
    assert run_check(sys.executable, models, check, "--seconds", "1.5", "--runs", "10000")["check"] == check


@pytest.mark.skipif(not os.environ.get("CLAQ_ORT120_PYTHON"), reason="needs CLAQ_ORT120_PYTHON, an ONNX Runtime 1.20")
@pytest.mark.parametrize("check", ["threads", "twice", "fork_session"])
def test_holds_on_the_oldest_onnx_runtime(models, check):
    found = run_check(os.environ["CLAQ_ORT120_PYTHON"], models, check, "--seconds", "1")
    assert found["onnxruntime"].startswith("1.20")
