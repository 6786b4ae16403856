"""Where the time of a step goes: its kernels, and the parts that they belong to."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

TOP = 20
PARTS = {
    "communication": ("nccl",),
    "optimizer and clipping": ("adam", "multi_tensor_apply", "lpnorm", "foreach"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "experts": (
        "up_kernel",
        "dhidden",
        "dweight",
        "rows_kernel",
        "spread_kernel",
        "gather_sum",
        "turns",
        "groupproblem",
        "group_kernel",
        "share_sum",
        "expert_sum",
        "row_dots",
    ),
    "router and losses of balance": (
        "_few_logits",
        "_part_kernel",
        "_split_kernel",
        "_product_kernel",
        "_select_kernel",
        "_gates",
        "_statistics",
        "_count",
        "_place",
        "_scatter",
        "topk",
    ),
    "other products": ("gemm", "nvjet", "cutlass", "cublas", "mm"),
}
"""Fragments of kernels' names, in lower case; the first part that has one takes the kernel."""


def part_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to, judged by its name."""
    name = kernel.lower()
    for part, fragments in PARTS.items():
        if any(fragment in name for fragment in fragments):
            return part
    return "everything else"


def where_time_goes(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Shares of a step's time on the device by part, and its longest kernels.

    Kernels that run beside each other count both; ``busy_ms`` is how long any ran. On the CPU the
    operations of torch take the place of kernels.

    Args:
        step: Has run before.
        device: CUDA or the CPU.
    """
    on_gpu = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    ) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [
        (event.key, getattr(event, clock), event.count)
        for event in profiler.key_averages()
        # A named range, such as an optimizer's step, would count its kernels again.
        if not event.is_user_annotation
    ]
    total = sum(us for _, us, _ in events) or 1.0
    parts: dict[str, float] = {}
    for kernel, us, _ in events:
        parts[part_of(kernel)] = parts.get(part_of(kernel), 0.0) + us / total
    longest = sorted(events, key=lambda event: -event[1])[:TOP]
    ranges = [e.time_range for e in profiler.events() if on_gpu and e.device_type.name == "CUDA"]
    return {
        "device_ms": round(total / 1e3, 3),
        "busy_ms": round(covered([(r.start, r.end) for r in ranges]) / 1e3, 3),
        "parts": {part: round(share, 4) for part, share in sorted(parts.items())},
        "kernels": [
            {"name": kernel[:120], "ms": round(us / 1e3, 3), "calls": calls}
            for kernel, us, calls in longest
        ],
    }


def covered(ranges: Iterable[tuple[float, float]]) -> float:
    """How much of the line lies within any range."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def show(found: dict[str, Any]) -> None:
    """Print what ``where_time_goes`` found."""
    print(f"  {found['device_ms']:.1f} ms on the device, which was busy for {found['busy_ms']:.1f}")
    for part, share in sorted(found["parts"].items(), key=lambda item: -item[1]):
        print(f"  {share:6.1%}  {part}")
    for row in found["kernels"]:
        print(f"  {row['ms']:9.2f} ms {row['calls']:5} x  {row['name']}")
