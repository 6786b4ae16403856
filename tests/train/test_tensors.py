import pytest
import torch
from torch import nn

from expertmesh.errors import UserError
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.tensors import (
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimConfig())
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_model_and_optimizer_come_back_and_go_on_alike() -> None:
    one, one_optimizer = trained(0)
    two, two_optimizer = trained(1)
    load_model_tensors(two, model_tensors(one), "saved")
    saved = {key: state.clone() for key, state in optimizer_tensors(one, one_optimizer).items()}
    load_optimizer_tensors(two, two_optimizer, saved, "saved")
    x = torch.randn(5, 3)
    for model, optimizer in ((one, one_optimizer), (two, two_optimizer)):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, tensor in model_tensors(one).items():
        assert torch.equal(tensor, model_tensors(two)[name]), name


def test_a_tied_tensor_is_saved_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert list(model_tensors(model)) == ["a.weight", "a.bias", "b.bias"]


def test_every_difference_is_named_and_nothing_is_loaded() -> None:
    model, _ = trained(0)
    before = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    saved = {name: tensor + 1 for name, tensor in before.items()}
    del saved["0.weight"]
    saved["extra"] = torch.zeros(1)
    saved["2.weight"] = torch.zeros(3, 4)
    saved["0.bias"] = saved["0.bias"].double()
    with pytest.raises(UserError) as error:
        load_model_tensors(model, saved, "runs/x")
    for part in (
        "runs/x was saved from another model",
        "missing: 0.weight",
        "unexpected: extra",
        "misshapen: 2.weight (expected (2, 4), got (3, 4))",
        "of another dtype: 0.bias (expected torch.float32, got torch.float64)",
    ):
        assert part in str(error.value)
    for name, tensor in model_tensors(model).items():
        assert torch.equal(tensor, before[name])


def test_long_lists_are_cut_and_counted() -> None:
    with pytest.raises(UserError, match=r"missing: .* and 4 more"):
        load_model_tensors(nn.ModuleList(nn.Linear(1, 1) for _ in range(5)), {}, "x")


def test_optimizer_state_of_another_model_is_named() -> None:
    model, optimizer = trained(0)
    saved = optimizer_tensors(model, optimizer)
    without = {name: tensor for name, tensor in saved.items() if not name.startswith("0.bias")}
    with pytest.raises(UserError, match=r"optimizer state of another model; missing: 0.bias"):
        load_optimizer_tensors(model, optimizer, without, "x")
