"""Graphs with a key/value cache of tiny language models with random weights."""

from __future__ import annotations

import torch

from claq_export.capture import CapturedModel
from claq_export.capture.decoder import capture_decoder
from claq_export.capture.tasks import TaskModel

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
"""Settings of models with gated layers and fewer heads of keys than of queries."""


def captured_decoder(config: object) -> CapturedModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.uniform_(-0.3, 0.3)
    return capture_decoder(TaskModel(model, "text-generation"))
