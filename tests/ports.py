"""Ports of this machine for tests that listen on one a while after they chose it."""

import secrets
import socket

# Linux gives ports from 32768 on to all who ask for any, gloo's many listeners among them. One of
# those would soon be somebody else's.
_FIRST, _LAST = 20_000, 32_000


def free_port() -> int:
    """A port that nobody listens on, and that nobody is given by chance."""
    while True:
        port = _FIRST + secrets.randbelow(_LAST - _FIRST)
        try:
            with socket.create_server(("", port)):
                return port
        except OSError:
            continue
