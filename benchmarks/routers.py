"""Each router trains the same small model on the same tokens, three seeds.

    python benchmarks/routers.py examples/nano.toml

The demo's model with shorter runs: everything but the router is the run file's. The seed sets the
initial values and the order of samples. ``generated`` is the loss where each token is routed with
its past alone, as in generation, minus the loss of the same tokens routed all at once: what a
router that lets later tokens decide is worth less than its validation loss says.

Runs that the results file holds already, of the same length, are not repeated; ``--fresh`` begins
anew. Times are processor time of one thread, so a busy machine does not spoil them.
"""

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import load_if_there, save, stamps_of  # beside this file
from torch import Tensor

import expertmesh as em
from expertmesh.data import DataBundle, Loader, build_data
from expertmesh.data.loader import collate
from expertmesh.errors import CausalityWarning
from expertmesh.kernels.cross_entropy import token_loss
from expertmesh.models import replace_routers
from expertmesh.routing import Router, balanced_table, random_table
from expertmesh.train.build import build_model, passes_over
from expertmesh.train.config import RunFile
from expertmesh.train.loop import make_evaluator
from expertmesh.train.optimizer import build_optimizer, set_lr
from expertmesh.train.run_file import load_run_file
from expertmesh.train.step import Stepper

NAME = "routers"
OVERRIDES = ("--run.device=cpu", "--train.batch=8", "--data.seq_len=64", "--eval.batches=24")
PREFIX_SEQUENCES = 4
TAIL = 0.25
"""The part of the steps, at the end, over which loads and drops of training are counted."""

STATISTICS = ("imbalance", "cv", "dead", "dropped", "entropy")


class Setting(NamedTuple):
    """What a router is made for."""

    dim: int
    num_experts: int
    layer: int
    seed: int
    count_V: Tensor


Build = Callable[[Setting], Router]


def preset(name: str, k: int, **options: Any) -> Build:
    """A preset of token choice."""
    return lambda s: em.router_preset(
        name,
        dim=s.dim,
        num_experts=s.num_experts,
        k=k,
        seed=s.seed,
        layer=s.layer,
        **options,
    )


def seeded(kind: Callable[..., Router], *arguments: Any, **options: Any) -> Build:
    """A router with parameters."""
    return lambda s: kind(s.dim, s.num_experts, *arguments, seed=s.seed, layer=s.layer, **options)


def plain(kind: Callable[..., Router], *arguments: Any) -> Build:
    """A router without."""
    return lambda s: kind(s.dim, s.num_experts, *arguments, layer=s.layer)


def shazeer(s: Setting) -> Router:
    """Noisy top-2 of 2017, all zeros at first."""
    return em.TopKRouter(
        s.dim,
        s.num_experts,
        2,
        renormalize="chosen",
        noise=em.LearnedNoise(s.dim, s.num_experts, min_std=1e-2),
        losses=(em.ImportanceLoss(coef=1e-2), em.LoadLoss(coef=1e-2)),
        init_std=0.0,
        layer=s.layer,
    )


def two_levels(s: Setting) -> Router:
    """Both of two groups, then two of the four experts of each, all zeros at first."""
    return em.HierarchicalRouter(
        s.dim,
        s.num_experts,
        num_groups=2,
        primary_noise=em.LearnedNoise(s.dim, 2, min_std=1e-2),
        secondary_noise=em.LearnedNoise(s.dim, s.num_experts, min_std=1e-2),
        losses=(em.ImportanceLoss(coef=1e-2), em.HierarchicalLoadLoss(coef=1e-2)),
        init_std=0.0,
        layer=s.layer,
    )


def hashed(table: Callable[[Setting], Tensor]) -> Build:
    """A hash router by token."""
    return lambda s: em.HashRouter(s.dim, s.num_experts, table(s), layer=s.layer)


def random_table_of(s: Setting) -> Tensor:
    """Another table for each layer and seed."""
    return random_table(len(s.count_V), s.num_experts, seed=s.seed)


def bias_balanced(s: Setting) -> Router:
    """DeepSeek-V3's without groups, and with a rate for hundreds of steps, not many thousands."""
    bias = em.SelectionBias(s.num_experts, rate=1e-2)
    return preset("deepseek_v3", 2, bias=bias, group_limit=None, scale=1.0)(s)


