"""Large fields: window by window against the dense likelihood, and the arrow-shaped matrices against NumPy."""


import equinox as eqx
import jax
import numpy as np
import pytest

from depthprob.inference import likelihood, local
from depthprob.inference.arrow import ArrowFactor, ArrowMatrix, plus_diagonal, strips
from depthprob.inference.likelihood import fisher_and_score, goodness_of_fit, make_problem
from depthprob.inference.posterior import infer
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts

DEFOCUS = np.arange(-160.0, 161.0, 40.0)
FREE = ("positions", "background", "smooth_background", "gain", "image_shifts", "focus_step", "source_size")


pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(scope="module", params=[False, True], ids=["open", "periodic"])
def problem(request, library):
    """72 columns in several strips; with a periodic field also across its edges."""
    periodic = request.param
    rng = np.random.default_rng(0)
    i, j = np.meshgrid(np.arange(18), np.arange(8))
    keep = (i + j) % 2 == 0
    positions = np.stack([2.04 * i[keep], 2.04 * j[keep]], 1) + (0.5 if periodic else 5.0) + rng.normal(0, 0.03, (72, 2))
    n = len(DEFOCUS)
    film = rng.normal(0, 0.2, (n, 5))
    field = Field(positions, rng.integers(3, 12, 72), rng.normal(0, 5, 72), np.full(n, 2e-3), np.ones(n), rng.normal(0, 0.3, (n, 2)), background_shape=film)
    shape = (48, 110) if not periodic else (41, 92)
    series = FocalSeries(DEFOCUS, 0.4, np.full(n, 9612.0), shape, periodic)
    counts = rng.poisson(np.maximum(np.asarray(expected_counts(field, library, series), float), 0))
    return eqx.tree_at(lambda p: p.dispersion, make_problem(counts, field, library, series, FREE), 1.0 + periodic)


def arrow_matrix(rng):
    sizes, k = [5, 7, 4, 6], 3
    at = np.cumsum([0, *sizes])
    a = np.zeros((at[-1], at[-1]))
    for s in range(3):
        both = slice(at[s], at[s + 2])
        x = rng.normal(size=(40, at[s + 2] - at[s]))
        a[both, both] += x.T @ x
    border = rng.normal(size=(at[-1], k))
    part = lambda s, t: a[at[s] : at[s + 1], at[t] : at[t + 1]]
    corner = border.T @ np.linalg.solve(a, border) + np.eye(k)
    return ArrowMatrix(rng.permutation(at[-1]), [part(s, s) for s in range(4)], [part(s + 1, s) for s in range(3)], border, corner)


def test_arrow_factor_solves_inverts_and_draws():
    rng = np.random.default_rng(0)
    matrix = arrow_matrix(rng)
    dense, right = matrix.dense(), rng.normal(size=matrix.size)
    factor, inverse = ArrowFactor(matrix), np.linalg.inv(matrix.dense())
    np.testing.assert_allclose(factor.solve(right), inverse @ right, rtol=1e-10)
    np.testing.assert_allclose(factor.variances(), np.diag(inverse), rtol=1e-10)
    draws = factor.draw(rng, 100_000)
    np.testing.assert_allclose(np.cov(draws.T), inverse, atol=0.02 * np.diag(inverse).max())
    extra = rng.uniform(1, 2, matrix.size)
    np.testing.assert_allclose(plus_diagonal(matrix, extra).dense(), dense + np.diag(extra), atol=1e-12)


@pytest.mark.parametrize("period", [None, 50.0])
def test_columns_closer_than_a_strip_is_wide_are_in_the_same_or_neighbouring_strips(period):
    along = np.random.default_rng(0).uniform(-3, 47, 200)
    parts = strips(along, 7.0, period)
    assert sorted(np.concatenate(parts)) == list(range(200)) and len(parts) == (4 if period else 8)
    strip = np.empty(200, int)
    for s, part in enumerate(parts):
        strip[part] = s
    away = abs(along[:, None] - along)
    away = away if period is None else np.minimum(away, period - away)
    assert (abs(strip[:, None] - strip)[away < 7.0] <= 1).all()


