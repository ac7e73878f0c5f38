"""The command line: ``claq-export MODEL --out model.onnx``."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from claq_export import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from .calibration.progress import ProgressReporter
    from .config import Config

COMMANDS = ("eval", "verify", "generate")
"""Words that are commands when they come first; anything else there is a model (a folder of that name: ``./eval``)."""

_MISSPELLED = 0.7
"""Likeness (difflib's ratio) from which a word that is no folder is taken for a misspelled command."""

_EXAMPLES = """\
examples:
  claq-export ./all-MiniLM-L6-v2 --out minilm/model.onnx
      4 bits a weight, calibrated on the text that comes with claq
  claq-export ./all-MiniLM-L6-v2 --out minilm/model.onnx --bits 3 --calibration sentences.txt
      3 bits, calibrated on your own text (the closer to what the model will see, the better)
  claq-export ./SmolLM2-135M --out smol/model.onnx --bits 2.5 --calibration corpus.jsonl
      2.5 true bits a weight over the whole model: columns of 2, 3 and 4 bits and outliers where they help most
  claq-export ./SmolLM2-135M --out smol/model.onnx --bits 3.1 --tune 30
      the same size, half an hour longer, closer to the original
  claq-export ./SmolLM2-135M --out smol/model.onnx --bits 3 --head-bits 4
      linears at 3 bits, the output head and the embedding that shares its codes at 4 (the default)
  claq-export ./whisper-tiny.en --out whisper/model.onnx --calibration recordings/
      encoder, first step and later steps in three files that share their data, calibrated on audio files
  claq-export ./all-MiniLM-L6-v2 --dry-run --bits 3
      what would be quantized, what not and why, and how large the result would be

other commands:
  claq-export eval ARTIFACT_OR_MODEL ...      perplexity, KL divergence, embeddings, LAMBADA: claq-export eval --help
  claq-export verify ARTIFACT --against MODEL --text FILE --max-kl 0.05
      exits with 8 when the artifact is worse than allowed, and names the worst layers: claq-export verify --help
  claq-export generate ./smol --prompt "Once upon a time"
      streams text from an exported language model: claq-export generate --help

the result is a folder that ONNX Runtime loads as it is:
  onnxruntime.InferenceSession("minilm/model.onnx")              runs everywhere, on standard operators
  options = onnxruntime.SessionOptions()
  claq_runtime.register(options)                                 pip install claq-runtime: fast, small in memory
  onnxruntime.InferenceSession("minilm/model.onnx", options)

exit status: 0 done; 2 wrong settings; 3 model unreadable; 4 model not capturable; 5 calibration data;
6 damaged artifact; 7 output not writable; 8 verification failed; 130 interrupted; 143 terminated (SIGTERM)
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``claq-export``."""
    parser = argparse.ArgumentParser(
        prog="claq-export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(
            "Quantize a PyTorch model to 2 to 4 bits a weight with CLAQ (a k-means codebook a column inside the GPTQ loop) and "
            "write it as one ONNX file.",
            100,
        ),
        epilog=_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder (config.json + safetensors) or hub id")
    parser.add_argument("--version", action="version", version=f"claq-export {__version__}")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="the .onnx file to write, for example out/model.onnx")
    output.add_argument(
        "--dry-run", action="store_true", help="print the plan and stop; nothing is calibrated or written"
    )
    output.add_argument(
        "--accuracy",
        choices=("fp32", "int8"),
        help="arithmetic of the native kernels: fp32 is exact to rounding, int8 rounds activations and is faster (default: int8 "
        "in the file, fp32 where PyTorch loads the folder)",
    )
    output.add_argument(
        "--dtype",
        default="float32",
        metavar="TYPE",
        help="type of the graph's inputs, outputs, activations and unquantized weights: float32, float16, or bfloat16, which "
        "ONNX Runtime computes in on GPUs only (default: float32, also for models stored in 16 bits)",
    )
    output.add_argument(
        "--opset",
        type=int,
        choices=(18, 23),
        default=23,
        help="ONNX operator set of text-generation models with cache: 23 has attention as one operator (ONNX Runtime 1.23 "
        "and later), 18 spells it out, slower (default: 23)",
    )
    output.add_argument(
        "--last-logits",
        action="store_true",
        help="text-generation models with cache return the logits of the last new token alone: a prompt is read faster, "
        "perplexity cannot be measured on the file (default: of all new tokens)",
    )
    output.add_argument(
        "--cache-dtype",
        choices=("float32", "float16"),
        help="key/value cache of text-generation models: float16 takes half the memory, and at long contexts much less time a "
        "token; the arithmetic stays float32 (default: as --dtype)",
    )
    output.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the file in ONNX Runtime, with and without claq-runtime, and fail if it disagrees with PyTorch (default: on)",
    )
    bits = parser.add_argument_group("quantization")
    bits.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="2, 3 or 4: the code width of all columns. A fraction from 2 to 5, such as 2.5 or 4.1: a budget of true bits a "
        "weight over the whole model, everything counted, for which columns and outliers of all layers compete (default: 4)",
    )
    bits.add_argument("--size", metavar="SIZE", help="a budget for the whole artifact instead, for example 60MB")
    bits.add_argument(
        "--embedding-bits",
        type=_table_bits,
        metavar="B",
        help="code width of embedding tables, 2, 3 or 4, or 'none' to leave them at full precision (default: 4; with a budget "
        "their columns compete like all others, and this is the least width of theirs)",
    )
    bits.add_argument(
        "--head-bits",
        type=_table_bits,
        metavar="B",
        help="the same of a language model's output head. A head tied to the embedding shares its codes: this option decides, "
        "if given, else --embedding-bits",
    )
    bits.add_argument(
        "--exact-tokens",
        type=float,
        metavar="SHARE",
        help="share of a vocabulary's rows kept at 16 bits, the most frequent tokens of the calibration data first, 0 to 0.1 "
        "(default: 0.01)",
    )
    bits.add_argument(
        "--floor",
        action="append",
        default=[],
        metavar="PATTERN=B",
        help="with a budget: at least B bits for columns of layers whose name matches (repeatable)",
    )
    bits.add_argument(
        "--importance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with a budget: weigh layers by the gradient of the model's output (default: on)",
    )
    bits.add_argument(
        "--guided",
        action=argparse.BooleanOptionalAction,
        help="weigh every calibration token by the squared gradient of the model's output at each layer, for a forward and a "
        "backward pass over all calibration data (default: on; off with --memory, torchrun, a preset or no calibration)",
    )
    bits.add_argument(
        "--tune",
        nargs="?",
        type=float,
        const=0.0,
        metavar="MINUTES",
        help="tune codebooks and scales by gradient afterwards, at the same size; at most MINUTES if given (default: off)",
    )
    bits.add_argument(
        "--preset",
        metavar="NAME",
        help="a configuration of the paper: claq-4, claq-3, claq-2.12, ... (docs/algorithm.md)",
    )
    bits.add_argument(
        "--outliers",
        type=float,
        metavar="SHARE",
        help="share of the weights kept at 16 bits, 0 to 0.1 (default: 0; not with a budget, which decides itself)",
    )
    bits.add_argument(
        "--reservation",
        choices=("fixed", "dynamic", "saliency"),
        help="how they are shared out over the columns (default: dynamic, more in the columns that need it)",
    )
    bits.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="quantize only layers whose name matches (repeatable)",
    )
    bits.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave layers alone whose name matches (repeatable)",
    )
    bits.add_argument(
        "--fuse-siblings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="quantize layers that read the same value (q/k/v, gate/up) as one (default: on)",
    )
    bits.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a switch of the algorithm, for example row_scale=none (docs/algorithm.md lists them; repeatable)",
    )
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--calibration",
        default="default",
        metavar="FILE",
        help="text (a document a line, or running text), .jsonl or .parquet; .npz: an array for each of the model's inputs, a "
        "sample a row (images, as the model's processor prepares them); of speech models an audio file or a folder of them; "
        "'default' = the English text that comes with claq; 'none' = no calibration, much worse",
    )
    data.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="calibration samples at most (default: 128; 64 for decoders guided by gradients; for encoders 512 single sentences "
        "of claq's own text)",
    )
    data.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens a sample (default: 128, for decoders 1024, or what the model takes)",
    )
    data.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="samples that run at once (default: 8, of texts at most 4,096 tokens)",
    )
    data.add_argument("--seed", type=int, default=0, help="of the draw of samples (default: 0)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--task",
        help="feature-extraction, text-classification, fill-mask, text-generation, text2text-generation, "
        "automatic-speech-recognition (Whisper), image-classification or image-feature-extraction (default: by the architecture)",
    )
    model.add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write a model that generates with a key/value cache, so that it does so token by token; an encoder-decoder becomes "
        "three files then, encoder_OUT, decoder_OUT and decoder_with_past_OUT (default: on); --no-cache: one file that sees all "
        "tokens at once",
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--work", metavar="FOLDER", help="where finished layers are kept until the export is done (default: OUT.work)"
    )
    run.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the same command goes on with an interrupted run by itself, and refuses, naming it, if something changed "
        "since; --no-resume discards what an interrupted run left",
    )
    run.add_argument(
        "--memory",
        metavar="SIZE",
        help="resident memory the run may take, for example 4GB: weights are read while calibration passes them, "
        "activations past it go to disk; what is needed is predicted first, and refused if it cannot fit",
    )
    run.add_argument(
        "--devices",
        default="cpu",
        metavar="NAMES",
        help="where calibration runs and layers are quantized, for example cuda or cuda:0,cuda:1: layers that do not depend "
        "on one another and sums over calibration tokens are spread over them (default: cpu)",
    )
    run.add_argument(
        "--report", metavar="FILE", help="write an HTML page about the run: bits, errors, column widths, codebooks"
    )
    run.add_argument("--log", metavar="FILE", help="write a JSON line for every stage and layer")
    run.add_argument("--quiet", action="store_true", help="no progress, only warnings and the result")
    run.add_argument("--verbose", action="store_true", help="log every graph pass")
    return parser


