"""What the tests of runs share."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three documents of words, long enough for a few dozen steps."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name in "abc":
        words = rng.choice(["alpha", "beta", "gamma\n", "delta,"], 400)
        (folder / f"{name}.txt").write_text(" ".join(words))
    return folder
