"""Lets transformers load and save claq models: importing this module registers the quantization method ``claq``.

    import claq_export.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("claq-folder")

The folder is one that ``claq-export`` wrote from a Hugging Face model, or that ``model.save_pretrained`` of such a model
wrote. Linear modules are :class:`~claq_export.modules.ClaqLinear` and embeddings :class:`~claq_export.modules.ClaqEmbedding`
before any weight is read, so that no dense weight of a quantized layer is ever in memory. A head that is tied to the
embedding shares its tensors. Works with transformers 4.57 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigError, FormatError, ModelError
from ..experts import join_experts, split_experts
from ..format.checkpoint import METHOD, VERSION, header_text, layer_entry
from ..format.layer import TENSOR_NAMES
from ..format.rows import columns_key, join_rows, slice_rows
from ..modules import ClaqEmbedding, ClaqLinear, dense_embedding, keep_a_parameter
from ..passes.fuse_siblings import stacked_name
from .places import Place, find_places, possible_targets, spellings
from .resolved import noted_files, watch
from .ties import (
    SharedTensors,
    UntiedWhileLoading,
    groups_by_codes,
    quantized_modules,
    shared_tensors,
    tie_again,
    tie_bare,
    untie,
)
from .weights import HEADER_KEY, LayerFiles

_MAJOR = int(transformers.__version__.split(".")[0])

if _MAJOR < 5:
    watch()


@register_quantization_config(METHOD)
class ClaqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a claq model; sizes and widths of layers stand in the header of the weights.

    Args:
        version: of the format.
        true_bits: bits a weight over the quantized layers, all counted; for information.
        untied_head: the head was tied to the embedding before it was quantized, and ``tie_word_embeddings`` denies it.

    Raises:
        ConfigError: the format is of another version.
    """

    def __init__(
        self, version: int = VERSION, true_bits: float | None = None, untied_head: bool = False, **_: Any
    ) -> None:
        if version != VERSION:
            raise ConfigError(f"the model is in format version {version!r}; this package reads version {VERSION}")
        self.quant_method: Any = METHOD
        self.version = version
        self.true_bits = true_bits
        if untied_head:
            self.untied_head = True


@register_quantizer(METHOD)
class ClaqHfQuantizer(HfQuantizer):
    """Puts quantized modules into a model that ``from_pretrained`` is making, and their tensors into its files."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # While a model is loaded.
        self._layers: LayerFiles | None = None
        self._places: dict[str, list[Place]] = {}
        self._shared: SharedTensors | None = None
        self._untied: UntiedWhileLoading | None = None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        self._layers = LayerFiles(_checkpoint_files(model.config, checkpoint_files))
        split_experts(model, possible_targets(model, self._layers))
        self._places = find_places(model, self._layers)
        all_places = [place for places in self._places.values() for place in places]
        self._shared = SharedTensors(model, self._layers, all_places)
        for name, places in self._places.items():
            level = self._layers.entries[name]["accuracy_level"]
            for place in places:
                place.hollow(model, self._layers.columns(name), level)
                if _MAJOR < 5 and self._shared.has_tied_bias(place):
                    # Models of transformers 4 tie it by assigning one parameter to the other, in either direction.
                    place.module.bias = place.owner.bias
        untie(model)
        self._untied = UntiedWhileLoading(model)
        # The names reported lack the base model's prefix where only the files or only the model has it.
        known = "|".join(dict.fromkeys(re.escape(name) for layer in self._places for name in spellings(model, layer)))
        _ignore(model, "unexpected", rf"^({known})\.({'|'.join(TENSOR_NAMES)})$")
        _ignore(model, "missing", *(f"^{re.escape(name)}$" for name in self._shared.given))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        assert self._layers is not None
        for name, places in self._places.items():
            layer = self._layers.read(name)
            for place in places:
                part = layer if place.stop - place.start == layer.out_features else None
                place.module.fill(slice_rows(layer, place.start, place.stop) if part is None else part)
        assert self._shared is not None
        assert self._untied is not None
        self._shared.settle(model)
        self._untied.end()
        _note_ties(model, self.quantization_config)
        keep_a_parameter(model)
        # Kernels have no gradient, and would be asked for one where a parameter before them wants it.
        model.requires_grad_(False)
        # save_pretrained names its file otherwise.
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        # Dense modules and the files' names are of no use any more.
        self._layers = self._shared = self._untied = None
        self._places = {}
        return model

    def get_state_dict_and_metadata(self, model: Any, *_: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The model's tensors as ``claq.safetensors`` holds them, slices of stacked layers stacked again."""
        # The names written are those of the modules: transformers 5 must not turn them into a checkpoint's old ones.
        model._weight_conversions = []
        state = model.state_dict()
        aliases = shared_tensors(model, state)
        for name in aliases:
            del state[name]
        entries: dict[str, Any] = {}
        stored: dict[int, str] = {}
        tied = _tied(model)
        for parts in _stacks(model, {name for others in tied.values() for name in others}):
            layer = join_rows([module.layer for _, module in parts])
            names = [name for name, _ in parts]
            others = tied.get(names[0], [])
            for name in (*names, *others):
                for tensor in TENSOR_NAMES:
                    del state[f"{name}.{tensor}"]
            title = names[0] if len(names) == 1 else _free(stacked_name(names), entries)
            first = parts[0][1]
            rows = [(name, module.out_features) for name, module in parts]
            level, transposed = getattr(first, "accuracy_level", 0), getattr(first, "transposed", False)
            entries[title] = layer_entry(layer, rows, level, transposed, others)
            state.update(_unshared({f"{title}.{name}": tensor for name, tensor in layer.tensors().items()}, stored))
        description = {"format": METHOD, "version": VERSION, "layers": entries, "aliases": aliases}
        return state, {HEADER_KEY: header_text(description)}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Transformers 5 writes the dtype's name into the configuration when it saves.
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for members in groups_by_codes(model):
            weight = nn.Parameter(members[0][1].layer.dequantize(kind), requires_grad=False)
            for name, module in members:
                model.set_submodule(name, _dense(module, weight))
        join_experts(model)
        tie_again(model)
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
    if not _quantized(model):
        raise ModelError(f"{type(model).__name__} has no quantized linear; run claq_export.quantize first")
    config = ClaqConfig(true_bits=true_bits)
    model.hf_quantizer = ClaqHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = METHOD
    _note_ties(model, config)
    return model


