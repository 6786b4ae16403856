"""The meshes of the equivalence table."""

from dataclasses import dataclass
from typing import Literal

from tests.distributed.settings import Setting


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies on ranks; axes that are not given are inferred.

    Attributes:
        world: Ranks.
        axes: Degrees by axis.
        zero: ZeRO stage of all but the experts.
        expert_zero: ZeRO stage of the experts; None as the rest.
        placement: Where the ranks of an expert-parallel group lie.
        per_rank: Pipeline stages of each rank; 2 is the interleaved schedule.
        dispatch: How tokens move.
        ddp: Whether the model is wrapped in DDP, which knows no ZeRO stages.
    """

    world: int
    axes: dict[str, int]
    zero: int = 2
    expert_zero: int | None = None
    placement: Literal["inside", "outside"] = "inside"
    per_rank: int = 1
    dispatch: Literal["all_to_all", "static"] = "all_to_all"
    ddp: bool = False

    @property
    def name(self) -> str:
        """For tables and tests."""
        degrees = " ".join(f"{axis}{degree}" for axis, degree in self.axes.items()) or "one rank"
        if self.ddp:
            return f"DDP {degrees}"
        interleaved = f" interleaved{self.per_rank}" if self.per_rank > 1 else ""
        outside = " outside" if self.placement == "outside" else ""
        experts = "" if self.expert_zero is None else f"/{self.expert_zero}"
        static = " static" if self.dispatch == "static" else ""
        return f"{degrees}{interleaved}{outside}{static} zero{self.zero}{experts}"

    def suits(self, setting: Setting) -> bool:
        """Whether the setting's model can be laid out so.

        Only decoders are divided over tp, cp and pp, tp must divide key and value heads, and static
        dispatch needs a capacity.
        """
        if self.dispatch == "static" and not setting.capacity:
            return False
        divided = [axis for axis in ("tp", "cp", "pp") if self.axes.get(axis, 1) > 1]
        if setting.decoder is None:
            return not divided
        return setting.decoder.get("num_kv_heads", 4) % self.axes.get("tp", 1) == 0


LAYOUTS: tuple[Layout, ...] = (
    Layout(world=1, axes={}),
    Layout(world=2, axes={"dp": 2}, zero=3),
    Layout(world=2, axes={"ep": 2}, zero=1, expert_zero=0),
    Layout(world=2, axes={"etp": 2}, zero=3, expert_zero=2),
    Layout(world=2, axes={"tp": 2, "ep": 2}),
    Layout(world=2, axes={"cp": 2, "ep": 2}, zero=3),
    Layout(world=2, axes={"pp": 2}, zero=0),
    Layout(world=2, axes={"pp": 2}, per_rank=2),
    Layout(world=2, axes={"ep": 2}, dispatch="static"),
    Layout(world=2, axes={"ep": 2}, ddp=True),
    Layout(world=4, axes={"dp": 4}, zero=0),
    Layout(world=4, axes={"ep": 4}),
    Layout(world=4, axes={"edp": 2, "ep": 2}, zero=3),
    Layout(world=4, axes={"edp": 2, "ep": 2}, zero=1, placement="outside"),
    Layout(world=4, axes={"ep": 2, "etp": 2}, zero=0, expert_zero=3),
    Layout(world=4, axes={"edp": 2, "etp": 2}, zero=3, expert_zero=1),
    Layout(world=4, axes={"etp": 4}, zero=1),
    Layout(world=4, axes={"dp": 2, "tp": 2, "ep": 4}, zero=3),
    Layout(world=4, axes={"tp": 4, "ep": 2, "edp": 2}),
    Layout(world=4, axes={"cp": 2, "tp": 2, "ep": 2, "etp": 2}, zero=3),
    Layout(world=4, axes={"cp": 4, "edp": 4}, zero=1),
    Layout(world=4, axes={"dp": 2, "cp": 2, "ep": 2, "edp": 2}, placement="outside"),
    Layout(world=4, axes={"pp": 2, "dp": 2, "ep": 2}),
    Layout(world=4, axes={"pp": 2, "tp": 2, "ep": 2}, zero=1),
    Layout(world=4, axes={"tp": 2, "ep": 2, "etp": 2}, zero=1, dispatch="static"),
    Layout(world=4, axes={"edp": 2, "ep": 2}, ddp=True),
    Layout(world=8, axes={"ep": 8}),
    Layout(world=8, axes={"edp": 2, "ep": 4}, zero=3),
    Layout(world=8, axes={"edp": 2, "ep": 4}, zero=2, expert_zero=1, placement="outside"),
    Layout(world=8, axes={"edp": 2, "ep": 2, "etp": 2}, zero=1),
    Layout(world=8, axes={"dp": 8, "edp": 8}, zero=3),
    Layout(world=8, axes={"dp": 2, "cp": 2, "tp": 2, "edp": 2, "ep": 2, "etp": 2}),
    Layout(world=8, axes={"dp": 2, "cp": 2, "tp": 2, "ep": 8}, zero=3),
    Layout(world=8, axes={"pp": 2, "dp": 2, "tp": 2, "ep": 2, "etp": 2}, zero=2),
    Layout(world=8, axes={"pp": 2, "dp": 2, "cp": 2, "ep": 4}, zero=1),
    Layout(world=8, axes={"pp": 2, "dp": 4, "edp": 2, "ep": 2}, zero=0),
    Layout(world=8, axes={"edp": 2, "ep": 2, "etp": 2}, ddp=True),
)
