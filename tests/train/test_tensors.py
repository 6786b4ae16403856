from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint import Entry
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.tensors import (
    check_model,
    empty_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    set_optimizer_tensors,
)


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimConfig())
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry(t.dtype, tuple(t.shape), ()) for name, t in tensors.items()}


def copy(saved: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    assert set(saved) == set(into)
    for name, tensor in saved.items():
        into[name].copy_(tensor)


def test_model_and_optimizer_come_back_and_go_on_alike() -> None:
    one, one_optimizer = trained(0)
    two, two_optimizer = trained(1)
    copy(model_tensors(one), model_tensors(two))
    saved = optimizer_tensors(one, one_optimizer)
    empty = empty_optimizer_tensors(two, two_optimizer, entries(saved), "saved")
    copy(saved, empty)
    set_optimizer_tensors(two, two_optimizer, empty)
    x = torch.randn(5, 3)
    for model, optimizer in ((one, one_optimizer), (two, two_optimizer)):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, tensor in model_tensors(one).items():
        assert torch.equal(tensor, model_tensors(two)[name]), name


@pytest.mark.parametrize("idle", [["0.weight", "0.bias", "1.weight", "1.bias"], ["2.bias"]])
@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_parameters_that_had_no_gradient_yet_begin_anew(
    idle: list[str], kind: Literal["adamw", "adafactor"]
) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, without: list[str]) -> None:
        optimizer.zero_grad()
        for name, param in model.named_parameters():
            if name not in without:
                param.grad = torch.cos(param.detach())
        optimizer.step()

    config = OptimConfig(name=kind)
    one, _ = trained(0)
    one_optimizer = build_optimizer(one, config)
    step(one, one_optimizer, idle)
    saved = optimizer_tensors(one, one_optimizer)
    assert {name.rpartition("/")[0] for name in saved}.isdisjoint(idle)
    two, _ = trained(1)
    copy(model_tensors(one), model_tensors(two))
    two_optimizer = build_optimizer(two, config)
    empty = empty_optimizer_tensors(two, two_optimizer, entries(saved), "saved")
    copy(saved, empty)
    set_optimizer_tensors(two, two_optimizer, empty)
    step(one, one_optimizer, [])
    step(two, two_optimizer, [])
    for name, tensor in model_tensors(one).items():
        assert torch.equal(tensor, model_tensors(two)[name]), name


def test_a_tied_tensor_is_saved_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert list(model_tensors(model)) == ["a.weight", "a.bias", "b.bias"]


def test_every_difference_is_named() -> None:
    own = model_tensors(trained(0)[0])
    saved = entries(own)
    check_model(own, saved, "runs/x")
    del saved["0.weight"]
    saved["extra"] = saved["elsewhere"] = Entry(torch.float32, (1,), ())
    saved["2.weight"] = Entry(torch.float32, (3, 4), ())
    saved["0.bias"] = Entry(torch.float64, (4,), ())
    with pytest.raises(UserError) as error:
        check_model(own, saved, "runs/x", elsewhere=["elsewhere"])
    assert str(error.value) == (
        "runs/x was saved from another model; missing: 0.weight; unexpected: extra; misshapen: "
        "2.weight (expected (2, 4), got (3, 4)); of another dtype: 0.bias (expected "
        "torch.float32, got torch.float64); set [model] as it was for that run, or run.dir to a "
        "new folder"
    )


def test_long_lists_are_cut_and_counted() -> None:
    own = model_tensors(nn.ModuleList(nn.Linear(1, 1) for _ in range(5)))
    with pytest.raises(UserError, match=r"missing: .* and 4 more"):
        check_model(own, {}, "x")


def test_optimizer_state_of_another_model_is_named() -> None:
    model, optimizer = trained(0)
    saved = entries(optimizer_tensors(model, optimizer))
    other = saved | {"0.bias/exp_avg": Entry(torch.float32, (5,), ())}
    with pytest.raises(UserError, match=r"misshapen: 0.bias \(expected \(4,\), got \(5,\)\)"):
        empty_optimizer_tensors(model, optimizer, other, "x")
    more = saved | {"0.gone/exp_avg": Entry(torch.float32, (5,), ())}
    with pytest.raises(UserError, match=r"unexpected: 0.gone"):
        empty_optimizer_tensors(model, optimizer, more, "x")
    assert empty_optimizer_tensors(model, optimizer, more, "x", elsewhere=["0.gone"])
