"""One small model held by ranks in many ways, for tests of what is saved and loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from expertmesh.parallel.mesh import Mesh
from expertmesh.train.checkpoint import CheckpointFolder
from expertmesh.train.tensors import model_tensors, optimizer_tensors

Values = dict[str, Tensor]


class Model(nn.Module):
    """Odd lengths, stacked experts, a scalar, a vector shorter than the ranks, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterDict({"up": torch.randn(8, 2, 4, 3)})
        self.attention = nn.Linear(6, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.gain = nn.Parameter(torch.randn(1))
        self.register_buffer("load", torch.randint(99, (8,)))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("bias", torch.randn(8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x)) * self.gain


def alone(model: Model) -> None:
    """Every rank holds everything."""


def zero_0(model: Model) -> None:
    fully_shard(model, mesh=_mesh(replicate=dist.get_world_size(), shard=1))


def zero_1(model: Model) -> None:
    fully_shard(model, mesh=_mesh(dp=dist.get_world_size()), reshard_after_forward=False)


def zero_3(model: Model) -> None:
    mesh = _mesh(dp=dist.get_world_size())
    fully_shard(model.attention, mesh=mesh)
    fully_shard(model, mesh=mesh)


def ep_4(model: Model) -> None:
    _experts(model, edp=1, ep=4, etp=1)


def ep_2_edp_2(model: Model) -> None:
    _experts(model, edp=2, ep=2, etp=1)


def ep_2_etp_2(model: Model) -> None:
    _experts(model, edp=1, ep=2, etp=2)


def _experts(model: Model, **degrees: int) -> None:
    mesh = _mesh(**degrees)
    up = distribute_tensor(model.experts["up"].data, mesh["ep", "etp"], [Shard(0), Shard(2)])
    model.experts["up"] = nn.Parameter(up)
    fully_shard(model.experts, mesh=mesh["edp"])
    fully_shard(model, mesh=_mesh(dp=dist.get_world_size()))


def tp_2_dp_2(model: Model) -> None:
    mesh = _mesh(dp=2, tp=2)
    for linear, dim in ((model.attention, 0), (model.head, 1)):
        weight = distribute_tensor(linear.weight.data, mesh["tp"], [Shard(dim)])
        linear.weight = nn.Parameter(weight)
    fully_shard(model, mesh=mesh["dp"])


def _mesh(**degrees: int) -> DeviceMesh:
    shape = tuple(degrees.values())
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(degrees))


def pp_2(model: Model) -> None:
    """Each rank holds some of the layers, and some buffers."""
    dropped = ["head", "gain", "bias"] if dist.get_rank() == 0 else ["experts", "attention", "load"]
    for name in dropped:
        delattr(model, name)


def build(cut: Callable[[Model], None], seed: int) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model()
    cut(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Two steps whose gradients are functions of the weights alone."""
    for _ in range(2):
        for param in model.parameters():
            param.grad = param.detach() * 0.5 + 1
        optimizer.step()


def values(model: Model, optimizer: torch.optim.Optimizer) -> Values:
    """Everything that a checkpoint holds, whole, as this rank knows it."""
    tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
    return {name: whole(tensor) for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def save(path: Path, cut: Callable[[Model], None], asynchronous: bool = False) -> Values:
    """Train from seed 0, save as step 2, and go on training. Returns what was saved."""
    model, optimizer = build(cut, seed=0)
    train(model, optimizer)
    if cut is zero_1:
        with torch.no_grad():
            model(torch.ones(2, 6))  # leaves the whole weights in place of the shards
    before = values(model, optimizer)
    folder = CheckpointFolder(path, group=Mesh().everyone)
    folder.save(2, model, optimizer, {"tokens": 5}, asynchronous=asynchronous)
    train(model, optimizer)
    folder.wait()
    return before


def load(path: Path, cut: Callable[[Model], None]) -> Values:
    """Load the newest into a model from another seed that was never trained."""
    model, optimizer = build(cut, seed=1)
    checkpoint, refused = CheckpointFolder(path, group=Mesh().everyone).newest_valid()
    assert checkpoint is not None
    assert refused == []
    assert checkpoint.state() == {"step": 2, "tokens": 5}
    checkpoint.load_model(model)
    checkpoint.load_optimizer(model, optimizer)
    found = values(model, optimizer)
    train(model, optimizer)  # an optimizer that was given its state can go on
    return found


def union(of_ranks: list[Values]) -> Mapping[str, Tensor]:
    """What the ranks know together; they must agree on what several know."""
    merged: Values = {}
    for known in of_ranks:
        for name, tensor in known.items():
            assert torch.equal(merged.setdefault(name, tensor), tensor), name
    return merged
