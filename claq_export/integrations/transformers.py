"""Lets transformers load and save claq models: importing this module registers the quantization method ``claq``.

    import claq_export.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("claq-folder")

The folder is one that ``claq-export`` wrote from a Hugging Face model, or that ``model.save_pretrained`` of such a model
wrote. Linear modules are :class:`~claq_export.modules.ClaqLinear` and embeddings :class:`~claq_export.modules.ClaqEmbedding`
before any weight is read, so that no dense weight of a quantized layer is ever in memory. A head that is tied to the
embedding shares its tensors. Works with transformers 4.57 and 5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigError, FormatError, ModelError
from ..experts import split_experts
from ..format.checkpoint import VERSION, header_text, layer_entry
from ..format.layer import TENSOR_NAMES
from ..format.rows import join_rows, share_columns, slice_rows
from ..modules import ClaqEmbedding, ClaqLinear, linear_kind
from ..passes.fuse_siblings import stacked_name
from .weights import HEADER_KEY, LayerFiles

METHOD = "claq"
"""``quant_method`` in ``config.json``."""

_MAJOR = int(transformers.__version__.split(".")[0])


@register_quantization_config(METHOD)
class ClaqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a claq model; sizes and widths of layers stand in the header of the weights.

    Args:
        version: of the format.
        true_bits: bits a weight over the quantized layers, all counted; for information.

    Raises:
        ConfigError: the format is of another version.
    """

    def __init__(self, version: int = VERSION, true_bits: float | None = None, **_: Any) -> None:
        if version != VERSION:
            raise ConfigError(f"the model is in format version {version!r}; this package reads version {VERSION}")
        self.quant_method: Any = METHOD
        self.version = version
        self.true_bits = true_bits


@register_quantizer(METHOD)
class ClaqHfQuantizer(HfQuantizer):
    """Puts quantized modules into a model that ``from_pretrained`` is making, and their tensors into its files."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._layers: LayerFiles | None = None
        self._places: dict[str, list[_Place]] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        self._layers = LayerFiles(_checkpoint_files(model.config, checkpoint_files))
        split_experts(model, _targets(model, self._layers))
        self._places = _places(model, self._layers)
        for name, places in self._places.items():
            level = self._layers.entries[name]["accuracy_level"]
            for place in places:
                place.hollow(model, self._layers.columns(name), level)
        _untie_quantized_heads(model)
        known = "|".join(re.escape(name) for name in self._places)
        pattern = rf"^({known})\.({'|'.join(TENSOR_NAMES)})$"
        present = model._keys_to_ignore_on_load_unexpected or ()
        # A set since transformers 5, a list before.
        model._keys_to_ignore_on_load_unexpected = (set if _MAJOR >= 5 else list)((*present, pattern))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        assert self._layers is not None
        for name, places in self._places.items():
            layer = self._layers.read(name)
            for place in places:
                part = layer if place.stop - place.start == layer.out_features else None
                place.module.fill(slice_rows(layer, place.start, place.stop) if part is None else part)
        # save_pretrained names its file otherwise.
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        return model

    def get_state_dict_and_metadata(self, model: Any, *_: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The model's tensors as ``claq.safetensors`` holds them, slices of stacked layers stacked again."""
        # The names written are those of the modules: transformers 5 must not turn them into a checkpoint's old ones.
        model._weight_conversions = []
        state = model.state_dict()
        entries: dict[str, Any] = {}
        tied = _tied(model)
        for parts in _stacks(model, [name for others in tied.values() for name in others]):
            layer = join_rows([module.layer for _, module in parts])
            names = [name for name, _ in parts]
            others = tied.get(names[0], [])
            for name in (*names, *others):
                for tensor in TENSOR_NAMES:
                    del state[f"{name}.{tensor}"]
            title = names[0] if len(names) == 1 else stacked_name(names)
            rows = [(name, module.out_features) for name, module in parts]
            entries[title] = layer_entry(layer, rows, getattr(parts[0][1], "accuracy_level", 0), False, others)
            state.update({f"{title}.{name}": tensor for name, tensor in layer.tensors().items()})
        description = {"format": METHOD, "version": VERSION, "layers": entries, "aliases": {}}
        return state, {HEADER_KEY: header_text(description)}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(_quantized(model)):
            kind = dtype if dtype is not None else model.dtype
            if isinstance(module, ClaqEmbedding):
                table = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
                table.weight = nn.Parameter(module.layer.dequantize(kind), requires_grad=False)
                model.set_submodule(name, table)
                continue
            linear = nn.Linear(module.in_features, module.out_features, bool(module.bias.numel()), device="meta")
            linear.weight = nn.Parameter(module.layer.dequantize(kind), requires_grad=False)
            if module.bias.numel():
                linear.bias = nn.Parameter(module.bias.to(kind), requires_grad=False)
            model.set_submodule(name, linear)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """There is no gradient."""
        return False


def mark_quantized(model: Any, true_bits: float | None = None) -> Any:
    """Let ``save_pretrained`` of a transformers model that :func:`claq_export.quantize` changed write a claq folder.

    Args:
        model: a ``PreTrainedModel`` with :class:`~claq_export.modules.ClaqLinear` modules.
        true_bits: noted in ``config.json``.

    Returns:
        ``model``.

    Raises:
        ModelError: the model has no quantized module.
    """
    if next(_quantized(model), None) is None:
        raise ModelError(f"{type(model).__name__} has no quantized linear; run claq_export.quantize first")
    config = ClaqConfig(true_bits=true_bits)
    model.hf_quantizer = ClaqHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = METHOD
    _untie_quantized_heads(model)
    return model


