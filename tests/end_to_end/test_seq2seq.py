"""Encoder-decoders from folder to three files by the command line: T5 by text, Whisper by recordings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
import torch
import transformers
from tiny_models import save_tiny_t5, save_tiny_whisper

import claq_export
import claq_export.integrations.transformers
import claq_runtime
from claq_export.cli import main
from claq_export.errors import ConfigError, ModelError
from claq_export.evaluation.guard import guard
from claq_export.format.checkpoint import load_checkpoint
from claq_export.generation_seq2seq import Seq2SeqGenerator, is_seq2seq_folder
from claq_export.onnx_session import float32_arithmetic

PARTS = ("encoder", "decoder", "decoder_with_past")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKENS = [2, 70, 71, 72, 90, 3]


def recordings(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        soundfile.write(folder / f"{number}.wav", np.random.default_rng(number).standard_normal(16_000) * 0.1, 16_000)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = np.random.default_rng(0).integers(5, 60, (6, 9))
    path = tmp_path_factory.mktemp("data") / "pairs.npz"
    np.savez(path, input_ids=tokens, attention_mask=np.ones_like(tokens), decoder_input_ids=tokens[:, :5])
    return path


@pytest.fixture(scope="module")
def exported(t5: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 at 4 bits, over what an earlier export left; calibrated as with a limit on memory, which leaves no gradients."""
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "decoder_model.onnx.0123456789abcdef.data").write_bytes(b"of an earlier export")
    options = ["--calibration", str(pairs), "--no-guided", "--quiet"]
    assert main([str(t5), "--out", str(folder / "model.onnx"), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_whisper(tmp_path_factory.mktemp("models") / "whisper")


@pytest.fixture(scope="module")
def heard(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    calibration = recordings(folder / "recordings", 4)
    assert main([str(whisper), "--out", str(folder / "model.onnx"), "--calibration", str(calibration), "--quiet"]) == 0
    return folder


def data_of(model: Path) -> dict[str, tuple[str, int]]:
    """Initializer -> file and offset, of those outside of the model file."""
    found = {}
    for tensor in onnx.load(str(model), load_external_data=False).graph.initializer:
        if tensor.external_data:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (entries["location"], int(entries["offset"]))
    return found


def test_three_files_share_their_data(exported: Path) -> None:
    assert is_seq2seq_folder(exported)
    assert not (exported / "model.onnx").exists()
    encoder, first, later = (data_of(exported / f"{part}_model.onnx") for part in PARTS)
    files = {place for held in (encoder, first, later) for place, _ in held.values()}
    assert {path.name for path in exported.glob("*.data")} == files  # the earlier one is gone
    assert sorted(name.split(".onnx.")[0] for name in files) == ["decoder_model", "encoder_model"]
    assert later  # all of it in the data of the first two
    assert {name: later[name] for name in later if name in first} == {
        name: first[name] for name in later if name in first
    }
    shared = next(name for name in encoder if name.endswith("codes") and name in first)
    assert encoder[shared] == first[shared]  # the embedding, which is the head too
    assert load_checkpoint(exported).config["task"] == "text2text-generation-with-past"
    assert json.loads((exported / "config.json").read_text())["quantization_config"]["quant_method"] == "claq"


@pytest.mark.parametrize("with_library", [False, True], ids=["stock", "runtime"])
def test_onnx_runtime_generates_as_transformers_does(exported: Path, with_library: bool) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported)
    assert type(model.lm_head).__name__ == "ClaqLinear"
    found = []
    with float32_arithmetic():
        generator = Seq2SeqGenerator(exported, Path(claq_runtime.library_path()) if with_library else None)
        for prompt in (TOKENS, [2, 70, 5, 6, 7, 3]):
            tokens = torch.tensor([prompt])
            wanted = model.generate(input_ids=tokens, max_new_tokens=12, do_sample=False, num_beams=1)[0, 1:].tolist()
            encoded = {"input_ids": tokens.numpy(), "attention_mask": np.ones_like(tokens.numpy())}
            assert list(generator.tokens(encoded, [0], 12)) == wanted
            found.append(wanted)
    assert found[0] != found[1]


def test_load_gives_the_same_model(t5: Path, exported: Path) -> None:
    fresh = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.from_pretrained(t5)).eval()
    loaded = claq_export.load(exported, fresh)
    named = {"input_ids": torch.tensor([TOKENS]), "decoder_input_ids": torch.tensor([[0, 7, 9]])}
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported)
    with torch.no_grad():
        assert torch.equal(loaded(**named).logits, again(**named).logits)


