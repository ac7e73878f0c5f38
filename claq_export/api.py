"""The Python API: ``export`` a model to an artifact, or ``quantize`` it inside PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import claq_export

from .cached import check_cache, decoding_inputs
from .cached_seq2seq import check_parts, seq2seq_inputs
from .calibration.data import Batch
from .calibration.peers import Peers
from .calibration.progress import ProgressReporter
from .capture import (
    CACHED_TASK,
    TASKS,
    CapturedModel,
    TaskModel,
    capture_decoder,
    capture_module,
    capture_parts,
    let_go_of_weights,
    load_pretrained,
)
from .capture.precision import check_cache_range, check_finite, check_range, check_weights, in_dtype, inputs_in_dtype
from .capture.tasks import DECODER_TOKENS
from .compiler import Compilation, emit_captured, used_state
from .config import Config, check_for_cache
from .deferred import weight_bytes
from .emit.artifact import Artifact, part_path
from .emit.staging import StagedExport
from .errors import CaptureError, ClaqError, ConfigError, OutputError
from .file_graph import in_float32
from .format.files import scratch_folder
from .modules import ClaqEmbedding, ClaqLinear, check_replaceable, replace_linears
from .passes import Skipped
from .preflight import check as check_preflight
from .preflight import check_processes, check_settings
from .process_memory import collect_garbage, peak_resident_bytes, return_freed_memory
from .report import BudgetRecord, QualityRow, ReportData, write_report
from .run_paths import check_paths, check_targets

if TYPE_CHECKING:
    from .verify import VerificationReport

UNQUANTIZED_LIMIT = 2 << 30
"""Bytes of weights up to which the unquantized model is written to a temporary folder too, for its latency."""

_VERIFY_TEXTS = (
    "The committee will meet again on Thursday to discuss the budget for the coming year.",
    "Rain fell all night.",
    "She had never seen the sea before, and for a long while she said nothing at all, only listening to the waves.",
)


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer: its name, shape ``[out_features, in_features]``, bits, bytes and relative error; an embedding's
    vocabulary is its out_features. ``role`` and ``tied`` as in :class:`claq_export.sizing.PlannedLayer`."""

    name: str
    out_features: int
    in_features: int
    true_bits: float
    nominal_bits: float
    nbytes: int
    error: float
    seconds: float
    role: str = "linear"
    tied: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        artifact: the ONNX files.
        layers: the quantized layers in graph order.
        skipped: weights left alone, with reasons.
        true_bits, nominal_bits: a weight, over all quantized layers.
        original_bytes: of the model's weights as they were loaded.
        artifact_bytes: of ``model.onnx`` and its data.
        seconds: by stage.
        quantization_seconds: where those of the quantization went: forward passes, Hessians, Cholesky factors, k-means, ...
        verifications: by model file; none when verification was switched off.
    """

    artifact: Artifact
    layers: tuple[LayerSummary, ...]
    skipped: tuple[Skipped, ...]
    true_bits: float
    nominal_bits: float
    original_bytes: int
    artifact_bytes: int
    seconds: Mapping[str, float]
    quantization_seconds: Mapping[str, float]
    verifications: Mapping[Path, VerificationReport]

    @property
    def verification(self) -> VerificationReport | None:
        """Of the first model file; None when verification was switched off."""
        return next(iter(self.verifications.values()), None)


def capture(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    task: str | None = None,
    tokenizer: Any = None,
    cache: bool = False,
    trust_remote_code: bool = False,
    lazy: bool = False,
    reread: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[CapturedModel, nn.Module]:
    """A model as a graph, and the module it came from.

    Args:
        model: a module (``example_inputs`` needed), or a Hugging Face folder or hub id.
        example_inputs, dynamic_shapes, input_names, output_names: of a module, see
            :func:`claq_export.capture.capture_module`. A folder has those of its task, batch and sequence (of tokens) dynamic.
        task: of a folder, where it cannot be inferred.
        tokenizer: for text calibration of a module given in Python.
        cache: of a folder with a causal language model or an encoder-decoder, capture what has a key/value cache too.
        trust_remote_code: run Python code that comes with a folder.
        lazy: leave a folder's large weights on disk until their values are needed.
        reread: load them, but let go of each after the capture that its file gives again when it is needed.
        dtype: of the graph that goes into the file; the model itself is captured in float32, whatever its own is.

    Raises:
        ModelError, CaptureError, ConfigError: see :mod:`claq_export.errors`.
    """
    if isinstance(model, nn.Module):
        return _capture_given(model, example_inputs, dynamic_shapes, input_names, output_names, tokenizer, dtype)
    if not isinstance(model, str | Path):
        raise ConfigError(f"the model must be an nn.Module, a folder or a hub id, got {type(model).__name__}")
    _refuse_for_folder(
        example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, input_names=input_names, output_names=output_names
    )
    loaded, found_tokenizer, _ = load_pretrained(model, task, trust_remote_code=trust_remote_code, lazy=lazy)
    captured = capture_module(loaded, dynamic_shapes=loaded.dynamic_axes)
    captured.tokenizer = tokenizer if tokenizer is not None else found_tokenizer
    cached = cache and TASKS[loaded.task].generates
    other = loaded
    if dtype != torch.float32:
        check_range(loaded.model, dtype)
        if reread:
            let_go_of_weights(loaded, [captured.graph_module])
        # As people load it in this dtype: transformers keeps what must stay in float32.
        other, _, _ = load_pretrained(model, task, dtype, trust_remote_code=trust_remote_code, lazy=lazy)
    if cached or dtype != torch.float32:
        example = inputs_in_dtype(other.example_inputs(), dtype)
        graphs = _capture_cached(other) if cached else (capture_module(other, example, other.dynamic_axes),)
        for graph in graphs:
            graph.tokenizer = captured.tokenizer
        captured.file_graphs = graphs
    if reread:
        let_go_of_weights(other, [graph.graph_module for graph in captured.graphs])
    return captured, loaded.model


def _capture_cached(model: TaskModel) -> tuple[CapturedModel, ...]:
    """What has a key/value cache: one graph, or those of an encoder-decoder."""
    return capture_parts(model) if TASKS[model.task].seq2seq else (capture_decoder(model),)


def _refuse_for_folder(**arguments: Any) -> None:
    """What only a module given in Python has a use for: the second argument of all may have been meant to be ``out``."""
    for name, value in arguments.items():
        if value is not None:
            hint = f"; did you mean out={str(value)!r}?" if isinstance(value, str | Path) else ""
            raise ConfigError(f"{name} is for a module given in Python; a folder has the inputs of its task{hint}")


def _capture_given(
    model: nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    tokenizer: Any,
    dtype: torch.dtype,
) -> tuple[CapturedModel, nn.Module]:
    """:func:`capture` of a module given in Python."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__}: torch.export cannot capture a TorchScript module; give the module it was made of"
        )
    check_weights(model, type(model).__name__)
    base = in_dtype(model, torch.float32)
    if example_inputs is None and isinstance(base, TaskModel):
        example_inputs = base.example_inputs()
    graphs = []
    for kind in dict.fromkeys((torch.float32, dtype)):
        if kind != torch.float32:
            check_range(base, kind)
        graph = capture_module(
            base if kind == torch.float32 else in_dtype(base, kind),
            inputs_in_dtype(example_inputs, kind),
            dynamic_shapes,
            input_names,
            output_names,
        )
        graph.tokenizer = tokenizer
        graphs.append(graph)
    captured = graphs[0]
    captured.file_graphs = tuple(graphs[1:])
    return captured, base


