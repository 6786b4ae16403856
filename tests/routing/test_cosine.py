import math

import pytest
import torch
from torch.nn import functional

from expertmesh.routing import Capacity, CosineRouter, LoadLoss

X = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

CLOSE = {"atol": 1e-6, "rtol": 1e-6}  # of lengths, to whose squares 1e-6 is added


def router(k=2, **options):
    return CosineRouter(6, 5, k, proj_dim=7, seed=0, dtype=torch.float64, **options)


def test_logits_are_scaled_cosines():
    made = router(temperature=0.25)
    with torch.no_grad():
        made.bias_P.copy_(torch.linspace(-1, 1, 7))
    routing = made(X)
    projected = X @ made.proj_PD.T + made.bias_P
    cosine = functional.cosine_similarity(projected[:, None], made.direction_EP[None], dim=2)
    torch.testing.assert_close(routing.logits_TE, 4.0 * cosine, **CLOSE)
    best = (4.0 * cosine).softmax(1).topk(2, dim=1)
    assert torch.equal(routing.expert_TK, best.indices)
    weight = best.values / best.values.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weight_TK, weight, **CLOSE)


def test_length_does_not_matter_and_temperature_is_bounded():
    made = router()
    torch.testing.assert_close(made(X).logits_TE, made(1e3 * X).logits_TE, **CLOSE)
    with torch.no_grad():
        made.tau.fill_(50.0)
    logits = made(X).logits_TE
    assert logits.abs().max() <= 100.0 + 1e-9
    assert made(1e4 * X).weight_TK.isfinite().all()


def test_a_token_of_zeros_has_a_bounded_gradient_and_changes_no_other():
    made = CosineRouter(16, 8, 2, seed=0)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    x.requires_grad_()
    routing = made(x)
    assert (routing.logits_TE[2] == 0).all()
    projected = functional.linear(x, made.proj_PD, made.bias_P)
    cosine = functional.cosine_similarity(projected[:, None], made.direction_EP[None], dim=2)
    torch.testing.assert_close(routing.logits_TE, 2.0 * cosine, atol=1e-6, rtol=0)
    routing.weight_TK[:, 0].sum().backward()
    for gradient in (x.grad, *(parameter.grad for parameter in made.parameters())):
        assert gradient.abs().max() < 1e3


def test_everything_learns():
    made = router(k=1)
    routing = made(X)
    routing.weight_TK.sum().backward()
    for name, param in made.named_parameters():
        assert param.grad.norm() > 0, name


def test_capacity_drops():
    routing = router(capacity=Capacity(factor=0.5))(X)
    assert routing.num_dropped > 0
    assert torch.bincount(routing.expert_TK.flatten(), minlength=6)[:5].max() <= 1


def test_starts_as_tutel_does():
    made = CosineRouter(64, 32, 2, seed=0)
    assert made.proj_PD.shape == (256, 64)
    assert made.tau.item() == pytest.approx(math.log(2.0))
    assert made.direction_EP.std().item() == pytest.approx(0.01, rel=0.05)
    assert made.proj_PD.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


def test_bad_input():
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            router(temperature=temperature)
    with pytest.raises(ValueError, match="k must be between 1 and num_experts=5"):
        router(k=6)
    with pytest.raises(ValueError, match="k=1 makes every weight 1"):
        router(k=1, renormalize="chosen")
    with pytest.raises(ValueError, match="noise_std must be a finite number of at least 0"):
        router(noise_std=-0.1)
    with pytest.raises(ValueError, match=r"LoadLoss needs noise.*got noise_std=0; set it above 0"):
        router(losses=[LoadLoss(coef=0.1)])
    assert router(losses=[LoadLoss(coef=0.1)], noise_std=0.1)(X).losses["load"] > 0
    with pytest.raises(ValueError, match="init_std must be a finite number of at least 0, got -1"):
        router(init_std=-1.0)
    with pytest.raises(ValueError, match="proj_dim must be at least 1"):
        CosineRouter(6, 5, 2, proj_dim=0)
