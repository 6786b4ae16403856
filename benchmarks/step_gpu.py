"""A whole training step of OLMoE-1B-7B on one GPU, beside others'.

    python benchmarks/step_gpu.py                  all 16 layers
    python benchmarks/step_gpu.py --profile        and where the time of a step goes
    python benchmarks/step_gpu.py --only expertmesh --layers 4
    python benchmarks/step_gpu.py --device cpu --results /tmp/x    small sizes, to test the script

    python benchmarks/step_gpu.py --float32 --rows 2 --micro-batches 4

Forward, backward, clipping and AdamW on random tokens; medians of wall-clock times to the step's
end on the device. Parameters, gradients and moments are bfloat16 for every contender, 55 GB of the
device's 139 GiB. With ``--float32`` they are float32, 110 GB, and products bfloat16 under autocast:
what a run that should learn keeps. Then few tokens fit beside them at a time, and a step has
several micro-batches. Its results are those of step_gpu_float32.json.

- expertmesh: the trainer's step; router, losses and counters included, routers in float32.
- expertmesh, compiled: the same with the blocks compiled, as by ``train.compile``.
- expertmesh, balanced by force: the same with ``round_robin``, whose experts take equal shares.
- dense, equal active parameters: our decoder with MLPs as wide as the k experts of a token.
- transformers: its OLMoE with sdpa and grouped_mm, no balance loss.

Contenders run one after another, each with the memory to itself, and are saved one by one in
results; those that are not run again stay as they are there. The exit status is 1
where an aim is missed or a contender fails.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alone import alone  # beside this file
from multi.build import make_stepper
from multi.rival import LR, olmoe, training_step
from multi.training import SEQUENCE, TINY, random_batch
from peak import MFU, utilisation
from profiled import show, where_time_goes
from record import RESULTS, load_if_there, save, stamps_of

from expertmesh.models import DecoderConfig, decoder_preset
from expertmesh.train.precision import PrecisionName

NAME, MODEL = "step_gpu", "olmoe-1b-7b"
ROWS = 4
ROUNDS, WARM = 8, 3
OURS, COMPILED = "expertmesh", "expertmesh, compiled"
BALANCED = "expertmesh, balanced by force"
DENSE, THEIRS = "dense, equal active parameters", "transformers, grouped_mm"
PRECISION = {
    torch.bfloat16: "bfloat16 parameters, gradients and AdamW moments; our routers float32",
    torch.float32: "float32 parameters, gradients and AdamW moments; bfloat16 products",
}
GIB = 2**30
MOE_ALONE = ("num_experts", "experts_per_token", "expert_hidden", "router")


@dataclass(frozen=True)
class Contender:
    """Who trains.

    Attributes:
        name: For tables.
        config: The decoder's shape.
        build: From the shape and the bench to a training step.
    """

    name: str
    config: DecoderConfig
    build: Callable[[DecoderConfig, "Bench"], Callable[[], object]]


@dataclass(frozen=True)
class Bench:
    """Where, how much at once, and how often.

    Attributes:
        device: CUDA, or the CPU for tests.
        rows: Sequences of a micro-batch.
        length: Their tokens.
        rounds: Steps that count.
        profile: Whether to look where a step's time goes.
        micro_batches: Of a step.
        dtype: Of parameters, gradients and moments.
    """

    device: torch.device
    rows: int
    length: int
    rounds: int
    profile: bool
    micro_batches: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def batch_rows(self) -> int:
        """Sequences of a step."""
        return self.rows * self.micro_batches

    def measure(self, contender: Contender) -> dict[str, Any]:
        """Speed, memory and use of the device."""
        config = contender.config
        step = contender.build(config, self)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = self._seconds(step)
        flops = config.flops_per_token(self.length)
        speed = self.batch_rows * self.length / seconds
        found: dict[str, Any] = {
            "tokens_per_second": speed,
            "step_ms": 1e3 * seconds,
            "mfu": utilisation(3 * speed * flops, self.device),
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
            "num_params": config.num_params,
            "num_active_params": config.num_active_params,
            "forward_flops_per_token": flops,
        }
        if self.profile:
            found["profile"] = where_time_goes(step, self.device)
            show(found["profile"])
        return found

    def _seconds(self, step: Callable[[], object]) -> float:
        times = []
        for _ in range(WARM + self.rounds):
            self._wait()
            start = time.perf_counter()
            step()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[WARM:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def our_step(
    config: DecoderConfig, bench: Bench, *, compiled: bool = False
) -> Callable[[], object]:
    """The trainer's; bfloat16 parameters need no autocast."""
    precision: PrecisionName = "fp32" if bench.dtype == torch.bfloat16 else "bf16"
    stepper = make_stepper(
        config,
        bench.device,
        precision=precision,
        sequences=bench.rows,
        lr=LR,
        dtype=bench.dtype,
        compiled=compiled,
    )
    batch = random_batch(config.vocab_size, bench.batch_rows, bench.length)
    return lambda: stepper.step(1, batch)


