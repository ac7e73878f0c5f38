"""claq.safetensors + claq.json: what is written comes back, and damaged files are refused by name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import files_limited_to
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_layers import layers, random_layer
from safetensors.torch import load_file, save_file

from claq_export.errors import FormatError, OutputError
from claq_export.format.checkpoint import CONFIG_FILE, TENSORS_FILE, load_checkpoint, save_checkpoint
from claq_export.format.layer import QuantizedLinear
from claq_export.format.rows import slice_rows


def assert_same(a: QuantizedLinear, b: QuantizedLinear) -> None:
    assert a.attributes() == b.attributes()
    for name, tensor in a.tensors().items():
        other = getattr(b, name)
        assert tensor.dtype == other.dtype, name
        assert tensor.numpy().tobytes() == other.numpy().tobytes(), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a stacked and a single layer, with tied and plain tensors."""
    shared = torch.randn(10, 4)
    save_checkpoint(
        tmp_path,
        {"block.q+k": random_layer(40, 24, (4, 2), outliers=0.1), "head": random_layer(24, 7, (3,), seed=1)},
        {
            "embed.weight": shared,
            "lm_head.weight": shared,
            "block.q+k.bias": torch.arange(24.0),
            "empty": torch.zeros(0),
        },
        {"bits": 3.5},
        parts={"block.q+k": [("block.q", 16), ("block.k", 8)]},
        accuracy_level=4,
        transposed=["head"],
        files={"tokenizer.json": "0" * 64},
    )
    return tmp_path


@settings(max_examples=25, deadline=None)
@given(layer=layers())
def test_layers_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, layer: QuantizedLinear) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, {"a.b": layer}, {}, {})
    assert_same(load_checkpoint(folder).layers["a.b"], layer)


