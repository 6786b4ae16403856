"""Whether the tests of several hosts can run here: prints what is missing, one line, and fails."""

import os
import shutil
import subprocess
import sys


def what_is_missing() -> str | None:
    """What keeps the tests from running; None if nothing does."""
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "root is needed to make network namespaces"
    for program, package in (
        ("ip", "iproute2"),
        ("ssh", "openssh-client"),
        ("/usr/sbin/sshd", "openssh-server"),
    ):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian's package {package})"
    return _namespaces_fail()


def _namespaces_fail() -> str | None:
    name = f"emtest{os.getpid()}try"
    for words in (
        ["netns", "add", name],
        ["-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1"],
        ["netns", "delete", name],
    ):
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            return f"`ip {' '.join(words)}` fails: {done.stderr.strip()}"
    return None


if __name__ == "__main__":
    if (missing := what_is_missing()) is not None:
        print(f"the tests of several hosts were NOT RUN: {missing}", flush=True)
        sys.exit(1)
