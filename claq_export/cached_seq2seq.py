"""Generation by the three graphs of an encoder-decoder: inputs of real steps, agreement with the graph without cache, and the
tokens that the model itself would write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from .cached import DECODE_STEPS, TEXTS, agreeing, relative_difference
from .capture import CapturedModel
from .capture.tasks import DECODER_TOKENS
from .kernels import use_backend

Inputs = dict[str, torch.Tensor]


class Generation:
    """One batch on its way: what was encoded, and keys and values of the steps so far.

    Args:
        parts: encoder, first step and later steps (:mod:`claq_export.capture.seq2seq`).
        encoded: the encoder's inputs.
        keep_inputs: whether :attr:`inputs` is wanted.

    Attributes:
        inputs: of each part, what it ran with.
    """

    def __init__(
        self, parts: Sequence[CapturedModel], encoded: Mapping[str, torch.Tensor], *, keep_inputs: bool = False
    ) -> None:
        encoder, *self._steps = parts
        self._keep_inputs, self._began = keep_inputs, False
        self.inputs: list[list[Inputs]] = [[dict(encoded)], [], []]
        (hidden,) = encoder.run(encoded)
        self._known: Inputs = {"encoder_hidden_states": hidden}
        if (mask := encoded.get("attention_mask")) is not None:
            self._known["encoder_attention_mask"] = mask

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read further tokens, int64 ``[batch, sequence]``; their logits ``[batch, sequence, vocabulary]``."""
        part = self._steps[self._began]
        named = {"input_ids": tokens, **self._known}
        inputs = {name: named[name] for name in part.input_names}
        if self._keep_inputs:
            self.inputs[1 + self._began].append(inputs)
        self._began = True
        logits, *state = part.run(inputs)
        names = (name.replace("present", "past_key_values", 1) for name in part.output_names[1:])
        self._known |= dict(zip(names, state, strict=True))
        return logits


def seq2seq_inputs(captured: CapturedModel, batch: Mapping[str, torch.Tensor] | None = None) -> list[list[Inputs]]:
    """For each of the three graphs its inputs in a generation of a few greedy steps, which begins with two tokens.

    Args:
        captured: the whole model, with its three graphs.
        batch: calibration data; of a model that reads no tokens the first two samples are encoded. Tokens of models that read
            them are those of a padded batch.
    """
    parts = captured.file_graphs
    encoder = parts[0]
    encoded = dict(encoder.example_inputs)
    if "input_ids" in encoder.input_names:
        if captured.tokenizer is not None:
            encoded = encoder.inputs_from_tokens([captured.tokenizer(text)["input_ids"] for text in TEXTS])
    elif batch is not None:
        encoded = {name: batch[name][:2].to(example.dtype) for name, example in encoded.items()}
    run = Generation(parts, encoded, keep_inputs=True)
    rows = next(iter(encoded.values())).shape[0]
    tokens = torch.full((rows, 2), captured.start_token_id)
    for _ in range(1 + DECODE_STEPS):
        tokens = run.step(tokens)[:, -1:].argmax(-1)
    return run.inputs


def check_parts(whole: CapturedModel, parts: Sequence[CapturedModel], steps: Sequence[Sequence[Inputs]]) -> float:
    """Compare generation by the three graphs with the graph that sees all tokens at once, all quantized, in exact arithmetic.

    Args:
        whole: the graph without cache.
        parts: the graphs with cache, in the dtype of ``whole``.
        steps: from :func:`seq2seq_inputs`; what was encoded and the tokens are used.

    Returns:
        the largest difference of logits, divided by their largest magnitude.

    Raises:
        VerificationError: it is more than rounding explains.
    """
    encoded = {name: value.float() if value.is_floating_point() else value for name, value in steps[0][0].items()}
    tokens = [inputs["input_ids"] for inputs in (*steps[1], *steps[2])]
    # Rounded to int8, activations that differ in their last bit would differ by a 127th.
    with use_backend("reference"):
        run = Generation(parts, encoded)
        found = torch.cat([run.step(some) for some in tokens], 1)
        expected = whole.run({**encoded, DECODER_TOKENS: torch.cat(tokens, 1)})[0]
    return agreeing(relative_difference(found, expected))


def greedy_tokens(captured: CapturedModel, encoded: Mapping[str, torch.Tensor], limit: int) -> list[torch.Tensor]:
    """What the model writes for a batch, the likeliest token at each step: what a decoder reads to write it.

    Args:
        captured: an encoder-decoder with its three graphs.
        encoded: the encoder's inputs.
        limit: most tokens.

    Returns:
        int64 ``[tokens]`` for each row: the start token and what follows, without the end.
    """
    run = Generation(captured.file_graphs, encoded)
    batch = next(iter(encoded.values())).shape[0]
    tokens, real = greedy(run.step, batch, captured.start_token_id, captured.end_token_ids, limit)
    return [row[kept] for row, kept in zip(tokens, real, strict=True)]


def greedy(
    step: Callable[[torch.Tensor], torch.Tensor], rows: int, start: int, ends: Sequence[int], limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The start token and what is written after it, the likeliest token at each step.

    Args:
        step: reads the last token, int64 ``[rows, 1]``, and gives logits ``[rows, ..., vocabulary]``.
        rows: how many sequences are written side by side.
        start: the token that they begin with.
        ends: tokens that end one.
        limit: most tokens.

    Returns:
        int64 ``[rows, tokens]``, and bool of that shape: which of them come before the end.
    """
    last = torch.full((rows, 1), start)
    tokens, real = last, torch.ones(rows, 1, dtype=torch.bool)
    stops = torch.tensor(list(ends), dtype=torch.int64)
    while tokens.shape[1] < limit:
        last = step(last)[:, -1:].argmax(-1)
        goes_on = real[:, -1:] & ~torch.isin(last, stops)
        if not bool(goes_on.any()):
            break
        tokens, real = torch.cat([tokens, last], 1), torch.cat([real, goes_on], 1)
    return tokens, real
