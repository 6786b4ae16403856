import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.box import Box, held
from expertmesh.testing.ranks import run_on_ranks


def test_overlap_and_slices() -> None:
    box = Box((2, 0), (5, 4))
    assert box.shape == (3, 4)
    assert box.num_elements == 12
    overlap = box.overlap(Box((4, 1), (9, 3)))
    assert overlap == Box((4, 1), (5, 3))
    assert overlap.within(box) == (slice(2, 3), slice(1, 3))
    assert str(overlap) == "[4:5,1:3]"
    assert box.overlap(Box((5, 0), (6, 4))) is None
    assert box.overlap(Box((3, 2), (3, 4))) is None


def test_a_scalar_is_a_box_of_one_element() -> None:
    scalar = Box.whole(())
    assert scalar.num_elements == 1
    assert scalar.overlap(scalar) == scalar


def test_a_plain_tensor_is_held_whole() -> None:
    shard = held("x", torch.ones(2, 3))
    assert Box.of(shard) == Box.whole((2, 3))


def boxes_of(length: int, placements: list[Placement]) -> tuple[Box, bool]:
    """The box held on a mesh of 2 x 2, and whether it holds what the whole has there."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = torch.arange(length * 6.0).reshape(length, 6)
    return _checked(distribute_tensor(whole, mesh, placements), whole)


def boxes_of_fsdp(length: int) -> tuple[Box, bool]:
    """The same for FSDP2 over a dim that is cut already."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = torch.arange(length * 6.0).reshape(length, 6)
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)]))
    fully_shard(module, mesh=mesh["dp"])
    return _checked(module.weight.detach(), whole)


def _checked(tensor: torch.Tensor, whole: torch.Tensor) -> tuple[Box, bool]:
    shard = held("x", tensor)
    box = Box.of(shard)
    return box, torch.equal(shard.local, whole[box.within(Box.whole(shard.shape))])


def refusals() -> list[str]:
    """Parts that are no boxes."""
    mesh = init_device_mesh("cpu", (2,))
    texts = []
    for placement in (Partial(), _StridedShard(0, split_factor=2)):
        tensor = DTensor.from_local(
            torch.ones(2), mesh, [placement], shape=torch.Size([4]), stride=(1,)
        )
        with pytest.raises(UserError) as error:
            held("blocks.0.weight", tensor)
        texts.append(str(error.value))
    return texts


@pytest.mark.parametrize("length", [8, 5, 1])
@pytest.mark.parametrize(
    "placements",
    [[Shard(0), Shard(0)], [Shard(1), Shard(0)], [Replicate(), Shard(0)], [Replicate()] * 2],
    ids=str,
)
def test_the_box_holds_what_the_whole_has_there(length: int, placements: list[Placement]) -> None:
    assert all(right for _, right in run_on_ranks(4, boxes_of, length, placements))


@pytest.mark.parametrize("length", [8, 6, 5, 3, 1])
def test_fsdp_over_a_dim_that_is_cut_already(length: int) -> None:
    found = run_on_ranks(4, boxes_of_fsdp, length)
    assert all(right for _, right in found)
    assert sum(box.num_elements for box, _ in found) == length * 6


def test_what_is_no_box_is_refused_by_name() -> None:
    for partial, strided in run_on_ranks(2, refusals):
        assert partial.startswith("blocks.0.weight is Partial(sum)")
        assert "with strides that no inner axis closes" in strided