def _note_ties(model: Any, config: Any) -> None:
    """Keep transformers from tying a quantized head, and note it for those who load the model without that head."""
    if getattr(config, "untied_head", False) and tie_bare(model):
        del config.untied_head
    if untie(model):
        config.untied_head = True


def _ignore(model: Any, what: str, *patterns: str) -> None:
    """Keep names that match a pattern out of what transformers reports as ``missing`` or ``unexpected`` in the files."""
    attribute = f"_keys_to_ignore_on_load_{what}"
    # A set since transformers 5, a list before.
    setattr(model, attribute, (set if _MAJOR >= 5 else list)((*(getattr(model, attribute) or ()), *patterns)))


def _free(name: str, taken: Collection[str]) -> str:
    """``name``, with underscores behind it until nothing else has it."""
    while name in taken:
        name += "_"
    return name


def _dense(module: ClaqLinear | ClaqEmbedding, weight: nn.Parameter) -> nn.Module:
    """A module of the kind in whose place ``module`` stands, on the dense ``weight [out_features, in_features]``."""
    if isinstance(module, ClaqEmbedding):
        return dense_embedding(module, weight)
    bias = nn.Parameter(module.bias.to(weight.dtype, copy=True), requires_grad=False) if module.has_bias else None
    if module.transposed:
        turned = Conv1D(module.out_features, module.in_features)
        turned.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        turned.bias = bias if bias is not None else nn.Parameter(weight.new_zeros(module.out_features), False)
        return turned
    linear = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def _quantized(model: nn.Module) -> dict[str, ClaqLinear | ClaqEmbedding]:
    return dict(quantized_modules(model))


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """First module of each shared weight -> the other ones."""
    groups = ([name for name, _ in members] for members in groups_by_codes(model))
    return {names[0]: names[1:] for names in groups if len(names) > 1}


def _stacks(model: nn.Module, without: Collection[str]) -> list[list[tuple[str, ClaqLinear | ClaqEmbedding]]]:
    """The quantized modules in order; those that share their columns, as slices of one layer do, together.

    They need not be neighbours: a layer may stand for linears of several blocks that read the same tensor.
    """
    stacks: dict[Any, list[tuple[str, ClaqLinear | ClaqEmbedding]]] = {}
    for name, module in _quantized(model).items():
        if name in without:
            continue
        key: Any = name
        if isinstance(module, ClaqLinear):
            key = (module.accuracy_level, module.transposed, columns_key(module.layer))
        stacks.setdefault(key, []).append((name, module))
    return list(stacks.values())


def _unshared(tensors: dict[str, torch.Tensor], stored: dict[int, str]) -> dict[str, torch.Tensor]:
    """``tensors``, those copied whose memory is in ``stored`` already; what is stored is noted there."""
    result = {}
    for name, tensor in tensors.items():
        shared = tensor.numel() and stored.setdefault(tensor.untyped_storage().data_ptr(), name) != name
        result[name] = tensor.clone() if shared else tensor
    return result


def _checkpoint_files(config: Any, given: Sequence[str] | None) -> list[Path]:
    """The files that ``from_pretrained`` reads; transformers before 5 does not tell a quantizer."""
    files = given or noted_files(str(config.name_or_path))
    if not files:
        raise FormatError(f"{config.name_or_path} has no safetensors weights that a claq model could be read from")
    return [Path(path) for path in files]
