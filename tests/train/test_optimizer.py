import math
from typing import Any

import pytest
import torch
from torch import nn

from expertmesh.errors import UserError
from expertmesh.train.optimizer import OptimConfig, build_optimizer, decays, set_lr
from expertmesh.train.optimizers.adafactor import Adafactor


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.scale = nn.Parameter(torch.ones(3))
        self.up_bias = nn.Parameter(torch.ones(4, 3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_vectors_and_stacked_biases_do_not_decay() -> None:
    model = Toy()
    decayed = {name for name, param in model.named_parameters() if decays(name, param)}
    assert decayed == {"weight", "frozen"}


def test_decay_acts_on_decayed_parameters_only_and_frozen_ones_are_left_out() -> None:
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((3, 2), 0.95))
    assert torch.equal(model.scale, torch.ones(3))
    assert torch.equal(model.up_bias, torch.ones(4, 3))
    assert torch.equal(model.frozen, torch.ones(2, 2))


def test_fused_step_is_the_papers_formula() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    start, grad = model.weight.detach().clone(), torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    config = OptimConfig(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.2)
    optimizer = build_optimizer(model, config)
    assert optimizer.defaults["fused"]
    model.weight.grad = grad.clone()
    optimizer.step()
    # After one step the corrected moments are the gradient and its square.
    expected = start * (1 - 0.1 * 0.2) - 0.1 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_adafactor_by_name_with_the_same_groups() -> None:
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(name="adafactor", lr=0.1, weight_decay=0.5))
    assert isinstance(optimizer, Adafactor)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((3, 2), 0.95))
    assert torch.equal(model.scale, torch.ones(3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adafactor", "beta1": 0.5}, "optim.beta1 is of optim.name = 'adamw'"),
        ({"beta2_decay": 0.5}, "optim.beta2_decay is of optim.name = 'adafactor'"),
        ({"name": "adafactor", "beta2_decay": 0.0}, "optim.beta2_decay must be above 0"),
        ({"schedule": "constant", "final": 0.5}, "optim.final is of the schedules 'cosine' and"),
        ({"clip": math.nan}, r"optim.clip must be finite, got nan; set optim.clip = 1\.0"),
        ({"lr": math.inf}, r"optim.lr must be finite, got inf; set optim.lr = 0\.001"),
        ({"weight_decay": math.inf}, "optim.weight_decay must be finite, got inf"),
        ({"eps": math.inf}, "optim.eps must be above 0 and finite, got inf"),
        ({"name": "adafactor", "beta2_decay": math.inf}, "optim.beta2_decay must be .*got inf"),
    ],
)
def test_what_an_optimizer_does_not_have_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimConfig(**values)


def test_set_lr_reaches_every_group() -> None:
    optimizer = build_optimizer(Toy(), OptimConfig())
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(nn.Identity(), OptimConfig())