PRIORITY = {"capacity": em.Capacity(factor=1.0, eval_factor=1.0, order="priority")}

ROUTERS: dict[str, Build] = {
    "mixtral, no balance loss": preset("mixtral", 2, balance_coef=0.0),
    "mixtral, balance 0.01": preset("mixtral", 2, balance_coef=0.01),
    "raw weights (olmoe)": preset("olmoe", 2),
    "selection bias (deepseek_v3)": bias_balanced,
    "noisy top-2 (Shazeer)": shazeer,
    "gshard": preset("gshard", 2),
    "st_moe": preset("st_moe", 2),
    "batch priority, capacity 1.0": preset("mixtral", 2, balance_coef=0.01, **PRIORITY),
    "switch": preset("switch", 1),
    "two levels (Shazeer), k=4": two_levels,
    "batchwise (Shazeer)": seeded(em.BatchwiseRouter, 2),
    "cosine": seeded(em.CosineRouter, 2, proj_dim=32, losses=(em.LoadBalancingLoss(coef=0.01),)),
    "expert choice": seeded(em.ExpertChoiceRouter),
    "expert choice, at most 2": seeded(em.ExpertChoiceRouter, cap=em.TokenCap(most=2)),
    "sinkhorn": seeded(em.SinkhornRouter, 2),
    "base": seeded(em.BaseRouter),
    "hash, random table": hashed(random_table_of),
    "hash, balanced table": hashed(lambda s: balanced_table(s.count_V, s.num_experts)),
    "thor without consistency": plain(em.ThorRouter),
    "uniform": plain(em.UniformRouter, 2),
}


def main() -> None:
    """Train every pair and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--fresh", action="store_true", help="repeat the runs that are there")
    arguments = parser.parse_args()
    words = [*OVERRIDES, f"--train.steps={arguments.steps}"]
    run = load_run_file(arguments.run_file, words)
    build_data(run.data)  # fetched and tokenised once, before processes look for it
    old = {} if arguments.fresh else load_if_there(NAME)
    rows = earlier_rows(run, old)
    kept = stamps_of(old, map(part, rows))
    done_before = {(row["router"], row["seed"]) for row in rows}
    with ProcessPoolExecutor(
        arguments.processes, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        waiting = [
            pool.submit(train, arguments.run_file, [*words, f"--run.seed={seed}"], name)
            for seed in arguments.seeds
            for name in arguments.routers
            if (name, seed) not in done_before
        ]
        for done in as_completed(waiting):
            rows.append(done.result())
            print(row_text(rows[-1]), flush=True)
            save(NAME, results(run, rows), kept=kept)  # after each: a run may be cut
    print(f"{len(waiting)} runs made, {len(done_before)} were there already")


def earlier_rows(run: RunFile, old: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of the results file that are as long as these."""
    length = {"steps": run.train.steps, "tokens_per_step": step_tokens(run)}
    same = all(old.get(key) == number for key, number in length.items())
    return [row for row in old["runs"] if row["router"] in ROUTERS] if same else []


def part(row: dict[str, Any]) -> str:
    """A run's name among those of the file."""
    return f"{row['router']}: seed {row['seed']}"


def step_tokens(run: RunFile) -> int:
    """Tokens of a step."""
    return run.train.batch * run.data.seq_len


