import threading
import time

import pytest
import torch
import torch.distributed as dist

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing.ranks import run_on_ranks


def outcome(faults: dict[int, Exception]) -> str:
    """What a rank raises when some ranks fail."""
    try:
        with Agreement(Mesh().everyone).together():
            if (fault := faults.get(dist.get_rank())) is not None:
                raise fault
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def talks_in_a_thread() -> tuple[list[int], list[float]]:
    """An agreement's own group does not disturb the ranks' usual one."""
    ranks = Agreement(Mesh().everyone)
    assert ranks.gather("made here") == ["made here"] * ranks.size
    heard: list[int] = []
    thread = threading.Thread(target=lambda: heard.extend(ranks.gather(dist.get_rank())))
    total = torch.ones(1) * dist.get_rank()
    if dist.get_rank() == 0:
        thread.start()
    dist.all_reduce(total)
    if dist.get_rank() != 0:
        thread.start()
    thread.join()
    return heard, total.tolist()


def overlapping() -> list[list[int]]:
    """Meshes that share a rank and leave others out, made by all and used by their own."""
    meshes = [Mesh(ranks=[0, 1]), Mesh(ranks=[1, 2, 3]), Mesh(ranks=[0, 3]), Mesh(), Mesh()]
    talks = [Agreement(mesh.everyone) for mesh in meshes if mesh.member]
    talks += [Agreement(mesh.everyone) for mesh in meshes[:2] if mesh.member]
    talks += [Agreement(mesh.group("dp")) for mesh in meshes[3:]]
    return [talk.gather(dist.get_rank()) for talk in talks]


def test_ranks_of_overlapping_meshes_agree_with_their_own() -> None:
    first, second, third, everyone = [0, 1], [1, 2, 3], [0, 3], [[0, 1, 2, 3]] * 2
    assert run_on_ranks(4, overlapping, timeout=30) == [
        [first, third, *everyone, first, *everyone],
        [first, second, *everyone, first, second, *everyone],
        [second, *everyone, second, *everyone],
        [second, third, *everyone, second, *everyone],
    ]


def test_alone_an_error_is_as_it_was_said() -> None:
    ranks = Agreement()
    assert ranks.gather(3) == [3]
    with pytest.raises(UserError, match=r"^No space left on device$"), ranks.together():
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), ranks.together():
        raise KeyError("a")


def test_nobody_fails() -> None:
    assert run_on_ranks(2, outcome, {}) == ["done"] * 2


def test_mistakes_of_some_are_told_to_all_with_their_ranks() -> None:
    faults = {0: UserError("a"), 1: OSError(28, "No space left on device"), 2: UserError("a")}
    expected = "UserError: ranks 0, 2: a; rank 1: No space left on device"
    assert run_on_ranks(4, outcome, faults) == [expected] * 4


def test_what_all_say_is_said_once() -> None:
    assert run_on_ranks(2, outcome, dict.fromkeys(range(2), UserError("a"))) == ["UserError: a"] * 2


def test_a_defect_is_raised_where_it_is_and_reported_elsewhere() -> None:
    zero, one = run_on_ranks(2, outcome, {0: TypeError("b")})
    assert (zero, one) == ("TypeError: b", "RuntimeError: rank 0: TypeError: b")


def test_mistakes_beside_a_defect_are_no_mistakes_on_any_rank() -> None:
    faults = {0: TypeError("b"), 1: UserError("a")}
    expected = "RuntimeError: rank 0: TypeError: b; rank 1: a"
    assert run_on_ranks(3, outcome, faults) == [expected] * 3


def comes_late() -> str:
    """What rank 0 says of one that is not there in time."""
    ranks = Agreement(Mesh(timeout=1.0).everyone)
    ranks.gather(0)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as caught:
            ranks.gather(1)
        return str(caught.value)
    time.sleep(1.5)
    return ""


def test_a_rank_that_is_slow_is_not_said_to_have_ended() -> None:
    message = run_on_ranks(2, comes_late, timeout=30)[0]
    assert "one of them has ended, or was waited for longer than mesh.timeout" in message
    assert "set mesh.timeout higher" in message


def test_a_thread_may_talk_while_the_ranks_do() -> None:
    assert run_on_ranks(3, talks_in_a_thread) == [([0, 1, 2], [3.0])] * 3