def export(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    out: str | Path = "model.onnx",
    config: Config | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    task: str | None = None,
    tokenizer: Any = None,
    cache: bool = True,
    trust_remote_code: bool = False,
    verify: bool = True,
    memory: int | None = None,
    work: str | Path | None = None,
    resume: bool | None = None,
    report: str | Path | None = None,
    reporter: ProgressReporter | None = None,
) -> ExportResult:
    """Quantize a model and write it as one ONNX file that runs with and without claq's runtime.

    Writes ``out``, ``<out>.<digest>.data``, ``claq.safetensors`` and ``claq.json`` into the folder of ``out``, and copies the
    configuration and tokenizer of a Hugging Face folder beside them. They appear there once all of them are written and
    verified; those of an earlier artifact stay as they were until then, and what the new one does not have goes with it.

    Args:
        model, example_inputs, dynamic_shapes, input_names, output_names, task, tokenizer, trust_remote_code: see
            :func:`capture`.
        out: the ``.onnx`` file.
        config: the settings; 4 bits by default.
        cache: write a folder's causal language model with a key/value cache, prefill and decode in one graph; an
            encoder-decoder as three files beside ``out``, ``encoder_<out>``, ``decoder_<out>`` (the first step) and
            ``decoder_with_past_<out>``. False: as a graph that sees all tokens at once.
        verify: compare the written file, run by ONNX Runtime, with the PyTorch quantized model, before it takes its place.
        memory: bytes of resident memory the run may take. Weights are then read from the folder's files while the
            calibration passes them, activations past the budget go to disk, and a run that cannot fit is refused with
            numbers before it begins. The artifact is compared with the finished layers byte by byte instead of being
            run. None = everything is in memory.
        work: folder for finished layers; an interrupted run with the same model, data and settings goes on from it.
            Claq deletes its files there when the export is complete, and the folder if nothing else is in it.
            None = keep nothing.
        resume: False: discard what an interrupted run left in ``work``; otherwise go on with it, and refuse a folder of
            another model, data, settings or version by naming what changed.
        report: write a self-contained HTML page about the run to this file.
        reporter: told of stages and layers; silent by default.

    Raises:
        ClaqError: see :mod:`claq_export.errors`; nothing half-written is left behind.
    """
    out = Path(out)
    config = config or Config()
    reporter = reporter or ProgressReporter(quiet=True)
    check_settings(config, memory=memory, report=report)
    if memory is not None:
        work = work or f"{out}.work"
    check_paths(out=out, report=report, work=work, calibration=config.calibration, model=model)
    check_targets(out, report)
    peers = Peers.from_environment()
    if peers.size > 1:
        check_processes(config, memory)
    if memory is not None:
        return_freed_memory()
    reporter.stage("capturing the model")
    start = time.perf_counter()
    captured, module = capture(
        model,
        example_inputs,
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
        task=task,
        tokenizer=tokenizer,
        cache=cache,
        trust_remote_code=trust_remote_code,
        lazy=memory is not None,
        reread=memory is None and report is None and config.tune is None,
        dtype=config.torch_dtype,
    )
    compilation = Compilation(captured, config, reporter, used_state(module, captured), keep_records=report is not None)
    check_for_cache(config, compilation.emitted[0].task == CACHED_TASK)
    compilation.memory, compilation.scratch = memory, out.parent
    compilation.peers = peers
    verify = verify and peers.rank == 0
    if memory is not None:
        verify = False
    compilation.keep_unfused = verify and not compilation.cached
    compilation.seconds["capture"] = time.perf_counter() - start
    original_bytes = weight_bytes(module)
    quantized = _quantized_already(module)
    del module
    collect_garbage()

    check_plan(compilation, quantized)
    reporter.stage("reading calibration data")
    compilation.batches()
    if memory is not None:
        preflight = compilation.preflight()
        reporter.stage(str(preflight), predicted=preflight.to_json())
        check_preflight(preflight, memory, out, None if work is None else Path(work))
    with ExitStack() as until_the_end:
        checks: list[_Check] = []
        if verify:
            checks = _checks(compilation)
            if original_bytes <= UNQUANTIZED_LIMIT:
                _emit_originals(compilation, checks, until_the_end)
        collect_garbage()
        reporter.stage(f"quantizing {len(compilation.plan.sites)} layers")
        try:
            compilation.quantize(Path(work) if work is not None else None, resume)
            collect_garbage()
            reporter.stage(f"writing {out}")
            artifact = None
            verifications: dict[Path, VerificationReport] = {}
            if peers.rank == 0:
                with _failure_told(peers), StagedExport(out) as staged:
                    artifact = compilation.emit(staged.path, out.parent)
                    if verify:
                        reports = _verified(compilation, staged.path, checks)
                        verifications = {
                            out.parent / name: replace(report, path=out.parent / name)
                            for name, report in reports.items()
                        }
                    if memory is not None:
                        _compare_with_layers(compilation, artifact)
                    artifact = staged.publish(artifact)
            artifact = _told(peers, artifact)
        except BaseException:
            # A notebook keeps the traceback, and with it the lock on the folder that the next try goes on with.
            if compilation.store is not None:
                compilation.store.close()
            raise
    if memory is not None:
        reporter.event("memory", peak_bytes=peak_resident_bytes())
    if work is not None and compilation.store is not None:
        compilation.store.remove()
    result = ExportResult(
        artifact=artifact,
        layers=tuple(_summary(compilation)),
        skipped=tuple(compilation.plan.skipped),
        true_bits=compilation.true_bits,
        nominal_bits=compilation.nominal_bits,
        original_bytes=original_bytes,
        artifact_bytes=artifact.bytes,
        seconds=dict(compilation.seconds),
        quantization_seconds=dict(compilation.quantization_seconds),
        verifications=verifications,
    )
    if report is not None and peers.rank == 0:
        write_report(report, _report_data(compilation, result))
    return result


