import math

import pytest

from expertmesh.train.schedule import Schedule


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    schedule = Schedule(name="constant", steps=10, warmup_steps=4)
    assert [schedule(step) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_is_halfway_in_the_middle_and_final_at_the_end() -> None:
    schedule = Schedule(name="cosine", steps=12, warmup_steps=2, final=0.2)
    assert schedule(7) == pytest.approx(0.6)
    assert schedule(4) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 5)))
    assert schedule(12) == pytest.approx(0.2)


def test_wsd_is_flat_then_linear() -> None:
    schedule = Schedule(name="wsd", steps=10, warmup_steps=2, decay_steps=4, final=0.0)
    factors = [schedule(step) for step in range(2, 11)]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_inverse_sqrt_falls_with_the_root_of_the_step_whatever_the_length() -> None:
    schedule = Schedule(name="inverse_sqrt", steps=10, warmup_steps=4)
    factors = [schedule(step) for step in (1, 2, 4, 9, 16, 400)]
    assert factors == pytest.approx([0.25, 0.5, 1.0, 2 / 3, 0.5, 0.1])
    assert [Schedule(name="inverse_sqrt", steps=10)(step) for step in (1, 4)] == [1.0, 0.5]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant", "inverse_sqrt"])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (5, 5), (9, 9), (0, 5)])
def test_factors_stay_between_zero_and_one(name: str, warmup: int, decay: int) -> None:
    schedule = Schedule(name=name, steps=5, warmup_steps=warmup, decay_steps=decay)  # type: ignore[arg-type]  # parametrized
    assert all(0.0 <= schedule(step) <= 1.0 for step in range(1, 8))
