"""Claq folders through transformers' own from_pretrained and save_pretrained."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import claq_export
from claq_export.errors import ConfigError, FormatError, ModelError
from claq_export.integrations.transformers import mark_quantized
from claq_export.modules import ClaqLinear

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k"
GREEDY = {"max_new_tokens": 40, "do_sample": False}


def calibration(count: int = 4) -> list[dict[str, torch.Tensor]]:
    batches = []
    for seed in range(count):
        tokens = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(seed))
        positions = torch.arange(24)[None]
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": positions})
    return batches


def settings(**changes) -> claq_export.Config:
    return claq_export.Config(**{"bits": 4, "calibration": calibration(), "outliers": 0.005, **changes})


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Path:
    """The real stories260K where it is at hand."""
    return STORIES if (STORIES / "config.json").is_file() else tiny_llama


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("claq")
    claq_export.export(source, out=out / "model.onnx", config=settings(), verify=False)
    return out


@pytest.fixture(scope="module")
def quantized(source: Path):
    """The model as claq_export.quantize leaves it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    example = {**calibration(1)[0], "use_cache": False}
    names = {name: {0: "batch", 1: "sequence"} for name in calibration(1)[0]}
    return claq_export.quantize(model, example, settings(), dynamic_shapes=names)


PROMPT = torch.tensor([[1, 40, 50, 23]])


def greedy(model) -> torch.Tensor:
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    return tensors


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_greedy_tokens_are_those_of_the_model_quantized_in_memory(folder: Path, quantized) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded.model.layers[0].self_attn.k_proj, ClaqLinear)
    assert loaded.dtype == torch.float32
    assert torch.equal(greedy(loaded), greedy(quantized))
    torch.testing.assert_close(loaded(PROMPT).logits, quantized(PROMPT).logits, rtol=1e-4, atol=1e-4)


def test_no_dense_weight_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, torch.device]] = []
    original = nn.Linear.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append((str(tuple(self.weight.shape)), self.weight.device))

    monkeypatch.setattr(nn.Linear, "__init__", watched)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert made
    assert {device.type for _, device in made} == {"meta"}
    assert not any(isinstance(module, nn.Linear) for module in loaded.model.modules())
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_what_is_saved_is_what_was_loaded(folder: Path, tmp_path: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "one")
    assert_same_tensors(stored(tmp_path / "one"), stored(folder))
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "claq"
    assert "transformers_weights" not in config

    size = sum(tensor.nbytes for tensor in stored(folder).values())
    loaded.save_pretrained(tmp_path / "shards", max_shard_size=size // 4)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for saved in ("one", "shards"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / saved)
        assert torch.equal(again(PROMPT).logits, loaded(PROMPT).logits)


def test_a_model_quantized_in_memory_is_saved(quantized, tmp_path: Path) -> None:
    mark_quantized(quantized).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(PROMPT).logits, quantized(PROMPT).logits)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    with pytest.raises(ModelError, match=r"no quantized linear; run claq_export\.quantize first"):
        mark_quantized(plain)


def test_bare_models_other_dtypes_and_dense_weights(folder: Path) -> None:
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    bare = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(bare(PROMPT).last_hidden_state, whole.model(PROMPT).last_hidden_state)

    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half(PROMPT).logits.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.down_proj.scale.dtype == torch.float16

    dense = transformers.AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert isinstance(dense.model.layers[0].mlp.down_proj, nn.Linear)
    torch.testing.assert_close(dense(PROMPT).logits, whole(PROMPT).logits, rtol=1e-3, atol=1e-3)


TINY = {
    "vocab_size": 90,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def in_memory(model, **changes):
    """The model quantized without calibration, and ready to be saved."""
    example = {**calibration(1)[0], "use_cache": False}
    return mark_quantized(claq_export.quantize(model.eval(), example, settings(calibration="none", **changes)))


def test_a_quantized_head_is_not_tied_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, tie_word_embeddings=True))
    quantized = in_memory(model, include=("lm_head", "model.*")).eval()
    assert isinstance(quantized.lm_head, ClaqLinear)
    expected = quantized(PROMPT).logits
    for folder in (tmp_path / "one", tmp_path / "two"):
        quantized.save_pretrained(folder)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(quantized.lm_head, ClaqLinear)
        assert torch.equal(quantized(PROMPT).logits, expected)


def test_biases_and_weights_stored_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=90, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value, std=0.1)
    quantized = in_memory(model).eval()
    quantized.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.transformer.h[0].attn.c_attn, ClaqLinear)
    assert torch.equal(loaded(PROMPT).logits, quantized(PROMPT).logits)


def edited(folder: Path, to: Path, change) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_bad_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    newer = edited(folder, tmp_path / "newer", lambda config: config["quantization_config"].update(version=2))
    with pytest.raises(ConfigError, match="format version 2; this package reads version 1"):
        transformers.AutoModelForCausalLM.from_pretrained(newer)
    other = edited(folder, tmp_path / "other", lambda config: config.update(intermediate_size=256))
    with pytest.raises(ModelError, match=r"mlp.* has 256 output features in the model, \d+ in the files"):
        transformers.AutoModelForCausalLM.from_pretrained(other)
    plain = edited(folder, tmp_path / "plain", lambda config: config.update(transformers_weights="plain.safetensors"))
    with pytest.raises((FormatError, OSError), match=r"plain\.safetensors|no safetensors weights"):
        transformers.AutoModelForCausalLM.from_pretrained(plain)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, plain / "plain.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"plain\.safetensors: no description of quantized layers"):
        transformers.AutoModelForCausalLM.from_pretrained(plain)


def test_the_example_generates(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    in_memory(model).save_pretrained(tmp_path)
    for file in tiny_llama.glob("*token*"):
        shutil.copy(file, tmp_path)
    example = Path(__file__).resolve().parents[2] / "examples" / "transformers_load.py"
    runpy.run_path(str(example))["main"]([str(tmp_path), "--prompt", "the people", "--tokens", "5"])
    text, memory = capsys.readouterr().out.strip().splitlines()[-2:]
    assert text.startswith("the people")
    assert re.fullmatch(r"\d+\.\d MB in memory", memory)
