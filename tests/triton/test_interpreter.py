"""The Triton kernels against the definition of the format, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from triton_interpreter import problem

PROGRAM = Path(__file__).parent / "interpreted.py"

if (reason := problem()) is not None:
    pytest.skip(reason, allow_module_level=True)


def _program() -> Any:
    spec = spec_from_file_location("interpreted", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["interpreted"] = module
    spec.loader.exec_module(module)
    return module


PROGRAM_MODULE = _program()
CASES, LOOKUPS = PROGRAM_MODULE.CASES, PROGRAM_MODULE.LOOKUPS


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    # The interpreter replaces parts of Triton for a whole process, so it gets one of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_computes_the_layer(results: dict[str, dict[str, Any]], case: Any) -> None:
    found = results[case.name]
    assert found["kernels"] == ([case.kernel] if case.vectors else [])
    assert found["shape"]
    assert found["dtype"]
    assert found["first_is_nan"] == (case.nan or case.vectors == 0)
    if case.dtype == "float32" or case.exact:
        # Only the order of fp32 additions differs from the float64 sum.
        bound = 5e-7
    elif case.dtype == "float16":
        bound = 6e-4
    else:
        # The interpreter truncates to bfloat16 instead of rounding.
        bound = 8e-3
    assert found["error"] <= bound


@pytest.mark.slow
@pytest.mark.parametrize("case", LOOKUPS, ids=lambda case: case.name)
def test_rows_are_bit_for_bit_the_reference(results: dict[str, dict[str, Any]], case: Any) -> None:
    found = results[case.name]
    assert found["shape"]
    assert found["dtype"]
    assert found["equal"]
    assert found["unknown_are_nan"]
    assert found["reference_error"] <= 1e-6
