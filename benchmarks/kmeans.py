"""Times claq's one-dimensional k-means against scikit-learn's KMeans(n_init=1) on the same weight columns, and
compares errors.

    python benchmarks/kmeans.py [--model FOLDER] [--rows 4096] [--columns 24] [--repeats 5] [--write]

Without ``--model`` (a Hugging Face folder with safetensors) columns are drawn from a Student-t distribution with 6
degrees of freedom. With it, columns of its linear weights are joined until they have the asked number of rows.
Everything runs on one thread. claq's methods run natively (libclaq, all columns in one call, as in a block of the
quantizer) and in their Python reference, column by column. Times are CPU times, so that other work on the machine
disturbs them less: the median over interleaved repeats of a pass over all columns, sorting, rounding and the assignment
of codes included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from claq_export.algorithm import native
from claq_export.algorithm.columns import ColumnCoder
from claq_export.algorithm.kmeans import METHODS, cluster
from claq_export.algorithm.settings import LayerSettings

RESULT = Path(__file__).parent / "results" / "kmeans.md"


def model_columns(folder: Path, rows: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Columns of ``rows`` weights of the model's linear layers, each row divided by its RMS, as the quantizer sees
    them."""
    from safetensors.torch import load_file

    weights = []
    for file in sorted(folder.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if weight.dim() == 2 and name.endswith(".weight") and "embed" not in name and min(weight.shape) >= 64:
                weight = weight.float()
                weights.append((weight / weight.square().mean(dim=1, keepdim=True).sqrt()).numpy())
    columns = []
    for _ in range(count):
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < rows:
            weight = weights[rng.integers(len(weights))]
            parts.append(weight[:, rng.integers(weight.shape[1])])
        columns.append(np.concatenate(parts)[:rows].astype(np.float32))
    return columns


def in_python(columns: list[np.ndarray], bits: int, options: LayerSettings) -> None:
    """Quantize columns without libclaq."""
    coder = ColumnCoder(options)
    coder.native = False
    for column in columns:
        coder.quantize(column, bits, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="said about the run in the table, for example: busy machine")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULT.name} in benchmarks/results")
    args = parser.parse_args()

    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    if args.model:
        columns = model_columns(args.model, args.rows, args.columns, rng)
    else:
        columns = [rng.standard_t(6, args.rows).astype(np.float32) for _ in range(args.columns)]

    block = np.stack(columns)
    origin = "of a model" if args.model else "Student-t, 6 degrees of freedom"
    lines = [
        f"{args.columns} columns of {args.rows} weights ({origin}), one thread, CPU time; "
        f"error = sum of squared distances over the optimum's, mean and worst column. {args.note}".rstrip(),
        "",
        "| bits | method | time a column | times faster than scikit-learn | error | worst |",
        "|---|---|---|---|---|---|",
    ]
    with threadpool_limits(1):
        for bits in (2, 3, 4):
            k = 1 << bits
            runs: dict[str, Callable[[], object]] = {}
            for method in METHODS:
                options = LayerSettings(bits=bits, kmeans=method)
                runs[f"{method}, native"] = partial(
                    native.quantize_columns, block, [bits] * len(block), [0] * len(block), options, threads=1
                )
                runs[f"{method}, Python"] = partial(in_python, columns, bits, options)
            times: dict[str, list[float]] = {name: [] for name in ("scikit-learn", *runs)}
            for _ in range(args.repeats):
                began = time.process_time()
                fitted = [KMeans(k, n_init=1, random_state=10).fit(column[:, None]) for column in columns]
                times["scikit-learn"].append(time.process_time() - began)
                for name, run in runs.items():
                    began = time.process_time()
                    run()
                    times[name].append(time.process_time() - began)
            errors: dict[str, list[float]] = {name: [] for name in times}
            for column, model in zip(columns, fitted, strict=True):
                tensor = torch.from_numpy(column)
                best = cluster(tensor, k, method="optimal").error
                # scikit-learn's inertia_ is one assignment old; measure all the same way.
                centres = np.sort(model.cluster_centers_[:, 0].astype(np.float64))
                to_nearest = np.abs(column[:, None] - centres).min(axis=1)
                errors["scikit-learn"].append(float((to_nearest**2).sum()) / best)
                for method in METHODS:
                    # Both give the same centroids, bit for bit (tests/algorithm/test_native.py).
                    error = cluster(tensor, k, method=method).error / best
                    errors[f"{method}, native"].append(error)
                    errors[f"{method}, Python"].append(error)
            base = float(np.median(times["scikit-learn"])) / len(columns)
            for name, values in times.items():
                middle = float(np.median(values)) / len(columns)
                lines.append(
                    f"| {bits} | {name} | {middle * 1e6:,.0f} us | {base / middle:.0f} | {np.mean(errors[name]):.4f} "
                    f"| {np.max(errors[name]):.4f} |"
                )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("# One-dimensional k-means\n\n`python benchmarks/kmeans.py`: " + text)


if __name__ == "__main__":
    main()
