"""A cache in buffers that each step writes into: the same tokens, logits and keys as with a longer cache from each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tiny_models import sentences

import claq_export
from claq_export import cache_buffers, verify
from claq_export.cache_buffers import CacheBuffers, run_in_place, takes_buffers
from claq_export.errors import VerificationError
from claq_export.generation import Generator

claq_runtime = pytest.importorskip("claq_runtime")


def generator_of(folder: Path, library: bool = True) -> Generator:
    return Generator(folder, Path(claq_runtime.library_path()) if library else None)


@pytest.fixture(scope="module", params=["float32", "float16"])
def artifact(request: pytest.FixtureRequest) -> Path:
    """A model with a cache in float32, and one with a cache in float16."""
    folder: Path = request.getfixturevalue("decoder_artifact" if request.param == "float32" else "narrow_artifact")
    return folder


@pytest.mark.parametrize("prompt", [[2], [2, 40, 41, 42, 43, 44]], ids=len)
def test_the_same_tokens_while_buffers_grow(artifact: Path, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_buffers, "_FEWEST", 2)
    rooms = []
    reserve = CacheBuffers.reserve

    def watched(self: CacheBuffers, tokens: int) -> None:
        reserve(self, tokens)
        rooms.append(self.room)

    monkeypatch.setattr(CacheBuffers, "reserve", watched)
    generator = generator_of(artifact)
    assert generator.in_place
    found = list(generator.tokens(prompt, 20))
    assert len(set(rooms)) > 2 or len(prompt) > 1
    assert rooms == sorted(rooms)
    generator.in_place = False
    assert found == list(generator.tokens(prompt, 20))
    assert len(rooms) == 20


def test_a_batch_padded_on_the_left_and_several_tokens_at_once(artifact: Path) -> None:
    session = generator_of(artifact).session
    names = [value.name for value in session.get_outputs()]
    random = np.random.default_rng(0)
    past = {name: kept.empty(2) for name, kept in cache_buffers.past_inputs(session).items()}
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    for new in (4, 1, 1, 3):
        mask = np.concatenate([mask, np.ones((2, new), np.int64)], 1) if next(iter(past.values())).size else mask
        positions = np.clip(mask.cumsum(-1) - 1, 0, None)[:, -new:]
        inputs = {
            "input_ids": random.integers(5, 60, (2, new)),
            "attention_mask": mask,
            "position_ids": positions,
            **past,
        }
        wanted = session.run(names, inputs)
        for found, value in zip(run_in_place(session, names, inputs), wanted, strict=True):
            np.testing.assert_array_equal(found, value)
        past = dict(zip(past, wanted[1:], strict=True))


def test_one_buffer_for_a_whole_text(decoder_artifact: Path) -> None:
    """What lies behind the tokens is never read."""
    generator = generator_of(decoder_artifact)
    cache = CacheBuffers(generator.session)
    cache.reserve(12)
    for buffer in cache._buffers.values():
        buffer.fill(np.nan)
    text = np.array([[2, 40, 41, 42, 43, 44, 9, 8, 7]])
    found = []
    for first, last in ((0, 1), (1, 4), (4, 5), (5, 9)):
        inputs = {
            "input_ids": text[:, first:last],
            "attention_mask": np.ones((1, last), np.int64),
            "position_ids": np.arange(first, last)[None],
        }
        found.append(cache.run(inputs))
    assert (cache.length, cache.room) == (9, max(cache_buffers._FEWEST, 24))
    wanted, state = generator.step(text, 0, generator.empty_cache())
    np.testing.assert_allclose(np.concatenate(found, 1), wanted, atol=1e-4 * float(np.abs(wanted).max()))
    keys = cache.tokens("past_key_values.0.key")
    np.testing.assert_allclose(keys, state[0].numpy(), atol=1e-5)


def test_not_without_the_library(decoder_artifact: Path) -> None:
    generator = generator_of(decoder_artifact, library=False)
    assert takes_buffers(generator.session)
    assert not generator.in_place
    assert list(generator.tokens([2, 40], 5)) == list(generator_of(decoder_artifact).tokens([2, 40], 5))


def test_not_where_attention_is_left_to_a_gpu(decoder_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    for usable in (True, False):
        monkeypatch.setattr(claq_runtime, "cuda", lambda usable=usable: (usable, ""))
        assert generator_of(decoder_artifact).in_place is not usable


@pytest.mark.parametrize("setting", [{"opset": 18}, {"dtype": "float16"}], ids=str)
def test_files_that_do_not_take_buffers_say_nothing_of_them(
    tiny_llama: Path, setting: dict[str, object], tmp_path: Path
) -> None:
    config = claq_export.Config(calibration="none", **setting)
    claq_export.export(str(tiny_llama), out=tmp_path / "model.onnx", config=config, verify=False)
    generator = generator_of(tmp_path)
    assert not takes_buffers(generator.session)
    assert not generator.in_place
    assert len(list(generator.tokens([2, 40], 3))) == 3


def test_an_export_checks_the_cache_in_place(
    one_block_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(session: ort.InferenceSession, names: Sequence[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        logits, *state = run_in_place(session, names, inputs)
        return [logits + 1, *state]

    monkeypatch.setattr(verify, "run_in_place", wrong)
    (tmp_path / "text.txt").write_text("\n".join(sentences(8)), encoding="utf-8")
    config = claq_export.Config(calibration=tmp_path / "text.txt", samples=2, sequence_length=16)
    with pytest.raises(VerificationError, match=r"runtime, cache in place: output 'logits'"):
        claq_export.export(str(one_block_llama), out=tmp_path / "out" / "model.onnx", config=config)
    assert not (tmp_path / "out" / "model.onnx").exists()
