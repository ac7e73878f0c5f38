"""Claq folders through transformers' own from_pretrained and save_pretrained."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import claq_export
from claq_export.errors import ConfigError, FormatError, ModelError
from claq_export.integrations.places import find_places
from claq_export.integrations.transformers import mark_quantized
from claq_export.modules import ClaqEmbedding, ClaqLinear

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
    """Those that an export of a folder and a module in Python have in common: gradients are for the first by default."""
    return claq_export.Config(
        **{"bits": 4, "calibration": calibration(), "outliers": 0.005, "guided": False, **changes}
    )


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


def tiny(kind: str):
    """A random model of transformers' class ``kind``, biases not zero, and its inputs."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, **SPECIAL}
    encoder = {**sizes, "intermediate_size": 64, "max_position_embeddings": 64}
    decoder = {**sizes, "max_position_embeddings": 64}
    bart = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    made = {
        "GPT2LMHeadModel": (
            "GPT2Config",
            {"vocab_size": 90, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4},
        ),
        "LlamaForCausalLM": ("LlamaConfig", {**TINY, "hidden_size": 32, "num_hidden_layers": 1}),
        "Gemma2ForCausalLM": ("Gemma2Config", {**encoder, "num_key_value_heads": 2, "head_dim": 8}),
        "BertForMaskedLM": ("BertConfig", encoder),
        "RobertaForMaskedLM": ("RobertaConfig", encoder),
        "AlbertForMaskedLM": ("AlbertConfig", {**encoder, "embedding_size": 32}),
        "PhiForCausalLM": ("PhiConfig", encoder),
        "MixtralForCausalLM": ("MixtralConfig", {**encoder, "num_key_value_heads": 2, "num_local_experts": 2}),
        "Gemma3ForCausalLM": ("Gemma3TextConfig", {**encoder, "num_key_value_heads": 2, "head_dim": 8}),
        "OPTForCausalLM": ("OPTConfig", {**decoder, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        "FalconForCausalLM": ("FalconConfig", sizes),
        "OlmoForCausalLM": ("OlmoConfig", encoder),
        "BartForConditionalGeneration": (
            "BartConfig",
            {"vocab_size": 90, "d_model": 32, **bart, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **SPECIAL},
        ),
        "T5ForConditionalGeneration": (
            "T5Config",
            {"vocab_size": 90, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        ),
    }
    config, settings_of = made[kind]
    given = {**SPECIAL, **settings_of, "decoder_start_token_id": 1}
    model = getattr(transformers, kind)(getattr(transformers, config)(**given)).eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value, std=0.1)
    return model


SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def logits(model) -> torch.Tensor:
    more = {"decoder_input_ids": PROMPT[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=PROMPT, **more).logits


@functools.cache
def _quantized_tiny(kind: str):
    model = tiny(kind)
    inputs = {"input_ids": PROMPT, "decoder_input_ids": PROMPT[:, :3]}
    example = inputs if model.config.is_encoder_decoder else (PROMPT,)
    claq_export.quantize(model, example, claq_export.Config(bits=4, calibration="none"))
    return mark_quantized(model)


def marked(kind: str):
    """The model quantized without calibration, ready to be saved."""
    return copy.deepcopy(_quantized_tiny(kind))


def loaded_again(model, folder: Path):
    """What ``from_pretrained`` makes of the folder that the model is saved to; nothing may be missing or left over."""
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return again


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM", "AlbertForMaskedLM"])
def test_a_head_whose_bias_is_another_parameter_too(kind: str, tmp_path: Path) -> None:
    # Itself, since a deep copy's parameter no longer has the memory of the head's bias.
    model = _quantized_tiny(kind)
    again = loaded_again(model, tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    once_more = loaded_again(again, tmp_path / "two")
    assert torch.equal(logits(once_more), logits(model))
    assert_same_tensors(stored(tmp_path / "one"), stored(tmp_path / "two"))


def test_an_exported_head_takes_the_bias_that_is_stored(tmp_path: Path) -> None:
    source = tiny("BertForMaskedLM")
    source.save_pretrained(tmp_path / "source")
    config = claq_export.Config(bits=4, calibration="none")
    claq_export.export(tmp_path / "source", out=tmp_path / "claq" / "model.onnx", config=config, verify=False)
    loaded = type(source).from_pretrained(tmp_path / "claq")
    predictions = loaded.cls.predictions
    assert torch.equal(predictions.decoder.bias, source.cls.predictions.bias)
    assert predictions.decoder.bias.data_ptr() == predictions.bias.data_ptr()


def without_tensors(folder: Path, *names: str) -> None:
    """Take tensors out of the folder's file."""
    from safetensors.torch import save_file

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in stored(folder).items() if name not in names}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


def test_a_bias_that_is_in_no_file_is_zero(tmp_path: Path) -> None:
    marked("GPT2LMHeadModel").save_pretrained(tmp_path)
    without_tensors(tmp_path, "transformer.h.0.mlp.c_fc.bias")
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert list(info["missing_keys"]) == ["transformer.h.0.mlp.c_fc.bias"]
    assert not loaded.transformer.h[0].mlp.c_fc.bias.any()


@pytest.mark.parametrize(
    "kind", ["GPT2LMHeadModel", "Gemma2ForCausalLM", "BartForConditionalGeneration", "T5ForConditionalGeneration"]
)
def test_a_bare_models_folder_gives_the_tied_head(kind: str, tmp_path: Path) -> None:
    model = marked(kind)
    model.save_pretrained(tmp_path / "whole")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    bare.save_pretrained(tmp_path / "bare")
    whole, info = type(model).from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert not info["missing_keys"]
    table = whole.get_input_embeddings().weight
    assert torch.equal(whole.get_output_embeddings().weight + 0, table + 0)
    # Where the head had codes of its own they are lost with it, and the embedding's serve.
    torch.testing.assert_close(logits(whole), logits(model), rtol=0.3, atol=0.3)


def test_a_masked_language_model_of_a_bare_models_folder(tmp_path: Path) -> None:
    model = marked("BertForMaskedLM")
    model.save_pretrained(tmp_path / "whole")
    transformers.AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "bare")
    whole, info = type(model).from_pretrained(tmp_path / "bare", output_loading_info=True)
    # The embedding's weight is the head's; what a bare model does not have is new.
    assert all("predictions" in name and "decoder" not in name for name in info["missing_keys"])
    assert whole.cls.predictions.decoder.codes.data_ptr() == whole.bert.embeddings.word_embeddings.codes.data_ptr()
    assert not whole.cls.predictions.decoder.bias.any()
    assert not any(name.endswith("codes") for name in info["unexpected_keys"] if "pooler" not in name)


@pytest.mark.parametrize("kind", ["Gemma3ForCausalLM", "OPTForCausalLM", "FalconForCausalLM", "OlmoForCausalLM"])
def test_classes_of_their_own_and_no_parameter_at_all(kind: str, tmp_path: Path) -> None:
    """Gemma scales rows of its table, OPT moves positions, Falcon has its own linear, OLMo weights of linears alone."""
    model = marked(kind)
    again = loaded_again(model, tmp_path)
    table = again.get_input_embeddings()
    own = type(tiny(kind).get_input_embeddings())
    assert isinstance(table, ClaqEmbedding)
    assert own is nn.Embedding or isinstance(table, own)
    for one in (model, again):
        assert not any(isinstance(part, nn.Linear) for part in one.modules())
        assert max(value.numel() for value in one.parameters()) <= 64  # norms and biases
        assert torch.equal(greedy(one), greedy(model))
        one.load_state_dict(one.state_dict())
    assert torch.equal(greedy(again.to(torch.bfloat16)), greedy(model.to(torch.bfloat16)))
    assert (again.dtype, again.model.dtype if kind == "OlmoForCausalLM" else again.dtype) == (torch.bfloat16,) * 2


@pytest.mark.parametrize("kind", ["PhiForCausalLM", "T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_layers_that_share_codebooks_without_being_neighbours(kind: str, tmp_path: Path) -> None:
    model = marked(kind)
    again = loaded_again(model, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "kind",
    [
        "GPT2LMHeadModel",
        "BertForMaskedLM",
        "BartForConditionalGeneration",
        "Gemma3ForCausalLM",
        "OPTForCausalLM",
        "FalconForCausalLM",
        "OlmoForCausalLM",
        pytest.param(
            "MixtralForCausalLM",
            marks=pytest.mark.skipif(
                int(transformers.__version__.split(".")[0]) < 5,
                reason="transformers 4 loops over the experts that were hit",
            ),
        ),
    ],
)
def test_a_dequantized_model_is_saved_as_any_other(kind: str, tmp_path: Path) -> None:
    model = loaded_again(marked(kind), tmp_path / "claq")
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, ClaqLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)
    again = loaded_again(dense, tmp_path / "dense")
    assert torch.equal(logits(again), logits(dense))


def test_dequantizing_after_saving(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert model.dequantize().model.layers[0].mlp.down_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("where", ["subfolder", "variant", "shards"])
def test_folders_that_options_name(where: str, folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    options = {"subfolder": {"subfolder": "inner"}, "variant": {"variant": "small"}, "shards": {}}[where]
    saved = {
        "subfolder": {},
        "variant": {"variant": "small"},
        "shards": {"max_shard_size": sum(tensor.nbytes for tensor in stored(folder).values()) // 2},
    }[where]
    model.save_pretrained(tmp_path / options.get("subfolder", "."), **saved)
    # The configuration's own loader looks for it beside the weights.
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, local_files_only=True, **options)
    assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)


def test_a_models_copies_and_pickles_go_on_sharing_the_table(tmp_path: Path) -> None:
    model = loaded_again(marked("GPT2LMHeadModel"), tmp_path)
    for copied in (pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model)))), copy.deepcopy(model)):
        assert torch.equal(logits(copied), logits(model))
        assert copied.lm_head.codes.dtype == torch.uint32
        assert copied.lm_head.codes.data_ptr() == copied.transformer.wte.codes.data_ptr()


