"""Models under evaluation behind one small interface, whatever runs them: PyTorch, or ONNX Runtime with or without
libclaq."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import ConfigError, ModelError

LOGITS_OUTPUT = "logits"
HIDDEN_OUTPUTS = ("last_hidden_state", "token_embeddings", "hidden_states")


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


class TorchModel:
    """A PyTorch module: plain, quantized or compiled. Implements :class:`LogitsModel` and :class:`EncoderModel`.

    The module takes ``input_ids`` (and ``attention_mask``, for encoders) as transformers' models do, or the token
    tensor alone; it returns a tensor, a tuple whose first entry is one, or an object or mapping with ``logits`` or
    ``last_hidden_state``.
    """

    def __init__(self, module: torch.nn.Module | Any) -> None:
        self.module = module
        parameter = next(module.parameters(), None) if isinstance(module, torch.nn.Module) else None
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        if isinstance(module, torch.nn.Module):
            module.eval()

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
        ModelError: ONNX Runtime cannot load the file.
    """

    def __init__(self, path: str | Path, library: str | Path | None = None, threads: int = 0) -> None:
        from ..onnx_session import open_session

        path = Path(path)
        if not path.is_file():
            raise ModelError(f"ONNX file {str(path)!r} does not exist")
        try:
            self.session = open_session(path, library, threads)
        except Exception as error:  # onnxruntime's exception classes have no public common base
            raise ModelError(f"ONNX Runtime cannot load {str(path)!r}: {error}") from error
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        if "input_ids" not in self.inputs and len(self.inputs) != 1:
            raise ModelError(f"{str(path)!r} has no input 'input_ids'; its inputs are {', '.join(self.inputs)}")
        self._token_input = "input_ids" if "input_ids" in self.inputs else next(iter(self.inputs))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        found = torch.from_numpy(self._run(tokens, torch.ones_like(tokens), (LOGITS_OUTPUT,)))
        if found.dim() == 3 and found.shape[1] != tokens.shape[1]:
            raise ModelError("the ONNX model returns the last token's logits alone; export it without --last-logits")
        return found.float()

    def padded_logits(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits for padded tokens ``[B, S]``: ``[B, S, V]`` of a masked language model, ``[B, C]`` of a classifier."""
        return torch.from_numpy(self._run(tokens, mask, (LOGITS_OUTPUT,))).float()

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._run(tokens, mask, HIDDEN_OUTPUTS)).float()

    def _run(self, tokens: torch.Tensor, mask: torch.Tensor, wanted: tuple[str, ...]) -> np.ndarray:
        output = next((name for name in wanted if name in self.outputs), self.outputs[0])
        return self.session.run([output], self._feed(tokens, mask))[0]

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
    library: str | Path | None = "auto",
    reference: str | Path | None = None,
    threads: int = 0,
) -> TorchModel | OnnxModel:
    """Open what a user names.

    Args:
        source: an ONNX file; a folder with ``claq.safetensors`` (its original given by ``reference`` unless the folder
            holds a ``config.json``); a Hugging Face folder or hub id; or a module.
        causal: True for a language model, False for an encoder.
        library: see :func:`runtime_library`; ONNX only.
        reference: the original model's folder, whose architecture a ``claq.safetensors`` folder fills with its weights.
        threads: intra-op threads of ONNX Runtime.

    Raises:
        ModelError: the source cannot be read.
    """
    if isinstance(source, torch.nn.Module):
        return TorchModel(source)
    path = Path(source)
    if path.suffix == ".onnx":
        return OnnxModel(path, runtime_library(library), threads)
    if (path / "claq.safetensors").is_file():
        if (path / "config.json").is_file():
            return TorchModel(_filled(path, _untrained(path, causal)))
        if reference is None:
            raise ConfigError(f"{str(path)!r} has no config.json; name the original model with --reference")
        return TorchModel(_filled(path, _pretrained(reference, causal)))
    return TorchModel(_pretrained(source, causal))


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


def _pretrained(source: str | Path, causal: bool) -> torch.nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if causal else AutoModel
    try:
        return kind.from_pretrained(str(source), dtype=torch.float32, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {str(source)!r} with transformers: {error}") from error


def _untrained(folder: Path, causal: bool) -> torch.nn.Module:
    """The architecture that a claq folder's ``config.json`` describes, without weights of its own."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from ..capture.checkpoint import read_json, safetensors_names
    from ..format.checkpoint import TENSORS_FILE
    from ..inputs import check_sizes

    tensors = len(safetensors_names(folder / TENSORS_FILE))
    check_sizes(read_json(folder / "config.json"), tensors, str(folder / "config.json"), ModelError)
    config = AutoConfig.from_pretrained(str(folder))
    # What claq-export writes there is the dtype of the unquantized tensors.
    dtype = getattr(config, "dtype", None) or torch.float32
    return (AutoModelForCausalLM if causal else AutoModel).from_config(config, dtype=dtype).eval()


def open_tokenizer(*sources: str | Path | None) -> Any:
    """The tokenizer of the first source that has one; an ONNX file stands for its folder.

    Raises:
        ModelError: none has.
    """
    from transformers import AutoTokenizer

    tried = []
    for source in sources:
        if source is None:
            continue
        path = Path(source)
        if path.suffix == ".onnx" and not path.is_file():
            raise ModelError(f"{path} does not exist")
        folder = path.parent if path.suffix == ".onnx" else path
        try:
            return AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            tried.append(f"{folder}: {' '.join(lines[:2])}")
    raise ModelError("no tokenizer found; name one with --tokenizer. " + " | ".join(tried))
