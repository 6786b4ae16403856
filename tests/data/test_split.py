import random

import pytest

from expertmesh.data.split import ENOUGH_DOCUMENTS, HeldOut, split
from expertmesh.errors import UserError


def parts(documents, val_fraction):
    how, pieces = split(lambda: iter(documents), val_fraction)
    got = {"train": [], "val": []}
    for part, text in pieces:
        got[part].append(text)
    return how, got["train"], got["val"]


MANY = [f"document {i}" for i in range(ENOUGH_DOCUMENTS * 2)]


def test_whole_documents_are_held_out():
    how, train, val = parts(MANY, 0.1)
    assert how == "documents"
    assert len(val) == 20
    assert sorted(train + val) == sorted(MANY)


def test_the_same_documents_in_any_order():
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert sorted(parts(MANY, 0.1)[2]) == sorted(parts(shuffled, 0.1)[2])


def test_copies_stay_together():
    _, train, val = parts(MANY * 3, 0.1)
    assert not set(train) & set(val)
    assert len(val) == 60


def test_few_documents_lose_their_tails():
    text = "".join(f"line {i:03}\n" for i in range(100))
    how, train, val = parts([text, text.upper()], 0.1)
    assert how == "tails"
    assert [a + b for a, b in zip(train, val, strict=True)] == [text, text.upper()]
    assert train[0].endswith("\n")
    assert len(val[0]) / len(text) == 0.1


def test_a_tail_starts_at_a_line():
    _, train, val = parts(["one\ntwo\nthree\nfour\n"], 0.4)
    assert (train, val) == (["one\ntwo\nthree\n"], ["four\n"])


def test_one_long_line_is_cut_where_it_is():
    _, train, val = parts(["x" * 100], 0.25)
    assert (len(train[0]), len(val[0])) == (75, 25)


def test_one_character_is_trained_on():
    assert parts(["x"], 0.5)[1:] == (["x"], [])


def test_nothing_held_out():
    assert parts(["a\nb"], 0.0) == ("none", ["a\nb"], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_a_wrong_fraction(fraction):
    with pytest.raises(UserError, match="val_fraction must be at least 0 and below 1"):
        split(lambda: iter([]), fraction)


def test_many_documents_are_held_out_by_their_hash_alone(monkeypatch):
    monkeypatch.setattr("expertmesh.data.split._EXACT_DOCUMENTS", 1000)
    many = [f"document {i}" for i in range(20_000)]
    read = []

    def documents():
        for text in many:
            read.append(text)
            yield text

    held_out = HeldOut.of(documents(), 0.1)
    # Reading stops as soon as exact counting is given up.
    assert len(read) == 1001
    share = sum(text in held_out for text in many) / len(many)
    assert abs(share - 0.1) < 3 * (0.1 * 0.9 / len(many)) ** 0.5
    assert held_out == HeldOut.of(iter(reversed(many)), 0.1)


@pytest.mark.parametrize(
    ("share", "number", "held"), [(0.05, 140, 7), (0.07, 100, 7), (0.1, 101, 11)]
)
def test_the_share_is_the_decimal_that_was_written(share, number, held):
    texts = [str(place) for place in range(number)]
    held_out = HeldOut.of(texts, share)
    assert sum(text in held_out for text in texts) == held
