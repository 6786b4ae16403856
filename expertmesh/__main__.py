"""``python -m expertmesh``: the command line, also for launchers that start a module."""

import sys

from expertmesh.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
