import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.files import DTYPES, sha256, write_json, write_tensors


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.tensor([[0, 1, 1]]).to(dtype) for dtype in DTYPES.values()}
    written = write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tolist() == tensor.tolist()
    content = (tmp_path / "x.safetensors").read_bytes()
    assert written.num_bytes == len(content)
    assert written.sha256 == hashlib.sha256(content).hexdigest() == sha256(tmp_path / written.name)


def test_scalars_empty_ones_views_and_none(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"scalar": whole[1, 2], "empty": whole[:0], "view": whole.t()[1:], "é[0:2]": whole}
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    write_tensors(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors") == {}


def test_one_element_with_a_stride_of_its_own(tmp_path: Path) -> None:
    """torch calls it contiguous whatever its strides, and reshaping keeps them."""
    column = torch.arange(32.0).reshape(4, 8)[:, 3]
    tensors = {"odd": column[1:2], "deeper": column[1:2, None], "several": column}
    assert tensors["odd"].stride() == (8,)
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"complex128 cannot be saved; expected one of torch.bool"):
        write_tensors(tmp_path / "x", {"a": torch.ones(1, dtype=torch.complex128)})


def test_json(tmp_path: Path) -> None:
    written = write_json(tmp_path / "x.json", {"a": (1, 2)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2]}
    assert written.sha256 == sha256(tmp_path / "x.json")
