"""Writing several files as one step: complete files under their names, or nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import OutputError

_WRITTEN_AT_ONCE = 8 << 20

_SCRATCH = "claq-scratch-"
_LOCK = "lock"

_LONGEST_NAME = 255
"""Bytes of a name, where a file system does not say."""


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def flush(path: Path, flags: int = 0) -> None:
    """Make what was written to a file, or renamed in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_for_weights(path: Path) -> BinaryIO:
    """Open a file of weights for writing, in pieces of megabytes however small its tensors are.

    Linux keeps a written file in memory in the pieces it was written in. Written tensor by tensor, SmolLM2's 71 MB lay in
    pages of 4 KiB, and decoding took 2 to 7 % longer than from larger ones (docs/runtime.md).

    Raises:
        OSError: it cannot be opened.
    """
    return path.open("wb", buffering=_WRITTEN_AT_ONCE)


def check_writable(out: Path, option: str = "--out", example: str = "model.onnx", longer: int = 0) -> None:
    """Make the folder of ``out`` and see that a file can be made in it.

    Args:
        out: the file that is to be written later.
        option: what it was named by, for the message.
        example: a file's name, for the message.
        longer: bytes by which names of files that come with it are longer than its own.

    Raises:
        OutputError: it cannot.
    """
    check_names(out, option, longer)
    if out.is_dir():
        raise OutputError(
            f"{str(out)!r} is a folder; {option} names the file to write, for example {str(out / example)!r}"
        )
    probe = _probe(out, longer)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and out.parent.is_dir():
            raise _too_long(out, option, longer) from error
        raise OutputError(f"output folder {str(out.parent)!r} is not writable: {error.strerror or error}") from error


def check_names(out: Path, option: str = "--out", longer: int = 0) -> None:
    """See that the file system has room for the names of a file and of its folders; arguments as in :func:`check_writable`.

    Nothing is made, and what the file system itself would refuse is no bare ``OSError`` here.

    Raises:
        OutputError: a name is too long.
    """
    nearest = nearest_folder(out)
    longest = os.statvfs(nearest).f_namemax or _LONGEST_NAME
    for folder in out.absolute().parents:
        if folder == nearest:
            break
        if len(os.fsencode(folder.name)) > longest:
            raise OutputError(f"{option}: the name {folder.name!r} of a folder is too long for its file system")
    if len(os.fsencode(_probe(out, longer).name)) > longest:
        raise _too_long(out, option, longer)


def nearest_folder(path: Path) -> Path:
    """What exists of the folders that a file of that name would lie in, nearest first; names may be of any length."""
    # The functions of os.path say no where the methods of Path raise, at a name that is too long.
    return next(folder for folder in path.absolute().parents if os.path.exists(folder))


def _probe(out: Path, longer: int) -> Path:
    """A name as long as those of the files that come with ``out``, the temporary ones too."""
    name = f".{out.name}.{os.getpid()}.probe"  # several processes may look at once
    missing = len(os.fsencode(out.name)) + longer - len(os.fsencode(name))
    return out.parent / (name + max(missing, 0) * "_")


def _too_long(out: Path, option: str, longer: int) -> OutputError:
    beside = f", and files beside it have names {longer} bytes longer" if longer else ""
    return OutputError(f"{option}: the name {out.name!r} is too long for its file system{beside}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        OSError: it cannot be written; an earlier file of that name is as it was.
    """
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock_file(path: Path) -> int | None:
    """A descriptor that holds an exclusive lock on a file until it is closed or the process ends, however it does;
    None if another process holds it. The file is made if it does not exist, and must not be replaced by another."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        # Whoever held the lock may have deleted the file before it was locked here: a third process would make a new one.
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one under that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for files as large as a model that are of no use afterwards, in the system's place for temporary ones.

    What killed processes of this user left there goes first. A folder is somebody's as long as the file ``lock`` in it is locked:
    the number of its process would say nothing of processes in other containers.

    Raises:
        OSError: none can be made.
    """
    parent = Path(tempfile.gettempdir())
    for folder in parent.glob(f"{_SCRATCH}*"):
        _remove_if_left(folder)
    made = Path(tempfile.mkdtemp(prefix=f".{_SCRATCH}", dir=parent))
    folder = parent / made.name.removeprefix(".")
    lock = lock_file(made / _LOCK)
    try:
        made.rename(folder)  # only now others look at it
        yield folder
    finally:
        for name in (folder, made):
            shutil.rmtree(name, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_if_left(folder: Path) -> None:
    """Remove another process's scratch folder if it is gone. Anyone may put things there: links and other users' are left."""
    try:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or not (folder / _LOCK).is_file():
            return
        lock = lock_file(folder / _LOCK)
    except OSError:
        return  # several processes may remove it at once
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove_orphans(path: Path) -> None:
    """Delete temporary files of ``path`` whose process was killed."""
    for entry, process in find_temporaries(path, "tmp"):
        if not is_alive(process):
            entry.unlink(missing_ok=True)


def find_temporaries(path: Path, ending: str) -> Iterator[tuple[Path, int]]:
    """What stands beside ``path`` under a hidden name, ``.<its name>.<number of a process>.<ending>``, and the number."""
    pattern = re.compile(re.escape(f".{path.name}.") + rf"(\d+)\.{ending}")
    for entry in path.parent.iterdir():
        if match := pattern.fullmatch(entry.name):
            yield entry, int(match[1])


def is_alive(process: int) -> bool:
    """Whether a process of that number runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


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
    ``OSError`` raised inside the block leaves it as :class:`~claq_export.errors.OutputError`. Temporary files of a
    process that was killed are removed by the next one that stages the same name.

    Renaming is one step a file, not one step for all: a process that dies in between leaves new files beside old ones.
    Whoever stages several makes sure that such a mixture is harmless (data under a name made of its content, which
    only the new model refers to) or noticed by the reader.

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
        temporary = _temporary(target)
        with _as_output_error(target):
            _remove_orphans(target)
            temporary.write_bytes(b"")
        self._staged.append((temporary, target, temporary.stat().st_mode))
        return temporary

    def rename(self, temporary: Path, name: str) -> Path:
        """Let a staged file become ``name`` instead, as when the name depends on the content; returns the target."""
        target = self._folder / name
        check_target(target)
        self._staged = [(t, target if t == temporary else old, mode) for t, old, mode in self._staged]
        return target

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
                        flush(temporary)
                for temporary, target, _ in self._staged:
                    with _as_output_error(target):
                        os.replace(temporary, target)
                    renamed += 1
                with _as_output_error(self._folder):
                    flush(self._folder, getattr(os, "O_DIRECTORY", 0))
        finally:
            for temporary, _, _ in self._staged[renamed:]:
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write into {self._folder}: {error.strerror or error}") from error
