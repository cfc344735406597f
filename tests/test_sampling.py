"""What draws are worth."""

import numpy as np
import pytest

from depthprob.inference.sampling import effective_draws


@pytest.mark.parametrize("correlation", [0.0, 0.8, -0.5])
def test_correlated_draws_are_worth_what_their_autocorrelation_time_says(correlation):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 20_000, 3))
    for t in range(1, z.shape[1]):
        z[:, t] = correlation * z[:, t - 1] + (1 - correlation**2) ** 0.5 * z[:, t]
    expected = 40_000 * (1 - correlation) / (1 + correlation)  # of a first-order autoregression
    np.testing.assert_allclose(effective_draws(z), expected, rtol=0.15)


def test_draws_that_alternate_are_worth_no_more_than_the_limit():
    z = np.random.default_rng(1).normal(size=(2, 150, 4)) * 0.05 + np.array([1.0, -1.0])[np.arange(150) % 2][:, None]
    assert effective_draws(z) == pytest.approx(300 * np.log10(300))
