"""The backend itself: what Dynamo calls with each graph, and the function it gets back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException

from ..capture.graph import writes_in_place
from ..errors import ClaqError, ConfigError
from .ahead import AheadGraph, compiling_ahead, serializable
from .dynamo import graph_parameters, trace_to_aten
from .graph import DynamoGraph
from .options import CompileOptions, parse_options
from .session import CompiledGraph, Session, session_for
from .store import STORES

Compiled = Callable[..., Any]


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
        aten = trace_to_aten(gm)
        # Only observed graphs are walked.
        functional = trace_to_aten(gm, functional=True) if parsed.observe and writes_in_place(aten) else aten
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
        rewritten = graph.rewrite(parsed.config, _store_key(session, parsed, ahead))
    except ClaqError as error:
        return _raising(error, ahead)
    if parsed.config.include and not rewritten.weights:
        warnings.warn(f"backend='claq': no layer of this graph is quantized ({rewritten.notes[0]})", stacklevel=2)
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
    for node in aten.graph.nodes:
        if node.op == "call_function" and (reason := _in_training(node)):
            raise ConfigError(
                f"backend='claq' compiles for inference, and the model is in training mode ({reason}): call model.eval()"
            )


def _in_training(node: fx.Node) -> str | None:
    """What an operator does that only training wants; None if nothing."""

    def argument(position: int, name: str, default: Any) -> Any:
        return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)

    aten = torch.ops.aten
    if node.target is aten.dropout.default and argument(2, "train", False) and argument(1, "p", 0.0):
        return f"dropout of {argument(1, 'p', 0.0):g}"
    if node.target is aten.scaled_dot_product_attention.default and argument(4, "dropout_p", 0.0):
        return f"attention with dropout of {argument(4, 'dropout_p', 0.0):g}"
    # A layer that keeps no statistics has none but the batch's in evaluation, too.
    if node.target is aten.batch_norm.default and argument(5, "training", False) and argument(3, "running_mean", None):
        return "batch normalization by the statistics of the batch"
    return None


def _raising(error: ClaqError, ahead: bool) -> Compiled:
    if ahead:
        raise error  # nothing wraps it there

    def refuse(*_args: Any) -> Any:
        raise error

    return refuse
