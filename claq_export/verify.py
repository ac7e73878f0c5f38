"""Verification of a written artifact: ONNX Runtime, with and without the native library, against the PyTorch model.

Three questions are answered with the same sample inputs: does the file compute what the quantized PyTorch model
computes (it fails otherwise), how far is that from the unquantized model, and how long does a run take.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from .cache_buffers import run_in_place, takes_buffers
from .deferred import DEFER_FROM, logical_bytes, materialize
from .errors import VerificationError
from .format.layer import QuantizedLinear
from .inputs import OnnxFile
from .kernels import use_backend
from .onnx_session import float32_arithmetic, open_session, uses_bfloat16
from .process_memory import trim_freed_memory
from .verify_layers import WHOLE_UP_TO, folding_bytes, layer_outputs

Inputs = Mapping[str, torch.Tensor]
Model = Callable[..., Any]

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest deviation, relative to the output's largest magnitude, that rounding explains, by dtype of the output: in float16
and bfloat16 ten roundings of the largest value. Outputs of other types must be equal."""

ROUNDING_HEADROOM = 2.0
"""Of a float16 or bfloat16 file: how much further from the float32 model than PyTorch's run in that dtype it may be.

What rounding each activation to 11 or 8 bits does to an output depends on the model; PyTorch's own run in the dtype measures
it. Two runtimes round at different places, so that their errors are draws of the same size, not equal ones."""


FUSING_TOLERANCE = 1e-4
"""Largest :attr:`Deviation.maximum` of the graph in a file from the same graph before its operators were fused, both in
float32: only the order of sums differs."""

INT8_TOLERANCE = 0.2
"""Largest :attr:`Deviation.rms` of a library that rounds activations to int8 (``accuracy_level`` 4).

A layer's error is under a percent, and what a deep model makes of it differs: 0.03 in the logits of SmolLM2-135M, 0.08 in the
last values of its cache, of which a single one is further off. That graph and kernels are right is checked with float32
arithmetic, in a session of its own, to the tolerance of the file's dtype."""

MOST_ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.3}
"""Beyond this PyTorch's own run in a dtype is no rounding of the float32 model: the two graphs are not of one model, or the
model is not one for the dtype."""


@dataclass(frozen=True)
class Deviation:
    """How far one output is from a reference, the worst over all sample inputs.

    Attributes:
        maximum: largest absolute difference, divided by the reference's largest magnitude.
        rms: root mean square of the difference, divided by that of the reference.
        cosine: mean cosine between the vectors along the last axis.
    """

    maximum: float
    rms: float
    cosine: float