def test_a_loaded_model_is_captured_and_the_capture_saved(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": PROMPT, "use_cache": False}, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(input_ids=PROMPT, use_cache=False).logits, model(PROMPT).logits)


def test_resizing_to_the_size_that_is_there(tmp_path: Path) -> None:
    model = loaded_again(marked("GPT2LMHeadModel"), tmp_path)
    expected = logits(model)
    model.resize_token_embeddings(90)
    assert torch.equal(logits(model), expected)
    assert model.lm_head.codes.data_ptr() == model.transformer.wte.codes.data_ptr()
    with pytest.raises((TypeError, ModelError), match=r"Embedding|resized"):
        model.resize_token_embeddings(96)


def test_a_loaded_model_is_compiled_without_no_grad(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not any(value.requires_grad for value in model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(PROMPT, use_cache=False).logits, model(PROMPT).logits)


def test_a_model_in_double_precision_is_told(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.float64)
    with pytest.raises(ModelError, match=r"cast to torch\.float64; cast it to one of those"):
        model(PROMPT)


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


def test_matrices_of_a_stack_that_a_model_uses_in_its_own_way_are_refused() -> None:
    """As JetMoE's experts: left out, they would be random."""
    model = nn.Module()
    model.base_model_prefix = "model"
    model.experts = nn.Module()
    model.experts.weight = nn.Parameter(torch.zeros(3, 16, 32))
    stored = SimpleNamespace(entries={"experts.weight.0": {}}, parts=lambda name: [(name, 16)], tied=lambda _: [])
    with pytest.raises(ModelError, match=r"'experts\.weight\.0' is a matrix of a stack .* claq_export\.load instead"):
        find_places(model, stored)
