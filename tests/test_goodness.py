"""Goodness of fit: standard normal under the truth, and under a fit once its leverage is given back."""

import numpy as np
import pytest
from scipy.stats import kstest

from depthprob.inference.goodness import goodness_of_fit, leverages
from depthprob.inference.likelihood import maximum, rates
from depthprob.inference.problem import make_problem
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts

pytestmark = pytest.mark.usefixtures("double_precision")

NUISANCES = ("positions", "background", "gain", "image_shifts")


def fifty_columns(library, seed):
    """True rates and a problem with their Poisson counts, started near the truth: 50 overlapping columns, 186 parameters."""
    rng = np.random.default_rng(seed)
    defocus = np.arange(-160.0, 161.0, 40.0)
    n = len(defocus)
    i, j = np.meshgrid(np.arange(10), np.arange(10))
    positions = np.stack([2.04 * i, 2.04 * j], -1)[(i + j) % 2 == 0] + 0.7 + rng.normal(0, 0.03, (50, 2))
    series = FocalSeries(defocus, 0.34, np.full(n, 9612.0), (60, 60), True)
    field = Field(positions, rng.integers(3, 12, 50), rng.normal(0, 6, 50), np.full(n, 1e-3), np.ones(n), np.zeros((n, 2)))
    rate = np.maximum(np.asarray(expected_counts(field, library, series), float), 0)
    return rate, make_problem(rng.poisson(rate), field, library, series, NUISANCES)


def fit_qualities(library, seed):
    """Goodness of fit of every column to the true rates, to the fitted ones, and to these with their leverage."""
    rate, problem = fifty_columns(library, seed)
    estimate = maximum(problem)
    fitted, leverage = rates(estimate.parameters, problem), leverages(estimate, problem)
    assert 0.9 * 186 < leverage.sum() < 186  # the prior knows the rest
    return [goodness_of_fit(estimate.parameters, problem, *options) for options in ((rate,), (fitted,), (fitted, leverage))]


def test_leverage_gives_back_what_the_fit_took_off_the_deviance(library):
    truth, fitted, mended = fit_qualities(library, 0)
    error = (mended - truth).std() / np.sqrt(50)
    assert error < 0.02
    assert np.mean(fitted - truth) < -4 * error
    assert abs(np.mean(mended - truth)) < 3.5 * error


@pytest.mark.slow
def test_goodness_of_fit_has_uniform_p_values_under_truth_with_everything_fitted(library):
    mended = np.concatenate([fit_qualities(library, seed)[2] for seed in range(12)])
    assert kstest(mended, "norm").pvalue > 1e-3
