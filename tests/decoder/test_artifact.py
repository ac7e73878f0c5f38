"""A language model with a cache from folder to text: what is written, and what ONNX Runtime generates from it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tiny_models import sentences

import claq_export
from claq_export.capture.decoder import CACHED_TASK, capture_decoder
from claq_export.capture.pretrained import load_pretrained
from claq_export.cli import main
from claq_export.emit.function import CACHED_ATTENTION, LAYER_OPERATORS
from claq_export.errors import CaptureError, ConfigError, ModelError, OutputError
from claq_export.generation import Generator
from claq_export.verify_layers import layer_outputs

PROMPTS = ([2, 40, 41, 42, 43, 44], [2, 50, 51])
NEW_TOKENS = 8


def quantized(folder: Path) -> torch.nn.Module:
    """The artifact's model in PyTorch."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return claq_export.load(folder, AutoModelForCausalLM.from_config(config)).eval()


def padded(rows: tuple[list[int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    return (
        torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    )


def generate_batch(session: ort.InferenceSession, ids: torch.Tensor, mask: torch.Tensor, count: int) -> np.ndarray:
    """Greedy tokens ``[batch, count]`` for a batch padded on the left, as optimum and transformers feed a graph."""
    inputs = {value.name: value for value in session.get_inputs()}
    past = {
        name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for name, value in inputs.items()
        if name.startswith("past")
    }
    new, ones, result = ids.numpy(), mask.numpy(), []
    for _ in range(count):
        positions = np.clip(ones.cumsum(-1) - 1, 0, None)[:, -new.shape[1] :]
        feed = {"input_ids": new, "attention_mask": ones, "position_ids": positions, **past}
        logits, *state = session.run(None, {name: feed[name] for name in inputs})
        past = dict(zip(past, state, strict=True))
        new = logits[:, -1].argmax(-1)[:, None]
        ones = np.concatenate([ones, np.ones_like(new)], 1)
        result.append(new)
    return np.concatenate(result, 1)


def test_folder_is_complete(decoder_artifact: Path) -> None:
    names = {path.name for path in decoder_artifact.iterdir()}
    wanted = {"model.onnx", "config.json", "generation_config.json", "genai_config.json", "tokenizer.json"}
    assert names >= wanted | {"claq.safetensors", "claq.json"}
    listed = json.loads((decoder_artifact / "claq.json").read_text())["files"]
    assert listed.keys() == {name for name in names if not name.startswith(("model.onnx", "claq."))}
    for name, digest in listed.items():
        assert hashlib.sha256((decoder_artifact / name).read_bytes()).hexdigest() == digest
    model = onnx.load(str(decoder_artifact / "model.onnx"), load_external_data=False)
    cache = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    tokens = ["input_ids", "attention_mask", "position_ids"]
    assert [value.name for value in model.graph.input] == tokens + [f"past_key_values.{slot}" for slot in cache]
    assert [value.name for value in model.graph.output] == ["logits", *(f"present.{slot}" for slot in cache)]
    axes = [dim.dim_param or dim.dim_value for dim in model.graph.input[3].type.tensor_type.shape.dim]
    assert axes == ["batch", 2, "past_sequence", 16]
    operators = [node.op_type for node in model.graph.node]
    assert operators.count(CACHED_ATTENTION) == 2
    # Else a layer has its four linears, which split, turn, gate, add to and normalize their own results.
    assert operators.count("RMSNormalization") == 1
    assert [operators.count(name) for name in ("ClaqMatMulRotary", "ClaqMatMulSwiGLU", "ClaqMatMulAddNorm")] == [
        2,
        2,
        4,
    ]
    assert not {"Split", "Sigmoid", "RotaryEmbedding"} & set(operators)
    assert not {"Softmax", "ReduceMean", "Neg"} & set(operators)
    # Attention takes what the linears write: all that is reshaped belongs to the mask.
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    # Some versions of transformers make the angles by the one plain product, and transpose them.
    turned = [makers.get(node.input[0]) for node in model.graph.node if node.op_type == "Transpose"]
    assert turned == ["MatMul"] * operators.count("MatMul")
    assert operators.count("MatMul") <= 1
    for node in model.graph.node:
        if node.op_type == CACHED_ATTENTION:
            assert {makers[name] for name in node.input[:3]} == {"ClaqMatMulRotary"}
    assert {entry.key: entry.value for entry in model.metadata_props}["claq.task"] == CACHED_TASK

    genai = json.loads((decoder_artifact / "genai_config.json").read_text())
    decoder = genai["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 16)
    assert genai["model"]["type"] == "llama"
    assert genai["search"]["past_present_share_buffer"] is False


@pytest.mark.parametrize("with_library", [False, True], ids=["stock", "runtime"])
def test_batch_padded_on_the_left_generates_as_transformers(decoder_artifact: Path, with_library: bool) -> None:
    options = ort.SessionOptions()
    if with_library:
        pytest.importorskip("claq_runtime").register(options)
    session = ort.InferenceSession(str(decoder_artifact / "model.onnx"), options)
    ids, mask = padded(PROMPTS)
    with torch.no_grad():
        wanted = quantized(decoder_artifact).generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    np.testing.assert_array_equal(generate_batch(session, ids, mask, NEW_TOKENS), wanted[:, ids.shape[1] :].numpy())


def test_steps_of_several_tokens_continue_a_batch(decoder_artifact: Path) -> None:
    """Chunks of a prompt, two sequences at once: what GroupQueryAttention refuses."""
    session = ort.InferenceSession(str(decoder_artifact / "model.onnx"))
    ids = torch.randint(5, 60, (2, 9)).numpy()
    generator = Generator(decoder_artifact)
    whole, _ = generator.step(ids, 0, generator.empty_cache(2))
    first, cache = generator.step(ids[:, :4], 0, generator.empty_cache(2))
    second, _ = generator.step(ids[:, 4:], 4, cache)
    assert session.get_outputs()[0].name == "logits"
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-4 * float(np.abs(whole).max()))


def test_generator_streams_the_same_tokens(decoder_artifact: Path) -> None:
    generator = Generator(decoder_artifact)
    tokens = list(generator.tokens(PROMPTS[0], NEW_TOKENS))
    ids = torch.tensor([PROMPTS[0]])
    session = ort.InferenceSession(str(decoder_artifact / "model.onnx"))
    assert tokens == generate_batch(session, ids, torch.ones_like(ids), NEW_TOKENS)[0].tolist()
    assert (generator.timing.prompt_tokens, generator.timing.new_tokens) == (6, NEW_TOKENS)
    assert list(generator.tokens(PROMPTS[0], NEW_TOKENS, stop=[tokens[2]])) == tokens[: tokens.index(tokens[2])]
    drawn = [list(generator.tokens(PROMPTS[0], 5, temperature=5.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ConfigError, match="temperature"):
        next(generator.tokens(PROMPTS[0], 5, temperature=-1.0))


def test_command_streams_text(decoder_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(decoder_artifact), "--prompt", "the people", "--max-new-tokens", "5"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("the people")
    assert "tokens/s" in shown.err
    assert main([*arguments, "--chat"]) == ModelError.exit_code
    assert "no chat template" in capsys.readouterr().err
    assert main(["generate", str(decoder_artifact / "nothing"), "--prompt", "a"]) == ModelError.exit_code
    assert "does not exist" in capsys.readouterr().err


def test_perplexity_is_that_of_pytorch(decoder_artifact: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "onnx.json"
    text.write_text("\n".join(sentences(40, seed=3)), encoding="utf-8")
    from claq_export.evaluation.language import language_quality, read_text, token_windows
    from claq_export.evaluation.models import OnnxModel, TorchModel, open_tokenizer

    windows = token_windows(read_text(text), open_tokenizer(decoder_artifact), 32, 4)
    onnx_model = OnnxModel(decoder_artifact / "model.onnx", None, 1)
    found = language_quality(onnx_model, windows).perplexity
    assert found == pytest.approx(
        language_quality(TorchModel(quantized(decoder_artifact)), windows).perplexity, rel=1e-4
    )
    assert not out.exists()


def test_no_cache_and_other_opset(
    tiny_llama: Path, one_block_llama: Path, decoder_artifact: Path, tmp_path: Path
) -> None:
    """The graph that sees all tokens at once refuses to generate; opset 18 generates the same in older runtimes."""
    common = ["--calibration", "none", "--quiet", "--no-verify", "--out"]
    assert main([str(one_block_llama), *common, str(tmp_path / "whole" / "model.onnx"), "--no-cache"]) == 0
    assert not (tmp_path / "whole" / "genai_config.json").exists()
    with pytest.raises(ModelError, match="no key/value cache"):
        Generator(tmp_path / "whole")
    assert main([str(tiny_llama), *common, str(tmp_path / "old" / "model.onnx"), "--opset", "18"]) == 0
    model = onnx.load(str(tmp_path / "old" / "model.onnx"), load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 18
    tokens = list(Generator(tmp_path / "old").tokens(PROMPTS[0], NEW_TOKENS))
    assert tokens == list(Generator(decoder_artifact).tokens(PROMPTS[0], NEW_TOKENS))
    older = os.environ.get("CLAQ_ORT120_PYTHON")
    if older:
        script = Path(claq_export.__file__).parents[1] / "examples" / "generate_onnxruntime.py"
        code = (
            "import sys, types, runpy; sys.modules['tokenizers'] = types.SimpleNamespace(Tokenizer=None);"
            f"m = runpy.run_path({str(script)!r}); from pathlib import Path;"
            f"print(*m['generate'](m['open_session'](Path({str(tmp_path / 'old' / 'model.onnx')!r})), {PROMPTS[0]}, 8))"
        )
        result = subprocess.run([older, "-c", code], capture_output=True, text=True, check=True)
        assert [int(token) for token in result.stdout.split()] == tokens


def test_last_logits_generate_the_same_tokens(
    tiny_llama: Path, one_block_llama: Path, decoder_artifact: Path, tmp_path: Path
) -> None:
    from claq_export.evaluation.models import OnnxModel

    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(64)), encoding="utf-8")
    common = ["--quiet", "--last-logits", "--calibration", str(text), "--out"]
    target = tmp_path / "last" / "model.onnx"
    assert main([str(tiny_llama), *common, str(target), "--samples", "4", "--sequence-length", "32"]) == 0
    logits = ort.InferenceSession(str(target)).get_outputs()[0]
    assert logits.shape[:2] == ["batch", 1]
    tokens = list(Generator(target).tokens(PROMPTS[0], NEW_TOKENS))
    assert tokens == list(Generator(decoder_artifact).tokens(PROMPTS[0], NEW_TOKENS))
    with pytest.raises(ModelError, match="without --last-logits"):
        OnnxModel(target).logits(torch.tensor([PROMPTS[0]]))
    assert main([str(one_block_llama), *common, str(tmp_path / "whole.onnx"), "--no-cache"]) == ConfigError.exit_code


def test_a_cache_in_float16_generates_the_same_tokens(
    tiny_llama: Path, decoder_artifact: Path, narrow_artifact: Path, tmp_path: Path
) -> None:
    from claq_export.evaluation.models import OnnxModel

    old = tmp_path / "old" / "model.onnx"
    common = ["--calibration", "none", "--quiet", "--opset", "18", "--cache-dtype", "float16", "--out", str(old)]
    assert main([str(tiny_llama), *common]) == 0
    tokens = list(Generator(decoder_artifact).tokens(PROMPTS[0], NEW_TOKENS))
    for path in (narrow_artifact / "model.onnx", old):
        session = ort.InferenceSession(str(path))
        cache = [v for v in (*session.get_inputs(), *session.get_outputs()) if v.name.startswith(("past", "present"))]
        assert {value.type for value in cache} == {"tensor(float16)"}
        assert session.get_outputs()[0].type == "tensor(float)"
        assert list(Generator(path).tokens(PROMPTS[0], NEW_TOKENS)) == tokens
    assert {entry.key: entry.value for entry in onnx.load(str(old)).metadata_props}.get("claq.cache_buffers") is None
    # Of the same layers all but the rounding of keys and values is the same.
    ids = torch.tensor([PROMPTS[0]])
    found, wanted = (OnnxModel(folder / "model.onnx").logits(ids) for folder in (narrow_artifact, decoder_artifact))
    assert 0 < float((found - wanted).abs().max() / wanted.abs().max()) < 1e-3
    listed, narrow = (json.loads((folder / "claq.json").read_text()) for folder in (decoder_artifact, narrow_artifact))
    assert listed["layers"] == narrow["layers"]
    assert narrow["config"]["cache_dtype"] == "float16"


def test_keys_beyond_float16_are_refused_before_quantization(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(1e6)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    out = tmp_path / "out" / "model.onnx"
    options = ["--calibration", "none", "--quiet", "--cache-dtype", "float16", "--out", str(out)]
    assert main([str(folder), *options]) == ModelError.exit_code
    assert "present.1.key of the model overflows a cache in float16; leave --cache-dtype" in capsys.readouterr().err
    assert not out.exists()


def test_each_layer_runs_alone_with_and_without_the_library(decoder_artifact: Path) -> None:
    library = Path(pytest.importorskip("claq_runtime").library_path())
    path = decoder_artifact / "model.onnx"
    nodes = [n for n in onnx.load(str(path), load_external_data=False).graph.node if n.op_type in LAYER_OPERATORS]
    found = list(layer_outputs(path, library))
    assert [name for name, *_ in found] == [node.name for node in nodes]
    assert {node.op_type for node in nodes} == set(LAYER_OPERATORS) - {"ClaqMatMulAdd", "ClaqMatMulSplit"}
    for _, stock, native, _ in found:
        assert stock.shape[0] == 3
        np.testing.assert_allclose(native, stock, atol=1e-5 * float(np.abs(stock).max()))


def test_models_without_such_a_cache_are_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path)
    model, _, _ = load_pretrained(tmp_path)
    with pytest.raises(CaptureError, match="--no-cache"):
        capture_decoder(model)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"temperature": 1.0, "seed": -1}, "seed must be at least 0, got -1"),
    ],
    ids=["temperature nan", "temperature inf", "top_p nan", "seed"],
)
def test_settings_are_refused_before_the_first_token(
    decoder_artifact: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Generator(decoder_artifact).tokens(PROMPTS[0], 5, **settings)


def test_threads_are_not_negative(decoder_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="threads"):
        Generator(decoder_artifact, threads=-2)
    with pytest.raises(SystemExit):
        main(["generate", str(decoder_artifact), "--prompt", "the", "--threads", "-2"])
    assert "-2 is not a whole number, 0 or more" in capsys.readouterr().err


def test_logits_of_nan_are_no_text(decoder_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(decoder_artifact)
    nothing = (np.full((1, 6, 127), np.nan, np.float32), [])
    monkeypatch.setattr(Generator, "step", lambda *_: nothing)
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match=r"model\.onnx gives NaN as logits after 6 tokens"):
            list(generator.tokens(PROMPTS[0], 5, temperature=temperature))


def test_command_refuses_a_setting_before_it_shows_the_prompt(
    decoder_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(decoder_artifact), "--prompt", "the people"]
    for options in (["--seed", "-1"], ["--temperature", "nan"]):
        assert main([*arguments, *options]) == ConfigError.exit_code
        assert capsys.readouterr().out == ""
    # The tokenizer that was asked for, or none.
    assert main([*arguments, "--tokenizer", str(tmp_path)]) == ModelError.exit_code
    assert f"the tokenizer in {tmp_path} cannot be loaded" in capsys.readouterr().err


def test_command_reads_a_prompt_of_utf8(
    decoder_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(decoder_artifact), "--max-new-tokens", "1", "--prompt"]
    for content, status in ((b"the people", 0), (b"caf\xe9", ConfigError.exit_code), (b"", ConfigError.exit_code)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), errors="surrogateescape"))
        assert main([*arguments, "-"]) == status
    assert "not UTF-8" in capsys.readouterr().err
    assert main([*arguments, os.fsdecode(b"caf\xe9")]) == ConfigError.exit_code
    assert "the prompt is not UTF-8" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_standard_output_is_an_error(decoder_artifact: Path) -> None:
    command = [sys.executable, "-m", "claq_export", "generate", str(decoder_artifact), "--prompt", "the people"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [*command, "--max-new-tokens", "2"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(claq_export.__file__).parents[1])},
            check=False,
        )
    assert run.returncode == OutputError.exit_code, run.stderr
    assert "claq-export: standard output cannot be written: No space left on device" in run.stderr
    assert "Traceback" not in run.stderr
