"""torchrun, with the ranks that failed written down for the launching machine.

``python -m expertmesh.launch.agent REPORT ARGUMENTS`` is ``torchrun ARGUMENTS``; if ranks fail,
``REPORT`` becomes a JSON list of them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str]) -> int:
    """Run torchrun.

    Args:
        argv: The report's path and torchrun's arguments.

    Returns:
        The exit status: 0, or 1 if a rank failed or a signal ended the job.
    """
    report, *arguments = argv
    try:
        torch.distributed.run.main(arguments)
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "status": failure.exitcode, "seconds": failure.timestamp}
            for rank, failure in error.failures.items()
        ]
        Path(report).write_text(json.dumps(failures))
        return 1
    except SignalException as stop:
        print(f"torchrun stopped its ranks: {stop.sigval.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
