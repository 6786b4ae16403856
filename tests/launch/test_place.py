import subprocess
import sys

from expertmesh.launch.place import OverSSH, ThisMachine


def test_this_machine_starts_python_in_the_folder(tmp_path):
    folder = tmp_path / "a folder; with 'signs'"
    folder.mkdir()
    code = "import os, sys; print(os.getcwd(), sys.argv[1:])"
    words = ThisMachine().command(["-c", code, "x y", "$HOME"], str(folder))
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder} ['x y', '$HOME']\n"


def test_ssh_never_asks_and_starts_the_same_python(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    *words, host, shell = OverSSH("node", ["ssh", "-p", "22"]).command(["-c", "print(1)"], "/a b")
    assert words[:3] == ["ssh", "-p", "22"]
    assert "BatchMode=yes" in words
    assert host == "node"
    assert shell == f"cd '/a b' && exec {sys.executable} -c 'print(1)'"


def test_ssh_takes_the_python_path_along(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/some where")
    shell = OverSSH("node").command(["-V"], "/")[-1]
    assert shell == f"cd / && exec env 'PYTHONPATH=/some where' {sys.executable} -V"


def test_the_address_is_what_ssh_would_call(tmp_path):
    config = tmp_path / "config"
    config.write_text("Host node\n  HostName 192.0.2.7\n")
    assert OverSSH("node", ["ssh", "-F", str(config)]).address == "192.0.2.7"
    assert OverSSH("other.example", ["ssh", "-F", str(config)]).address == "other.example"
