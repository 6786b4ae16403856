"""The layer on one GPU against its own matrix products and against transformers, in one process.

    python benchmarks/layer_gpu.py

bfloat16, gated experts, routing by a random router over random tokens, nothing dropped. For each
shape the forward pass without gradient and forward and backward with the gradients of the input
and of all parameters; contenders take turns, each timed behind uncounted runs of itself; medians
go to results/layer_gpu.json.

- expertmesh: ``MoE`` with the router of the shape's model and ``GatedMLPExperts``, backend auto.
- cuBLAS bmm, GEMMs alone: batched products of the same FLOPs, every expert with as many rows.
- grouped_mm, GEMMs alone: the layer's six products, with the router's row counts.
- transformers grouped_mm: the Mixtral block, which shares the layer's expert weights.

Saved memory is what is allocated between forward and backward beyond what was before, the output
included.
"""

import argparse
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from record import save  # beside this file
from torch import Tensor, nn

from expertmesh.experts import GatedMLPExperts
from expertmesh.kernels.grouping import group_by_expert
from expertmesh.layer import MoE
from expertmesh.routing import router_preset

BF16 = torch.bfloat16
SEQUENCE = 4096
RUN_IN_MS = 300
"""A step of these layers takes up to 3 % more or less for a fifth of a second behind another's."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """T tokens, width D, expert width F, E experts, K choices, and whose router."""

    T: int
    D: int
    F: int
    E: int
    K: int
    router: str


SHAPES = {
    "olmoe-1b-7b": Shape(32768, 2048, 1024, 64, 8, "olmoe"),
    "qwen3-30b-a3b": Shape(32768, 2048, 768, 128, 8, "qwen3_moe"),
    "fine-grained 7B": Shape(24576, 1536, 256, 128, 8, "qwen3_moe"),
    "mixtral-8x7b": Shape(16384, 4096, 14336, 8, 2, "mixtral"),
    "deepseek-v2-lite": Shape(32768, 2048, 1408, 64, 6, "deepseek_v2"),
    "openmoe-8b width": Shape(16384, 2048, 8192, 32, 2, "mixtral"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print("matmul {matmul_tflops:.0f} TFLOP/s, copy {copy_tb_per_s:.2f} TB/s".format(**ceilings))
    results: dict[str, Any] = {"dtype": "bfloat16", "rounds": arguments.rounds, **ceilings}
    results |= {"shapes": {}, "median_ms": {}, "saved_mib": {}, "bmm_speed_fraction": {}}
    for name in arguments.shapes:
        times, saved = measure_layer(SHAPES[name], arguments.rounds)
        results["shapes"][name] = asdict(SHAPES[name])
        results["median_ms"][name] = times
        results["saved_mib"][name] = saved
        results["bmm_speed_fraction"][name] = {
            direction: round(row["cuBLAS bmm, GEMMs alone"] / row["expertmesh"], 3)
            for direction, row in times.items()
        }
        print_shape(name, times, saved)
        path = save("layer_gpu", results)  # after each: a run may be cut
    print(f"written to {path}")


def measure_ceilings() -> dict[str, float]:
    """What this GPU reaches on one large product and on one large copy."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=BF16).unbind(0)
    source = torch.randn(1 << 30, device="cuda", dtype=BF16)
    target = torch.empty_like(source)
    times = medians({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds=15)
    return {
        "matmul_tflops": round(2 * 8192**3 / times["matmul"] / 1e9, 1),
        "copy_tb_per_s": round(2 * source.nbytes / times["copy"] / 1e9, 3),
    }


def measure_layer(
    shape: Shape, rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Median milliseconds by direction and contender, and MiB saved by layer."""
    layer = make_layer(shape)
    x_BSD = torch.randn(shape.T // SEQUENCE, SEQUENCE, shape.D, device="cuda", dtype=BF16)
    dy_BSD = torch.randn_like(x_BSD)
    modules: dict[str, nn.Module] = {"expertmesh": layer}
    block = mixtral_block(shape, layer)
    if block is not None:
        modules["transformers grouped_mm"] = block

    forward = {name: forward_step(module, x_BSD) for name, module in modules.items()}
    both = {name: training_step(module, x_BSD, dy_BSD) for name, module in modules.items()}
    with torch.no_grad():
        routing = layer.eval()(x_BSD, return_routing=True)[1]
        offsets_E = group_by_expert(routing.expert_TK, shape.E).offsets_E
    for name, steps in (
        ("cuBLAS bmm, GEMMs alone", bmm_steps(shape)),
        ("grouped_mm, GEMMs alone", grouped_mm_steps(shape, offsets_E)),
    ):
        forward[name] = run_all(steps[:2])
        both[name] = run_all(steps)
    times = {"forward": medians(forward, rounds), "forward and backward": medians(both, rounds)}
    saved = {name: saved_mib(module, x_BSD) for name, module in modules.items()}
    return times, saved


def make_layer(
    shape: Shape, backend: str = "auto", *, router_dtype: torch.dtype = torch.float32
) -> MoE:
    sizes = {"dim": shape.D, "num_experts": shape.E, "k": shape.K}
    router = router_preset(shape.router, **sizes, seed=0, device="cuda", dtype=router_dtype)
    experts = GatedMLPExperts(
        shape.D, shape.F, shape.E, seed=0, device="cuda", dtype=BF16, backend=backend
    )
    return MoE(router, experts)


def mixtral_block(shape: Shape, layer: MoE) -> nn.Module | None:
    """transformers' block over the layer's own parameters; None where it has no grouped_mm."""
    try:
        from transformers import MixtralConfig
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return None
    if "grouped_mm" not in ALL_EXPERTS_FUNCTIONS:
        return None
    config = MixtralConfig(
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_local_experts=shape.E,
        num_experts_per_tok=shape.K,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    experts: Any = layer.experts
    gate: Any = block.gate
    gate.weight = nn.Parameter(layer.router.get_parameter("weight_ED").detach().to(BF16))
    block.experts.gate_up_proj = nn.Parameter(experts.gate_up.detach().flatten(1, 2))
    block.experts.down_proj = nn.Parameter(experts.down.detach())
    return block


def forward_step(module: nn.Module, x_BSD: Tensor) -> Step:
    """Without gradient, as in evaluation: balance losses are for training."""

    @torch.no_grad()
    def run() -> object:
        return module.eval()(x_BSD)

    return run


def training_step(module: nn.Module, x_BSD: Tensor, dy_BSD: Tensor) -> Step:
    """Gradients are returned, not accumulated."""
    x_BSD = x_BSD.detach().requires_grad_()
    wanted = [x_BSD, *module.parameters()]
    return lambda: torch.autograd.grad(module.train()(x_BSD), wanted, dy_BSD)


def saved_mib(module: nn.Module, x_BSD: Tensor) -> float:
    x_BSD = x_BSD.detach().requires_grad_()
    before = torch.cuda.memory_allocated()
    y = module.train()(x_BSD)
    held = torch.cuda.memory_allocated() - before
    del y
    return round(held / 2**20, 1)


def bmm_steps(shape: Shape) -> list[Step]:
    """up, down, and their gradients, over equal groups."""
    rows = shape.T * shape.K // shape.E
    x, h, pre = (random_bf16(shape.E, rows, n) for n in (shape.D, shape.F, 2 * shape.F))
    up, down = random_bf16(shape.E, 2 * shape.F, shape.D), random_bf16(shape.E, shape.D, shape.F)
    return [
        lambda: torch.bmm(x, up.mT),
        lambda: torch.bmm(h, down.mT),
        lambda: torch.bmm(x, down),
        lambda: torch.bmm(x.mT, h),
        lambda: torch.bmm(pre, up),
        lambda: torch.bmm(pre.mT, x),
    ]


def grouped_mm_steps(shape: Shape, offsets_E: Tensor) -> list[Step]:
    """The layer's six products over ready-grouped rows."""
    grouped_mm = torch.nn.functional.grouped_mm
    x, h, pre = (random_bf16(shape.T * shape.K, n) for n in (shape.D, shape.F, 2 * shape.F))
    up, down = random_bf16(shape.E, 2 * shape.F, shape.D), random_bf16(shape.E, shape.D, shape.F)
    return [
        lambda: grouped_mm(x, up.mT, offs=offsets_E),
        lambda: grouped_mm(h, down.mT, offs=offsets_E),
        lambda: grouped_mm(x, down, offs=offsets_E),
        lambda: grouped_mm(x.t(), h, offs=offsets_E),
        lambda: grouped_mm(pre, up, offs=offsets_E),
        lambda: grouped_mm(pre.t(), x, offs=offsets_E),
    ]


def random_bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def run_all(steps: list[Step]) -> Step:
    def run() -> object:
        for step in steps:
            step()
        return None

    return run


def medians(
    steps: dict[str, Step], rounds: int, *, run_in_ms: float = RUN_IN_MS
) -> dict[str, float]:
    """Milliseconds by step; steps take turns, and the first two rounds are not counted.

    In its turn a step is first repeated for ``run_in_ms``, as steps of training are, and then timed
    in a row for a third of that. A GPU at its limit of power follows with its clock what it has
    just computed: so nobody is timed at the clock that another left behind, and every round has an
    order of its own. What the host needs to launch shows where it takes longer than the device, not
    otherwise.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    repeats = dict.fromkeys(steps, (1, 1))
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 2):
        order = list(steps)
        shuffle(order)
        for name in order:
            run = steps[name]
            runs_in, counted = repeats[name]
            for _ in range(runs_in):
                run()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(counted):
                run()
            stop.record()
            torch.cuda.synchronize()
            ms = start.elapsed_time(stop) / counted
            repeats[name] = math.ceil(run_in_ms / ms), math.ceil(run_in_ms / 3 / ms)
            if number >= 2:
                times[name].append(ms)
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def print_shape(name: str, times: dict[str, dict[str, float]], saved: dict[str, float]) -> None:
    print(name)
    for contender in times["forward"]:
        forward, both = (row[contender] for row in times.values())
        mib = f"{saved[contender]:8.0f} MiB" if contender in saved else ""
        print(f"  {contender:26} {forward:8.2f} / {both:8.2f} ms {mib}")


if __name__ == "__main__":
    main()
