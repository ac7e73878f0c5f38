"""From a PyTorch graph with nodes of claq to ``model.onnx``: translation, tidying, naming, metadata."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from torch import fx

import claq_export
from claq_export.deferred import is_deferred
from claq_export.errors import CaptureError
from claq_export.format.files import check_target
from claq_export.passes import AdditiveMasks, PassContext

from .artifact import Artifact, SharedData
from .complex_values import complex_axes_on_real_views
from .decoder import decoder_translations, has_narrow_cache, settle_decoder
from .function import DOMAIN, LAYER_OPERATORS, OPSET, functions_of
from .fused_forms import fused_forms
from .shapes import settle_reshapes
from .translation import translation_table
from .writer import write_model

IR_VERSION = 10
"""ONNX IR version of emitted files; ONNX Runtime 1.20 reads up to 10."""

DECODER_IR_VERSION = 11
"""ONNX IR version of files with operators of opset 23; ONNX Runtime 1.23 and later read them."""

FOLD_LIMIT = 1024
"""Constants with more elements are left to the runtime to fold: a folded copy of a tied weight is stored twice."""

_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten.reshape.default}
_TRANSPOSITIONS = {_aten.transpose.int, _aten.permute.default, _aten.t.default}


def emit_onnx(
    model: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, torch.Tensor],
    path: Path | str,
    *,
    dynamic_shapes: Mapping[str, Mapping[int, Any] | None] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    shared: SharedData | None = None,
) -> Artifact:
    """Write a quantized model as ONNX: ``path`` and, beside it, ``<path>.data``.

    The file holds one ``com.claq::ClaqMatMul`` node for each use of a quantized linear, one ``com.claq::ClaqGather`` node
    for each use of a quantized embedding, and these operators as model-local functions of standard operators. The same
    input gives the same bytes.

    Args:
        model: a graph of aten operators, ``claq::linear`` and ``claq::embedding`` (a ``GraphModule``, any module that
            ``torch.export`` can capture, or an ``ExportedProgram``).
        example_inputs: input name to tensor, as keyword arguments of the forward; the names become the graph's inputs.
            Dynamic axes must have a size of at least 2 here.
        path: the ``.onnx`` file; its folder must exist.
        dynamic_shapes: input name to ``{axis: name}``; a name is a string or a named ``torch.export.Dim``. Axes that
            are not listed are static. With an ``ExportedProgram`` it only names the axes.
        input_names: names of the graph's inputs, in order, where they are not to be those of the example.
        output_names: names of the graph's outputs, in order; by default those of the captured graph.
        metadata: entries for the file's ``metadata_props``.
        shared: of several models in one folder that hold equal tensors: what those before this one wrote.

    Returns:
        what was written.

    Raises:
        CaptureError: the graph cannot be exported or translated; the message names the operator.
        OutputError: the files cannot be written; nothing is left behind then.
    """
    path = Path(path)
    check_target(path)
    axes = {name: dict(dims or {}) for name, dims in (dynamic_shapes or {}).items()}
    with _quiet_exporter():
        program = _exported_program(model, example_inputs, axes)
        graph = _translate(program)
    with _released(graph):
        _tidy(graph)
        _name_inputs(graph, list(example_inputs))
        if input_names is not None:
            axes = {new: axes.get(old, {}) for old, new in zip(example_inputs, input_names, strict=True)}
            _name_inputs(graph, list(input_names))
        _name_outputs(graph, output_names)
        _name_axes(graph, axes)
        layers = _name_layers(graph)
        graph.producer_name, graph.producer_version = "claq-export", claq_export.__version__
        decoder = settle_decoder(graph)
        graph.ir_version = DECODER_IR_VERSION if decoder else IR_VERSION
        graph.metadata_props.clear()
        graph.metadata_props.update({key: metadata[key] for key in sorted(metadata)} if metadata else {})
        functions = functions_of(
            (node.op_type for node in graph.graph if node.domain == DOMAIN), narrow_cache=has_narrow_cache(graph)
        )
        if decoder:
            for function in functions:
                _set_opset(function, graph.opset_imports[""])
        files = write_model(graph, functions, path, shared)
        return Artifact(
            path=path,
            files=tuple(files),
            bytes=sum(file.stat().st_size for file in files),
            inputs=tuple(value.name or "" for value in graph.graph.inputs),
            outputs=tuple(value.name or "" for value in graph.graph.outputs),
            layers=tuple(layers),
        )


def _set_opset(function: onnx.FunctionProto, version: int) -> None:
    """Let a function import the model's version of the default domain, in which its operators mean the same."""
    for entry in function.opset_import:
        if entry.domain == "":
            entry.version = version


