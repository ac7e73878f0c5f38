"""An export's folder beside the place it is for: all files are written and verified there, then renamed to their places."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import ClaqError, OutputError
from ..format.files import check_target, find_temporaries, flush, is_alive
from .artifact import Artifact, data_files
from .companions import earlier_companions


def remove_orphans(out: Path) -> None:
    """Remove the folders that killed exports to ``out`` left beside it, each as large as an artifact.

    One that cannot be removed, such as another user's, stays.

    Raises:
        OSError: the folder of ``out`` cannot be listed.
    """
    for entry, process in find_temporaries(out, "new"):
        if process == os.getpid() or not is_alive(process):
            shutil.rmtree(entry, ignore_errors=True)  # several processes may do so at once


class StagedExport:
    """A hidden folder in the folder of ``out``, so on the same file system, for the files of one export.

    Nothing of an earlier export is touched before :meth:`publish`. Leaving the ``with`` block removes the folder, whatever
    happened; one that a killed process left is removed when the next export to ``out`` begins. Errors of claq that leave the
    block name files by the places they were meant for.

    Args:
        out: where the model file ends; its folder must exist.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._folder = out.parent / f".{out.name}.{os.getpid()}.new"

    @property
    def path(self) -> Path:
        """Where the model file is written."""
        return self._folder / self._out.name

    def __enter__(self) -> Self:
        try:
            remove_orphans(self._out)
            self._folder.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write into {self._out.parent}: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, ClaqError):
            staged, place = str(self._folder), str(self._out.parent)
            error.args = tuple(text.replace(staged, place) if isinstance(text, str) else text for text in error.args)

    def publish(self, artifact: Artifact) -> Artifact:
        """Rename all files to their places, models last; then remove what the export before left.

        That are the model's earlier data file, and the tokenizer, configuration and the like that the earlier export wrote and
        this one does not bring itself: they would be served as if they were its own. A folder with another model file too
        keeps all its files.

        Args:
            artifact: what was written to :attr:`path`.

        Returns:
            the artifact in its place.

        Raises:
            OutputError: a file cannot be put into its place, or an earlier one not be removed.
        """
        folder = self._out.parent
        staged = sorted(path for path in self._folder.rglob("*") if path.is_file())
        staged.sort(key=lambda path: path in artifact.models)
        places = {path: folder / path.relative_to(self._folder) for path in staged}
        try:
            earlier = earlier_companions(folder, [model.name for model in artifact.models])
            for place in places.values():
                place.parent.mkdir(exist_ok=True)
                check_target(place)
            for path, place in places.items():
                os.replace(path, place)
            flush(folder, getattr(os, "O_DIRECTORY", 0))
            written = set(places.values())
            for path in (*(data for model in artifact.models for data in data_files(folder / model.name)), *earlier):
                if path not in written:
                    path.unlink(missing_ok=True)
                    if path.parent != folder and not any(path.parent.iterdir()):
                        path.parent.rmdir()
        except OSError as error:
            raise OutputError(f"cannot write into {folder}: {error.strerror or error}") from error
        files = tuple(places[path] for path in artifact.files)
        return dataclasses.replace(artifact, path=places[artifact.path], files=files)
