"""Progress of a long run: a live line for a person, a JSONL log for machines."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..errors import OutputError


class ProgressReporter:
    """Reports stages and layers as they finish. Texts are shown as they are: brackets in a path are no markup.

    Args:
        quiet: no live line (the log is still written).
        log_path: JSONL file; a line an event, each with ``event`` and ``seconds`` since the start.
        console: where the live line goes; standard error by default.

    Raises:
        OutputError: also by its methods: the log file cannot be written.
    """

    def __init__(self, quiet: bool = False, log_path: str | Path | None = None, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._quiet = quiet
        self._start = time.perf_counter()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._log: TextIO | None = None
        self._log_path = log_path
        if log_path is not None:
            try:
                self._log = Path(log_path).open("w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
            except OSError as error:
                raise self._cannot_write(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish_layers()
        if error is not None:
            # What ended the run is what the user must see, not that it cannot be logged.
            with contextlib.suppress(OutputError):
                self.event("error", type=type(error).__name__, message=str(error))
        if self._log is not None:
            self._log.close()  # every line was flushed when it was written

    def event(self, kind: str, /, **fields: Any) -> None:
        """Write one line to the log.

        Raises:
            OutputError: it cannot be written; no further line is tried.
        """
        if self._log is None:
            return
        record = {"event": kind, "seconds": round(time.perf_counter() - self._start, 3), **fields}
        try:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
        except OSError as error:
            log, self._log = self._log, None
            with contextlib.suppress(OSError):  # closing tries to write what could not be written
                log.close()
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> OutputError:
        return OutputError(f"log file {str(self._log_path)!r} cannot be written: {error.strerror or error}")

    def stage(self, message: str, **fields: Any) -> None:
        """A step of the run begins."""
        self.event("stage", message=message, **fields)
        if not self._quiet:
            self.console.print(Text(message, style="bold"))

    def warn(self, message: str) -> None:
        """Something the user must not miss, also with ``--quiet``."""
        self.event("warning", message=message)
        self.console.print(Text.assemble(("warning:", "bold yellow"), f" {message}"))

    def start_layers(self, total: int, verb: str) -> None:
        """``total`` layers are about to be worked on."""
        if self._quiet:
            return
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[last]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(verb, total=total, last="")
        self._progress.start()

    def layer(self, name: str, **fields: Any) -> None:
        """A layer is done; ``true_bits`` and ``error`` of the fields are shown."""
        self.event("layer", name=name, **fields)
        if self._progress is not None and self._task is not None:
            last = name
            if "true_bits" in fields:
                last += f"  {fields['true_bits']:.2f} bits  error {fields['error']:.2e}"
            self._progress.update(self._task, advance=1, last=last)

    def advance(self) -> None:
        """One of several things that are no layers is done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1)

    def finish_layers(self) -> None:
        """Stop the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
