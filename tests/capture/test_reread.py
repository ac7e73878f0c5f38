"""Weights that a model's files give again leave memory after the capture; everything that runs the graph still sees them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_llama, shard

from claq_export import inputs
from claq_export.capture import (
    TaskModel,
    capture_decoder,
    capture_module,
    let_go_of_weights,
    load_pretrained,
    restore_weights,
)
from claq_export.capture.precision import check_range
from claq_export.deferred import is_deferred, materialize
from claq_export.errors import ModelError


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr("claq_export.capture.reread.DEFER_FROM", 8192)
    folder = save_tiny_llama(tmp_path / "model")
    shard(folder)  # half of them float16, so that reading converts
    return folder


def captured_twice(folder):
    model, _, _ = load_pretrained(folder)
    whole = capture_module(model, dynamic_shapes=model.dynamic_axes)
    return model, whole, capture_decoder(model)


def weights(graph_module):
    return dict(graph_module.named_parameters(remove_duplicate=False))


def test_graphs_without_weights_in_memory_compute_the_same(source):
    model, whole, cached = captured_twice(source)
    before = [captured.run(captured.example_inputs) for captured in (whole, cached)]
    shapes = {name: weight.shape for name, weight in weights(whole.graph_module).items()}
    let_go_of_weights(model, [whole.graph_module, cached.graph_module])
    for captured, outputs in zip((whole, cached), before, strict=True):
        for name, weight in weights(captured.graph_module).items():
            large = 4 * weight.numel() >= 8192
            assert is_deferred(weight) is large, name
            assert weight.untyped_storage().nbytes() < 8192
        for value, again in zip(outputs, captured.run(captured.example_inputs), strict=True):
            assert torch.equal(value, again)
    assert {name: weight.shape for name, weight in weights(whole.graph_module).items()} == shapes
    embedding, head = model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight
    assert embedding is head  # tied still
    assert is_deferred(embedding)


def test_what_files_do_not_give_stays_in_memory(source):
    model, _, _ = load_pretrained(source)
    changed = model.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        changed[3, 4] += 1
    transposed = model.model.model.layers[0].mlp.up_proj
    transposed.weight = torch.nn.Parameter(transposed.weight.detach().T.contiguous().T)
    whole = capture_module(model, dynamic_shapes=model.dynamic_axes)
    let_go_of_weights(model, [whole.graph_module])
    kept = [
        name for name, weight in weights(whole.graph_module).items() if weight.dim() == 2 and not is_deferred(weight)
    ]
    assert sorted(kept) == ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert model.model.model.layers[1].mlp.up_proj.weight is changed


def test_a_module_without_files_keeps_its_weights():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = TaskModel(LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)), "text-generation")
    let_go_of_weights(model, [])
    assert not any(map(is_deferred, model.parameters()))


def test_restored_weights_are_those_of_the_files_and_shared(source):
    model, whole, cached = captured_twice(source)
    expected = {name: weight.detach().clone() for name, weight in weights(whole.graph_module).items()}
    let_go_of_weights(model, [whole.graph_module, cached.graph_module])
    restore_weights([whole.graph_module, cached.graph_module])
    found, other = weights(whole.graph_module), weights(cached.graph_module)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
        assert weight.data_ptr() == other[name].data_ptr(), name
    restore_weights([whole.graph_module])  # nothing to do


def test_values_beyond_a_dtype_are_found_on_disk_too(source, monkeypatch):
    monkeypatch.setattr("claq_export.capture.lazy.DEFER_FROM", 8192)
    path = source / "b.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("mlp.gate_proj.weight"))
    tensors = {key: value.float() for key, value in tensors.items()}
    tensors[name][2, 2] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    model, _, _ = load_pretrained(source, lazy=True)
    assert is_deferred(model.model.get_parameter(name))
    with pytest.raises(ModelError, match=rf"float16 ends at 65504, beyond which lie values of {name} \(1e\+06\)"):
        check_range(model.model, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_pieces_of_a_stored_tensor_are_its_values_in_order(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("claq_export.inputs.safetensors_file._PIECE_BYTES", 48)
    values = (torch.arange(7 * 11) % 5).reshape(7, 11).to(dtype)
    save_file({"x": values, "scalar": values[1, 1].clone(), "none": values[:0].clone()}, tmp_path / "x.safetensors")
    file = inputs.SafetensorsFile(tmp_path / "x.safetensors", ModelError)
    pieces = list(file.pieces("x"))
    assert len(pieces) == -(-77 * dtype.itemsize // 48)
    assert torch.equal(torch.cat(pieces), values.flatten())
    assert torch.equal(next(file.pieces("scalar")).reshape(()), values[1, 1])
    assert list(file.pieces("none")) == []
    with pytest.raises(ModelError, match="tensor 'y' is missing"):
        next(file.pieces("y"))
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-40])
    with pytest.raises(ModelError, match="was shortened while it was read"):
        list(file.pieces("x"))


def test_materialized_values_are_read_anew(source):
    """A stand-in holds nothing: each reading is memory of its own."""
    model, whole, _ = captured_twice(source)
    let_go_of_weights(model, [whole.graph_module])
    weight = model.model.model.layers[0].mlp.up_proj.weight
    first, second = materialize(weight), materialize(weight)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
