"""The common ground of the quality comparison: one model, one calibration text, one evaluation text, one way to count
bits."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from claq_export.evaluation import LanguageQuality, TorchModel, language_quality, token_windows

from .common import Group, Inputs, Quantized
from .llama import groups_of, squared_gradients, walk

Quantizer = Callable[[Group, torch.Tensor, Inputs], Quantized]


class FinalStates:
    """The original model, remembered by its last hidden states, so that its logits cost one matrix product a window."""

    def __init__(self, model: torch.nn.Module, windows: torch.Tensor, work: Path) -> None:
        self.head = model.lm_head
        name = hashlib.sha256(windows.numpy().tobytes() + model.lm_head.weight.data.numpy().tobytes()).hexdigest()[:16]
        path = work / f"states-{name}.safetensors"
        if not path.is_file():
            with torch.inference_mode():
                states = [model.model(input_ids=w[None], use_cache=False)[0] for w in windows]
            save_file({"states": torch.stack(states).clone()}, path)
        self.states = dict(zip(map(self._key, windows), load_file(path)["states"], strict=True))

    @staticmethod
    def _key(tokens: torch.Tensor) -> bytes:
        return tokens.reshape(-1).numpy().tobytes()

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.head(self.states[self._key(tokens)])


class Bench:
    """A Llama model that is quantized again and again, always from its original weights.

    Args:
        folder: where the model comes from.
        model, tokenizer: the original.
        text, calibration: running texts.
        context: tokens a window of both.
        windows, calibration_windows: how many of each.
        work: folder for what is expensive and shared (statistics of the unquantized model, gradients).
    """

    def __init__(
        self,
        folder: str,
        model: torch.nn.Module,
        tokenizer: object,
        text: str,
        calibration: str,
        context: int,
        windows: int,
        calibration_windows: int,
        work: Path,
    ) -> None:
        self.folder = folder
        self.model = model
        self.windows = token_windows(text, tokenizer, context, windows)
        every = token_windows(calibration, tokenizer, context)
        chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:calibration_windows]
        self.calibration = every[chosen.sort().values]
        self._every = every
        self.work = work
        self.groups = [g for n, b in enumerate(model.model.layers) for g in groups_of(b, n).values()]
        self.original = {group.name: group.stacked().clone() for group in self.groups}
        self.weights = sum(weight.numel() for weight in self.original.values())
        self.reference = FinalStates(model, self.windows, work)

    def more_text(self, windows: int) -> torch.Tensor:
        """Random windows of the calibration text, more than calibrate; those that calibrate are among them."""
        return self._every[torch.randperm(len(self._every), generator=torch.Generator().manual_seed(0))[:windows]]

    def restore(self) -> None:
        for group in self.groups:
            group.assign(self.original[group.name])

    @cached_property
    def statistics(self) -> dict[str, Inputs]:
        """What each group reads in the unquantized model."""
        path = self.work / f"statistics-{len(self.calibration)}.safetensors"
        if not path.is_file():
            self.restore()
            found: dict[str, torch.Tensor] = {}
            for group, inputs in walk(self.model, self.calibration):
                seen = Inputs.of(inputs)
                found[f"{group.name}.hessian"], found[f"{group.name}.magnitude"] = seen.hessian, seen.magnitude
            save_file(found, path)
        stored, tokens = load_file(path), self.calibration.numel()
        return {g.name: Inputs(stored[f"{g.name}.hessian"], stored[f"{g.name}.magnitude"], tokens) for g in self.groups}

    @cached_property
    def fisher(self) -> dict[str, torch.Tensor]:
        """Summed squared gradients of each group's stacked weight."""
        path = self.work / f"fisher-{len(self.calibration)}.safetensors"
        if not path.is_file():
            self.restore()
            save_file(squared_gradients(self.model, self.calibration), path)
        stored, joined = load_file(path), {}
        for group in self.groups:
            number, kind = group.name.split(".")
            part = "self_attn" if kind in ("qkv", "o") else "mlp"
            joined[group.name] = torch.cat([stored[f"{number}.{part}.{name}"] for name in group.linears])
        return joined

    def at_once(self, quantize: Callable[[Group, torch.Tensor], Quantized]) -> float:
        """Quantize every group from its original weight alone; returns all bits."""
        self.restore()
        bits = 0.0
        for group in self.groups:
            result = quantize(group, self.original[group.name])
            group.assign(result.weight)
            bits += result.bits
        return bits

    def in_sequence(self, quantize: Callable[..., Quantized], beside_the_original: bool = False) -> float:
        """Quantize group after group, each from the inputs that the quantized groups before it give; returns all bits.

        Args:
            quantize: called with the group, its original weight and its inputs.
            beside_the_original: it also wants what the group reads in the unquantized model, as its last argument.
        """
        self.restore()
        models = [self.model, copy.deepcopy(self.model)] if beside_the_original else [self.model]
        bits = 0.0
        for stops in zip(*(walk(model, self.calibration) for model in models), strict=True):
            group = stops[0][0]
            result = quantize(group, self.original[group.name], *(inputs for _, inputs in stops))
            group.assign(result.weight)
            bits += result.bits
        return bits

    def evaluate(self) -> LanguageQuality:
        """Quality of the model as it is now."""
        return language_quality(TorchModel(self.model), self.windows, self.reference)
