"""``expertmesh report RUN``: the pictures and the page of a run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

HELP = "draw a run's loss, load and drops, and write one HTML page"


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: What follows ``expertmesh report``.

    Returns:
        The exit status.

    Raises:
        UserError: If there is no run to draw, or matplotlib is not installed.
    """
    parser = argparse.ArgumentParser(prog="expertmesh report", description=HELP)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder that `expertmesh train` wrote"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where report.html and figures/ go (default: RUN)",
    )
    args = parser.parse_args(argv)

    # Here, so that `expertmesh --help` does not wait for numpy.
    from expertmesh.report import write_report

    page = write_report(args.run, args.output)
    print(f"page      {page}")
    print(f"pictures  {page.parent / 'figures' / '*.png'}")
    return 0
