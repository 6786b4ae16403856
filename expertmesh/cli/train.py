"""``expertmesh train``: a run file and overrides in, a trained run's folder out."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from expertmesh.train.console import output_may_end

if TYPE_CHECKING:
    from expertmesh.train.config import RunFile
    from expertmesh.train.loop import Outcome, Trainer

HELP = "train a model from a run file; continues a run that was stopped"

_EPILOG = """\
overrides: --section.key=value sets any field of the run file, for example
  --train.steps=200 --optim.lr=3e-4 --model.preset=nano-dense --run.dir=runs/second
The tables and their fields are listed in docs/training.md.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: What follows ``expertmesh train``.

    Returns:
        The exit status.

    Raises:
        UserError: For a run file, data or checkpoint that cannot be used.
    """
    args, run = parse(argv)
    if args.fake_world is not None:
        from expertmesh.train.fake_world import describe_fake_world

        print(describe_fake_world(run, args.fake_world))
        return 0
    # Here, so that `expertmesh --help` does not wait for torch.
    from expertmesh.parallel.processes import joined, local_device
    from expertmesh.train.loop import Trainer
    from expertmesh.train.precision import pick_device

    with output_may_end(), joined(local_device(pick_device(run.run.device)), run.mesh.timeout):
        return train(Trainer(run))


def parse(argv: Sequence[str]) -> "tuple[argparse.Namespace, RunFile]":
    """Read the command line and the run file, and do nothing yet.

    Args:
        argv: What follows ``expertmesh train``.

    Raises:
        UserError: For a run file that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="expertmesh train",
        description=HELP.capitalize() + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_file", metavar="RUN.toml", help="the run file")
    parser.add_argument(
        "--fake-world",
        type=int,
        metavar="N",
        help="train nothing; print what each of N ranks would hold and send",
    )
    args, overrides = parser.parse_known_args(argv)
    from expertmesh.train.run_file import load_run_file

    return args, load_run_file(args.run_file, overrides)


@output_may_end()
def train(trainer: "Trainer") -> int:
    """Take a run to its end, and say how it goes.

    Args:
        trainer: The run; all ranks call together.

    Returns:
        The exit status.
    """
    from expertmesh.train.display import NoDisplay, make_display
    from expertmesh.train.expert_tokens import EXPERT_TOKENS
    from expertmesh.train.published import is_published

    run = trainer.run
    speaks = trainer.ranks.first
    all_told = (run.folder / EXPERT_TOKENS).exists() and (
        not run.train.save_published or is_published(run, trainer.step)
    )
    if trainer.done and all_told:
        if speaks:
            print(f"{run.folder} is done: all {trainer.step} steps are trained")
            more = 2 * trainer.step
            print(f"more steps: --train.steps={more}; another run: --run.dir=FOLDER")
        return 0
    if speaks:
        _describe(run, trainer)
    with make_display(run.train.steps, trainer.step) if speaks else NoDisplay() as display:
        outcome = trainer.fit(display)
    if outcome.stopped_by is None:
        _finish(run, trainer, outcome)
    elif speaks:
        print(
            f"stopped by {outcome.stopped_by} after step {outcome.step}; everything is saved; "
            f"continue with: expertmesh train {run.folder / 'config.toml'}"
        )
    return 0


def _describe(run: "RunFile", trainer: "Trainer") -> None:
    for note in trainer.notes:
        print(f"warning: {note}")
    model = run.model
    experts = f", {model.num_experts} experts, {model.experts_per_token} per token"
    print(
        f"model    {model.num_params:,} parameters, {model.num_active_params:,} active per token"
        f"{experts if model.num_experts else ''}"
    )
    print(
        f"data     {len(trainer.data.train):,} samples of {run.data.seq_len} tokens; "
        f"{run.train.batch} per step, {run.train.steps:,} steps"
    )
    print(f"device   {trainer.device}, {run.train.precision}")
    if trainer.mesh is not None:
        print("mesh     " + trainer.mesh.grid.describe().replace("\n", "\n         "))
    print(f"folder   {run.folder}  (config.toml, data.json, metrics.jsonl, checkpoints/)")
    if trainer.step:
        print(f"continuing after step {trainer.step}")
        for change in trainer.changes():
            print(f"  changed since: {change}")


def _finish(run: "RunFile", trainer: "Trainer", outcome: "Outcome") -> None:
    """The last evaluation, with the tokens that each expert takes."""
    from expertmesh.train.expert_tokens import EXPERT_TOKENS, ExpertTokens
    from expertmesh.train.files import write_whole
    from expertmesh.train.published import PUBLISHED

    table: dict[str, object] = {"layers": {}}
    evaluation = outcome.evaluation
    if trainer.evaluator is not None:
        with ExpertTokens(trainer.model, run.model.vocab_size) as counts:
            evaluation = trainer.evaluator(trainer.passes)
        counts.add_other_ranks(trainer.ranks)
        table = counts.table(trainer.data.tokenizer)
    if not trainer.ranks.first:
        return
    write_whole(run.folder / EXPERT_TOKENS, json.dumps(table) + "\n")
    print(f"done     {outcome.step:,} steps, {trainer.clock.tokens:,} tokens")
    if evaluation is not None:
        bits = evaluation.bits_per_byte
        per_byte = "" if bits is None else f", {bits:.4f} bits per byte"
        print(
            f"val      loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}{per_byte}"
        )
    print(f"weights  {trainer.checkpoints.complete()[-1].path}")
    if run.train.save_published:
        print(f"         {run.folder / PUBLISHED}")
    print(f"next     expertmesh generate {run.folder} --prompt TEXT")
    print(f"         expertmesh report {run.folder}")
