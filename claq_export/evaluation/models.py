"""Models under evaluation behind one small interface, whatever runs them: PyTorch, or ONNX Runtime with or without
libclaq."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from ..capture.pretrained import auto_class, check_complete, let_interruptions_through, load_tokenizer, quietly
from ..capture.tasks import Task, canonical_task, longest_sequence, stated_positions
from ..errors import ClaqError, ConfigError, FormatError, ModelError
from ..format import metadata
from ..inputs import read_json_object

LOGITS_OUTPUT = "logits"
HIDDEN_OUTPUTS = ("last_hidden_state", "token_embeddings", "hidden_states")
_OTHER_OUTPUTS = frozenset({"pooler_output", "sentence_embedding", "text_embeds"})
"""Names that say that an output is neither."""


class LogitsModel(Protocol):
    """What a language model is to the evaluation."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token logits, float ``[B, S, V]``, for int64 ``tokens [B, S]`` without padding."""
        ...


class EncoderModel(Protocol):
    """What a sentence encoder is to the evaluation."""

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token embeddings, float32 ``[B, S, D]``, for int64 ``tokens [B, S]``; ``mask [B, S]`` is 0 at padding."""
        ...


def sequence_limit(*models: Any) -> int | None:
    """Most tokens that all of the models take at once, by their ``max_sequence``; None where none states a limit."""
    limits = [getattr(model, "max_sequence", None) for model in models]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def window_length(asked: int | None, usual: int, limit: int | None) -> int:
    """Tokens a window of models that take at most ``limit`` (None: any number); ``usual`` where none are asked for.

    Raises:
        ConfigError: more than the limit are asked for.
    """
    if asked is None:
        return usual if limit is None else min(usual, limit)
    if limit is not None and asked > limit:
        raise ConfigError(f"--context {asked}: the model takes at most {limit} tokens, by its configuration")
    return asked


class TorchModel:
    """A PyTorch module: plain, quantized or compiled. Implements :class:`LogitsModel` and :class:`EncoderModel`.

    The module takes ``input_ids`` (and ``attention_mask``, for encoders) as transformers' models do, or the token
    tensor alone; it returns a tensor, a tuple whose first entry is one, or an object or mapping with ``logits`` or
    ``last_hidden_state``.

    Attributes:
        max_sequence: most tokens it takes, by its configuration; None where that sets no limit.
    """

    def __init__(self, module: torch.nn.Module | Any) -> None:
        self.module = module
        parameter = next(module.parameters(), None) if isinstance(module, torch.nn.Module) else None
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        self.max_sequence: int | None = None
        if isinstance(module, torch.nn.Module):
            module.eval()
            self.max_sequence = longest_sequence(module)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            if hasattr(self.module, "config"):
                output = self.module(input_ids=tokens.to(self.device), use_cache=False)
            else:
                output = self.module(tokens.to(self.device))
            return _pick(output, (LOGITS_OUTPUT,))

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            output = self.module(input_ids=tokens.to(self.device), attention_mask=mask.to(self.device))
            return _pick(output, HIDDEN_OUTPUTS).float().cpu()


def _pick(output: Any, names: tuple[str, ...]) -> torch.Tensor:
    """The wanted tensor of a module's output."""
    for name in names:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    if isinstance(output, torch.Tensor):
        return output
    raise ModelError(f"the model returns {type(output).__name__} without {' or '.join(names)}")


