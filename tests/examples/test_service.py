"""The service example: the diff is the whole move, and both services give the same unit vectors."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

pytest.importorskip("fastapi", reason="pip install -r examples/service/requirements.txt")
pytest.importorskip("httpx", reason="pip install -r examples/service/requirements.txt")

SERVICE = Path(__file__).resolve().parents[2] / "examples" / "service"
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


def embeddings(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    from fastapi.testclient import TestClient

    monkeypatch.setenv("MODEL", str(model))
    client = TestClient(runpy.run_path(str(SERVICE / name))["app"])
    assert client.get("/health").json() == {"status": "ok"}
    assert client.post("/embed", json={"sentences": []}).status_code == 422
    response = client.post("/embed", json={"sentences": ["rain", "rain fell all night"]})
    return np.array(response.json()["embeddings"])


def test_both_services_answer_alike(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("claq_runtime")
    before = embeddings("before.py", model, monkeypatch)
    after = embeddings("after.py", model, monkeypatch)
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(after, before, rtol=1e-6)
    assert abs(float(before[0] @ before[1])) < 0.999


def test_the_diff_is_two_lines_of_code_and_all_there_is() -> None:
    before, after = ((SERVICE / name).read_text().splitlines(True) for name in ("before.py", "after.py"))
    diff = "".join(difflib.unified_diff(before, after, "before.py", "after.py"))
    assert diff == (SERVICE / "service.diff").read_text()
    assert diff in (SERVICE / "README.md").read_text()
    changed = [line for line in diff.splitlines()[2:] if line[0] in "+-" and line[1:].strip()]
    assert changed == ["+import claq_runtime", "+claq_runtime.register(options)"]
