"""Transcribe speech with an exported Whisper in plain ONNX Runtime: an encoder, the first step, later steps.

    claq-export ./whisper-tiny.en --out whisper/model.onnx --calibration recordings/
    python examples/transcribe.py whisper recording.wav

The recording has one channel of 16,000 samples a second and at most 30 seconds. Spectra are made by transformers' feature
extractor; the rest is NumPy. Of models of several languages the first tokens name language and task, as in
``--first "<|startoftranscript|><|de|><|transcribe|><|notimestamps|>"``.

Usage: python examples/transcribe.py FOLDER RECORDING [--first TOKENS]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import soundfile
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor

PARTS = ("encoder", "decoder", "decoder_with_past")


def open_session(model: Path) -> ort.InferenceSession:
    """A session with claq's kernels where claq-runtime is installed; without it the same file runs on standard operators."""
    options = ort.SessionOptions()
    try:
        import claq_runtime

        claq_runtime.register(options)
    except ImportError:
        print("claq-runtime is not installed: running on ONNX Runtime's standard operators", file=sys.stderr)
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, known: dict[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
    """All outputs by name; of what is known the session takes its inputs."""
    names = [value.name for value in session.get_outputs()]
    feed = {value.name: known[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run_with_ort_values(names, feed), strict=True))


def transcribe(
    sessions: list[ort.InferenceSession], spectrum: np.ndarray, first: list[int], end: int, most: int
) -> list[int]:
    """The likeliest token at each step, ``most`` at most. Keys and values of what was heard are made once, in the first step."""
    encoder, step, later = sessions
    value = ort.OrtValue.ortvalue_from_numpy
    hidden = run(encoder, {"input_features": value(spectrum)})["last_hidden_state"]
    known = {"encoder_hidden_states": hidden}
    new, found = first, []
    while len(found) < most:
        outputs = run(step, {**known, "input_ids": value(np.array([new], np.int64))})
        token = int(outputs.pop("logits").numpy()[0, -1].argmax())
        if token == end:
            break
        found.append(token)
        known |= {name.replace("present", "past_key_values"): state for name, state in outputs.items()}
        new, step = [token], later
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--first", help="tokens that the text begins after (default: the start token)")
    options = parser.parse_args()
    config = json.loads((options.folder / "config.json").read_text())
    sound, rate = soundfile.read(options.recording, dtype="float32")
    if rate != 16_000 or sound.ndim != 1:
        sys.exit(f"{options.recording} must have one channel of 16,000 samples a second")
    extractor = WhisperFeatureExtractor(feature_size=config["num_mel_bins"])
    spectrum = extractor(sound, sampling_rate=rate, return_tensors="np")["input_features"]
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    first = [config["decoder_start_token_id"]]
    if options.first:
        first = tokenizer.encode(options.first, add_special_tokens=False).ids
    sessions = [open_session(options.folder / f"{part}_model.onnx") for part in PARTS]
    most = config["max_target_positions"] - len(first)
    tokens = transcribe(sessions, spectrum, first, config["eos_token_id"], most)
    print(tokenizer.decode(tokens, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
