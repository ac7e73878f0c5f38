"""The operators that split, gate or add to their own product: against ClaqMatMul, their functions, and each other's families."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from runtime_layers import NAMES, Layer, make_layer

import claq_runtime
from claq_export.emit.function import PRODUCTS, claq_function

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
FED = {
    "ClaqMatMulAdd": ["residual"],
    "ClaqMatMulAddNorm": ["residual", "norm_weight"],
    "ClaqMatMulRotary": ["cos", "sin"],
}
OUTPUTS = {"ClaqMatMulAddNorm": 2, "ClaqMatMulSplit": 3, "ClaqMatMulRotary": 3}
EPSILON = 1e-5
ROTARY_DIM = 4
FAMILIES = claq_runtime.kernels()
FUSED = [name for name in PRODUCTS if name != "ClaqMatMul"]


def model_of(
    operator: str,
    layer: Layer,
    kind: int = TensorProto.FLOAT,
    *,
    accuracy_level: int = 0,
    split: tuple[int, int, int] | None = None,
    heads: tuple[int, int] = (1, 1),
    with_function: bool = False,
) -> bytes:
    """A model of one node: ``x`` and what it takes beside; outputs ``y0``, ``y1``, ..."""
    attributes: dict[str, Any] = {**layer.attributes, "accuracy_level": accuracy_level}
    if split is not None:
        attributes |= {f"split_{index}": size for index, size in enumerate(split)}
    fed = ["x", *FED.get(operator, [])]
    made = [f"y{index}" for index in range(OUTPUTS.get(operator, 1))]
    if operator == "ClaqMatMulRotary":
        attributes |= {"heads_0": heads[0], "heads_1": heads[1], "rotary_dim": ROTARY_DIM}
    if operator == "ClaqMatMulAddNorm":
        attributes["epsilon"] = EPSILON
    bias = helper.np_dtype_to_tensor_dtype(layer.tensors["bias"].dtype)
    assert bias == kind
    node = helper.make_node(operator, ["x", *NAMES, *fed[1:]], made, name="layer", domain="com.claq", **attributes)
    graph = helper.make_graph(
        [node],
        "fused",
        [helper.make_tensor_value_info(name, kind, None) for name in fed],
        [helper.make_tensor_value_info(name, kind, None) for name in made],
        [numpy_helper.from_array(value, name) for name, value in layer.tensors.items()],
    )
    functions = [onnx.FunctionProto.FromString(claq_function(operator))] if with_function else []
    imports = [
        helper.make_opsetid("", 23 if operator in ("ClaqMatMulAddNorm", "ClaqMatMulRotary") else 18),
        helper.make_opsetid("com.claq", 1),
    ]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=9).SerializeToString()


def run(model: bytes, *, library: bool = True, **feeds: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    if library:
        claq_runtime.register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def random_inputs(
    layer: Layer, rows: int, dtype: str, seed: int = 0
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """x, a residual, and the product by ClaqMatMul at accuracy_level 4."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(1, rows, layer.attributes["in_features"])).astype(dtype)
    residual = random.normal(size=(1, rows, layer.attributes["out_features"])).astype(dtype)
    (product,) = run(model_of("ClaqMatMul", layer, TYPES[dtype], accuracy_level=4), x=x)
    return x, residual, product


def with_bias(layer: Layer, dtype: str) -> Layer:
    layer.tensors["bias"] = np.random.default_rng(3).normal(size=layer.attributes["out_features"]).astype(dtype)
    return layer