def test_rates_score_and_information_are_those_of_the_dense_likelihood(problem):
    parameters = dict(problem.start, depth=problem.start["depth"] + 2.0)
    windows = local.plan_windows(problem.library, problem.series, np.asarray(parameters["depth"]))
    sums = local.evaluate(parameters, problem, windows)
    dense = likelihood.rates(parameters, problem)
    # tails beyond the windows: under FAINT of a column's peak each, and a few of them meet
    np.testing.assert_allclose(sums.rate, dense, atol=4 * local.FAINT * dense.max())
    matrix = local.select(local.information(parameters, problem, sums.rate), problem)
    fisher, score = fisher_and_score(parameters, problem)
    scale = np.sqrt(np.diag(fisher))
    columns = slice(0, 3 * len(problem.n_atoms))
    # where those tails are missing pixels are darker, and tell up to 1.3 % more
    np.testing.assert_allclose((matrix.dense() / np.outer(scale, scale))[columns, columns], (fisher / np.outer(scale, scale))[columns, columns], atol=0.02)
    own = np.concatenate([np.ravel(sums.score[name]) for name in problem.free])
    # what the tails change in a depth, in its own standard deviations
    gauge = np.zeros_like(fisher)
    gauge[columns.stop :, columns.stop :] = local.gauge(problem)
    covariance = np.linalg.inv(fisher + gauge + 1e-9 * np.diag(np.diag(fisher)))
    step = covariance @ (own - score) / np.sqrt(np.diag(covariance))
    assert abs(step[columns]).max() < 0.1


def test_information_does_not_depend_on_the_bands(problem, monkeypatch):
    windows = local.plan_windows(problem.library, problem.series, np.asarray(problem.start["depth"]))
    rate = local.rates(problem.start, problem, windows)
    found = []
    for memory in (1e12, 1e7):
        monkeypatch.setattr(local, "BAND", memory)
        found.append(local.column_information(problem.start, problem, rate, windows).dense())
    whole, cut = found
    np.testing.assert_allclose(cut, whole, atol=1e-6 * abs(whole).max())


def test_maximum_amplitudes_and_bounds_agree_with_the_dense_fit(problem):
    wide, near = likelihood.maximum(problem), local.maximum(problem)
    assert near.converged
    for name in ("depth", "x", "y", "shift_x", "focus_step"):
        sd = wide.sd(name)
        assert (abs(np.asarray(near.parameters[name]) - np.asarray(wide.parameters[name])) < 0.15 * sd).all(), name
        np.testing.assert_allclose(near.sd(name), sd, rtol=0.01)
    amplitude, sd, _ = likelihood.column_amplitudes(wide.parameters, problem)
    again, sd_again, _ = before = local.column_amplitudes(near.parameters, problem)
    np.testing.assert_allclose(local.column_amplitudes(near.parameters, problem, before).value, again, rtol=1e-6)
    assert (abs(again - amplitude) < 0.6 * sd).all()
    np.testing.assert_allclose(sd_again, sd, rtol=0.05)  # backgrounds are held
    np.testing.assert_allclose(local.column_bounds(near, problem), likelihood.column_bounds(wide, problem), rtol=0.02)
    fits = [goodness_of_fit(e.parameters, problem, f.rates(e.parameters, problem)) for e, f in ((wide, likelihood), (near, local))]
    assert abs(fits[0] - fits[1]).max() < 0.5


def test_laplace_draws_have_the_estimates_covariance(problem):
    estimate = local.maximum(problem)
    posterior = infer(problem, "laplace", jax.random.key(0), 1000, 2, estimate=estimate)
    np.testing.assert_allclose(posterior.of("depth").reshape(-1, 72).std(0), estimate.sd("depth"), rtol=0.12)


