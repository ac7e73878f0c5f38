"""What a layer does with the pages of a file that its tensors are mapped from: those it has copied leave the process's memory."""

import mmap
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runtime_layers import Layer, NativeLayer, make_layer

PAGE = mmap.PAGESIZE
PAGEMAP = Path("/proc/self/pagemap")
PRESENT = 1 << 63

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are given back on Linux only"),
    pytest.mark.skipif(not PAGEMAP.exists(), reason="needs /proc/self/pagemap"),
]


@pytest.fixture(scope="module")
def layer() -> Layer:
    # Sixteen outputs each in the slices of the AVX-512 families: none is left to be read where the format has it.
    return make_layer(960, 1024, {4: 512, 3: 256, 2: 256}, outliers=0.05, bias=True)


def map_tensors(layer: Layer, file: Path, **options) -> Layer:
    """The layer with every tensor mapped from a file, each from a page of its own on and read once."""
    places, offset = {}, 0
    with file.open("wb") as out:
        for name, tensor in layer.tensors.items():
            out.seek(offset)
            out.write(tensor.tobytes())
            places[name] = offset
            offset = -(-(offset + max(1, tensor.nbytes)) // PAGE) * PAGE
        out.truncate(offset)
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, **options)
    tensors = {}
    for name, tensor in layer.tensors.items():
        flat = np.frombuffer(mapped, tensor.dtype, tensor.size, places[name])
        flat.sum(dtype=np.float64)
        tensors[name] = flat.reshape(tensor.shape)
    return replace(layer, tensors=tensors)


def resident_pages(tensor: np.ndarray) -> list[bool]:
    """For each whole page of a tensor that begins at one, whether this process has it in memory."""
    address = tensor.ctypes.data
    assert address % PAGE == 0
    with PAGEMAP.open("rb", buffering=0) as file:
        file.seek(address // PAGE * 8)
        entries = np.frombuffer(file.read(tensor.nbytes // PAGE * 8), np.uint64)
    return [bool(int(entry) & PRESENT) for entry in entries]


def test_pages_of_copied_tensors_are_given_back(layer, tmp_path):
    mapped = map_tensors(layer, tmp_path / "tensors", access=mmap.ACCESS_READ)
    copied = ["codebook"]
    if NativeLayer(layer).kernel.startswith("avx512"):
        copied += ["outlier_index", "outlier_value"]
    assert all(len(resident_pages(mapped.tensors[name])) > 1 for name in copied)
    assert all(all(resident_pages(mapped.tensors[name])) for name in copied)
    native = NativeLayer(mapped)
    for name in copied:
        assert not any(resident_pages(mapped.tensors[name])), name
    assert all(resident_pages(mapped.tensors["codes"]))
    x = np.random.default_rng(0).normal(size=(40, 1024)).astype(np.float32)
    for rows in (1, 4, 40):
        np.testing.assert_array_equal(native.run(x[:rows], 4), NativeLayer(layer).run(x[:rows], 4))
    for name in copied:
        assert not any(resident_pages(mapped.tensors[name])), name
    for name in copied:  # they are read from the file again
        np.testing.assert_array_equal(mapped.tensors[name], layer.tensors[name])


def test_what_was_written_to_a_private_mapping_is_kept(layer, tmp_path):
    mapped = map_tensors(layer, tmp_path / "tensors", access=mmap.ACCESS_COPY)
    for name in ("codebook", "outlier_value"):
        tensor = mapped.tensors[name].reshape(-1)
        tensor[tensor.size // 2] = 3
        assert layer.tensors[name].reshape(-1)[tensor.size // 2] != 3
    expected = {name: tensor.copy() for name, tensor in mapped.tensors.items()}
    native = NativeLayer(mapped)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(mapped.tensors[name], tensor, err_msg=name)
    x = np.random.default_rng(0).normal(size=(4, 1024)).astype(np.float32)
    np.testing.assert_array_equal(native.run(x), NativeLayer(replace(layer, tensors=expected)).run(x))
