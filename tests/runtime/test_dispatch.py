"""Which kernels are chosen, in processes to which benchmarks/hide_cpu_features.py shows fewer instructions than there are."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import claq_runtime

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="benchmarks/hide_cpu_features.c is for Linux on x86-64",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """What `benchmarks/hide_cpu_features.py` starts programs with; looking for each cpuid in ONNX Runtime takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import hide_cpu_features
    return hide_cpu_features.environment(tmp_path_factory.mktemp("hidden"))


def run_without(features: str, script: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    hidden = environment | {"CLAQ_HIDDEN_FEATURES": features}
    return subprocess.run([sys.executable, script], env=hidden, capture_output=True, text=True)


def kernels_without(features: str, folder: Path, environment: dict[str, str]) -> list[str]:
    """What a process and a child of it find, which must be the same."""
    script = folder / "kernels.py"
    script.write_text(
        "import json, subprocess, sys, claq_runtime\n"
        "child = [] if len(sys.argv) > 1 else json.loads(subprocess.check_output([sys.executable, __file__, 'child']))\n"
        "kernels = claq_runtime.kernels()\n"
        "assert not child or child == kernels, (child, kernels)\n"
        "print(json.dumps(kernels))\n"
    )
    done = run_without(features, script, environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("features", "gone"),
    [
        ("amx", {"avx512amx"}),
        ("amx,avx512vbmi", {"avx512amx", "avx512vnni"}),
        ("amx,avx512", {"avx512amx", "avx512vnni", "avx512bwvnni", "avx512bw"}),
        ("amx,avx512,avxvnni", {"avx512amx", "avx512vnni", "avx512bwvnni", "avx512bw", "avxvnni"}),
    ],
)
def test_kernels_that_the_cpu_does_not_claim_are_not_offered(
    features: str, gone: set[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    expected = [name for name in claq_runtime.kernels() if name not in gone]
    assert kernels_without(features, tmp_path, environment) == expected


def test_an_unknown_feature_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "nothing.py"
    script.write_text("print('ran')\n")
    done = run_without("avx1024", script, environment)
    assert done.returncode == 2
    assert "avx1024 is unknown, expected avx512" in done.stderr
    assert "ran" not in done.stdout
