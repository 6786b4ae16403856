import math

import numpy as np

from expertmesh.report.by_token import by_token


def entry(guessed: float, favourites: dict[int, int]) -> dict:
    ids, favourite = list(favourites), list(favourites.values())
    found = {"guessed": guessed, "unguided": 0.25, "ids": ids, "favourite": favourite}
    return {"load": [1], "by_token": found}


def test_settled_counts_favourites_that_are_the_last_ones() -> None:
    found = by_token(
        [
            (10, entry(0.2, {1: 0, 2: 3, 5: 1, 6: 1})),
            (15, {"load": [1]}),
            (20, entry(0.5, {1: 2, 2: 3, 5: 1, 6: 1})),
            (30, entry(0.7, {1: 2, 2: 3, 5: 0, 6: 1})),
        ]
    )
    assert found.step.tolist() == [10, 20, 30]
    assert found.guessed.tolist() == [0.2, 0.5, 0.7]
    assert found.unguided.tolist() == [0.25] * 3
    assert found.settled.tolist() == [0.5, 0.75, 1.0]


def test_ids_that_one_of_two_evaluations_lacks_are_left_out() -> None:
    found = by_token([(1, entry(0.1, {1: 0})), (2, entry(0.1, {2: 0})), (3, entry(0.1, {1: 0}))])
    np.testing.assert_array_equal(found.settled, [1.0, math.nan, 1.0])


def test_malformed_entries_are_left_out() -> None:
    good = entry(0.5, {1: 1})
    torn = {"by_token": {**good["by_token"], "favourite": []}}
    nested = {"by_token": {**good["by_token"], "ids": [[1]]}}
    empty = {"by_token": {"guessed": None, "unguided": None, "ids": [], "favourite": []}}
    found = by_token([(1, torn), (2, empty), (3, {"by_token": 7}), (4, good), (5, {}), (6, nested)])
    assert found.step.tolist() == [4]
    assert len(by_token([])) == 0
