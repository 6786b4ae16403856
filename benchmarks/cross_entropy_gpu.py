"""Output layer and loss of OpenMoE-8B on a GPU: all logits at once, and some at a time.

    python benchmarks/cross_entropy_gpu.py

256,384 words, width 2048, sequences of 2048 tokens, bfloat16 products over float32 weights,
forward and backward. Time is the median of ten runs between CUDA events; ``peak_mib`` is what the
pass needed beyond its inputs, gradients included. ``all at once`` is autograd through the
definition; the others say how many logits live at a time.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import save  # beside this file
from torch import Tensor

from expertmesh.kernels.cross_entropy import CrossEntropy, linear_cross_entropy, token_loss

WORDS, DIM, RUNS = 256_384, 2048, 10
KIND = CrossEntropy(z_loss=1e-4)
AT_ONCE = {f"2**{bits} logits": 1 << bits for bits in (24, 26, 27, 28, 29, 30)}


def plain(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The definition."""
    return token_loss(F.linear(hidden_ND, weight_VD), targets_N, KIND)


def chunked(at_once: int) -> Callable[..., Tensor]:
    """So many logits at a time."""
    return lambda h, w, t: linear_cross_entropy(h, w, t, KIND, logits_at_once=at_once)


def measure(loss: Callable[..., Tensor], tokens: int) -> dict[str, float] | None:
    """Milliseconds and MiB of a forward and backward pass; None if it does not fit."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, DIM, device="cuda", requires_grad=True)
    weight_VD = (torch.randn(WORDS, DIM, device="cuda") * 0.02).requires_grad_()
    targets_N = torch.randint(WORDS, (tokens,), device="cuda")
    times = []
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(RUNS + 2):
            hidden_ND.grad = weight_VD.grad = None
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            with torch.autocast("cuda", torch.bfloat16):
                value = loss(hidden_ND, weight_VD, targets_N)
            value.backward()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    except torch.OutOfMemoryError:
        return None
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms": round(statistics.median(times[2:]), 2), "peak_mib": round(peak)}


def main() -> None:
    """Measure and save."""
    ways = {"all at once": plain, **{name: chunked(n) for name, n in AT_ONCE.items()}}
    results: dict[str, Any] = {}
    for tokens in (2048, 8192, 16384):
        results[str(tokens)] = {}
        for name, way in ways.items():
            results[str(tokens)][name] = found = measure(way, tokens)
            torch.cuda.empty_cache()
            print(f"{tokens:>6} tokens  {name:<16} {found}", flush=True)
        path = save("cross_entropy_gpu", {"words": WORDS, "dim": DIM, "by_tokens": results})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
