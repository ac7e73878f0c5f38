"""What a service does to an operator library, for as long as asked: the program behind the tests of ``test_service.py``.

    python tests/runtime/service_stress.py FOLDER LIBRARY CHECK [--seconds S] [--runs N]

FOLDER holds models ``a.onnx``, ``b.onnx`` and inputs ``a.npz``, ``b.npz`` (``x0``, ``x1``, ...) and
a layer ``layer.npz``, LIBRARY is libclaq. Each
check runs in a process of its own, because some of them limit it, fork it or send it signals, and needs numpy and
onnxruntime (1.20 or newer) alone. It prints one JSON line and exits with 0 if everything held.
``benchmarks/service_stress.py`` runs all of them for minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime


class Model:
    """A model file, its inputs, and what a first run gave for each."""

    def __init__(self, folder: Path, name: str, library: str, threads: int = 2) -> None:
        self.path, self.library, self.threads = folder / f"{name}.onnx", library, threads
        with np.load(folder / f"{name}.npz") as inputs:
            self.inputs = [inputs[key] for key in sorted(inputs.files)]
        session = self.session()
        self.expected = [session.run(None, {"x": x})[0].tobytes() for x in self.inputs]

    def session(self, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
        if options is None:
            options = onnxruntime.SessionOptions()
            options.register_custom_ops_library(self.library)
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])

    def check(self, session: onnxruntime.InferenceSession, i: int) -> None:
        """Run input ``i``; the result must have the bits of the first run."""
        got = session.run(None, {"x": self.inputs[i]})[0].tobytes()
        if got != self.expected[i]:
            raise AssertionError(f"input {i} gives another result than at first")


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


_ATTRIBUTES = ("in_features", "out_features", "columns_4", "columns_3", "columns_2")
_TENSORS = (
    "codes", "codebook", "scale", "row_scale", "order", "outlier_ptr", "outlier_index", "outlier_value", "bias",
)  # fmt: skip
_DTYPES = {"float32": 1, "int8": 3, "uint16": 4, "int32": 6, "float16": 10, "uint32": 12}


class _Desc(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in _ATTRIBUTES),
        *((name, _Tensor) for name in _TENSORS),
        ("kernel", ctypes.c_char_p),
    )


class NativeLayer:
    """A layer of ``layer.npz`` behind the C interface, on the calling thread."""

    def __init__(self, folder: Path, library: str) -> None:
        self._library = ctypes.CDLL(library)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._library.claq_run.argtypes = [
            pointer, ctypes.c_int, ctypes.c_int32, pointer, ctypes.c_int64, pointer, pointer, pointer, ctypes.c_char_p, size,
        ]  # fmt: skip
        self._library.claq_gather.argtypes = [
            pointer, ctypes.c_int, pointer, ctypes.c_int64, ctypes.c_int, pointer, pointer, pointer, ctypes.c_char_p, size,
        ]  # fmt: skip
        with np.load(folder / "layer.npz") as stored:
            values = {name: stored[name] for name in stored.files}
        self._arrays = {name: np.ascontiguousarray(values[name]) for name in _TENSORS}
        desc = _Desc(struct_size=ctypes.sizeof(_Desc), **{name: int(values[name]) for name in _ATTRIBUTES})
        for name, array in self._arrays.items():
            shape = (ctypes.c_int64 * array.ndim)(*array.shape)
            setattr(desc, name, _Tensor(array.ctypes.data, shape, array.ndim, _DTYPES[array.dtype.name]))
        self.in_features, self.out_features = desc.in_features, desc.out_features
        self._handle = ctypes.c_void_p()
        error = ctypes.create_string_buffer(512)
        if self._library.claq_create(ctypes.byref(desc), ctypes.byref(self._handle), error, size(len(error))):
            raise AssertionError(error.value.decode())

    def status(self, x: np.ndarray, y: np.ndarray, threads: int) -> tuple[int, str]:
        """Run in int8; the status and its message."""
        error = ctypes.create_string_buffer(512)
        data = (x.ctypes.data, len(x), y.ctypes.data)
        pool = (
            (ctypes.cast(self._library.claq_pool_parallel_for, ctypes.c_void_p), threads)
            if threads > 1
            else (None, None)
        )
        return self._library.claq_run(self._handle, 1, 4, *data, *pool, error, len(error)), error.value.decode()

    def gather_status(self, indices: np.ndarray, y: np.ndarray) -> tuple[int, str]:
        """Look up int64 ``indices`` as float32 rows; the status and its message."""
        error = ctypes.create_string_buffer(512)
        data = (indices.ctypes.data, len(indices), 1, y.ctypes.data)
        return self._library.claq_gather(self._handle, 7, *data, None, None, error, len(error)), error.value.decode()

    def run(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        """The layer's output in int8, on libclaq's own threads if there are to be more than one."""
        y = np.empty((len(x), self.out_features), np.float32)
        status, message = self.status(x, y, threads)
        if status:
            raise AssertionError(message)
        return y


def resident() -> int:
    """Bytes of anonymous resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def in_threads(count: int, work) -> None:
    """Run ``work(i)`` in that many threads; the first failure is raised here."""
    failures: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def threads(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """Eight threads on one session: every result has the bits of a run alone."""
    model = Model(folder, "a", library)
    session, end, done = model.session(), time.monotonic() + seconds, [0] * 8

    def work(i: int) -> None:
        draw = random.Random(i)
        while time.monotonic() < end:
            model.check(session, draw.randrange(len(model.inputs)))
            done[i] += 1

    in_threads(8, work)
    return {"runs": sum(done)}


def churn(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """Sessions of two models created, run and destroyed in two threads; memory must not grow."""
    models = [Model(folder, name, library) for name in "ab"]
    counts = [0, 0]

    def rounds(seconds: float) -> None:
        end = time.monotonic() + seconds

        def work(i: int) -> None:
            while time.monotonic() < end:
                for model in (models[i], models[1 - i]):
                    model.check(model.session(), counts[i] % len(model.inputs))
                counts[i] += 1

        in_threads(2, work)
        gc.collect()

    rounds(seconds / 3)
    before = resident()
    rounds(2 * seconds / 3)
    growth = resident() - before
    assert growth < 8 << 20, f"memory grew by {growth} bytes over {sum(counts)} rounds"
    return {"sessions": 2 * sum(counts), "growth_bytes": growth}


def memory_of_runs(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """Resident memory over many runs of all sizes is flat."""
    model = Model(folder, "a", library)
    session = model.session()
    for i in range(runs // 10):
        model.check(session, i % len(model.inputs))
    gc.collect()
    before = resident()
    for i in range(runs):
        model.check(session, i % len(model.inputs))
    gc.collect()
    growth = resident() - before
    assert growth < 1 << 20, f"memory grew by {growth} bytes over {runs} runs"
    return {"runs": runs, "growth_bytes": growth}


def two_models(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """Two sessions of different models run at the same time, and each keeps its own results."""
    models = [Model(folder, name, library) for name in "ab"]
    sessions = [model.session() for model in models]
    end, done = time.monotonic() + seconds, [0] * 4

    def work(i: int) -> None:
        while time.monotonic() < end:
            models[i % 2].check(sessions[i % 2], done[i] % len(models[i % 2].inputs))
            done[i] += 1

    in_threads(4, work)
    return {"runs": sum(done)}


def in_children(seconds: float, work) -> int:
    """Fork again and again; each child does ``work`` and must end well within a minute. Returns the number of children."""
    end, children = time.monotonic() + seconds, 0
    while time.monotonic() < end or not children:
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a child that hangs dies of it
            try:
                work()
            except BaseException as error:
                print(f"child: {error}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            raise AssertionError(f"a forked child ended with status {status}")
        children += 1
    return children


def fork_session(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """Children forked after the library was loaded and has run go on with the inherited session and make their own.

    The session has no pool of threads (a fork leaves those behind) and is idle when it is forked: ONNX Runtime's own
    allocator locks, and a child forked in the middle of another thread's run inherits them locked.
    """
    model = Model(folder, "a", library, threads=1)
    session = model.session()

    def work() -> None:
        for i in range(len(model.inputs)):
            model.check(session, i)
        model.check(model.session(), 0)

    return {"children": in_children(seconds, work)}


def fork_library(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """Children forked while threads are inside of libclaq run its layers and do not hang: no lock is held in a run, and a child
    has a pool of threads of its own."""
    layer = NativeLayer(folder, library)
    x = np.random.default_rng(0).normal(size=(40, layer.in_features)).astype(np.float32)
    expected, stop = [layer.run(x[:rows]).tobytes() for rows in range(1, 41)], threading.Event()

    def hammer(i: int) -> None:
        while not stop.is_set():
            layer.run(x[: 1 + i % 40], threads=1 + 2 * (i % 2))

    threads = [threading.Thread(target=hammer, args=(13 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()

    def work() -> None:
        for rows in range(1, 41):
            if layer.run(x[:rows], threads=1 + rows % 3).tobytes() != expected[rows - 1]:
                raise AssertionError(f"{rows} rows give another result in a child")

    try:
        return {"children": in_children(seconds, work)}
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def twice(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """Registered twice, loaded twice from one path, and once more from another path, all in one process."""
    model = Model(folder, "a", library)
    for _ in range(2):  # the same library in two sets of options
        model.check(model.session(), 0)
    handles = [ctypes.CDLL(library) for _ in range(2)]
    for handle in handles:
        handle.claq_version.restype = ctypes.c_char_p
    assert handles[0].claq_version() == handles[1].claq_version()
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copy(library, scratch)
        other = ctypes.CDLL(copy)
        other.claq_version.restype = ctypes.c_char_p
        assert other.claq_version()
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(copy)
        second = model.session(options)
        first = model.session()
        for i in range(len(model.inputs)):
            model.check(first, i)
            model.check(second, i)
        del second
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    try:
        # ONNX Runtime itself may refuse to register a domain twice; it must not crash or change results.
        options.register_custom_ops_library(library)
        refused = 0
        model.check(model.session(options), 0)
    except Exception as error:
        refused = int(bool(str(error)))
        model.check(model.session(), 0)
    return {"refused": refused}


def little_memory(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """With the address space used up a run ends in a status with a message; with memory back the session works on."""
    model = Model(folder, "a", library, threads=1)
    session = model.session()
    width = model.inputs[0].shape[-1]
    large = np.zeros((1, (256 << 20) // (4 * width), width), np.float32)
    # The C++ library keeps a little memory for each thread that throws, and ends the process if it cannot have it: a first
    # failure, with memory at hand, is what a service has long had behind it.
    try:
        session.run(None, {"x": large[..., :1]})
    except Exception as error:
        print(f"first failure: {str(error)[:60]}", file=sys.stderr)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    failures = 0
    for spare in (1 << 18, 1 << 20, 16 << 20, 64 << 20, 300 << 20):
        resource.setrlimit(resource.RLIMIT_AS, (statm + spare, hard))
        try:
            session.run(None, {"x": large})
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            failures += bool(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for i in range(len(model.inputs)):
            model.check(session, i)
    # The C interface, where the allocation is libclaq's own, in a thread that has run a layer and never thrown.
    layer = NativeLayer(folder, library)
    indices = np.zeros(1 << 25, np.int64)
    rows = np.zeros((3, layer.in_features), np.float32)
    found: list[tuple[int, str]] = []

    def look_up(_: int) -> None:
        layer.gather_status(indices[:3], rows)
        expected = rows.tobytes()
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now, hard))
        # 256 MB of row numbers cannot be had, so nothing is written past the three rows.
        found.append(layer.gather_status(indices, rows))
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        layer.gather_status(indices[:3], rows)
        if rows.tobytes() != expected:
            raise AssertionError("the layer gives another result after a failed allocation")

    in_threads(1, look_up)
    status, message = found[0]
    if status != 3 or message != "not enough memory":
        raise AssertionError(f"the C interface gives status {status} and message {message!r}")
    if not failures:
        raise AssertionError("no run failed; the limits were too wide")
    return {"failed_runs": failures, "native_status": status}


def signals(folder: Path, library: str, seconds: float, runs: int) -> dict[str, float]:
    """Signals in the middle of runs change nothing."""
    model = Model(folder, "a", library)
    session, end, done, caught = model.session(), time.monotonic() + seconds, 0, [0]

    def handler(number: int, frame: object) -> None:
        caught[0] += 1

    signal.signal(signal.SIGALRM, handler)
    signal.signal(signal.SIGUSR1, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    while time.monotonic() < end or not caught[0]:
        model.check(session, done % len(model.inputs))
        os.kill(os.getpid(), signal.SIGUSR1)
        done += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"runs": done, "signals": caught[0]}


CHECKS = {
    function.__name__: function
    for function in (
        threads,
        churn,
        memory_of_runs,
        two_models,
        fork_session,
        fork_library,
        twice,
        little_memory,
        signals,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("library")
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--runs", type=int, default=10_000)
    options = parser.parse_args()
    start = time.monotonic()
    found = CHECKS[options.check](options.folder, options.library, options.seconds, options.runs)
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"check": options.check, "onnxruntime": onnxruntime.__version__, "seconds": seconds, **found}))


if __name__ == "__main__":
    main()
