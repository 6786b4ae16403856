"""A decoder of the same shape by torchtitan: experts over all ranks, the rest sharded by FSDP2.

    pip install --no-deps torchtitan==0.2.2 tyro typeguard docstring-parser shtab einops torchdata

beside ``datasets``, ``tokenizers`` and ``tensorboard``; later versions want a nightly torch.
"""

import importlib
import importlib.util
from importlib import metadata
from typing import Any

import torch
from torch.nn import functional

from expertmesh.models import DecoderConfig
from multi.rival import LR, Work
from multi.world import Step, World

PACKAGE = "torchtitan"


def refusal(device: torch.device) -> str | None:
    """Why it is left out; None where it runs, if it fits the installed torch."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "not installed (this is written for version 0.2.2)"
    return None if device.type == "cuda" else "it runs on GPUs"


def words(device: torch.device) -> str:
    """What it is here, or why it is left out."""
    left_out = refusal(device)
    if left_out is not None:
        return f"{PACKAGE} is left out: {left_out}"
    return (
        f"{PACKAGE} {metadata.version(PACKAGE)}: its Qwen3 with the same sizes (norms of queries "
        "and keys by head), experts over all ranks, FSDP2 in bfloat16 with float32 parameters, "
        "gradients summed in every micro-batch as by its trainer; neither compiled nor recomputed, "
        "no router loss"
    )


def step(world: World, config: DecoderConfig, work: Work) -> Step:
    """A training step as torchtitan's trainer takes it.

    Args:
        world: All processes.
        config: Our model's shape.
        work: Of each rank.
    """
    job, dims = _job(work), _dims(world)
    model = _model(world, config, job, dims)
    optimizers = _of("components.optimizer").build_optimizers([model], job.optimizer, dims)
    utils = _of("distributed.utils")
    # FSDP2 lowers the precision itself; a process alone has none, and its trainer uses autocast.
    precision = utils.maybe_enable_amp(dims, job.training.mixed_precision_param, world.device.type)
    pieces = work.tokens(config.vocab_size, world.rank, world.device)
    num_tokens = work.num_tokens * world.size

    def take() -> object:
        optimizers.zero_grad()
        losses = []
        for tokens_BS in pieces:
            targets_T = tokens_BS.roll(-1, 1).flatten()
            with precision:
                logits_TV = model(tokens_BS).flatten(0, 1).float()
                loss = functional.cross_entropy(logits_TV, targets_T, reduction="sum") / num_tokens
            del logits_TV
            loss.backward()
            losses.append(loss.detach())
        utils.clip_grad_norm_(
            list(model.parameters()), 1.0, foreach=True, ep_enabled=dims.ep_enabled
        )
        optimizers.step()
        return float(torch.stack(losses).sum())

    return take


def _of(module: str) -> Any:
    """One of its modules."""
    return importlib.import_module(f"{PACKAGE}.{module}")


def _job(work: Work) -> Any:
    job = _of("config").JobConfig()
    job.training.seq_len = work.length
    job.activation_checkpoint.mode = "none"
    job.optimizer.lr = LR
    return job


def _dims(world: World) -> Any:
    return _of("distributed").ParallelDims(
        dp_replicate=1,
        dp_shard=world.size,
        cp=1,
        tp=1,
        pp=1,
        ep=world.size,
        etp=1,
        world_size=world.size,
    )


def _model(world: World, config: DecoderConfig, job: Any, dims: Any) -> Any:
    experts = _of("models.moe").MoEArgs(
        num_experts=config.num_experts,
        num_shared_experts=0,
        score_func="softmax",
        score_before_experts=False,
        top_k=config.experts_per_token,
        load_balance_coeff=None,
        use_grouped_mm=world.device.type == "cuda",
    )
    sizes = _of("models.qwen3.model.args").Qwen3ModelArgs(
        dim=config.dim,
        n_layers=config.num_layers,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim or config.dim // config.num_heads,
        vocab_size=config.vocab_size,
        max_seq_len=job.training.seq_len,
        moe_enabled=True,
        moe_inter_dim=config.expert_hidden,
        moe_args=experts,
    )
    with torch.device("meta"):
        model = _of("models.qwen3.model.model").Qwen3Model(sizes)
    _of("models.qwen3.infra.parallelize").parallelize_qwen3(model, dims, job)
    model.to_empty(device=world.device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=world.device)
    return model.train()
