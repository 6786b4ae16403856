r"""Fine-tunes OpenMoE on instructions, with the flat flags of the original trainer.

    torchrun --standalone --nproc-per-node 4 \
      examples/openmoe/train.py --model_name test -d alpaca-demo

Each flag becomes a field of a run file, which is printed; `expertmesh train` runs the same. A flag
that nothing here stands for is refused: none is ignored.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from expertmesh.errors import UserError

WEIGHTS = {
    "test": "",
    "base": "hpcai-tech/openmoe-base",
    "8b": "hpcai-tech/openmoe-8b",
    "34b": "OrionZheng/openmoe-34b-200B",
}
"""Where each size begins, as in the original; the test size has random values."""

REFUSED = {
    "load_balance": "experts are not moved between ranks; balance comes from "
    "--router_aux_loss_factor, and in a run file from model.router_options.bias_rate",
    "load_balance_interval": "experts are not moved between ranks; leave it out",
    "comm_overlap": "communication is not overlapped; --plugin ep_zero keeps all but the "
    "all-to-all between neighbouring ranks",
    "hierarchical_alltoall": "the all-to-all is not split by hosts; --plugin ep_zero and "
    "mesh.placement say which ranks of a host exchange tokens",
}
"""Flags of the original for what is not here, with what is."""

APEX = (
    "python -m pip install -v --disable-pip-version-check --no-cache-dir --no-build-isolation "
    "--config-settings '--build-option=--cpp_ext' --config-settings '--build-option=--cuda_ext' ./"
)


def parser() -> argparse.ArgumentParser:
    """The flags, by the original's names and defaults."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = flags.add_argument
    add("--model_name", choices=[*WEIGHTS], default="base")
    add("--plugin", default="ep", help="ep (default, any number of ranks), ep_zero or hybrid")
    add("--output_path", default="./outputs", help="the run's folder")
    add("--num_epochs", "--num_epoch", type=float, default=1)
    add("--batch_size", type=int, default=1, help="sequences of a step per data rank")
    add("--microbatch_size", type=int, help="of them, those of one pass; hybrid: 1, else all")
    add("-i", "--save_interval", type=int, default=1000, help="steps between checkpoints")
    add("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    add("--max_length", type=int, default=2048)
    add("-d", "--dataset", default="yizhongw/self_instruct", help="hub, file, or catalog name")
    add("--task_name", default="super_natural_instructions", help="of a data set of the hub")
    add("--lr", type=float, default=1e-5)
    add("--weight_decay", type=float, default=0)
    add("--zero_stage", type=int, choices=[0, 1, 2, 3], help="ep: 2; ep_zero and hybrid: 1")
    add("--extra_dp_size", type=int, help="copies of each expert, for ep_zero: 2")
    add("--pp_size", type=int, help="pipeline stages, for hybrid: 2")
    add("--dp_size", type=int, help="copies of each expert in a stage, for hybrid")
    add("--ep_size", type=int, help="ranks that share the experts of a stage, for hybrid")
    add("--seed", type=int, default=42)
    add("--use_kernel", action="store_true", help="say which kernels run, and which cannot here")
    add("--use_layernorm_kernel", action="store_true", help="apex's norm; needs apex")
    add("--router_aux_loss_factor", type=float, default=0.01, help="weight of the balance loss")
    add("--router_z_loss_factor", type=float, default=1e-4, help="of the routers' z-loss")
    add("--label_smoothing", type=float, default=0.0)
    add("--z_loss_factor", type=float, default=1e-4, help="weight of the output's z-loss")
    add("--init_from", help="folder or hub name of the first weights, or none; by model_name")
    for name in REFUSED:
        kind: dict[str, Any] = {"type": int} if name.endswith("interval") else {"nargs": 0}
        add(f"--{name}", action=_Refuse, help="refused: not here", **kind)
    return flags


class _Refuse(argparse.Action):
    """An error that says what there is instead."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: object, *_: Any
    ) -> None:
        raise UserError(f"--{self.dest} is not supported: {REFUSED[self.dest]}")


def tables(flags: argparse.Namespace, world: int) -> dict[str, dict[str, Any]]:
    """The run file that says the same.

    Args:
        flags: As ``parser()`` gives them.
        world: Number of ranks.

    Raises:
        UserError: If a flag does not go with the others or with the ranks.
    """
    from expertmesh.data import instruction_source
    from expertmesh.models import decoder_preset

    preset = f"openmoe-{flags.model_name}"
    model = decoder_preset(preset)
    mesh = _mesh(flags, world, model.num_experts)
    data_ranks = world // mesh["pp"]
    batch, micro_batch = (n * data_ranks for n in _batch(flags))
    init = WEIGHTS[flags.model_name] if flags.init_from is None else flags.init_from
    return {
        "run": {"dir": flags.output_path, "seed": flags.seed},
        "model": {
            "preset": preset,
            # The original means its router losses over layers; here layers' losses are added.
            "router_options": {
                "balance_coef": flags.router_aux_loss_factor / model.num_moe_layers,
                "z_coef": flags.router_z_loss_factor / model.num_moe_layers,
            },
        },
        "init": {"from": "" if init == "none" else init},
        "data": {
            "kind": "instructions",
            "source": instruction_source(flags.dataset, flags.task_name),
            "tokenizer": "tokenizer-umt5",
            "seq_len": flags.max_length,
            "val_fraction": 0.0,
        },
        "loss": {"label_smoothing": flags.label_smoothing, "z_loss": flags.z_loss_factor},
        "train": {
            "epochs": flags.num_epochs,
            "batch": batch,
            "micro_batch": micro_batch,
            "precision": flags.precision,
            "checkpoint_activations": True,
            "save_every": flags.save_interval,
            "save_published": True,
        },
        # The original's Adam: torch's defaults, one rate from first to last step, no clipping.
        "optim": {
            "lr": flags.lr,
            "schedule": "constant",
            "beta2": 0.999,
            "weight_decay": flags.weight_decay,
            "clip": 0.0,
        },
        "mesh": mesh,
    }


def _mesh(flags: argparse.Namespace, world: int, num_experts: int) -> dict[str, Any]:
    from expertmesh.parallel import strategies

    _check_plugin(flags)
    if flags.plugin == "ep_zero":
        copies = 2 if flags.extra_dp_size is None else flags.extra_dp_size
        chosen = strategies.copies_beside_each_other(world, num_experts, copies)
    elif flags.plugin == "hybrid" and flags.pp_size is not None:
        chosen = _stages(flags, world, num_experts)
    else:
        chosen = strategies.strategy(flags.plugin, world, num_experts)
        if flags.plugin == "hybrid" and flags.ep_size is not None:
            chosen = replace(chosen, ep=flags.ep_size)
    zero = chosen.zero if flags.zero_stage is None else flags.zero_stage
    mesh: dict[str, Any] = {"pp": chosen.pp, "ep": chosen.ep, "placement": chosen.placement}
    if flags.dp_size is not None:
        mesh["edp"] = flags.dp_size
    return mesh | {"zero": zero, "expert_zero": zero}


def _stages(flags: argparse.Namespace, world: int, num_experts: int) -> Any:
    from expertmesh.parallel import strategies

    if flags.pp_size < 2 or world % flags.pp_size:
        raise UserError(
            f"--pp_size must be at least 2 and divide the {world} ranks, got {flags.pp_size}; "
            "for one stage use --plugin ep or ep_zero"
        )
    ep = strategies.experts_everywhere(world // flags.pp_size, num_experts).ep
    return strategies.Strategy(pp=flags.pp_size, ep=flags.ep_size or ep, zero=1, expert_zero=1)


def _check_plugin(flags: argparse.Namespace) -> None:
    """Refuse an unknown plugin, and sizes that belong to another one."""
    from expertmesh.errors import nearest
    from expertmesh.parallel.strategies import STRATEGIES

    if flags.plugin not in STRATEGIES:
        raise UserError(
            f"--plugin must be one of {', '.join(STRATEGIES)}, got {flags.plugin!r}"
            + nearest(flags.plugin, STRATEGIES)
        )
    owners = {"extra_dp_size": "ep_zero", "pp_size": "hybrid", "dp_size": "hybrid"}
    for name, plugin in (owners | {"ep_size": "hybrid"}).items():
        value = getattr(flags, name)
        if value is not None and flags.plugin != plugin:
            raise UserError(
                f"--{name} is for --plugin {plugin}, got {value} with --plugin {flags.plugin}; "
                "leave it out"
            )
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")


def _batch(flags: argparse.Namespace) -> tuple[int, int]:
    """Sequences of a step and of a pass, per data rank."""
    batch = flags.batch_size
    micro_batch = flags.microbatch_size
    if micro_batch is None:
        micro_batch = 1 if flags.plugin == "hybrid" else batch
    if batch < 1 or micro_batch < 1 or batch % micro_batch:
        raise UserError(
            f"--microbatch_size must divide --batch_size={batch}, both at least 1, got "
            f"{micro_batch}; set --microbatch_size 1"
        )
    return batch, micro_batch


def kernels(device: str, precision: str) -> list[str]:
    """What runs on the device beside plain PyTorch, and what cannot, a line each.

    All of it is used whether one asks or not.
    """
    import importlib.util

    import torch

    cuda = "needs a CUDA device" if device != "cuda" else ""
    half = "needs bf16 or fp16" if precision == "fp32" else ""
    flash = "" if torch.backends.cuda.is_flash_attention_available() else "not in this torch"
    triton = "" if importlib.util.find_spec("triton") else "pip install 'expertmesh[gpu]'"
    reasons = {
        "flash attention (SDPA's)": cuda or half or flash,
        "Triton kernels of experts and routers": cuda or triton,
    }
    return [
        f"skipped  {name}: {reason}" if reason else f"kernel   {name}"
        for name, reason in reasons.items()
    ]


def apex_norm() -> Any:
    """Apex's norm.

    Raises:
        UserError: If apex is not installed.
    """
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError:
        raise UserError(
            "--use_layernorm_kernel needs apex, which is not installed; in a checkout of NVIDIA's "
            f"apex run: {APEX}; or leave the flag out: torch's own fused norm is used then"
        ) from None
    return fused_rms_norm_affine


def use_norm(model: Any, fused: Any) -> None:
    """Let ``fused(x, weight, normalized_shape, eps)`` compute every norm of a model."""
    from expertmesh.models.norm import RMSNorm

    def forward(norm: RMSNorm, x: Any) -> Any:
        return fused(x, norm.weight, norm.normalized_shape, norm.eps)

    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = forward.__get__(module)


def main(argv: Sequence[str] | None = None) -> int:
    """Train."""
    flags = parser().parse_args(argv)
    from expertmesh.cli.train import train
    from expertmesh.parallel.processes import joined, launched, local_device
    from expertmesh.train import toml
    from expertmesh.train.loop import Trainer
    from expertmesh.train.precision import pick_device
    from expertmesh.train.run_file import parse_run

    world = launched()
    # What is missing is said before data and weights are read.
    norm = apex_norm() if flags.use_layernorm_kernel else None
    content = tables(flags, world)
    run = parse_run(content, source="the flags")
    device = local_device(pick_device(run.run.device))
    if os.environ.get("RANK", "0") == "0":
        print(toml.dumps(content))
        ranks = world // content["mesh"]["pp"]
        print(f"global batch: {run.train.batch} = {flags.batch_size} x {ranks} data ranks")
        if flags.use_kernel:
            print("\n".join(kernels(device.type, flags.precision)))
    with joined(device, run.mesh.timeout):
        trainer = Trainer(run)
        if norm is not None:
            use_norm(trainer.model, norm)
        return train(trainer)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
