"""Joining the processes that a launcher started, and leaving them."""

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from expertmesh.errors import UserError

JOINING = timedelta(minutes=10)
"""How long a process waits for the others of its start; hosts may load files at unlike speed."""


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
    gone, the others' collectives fail, at the latest after ``timeout``. A launcher that starts all
    ranks again may keep one store for all starts (torchrun does): nothing of an earlier start is
    seen.

    Args:
        device: Where the models are; decides the backend.
        timeout: Seconds after which a collective that not all ranks have come to fails. Joining
            has its own limit, ``JOINING``.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://", timeout=JOINING))
    start = dist.PrefixStore(f"expertmesh/{_agreed_name(store, rank, world)}", store)
    dist.init_process_group(backend, store=start, rank=rank, world_size=world, timeout=JOINING)
    limit_waiting(dist.group.WORLD, timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()


def limit_waiting(group: dist.ProcessGroup | None, timeout: timedelta) -> None:
    """Let collectives of a group that not all its ranks have come to fail after ``timeout``."""
    _set_pg_timeout(timeout, group)


def _agreed_name(store: dist.Store, rank: int, world: int) -> str:
    """A name for this start, the same on all its ranks and of no earlier start.

    Rank 0 makes it, and tells it to every process that asks in a name of its own, until all ranks
    have said that they heard. What earlier processes of a rank wrote is answered too, to no effect:
    restart counts would not do, as hosts that restart for the sake of another do not count it.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        name: str = store.get(f"answer/{own}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    deadline = time.monotonic() + JOINING.total_seconds()
    missing = set(range(1, world))
    while missing:
        for other in sorted(missing):
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
            if store.check([f"heard/{own}/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(
                f"{len(missing)} of {world} ranks, rank {min(missing)} first, have not joined "
                f"within {JOINING.total_seconds():g} s"
            )
        time.sleep(0.02)
    return own
