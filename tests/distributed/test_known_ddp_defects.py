"""What DDP used to do to experts that are not the same on all ranks."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import expertmesh as em
from expertmesh.errors import UserError
from expertmesh.layer import MoE
from expertmesh.shards import Shard
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.testing.equivalence import assemble, pieces
from tests.distributed.layers import DIM, alone, layer, own_slice, tokens


class Net(nn.Module):
    """A user's model: the MoE layer is a part of it, and some of it is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.moe = layer()
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(DIM))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.moe(self.first(x_TD))


def after_ddp(axes: dict[str, int]) -> dict[str, Shard]:
    torch.manual_seed(torch.distributed.get_rank())  # a user may well forget to seed alike
    return pieces(em.ddp(Net(), em.Mesh(**axes)).module.named_parameters())


def test_wrapping_does_not_overwrite_experts_by_those_of_the_first_rank() -> None:
    values = assemble(run_on_ranks(4, after_ddp, {"ep": 2}))
    for name, expected in layer().named_parameters():
        assert torch.equal(values[f"moe.{name}"], expected.detach()), name


def after_training(axes: dict[str, int], accumulation: int) -> dict[str, Shard]:
    """A DDP script: local mean losses, SGD, accumulation under ``no_sync``."""
    mesh = em.Mesh(**axes)
    torch.manual_seed(0)
    net = em.ddp(Net(), mesh) if mesh.world > 1 else Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        parts = tokens(32)[own_slice(mesh, 32)].chunk(accumulation)
        for index, part in enumerate(parts):
            sync = not isinstance(net, DistributedDataParallel) or index == accumulation - 1
            with torch.enable_grad() if sync else net.no_sync():
                (net(part).square().mean() / accumulation).backward()
        em.clip_grad_norm_(net, 0.5, mesh)
        optimizer.step()
        optimizer.zero_grad()
    return pieces((name.removeprefix("module."), p) for name, p in net.named_parameters())


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("axes", [{"ep": 2}, {"ep": 4}, {"etp": 2}], ids=str)
def test_expert_gradients_are_neither_averaged_away_nor_multiplied(
    axes: dict[str, int], accumulation: int
) -> None:
    got = assemble(run_on_ranks(4, after_training, axes, accumulation))
    for name, expected in assemble([after_training({}, accumulation)]).items():
        assert_close(name, got[name], expected)


def one_expert_in_use(axes: dict[str, int]) -> dict[str, Shard]:
    mesh = em.Mesh(**axes)
    moe = layer(k=1, bias=em.SelectionBias(8, rate=0.0))
    with torch.no_grad():
        moe.router.bias.bias_E[0] = 100.0
    net: nn.Module = em.ddp(moe, mesh) if mesh.world > 1 else moe
    for _ in range(2):  # DDP complains in the second pass of parameters unused in the first
        net.zero_grad()
        net(tokens(16)[own_slice(mesh, 16)]).square().mean().backward()
    grads = ((name, p.grad) for name, p in moe.named_parameters())
    return pieces((name, grad) for name, grad in grads if grad is not None)


def test_experts_without_tokens_do_not_stop_ddp() -> None:
    got = assemble(run_on_ranks(2, one_expert_in_use, {"ep": 2}, timeout=30))
    expected = assemble([one_expert_in_use({})])
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(name, got[name], expected[name])


def plain_ddp() -> str:
    moe = em.parallelize(layer(), em.Mesh(ep=2))
    with pytest.raises(UserError) as caught:
        DistributedDataParallel(moe)
    return str(caught.value)


def test_plain_ddp_round_dealt_out_experts_is_refused() -> None:
    for message in run_on_ranks(2, plain_ddp):
        assert "expertmesh.ddp(model, mesh)" in message


def bias_after_forward() -> tuple[Tensor, Tensor]:
    """A forward pass of each rank's own tokens, after which DDP would broadcast buffers."""
    mesh = em.Mesh(ep=2)
    net = em.ddp(layer(bias=em.SelectionBias(8, rate=0.25)), mesh)
    moe = net.module
    assert isinstance(moe, MoE)
    for _ in range(2):
        net(tokens(20)[own_slice(mesh, 20)]).sum().backward()
    counts_E = moe.router.bias.count_E.clone()
    em.update_selection_bias(net, _summed)
    return counts_E, moe.router.bias.bias_E


def _summed(counts: Tensor) -> Tensor:
    counts = counts.clone()
    torch.distributed.all_reduce(counts)
    return counts


def test_load_counters_are_not_overwritten_by_those_of_the_first_rank() -> None:
    (first_E, bias_E), (second_E, other_E) = run_on_ranks(2, bias_after_forward)
    load_E = alone(20).load_E
    assert (first_E + second_E).tolist() == (2 * load_E).tolist()
    expected = 0.25 * torch.sign(load_E.sum() - 8 * load_E).float()
    assert torch.equal(bias_E, expected)
    assert torch.equal(other_E, expected)


def norms() -> tuple[float, float]:
    """The norm as ``clip_grad_norm_`` gives it, and as torch's own sees this rank's part."""
    mesh = em.Mesh(ep=2)
    net = em.ddp(layer(), mesh)
    x_TD = tokens(16)[own_slice(mesh, 16)]
    (net(x_TD) * torch.sin(x_TD)).sum().div(len(x_TD)).backward()
    norm = em.clip_grad_norm_(net, 1e9, mesh)
    own = pieces((n, p.grad) for n, p in net.named_parameters()).values()
    return float(norm), float(torch.stack([piece.local.norm() for piece in own]).norm())


def test_the_norm_is_one_on_all_ranks_although_experts_differ() -> None:
    (first, part), (second, _) = run_on_ranks(2, norms)
    expected = alone(16)
    assert first == second == pytest.approx(expected.norm, rel=1e-12)
    assert part < 0.99 * first
