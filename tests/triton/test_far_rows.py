"""Matrices of 2**31 elements and more: where their rows begin is counted in 64 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter import problem

ROOT = Path(__file__).parents[2]
CASES = (
    "finish",
    "finish of float32",
    "finish with outliers",
    "scale",
    "scale at once",
    "quantize",
    "gemm",
)

if (reason := problem()) is not None:
    pytest.skip(reason, allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("needs address space that is not reserved", allow_module_level=True)


@pytest.mark.parametrize("case", CASES)
def test_rows_beyond_32_bits_are_found(case: str) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("far_rows.py")), case],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) is True
