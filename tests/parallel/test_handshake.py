from typing import Any

import torch.distributed as dist

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.handshake import same_on_all_ranks
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing import run_on_ranks

SAME = {"run.seed": 7, "optim.lr": 1e-3}


def outcome(special: dict[int, dict[str, Any]]) -> str:
    """What a rank is told when some ranks come with other facts."""
    facts = SAME | special.get(dist.get_rank(), {})
    try:
        same_on_all_ranks(facts, Agreement(Mesh().everyone))
    except UserError as error:
        return str(error)
    return "alike"


def test_alike() -> None:
    assert run_on_ranks(4, outcome, {}) == ["alike"] * 4


def test_what_differs_is_named_on_every_rank() -> None:
    special = {1: {"run.seed": 8}, 3: {"run.seed": 8, "optim.lr": 0.01}}
    (message,) = set(run_on_ranks(4, outcome, special, timeout=30))
    assert message == (
        "the ranks were not started alike. run.seed: ranks 0, 2 say 7; ranks 1, 3 say 8; "
        "optim.lr: ranks 0, 1, 2 say 0.001; rank 3 says 0.01; "
        "give every host the same run file, overrides, data and version"
    )


def test_a_fact_that_one_rank_lacks_is_named() -> None:
    (message,) = set(run_on_ranks(2, outcome, {1: {"version": "0.2"}}))
    assert "version: rank 0 says nothing; rank 1 says '0.2'" in message


def test_many_differences_are_counted() -> None:
    special = {1: {f"fact_{number}": number for number in range(12)}}
    (message,) = set(run_on_ranks(2, outcome, special))
    assert "fact_7: rank 0 says nothing; rank 1 says 7" in message
    assert "fact_8" not in message
    assert "; and 4 more; give every host" in message


def test_alone_everything_is_alike() -> None:
    same_on_all_ranks(SAME, Agreement())
