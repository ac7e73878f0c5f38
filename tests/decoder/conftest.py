"""One exported decoder for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import sentences

from claq_export.cli import main


@pytest.fixture(scope="session")
def decoder_artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama at 4 bits, with cache, exported and verified by the command line."""
    folder = tmp_path_factory.mktemp("decoder")
    text = folder.parent / "decoder.txt"
    text.write_text("\n".join(sentences(64)), encoding="utf-8")
    options = ["--calibration", str(text), "--samples", "4", "--sequence-length", "32", "--quiet"]
    assert main([str(tiny_llama), "--out", str(folder / "model.onnx"), *options]) == 0
    return folder
