import gc

import pytest

from expertmesh.train.collector import collected_later


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_and_is_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with collected_later():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="broken"), collected_later():
            raise ValueError("broken")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
