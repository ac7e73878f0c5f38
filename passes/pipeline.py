"""Runs passes in order, logs each, and can write the graph down after each."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from .base import Pass, PassContext

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRecord:
    """One line of the pipeline's log: a pass, whether it changed the graph, node counts, seconds, its notes."""

    name: str
    modified: bool
    nodes_before: int
    nodes_after: int
    seconds: float
    notes: tuple[str, ...]


class Pipeline:
    """An ordered list of passes.

    Args:
        passes: in the order they run.
        dump_dir: folder for the graph's text before the first pass (``00-input.txt``) and after each; made if absent.
    """

    def __init__(self, passes: Sequence[Pass], dump_dir: Path | None = None) -> None:
        self.passes = tuple(passes)
        self._dump_dir = dump_dir

    def __str__(self) -> str:
        return "\n".join(f"{index:2}. {step.name}: {step.doc}" for index, step in enumerate(self.passes, 1))

    def run(self, gm: fx.GraphModule, context: PassContext) -> list[PassRecord]:
        """Run every pass on ``gm``, in place.

        Raises:
            ContractError: a pass's condition does not hold.
            ClaqError: a pass refuses the user's settings.
        """
        records: list[PassRecord] = []
        self._dump(gm, 0, "input")
        for index, step in enumerate(self.passes, 1):
            before, start = len(gm.graph.nodes), time.perf_counter()
            result = step(gm, context)
            record = PassRecord(
                step.name,
                result.modified,
                before,
                len(gm.graph.nodes),
                time.perf_counter() - start,
                result.notes,
            )
            records.append(record)
            _log.info(
                "%s: %s, %d -> %d nodes, %.2f s",
                record.name,
                "modified" if record.modified else "unchanged",
                record.nodes_before,
                record.nodes_after,
                record.seconds,
            )
            for note in record.notes:
                _log.debug("%s: %s", record.name, note)
            self._dump(gm, index, step.name)
        return records

    def _dump(self, gm: fx.GraphModule, index: int, name: str) -> None:
        if self._dump_dir is not None:
            self._dump_dir.mkdir(parents=True, exist_ok=True)
            (self._dump_dir / f"{index:02}-{name}.txt").write_text(f"{gm.graph}\n", encoding="utf-8")
