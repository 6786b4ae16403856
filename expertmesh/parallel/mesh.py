"""The mesh: both grids with their process groups, as one object that is passed around."""

import itertools
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.parallel.board import Board
from expertmesh.parallel.grid import DENSE_AXES, Grid, Placement, Ranks
from expertmesh.parallel.handshake import same_on_all_ranks
from expertmesh.parallel.processes import limit_waiting

# Numbers the meshes of this process; as all processes make all meshes, theirs have these numbers.
_MADE = itertools.count()
_JOINED_AXES = (("dp", "cp"), ("cp", "tp"), ("dp", "cp", "tp"), ("ep", "etp"), DENSE_AXES)


class Mesh:
    """Ranks laid out for dense layers and for experts.

    Every process of the world makes the mesh, also those that are not in it: process groups are
    made together. Without a process group there is a mesh of one rank. Nothing is global: models
    with different meshes live in one process.

    Args:
        pp: Pipeline stages.
        dp: Data-parallel replicas of the dense layers; -1 takes what is left.
        cp: Slices of the sequence (context parallel).
        tp: Slices of attention (tensor parallel).
        edp: Replicas of each expert; -1 takes what is left.
        ep: Ranks among which the experts are dealt out.
        etp: Slices of each expert's hidden units.
        placement: Whether an expert-parallel group lies ``"inside"`` a host or ``"outside"``; see
            ``expertmesh.parallel.grid.Placement``.
        ranks: The ranks to use, in ascending order; None uses the whole world.
        device_mesh: Take the ranks from a ``DeviceMesh`` instead.
        device: ``"cpu"`` or ``"cuda"``; None is that of the process group's backend.
        timeout: Seconds after which ranks of the mesh that wait for each other give up; None is
            torch's default.

    Raises:
        UserError: If the degrees do not multiply to the number of ranks; on every process, if they
            ask for different meshes.

    Example:
        >>> mesh = Mesh(ep=2)  # under torchrun with 4 processes: edp=2, dp=4
        >>> print(mesh.grid.describe())
    """

    def __init__(
        self,
        *,
        pp: int = 1,
        dp: int = -1,
        cp: int = 1,
        tp: int = 1,
        edp: int = -1,
        ep: int = 1,
        etp: int = 1,
        placement: Placement = "inside",
        ranks: Sequence[int] | None = None,
        device_mesh: DeviceMesh | None = None,
        device: str | None = None,
        timeout: float | None = None,
    ) -> None:
        if device_mesh is not None:
            if ranks is not None:
                raise UserError("give ranks or device_mesh, not both")
            ranks = _ranks_of(device_mesh)
            device = device_mesh.device_type if device is None else device
        started = dist.is_initialized()
        world = dist.get_world_size() if started else 1
        numbers = list(range(world)) if ranks is None else list(ranks)
        self.rank = dist.get_rank() if started else 0
        self.device_type = _device_type(device)
        self._timeout = None if timeout is None else timedelta(seconds=timeout)
        grid: Grid | UserError
        try:
            if started:
                _check_order(numbers)
            grid = Grid.infer(
                len(numbers),
                pp=pp,
                dp=dp,
                cp=cp,
                tp=tp,
                edp=edp,
                ep=ep,
                etp=etp,
                placement=placement,
                ranks=numbers,
            )
        except UserError as error:
            grid = error
        if started:
            self._same_everywhere(grid)
        if isinstance(grid, UserError):
            raise grid
        self.grid = grid
        self._groups: dict[tuple[str, ...], Group] = {}
        self._process_groups: dict[tuple[str, ...], dist.ProcessGroup | None] = {}
        if started:
            self._make_groups()

    def _same_everywhere(self, grid: Grid | UserError) -> None:
        """Every process of the world makes the mesh, and must mean the same one."""
        if isinstance(grid, Grid):
            degrees = ", ".join(f"{axis}={degree}" for axis, degree in grid.degrees.items())
            ranks = grid.dense.flatten().tolist()
            told = f"{degrees}, placement={grid.placement}, ranks={ranks}"
        else:
            told = str(grid)
        world = range(dist.get_world_size())
        same_on_all_ranks(
            {"mesh": told},
            Board(f"mesh/{next(_MADE)}", world, self._timeout),
            mistake="the ranks made different meshes",
            remedy="give expertmesh.Mesh the same arguments on every rank",
        )

    def _make_groups(self) -> None:
        """Make every group that a model over this mesh may need.

        All ranks of the world do this together, whatever their part of the model holds and also
        those outside the mesh: torch makes groups collectively and names them by their number, so
        a rank that made one group less would from then on wait for the wrong ranks.
        """
        pp, dp, cp, tp = self.grid.dense.shape
        self.dense = self._device_mesh(self.grid.dense, DENSE_AXES)
        # FSDP takes a mesh of two axes to mean copies of sharded parameters. Whole copies are its
        # case of one piece each, so the meshes that parameters are stored over have an axis "own"
        # of one rank.
        self.expert = self._device_mesh(
            self.grid.expert[:, :, None], ("pp", "edp", "own", "ep", "etp")
        )
        self.attention = self._device_mesh(
            self.grid.dense.reshape(pp, dp * cp, 1, tp), ("pp", "data", "own", "tp")
        )
        self.storage = self._device_mesh(self.grid.dense.reshape(pp, -1, 1), ("pp", "stage", "own"))
        made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        for names in _JOINED_AXES:
            parts = self.grid.groups(names)
            place = tuple(map(tuple, parts))
            if place not in made:
                several = len(parts[0]) > 1
                made[place] = dist.new_subgroups_by_enumeration(parts)[0] if several else None
            self._process_groups[names] = made[place]
        if self._timeout is not None and self.member:
            self._limit_waiting(self._timeout)

    def _limit_waiting(self, timeout: timedelta) -> None:
        """Groups that are made after the world have torch's default otherwise, half an hour."""
        groups = [group for group in self._process_groups.values() if group is not None]
        for root in (self.dense, self.expert, self.attention, self.storage):
            groups += root.get_all_groups()
        for group in groups:
            limit_waiting(group, timeout)

    @property
    def world(self) -> int:
        """Number of ranks in the mesh."""
        return self.grid.world

    def degree(self, axis: str) -> int:
        """The size of an axis."""
        return self.grid.degrees[axis]

    @cached_property
    def member(self) -> bool:
        """Whether this process is in the mesh."""
        return bool((self.grid.dense == self.rank).any())

    @cached_property
    def coordinates(self) -> dict[str, int]:
        """This rank's place along every axis."""
        return self.grid.coordinates(self.rank)

    @cached_property
    def everyone(self) -> Group:
        """All ranks of the mesh."""
        return self.group(DENSE_AXES)

    @cached_property
    def stage(self) -> Group:
        """The ranks of this rank's pipeline stage, in the order of the dense grid."""
        return self.group(("dp", "cp", "tp"))

    def group(self, axes: str | Sequence[str]) -> Group:
        """The ranks that differ from this one in these axes only.

        Args:
            axes: One axis, or several: ``(dp, cp)``, ``(cp, tp)``, ``(dp, cp, tp)``, ``(ep, etp)``
                or all of the dense grid.

        Raises:
            UserError: If this process is not in the mesh, or no group has these axes.
        """
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        if names not in self._groups:
            self._groups[names] = self._group(names)
        return self._groups[names]

    def _group(self, names: tuple[str, ...]) -> Group:
        if not self.member:
            raise UserError(f"rank {self.rank} is not in {self}, and in none of its groups")
        if len(names) > 1 and names not in _JOINED_AXES:
            known = ", ".join(f"({', '.join(axes)})" for axes in _JOINED_AXES)
            raise UserError(f"groups of several axes are {known}; got ({', '.join(names)})")
        ranks = tuple(self.grid.group_of(self.rank, names))
        if len(ranks) == 1:
            return Group(ranks, 0, None, self.device_type, self._timeout)
        one = len(names) == 1
        process_group = self.submesh(names).get_group() if one else self._process_groups[names]
        everyone = self._process_groups[DENSE_AXES]
        assert everyone is not None
        return Group(
            ranks,
            ranks.index(self.rank),
            process_group,
            self.device_type,
            self._timeout,
            name=f"{everyone.group_name}/{'-'.join(names)}/{ranks[0]}",
        )

    def submesh(self, axes: str | Sequence[str]) -> DeviceMesh:
        """The ``DeviceMesh`` of these axes through this rank; several stay several dims."""
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        root = self.dense if all(name in DENSE_AXES for name in names) else self.expert
        return root[names]

    def _device_mesh(self, ranks: Ranks, axes: tuple[str, ...]) -> DeviceMesh:
        numbers = torch.from_numpy(np.ascontiguousarray(ranks))
        return DeviceMesh(self.device_type, numbers, mesh_dim_names=axes)

    def __repr__(self) -> str:
        degrees = ", ".join(f"{axis}={degree}" for axis, degree in self.grid.degrees.items())
        return f"Mesh({degrees}, placement={self.grid.placement!r})"


def _ranks_of(device_mesh: DeviceMesh) -> list[int]:
    ranks = device_mesh.mesh.flatten().tolist()
    if len(ranks) != device_mesh._get_root_mesh().mesh.numel():
        raise UserError(
            f"device_mesh is a slice, ranks {ranks}, and other ranks have other slices; every "
            "process makes every mesh, so give ranks=, once for each slice"
        )
    return ranks


def _check_order(ranks: list[int]) -> None:
    world = dist.get_world_size()
    if ranks != sorted(ranks) or not all(0 <= rank < world for rank in ranks):
        # torch sorts the ranks of a group, so another order would hold in some places only.
        raise UserError(
            f"ranks must be in ascending order and below the {world} of the world, got {ranks}"
        )


def _device_type(device: str | None) -> str:
    if device is not None:
        return device
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        return "cuda"
    return "cpu"
