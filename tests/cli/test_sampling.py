"""Text as it comes: what waits, and what is never shown."""

import pytest
import torch

from expertmesh.cli.sampling import Pieces

WORDS = {7: "a", 8: " b", 9: " </", 10: "s", 11: ">", 12: "\N{REPLACEMENT CHARACTER}"}


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def shown(ids, **options):
    parts: list[str] = []
    pieces = Pieces(decode, parts.append, **options)
    pieces.put(torch.tensor([ids[0]]))
    for token in ids[1]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(parts) == pieces.text
    return parts


def test_text_comes_piece_by_piece() -> None:
    assert shown(([7], [8, 8])) == ["a", " b", " b", ""]
    assert shown(([7], [8, 8]), with_prompt=False) == [" b", " b", ""]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([8, 9, 10, 11], " b"),
        ([8, 9, 10], " b </s"),
        ([8, 9, 9, 10, 11], " b </"),
        ([9, 10, 8, 11], " </s b>"),
        ([9, 10, 11, 8], " </s> b"),
    ],
)
def test_an_ending_is_held_back_and_left_out(ids: list[int], text: str) -> None:
    parts = shown(([7], ids), with_prompt=False, endings=[(9, 10, 11)])
    assert "".join(parts) == text


def test_half_a_character_waits() -> None:
    assert shown(([7], [12, 8])) == ["a", "\N{REPLACEMENT CHARACTER} b", ""]
