"""Layer by layer: how far each quantized layer of an artifact is from the linear or embedding it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..algorithm import measure
from ..emit.artifact import written_models
from ..emit.function import LAYER_OPERATORS
from ..errors import FormatError
from ..format import metadata
from ..format.checkpoint import load_checkpoint
from ..format.layer import TENSOR_NAMES, QuantizedLinear
from ..inputs import OnnxFile

DOMAIN = "com.claq"

OPERATORS: Mapping[str, slice] = dict.fromkeys(LAYER_OPERATORS, slice(1, 1 + len(TENSOR_NAMES)))
"""Operators of :data:`DOMAIN` whose weight is compared, and which of their inputs are :data:`TENSOR_NAMES`."""

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ArtifactLayer:
    """A layer of an artifact.

    Attributes:
        name: of the layer.
        layer: its weight.
        parts: the linears ``(qualified name, rows)`` it stands for.
        transposed: the original stores their weights as ``[in_features, out_features]``; None: the artifact does not say.
    """

    name: str
    layer: QuantizedLinear
    parts: tuple[tuple[str, int], ...]
    transposed: bool | None = None


@dataclass(frozen=True)
class LayerError:
    """What a layer lost.

    Attributes:
        name: of the layer.
        out_features, in_features: its shape.
        true_bits: a weight.
        weight_error: ||dW||^2 / ||W||^2.
        output_error: ||x dW^T||^2 / ||x W^T||^2 over the tokens that the original model's layer sees; None where the
            original has no linear module of that name to listen at.
    """

    name: str
    out_features: int
    in_features: int
    true_bits: float
    weight_error: float
    output_error: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def artifact_layers(path: Path) -> Iterator[ArtifactLayer]:
    """The quantized layers of an ONNX file, of the files of an encoder-decoder (``path`` as ``--out`` named them), or of a folder
    with ``claq.safetensors``, one at a time, validated.

    Raises:
        FormatError: the artifact is damaged; the message names file and layer.
    """
    if path.suffix == ".onnx":
        seen: set[str] = set()
        for file in written_models(path):
            for entry in _onnx_layers(file):
                if entry.name not in seen:
                    seen.add(entry.name)
                    yield entry
        return
    checkpoint = load_checkpoint(path)
    for name, layer in checkpoint.layers.items():
        yield ArtifactLayer(name, layer, checkpoint.parts_of(name), name in checkpoint.transposed)


def _onnx_layers(path: Path) -> Iterator[ArtifactLayer]:
    file = OnnxFile(path, FormatError)
    parts = _stored_parts(file)
    transposed = _stored_transposed(file)
    seen: set[str] = set()
    for node in file.model.graph.node:
        inputs = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        if inputs is None:
            continue
        given = node.input[inputs]
        if len(given) != len(TENSOR_NAMES):
            raise FormatError(
                f"{path}: layer {node.name!r}: the {node.op_type} node has {len(node.input)} inputs, too few for a layer"
            )
        if given[0] in seen:
            continue
        seen.add(given[0])
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        try:
            tensors = {
                name: torch.from_numpy(file.read(value).copy()) for name, value in zip(TENSOR_NAMES, given, strict=True)
            }
            layer = QuantizedLinear.from_parts(attributes, tensors)
        except (FormatError, ValueError, TypeError) as error:
            raise FormatError(f"{path}: layer {node.name!r}: {error}") from error
        name = node.name.partition("#")[0]  # later uses of a layer are numbered
        flipped = None if transposed is None else name in transposed
        yield ArtifactLayer(name, layer, parts.get(name) or ((name, layer.out_features),), flipped)


def _stored_parts(file: OnnxFile) -> dict[str, tuple[tuple[str, int], ...]]:
    try:
        stored = json.loads(file.metadata.get(metadata.PARTS, "{}"))
        return {str(name): tuple((str(part), int(rows)) for part, rows in entries) for name, entries in stored.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{file.path}: metadata {metadata.PARTS!r} is not what claq-export writes: {error}"
        ) from error


def _stored_transposed(file: OnnxFile) -> frozenset[str] | None:
    """None for files of a version that did not record it."""
    text = file.metadata.get(metadata.TRANSPOSED)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{file.path}: metadata {metadata.TRANSPOSED!r} is not what claq-export writes: {error}"
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{file.path}: metadata {metadata.TRANSPOSED!r} must be a list of names")
    return frozenset(names)


def layer_errors(
    artifact: Path, original: nn.Module, run: Callable[[], object], progress: Callable[[str], None] | None = None
) -> list[LayerError]:
    """Compare every layer with the original's, worst first.

    Args:
        artifact: ``.onnx`` file or folder with ``claq.safetensors``.
        original: the unquantized model; names of its modules are the artifact's.
        run: runs the original on representative inputs; called once.
        progress: called with each layer's name.

    Raises:
        FormatError: the artifact is damaged, or its layers are not the original's.
    """
    layers = list(artifact_layers(artifact))
    modules = dict(original.named_modules())
    state = original.state_dict()
    names = {part for entry in layers for part, _ in entry.parts}
    with _energies({name: modules[name] for name in names if name in modules}, layers) as energies:
        if energies:
            run()
    result = []
    for entry in layers:
        weights = [_weight(state, modules, part, rows, entry) for part, rows in entry.parts]
        if any(weight is None for weight in weights):
            missing = next(part for (part, _), weight in zip(entry.parts, weights, strict=True) if weight is None)
            raise FormatError(
                f"{artifact}: layer {entry.name!r} stands for linear {missing!r}, "
                f"which the model compared with does not have in that size"
            )
        weight = torch.cat([w for w in weights if w is not None])
        lost = energies.get(entry.name)
        result.append(
            LayerError(
                name=entry.name,
                out_features=entry.layer.out_features,
                in_features=entry.layer.in_features,
                true_bits=measure(entry.layer).true_bits,
                weight_error=_ratio(*_squares(entry.layer.dequantize() - weight, weight)),
                output_error=None if lost is None else _ratio(*lost),
            )
        )
        if progress is not None:
            progress(entry.name)
    return sorted(result, key=lambda e: -(e.weight_error if e.output_error is None else e.output_error))


@contextmanager
def _energies(modules: Mapping[str, nn.Module], layers: Sequence[ArtifactLayer]) -> Iterator[dict[str, list[float]]]:
    """While open, layers' ``[||x dW^T||^2, ||x W^T||^2]`` grow with every run of the model."""
    found: dict[str, list[float]] = {}
    hooks = []

    def listen(entry: ArtifactLayer, module: nn.Module, first: int, rows: int) -> None:
        sums = found.setdefault(entry.name, [0.0, 0.0])

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0].detach().reshape(-1, entry.layer.in_features).float()
            bias = getattr(module, "bias", None)
            original = output.detach().reshape(-1, rows).float()
            if bias is not None:
                original = original - bias.detach().float()
            weight = entry.layer.dequantize()[first : first + rows]
            for start in range(0, x.shape[0], _ROWS_AT_ONCE):
                part = original[start : start + _ROWS_AT_ONCE]
                lost, whole = _squares(x[start : start + _ROWS_AT_ONCE] @ weight.T - part, part)
                sums[0] += lost
                sums[1] += whole

        hooks.append(module.register_forward_hook(hook))

    for entry in layers:
        # Either every linear of a stack can be heard or the layer's error would be that of a part.
        if all(_is_linear(modules.get(part)) for part, _ in entry.parts):
            first = 0
            for part, rows in entry.parts:
                listen(entry, modules[part], first, rows)
                first += rows
    try:
        with torch.no_grad():
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _weight(
    state: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], name: str, rows: int, entry: ArtifactLayer
) -> torch.Tensor | None:
    """The original weight ``[rows, in_features]`` of a linear that is part of a layer, or None."""
    weight = state.get(f"{name}.weight", state.get(name))
    owner = modules.get(name)
    if weight is None:
        # The weights of all experts of a mixture are one tensor of three axes, and their linears are numbered.
        stack, _, index = name.rpartition(".")
        experts = state.get(stack)
        if experts is None or experts.dim() != 3 or not index.isdecimal() or int(index) >= len(experts):
            return None
        weight, owner = experts[int(index)], modules.get(stack.rpartition(".")[0])
    if weight.dim() != 2:
        return None
    shape, columns = tuple(weight.shape), entry.layer.in_features
    if entry.transposed is not None:
        transposed = entry.transposed
    else:
        transposed = (
            type(owner).__name__ == "Conv1D" or bool(getattr(owner, "is_transposed", False)) or shape != (rows, columns)
        )
    weight = weight.T if transposed else weight
    return weight.float() if tuple(weight.shape) == (rows, columns) else None


def _squares(difference: torch.Tensor, whole: torch.Tensor) -> tuple[float, float]:
    return float(difference.square().sum(dtype=torch.float64)), float(whole.square().sum(dtype=torch.float64))


def _ratio(lost: float, whole: float) -> float:
    return lost / whole if whole > 0 else (0.0 if lost == 0 else float("inf"))