def quantize(
    model: nn.Module,
    example_inputs: Any,
    config: Config | None = None,
    *,
    dynamic_shapes: Any = None,
    tokenizer: Any = None,
    reporter: ProgressReporter | None = None,
) -> nn.Module:
    """Quantize the linear modules of a model in place.

    Args:
        model: its ``nn.Linear`` and transformers ``Conv1D`` modules become :class:`claq_export.modules.ClaqLinear`.
        example_inputs, dynamic_shapes, tokenizer: see :func:`capture`.
        config: the settings; 4 bits by default.
        reporter: told of stages and layers; silent by default.

    Returns:
        ``model``.

    Raises:
        ClaqError: see :mod:`claq_export.errors`; the model is unchanged then.
    """
    config = config or Config()
    if config.dtype != "float32":
        raise ConfigError(
            f"dtype={config.dtype!r} is that of an exported graph; cast the module itself (module.half())"
        )
    check_replaceable(model)
    # The module's own tensors, in its own dtype, since it is changed in place.
    captured = capture_module(model, example_inputs, dynamic_shapes)
    captured.tokenizer = tokenizer
    compilation = Compilation(captured, config, reporter or ProgressReporter(quiet=True))
    check_plan(compilation, _quantized_already(model))
    compilation.quantize()
    layers = {name: done.layer for name, done in compilation.sites.items()}
    replace_linears(
        model.model if isinstance(model, TaskModel) else model,  # layers are named as in the model inside
        layers,
        parts={name: done.site.parts for name, done in compilation.sites.items()},
        accuracy_levels=dict.fromkeys(layers, config.torch_accuracy_level),
        transposed=compilation.transposed,
        tied=compilation.tied,
    )
    return model


