"""Generation from the three ONNX files of an encoder-decoder: encoder, first step, later steps; NumPy and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .cache_buffers import PAST, PRESENT
from .capture.captured import PARTS
from .emit.artifact import has_parts, part_path
from .errors import ModelError
from .generation import Sampling, Timing
from .onnx_session import check_threads, load_session


def is_seq2seq_folder(path: Path) -> bool:
    """Whether a folder holds the files of an encoder-decoder, under the names that ``--out model.onnx`` gives them."""
    return path.is_dir() and has_parts(path / "model.onnx")


@dataclass
class Seq2SeqGenerator:
    """An encoder-decoder in ONNX Runtime, one sequence at a time.

    Args:
        folder: of the three files.
        library: custom-operator library to register, or None.
        threads: intra-op threads of each session; 0 = ONNX Runtime's default.

    Raises:
        ConfigError: a negative number of threads.
        ModelError: a file cannot be loaded.
    """

    folder: Path
    library: Path | None = None
    threads: int = 0
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        check_threads(self.threads)
        paths = [part_path(Path(self.folder) / "model.onnx", part) for part in PARTS]
        self._encoder, self._first, self._next = (load_session(path, self.library, self.threads) for path in paths)
        self.inputs = tuple(value.name for value in self._encoder.get_inputs())

    def tokens(
        self,
        encoded: Mapping[str, npt.NDArray[Any]],
        first: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[int] = (),
    ) -> Iterator[int]:
        """Generate tokens for what the encoder reads, one at a time; :attr:`timing` tells how long it took so far.

        Args:
            encoded: the encoder's inputs by name, batch 1.
            first: tokens that the output begins after (the start token), at least one.
            max_new_tokens, temperature, top_p, seed, stop: see :class:`~claq_export.generation.Sampling`.

        Raises:
            ConfigError: at once: a setting is out of range, or there is no token to begin with.
            ModelError: while tokens are drawn: ONNX Runtime refuses them, or the model's logits are NaN.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop))
        self.timing = Timing(prompt_tokens=len(first))
        known: dict[str, Any] = {}

        def step(new: Sequence[int]) -> npt.NDArray[Any]:
            if not known:
                (hidden,) = self._run(self._encoder, dict(encoded))
                known["encoder_hidden_states"] = hidden
                known["encoder_attention_mask"] = encoded.get("attention_mask")
                session = self._first
            else:
                session = self._next
            logits, *state = self._run(session, {**known, "input_ids": np.array([new], np.int64)})
            names = (value.name.replace(PRESENT, PAST, 1) for value in session.get_outputs()[1:])
            known.update(zip(names, state, strict=True))
            return np.asarray(logits.numpy())

        return sampling.draw(step, first, self.timing, Path(self.folder))

    def _run(self, session: ort.InferenceSession, named: Mapping[str, Any]) -> list[Any]:
        feed = {
            value.name: held
            if isinstance(held := named[value.name], ort.OrtValue)
            else ort.OrtValue.ortvalue_from_numpy(held)
            for value in session.get_inputs()
        }
        try:
            return list(session.run_with_ort_values([value.name for value in session.get_outputs()], feed))
        except Exception as error:  # onnxruntime's exception classes have no public common base
            raise ModelError(f"{self.folder} fails: {error}") from error
