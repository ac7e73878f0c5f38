"""The fuzz targets on the committed corpus and on mutations of it; a bounded run of the fuzzers where they are installed."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[2] / "fuzz"


@pytest.fixture(scope="module")
def readers():
    spec = importlib.util.spec_from_file_location("fuzz_readers", FUZZ / "targets" / "readers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = ("safetensors", "checkpoint", "layer", "onnx", "paths", "calibration", "index", "config", "arrays")


def mutations(content: bytes, count: int, rng: random.Random):
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            kind = rng.randrange(3)
            if kind == 0 and place < len(data):
                data[place] = rng.randrange(256)
            elif kind == 1:
                data[place:place] = rng.randbytes(rng.randint(1, 4))
            else:
                del data[place : place + rng.randint(1, 8)]
        yield bytes(data)


@pytest.mark.parametrize("target", TARGETS)
def test_readers_refuse_in_their_own_words(readers, target):
    """Whatever the bytes, a reader returns or raises a ClaqError."""
    rng = random.Random(0)
    corpus = sorted((FUZZ / "corpus" / target).iterdir())
    accepted = 0
    for path in corpus:
        content = path.read_bytes()
        accepted += readers.run(readers.TARGETS[target], content)
        for data in mutations(content, 60, rng):
            readers.run(readers.TARGETS[target], data)
    assert accepted, "no input of the corpus is a valid one, so nothing behind the first check is reached"


def test_a_finding_is_seen(readers):
    def broken(data: bytes) -> None:
        raise KeyError("not a refusal")

    with pytest.raises(KeyError):
        readers.run(broken, b"")


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install atheris")
def test_the_fuzzer_runs(tmp_path):
    command = [sys.executable, FUZZ / "run.py", "safetensors", "--runs", "3000", "--corpus", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| safetensors | 3,000 |" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CLAQ_FUZZ_NATIVE"), reason="builds libclaq with clang: set CLAQ_FUZZ_NATIVE=1 for it"
)
def test_the_native_fuzzer_runs():
    command = [sys.executable, FUZZ / "run.py", "native", "--seconds", "20"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| none |" in result.stdout
