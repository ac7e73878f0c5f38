"""The dispatch table, the splitting of columns, and what happens where Triton is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from claq_export.kernels.triton.dispatch import dispatch_for


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (15, 3)])
def test_every_generation_has_kernels_for_every_number_of_vectors(capability: tuple[int, int]) -> None:
    dispatch = dispatch_for(*capability)
    limits = [config.max_vectors for config in dispatch.gemm]
    assert limits == sorted(limits)
    assert dispatch.gemv.max_vectors <= 4
    for config in (dispatch.gemv, dispatch.dense, *dispatch.gemm):
        assert config.lanes & (config.lanes - 1) == 0
        assert config.warps & (config.warps - 1) == 0
    if capability[0] < 8:
        # tl.dot has no tensor-core code there.
        assert dispatch.gemm == ()


def test_tile_is_the_smallest_that_holds_the_vectors() -> None:
    dispatch = dispatch_for(9, 0)
    chosen = [dispatch.gemm_for(vectors) for vectors in (5, 16, 17, 33, 128)]
    assert [config.vectors if config else None for config in chosen] == [16, 16, 32, 64, 64]
    assert dispatch.gemm_for(129) is None


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_columns_are_split_only_as_far_as_programs_are_wanted() -> None:
    from claq_export.kernels.triton.launch import splits_of

    assert splits_of((0, 0, 128), tiles=43, step=4, programs=132 * 8) == 16
    assert splits_of((0, 0, 128), tiles=4, step=4, programs=132 * 8) == 32
    assert splits_of((0, 0, 128), tiles=5000, step=4, programs=132 * 8) == 1
    assert splits_of((0, 1, 0), tiles=1, step=4, programs=1000) == 1


def test_the_operator_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from claq_export.kernels import linear, triton\n"
        "assert not triton.available()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_operator_has_a_cuda_implementation_that_loads_triton_late() -> None:
    program = (
        "import sys, torch\n"
        "from claq_export.kernels import linear\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert has('claq::linear', 'CUDA') and 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
