"""What is started, and how torchrun is told."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from expertmesh.launch.hosts import Host
from expertmesh.launch.place import Place

RANK_MARK = "\x1f"
"""Stands before and after the rank at the head of a line of output."""

# Settings of the libraries that take part. Everything else is each host's own.
_SENT = ("EXPERTMESH_", "GLOO_", "NCCL_", "OMP_", "MKL_", "GOMP_", "TORCH_", "PYTORCH_", "CUDA_")


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the hosts' torchruns meet.

    Attributes:
        port: On the first host; None lets torchrun take a free one, on one machine only.
        id: Tells this job from others.
    """

    port: int | None
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])


@dataclass(frozen=True, kw_only=True)
class Job:
    """The same program as several ranks on each host.

    Attributes:
        program: Words after torchrun's options: ``-m``, a module and its arguments, or a script.
        hosts: Who runs how many ranks; torchrun numbers hosts in the order of their addresses.
        places: How each of them is reached.
        folder: Where the program starts, an absolute path, the same on every host.
        rendezvous: Where the hosts meet.
        max_restarts: How often all ranks may be started again after one has failed.
        gpus: ``CUDA_VISIBLE_DEVICES`` on each host, or None to leave it.
        patience: Seconds from asking a host to stop until its processes are killed. torchrun gives
            its ranks 30 of them, in which a step can end and be saved.
    """

    program: tuple[str, ...]
    hosts: tuple[Host, ...]
    places: tuple[Place, ...]
    folder: str
    rendezvous: Rendezvous
    max_restarts: int = 0
    gpus: str | None = None
    patience: float = 45.0

    def torchrun(self, index: int) -> list[str]:
        """torchrun's arguments on a host.

        Args:
            index: The host's place in ``hosts``.
        """
        words = [
            f"--nproc-per-node={self.hosts[index].num_processes}",
            f"--max-restarts={self.max_restarts}",
            "--tee=3",
        ]
        if self.rendezvous.port is None:
            return [*words, "--standalone", *self.program]
        return [
            *words,
            f"--nnodes={len(self.hosts)}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.places[0].address}:{self.rendezvous.port}",
            f"--rdzv-id={self.rendezvous.id}",
            # torchrun would guess from host names, which several machines may share.
            f"--rdzv-conf=is_host={int(index == 0)}",
            f"--local-addr={self.places[index].address}",
            *self.program,
        ]

    def order(self, index: int, environ: Mapping[str, str] = os.environ) -> str:
        """The line that tells a host's keeper what to do.

        Args:
            index: The host's place in ``hosts``.
            environ: Where the settings to send come from.
        """
        settings = {name: value for name, value in environ.items() if name.startswith(_SENT)}
        settings["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = f"{RANK_MARK}${{rank}}{RANK_MARK}"
        if self.gpus is not None:
            settings["CUDA_VISIBLE_DEVICES"] = self.gpus
        return json.dumps(
            {
                "torchrun": self.torchrun(index),
                "num_processes": self.hosts[index].num_processes,
                "environment": settings,
                "patience": self.patience,
            }
        )


def train_program(words: Sequence[str]) -> tuple[str, ...]:
    """``expertmesh WORDS`` as torchrun starts it."""
    return ("-m", "expertmesh", *words)
