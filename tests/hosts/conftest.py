import signal
from collections.abc import Iterator

import pytest

from tests.hosts.network import Network


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    # Otherwise a SIGTERM ends pytest without its finalizers, and the namespaces stay.
    before = signal.signal(signal.SIGTERM, _interrupt)
    with Network(tmp_path_factory.mktemp("network")) as network:
        yield network
    signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