def test_everything_comes_back(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert checkpoint.config == {"bits": 3.5}
    assert json.loads((saved / CONFIG_FILE).read_text())["files"] == {"tokenizer.json": "0" * 64}
    assert checkpoint.parts_of("block.q+k") == (("block.q", 16), ("block.k", 8))
    assert checkpoint.parts_of("head") == (("head", 7),)
    assert checkpoint.accuracy_levels == {"block.q+k": 4, "head": 4}
    assert set(checkpoint.transposed) == {"head"}
    assert checkpoint.aliases == {"lm_head.weight": "embed.weight"}
    assert checkpoint.tensors["lm_head.weight"] is checkpoint.tensors["embed.weight"]
    assert checkpoint.tensors["empty"].shape == (0,)
    assert checkpoint.tensors["block.q.bias"].tolist() == list(range(16))
    assert checkpoint.tensors["block.k.bias"].tolist() == list(range(16, 24))
    assert "lm_head.weight" not in load_file(saved / TENSORS_FILE)


def test_same_input_same_bytes(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint, again = load_checkpoint(saved), tmp_path_factory.mktemp("again")
    save_checkpoint(
        again,
        checkpoint.layers,
        checkpoint.tensors,
        checkpoint.config,
        parts=checkpoint.parts,
        accuracy_level=4,
        transposed=checkpoint.transposed,
        files={"tokenizer.json": "0" * 64},
    )
    for name in (TENSORS_FILE, CONFIG_FILE):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_quantized_weights_are_not_stored_again(tmp_path: Path) -> None:
    weights = {"head.weight": torch.zeros(7, 24), "head.bias": torch.ones(7), "raw": torch.zeros(7, 24)}
    save_checkpoint(tmp_path, {"head": random_layer(24, 7), "raw": random_layer(24, 7)}, weights, {})
    assert set(load_checkpoint(tmp_path).tensors) == {"head.bias"}


def test_views_of_one_tensor_are_stored_as_they_are(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(tmp_path, {}, {"row": base[1], "columns": base[:, 1:3], "transposed": base.T}, {})
    tensors = load_checkpoint(tmp_path).tensors
    assert tensors["row"].tolist() == base[1].tolist()
    assert tensors["columns"].tolist() == base[:, 1:3].tolist()
    assert tensors["transposed"].tolist() == base.T.tolist()


def replace_in_layer(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / TENSORS_FILE)
        tensors[f"block.q+k.{name}"] = tensor
        save_file(tensors, folder / TENSORS_FILE)

    return change


def edit_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / CONFIG_FILE).read_text())
        change(value)
        (folder / CONFIG_FILE).write_text(json.dumps(value))

    return edit


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return cut


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def drop(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        tensors = load_file(folder / TENSORS_FILE)
        del tensors[name]
        save_file(tensors, folder / TENSORS_FILE)

    return remove


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("no tensors", lambda f: (f / TENSORS_FILE).unlink(), r"claq\.safetensors does not exist"),
    ("no json", lambda f: (f / CONFIG_FILE).unlink(), r"claq\.json does not exist"),
    ("half the tensors", truncate(TENSORS_FILE, 0.5), r"claq\.safetensors is damaged"),
    ("a few bytes of tensors", truncate(TENSORS_FILE, 0.001), r"claq\.safetensors is damaged"),
    ("empty tensors file", overwrite(TENSORS_FILE, b""), r"claq\.safetensors is damaged"),
    ("huge header", overwrite(TENSORS_FILE, struct.pack("<Q", 1 << 60) + b"{}"), r"claq\.safetensors is damaged"),
    ("a pickle", overwrite(TENSORS_FILE, b"\x80\x04\x95" + bytes(100)), r"claq\.safetensors is damaged"),
    ("half the json", truncate(CONFIG_FILE, 0.5), r"claq\.json is not valid JSON"),
    ("json of another kind", overwrite(CONFIG_FILE, b"[]"), r'"format" must be "claq"'),
    ("json too deep", overwrite(CONFIG_FILE, b"[" * 100000), r"claq\.json is not valid JSON"),
    ("not text", overwrite(CONFIG_FILE, b"\xff\xfe{}"), r"claq\.json is not valid JSON"),
    ("other version", edit_json(lambda v: v.update(version=2)), r"format version 2; this package reads version 1"),
    ("no layers", edit_json(lambda v: v.pop("layers")), r"'layers' must be an object, got NoneType"),
    ("layer is a list", edit_json(lambda v: v["layers"].update(head=[])), r"layer 'head' must be an object, got list"),
    (
        "in_features is a string",
        edit_json(lambda v: v["layers"]["head"].update(in_features="24")),
        r"layer 'head': 'in_features' must be an integer >= 0, got '24'",
    ),
    (
        "in_features is enormous",
        edit_json(lambda v: v["layers"]["head"].update(in_features=1 << 40)),
        r"layer 'head': 'in_features' must be an integer",
    ),
    (
        "columns do not match the codes",
        edit_json(lambda v: v["layers"]["head"].update(columns_3=64)),
        r"layer 'head': codes must be torch\.uint32 of shape \[6, 7\], got torch\.uint32 of shape \[3, 7\]",
    ),
    ("parts missing", edit_json(lambda v: v["layers"]["head"].pop("parts")), r"layer 'head': 'parts' must be a list"),
    (
        "part without rows",
        edit_json(lambda v: v["layers"]["head"].update(parts=[{"name": "head"}])),
        r"a part must have a name and a number of rows",
    ),
    (
        "parts do not add up",
        edit_json(lambda v: v["layers"]["head"]["parts"][0].update(rows=6)),
        r"the parts of layer 'head' must add up to its 7 output features, got \[6\]",
    ),
    (
        "one linear in two layers",
        edit_json(lambda v: v["layers"]["head"]["parts"][0].update(name="block.q")),
        r"linear 'block\.q' is part of both 'block\.q\+k' and 'head'",
    ),
    (
        "transposed is a number",
        edit_json(lambda v: v["layers"]["head"].update(transposed=1)),
        r"'transposed' must be true or false, got 1",
    ),
    (
        "alias of nothing",
        edit_json(lambda v: v["aliases"].update(x="y")),
        r"alias 'x' names tensor 'y', which is not stored",
    ),
    ("alias is a number", edit_json(lambda v: v["aliases"].update(x=1)), r"alias 'x' must be a name, got 1"),
    ("codes missing", drop("head.codes"), r"tensor 'head\.codes' is missing"),
    (
        "codes of another dtype",
        replace_in_layer("codes", torch.zeros(5, 24, dtype=torch.int32)),
        r"layer 'block\.q\+k': codes must be torch\.uint32",
    ),
    (
        "scale not finite",
        replace_in_layer("scale", torch.full((64,), float("nan"), dtype=torch.float16)),
        r"layer 'block\.q\+k': scale must be finite",
    ),
    (
        "order out of range",
        replace_in_layer("order", torch.full((64,), 41, dtype=torch.int32).to(torch.uint16)),
        r"layer 'block\.q\+k': order must hold values in 0\.\.40",
    ),
    (
        "row pointers too short",
        replace_in_layer("outlier_ptr", torch.zeros(3, dtype=torch.int32)),
        r"layer 'block\.q\+k': outlier_ptr must be torch\.int32 of shape \[25\]",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damaged_files_are_refused_by_name(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(FormatError, match=message):
        load_checkpoint(saved)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_damage_never_gives_anything_but_a_format_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A reader of bytes from anywhere must not raise what it did not mean to; bits of values may of course flip."""
    folder = tmp_path_factory.mktemp("damaged")
    save_checkpoint(folder, {"head": random_layer(24, 7, (2, 3), outliers=0.1)}, {"x": torch.ones(3)}, {})
    name = data.draw(st.sampled_from([TENSORS_FILE, CONFIG_FILE]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        checkpoint = load_checkpoint(folder)
    except FormatError:
        pass
    else:
        for layer in checkpoint.layers.values():
            layer.validate()


def test_names_that_collide(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tensor 'head\.scale' of the model has the name of a part of layer 'head'"):
        save_checkpoint(tmp_path, {"head": random_layer(8, 4)}, {"head.scale": torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        save_checkpoint(tmp_path / "nowhere", {}, {}, {})


def test_folder_that_cannot_be_written() -> None:
    # /proc refuses new files even to root, whom permissions do not stop.
    with pytest.raises(OutputError, match=r"cannot write /proc/claq\.safetensors"):
        save_checkpoint("/proc", {}, {}, {})


def test_target_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).mkdir()
    with pytest.raises(OutputError, match=r"claq\.json: it is a folder"):
        save_checkpoint(tmp_path, {}, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_FILE]


def test_full_disk_leaves_the_old_files(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(OutputError, match=r"claq\.safetensors"), files_limited_to(1 << 16):
        save_checkpoint(saved, {}, {"large": torch.zeros(1 << 16)}, {})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_files_have_ordinary_permissions(saved: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~umask}


@settings(max_examples=40, deadline=None)
@given(layer=layers(), data=st.data())
def test_rows_of_a_stacked_layer(layer: QuantizedLinear, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, layer.out_features - 1))
    stop = data.draw(st.integers(start + 1, layer.out_features))
    part = slice_rows(layer, start, stop)
    part.validate()
    assert torch.equal(part.dequantize(), layer.dequantize()[start:stop])
    assert part.codes.untyped_storage().nbytes() == part.codes.numel() * 4


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (-1, 2), (0, 8)])
def test_rows_outside_the_layer(start: int, stop: int) -> None:
    with pytest.raises(FormatError, match="are not inside the layer's 7 output features"):
        slice_rows(random_layer(8, 7), start, stop)


def test_nan_in_the_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="config"):
        save_checkpoint(tmp_path, {}, {}, {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []
