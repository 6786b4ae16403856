"""OpenMoE on one GPU: training base and 8B, inference of 8B and 34B, from random weights.

    python benchmarks/openmoe_gpu.py            under three minutes on one H200
    python benchmarks/openmoe_gpu.py --tiny     the same code on small models, here, for tests

Training: sequences of 2048 random tokens, bfloat16 weights and gradients, Adafactor, the loss over
the 256,384 words in chunks, nothing dropped; all blocks of 8B on the one device. Figures are
medians of the timed steps. The published 2.61 samples/s are of an A800 beside seven others. MFU
counts three forward passes of ``DecoderConfig.flops_per_token`` for a step, recomputed blocks not;
the formula is in the result.

Inference: weights are made on the device, one row of 32 tokens is read and 32 are generated with a
cache; the peak includes all of it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from alone import alone  # beside this file
from peak import MFU, utilisation
from record import RESULTS, save
from torch import Tensor

from expertmesh.kernels.backends import Problem, choose
from expertmesh.kernels.cross_entropy import linear_cross_entropy
from expertmesh.kernels.moe_mlp import MLP_BACKENDS
from expertmesh.models import DecoderConfig, DecoderLM, decoder_preset
from expertmesh.train.optimizers.adafactor import build_adafactor

NAME = "openmoe_gpu"
PUBLISHED = {
    "samples_per_second": 2.61,
    "memory_gb": {"8b bf16": 23, "8b fp32": 49, "34b bf16": 89},
}
"""An A800's share of the original trainer's throughput on eight, and its users' memory."""
WARM_UP = 3
MOST_STEPS = 30
NEW_TOKENS = 32
GB = 1e9
TINY = {
    "vocab_size": 131,
    "dim": 32,
    "num_layers": 12,
    "head_dim": 8,
    "dense_hidden": 48,
    "expert_hidden": 48,
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """One measured setting.

    Attributes:
        size: Of the model.
        rows: Sequences of a step.
        recompute: Whether blocks are recomputed in backward.
    """

    size: str
    rows: int
    recompute: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}, {self.rows} rows{', recomputed' if self.recompute else ''}"


@dataclass(frozen=True, kw_only=True)
class Inference:
    """One measured setting."""

    size: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.size} {'bf16' if self.dtype == torch.bfloat16 else 'fp32'}"


TRAININGS = (
    Training(size="base", rows=32),
    Training(size="8b", rows=4),
    Training(size="8b", rows=16, recompute=True),
)
INFERENCES = (
    Inference(size="8b", dtype=torch.bfloat16),
    Inference(size="8b", dtype=torch.float32),
    Inference(size="34b", dtype=torch.bfloat16),
)


