"""The same decoder by transformers, sharded by FSDP2."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from expertmesh.models import DecoderConfig
from multi.world import Step, World

LR = 1e-4


@dataclass(frozen=True)
class Work:
    """A rank's part of an optimizer step.

    Attributes:
        rows: Sequences of a micro-batch.
        micro_batches: Of a step.
        length: Tokens of a sequence.
    """

    rows: int
    micro_batches: int
    length: int

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.rows * self.micro_batches * self.length

    def tokens(self, vocab_size: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
        """Random micro-batches ``(B, S)``."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.rows * self.micro_batches, self.length
        tokens_BS = torch.randint(vocab_size, shape, generator=generator)
        return tokens_BS.to(device).split(self.rows)


def transformers_step(world: World, config: DecoderConfig, work: Work, size: int) -> Step:
    """A training step of OLMoE in transformers.

    Parameters are float32 and are gathered in bfloat16, gradients are summed in float32: the usual
    recipe. Blocks are sharded one by one, and gathered again in backward.

    Args:
        world: All processes.
        config: Our model's shape.
        work: Of each rank.
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
    # Ranks by themselves do the same, so that memory is enough on all or on none.
    pieces = work.tokens(config.vocab_size, world.rank if size > 1 else 0, world.device)
    return training_step(model, pieces)


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
        model: A causal language model. Under FSDP2 gradients are summed over ranks in the last
            micro-batch alone.
        pieces: Micro-batches of tokens ``(B, S)``, of one shape.
        autocast: Whether products are bfloat16.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for place, tokens_BS in enumerate(pieces):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(place == len(pieces) - 1)
            with torch.autocast(tokens_BS.device.type, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=tokens_BS, labels=tokens_BS).loss / len(pieces)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(torch.stack(losses).sum())

    return step
