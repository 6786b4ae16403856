import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from expertmesh.errors import UserError
from expertmesh.testing import RankError, RankPool, RankTimeout, run_on_ranks
from expertmesh.testing.nursery import _Call, _Rank
from expertmesh.testing.protocol import Hung

REMEMBERED: list[int] = []


def total_of_ranks(start: int) -> tuple[int, int, int]:
    value = torch.tensor([start + dist.get_rank()], dtype=torch.float64)
    dist.all_reduce(value)
    assert os.environ["RANK"] == str(dist.get_rank())
    assert os.environ["WORLD_SIZE"] == str(dist.get_world_size())
    return dist.get_rank(), int(value), torch.get_num_threads()


def remember() -> int:
    REMEMBERED.append(1)
    return len(REMEMBERED)


def one_raises() -> None:
    if dist.get_rank() == 2:
        raise ValueError("rank two is not amused")
    dist.barrier()


def all_raise() -> None:
    raise UserError(f"said by {dist.get_rank()}")


def one_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def one_dies_unseen() -> None:
    """The nursery is stopped for a while, and then hears of both ends at once."""
    if dist.get_rank() == 1:
        nursery = os.getppid()
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {nursery}"])
        os.kill(nursery, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def never_arrives() -> None:
    if dist.get_rank() != 0:
        wait_for_rank_zero()


def wait_for_rank_zero() -> None:
    dist.barrier()


def sleep_long(path: str) -> None:
    Path(path, str(os.getpid())).touch()
    time.sleep(100)


def pid_and_parent() -> tuple[int, int]:
    return os.getpid(), os.getppid()


def echo(x: torch.Tensor) -> torch.Tensor:
    return x * (dist.get_rank() + 1)


def where() -> tuple[str, str | None]:
    return os.getcwd(), os.environ.get("EXPERTMESH_TEST_WORD")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_end_soon(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{[p for p in pids if alive(p)]} live on"
        time.sleep(0.02)


@pytest.mark.parametrize("world", [1, 3, 2])
def test_every_rank_answers_in_its_place(world: int) -> None:
    expected = world * 10 + sum(range(world))
    assert run_on_ranks(world, total_of_ranks, 10) == [(r, expected, 1) for r in range(world)]


def test_a_rank_remembers_nothing_of_earlier_calls() -> None:
    assert run_on_ranks(2, remember) == [1, 1]
    assert run_on_ranks(2, remember) == [1, 1]


def test_tensors_go_both_ways() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    one, two = run_on_ranks(2, echo, x)
    assert torch.equal(one, x)
    assert torch.equal(two, 2 * x)


def test_ranks_see_the_callers_folder_and_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_on_ranks(1, where)  # the nursery is there before the change
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPERTMESH_TEST_WORD", "hello")
    assert run_on_ranks(1, where) == [(str(tmp_path), "hello")]


def test_an_exception_names_its_rank_and_does_not_wait_for_the_others() -> None:
    # Among other workers this one first waits for its turn, which counts here.
    start = time.monotonic()
    with pytest.raises(RankError, match="rank two is not amused") as caught:
        run_on_ranks(3, one_raises, timeout=600)
    assert time.monotonic() - start < 300
    assert caught.value.rank == 2
    assert "one_raises" in str(caught.value)
    assert list(caught.value.tracebacks) == [2]
    assert len(run_on_ranks(3, remember)) == 3


def test_an_error_on_every_rank_is_heard_from_every_rank() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(2, all_raise)
    assert {r: f"said by {r}" in text for r, text in caught.value.tracebacks.items()} == {
        0: True,
        1: True,
    }


@pytest.mark.parametrize("dies", [one_dies, one_dies_unseen])
def test_a_dead_rank_is_an_error_that_says_how_it_died(dies: Callable[[], None]) -> None:
    with pytest.raises(RankError, match="ended with signal SIGKILL") as caught:
        run_on_ranks(2, dies, timeout=30)
    assert caught.value.rank == 1


def test_a_hang_ends_with_the_stacks_of_those_who_wait() -> None:
    with pytest.raises(RankTimeout, match="wait_for_rank_zero") as caught:
        run_on_ranks(3, never_arrives, timeout=2)
    assert caught.value.ranks == [1, 2]
    assert "not finished after 2 s" in str(caught.value)


def test_a_rank_that_has_not_begun_is_late_too(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "100"]) as process, Pipe()[0] as pipe:
        call = _Call([_Rank(process.pid, pipe, tmp_path / "not_yet")])
        assert call.answer() == Hung({0: "the rank had not begun"})


def test_ranks_end_with_their_call_and_the_nursery_with_its_pool() -> None:
    with RankPool() as pool:
        first = pool.run(2, pid_and_parent)
        second = pool.run(2, pid_and_parent)
        assert len({parent for _, parent in first + second}) == 1
        assert_end_soon([pid for pid, _ in first + second])
        nursery = first[0][1]
        assert alive(nursery)
    assert_end_soon([nursery])


def test_an_abandoned_call_leaves_no_rank_behind(tmp_path: Path) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def interrupt_when_both_sleep() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        threading.Thread(target=interrupt_when_both_sleep, daemon=True).start()
        with RankPool() as pool, pytest.raises(KeyboardInterrupt):
            pool.run(2, sleep_long, str(tmp_path))
    finally:
        signal.signal(signal.SIGALRM, previous)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert_end_soon(pids)


def test_a_function_without_an_importable_name_is_refused() -> None:
    with pytest.raises(UserError, match="importable by name"):
        run_on_ranks(1, lambda: None)
    with pytest.raises(UserError, match="world must be at least 1"):
        run_on_ranks(0, remember)


def noted(path: str) -> None:
    """Write when this call began and ended."""
    if dist.get_rank() == 0:
        begin = time.monotonic()
        time.sleep(0.5)
        Path(path, str(os.getpid())).write_text(f"{begin} {time.monotonic()}")


def test_workers_take_turns_with_many_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with RankPool() as other:
        other.run(1, remember)
        threads = [
            threading.Thread(target=run, args=(3, noted, str(tmp_path)))
            for run in (run_on_ranks, other.run)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    spans = sorted(tuple(map(float, p.read_text().split())) for p in tmp_path.iterdir())
    assert len(spans) == 2
    assert spans[0][1] <= spans[1][0]
