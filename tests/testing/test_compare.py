"""The comparison must fail where it should."""

import pytest
import torch

from expertmesh.testing import assert_close, relative_error


def test_relative_error_is_by_norm() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.05]), expected) == pytest.approx(
        0.01, rel=1e-4
    )


def test_small_elements_do_not_count_alone() -> None:
    expected = torch.tensor([1.0, 1e-9])
    assert_close("pair", torch.tensor([1.0, 2e-9]), expected)


def test_prints_name_and_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert_close("weights", torch.ones(2), torch.ones(2))
    assert "weights: relative error 0" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"weights: relative error 1 exceeds 1e-05"):
        assert_close("weights", torch.full((2,), 2.0), torch.ones(2))


def test_zero_expected_counts_absolutely() -> None:
    assert_close("zero", torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError, match="zero"):
        assert_close("zero", torch.tensor([0.0, 1e-3]), torch.zeros(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_never_pass(bad: float) -> None:
    good, broken = torch.ones(2), torch.tensor([1.0, bad])
    for actual, expected in ((broken, good), (good, broken), (broken, broken)):
        with pytest.raises(AssertionError):
            assert_close("bad", actual, expected, tol=1e9)


def test_shape_dtype_and_none() -> None:
    with pytest.raises(AssertionError, match=r"x: shape \(2,\), not \(2, 1\)"):
        assert_close("x", torch.ones(2), torch.ones(2, 1))
    with pytest.raises(AssertionError, match=r"dtype torch.float64, not torch.float32"):
        assert_close("x", torch.ones(2, dtype=torch.float64), torch.ones(2))
    with pytest.raises(AssertionError, match="None is not a tensor"):
        assert_close("x", None, torch.ones(2))


def test_integers_are_exact_and_empty_passes() -> None:
    with pytest.raises(AssertionError):
        assert_close("n", torch.tensor([100, 101]), torch.tensor([100, 100]))
    assert_close("empty", torch.ones(0, 3), torch.ones(0, 3))


def test_integers_that_float64_cannot_tell_apart_differ() -> None:
    with pytest.raises(AssertionError, match="key: not exactly equal"):
        assert_close("key", torch.tensor([2**53 + 1]), torch.tensor([2**53]))
    assert_close("key", torch.tensor([2**53 + 1]), torch.tensor([2**53 + 1]))


def test_imaginary_parts_count() -> None:
    assert relative_error(torch.tensor([3 + 4j]), torch.tensor([3 + 0j])) == pytest.approx(4 / 3)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("z", torch.tensor([1 + 1j]), torch.tensor([1 + 5j]), tol=0.1)
