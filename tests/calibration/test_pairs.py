"""Calibration of encoder-decoders: recordings become spectra, and the model writes what its decoder reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import save_tiny_t5, save_tiny_whisper, sentences

from claq_export.api import capture
from claq_export.calibration.loading import load_calibration
from claq_export.calibration.speech import read_speech
from claq_export.capture import CapturedModel
from claq_export.config import Config
from claq_export.errors import CalibrationError

RATE = 16_000


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    captured, _ = capture(save_tiny_whisper(tmp_path_factory.mktemp("whisper")), cache=True)
    return captured


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    captured, _ = capture(save_tiny_t5(tmp_path_factory.mktemp("t5")), cache=True, reread=True)
    return captured


def write(path: Path, seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> Path:
    noise = np.random.default_rng(seed).standard_normal((int(seconds * rate), channels)) * 0.1
    soundfile.write(path, noise, rate)
    return path


def read(path: Path, captured: CapturedModel, samples: int | None) -> list[dict[str, torch.Tensor]]:
    return read_speech(path, captured.source.folder, captured.example_inputs["input_features"].shape[1], samples)


def test_recordings_are_cut_into_what_the_model_hears(whisper: CapturedModel, tmp_path: Path) -> None:
    write(tmp_path / "b.wav", 2.5)
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "a.FLAC".lower(), 0.5, channels=2)
    (tmp_path / "notes.txt").write_text("no audio")
    batches = read(tmp_path, whisper, 10)
    assert len(batches) == 4  # three seconds of one, half a second of the other
    assert all(batch["input_features"].shape == (1, 8, 100) for batch in batches)
    assert len({batch["input_features"].numpy().tobytes() for batch in batches}) == 4
    assert len(read(tmp_path, whisper, 2)) == 2
    assert len(read(tmp_path / "b.wav", whisper, None)) == 3


def test_channels_are_averaged(whisper: CapturedModel, tmp_path: Path) -> None:
    left, right = np.random.default_rng(0).standard_normal((2, RATE)) * 0.1
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", (left + right) / 2, RATE, subtype="FLOAT")
    two, one = (read(tmp_path / f"{name}.wav", whisper, 1)[0]["input_features"] for name in ("two", "one"))
    assert torch.allclose(two, one, atol=1e-4)


def test_the_model_writes_the_tokens(whisper: CapturedModel, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.wav", 1, seed=number)
    batches = load_calibration(whisper, Config(calibration=tmp_path))
    rows = [row for batch in batches for row in zip(batch["decoder_input_ids"], batch["input_features"], strict=True)]
    assert len(rows) == 3
    for tokens, features in rows:
        assert tokens[0] == 2  # the start token
        assert len(tokens) <= 40  # what the model takes
        assert not set(tokens.tolist()) & set(whisper.end_token_ids)
        logits = whisper.run({"input_features": features[None], "decoder_input_ids": tokens[None]})[0][0]
        assert logits[:-1].argmax(-1).tolist() == tokens[1:].tolist()


def test_texts_are_answered(t5: CapturedModel) -> None:
    texts = sentences(12)
    batches = load_calibration(t5, Config(calibration=texts, samples=12, batch_size=4))
    assert sum(len(batch["input_ids"]) for batch in batches) == 12
    assert all(set(batch) == {"input_ids", "attention_mask", "decoder_input_ids"} for batch in batches)
    assert all(len(batch["input_ids"]) == len(batch["decoder_input_ids"]) <= 4 for batch in batches)
    again = load_calibration(t5, Config(calibration=texts, samples=12, batch_size=4))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(batches, again, strict=True) for name in a)


def test_the_packaged_text_is_answered(t5: CapturedModel) -> None:
    batches = load_calibration(t5, Config(samples=5, sequence_length=16))
    assert sum(len(batch["input_ids"]) for batch in batches) == 5
    assert all(batch["input_ids"].shape[1] <= 16 for batch in batches)
    assert len({tuple(row.tolist()) for batch in batches for row in batch["decoder_input_ids"]}) > 1


def test_tokens_that_are_given_stay(t5: CapturedModel, tmp_path: Path) -> None:
    tokens = np.arange(12).reshape(2, 6) + 5
    given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "decoder_input_ids": tokens[:, :4]}
    np.savez(tmp_path / "pairs.npz", **given)
    (batch,) = load_calibration(t5, Config(calibration=tmp_path / "pairs.npz"))
    assert batch["decoder_input_ids"].tolist() == tokens[:, :4].tolist()
    (batch,) = load_calibration(
        t5, Config(calibration=[{name: torch.from_numpy(value) for name, value in given.items()}])
    )
    assert batch["decoder_input_ids"].tolist() == tokens[:, :4].tolist()
    del given["decoder_input_ids"]
    np.savez(tmp_path / "sources.npz", **given)
    batches = load_calibration(t5, Config(calibration=tmp_path / "sources.npz"))
    assert [int(batch["decoder_input_ids"][0, 0]) for batch in batches] == [0] * len(batches)


def test_without_cache_or_memory_the_tokens_must_be_given(t5: CapturedModel, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"hold no 'decoder_input_ids'.*not all in memory \(--memory\)"):
        load_calibration(t5, Config(calibration=sentences(2)), whole=False)
    graphs, t5.file_graphs = t5.file_graphs, ()
    try:
        with pytest.raises(CalibrationError, match=r"captured without a cache \(--no-cache\); give a .npz file"):
            load_calibration(t5, Config(calibration=sentences(2)))
    finally:
        t5.file_graphs = graphs


def test_bad_recordings_are_named(whisper: CapturedModel, tmp_path: Path) -> None:
    for path, message in (
        (write(tmp_path / "fast.wav", 1, rate=44_100), "fast.wav' has 44100 samples a second, the model hears 16000"),
        (write(tmp_path / "empty.wav", 0), "empty.wav' is empty"),
    ):
        with pytest.raises(CalibrationError, match=message):
            read(path, whisper, 1)
    (tmp_path / "bad.wav").write_bytes(b"RIFF and no more")
    with pytest.raises(CalibrationError, match=r"bad.wav' cannot be read"):
        read(tmp_path / "bad.wav", whisper, 1)
    (tmp_path / "none").mkdir()
    with pytest.raises(CalibrationError, match=r"none' holds no audio file \(.wav, .flac"):
        read(tmp_path / "none", whisper, 1)
    with pytest.raises(CalibrationError, match="calibrate it with recordings"):
        load_calibration(whisper, Config())


def test_without_soundfile_the_way_out_is_named(
    whisper: CapturedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(CalibrationError, match=r"pip install soundfile\); a .npz file of 'input_features' does not"):
        read(write(tmp_path / "a.wav", 1), whisper, 1)