def _quantized_already(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, ClaqLinear | ClaqEmbedding)]


def check_plan(compilation: Compilation, quantized: Sequence[str] = ()) -> None:
    """Refuse a model without a layer to quantize, and what no calibration can make of the plan.

    Args:
        compilation: of the model.
        quantized: modules of it that are quantized already.

    Raises:
        ConfigError: there is no layer (the message gives reasons), a floor is for a layer that is not there, the budget is
            less than the narrowest columns take.
    """
    if compilation.plan.sites:
        if compilation.config.budgeted:
            compilation.predicted_layers()
        return
    reasons = "; ".join(f"{skipped.name}: {skipped.reason}" for skipped in compilation.plan.skipped[:5])
    if quantized:
        reasons = f"{', '.join(quantized[:3])}: quantized already; take the model as it was before claq_export.quantize"
    raise ConfigError(f"there is no layer to quantize ({reasons or 'the model has none'})")


def verification_inputs(
    captured: CapturedModel, batches: Sequence[Batch] | None = None
) -> list[list[dict[str, torch.Tensor]]]:
    """Inputs to compare runs with, for each graph that goes into a file: the steps of a generation, or the example, as it was
    given too where capture enlarged it, and for text models a padded batch of other sizes. An encoder-decoder that hears
    gets the first of the calibration ``batches``, if there are any."""
    graph = captured.emitted[0]
    if graph.part:
        return seq2seq_inputs(captured, batches[0] if batches else None)
    if graph.cached:
        return [decoding_inputs(graph)]
    samples = [dict(graph.example_inputs)]
    if graph.given_inputs is not None:
        samples.append(dict(graph.given_inputs))
    if graph.tokenizer is not None and "input_ids" in graph.input_names and DECODER_TOKENS not in graph.input_names:
        limit = graph.max_sequence or 512
        tokenized = [graph.tokenizer(text, truncation=True, max_length=limit) for text in _VERIFY_TEXTS]
        rows = [one["input_ids"] for one in tokenized]
        samples.insert(0, graph.inputs_from_tokens(rows))
    return [samples]


