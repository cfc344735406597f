"""Columns fitted one by one: against the joint fit, scipy, finite differences, the bound, and their own null distributions."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares, root
from scipy.stats import kstest

from depthprob.inference import single
from depthprob.inference.likelihood import depth_bounds, fisher_and_score, maximum
from depthprob.inference.problem import BACKGROUND_SHAPE, PRIOR_SD, make_problem
from depthprob.inference.single import compare_estimators, fit_single_columns
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts

DEFOCUS = np.arange(-160.0, 161.0, 20.0)
IMAGES = len(DEFOCUS)
SERIES = FocalSeries(DEFOCUS, 0.4, np.full(IMAGES, 9612.0), (19, 19))
MIDDLE = 9 * 0.4


pytestmark = pytest.mark.usefixtures("double_precision")


def field(n, depth, dx, dy, background=1e-3):
    zero = np.zeros(IMAGES)
    return Field(jnp.array([[MIDDLE + dx, MIDDLE + dy]]), np.array([n]), jnp.array([depth]), zero + background, zero + 1, np.zeros((IMAGES, 2)))


def test_tables_give_the_library_anywhere_within_a_pixel(library):
    tables = single._tables(library, 0.4, SERIES.shape)
    for dx, dy, depth in ((0.0, 0.0, 3.0), (0.187, -0.113, -9.0), (0.21, 0.21, 0.0)):
        theta = jnp.array([depth, dx, dy, 0.0, np.log(1e-3)])
        rate, rows = single._rate_and_derivatives(theta, jnp.array(6), library, tables, jnp.asarray(DEFOCUS), jnp.float32(9612 * 0.16))
        exact = np.asarray(expected_counts(field(6, depth, dx, dy), library, SERIES)).reshape(IMAGES, -1)
        np.testing.assert_allclose(rate, exact, atol=2e-3 * exact.max())
        problem = make_problem(np.zeros((IMAGES, 19, 19)), field(6, depth, dx, dy), library, SERIES, ("positions",))
        fisher = fisher_and_score(problem.start, problem)[0]
        own = np.asarray((rows[:3].reshape(3, -1) / np.sqrt(rate).ravel()) @ (rows[:3].reshape(3, -1) / np.sqrt(rate).ravel()).T)
        scale = np.sqrt(np.diag(fisher))
        np.testing.assert_allclose(own / np.outer(scale, scale), fisher / np.outer(scale, scale), atol=0.01)


def test_estimates_are_those_of_the_joint_fit(library):
    rng = np.random.default_rng(1)
    counts = rng.poisson(np.asarray(expected_counts(field(7, -22.0, 0.1, -0.15), library, SERIES), float))
    fit = fit_single_columns(counts[None], np.array([7]), library, SERIES, ("positions",))
    joint = maximum(make_problem(counts, field(7, 0.0, 0.0, 0.0), library, SERIES, ("positions",)))
    assert fit.converged.all()
    np.testing.assert_allclose(fit.depth, joint.parameters["depth"], atol=0.03 * joint.sd("depth")[0])
    np.testing.assert_allclose(fit.x + MIDDLE, joint.parameters["x"], atol=0.1 * joint.sd("x")[0])
    np.testing.assert_allclose(fit.sd, joint.sd("depth"), rtol=0.01)
    problem = make_problem(counts, field(7, float(fit.depth[0]), float(fit.x[0]), float(fit.y[0])), library, SERIES, ("positions",))
    np.testing.assert_allclose(fit.crlb, depth_bounds(fisher_and_score(problem.start, problem)[0], problem), rtol=0.01)


@pytest.mark.parametrize("dose", [300.0, 9612.0])
def test_the_slope_of_likelihood_times_prior_is_zero_at_the_estimate(library, dose):
    series = FocalSeries(DEFOCUS, 0.4, np.full(IMAGES, dose), SERIES.shape)
    counts = np.random.default_rng(5).poisson(np.asarray(expected_counts(field(7, -22.0, 0.1, -0.15), library, series), float))
    fit = fit_single_columns(counts[None], np.array([7]), library, series)
    assert fit.converged.all()
    tables = single._tables(library, 0.4, series.shape)
    inverse_variance = np.array([PRIOR_SD[name] ** -2 for name in ("depth", "x", "y")])

    def slope(theta):
        free = jnp.array([theta[0], theta[1], theta[2], 0.0, theta[3]])
        rate, rows = (np.asarray(a, float) for a in single._rate_and_derivatives(free, jnp.array(7), library, tables, jnp.asarray(DEFOCUS), jnp.float32(dose * 0.16)))
        of_data = (rows[[0, 1, 2, 4]] * (counts.reshape(rate.shape) / rate - 1)).sum((1, 2))
        return of_data + np.append(-inverse_variance * theta[:3], BACKGROUND_SHAPE)

    scale, start = np.array([fit.sd[0], 0.02, 0.02, 0.05]), np.array([-22.0, 0.1, -0.15, np.log(1e-3)])
    best = root(lambda u: slope(start + scale * u) * scale, np.zeros(4), options={"eps": 1e-3, "xtol": 1e-6}).x * scale + start
    np.testing.assert_allclose(fit.depth, best[0], atol=2e-3 * fit.sd[0])
    np.testing.assert_allclose([fit.x[0], fit.y[0], np.log(fit.background[0])], best[1:], atol=1e-4)


def test_maximum_likelihood_reaches_the_bound_and_the_peak_does_not(library):
    rows = {r.estimator: r for r in compare_estimators(library, DEFOCUS, (8,), (9612.0,), series_count=600)}
    best, peak = rows["library maximum likelihood"], rows["Gaussian peak"]
    assert abs(best.sd / best.crlb - 1) < 3 * best.sd_error / best.crlb
    assert abs(best.bias) < 3.5 * best.bias_error
    assert abs(best.covered - 0.9) < 3.5 * np.sqrt(0.09 / 600)
    assert peak.sd / peak.crlb > 1.5


def test_least_squares_is_that_of_scipy_and_its_error_bars_are_its_scatter(library):
    rng = np.random.default_rng(3)
    exact = np.asarray(expected_counts(field(7, -22.0, 0.1, -0.15), library, SERIES), float)
    counts = rng.poisson(np.broadcast_to(exact, (200, *exact.shape)))
    fit = fit_single_columns(counts, np.full(200, 7), library, SERIES, least_squares=True)
    assert fit.converged.all()
    model = jax.jit(lambda v: expected_counts(field(7, v[0], v[1], v[2], jnp.exp(v[3])), library, SERIES).ravel())
    slopes = jax.jit(jax.jacfwd(model))  # differences over small steps of counts in single precision are mostly rounding
    best = least_squares(lambda v: np.asarray(model(v), float) - counts[0].ravel(), [-15.0, 0.0, 0.0, np.log(1e-3)], lambda v: np.asarray(slopes(v), float), x_scale=[1, 0.03, 0.03, 0.3])
    assert abs(fit.depth[0] - best.x[0]) < 0.03 * fit.sd[0]
    assert abs(fit.x[0] - best.x[1]) < 0.01
    error = fit.depth + 22.0
    assert abs(np.std(error / fit.sd) - 1) < 3.5 / np.sqrt(400)
    assert fit.sd.mean() > 1.1 * fit.crlb.mean()  # what taking all pixels for equally uncertain costs


def test_goodness_of_fit_is_standard_normal_under_truth_and_sees_a_wrong_count(library):
    rng = np.random.default_rng(2)
    exact = np.asarray(expected_counts(field(6, 4.0, 0.0, 0.0), library, SERIES), float)
    counts = rng.poisson(np.broadcast_to(exact, (400, *exact.shape)))
    right = fit_single_columns(counts, np.full(400, 6), library, SERIES).goodness_of_fit
    assert kstest(right, "norm").pvalue > 1e-3
    wrong = fit_single_columns(counts[:50], np.full(50, 9), library, SERIES).goodness_of_fit
    assert np.median(wrong) > 3


def test_an_estimator_of_ones_own_is_compared(library):
    own = {"always zero": lambda patches, n, library, series: np.zeros(len(patches))}
    (row,) = compare_estimators(library, DEFOCUS, (3,), (9612.0,), own, series_count=300, depth_range=10.0)
    np.testing.assert_allclose(row.sd, 20 / np.sqrt(12), rtol=0.1)
    assert np.isnan(row.covered)


def test_unknown_freedom_is_refused(library):
    with pytest.raises(ValueError, match="positions, gain, background"):
        fit_single_columns(np.zeros((1, IMAGES, 19, 19)), np.array([3]), library, SERIES, ("shifts",))
