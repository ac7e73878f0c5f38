"""Tasks of text and image models: which transformers class serves each, and a module that fixes inputs and outputs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .captured import Source, text_inputs
from .checkpoint import read_json


@dataclass(frozen=True)
class Task:
    """One task under the name optimum gives it.

    Attributes:
        name: task name.
        auto_class: the transformers class that loads a model for it.
        output: the field of the model's output that is the result.
        suffixes: endings of architecture names (``config.architectures``) that mean this task.
        image: the model reads ``pixel_values`` instead of tokens.
        speech: it reads ``input_features``, log-mel spectra.
        seq2seq: it is an encoder and a decoder, which also reads ``decoder_input_ids``.
    """

    name: str
    auto_class: str
    output: str
    suffixes: tuple[str, ...]
    image: bool = False
    speech: bool = False
    seq2seq: bool = False

    @property
    def generates(self) -> bool:
        """Whether the model generates token by token, with a key/value cache."""
        return self.seq2seq or self.name == "text-generation"


TASKS = {
    task.name: task
    for task in (
        Task("feature-extraction", "AutoModel", "last_hidden_state", ("EncoderModel",)),
        Task("text-classification", "AutoModelForSequenceClassification", "logits", ("ForSequenceClassification",)),
        Task("fill-mask", "AutoModelForMaskedLM", "logits", ("ForMaskedLM", "WithLMHeadModel")),
        Task("text-generation", "AutoModelForCausalLM", "logits", ("ForCausalLM", "LMHeadModel")),
        Task(
            "image-classification",
            "AutoModelForImageClassification",
            "logits",
            ("ForImageClassification", "ForImageClassificationWithTeacher"),
            image=True,
        ),
        Task("image-feature-extraction", "AutoModel", "last_hidden_state", ("VisionModel",), image=True),
        # Architectures of text and images end as these do; :func:`seq2seq_task` tells them apart.
        Task("text2text-generation", "AutoModelForSeq2SeqLM", "logits", (), seq2seq=True),
        Task("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", "logits", (), speech=True, seq2seq=True),
    )
}

ALIASES = {
    "default": "feature-extraction",
    "sentence-similarity": "feature-extraction",
    "sequence-classification": "text-classification",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "speech2seq-lm": "automatic-speech-recognition",
}

SPECTRUM, DECODER_TOKENS = "input_features", "decoder_input_ids"
"""Inputs of encoder-decoders: what a speech model hears, and the tokens that came before."""

# Decoders whose positions optimum's exports leave to the model: they count the mask's ones, or have no positions.
_COUNTS_POSITIONS = frozenset({"opt", "bloom", "mpt", "xglm", "biogpt"})


def canonical_task(name: str) -> Task:
    """The task of that name or alias.

    Raises:
        ModelError: the task is unknown; the message names the known ones.
    """
    task = TASKS.get(ALIASES.get(name, name))
    if task is None:
        raise ModelError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)} (also {', '.join(ALIASES)})")
    return task


def seq2seq_task(config: Any) -> Task | None:
    """The task of an encoder-decoder's configuration, by the tables of transformers; None of other architectures."""
    from transformers.models.auto import modeling_auto

    saved = (getattr(config, "architectures", None) or [""])[0]
    tables = {
        "text2text-generation": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "automatic-speech-recognition": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
    found = (name for name, table in tables.items() if saved and table.get(config.model_type) == saved)
    name = next(found, None) if getattr(config, "is_encoder_decoder", False) else None
    return None if name is None else TASKS[name]


def infer_task(architectures: list[str] | None) -> Task:
    """The task an architecture was saved for (``BertForMaskedLM`` -> fill-mask).

    Raises:
        ModelError: no architecture is recorded, or it is for a task claq does not know.
    """
    known = ", ".join(TASKS)
    if not architectures:
        raise ModelError(f"config.json names no architecture, so the task is unknown; choose it with --task ({known})")
    for task in TASKS.values():
        if architectures[0].endswith(task.suffixes):
            return task
    if architectures[0].endswith("Model"):
        return TASKS["feature-extraction"]
    raise ModelError(
        f"architecture {architectures[0]} belongs to no task claq knows ({known}); choose one with --task if it fits"
    )


class TaskModel(nn.Module):
    """A transformers model with the inputs and the one output of its task, as positional tensors.

    Attributes:
        model: the transformers model; its parameters keep their names there.
        task: task name.
        input_names, output_names: of :meth:`forward`, as optimum names them.
        source: where the model came from, set by the loader.
    """

    state_prefix = "model."
    """Capture takes this off the names of parameters."""

    independent_axes = True
    """Whether each dynamic axis may be made longer by itself, as capture does to compare the graph at other sizes."""

    def __init__(self, model: nn.Module, task: str, source: Source | None = None) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        self.task = task
        self.source = source
        self.input_names = _input_names(model, task)
        self.output_names: tuple[str, ...] = (TASKS[task].output,)
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Run the model on tensors in the order of ``input_names``: int64 ``[batch, sequence]``, float32 images
        ``[batch, channels, height, width]`` or spectra ``[batch, mel bins, frames]``."""
        named: dict[str, Any] = dict(zip(self.input_names, tensors, strict=True))
        if self.task == "text-generation" or TASKS[self.task].seq2seq:
            named["use_cache"] = False
        result: torch.Tensor = getattr(self.model(**named, return_dict=True), self.output_names[0])
        return result

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name -> {axis: name}. The size of an image and the length of a spectrum are fixed: position embeddings depend
        on them."""
        if not TASKS[self.task].seq2seq:
            axes = {0: "batch"} if TASKS[self.task].image else {0: "batch", 1: "sequence"}
            return {name: dict(axes) for name in self.input_names}
        encoded = {0: "batch"} if TASKS[self.task].speech else {0: "batch", 1: "encoder_sequence"}
        decoded = {0: "batch", 1: "sequence"}
        return {name: dict(decoded if name == DECODER_TOKENS else encoded) for name in self.input_names}

    @property
    def pad_token_id(self) -> int:
        """The token that pads; 0 where the model names none."""
        pad = getattr(self.config, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0

    @property
    def start_token_id(self) -> int:
        """The token that an encoder-decoder's output begins after; the padding token where the model names none."""
        start = getattr(self.config, "decoder_start_token_id", None)
        return start if isinstance(start, int) and start >= 0 else self.pad_token_id

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end what is generated."""
        end = getattr(self.config, "eos_token_id", None)
        return tuple(token for token in (end if isinstance(end, list) else [end]) if isinstance(token, int))

    @property
    def max_sequence(self) -> int | None:
        """Most tokens a sequence may have, by the configuration."""
        return longest_sequence(self.model)

    def example_inputs(self, batch: int = 2, sequence: int = 8) -> dict[str, torch.Tensor]:
        """Inputs to trace with: fixed pseudo-random tokens, the last row padded; or noise of an image's or a spectrum's size.
        An encoder-decoder's second sequence is two tokens shorter."""
        generator = torch.Generator().manual_seed(0)
        if TASKS[self.task].image:
            shape = _image_shape(self.config, self.source.folder if self.source is not None else None)
            pixels = torch.randn(batch, *shape, generator=generator)
            return {"pixel_values": pixels.to(next(self.model.parameters()).dtype)}
        if TASKS[self.task].speech:
            frames = torch.randn(batch, *spectrum_shape(self.config), generator=generator)
            inputs = {SPECTRUM: frames.to(next(self.model.parameters()).dtype)}
        else:
            inputs = self._example_text(batch, sequence, generator)
        if TASKS[self.task].seq2seq:
            shorter = (batch, max(1, sequence - 2))
            inputs[DECODER_TOKENS] = torch.randint(0, self._vocabulary(), shorter, generator=generator)
        return inputs

    def _example_text(self, batch: int, sequence: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Tokens and what goes with them, but not a decoder's; the last row is padded."""
        tokens = torch.randint(0, self._vocabulary(), (batch, sequence), generator=generator)
        mask = torch.ones(batch, sequence, dtype=torch.int64)
        mask[-1, sequence - sequence // 4 :] = 0
        end = getattr(self.config, "eos_token_id", None)
        if (
            self.task == "text-classification"
            and getattr(self.config, "is_encoder_decoder", False)
            and isinstance(end, int)
        ):
            # BART and its kin classify by the state at the end token, of which each row must have as many as the others.
            tokens[tokens == end] = (end + 1) % self._vocabulary()
            tokens[torch.arange(batch), mask.sum(1) - 1] = end
        tokens[mask == 0] = self.pad_token_id
        names = tuple(name for name in self.input_names if name != DECODER_TOKENS)
        return text_inputs(names, tokens, mask, self.pad_token_id)

    def _vocabulary(self) -> int:
        """Number of tokens, by the configuration.

        Raises:
            ModelError: it does not tell.
        """
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        if not isinstance(size, int):
            raise ModelError(
                f"the configuration of {self.config.model_type!r} gives no vocab_size, so its tokens are unknown; export the "
                "module from Python with an example"
            )
        return size


def longest_sequence(model: nn.Module) -> int | None:
    """Most tokens that a transformers model takes, by its configuration; None where that sets no limit."""
    limit = stated_positions(getattr(model, "config", None))
    return None if limit is None else limit - _positions_before_first(model, limit)


def stated_positions(config: Any) -> int | None:
    """Positions of a model by its configuration, or None; of some the first ones are no token's."""
    for key in ("max_position_embeddings", "n_positions", "max_target_positions"):
        limit = getattr(config, key, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _positions_before_first(model: nn.Module, limit: int) -> int:
    """Rows of a table of ``limit`` positions that no token has: a table with a padding index (RoBERTa's and those made after
    it) is counted from the row after that."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if not isinstance(padding, int) or "position" not in name.rpartition(".")[2]:
            continue
        table = getattr(module, "weight", None)
        if isinstance(table, torch.Tensor) and table.shape[0] == limit:
            return padding + 1
    return 0


def spectrum_shape(config: Any) -> tuple[int, int]:
    """Mel bins and frames of a speech model's input, by its configuration.

    Raises:
        ModelError: it is no Whisper's.
    """
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if config.model_type != "whisper" or not isinstance(bins, int) or not isinstance(positions, int):
        raise ModelError(
            f"of speech models claq knows the input of Whisper alone, this is {config.model_type!r}; export the module from "
            "Python with an example"
        )
    return bins, 2 * positions  # its second convolution takes every other frame


def _image_shape(config: Any, folder: Path | None) -> tuple[int, int, int]:
    """Channels, height and width by an image model's configuration, or by that of its image half; the size else by what the
    folder says about preparing images.

    Raises:
        ModelError: neither gives the size.
    """
    image = config if hasattr(config, "image_size") else getattr(config, "vision_config", config)
    sides = _sides(getattr(image, "image_size", None)) or _prepared_sides(folder)
    if sides is None:
        raise ModelError(
            f"the configuration of {config.model_type!r} gives no image_size, and there is no preprocessor_config.json with "
            "one, so its input is unknown; export the module from Python with an example"
        )
    return (int(getattr(image, "num_channels", 3)), *sides)


def _prepared_sides(folder: Path | None) -> tuple[int, int] | None:
    """Height and width of the images that an image processor's configuration makes."""
    path = None if folder is None else folder / "preprocessor_config.json"
    if path is None or not path.is_file():
        return None
    settings = read_json(path)
    cropped = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    return _sides(cropped) or _sides(settings.get("size"))


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width of a size as configurations give it: a number, two, or a mapping."""
    if isinstance(size, dict):
        size = [size["height"], size["width"]] if {"height", "width"} <= size.keys() else size.get("shortest_edge")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    return sides[0], sides[1]


def _input_names(model: nn.Module, task: str) -> tuple[str, ...]:
    if TASKS[task].image:
        return ("pixel_values",)
    if TASKS[task].seq2seq:
        encoded = (SPECTRUM,) if TASKS[task].speech else ("input_ids", "attention_mask")
        return (*encoded, DECODER_TOKENS)
    accepted = inspect.signature(model.forward).parameters
    config: Any = model.config
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    # A model whose table has rows before the first position adds them to those that it counts, not to those that it is given.
    counts_positions = config.model_type in _COUNTS_POSITIONS or longest_sequence(model) != stated_positions(config)
    if task == "text-generation" and "position_ids" in accepted and not counts_positions:
        names.append("position_ids")
    return tuple(names)
