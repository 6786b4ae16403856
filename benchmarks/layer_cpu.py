"""The layer on the CPU against what a user would otherwise run, side by side in one process.

    python benchmarks/layer_cpu.py

Forward and backward with the gradients of the input and of all parameters, float32. The contenders
take turns within each round, so that a busy moment of the machine hits all of them; medians over
the rounds and ratios of medians are printed and written to results/layer_cpu.json.

- expertmesh: ``MoE`` with ``TopKRouter`` and ``GatedMLPExperts``, backend auto.
- expertmesh, torch.mm: the same without oneDNN's products, which torch uses for float32 only where
  its compiler or this library asks for them: what remains is due to the dataflow.
- transformers eager, grouped_mm: the Mixtral block in two of its experts modes.
- dense: a gated MLP of hidden width K * F, the same number of FLOPs per token.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from record import save  # beside this file
from torch import Tensor, nn
from turns import take_turns

import expertmesh.kernels.grouped_gemm.matmul as products
from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.routing import TopKRouter

SHAPE = {"T": 4096, "D": 256, "F": 512, "E": 32, "K": 4}
TARGETS = {
    "transformers eager": ("at least", 3.0),
    "transformers grouped_mm": ("at least", 1.2),
    "dense, equal FLOPs": ("at least", 1 / 1.1),
}

Step = Callable[[], object]


class DenseMLP(nn.Module):
    """The gated MLP of a dense model."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def expertmesh_layer() -> nn.Module:
    dim, hidden, num_experts, k = (SHAPE[letter] for letter in "DFEK")
    router = TopKRouter(dim, num_experts, k, renormalize="chosen", seed=0)
    return MoE(router, GatedMLPExperts(dim, hidden, num_experts, seed=0))


def mixtral_block(experts_mode: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    dim, hidden, num_experts, k = (SHAPE[letter] for letter in "DFEK")
    config = MixtralConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=k,
        hidden_act="silu",
    )
    config._experts_implementation = experts_mode
    return MixtralSparseMoeBlock(config)


def same_values(block: Any, layer: Any) -> nn.Module:
    """Give the Mixtral block our layer's values, so that both route and compute the same."""
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight_ED)
        block.experts.gate_up_proj.copy_(layer.experts.gate_up.flatten(1, 2))
        block.experts.down_proj.copy_(layer.experts.down)
    return block


def step(module: nn.Module, x_TD: Tensor, dy_TD: Tensor) -> Step:
    """One forward and backward; gradients are returned, not accumulated."""
    x_1TD = x_TD.unsqueeze(0).clone().requires_grad_()
    wanted = [x_1TD, *module.parameters()]
    return lambda: torch.autograd.grad(module(x_1TD), wanted, dy_TD.unsqueeze(0))


@contextmanager
def without_onednn() -> Iterator[None]:
    before, products._ONEDNN = products._ONEDNN, False
    try:
        yield
    finally:
        products._ONEDNN = before


def contenders() -> dict[str, Step]:
    torch.manual_seed(0)
    x_TD, dy_TD = torch.randn(2, SHAPE["T"], SHAPE["D"]).unbind(0)
    layer = expertmesh_layer()
    eager = same_values(mixtral_block("eager"), layer)
    grouped = same_values(mixtral_block("grouped_mm"), layer)
    torch.testing.assert_close(layer(x_TD), eager(x_TD.unsqueeze(0))[0], atol=1e-4, rtol=1e-3)
    ours = step(layer, x_TD, dy_TD)

    def plain_products() -> object:
        with without_onednn():
            return ours()

    return {
        "expertmesh": ours,
        "expertmesh, torch.mm": plain_products,
        "transformers eager": step(eager, x_TD, dy_TD),
        "transformers grouped_mm": step(grouped, x_TD, dy_TD),
        "dense, equal FLOPs": step(DenseMLP(SHAPE["D"], SHAPE["K"] * SHAPE["F"]), x_TD, dy_TD),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="torch's CPU threads (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    times = take_turns(contenders(), arguments.rounds, warm=2)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: median / medians["expertmesh"] for name, median in medians.items()}
    for name, median in medians.items():
        goal = "{} {:.2f}".format(*TARGETS[name]) if name in TARGETS else ""
        print(f"{name:26} {median:7.1f} ms  {ratios[name]:5.2f} x expertmesh  {goal}")
    results = {
        "shape": {**SHAPE, "dtype": "float32", "pass": "forward and backward"},
        "rounds": arguments.rounds,
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "min_ms": {name: round(min(values), 2) for name, values in times.items()},
        "ratio_of_medians_to_expertmesh": {n: round(value, 3) for n, value in ratios.items()},
        "targets": {name: list(target) for name, target in TARGETS.items()},
    }
    print(f"written to {save('layer_cpu', results)}")


if __name__ == "__main__":
    main()
