"""Image models from folder to file by the command line: ViT and DeiT as classifiers, the image half of CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

import claq_export
from claq_export.api import capture
from claq_export.calibration.loading import load_calibration
from claq_export.cli import main
from claq_export.errors import CalibrationError, ModelError

IMAGE = {
    "image_size": 24,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def vit() -> torch.nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=5))


def deit() -> torch.nn.Module:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**IMAGE, num_labels=5))


def bare_vit() -> torch.nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**IMAGE))


def clip() -> torch.nn.Module:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=24)
    return transformers.CLIPModel(config)


def image_half(folder: Path) -> torch.nn.Module:
    config = transformers.CLIPConfig.from_pretrained(folder).vision_config
    return transformers.CLIPVisionModel.from_pretrained(folder, config=config)


@pytest.mark.parametrize(
    ("make", "loader", "task", "output", "shape"),
    [
        pytest.param(vit, transformers.ViTForImageClassification.from_pretrained, None, "logits", (3, 5), id="ViT"),
        pytest.param(deit, transformers.DeiTForImageClassification.from_pretrained, None, "logits", (3, 5), id="DeiT"),
        pytest.param(
            bare_vit, transformers.ViTModel.from_pretrained, None, "last_hidden_state", (3, 10, 64), id="bare"
        ),
        pytest.param(clip, image_half, "image-feature-extraction", "last_hidden_state", (3, 10, 64), id="CLIP"),
    ],
)
def test_folder_to_file(make, loader, task: str | None, output: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    images = np.random.default_rng(0).standard_normal((6, 3, 24, 24)).astype(np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=images)
    target = tmp_path / "out" / "model.onnx"
    options = ["--out", str(target), "--calibration", str(tmp_path / "images.npz"), "--quiet"]
    assert main([str(tmp_path / "model"), *options, *(["--task", task] if task else [])]) == 0
    operators = [node.op_type for node in onnx.load(str(target), load_external_data=False).graph.node]
    assert "ClaqMatMul" in operators
    session = ort.InferenceSession(str(target))
    (pixels,) = session.get_inputs()
    assert (pixels.name, pixels.shape) == ("pixel_values", ["batch", 3, 24, 24])
    (found,) = session.run([output], {"pixel_values": images[:3]})
    assert found.shape == shape
    loaded = claq_export.load(target.parent, loader(tmp_path / "model"), strict=False).eval()
    with torch.no_grad():
        expected = getattr(loaded(pixel_values=torch.from_numpy(images[:3])), output).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


def test_what_cannot_calibrate_or_be_told_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit().save_pretrained(tmp_path / "vit")
    clip().save_pretrained(tmp_path / "clip")
    command = [str(tmp_path / "vit"), "--out", str(tmp_path / "out" / "model.onnx"), "--quiet"]
    assert main(command) == CalibrationError.exit_code
    assert "reads pixel_values, which no text can give" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", images=np.zeros((2, 3, 24, 24), np.float32))
    assert main([*command, "--calibration", str(tmp_path / "other.npz")]) == CalibrationError.exit_code
    assert "has no array 'pixel_values'; it has 'images'" in capsys.readouterr().err
    np.savez(tmp_path / "objects.npz", pixel_values=np.array([None, 1], object))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 not an archive")
    np.savez(tmp_path / "integers.npz", pixel_values=np.zeros((2, 3, 24, 24), np.int64))
    captured, _ = capture(tmp_path / "vit")
    for name, message in (
        ("objects", "is not a readable .npz archive"),
        ("damaged", "is not a readable .npz archive"),
        ("integers", "must be torch.float32"),
    ):
        with pytest.raises(CalibrationError, match=message):
            load_calibration(captured, claq_export.Config(calibration=tmp_path / f"{name}.npz"))
    assert main([str(tmp_path / "clip"), *command[1:]]) == ModelError.exit_code
    assert "--task image-feature-extraction" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("model*"))
