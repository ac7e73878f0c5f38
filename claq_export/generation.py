"""Text generation from an ONNX artifact with a key/value cache: prefill, steps, sampling; NumPy and ONNX Runtime.

Encoder-decoders: generation_seq2seq.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .cache_buffers import PAST, PRESENT, CacheBuffers, past_inputs, takes_buffers
from .errors import ConfigError, ModelError
from .onnx_session import check_threads, load_session


@dataclass
class Timing:
    """What a generation took.

    Attributes:
        prompt_tokens, new_tokens: how many.
        prefill_seconds: until the first new token.
        decode_seconds: for those after it.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens to generate.
        temperature: 0 = always the likeliest token.
        top_p: sample from the likeliest tokens that make up this share of the probability.
        seed: of the draws.
        stop: tokens that end the text; they are not yielded.

    Raises:
        ConfigError: one is out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"max_new_tokens must be positive, temperature finite and at least 0 and top_p in (0, 1]; got "
                f"{self.max_new_tokens}, {self.temperature}, {self.top_p}"
            )
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"the seed must be at least 0, got {self.seed}")

    def draw(
        self, step: Callable[[Sequence[int]], npt.NDArray[Any]], first: Sequence[int], timing: Timing, path: Path
    ) -> Iterator[int]:
        """Generate tokens, one at a time.

        Args:
            step: reads further tokens; logits ``[1, tokens, vocabulary]``.
            first: what it reads first, at least one token.
            timing: is told how long each took; what is spent before the first call counts as the prefill's.
            path: of the model, for the message.

        Raises:
            ConfigError: at once: there is no token to begin with.
            ModelError: while tokens are drawn: ``step`` raises it, or the model's logits are NaN.
        """
        if not first:
            raise ConfigError("the prompt has no tokens")
        return self._draw(step, list(first), timing, path)

    def _draw(
        self, step: Callable[[Sequence[int]], npt.NDArray[Any]], new: list[int], timing: Timing, path: Path
    ) -> Iterator[int]:
        random = np.random.default_rng(self.seed)
        length = 0
        for _ in range(self.max_new_tokens):
            start = time.perf_counter()
            logits = step(new)
            length += len(new)
            if np.isnan(logits[0, -1]).any():
                raise ModelError(f"{path} gives NaN as logits after {length} tokens")
            token = _pick(logits[0, -1], self.temperature, self.top_p, random)
            elapsed = time.perf_counter() - start
            if timing.new_tokens == 0:
                timing.prefill_seconds += elapsed
            else:
                timing.decode_seconds += elapsed
            timing.new_tokens += 1
            if token in self.stop:
                return
            yield token
            new = [token]


