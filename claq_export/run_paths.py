"""Paths of a run that must not meet: what would overwrite its own input or result is refused before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .config import DEFAULT_CALIBRATION, NO_CALIBRATION
from .emit.artifact import DATA_NAME_LONGER
from .emit.companions import is_written_beside
from .emit.staging import remove_orphans
from .errors import CalibrationError, ConfigError, OutputError
from .format.files import check_names, check_writable, nearest_folder

_NOT_A_MODELS = (".html", ".htm", ".jsonl", ".log")
"""Endings of files that may be overwritten in a model's folder: an earlier run's report or log."""


def check_paths(
    *,
    out: str | Path | None = None,
    report: str | Path | None = None,
    log: str | Path | None = None,
    work: str | Path | None = None,
    calibration: object = None,
    model: object = None,
) -> None:
    """Refuse paths of one run of which one would destroy another. Nothing is made or opened.

    Args:
        out, report, log: files that will be written.
        work: the folder of finished layers, in which claq deletes its files in the end.
        calibration: a file; anything that is no path is ignored.
        model: a folder; anything that is no path is ignored.

    Raises:
        ConfigError: two of them meet; the message names both.
        CalibrationError: the calibration file does not exist.
    """
    written = {
        name: Path(path)
        for name, path in (("--out", out), ("--report", report), ("--log", log))
        if path is not None and not _is_device(Path(path))
    }
    read = _calibration_file(calibration)
    for name, path in written.items():
        for other, second in written.items():
            if name < other and _same(path, second):
                raise ConfigError(f"{name} and {other} are both {str(path)!r}; one would overwrite the other")
        if read is not None and _same(path, read):
            raise ConfigError(f"{name} {str(path)!r} is the calibration file; it would be overwritten")
    artifact = written.pop("--out", None)
    for name, path in written.items():
        if artifact is not None and _is_of_artifact(path, artifact):
            raise ConfigError(f"{name} {str(path)!r} is a file of the artifact {str(artifact)!r}; name another")
        if isinstance(model, str | Path) and _is_of_model(path, Path(model)):
            raise ConfigError(f"{name} {str(path)!r} is a file of the model's folder; it would be overwritten")
    if read is not None and artifact is not None and _is_of_artifact(read, artifact):
        raise ConfigError(f"the calibration file {str(read)!r} would be overwritten by the artifact {str(artifact)!r}")
    if work is not None:
        inside: dict[str, Path | None] = {"--out": artifact, **written, "--calibration": read}
        if isinstance(model, str | Path) and os.path.isdir(folder := Path(model).expanduser()):
            inside["the model"] = folder
        _check_work(Path(work), inside)


def _check_work(work: Path, others: Mapping[str, Path | None]) -> None:
    folder = work.resolve()
    for name, path in others.items():
        if path is None:
            continue
        place = path.resolve()
        if folder == place or folder in place.parents:
            raise ConfigError(
                f"claq deletes its files in --work {str(work)!r} when the export is done, and {name} {str(path)!r} lies in it; "
                "name a folder of its own"
            )


def check_targets(out: Path, report: str | Path | None) -> None:
    """Make the folders of what will be written, and see that files can be made in them.

    What killed exports to ``out`` left beside it is removed, so that it does not count as used when disk is predicted.

    Raises:
        OutputError: they cannot.
    """
    check_writable(out, longer=DATA_NAME_LONGER)
    try:
        remove_orphans(out)
    except OSError as error:
        raise OutputError(f"output folder {str(out.parent)!r} cannot be read: {error.strerror or error}") from error
    if report is not None:
        check_writable(Path(report), "--report", "report.html")


def check_could_be_written(out: str | Path | None, report: str | Path | None) -> None:
    """The same for a dry run, which makes no folder and needs neither file.

    Raises:
        OutputError: a file of that name could not be made, as far as can be told without trying.
    """
    for option, name, longer in (("--out", out, DATA_NAME_LONGER), ("--report", report, 0)):
        if name is None:
            continue
        path = Path(name)
        check_names(path, option, longer)
        if path.is_dir():
            raise OutputError(f"{str(path)!r} is a folder; {option} names the file to write")
        folder = nearest_folder(path)
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{option}: output folder {str(path.parent)!r} is not writable")


def _calibration_file(calibration: object) -> Path | None:
    """The file, or the folder of recordings, that calibration data are read from, if that is what the setting names.

    Raises:
        CalibrationError: it does not exist.
    """
    if not isinstance(calibration, str | Path) or str(calibration) in (DEFAULT_CALIBRATION, NO_CALIBRATION):
        return None
    path = Path(calibration)
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise CalibrationError(f"calibration file {str(path)!r} does not exist or is not a file")
    return path


def _is_device(path: Path) -> bool:
    """Whether this is ``/dev/null``, a pipe or the like, which several may write to."""
    # Path's own methods raise where a name is too long, which is refused later, by the option that gave it.
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (os.path.exists(a) and os.path.exists(b) and a.samefile(b))


def _is_of_artifact(path: Path, artifact: Path) -> bool:
    """Whether an export to ``artifact`` writes a file of this name."""
    place, folder = path.resolve(), artifact.resolve().parent
    return folder in place.parents and is_written_beside(place.relative_to(folder).as_posix(), artifact)


def _is_of_model(path: Path, model: Path) -> bool:
    """Whether this is a file of the model's folder, which a run only reads."""
    folder = model.expanduser()
    if not os.path.isdir(folder) or not os.path.isfile(path) or path.suffix.lower() in _NOT_A_MODELS:
        return False
    return folder.resolve() in path.resolve().parents
