"""libclaq in one C++ process several times: opened twice, under two names, registered twice, closed and opened again."""

import glob
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from runtime_layers import make_layer, make_model

import claq_runtime

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_cpp_host_that_has_the_library_twice(tmp_path):
    (ort,) = glob.glob(os.path.join(os.path.dirname(onnxruntime.__file__), "capi", "libonnxruntime.so.*"))
    os.symlink(ort, tmp_path / "libonnxruntime.so.1")
    program = tmp_path / "load_twice"
    command = [
        "g++", "-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{HERE.parents[1] / 'examples' / 'cpp'}",
        HERE / "load_twice.cpp", tmp_path / "libonnxruntime.so.1", "-ldl", "-pthread", "-Wl,-rpath,$ORIGIN", "-o", program,
    ]  # fmt: skip
    compiled = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr

    layer = make_layer(96, 192, {4: 64, 3: 64, 2: 64}, ordered=True, outliers=0.01, bias=True)
    model = make_model(layer, accuracy_level=4)
    onnx.save(model, tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(1, 9, 192)).astype(np.float32)
    x.tofile(tmp_path / "x")
    copy = shutil.copy(claq_runtime.library_path(), tmp_path / "other.so")
    inputs = (tmp_path / "model.onnx", claq_runtime.library_path(), copy, tmp_path / "x", 9, 192)
    found = subprocess.run([str(part) for part in (program, *inputs)], capture_output=True, timeout=120)
    assert found.returncode == 0, found.stderr.decode()

    options = onnxruntime.SessionOptions()
    claq_runtime.register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert found.stdout == session.run(None, {"x": x})[0].tobytes()
