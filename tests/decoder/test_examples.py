"""The examples for language models, each in an interpreter that has what it needs: all give the same tokens."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from claq_export.generation import Generator

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "the people of the country"
NEW_TOKENS = 6


def interpreter(module: str, variable: str) -> str:
    """This interpreter if it has the module, else the one that an environment variable names."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if found:
        return sys.executable
    if variable in os.environ:
        return os.environ[variable]
    pytest.skip(f"{module} is not installed here; {variable} may name an interpreter that has it")


def keep_last_logits(path: Path) -> None:
    """What ``--last-logits`` does to a graph, without another export: the output head reads the last token alone."""
    model = onnx.load(str(path), load_external_data=False)
    position, head = next((i, node) for i, node in enumerate(model.graph.node) if "logits" in node.output)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "last"))
    model.graph.node.insert(position, onnx.helper.make_node("Gather", [head.input[0], "last"], ["last_state"], axis=1))
    head.input[0] = "last_state"
    axis = model.graph.output[0].type.tensor_type.shape.dim[1]
    axis.Clear()
    axis.dim_value = 1
    path.write_bytes(model.SerializeToString())


def run(python: str, script: str, *arguments: str) -> str:
    result = subprocess.run(
        [python, str(ROOT / "examples" / script), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


@pytest.fixture(scope="module")
def expected(decoder_artifact: Path) -> tuple[list[int], list[int], str]:
    """Prompt, new tokens, and both as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(decoder_artifact / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    tokens = list(Generator(decoder_artifact).tokens(prompt, NEW_TOKENS))
    return prompt, tokens, tokenizer.decode(prompt + tokens)


def test_onnxruntime(endless: Path, expected: tuple[list[int], list[int], str]) -> None:
    text = run(sys.executable, "generate_onnxruntime.py", str(endless), PROMPT, str(NEW_TOKENS))
    assert text == expected[2]


def test_optimum(endless: Path, expected: tuple[list[int], list[int], str]) -> None:
    python = interpreter("optimum.onnxruntime", "CLAQ_OPTIMUM_PYTHON")
    text = run(python, "generate_optimum.py", str(endless), PROMPT, str(NEW_TOKENS))
    assert text.split() == expected[2].split()


def test_optimum_embeds(artifact_encoder: Path) -> None:
    python = interpreter("optimum.onnxruntime", "CLAQ_OPTIMUM_PYTHON")
    lines = run(python, "embed_optimum.py", str(artifact_encoder)).splitlines()
    assert lines[0].startswith("1.000")


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
def test_genai(endless: Path, expected: tuple[list[int], list[int], str], in_place: bool) -> None:
    python = interpreter("onnxruntime_genai", "CLAQ_GENAI_PYTHON")
    prompt, tokens, _ = expected
    # GenAI's tokenizer does not know the test model's WordPiece; the tokens themselves are what is compared.
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); from pathlib import Path; import numpy as np;"
        f"import generate_genai; model, may = generate_genai.open_model(Path({str(endless)!r}));"
        "import importlib.util; assert may == bool(importlib.util.find_spec('claq_runtime'));"
        f"print(*generate_genai.likeliest(model, {in_place} and may, np.array({prompt}, np.int32), {len(tokens)}))"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [int(token) for token in result.stdout.split()] == prompt + tokens


@pytest.mark.parametrize("with_library", [False, True], ids=["stock", "runtime"])
def test_cpp(endless: Path, tmp_path: Path, expected: tuple[list[int], list[int], str], with_library: bool) -> None:
    import onnxruntime

    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries or shutil.which("make") is None or shutil.which("g++") is None:
        pytest.skip("needs make, g++ and an ONNX Runtime wheel that carries libonnxruntime.so")
    library = ""
    if with_library:
        library = pytest.importorskip("claq_runtime").library_path()
    source = shutil.copytree(ROOT / "examples" / "cpp", tmp_path / "cpp")
    subprocess.run(["make", "-s", "-C", str(source), f"ORT_LIBRARY={libraries[0]}"], check=True)
    prompt, tokens, _ = expected
    result = subprocess.run(
        [str(source / "generate"), str(endless / "model.onnx"), library, str(NEW_TOKENS), *map(str, prompt)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(token) for token in result.stdout.split()] == tokens


@pytest.fixture(scope="module", params=["all logits", "last logits", "float16 cache"])
def endless(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the artifact whose text does not end at the token that the random model likes best; its graph returns all
    logits or the last ones alone, its cache is in float32 or float16."""
    source = request.getfixturevalue("narrow_artifact" if request.param == "float16 cache" else "decoder_artifact")
    folder = Path(shutil.copytree(source, tmp_path_factory.mktemp("endless") / "model"))
    if request.param == "last logits":
        keep_last_logits(folder / "model.onnx")
    for name in ("config.json", "generation_config.json", "genai_config.json"):
        settings = json.loads((folder / name).read_text())
        (settings["model"] if name == "genai_config.json" else settings)["eos_token_id"] = 1
        (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def artifact_encoder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from claq_export.cli import main

    folder = tmp_path_factory.mktemp("encoder")
    assert (
        main([str(tiny_bert), "--out", str(folder / "model.onnx"), "--calibration", "none", "--quiet", "--no-verify"])
        == 0
    )
    return folder