@dataclass
class Generator:
    """A causal language model in ONNX Runtime, one sequence at a time.

    Args:
        path: ``model.onnx`` with cache, or its folder.
        library: custom-operator library to register, or None.
        threads: intra-op threads; 0 = ONNX Runtime's default.

    Attributes:
        in_place: whether :meth:`tokens` keeps the cache in buffers that each step writes into; set it to False for a longer
            cache from each step.

    Raises:
        ConfigError: a negative number of threads.
        ModelError: the file is not there, cannot be loaded, or has no cache.
    """

    path: Path
    library: Path | None = None
    threads: int = 0
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        check_threads(self.threads)
        self.path = Path(self.path)
        if self.path.is_dir():
            self.path = self.path / "model.onnx"
        if not self.path.is_file():
            file = self.path if self.path.suffix == ".onnx" else self.path / "model.onnx"
            raise ModelError(f"{self.path} does not exist; write it with: claq-export MODEL --out {file}")
        self.session = load_session(self.path, self.library, self.threads)
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._past = past_inputs(self.session)
        if "input_ids" not in self._inputs or "logits" not in self._outputs or not self._past:
            raise ModelError(
                f"{self.path} does not generate: it has no key/value cache (inputs {', '.join(list(self._inputs)[:4])}); "
                "export a text-generation model without --no-cache"
            )
        self._presents = [PRESENT + name.removeprefix(PAST) for name in self._past]
        self.in_place = self.library is not None and takes_buffers(self.session)
        missing = [name for name in self._presents if name not in self._outputs]
        if missing:
            raise ModelError(f"{self.path} takes a cache but does not return {missing[0]!r}")

    def tokens(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[int] = (),
    ) -> Iterator[int]:
        """Generate tokens after a prompt, one at a time; :attr:`timing` tells how long it took so far.

        Args:
            prompt: token ids, at least one.
            max_new_tokens, temperature, top_p, seed, stop: see :class:`Sampling`.

        Raises:
            ConfigError: at once: a setting is out of range, or there is no token to begin with.
            ModelError: while tokens are drawn: ONNX Runtime refuses them, or the model's logits are NaN.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop))
        step = self._step_in_place() if self.in_place else self._step_with_copies()
        self.timing = Timing(prompt_tokens=len(prompt))
        return sampling.draw(step, prompt, self.timing, self.path)

    def _step_in_place(self) -> Callable[[Sequence[int]], npt.NDArray[Any]]:
        """What reads the next tokens of a sequence."""
        cache = CacheBuffers(self.session)

        def step(new: Sequence[int]) -> npt.NDArray[Any]:
            inputs = self._token_inputs(np.array([new], np.int64), cache.length)
            with self._naming(cache.length):
                return cache.run(inputs)

        return step

    def _step_with_copies(self) -> Callable[[Sequence[int]], npt.NDArray[Any]]:
        past = self.empty_cache()
        length = 0

        def step(new: Sequence[int]) -> npt.NDArray[Any]:
            nonlocal past, length
            logits, past = self.step(np.array([new], np.int64), length, past)
            length += len(new)
            return logits

        return step

    def empty_cache(self, batch: int = 1) -> list[Any]:
        """Keys and values of no token, one ``OrtValue`` an input."""
        return [ort.OrtValue.ortvalue_from_numpy(past.empty(batch)) for past in self._past.values()]

    def step(
        self, tokens: npt.NDArray[np.int64], length: int, past: Sequence[Any]
    ) -> tuple[npt.NDArray[Any], list[Any]]:
        """Run the model on new tokens.

        Args:
            tokens: ``[batch, sequence]``.
            length: tokens in the cache.
            past: the cache, as returned by the step before.

        Returns:
            logits ``[batch, sequence, vocabulary]`` and the longer cache.
        """
        named = self._token_inputs(tokens, length)
        feed = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in named.items()}
        feed |= dict(zip(self._past, past, strict=True))
        with self._naming(length):
            logits, *state = self.session.run_with_ort_values(["logits", *self._presents], feed)
        return logits.numpy(), state

    def _token_inputs(self, tokens: npt.NDArray[np.int64], length: int) -> dict[str, npt.NDArray[np.int64]]:
        """The inputs of the model that tell of new tokens, after ``length`` others."""
        batch, sequence = tokens.shape
        named = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, length + sequence), np.int64),
            "position_ids": np.broadcast_to(np.arange(length, length + sequence), (batch, sequence)).copy(),
        }
        return {name: value for name, value in named.items() if name in self._inputs}

    @contextmanager
    def _naming(self, length: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's exceptions share no other base class
            raise ModelError(f"{self.path} fails after {length} tokens: {error}") from error


def _pick(logits: npt.NDArray[Any], temperature: float, top_p: float, random: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    wide = logits.astype(np.float64)
    scores = np.exp((wide - wide.max()) / temperature)
    order = np.argsort(-scores)
    shares = scores[order] / scores.sum()
    kept = int(np.searchsorted(shares.cumsum(), top_p)) + 1
    order, shares = order[:kept], shares[:kept]
    return int(random.choice(order, p=shares / shares.sum()))
