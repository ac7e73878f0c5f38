"""Loads Hugging Face models and tokenizers (folder or hub id); refuses what would leave weights random or not finite."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, first_line
from ..inputs import check_sizes, contained
from .captured import CapturedModel, Source
from .checkpoint import digest, read_json, safetensors_names, weight_files
from .fit import check_fit
from .lazy import build_lazily
from .module import capture_module
from .precision import check_weights
from .tasks import Task, TaskModel, canonical_task, infer_task, seq2seq_task

_log = logging.getLogger(__name__)

# Parts of a model that the task's output does not depend on; a checkpoint may lack them.
_UNUSED = {
    "feature-extraction": re.compile(r"(^|\.)pooler\."),
    "fill-mask": re.compile(r"(^|\.)pooler\."),
    "image-feature-extraction": re.compile(r"(^|\.)pooler\."),
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
_GENERATION = "generation_config.json"
_FILES_READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.jinja")


def load_pretrained(
    path_or_id: str | Path,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[TaskModel, Any, str]:
    """Load a model for a task.

    Args:
        path_or_id: folder with ``config.json`` and safetensors, or the id of such a repository on the Hugging Face hub.
        task: task name or alias (:mod:`claq_export.capture.tasks`); None: inferred from the saved architecture.
        dtype: of the weights after loading.
        trust_remote_code: run Python code that comes with the model.
        lazy: leave large weights on disk until their values are needed (:mod:`claq_export.deferred`).

    Returns:
        ``(model, tokenizer or None, task name)``; the model's ``source`` holds path and digest.

    Raises:
        ModelError: the folder, a file, the architecture or the task is missing, damaged or unknown; a weight that the
            task needs is not in the files or does not fit; a weight is NaN or infinite.
    """
    folder = _folder(path_or_id, trust_remote_code)
    _refuse_links_out(folder)
    settings = read_json(folder / "config.json")
    if quantized := settings.get("quantization_config"):
        method = (
            quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else "an unknown method"
        )
        raise ModelError(f"{path_or_id} is already quantized ({method}); claq needs the floating-point model")
    if (folder / _GENERATION).is_file():
        read_json(folder / _GENERATION)  # wanted only when the artifact is written, hours later
    files = weight_files(folder)
    tensors = sum(len(safetensors_names(path)) for path in files)
    check_sizes(settings, tensors, str(folder / "config.json"), ModelError)
    config = _config(folder, settings, trust_remote_code)
    chosen = canonical_task(task) if task is not None else _inferred(folder, config)
    if chosen.name == "image-feature-extraction":
        config = getattr(config, "vision_config", config)  # of a model of text and images, the half that reads images
    if lazy:
        model = _load_lazily(folder, files, config, chosen, dtype, trust_remote_code)
    else:
        model = _load(folder, files, config, chosen, dtype, trust_remote_code)
        check_weights(model, str(path_or_id))
    identity = digest([folder / "config.json", *files])
    source = Source(path=str(path_or_id), sha256=identity, files=tuple(files), folder=folder)
    return TaskModel(model, chosen.name, source), _tokenizer(folder, trust_remote_code), chosen.name


def capture_pretrained(
    path_or_id: str | Path,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> CapturedModel:
    """Load and capture a model with dynamic batch and sequence; arguments and errors as :func:`load_pretrained`'s.

    Raises:
        CaptureError: the model cannot be turned into a graph.
    """
    model, tokenizer, _ = load_pretrained(path_or_id, task, dtype, trust_remote_code)
    captured = capture_module(model, dynamic_shapes=model.dynamic_axes)
    captured.tokenizer = tokenizer
    return captured


def _folder(path_or_id: str | Path, trust_remote_code: bool) -> Path:
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder / 'config.json'} is missing; a Hugging Face model folder is expected")
        return folder
    text = str(path_or_id)
    if folder.exists():
        raise ModelError(f"{text} is a file; expected a folder with config.json and safetensors, or a hub id")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        raise ModelError(f"model folder {text} does not exist")
    from huggingface_hub import snapshot_download

    patterns = [*_FILES_READ, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types (network, login, unknown id); each is the reason
        let_interruptions_through(error)
        raise ModelError(
            f"{text} is no folder here, and the Hugging Face hub does not give it: {first_line(error)}"
        ) from error


def _config(folder: Path, settings: dict[str, Any], trust_remote_code: bool) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = settings.get("model_type")
    remote = trust_remote_code and "auto_map" in settings
    if not isinstance(kind, str) and not remote:
        raise ModelError(f"{folder / 'config.json'} has no model_type, so the architecture is unknown")
    if kind not in CONFIG_MAPPING_NAMES and not remote:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING_NAMES, 3)
        code = "; it brings its own code: --trust-remote-code runs it" if "auto_map" in settings else ""
        raise ModelError(
            f"unknown architecture {kind!r} in {folder / 'config.json'}: transformers {_version()} knows "
            f"{len(CONFIG_MAPPING_NAMES)} (bert, gpt2, llama, …){', near: ' + ', '.join(near) if near else ''}{code}"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configuration classes validate in their own ways; each is the reason
        let_interruptions_through(error)
        raise ModelError(f"{folder / 'config.json'} is not valid: {first_line(error)}") from error


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _inferred(folder: Path, config: Any) -> Task:
    if (folder / "modules.json").is_file():  # sentence-transformers: pooled hidden states, whatever the checkpoint was
        return canonical_task("feature-extraction")
    task = seq2seq_task(config) or infer_task(config.architectures)
    if task.name == "feature-extraction" and hasattr(config, "vision_config"):
        raise ModelError(
            f"{config.architectures[0]} reads text and images; --task image-feature-extraction exports the half that reads "
            "images"
        )
    if task.name == "feature-extraction" and hasattr(config, "image_size") and not hasattr(config, "vocab_size"):
        return canonical_task("image-feature-extraction")
    return task


def auto_class(config: Any, task: Task) -> str:
    """Name of the transformers class that loads a configuration's model for a task."""
    saved = (config.architectures or [""])[0]
    encoder_only = getattr(config, "is_encoder_decoder", False) or saved.endswith("EncoderModel")
    return "AutoModelForTextEncoding" if task.name == "feature-extraction" and encoder_only else task.auto_class


