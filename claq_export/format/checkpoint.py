"""The PyTorch container of a quantized model: ``claq.safetensors`` for tensors, ``claq.json`` for everything else.

``claq.json`` is an object with

- ``format`` = ``"claq"``, ``version`` = 1, and ``claq_version``, the version of this package that wrote it;
- ``config``: the settings of the run, any JSON object;
- ``layers``: name -> the integers of docs/format.md (``in_features``, ``out_features``, ``columns_4``, ``columns_3``,
  ``columns_2``, ``accuracy_level``), ``transposed`` (the model stores this weight as ``[K, N]``), and ``parts``, a list
  of ``{"name", "rows"}``: the linear layers of the PyTorch model that the layer stands for, by qualified name, in the
  order of their rows. A layer that was quantized alone has itself as its only part. ``tied``, if present, lists further
  modules of the same weight: the embedding that an output head is tied to;
- ``aliases``: names of tied tensors -> the name under which the tensor is stored;
- ``files``, if present: the smaller files written beside it, such as a tokenizer's -> their SHA-256. Only the next export
  into the folder reads them, to tell what it may remove.

Biases are unquantized tensors of the model and stored under their own names, like all others. The header of
``claq.safetensors`` carries the same object without ``config`` and ``files`` as metadata ``claq``, so that loaders which
fetch single files (transformers) need no other; its metadata ``format`` is ``pt``, which transformers asks for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import claq_export

from ..errors import FormatError, OutputError
from ..inputs import SafetensorsFile, parse_json_object
from .files import StagedFiles
from .layer import TENSOR_NAMES, QuantizedLinear
from .safetensors_writer import write_safetensors

TENSORS_FILE = "claq.safetensors"
CONFIG_FILE = "claq.json"
VERSION = 1
"""Version of the container, that of docs/format.md."""
METHOD = "claq"
"""The container's ``format``, and ``quant_method`` in a ``config.json`` beside it."""

JSON_LIMIT = 256 << 20
"""Bytes of ``claq.json`` a reader accepts; a model of a hundred thousand layers has 30 MB."""

_ATTRIBUTES = ("in_features", "out_features", "columns_4", "columns_3", "columns_2")


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model without its architecture.

    Attributes:
        layers: name -> quantized layer.
        tensors: every unquantized tensor of the model, by its name in the model's ``state_dict()``.
        config: settings of the run that made it.
        parts: layer -> ((qualified name of a linear, its rows), ...), in the order of the layer's rows. A layer that is
            not listed stands for the linear of its own name.
        accuracy_levels: layer -> the operator's ``accuracy_level``; 0 where not listed.
        aliases: tied name -> stored name.
        transposed: layers whose weight the model stores as ``[K, N]``.
        tied: layer -> further modules with the same weight.
    """

    layers: Mapping[str, QuantizedLinear]
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Sequence[tuple[str, int]]] = field(default_factory=dict)
    accuracy_levels: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    transposed: Collection[str] = ()
    tied: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def parts_of(self, name: str) -> tuple[tuple[str, int], ...]:
        """The linears that layer ``name`` stands for, with their rows."""
        return tuple(self.parts.get(name) or ((name, self.layers[name].out_features),))


def save_checkpoint(
    folder: Path | str,
    layers: Mapping[str, QuantizedLinear],
    other_tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    parts: Mapping[str, Sequence[tuple[str, int]]] | None = None,
    accuracy_level: int = 0,
    transposed: Collection[str] = (),
    tied: Mapping[str, Sequence[str]] | None = None,
    files: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``claq.safetensors`` and ``claq.json`` into ``folder``, both or none.

    Args:
        folder: an existing folder.
        layers: name -> quantized layer.
        other_tensors: the model's tensors by their ``state_dict()`` names. Weights that the layers stand for are left
            out; names that share one tensor (tied weights) are stored once; the bias ``<layer>.bias`` of a stacked
            layer is stored as the biases of its parts.
        config: JSON values.
        parts: for stacked layers, the linears they stand for and their rows; see :class:`Checkpoint`.
        accuracy_level: of all layers.
        transposed: layers whose weight the model stores as ``[K, N]``.
        tied: layer -> further modules with the same weight.
        files: other files written beside the two -> hex digest of their SHA-256.

    Returns:
        the two files, tensors first.

    Raises:
        FormatError: two tensors have the same name, parts do not add up to their layer, or config is not JSON.
        OutputError: the files cannot be written; nothing is left behind then.
    """
    folder = Path(folder)
    checkpoint = Checkpoint(
        layers, other_tensors, config, parts or {}, dict.fromkeys(layers, accuracy_level), tied=tied or {}
    )
    _check_parts(checkpoint, "the checkpoint")
    unquantized = _unquantized(checkpoint)
    aliases = find_aliases(unquantized.items())
    stored = {name: tensor for name, tensor in unquantized.items() if name not in aliases}
    for name, layer in layers.items():
        for part, tensor in layer.tensors().items():
            key = f"{name}.{part}"
            if key in stored or key in aliases:
                raise FormatError(f"tensor {key!r} of the model has the name of a part of layer {name!r}")
            stored[key] = tensor
    description = {
        "format": METHOD,
        "version": VERSION,
        "claq_version": claq_export.__version__,
        "config": dict(config),
        "layers": {
            name: layer_entry(
                layer, checkpoint.parts_of(name), accuracy_level, name in transposed, checkpoint.tied.get(name, ())
            )
            for name, layer in layers.items()
        },
        "aliases": aliases,
        **({"files": dict(files)} if files else {}),
    }
    try:
        content = json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FormatError(f"config cannot be written as JSON: {error}") from error
    with StagedFiles(folder) as staged:
        tensors_path = staged.stage(TENSORS_FILE)
        try:
            write_safetensors(tensors_path, stored, {"format": "pt", "claq": header_text(description)})
        except OSError as error:
            raise OutputError(f"cannot write {folder / TENSORS_FILE}: {error.strerror or error}") from error
        staged.stage(CONFIG_FILE).write_text(content, encoding="utf-8")
    return [folder / TENSORS_FILE, folder / CONFIG_FILE]