@dataclass(frozen=True)
class Run:
    """One way to run the artifact.

    Attributes:
        name: ``"stock"`` (ONNX Runtime alone), ``"runtime"`` (with the native library), ``"runtime, fp32"`` (the same in
            float32 arithmetic, of a file that asks for int8) or ``"original"`` (unquantized).
        load_seconds: creation of the session.
        latency_ms: median time of one run of the first sample inputs.
        deviations: output name -> deviation from the quantized PyTorch model (in float32, whatever the file's dtype);
            empty for ``"original"``. Of a ``"stock"`` run that went layer by layer ``"layers"`` -> that of the worst one from
            the library, and no latency.
    """

    name: str
    load_seconds: float
    latency_ms: float
    deviations: Mapping[str, Deviation]


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify_artifact` found.

    Attributes:
        path: the model file.
        runs: by name; all but ``"stock"`` are missing when there was nothing to run.
        rounding: output name -> deviation of PyTorch's run in the file's dtype from that in float32; empty for float32.
        fidelity: output name -> deviation of the quantized from the unquantized PyTorch model; empty if none was given.
        onnxruntime: version of ONNX Runtime.
        note: why the native library was not tried, or in which way the file could not be run as it is; or empty.
        warnings: outputs that could not be compared everywhere, because the unquantized model gives NaN there.
    """

    path: Path
    runs: Mapping[str, Run]
    rounding: Mapping[str, Deviation]
    fidelity: Mapping[str, Deviation]
    onnxruntime: str
    note: str
    warnings: tuple[str, ...] = ()


def verify_artifact(
    path: Path | str,
    reference: Model,
    sample_inputs: Sequence[Inputs] | Inputs,
    *,
    exact: Model | None = None,
    unfused: Model | None = None,
    unquantized: Model | None = None,
    original_path: Path | str | None = None,
    library: bool | str | Path | None = None,
    tolerance: float | None = None,
    library_tolerance: float | None = None,
    rounds: int = 10,
    file_names: Mapping[str, str] | None = None,
) -> VerificationReport:
    """Check that an artifact computes what the quantized PyTorch model computes, and measure it.

    Args:
        path: the ``.onnx`` file.
        reference: the quantized PyTorch model; called with the sample inputs as keyword arguments, returns a tensor, a
            tuple or a mapping of tensors, in the order of the file's outputs. It runs on the reference kernel.
        exact: the same with float32 arithmetic, where the file computes in float16 or bfloat16; called with the sample
            inputs in float32. The file is compared with it then, by the measure of what ``reference`` deviates.
        unfused: the same before operators were fused, in float32; called as ``exact`` is, or else as ``reference``.
        sample_inputs: one set of inputs or several (other sizes of the dynamic axes, for example).
        unquantized: the original PyTorch model, called in the same way.
        original_path: the original model as ONNX, for its latency.
        library: False = do not try the native library; a path = that library; None = the installed ``claq_runtime``, if
            there is one; True = the installed one, which must be there.
        tolerance: largest allowed :attr:`Deviation.maximum`; by default :data:`TOLERANCES`, or what :func:`rounding_limit`
            makes of the rounding measured with ``exact``.
        library_tolerance: the same for the run with the library; by default ``tolerance``, but where the file asks for int8
            activations the root mean square is compared with :data:`INT8_TOLERANCE` if neither is given. There the library
            also runs with float32 arithmetic (``CLAQ_ACCURACY=fp32``), to ``tolerance``.
        file_names: inputs' names in the file where they are not those of ``sample_inputs``.
        rounds: timed runs of each session, interleaved; 0 = none (latencies are NaN).

    Returns:
        the report.

    Raises:
        VerificationError: ONNX Runtime or the ONNX checker refuses the file, fusing operators changed what the model computes, an
            output has another type than the PyTorch model's, is NaN where that of the unquantized model is not, or deviates by
            more than the tolerance; the message names the run, the output and the error.
    """
    path = Path(path)
    samples = [sample_inputs] if isinstance(sample_inputs, Mapping) else list(sample_inputs)
    if not samples:
        raise ValueError("verification needs at least one set of sample inputs")
    _check_model(path)
    # The reference kernel is exact at every accuracy level and shares no code with what is being verified.
    with use_backend("reference"):
        results = [_call(reference, inputs) for inputs in samples]
        dtypes = [tensor.dtype for tensor in results[0]]
        expected = [[_array(tensor) for tensor in outputs] for outputs in results]
        compared = expected
        if exact is not None:
            compared = [[_array(tensor) for tensor in _call(exact, _in_float32(inputs))] for inputs in samples]
        before_fusing = None
        if unfused is not None:
            given = samples if exact is None else [_in_float32(inputs) for inputs in samples]
            before_fusing = [[_array(tensor) for tensor in _call(unfused, inputs)] for inputs in given]
    library_file, note = _library(library)

    model = onnx.load(str(path), load_external_data=False)
    memory = folding_bytes(model)
    by_layer = library_file is not None and memory > WHOLE_UP_TO
    sessions: dict[str, tuple[onnxruntime.InferenceSession, float]] = {}
    if not by_layer:
        sessions["stock"] = _session(path, "stock", None)
    if library_file is not None:
        sessions["runtime"] = _session(path, "runtime", library_file)
    names = [output.name for output in next(iter(sessions.values()))[0].get_outputs()]
    _check_types(path, names, dtypes)
    if before_fusing is not None:
        _check_fusing(path, names, before_fusing, compared)
    rounding: dict[str, Deviation] = {}
    if exact is not None:
        rounding = {
            name: _deviation([outputs[i] for outputs in expected], [outputs[i] for outputs in compared])
            for i, name in enumerate(names)
        }
        _check_rounding(path, rounding, dict(zip(names, dtypes, strict=True)))
    usual = {
        name: rounding_limit(rounding[name], dtype) if name in rounding else TOLERANCES.get(dtype, 0.0)
        for name, dtype in zip(names, dtypes, strict=True)
    }
    allowed = usual if tolerance is None else dict.fromkeys(names, tolerance)
    int8 = library_file is not None and _uses_int8(model)
    rounded = int8 and library_tolerance is None and tolerance is None
    limits = {
        "stock": allowed,
        "runtime": allowed if library_tolerance is None else dict.fromkeys(names, library_tolerance),
    }
    if uses_bfloat16(path):
        note = "; ".join(filter(None, (note, BFLOAT16_NOTE)))
    feeds = [{(file_names or {}).get(name, name): tensor for name, tensor in inputs.items()} for inputs in samples]
    deviations = {
        run: _compare(path, run, session, names, feeds, compared, None if rounded and run == "runtime" else limits[run])
        for run, (session, _) in sessions.items()
    }
    runs: dict[str, Run] = {}
    if int8:
        with float32_arithmetic():
            unrounded, seconds = _session(path, "runtime, fp32", library_file)
        found = _compare(path, "runtime, fp32", unrounded, names, feeds, compared, allowed)
        runs["runtime, fp32"] = Run("runtime, fp32", seconds, math.nan, found)
        _check_in_place(path, unrounded, names, feeds, compared, allowed)
        del unrounded
    elif "runtime" in sessions:
        _check_in_place(path, sessions["runtime"][0], names, feeds, compared, limits["runtime"])
    if by_layer:
        assert library_file is not None
        runs["stock"] = _layer_by_layer(path, library_file)
        note = "; ".join(filter(None, (note, BY_LAYER_NOTE.format(memory / 1e9))))
    if original_path is not None:
        sessions["original"] = _session(Path(original_path), "original", None)
    latencies = _latencies({run: session for run, (session, _) in sessions.items()}, feeds[0], rounds)
    fidelity: dict[str, Deviation] = {}
    originals = None
    if unquantized is not None:
        originals = [[_array(tensor) for tensor in _call(unquantized, inputs)] for inputs in samples]
    warnings = _check_nan(path, names, expected, originals)
    if originals is not None:
        fidelity = {
            name: _deviation([outputs[i] for outputs in expected], [outputs[i] for outputs in originals])
            for i, name in enumerate(names)
            if not name.startswith("present.")  # a cache is checked above; its distance tells nothing of its own
        }
    return VerificationReport(
        path=path,
        runs=runs
        | {run: Run(run, seconds, latencies[run], deviations.get(run, {})) for run, (_, seconds) in sessions.items()},
        rounding=rounding,
        fidelity=fidelity,
        onnxruntime=onnxruntime.__version__,
        note=note,
        warnings=warnings,
    )


BY_LAYER_NOTE = (
    "ONNX Runtime alone ran the layers one by one, each compared with claq-runtime: to open the whole file it would take about "
    "{:.1f} GB"
)
"""How a large file is verified."""

BFLOAT16_NOTE = (
    "ONNX Runtime's CPU provider has few bfloat16 kernels: the file was run with its other operators in float32, each result "
    "rounded to bfloat16; to run as it is it needs a provider such as CUDA"
)
"""How a bfloat16 file is verified."""


def rounding_limit(rounding: Deviation, dtype: torch.dtype) -> float:
    """What an output of a float16 or bfloat16 file may deviate from the float32 model's.

    Args:
        rounding: deviation of PyTorch's run in the file's dtype.
        dtype: of the output.
    """
    return max(ROUNDING_HEADROOM * rounding.maximum, TOLERANCES.get(dtype, 0.0))


def _layer_by_layer(path: Path, library: Path) -> Run:
    """ONNX Runtime alone on each layer of a file that is too large for it as a whole."""
    worst, total, limit = Deviation(0.0, 0.0, math.nan), 0.0, TOLERANCES[torch.float32]
    for layer, stock, native, seconds in layer_outputs(path, library):
        total += seconds
        deviation = _deviation([stock], [native])
        if not deviation.maximum <= limit:
            raise VerificationError(
                f"stock: layer {layer!r} of {path} deviates from claq-runtime by {deviation.maximum:.3g} of its largest value; "
                f"at most {limit:.3g} is expected"
            )
        worst = max(worst, deviation, key=lambda found: found.maximum)
    return Run("stock", total, math.nan, {"layers": worst})


def _check_rounding(path: Path, rounding: Mapping[str, Deviation], dtypes: Mapping[str, torch.dtype]) -> None:
    for name, deviation in rounding.items():
        most = MOST_ROUNDING.get(dtypes[name], math.inf)
        if not deviation.maximum <= most:
            raise VerificationError(
                f"{path}: in {str(dtypes[name]).removeprefix('torch.')} PyTorch's output {name!r} is {deviation.maximum:.3g} of "
                f"its largest value away from the float32 model's; rounding explains at most {most:g}"
            )


def check_stored(paths: Sequence[Path], layers: Mapping[str, QuantizedLinear]) -> None:
    """Check that the files of an artifact are valid models that hold these layers, byte for byte, without running them.

    For a model that does not fit into memory: one tensor at a time is read.

    Raises:
        VerificationError: they do not; the message names the layer and the tensor.
    """
    for path in paths:
        _check_model(path)
    files = [OnnxFile(path, VerificationError) for path in paths]
    for name, layer in layers.items():
        for part, expected in layer.tensors().items():
            key = f"{name}.{part}"
            holders = [file for file in files if key in file.initializers]
            # Small equal tensors of several layers may have been merged under one name.
            if not holders and logical_bytes(expected) < DEFER_FROM:
                continue
            for file in holders or files[:1]:
                if file.read(key).tobytes() != materialize(expected).numpy().tobytes():
                    raise VerificationError(f"{file.path}: tensor {key!r} is not that of the finished layer")


def _check_model(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, OSError) as error:
        raise VerificationError(f"{path} is not a valid ONNX model: {error}") from error


def _library(library: bool | str | Path | None) -> tuple[Path | None, str]:
    """The native library, or why it is not tried."""
    if library is False:
        return None, "not asked for"
    if isinstance(library, (str, Path)):
        return Path(library), ""
    try:
        import claq_runtime

        return Path(claq_runtime.library_path()), ""
    except (ImportError, FileNotFoundError) as error:
        if library is True:
            raise VerificationError(f"the native library is not installed: {error}") from error
        return None, f"claq-runtime is not installed: {error}"


def _check_types(path: Path, names: Sequence[str], dtypes: Sequence[torch.dtype]) -> None:
    """The file's outputs are those of the PyTorch model, in number and type."""
    outputs = onnx.load(str(path), load_external_data=False).graph.output
    if len(names) != len(dtypes):
        raise VerificationError(f"{path} has {len(names)} outputs, the PyTorch model returns {len(dtypes)}")
    for output, dtype in zip(outputs, dtypes, strict=True):
        found, wanted = output.type.tensor_type.elem_type, int(ir.tensor_adapters.from_torch_dtype(dtype))
        if found != wanted:
            raise VerificationError(
                f"output {output.name!r} of {path} is {onnx.TensorProto.DataType.Name(found)}, the PyTorch model's is {dtype}"
            )


def _check_fusing(
    path: Path,
    names: Sequence[str],
    before: Sequence[Sequence[npt.NDArray[Any]]],
    after: Sequence[Sequence[npt.NDArray[Any]]],
) -> None:
    """Fusing operators left every output as it was."""
    for i, name in enumerate(names):
        for old, new in zip(before, after, strict=True):
            if old[i].shape != new[i].shape:
                raise VerificationError(
                    f"fusing operators made output {name!r} of {path} one of shape {list(new[i].shape)}; "
                    f"the quantized model's has {list(old[i].shape)}"
                )
        deviation = _deviation([outputs[i] for outputs in after], [outputs[i] for outputs in before])
        limit = FUSING_TOLERANCE if before[0][i].dtype.kind == "f" else 0.0
        if not deviation.maximum <= limit:
            raise VerificationError(
                f"fusing operators changed output {name!r} of {path} by {deviation.maximum:.3g} of the quantized model's largest "
                f"value; at most {limit:.3g} is expected"
            )


def _check_nan(
    path: Path,
    names: Sequence[str],
    expected: Sequence[Sequence[npt.NDArray[Any]]],
    originals: Sequence[Sequence[npt.NDArray[Any]]] | None,
) -> tuple[str, ...]:
    """NaN on both sides counts as agreement, so see that it is the unquantized model's; what is to be said where it is.

    Without that model an output that is NaN everywhere is refused: nothing of it would be compared.
    """
    warnings = []
    for i, name in enumerate(names):
        found = [np.isnan(outputs[i]) for outputs in expected]
        if not any(nan.any() for nan in found):
            continue
        if originals is None:
            new = all(nan.all() for nan in found)
        else:
            new = any((nan & ~np.isnan(outputs[i])).any() for nan, outputs in zip(found, originals, strict=True))
        if new:
            raise VerificationError(
                f"output {name!r} of {path} is NaN in the quantized PyTorch model"
                + ("" if originals is None else ", and not in the unquantized one")
            )
        if originals is not None:
            count, size = sum(int(nan.sum()) for nan in found), sum(nan.size for nan in found)
            warnings.append(
                f"{count} of {size} values of output {name!r} are NaN in the unquantized model too: they were not compared"
            )
    return tuple(warnings)


def _session(path: Path, run: str, library: Path | None) -> tuple[onnxruntime.InferenceSession, float]:
    trim_freed_memory()  # opening one takes the most of a verification, and what went before left holes
    start = time.perf_counter()
    try:
        session = open_session(path, library)
    except Exception as error:
        # ONNX Runtime's exceptions share no base class but Exception.
        raise VerificationError(f"{run}: ONNX Runtime {onnxruntime.__version__} refuses {path}: {error}") from error
    return session, time.perf_counter() - start


def _uses_int8(model: onnx.ModelProto) -> bool:
    return any(
        attribute.name == "accuracy_level" and attribute.i == 4
        for node in model.graph.node
        for attribute in node.attribute
    )


def _call(model: Model, inputs: Inputs) -> list[torch.Tensor]:
    """Outputs of a PyTorch model, flattened in their order."""
    with torch.no_grad():
        result = model(**inputs)
    if isinstance(result, torch.Tensor):
        tensors: list[Any] = [result]
    else:
        tensors = list(result.values() if isinstance(result, Mapping) else result)
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """As NumPy has it, which does not have bfloat16."""
    array: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
    return array


def _in_float32(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def _feed(session: onnxruntime.InferenceSession, inputs: Inputs) -> dict[str, npt.NDArray[Any]]:
    wanted = {value.name for value in session.get_inputs()}
    return {name: _array(tensor) for name, tensor in inputs.items() if name in wanted}


def _check_in_place(
    path: Path,
    session: onnxruntime.InferenceSession,
    names: list[str],
    samples: Sequence[Inputs],
    expected: list[list[npt.NDArray[Any]]],
    limits: Mapping[str, float],
) -> None:
    """The same outputs come out where the cache is in buffers, of a file that takes them."""
    if takes_buffers(session):
        in_place = partial(run_in_place, session)
        _compare(path, "runtime, cache in place", session, names, samples, expected, limits, in_place)


def _compare(
    path: Path,
    run: str,
    session: onnxruntime.InferenceSession,
    names: list[str],
    samples: Sequence[Inputs],
    expected: list[list[npt.NDArray[Any]]],
    limits: Mapping[str, float] | None,
    call: Callable[[list[str], dict[str, npt.NDArray[Any]]], list[npt.NDArray[Any]]] | None = None,
) -> dict[str, Deviation]:
    """Deviations of a session's outputs, each checked against its limit; against that of int8 arithmetic without ``limits``.
    ``call`` runs the session in another way than its own ``run``."""
    call = call or session.run
    results: list[list[npt.NDArray[Any]]] = []
    for inputs in samples:
        try:
            results.append(call(names, _feed(session, inputs)))
        except Exception as error:
            sizes = {name: list(tensor.shape) for name, tensor in inputs.items()}
            raise VerificationError(f"{run}: {path} fails on inputs {sizes}: {error}") from error
    deviations = {}
    for i, name in enumerate(names):
        for got, wanted in zip(results, expected, strict=True):
            if got[i].shape != wanted[i].shape:
                raise VerificationError(
                    f"{run}: output {name!r} of {path} has shape {list(got[i].shape)}, "
                    f"the PyTorch model's has {list(wanted[i].shape)}"
                )
        deviation = _deviation([got[i] for got in results], [wanted[i] for wanted in expected])
        if limits is None and not deviation.rms <= INT8_TOLERANCE:
            raise VerificationError(
                f"{run}: with activations rounded to int8 output {name!r} of {path} deviates from the quantized PyTorch model by "
                f"{deviation.rms:.3g} of its root mean square, more than the {INT8_TOLERANCE:g} that rounding explains; if this "
                "model is sensitive to it, export with --accuracy fp32"
            )
        if limits is not None and not deviation.maximum <= limits[name]:
            raise VerificationError(
                f"{run}: output {name!r} of {path} deviates from the quantized PyTorch model by "
                f"{deviation.maximum:.3g} of its largest value; at most {limits[name]:.3g} is expected"
            )
        deviations[name] = deviation
    return deviations


def _deviation(got: Sequence[npt.NDArray[Any]], wanted: Sequence[npt.NDArray[Any]]) -> Deviation:
    """Worst maximum and rms over pairs of equal shape; mean cosine over all their vectors."""
    maximum = rms = 0.0
    cosines: list[npt.NDArray[np.float64]] = []
    for left, right in zip(got, wanted, strict=True):
        if not left.size:
            continue
        a, b = np.atleast_1d(left).astype(np.float64), np.atleast_1d(right).astype(np.float64)
        # Masked logits are -inf on both sides; that is agreement, and no scale to measure others by.
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        finite = np.isfinite(a) & np.isfinite(b)
        if not (same | finite).all():
            return Deviation(math.inf, math.inf, math.nan)
        a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        difference = np.abs(a - b)
        maximum = max(maximum, _ratio(difference.max(), np.abs(b).max()))
        rms = max(rms, _ratio(math.sqrt((difference**2).mean()), math.sqrt((b**2).mean())))
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        used = lengths > 0
        cosines.append(((a * b).sum(-1)[used] / lengths[used]).ravel())
    vectors = np.concatenate(cosines) if cosines else np.zeros(0)
    return Deviation(maximum, rms, float(vectors.mean()) if vectors.size else math.nan)


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return float(part / whole) if whole else math.inf


def _latencies(sessions: Mapping[str, onnxruntime.InferenceSession], inputs: Inputs, rounds: int) -> dict[str, float]:
    """Median milliseconds of a run; the sessions take turns, so that a busy machine slows all of them alike."""
    feeds = {run: _feed(session, inputs) for run, session in sessions.items()}
    times: dict[str, list[float]] = {run: [] for run in sessions}
    for round_ in range(rounds + 1):
        for run, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds[run])
            if round_:  # the first one warms up
                times[run].append(time.perf_counter() - start)
    return {run: 1000 * statistics.median(values) if values else math.nan for run, values in times.items()}
