"""Reference numbers of published formulas that no other test of a formula states."""

import pytest
import torch

from expertmesh.experts import MLPExperts
from expertmesh.layer import MoE
from expertmesh.metrics import summarize
from expertmesh.routing import RandomSecond, SelectionBias, ThresholdSecond

EXACT = {"abs": 1e-6}
P = [0.643914, 0.236883, 0.087144, 0.032059]


def test_probabilities_and_logsumexp(one_token, identity_router):
    routing = identity_router(4)(one_token)
    assert routing.expert_TK.tolist() == [[0, 1, 2, 3]]
    assert routing.weight_TK[0].tolist() == pytest.approx(P, **EXACT)
    assert float(routing.logits_TE.detach().logsumexp(1)) == pytest.approx(2.440190, **EXACT)


def test_scores_with_a_selection_bias(one_token, identity_router):
    bias = torch.tensor([-0.3, 0.0, 0.2, 0.0], dtype=torch.float64)
    router = identity_router(4, score="sigmoid", bias=SelectionBias(4))
    router.bias.bias_E.copy_(bias)
    routing = router(one_token)
    assert routing.expert_TK.tolist() == [[1, 2, 0, 3]]  # by .731059, .7, .580797, .268941
    biased = routing.weight_TK[0] + bias[routing.expert_TK[0]]
    assert biased.tolist() == pytest.approx([0.731059, 0.7, 0.580797, 0.268941], **EXACT)


@pytest.mark.parametrize(("uniform", "kept"), [(0.537882, True), (0.537884, False)])
def test_the_chance_of_gshards_second_expert(uniform, kept, one_token, identity_router):
    class Given:
        def uniform(self, label, width, dtype):
            return torch.full((1, width), uniform, dtype=dtype)

    gate = identity_router(2, renormalize="chosen")(one_token).weight_TK
    skipped = RandomSecond(0.5)(gate, Given(), training=True)
    assert skipped.tolist() == [[False, not kept]]


@pytest.mark.parametrize(("ratio", "kept"), [(0.367879, True), (0.367880, False)])
def test_the_ratio_of_st_moes_second_expert(ratio, kept, one_token, identity_router):
    routing = identity_router(2, skip=ThresholdSecond(ratio))(one_token)
    assert routing.expert_TK.tolist() == [[0, 1 if kept else 4]]


def test_statistics_of_four_tokens(four_tokens, identity_router):
    pair = identity_router(2, renormalize="chosen")
    mean_E = four_tokens.softmax(1).mean(0)
    assert mean_E.tolist() == pytest.approx([0.6151, 0.2723, 0.0773, 0.0352], abs=5e-5)
    assert (identity_router(1)(four_tokens).load_E / 4).tolist() == [0.75, 0.25, 0, 0]
    routing = pair(four_tokens)
    assert routing.load_E.tolist() == [4, 3, 1, 0]
    importance_E = torch.zeros(4, dtype=torch.float64).index_put(
        (routing.expert_TK,), routing.weight_TK, accumulate=True
    )
    assert importance_E.tolist() == pytest.approx([2.698372, 1.182426, 0.119203, 0.0], **EXACT)
    moe = MoE(pair, MLPExperts(4, 3, 4, seed=0).double())
    moe(four_tokens)
    assert summarize(moe.metrics()).imbalance - 1 == pytest.approx(1.0, **EXACT)  # MaxVio


def test_shares_of_sigmoid_scores(four_tokens, identity_router):
    score_TE = identity_router(4, score="sigmoid")(four_tokens).logits_TE.sigmoid()
    mean_E = (score_TE / score_TE.sum(1, keepdim=True)).mean(0)
    expected = [0.361661, 0.295616, 0.207262, 0.135460]
    assert mean_E.tolist() == pytest.approx(expected, **EXACT)
