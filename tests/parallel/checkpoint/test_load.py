from pathlib import Path

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.checkpoint import load_tensors, plan, read_index
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.parallel.checkpoint.files import write_tensors
from expertmesh.parallel.checkpoint.index import Entry


def test_boxes_of_many_files_make_one_tensor(tmp_path: Path) -> None:
    whole = torch.randn(5, 4, 3)
    boxes = [Box((0, 0, 0), (2, 4, 3)), Box((2, 0, 0), (5, 1, 3)), Box((2, 1, 0), (5, 4, 3))]
    for number, box in enumerate(boxes):
        part = whole[box.within(Box.whole(whole.shape))]
        write_tensors(tmp_path / f"a-{number}", {f"w{box}": part})
    entry = Entry(whole.dtype, (5, 4, 3), tuple((f"a-{n}", box) for n, box in enumerate(boxes)))
    found = torch.full_like(whole, -1)
    load_tensors(tmp_path, {"w": entry}, {"w": found})
    assert torch.equal(found, whole)


def test_many_small_reads_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertmesh.parallel.checkpoint.load.MAPPED_BYTES", 24)
    tensors = {f"w{n}": torch.randn(n) for n in range(7)}
    plan(tensors, "a", Agreement()).write(tmp_path)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_tensors(tmp_path, read_index(tmp_path, "a"), found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"v": torch.ones(2)}, "a cannot be read: .*w"),
        ({"w": torch.ones(3)}, r"a: w should be torch.float32 \(2,\), is torch.float32 \(3,\)"),
        ({"w": torch.ones(2).double()}, r"should be torch.float32 \(2,\), is torch.float64"),
    ],
)
def test_a_file_that_is_not_as_its_index_says(
    tmp_path: Path, saved: dict[str, torch.Tensor], message: str
) -> None:
    write_tensors(tmp_path / "a", saved)
    entry = Entry(torch.float32, (2,), (("a", Box.whole((2,))),))
    with pytest.raises(UserError, match=message):
        load_tensors(tmp_path, {"w": entry}, {"w": torch.zeros(2)})


def test_a_copy_on_the_host_does_not_change_with_the_model() -> None:
    tensor = torch.ones(3, 2).t()
    part = plan({"w": tensor}, "a", Agreement())
    copy = part.on_host()
    tensor.zero_()
    assert torch.equal(copy.tensors["w"], torch.ones(2, 3))
    assert torch.equal(part.tensors["w"], torch.zeros(2, 3))