def train(run_file: Path, words: list[str], name: str) -> dict[str, Any]:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CausalityWarning)
    run = load_run_file(run_file, words)
    data = build_data(run.data)
    model, device = build_model(run, torch.device("cpu")), torch.device("cpu")
    count_V = frequencies(data, run.model.vocab_size)
    replace_routers(
        model,
        lambda layer: ROUTERS[name](
            Setting(
                run.model.dim, run.model.num_experts, layer, run.run.seed * 100 + layer, count_V
            )
        ),
    )
    passes = passes_over(model, run, device)
    optimizer = build_optimizer(model, run.optim)
    stepper = Stepper(passes, optimizer, seed=run.run.seed, clip=run.optim.clip)
    loader = Loader(data.train, batch_size=run.train.batch, seed=run.run.seed)
    seconds, tail = [], run.train.steps - max(1, round(TAIL * run.train.steps))
    routers = [moe.router for moe in em.moe_layers(model).values()]
    for step in range(1, run.train.steps + 1):
        if step == tail + 1:
            summaries(model)  # forgets what came before
        set_lr(optimizer, run.optim.lr * run.schedule(step))
        start = time.process_time()
        loss = stepper.step(step, loader.batch(step - 1)).loss
        seconds.append(time.process_time() - start)
    training = summaries(model)
    evaluator = make_evaluator(run, data)
    assert evaluator is not None
    return {
        "router": name,
        "seed": run.run.seed,
        "leaks": routers[0].leaks,
        "router_params": sum(p.numel() for router in routers for p in router.parameters()),
        "train_loss": loss,
        "val_loss": evaluator(passes).loss,
        "training": training,
        "evaluation": summaries(model),
        "step_ms": 1e3 * statistics.median(seconds),
        **generated(model, data),
    }


def frequencies(data: DataBundle, vocab_size: int) -> Tensor:
    """How often each token id comes in the first training samples."""
    count_V = torch.zeros(vocab_size, dtype=torch.int64)
    for place in range(min(len(data.train), 2000)):
        count_V += torch.from_numpy(data.train[place].tokens_S).bincount(minlength=vocab_size)
    return count_V


def summaries(model: torch.nn.Module) -> dict[str, float]:
    """Means over the MoE layers since the last call."""
    found = [em.summarize(moe.metrics()) for moe in em.moe_layers(model).values()]
    return {name: statistics.mean(getattr(s, name) for s in found) for name in STATISTICS}


@torch.no_grad()
def generated(model: torch.nn.Module, data: DataBundle) -> dict[str, float]:
    """Losses of some held-out tokens, routed all at once and each with its past alone."""
    assert data.val is not None
    stride = len(data.val) // PREFIX_SEQUENCES
    batch = collate(data.val, [stride * place for place in range(PREFIX_SEQUENCES)])
    model.eval()
    at_once = model(batch.tokens_BS)
    ends = range(1, batch.tokens_BS.shape[1] + 1)
    alone = torch.cat([model(batch.tokens_BS[:, :end])[:, -1:] for end in ends], dim=1)
    losses = [float(token_loss(y, batch.targets_BS)) for y in (at_once, alone)]
    return {"at_once": losses[0] / batch.num_targets, "generated": losses[1] / batch.num_targets}


def results(run: RunFile, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with their means over seeds."""
    rows = sorted(rows, key=lambda row: (list(ROUTERS).index(row["router"]), row["seed"]))
    means = {}
    for name in dict.fromkeys(row["router"] for row in rows):
        own = [row for row in rows if row["router"] == name]
        losses = [row["val_loss"] for row in own]
        means[name] = {
            "leaks": own[0]["leaks"],
            "val_loss": statistics.mean(losses),
            "val_loss_spread": max(losses) - min(losses),
            "generated_minus_at_once": statistics.mean(r["generated"] - r["at_once"] for r in own),
            "imbalance": statistics.mean(row["training"]["imbalance"] for row in own),
            "dead": statistics.mean(row["training"]["dead"] for row in own),
            "dropped": statistics.mean(row["training"]["dropped"] for row in own),
            "dropped_in_evaluation": statistics.mean(r["evaluation"]["dropped"] for r in own),
            "step_ms": statistics.median(row["step_ms"] for row in own),
        }
    return {
        "what": "nano decoder, one router each; losses in nats per token, loads of the last steps",
        "tokens_per_step": step_tokens(run),
        "steps": run.train.steps,
        "num_experts": run.model.num_experts,
        "means": means,
        "runs": rows,
    }


def row_text(row: dict[str, Any]) -> str:
    """A line of the log."""
    return (
        f"seed {row['seed']} {row['router']:32} val {row['val_loss']:.4f}, generated "
        f"{row['generated'] - row['at_once']:+.4f}, imbalance {row['training']['imbalance']:.2f}, "
        f"dropped {row['training']['dropped']:.3f}, {row['step_ms']:.0f} ms"
    )


if __name__ == "__main__":
    main()