class _Place:
    """Rows of a layer and the module of a model that they belong to."""

    def __init__(self, target: str, start: int, stop: int, owner: nn.Module) -> None:
        self.target, self.start, self.stop = target, start, stop
        self.owner = owner
        self.module: ClaqLinear | ClaqEmbedding

    def hollow(self, model: nn.Module, columns: tuple[int, int, int], accuracy_level: int) -> None:
        """Put a module without tensors into the model."""
        weight = self.owner.weight
        assert isinstance(weight, torch.Tensor)
        kind = linear_kind(self.owner)
        shape = tuple(weight.shape)[::-1] if kind == "Conv1D" else tuple(weight.shape)
        rows, in_features = shape
        if rows != self.stop - self.start:
            raise ModelError(
                f"{self.target!r} has {rows} output features in the model, {self.stop - self.start} in the files"
            )
        if kind == "Embedding":
            self.module = ClaqEmbedding.hollow(in_features, rows, columns, weight.dtype)
        else:
            bias = self.owner.bias if isinstance(self.owner.bias, torch.Tensor) else None
            self.module = ClaqLinear.hollow(in_features, rows, columns, bias, accuracy_level)
        model.set_submodule(self.target, self.module)


def _places(model: Any, layers: LayerFiles) -> dict[str, list[_Place]]:
    """Layer -> where its rows go. A layer of which the model has no module (a head, for a bare model) is left out.

    Raises:
        ModelError: a module is not a plain linear, or no layer fits the model at all.
    """
    prefix = f"{model.base_model_prefix}."
    found: dict[str, list[_Place]] = {}
    for name in layers.entries:
        start = 0
        parts = [(part, rows, True) for part, rows in layers.parts(name)]
        parts += [(other, parts[0][1], False) for other in layers.tied(name)]
        for part, rows, follows in parts:
            # A base model's names lack the prefix that a model with a head has, and the other way round.
            for target in (part, part.removeprefix(prefix), prefix + part):
                owner = _submodule(model, target)
                if owner is not None:
                    break
            if not follows:
                start = 0  # all rows once more, under another name
            stop = start + rows
            if owner is not None:
                if linear_kind(owner) is None:
                    raise ModelError(
                        f"{target!r} is a {type(owner).__name__} in transformers {transformers.__version__}, not a plain "
                        "linear or embedding module; load the folder with claq_export.load instead"
                    )
                found.setdefault(name, []).append(_Place(target, start, stop, owner))
            start = stop
    if not found:
        some = ", ".join(list(layers.entries)[:3])
        raise ModelError(f"{type(model).__name__} has none of the quantized layers ({some}, …)")
    return found


def _targets(model: Any, layers: LayerFiles) -> list[str]:
    """The names that quantized linears may have in the model."""
    prefix = f"{model.base_model_prefix}."
    parts = [part for name in layers.entries for part, _ in layers.parts(name)]
    return [target for part in parts for target in (part, part.removeprefix(prefix), prefix + part)]


def _submodule(model: nn.Module, target: str) -> nn.Module | None:
    try:
        return model.get_submodule(target)
    except AttributeError:
        return None


def _untie_quantized_heads(model: Any) -> None:
    """A quantized output head has its own codes: transformers must not tie it to the embedding again."""
    quantized = {name for name, _ in _quantized(model)}
    head = model.get_output_embeddings()
    if isinstance(head, ClaqLinear):
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        for name in [name for name in tied if name.removesuffix(".weight") in quantized]:
            del tied[name]


def _quantized(model: nn.Module) -> Iterator[tuple[str, ClaqLinear | ClaqEmbedding]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, (ClaqLinear, ClaqEmbedding)))


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """First module of each shared weight, a linear if there is one as in exports -> the other ones."""
    groups: dict[int, list[tuple[str, ClaqLinear | ClaqEmbedding]]] = {}
    for name, module in _quantized(model):
        groups.setdefault(module.codes.data_ptr(), []).append((name, module))
    found = {}
    for members in groups.values():
        names = [name for name, module in sorted(members, key=lambda member: isinstance(member[1], ClaqEmbedding))]
        if len(names) > 1:
            found[names[0]] = names[1:]
    return found


def _stacks(model: nn.Module, without: Sequence[str]) -> list[list[tuple[str, ClaqLinear | ClaqEmbedding]]]:
    """The quantized modules in order; neighbours that share their columns, as slices of one layer do, together."""
    stacks: list[list[tuple[str, ClaqLinear | ClaqEmbedding]]] = []
    for name, module in _quantized(model):
        if name in without:
            continue
        last = stacks[-1][-1][1] if stacks else None
        if (
            isinstance(last, ClaqLinear)
            and isinstance(module, ClaqLinear)
            and last.accuracy_level == module.accuracy_level
            and share_columns(last.layer, module.layer)
        ):
            stacks[-1].append((name, module))
        else:
            stacks.append([(name, module)])
    return stacks


def _checkpoint_files(config: Any, given: Sequence[str] | None) -> list[Path]:
    """The safetensors files that ``from_pretrained`` reads; transformers before 5 does not tell a quantizer."""
    if given:
        return [Path(path) for path in given]
    explicit = getattr(config, "transformers_weights", None)
    for name in (explicit,) if explicit else (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        path = _resolved(config, name)
        if path is not None and name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            return [shard for shard in (_resolved(config, name) for name in shards) if shard is not None]
        if path is not None:
            return [path]
    raise FormatError(f"{config.name_or_path} has no safetensors weights that a claq model could be read from")


def _resolved(config: Any, name: str) -> Path | None:
    path = cached_file(
        config.name_or_path,
        name,
        revision=getattr(config, "_commit_hash", None),
        _raise_exceptions_for_missing_entries=False,
    )
    return Path(path) if path is not None else None
