"""Read a cubin's machine code: registers, spills, and instructions in its main loop (no GPU needed)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, bytes of stack (spills) and of static shared memory."""

    registers: int
    stack: int
    shared: int


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> Resources:
    """Registers, stack and shared memory of a cubin's one kernel.

    Raises:
        ValueError: the tool's answer was not understood.
    """
    answer = _tool("cuobjdump", "-res-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", answer)
    if not found:
        raise ValueError(f"cuobjdump -res-usage said: {answer[-200:]!r}")
    return Resources(*map(int, found.groups()))


def instructions(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """The machine instructions of a cubin, and its loops as (first, last) positions, from the backward branches."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in _tool("nvdisasm", "-c", cubin=cubin).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found.group(1).strip())
    loops = []
    for position, instruction in enumerate(code):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target.group(1), position) < position:
            loops.append((labels[target.group(1)], position))
    return code, loops


def operations(instructions: list[str]) -> Counter[str]:
    """Count the instructions by their name, without predicates and suffixes."""
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in instructions)


def main_loop(cubin: bytes) -> list[str]:
    """The instructions of the innermost loop with the most of them.

    Raises:
        ValueError: there is no loop.
    """
    code, loops = instructions(cubin)
    inner = [a for a in loops if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        raise ValueError("the kernel has no loop")
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return code[first : last + 1]
