"""What a task's model tells of its inputs: how many positions tokens have, and of what size images are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from claq_export.capture import TaskModel
from claq_export.capture.captured import text_inputs
from claq_export.errors import ModelError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
}


@pytest.mark.parametrize(
    ("family", "positions"), [("Bert", 20), ("Roberta", 18), ("MPNet", 18), ("Camembert", 18), ("Data2VecText", 18)]
)
def test_the_longest_sequence_runs_and_no_longer_one(family: str, positions: int) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = TaskModel(getattr(transformers, f"{family}Model")(config), "feature-extraction")
    assert model.max_sequence == positions
    longest, longer = (
        text_inputs(model.input_names, torch.full((1, length), 5)) for length in (positions, positions + 1)
    )
    with torch.no_grad():
        model(*longest.values())
        with pytest.raises((IndexError, RuntimeError)):
            model(*longer.values())


IMAGE = {**SIZES, "image_size": 24, "patch_size": 8, "num_channels": 1}


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_the_size_of_images_is_that_of_the_image_half(family: str) -> None:
    config: Any = getattr(transformers, f"{family}Config")(text_config=SIZES, vision_config=IMAGE)
    model = TaskModel(getattr(transformers, f"{family}ForImageClassification")(config), "image-classification")
    inputs = model.example_inputs()
    assert inputs["pixel_values"].shape == (2, 1, 24, 24)
    with torch.no_grad():
        assert model(*inputs.values()).shape == (2, config.num_labels)


def test_images_of_unknown_size_are_named() -> None:
    config = transformers.BertConfig(**SIZES)
    model = TaskModel(transformers.BertModel(config), "image-classification")
    with pytest.raises(ModelError, match="the configuration of 'bert' gives no image_size"):
        model.example_inputs()
