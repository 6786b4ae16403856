"""``expertmesh convert FAMILY SRC DST``: published checkpoints into other kinds of files."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expertmesh.errors import UserError

if TYPE_CHECKING:
    from expertmesh.convert.command import Given
    from expertmesh.convert.family import Family
    from expertmesh.convert.source import Stored
    from expertmesh.train.config import RunFile

HELP = "convert checkpoints: t5x, published, one tensor per expert"
# Named here too, so that `--help` does not wait for torch.
FAMILIES = ("openmoe", "mixtral", "olmoe", "qwen3-moe")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: What follows ``expertmesh convert``.

    Returns:
        The exit status.

    Raises:
        UserError: If a folder does not fit the model, cannot be written, or differs.
    """
    args = _parser().parse_args(argv)
    from expertmesh.convert.families import FAMILIES as families

    family = families[args.family]
    if args.verify:
        return _verify(family, args)
    if args.destination is None:
        raise UserError("give the folder to write, or --verify to compare SRC with its manifest")
    return _convert(family, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertmesh convert",
        description="Convert a checkpoint to safetensors under other names, a part at a time, and "
        "read the result back. What SRC is, is found out: a t5x folder, safetensors or pickled "
        "tensors with stacked experts or one tensor per expert, or the folder of a training run.",
    )
    parser.add_argument("family", choices=FAMILIES, help="whose names")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder to read")
    parser.add_argument("destination", type=Path, nargs="?", metavar="DST", help="folder to write")
    parser.add_argument(
        "--to",
        metavar="KIND",
        help="published (default); for openmoe per-expert or t5x, for the others stacked",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the result (default: as in SRC)")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config.json or a preset such as openmoe-8b (default: SRC's, or what its shapes fit)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="copy these too (default: SRC's, or a run's)",
    )
    parser.add_argument("--shard-gb", type=float, metavar="N", help="largest file (default: 5)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="write nothing: compare DST with what SRC would give, or SRC with its own manifest",
    )
    return parser


def _convert(family: "Family", args: argparse.Namespace) -> int:
    import torch

    from expertmesh.convert import command
    from expertmesh.errors import nearest

    to = "published" if args.to is None else args.to
    if to not in family.kinds:
        raise UserError(
            f"--to must be one of {', '.join(family.kinds)}, got {to!r}" + nearest(to, family.kinds)
        )
    shard_bytes = 1e9 * (5.0 if args.shard_gb is None else args.shard_gb)
    if not 0 < shard_bytes < math.inf:
        raise UserError(f"--shard-gb must be above 0 and finite, got {args.shard_gb:g}")
    given = _given(family, args)
    print(f"from  {given.source.path}: {given.kind}, {_size(given.source.tensors)}")
    tensors = command.convert(
        family,
        given,
        args.destination,
        to,
        dtype=None if args.dtype is None else getattr(torch, DTYPES[args.dtype]),
        shard_bytes=int(shard_bytes),
        tokenizer=_tokenizer(args),
        progress=_Progress(given.config.num_params),
    )
    print(f"to    {args.destination}: {to}, {_size(tensors)}")
    print("read back: names, shapes and SHA-256 of every tensor agree")
    return 0


def _verify(family: "Family", args: argparse.Namespace) -> int:
    from expertmesh.convert import command

    _check_verify(args)
    if args.destination is None:
        tensors = command.verify_alone(args.source)
        print(f"{args.source}: {_size(tensors)}, all as its manifest says")
        return 0
    given = _given(family, args)
    progress = _Progress(given.config.num_params)
    tensors = command.verify(family, given, args.destination, progress)
    print(f"{args.destination}: {_size(tensors)}, all as in {args.source}")
    return 0


def _check_verify(args: argparse.Namespace) -> None:
    """Refuse what says how to write, where nothing is written."""
    names = ["to", "dtype", "tokenizer", "shard_gb"]
    if args.destination is None:
        names.append("config")
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"--verify writes nothing, got {flags} beside it; leave that out")


def _given(family: "Family", args: argparse.Namespace) -> "Given":
    """What SRC is: a folder of weights, or what a training run left."""
    from expertmesh.convert import command

    folder = args.source
    if (run := _run(args)) is not None:
        from expertmesh.train.checkpoint import CheckpointFolder
        from expertmesh.train.loop import CHECKPOINTS

        checkpoint, passed_over = CheckpointFolder(folder / CHECKPOINTS).newest_valid()
        for line in passed_over:
            print(f"passed over: {line}")
        if checkpoint is None:
            raise UserError(f"{folder} has no checkpoint yet; train it first")
        return command.look_at_training(family, checkpoint.path, run.model)
    return command.look_at(family, folder, args.config)


def _run(args: argparse.Namespace) -> "RunFile | None":
    """The run file, where SRC is what a training run left."""
    from expertmesh.train.config import CONFIG
    from expertmesh.train.run_file import load_run_file

    path = args.source / CONFIG
    return load_run_file(path) if args.config is None and path.is_file() else None


def _tokenizer(args: argparse.Namespace) -> Path | None:
    """What to copy beside the result; None takes what lies beside the tensors, if any."""
    given: Path | None = args.tokenizer
    if given is not None or (run := _run(args)) is None:
        return given
    from expertmesh.data.tokenizer import tokenizer_path

    try:
        return tokenizer_path(run.data.tokenizer, cache=run.data.cache)
    except UserError as error:
        print(f"no tokenizer is put beside it: {error}; --tokenizer PATH gives one")
        return None


def _size(tensors: "Mapping[str, Stored]") -> str:
    from expertmesh.convert.destination import num_bytes

    dtypes = sorted({str(stored.dtype).removeprefix("torch.") for stored in tensors.values()})
    return f"{len(tensors)} tensors, {num_bytes(tensors) / 1e9:.3g} GB of {' and '.join(dtypes)}"


class _Progress:
    """Says on a terminal how far it is."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._said = total, 0, -1

    def __call__(self, num_elements: int) -> None:
        self._done += num_elements
        percent = min(100, 100 * self._done // max(1, self._total))
        if percent != self._said and sys.stderr.isatty():
            self._said = percent
            print(f"\r{percent:3d} %", end="\r", file=sys.stderr, flush=True)
