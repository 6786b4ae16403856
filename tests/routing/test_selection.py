import pytest
import torch

from expertmesh.routing.selection import count_experts, rank_within, top_k


def plain_top_k(score_TE, k):
    """Sort (-score, expert) pairs in Python."""
    rows = []
    for row in score_TE.tolist():
        rows.append(sorted(range(len(row)), key=lambda e: (-row[e], e))[:k])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(score_TE), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("T", "E", "k"), [(0, 4, 2), (1, 1, 1), (37, 8, 3), (50, 64, 8)])
def test_top_k_equals_sorted_pairs_with_ties(dtype, T, E, k):
    generator = torch.Generator().manual_seed(T + E)
    coarse = torch.randint(-3, 4, (T, E), generator=generator).to(dtype) / 2
    fine = torch.randn(T, E, generator=generator, dtype=dtype)
    for score in (coarse, fine, -coarse.abs(), fine * 1e4):
        assert torch.equal(top_k(score, k), plain_top_k(score, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_at_the_edges_of_floats(dtype):
    score = torch.tensor([[0.0, -0.0, -torch.inf, torch.inf, 1e-45, -1e-45]], dtype=dtype)
    assert top_k(score, 6).tolist() == plain_top_k(score, 6).tolist()
    same = torch.zeros(2, 5, dtype=dtype)
    assert top_k(same, 3).tolist() == [[0, 1, 2]] * 2


def test_counts_leave_the_sentinel_out():
    expert = torch.tensor([[0, 3], [4, 3], [4, 4]])
    assert count_experts(expert, 4).tolist() == [1, 0, 0, 2]
    assert count_experts(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_rank_counts_earlier_entries_of_the_bucket():
    bucket = torch.tensor([2, 0, 2, 2, 1, 0])
    assert rank_within(bucket, 3).tolist() == [0, 0, 1, 2, 0, 1]
    assert rank_within(torch.empty(0, dtype=torch.int64), 3).tolist() == []