@contextlib.contextmanager
def _released(model: ir.Model) -> Iterator[None]:
    """Let go of the model's tensors in the end: onnxscript's rewrite rules, which live as long as the process, keep the graph
    they were tried on last, with all its weights."""
    translated = list(model.graph.initializers.values())
    try:
        yield
    finally:
        for value in (*translated, *model.graph.initializers.values()):
            value.const_value = None


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's remarks about packages and operators that this model does not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _exported_program(
    model: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, torch.Tensor],
    axes: Mapping[str, Mapping[int, Any]],
) -> torch.export.ExportedProgram:
    if isinstance(model, torch.export.ExportedProgram):
        return model
    shapes = {name: dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in example_inputs}
    try:
        with torch.no_grad():
            program = torch.export.export(model, (), kwargs=dict(example_inputs), dynamic_shapes=shapes)
    except Exception as error:
        raise CaptureError(f"the quantized graph cannot be exported: {_reason(error)}") from error
    _settle_strides(program.graph)
    AdditiveMasks().run(program.graph_module, PassContext())
    complex_axes_on_real_views(program.graph_module)
    return program


def _settle_strides(graph: fx.Graph) -> None:
    """Copy what a transposition gives before it is viewed in another shape.

    Whether that view is possible depends on strides, and those of an operator's kernel (of attention, for instance) are not
    those of its decomposition, with which the translation goes on. In ONNX the copy is an Identity, which ONNX Runtime drops.
    """
    for node in list(graph.nodes):
        source = node.args[0] if node.target in _VIEWS else None
        if isinstance(source, fx.Node) and source.target in _TRANSPOSITIONS:
            with graph.inserting_before(node):
                copy = graph.call_function(_aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
            copy.meta = dict(source.meta)
            node.replace_input_with(source, copy)


def _translate(program: torch.export.ExportedProgram) -> ir.Model:
    try:
        # The version converter inlines functions and the optimizer folds large constants: both are done here instead.
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translation_table() | decoder_translations() | fused_forms(),
            optimize=False,
            verbose=False,
        )
    except Exception as error:
        raise CaptureError(f"the quantized graph cannot be written as ONNX: {_reason(error)}") from error
    assert onnx_program is not None
    return onnx_program.model


