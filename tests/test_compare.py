"""The comparison that all tests trust can fail."""

import ml_dtypes
import numpy as np
import pytest
from support.compare import close, rms

ONES = np.ones((2, 3))
WRONG = {
    "structure": ({"a": ONES}, {"b": ONES}),
    "None for an array": ({"a": None}, {"a": ONES}),
    "a missing leaf": ({"a": ONES}, {"a": ONES, "b": ONES}),
    "shape": (ONES[:1], ONES),
    "nan": (np.full((2, 3), np.nan), ONES),
    "both infinite": (np.full((2, 3), np.inf), np.full((2, 3), np.inf)),
    "error": (ONES * (1 + 2e-3), ONES),
    "noise where zero is right": (ONES * 2e-3, ONES * 0),
}


@pytest.mark.parametrize("compare", [close, rms])
@pytest.mark.parametrize("case", WRONG)
def test_difference_is_seen(compare, case):
    with pytest.raises(AssertionError):
        compare(*WRONG[case], 1e-3)


@pytest.mark.parametrize("compare", [close, rms])
def test_error_within_the_bar_passes(compare):
    desired = {"a": ONES * 100, "b": [0.0, None], "c": np.zeros((0, 2))}
    actual = {
        "a": (ONES * 100.2).astype(ml_dtypes.bfloat16),
        "b": [0.0, None],
        "c": np.zeros((0, 2)),
    }
    compare(actual, desired, 5e-3)


def test_error_is_relative_to_the_largest_value_and_the_leaf_is_named():
    desired = np.array([1000.0, 1.0])
    close(desired + [0, 0.9], desired, 1e-3)
    with pytest.raises(
        AssertionError, match=r"\['x'\]\[1\]: error 2.00e-03 > 0.001, worst at \(1,\)"
    ):
        close({"x": [desired, desired + [0, 2]]}, {"x": [desired, desired]}, 1e-3)


def test_rms_is_of_the_whole_tensor():
    desired, actual = np.ones(100), np.ones(100)
    actual[7] = 1.01
    rms(actual, desired, 1.1e-3)
    with pytest.raises(AssertionError):
        close(actual, desired, 1.1e-3)
