import os
import time

import pytest
import torch
import torch.distributed as dist

from expertmesh.errors import UserError
from expertmesh.parallel.processes import (
    joined,
    joined_world,
    launched,
    local_device,
)
from expertmesh.testing import run_on_ranks
from tests.ports import free_port

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("text", "number"), [(None, 1), ("1", 1), ("16", 16)])
def test_number_of_processes(text: str | None, number: int) -> None:
    assert launched({} if text is None else {"WORLD_SIZE": text}) == number


@pytest.mark.parametrize("text", ["", "0", "-2", "two", "1.5"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"WORLD_SIZE must be a positive number, got '{text}'"):
        launched({"WORLD_SIZE": text})


def test_each_process_of_a_host_has_its_own_accelerator() -> None:
    four = {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}
    assert local_device(CPU, four) == CPU
    assert local_device(CUDA, four) == torch.device("cuda", 2)
    assert local_device(torch.device("cuda", 1), {}) == torch.device("cuda", 1)


def test_without_a_launcher_nothing_is_joined() -> None:
    with joined(CPU, 5.0):
        assert not dist.is_initialized()
        assert joined_world() == 1


def leave_the_pool(port: int) -> None:
    """Be a process that a launcher has just started."""
    dist.barrier()  # the other may still be entering
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert joined_world() == 1


def join_twice(port: int) -> tuple[int, float]:
    leave_the_pool(port)
    with joined(CPU, 30.0):
        group = dist.group.WORLD
        with joined(CPU, 1.0):  # who has joined stays as they are
            assert dist.group.WORLD is group
        one = torch.ones(())
        dist.all_reduce(one)
        world = joined_world()
    assert not dist.is_initialized()
    return world, float(one)


def test_processes_join_and_leave() -> None:
    assert run_on_ranks(2, join_twice, free_port()) == [(2, 2.0)] * 2


def join_late(port: int) -> bool:
    """Rank 1 comes later than a collective would wait."""
    leave_the_pool(port)
    if os.environ["RANK"] == "1":
        time.sleep(3.0)
    with joined(CPU, 1.0):
        dist.all_reduce(torch.ones(()))
    return True


def test_who_comes_late_is_waited_for() -> None:
    assert run_on_ranks(2, join_late, free_port()) == [True, True]


def start_again(port: int) -> list[float]:
    """Three starts of all ranks in one store that a launcher keeps; the third is of fewer ranks.

    Rank 1 was killed before it joined in one of them: others have started more often than it.
    """
    leave_the_pool(port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    rank = int(os.environ["RANK"])
    kept = dist.TCPStore("127.0.0.1", port, is_master=True) if rank == 0 else None
    stale = dist.TCPStore("127.0.0.1", port)
    stale.set(f"asks/{rank}", f"killed {rank}")
    found = []
    for world in (3, 3, 2):
        os.environ["WORLD_SIZE"] = str(world)
        if rank < world:
            with joined(CPU, 20.0):
                own = torch.tensor(float(rank + 1))
                dist.all_reduce(own)
                found.append(float(own))
                dist.barrier()
    stale.set(f"done {rank}", "")
    if kept is not None:
        # The store ends with rank 0, so that one leaves last, and alone waits.
        stale.wait([f"done {other}" for other in range(3)])
    return found


def test_starts_that_share_a_store_do_not_see_each_other() -> None:
    assert run_on_ranks(3, start_again, free_port()) == [[6.0, 6.0, 3.0]] * 2 + [[6.0, 6.0]]


def alone_in_a_collective(port: int, silent: bool) -> tuple[str, float]:
    """Rank 0 waits for a rank that is silent, or gone."""
    leave_the_pool(port)
    started = time.monotonic()
    with joined(CPU, 2.0):
        if dist.get_rank() == 1:
            if silent:
                time.sleep(4.0)
            return "left", 0.0
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(()))
    return type(caught.value).__name__, time.monotonic() - started


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "gone"])
def test_waiting_for_a_rank_ends(silent: bool) -> None:
    (error, seconds), (left, _) = run_on_ranks(
        2, alone_in_a_collective, free_port(), silent, timeout=40
    )
    assert error.endswith("Error")
    assert seconds < 20  # of which two are the timeout
    assert left == "left"


def an_error_inside(port: int) -> str:
    leave_the_pool(port)
    with pytest.raises(ValueError, match="mine") as caught, joined(CPU, 5.0):
        raise ValueError("mine")
    assert not dist.is_initialized()
    return str(caught.value)


def test_an_error_is_passed_on_after_leaving() -> None:
    assert run_on_ranks(2, an_error_inside, free_port()) == ["mine"] * 2