def their_step(config: DecoderConfig, bench: Bench) -> Callable[[], object]:
    """transformers', with parameters of the same type."""
    model = olmoe(config, bench.device).to(bench.dtype)
    batch = random_batch(config.vocab_size, bench.batch_rows, bench.length)
    pieces = batch.tokens_BS.to(bench.device).split(bench.rows)
    return training_step(model, pieces, autocast=bench.dtype == torch.float32)


def contenders(changes: dict[str, Any]) -> list[Contender]:
    """All of them, over the model with these fields set otherwise."""
    config = decoder_preset(MODEL, **changes)
    plain = {field: getattr(DecoderConfig, field) for field in MOE_ALONE}
    hidden = config.experts_per_token * config.expert_hidden
    dense = decoder_preset(MODEL, **changes | plain | {"dense_hidden": hidden})
    balanced = decoder_preset(MODEL, **changes, router="round_robin")
    return [
        Contender(OURS, config, our_step),
        Contender(COMPILED, config, partial(our_step, compiled=True)),
        Contender(BALANCED, balanced, our_step),
        Contender(DENSE, dense, our_step),
        Contender(THEIRS, config, their_step),
    ]


def aims(found: dict[str, dict[str, Any]], *, whole: bool) -> list[dict[str, Any]]:
    """What is wanted, of the contenders that are there.

    Args:
        found: Figures by contender.
        whole: Whether the model has all its layers; the first aim is for it alone.
    """
    speed = {who: row["tokens_per_second"] for who, row in found.items() if "error" not in row}
    if OURS not in speed:
        return []
    # The others are not compiled; what is asked of the speed alone, the faster way may meet.
    ours = speed[OURS]
    best = max(ours, speed.get(COMPILED, 0.0))
    rows = [("tokens/s", best, "at least", 40_000.0)] if whole else []
    for what, other, wanted in (
        (f"speed over {THEIRS}", THEIRS, 1.3),
        (f"speed over {BALANCED}", BALANCED, 0.9),
    ):
        if other in speed:
            rows.append((what, ours / speed[other], "at least", wanted))
    if DENSE in speed:
        rows.append((f"time over {DENSE}", speed[DENSE] / ours, "at most", 1.25))
    return [
        {
            "what": what,
            "found": round(value, 3),
            "wanted": f"{side} {limit:g}",
            "met": value >= limit if side == "at least" else value <= limit,
        }
        for what, value, side, limit in rows
    ]


def measure_all(
    bench: Bench, chosen: Sequence[Contender], about: dict[str, Any], whole: bool, folder: Path
) -> dict[str, Any]:
    """Each contender, saved when it is done."""
    name = NAME if bench.dtype == torch.bfloat16 else f"{NAME}_float32"
    old = load_if_there(name, folder)
    if any(old.get(key) != value for key, value in about.items()):
        old = {}
    found: dict[str, Any] = dict(old.get("contenders", {}))
    rest = list(found)
    results: dict[str, Any] = {}
    for contender in chosen:
        found[contender.name] = alone(bench.measure, contender)
        rest = [who for who in rest if who != contender.name]
        results = about | {"mfu_is": MFU, "contenders": found, "aims": aims(found, whole=whole)}
        save(name, results, folder, kept=stamps_of(old, rest))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="of the model (default: all)")
    parser.add_argument(
        "--rows", type=int, default=ROWS, help=f"sequences at a time (default {ROWS})"
    )
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step (default 1)")
    parser.add_argument("--float32", action="store_true", help="parameters and all that is theirs")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"steps (default {ROUNDS})")
    parser.add_argument("--only", nargs="+", choices=[OURS, COMPILED, BALANCED, DENSE, THEIRS])
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, help="folder of the JSON")
    arguments = parser.parse_args(argv)
    tiny = arguments.device == "cpu"
    if tiny and arguments.results is None:
        parser.error("sizes on the CPU are for tests: set --results to a folder for their JSON")
    changes: dict[str, Any] = TINY if tiny else {}
    if arguments.layers is not None:
        changes = changes | {"num_layers": arguments.layers}
    chosen = contenders(changes)
    layers, length = chosen[0].config.num_layers, 16 if tiny else SEQUENCE
    device = torch.device(arguments.device)
    bench = Bench(
        device,
        arguments.rows,
        length,
        arguments.rounds,
        arguments.profile,
        arguments.micro_batches,
        torch.float32 if arguments.float32 else torch.bfloat16,
    )
    about = {
        "model": MODEL,
        "layers": layers,
        "rows": bench.rows,
        "micro_batches": bench.micro_batches,
        "sequence": length,
        "rounds": bench.rounds,
        "precision": PRECISION[bench.dtype],
    }
    whole = layers == decoder_preset(MODEL).num_layers
    if arguments.only:
        chosen = [contender for contender in chosen if contender.name in arguments.only]
    results = measure_all(bench, chosen, about, whole, arguments.results or RESULTS)
    for aim in results["aims"]:
        print(f"{'met' if aim['met'] else 'MISSED'}: {aim['what']} {aim['found']}, {aim['wanted']}")
    failed = any("error" in row for row in results["contenders"].values())
    # Aims are those of a GPU.
    return int(failed or (not tiny and not all(aim["met"] for aim in results["aims"])))


if __name__ == "__main__":
    sys.exit(main())
