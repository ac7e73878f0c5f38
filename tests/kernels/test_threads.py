"""libclaq's work in PyTorch runs on PyTorch's own threads, with the results of any others."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch
from quantized_layers import random_layer

from claq_export import threads
from claq_export.kernels import native

available, reason = native.native_available()
pytestmark = pytest.mark.skipif(not available, reason=reason)
OPENMP = "backend: OpenMP" in torch.__config__.parallel_info()
needs_openmp = pytest.mark.skipif(not OPENMP, reason="this PyTorch does not run on OpenMP")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads._threads.cache_clear()
    yield
    torch.set_num_threads(before)
    threads._threads.cache_clear()


def native_layer(seed=0):
    layer = random_layer(640, 4096, seed=seed)
    bias = torch.zeros(0)
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    return native.NativeLinear(*layer.tensors().values(), bias, columns=layer.columns, **sizes)


def address(function):
    return ctypes.cast(function, ctypes.c_void_p).value


@needs_openmp
def test_the_threads_are_those_of_pytorch(two_threads):
    library, _ = native._load()
    parallel_for, context = threads.threads_for(library)
    assert parallel_for.value == address(library.claq_openmp_parallel_for)
    assert context.contents.threads == 2
    torch.set_num_threads(1)
    assert threads.threads_for(library) == (None, None)


class WithoutOpenMP:
    """A libclaq from before it knew OpenMP."""

    def __init__(self, library):
        self.claq_pool_parallel_for = library.claq_pool_parallel_for


def test_an_older_library_works_on_its_own_threads(two_threads):
    library, _ = native._load()
    parallel_for, context = threads.threads_for(WithoutOpenMP(library))
    assert parallel_for.value == address(library.claq_pool_parallel_for)
    assert context.value == 2


@needs_openmp
@pytest.mark.parametrize("total", [0, 1, 2, 7, 1000])
def test_each_task_runs_once(two_threads, total):
    library, _ = native._load()
    _, context = threads.threads_for(library)
    seen = [0] * total
    task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)

    @task
    def count(data, index):
        seen[index] += 1

    spread = ctypes.CFUNCTYPE(None, ctypes.c_void_p, task, ctypes.c_size_t, ctypes.c_void_p)
    spread(address(library.claq_openmp_parallel_for))(ctypes.cast(context, ctypes.c_void_p), count, total, None)
    assert seen == [1] * total


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_results_do_not_depend_on_whose_threads_they_are(two_threads, monkeypatch, level, rows):
    layer = native_layer()
    x = torch.randn(rows, 640, generator=torch.Generator().manual_seed(1))
    on_pytorch = layer(x, level)
    monkeypatch.setattr(threads, "_forked", True)
    threads._threads.cache_clear()
    assert torch.equal(layer(x, level), on_pytorch)


def test_many_threads_of_python_at_once(two_threads):
    layer = native_layer()
    x = torch.randn(5, 640, generator=torch.Generator().manual_seed(2))
    expected, wrong = layer(x, 4), []

    def work():
        for _ in range(50):
            torch.mm(x, x.T)  # PyTorch's operators in between
            if not torch.equal(layer(x, 4), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_wait_for_threads_that_are_not_there(two_threads):
    """In a process of its own: pytest's has threads that a fork had better not meet."""
    program = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_threads import native_layer
torch.set_num_threads(2)
layer, x = native_layer(), torch.ones(4, 640)
torch.randn(600, 600) @ torch.randn(600, 600)
y = layer(x, 4)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(layer(x, 4), y) else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([os.path.join(os.path.dirname(here), "support"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, here],
        timeout=120,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
