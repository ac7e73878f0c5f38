"""Graphs compiled ahead of time: what ``aot_compile`` of ``torch.compile(..., backend="claq")`` saves and loads.

PyTorch writes a compiled function as a file of its own (``save_compiled_function``): Dynamo's bytecode, guards, and what
the backend makes of itself. That is a pickle of PyTorch's, of code and of names; no weight is in it. Ours is a header in
JSON, with the names of the parameters and the folder of the quantized weights, and the rest of the graph as the fallback
compiled it. Loaded in another process, the graph takes the weights from ``claq.safetensors`` at its first call: nothing is
traced, calibrated or quantized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import fx
from torch._dynamo.aot_compile_types import (
    BundledAOTAutogradSerializableCallable,
    GraphModuleSerializableCallable,
    SerializableCallable,
)
from torch._functorch import config as functorch_config

from ..errors import FormatError, ModelError
from ..inputs import parse_json_object
from .graph import Rewritten, SavedGraph
from .options import parse_options
from .session import CompiledGraph, Session
from .store import STORES, WeightStore

FORMAT = 1
_MAGIC = b"claq graph\n"
_INNER = {kind.__name__: kind for kind in (BundledAOTAutogradSerializableCallable, GraphModuleSerializableCallable)}
_folder: ContextVar[Path | None] = ContextVar("claq_weights_folder", default=None)


def compiling_ahead() -> bool:
    """Whether Dynamo asks for a graph that can be saved: ``aot_compile`` sets both of these around its call, a user neither."""
    return bool(functorch_config.bundled_autograd_cache and functorch_config.force_non_lazy_backward_lowering)


@contextmanager
def weights_in(folder: Path | str) -> Iterator[None]:
    """Graphs that are loaded inside take their quantized weights from ``folder``, wherever they were saved."""
    token = _folder.set(Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


class AheadGraph(SerializableCallable):
    """A compiled graph that PyTorch can save.

    Args:
        compiled: the graph with the weights of its session.
        inner: what the fallback compiled, in a form that PyTorch can save.
        key: name of the graph's store, which is part of the compiled code.
    """

    def __init__(self, compiled: CompiledGraph, inner: SerializableCallable, key: str) -> None:
        self.compiled = compiled
        self.inner = inner
        self.key = key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on its inputs, as Dynamo passes them."""
        return self.compiled(*args, **kwargs)

    @classmethod
    def serialize_compile_artifacts(cls, fn: AheadGraph) -> bytes:
        """The graph without its weights.

        Raises:
            ModelError: the weights are nowhere on disk.
        """
        folder = fn.compiled.session.options.weights or fn.compiled.session.store.saved_in
        if folder is None:
            raise ModelError(
                "the quantized weights of this graph are not on disk: claq_export.save_compiled(model, folder) first; the "
                "compiled function holds code alone and takes the weights from there when it is loaded"
            )
        rewritten = fn.compiled.rewritten
        header = {
            "format": FORMAT,
            "folder": str(folder.resolve()),
            "key": fn.key,
            "names": {str(position): name for position, name in fn.compiled.graph.names.items()},
            "weights": rewritten.weights,
            "biases": rewritten.biases,
            "freeable": rewritten.freeable,
            "release_weights": fn.compiled.session.options.release_weights,
            "inner": type(fn.inner).__name__,
        }
        text = json.dumps(header).encode()
        body = type(fn.inner).serialize_compile_artifacts(fn.inner)
        return _MAGIC + len(text).to_bytes(8, "little") + text + body

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> AheadGraph:
        """The graph, ready to take its weights from disk at its first call.

        Raises:
            FormatError: not what :meth:`serialize_compile_artifacts` writes, or of a newer version.
        """
        header, body = _parse(data)
        folder = _folder.get() or Path(header["folder"])
        options = parse_options({"weights": folder, "release_weights": header["release_weights"], "progress": False})
        # The compiled code looks its weights up under the name it was compiled with; stores tell parameters by identity,
        # so that several models may share one.
        session = Session(options, STORES.setdefault(header["key"], WeightStore(header["key"])))
        inner = _INNER[header["inner"]].deserialize_compile_artifacts(body)
        rewritten = Rewritten(
            fx.GraphModule({}, fx.Graph()),
            tuple(header["weights"]),
            tuple(header["biases"]),
            tuple(header["freeable"]),
            (),
        )
        graph = SavedGraph({int(position): name for position, name in header["names"].items()})
        return cls(CompiledGraph(graph, rewritten, inner, session), inner, header["key"])


def serializable(module: fx.GraphModule, run: Callable[..., Any]) -> SerializableCallable:
    """What the fallback compiled from a graph, in a form that PyTorch can save.

    Raises:
        ModelError: it cannot be saved.
    """
    if run == module.forward:
        return GraphModuleSerializableCallable(module)
    if getattr(run, "serialize", None) is None:
        raise ModelError(
            "Inductor gave a graph that cannot be saved (its caches are off, or this version of PyTorch does not keep "
            "graphs with such operators): compile ahead of time with options={'fallback': 'eager'}"
        )
    return BundledAOTAutogradSerializableCallable(run)


def _parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    if not data.startswith(_MAGIC):
        raise FormatError("this is not a graph saved by backend='claq'")
    start = len(_MAGIC) + 8
    end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
    header = parse_json_object(data[start:end], "the header of the saved graph", FormatError)
    if header.get("format") != FORMAT:
        raise FormatError(f"the graph was saved in format {header.get('format')}, this version of claq reads {FORMAT}")
    return header, data[end:]
