"""ModuleExperts against the modules themselves."""

import pytest
import torch
from torch import Tensor, nn

from expertmesh.experts import ModuleExperts
from expertmesh.testing import assert_close


class Net(nn.Module):
    """Two layers, a normalisation, a buffer that counts, and a tied scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 9, dtype=torch.float64)
        self.norm = nn.LayerNorm(9, dtype=torch.float64)
        self.fc2 = nn.Linear(9, 6, dtype=torch.float64)
        self.scale = nn.Parameter(torch.rand(6, dtype=torch.float64))
        self.same_scale = self.scale
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.rand(6, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        y = self.fc2(torch.tanh(self.norm(self.fc1(x)))) * self.same_scale
        return y + self.shift


def rows(num_rows: int = 11, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Four experts; expert 1 is idle and some choices are sentinels."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 6, generator=g, dtype=torch.float64)
    expert = torch.randint(0, 5, (num_rows, k), generator=g)
    expert[expert == 1] = 2
    return x, expert, torch.rand(num_rows, k, generator=g, dtype=torch.float64)


def single(experts: ModuleExperts, e: int) -> Net:
    net = Net()
    values = {**dict(experts.stacked.named_parameters()), **dict(experts.stacked.named_buffers())}
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            value.copy_(values[name][e])
    return net


def test_outputs_and_gradients_are_the_modules() -> None:
    experts = ModuleExperts(Net, 4, dim=6, seed=0)
    nets = [single(experts, e) for e in range(4)]
    x, expert, weight = (t.requires_grad_(t.is_floating_point()) for t in rows())
    y = experts(x, expert, weight)
    expected_rows = []
    for r, ids in enumerate(expert.tolist()):
        row = torch.zeros(6, dtype=torch.float64)
        for e, w in zip(ids, weight[r], strict=True):
            if e < 4:
                row = row + w * nets[e](x[r : r + 1])[0]
        expected_rows.append(row)
    expected = torch.stack(expected_rows)
    assert_close("y", y, expected)
    dy = torch.randn_like(y)
    used = [e for e in range(4) if e != 1]
    own = torch.autograd.grad(y, [x, weight, *experts.parameters()], dy)
    theirs = torch.autograd.grad(
        expected, [x, weight, *(p for e in used for p in nets[e].parameters())], dy
    )
    assert_close("dx", own[0], theirs[0])
    assert_close("dweight", own[1], theirs[1])
    num = len(list(experts.parameters()))
    for i, (name, _) in enumerate(experts.named_parameters()):
        assert own[2 + i][1].count_nonzero() == 0
        for j, e in enumerate(used):
            assert_close(f"{name}[{e}]", own[2 + i][e], theirs[2 + j * num + i])


def test_names_and_shapes() -> None:
    experts = ModuleExperts(Net, 4, dim=6)
    state = {name: tuple(value.shape) for name, value in experts.state_dict().items()}
    assert state["stacked.fc1.weight"] == (4, 9, 6)
    assert state["stacked.norm.bias"] == (4, 9)
    assert state["stacked.seen"] == (4,)
    assert experts.stacked.scale is experts.stacked.same_scale
    assert len(list(experts.parameters())) == 7


def test_state_dict_round_trip() -> None:
    one, other = ModuleExperts(Net, 4, dim=6, seed=0), ModuleExperts(Net, 4, dim=6, seed=1)
    other.load_state_dict(one.state_dict())
    other.stacked.shift = one.stacked.shift
    assert torch.equal(one(*rows()), other(*rows()))


def test_buffers_belong_to_each_expert() -> None:
    experts = ModuleExperts(Net, 4, dim=6)
    x, expert, weight = rows()
    experts(x, expert, weight)
    counts = torch.bincount(expert.flatten(), minlength=5)[:4]
    assert experts.stacked.seen.tolist() == counts.tolist()


def test_initial_values_follow_seed_and_expert() -> None:
    one, same, other = (ModuleExperts(Net, 4, dim=6, seed=seed) for seed in (1, 1, 2))
    weight = one.stacked.fc1.weight
    assert torch.equal(weight, same.stacked.fc1.weight)
    assert not torch.equal(weight, other.stacked.fc1.weight)
    assert not torch.equal(weight[0], weight[1])
    few = ModuleExperts(Net, 2, dim=6, seed=1)
    assert torch.equal(few.stacked.fc1.weight, weight[:2])


def test_construction_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    ModuleExperts(Net, 4, dim=6, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_meta_device_gives_the_same_values_later() -> None:
    with torch.device("meta"):
        later = ModuleExperts(Net, 4, dim=6)
    later.to_empty(device="cpu").reset_parameters(5)
    direct = ModuleExperts(Net, 4, dim=6, seed=5)
    for name, value in direct.state_dict().items():
        assert torch.equal(value, later.state_dict()[name]), name
    assert torch.equal(later(*rows()), direct(*rows()))


@pytest.mark.parametrize("num_rows", [0, 3])
def test_nobody_chosen(num_rows: int) -> None:
    experts = ModuleExperts(Net, 4, dim=6)
    x, expert, weight = rows(num_rows)
    x.requires_grad_()
    y = experts(x, torch.full_like(expert, 4), weight)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.count_nonzero() == 0
    for leaf in (x, *experts.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.count_nonzero() == 0


def test_nan_in_sentinels_stays_there() -> None:
    experts = ModuleExperts(Net, 4, dim=6, seed=0)
    x, expert, weight = rows()
    expert[0] = 4
    x[0], weight[0] = float("nan"), float("nan")
    x.requires_grad_()
    y = experts(x, expert, weight)
    y.sum().backward()
    assert y[0].count_nonzero() == 0
    assert x.grad[0].count_nonzero() == 0
    assert all(p.grad.isfinite().all() for p in experts.parameters())


def test_train_and_eval_reach_the_experts() -> None:
    experts = ModuleExperts(lambda: nn.Dropout(1.0), 2, dim=6)
    x, weight = torch.ones(2, 6), torch.ones(2, 1)
    expert = torch.tensor([[0], [1]])
    assert experts.train()(x, expert, weight).sum() == 0
    assert torch.equal(experts.eval()(x, expert, weight), x)


def test_different_structure_is_refused() -> None:
    widths = iter([4, 5])
    with pytest.raises(ValueError, match=r"weight is \(4, 6\) in expert 0 and \(5, 6\)"):
        ModuleExperts(lambda: nn.Linear(6, next(widths)), 2, dim=6)


def test_wrong_output_width() -> None:
    experts = ModuleExperts(lambda: nn.Linear(6, 5), 2, dim=6)
    with pytest.raises(ValueError, match=r"must return the shape .*\(2, 6\), got \(2, 5\)"):
        experts(torch.zeros(2, 6), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def test_wrong_input_width() -> None:
    experts = ModuleExperts(lambda: nn.Linear(6, 6), 2, dim=6)
    with pytest.raises(ValueError, match="x has width 7"):
        experts(torch.zeros(2, 7), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
