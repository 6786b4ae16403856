"""The same decoder by transformers, sharded by FSDP2."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from expertmesh.models import DecoderConfig
from multi.world import Step, World

LR = 1e-4


def transformers_step(
    world: World, config: DecoderConfig, rows: int, length: int, size: int
) -> Step:
    """A training step of OLMoE in transformers.

    Parameters are float32 and are gathered in bfloat16, gradients are summed in float32: the usual
    recipe. Blocks are sharded one by one, and gathered again in backward.

    Args:
        world: All processes.
        config: Our model's shape.
        rows: Sequences of each rank.
        length: Their tokens.
        size: Ranks of the mesh: all of them, or 1 for each by itself.
    """
    model = olmoe(config, world.device)
    mesh = init_device_mesh(
        world.device.type, (world.size // size, size), mesh_dim_names=("copies", "pieces")
    )["pieces"]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    generator = torch.Generator().manual_seed(world.rank)
    tokens_BS = torch.randint(config.vocab_size, (rows, length), generator=generator)
    return training_step(model, [tokens_BS.to(world.device)])


def olmoe(config: DecoderConfig, device: torch.device) -> Any:
    """OLMoE in transformers, float32, with grouped_mm on a GPU."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    theirs = OlmoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.expert_hidden,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_seq_len,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        use_cache=False,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    theirs._attn_implementation = "sdpa"
    if device.type == "cuda":
        theirs._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with device:
        return OlmoeForCausalLM(theirs)


def training_step(model: Any, pieces: Sequence[Tensor], *, autocast: bool = False) -> Step:
    """Loss, gradients, clipping and AdamW, as transformers' users write them.

    Args:
        model: A causal language model.
        pieces: Micro-batches of tokens ``(B, S)``, of one shape.
        autocast: Whether products are bfloat16.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for tokens_BS in pieces:
            with torch.autocast(tokens_BS.device.type, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=tokens_BS, labels=tokens_BS).loss / len(pieces)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(torch.stack(losses).sum())

    return step