def _reason(error: BaseException) -> str:
    """The start of the innermost cause's message, without the exporter's multi-page report."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:500] if lines else type(error).__name__


def _tidy(model: ir.Model) -> None:
    """Fold small constants, apply the exporter's standard rewrites, and drop what only the exporter needs."""
    common_passes.InlinePass()(model)
    settle_reshapes(model)
    _name_transposed_weights(model)
    onnxscript.optimizer.fold_constants(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    onnxscript.rewriter.rewrite(model)
    for tidy in (
        common_passes.RemoveUnusedNodesPass(),
        common_passes.RemoveUnusedFunctionsPass(),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.LiftSubgraphInitializersToMainGraphPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
        common_passes.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
    model.graph.metadata_props.clear()
    model.doc_string = None
    _store_equal_tensors_once(model)


def _name_transposed_weights(model: ir.Model) -> None:
    """Let the transpose of a weight, which folding turns into an initializer, carry the weight's name; those of a weight that
    is transposed several times have numbers besides."""
    times: Counter[str] = Counter()
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is not None and source.is_initializer() and not node.outputs[0].is_graph_output():
            name = f"{source.name}.transposed"
            times[name] += 1
            node.outputs[0].name = name if times[name] == 1 else f"{name}.{times[name]}"


def _store_equal_tensors_once(model: ir.Model) -> None:
    """Merge equal large initializers (tied weights). Small ones stay, so that tensors keep the name of their layer."""
    seen: dict[tuple[Any, ...], list[ir.Value]] = {}
    for value in tuple(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size <= FOLD_LIMIT or is_deferred(getattr(tensor, "raw", None)):
            continue
        content = _bytes_of(tensor)
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(content.data).digest())
        for other in seen.setdefault(key, []):
            assert other.const_value is not None
            if np.array_equal(_bytes_of(other.const_value), content):
                value.replace_all_uses_with(other)
                del model.graph.initializers[value.name]  # type: ignore[arg-type]
                break
        else:
            seen[key].append(value)


def _bytes_of(tensor: ir.TensorProtocol) -> npt.NDArray[np.uint8]:
    """A tensor's bytes, not copied where its memory allows it."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs


def _name_inputs(model: ir.Model, names: list[str]) -> None:
    present = [value.name for value in model.graph.inputs]
    if len(present) != len(names):
        raise CaptureError(f"the graph takes {len(present)} inputs ({', '.join(map(str, present))}), got {len(names)}")
    if set(present) != set(names):
        _rename(model, model.graph.inputs, names)


def _name_outputs(model: ir.Model, names: Sequence[str] | None) -> None:
    if names is None:
        return
    if len(names) != len(model.graph.outputs):
        raise CaptureError(
            f"the graph has {len(model.graph.outputs)} outputs, got {len(names)} names: {', '.join(names)}"
        )
    _rename(model, model.graph.outputs, names)


def _rename(model: ir.Model, values: Sequence[ir.Value], names: Sequence[str]) -> None:
    """Give ``values`` their public names; other values that have one of the names already get a suffix."""
    public, renamed = set(names), {id(value) for value in values}
    everything = list(_values(model))
    taken = {value.name for value in everything}
    for other in everything:
        if other.name in public and id(other) not in renamed:
            suffix = 1
            while f"{other.name}_{suffix}" in taken:
                suffix += 1
            other.name = f"{other.name}_{suffix}"
            taken.add(other.name)
    for value, name in zip(values, names, strict=True):
        value.name = name


def _axis_name(name: object) -> str | None:
    if isinstance(name, str):
        return name
    return getattr(name, "__name__", None)


def _name_axes(model: ir.Model, axes: Mapping[str, Mapping[int, Any]]) -> None:
    """Replace the exporter's symbols (``s31``) by the given names in every shape, also inside expressions."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, given in axes.get(value.name or "", {}).items():
            name = _axis_name(given)
            dim = value.shape[axis] if value.shape is not None else None
            if name and isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                names.setdefault(dim.value, name)
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None
    if symbol is None:
        return
    for value in _values(model):
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                renamed = symbol.sub(lambda match: names[match.group()], dim.value)
                if renamed != dim.value:
                    value.shape[axis] = renamed


def _name_layers(model: ir.Model) -> list[str]:
    """Name each node that holds a layer after it: the name of its codes without ``.codes``, later uses numbered."""
    layers: list[str] = []
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in LAYER_OPERATORS:
            codes = node.inputs[1]
            assert codes is not None
            if codes.name and codes.name.endswith(".codes"):
                name = codes.name.removesuffix(".codes")
                uses = sum(layer == name or layer.startswith(f"{name}#") for layer in layers)
                node.name = name if not uses else f"{name}#{uses + 1}"
            layers.append(node.name or "")
    return layers
