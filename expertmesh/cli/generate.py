"""``expertmesh generate``: text from a run or a folder, as it is made."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expertmesh.cli import sampling

if TYPE_CHECKING:
    from expertmesh.cli.text_model import TextModel

HELP = "write text with a trained run or a model's folder; needs the extra hf"


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: What follows ``expertmesh generate``.

    Returns:
        The exit status.

    Raises:
        UserError: If there is no usable run or folder, an option is out of range, or transformers
            is not installed.
    """
    args = _parser().parse_args(argv)
    _check(args)

    # Here, so that `expertmesh --help` does not wait for torch. First what may be missing.
    from expertmesh.errors import require

    require("transformers", extra="hf")
    from expertmesh.cli.text_model import of_folder, of_run

    model = of_folder(args) if args.run is None else of_run(args.run)
    written = []
    for index in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {index + 1} of {args.num_samples}")
        written.append(_sample(model, args, args.seed + index))
        print()
    if args.output is not None:
        args.output.write_text("\n\n".join(written) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    from expertmesh.cli.text_model import add_model_options

    parser = argparse.ArgumentParser(
        prog="expertmesh generate", description=HELP.capitalize() + "."
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder that `train` wrote")
    add_model_options(parser, required=False)
    parser.add_argument("--prompt", default="", help="what the text begins with")
    sampling.add_options(parser)
    parser.add_argument("--num-samples", type=int, default=1, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the text there too")
    return parser


def _check(args: argparse.Namespace) -> None:
    from expertmesh.errors import UserError

    if (args.run is None) == (args.model is None):
        raise UserError(
            "give either a RUN that `expertmesh train` wrote, or --model PATH of a model's folder"
        )
    placing = {
        "--dtype": args.dtype != "auto",
        "--device-map": args.device_map is not None,
        "--max-memory": args.max_memory is not None,
        "--offload-folder": args.offload_folder is not None,
    }
    if args.run is not None and (given := [flag for flag, is_set in placing.items() if is_set]):
        raise UserError(f"{', '.join(given)} goes with --model, not with a RUN")
    sampling.check_options(args)
    sampling.check_ranges(args, {"num_samples": ("at least 1", args.num_samples >= 1)})
    sampling.check_text("--prompt", args.prompt)
    # Said now, and not when the text is written.
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise UserError(f"--output must be a file in a folder that is there, got {args.output}")


def _sample(model: "TextModel", args: argparse.Namespace, seed: int) -> str:
    """One text, prompt included, shown while it is made."""
    import torch

    torch.manual_seed(seed)
    ids = model.encode(args.prompt)
    pieces = sampling.Pieces(model.decode, sampling.print_piece)
    model.write(
        ids,
        streamer=pieces,
        max_new_tokens=model.room(len(ids), args.max_new_tokens, sampling.NEW_TOKENS),
        **sampling.drawing(args),
    )
    return pieces.text