class Cache:
    """Keys and values of earlier positions."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[-2] if self.layers else 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            old_key, old_value = self.layers[layer]
            key, value = torch.cat([old_key, key], -2), torch.cat([old_value, value], -2)
        self.layers[layer] = (key, value)
        return key, value


@dataclass(frozen=True)
class Bench:
    """Where and how long.

    Attributes:
        device: CUDA, or the CPU for tests.
        seconds: Of timed steps per setting.
        seq_len: Tokens of a sequence.
        tiny: Whether every model is shrunk.
    """

    device: torch.device
    seconds: float
    seq_len: int
    tiny: bool

    def config(self, size: str) -> DecoderConfig:
        """A published size, or one of its structure for tests."""
        return decoder_preset(f"openmoe-{size}", **(TINY if self.tiny else {}))

    @torch.no_grad()
    def model(self, config: DecoderConfig, dtype: torch.dtype) -> DecoderLM:
        """Normal weights of the family's size, drawn on the device: the values do not matter."""
        with torch.device("meta"):
            model = DecoderLM(config).to(dtype)
        model.to_empty(device=self.device)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(0, config.init_std)
        return model

    def train(self, setting: Training) -> dict[str, Any]:
        """Speed, memory and first and last loss of one fixed batch."""
        config = self.config(setting.size)
        model = self.model(config, torch.bfloat16)
        if setting.recompute:
            model.checkpoint_blocks()
        optimizer = build_adafactor([{"params": list(model.parameters())}], lr=1e-2, decay=0.8)
        rows_len = (setting.rows, self.seq_len + 1)
        tokens = torch.randint(config.vocab_size, rows_len, device=self.device)
        losses: list[float] = []

        def step() -> None:
            targets = tokens[:, 1:]
            output = _loss_of(targets)
            loss = model(tokens[:, :-1], output=output)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))

        seconds = self._time(step)
        num_tokens = setting.rows * self.seq_len
        tokens_per_second = num_tokens / statistics.median(seconds)
        flops = 3 * config.flops_per_token(self.seq_len)
        return {
            "experts_backend": self._backend(config, num_tokens),
            "steps": len(seconds),
            "samples_per_second": tokens_per_second / self.seq_len,
            "tokens_per_second": tokens_per_second,
            "flops_per_token": flops,
            "mfu": utilisation(tokens_per_second * flops, self.device),
            "memory_gb": self._memory(),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }

    @torch.no_grad()
    def infer(self, setting: Inference) -> dict[str, Any]:
        """Memory of weights and generation, and seconds of a generated token."""
        config = self.config(setting.size)
        model = self.model(config, setting.dtype).eval()
        weights = self._memory()
        prompt = torch.randint(config.vocab_size, (1, 32), device=self.device)
        cache = Cache()
        new, timed = prompt, NEW_TOKENS - 1 - WARM_UP
        for written in range(NEW_TOKENS):
            if written == NEW_TOKENS - timed:  # kernels are compiled by then
                self._wait()
                start = time.perf_counter()
            new = model(new, cache=cache)[:, -1:].argmax(-1)
        self._wait()
        seconds = (time.perf_counter() - start) / timed
        return {"weights_gb": weights, "memory_gb": self._memory(), "ms_per_token": 1e3 * seconds}

    def _time(self, step: Callable[[], None]) -> list[float]:
        for _ in range(WARM_UP):
            step()
        self._wait()
        seconds: list[float] = []
        while sum(seconds) < self.seconds and len(seconds) < MOST_STEPS:
            start = time.perf_counter()
            step()
            self._wait()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _backend(self, config: DecoderConfig, num_tokens: int) -> str:
        problem = Problem(
            device=self.device,
            dtype=torch.bfloat16,
            num_experts=config.num_experts,
            num_assignments=num_tokens * config.experts_per_token,
            dim=config.dim,
            hidden=config.expert_hidden,
            needs_grad=True,
            num_parts=3,
        )
        return choose(MLP_BACKENDS, problem).name

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _memory(self) -> float | None:
        """Most gigabytes allocated since the last setting."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / GB


def _loss_of(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, targets) / targets.numel()


def measure_all(
    bench: Bench, keep: Callable[[dict[str, Any]], object], most_rows: int | None = None
) -> dict[str, Any]:
    """Every setting, by name.

    Args:
        bench: Where and how long.
        keep: Is given what there is after each setting: a run may be cut.
        most_rows: Of a step, for tests.
    """
    results: dict[str, Any] = {"seq_len": bench.seq_len, "published": PUBLISHED}
    results |= {"mfu_is": MFU, "training": {}, "inference": {}}
    for training in TRAININGS:
        setting = replace(training, rows=min(training.rows, most_rows or training.rows))
        found = alone(bench.train, setting)
        results["training"][setting.name] = {**asdict(setting), **found}
        keep(results)
    for inference in INFERENCES:
        found = alone(bench.infer, inference)
        results["inference"][inference.name] = {"size": inference.size, **found}
        keep(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, not saved")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timed steps per setting")
    arguments = parser.parse_args()
    print(f"MFU = {MFU}")
    if arguments.tiny:
        measure_all(Bench(torch.device("cpu"), 0.2, 32, tiny=True), lambda _: None, most_rows=4)
        return
    bench = Bench(torch.device("cuda"), arguments.seconds, 2048, tiny=False)
    measure_all(bench, partial(save, NAME))
    print(f"written to {RESULTS / NAME}.json")


if __name__ == "__main__":
    main()
