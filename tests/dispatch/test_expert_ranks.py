"""Which rank holds what, against lists."""

import pytest
import torch

from expertmesh.dispatch.expert_ranks import ExpertRanks


@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (1, 3), (2, 1), (4, 1), (2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_destinations_and_first_experts(ep: int, etp: int, k: int) -> None:
    ranks = ExpertRanks(8, ep, etp)
    generator = torch.Generator().manual_seed(k)
    expert_TK = torch.rand(40, 9, generator=generator).argsort(dim=1)[:, :k]
    sent_TJ = ranks.destinations(expert_TK)
    assert sent_TJ.shape == (40, min(k, ep) * etp)
    each = 8 // ep
    for chosen, sent in zip(expert_TK.tolist(), sent_TJ.tolist(), strict=True):
        wanted = {e // each * etp + s for e in chosen if e < 8 for s in range(etp)}
        named = [rank for rank in sent if rank < ranks.num_ranks]
        assert len(named) == len(set(named))
        assert set(named) == wanted
        assert set(sent) <= wanted | {ranks.num_ranks}
    for rank in range(ranks.num_ranks):
        assert ranks.first(rank) == rank // etp * each


def test_no_tokens() -> None:
    assert ExpertRanks(4, 2, 2).destinations(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 4)
