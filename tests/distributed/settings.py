"""What the equivalence table trains: small models and batches that together use every option."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.data import Batch
from expertmesh.data.dataset import IGNORE
from expertmesh.layer import moe_layers
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.random import fold, uniform
from expertmesh.routing import (
    Capacity,
    GroupLimit,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadBalancingLoss,
    LoadLoss,
    NormalNoise,
    RandomSecond,
    SelectionBias,
    ThresholdSecond,
    TopKRouter,
    UniformNoise,
    ZLoss,
)
from tests.distributed.widenet import WideNet

VOCAB, DIM, EXPERTS = 32, 16, 8

DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": DIM,
    "num_layers": 4,
    "num_heads": 4,
    "qk_norm": "head",
    "max_seq_len": 16,
    "dense_hidden": 24,
    "moe_every": 2,
    "num_experts": EXPERTS,
    "experts_per_token": 2,
    "expert_hidden": 8,
    "num_shared_experts": 1,
    "init_std": 0.3,
    "router": "olmoe",
    "router_options": {"init_std": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, how it routes, and the batches it sees.

    Attributes:
        about: What it is there for.
        decoder: Overrides of ``DECODER``; None trains ``WideNet``.
        routing: Changes each router, by its layer; learned parts are made on the default device.
        capacity: Whether the routers have one.
        finish: Changes the model once it has values.
        rows: Sequences of a step's batch.
        seq_len: Tokens of a sequence.
        lengths: Tokens before the padding, by row; None has no padding.
        sequences: Sequences of a micro-batch.
        checkpointed: Whether activations are recomputed.
    """

    about: str
    decoder: Mapping[str, Any] | None = field(default_factory=dict)
    routing: Callable[[TopKRouter], None]
    capacity: bool = False
    finish: Callable[[nn.Module], None] = lambda model: None
    rows: int = 8
    seq_len: int = 12
    lengths: tuple[int, ...] | None = None
    sequences: int = 8
    checkpointed: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of a step's batch."""
        return self.rows * self.seq_len

    def model(self, seed: int, dtype: torch.dtype) -> nn.Module:
        """The model, with values unless made on the meta device."""
        if self.decoder is None:
            model: nn.Module = WideNet(VOCAB, DIM, EXPERTS, seed=seed)
        else:
            options = {**DECODER, **self.decoder}
            model = DecoderLM(DecoderConfig(**options), seed=seed)
        for index, moe in enumerate(moe_layers(model).values()):
            assert isinstance(moe.router, TopKRouter)
            moe.router.losses = ()
            self.routing(moe.router)
            moe.router.layer = index
        if self.checkpointed:
            model.checkpoint_blocks()
        return model.to(dtype)

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        tokens_BS = _numbers("tokens", step, (self.rows, self.seq_len))
        # Where capacity goes by weight, equal tokens are the hard case, and these always are.
        tokens_BS[:, 0] = 0
        targets_BS = _numbers("targets", step, (self.rows, self.seq_len))
        padding = None
        if self.lengths is not None:
            padding = torch.arange(self.seq_len) >= torch.tensor(self.lengths)[:, None]
            targets_BS = targets_BS.masked_fill(padding, IGNORE)
        return Batch(tokens_BS, targets_BS, padding, torch.arange(self.rows))


def _numbers(name: str, step: int, shape: tuple[int, int]) -> Tensor:
    count = torch.arange(shape[0] * shape[1])
    return (uniform(fold(0, name, step), count, torch.float64) * VOCAB).long().view(shape)


def _dropless(router: TopKRouter) -> None:
    router.renormalize = "chosen"
    router.noise = NormalNoise(0.3)
    router.losses = (LoadBalancingLoss(coef=0.1, form="huggingface"), ZLoss(coef=0.01))


def _padded(router: TopKRouter) -> None:
    router.score = "sigmoid"
    router.renormalize = "chosen"
    router.scale = 2.5
    router.bias = SelectionBias(EXPERTS, rate=0.05)
    router.noise = UniformNoise(0.2)
    router.losses = (
        LoadBalancingLoss(coef=0.1, form="deepseek_v3", scope="sequence"),
        ImportanceLoss(coef=0.1, scope="sequence"),
        ZLoss(coef=0.01),
    )


def _by_position(router: TopKRouter) -> None:
    router.noise = InputJitter(0.1)
    router.capacity = Capacity(factor=0.8, order="position")
    router.losses = (LoadBalancingLoss(coef=0.1, form="switch"),)


def _by_token(router: TopKRouter) -> None:
    router.renormalize = "chosen"
    router.capacity = Capacity(factor=0.7, order="token", scope="sequence")
    router.losses = (LoadBalancingLoss(coef=0.1, form="megablocks", scope="sequence"),)


