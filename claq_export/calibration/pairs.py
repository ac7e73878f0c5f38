"""Calibration samples of encoder-decoders: what the decoder reads is written by the model itself where it is not given."""

from __future__ import annotations

from collections.abc import Sequence

from ..cached_seq2seq import greedy_tokens
from ..capture import TASKS, CapturedModel, weights_in_memory
from ..capture.tasks import DECODER_TOKENS
from ..errors import CalibrationError
from .data import Batch, group_equal_shapes
from .progress import ProgressReporter

TOKENS_WRITTEN = 64
"""Most tokens that the model writes for a sample."""


def is_pair_of_sequences(captured: CapturedModel) -> bool:
    """Whether the model reads an encoder's input and a decoder's tokens."""
    task = TASKS.get(captured.task or "")
    return task is not None and task.seq2seq


def with_decoder_tokens(
    captured: CapturedModel,
    batches: Sequence[Batch],
    batch_size: int,
    reporter: ProgressReporter,
    *,
    whole: bool = True,
) -> list[Batch]:
    """The batches, each with ``decoder_input_ids``: the start token and what the unquantized model writes after it, the likeliest
    token at each step.

    Args:
        captured: with the graphs of its cache, not rewritten yet.
        batches: the encoder's inputs; batches that have the tokens stay as they are.
        batch_size: of the batches that are returned.
        reporter: told of each batch.
        whole: whether the weights may all be in memory.

    Raises:
        CalibrationError: the tokens are missing, and there is no cache to write them with, or too little memory.
    """
    if all(DECODER_TOKENS in batch for batch in batches):
        return list(batches)
    if not captured.file_graphs or not captured.file_graphs[0].part or not whole:
        why = (
            "the weights are not all in memory (--memory)"
            if not whole
            else "it is captured without a cache (--no-cache)"
        )
        raise CalibrationError(
            f"the calibration data hold no {DECODER_TOKENS!r}, and the model cannot write them itself since {why}; give a .npz "
            "file with an array of them, or batches from Python"
        )
    limit = min(TOKENS_WRITTEN, captured.max_sequence or TOKENS_WRITTEN)
    examples = captured.file_graphs[0].example_inputs
    samples: list[Batch] = []
    reporter.start_layers(len(batches), "writing the decoder's tokens")
    try:
        with weights_in_memory([graph.graph_module for graph in captured.file_graphs]):
            for batch in batches:
                encoded = {name: batch[name].to(example.dtype) for name, example in examples.items()}
                for row, tokens in enumerate(greedy_tokens(captured, encoded, limit)):
                    rows = {name: value[row : row + 1] for name, value in batch.items()}
                    samples.append({**rows, DECODER_TOKENS: tokens[None]})
                reporter.advance()
    finally:
        reporter.finish_layers()
    return group_equal_shapes(samples, batch_size)
