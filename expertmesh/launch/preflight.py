"""Tries every host before anything starts on one, and names each that cannot take part."""

import json
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.errors import UserError
from expertmesh.launch import probe
from expertmesh.launch.place import Place, ThisMachine

_SECONDS = 60
_CALL_SECONDS = 10
# Of an answer that cannot be read, so many characters are shown.
_MOST_SHOWN = 100
Facts = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why a host cannot take part."""

    host: str
    reason: str


def check_hosts(places: Sequence[Place], *, port: int, folder: str) -> None:
    """Try all hosts: ssh, Python, this project's version, the folder, the way to the first one.

    Args:
        places: The hosts; they meet at the first one.
        port: The port there on which they meet.
        folder: Where the job starts, on all of them.

    Raises:
        UserError: With a line for each host that cannot take part.
    """
    here = _facts(ThisMachine(), folder)
    if isinstance(here, Problem):
        raise UserError(f"this machine cannot start a job: {here.reason}")
    with ThreadPoolExecutor(max_workers=len(places)) as pool:
        found = list(pool.map(lambda place: _try(place, folder, here), places))
        problems = [problem for problem in found if problem is not None]
        able = [place for place, problem in zip(places, found, strict=True) if problem is None]
        if able and able[0] is places[0]:
            problems += _meet(able, port, pool)
    if problems:
        lines = "\n".join(f"  {problem.host}: {problem.reason}" for problem in problems)
        raise UserError(
            f"{len(problems)} of {len(places)} hosts cannot take part; nothing was started\n{lines}"
        )


def _try(place: Place, folder: str, here: Facts) -> Problem | None:
    there = _facts(place, folder)
    if isinstance(there, Problem):
        return there
    reasons = differences(here, there)
    if not there["folder"]:
        reasons.insert(0, f"there is no folder {folder}; the job starts in the same one everywhere")
    return Problem(place.name, "; ".join(reasons)) if reasons else None


def differences(here: Facts, there: Facts) -> list[str]:
    """What does not agree between two machines, in words.

    Args:
        here: What ``probe.facts`` found on this machine.
        there: What it found on the other one.
    """
    if there["python"].split(".")[:2] != here["python"].split(".")[:2]:
        return [f"Python {there['python']}, here {here['python']}"]
    if "missing" in there:
        return [there["missing"]]
    reasons = [
        f"{name} {there[name]}, here {here[name]}"
        for name in ("expertmesh", "torch")
        if there[name] != here[name]
    ]
    if not reasons and there["sources"] != here["sources"]:
        reasons.append(
            f"expertmesh {there['expertmesh']} with other source files than here "
            f"(digest {there['sources']}, here {here['sources']})"
        )
    return reasons


def _facts(place: Place, folder: str) -> Facts | Problem:
    return _ask(place, "facts", folder)


def _meet(places: Sequence[Place], port: int, pool: ThreadPoolExecutor) -> list[Problem]:
    """Let the first host listen, and all of them call it."""
    first = places[0]
    word = uuid.uuid4().hex
    with _listening(first, port, word) as problem:
        if problem is not None:
            return [problem]

        def call(place: Place) -> Problem | None:
            words = ["reach", first.address, str(port), word, str(_CALL_SECONDS)]
            answer = _ask(place, *words)
            if isinstance(answer, Problem) or answer["error"] is None:
                return answer if isinstance(answer, Problem) else None
            return Problem(
                place.name,
                f"cannot reach {first.address}:{port}, where all hosts meet: {answer['error']}; "
                "open the port, or set another one with --port",
            )

        return [problem for problem in pool.map(call, places) if problem is not None]


@contextmanager
def _listening(place: Place, port: int, word: str) -> Iterator[Problem | None]:
    """``probe.listen`` on a host, as long as the context lasts."""
    process = subprocess.Popen(
        _command(place, "listen", str(port), word),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    # Reading has no time limit of its own: ending the process is one.
    deadline = time.monotonic() + _SECONDS
    timer = threading.Timer(_SECONDS, process.kill)
    timer.start()
    try:
        said: list[str] = []
        answer: Facts | Problem | None = None
        for line in process.stdout:
            if (answer := _answer(place, line)) is not None:
                break
            said.append(line)
        if answer is None and time.monotonic() >= deadline:
            yield Problem(place.name, f"did not listen on port {port} within {_SECONDS} s")
        elif answer is None:
            yield _ended(place, process.wait(), said)
        elif isinstance(answer, Problem):
            yield answer
        elif answer["error"] is not None:
            yield Problem(
                place.name,
                f"cannot listen on port {port}, where all hosts meet: {answer['error']}; "
                "set another one with --port",
            )
        else:
            yield None
    finally:
        timer.cancel()
        process.stdin.close()
        try:
            process.wait(timeout=_CALL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _ask(place: Place, *words: str) -> Facts | Problem:
    """A host's answer to a question of ``probe``."""
    try:
        asked = subprocess.run(
            _command(place, *words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return Problem(place.name, f"no answer within {_SECONDS} s")
    for line in asked.stdout.splitlines():
        if (answer := _answer(place, line)) is not None:
            return answer
    said = asked.stderr.strip().splitlines() or asked.stdout.strip().splitlines()
    return _ended(place, asked.returncode, said)


def _ended(place: Place, status: int, said: Sequence[str]) -> Problem:
    """Why a question came to its end without an answer; the last words tell."""
    words = [line.strip() for line in said if line.strip()]
    reason = words[-1] if words else f"ended with status {status}, saying nothing"
    if status == _SSH_FAILED:
        said_by_ssh = reason.removeprefix("ssh: ")
        reason = f"ssh: {said_by_ssh}; `ssh {place.name} true` must work without a password"
    return Problem(place.name, reason)


# ssh's own failures; anything else is the status of the program that it started.
_SSH_FAILED = 255


def _command(place: Place, *words: str) -> list[str]:
    source = Path(probe.__file__).read_text()
    return place.command(["-c", source, *words], "/")


def _answer(place: Place, line: str) -> Facts | Problem | None:
    """What a line answers, or None where it is not an answer."""
    _, mark, words = line.partition(probe.ANSWER)
    if not mark:
        return None
    try:
        return json.loads(words)
    except ValueError:
        came = words.strip()
        shown = came if len(came) <= _MOST_SHOWN else f"{came[:_MOST_SHOWN]}..."
        return Problem(
            place.name,
            f"its answer is cut off or mixed with other words: expected one line of JSON, got "
            f"{shown!r}; see that the connection holds and that shell start-up files print nothing",
        )
