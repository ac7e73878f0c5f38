"""The Python readers' fuzz targets.

Each takes the fuzzer's bytes, hands them to a reader as a file's content, and lets only :class:`ClaqError` pass: any
other exception is a finding, and so is a result that breaks what the reader promises.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from claq_export.calibration.data import read_texts
from claq_export.capture.checkpoint import weight_files
from claq_export.errors import CalibrationError, ClaqError, FormatError, ModelError
from claq_export.evaluation.layers import artifact_layers
from claq_export.format.checkpoint import load_checkpoint
from claq_export.format.layer import TENSOR_NAMES, QuantizedLinear
from claq_export.inputs import OnnxFile, SafetensorsFile, check_sizes, contained, parse_json_object, read_npz

_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
_folder = Path(tempfile.mkdtemp(prefix="claq-fuzz-", dir=_MEMORY))


def _write(name: str, content: bytes) -> Path:
    path = _folder / name
    path.write_bytes(content)
    return path


def safetensors(data: bytes) -> None:
    """A safetensors file: the first byte says whether the rest is the file, or its header with a right length."""
    if not data:
        return
    content = data[1:]
    if data[0] % 4:
        header, _, rest = content.partition(b"\0")
        content = struct.pack("<Q", len(header)) + header + rest
    path = _write("x.safetensors", content)
    file = SafetensorsFile(path, FormatError)
    total = 0
    for name in file:
        info = file.tensors[name]
        tensor = file.read(name)
        assert tensor.shape == info.shape
        assert tensor.dtype == info.dtype
        total += info.nbytes
    assert total <= len(content)


def checkpoint(data: bytes) -> None:
    """A claq folder: ``claq.json`` before the first zero byte, ``claq.safetensors`` after it, with a right length."""
    text, _, rest = data.partition(b"\0")
    header, _, tensors = rest.partition(b"\0")
    _write("claq.json", text)
    _write("claq.safetensors", struct.pack("<Q", len(header)) + header + tensors)
    load_checkpoint(_folder)


_DTYPES = (
    torch.uint32,
    torch.int8,
    torch.float16,
    torch.float16,
    torch.uint16,
    torch.int32,
    torch.uint16,
    torch.float16,
)


def layer(data: bytes) -> None:
    """A layer's attributes and tensors: a byte an attribute (in units that make sense), then each tensor's bytes."""
    if len(data) < 16:
        return
    attributes = {
        "in_features": data[0],
        "out_features": data[1] % 32,
        "columns_4": 16 * (data[2] % 8),
        "columns_3": 16 * (data[3] % 8),
        "columns_2": 16 * (data[4] % 8),
    }
    K, N = attributes["in_features"], attributes["out_features"]
    four, three, two = (attributes[f"columns_{width}"] for width in (4, 3, 2))
    P = four + three + two
    position = 15
    tensors = {}
    sizes = {
        "codes": (4 * four + 3 * three + 2 * two) // 32 * N,
        "codebook": 16 * four + 8 * three + 4 * two,
        "scale": P,
        "row_scale": N,
        "order": P if data[5] % 2 else 0,
        "outlier_ptr": N + 1 if data[6] % 2 else 0,
        "outlier_index": data[7] % 16,
        "outlier_value": data[7] % 16,
    }
    for i, name in enumerate(TENSOR_NAMES):
        count = max(0, sizes[name] + (data[8 + i % 7] if data[8 + i % 7] < 3 else 0))
        size = count * _DTYPES[i].itemsize
        # What the input does not say is zero: short inputs make whole layers too.
        content = (data[position : position + size] if name not in ("codes", "codebook") else b"").ljust(size, b"\0")
        position += size if name not in ("codes", "codebook") else 0
        tensor = torch.frombuffer(bytearray(content), dtype=_DTYPES[i]) if size else torch.zeros(0, dtype=_DTYPES[i])
        tensors[name] = tensor.reshape(-1, N) if name == "codes" and N and count % N == 0 else tensor
    weight = QuantizedLinear.from_parts(attributes, tensors).dequantize()
    assert weight.shape == (N, K)
    assert torch.isfinite(weight).all() or float(tensors["outlier_value"].float().abs().max()) > 1


def onnx(data: bytes) -> None:
    """An ONNX file: its graph, every initializer, and the layers in it."""
    path = _write("model.onnx", data)
    file = OnnxFile(path, FormatError)
    for name in file.initializers:
        file.read(name)
    for entry in artifact_layers(path):
        entry.layer.dequantize()


def paths(data: bytes) -> None:
    """A file name inside a file: what is accepted lies inside the folder."""
    name = data.decode("utf-8", "surrogateescape")
    path = contained(_folder, name, FormatError)
    assert os.path.realpath(path).startswith(os.path.realpath(_folder))


def calibration(data: bytes) -> None:
    """A calibration file, as text and as JSON lines by its first byte."""
    texts = read_texts(_write("text.jsonl" if data[:1] < b"\x80" else "text.txt", data[1:]))
    assert texts
    assert all(isinstance(text, str) and text.encode() for text in texts)


def index(data: bytes) -> None:
    """A sharded model's index and the headers of the files that it names."""
    text, _, header = data.partition(b"\0")
    _write("model.safetensors.index.json", text)
    _write("a.safetensors", struct.pack("<Q", len(header)) + header)
    for path in weight_files(_folder):
        assert os.path.realpath(path).startswith(os.path.realpath(_folder))


