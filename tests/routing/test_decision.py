import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
    set_checkpoint_early_stop,
)

from expertmesh.routing import Capacity, NormalNoise, TopKRouter


def save_decisions(ctx, op, *args, **kwargs):
    if op is torch.ops.expertmesh.decision.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def test_saved_decisions_survive_a_change_of_weights_before_recompute():
    seen = []
    options = {"noise": NormalNoise(1.0), "capacity": Capacity(factor=0.6), "init_std": 1.0}
    router = TopKRouter(8, 6, 2, seed=0, **options)

    def run(x):
        routing = router(x)
        seen.append((routing.chosen_TK, routing.expert_TK))
        return routing.weight_TK * 2

    def backward_after_change(context_fn):
        seen.clear()
        x = torch.randn(40, 8, requires_grad=True)
        with set_checkpoint_early_stop(False):
            y = checkpoint(run, x, use_reentrant=False, context_fn=context_fn)
        with torch.no_grad():
            router.weight_ED.add_(torch.randn_like(router.weight_ED))
        y.sum().backward()
        (first, again) = seen
        return all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    assert backward_after_change(lambda: create_selective_checkpoint_contexts(save_decisions))
    assert not backward_after_change(noop_context_fn)


def test_the_operation_is_sound():
    torch.library.opcheck(torch.ops.expertmesh.decision.default, (torch.tensor([[1, 2]]),))
