"""Logits of one small language model from PyTorch and from ONNX Runtime, on the GPU or the CPU; prints JSON.

    python benchmarks/gpu/logits.py --library libclaq.so [--provider CPUExecutionProvider]

The model (embedding, causal attention, a tied output head) is quantized and exported here; nothing is downloaded. One of its
layers is then run by each of the fused operators beside its product in float64. Every claq node must have run on the
provider asked for, which ONNX Runtime's profile tells.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

import claq_export
from claq_export.emit.function import DOMAIN, OPSET, PRODUCTS, VERSION
from claq_export.format.checkpoint import load_checkpoint
from claq_export.format.layer import QuantizedLinear

VOCABULARY, WIDTH = 1000, 128
EPSILON = 1e-5


class Small(nn.Module):
    """One block of a decoder; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, tokens, vocabulary]``."""
        x = self.embedding(ids)
        q, k, v = self.qkv(self.norms[0](x)).unsqueeze(1).chunk(3, -1)
        x = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


def claq_nodes(profile: str) -> dict[str, list[str]]:
    """Providers that ran each claq operator."""
    events = json.loads(Path(profile).read_text())
    found: dict[str, set[str]] = {}
    for event in events:
        name = event.get("args", {}).get("op_name", "")
        if name.startswith("Claq"):
            found.setdefault(name, set()).add(event["args"]["provider"])
    return {name: sorted(providers) for name, providers in sorted(found.items())}


def fused_model(layer: QuantizedLinear) -> bytes:
    """One node of each fused operator on the same layer; the last output of a split is empty."""
    tensors = {name: tensor.numpy() for name, tensor in layer.tensors().items()} | {"bias": np.zeros(0, np.float32)}
    third = layer.out_features // 3
    split = {"split_0": third, "split_1": layer.out_features - third, "split_2": 0}
    fed = {
        "ClaqMatMulAdd": ["residual"],
        "ClaqMatMulAddNorm": ["residual", "norm_weight"],
        "ClaqMatMulRotary": ["cos", "sin"],
    }
    own = {
        "ClaqMatMulSplit": split,
        "ClaqMatMulRotary": {**split, "heads_0": 2, "heads_1": 2, "rotary_dim": 4},
        "ClaqMatMulAddNorm": {"epsilon": EPSILON},
    }
    outputs = {
        "ClaqMatMulAdd": ["added"],
        "ClaqMatMulAddNorm": ["sum", "normalized"],
        "ClaqMatMulSwiGLU": ["gated"],
        "ClaqMatMulSplit": ["first", "second", "none"],
        "ClaqMatMulRotary": ["query", "key", "nothing"],
    }
    nodes = [
        helper.make_node(
            operator,
            ["x", *tensors, *fed.get(operator, [])],
            names,
            domain=DOMAIN,
            **layer.attributes(),
            **own.get(operator, {}),
        )
        for operator, names in outputs.items()
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for names in outputs.values() for name in names
    ]
    graph = helper.make_graph(
        nodes,
        "fused",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in ("x", "residual", "norm_weight", "cos", "sin")
        ],
        values,
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def fused_error(session: onnxruntime.InferenceSession, layer: QuantizedLinear, rows: int) -> float:
    """The largest error of any fused operator, relative to its largest value."""
    random = np.random.default_rng(rows)
    x = random.normal(size=(rows, layer.in_features)).astype(np.float32)
    residual = random.normal(size=(rows, layer.out_features)).astype(np.float32)
    product = x.astype(np.float64) @ layer.dequantize(torch.float32).numpy().T.astype(np.float64)
    gate, up = np.split(product, 2, -1)
    third = layer.out_features // 3
    total, weight = product + residual, random.normal(size=layer.out_features).astype(np.float32)
    normalized = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON) * weight
    cos, sin = (random.normal(size=(rows, 2)).astype(np.float32) for _ in range(2))

    def turned(part: np.ndarray) -> np.ndarray:
        heads = part.reshape(rows, 2, -1)
        first, second, rest = heads[..., :2], heads[..., 2:4], heads[..., 4:]
        c, s = cos[:, None], sin[:, None]
        return np.concatenate([first * c - second * s, second * c + first * s, rest], -1).reshape(rows, -1)

    left, right = product[:, :third], product[:, third:]
    expected = {
        "added": total,
        "sum": total,
        "normalized": normalized,
        "gated": gate / (1 + np.exp(-gate)) * up,
        "first": left,
        "second": right,
        "query": turned(left),
        "key": turned(right),
    }
    feeds = {"x": x, "residual": residual, "norm_weight": weight, "cos": cos, "sin": sin}
    found = dict(zip(expected, session.run(list(expected), feeds), strict=True))
    return max(float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in expected.items())


def main() -> int:
    """The exit status is 1 where the logits differ or a node ran elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--provider", default="CUDAExecutionProvider")
    options = parser.parse_args()
    available = onnxruntime.get_available_providers()
    if options.provider not in available:
        print(json.dumps({"not tried": f"onnxruntime {onnxruntime.__version__} here has no {options.provider}"}))
        return 0
    torch.manual_seed(0)
    model = Small().eval().requires_grad_(False)
    batches = [torch.randint(0, VOCABULARY, (2, 24)) for _ in range(4)]
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        config = claq_export.Config(bits=4, calibration=batches, exact_tokens=0.01, accuracy="fp32")
        path = Path(folder) / "model.onnx"
        axes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=512)},)
        claq_export.export(model, (batches[0],), path, config, dynamic_shapes=axes, verify=False)
        quantized = claq_export.load(folder, Small().eval().requires_grad_(False))
        providers = [options.provider, *(p for p in ("CPUExecutionProvider",) if p != options.provider)]

        def open_session(model: str | bytes, name: str) -> onnxruntime.InferenceSession:
            settings = onnxruntime.SessionOptions()
            settings.register_custom_ops_library(options.library)
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / name)
            return onnxruntime.InferenceSession(model, settings, providers=providers)

        session = open_session(str(path), "model")
        for batch, tokens in ((1, 1), (1, 7), (2, 24), (3, 60)):
            ids = torch.randint(0, VOCABULARY, (batch, tokens))
            got = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
            expected = quantized(ids).numpy()
            errors[f"{batch} x {tokens}"] = float(np.abs(got - expected).max() / np.abs(expected).max())
        nodes = claq_nodes(session.end_profiling())
        layer = load_checkpoint(Path(folder)).layers["up"]
        session = open_session(fused_model(layer), "fused")
        for rows in (1, 7, 130):
            errors[f"fused, {rows} rows"] = fused_error(session, layer, rows)
        nodes |= claq_nodes(session.end_profiling())
    right = max(errors.values()) <= 1e-4 and set(nodes) == {"ClaqGather", *PRODUCTS}
    right = right and all(ran == [options.provider] for ran in nodes.values())
    print(json.dumps({"version": onnxruntime.__version__, "errors": errors, "nodes": nodes, "right": right}))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
