"""How the experts' time follows the load: skew, number of tokens, and the first call.

    python benchmarks/loads_gpu.py

One GPU, bfloat16, gated experts, backend auto, forward and backward with the gradients of rows,
weights and matrices; medians go to results/loads_gpu.json.

- first call: seconds from an empty kernel cache to the end of the first step of a whole layer.
- skew: the same number of rows, drawn independently: uniform; Zipf with exponent 1; one expert
  takes half; three quarters of the experts take nothing.
- tokens: the layer's experts on 4 thousand to 262 thousand tokens; beside them GShard's dispatch
  by one-hot einsums (arXiv 2006.16668) with room for an equal share, as far as 64 GiB hold its
  tables, which grow with the square of the tokens.
"""

import argparse
import os
import tempfile
import time
from typing import Any

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # before Triton is imported

import torch
from layer_gpu import BF16, SHAPES, Shape, Step, make_layer, medians, training_step
from record import save
from torch import Tensor

from expertmesh.kernels.moe_mlp import moe_mlp

FIRST = ("olmoe-1b-7b", "fine-grained 7B")
SKEWED = ("olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b")
TOKENS = tuple(4096 << i for i in range(7))
MOST_TABLE_BYTES = 64 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    results: dict[str, Any] = {"dtype": "bfloat16", "rounds": rounds}
    results["first_step_s"] = first_steps()
    print("first step, s:", results["first_step_s"], flush=True)
    results |= {"skew_ms": {}, "tokens": {}}
    for name in SKEWED:
        results["skew_ms"][name] = times = measure_skew(SHAPES[name], rounds)
        print(name, {load: f"{ms:.2f} ms" for load, ms in times.items()}, flush=True)
        save("loads_gpu", results)  # after each: a run may be cut
    shape = SHAPES[SKEWED[0]]
    up, down = matrices(shape)
    for num_tokens in TOKENS:
        results["tokens"][num_tokens] = row = measure_tokens(shape, num_tokens, up, down, rounds)
        print(num_tokens, row, flush=True)
        path = save("loads_gpu", results)
    print(f"written to {path}")


def first_steps() -> dict[str, float]:
    """Seconds of the first forward and backward, compilation included."""
    seconds = {}
    for name in FIRST:
        shape = SHAPES[name]
        layer = make_layer(shape)
        x_TD = torch.randn(shape.T, shape.D, device="cuda", dtype=BF16)
        step = training_step(layer, x_TD, torch.randn_like(x_TD))
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - start, 2)
    return seconds


def experts_step(shape: Shape, expert_RK: Tensor, up: Tensor, down: Tensor) -> Step:
    """Forward and backward of the expert operation on given choices."""
    rows = len(expert_RK)
    x_RD = torch.randn(rows, shape.D, device="cuda", dtype=BF16).requires_grad_()
    dy_RD = torch.randn_like(x_RD)
    weight_RK = torch.rand(rows, shape.K, device="cuda").requires_grad_()
    leaves = [x_RD, weight_RK, up, down]

    def run() -> object:
        return torch.autograd.grad(moe_mlp(x_RD, expert_RK, weight_RK, up, down), leaves, dy_RD)

    return run


def matrices(shape: Shape) -> tuple[Tensor, Tensor]:
    up = torch.randn(shape.E, 2, shape.F, shape.D, device="cuda", dtype=BF16) * shape.D**-0.5
    down = torch.randn(shape.E, shape.D, shape.F, device="cuda", dtype=BF16) * shape.F**-0.5
    return up.requires_grad_(), down.requires_grad_()


def measure_skew(shape: Shape, rounds: int) -> dict[str, float]:
    """Milliseconds by how choices are spread."""
    place = torch.arange(shape.E, device="cuda")
    chances = {
        "uniform": torch.ones(shape.E, device="cuda"),
        "Zipf": 1 / (place + 1.0),
        "one takes half": torch.where(place == 0, shape.E - 1.0, 1.0),
        "three quarters empty": (place % 4 == 0).float(),
    }
    up, down = matrices(shape)
    steps = {}
    for load, chance_E in chances.items():
        expert_N = torch.multinomial(chance_E, shape.T * shape.K, replacement=True)
        steps[load] = experts_step(shape, expert_N.view(shape.T, shape.K), up, down)
    return medians(steps, rounds)


def measure_tokens(
    shape: Shape, num_tokens: int, up: Tensor, down: Tensor, rounds: int
) -> dict[str, float]:
    """Milliseconds and peak MiB of ours and of one-hot einsums."""
    score_TE = torch.rand(num_tokens, shape.E, device="cuda")
    expert_TK = score_TE.topk(shape.K).indices
    contenders = {"expertmesh": experts_step(shape, expert_TK, up, down)}
    capacity = num_tokens * shape.K // shape.E
    if 3 * num_tokens * shape.E * capacity * BF16.itemsize <= MOST_TABLE_BYTES:
        contenders["one-hot einsum"] = einsum_step(shape, expert_TK, capacity, up, down)
    row = {f"{who}, peak MiB": peak_mib(step) for who, step in contenders.items()}
    row |= {f"{who}, ms": ms for who, ms in medians(contenders, rounds).items()}
    torch.cuda.empty_cache()
    return row


def peak_mib(step: Step) -> float:
    """Of one step, beyond what was allocated before."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def einsum_step(shape: Shape, expert_TK: Tensor, capacity: int, up: Tensor, down: Tensor) -> Step:
    """GShard's dispatch and combine, tables included; what exceeds the capacity is dropped."""
    num_tokens = len(expert_TK)
    x_TD = torch.randn(num_tokens, shape.D, device="cuda", dtype=BF16).requires_grad_()
    dy_TD = torch.randn_like(x_TD)
    weight_TK = torch.rand(num_tokens, shape.K, device="cuda").requires_grad_()
    leaves = [x_TD, weight_TK, up, down]

    def run() -> object:
        chosen_TE = torch.zeros(num_tokens, shape.E, device="cuda", dtype=torch.int32)
        chosen_TE.scatter_(1, expert_TK, 1)
        slot_TE = torch.where(chosen_TE > 0, chosen_TE.cumsum(0, dtype=torch.int32) - 1, capacity)
        weight_TE = x_TD.new_zeros(num_tokens, shape.E).scatter(1, expert_TK, weight_TK.to(BF16))
        slots_C = torch.arange(capacity, device="cuda", dtype=torch.int32)
        dispatch_TEC = (slot_TE[..., None] == slots_C).to(BF16)
        combine_TEC = dispatch_TEC * weight_TE[..., None]
        x_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, x_TD)
        pre = torch.bmm(x_ECD, up.flatten(1, 2).mT).unflatten(2, (2, shape.F))
        hidden_ECF = torch.nn.functional.silu(pre[:, :, 0]) * pre[:, :, 1]
        y_TD = torch.einsum("tec,ecd->td", combine_TEC, torch.bmm(hidden_ECF, down.mT))
        return torch.autograd.grad(y_TD, leaves, dy_TD)

    return run


if __name__ == "__main__":
    main()