def header_text(description: Mapping[str, Any]) -> str:
    """The description as metadata ``claq`` of a safetensors header: JSON without ``config`` and ``files``."""
    return json.dumps(_of_tensors(description), ensure_ascii=False)


def _of_tensors(description: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``claq.json`` the header of ``claq.safetensors`` repeats."""
    return {key: value for key, value in description.items() if key not in ("config", "files")}


def layer_entry(
    layer: QuantizedLinear,
    parts: Sequence[tuple[str, int]],
    accuracy_level: int,
    transposed: bool,
    tied: Sequence[str] = (),
) -> dict[str, Any]:
    """What a description says about one layer."""
    entry: dict[str, Any] = {
        **layer.attributes(),
        "accuracy_level": accuracy_level,
        "transposed": transposed,
        "parts": [{"name": part, "rows": rows} for part, rows in parts],
    }
    return {**entry, "tied": list(tied)} if tied else entry


def _unquantized(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors without quantized weights, the bias of each stacked layer replaced by those of its parts."""
    tensors = dict(checkpoint.tensors)
    for name in checkpoint.layers:
        parts = checkpoint.parts_of(name)
        for part, _ in parts:
            # A layer is named after its module, or after the parameter itself where that is not called weight.
            tensors.pop(f"{part}.weight", None)
            tensors.pop(part, None)
        for other in checkpoint.tied.get(name, ()):
            tensors.pop(f"{other}.weight", None)
            tensors.pop(other, None)
        if len(parts) > 1 and (bias := tensors.pop(f"{name}.bias", None)) is not None:
            for (part, _), values in zip(parts, bias.split([rows for _, rows in parts]), strict=True):
                tensors.setdefault(f"{part}.bias", values)
    names = {part for name in checkpoint.layers for part, _ in checkpoint.parts_of(name)}
    for stack in quantized_stacks(tensors, names):
        del tensors[stack]
    return tensors


def quantized_stacks(tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> list[str]:
    """Tensors of three axes (the weights of all experts) whose matrices ``<tensor>.0``, ... are all in ``names``."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.dim() == 3 and len(tensor) and all(f"{name}.{index}" in names for index in range(len(tensor)))
    ]


def find_aliases(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Names that stand for an earlier one because their tensors share all of its memory, by what they stand for."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in tensors:
        if not tensor.numel():
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        stored = first.setdefault(key, name)
        if stored != name:
            aliases[name] = stored
    return aliases


def load_checkpoint(folder: Path | str) -> Checkpoint:
    """Read and validate what :func:`save_checkpoint` wrote.

    Raises:
        FormatError: a file is missing, truncated or not what it should be, or a layer breaks a rule of docs/format.md;
            the message names the file, the layer and the tensor.
    """
    folder = Path(folder)
    description = _read_json(folder / CONFIG_FILE)
    path = folder / TENSORS_FILE
    tensors, header = _read_tensors(path)
    layers: dict[str, QuantizedLinear] = {}
    for name, entry in description["layers"].items():
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in TENSOR_NAMES}
        missing = [part for part, tensor in parts.items() if tensor is None]
        if missing:
            raise FormatError(f"{path}: tensor '{name}.{missing[0]}' is missing")
        try:
            layers[name] = QuantizedLinear.from_parts(entry, parts)  # type: ignore[arg-type]
        except FormatError as error:
            raise FormatError(f"{path}: layer {name!r}: {error}") from error
    for alias, name in description["aliases"].items():
        if name not in tensors:
            raise FormatError(f"{folder / CONFIG_FILE}: alias {alias!r} names tensor {name!r}, which is not stored")
        tensors[alias] = tensors[name]
    checkpoint = Checkpoint(
        layers=layers,
        tensors=tensors,
        config=description["config"],
        parts={
            name: tuple((part["name"], part["rows"]) for part in entry["parts"])
            for name, entry in description["layers"].items()
        },
        accuracy_levels={name: entry["accuracy_level"] for name, entry in description["layers"].items()},
        aliases=description["aliases"],
        transposed=frozenset(name for name, entry in description["layers"].items() if entry["transposed"]),
        tied={name: tuple(entry["tied"]) for name, entry in description["layers"].items() if entry.get("tied")},
    )
    _check_parts(checkpoint, str(folder / CONFIG_FILE))
    if header is not None:
        # JSON may hold half of a surrogate pair, which no UTF-8 has: the parser refuses it.
        stated = parse_json_object(
            header.encode("utf-8", "surrogatepass"), f"{path}: its header's description", FormatError
        )
        if stated != _of_tensors(description):
            raise FormatError(
                f"{path} and {CONFIG_FILE} are from two exports, or one was changed: their descriptions of the layers "
                "differ; an export that was interrupted while it replaced them leaves such a pair. Export again"
            )
    return checkpoint


def _check_parts(checkpoint: Checkpoint, where: str) -> None:
    owner: dict[str, str] = {}
    for name, layer in checkpoint.layers.items():
        parts = checkpoint.parts_of(name)
        rows = sum(count for _, count in parts)
        if rows != layer.out_features or any(count < 1 for _, count in parts):
            raise FormatError(
                f"{where}: the parts of layer {name!r} must add up to its {layer.out_features} output features, "
                f"got {[count for _, count in parts]}"
            )
        for part, _ in parts:
            if part in owner:
                raise FormatError(f"{where}: linear {part!r} is part of both {owner[part]!r} and {name!r}")
            owner[part] = name
    for name in checkpoint.parts:
        if name not in checkpoint.layers:
            raise FormatError(f"{where}: parts are given for {name!r}, which is not a layer")


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """All tensors, and the description in the file's header if there is one."""
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        file = SafetensorsFile(path, FormatError)
        return {name: file.read(name) for name in file}, file.metadata.get("claq")
    except FormatError as error:
        raise FormatError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Parse ``claq.json`` and check every type a reader relies on."""
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    if path.stat().st_size > JSON_LIMIT:
        raise FormatError(f"{path} has {path.stat().st_size} bytes; at most {JSON_LIMIT} are expected")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    return _checked(value, path, ("config", "layers", "aliases"))


def parse_header(text: str, path: Path) -> dict[str, Any]:
    """The description in metadata ``claq`` of the safetensors file ``path``, checked as ``claq.json`` is.

    Raises:
        FormatError: it is not JSON, or not what a description must be.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: metadata 'claq' is not valid JSON: {error}") from error
    return _checked(value, path, ("layers", "aliases"))


def _checked(value: Any, path: Path, objects: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("format") != "claq":
        raise FormatError(f'{path} does not describe a claq model: "format" must be "claq"')
    if value.get("version") != VERSION:
        raise FormatError(f"{path} has format version {value.get('version')!r}; this package reads version {VERSION}")
    for key in objects:
        if not isinstance(value.get(key), dict):
            raise FormatError(f"{path}: {key!r} must be an object, got {type(value.get(key)).__name__}")
    for name, entry in value["layers"].items():
        _check_entry(path, name, entry)
    for alias, name in value["aliases"].items():
        if not isinstance(name, str):
            raise FormatError(f"{path}: alias {alias!r} must be a name, got {name!r}")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _check_entry(path: Path, name: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise FormatError(f"{path}: layer {name!r} must be an object, got {type(entry).__name__}")
    for key in (*_ATTRIBUTES, "accuracy_level"):
        if not _is_whole(entry.get(key)):
            raise FormatError(f"{path}: layer {name!r}: {key!r} must be an integer >= 0, got {entry.get(key)!r}")
    if not isinstance(entry.get("transposed"), bool):
        raise FormatError(
            f"{path}: layer {name!r}: 'transposed' must be true or false, got {entry.get('transposed')!r}"
        )
    tied = entry.get("tied", [])
    if not isinstance(tied, list) or not all(isinstance(other, str) for other in tied):
        raise FormatError(f"{path}: layer {name!r}: 'tied' must be a list of names, got {tied!r}")
    parts = entry.get("parts")
    if not isinstance(parts, list) or not parts:
        raise FormatError(f"{path}: layer {name!r}: 'parts' must be a list with at least one entry")
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("name"), str) or not _is_whole(part.get("rows")):
            raise FormatError(f"{path}: layer {name!r}: a part must have a name and a number of rows, got {part!r}")
