"""Compile one kernel variant for one GPU generation, without a GPU."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

# Line information would put this machine's folders into the image and make it differ from one checkout to the next;
# the default of fused multiply-add differs between Triton versions.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .variants import Variant

HIDDEN_PARAMETERS = 2
"""Pointers after the declared parameters of every kernel (global and profile scratch); null, as their sizes are 0."""


class KernelBuildError(RuntimeError):
    """A kernel could not be compiled, or needs a launch that the loader does not make."""


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel variant for one target, with all that a launch needs.

    Attributes:
        variant: name of the variant.
        target: compute capability (80, 90, ...).
        entry: name of the function in the image.
        num_warps: the block is ``32 * num_warps`` threads.
        shared: bytes of dynamic shared memory.
        parameters: (name, type) in launch order, without the two hidden null pointers at the end.
        tile: see :class:`.variants.Variant`.
        weights, most_vectors, programs: see :class:`.variants.Variant`.
        cubin, ptx: the images.
    """

    variant: str
    target: int
    entry: str
    num_warps: int
    shared: int
    parameters: tuple[tuple[str, str], ...]
    tile: tuple[int, int, int]
    weights: float
    most_vectors: int
    programs: int
    cubin: bytes
    ptx: str


def compile_variant(variant: Variant, target: int) -> CompiledKernel:
    """Compile for a compute capability (80, 86, 89, 90, 100, 120, ...).

    Raises:
        KernelBuildError: Triton's interpreter is on, the target is unknown to the assembler, or the kernel asks for
            scratch memory or a cluster launch.
    """
    if triton.knobs.runtime.interpret:
        raise KernelBuildError("TRITON_INTERPRET is set: kernels cannot be compiled while the interpreter is on")
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in variant.signature.items()
        if (kind.startswith("*") and name not in variant.unaligned) or name in variant.multiples
    }
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.num_warps, "num_stages": 1}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        raise KernelBuildError(f"{variant.name} for sm_{target}: {type(error).__name__}: {error}") from error
    metadata = compiled.metadata
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        raise KernelBuildError(f"{variant.name} for sm_{target} needs a cluster or cooperative launch")
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise KernelBuildError(f"{variant.name} for sm_{target} needs scratch memory")
    parameters = tuple((name, signature[name]) for name in names if signature[name] != "constexpr")
    declared = len(re.findall(r"\.param \.", compiled.asm["ptx"].split(")")[0]))
    if declared != len(parameters) + HIDDEN_PARAMETERS:
        raise KernelBuildError(
            f"{variant.name} for sm_{target} has {declared} parameters, expected {len(parameters)} + 2"
        )
    return CompiledKernel(
        variant=variant.name,
        target=target,
        entry=metadata.name,
        num_warps=metadata.num_warps,
        shared=metadata.shared,
        parameters=parameters,
        tile=variant.tile,
        weights=variant.weights,
        most_vectors=variant.most_vectors,
        programs=variant.programs,
        cubin=compiled.asm["cubin"],
        ptx=compiled.asm["ptx"],
    )
