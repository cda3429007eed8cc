"""One process of a training: its rank, its device, and sums over all ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slrnet.config import Tf32

__all__ = [
    "Process",
    "configure_arithmetic",
    "configure_process",
    "current_process",
    "gather_over_ranks",
    "share_buffers",
    "sum_over_ranks",
]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Process:
    """One process among those that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints, curves and progress."""
        return self.rank == 0


def current_process(device: torch.device) -> Process:
    """This process as torch's process group knows it; a single process if there is no group."""
    if dist.is_available() and dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size(), device)
    return Process(device=device)


def sum_over_ranks(values: Tensor, process: Process) -> Tensor:
    """Adds a tensor over all ranks; every rank gets the sum. All ranks must call it in the same order."""
    if process.world_size == 1:
        return values
    total = values.to(process.device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def gather_over_ranks(value: Value, process: Process) -> list[Value]:
    """Every rank's plain value, by rank; every rank gets all. All ranks must call it in the same order."""
    if process.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * process.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def share_buffers(model: nn.Module, process: Process) -> None:
    """Gives every rank the buffers (batch norms' statistics) of rank 0: all ranks measure the model that it saves."""
    if process.world_size == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_type.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_type.values():
        joined = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(joined, src=0)
        for buffer, shared in zip(buffers, joined.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(shared.view_as(buffer))


def configure_process(threads: int | None) -> None:
    """Makes a CPU process fast: denormal numbers are 0, and `threads` threads run operators.

    None, or a set OMP_NUM_THREADS, keeps torch's own number.
    """
    if threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, threads))
    torch.set_flush_denormal(True)


def configure_arithmetic(*, deterministic: bool, tf32: Tf32) -> None:
    """Sets how a GPU computes in this process; call it before the first work on the GPU. See `config.TrainConfig`."""
    torch.backends.cudnn.allow_tf32 = tf32 != "off"
    torch.backends.cuda.matmul.allow_tf32 = tf32 == "all"
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, matrix products refuse to run
        # Nothing here reads memory that it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
