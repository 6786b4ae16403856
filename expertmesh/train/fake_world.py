"""What a run would cost on ranks that are not there, for ``expertmesh train --fake-world N``."""

from typing import Any

from expertmesh.errors import UserError
from expertmesh.models.stages import Stages
from expertmesh.parallel.cost import Work, memory, traffic
from expertmesh.parallel.fake import FakeRank, fake_ranks
from expertmesh.parallel.grid import Grid
from expertmesh.train.config import RunFile
from expertmesh.train.mesh import MeshConfig

_MEMORY = {
    "parameters": "parameters (float32 masters)",
    "gathered": "gathered from other ranks",
    "rounded": "rounded for products",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
}
_PURPOSE_WIDTH = max(len(text) for text in _MEMORY.values())
_COLUMN_WIDTH = 12
# More would not fit beside each other.
_MOST_COLUMNS = 6


def describe_fake_world(run: RunFile, world: int) -> str:
    """Memory of a rank and bytes that it sends in a step, for each pipeline stage.

    Args:
        run: The run file.
        world: Number of ranks.

    Returns:
        Text for a terminal; the formulas are those of ``expertmesh.parallel.cost``.

    Raises:
        UserError: If the run does not fit so many ranks.
    """
    if world < 1:
        raise UserError(f"--fake-world must be at least 1, got {world}; set --fake-world 8")
    settings = run.mesh.resolve(world, run.model.num_experts)
    axes = ("pp", "dp", "cp", "tp", "edp", "ep", "etp")
    degrees: dict[str, Any] = {axis: getattr(settings, axis) for axis in axes}
    grid = Grid.infer(world, placement=settings.placement, **degrees)
    stages = Stages.of(run.model, grid.degrees["pp"], per_rank=settings.stages)
    work = _work(run, grid, settings)
    ranks = fake_ranks(
        run.model,
        grid,
        stages,
        zero=work.zero,
        expert_zero=work.expert_zero,
        dispatch=settings.dispatch,
    )
    return "\n".join([*_setting(run, grid, work), *_costs(ranks, work, settings.dispatch)])


def _work(run: RunFile, grid: Grid, settings: MeshConfig) -> Work:
    sequences, expert_zero = run.train.sequences, settings.expert_zero
    return Work(
        config=run.model,
        degrees=grid.degrees,
        per_rank=settings.stages,
        zero=settings.zero,
        expert_zero=settings.zero if expert_zero is None else expert_zero,
        rows=-(-sequences // grid.degrees["dp"]),
        seq_len=run.data.seq_len,
        num_micro_batches=run.train.batch // sequences,
        narrow=4 if run.train.precision == "fp32" else 2,
        recompute=run.train.checkpoint_activations,
        optimizer=run.optim.name,
    )


def _setting(run: RunFile, grid: Grid, work: Work) -> list[str]:
    shape = {axis: degree for axis, degree in grid.degrees.items() if degree > 1}
    named = ", ".join(f"{axis}={degree}" for axis, degree in shape.items()) or "one rank"
    recompute = ", blocks recomputed" if work.recompute else ""
    plural = "" if work.num_micro_batches == 1 else "es"
    return [
        f"ranks    {grid.world:,}: {named}; ZeRO {work.zero}, experts {work.expert_zero}",
        f"model    {run.model.num_params:,} parameters, {run.train.precision}{recompute}",
        f"step     {run.train.batch} sequences of {run.data.seq_len} tokens in "
        f"{work.num_micro_batches} micro-batch{plural}; at most {work.num_tokens:,} tokens "
        "of each on a rank",
    ]


def _costs(ranks: list[FakeRank], work: Work, dispatch: str) -> list[str]:
    shown = ranks if len(ranks) <= _MOST_COLUMNS else [*ranks[: _MOST_COLUMNS - 1], ranks[-1]]
    places = [rank.coordinates["pp"] for rank in shown]
    heads = [f"pp rank {place}" for place in places] if len(ranks) > 1 else ["each rank"]
    columns = [memory(rank, work) for rank in shown]
    lines = ["", _line("memory of a rank", heads)]
    for purpose, text in _MEMORY.items():
        lines.append(_line(f"  {text}", [_size(column[purpose]) for column in columns]))
    lines.append(_line("  together", [_size(sum(column.values())) for column in columns]))
    columns = [traffic(rank, work) for rank in shown]
    lines += ["", _line("sent by a rank in a step", heads)]
    for kind in columns[0]:
        lines.append(_line(f"  {kind}", [_size(column[kind]) for column in columns]))
    if dispatch == "static":
        lines.append("static dispatch sends empty rows besides, which are not counted")
    return lines


def _line(name: str, cells: list[str]) -> str:
    return name.ljust(_PURPOSE_WIDTH + 2) + "".join(cell.rjust(_COLUMN_WIDTH) for cell in cells)


def _size(num_bytes: int) -> str:
    """In the largest binary unit that leaves at least one before the point."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024.0:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024.0
    return f"{size:.1f} TiB"
