"""OpenMoE-8B under ep, ep_zero and hybrid on pretended ranks: results/openmoe_meshes.json.

    python benchmarks/openmoe_meshes.py            8 and 64 ranks, a table and the JSON
    python benchmarks/openmoe_meshes.py --print    the table alone, from the JSON that is there

Nothing is trained and no GPU is needed: one process takes the place of a rank of each pipeline
stage, lays out that rank's part of the model on the meta device, and the formulas of
``expertmesh.parallel.cost`` say what it keeps and sends. Every row has the same optimizer step: 4
sequences of 2048 tokens for each rank, AdamW in float32 with bfloat16 products, blocks recomputed.
``hybrid`` runs them as 8 micro-batches of its half of the ranks, the others as one.
"""

import argparse
from dataclasses import replace
from typing import Any

from record import load, save  # beside this file

from expertmesh.models import decoder_preset
from expertmesh.models.stages import Stages
from expertmesh.parallel.cost import Work, memory, traffic
from expertmesh.parallel.fake import FakeRank, fake_ranks
from expertmesh.parallel.grid import Grid
from expertmesh.parallel.strategies import (
    Strategy,
    copies_beside_each_other,
    experts_everywhere,
    two_stages,
)

NAME = "openmoe_meshes"
WORLDS = (8, 64)
HOST = 8  # ranks of a host
SEQUENCES, SEQ_LEN = 4, 2048  # of each rank in a step
EXPERTS = 32
GIB = 2**30


def strategies(world: int) -> dict[str, Strategy]:
    """What is compared, by name; the numbers behind it are its ZeRO stage and copies."""
    ep, hybrid = experts_everywhere(world, EXPERTS), two_stages(world, EXPERTS)
    return {
        "ep, zero 2": ep,
        "ep, zero 1": replace(ep, zero=1, expert_zero=1),
        "ep_zero, 2 copies, zero 1": copies_beside_each_other(world, EXPERTS, 2),
        "ep_zero, 4 copies, zero 1": copies_beside_each_other(world, EXPERTS, 4),
        "hybrid, zero 1": hybrid,
    }


def measure(world: int, chosen: Strategy) -> dict[str, Any]:
    """The most costly rank of one mesh."""
    config = decoder_preset("openmoe-8b")
    grid = Grid.infer(world, pp=chosen.pp, ep=chosen.ep, placement=chosen.placement)
    micro_batches = 1 if chosen.pp == 1 else 8
    work = Work(
        config=config,
        degrees=grid.degrees,
        zero=chosen.zero,
        expert_zero=chosen.expert_zero,
        rows=SEQUENCES * chosen.pp // micro_batches,
        seq_len=SEQ_LEN,
        num_micro_batches=micro_batches,
        narrow=2,
        recompute=True,
    )
    stages = Stages.of(config, chosen.pp)
    ranks = fake_ranks(config, grid, stages, zero=chosen.zero, expert_zero=chosen.expert_zero)
    costs = [memory(rank, work) for rank in ranks]
    worst = max(range(len(ranks)), key=lambda place: sum(costs[place].values()))
    sent = traffic(ranks[worst], work)
    return {
        "degrees": grid.degrees,
        "layers": [len(stage) for stage in stages.blocks],
        "memory": costs[worst],
        "memory_total": sum(costs[worst].values()),
        "sent": sent,
        "sent_total": sum(sent.values()),
        "sent_to_other_hosts": _to_other_hosts(grid, ranks[worst], work, sent),
    }


def _to_other_hosts(grid: Grid, rank: FakeRank, work: Work, sent: dict[str, int]) -> int:
    """Bytes that leave a host, the mean over a group's ranks.

    The all-to-all goes to all others of its group alike, and the sums over copies of the experts
    and over all ranks of a stage go round a ring in the groups' order.
    """
    first = int(grid.dense[rank.coordinates["pp"]].flat[0])
    experts = _parameters_sent(rank, work, expert=True)
    dense = _parameters_sent(rank, work, expert=False)
    total = sent["all-to-all"] * _spread(grid.group_of(first, ("ep", "etp")))
    total += experts * _ring(grid.group_of(first, "edp"))
    total += dense * _ring(grid.group_of(first, ("dp", "cp", "tp")))
    if grid.degrees["pp"] > 1:
        total += sent["send"] * (grid.stage_size >= HOST)
    return round(total)


def _parameters_sent(rank: FakeRank, work: Work, *, expert: bool) -> int:
    own = tuple(parameter for parameter in rank.parameters if parameter.expert == expert)
    sent = traffic(replace(rank, parameters=own, blocks=()), work)
    return sent["all-gather"] + sent["reduce-scatter"] + sent["all-reduce"]


def _spread(group: list[int]) -> float:
    """The share of a rank's peers that are on other hosts."""
    if len(group) == 1:
        return 0.0
    return sum(rank // HOST != group[0] // HOST for rank in group) / (len(group) - 1)


def _ring(group: list[int]) -> float:
    """The share of a ring's links that lead to another host."""
    following = [*group[1:], group[0]]
    links = zip(group, following, strict=True)
    return sum(a // HOST != b // HOST for a, b in links) / len(group)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown, GiB of the most costly rank."""
    lines = [
        "| ranks | plugin | mesh | parameters | gathered | gradients | optimizer | activations, "
        "rounded | memory | sent in a step | of it all-to-all | to other hosts |",
        "|---:|---|---|" + "---:|" * 9,
    ]
    for world, rows in result["worlds"].items():
        for name, row in rows.items():
            degrees = row["degrees"]
            mesh = " ".join(f"{a}{degrees[a]}" for a in ("pp", "dp", "edp", "ep") if degrees[a] > 1)
            kept, sent = row["memory"], row["sent"]
            cells = [
                *(kept[key] for key in ("parameters", "gathered", "gradients", "optimizer")),
                kept["activations"] + kept["rounded"],
                row["memory_total"],
                row["sent_total"],
                sent["all-to-all"],
                row["sent_to_other_hosts"],
            ]
            shown = " | ".join(f"{cell / GIB:.1f}" for cell in cells)
            lines.append(f"| {world} | {name} | {mesh} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="the table alone, from the JSON")
    if not parser.parse_args().print:
        worlds = {
            str(world): {name: measure(world, s) for name, s in strategies(world).items()}
            for world in WORLDS
        }
        about = {"sequences_per_rank": SEQUENCES, "seq_len": SEQ_LEN}
        print(f"written to {save(NAME, {**about, 'worlds': worlds})}")
    print(table(load(NAME)))


if __name__ == "__main__":
    main()
