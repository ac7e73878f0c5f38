"""Readers of files that somebody else may have made: what they hold is checked before it is believed.

Models, artifacts, work folders and arrays are read by them. Not here are calibration text (``calibration/data.py``), what
transformers reads itself (configuration classes, tokenizers, its own loading of a claq folder) and what ONNX Runtime does.

One module a kind of file; each states its limits, names the file in its errors and executes nothing it reads
(``docs/security.md``). Readers take the error class of their caller's room, because a damaged model and a damaged
artifact have different exit codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .json_file import is_text, parse_json_object, read_json_object
from .model_config import check_sizes
from .npz_file import names_in_npz, read_npz
from .paths import contained
from .safetensors_file import SafetensorsFile, TensorInfo, parse_header

if TYPE_CHECKING:
    from .onnx_file import OnnxFile

__all__ = [
    "OnnxFile",
    "SafetensorsFile",
    "TensorInfo",
    "check_sizes",
    "contained",
    "is_text",
    "names_in_npz",
    "parse_header",
    "parse_json_object",
    "read_json_object",
    "read_npz",
]


def __getattr__(name: str) -> Any:
    # Who reads no ONNX files, such as torch.compile, does not import onnx.
    if name == "OnnxFile":
        from .onnx_file import OnnxFile

        return OnnxFile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