class OnnxModel:
    """An ONNX file run by ONNX Runtime. Implements :class:`LogitsModel` and :class:`EncoderModel`.

    Inputs beyond the token ids are filled in: ``attention_mask`` (ones without padding), ``token_type_ids`` (zeros),
        ``position_ids``, and for decoders with a KV cache an empty past, so that a whole window runs as one prefill.

    Args:
        path: the model file.
        library: path of the custom-operator library to register; None runs the file as stock ONNX Runtime does.
        threads: intra-op threads; 0 leaves the choice to ONNX Runtime.

    Raises:
        ConfigError: a negative number of threads.
        ModelError: ONNX Runtime cannot load the file.
    """

    def __init__(self, path: str | Path, library: str | Path | None = None, threads: int = 0) -> None:
        from ..onnx_session import check_threads, load_session

        check_threads(threads)
        path = self.path = Path(path)
        if not path.is_file():
            raise ModelError(f"ONNX file {str(path)!r} does not exist")
        self.session = load_session(path, library, threads)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        if "input_ids" not in self.inputs and len(self.inputs) != 1:
            raise ModelError(f"{str(path)!r} has no input 'input_ids'; its inputs are {', '.join(self.inputs)}")
        self._token_input = "input_ids" if "input_ids" in self.inputs else next(iter(self.inputs))

    @cached_property
    def config(self) -> Any:
        """The settings in ``config.json`` beside the file, as attributes; none if it is not there.

        Raises:
            ModelError: it is not a JSON object.
        """
        path = self.path.parent / "config.json"
        return SimpleNamespace(**read_json_object(path, ModelError) if path.is_file() else {})

    @cached_property
    def task(self) -> str | None:
        """What claq-export wrote the file for; None for a file of others."""
        return self.session.get_modelmeta().custom_metadata_map.get(metadata.TASK) or None

    @cached_property
    def max_sequence(self) -> int | None:
        """Most tokens it takes, by the configuration beside it; None where that sets no limit."""
        limit, padding = stated_positions(self.config), getattr(self.config, "pad_token_id", None)
        if limit is None or not isinstance(padding, int) or padding <= 0 or not _has_masked_form(self.config):
            return limit  # the tables of BERT-like models, whose padding is token 0, begin at position 0
        # Encoders like RoBERTa count positions from after the padding index; the file does not show whether this one does.
        return max(limit - padding - 1, 1)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        found = torch.from_numpy(self._run(tokens, torch.ones_like(tokens), (LOGITS_OUTPUT,)))
        if found.dim() == 3 and found.shape[1] == 1 < tokens.shape[1]:
            raise ModelError(f"{self.path} returns the last token's logits alone; export it without --last-logits")
        return self._of_tokens(found, tokens)

    def padded_logits(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits for padded tokens ``[B, S]``: ``[B, S, V]`` of a masked language model, ``[B, C]`` of a classifier."""
        return torch.from_numpy(self._run(tokens, mask, (LOGITS_OUTPUT,))).float()

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._of_tokens(torch.from_numpy(self._run(tokens, mask, HIDDEN_OUTPUTS)), tokens)

    def _of_tokens(self, found: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if found.dim() != 3 or found.shape[:2] != tokens.shape:
            raise ModelError(
                f"{self.path} returns values of shape {list(found.shape)} for tokens of shape {list(tokens.shape)}; a vector "
                "for each token is needed"
            )
        return found.float()

    def _run(self, tokens: torch.Tensor, mask: torch.Tensor, wanted: tuple[str, ...]) -> np.ndarray:
        output = self._output(wanted)
        try:
            return self.session.run([output], self._feed(tokens, mask))[0]
        except ModelError:
            raise
        except Exception as error:  # onnxruntime's exception classes have no public common base
            raise ModelError(f"ONNX Runtime cannot run {str(self.path)!r}: {error}") from error

    def _output(self, wanted: tuple[str, ...]) -> str:
        """The output of a wanted name; a single one may have a name of its own, as modules exported from Python have."""
        named = next((name for name in wanted if name in self.outputs), None)
        if named is not None:
            return named
        if len(self.outputs) == 1 and self.outputs[0] not in {LOGITS_OUTPUT, *HIDDEN_OUTPUTS, *_OTHER_OUTPUTS}:
            return self.outputs[0]
        raise ModelError(
            f"{str(self.path)!r} has no output {' or '.join(map(repr, wanted))}; its outputs are {', '.join(self.outputs[:4])}"
        )

    def _feed(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
        feed: dict[str, np.ndarray] = {}
        for name, value in self.inputs.items():
            dtype = _numpy_dtype(value.type)
            if name == self._token_input:
                feed[name] = tokens.cpu().numpy().astype(dtype)
            elif name == "attention_mask":
                feed[name] = mask.cpu().numpy().astype(dtype)
            elif name == "token_type_ids":
                feed[name] = np.zeros(tuple(tokens.shape), dtype)
            elif name == "position_ids":
                feed[name] = np.broadcast_to(np.arange(tokens.shape[1], dtype=dtype), tuple(tokens.shape)).copy()
            elif name.startswith("past_"):
                feed[name] = np.zeros(_empty_past(value.shape, tokens.shape[0]), dtype)
            else:
                raise ModelError(f"the ONNX model's input {name!r} cannot be made from text")
        return feed


_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bool)": np.dtype(np.bool_),
}


def _numpy_dtype(onnx_type: str) -> np.dtype[Any]:
    if onnx_type not in _NUMPY_DTYPES:
        raise ModelError(f"an input of type {onnx_type} cannot be made from text")
    return _NUMPY_DTYPES[onnx_type]


def _empty_past(shape: list[int | str | None], batch: int) -> tuple[int, ...]:
    """``[batch, heads, past, head_dim]`` with the batch filled in and every other free dimension 0."""
    return tuple(batch if i == 0 else (d if isinstance(d, int) else 0) for i, d in enumerate(shape))


def runtime_library(choice: str | Path | None) -> Path | None:
    """The custom-operator library to register.

    Args:
        choice: ``"auto"`` (that of the installed ``claq_runtime``, None without it), ``"none"`` or None, or a path.

    Raises:
        ConfigError: the path does not exist.
    """
    if choice is None or choice == "none":
        return None
    if choice == "auto":
        try:
            import claq_runtime
        except ImportError:
            return None
        return Path(claq_runtime.library_path())
    if not Path(choice).is_file():
        raise ConfigError(f"runtime library {str(choice)!r} does not exist; give a path, 'auto' or 'none'")
    return Path(choice)


def open_model(
    source: str | Path | torch.nn.Module,
    *,
    causal: bool,
    task: str | None = None,
    library: str | Path | None = "auto",
    reference: str | Path | None = None,
    threads: int = 0,
) -> TorchModel | OnnxModel:
    """Open what a user names.

    Args:
        source: an ONNX file; a folder with ``claq.safetensors`` (its original given by ``reference`` unless the folder
            holds a ``config.json``); a Hugging Face folder or hub id; or a module.
        causal: True for a language model, which predicts from the tokens before; False for an encoder.
        task: of the model, where it is neither (a classifier, for example); a name of :mod:`claq_export.capture.tasks`.
        library: see :func:`runtime_library`; ONNX only.
        reference: the original model's folder, whose architecture a ``claq.safetensors`` folder fills with its weights.
        threads: intra-op threads of ONNX Runtime.

    Raises:
        ConfigError: a setting is out of range, or the reference is missing.
        ModelError: the source cannot be read, lacks weights that the task needs, or is to be a language model and attends in
            both directions.
        FormatError: the artifact is damaged.
    """
    model = _opened(source, causal, task, library, reference, threads)
    if causal and _attends_both_ways(model):
        raise ModelError(
            f"{source if isinstance(source, (str, Path)) else type(source).__name__} is a masked language model: it sees the "
            "tokens that it would have to predict, so its perplexity and the likelihood of a continuation mean nothing"
        )
    return model


def _attends_both_ways(model: TorchModel | OnnxModel) -> bool:
    """Whether a model with logits is a masked language model, as far as can be told."""
    if isinstance(model, OnnxModel) and model.task == "fill-mask":
        return True
    config = model.config if isinstance(model, OnnxModel) else getattr(model.module, "config", None)
    if not _has_masked_form(config) or getattr(config, "is_encoder_decoder", False):
        return False
    return not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def _has_masked_form(config: Any) -> bool:
    """Whether transformers has a masked language model of this architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    family = getattr(config, "model_type", None)
    return isinstance(family, str) and family in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _opened(
    source: str | Path | torch.nn.Module,
    causal: bool,
    task: str | None,
    library: str | Path | None,
    reference: str | Path | None,
    threads: int,
) -> TorchModel | OnnxModel:
    if isinstance(source, torch.nn.Module):
        return TorchModel(source)
    kind = canonical_task(task or ("text-generation" if causal else "feature-extraction"))
    path = Path(source).expanduser()
    if path.suffix == ".onnx":
        return OnnxModel(path, runtime_library(library), threads)
    if (path / "claq.safetensors").is_file():
        if (path / "config.json").is_file():
            return TorchModel(_filled(path, _untrained(path, kind)))
        if reference is None:
            raise ConfigError(f"{str(path)!r} has no config.json; name the original model with --reference")
        return TorchModel(_filled(path, _pretrained(reference, kind)))
    return TorchModel(_pretrained(source, kind))


def _filled(folder: Path, model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with the weights of an artifact's folder."""
    from ..format.checkpoint import load_checkpoint
    from ..modules import restore

    checkpoint = load_checkpoint(folder)
    stored = (*checkpoint.layers, *checkpoint.tensors)
    # An encoder's graph ends before its pooler, where the task does not need one; then the artifact does not hold it.
    if getattr(model, "pooler", None) is not None and not any(name.startswith("pooler.") for name in stored):
        model.pooler = None  # type: ignore[assignment]
    return restore(model, checkpoint)


def _pretrained(source: str | Path, task: Task) -> torch.nn.Module:
    """A model of a folder or hub id, also one quantized by claq or by what else transformers knows."""
    import transformers

    from ..integrations import transformers as _registered  # noqa: F401  # else claq's own folders have random weights

    place = Path(source).expanduser()
    source = place if place.is_dir() else str(source)
    try:
        with quietly():
            name = auto_class(transformers.AutoConfig.from_pretrained(source), task)
            model, info = getattr(transformers, name).from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except ClaqError:
        raise
    except Exception as error:  # transformers raises many types; each is the reason
        let_interruptions_through(error)
        raise ModelError(f"cannot load {str(source)!r} with transformers: {error}") from error
    check_complete(model, info, source, task)
    evaluated: torch.nn.Module = model.eval()
    return evaluated


def _untrained(folder: Path, task: Task) -> torch.nn.Module:
    """The architecture that a claq folder's ``config.json`` describes, without weights of its own."""
    import transformers

    from ..capture.checkpoint import read_json
    from ..format.checkpoint import TENSORS_FILE
    from ..inputs import SafetensorsFile, check_sizes

    tensors = len(SafetensorsFile(folder / TENSORS_FILE, FormatError).tensors)
    check_sizes(read_json(folder / "config.json"), tensors, str(folder / "config.json"), ModelError)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        # What claq-export writes there is the dtype of the unquantized tensors.
        dtype = getattr(config, "dtype", None) or torch.float32
        model: torch.nn.Module = getattr(transformers, auto_class(config, task)).from_config(config, dtype=dtype)
    except Exception as error:  # transformers raises many types; each is the reason
        let_interruptions_through(error)
        raise ModelError(f"cannot make the model of {folder / 'config.json'} for {task.name}: {error}") from error
    return model.eval()


def open_tokenizer(*sources: str | Path | None, chosen: str | Path | None = None) -> Any:
    """The tokenizer of the first source that has one; an ONNX file stands for its folder.

    Args:
        sources: files, folders or hub ids; None is passed over.
        chosen: where a user says that it is; if given, nothing else is tried.

    Raises:
        ModelError: none has.
    """
    if chosen is not None:
        return load_tokenizer(_tokenizer_folder(chosen))
    tried = []
    for source in sources:
        if source is None:
            continue
        folder = _tokenizer_folder(source)
        try:
            return load_tokenizer(folder)
        except ModelError as error:
            tried.append(str(error))
    raise ModelError("no tokenizer found; name one with --tokenizer. " + " | ".join(tried))


def _tokenizer_folder(source: str | Path) -> str | Path:
    path = Path(source).expanduser()
    if path.suffix != ".onnx":
        return path if path.is_dir() else source
    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    return path.parent
