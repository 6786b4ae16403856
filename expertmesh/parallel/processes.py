"""Joining the processes that a launcher started, and leaving them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from expertmesh.errors import UserError


def launched(environ: Mapping[str, str] = os.environ) -> int:
    """Number of processes that a launcher (torchrun, Slurm with torchrun) started; 1 without.

    Raises:
        UserError: If the launcher's variables are no numbers.
    """
    text = environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"WORLD_SIZE must be a positive number, got {text!r}; start with torchrun")
    return int(text)


def local_device(device: torch.device, environ: Mapping[str, str] = os.environ) -> torch.device:
    """The accelerator of this process among those of its host; a CPU is shared by all."""
    if device.type == "cpu" or launched(environ) == 1:
        return device
    return torch.device(device.type, int(environ.get("LOCAL_RANK", "0")))


def joined_world() -> int:
    """Number of processes that have joined; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[None]:
    """Be in the launcher's process group inside, and out of it afterwards.

    Without a launcher, or where the caller has joined already, nothing happens. When a rank is
    gone, the others' collectives fail, at the latest after ``timeout``.

    Args:
        device: Where the models are; decides the backend.
        timeout: Seconds after which a collective that not all ranks have come to fails.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()