def _table_bits(text: str) -> int:
    """``"4"`` or ``"none"`` as a width, 0 for none; argparse reports what is neither."""
    return 0 if text == "none" else int(text)


def parse_overrides(entries: Sequence[str]) -> dict[str, Any]:
    """``["row_scale=none", "block=64"]`` as values of LayerSettings: numbers, true/false/none, else strings.

    Raises:
        ConfigError: an entry is not ``name=value``.
    """
    from .errors import ConfigError

    values: dict[str, Any] = {}
    for entry in entries:
        name, separator, text = entry.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set takes NAME=VALUE, got {entry!r}")
        values[name] = _parse_value(text)
    return values


def parse_size(text: str) -> int:
    """``"60MB"`` (decimal), ``"57MiB"`` or plain bytes as a number of bytes.

    Raises:
        ConfigError: it is none of these.
    """
    from .errors import ConfigError

    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in units:
        raise ConfigError(f"a size is a number and a unit, for example 60MB or 1.5GiB; got {text!r}")
    return int(float(match[1]) * units[match[2].upper()])


def parse_floors(entries: Sequence[str]) -> dict[str, int]:
    """``["*down_proj=3"]`` as patterns and widths.

    Raises:
        ConfigError: an entry is not ``pattern=width``.
    """
    from .errors import ConfigError

    floors = {}
    for entry in entries:
        pattern, _, width = entry.rpartition("=")
        if not pattern or not width.isdigit():
            raise ConfigError(f"--floor takes PATTERN=BITS, got {entry!r}")
        floors[pattern] = int(width)
    return floors