def config(data: bytes) -> None:
    """A model's ``config.json``: the sizes that are accepted are within their limits."""
    settings = parse_json_object(data, "config.json", ModelError)
    check_sizes(settings, 4, "config.json", ModelError)
    layers = settings.get("num_hidden_layers")
    assert layers is None or isinstance(layers, (dict, list)) or 1 <= layers <= 1000


def arrays(data: bytes) -> None:
    """A NumPy archive: the first byte says whether the rest is the archive, or an array in one."""
    content = io.BytesIO()
    if data[:1] < b"\x40":
        content.write(data[1:])
    else:
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("x.npy", data[1:])
    found = read_npz(_write("x.npz", content.getvalue()), ["x"], CalibrationError)
    assert found["x"].nbytes <= 64 << 10 or data[:1] < b"\x40"


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (safetensors, checkpoint, layer, onnx, paths, calibration, index, config, arrays)
}


def run(target: Callable[[bytes], None], data: bytes) -> bool:
    """Feed a target; True if the reader accepted the input.

    Raises:
        Exception: a finding.
    """
    try:
        target(data)
    except (FormatError, ModelError, ClaqError):
        return False
    return True


def seeds() -> dict[str, list[bytes]]:
    """Small valid inputs of each target, from which the fuzzer starts."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"x": "y"}})
    empty = json.dumps({"a": {"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}})
    description = {"format": "claq", "version": 1, "config": {}, "layers": {}, "aliases": {}}
    with tempfile.TemporaryDirectory() as folder:
        import onnx as onnx_package

        from claq_export.emit import emit_onnx
        from claq_export.format.checkpoint import save_checkpoint
        from claq_export.format.layer import assemble
        from claq_export.modules import ClaqLinear

        generator = torch.Generator().manual_seed(0)
        quantized = assemble(
            torch.randint(0, 4, (32, 2), generator=generator),
            torch.randint(-9, 9, (32, 16), dtype=torch.int8, generator=generator),
            torch.ones(32),
            torch.ones(2),
            torch.full((32,), 2),
        )
        save_checkpoint(folder, {"f": quantized}, {"b": torch.zeros(2)}, {})
        example = {"x": torch.zeros(2, 32)}
        emit_onnx(ClaqLinear(quantized).eval(), example, Path(folder) / "m.onnx", dynamic_shapes={"x": {0: "n"}})
        model = onnx_package.load(Path(folder) / "m.onnx")
        del model.functions[:]
        small = model.SerializeToString()
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx_package.TensorProto.EXTERNAL
        for key, value in (("location", "x.safetensors"), ("offset", "0"), ("length", "8")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        external = model.SerializeToString()
        stored = Path(folder, "claq.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", stored[:8])
        checkpoint_seed = (
            Path(folder, "claq.json").read_bytes() + b"\0" + stored[8 : 8 + length] + b"\0" + stored[8 + length :]
        )
    array = io.BytesIO()
    np.save(array, np.arange(6, dtype=np.float32).reshape(2, 3))
    archive = io.BytesIO()
    np.savez_compressed(archive, x=np.zeros((2, 3), np.int64, order="F"))
    plain = bytes([32, 2, 0, 0, 2, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9])
    ordered = bytes([20, 1, 0, 2, 0, 1, 1, 2, 9, 9, 9, 9, 9, 9, 9])
    return {
        "safetensors": [b"\1" + header.encode() + b"\0" + bytes(8), b"\1" + empty.encode(), b"\0" + bytes(8)],
        "checkpoint": [checkpoint_seed, json.dumps(description).encode() + b"\0{}\0"],
        "layer": [plain + bytes(80), ordered + bytes(120)],
        "onnx": [small, external],
        "paths": [b"model.data", b"a/b.data", b"../x", b"/etc/passwd", b"a\\..\\b", b"link"],
        "calibration": [b'\0{"text": "one two"}\n"three"\n', b"\x80one line\nanother\n\nparagraph\n"],
        "index": [
            json.dumps({"weight_map": {"a": "a.safetensors"}}).encode() + b"\0" + empty.encode(),
            json.dumps({"weight_map": {"a": "../a.safetensors"}}).encode() + b"\0{}",
        ],
        "arrays": [b"\x80" + array.getvalue(), b"\0" + archive.getvalue()],
        "config": [
            json.dumps({"num_hidden_layers": 2, "vision_config": {"hidden_size": [8, 16]}, "eps": 1e-5}).encode(),
            b'{"n_layer": 12, "vocab_size": NaN, "head_dim": null, "max_position_embeddings": 1e3}',
        ],
    }
