"""What a task's model tells of its inputs: how many positions tokens have, and of what size images are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from claq_export.capture import TaskModel, capture_module
from claq_export.capture.captured import Source, text_inputs
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


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"height": 16, "width": 24}}, (16, 24)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 24}}, (24, 24)),
        ({"size": {"shortest_edge": 40}, "crop_size": 24, "do_center_crop": False}, (40, 40)),
        ({"size": 32}, (32, 32)),
    ],
)
def test_the_size_of_images_is_that_of_the_image_processor(
    settings: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    source = Source("here", "0", folder=tmp_path)
    assert TaskModel(model, "image-classification", source).example_inputs()["pixel_values"].shape == (2, 3, *size)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json must hold a JSON object, found list"):
        TaskModel(model, "image-classification", source).example_inputs()


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 looks at the tokens while it is captured"
)
def test_rows_end_as_classifiers_with_a_decoder_need_it() -> None:
    """BART classifies by the state at the end token and refuses rows without one, or with several."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=6,  # few tokens, of which one ends a row
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
    )
    model = TaskModel(transformers.BartForSequenceClassification(config).eval(), "text-classification")
    captured = capture_module(model, dynamic_shapes=model.dynamic_axes)
    inputs = captured.inputs_from_tokens([[0, 4, 5, 2], [0, 5, 2]])
    with torch.no_grad():
        torch.testing.assert_close(captured.run(inputs)[0], model(*inputs.values()), rtol=1e-4, atol=1e-5)


def test_a_vocabulary_of_unknown_size_is_named() -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = TaskModel(transformers.CanineModel(transformers.CanineConfig(**tiny)), "feature-extraction")
    with pytest.raises(ModelError, match="the configuration of 'canine' gives no vocab_size"):
        model.example_inputs()


def test_images_of_unknown_size_are_named() -> None:
    config = transformers.BertConfig(**SIZES)
    model = TaskModel(transformers.BertModel(config), "image-classification")
    with pytest.raises(ModelError, match="the configuration of 'bert' gives no image_size"):
        model.example_inputs()
