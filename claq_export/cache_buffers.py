"""A key/value cache in buffers that a session writes into, instead of a longer copy of all tokens at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .format import metadata

PAST = "past_key_values."
PRESENT = "present."

_LOGITS = "logits"
_FEWEST = 256
_TOKENS = 2  # axis of keys and values


@dataclass(frozen=True)
class PastInput:
    """A past key or value of a session: heads, size of a head, and type."""

    heads: int
    size: int
    dtype: type[np.floating[Any]]

    def empty(self, batch: int, tokens: int = 0) -> npt.NDArray[Any]:
        """Zeros ``[batch, heads, tokens, size]``."""
        return np.zeros((batch, self.heads, tokens, self.size), self.dtype)


def past_inputs(session: ort.InferenceSession) -> dict[str, PastInput]:
    """The past keys and values of a session, by name."""
    return {
        value.name: PastInput(value.shape[1], value.shape[3], np.float16 if "float16" in value.type else np.float32)
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }


def takes_buffers(session: ort.InferenceSession) -> bool:
    """Whether a session with claq-runtime takes :class:`CacheBuffers`, by what the file says of itself.

    Not where claq-runtime has found a GPU: it leaves attention to ONNX Runtime there, which makes a longer cache.
    """
    if session.get_modelmeta().custom_metadata_map.get(metadata.CACHE_BUFFERS) != "1":
        return False
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return True
    try:
        import claq_runtime
    except ImportError:  # a library from elsewhere cannot be asked
        return False
    return not claq_runtime.cuda()[0]


class CacheBuffers:
    """Keys and values of the tokens read so far, in buffers with room for more, of the type the file says.

    Past and present of a step are bound to the same buffers, and the operator ``ClaqCachedAttention`` then writes the new
    tokens behind those that are there; how many these are the attention mask tells.

    Args:
        session: with claq-runtime, of a file that :func:`takes_buffers`.
        batch: sequences.

    Attributes:
        length: tokens in the cache.
        room: tokens that there is room for.
    """

    def __init__(self, session: ort.InferenceSession, batch: int = 1) -> None:
        self._session = session
        self._batch = batch
        self._past = past_inputs(session)
        self._buffers: dict[str, npt.NDArray[Any]] = {}
        self._binding = session.io_binding()
        self._binding.bind_output(_LOGITS)  # the first output
        self.length = self.room = 0

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all, where there is not, and for as many again."""
        if tokens <= self.room:
            return
        self.room = max(_FEWEST, 2 * tokens)
        for name, past in self._past.items():
            # Pages that no token was written to take no memory yet.
            larger = past.empty(self._batch, self.room)
            if self.length:
                larger[:, :, : self.length] = self._buffers[name][:, :, : self.length]
            self._buffers[name] = larger
            shared = ort.OrtValue.ortvalue_from_numpy(larger)
            self._binding.bind_ortvalue_input(name, shared)
            self._binding.bind_ortvalue_output(PRESENT + name.removeprefix(PAST), shared)

    def fill(self, past: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take the place of a cache that was made elsewhere: keys and values ``[batch, heads, tokens, size]`` by input name."""
        length = next(iter(past.values())).shape[_TOKENS]
        self.reserve(max(1, length))
        for name, value in past.items():
            self._buffers[name][:, :, :length] = value
        self.length = length

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Read further tokens.

        Args:
            inputs: all of the session's but the past; the attention mask is as long as the cache will be.

        Returns:
            logits ``[batch, sequence, vocabulary]``.
        """
        new = inputs["input_ids"].shape[1]
        self.reserve(self.length + new)
        for name, value in inputs.items():
            self._binding.bind_cpu_input(name, value)
        # Of other sizes at each step; what is bound already would be written into.
        self._binding.bind_output(_LOGITS)
        self._session.run_with_iobinding(self._binding)
        self.length += new
        return self._binding.get_outputs()[0].numpy()  # type: ignore[no-any-return]

    def tokens(self, name: str) -> npt.NDArray[Any]:
        """Keys or values of the tokens read so far ``[batch, heads, length, size]``, by the name of their input."""
        return self._buffers[name][:, :, : self.length]


def run_in_place(
    session: ort.InferenceSession, names: Sequence[str], inputs: Mapping[str, npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """What ``session.run(names, inputs)`` gives, by buffers."""
    past = {name: value for name, value in inputs.items() if name.startswith(PAST)}
    cache = CacheBuffers(session, len(inputs["input_ids"]))
    cache.fill(past)
    logits = cache.run({name: value for name, value in inputs.items() if name not in past})
    return [logits if name == _LOGITS else cache.tokens(PAST + name.removeprefix(PRESENT)) for name in names]
