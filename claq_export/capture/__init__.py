"""Capture: a PyTorch model, given in Python or as a Hugging Face folder, becomes a graph of ATen operators."""

from __future__ import annotations

from .captured import CACHED, ENCODER, PAST_INPUTS, CapturedModel, Source, graph_digest, text_inputs
from .decoder import CACHED_TASK, capture_decoder
from .module import capture_module
from .pretrained import capture_pretrained, load_pretrained
from .reread import let_go_of_weights, restore_weights, weights_in_memory
from .seq2seq import capture_parts
from .tasks import TASKS, Task, TaskModel

__all__ = [
    "CACHED",
    "CACHED_TASK",
    "ENCODER",
    "PAST_INPUTS",
    "TASKS",
    "CapturedModel",
    "Source",
    "Task",
    "TaskModel",
    "capture_decoder",
    "capture_module",
    "capture_parts",
    "capture_pretrained",
    "graph_digest",
    "let_go_of_weights",
    "load_pretrained",
    "restore_weights",
    "text_inputs",
    "weights_in_memory",
]
