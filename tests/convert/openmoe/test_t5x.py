"""t5x checkpoints as they are on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.convert.slabs import SLAB_BYTES
from expertmesh.convert.t5x import T5xCheckpoint, find_checkpoint, is_t5x
from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.box import Box
from tests.convert.openmoe import by_hand, t5x_files

TENSORS = {
    "decoder/decoder_norm/scale": torch.randn(5),
    "decoder/layers_0/mlp/wi_0/kernel": torch.randn(4, 7),
    "decoder/layers_1/mlp/expert/wo/kernel": torch.randn(3, 4, 5),
}


def read(path: Path) -> dict[str, Tensor]:
    source = T5xCheckpoint(path)
    return {name: source.read(name, Box.whole(s.shape)) for name, s in source.tensors.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"index": False},
        {"driver": "gcs"},
        {"driver": "gfile"},
        {"pieces": 1},
        {"inline": ("decoder/decoder_norm/scale",)},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_wrote_it(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    path = t5x_files.write(tmp_path / "checkpoint_7", tensors, **options)
    assert is_t5x(path)
    assert_same(read(path), tensors)


def test_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = t5x_files.write(tmp_path / "c", TENSORS)
    # The second time every chunk is too large to be unpacked again for each part.
    for limit in (SLAB_BYTES, 1):
        monkeypatch.setattr("expertmesh.convert.t5x.SLAB_BYTES", limit)
        source = T5xCheckpoint(path)
        for name, tensor in TENSORS.items():
            for start in range(tensor.shape[0]):
                box = Box(
                    (start, *[0] * (tensor.dim() - 1)),
                    (start + 1, *[size - 1 for size in tensor.shape[1:]]),
                )
                whole = Box.whole(tuple(tensor.shape))
                assert torch.equal(source.read(name, box), tensor[box.within(whole)])


def test_an_index_stands_in_for_files_that_begin_with_a_dot(tmp_path: Path) -> None:
    path = t5x_files.write(tmp_path / "c", TENSORS)
    for file in path.glob("*/.zarray"):
        file.unlink()
    assert_same(read(path), TENSORS)


def test_the_newest_of_several_is_taken(tmp_path: Path) -> None:
    for step in (900, 1000, 2):
        t5x_files.write(tmp_path / f"checkpoint_{step}", TENSORS)
    (tmp_path / "checkpoint_5000").mkdir()
    assert is_t5x(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint_1000"
    assert find_checkpoint(tmp_path / "checkpoint_2") == tmp_path / "checkpoint_2"
    assert find_checkpoint(tmp_path / "checkpoint_2" / "checkpoint") == tmp_path / "checkpoint_2"


def test_other_folders_are_none(tmp_path: Path) -> None:
    assert not is_t5x(tmp_path)
    assert not is_t5x(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no checkpoint and no target.\*"):
        T5xCheckpoint(tmp_path)


def test_an_array_that_is_not_there_is_not_listed(tmp_path: Path) -> None:
    path = t5x_files.write(tmp_path / "c", TENSORS)
    shutil.rmtree(path / "target.decoder.decoder_norm.scale")
    assert set(T5xCheckpoint(path).tensors) == set(TENSORS) - {"decoder/decoder_norm/scale"}


def remove_a_chunk(path: Path) -> None:
    (path / "target.decoder.layers_0.mlp.wi_0.kernel" / "1.0").unlink()


def spoil_a_chunk(path: Path) -> None:
    (path / "target.decoder.layers_0.mlp.wi_0.kernel" / "1.0").write_bytes(b"not gzip")


def spoil_metadata(path: Path) -> None:
    (path / "target.decoder.layers_0.mlp.wi_0.kernel" / ".zarray").write_text("{}")


def other_dtype(path: Path) -> None:
    file = path / "target.decoder.layers_0.mlp.wi_0.kernel" / ".zarray"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {"dtype": "<u2"}))


def spoil_the_index(path: Path) -> None:
    (path / "checkpoint").write_bytes(b"\x81\xa1")


def index_of_something_else(path: Path) -> None:
    (path / "checkpoint").write_bytes(b"\x81\xa1a\x01")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_a_chunk, r"wi_0.kernel lacks 1 of its 4 chunks, 1.0 first; copy the folder again"),
        (spoil_a_chunk, r"an array cannot be read: .*wi_0.kernel/1.0"),
        (spoil_metadata, r"wi_0.kernel is no zarr array"),
        (other_dtype, r"is of dtype uint16; expected one of float64, float32"),
        (spoil_the_index, r"checkpoint is no index of t5x: is no MessagePack: it ends early"),
        (index_of_something_else, r"checkpoint is no index of t5x: it has no target"),
    ],
)
def test_spoiled_checkpoints(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    path = t5x_files.write(tmp_path / "c", TENSORS)
    spoil(path)
    with pytest.raises(UserError, match=message):
        read(path)


def test_scalars(tmp_path: Path) -> None:
    tensors = {"decoder/temperature": torch.tensor(0.5)}
    assert_same(read(t5x_files.write(tmp_path / "c", tensors)), tensors)


def test_a_model(tmp_path: Path) -> None:
    tensors = by_hand.t5x(by_hand.model())
    assert_same(read(t5x_files.write(tmp_path / "c", tensors)), tensors)
