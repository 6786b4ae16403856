import socket
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.errors import UserError
from expertmesh.launch import preflight, probe
from expertmesh.launch.place import ThisMachine
from expertmesh.launch.preflight import check_hosts, differences
from tests.launch.fakes import FakePlace
from tests.ports import free_port

HERE = {"python": "3.11.7", "folder": True, "expertmesh": "1", "sources": "ab", "torch": "2.13"}


def named(name, **differing):
    """A host that is this machine, but for its name and some words of its answers."""
    source = Path(probe.__file__).read_text()
    for old, new in differing.items():
        assert old in source
        source = source.replace(old, new)
    place = FakePlace(name, "")
    place.source = f"import sys; del sys.argv[1:3]\n{source}"
    return place


@pytest.mark.parametrize(
    ("there", "reasons"),
    [
        ({}, []),
        ({"python": "3.11.2"}, []),
        ({"python": "3.12.1"}, ["Python 3.12.1, here 3.11.7"]),
        ({"python": "3.12.1", "torch": "1"}, ["Python 3.12.1, here 3.11.7"]),
        ({"expertmesh": "2", "sources": "x"}, ["expertmesh 2, here 1"]),
        ({"torch": "2.11"}, ["torch 2.11, here 2.13"]),
        ({"missing": "ImportError: no expertmesh"}, ["ImportError: no expertmesh"]),
        (
            {"sources": "cd"},
            ["expertmesh 1 with other source files than here (digest cd, here ab)"],
        ),
    ],
)
def test_what_must_agree(there, reasons):
    assert differences(HERE, HERE | there) == reasons


def test_the_probe_knows_this_installation():
    import torch

    import expertmesh

    words = [sys.executable, "-c", Path(probe.__file__).read_text(), "facts", "/"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    answer = preflight._answer(ThisMachine(), done.stdout)
    assert answer["expertmesh"] == expertmesh.__version__
    assert answer["torch"] == torch.__version__
    assert answer["folder"] is True
    assert sys.version.startswith(answer["python"])


def test_a_digest_tells_every_change_apart(tmp_path):
    (tmp_path / "sub").mkdir()
    seen = set()
    for name, text in [("a.py", "1"), ("a.py", "2"), ("sub/a.py", "1"), ("b.py", "1")]:
        (tmp_path / name).write_text(text)
        seen.add(probe._digest(str(tmp_path)))
    assert len(seen) == 4
    (tmp_path / "notes.txt").write_text("not a source")
    assert probe._digest(str(tmp_path)) in seen


def test_this_machine_can_take_part(tmp_path):
    check_hosts([ThisMachine()], port=free_port(), folder=str(tmp_path))


def test_every_host_that_cannot_is_named_with_its_reason(tmp_path):
    refusal = "import sys; print('Permission denied (publickey).', file=sys.stderr); sys.exit(255)"
    bare = "import sys; print('sh: python3: not found', file=sys.stderr); sys.exit(127)"
    old = 'print("Welcome!"); '
    places = [
        FakePlace("stranger", refusal),
        FakePlace("bare", bare),
        named("old", **{"version = ": f"{old}version = '2.7.1' or "}),
        named("other", **{"expertmesh.__version__": "'9.9'"}),
        ThisMachine(),
    ]
    with pytest.raises(UserError) as caught:
        check_hosts(places, port=free_port(), folder=str(tmp_path))
    first, *lines = str(caught.value).splitlines()
    assert first == "4 of 5 hosts cannot take part; nothing was started"
    assert lines[0] == (
        "  stranger: ssh: Permission denied (publickey).; "
        "`ssh stranger true` must work without a password"
    )
    assert lines[1] == "  bare: sh: python3: not found"
    assert lines[2].startswith("  old: Python 2.7.1, here 3.")
    assert lines[3].startswith("  other: expertmesh 9.9, here ")
    assert len(lines) == 4


def test_a_folder_that_is_not_there():
    place = named("other", **{"os.path.isdir(folder)": "False"})
    with pytest.raises(UserError, match="other: there is no folder /; the job starts in the same"):
        check_hosts([place], port=free_port(), folder="/")


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}, .* in use.* --port"):
            check_hosts([ThisMachine()], port=port, folder="/")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise SystemExit('python: no such option')", "python: no such option"),
        (
            "import os; os.write(2, b'kex_exchange: reset by peer\\n'); os._exit(255)",
            "ssh: kex_exchange: reset by peer; `ssh first true` must work without a password",
        ),
    ],
)
def test_a_first_host_that_does_not_listen(source, reason):
    with preflight._listening(FakePlace("first", source), 7, "word") as problem:
        assert problem == preflight.Problem("first", reason)


def test_a_first_host_that_does_not_listen_in_time(monkeypatch):
    monkeypatch.setattr(preflight, "_SECONDS", 1)
    silent = FakePlace("first", "import time; time.sleep(60)")
    with preflight._listening(silent, 7, "word") as problem:
        assert problem == preflight.Problem("first", "did not listen on port 7 within 1 s")


def test_a_first_host_that_cannot_be_reached():
    port = free_port()
    deaf = named("deaf", **{"(address, int(port))": "('127.0.0.1', 1)"})
    with pytest.raises(UserError) as caught:
        check_hosts([ThisMachine(), deaf], port=port, folder="/")
    assert str(caught.value).splitlines() == [
        "1 of 2 hosts cannot take part; nothing was started",
        f"  deaf: cannot reach localhost:{port}, where all hosts meet: Connection refused; "
        "open the port, or set another one with --port",
    ]


def test_a_host_that_says_nothing(monkeypatch):
    # Not by way of check_hosts: this machine, which is asked too, may be busy for a second.
    monkeypatch.setattr(preflight, "_SECONDS", 1)
    mute = FakePlace("mute", "import time; time.sleep(60)")
    assert preflight._facts(mute, "/") == preflight.Problem("mute", "no answer within 1 s")


CUT = 'expected one line of JSON, got \'{"python": "3.1\'; see that the connection holds'


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('{"python": "3.1', CUT),
        ("", "expected one line of JSON, got ''; see that the connection holds"),
        ('{"python": "' + "3" * 200, 'got \'{"python": "' + "3" * 88 + "...'; see that"),
    ],
)
def test_an_answer_that_is_cut_off(answer, reason):
    said = f"print({probe.ANSWER + answer!r}, end='')"
    with pytest.raises(UserError) as caught:
        check_hosts([FakePlace("far", said), ThisMachine()], port=free_port(), folder="/")
    first, line = str(caught.value).splitlines()
    assert first == "1 of 2 hosts cannot take part; nothing was started"
    assert line.startswith("  far: its answer is cut off or mixed with other words: ")
    assert reason in line


def test_a_first_host_whose_answer_to_listening_is_cut_off():
    said = f"print({probe.ANSWER!r} + '{{', end='')"
    with preflight._listening(FakePlace("first", said), 7, "word") as problem:
        assert problem is not None
        assert problem.host == "first"
        assert "cut off or mixed with other words: expected one line of JSON, got '{'" in (
            problem.reason
        )
