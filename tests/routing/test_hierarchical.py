import pytest
import torch

from expertmesh.random import RandomKey
from expertmesh.routing import (
    HierarchicalLoadLoss,
    HierarchicalRouter,
    ImportanceLoss,
    LearnedNoise,
    LoadLoss,
    NormalNoise,
    ZLoss,
)
from expertmesh.routing.hierarchical import two_level_load
from expertmesh.routing.losses import squared_cv

G, M, D, T = 3, 4, 5, 11
X = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OPTIONS = {"num_groups": G, "init_std": 1.0, "seed": 0, "dtype": torch.float64}


def plain(router, x):
    """Weights ``(T, E)`` by the two-level formula, token by token."""
    out = torch.zeros(len(x), G * M, dtype=x.dtype)
    for t, row in enumerate(x):
        primary = router.weight_GD @ row
        groups = primary.topk(router.k_groups)
        for group, outer in zip(groups.indices, groups.values.softmax(0), strict=True):
            logits = router.weight_ED.view(G, M, D)[group] @ row
            best = logits.topk(router.k_each)
            out[t, group * M + best.indices] = outer * best.values.softmax(0)
    return out


@pytest.mark.parametrize(("k_groups", "k_each"), [(2, 2), (3, 2), (2, 4)])
def test_is_the_plain_definition_with_gradients(k_groups, k_each):
    router = HierarchicalRouter(D, G * M, k_groups=k_groups, k_each=k_each, **OPTIONS)
    routing = router(X)
    assert routing.expert_TK.shape == (T, k_groups * k_each)
    table = torch.zeros(T, G * M, dtype=X.dtype).scatter(1, routing.expert_TK, routing.weight_TK)
    expected = plain(router, X)
    torch.testing.assert_close(table, expected)
    torch.testing.assert_close(table.sum(1), torch.ones(T, dtype=X.dtype))
    params = [router.weight_GD, router.weight_ED]
    scale = torch.arange(G * M)
    grads = torch.autograd.grad((table * scale).sum(), params)
    wanted = torch.autograd.grad((expected * scale).sum(), params)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_logits_are_those_of_the_product():
    router = HierarchicalRouter(D, G * M, **OPTIONS)
    outer = (X @ router.weight_GD.T).softmax(1)
    inner = (X @ router.weight_ED.T).view(T, G, M).softmax(2)
    product = (outer[:, :, None] * inner).flatten(1)
    torch.testing.assert_close(router(X).logits_TE.softmax(1), product)


def test_ties_go_to_the_lowest():
    router = HierarchicalRouter(D, G * M, **{**OPTIONS, "init_std": 0.0})
    assert router(X[:1]).expert_TK.tolist() == [[0, 1, M, M + 1]]


def phi(value):
    return torch.special.ndtr(torch.as_tensor(value, dtype=torch.float64)).item()


def chance(clean, noisy, std, k, i):
    """Shazeer's P(x, i): i among the k best if its own noise is drawn again."""
    others = sorted((v for j, v in enumerate(noisy) if j != i), reverse=True)
    return phi((clean[i] - others[k - 1]) / std)


class Kept(HierarchicalLoadLoss):
    """Keeps the evidence it saw."""

    def __call__(self, evidence):
        object.__setattr__(self, "seen", evidence)
        return super().__call__(evidence)


def test_load_is_the_papers_product():
    loss = Kept(coef=1.0)
    router = HierarchicalRouter(
        D,
        G * M,
        primary_noise=NormalNoise(0.5),
        secondary_noise=NormalNoise(0.7),
        losses=(loss, ImportanceLoss(coef=1.0)),
        **OPTIONS,
    )
    torch.manual_seed(0)
    routing = router(X)
    evidence = loss.seen
    load_E = two_level_load(evidence, "micro_batch")[0]
    primary, secondary = evidence.primary, evidence.secondary
    assert not torch.equal(primary.noisy_TE, primary.clean_TE)
    chosen = routing.expert_TK[:, ::2] // M
    for i in range(G):
        members = [t for t in range(T) if i in chosen[t]]
        outer = sum(
            chance(primary.clean_TE[t].tolist(), primary.noisy_TE[t].tolist(), 0.5, 2, i)
            for t in range(T)
        )
        for j in range(M):
            inside = slice(i * M, (i + 1) * M)
            inner = sum(
                chance(
                    secondary.clean_TE[t, inside].tolist(),
                    secondary.noisy_TE[t, inside].tolist(),
                    0.7,
                    2,
                    j,
                )
                for t in members
            )
            assert load_E[i * M + j].item() == pytest.approx(outer * inner / len(members))
    torch.testing.assert_close(routing.losses["load"], squared_cv(load_E[None], "population")[0])
    weights = torch.zeros(T, G * M, dtype=X.dtype).scatter(1, routing.expert_TK, routing.weight_TK)
    importance = squared_cv(weights.sum(0)[None], "population")[0]
    torch.testing.assert_close(routing.losses["importance"], importance)
    sum(routing.losses.values()).backward()
    assert router.weight_GD.grad.norm() > 0
    assert router.weight_ED.grad.norm() > 0


def test_noise_of_the_levels_is_not_the_same():
    noise = [LearnedNoise(D, width, dtype=torch.float64) for width in (G, G * M)]
    router = HierarchicalRouter(
        D,
        G * M,
        primary_noise=noise[0],
        secondary_noise=noise[1],
        losses=(Kept(coef=1.0),),
        **{**OPTIONS, "init_std": 0.0},
    )
    key = RandomKey.of(0, 1, torch.arange(T))
    router(X, key=key)
    seen = router.losses[0].seen
    assert not torch.isclose(seen.primary.noisy_TE[0, 0], seen.secondary.noisy_TE[0, 0])


def test_bad_input():
    with pytest.raises(ValueError, match=r"k_each must be a whole number, got 2.0"):
        HierarchicalRouter(D, 12, num_groups=3, k_each=2.0)
    with pytest.raises(ValueError, match=r"primary_noise must be made for .* 3 logits, got"):
        HierarchicalRouter(D, 12, num_groups=3, primary_noise=LearnedNoise(D, 12))
    with pytest.raises(ValueError, match=r"secondary_noise must be a Noise or None, got 0.1"):
        HierarchicalRouter(D, 12, num_groups=3, secondary_noise=0.1)
    with pytest.raises(ValueError, match="num_groups must divide num_experts=12"):
        HierarchicalRouter(D, 12, num_groups=5)
    with pytest.raises(ValueError, match="k_groups must be between 1 and 3"):
        HierarchicalRouter(D, 12, num_groups=3, k_groups=4)
    with pytest.raises(ValueError, match="k_each=1 makes every weight of its level 1"):
        HierarchicalRouter(D, 12, num_groups=3, k_each=1)
    for loss in (LoadLoss(coef=0.1), ZLoss(coef=0.1)):
        with pytest.raises(ValueError, match="is for logits of one level"):
            HierarchicalRouter(D, 12, num_groups=3, losses=(loss,))
    quiet = HierarchicalRouter(D, 12, num_groups=3, losses=(HierarchicalLoadLoss(coef=0.1),))
    with pytest.raises(ValueError, match="needs additive normal noise"):
        quiet(X)
