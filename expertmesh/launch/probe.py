"""What a machine is asked before a job starts.

This file is not imported there but sent, as ``python -c``. So it uses nothing but Python's own
library, and no syntax newer than Python 3.6: an old one should still be able to say what it is.
Each answer is one line, ``ANSWER`` and JSON: a shell's start-up files may print lines too.
"""

import hashlib
import json
import os
import socket
import sys
import threading

ANSWER = "\x1fexpertmesh "


def facts(folder: str) -> dict:
    """What must agree on all machines, as seen from ``folder``."""
    version = ".".join(map(str, sys.version_info[:3]))
    found = {"python": version, "folder": os.path.isdir(folder)}
    if found["folder"]:
        # As for the job: `python -m` looks first into the folder that it is started in.
        os.chdir(folder)
    try:
        import importlib.metadata

        import expertmesh

        found["expertmesh"] = expertmesh.__version__
        found["sources"] = _digest(os.path.dirname(expertmesh.__file__))
        found["torch"] = importlib.metadata.version("torch")
    except Exception as error:
        found["missing"] = f"{type(error).__name__}: {error}"
    return found


def _digest(root: str) -> str:
    """One number for all source files: a version stays the same while a project is worked on."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
                digest.update(f"{os.path.relpath(path, root)}={content}\n".encode())
    return digest.hexdigest()[:12]


def listen(port: str, word: str) -> dict:
    """Answer each caller on ``port`` with ``word``, until standard input ends."""
    try:
        server = socket.create_server(("", int(port)))
    except OSError as error:
        return {"error": error.strerror or str(error)}
    threading.Thread(target=_serve, args=(server, word), daemon=True).start()
    tell({"error": None})
    sys.stdin.read()
    return {"error": None}


def _serve(server: socket.socket, word: str) -> None:
    while True:
        caller, _ = server.accept()
        with caller:
            caller.sendall(word.encode())
            # The caller hangs up first, so that the port is free at once afterwards.
            caller.recv(1)


def reach(address: str, port: str, word: str, seconds: str) -> dict:
    """Whether ``listen`` can be called at ``address``."""
    try:
        with socket.create_connection((address, int(port)), timeout=float(seconds)) as call:
            heard = call.recv(len(word)).decode(errors="replace")
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {"error": None if heard == word else "another program answers there"}


def tell(answer: dict) -> None:
    """Print one answer."""
    sys.stdout.write(ANSWER + json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    question, *words = sys.argv[1:]
    if question == "facts":
        tell(facts(*words))
    elif question == "listen":
        tell(listen(*words))
    else:
        tell(reach(*words))
