"""Which part of the experts a rank gets, and with what values."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh.dispatch import LocalDispatcher
from expertmesh.errors import UserError
from expertmesh.experts import GatedMLPExperts, HeterogeneousExperts, MLPExperts, ModuleExperts
from expertmesh.layer import MoE
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.experts import check_experts, distinct_moe_layers, place_experts
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.routing import TopKRouter
from expertmesh.routing.population import Alone
from expertmesh.shards import Shard, local, shard_of
from expertmesh.testing import run_on_ranks
from expertmesh.testing.equivalence import assemble, pieces
from tests.parallel.user_model import (
    DIM,
    EXPERTS,
    UserModel,
    gradient_pieces,
    moe_of,
    own_tokens,
    tokens,
)

CONFIG = DecoderConfig(
    vocab_size=40,
    dim=16,
    num_layers=3,
    num_heads=4,
    max_seq_len=16,
    qk_norm="full",
    dense_hidden=24,
    first_dense=1,
    num_experts=4,
    experts_per_token=2,
    expert_hidden=12,
    num_shared_experts=1,
)


class Widest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta and not isinstance(out, DTensor):
            self.numel = max(self.numel, out.numel())
        return out


def given_values(degrees: dict[str, Any], zero: int) -> dict[str, Shard]:
    """As the trainer does it: laid out without values, then each rank draws its own."""
    mesh = Mesh(**degrees)
    with torch.device("meta"):
        model = DecoderLM(CONFIG)
    if mesh.degree("pp") > 1:
        stages = Stages.of(CONFIG, mesh.degree("pp"))
        keep_stages(model, stages, mesh.coordinates["pp"])
    parallelize(model, mesh, zero=zero)
    assert all(parameter.is_meta for parameter in model.parameters())
    with Widest() as widest:
        model.to_empty(device="cpu")
        model.init_weights(3)
    # Never more than a rank's own at a time, and no storage of a whole behind a part.
    assert widest.numel <= max(local(p).numel() for p in model.parameters())
    for moe in distinct_moe_layers(model):
        for own in map(local, moe.experts.parameters()):
            assert own.untyped_storage().nbytes() == own.nbytes
    return pieces([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize(
    ("world", "degrees", "zero"),
    [
        (2, {"etp": 2}, 0),
        (4, {"ep": 2}, 3),
        (4, {"ep": 2, "etp": 2, "tp": 2}, 1),
        (4, {"pp": 2, "ep": 2}, 2),
        (6, {"edp": 3, "ep": 2}, 3),
    ],
    ids=str,
)
def test_initial_values_are_those_of_one_process_to_the_bit(
    world: int, degrees: dict[str, Any], zero: int
) -> None:
    expected = pieces([*(model := DecoderLM(CONFIG, seed=3)).named_parameters()])
    expected |= pieces(model.named_buffers())
    got = assemble(run_on_ranks(world, given_values, degrees, zero))
    assert got.keys() == expected.keys()
    for name, shard in expected.items():
        assert torch.equal(got[name], shard.local), name


class Draw(nn.Module):
    """An expert whose buffer and parameters are drawn."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.tied = self.linear.weight
        self.register_buffer("shift", torch.rand(DIM))


def of_modules(degrees: dict[str, Any]) -> tuple[dict[str, Shard], bool]:
    with torch.device("meta"):
        experts = ModuleExperts(Draw, EXPERTS, dim=DIM)
        moe = MoE(TopKRouter(DIM, EXPERTS, 2, seed=0), experts)
    parallelize(moe, Mesh(**degrees))
    stacked = experts.stacked
    assert isinstance(stacked, Draw)
    tied = stacked.get_parameter("tied") is stacked.get_parameter("linear.weight")
    moe.to_empty(device="cpu")
    moe.reset_parameters(9)
    return pieces([*moe.named_parameters(), *moe.named_buffers()]), tied


@pytest.mark.parametrize("degrees", [{"ep": 4}, {"ep": 2, "edp": 2}], ids=str)
def test_modules_as_experts_draw_their_own(degrees: dict[str, Any]) -> None:
    by_rank = run_on_ranks(4, of_modules, degrees)
    experts = ModuleExperts(Draw, EXPERTS, dim=DIM)
    moe = MoE(TopKRouter(DIM, EXPERTS, 2), experts)
    moe.reset_parameters(9)
    got = assemble([view for view, _ in by_rank])
    for name, tensor in (*moe.named_parameters(), *moe.named_buffers()):
        assert torch.equal(got[name], tensor.detach()), name
    assert all(tied for _, tied in by_rank)


