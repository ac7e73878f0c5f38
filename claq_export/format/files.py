"""Writing several files as one step: complete files under their names, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import OutputError


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


class StagedFiles:
    """Files of one folder that appear together once all of them are complete.

    Each file is written under a temporary name in the same folder; leaving the ``with`` block flushes all of them to
    disk and renames them in the order they were opened, so open the file that refers to the others last. When the
    block raises, the temporary files are removed and files of an earlier run stay as they were.

    Raises:
        OutputError: the folder is missing or not writable, a target is a folder, or the disk is full.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._staged: list[tuple[Path, Path, BinaryIO]] = []

    def __enter__(self) -> StagedFiles:
        if not self._folder.is_dir():
            raise OutputError(f"cannot write into {self._folder}: no such folder")
        return self

    def open(self, name: str) -> BinaryIO:
        """Open a new file ``name`` of the folder for writing in binary mode."""
        target = self._folder / name
        if target.is_dir():
            raise OutputError(f"cannot write {target}: it is a folder")
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        with _as_output_error(target):
            # Not tempfile: its files are readable by their owner alone, whatever the umask says.
            handle = open(temporary, "xb")  # noqa: SIM115 - closed by __exit__
        self._staged.append((temporary, target, handle))
        return handle

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file ``name``."""
        handle = self.open(name)
        with _as_output_error(self._folder / name):
            handle.write(content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        renamed = 0
        try:
            if kind is None:
                for _, target, handle in self._staged:
                    with _as_output_error(target):
                        handle.flush()
                        os.fsync(handle.fileno())
                for temporary, target, handle in self._staged:
                    with _as_output_error(target):
                        handle.close()
                        os.replace(temporary, target)
                    renamed += 1
                self._flush_folder()
        finally:
            for temporary, _, handle in self._staged[renamed:]:
                # Closing flushes, which fails again on the full disk that brought us here.
                with suppress(OSError):
                    handle.close()
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write into {self._folder}: {error.strerror or error}") from error

    def _flush_folder(self) -> None:
        """Make the renames themselves durable, where the platform can."""
        if hasattr(os, "O_DIRECTORY"):
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
