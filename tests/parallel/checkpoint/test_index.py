from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.parallel.checkpoint.index import Entry, key, read_index, write_index

HALVES = (("a-1", Box((0, 0), (2, 3))), ("a-2", Box((2, 0), (4, 3))))


def test_an_index_comes_back(tmp_path: Path) -> None:
    entries = {
        "w": Entry(torch.bfloat16, (4, 3), HALVES),
        "step": Entry(torch.float32, (), (("a-2", Box((), ())),)),
        "none": Entry(torch.int64, (0, 3), ()),
    }
    write_index(tmp_path, "a", entries)
    assert read_index(tmp_path, "a") == entries


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4, 3), "n": torch.tensor(1)}, tmp_path / "a.safetensors")
    assert read_index(tmp_path, "a") == {
        "w": Entry(torch.float32, (4, 3), (("a.safetensors", Box.whole((4, 3))),)),
        "n": Entry(torch.int64, (), (("a.safetensors", Box.whole(())),)),
    }


def test_a_tensor_that_lacks_a_part_is_named(tmp_path: Path) -> None:
    write_index(tmp_path, "a", {"w": Entry(torch.float32, (4, 3), HALVES[1:])})
    with pytest.raises(UserError, match=r"a.index.json: 6 of 12 elements of w are there"):
        read_index(tmp_path, "a")


@pytest.mark.parametrize("text", ["{", '{"files": []}', '{"files": [], "tensors": {"w": {}}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.index.json").write_text(text)
    with pytest.raises(UserError, match=r"a.index.json cannot be read as an index"):
        read_index(tmp_path, "a")


def test_nothing_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.safetensors is missing"):
        read_index(tmp_path, "a")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a.safetensors cannot be read as safetensors"):
        read_index(tmp_path, "a")


def test_a_box_is_called_by_its_place() -> None:
    assert key("w", Box.whole((4, 3)), (4, 3)) == "w"
    assert key("w", HALVES[1][1], (4, 3)) == "w[2:4,0:3]"
    assert key("step", Box.whole(()), ()) == "step"