def _parse_value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run_export(options: argparse.Namespace) -> None:
    """Do what the parsed command line says.

    Raises:
        ClaqError: see :mod:`claq_export.errors`.
    """
    from rich.console import Console

    from .api import export
    from .calibration.peers import is_one_of_several
    from .calibration.progress import ProgressReporter
    from .errors import ConfigError
    from .preflight import check_settings
    from .process_memory import return_freed_memory
    from .run_paths import check_paths
    from .standard_output import to_standard_output
    from .summary import print_result, print_tip

    if options.out is None and not options.dry_run:
        raise ConfigError("--out FILE is needed (or --dry-run)")
    if options.out is not None and not options.out.endswith(".onnx"):
        raise ConfigError(f"--out names an .onnx file, got {options.out!r}")
    config = _config(options)
    memory = None if options.memory is None else parse_size(options.memory)
    check_settings(config, memory=memory, report=options.report)
    work = options.work or (None if options.out is None else f"{options.out}.work")
    paths = {"out": options.out, "report": options.report, "log": options.log, "work": work}
    check_paths(**paths, calibration=config.calibration, model=options.model)
    # Piped output has no width of its own; names of layers should not be broken at 80 columns then.
    console = Console(width=None if sys.stdout.isatty() else 140)
    # Of several processes (torchrun) the first one speaks.
    first = not is_one_of_several() or os.environ.get("RANK", "0") == "0"
    with ProgressReporter(quiet=options.quiet or not first, log_path=options.log if first else None) as reporter:
        if options.dry_run:
            _dry_run(options, config, reporter, console)
            return
        return_freed_memory()  # of this process, which is all claq's
        result = export(
            options.model,
            out=options.out,
            config=config,
            task=options.task,
            cache=options.cache,
            trust_remote_code=options.trust_remote_code,
            verify=options.verify,
            memory=memory,
            work=work,
            resume=options.resume,
            report=options.report,
            reporter=reporter,
        )
        reporter.event("result", true_bits=result.true_bits, artifact_bytes=result.artifact_bytes)
    if first:
        with to_standard_output():
            print_result(console, result)
            if memory is None and not is_one_of_several():
                print_tip(console, config, result)


