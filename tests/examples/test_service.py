"""The service example: the diff is the whole move, both services give the same unit vectors and the same text."""

from __future__ import annotations

import difflib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from claq_export.generation import Generator

pytest.importorskip("fastapi", reason="pip install -r examples/service/requirements.txt")
pytest.importorskip("httpx", reason="pip install -r examples/service/requirements.txt")

SERVICE = Path(__file__).resolve().parents[2] / "examples" / "service"
PROMPT, NEW_TOKENS = "the people of the country", 6
WORDS = ["[PAD]", "rain", "fell", "all", "night"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An encoder that looks rows up in a table, and its tokenizer."""
    table = np.random.default_rng(0).standard_normal((len(WORDS), 8)).astype(np.float32)
    tokens = [
        helper.make_tensor_value_info(n, onnx.TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")
    ]
    states = helper.make_tensor_value_info("last_hidden_state", onnx.TensorProto.FLOAT, ["b", "s", 8])
    lookup = helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])
    graph = helper.make_graph([lookup], "encoder", tokens, [states], [numpy_helper.from_array(table, "table")])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "model.onnx"


def client(name: str, model: Path, generator: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from fastapi.testclient import TestClient

    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("GENERATOR", str(generator / "model.onnx"))
    monkeypatch.syspath_prepend(str(SERVICE))
    service = TestClient(runpy.run_path(str(SERVICE / name))["app"])
    assert service.get("/health").json() == {"status": "ok"}
    return service


def embeddings(service: Any) -> np.ndarray:
    assert service.post("/embed", json={"sentences": []}).status_code == 422
    response = service.post("/embed", json={"sentences": ["rain", "rain fell all night"]})
    return np.array(response.json()["embeddings"])


def generated(service: Any) -> tuple[list[int], str]:
    """Tokens and text, put together from the lines of the stream."""
    response = service.post("/generate", json={"prompt": PROMPT, "max_new_tokens": NEW_TOKENS})
    lines = [json.loads(line) for line in response.text.splitlines()]
    return [line["token"] for line in lines], "".join(line["text"] for line in lines)


def test_both_services_answer_alike(model: Path, decoder_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("claq_runtime")
    before = client("before.py", model, decoder_artifact, monkeypatch)
    after = client("after.py", model, decoder_artifact, monkeypatch)
    vectors = embeddings(before)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(embeddings(after), vectors, rtol=1e-6)
    assert abs(float(vectors[0] @ vectors[1])) < 0.999
    tokens, text = generated(before)
    tokenizer = Tokenizer.from_file(str(decoder_artifact / "tokenizer.json"))
    stop = json.loads((decoder_artifact / "config.json").read_text())["eos_token_id"]
    expected = Generator(decoder_artifact).tokens(tokenizer.encode(PROMPT).ids, NEW_TOKENS, stop=[stop])
    assert tokens == list(expected)
    assert text == tokenizer.decode(tokens)
    assert generated(after) == (tokens, text)
    too_long = before.post("/generate", json={"prompt": "rain " * 60, "max_new_tokens": NEW_TOKENS})
    assert too_long.status_code == 422
    assert "64 fit" in too_long.json()["detail"]


def test_the_diff_is_two_lines_of_code_and_all_there_is() -> None:
    before, after = ((SERVICE / name).read_text().splitlines(True) for name in ("before.py", "after.py"))
    diff = "".join(difflib.unified_diff(before, after, "before.py", "after.py"))
    assert diff == (SERVICE / "service.diff").read_text()
    assert diff in (SERVICE / "README.md").read_text()
    changed = [line for line in diff.splitlines()[2:] if line[0] in "+-" and line[1:].strip()]
    assert changed == ["+import claq_runtime", "+claq_runtime.register(options)"]
