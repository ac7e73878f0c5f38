"""From timed tile sizes to the dispatch table of the Triton kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DISPATCH = Path(__file__).resolve().parents[2] / "kernels" / "triton" / "dispatch.json"


def fastest_tiles(tuning: list[dict[str, Any]], entry: dict[str, Any], source: str) -> dict[str, Any]:
    """A generation's entry of dispatch.json with the tiles that were fastest, summed over the widths.

    Args:
        tuning: rows of :func:`tune`; a tile that was not timed at every width is left out.
        entry: what the table says so far; kept where nothing was timed.
        source: where the numbers come from.
    """
    totals: dict[int, dict[str, list[float]]] = {}
    for row in tuning:
        if isinstance(row["us"], float):
            totals.setdefault(row["vectors"], {}).setdefault(json.dumps(row["tile"]), []).append(row["us"])
    best = {}
    for vectors, tiles in totals.items():
        most = max(len(times) for times in tiles.values())
        summed = {tile: sum(times) for tile, times in tiles.items() if len(times) == most}
        best[vectors] = json.loads(min(summed, key=lambda tile: summed[tile]))
    found = {**entry, "source": source}
    if 1 in best:
        found["gemv"] = {**best[1], "max_vectors": entry["gemv"]["max_vectors"]}
    tens = [{**best[vectors], "max_vectors": vectors} for vectors in (16, 128) if vectors in best]
    if len(tens) == 2:
        found["gemm"] = tens
    return found


def write_dispatch(
    tuning: list[dict[str, Any]], capability: tuple[int, int], source: str, path: Path = DISPATCH
) -> None:
    """Put the fastest tiles into the dispatch table, under this compute capability."""
    table = json.loads(path.read_text())
    key = f"{capability[0]}.{capability[1]}"
    generations = table["generations"]
    entry = next(generations[name] for name in (key, str(capability[0]), "default") if name in generations)
    generations[key] = fastest_tiles(tuning, entry, source)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(table, indent=2) + "\n")
    unfinished.replace(path)
