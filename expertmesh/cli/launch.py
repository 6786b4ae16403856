"""``expertmesh launch -- train ...``: several processes, here or on the hosts of a file."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmesh.launch.job import Job
    from expertmesh.launch.supervise import Outcome

HELP = "train with several processes, on this machine or on several over ssh"
_PORT = 29500

_EPILOG = """\
examples:
  expertmesh launch --standalone --nproc-per-node 4 -- train run.toml --mesh.ep=4
  expertmesh launch --hostfile hosts --nproc-per-node 8 --log-dir logs -- train run.toml
See docs/launching.md.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: What follows ``expertmesh launch``.

    Returns:
        The exit status: 1 if a rank failed, 128 and the signal's number after a signal.

    Raises:
        UserError: For options that do not fit, a run file that cannot be used, and for hosts that
            cannot take part.
    """
    options = list(argv)
    program: list[str] = []
    if "--" in options:
        at = options.index("--")
        options, program = options[:at], options[at + 1 :]
    args = _parser().parse_args(options)

    from expertmesh.cli import train
    from expertmesh.launch.logs import Logs
    from expertmesh.launch.preflight import check_hosts
    from expertmesh.launch.supervise import run_job

    job = make_job(args, program)
    with Logs(args.log_dir, sys.stdout) as logs:
        if args.hostfile is not None:
            assert job.rendezvous.port is not None
            check_hosts(job.places, port=job.rendezvous.port, folder=job.folder)
        # A mistake in it would end every rank, and be tried again with each restart.
        train.parse(program[1:])
        return _conclude(run_job(job, logs), args.log_dir)


def make_job(args: argparse.Namespace, program: Sequence[str]) -> "Job":
    """The job that the command line describes.

    Args:
        args: The parsed options.
        program: What stands after ``--``.

    Raises:
        UserError: If they do not fit together.
    """
    from expertmesh.errors import UserError
    from expertmesh.launch.hosts import Host, read_hostfile
    from expertmesh.launch.job import Job, Rendezvous, train_program
    from expertmesh.launch.place import HERE, OverSSH, Place, ThisMachine

    if not program or program[0] != "train":
        raise UserError(
            "what to start must stand after `--` and begin with `train`, "
            f"got {shlex.join(program) or 'nothing'}; "
            "as in: expertmesh launch --standalone --nproc-per-node 2 -- train run.toml"
        )
    _check_numbers(args)
    places: tuple[Place, ...] = (ThisMachine(),)
    if args.hostfile is not None:
        hosts = read_hostfile(args.hostfile, args.nproc_per_node)
        ssh = _ssh(args.ssh)
        places = tuple(OverSSH(host.name, ssh) for host in hosts)
    elif args.nproc_per_node is None:
        raise UserError("--nproc-per-node must say how many processes to start")
    else:
        hosts = [Host(name=HERE, num_processes=args.nproc_per_node)]
    _check_gpus(args.gpus, max(host.num_processes for host in hosts))
    return Job(
        program=train_program(program),
        hosts=tuple(hosts),
        places=places,
        folder=os.getcwd(),
        rendezvous=Rendezvous(port=None if args.standalone else args.port or _PORT),
        max_restarts=args.max_restarts,
        gpus=args.gpus,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertmesh launch",
        usage="expertmesh launch [options] -- train RUN.toml [--section.key=value ...]",
        description=HELP[0].upper() + HELP[1:] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--standalone",
        action="store_true",
        help="this machine, meeting on a free port, so that several jobs can run on it",
    )
    where.add_argument(
        "--hostfile", type=Path, metavar="F", help="lines `host [slots=N]`; all meet at the first"
    )
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N", help="processes on each host without slots"
    )
    parser.add_argument("--gpus", metavar="LIST", help="GPUs to use on each host, as in 0,1,3")
    parser.add_argument("--port", type=int, metavar="P", help=f"to meet on (default: {_PORT})")
    parser.add_argument(
        "--log-dir", type=Path, metavar="D", help="keep one log per rank there, on this machine"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="R",
        help="times that all ranks start again, from the last checkpoint, when one failed",
    )
    parser.add_argument("--ssh", metavar="WORDS", help='how the hosts are reached (default: "ssh")')
    return parser


def _check_numbers(args: argparse.Namespace) -> None:
    from expertmesh.errors import UserError

    ranges = {
        "nproc_per_node": ("at least 1", args.nproc_per_node is None or args.nproc_per_node >= 1),
        "max_restarts": ("at least 0", args.max_restarts >= 0),
        "port": ("between 1 and 65535", args.port is None or 1 <= args.port <= 65535),
    }
    for name, (expected, holds) in ranges.items():
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {expected}, got {getattr(args, name)}")
    if args.standalone and args.port is not None:
        raise UserError(
            f"--standalone takes a free port, got --port {args.port} too; leave one of them out"
        )
    if args.hostfile is None and args.ssh is not None:
        raise UserError(
            f"--ssh is for the hosts of a --hostfile, got {args.ssh!r} without one; leave it out"
        )


def _ssh(words: str | None) -> list[str]:
    from expertmesh.errors import UserError

    try:
        split = ["ssh"] if words is None else shlex.split(words)
    except ValueError as error:
        raise UserError(f"--ssh must be words for a shell, got {words}: {error}") from error
    if not split:
        raise UserError('--ssh must say how ssh is called, as in "ssh -p 2222", got nothing')
    return split


def _check_gpus(gpus: str | None, num_processes: int) -> None:
    from expertmesh.errors import UserError

    if gpus is None:
        return
    names = [name.strip() for name in gpus.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise UserError(f"--gpus must be a list such as 0,1,3, got {gpus!r}")
    if len(names) < num_processes:
        raise UserError(
            f"--gpus must name a GPU for each of the {num_processes} processes of a host, "
            f"got {len(names)}: {gpus}; set --nproc-per-node={len(names)}"
        )


def _conclude(outcome: "Outcome", log_dir: Path | None) -> int:
    """Say how it ended; the exit status."""
    from expertmesh.launch.logs import rank_file

    if outcome.failures:
        first, *others = outcome.failures
        print(f"error: {first}; everything was stopped", file=sys.stderr)
        if log_dir is not None and first.rank is not None:
            print(f"  its log: {log_dir / rank_file(first.rank)}", file=sys.stderr)
        for other in others:
            print(f"  also: {other}", file=sys.stderr)
        return 1
    if outcome.stopped_by is not None:
        print(f"stopped by {outcome.stopped_by.name}", file=sys.stderr)
        return 128 + outcome.stopped_by
    return 0
