"""Recordings of speech as a model's inputs: audio files to log-mel spectra, as the model's feature extractor makes them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..capture.tasks import SPECTRUM
from ..errors import CalibrationError
from .data import Batch

AUDIO = (".wav", ".flac", ".ogg", ".mp3")
"""Endings of audio files that are looked for in a folder."""

_SECONDS_READ = 3600
"""Of a file at most."""


def is_speech(source: str | Path) -> bool:
    """Whether calibration data of that name are recordings: a folder, or an audio file."""
    path = Path(source)
    return path.suffix.lower() in AUDIO or path.is_dir()


def read_speech(
    source: str | Path, model: Path | None, mel_bins: int, samples: int | None, seed: int = 0
) -> list[Batch]:
    """Spectra of recordings, one dictionary a sample: ``input_features [1, mel bins, frames]``.

    A recording longer than the model hears at once is cut; of more pieces than ``samples`` some are drawn at random.

    Args:
        source: an audio file, or a folder whose audio files are read, in the order of their names.
        model: folder of the model, which may hold the settings of its feature extractor.
        mel_bins: what the model hears where it does not.
        samples: how many at most; None = all.
        seed: of the draw.

    Raises:
        CalibrationError: there is no audio file, the package that reads them is missing, one cannot be read, or has another
            sampling rate than the model hears.
    """
    path = Path(source)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO) if path.is_dir() else [path]
    if not files:
        raise CalibrationError(f"folder {str(path)!r} holds no audio file ({', '.join(AUDIO)})")
    extractor = _feature_extractor(model, mel_bins)
    length = int(extractor.n_samples)
    pieces: list[npt.NDArray[np.float32]] = []
    for file in files:
        sound = _read(file, int(extractor.sampling_rate))
        pieces += [sound[start : start + length] for start in range(0, len(sound), length)]
    chosen = sorted(
        random.Random(seed).sample(range(len(pieces)), len(pieces) if samples is None else min(samples, len(pieces)))
    )
    batches = []
    for index in chosen:
        features = extractor(pieces[index], sampling_rate=extractor.sampling_rate, return_tensors="np")[SPECTRUM]
        batches.append({SPECTRUM: torch.from_numpy(np.asarray(features, np.float32))})
    return batches


def _feature_extractor(folder: Path | None, mel_bins: int) -> Any:
    """That of the model's folder; Whisper's own where the folder has none."""
    from transformers import WhisperFeatureExtractor

    if folder is not None and any(
        (folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        try:
            return WhisperFeatureExtractor.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise CalibrationError(f"the feature extractor in {str(folder)!r} cannot be loaded: {error}") from error
    return WhisperFeatureExtractor(feature_size=mel_bins)


def _read(path: Path, rate: int) -> npt.NDArray[np.float32]:
    """One channel of a file, float32 ``[samples]``."""
    try:
        import soundfile
    except ImportError as error:
        raise CalibrationError(
            f"reading {str(path)!r} needs the package soundfile (pip install soundfile); a .npz file of {SPECTRUM!r} does not"
        ) from error
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate != rate:
                raise CalibrationError(
                    f"{str(path)!r} has {file.samplerate} samples a second, the model hears {rate}; convert it, for example with "
                    f"ffmpeg -i {path.name} -ar {rate} -ac 1 out.wav"
                )
            sound = file.read(_SECONDS_READ * rate, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise CalibrationError(f"audio file {str(path)!r} cannot be read: {error}") from error
    if not len(sound):
        raise CalibrationError(f"audio file {str(path)!r} is empty")
    return np.ascontiguousarray(sound.mean(1), np.float32)
