"""Count machine instructions per weight of the matrix kernels, and registers and spills; no GPU needed.

    python benchmarks/gpu/instructions.py [--targets sm_80,sm_90] [--kernels gemv_w2_v1_r1,...]

writes benchmarks/results/gpu_instructions.json, which tests/triton/test_aot.py holds later builds to, and a table beside
it. A count is that of the main loop: everything a thread executes for a step, divided by the weights it decodes in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import triton

from claq_export.kernels.aot.compile import compile_variant
from claq_export.kernels.aot.sass import main_loop, operations, resources
from claq_export.kernels.aot.variants import variants

RESULTS = Path(__file__).parents[1] / "results"
KERNELS = [f"gemv_w{bits}_v1_r{rows}" for bits in (2, 3, 4) for rows in (1, 2, 4)]
KERNELS += [f"gemm_w{bits}_v1_m{vectors}" for bits in (2, 3, 4) for vectors in (16, 32, 64)]


def count(kernel: str, target: int) -> dict[str, object] | None:
    """Instructions per weight and resources of one kernel; None if the target's table has no such tile."""
    variant = next((v for v in variants(target) if v.name == kernel), None)
    if variant is None:
        return None
    compiled = compile_variant(variant, target)
    loop, used = main_loop(compiled.cubin), resources(compiled.cubin)
    parts = {name: round(n / compiled.weights, 3) for name, n in operations(loop).most_common(8)}
    return {
        "instructions_per_weight": round(len(loop) / compiled.weights, 3),
        "registers": used.registers,
        "spilled_bytes": used.stack,
        "shared_bytes": compiled.shared,
        "parts": parts,
    }


def main() -> None:
    """Count, and merge the counts into the recorded ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="sm_80,sm_86,sm_89,sm_90,sm_100,sm_120")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    options = parser.parse_args()
    path = RESULTS / "gpu_instructions.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    if recorded.get("triton") != triton.__version__:
        recorded = {"triton": triton.__version__, "targets": {}}
    for target in options.targets.split(","):
        rows = recorded["targets"].setdefault(target, {})
        for kernel in options.kernels.split(","):
            found = count(kernel, int(target.removeprefix("sm_")))
            if found:
                rows[kernel] = found
                print(f"{target} {kernel}: {found}", flush=True)
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    targets = sorted(recorded["targets"], key=lambda name: int(name.removeprefix("sm_")))
    lines = [
        "# Machine instructions per weight of the Triton kernels",
        "",
        f"Written by `benchmarks/gpu/instructions.py` with Triton {triton.__version__}: instructions of the main loop a",
        "weight, registers a thread, bytes spilled. `gemv_w2_v1_r1`: 2 bits, one vector; `gemm_w2_v1_m16`: a tile of 16.",
        "Counted in the compiled code, not run.",
        "",
        "| kernel | " + " | ".join(targets) + " |",
        "|---|" + "---|" * len(targets),
    ]
    for kernel in KERNELS:
        cells = []
        for target in targets:
            row = recorded["targets"][target].get(kernel)
            spill = f", {row['spilled_bytes']} B spilled" if row and row["spilled_bytes"] else ""
            cells.append(f"{row['instructions_per_weight']:.2f} ({row['registers']} registers{spill})" if row else "")
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    (RESULTS / "gpu_instructions.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
