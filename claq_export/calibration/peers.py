"""Several processes that calibrate one model together: batches split, Hessians summed, layers shared out.

Started by ``torchrun --nproc-per-node N -m claq_export ...``. They talk through ``torch.distributed``'s gloo, in a group of
their own where the caller's group has another backend, such as nccl. Every process walks the whole
graph with its share of the batches. At a layer the Hessians are added up, so that each process has that of all batches;
layers that do not depend on one another are quantized by different processes and handed round. All then go on with the
same quantized weights. Process 0 alone keeps finished layers and writes the artifact.

What is handed round is JSON and the bytes of tensors, no pickle.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from ..algorithm import Hessian
from ..errors import CalibrationError
from ..format.layer import QuantizedLinear
from .data import Batch

if dist.is_available():
    # Functions of this module have the default group of the time of its import as default argument. Imported while there is
    # a group (torch.export does), they keep it alive, with threads that destroy_process_group would have ended; one
    # that then drops a tensor while the interpreter ends aborts the process.
    import torch.distributed.nn


def is_one_of_several() -> bool:
    """Whether ``torchrun`` started several processes; some shells and schedulers set ``RANK`` alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def _end_group() -> None:
    """Gloo's threads, if still running when the process ends, may abort it."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Peers:
    """The processes of a run, and this one's place among them.

    Args:
        rank, size: this process and how many there are.
        group: what they talk through; None = the default group.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size = rank, size
        self._group = group

    @classmethod
    def from_environment(cls) -> Peers:
        """The group that ``torchrun`` (or the caller's ``init_process_group``) made; one process without it."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not is_one_of_several():
                return cls()
            dist.init_process_group("gloo")
            atexit.register(_end_group)
        # What is handed round lies in the host's memory, which nccl does not reach.
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def devices(self, names: Sequence[str]) -> Sequence[str]:
        """This process's part of a machine's devices: those of a single process, or each a share where ``torchrun`` started
        several on the machine; a device serves several processes if there are fewer devices."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1
        place = int(os.environ.get("LOCAL_RANK", "0")) if here > 1 else 0
        return names[place::here] or (names[place % len(names)],)

    def share(self, batches: Sequence[Batch], tokens_at_once: int) -> list[Batch]:
        """This process's batches: whole groups of ``tokens_at_once`` tokens, in turns.

        A token's weight in a Hessian depends on the other tokens of its group (their median norm), so groups stay
        together and the sums are those of a single process.

        Raises:
            CalibrationError: there are fewer groups than processes.
        """
        if self.size == 1:
            return list(batches)
        groups: list[list[Batch]] = [[]]
        tokens = 0
        for batch in batches:
            if tokens >= tokens_at_once:
                groups.append([])
                tokens = 0
            groups[-1].append(batch)
            tokens += max(
                (tensor.numel() for tensor in batch.values() if not tensor.is_floating_point()), default=0
            ) or max(tensor.shape[0] for tensor in batch.values())
        if len(groups) < self.size:
            raise CalibrationError(
                f"{self.size} processes need as many groups of {tokens_at_once} calibration tokens, there are {len(groups)}; "
                "give more --samples or fewer processes"
            )
        return [batch for group in groups[self.rank :: self.size] for batch in group]

    def add_up(self, hessian: Hessian) -> None:
        """Replace a Hessian over this process's batches by that over all."""
        if self.size > 1:
            tokens = torch.tensor([hessian.tokens])
            matrix = hessian.matrix.cpu()
            dist.all_reduce(matrix, group=self._group)
            hessian.matrix.copy_(matrix)
            dist.all_reduce(tokens, group=self._group)
            hessian.tokens = int(tokens)

    def hand_round(
        self, finished: tuple[QuantizedLinear, dict[str, Any]] | None, owner: int
    ) -> tuple[QuantizedLinear, dict[str, Any]] | None:
        """What process ``owner`` has: a layer and a record that goes with it, or None."""
        if self.size == 1:
            return finished
        content = b""
        if self.rank == owner and finished is not None:
            layer, record = finished
            head = json.dumps({"attributes": layer.attributes(), "record": record}).encode()
            tensors = {name: tensor.cpu().contiguous() for name, tensor in layer.tensors().items()}
            content = len(head).to_bytes(8, "little") + head + safetensors.torch.save(tensors)
        content = self._bytes(content, owner)
        if not content:
            return None
        length = int.from_bytes(content[:8], "little")
        head_values = json.loads(content[8 : 8 + length])
        tensors = safetensors.torch.load(content[8 + length :])
        return QuantizedLinear.from_parts(head_values["attributes"], tensors), head_values["record"]

    def tell(self, value: Any) -> Any:
        """JSON values of process 0, in every process."""
        return value if self.size == 1 else json.loads(self._bytes(json.dumps(value).encode(), 0))

    def _bytes(self, content: bytes, owner: int) -> bytes:
        size = torch.tensor([len(content)])
        dist.broadcast(size, owner, group=self._group)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == owner and content:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if int(size):
            dist.broadcast(buffer, owner, group=self._group)
        return buffer.numpy().tobytes()
