"""The backend itself: what Dynamo calls with each graph, and the function it gets back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException

from ..capture.graph import writes_in_place
from ..errors import ClaqError, ConfigError
from ..passes.select_linears import layer_name
from .ahead import AheadGraph, compiling_ahead, serializable
from .autocast import autocast_in_force, has_autocast
from .dynamo import graph_parameters, trace_to_aten
from .graph import DynamoGraph, Rewritten
from .options import CompileOptions, parse_options
from .session import CompiledGraph, Session, session_for
from .store import STORES

Compiled = Callable[..., Any]

_aten = torch.ops.aten


def claq(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile one of Dynamo's graphs; ``torch.compile(model, backend="claq", options={...})`` calls this.

    Args:
        gm: the graph; parameters are inputs.
        example_inputs: its inputs at this call.
        options: see docs/torch-compile.md.
        mode: passed on to Inductor.

    Returns:
        what Dynamo calls instead of the graph. It raises :class:`~claq_export.errors.ClaqError` where the options are
        wrong or gradients are wanted; raised from here, Dynamo would wrap the error in its own. Under ``aot_compile``
        it can be saved (:mod:`.ahead`).
    """
    ahead = compiling_ahead()
    try:
        parsed = parse_options(options, mode)
        if any(isinstance(p, torch.nn.Parameter) for p in gm.parameters()):
            raise ConfigError(
                "backend='claq' needs parameters as inputs of Dynamo's graphs: leave "
                "torch._dynamo.config.inline_inbuilt_nn_modules on"
            )
        _refuse_gradients(example_inputs)
    except ClaqError as error:
        return _raising(error, ahead)
    session = session_for(parsed)
    try:
        with autocast_in_force(gm) as forward:
            aten = trace_to_aten(forward)
            # Only observed graphs are walked.
            functional = trace_to_aten(forward, functional=True) if parsed.observe and writes_in_place(aten) else aten
    except TorchDynamoException:
        raise  # Dynamo's own signals, such as to start over with other sizes
    except Exception as error:  # operators fail to trace in their own ways; each is the reason
        warnings.warn(
            f"backend='claq' cannot trace a graph, which runs without quantization: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return _fall_back(gm, example_inputs, parsed)
    graph = DynamoGraph(aten, functional, graph_parameters(gm, example_inputs), example_inputs)
    try:
        _refuse_training(aten)
        # Siblings on both sides of a border of autocast give values of different dtypes.
        config = replace(parsed.config, fuse_siblings=False) if has_autocast(gm) else parsed.config
        rewritten = graph.rewrite(config, _store_key(session, parsed, ahead))
    except ClaqError as error:
        return _raising(error, ahead)
    if told := _left_alone(aten, graph, rewritten, bool(config.include)):
        warnings.warn(f"backend='claq': {told}", stacklevel=2)
    run = _fall_back(rewritten.module, example_inputs, parsed)
    if ahead:
        inner = serializable(rewritten.module, run)
        compiled = CompiledGraph(graph, rewritten, inner, session)
        return AheadGraph(compiled, inner, _store_key(session, parsed, ahead)) if rewritten.weights else inner
    if not rewritten.weights:
        return run
    return CompiledGraph(graph, rewritten, run, session).__call__


def _store_key(session: Session, options: CompileOptions, ahead: bool) -> str:
    """What compiled code calls the session's store; a graph that is saved must not share its name in another process."""
    if not ahead:
        return session.store.key
    STORES[f"ahead-{options.key}"] = session.store
    return f"ahead-{options.key}"


def _fall_back(module: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions) -> Compiled:
    if options.fallback == "eager":
        return module.forward
    from torch import _inductor

    settings = _inductor.list_mode_options(options.mode) if options.mode else None
    return _inductor.compile(module, list(example_inputs), settings)  # type: ignore[no-any-return]


def _refuse_gradients(inputs: Sequence[Any]) -> None:
    """Raise where the call would need gradients.

    Raises:
        ConfigError: gradients are enabled and an input (parameters are inputs) requires them.
    """
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise ConfigError(
            "backend='claq' compiles for inference: call the model under torch.no_grad() or torch.inference_mode(); "
            "train the original model, without torch.compile or with another backend, and compile it afterwards"
        )


def _refuse_training(aten: fx.GraphModule) -> None:
    """Raise where the graph computes as in training, which would calibrate on, and then compute, something else.

    Raises:
        ConfigError: an operator drops values at random or normalizes by the statistics of the batch.
    """
    for node in _operators(aten):
        if reason := _in_training(node):
            raise ConfigError(
                f"backend='claq' compiles for inference, and the model is in training mode ({reason}): call model.eval()"
            )


def _operators(aten: fx.GraphModule) -> Iterator[fx.Node]:
    """The calls of operators in a graph and in the branches of its control flow."""
    for module in aten.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def _in_training(node: fx.Node) -> str | None:
    """What an operator does that only training wants; None if nothing.

    Told by the names of its arguments, which are the same in all forms of dropout (``feature_dropout``,
    ``alpha_dropout_``, ``lstm``), of attention and of normalization.
    """
    arguments = _arguments(node)
    rate = arguments.get("p", arguments.get("dropout")) if "train" in arguments else None
    if rate and arguments["train"] is not False:
        return f"dropout of {_number(rate)}"
    if rate := arguments.get("dropout_p"):
        return f"attention with dropout of {_number(rate)}"
    name = node.target._schema.name  # type: ignore[union-attr]
    if name.startswith("aten::rrelu") and arguments["training"] and arguments["lower"] != arguments["upper"]:
        return "random slopes of rrelu"
    # A layer that keeps no statistics has none but the batch's in evaluation, too.
    by_batch = arguments.get("training") or arguments.get("use_input_stats")
    if by_batch and arguments.get("running_mean") is not None:
        return "normalization by the statistics of the batch"
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What an operator is called with, by name, defaults included."""
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((parameter.name for parameter in parameters), node.args, strict=False)) | node.kwargs
    return {parameter.name: given.get(parameter.name, parameter.default_value) for parameter in parameters}


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else "some rate"


_ENCODERS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
_FUSED = frozenset((*_ENCODERS, "lstm", "gru", "rnn_tanh", "rnn_relu"))
"""Operators of ATen that multiply by weights of linear layers among all that is around these."""

_PRODUCTS = _FUSED | {"linear", "mm", "matmul", "bmm", "addmm", "einsum"}


def _left_alone(aten: fx.GraphModule, graph: DynamoGraph, rewritten: Rewritten, included: bool) -> str:
    """What to say of weights that stay as they are: those inside of fused operators, and all that the graph multiplies by
    where none is quantized (or nothing of what was asked for is there), unless each was excluded by name."""
    placeholders = [node for node in aten.graph.nodes if node.op == "placeholder"]
    weights = {placeholders[i]: layer_name(name) for i, name in graph.names.items()}
    told = _FUSED if rewritten.weights else _PRODUCTS
    layers: dict[str, None] = {}
    encoders = False
    for node in _operators(aten):
        name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
        if name not in told:
            continue
        sources = list(node.all_input_nodes)
        for source in sources:
            if source in weights and source.meta["val"].dim() >= 2:
                layers[weights[source]] = None
                encoders |= name in _ENCODERS
            elif source.target in (_aten.t.default, _aten.transpose.int, _aten.permute.default):
                sources += source.all_input_nodes
    if not layers and (rewritten.weights or not included):
        return ""
    notes = [note for note in rewritten.notes if note.partition(": ")[0] in layers] or list(rewritten.notes)
    if all(note.partition(": ")[2].startswith("excluded by") for note in notes):
        return ""
    some = "; ".join(notes[:3]) + (f"; and {len(notes) - 3} more" if len(notes) > 3 else "")
    advice = ". torch.backends.mha.set_fastpath_enabled(False) gives layers that can be" if encoders else ""
    return f"{'not every' if rewritten.weights else 'no'} layer of this graph is quantized ({some}){advice}"


def _raising(error: ClaqError, ahead: bool) -> Compiled:
    if ahead:
        raise error  # nothing wraps it there

    def refuse(*_args: Any) -> Any:
        raise error

    return refuse
