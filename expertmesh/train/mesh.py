"""How many processes a run's mesh asks for. One, as long as the trainer runs in one process."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from expertmesh.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Degrees of parallelism. The number of experts is the model's and never appears here.

    Attributes:
        pp: Pipeline stages.
        dp: Data-parallel replicas; -1 is inferred from the number of processes.
        cp: Context-parallel ranks (slices of the sequence).
        tp: Tensor-parallel ranks (slices of the dense layers).
        ep: Expert-parallel ranks, within ``dp * cp * tp``.
        etp: Slices of each expert's hidden units, within ``dp * cp * tp``.
    """

    pp: int = 1
    dp: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1 and not (field.name == "dp" and value == -1):
                either = " or -1 (inferred)" if field.name == "dp" else ""
                raise UserError(
                    f"mesh.{field.name} must be at least 1{either}, got {value}; "
                    f"set mesh.{field.name} = 1"
                )


def check_single_process(mesh: MeshConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse every mesh but that of one process.

    Args:
        mesh: The run file's ``[mesh]``.
        environ: Where a launcher says how many processes it started.

    Raises:
        UserError: Naming the axes that are not 1, or the launcher's number of processes.
    """
    world = environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UserError(
            f"WORLD_SIZE={world}: the trainer runs in one process; "
            "start it with `expertmesh train`, not under a launcher, or unset WORLD_SIZE"
        )
    degrees = {field.name: getattr(mesh, field.name) for field in fields(mesh)}
    wrong = {name: degree for name, degree in degrees.items() if degree not in (1, -1)}
    if wrong:
        given = ", ".join(f"mesh.{name} = {degree}" for name, degree in wrong.items())
        mend = ", ".join(f"mesh.{name} = 1" for name in wrong)
        raise UserError(f"every axis of the mesh must be 1 in one process, got {given}; set {mend}")
