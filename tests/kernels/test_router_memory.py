"""What a router by kernels holds between forward and backward, beyond its input and weight."""

import pytest
import torch
from torch import Tensor

from expertmesh.routing import router_preset, topk

TOKENS, DIM, EXPERTS = 192, 8, 16


def held_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes of different storages that the graph keeps, and K."""
    monkeypatch.setattr(topk, "serves", lambda x_TD, weight_ED: True)
    monkeypatch.setattr("expertmesh.routing.losses.counts", lambda score_TE: True)
    router = router_preset(name, dim=DIM, num_experts=EXPERTS, seed=0)
    x = torch.randn(TOKENS, DIM).bfloat16().requires_grad_()
    given = {x.untyped_storage().data_ptr(), router.weight_ED.untyped_storage().data_ptr()}
    kept: dict[int, Tensor] = {}

    def note(saved: Tensor) -> Tensor:
        kept.setdefault(saved.untyped_storage().data_ptr(), saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        routing = router(x, sequence_length=TOKENS // 2)
    assert routing.losses
    sizes = [saved.untyped_storage().nbytes() for at, saved in kept.items() if at not in given]
    return sum(sizes), router.k


@pytest.mark.parametrize(
    ("name", "norms", "tables"),
    [
        ("mixtral", 0, 0),
        ("qwen3_moe", 0, 0),
        ("deepseek_v2", 0, 0),
        ("olmoe", 1, 0),  # the z-loss squares each token's norm
        ("openmoe", 1, 0),
        ("deepseek_v3", 0, 1),  # sigmoids don't sum to 1: its balance loss needs them again
        ("gpt_oss", 0, 1),  # a bias is added to the logits: they are held
    ],
)
def test_held_bytes(name: str, norms: int, tables: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of 2 bytes, since gates are computed again; and what the preset's losses ask for."""
    held, k = held_bytes(name, monkeypatch)
    per_token = 2 * k + 4 * norms + 4 * EXPERTS * tables
    shares = 2 * 4 * EXPERTS  # the experts' shares of choices, of two sequences at most
    assert per_token * TOKENS <= held <= per_token * TOKENS + shares + 64  # and some scalars
