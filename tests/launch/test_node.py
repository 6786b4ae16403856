"""What comes from a host is taken to its end, whatever becomes of it here."""

import io
from pathlib import Path

import pytest

from expertmesh.launch import supervise
from expertmesh.launch.job import RANK_MARK
from expertmesh.launch.keeper import REPORT
from expertmesh.launch.logs import Logs
from expertmesh.launch.supervise import Outcome, run_job
from tests.launch.fakes import FakePlace, job
from tests.launch.test_supervise import GOOD, REPORTING

# More than a pipe holds, after the order and before the end of input ends the job.
TALKS_ON = f"""{REPORTING}
print("first", flush=True)
print("x" * 200_000, flush=True)
sys.stdin.read()
report(1)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(supervise, "_BEYOND_PATIENCE_SECONDS", 0.5)


class Closed(io.StringIO):
    """A reader that is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def run(logs: Logs, source: str) -> Outcome:
    with logs:
        return run_job(job(FakePlace("a", source)), logs)


def run_and_show(source: str) -> tuple[Outcome, str]:
    shown = io.StringIO()
    return run(Logs(None, shown), source), shown.getvalue()


def test_when_nobody_reads_along_the_job_ends() -> None:
    (failure,) = run(Logs(None, Closed()), TALKS_ON).failures
    assert str(failure) == (
        "a ended with status 1 (torchrun): its output could not be taken: [Errno 32] Broken pipe"
    )


def test_when_a_log_cannot_be_written_the_job_ends(tmp_path: Path) -> None:
    (tmp_path / "host_a.log").mkdir()
    shown = io.StringIO()
    (failure,) = run(Logs(tmp_path, shown), TALKS_ON).failures
    assert "could not be taken: [Errno 21] Is a directory" in str(failure)
    assert shown.getvalue().startswith("a first\n")


def test_a_report_that_is_cut_off_is_a_lost_host() -> None:
    cut = f"{REPORTING}print({REPORT!r} + '{{\"status\": 0, \"fail', end=''); sys.exit(255)"
    outcome, _ = run_and_show(cut)
    (failure,) = outcome.failures
    assert str(failure).startswith("a was lost (status 255): its output could not be taken: ")


def test_a_report_is_found_behind_words_without_a_lines_end() -> None:
    outcome, shown = run_and_show(GOOD.replace("print('all is well')", "print('well', end='')"))
    assert outcome.failures == ()
    assert shown == "a well\n"


def test_what_a_rank_says_is_no_report() -> None:
    line = f"{RANK_MARK}3{RANK_MARK}report of the day"
    outcome, shown = run_and_show(GOOD.replace("'all is well'", repr(line)))
    assert outcome.failures == ()
    assert shown == "a[3] report of the day\n"