def _by_priority(router: TopKRouter) -> None:
    router.renormalize = "kept"
    router.skip = ThresholdSecond(0.3)
    router.capacity = Capacity(factor=0.8, order="priority")
    router.losses = (
        ImportanceLoss(coef=0.1, of="probabilities", variance="unbiased"),
        LoadBalancingLoss(coef=0.1, scope=8),
    )


def _by_probability(router: TopKRouter) -> None:
    router.score = "sigmoid"
    router.bias = SelectionBias(EXPERTS, rate=0.05)
    router.group_limit = GroupLimit(num_groups=4, kept=2)
    router.capacity = Capacity(factor=0.8, order="probability")
    router.losses = (LoadBalancingLoss(coef=0.1, form="gshard_paper"),)


def _at_random(router: TopKRouter) -> None:
    router.renormalize = "chosen"
    router.noise = LearnedNoise(DIM, EXPERTS, min_std=0.1)
    router.skip = RandomSecond(0.5)
    router.capacity = Capacity(factor=0.8, order="random")
    router.losses = (LoadLoss(coef=0.1), ImportanceLoss(coef=0.1))


def _one_expert(router: TopKRouter) -> None:
    router.score = "sigmoid"
    router.bias = SelectionBias(EXPERTS, rate=0.0)
    router.losses = (LoadBalancingLoss(coef=0.1, form="switch"),)


def _openmoe(router: TopKRouter) -> None:
    router.capacity = Capacity(factor=1.25, formula="flaxformer", scope="<=40")
    router.losses = (LoadBalancingLoss(coef=0.1, form="huggingface"), ZLoss(coef=0.01))


@torch.no_grad()
def _send_all_to_expert_5(model: nn.Module) -> None:
    for moe in moe_layers(model).values():
        assert isinstance(moe.router, TopKRouter)
        assert moe.router.bias is not None
        moe.router.bias.bias_E[5] = 1e3


SETTINGS: dict[str, Setting] = {
    "dropless": Setting(
        about="normal noise, dropout, balance and z-loss",
        decoder={"dropout": 0.1, "expert_dropout": 0.2},
        routing=_dropless,
    ),
    "padded": Setting(
        about="very uneven rows, 4 micro-batches, selection bias, losses by sequence",
        routing=_padded,
        lengths=(12, 1, 7, 12, 3, 0, 12, 9),
        sequences=2,
    ),
    "position": Setting(
        about="capacity by position, top-1, jitter",
        decoder={"experts_per_token": 1, "num_shared_experts": 0},
        routing=_by_position,
        capacity=True,
    ),
    "token": Setting(
        about="capacity by token within a sequence, grouped-query attention",
        decoder={"num_kv_heads": 2, "qk_norm": "none", "position": "learned"},
        routing=_by_token,
        capacity=True,
    ),
    "priority": Setting(
        about="capacity by priority, weights over those kept, losses by 8 tokens, 4 micro-batches",
        decoder={"qk_norm": "full"},
        routing=_by_priority,
        capacity=True,
        lengths=(12, 12, 5, 12, 8, 12, 2, 12),
        sequences=2,
    ),
    "probability": Setting(
        about="capacity by probability, top-3 of the best groups, latent attention",
        decoder={
            "experts_per_token": 3,
            "attention": "mla",
            "qk_norm": "none",
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2,
            "v_head_dim": 4,
        },
        routing=_by_probability,
        capacity=True,
    ),
    "random": Setting(
        about="capacity at random, learned noise, dropout, load loss, 2 micro-batches, recomputed",
        decoder={"dropout": 0.2, "expert_dropout": 0.4},
        routing=_at_random,
        capacity=True,
        sequences=4,
        checkpointed=True,
    ),
    "one expert": Setting(
        about="all tokens to one expert, 7 idle",
        decoder={"experts_per_token": 1},
        routing=_one_expert,
        finish=_send_all_to_expert_5,
    ),
    "few tokens": Setting(
        about="2 rows of 3 tokens: ranks without tokens",
        routing=_dropless,
        rows=2,
        seq_len=3,
        sequences=2,
    ),
    "openmoe": Setting(
        about="OpenMoE: doubly gated, an extra MLP, unscaled attention, slots by 32 tokens",
        decoder={
            "attention_scale": 1.0,
            "head_dim": 6,
            "qk_norm": "none",
            "mlp": "doubly_gated",
            "extra_mlp": True,
            "num_shared_experts": 0,
            "router": "openmoe",
        },
        routing=_openmoe,
        capacity=True,
        lengths=(12, 12, 5, 12, 8, 12, 2, 12),
    ),
    "one layer at 3 depths": Setting(
        about="one MoE layer used at 3 depths, 2 micro-batches",
        decoder=None,
        routing=_dropless,
        sequences=4,
    ),
}
