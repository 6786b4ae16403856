"""What the blocks share, moved to another device."""

import torch

from expertmesh.models.context import BlockContext
from expertmesh.models.rotary import Rotation
from expertmesh.random import RandomKey


def test_a_context_moves_and_keeps_what_has_a_place_of_its_own() -> None:
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    cache, record = object(), {}
    context = BlockContext(
        seq_len=3,
        tokens_BS=tokens,
        padding_mask_BS=tokens > 0,
        attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool),
        rotation=Rotation.of(tokens, 4, 1e4, torch.float32),
        key=RandomKey.of(0, 1, tokens),
        cache=cache,
        replay={},
        record=record,
        loss_scale=2.0,
    )
    moved = context.to("meta", non_blocking=True)
    for tensor in (
        moved.tokens_BS,
        moved.padding_mask_BS,
        moved.attention_mask,
        moved.rotation.cos,
        moved.rotation.sin,
        moved.key.seed,
        moved.key.token_index,
    ):
        assert tensor.is_meta
    assert moved.cache is cache
    assert moved.record is record
    assert (moved.seq_len, moved.loss_scale) == (3, 2.0)
    bare = BlockContext(3, tokens, None, None, None, None, None, {}, None).to("meta")
    assert bare.tokens_BS.is_meta
    assert bare.rotation is None