def test_generate_answers(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(exported), "--prompt", "the people of the land", "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert not out.startswith("the people")
    assert "prompt tokens in" in err
    assert "5 new ones" in err


SENTENCES = "the people of the land\nrain fell all night\nthe sea\n"


def checkpoint_alone(artifact: Path, folder: Path) -> Path:
    """What PyTorch reads of an artifact."""
    folder.mkdir()
    for name in ("claq.safetensors", "claq.json", "config.json"):
        (folder / name).write_bytes((artifact / name).read_bytes())
    return folder


def test_verify_compares_what_comes_after_the_originals_tokens(
    t5: Path, pairs: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES)
    with float32_arithmetic():
        report = guard(exported, t5, text, {"max_kl": 10.0}, library="none")
    assert report.passed
    assert report.task == "text2text-generation"
    # The same by hand, a sentence at a time and without padding.
    original = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    quantized = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    divergences = []
    for line in SENTENCES.split("\n")[:-1]:
        encoded = tokenizer(line, return_tensors="pt")["input_ids"]
        written = original.generate(input_ids=encoded, max_new_tokens=63, do_sample=False, num_beams=1)
        written = written[:, :-1] if written[0, -1] == original.config.eos_token_id else written
        with torch.no_grad():
            p, q = (
                m(input_ids=encoded, decoder_input_ids=written).logits[0].log_softmax(-1) for m in (original, quantized)
            )
        divergences.append((p.exp() * (p - q)).sum(-1))
    expected = torch.cat(divergences)
    assert report.measures["tokens"] == len(expected)
    assert report.measures["kl_mean"] == pytest.approx(float(expected.mean()), rel=1e-2, abs=1e-8)
    assert len(report.layers) == len(load_checkpoint(exported).layers)
    assert all(layer.output_error is not None for layer in report.layers if layer.name != "shared")
    # The other forms of the artifact give the same.
    alone = guard(checkpoint_alone(exported, tmp_path / "alone"), t5, text, {"max_kl": 10.0})
    assert alone.measures["kl_mean"] == pytest.approx(report.measures["kl_mean"], rel=1e-2, abs=1e-8)
    single = tmp_path / "single" / "model.onnx"
    options = ["--calibration", str(pairs), "--no-cache", "--no-guided", "--accuracy", "fp32", "--no-verify", "--quiet"]
    assert main([str(t5), "--out", str(single), *options]) == 0
    with float32_arithmetic():
        uncached = guard(single, t5, text, {"max_kl": 10.0}, layers=False)
    assert uncached.measures["kl_mean"] == pytest.approx(report.measures["kl_mean"], rel=1e-2, abs=1e-8)
    # A limit that does not hold has an exit status of its own.
    command = ["verify", str(exported / "model.onnx"), "--against", str(t5), "--text", str(text)]
    assert main([*command, "--max-kl", str(report.measures["kl_mean"] / 2), "--no-layers"]) == 8
    assert "kl_mean is" in capsys.readouterr().err


def test_verify_of_speech(whisper: Path, heard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(heard), "--against", str(whisper), "--max-kl", "10", "--json"]
    assert main([*command, "--audio", str(heard / "recordings")]) == 0
    measures = json.loads(capsys.readouterr().out)["measures"]
    assert measures["samples"] == 4
    assert 0 < measures["kl_mean"] < measures["kl_p99"]
    (tmp_path / "text.txt").write_text(SENTENCES)
    assert main([*command, "--text", str(tmp_path / "text.txt")]) == 2
    assert "automatic-speech-recognition is measured on recordings (--audio), not on text" in capsys.readouterr().err


def test_verify_names_what_is_wrong(t5: Path, exported: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES)
    with pytest.raises(
        ModelError, match=r"decoder_model.onnx is one of several files of a model; name them as .*model.onnx"
    ):
        guard(exported / "decoder_model.onnx", t5, text, {"max_kl": 1.0})
    with pytest.raises(ConfigError, match="text2text-generation is measured on text"):
        guard(exported, t5, None, {"max_kl": 1.0}, audio=tmp_path)
    with pytest.raises(ConfigError, match="needs a text"):
        guard(exported, t5, None, {"max_kl": 1.0})


def test_last_logits_are_for_language_models(t5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(t5), "--dry-run", "--last-logits", "--quiet"]) == 2
    assert "last_logits is for language models with a key/value cache" in capsys.readouterr().err


def test_with_a_limit_on_memory_the_files_are_the_same(t5: Path, pairs: Path, exported: Path, tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "model.onnx"), "--calibration", str(pairs), "--quiet", "--memory", "4GB"]
    assert main([str(t5), *arguments]) == 0
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes(), name


def test_whisper_transcribes(heard: Path, tmp_path: Path) -> None:
    model = transformers.WhisperForConditionalGeneration.from_pretrained(heard)
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(heard)
    assert (extractor.feature_size, extractor.n_samples) == (8, 16_000)
    sound, _ = soundfile.read(heard / "recordings" / "2.wav", dtype="float32")
    spectrum = extractor(sound, sampling_rate=16_000, return_tensors="np")["input_features"]
    with float32_arithmetic():
        generator = Seq2SeqGenerator(heard, Path(claq_runtime.library_path()))
        found = list(generator.tokens({"input_features": spectrum}, [2], 10))
    tokens = [2]
    for token in found:
        with torch.no_grad():
            logits = model(torch.from_numpy(spectrum), decoder_input_ids=torch.tensor([tokens])).logits
        assert int(logits[0, -1].argmax()) == token
        tokens.append(token)
    assert len(set(found)) > 1


def test_the_example_transcribes(heard: Path) -> None:
    recording = heard / "recordings" / "1.wav"
    script = f"""
import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import functools, transformers, transcribe
transcribe.WhisperFeatureExtractor = functools.partial(transformers.WhisperFeatureExtractor, chunk_length=1)
sys.argv = ["transcribe.py", {str(heard)!r}, {str(recording)!r}, "--first", "[CLS]"]
transcribe.main()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip()


def test_speech_has_no_prompt(heard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(heard), "--prompt", "the"]) == 2
    assert "hears speech, which no prompt can give; examples/transcribe.py" in capsys.readouterr().err


def test_float16(whisper: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": "none", "dtype": "float16"}
    result = claq_export.export(whisper, out=tmp_path / "model.onnx", config=claq_export.Config(**settings))
    assert [path.name for path in result.artifact.models] == [f"{part}_model.onnx" for part in PARTS]
    assert set(result.verifications) == set(result.artifact.models)
    later = onnx.load(str(tmp_path / "decoder_with_past_model.onnx"), load_external_data=False)
    kinds = {value.name: value.type.tensor_type.elem_type for value in later.graph.input}
    assert kinds.pop("input_ids") == onnx.TensorProto.INT64
    assert set(kinds.values()) == {onnx.TensorProto.FLOAT16}
