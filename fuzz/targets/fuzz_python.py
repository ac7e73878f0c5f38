"""Runs one Python target under atheris: ``python fuzz_python.py TARGET [libFuzzer options] CORPUS...``."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

# Only claq's own readers are instrumented; torch and onnx are imported before, as they are.
import onnx  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402, F401

with atheris.instrument_imports(
    include=[
        "claq_export.inputs",
        "claq_export.format",
        "claq_export.calibration.data",
        "claq_export.capture.checkpoint",
    ]
):
    import readers


def main() -> None:
    torch.set_num_threads(1)
    name = sys.argv.pop(1)
    target = readers.TARGETS[name]
    atheris.Setup(sys.argv, lambda data: readers.run(target, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
