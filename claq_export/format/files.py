"""Writing several files as one step: complete files under their names, or nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..errors import OutputError


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _flush(path: Path, flags: int = 0) -> None:
    """Make what was written to a file, or renamed in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(path: Path) -> None:
    """Say early, before hours of work, that ``path`` cannot be written.

    Raises:
        OutputError: its folder is missing or not writable, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: no such folder")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: the folder is not writable")


class StagedFiles:
    """Files of one folder that appear together once all of them are complete.

    :meth:`stage` names a temporary file in the same folder for the caller to write. Leaving the ``with`` block flushes
    all of them to disk and renames them in the order they were staged, so stage the file that refers to the others
    last. When the block raises, the temporary files are removed and files of an earlier run stay as they were; an
    ``OSError`` raised inside the block leaves it as :class:`~claq_export.errors.OutputError`.

    Raises:
        OutputError: the folder is missing or not writable, a target is a folder, or the disk is full.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._staged: list[tuple[Path, Path, int]] = []

    def __enter__(self) -> StagedFiles:
        if not self._folder.is_dir():
            raise OutputError(f"cannot write into {self._folder}: no such folder")
        return self

    def stage(self, name: str) -> Path:
        """Path of the temporary file that becomes ``name``; it exists and is empty."""
        target = self._folder / name
        check_target(target)
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        with _as_output_error(target):
            temporary.write_bytes(b"")
        self._staged.append((temporary, target, temporary.stat().st_mode))
        return temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        renamed = 0
        try:
            if kind is None:
                for temporary, target, mode in self._staged:
                    with _as_output_error(target):
                        # Writers that make their own file (safetensors) let only its owner read it.
                        temporary.chmod(stat.S_IMODE(mode))
                        _flush(temporary)
                for temporary, target, _ in self._staged:
                    with _as_output_error(target):
                        os.replace(temporary, target)
                    renamed += 1
                with _as_output_error(self._folder):
                    _flush(self._folder, getattr(os, "O_DIRECTORY", 0))
        finally:
            for temporary, _, _ in self._staged[renamed:]:
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write into {self._folder}: {error.strerror or error}") from error
