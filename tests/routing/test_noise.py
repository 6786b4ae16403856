import pytest
import torch

from expertmesh.random import RandomKey
from expertmesh.routing import InputJitter, LearnedNoise, NormalNoise, TopKRouter, UniformNoise
from expertmesh.routing.draw import Draw

T, D, E = 4000, 6, 5


def perturb(noise, x, weight):
    draw = Draw(None, 0, len(x), x.device, True)
    return noise(x, weight, draw)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return torch.randn(T, D, dtype=torch.float64), torch.randn(E, D, dtype=torch.float64)


@pytest.mark.parametrize(("noise", "std"), [(NormalNoise(), 1 / E), (NormalNoise(0.3), 0.3)])
def test_normal_noise_has_the_stated_deviation(problem, noise, std):
    x, weight = problem
    logits = perturb(noise, x, weight)
    torch.testing.assert_close(logits.clean_TE, x @ weight.T)
    added = logits.noisy_TE - logits.clean_TE
    assert float(added.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(added.mean())) < 0.01
    assert float(logits.std_TE) == pytest.approx(std)


def test_uniform_noise_multiplies_logits(problem):
    x, weight = problem
    logits = perturb(UniformNoise(0.1), x, weight)
    factor = logits.noisy_TE / logits.clean_TE
    assert factor.min() >= 0.9 - 1e-9
    assert factor.max() <= 1.1 + 1e-9
    assert float(factor.std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert logits.std_TE is None


def test_input_jitter_multiplies_the_input(problem):
    x, _ = problem
    logits = perturb(InputJitter(0.1), x, torch.eye(D, dtype=torch.float64))
    factor = logits.noisy_TE / x
    assert factor.min() >= 0.9 - 1e-9
    assert factor.max() <= 1.1 + 1e-9
    assert float(factor.std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)


def test_learned_noise_starts_at_softplus_of_zero(problem):
    x, weight = problem
    noise = LearnedNoise(D, E, dtype=torch.float64)
    logits = perturb(noise, x, weight)
    assert float((logits.noisy_TE - logits.clean_TE).detach().std()) == pytest.approx(
        0.693147, rel=0.02
    )
    (logits.noisy_TE**2).sum().backward()
    assert noise.weight_ED.grad.abs().sum() > 0


def test_a_key_names_the_noise_whatever_the_batch():
    router = TopKRouter(D, E, 2, noise=NormalNoise(1.0), seed=0)
    x = torch.randn(12, D)
    whole = router(x, key=RandomKey.of(1, 7, torch.arange(12)))
    part = router(x[5:9], key=RandomKey.of(1, 7, torch.arange(5, 9)))
    assert torch.equal(whole.expert_TK[5:9], part.expert_TK)
    later = router(x, key=RandomKey.of(1, 8, torch.arange(12)))
    other_layer = TopKRouter(D, E, 2, noise=NormalNoise(1.0), seed=0, layer=3)
    deeper = other_layer(x, key=RandomKey.of(1, 7, torch.arange(12)))
    assert not torch.equal(whole.expert_TK, later.expert_TK)
    assert not torch.equal(whole.expert_TK, deeper.expert_TK)


def test_without_a_key_the_generator_of_torch_decides():
    router = TopKRouter(D, E, 2, noise=NormalNoise(1.0), seed=0)
    x = torch.randn(200, D)
    torch.manual_seed(3)
    first, second = router(x), router(x)
    torch.manual_seed(3)
    assert torch.equal(first.expert_TK, router(x).expert_TK)
    assert not torch.equal(first.expert_TK, second.expert_TK)


def test_a_router_without_noise_leaves_the_generator_alone():
    before = torch.get_rng_state()
    TopKRouter(D, E, 2, seed=0)(torch.ones(4, D))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", [NormalNoise, UniformNoise, InputJitter])
def test_widths_must_be_positive(make):
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        make(0.0)


@pytest.mark.parametrize("min_std", [-5.0, float("nan"), float("inf")])
def test_a_least_deviation_is_a_deviation(min_std):
    with pytest.raises(ValueError, match="min_std must be a finite number of at least 0, got"):
        LearnedNoise(8, 4, min_std=min_std)
