"""Run the tests that need a GPU and keep what came of them.

python benchmarks/gpu_tests.py

What follows is passed on to pytest.
"""

import sys

import pytest
from record import save


class Tally:
    """Counts outcomes and remembers what failed."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of each test."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)


def main() -> int:
    """Run, write, and pass pytest's status on."""
    tally = Tally()
    status = pytest.main(["-m", "gpu", "-q", "tests/gpu", *sys.argv[1:]], plugins=[tally])
    path = save("gpu_tests", {"tests": tally.counts, "failures": tally.failures})
    print(f"written to {path}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
