"""Everything claq reads from files that somebody else may have made passes through here, before it is believed.

One module a kind of file; each states its limits, names the file in its errors and executes nothing it reads
(``docs/security.md``). Readers take the error class of their caller's room, because a damaged model and a damaged
artifact have different exit codes.
"""

from .json_file import is_text, parse_json_object, read_json_object
from .model_config import check_sizes
from .npz_file import read_npz
from .onnx_file import OnnxFile
from .paths import contained
from .safetensors_file import SafetensorsFile, TensorInfo, parse_header

__all__ = [
    "OnnxFile",
    "SafetensorsFile",
    "TensorInfo",
    "check_sizes",
    "contained",
    "is_text",
    "parse_header",
    "parse_json_object",
    "read_json_object",
    "read_npz",
]
