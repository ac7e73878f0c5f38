"""Pictures of published results, for readers who would rather look: speed of the CPU kernels and of decoding.

    python benchmarks/pictures.py        # benchmarks/results/speed.png from cpu_matmul_*.json and decoder_*.json

Everything shown is in those files; the pictures are drawn again whenever one of them changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
# (kernel family, processor as a reader knows it, the goal for 1, 4, 16, 128 and 512 rows of x)
MACHINES = [
    ("avx512amx", "Intel Granite Rapids (AVX-512 and AMX)", (0.8, 0.6, 0.6, 0.85, 0.85)),
    ("avx512vnni", "AMD Zen 4 (AVX-512 with VNNI)", (0.8, 0.6, 0.6, 0.85, 0.85)),
    ("avx512bwvnni", "Intel Cascade Lake (AVX-512 with VNNI)", (0.8, 0.6, 0.6, 0.85, 0.85)),
    ("avx2", "AMD Zen 3 (AVX2)", (1.0,) * 5),
]
WIDTHS = {4: ("4 bits", "black", "o"), 3: ("3 bits (peer: 4)", "tab:blue", "s"), 2: ("2 bits", "tab:orange", "^")}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_products(axes: Axes, document: dict[str, Any], title: str, goal: Sequence[float]) -> None:
    """Time of ClaqMatMul over MatMulNBits's, one thread: the geometric mean of all shapes, and their range."""
    rows = document["rows"]
    places = np.arange(len(rows))
    axes.axhline(1.0, color="grey", linewidth=1.2)
    axes.text(len(rows) - 0.5, 1.005, "MatMulNBits", color="grey", fontsize=8, ha="right", va="bottom")
    for place, value in zip(places, goal, strict=True):
        label = "goal" if place == 0 else None
        axes.plot([place - 0.38, place + 0.38], [value] * 2, color="tab:red", linestyle=":", linewidth=2, label=label)
    for number, (bits, (label, colour, marker)) in enumerate(WIDTHS.items()):
        of_rows = [
            [
                result["ratio_to_nbits"]
                for result in document["results"]
                if result["threads"] == 1 and result["bits"] == bits and result["rows"] == m
            ]
            for m in rows
        ]
        means = np.array([np.exp(np.mean(np.log(values))) for values in of_rows])
        ends = np.array([[min(values), max(values)] for values in of_rows]).T
        axes.errorbar(
            places + 0.2 * (number - 1),
            means,
            yerr=np.abs(ends - means),
            fmt=marker,
            color=colour,
            markersize=7,
            elinewidth=1.2,
            capsize=2.5,
            label=label,
        )
    axes.set_xticks(places, [str(m) for m in rows])
    axes.set_xlabel("rows of x (M)")
    axes.set_ylim(0, 1.65)
    axes.set_title(f"{title}\n{document['date']}, one thread", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    bare(axes)


def draw_decoding(axes: Axes, documents: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Tokens a second of SmolLM2-135M, two threads."""
    shown = {
        "claq int8": "claq",
        "MatMulNBits": "MatMulNBits",
        "llama.cpp smollm2-Q4_0": "llama.cpp Q4_0",
        "llama.cpp smollm2-Q4_K_M": "llama.cpp Q4_K_M",
    }
    height = 0.8 / len(documents)
    for number, (machine, document) in enumerate(documents):
        measured = [place for place, name in enumerate(shown) if name in document["decode_tokens_per_second"]]
        names = [list(shown)[place] for place in measured]
        speeds = [document["decode_tokens_per_second"][name]["median"] for name in names]
        places = np.array(measured) + height * (number - (len(documents) - 1) / 2)
        colours = ["black" if name.startswith("claq") else "silver" for name in names]
        bars = axes.barh(places, speeds, height * 0.92, color=colours, alpha=1 - 0.2 * number)
        texts = [f"{speed:.0f}  {machine}" for speed in speeds]
        axes.bar_label(bars, texts, fontsize=8, padding=3)
    axes.set_yticks(np.arange(len(shown)), list(shown.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 340)
    axes.set_xlabel("tokens a second")
    axes.set_title("decoding SmolLM2-135M, 4 bits\nbatch 1, two threads", fontsize=9)
    bare(axes)


def main() -> None:
    figure, axes = pyplot.subplots(1, 5, figsize=(20, 4.3), dpi=110, gridspec_kw={"width_ratios": [1, 1, 1, 1, 1.1]})
    for place, (family, title, goal) in zip(axes[:-1], MACHINES, strict=True):
        draw_products(place, load(f"cpu_matmul_{family}.json"), title, goal)
    axes[0].set_ylabel("time / MatMulNBits (below 1: claq is faster)")
    axes[0].legend(fontsize=8, frameon=False, loc="upper right")
    names = {"avx512amx": "Granite Rapids", "avx512vnni": "Zen 4", "avx512bwvnni": "Cascade Lake", "avx2": "Zen 3"}
    draw_decoding(axes[-1], [(name, load(f"decoder_{family}.json")) for family, name in names.items()])
    figure.tight_layout()
    figure.savefig(RESULTS / "speed.png")


if __name__ == "__main__":
    main()
