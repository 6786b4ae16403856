"""A model laid out over ranks that are not there: what each would hold.

One process takes the place of one rank in torch's fake process group, builds that rank's part of
the model on the meta device with the code that real ranks run, and reads off what it would store.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expertmesh.errors import UserError
from expertmesh.experts import Experts
from expertmesh.models.config import DecoderConfig
from expertmesh.models.decoder import DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.grid import Grid
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import is_sharded, shard_of

_STORAGE_AXES = ("stage", "data", "edp")


@dataclass(frozen=True)
class Stored:
    """One parameter, as a rank holds it.

    Attributes:
        name: The parameter's.
        expert: Whether it is the experts'.
        held: Bytes of this rank's piece.
        ranks: Those that hold pieces, or in ZeRO stage 0 copies, and sum its gradient.
        copied: Whether they hold copies.
        shape: Of the whole parameter.
    """

    name: str
    expert: bool
    held: int
    ranks: int
    copied: bool
    shape: tuple[int, ...]

    @property
    def gathered(self) -> int:
        """Bytes once the pieces are together; those of ranks that hold less are filled up."""
        return self.held if self.copied else self.held * self.ranks


@dataclass(frozen=True)
class FakeRank:
    """A pretended rank.

    Attributes:
        coordinates: Its place along every axis of the mesh.
        parameters: What it holds.
        blocks: The blocks that it runs, in the order of its stages.
    """

    coordinates: dict[str, int]
    parameters: tuple[Stored, ...]
    blocks: tuple[int, ...]


def fake_ranks(
    config: DecoderConfig,
    grid: Grid,
    stages: Stages,
    *,
    zero: int,
    expert_zero: int,
    dispatch: str = "all_to_all",
) -> list[FakeRank]:
    """The first rank of every pipeline stage: of its stage, no other holds more.

    Args:
        config: The model's shape.
        grid: The mesh.
        stages: How the model is cut.
        zero: ZeRO stage of all but the experts.
        expert_zero: That of the experts.
        dispatch: As for ``parallelize``.

    Raises:
        UserError: If the model does not fit the mesh, or this process is one of several.
    """
    firsts = [int(ranks.flat[0]) for ranks in grid.dense]
    made = []
    for rank in firsts:
        with _pretend(grid.world, rank):
            degrees: dict[str, Any] = dict(grid.degrees)
            mesh = Mesh(**degrees, placement=grid.placement, device="cpu")
            with torch.device("meta"):
                model = DecoderLM(config)
            keep_stages(model, stages, mesh.coordinates["pp"])
            parallelize(model, mesh, zero=zero, expert_zero=expert_zero, dispatch=dispatch)
            own = stages.of_rank(mesh.coordinates["pp"])
            made.append(
                FakeRank(
                    coordinates=mesh.coordinates,
                    parameters=tuple(_stored(model, zero, expert_zero)),
                    blocks=tuple(block for stage in own for block in stages.blocks[stage]),
                )
            )
    return made


@contextmanager
def _pretend(world: int, rank: int) -> Iterator[None]:
    """Be one rank of a world without the others; collectives do nothing."""
    # Importing it makes the backend known; torch has no other place for it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError(
            "ranks can only be pretended by a process that is no rank itself; "
            "start it with `expertmesh train`, not under a launcher"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _stored(model: nn.Module, zero: int, expert_zero: int) -> Iterator[Stored]:
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owners = [modules[owner] for owner in _prefixes(name)]
        expert = any(isinstance(owner, Experts) for owner in owners)
        local = shard_of(parameter).local
        yield Stored(
            name=name,
            expert=expert,
            held=local.numel() * local.element_size(),
            ranks=_storage_ranks(parameter),
            copied=(expert_zero if expert else zero) == 0,
            shape=tuple(parameter.shape),
        )


def _prefixes(name: str) -> list[str]:
    """Names of the modules around a parameter, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _storage_ranks(parameter: Tensor) -> int:
    """How many ranks FSDP keeps a parameter on, beside the axes that cut it before."""
    if not is_sharded(parameter):
        return 1
    mesh = parameter.device_mesh  # type: ignore[attr-defined]  # of a DTensor
    names = mesh.mesh_dim_names or ()
    return next((mesh.size(names.index(axis)) for axis in _STORAGE_AXES if axis in names), 1)