def cut_from_values(degrees: dict[str, Any]) -> dict[str, Shard]:
    moe = moe_of("gated")
    assert isinstance(moe.experts, GatedMLPExperts)
    whole = moe.experts.gate_up
    place_experts(moe, Mesh(**degrees))
    part = moe.experts.gate_up
    assert isinstance(part, DTensor)
    assert part.shape == whole.shape
    assert local(part).untyped_storage().nbytes() == local(part).nbytes
    assert local(part).data_ptr() != whole.data_ptr()
    return pieces(moe.named_parameters())


def test_parts_are_cut_from_the_values_that_are_there() -> None:
    got = assemble(run_on_ranks(4, cut_from_values, {"ep": 2, "etp": 2}))
    for name, param in moe_of("gated").named_parameters():
        assert torch.equal(got[name], param.detach()), name


def frozen_and_connected() -> None:
    """Freezing is kept; layers know the ranks; a layer in two places is placed once."""
    mesh = Mesh(ep=2)
    model = UserModel()
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    assert not all(before.values())
    place_experts(model, mesh)
    assert {name: param.requires_grad for name, param in model.named_parameters()} == before
    for moe in distinct_moe_layers(model):
        assert not isinstance(moe.dispatcher, LocalDispatcher)
        assert moe.router.population.num_ranks == 2
        for param in moe.experts.parameters():
            shard = shard_of(param)
            assert shard.offset[0] == mesh.rank * EXPERTS // 2
    names = [name for name, _ in UserModel().named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names


def test_placing_changes_neither_names_nor_what_is_frozen() -> None:
    run_on_ranks(2, frozen_and_connected)


def test_one_rank_has_its_experts_at_hand() -> None:
    moe = moe_of()
    place_experts(moe, Mesh())
    assert isinstance(moe.dispatcher, LocalDispatcher)
    assert isinstance(moe.router.population, Alone)
    assert not isinstance(moe.experts.down, DTensor)


def heterogeneous() -> MoE:
    kinds = [nn.Linear(DIM, DIM), nn.Sequential(nn.Linear(DIM, 3), nn.Linear(3, DIM))]
    return MoE(TopKRouter(DIM, 2, 1), HeterogeneousExperts(kinds, dim=DIM))


def refusals() -> list[str]:
    messages = []
    attempts: list[tuple[nn.Module, dict[str, int]]] = [
        (heterogeneous(), {"ep": 2}),
        (moe_of("module"), {"etp": 2}),
        (MoE(TopKRouter(DIM, 3, 1), MLPExperts(DIM, 4, 3)), {"ep": 2}),
        (MoE(TopKRouter(DIM, 2, 1), MLPExperts(DIM, 5, 2)), {"etp": 2}),
    ]
    for model, degrees in attempts:
        options: dict[str, Any] = dict(degrees)
        with pytest.raises(UserError) as caught:
            check_experts(model, Mesh(**options), "all_to_all")
        messages.append(str(caught.value))
    return messages


def test_experts_that_do_not_fit_are_refused() -> None:
    for unstacked, inseparable, uneven, odd in run_on_ranks(2, refusals):
        assert "HeterogeneousExperts does not stack its experts" in unstacked
        assert "set ep=1 and etp=1, got ep=2, etp=1" in unstacked
        assert "ModuleExperts cannot be cut into hidden slices, got etp=2" in inseparable
        assert "ep=2 for 3 experts; set ep to one of [1]" in uneven
        assert "etp must divide the hidden width of up, got etp=2 for 5 hidden units" in odd


def copied(number: int) -> tuple[Tensor, dict[str, Shard]]:
    """What cannot be dealt out can be copied, here in pieces; outputs and gradients."""
    mesh = Mesh()
    torch.manual_seed(0)
    moe = heterogeneous().double()
    if mesh.world > 1:
        parallelize(moe, mesh, zero=3)
    x_TD = tokens(number, 0)[own_tokens(mesh, number)]
    y_TD = moe(x_TD)
    (y_TD * x_TD).sum().backward()
    return y_TD.detach(), gradient_pieces(moe)


@pytest.mark.parametrize("number", [9, 1])
def test_experts_of_different_kinds_are_copied(number: int) -> None:
    # Of one token only one rank has any, and it reaches one expert only: nobody waits.
    views = run_on_ranks(2, copied, number, timeout=30)
    expected, gradients = copied(number)
    torch.testing.assert_close(torch.cat([y for y, _ in views]), expected)
    got = assemble([view for _, view in views])
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient.local, msg=name)
