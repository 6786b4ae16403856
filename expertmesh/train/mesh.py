"""The run file's ``[mesh]``: how many processes a run is laid out over, and how."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import torch

from expertmesh.errors import UserError

if TYPE_CHECKING:
    from expertmesh.parallel.mesh import Mesh

_INFERRED = ("dp", "edp")
# torch adds it to a clock that counts nanoseconds in 63 bits.
_LONGEST_TIMEOUT = 1e9


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Degrees of parallelism. The number of experts is the model's and never appears here.

    Attributes:
        strategy: ``"ep"``, ``"ep_zero"`` or ``"hybrid"`` sets ``pp``, ``ep``, ``placement`` and
            the ZeRO stages from the numbers of ranks and experts; see ``parallel.strategies``.
        pp: Pipeline stages.
        stages: Pipeline stages of each rank; more than one is the interleaved schedule.
        dp: Data-parallel replicas; -1 is inferred from the number of processes.
        cp: Context-parallel ranks (slices of the sequence).
        tp: Tensor-parallel ranks (slices of attention).
        edp: Replicas of each expert; -1 is inferred.
        ep: Expert-parallel ranks, within ``dp * cp * tp``.
        etp: Slices of each expert's hidden units, within ``dp * cp * tp``.
        placement: Whether an expert-parallel group lies ``"inside"`` a host or ``"outside"``.
        zero: ZeRO stage of everything but the experts, 0 to 3.
        expert_zero: ZeRO stage of the experts; None is ``zero``.
        dispatch: ``"all_to_all"``, or ``"static"`` for routers with a capacity.
        timeout: Seconds after which a rank that waits for another gives up.
    """

    strategy: Literal["ep", "ep_zero", "hybrid"] | None = None
    pp: int = 1
    stages: int = 1
    dp: int = -1
    cp: int = 1
    tp: int = 1
    edp: int = -1
    ep: int = 1
    etp: int = 1
    placement: Literal["inside", "outside"] = "inside"
    zero: int = 2
    expert_zero: int | None = None
    dispatch: Literal["all_to_all", "static"] = "all_to_all"
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("pp", "stages", "dp", "cp", "tp", "edp", "ep", "etp"):
            value = getattr(self, name)
            if value < 1 and not (name in _INFERRED and value == -1):
                either = " or -1 (inferred)" if name in _INFERRED else ""
                raise UserError(
                    f"mesh.{name} must be at least 1{either}, got {value}; set mesh.{name} = 1"
                )
        for name in ("zero", "expert_zero"):
            if getattr(self, name) not in (0, 1, 2, 3, *((None,) if name == "expert_zero" else ())):
                raise UserError(
                    f"mesh.{name} must be 0, 1, 2 or 3, got {getattr(self, name)}; "
                    f"set mesh.{name} = 2"
                )
        if not 0 < self.timeout <= _LONGEST_TIMEOUT:
            raise UserError(
                f"mesh.timeout must be above 0 and at most {_LONGEST_TIMEOUT:g} seconds, got "
                f"{self.timeout}; set mesh.timeout = {MeshConfig.timeout:g}"
            )
        if self.strategy is not None:
            self._check_free_of_degrees()

    def resolve(self, world: int, num_experts: int) -> "MeshConfig":
        """The degrees that the strategy names, for so many ranks and experts.

        Raises:
            UserError: If there are stages and no pipeline.
        """
        resolved = self._of_strategy(world, num_experts)
        if resolved.stages > 1 and resolved.pp == 1:
            raise UserError(
                f"mesh.stages is of pipelines, got {self.stages} with mesh.pp=1; set mesh.pp, or "
                "leave mesh.stages out"
            )
        return resolved

    def _of_strategy(self, world: int, num_experts: int) -> "MeshConfig":
        if self.strategy is None:
            return self
        from expertmesh.parallel.strategies import strategy

        chosen = strategy(self.strategy, world, num_experts)
        degrees = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
        return replace(self, strategy=None, **degrees)

    def build(self, world: int, num_experts: int, device: torch.device) -> "Mesh | None":
        """The mesh of the processes that have joined; None for one process.

        Args:
            world: Number of processes.
            num_experts: E; 0 for a dense model.
            device: Where the models are.

        Raises:
            UserError: If the degrees do not multiply to the number of processes.
        """
        resolved = self.resolve(world, num_experts)
        degrees = {
            name: getattr(resolved, name) for name in ("pp", "dp", "cp", "tp", "edp", "ep", "etp")
        }
        from expertmesh.parallel.grid import Grid

        try:
            Grid.infer(world, placement=resolved.placement, **degrees)
        except UserError as error:
            hint = "" if world > 1 else "; one process was started: use torchrun for more"
            raise UserError(f"[mesh] {error}{hint}") from None
        if world == 1:
            return None
        from expertmesh.parallel.mesh import Mesh

        return Mesh(
            placement=resolved.placement,
            device=device.type,
            timeout=resolved.timeout,
            **degrees,
        )

    def _check_free_of_degrees(self) -> None:
        defaults = MeshConfig()
        given = [
            f"mesh.{name}"
            for name in ("pp", "ep", "placement", "zero", "expert_zero")
            if getattr(self, name) != getattr(defaults, name)
        ]
        if given:
            raise UserError(
                f"mesh.strategy={self.strategy!r} sets {', '.join(given)} itself; leave the "
                "strategy or them out"
            )
