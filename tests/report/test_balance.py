import numpy as np
import pytest

from expertmesh.report import balance, style


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["blocks.1.moe", "blocks.10.moe"], ["1", "10"]),
        (["blocks.1.moe"], ["blocks.1.moe"]),
        (["encoder.0.moe", "decoder.0.moe"], ["encoder", "decoder"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["moe", "blocks.moe"], ["moe", "blocks.moe"]),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert balance.short_names(names) == short


def test_moving_mean_is_centred_and_skips_nan() -> None:
    value = np.array([1.0, 2.0, np.nan, 6.0, 10.0])
    np.testing.assert_allclose(style.moving_mean(value, 3), [1.5, 1.5, 4.0, 8.0, 8.0])
    np.testing.assert_array_equal(style.moving_mean(value, 1), value)
