import math

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.routing import (
    BatchwiseRouter,
    HierarchicalLoadLoss,
    ImportanceLoss,
    LearnedNoise,
    LoadBalancingLoss,
    LoadLoss,
    NormalNoise,
    SelectionBias,
    SinkhornRouter,
    ThresholdLoss,
    ThresholdSecond,
    TopKRouter,
    UniformNoise,
    ZLoss,
)
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.losses import FORMS, smooth_load, squared_cv
from expertmesh.routing.noise import NoisyLogits
from expertmesh.routing.population import Alone


def value(router, x, **arguments):
    (loss,) = router.train()(x, **arguments).losses.values()
    return float(loss.detach())


REFERENCE = {
    "switch": 2.117750,
    "gshard_paper": 0.132359,
    "megablocks": 1.677431,
    "huggingface": 3.354863,
}


@pytest.mark.parametrize("form", REFERENCE)
def test_reference_balance_losses(form, four_tokens, identity_router):
    router = identity_router(2, losses=(LoadBalancingLoss(coef=1.0, form=form),))
    assert value(router, four_tokens) == pytest.approx(REFERENCE[form], abs=1e-6)


def test_reference_sequence_loss_of_deepseek_v3(four_tokens, identity_router):
    loss = LoadBalancingLoss(coef=1.0, form="deepseek_v3", scope="sequence")
    router = identity_router(2, score="sigmoid", bias=SelectionBias(4), losses=(loss,))
    router.bias.bias_E.copy_(torch.tensor([-3.0, 0.0, 3.0, 0.0]))  # must not enter the statistic
    assert value(router, four_tokens, sequence_length=4) == pytest.approx(1.270378, abs=1e-6)


def test_reference_z_and_importance(one_token, four_tokens, identity_router):
    router = identity_router(2, losses=(ZLoss(coef=1.0),))
    assert value(router, one_token) == pytest.approx(5.954526, abs=1e-6)
    assert value(router, four_tokens) == pytest.approx(7.458575, abs=1e-6)
    router = identity_router(2, renormalize="chosen", losses=(ImportanceLoss(coef=1.0),))
    assert value(router, four_tokens) == pytest.approx(1.173387, abs=1e-6)


def test_reference_smooth_load(one_token):
    std = torch.full_like(one_token, 2.0).log()
    chance = smooth_load(NoisyLogits(one_token, one_token, std), 2)
    expected = torch.tensor([[0.998045, 0.925447, 0.074553, 0.001955]], dtype=torch.float64)
    torch.testing.assert_close(chance, expected, atol=1e-6, rtol=0)
    assert float(chance.sum()) == pytest.approx(2, abs=1e-9)


def plain_v_moe(clean, noisy, std, k):
    """V-MoE's importance and load loss by loops over tokens and experts."""
    importance, load = torch.zeros(clean.shape[1]).double(), torch.zeros(clean.shape[1]).double()
    for token in range(len(clean)):
        p = clean[token].exp() / clean[token].exp().sum()
        threshold = sorted(noisy[token].tolist())[-k]
        for expert in range(clean.shape[1]):
            importance[expert] += p[expert]
            far = float(clean[token, expert] - threshold) / std
            load[expert] += 0.5 * (1 + math.erf(far / math.sqrt(2)))
    variance = [((v - v.mean()) ** 2).mean() / v.mean() ** 2 for v in (importance, load)]
    return [float(v) for v in variance]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_losses_of_v_moe_are_its_definitions(k):
    generator = torch.Generator().manual_seed(k)
    clean, noise = torch.randn(2, 13, 4, dtype=torch.float64, generator=generator)
    noisy = clean + 0.25 * noise
    evidence = Evidence(
        logits=NoisyLogits(clean, noisy, torch.tensor(0.25, dtype=torch.float64)),
        score_TE=noisy.softmax(1),
        chosen_TK=noisy.topk(k).indices,
        gate_TK=noisy.softmax(1).topk(k).values,
        padding_mask=None,
        sequence_length=None,
        population=Alone(),
        key=None,
    )
    importance = ImportanceLoss(coef=1.0, of="clean_probabilities")(evidence)
    load = LoadLoss(coef=1.0, threshold="kth")(evidence)
    assert [float(importance), float(load)] == pytest.approx(plain_v_moe(clean, noisy, 0.25, k))
    assert float(LoadLoss(coef=1.0)(evidence)) != pytest.approx(float(load))
    noisy_importance = ImportanceLoss(coef=1.0, of="probabilities")(evidence)
    assert float(noisy_importance) != pytest.approx(float(importance))