@dataclass
class _Check:
    """What a written graph is compared with: sample inputs, the unquantized model's outputs for them, and its ONNX file."""

    samples: list[dict[str, torch.Tensor]]
    originals: _Recorded
    original_path: Path | None = None


def _checks(compilation: Compilation) -> list[_Check]:
    """One for each graph that goes into a file, recorded before they are rewritten."""
    samples = verification_inputs(compilation.captured, compilation.batches())
    return [
        _Check(inputs, _Recorded(graph, inputs)) for graph, inputs in zip(compilation.emitted, samples, strict=True)
    ]


class _Recorded:
    """The unquantized model's outputs for some inputs, recorded before its graph is rewritten."""

    def __init__(self, captured: CapturedModel, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._outputs = {self._key(inputs): captured.run(inputs) for inputs in samples}
        for inputs, outputs in zip(samples, self._outputs.values(), strict=True):
            if captured.dtype != torch.float32:
                check_finite(captured, outputs, dict(inputs))
            elif captured.cache_dtype != torch.float32:
                check_cache_range(captured, outputs)

    @staticmethod
    def _key(inputs: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        return tuple(id(tensor) for tensor in inputs.values())

    def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._outputs[self._key(inputs)]


def _emit_originals(compilation: Compilation, checks: Sequence[_Check], stack: ExitStack) -> None:
    """Write the unquantized model as ONNX into a folder that ends with ``stack``.

    Only a latency is measured with it: a warning where it cannot be written.
    """
    try:
        folder = stack.enter_context(scratch_folder())
        with compilation.timed("emission"):
            for graph, check in zip(compilation.emitted, checks, strict=True):
                path = part_path(folder / "original.onnx", graph.part)
                emit_captured(graph, path)
                check.original_path = path
    except (OSError, OutputError) as error:
        compilation.reporter.warn(f"the latency of the unquantized model will not be measured: {error}")


def _verified(compilation: Compilation, out: Path, checks: Sequence[_Check]) -> dict[str, VerificationReport]:
    """The report on each model file of an artifact that was written as ``out``, by its name; the reporter is told their warnings.

    Raises:
        VerificationError: one does not compute what the quantized PyTorch model computes.
    """
    from .verify import verify_artifact

    collect_garbage()
    captured, emitted = compilation.captured, compilation.emitted
    compilation.reporter.stage("verifying the artifact in ONNX Runtime")
    reports = {}
    with compilation.timed("verification"):
        exact = [graph if graph.cache_dtype == torch.float32 else in_float32(graph, captured) for graph in emitted]
        if compilation.cached:
            # With the graph without cache, in which nothing is fused.
            _check_cache(captured, exact, [check.samples for check in checks])
            collect_garbage()
        for graph, wide, check, before in zip(emitted, exact, checks, compilation.unfused, strict=True):
            unfused = None if compilation.cached else before
            if unfused is not None and wide is not graph:
                unfused = in_float32(unfused, captured)
            path = part_path(out, graph.part)
            reports[path.name] = verify_artifact(
                path,
                graph.graph_module,
                check.samples,
                exact=wide.graph_module if wide is not graph else None,
                unfused=None if unfused is None else unfused.graph_module,
                file_names=graph.file_names,
                unquantized=check.originals,
                original_path=check.original_path,
            )
    for warning in dict.fromkeys(warning for report in reports.values() for warning in report.warnings):
        compilation.reporter.warn(warning)
    return reports


def _check_cache(
    whole: CapturedModel, cached: Sequence[CapturedModel], samples: Sequence[list[dict[str, torch.Tensor]]]
) -> None:
    if cached[0].part:
        check_parts(whole, cached, samples)
    else:
        check_cache(whole, cached[0], samples[0])


def _compare_with_layers(compilation: Compilation, artifact: Artifact) -> None:
    """What is done in the place of :func:`_verified` where the model does not fit into memory.

    Raises:
        VerificationError: the artifact does not hold the finished layers.
    """
    from .verify import check_stored

    compilation.reporter.stage("comparing the artifact with the finished layers")
    with compilation.timed("verification"):
        check_stored(artifact.models, {name: done.layer for name, done in compilation.sites.items()})


@contextmanager
def _failure_told(peers: Peers) -> Iterator[None]:
    """Tell the other processes, which wait in :func:`_told`, of an error of claq in the block."""
    try:
        yield
    except ClaqError as error:
        peers.tell({"error": str(error)})
        raise


def _told(peers: Peers, artifact: Artifact | None) -> Artifact:
    """The artifact that process 0 wrote, in every process.

    Raises:
        OutputError: process 0 failed, see :func:`_failure_told`.
    """
    if peers.size == 1:
        assert artifact is not None
        return artifact
    description = None
    if artifact is not None:
        description = asdict(artifact) | {"path": str(artifact.path), "files": [str(file) for file in artifact.files]}
    told = peers.tell(description)
    if "error" in told:
        raise OutputError(f"the process that writes the artifact failed: {told['error']}")
    return Artifact(
        path=Path(told["path"]),
        files=tuple(map(Path, told["files"])),
        bytes=told["bytes"],
        inputs=tuple(told["inputs"]),
        outputs=tuple(told["outputs"]),
        layers=tuple(told["layers"]),
    )


def _report_data(compilation: Compilation, result: ExportResult) -> ReportData:
    quality = []
    for path, report in result.verifications.items():
        of = f", {path.name}" if len(result.verifications) > 1 else ""
        for output, deviation in report.fidelity.items():
            quality.append(QualityRow(f"cosine of {output}{of}", "1", f"{deviation.cosine:.4f}", "verification inputs"))
            quality.append(
                QualityRow(f"relative error of {output}{of}", "0", f"{deviation.rms:.4f}", "verification inputs")
            )
        for name, label in (("stock", "ONNX Runtime alone"), ("runtime", "with claq-runtime")):
            if name in report.runs and "original" in report.runs:
                original, run = (report.runs[key].latency_ms for key in ("original", name))
                if math.isnan(run):
                    continue  # verified layer by layer
                quality.append(QualityRow(f"latency, {label}{of}", f"{original:.1f} ms", f"{run:.1f} ms"))
    if (tuning := compilation.tuning) is not None:
        remark = f"before and after {tuning.steps} updates"
        quality.append(QualityRow("loss of tuning, held out", f"{tuning.before:.4g}", f"{tuning.after:.4g}", remark))
    return ReportData(
        model=Path(compilation.captured.source.path).name,
        layers=compilation.records,
        size_before=result.original_bytes,
        size_after=result.artifact_bytes,
        config=compilation.settings(),
        quality=quality,
        seconds=sum(result.seconds.values()),
        versions={"claq": claq_export.__version__, "torch": torch.__version__},
        skipped={entry.name: entry.reason for entry in result.skipped},
        budget=_budget_record(compilation, result),
    )


def _budget_record(compilation: Compilation, result: ExportResult) -> BudgetRecord | None:
    config = compilation.config
    if not config.budgeted:
        return None
    if config.size is not None:
        return BudgetRecord(config.size, result.artifact_bytes, floors=config.floors)
    weights = sum(layer.in_features * layer.out_features for layer in result.layers)
    found = sum(layer.nbytes for layer in result.layers)
    return BudgetRecord(round(config.bits * weights / 8), found, weights, config.floors)


def _summary(compilation: Compilation) -> list[LayerSummary]:
    return [
        LayerSummary(
            name=name,
            out_features=done.layer.out_features,
            in_features=done.layer.in_features,
            true_bits=done.bits.true_bits,
            nominal_bits=done.bits.nominal_bits,
            nbytes=done.bits.nbytes,
            error=done.error,
            seconds=done.seconds,
            role=done.site.role,
            tied=bool(done.site.nodes and done.site.lookups),
        )
        for name, done in compilation.sites.items()
    ]
