"""The mesh: both grids with their process groups, as one object that is passed around."""

from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.parallel.grid import DENSE_AXES, Grid, Placement, Ranks


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
        ranks: The ranks to use; None uses the whole world.
        device_mesh: Take the ranks, in its order, from a ``DeviceMesh`` instead.
        device: ``"cpu"`` or ``"cuda"``; None is that of the process group's backend.
        timeout: Seconds after which ranks that wait for each other's word give up; None is torch's
            default. Collectives on tensors have the process group's.

    Raises:
        UserError: If the degrees do not multiply to the number of ranks.

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
            ranks = device_mesh.mesh.flatten().tolist()
            device = device_mesh.device_type if device is None else device
        started = dist.is_initialized()
        world = dist.get_world_size() if started else 1
        numbers = list(range(world)) if ranks is None else list(ranks)
        self.grid = Grid.infer(
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
        self.rank = dist.get_rank() if started else 0
        self.device_type = _device_type(device)
        self._timeout = None if timeout is None else timedelta(seconds=timeout)
        self._groups: dict[tuple[str, ...], Group] = {}
        if started:
            self.dense = self._device_mesh(self.grid.dense, DENSE_AXES)

    # FSDP takes a mesh of two axes to mean copies of sharded parameters. Whole copies are its
    # case of one piece each, so the meshes that parameters are stored over have an axis "own" of
    # one rank.

    @cached_property
    def expert(self) -> DeviceMesh:
        """``(pp, edp, own, ep, etp)``: over which experts are stored."""
        ranks = self.grid.expert[:, :, None]
        return self._device_mesh(ranks, ("pp", "edp", "own", "ep", "etp"))

    @cached_property
    def attention(self) -> DeviceMesh:
        """``(pp, data, own, tp)``, data being ``(dp, cp)``: for tensor-parallel attention."""
        pp, dp, cp, tp = self.grid.dense.shape
        return self._device_mesh(
            self.grid.dense.reshape(pp, dp * cp, 1, tp), ("pp", "data", "own", "tp")
        )

    @cached_property
    def storage(self) -> DeviceMesh:
        """``(pp, stage, own)``: over which everything else is stored."""
        pp = self.grid.dense.shape[0]
        return self._device_mesh(self.grid.dense.reshape(pp, -1, 1), ("pp", "stage", "own"))

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

        Groups of one axis exist from the start; one of several is made when first asked for, by
        all ranks of the mesh together.

        Args:
            axes: One axis, or several of one grid, the slowest first.
        """
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        if names not in self._groups:
            ranks = tuple(self.grid.group_of(self.rank, names))
            process_group = self._process_group(names) if len(ranks) > 1 else None
            self._groups[names] = Group(
                ranks, ranks.index(self.rank), process_group, self.device_type, self._timeout
            )
        return self._groups[names]

    def make_groups(self) -> None:
        """Make every group that a model over this mesh may need.

        All ranks of the world do this together, whatever their part of the model holds: torch
        makes groups collectively, and a rank that needed one group less would keep others waiting.
        """
        if self.world == 1:
            return
        for axes in (("dp", "cp", "tp"), ("cp", "tp"), ("ep", "etp"), DENSE_AXES):
            self.group(axes)
        _ = self.expert, self.attention, self.storage

    def submesh(self, axes: str | Sequence[str]) -> DeviceMesh:
        """The ``DeviceMesh`` of these axes through this rank; several stay several dims."""
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        root = self.dense if all(name in DENSE_AXES for name in names) else self.expert
        return root[names]

    def flat(self, axes: Sequence[str]) -> DeviceMesh:
        """As ``submesh``, as one dim."""
        names = tuple(axes)
        sub = self.submesh(names)
        return sub if sub.ndim == 1 else sub._flatten("_".join(names))

    def _device_mesh(self, ranks: Ranks, axes: tuple[str, ...]) -> DeviceMesh:
        numbers = torch.from_numpy(np.ascontiguousarray(ranks))
        return DeviceMesh(self.device_type, numbers, mesh_dim_names=axes)

    def _process_group(self, names: tuple[str, ...]) -> dist.ProcessGroup:
        mesh = self.submesh(names[0]) if len(names) == 1 else self.flat(names)
        return mesh.get_group()

    def __repr__(self) -> str:
        degrees = ", ".join(f"{axis}={degree}" for axis, degree in self.grid.degrees.items())
        return f"Mesh({degrees}, placement={self.grid.placement!r})"


def _device_type(device: str | None) -> str:
    if device is not None:
        return device
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        return "cuda"
    return "cpu"