def test_reference_squared_cv():
    counts = torch.tensor([[1.0, 2.0, 3.0, 2.0]], dtype=torch.float64)
    assert float(squared_cv(counts, "population")) == pytest.approx(0.125, abs=1e-6)
    assert float(squared_cv(counts, "unbiased")) == pytest.approx(1 / 6, abs=1e-6)
    assert float(squared_cv(torch.ones(1, 1), "unbiased")) == 0


def test_smooth_load_is_the_chance_of_being_chosen_under_fresh_noise():
    # Its mean over all noise is the true selection probability, and so sums to k.
    torch.manual_seed(0)
    clean = torch.tensor([[1.0, 0.3, -0.2, 0.6, 0.0]], dtype=torch.float64).expand(100_000, 5)
    noisy = clean + 0.7 * torch.randn_like(clean)
    estimate = smooth_load(NoisyLogits(clean, noisy, torch.tensor(0.7)), 2).mean(0)
    chosen = torch.zeros_like(noisy).scatter(1, noisy.topk(2).indices, 1.0).mean(0)
    torch.testing.assert_close(estimate, chosen, atol=6e-3, rtol=0)
    assert float(estimate.sum()) == pytest.approx(2, abs=1e-2)


BALANCED = {
    "switch": 1.0,
    "megablocks": 1.0,
    "huggingface": 2.0,
    "gshard_paper": 1 / 16,
    "deepseek_v3": 1.0,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", 4])
def test_value_at_perfect_balance(form, scope, identity_router):
    # Every expert is first choice once, second choice once, with the same scores.
    x = torch.tensor([[3.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.cat([x.roll(shift, 1) for shift in range(4)]).repeat(4, 1)
    router = identity_router(2, losses=(LoadBalancingLoss(coef=1.0, form=form, scope=scope),))
    assert value(router, x, sequence_length=8) == pytest.approx(BALANCED[form], abs=1e-9)
    router = identity_router(2, losses=(ImportanceLoss(coef=1.0, scope=scope),))
    assert value(router, x, sequence_length=8) == pytest.approx(0, abs=1e-9)
    router = identity_router(2, noise=NormalNoise(1e-6), losses=(LoadLoss(coef=1.0, scope=scope),))
    assert value(router, x, sequence_length=8) == pytest.approx(0, abs=1e-9)


def test_sequence_scope_is_the_mean_over_sequences_without_padding():
    torch.manual_seed(0)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4:] = True
    mask[2] = True
    for kind in (LoadBalancingLoss, ImportanceLoss):
        per_sequence = TopKRouter(
            8, 4, 2, seed=0, dtype=torch.float64, losses=(kind(coef=1.0, scope="sequence"),)
        )
        whole = TopKRouter(8, 4, 2, seed=0, dtype=torch.float64, losses=(kind(coef=1.0),))
        together = value(per_sequence, x.view(-1, 8), padding_mask=mask.view(-1), sequence_length=6)
        alone = [value(whole, x[0, :4]), value(whole, x[1])]
        assert together == pytest.approx(sum(alone) / 2, abs=1e-9)


@pytest.mark.parametrize("form", ["megablocks", "huggingface"])
def test_skipped_choices_count_as_choices(form, four_tokens, identity_router):
    losses = (LoadBalancingLoss(coef=1.0, form=form),)
    skipping = identity_router(2, losses=losses, skip=ThresholdSecond(1.0))
    assert (skipping(four_tokens).expert_TK[:, 1] == 4).all()
    assert value(skipping, four_tokens) == value(identity_router(2, losses=losses), four_tokens)


def test_gradient_flows_through_probabilities_only(identity_router):
    torch.manual_seed(1)
    x = torch.randn(16, 4, dtype=torch.float64, requires_grad=True)
    router = identity_router(2, losses=(LoadBalancingLoss(coef=1.0, form="megablocks"),))
    routing = router(x)
    routing.losses["balance"].backward()
    share_E = routing.load_E / 16
    p = x.detach().requires_grad_()
    (4 / 2 * (share_E * p.softmax(1).mean(0)).sum()).backward()
    torch.testing.assert_close(x.grad, p.grad)


def test_coefficients_multiply(four_tokens, identity_router):
    for make in (
        lambda c: LoadBalancingLoss(coef=c),
        lambda c: ImportanceLoss(coef=c),
        lambda c: ZLoss(coef=c),
        lambda c: ImportanceLoss(coef=c, of="probabilities", variance="unbiased"),
    ):
        one = value(identity_router(2, losses=(make(1.0),)), four_tokens)
        assert value(identity_router(2, losses=(make(0.25),)), four_tokens) == pytest.approx(
            one / 4
        )


def test_load_loss_trains_a_learned_noise_router():
    torch.manual_seed(0)
    router = TopKRouter(
        8, 4, 2, noise=LearnedNoise(8, 4), losses=(LoadLoss(coef=1.0),), seed=0, init_std=0.5
    )
    router(torch.randn(64, 8)).losses["load"].backward()
    assert router.weight_ED.grad.abs().sum() > 0
    assert router.noise.weight_ED.grad.abs().sum() > 0


@pytest.mark.parametrize("noise", [None, UniformNoise(0.1)])
def test_load_loss_needs_additive_noise(noise):
    router = TopKRouter(8, 4, 2, noise=noise, losses=(LoadLoss(coef=1.0),))
    with pytest.raises(ValueError, match="set noise to NormalNoise or LearnedNoise"):
        router(torch.randn(4, 8))


@pytest.mark.parametrize(
    ("router", "losses", "message"),
    [
        (TopKRouter, [ThresholdLoss()], "ThresholdLoss is for BatchwiseRouter alone.* TopKRouter"),
        (SinkhornRouter, [ThresholdLoss()], "is for BatchwiseRouter alone, got it in SinkhornR"),
        (TopKRouter, [HierarchicalLoadLoss(coef=1.0)], "is for HierarchicalRouter alone.*leave it"),
        (BatchwiseRouter, [HierarchicalLoadLoss(coef=1.0)], "alone, got it in BatchwiseRouter"),
        (SinkhornRouter, [LoadLoss(coef=1.0)], "which SinkhornRouter never has; leave it out"),
        (TopKRouter, ZLoss(coef=1.0), r"sequence of balance losses, got ZLoss.*losses=\(loss,\)"),
        (TopKRouter, [0.01], "losses must be balance losses such as .*, got 0.01"),
    ],
)
def test_losses_that_a_router_cannot_serve_are_refused_when_it_is_built(router, losses, message):
    with pytest.raises(UserError, match=message):
        router(8, 4, 2, losses=losses)


@pytest.mark.parametrize("coef", [-1.0, float("nan"), float("inf"), "0.1", None, True])
@pytest.mark.parametrize("kind", [LoadBalancingLoss, ImportanceLoss, LoadLoss, ZLoss])
def test_coefficients_are_numbers(kind, coef):
    with pytest.raises(ValueError, match="loss must be a number of at least 0, got"):
        kind(coef=coef)


def test_unknown_form_and_scope():
    with pytest.raises(ValueError, match="did you mean 'switch'"):
        LoadBalancingLoss(coef=1.0, form="swtch")
    with pytest.raises(ValueError, match="balance loss scope must be"):
        LoadBalancingLoss(coef=1.0, scope="globe")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ImportanceLoss, {"of": "gate"}, "of must be one of gates, probabilities.* mean 'gates'"),
        (ImportanceLoss, {"variance": "biased"}, "variance must be one of population, unbiased"),
        (ImportanceLoss, {"scope": "batch"}, "importance loss scope must be 'micro_batch'"),
        (LoadLoss, {"variance": "sample"}, "load loss variance must be one of population, unbi"),
        (LoadLoss, {"threshold": "k"}, "load loss threshold must be one of kth_of_others, kth"),
        (LoadLoss, {"scope": 0}, "load loss scope must be 'micro_batch'"),
        (HierarchicalLoadLoss, {"variance": 1}, "load loss variance must be one of population"),
        (LoadBalancingLoss, {"form": 3}, "balance loss form must be one of switch"),
    ],
)
def test_options_are_checked_where_they_are_given(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(coef=1.0, **options)