def _config(options: argparse.Namespace) -> Config:
    """The settings that the parsed command line gives.

    Raises:
        ConfigError: a value is out of range, or two options contradict each other.
    """
    from .config import EXACT_TOKENS, Config
    from .errors import ConfigError

    if options.preset is not None:
        if options.bits is not None or options.size is not None:
            raise ConfigError("--preset sets the bits; give it without --bits and --size")
        if options.outliers is not None or options.reservation is not None:
            raise ConfigError("--preset sets the outliers; give it without --outliers and --reservation")
    if options.bits is not None and options.size is not None:
        raise ConfigError("--bits and --size are two ways to set one budget; give one")
    return Config(
        bits=4.0 if options.bits is None else options.bits,
        size=None if options.size is None else parse_size(options.size),
        floors=parse_floors(options.floor),
        importance=options.importance,
        guided=options.guided,
        tune=options.tune,
        embedding_bits=options.embedding_bits,
        head_bits=options.head_bits,
        exact_tokens=EXACT_TOKENS if options.exact_tokens is None else options.exact_tokens,
        preset=options.preset,
        outliers=0.0 if options.outliers is None else options.outliers,
        reservation=options.reservation or "dynamic",
        calibration=options.calibration,
        samples=options.samples,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        seed=options.seed,
        include=tuple(options.include),
        exclude=tuple(options.exclude),
        fuse_siblings=options.fuse_siblings,
        accuracy=options.accuracy,
        opset=options.opset,
        last_logits=options.last_logits,
        cache_dtype=options.cache_dtype,
        dtype=options.dtype,
        devices=tuple(name.strip() for name in options.devices.split(",")),
        algorithm=parse_overrides(options.set),
    )


def _dry_run(options: argparse.Namespace, config: Config, reporter: ProgressReporter, console: Console) -> None:
    """Print the plan, or refuse what the run itself would refuse as far as that is known without calibration.

    Raises:
        ClaqError: see :mod:`claq_export.errors`.
    """
    from .api import capture, check_plan
    from .compiler import Compilation
    from .config import check_for_cache
    from .run_paths import check_could_be_written
    from .standard_output import to_standard_output
    from .summary import print_plan

    check_could_be_written(options.out, options.report)
    captured, _ = capture(options.model, task=options.task, trust_remote_code=options.trust_remote_code)
    check_for_cache(config, options.cache and captured.task == "text-generation")
    compilation = Compilation(captured, config, reporter)
    check_plan(compilation)
    layers = compilation.predicted_layers()
    with to_standard_output():
        print_plan(console, layers, compilation.plan.skipped)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line; ``run`` is the function that does what it says."""
    if argv and argv[0] in COMMANDS:
        from .evaluation.command import add_eval_command
        from .evaluation.guard_command import add_verify_command
        from .generate_command import add_generate_command

        parser = argparse.ArgumentParser(prog="claq-export")
        parser.set_defaults(verbose=False)
        subparsers = parser.add_subparsers()
        add_eval_command(subparsers)
        add_verify_command(subparsers)
        add_generate_command(subparsers)
        return parser.parse_args(argv)
    parser = build_parser()
    parser.set_defaults(run=run_export)
    word = argv[0] if argv and not argv[0].startswith("-") else ""
    meant = difflib.get_close_matches(word, COMMANDS, 1, _MISSPELLED)
    if meant and not os.path.exists(word):
        # Before argparse complains of the command's own arguments, or the hub is asked for a model of that name.
        parser.error(f"there is no command and no folder {word!r}; did you mean {meant[0]!r}?")
    return parser.parse_args(argv)


def _printable(message: str) -> str:
    """A message that may quote names from a hostile file: a terminal must not take them for its own control sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in message)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``claq-export``; returns the exit status."""
    from .errors import ClaqError

    goes_on = False
    with _stopped_in_order() as signals:
        try:
            options = parse(sys.argv[1:] if argv is None else argv)
            goes_on = options.run is run_export and not options.dry_run
            level = logging.INFO if options.verbose else logging.ERROR
            logging.basicConfig(level=level, format="%(name)s: %(message)s")
            options.run(options)
        except KeyboardInterrupt:
            return _tell_stopped(signals, goes_on)
        except Exception as error:
            # An interruption while a library is imported can come out of it as any other error.
            if signals:
                return _tell_stopped(signals, goes_on)
            if not isinstance(error, ClaqError):
                raise
            print(f"claq-export: {_printable(str(error))}", file=sys.stderr)
            return error.exit_code
    return 0


def _tell_stopped(signals: Sequence[int], goes_on: bool) -> int:
    number = signals[0] if signals else signal.SIGINT
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    hint = "; the same command goes on where it stopped" if goes_on else ""
    print(f"claq-export: {word}{hint}", file=sys.stderr)
    return 128 + number


@contextmanager
def _stopped_in_order() -> Iterator[list[int]]:
    """Inside the block SIGTERM ends a run as Ctrl-C does, so that temporary files are removed; a second one ends it at once.

    Yields a list, to which a signal is added when it comes. Signals that were ignored stay so, and in a thread other than the
    main one all are left alone.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    usual: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    usual = {number: handler for number, handler in usual.items() if signal.getsignal(number) == handler}

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, usual[number])
        raise KeyboardInterrupt

    for number in usual:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
