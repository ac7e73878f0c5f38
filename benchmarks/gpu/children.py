"""Work in processes of its own: what it does to the GPU, a crash or a hang takes nothing else along."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Finding = dict[str, Any]
PartType = TypeVar("PartType")

POLL_SECONDS = 0.2


def _child(work: Callable[[Any, Callable[[Finding], None]], None], part: object, path: Path) -> None:
    with path.open("a") as lines:

        def report(finding: Finding) -> None:
            lines.write(json.dumps(finding) + "\n")
            lines.flush()

        work(part, report)


class _Tail:
    """The findings that a process has written, each given once."""

    def __init__(self, path: Path) -> None:
        self.path, self.read = path, 0

    def new(self) -> list[Finding]:
        text = self.path.read_bytes()[self.read :] if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a line that is being written comes later
        self.read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def in_children(
    work: Callable[[PartType, Callable[[Finding], None]], None],
    parts: Sequence[PartType],
    seconds: float,
    report: Callable[[Finding], None],
) -> None:
    """Call ``work(part, report)`` for every part, each in a process of its own; findings come here as they are made.

    A process that dies, or is stopped after ``seconds``, is a finding that has not passed; what it had reported stays.
    """
    context, deadline = get_context("spawn"), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        tails = [_Tail(Path(folder) / str(number)) for number in range(len(parts))]
        processes = [
            context.Process(target=_child, args=(work, part, tail.path), daemon=False)
            for part, tail in zip(parts, tails, strict=True)
        ]
        for process in processes:
            process.start()
        stopped = False
        while any(process.is_alive() for process in processes):
            if time.monotonic() > deadline:
                stopped = True
                for process in processes:
                    process.kill()
            time.sleep(POLL_SECONDS)
            for tail in tails:
                for finding in tail.new():
                    report(finding)
        for number, (process, tail) in enumerate(zip(processes, tails, strict=True)):
            process.join()
            for finding in tail.new():
                report(finding)
            if process.exitcode:
                reason = f"it took longer than {seconds:.0f} s" if stopped else f"exit status {process.exitcode}"
                what = f"process {number + 1} of {len(processes)} did not end: {reason}"
                report({"what": what, "passed": False, "failure": reason})
