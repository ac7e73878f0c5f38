"""Pictures of published results, for readers who would rather look: speed of the CPU kernels and of decoding.

    python benchmarks/pictures.py        # from cpu_matmul_*.json and decoder_*.json

benchmarks/results/speed.png holds what matters most, 4 bits on all processors; speed_by_width.png all
widths, a panel a processor.
Everything shown is in those files; the pictures are drawn again whenever one of them changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
AVX512_GOAL, AVX2_GOAL = (0.8, 0.6, 0.6, 0.85, 0.85), (1.0,) * 5
"""The goals for 1, 4, 16, 128 and 512 rows of x: with AVX-512, and without."""


@dataclass(frozen=True)
class Machine:
    """A processor that was measured.

    Attributes:
        family: of kernels, in the names of result files.
        name: short.
        features: as a reader knows them.
        goal: time of claq over that of its peer, by rows of x.
        colour, marker: in pictures of several processors.
    """

    family: str
    name: str
    features: str
    goal: Sequence[float]
    colour: str
    marker: str


MACHINES = (
    Machine("avx512amx", "Intel Granite Rapids", "AVX-512 and AMX", AVX512_GOAL, "black", "o"),
    Machine("avx512vnni", "AMD Zen 4", "AVX-512 with VNNI", AVX512_GOAL, "tab:blue", "s"),
    Machine("avx512bwvnni", "Intel Cascade Lake", "AVX-512 with VNNI", AVX512_GOAL, "tab:orange", "^"),
    Machine("avx2", "AMD Zen 3", "AVX2", AVX2_GOAL, "tab:green", "D"),
)
WIDTHS = {4: ("4 bits", "black", "o"), 3: ("3 bits (peer: 4)", "tab:blue", "s"), 2: ("2 bits", "tab:orange", "^")}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def ratios(document: dict[str, Any], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Time of ClaqMatMul over that of MatMulNBits on one thread, for each number of rows: the geometric mean of all shapes, and
    how far the least and the largest are from it ``[2, rows]``."""
    of_rows = [
        [
            result["ratio_to_nbits"]
            for result in document["results"]
            if result["threads"] == 1 and result["bits"] == bits and result["rows"] == m
        ]
        for m in document["rows"]
    ]
    means = np.array([np.exp(np.mean(np.log(values))) for values in of_rows])
    ends = np.array([[min(values), max(values)] for values in of_rows]).T
    return means, np.abs(ends - means)


def draw_ratios(axes: Axes, rows: Sequence[int]) -> None:
    """What all panels of ratios share."""
    axes.axhline(1.0, color="grey", linewidth=1.2)
    axes.text(1.01, 1, "MatMul-\nNBits", color="grey", fontsize=9, va="center", transform=axes.get_yaxis_transform())
    axes.set_xticks(np.arange(len(rows)), [str(m) for m in rows])
    axes.set_xlabel("rows of x (M)")
    axes.set_ylabel("time / MatMulNBits")
    axes.grid(axis="y", alpha=0.3)
    bare(axes)


def draw_goal(axes: Axes, goal: Sequence[float], label: str, **style: Any) -> None:
    for place, value in enumerate(goal):
        axes.plot([place - 0.4, place + 0.4], [value] * 2, linewidth=2, label=None if place else label, **style)


def draw_points(axes: Axes, document: dict[str, Any], bits: int, offset: float, **style: Any) -> None:
    means, reach = ratios(document, bits)
    axes.errorbar(
        np.arange(len(means)) + offset,
        means,
        yerr=reach,
        linestyle="none",
        markersize=6,
        elinewidth=1.1,
        capsize=2,
        **style,
    )


def draw_processors(axes: Axes, documents: Sequence[dict[str, Any]]) -> None:
    """4 bits on all processors."""
    draw_ratios(axes, documents[0]["rows"])
    draw_goal(axes, AVX512_GOAL, "goal with AVX-512", color="tab:red", linestyle=":")
    for number, (machine, document) in enumerate(zip(MACHINES, documents, strict=True)):
        offset = 0.17 * (number - (len(MACHINES) - 1) / 2)
        style = {"color": machine.colour, "marker": machine.marker}
        draw_points(axes, document, 4, offset, label=f"{machine.name} ({machine.features})", **style)
    axes.set_ylim(0, 1.4)
    axes.set_title("One product, 4 bits, one thread (lower is better)", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def draw_widths(axes: Axes, machine: Machine, document: dict[str, Any]) -> None:
    """All widths on one processor."""
    draw_ratios(axes, document["rows"])
    draw_goal(axes, machine.goal, "goal", color="tab:red", linestyle=":")
    for number, (bits, (label, colour, marker)) in enumerate(WIDTHS.items()):
        draw_points(axes, document, bits, 0.2 * (number - 1), label=label, color=colour, marker=marker)
    axes.set_ylim(0, 1.65)
    axes.set_title(f"{machine.name} ({machine.features}), {document['date']}", fontsize=11)


def draw_decoding(axes: Axes, documents: Sequence[dict[str, Any]]) -> None:
    """Tokens a second of SmolLM2-135M, two threads, a group of bars a processor."""
    shown = {
        "claq int8": ("claq", "black"),
        "MatMulNBits": ("MatMulNBits", "darkgrey"),
        "llama.cpp smollm2-Q4_0": ("llama.cpp Q4_0", "lightsteelblue"),
        "llama.cpp smollm2-Q4_K_M": ("llama.cpp Q4_K_M", "tab:blue"),
    }
    height = 0.8 / len(shown)
    for number, (key, (label, colour)) in enumerate(shown.items()):
        measured = [place for place, found in enumerate(documents) if key in found["decode_tokens_per_second"]]
        speeds = [documents[place]["decode_tokens_per_second"][key]["median"] for place in measured]
        # Bars of a group stand close together where one was not measured.
        before = [
            sum(other in documents[place]["decode_tokens_per_second"] for other in list(shown)[:number])
            for place in measured
        ]
        places = np.array(measured) + height * (np.array(before) - (len(shown) - 1) / 2)
        bars = axes.barh(places, speeds, height * 0.92, color=colour, label=label)
        axes.bar_label(bars, [f"{speed:.0f}" for speed in speeds], fontsize=8.5, padding=3)
    axes.set_yticks(np.arange(len(documents)), [machine.name.replace(" ", "\n", 1) for machine in MACHINES])
    axes.invert_yaxis()
    axes.set_xlim(0, 230)
    axes.set_xlabel("tokens a second")
    axes.set_title("SmolLM2-135M decoding, two threads (higher is better)", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, columnspacing=1)
    bare(axes)


def main() -> None:
    products = [load(f"cpu_matmul_{machine.family}.json") for machine in MACHINES]
    decoding = [load(f"decoder_{machine.family}.json") for machine in MACHINES]

    figure, axes = pyplot.subplots(1, 2, figsize=(11.5, 4.9), dpi=150)
    draw_processors(axes[0], products)
    draw_decoding(axes[1], decoding)
    figure.tight_layout()
    figure.savefig(RESULTS / "speed.png")

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), dpi=130)
    for place, machine, document in zip(grid.flat, MACHINES, products, strict=True):
        draw_widths(place, machine, document)
    grid.flat[0].legend(fontsize=9, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(RESULTS / "speed_by_width.png")


if __name__ == "__main__":
    main()