def _builder(config: Any, task: Task, dtype: torch.dtype, trust_remote_code: bool) -> Callable[[], torch.nn.Module]:
    """Makes the task's model from its configuration, without its weights."""
    import transformers

    def build() -> torch.nn.Module:
        auto = getattr(transformers, auto_class(config, task))
        model: torch.nn.Module = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return model

    return build


def _load_lazily(
    folder: Path, files: list[Path], config: Any, task: Task, dtype: torch.dtype, trust_remote_code: bool
) -> torch.nn.Module:
    unused = _UNUSED.get(task.name)
    build = _builder(config, task, dtype, trust_remote_code)
    try:
        with quietly():
            check_fit(build, files, str(folder / "config.json"))
            return build_lazily(build, files, dtype, lambda name: unused is not None and bool(unused.search(name)))
    except ModelError:
        raise
    except Exception as error:  # transformers raises many types; each is the reason
        raise _cannot_load(folder, config, task, error) from error


def _load(
    folder: Path, files: list[Path], config: Any, task: Task, dtype: torch.dtype, trust_remote_code: bool
) -> torch.nn.Module:
    import transformers

    try:
        with quietly():
            check_fit(_builder(config, task, dtype, trust_remote_code), files, str(folder / "config.json"))
            model, info = getattr(transformers, auto_class(config, task)).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                use_safetensors=True,
            )
    except ModelError:
        raise
    except Exception as error:  # transformers raises many types; each is the reason
        raise _cannot_load(folder, config, task, error) from error
    check_complete(model, info, folder, task)
    with torch.no_grad():
        for key in sorted(info["missing_keys"]):
            # transformers made it of random numbers; the same files must give the same bytes.
            model.get_parameter(key).zero_()
    return model.eval()


def check_complete(model: Any, info: Mapping[str, Any], source: str | Path, task: Task) -> None:
    """Refuse a model some of whose weights transformers made of random numbers.

    Args:
        model: as ``from_pretrained`` returned it.
        info: what it returned beside the model (``output_loading_info=True``).
        source: folder or hub id, for the message.
        task: what the model is for; weights that do not reach its output may be missing.

    Raises:
        ModelError: a weight that the task needs is not in the files, or has another shape there.
    """
    unused = _UNUSED.get(task.name)
    missing = [key for key in sorted(info["missing_keys"]) if unused is None or not unused.search(key)]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        saved = (model.config.architectures or ["an unknown architecture"])[0]
        raise ModelError(
            f"{source} lacks {len(missing)} weights that {type(model).__name__} needs for {task.name}: "
            f"{', '.join(missing[:4])}{more}; the checkpoint was saved from {saved}"
        )
    mismatched = sorted(str(entry[0]) for entry in info.get("mismatched_keys", ()))
    if mismatched:
        raise ModelError(
            f"{source} has weights of another shape than {type(model).__name__}'s: {', '.join(mismatched[:4])}"
        )


def _cannot_load(folder: Path, config: Any, task: Task, error: Exception) -> ModelError:
    let_interruptions_through(error)
    if "Unrecognized configuration class" in str(error):
        return ModelError(f"transformers has no {task.name} model for architecture {config.model_type!r}")
    return ModelError(f"{folder} cannot be loaded for {task.name}: {first_line(error)}")


def let_interruptions_through(error: BaseException) -> None:
    """Raise KeyboardInterrupt if one led to an error: transformers tells of what stops an import as of a missing module."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bar and no warnings from transformers: what they would say is checked and raised here."""
    from transformers.utils import logging as transformers_logging

    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _refuse_links_out(folder: Path) -> None:
    """Other libraries read the tokenizer's files, and all of them are copied beside the artifact."""
    for pattern in _FILES_READ:
        for path in folder.glob(pattern):
            if path.is_symlink():
                contained(folder, path.name, ModelError)


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return load_tokenizer(folder, trust_remote_code)
    except ModelError as error:  # a model without a working tokenizer can still be quantized from token ids
        _log.error("%s", error)
        return None


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        ModelError: there is none, it cannot be loaded, or it knows no words.
    """
    from transformers import AutoTokenizer

    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types; each is the reason
        let_interruptions_through(error)
        raise ModelError(f"the tokenizer in {source} cannot be loaded: {first_line(error)}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        # transformers 5 makes one of special tokens alone where a folder holds no more than a configuration.
        raise ModelError(f"the tokenizer in {source} cannot be loaded: there are no files with its vocabulary")
    return tokenizer
