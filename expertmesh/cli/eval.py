"""``expertmesh eval RUN``: held-out loss and expert load of a trained model."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmesh.metrics import RoutingSummary

HELP = "held-out loss, perplexity, bits per byte and expert load of a trained run"

_EPILOG = """\
overrides: --section.key=value, as for training, for example
  --eval.batches=none (the whole held-out split)  --data.source=FILE --data.val_fraction=0.5
"""
# One of these says that other data than the run's is meant.
_OTHER_DATA = ("--data.source", "--data.mix", "--data.fields", "--data.kind", "--data.tokenizer")


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: What follows ``expertmesh eval``.

    Returns:
        The exit status.

    Raises:
        UserError: If the folder holds no usable run, the data no held-out split, or text that the
            run was trained on would be in it.
    """
    parser = argparse.ArgumentParser(
        prog="expertmesh eval",
        description=HELP[0].upper() + HELP[1:] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder that `expertmesh train` wrote")
    args, overrides = parser.parse_known_args(argv)

    # Here, so that `expertmesh --help` does not wait for torch.
    from expertmesh.data import build_data
    from expertmesh.errors import UserError
    from expertmesh.train.build import passes_over
    from expertmesh.train.finished import load_run
    from expertmesh.train.loop import check_data_fits, make_evaluator
    from expertmesh.train.progress import routing_summaries
    from expertmesh.train.provenance import check_held_out

    trained = load_run(args.run, overrides)
    data = build_data(trained.run.data)
    check_data_fits(trained.run, data)
    chosen = any(word.startswith(_OTHER_DATA) for word in overrides)
    check_held_out(Path(args.run), data.provenance, chosen=chosen)
    evaluator = make_evaluator(trained.run, data)
    if evaluator is None:
        raise UserError(
            "data.val_fraction is 0: nothing is held out; give text that the run was not trained "
            "on: --data.source=FILE --data.val_fraction=0.5"
        )
    evaluation = evaluator(passes_over(trained.model, trained.run, trained.device))
    print(f"run            {args.run}, step {trained.step}")
    print(f"tokens         {evaluation.num_targets:,}")
    print(f"loss           {evaluation.loss:.4f} nats per token")
    print(f"perplexity     {evaluation.perplexity:.3f}")
    if evaluation.bits_per_byte is not None:
        print(f"bits per byte  {evaluation.bits_per_byte:.4f}")
    _print_load(routing_summaries(trained.model))
    return 0


def _print_load(summaries: Mapping[str, "RoutingSummary"]) -> None:
    """Each layer's load per expert, relative to the fair share."""
    if not summaries:
        return
    width = max(len(name) for name in summaries)
    print("\nload per expert, 1.00 = fair share")
    print(f"{'layer':{width}}   max    cv  dead  drops  experts")
    for name, layer in summaries.items():
        experts = " ".join(f"{load:.2f}" for load in layer.relative_load)
        print(
            f"{name:{width}}  {layer.imbalance:4.2f}  {layer.cv:4.2f}  {layer.dead:4d}  "
            f"{layer.dropped:5.1%}  {experts}"
        )
