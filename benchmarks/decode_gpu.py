"""Decoding steps of one layer on one GPU beside transformers' block over the same weights.

    python benchmarks/decode_gpu.py

bfloat16, gated experts, no gradient, routing by a random router over random tokens. Every
contender but one runs as a CUDA graph of several steps with tokens of their own, so that caches do
not hold all weights; contenders take turns, and medians go to results/decode_gpu.json.

- experts: ``GatedMLPExperts`` on a decision made beforehand, backend auto.
- layer: ``MoE`` whole, with router and counters.
- layer, no graph: the same with what the host needs to launch.
- transformers: the Mixtral block, router included, with its batched_mm and grouped_mm experts.

The bound is the time to read the chosen experts' weights at the speed of a large copy.
"""

import argparse
import statistics
from typing import Any

import torch
from layer_gpu import (  # beside this file
    BF16,
    SHAPES,
    Shape,
    Step,
    make_layer,
    measure_ceilings,
    medians,
    mixtral_block,
    random_bf16,
)
from record import save
from torch import Tensor, nn

from expertmesh.kernels.backends import Problem, choose
from expertmesh.kernels.moe_mlp.op import MLP_BACKENDS
from expertmesh.layer import MoE
from expertmesh.routing import Routing

DECODED = ("mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b")
TOKENS = (1, 4, 16, 64)
STEPS = 8
PEERS = ("batched_mm", "grouped_mm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    results: dict[str, Any] = {"dtype": "bfloat16", "rounds": rounds, **ceilings, "steps": {}}
    for name in DECODED:
        results["steps"][name] = measure(SHAPES[name], ceilings["copy_tb_per_s"], rounds)
        for num_tokens, row in results["steps"][name].items():
            us = ", ".join(f"{what} {value:.0f}" for what, value in row["us"].items())
            print(f"{name}, {num_tokens} tokens, bound {row['bound_us']:.0f} us: {us}", flush=True)
        path = save("decode_gpu", results)
    print(f"written to {path}")


@torch.no_grad()
def measure(shape: Shape, tb_per_s: float, rounds: int) -> dict[int, dict[str, Any]]:
    """For each number of tokens: backend, bound, microseconds a step, and shares of the bound."""
    layer = make_layer(shape).eval()
    blocks = {peer: peer_block(shape, layer, peer) for peer in PEERS}
    rows = {}
    for num_tokens in TOKENS:
        batches = [random_bf16(num_tokens, shape.D) for _ in range(STEPS)]
        routings = [layer.router(x_TD) for x_TD in batches]
        touched = statistics.mean(int((routing.load_E > 0).sum()) for routing in routings)
        bound_us = touched * 3 * shape.D * shape.F * BF16.itemsize / tb_per_s / 1e6
        steps: dict[str, Step] = {
            "experts": captured(over_experts(layer, batches, routings)),
            "layer": captured(over(layer, batches)),
            "layer, no graph": over(layer, batches),
        }
        for peer, block in blocks.items():
            if num_tokens * shape.K > 4 * shape.E and peer == "batched_mm":
                continue  # it copies the weights of every choice
            steps[f"transformers {peer}"] = captured(over(block, [x[None] for x in batches]))
        us = {name: 1e3 * ms / STEPS for name, ms in medians(steps, rounds).items()}
        rows[num_tokens] = {
            "backend": backend_of(shape, num_tokens),
            "experts_touched": touched,
            "bound_us": round(bound_us, 1),
            "us": {name: round(value, 1) for name, value in us.items()},
            "share_of_bound": {name: round(bound_us / value, 3) for name, value in us.items()},
        }
    return rows


def peer_block(shape: Shape, layer: MoE, implementation: str) -> nn.Module:
    block = mixtral_block(shape, layer)
    if block is None:
        raise SystemExit("transformers is too old or missing; run: pip install 'transformers>=5.0'")
    experts: Any = block.experts
    experts.config._experts_implementation = implementation
    return block.eval()


def over_experts(layer: MoE, batches: list[Tensor], routings: list[Routing]) -> Step:
    return lambda: [
        layer.experts(x_TD, routing.expert_TK, routing.weight_TK)
        for x_TD, routing in zip(batches, routings, strict=True)
    ]


def over(module: nn.Module, batches: list[Tensor]) -> Step:
    return lambda: [module(x) for x in batches]


def captured(run: Step) -> Step:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def backend_of(shape: Shape, num_tokens: int) -> str:
    """What auto picks for a decoding step."""
    problem = Problem(
        device=torch.device("cuda", torch.cuda.current_device()),
        dtype=BF16,
        num_experts=shape.E,
        num_assignments=num_tokens * shape.K,
        dim=shape.D,
        hidden=shape.F,
        needs_grad=False,
        capturing=True,
    )
    return choose(MLP_BACKENDS, problem).name


if __name__ == "__main__":
    main()
