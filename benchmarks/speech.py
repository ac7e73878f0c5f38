"""Whisper at 2 to 4 bits: word error rate, agreement with the original, size and speed, beside ONNX Runtime's own quantization.

    python benchmarks/speech.py FOLDER --sentences lambada_test.jsonl --work speech-work

FOLDER is a Whisper of one language (whisper-tiny.en) as transformers saves it. Recordings are spoken by espeak-ng, which must be
installed: synthetic voices, so that error rates are those of such voices. Sentences of the text that comes with claq calibrate,
sentences of `--sentences` (a `text` a line) are transcribed. `MatMulNBits` and dynamic int8 are made of the float32 files by ONNX
Runtime's tools. All systems transcribe each recording in turn, the likeliest token at each step; medians are compared.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import logging
import random
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import jiwer
import onnx
import onnxruntime
import soundfile
import torch
from cpu_matmul import cpu_name, report_name
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from scipy.signal import resample_poly
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor

import claq_export
import claq_runtime
from claq_export.api import capture
from claq_export.calibration.data import read_texts, split_sentences
from claq_export.calibration.loading import DEFAULT_TEXT
from claq_export.capture.captured import PARTS
from claq_export.compiler import emit_captured
from claq_export.emit.artifact import part_path
from claq_export.generation_seq2seq import Seq2SeqGenerator

RATE = 16_000
VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb+m4")
CALIBRATION_RECORDINGS = 64
SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z ,']{50,140}\.")


def speak(sentences: Sequence[str], folder: Path) -> None:
    """A recording a sentence, the voices in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(sentences):
        path = folder / f"{number:03}.wav"
        if path.is_file():
            continue
        command = ["espeak-ng", "-v", VOICES[number % len(VOICES)], "-s", "150", "--stdout", text]
        sound, rate = soundfile.read(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout))
        soundfile.write(path, resample_poly(sound, RATE // 50, rate // 50), RATE)


def calibration_sentences() -> list[str]:
    sentences = [text for document in read_texts(DEFAULT_TEXT) for text in split_sentences(document)]
    some = [text for text in sentences if 40 < len(text) < 200]
    random.Random(0).shuffle(some)
    return [" ".join(some[2 * i : 2 * i + 2]) for i in range(CALIBRATION_RECORDINGS)]


def test_sentences(path: Path, count: int) -> list[str]:
    found = []
    for text in read_texts(path):
        found += [match for match in SPEAKABLE.findall(text) if "''" not in match and "``" not in match]
        if len(found) >= count:
            break
    return found[:count]


def float_files(model: str, folder: Path) -> None:
    """The model as it is, in the same three graphs."""
    folder.mkdir(exist_ok=True)
    captured, _ = capture(model, cache=True)
    for graph in captured.file_graphs:
        path = part_path(folder / "model.onnx", graph.part)
        if not path.is_file():
            emit_captured(graph, path)


def peers(source: Path, nbits: Path, dynamic: Path) -> None:
    for part in PARTS:
        plain = part_path(source / "model.onnx", part)
        for folder in (nbits, dynamic):
            folder.mkdir(exist_ok=True)
        if not (dynamic / plain.name).is_file():
            quantize_dynamic(
                plain, dynamic / plain.name, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gather"]
            )
        if not (nbits / plain.name).is_file():
            quantizer = MatMulNBitsQuantizer(onnx.load(plain), block_size=32, is_symmetric=True, accuracy_level=4)
            quantizer.process()
            quantizer.model.save_model_to_file(str(nbits / plain.name), use_external_data_format=False)


def megabytes(folder: Path) -> float:
    files = [*folder.glob("*.onnx"), *folder.glob("*.data")]
    return sum(file.stat().st_size for file in files) / 1e6


def words(text: str) -> str:
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Whisper's folder, with tokenizer.json")
    parser.add_argument("--sentences", required=True, type=Path, help="text to speak and transcribe")
    parser.add_argument(
        "--work", required=True, type=Path, help="folder for recordings and artifacts, used again if it is there"
    )
    parser.add_argument("--count", type=int, default=100, help="recordings to transcribe")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.1, 3.0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report, or -")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    work: Path = options.work
    speak(calibration_sentences(), work / "calibration")
    texts = test_sentences(options.sentences, options.count)
    speak(texts, work / "test")
    float_files(options.model, work / "float32")
    peers(work / "float32", work / "nbits", work / "int8")
    folders = {
        "float32": (work / "float32", None),
        "ONNX Runtime, dynamic int8": (work / "int8", None),
        "ONNX Runtime, `MatMulNBits` 4 bits": (work / "nbits", None),
    }
    for bits in options.bits:
        target = work / f"claq-{bits:g}"
        if not (target / "claq.json").is_file():
            config = claq_export.Config(bits=bits, calibration=work / "calibration")
            claq_export.export(options.model, out=target / "model.onnx", config=config)
        folders[f"claq, `--bits {bits:g}`"] = (target, Path(claq_runtime.library_path()))
    systems = {name: Seq2SeqGenerator(folder, library, options.threads) for name, (folder, library) in folders.items()}
    extractor = WhisperFeatureExtractor()
    tokenizer = Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))
    config = json.loads((Path(options.model) / "config.json").read_text())
    found: dict[str, list[list[int]]] = {name: [] for name in systems}
    first: dict[str, list[float]] = {name: [] for name in systems}
    rate: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(len(texts)):
        sound, _ = soundfile.read(work / "test" / f"{number:03}.wav", dtype="float32")
        spectrum = extractor(sound, sampling_rate=RATE, return_tensors="np")["input_features"]
        for name, system in systems.items():
            drawn = system.tokens(
                {"input_features": spectrum}, [config["decoder_start_token_id"]], 96, stop=[config["eos_token_id"]]
            )
            found[name].append(list(drawn))
            first[name].append(system.timing.prefill_seconds)
            rate[name].append(system.timing.decode_seconds / max(1, system.timing.new_tokens - 1))
    references = [words(text) for text in texts]
    rows = []
    for name, (folder, _) in folders.items():
        spoken = [words(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in found[name]]
        error = jiwer.wer(references, spoken)
        equal = sum(a == b for a, b in zip(found[name], found["float32"], strict=True))
        heard, step = statistics.median(first[name]), statistics.median(rate[name])
        rows.append(
            f"| {name} | {megabytes(folder):.1f} MB | {100 * error:.1f} % | {equal} of {len(texts)} | {heard * 1e3:.0f} ms | "
            f"{step * 1e3:.2f} ms |"
        )
    lines = [
        "# Whisper: transcription",
        "",
        f"Written by `benchmarks/speech.py` on {datetime.date.today().isoformat()}: {cpu_name()}, {options.threads} threads, "
        f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, claq-runtime {claq_runtime.__version__}. Model: "
        f"{Path(options.model).name}; {len(texts)} sentences spoken by espeak-ng, in {len(VOICES)} voices; calibrated on "
        f"{CALIBRATION_RECORDINGS} other recordings of such voices. *Equal*: recordings whose tokens are all those of float32. "
        "Times are medians, the systems in turns: the encoder with the first token, and each token after it.",
        "",
        "| | files | word error rate | equal | heard in | a token |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    print("\n".join(lines))
    if options.out != "-":
        (Path(options.out) / f"speech_{report_name()}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