def rms_norm(x: npt.NDArray[np.float64], weight: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight


def rotate(
    x: npt.NDArray[np.float64], cos: npt.NDArray[Any], sin: npt.NDArray[Any], heads: int
) -> npt.NDArray[np.float64]:
    half = cos.shape[-1]
    split = x.reshape(*x.shape[:-1], heads, -1)
    first, second, rest = split[..., :half], split[..., half : 2 * half], split[..., 2 * half :]
    c, s = cos[..., None, :], sin[..., None, :]
    return np.concatenate([first * c - second * s, second * c + first * s, rest], -1).reshape(x.shape)


def silu(gate: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return gate / (1 + np.exp(-gate))


# More than 240,000 weights: the columns of a row alone are shared out. More than 256 rows: several products.
SIZES = [(70, 33), (1100, 300), (2, 5), (66, 96)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 7, 130, 300])
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_fused_is_the_product_and_what_follows(out_features: int, in_features: int, rows: int, dtype: str) -> None:
    layer = with_bias(make_layer(out_features, in_features), dtype)
    x, residual, product = random_inputs(layer, rows, dtype)
    kind = TYPES[dtype]
    (added,) = run(model_of("ClaqMatMulAdd", layer, kind, accuracy_level=4), x=x, residual=residual)
    np.testing.assert_array_equal(added, (product.astype(np.float32) + residual.astype(np.float32)).astype(dtype))

    weight = np.random.default_rng(5).normal(size=out_features).astype(dtype)
    feeds = {"x": x, "residual": residual, "norm_weight": weight}
    total, normalized = run(model_of("ClaqMatMulAddNorm", layer, kind, accuracy_level=4), **feeds)
    np.testing.assert_array_equal(total, added)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == "float32" else {"rtol": 6e-4, "atol": 1e-6}
    np.testing.assert_allclose(normalized, rms_norm(added.astype(np.float64), weight), **tolerance)

    for split in (
        (out_features - out_features // 3, out_features // 3, 0),
        (1, out_features // 2, out_features - 1 - out_features // 2),
    ):
        parts = run(model_of("ClaqMatMulSplit", layer, kind, accuracy_level=4, split=split), x=x)
        assert [part.shape[-1] for part in parts] == list(split)
        np.testing.assert_array_equal(np.concatenate(parts, -1), product)

    if out_features > 60:
        split, heads = (40, 20, out_features - 60), (4, 2)
        cos, sin = (
            np.random.default_rng(seed).normal(size=(1, rows, ROTARY_DIM // 2)).astype(dtype) for seed in (6, 7)
        )
        model = model_of("ClaqMatMulRotary", layer, kind, accuracy_level=4, split=split, heads=heads)
        query, key, value = run(model, x=x, cos=cos, sin=sin)
        wide = product.astype(np.float64)
        np.testing.assert_allclose(query, rotate(wide[..., :40], cos, sin, 4), rtol=1e-3, atol=tolerance["rtol"] * 10)
        np.testing.assert_allclose(key, rotate(wide[..., 40:60], cos, sin, 2), rtol=1e-3, atol=tolerance["rtol"] * 10)
        np.testing.assert_array_equal(value, product[..., 60:])

    (gated,) = run(model_of("ClaqMatMulSwiGLU", layer, kind, accuracy_level=4), x=x)
    gate, up = np.split(product.astype(np.float64), 2, -1)
    expected = silu(gate) * up
    np.testing.assert_allclose(
        gated, expected, rtol=4e-7 if dtype == "float32" else 6e-4, atol=1e-6 if dtype != "float32" else 1e-30
    )


@pytest.mark.parametrize("operator", FUSED)
@pytest.mark.parametrize("rows", [1, 7])
def test_the_function_computes_the_same(operator: str, rows: int) -> None:
    layer = with_bias(make_layer(66, 96), "float32")
    x, residual, _ = random_inputs(layer, rows, "float32")
    split = (40, 20, 6) if OUTPUTS.get(operator) == 3 else None
    model = model_of(operator, layer, split=split, heads=(4, 2), with_function=True)
    random = np.random.default_rng(5)
    given = {"x": x, "residual": residual, "norm_weight": random.normal(size=66).astype(np.float32)}
    given |= {name: random.normal(size=(1, rows, ROTARY_DIM // 2)).astype(np.float32) for name in ("cos", "sin")}
    feeds = {name: given[name] for name in ("x", *FED.get(operator, []))}
    stock, native = run(model, library=False, **feeds), run(model, **feeds)
    assert len(stock) == len(native) == OUTPUTS.get(operator, 1)
    for one, other in zip(stock, native, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(np.abs(other).max()))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "portable"])
def test_families_gate_bit_for_bit(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    layer = with_bias(make_layer(1100, 300), "float32")
    x = np.random.default_rng(1).normal(size=(1, 9, 300)).astype(np.float32) * 20
    results = []
    for name in ("portable", family):
        monkeypatch.setenv("CLAQ_KERNEL", name)
        results.append(run(model_of("ClaqMatMulSwiGLU", layer, accuracy_level=4), x=x)[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_at_the_ends(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setenv("CLAQ_KERNEL", family)
    finite = [0.0, -0.0, 1e-40, -1e-40, 1e-8, 20.0, -20.0, 86.9, -86.9, 88.5, -88.5, -103.0, 1e4, -1e4, 3e38, -3e38]
    gates = np.array([*finite, np.inf, -np.inf, np.nan], np.float32)
    layer = make_layer(2 * len(gates), 8)
    # Of an x of zeros the product is the bias.
    layer.tensors["bias"] = np.concatenate([gates, np.full_like(gates, 0.5)])
    (y,) = run(model_of("ClaqMatMulSwiGLU", layer), x=np.zeros((1, 2, 8), np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (silu(gates.astype(np.float64)) * 0.5).astype(np.float32)
    count = len(finite)
    np.testing.assert_allclose(y[0, :, :count], np.broadcast_to(expected[:count], (2, count)), rtol=4e-7, atol=1e-34)
    np.testing.assert_array_equal(y[0, :, count:], [[np.inf, np.nan, np.nan]] * 2)


@pytest.mark.parametrize("operator", FUSED)
def test_no_rows(operator: str) -> None:
    layer = with_bias(make_layer(50, 40), "float32")
    given = {"residual": np.zeros((1, 0, 50), np.float32), "norm_weight": np.ones(50, np.float32)}
    given |= {name: np.zeros((1, 0, 2), np.float32) for name in ("cos", "sin")}
    empty = {"x": np.zeros((1, 0, 40), np.float32)} | {name: given[name] for name in FED.get(operator, [])}
    split = (30, 20, 0) if OUTPUTS.get(operator) == 3 else None
    widths = [part.shape for part in run(model_of(operator, layer, split=split), **empty)]
    wanted = {
        "ClaqMatMulAdd": [50],
        "ClaqMatMulAddNorm": [50, 50],
        "ClaqMatMulSwiGLU": [25],
        "ClaqMatMulSplit": [30, 20, 0],
        "ClaqMatMulRotary": [30, 20, 0],
    }[operator]
    assert widths == [(1, 0, width) for width in wanted]


def test_what_does_not_fit_is_refused() -> None:
    odd = with_bias(make_layer(51, 40), "float32")
    with pytest.raises(Exception, match=r"ClaqMatMulSwiGLU node 'layer': out_features: is 51, expected an even number"):
        run(model_of("ClaqMatMulSwiGLU", odd), x=np.zeros((1, 1, 40), np.float32))
    for split, name in (((30, 20, 0), "split_2"), ((60, -9, 0), "split_0"), ((1 << 62, 1 << 62, 51), "split_0")):
        with pytest.raises(
            Exception, match=f"ClaqMatMulSplit node 'layer': {name}: is .*, expected parts of out_features = 51"
        ):
            run(model_of("ClaqMatMulSplit", odd, split=split), x=np.zeros((1, 1, 40), np.float32))
    with pytest.raises(Exception, match="split_0: the attribute is missing"):
        run(model_of("ClaqMatMulSplit", odd), x=np.zeros((1, 1, 40), np.float32))
    x = np.zeros((1, 2, 40), np.float32)
    for shape in ((1, 1, 51), (1, 2, 50), (2, 51)):
        with pytest.raises(Exception, match="ClaqMatMulAdd: residual: expected the shape of the result"):
            run(model_of("ClaqMatMulAdd", odd), x=x, residual=np.zeros(shape, np.float32))
    with pytest.raises(Exception, match=r"ClaqMatMulAdd: x: the last dimension is 39, expected in_features = 40"):
        run(model_of("ClaqMatMulAdd", odd), x=x[..., :39], residual=np.zeros((1, 2, 51), np.float32))
    feeds = {"residual": np.zeros((1, 2, 51), np.float32), "norm_weight": np.zeros(50, np.float32)}
    with pytest.raises(Exception, match="ClaqMatMulAddNorm: norm_weight: expected one value for each output"):
        run(model_of("ClaqMatMulAddNorm", odd), x=x, **feeds)
    for epsilon, problem in (
        (None, "the attribute is missing"),
        (-1.0, "is -1.000000, expected"),
        (np.nan, "is -?nan, expected"),
    ):
        model = onnx.ModelProto.FromString(model_of("ClaqMatMulAddNorm", odd))
        (attribute,) = (entry for entry in model.graph.node[0].attribute if entry.name == "epsilon")
        if epsilon is None:
            model.graph.node[0].attribute.remove(attribute)
        else:
            attribute.f = epsilon
        with pytest.raises(Exception, match=f"ClaqMatMulAddNorm node 'layer': epsilon: {problem}"):
            run(model.SerializeToString(), x=x)


def test_rotations_that_do_not_fit_are_refused() -> None:
    layer = make_layer(66, 40)
    x, angles = np.zeros((2, 3, 40), np.float32), np.zeros((2, 3, 2), np.float32)
    for heads, problem in (
        ((3, 2), "heads_0: is 3, expected a divisor of split_0 = 40"),
        ((4, 0), "heads_1: is 0, expected"),
    ):
        with pytest.raises(Exception, match=f"ClaqMatMulRotary node 'layer': {problem}"):
            run(model_of("ClaqMatMulRotary", layer, split=(40, 20, 6), heads=heads), x=x, cos=angles, sin=angles)
    model = model_of("ClaqMatMulRotary", layer, split=(40, 20, 6), heads=(4, 5))
    with pytest.raises(Exception, match="ClaqMatMulRotary: cos: expected a row for each row of x"):
        run(model, x=x, cos=angles[:1], sin=angles)
    with pytest.raises(Exception, match="ClaqMatMulRotary: sin: expected the shape of cos"):
        run(model, x=x, cos=angles, sin=angles[..., :1])
    for width in (0, 1, 3):
        with pytest.raises(
            Exception, match=rf"ClaqMatMulRotary: cos: the last dimension is {width}, expected rotary_dim / 2 = 2"
        ):
            run(model, x=x, cos=np.zeros((2, 3, width), np.float32), sin=np.zeros((2, 3, width), np.float32))


@pytest.mark.parametrize(
    ("rotary_dim", "heads", "problem"),
    [
        (-2, (4, 2), "is -2, expected an even number of at most 10"),
        (3, (4, 2), "is 3, expected an even number"),
        (12, (4, 2), "is 12, expected an even number of at most 10"),
        (6, (4, 5), "is 6, expected an even number of at most 4"),
        (2**62, (4, 2), "is 4611686018427387904, expected"),
        (0, (4, 5), "is 0, expected .* or 0 if all heads are of one even size"),
        (0, (8, 4), "is 0, expected .* or 0 if all heads are of one even size"),
        (None, (4, 2), "the attribute is missing"),
        (4.0, (4, 2), "the attribute is of another type, expected an integer"),
    ],
)
def test_a_rotary_dim_that_does_not_fit_is_refused(
    rotary_dim: float | None, heads: tuple[int, int], problem: str
) -> None:
    angles = np.zeros((1, 3, 2), np.float32)
    model = with_rotary_dim(
        model_of("ClaqMatMulRotary", make_layer(66, 40), split=(40, 20, 6), heads=heads), rotary_dim
    )
    with pytest.raises(Exception, match=f"ClaqMatMulRotary node 'layer': rotary_dim: {problem}"):
        run(model, x=np.zeros((1, 3, 40), np.float32), cos=angles, sin=angles)


@pytest.mark.parametrize("rotary_dim", [0, 2, 4, 10])
def test_every_rotary_dim_turns_as_the_function(rotary_dim: int) -> None:
    layer = make_layer(66, 96)
    model = model_of("ClaqMatMulRotary", layer, split=(40, 20, 6), heads=(4, 2), with_function=True)
    random = np.random.default_rng(8)
    shapes = {"x": (1, 3, 96), "cos": (1, 3, (rotary_dim or 10) // 2), "sin": (1, 3, (rotary_dim or 10) // 2)}
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    stock, native = (run(with_rotary_dim(model, rotary_dim), library=library, **feeds) for library in (False, True))
    for one, other in zip(stock, native, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(np.abs(other).max()))


def with_rotary_dim(model: bytes, rotary_dim: float | None) -> bytes:
    changed = onnx.ModelProto.FromString(model)
    attributes = changed.graph.node[0].attribute
    attributes.remove(next(entry for entry in attributes if entry.name == "rotary_dim"))
    if rotary_dim is not None:
        attributes.append(helper.make_attribute("rotary_dim", rotary_dim))
    return changed.SerializeToString()
