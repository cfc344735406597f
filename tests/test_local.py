"""Large fields: window by window against the dense likelihood, and the arrow-shaped matrices against NumPy."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.diagnostics import effective_sample_size
from scipy.stats import poisson

from depthprob.errors import InputError
from depthprob.inference import density, drawing, likelihood, local, tiles
from depthprob.inference.arrow import ArrowFactor, ArrowMatrix, plus_diagonal, strips
from depthprob.inference.goodness import goodness_of_fit
from depthprob.inference.likelihood import fisher_and_score, objective
from depthprob.inference.posterior import infer, to_arviz
from depthprob.inference.problem import from_vector, make_problem, prior_precision, prior_slope, to_vector
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts

DEFOCUS = np.arange(-160.0, 161.0, 40.0)
FREE = ("positions", "background", "smooth_background", "gain", "image_shifts", "focus_step", "source_size")


pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(autouse=True)
def few_window_sizes(monkeypatch):
    """Each is compiled anew."""
    monkeypatch.setattr(drawing, "CLASSES", 2)
    monkeypatch.setattr(drawing, "COLUMNS_A_CLASS", 50)


@pytest.fixture(scope="module", params=[False, True], ids=["open", "periodic"])
def problem(request, library):
    """72 columns in several strips; with a periodic field also across its edges, with an open one in distorted images."""
    periodic = request.param
    rng = np.random.default_rng(0)
    i, j = np.meshgrid(np.arange(18), np.arange(8))
    keep = (i + j) % 2 == 0
    positions = np.stack([2.04 * i[keep], 2.04 * j[keep]], 1) + (0.5 if periodic else 5.0) + rng.normal(0, 0.03, (72, 2))
    n = len(DEFOCUS)
    film, scan = rng.normal(0, 0.2, (n, 5)), rng.normal(0, 0.01, (n, 2, 2))
    field = Field(positions, rng.integers(3, 12, 72), rng.normal(0, 5, 72), np.full(n, 2e-3), np.ones(n), rng.normal(0, 0.3, (n, 2)), background_shape=film, image_distortions=None if periodic else scan)
    shape = (48, 110) if not periodic else (41, 92)
    series = FocalSeries(DEFOCUS, 0.4, np.full(n, 9612.0), shape, periodic)
    counts = rng.poisson(np.maximum(np.asarray(expected_counts(field, library, series), float), 0))
    return eqx.tree_at(lambda p: p.dispersion, make_problem(counts, field, library, series, (*FREE, *("image_distortions",) * (not periodic))), 1.0 + periodic)


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
    scale = np.array([factor.scale() @ e for e in jnp.eye(matrix.size)]).T
    np.testing.assert_allclose(scale @ scale.T, inverse, rtol=1e-9, atol=1e-12 * np.diag(inverse).max())
    np.testing.assert_allclose(factor.coloured(right[None])[0], scale @ right, rtol=1e-10)


@pytest.mark.parametrize("share, wrong", [(0.0, 1), (0.4, 0), (1.0, 1)])
def test_residuals_tell_what_share_of_a_change_the_counts_hold(library, share, wrong):
    """By all and by the sharp images, also where the third column is taken for one atom more."""
    foci, n, ones = np.linspace(-150, 150, 9), np.array([4, 7, 5, 9]), np.ones(9)
    series = FocalSeries(foci, 0.34, 9612.0 * ones, (24, 22), True)
    field = Field(np.array([[2.7, 0.7], [4.74, 2.74], [2.7, 4.78], [4.74, 6.82]]), n, np.array([-3.0, 1.0, 4.0, 0.0]), 2e-3 * ones, ones, np.zeros((9, 2)))
    total, wider = (np.asarray(expected_counts(dataclasses.replace(field, source_variance=v), library, series), float) for v in (0.0, 0.05))
    change = (wider - total).astype(np.float32)
    counts = np.random.default_rng(5).poisson(total + share * change)
    taken = dataclasses.replace(field, n_atoms=n + wrong * (np.arange(4) == 2))
    for reader in (likelihood, local):
        problem = make_problem(counts, taken, library, series, ("positions", "background", "gain", "image_shifts"), dense=reader is likelihood)
        parameters = reader.find_mode(problem).parameters
        held = reader.share_held(change, parameters, problem, reader.column_amplitudes(parameters, problem))
        assert held.value == pytest.approx(share, abs=3.5 * held.sd) and 0.02 < held.sd < 0.2


@pytest.mark.parametrize("change", [0.0, 1.0, 1.2])
def test_nothing_is_known_of_the_share_of_a_change_that_parameters_do_themselves(change):
    """Nor of none, nor by a matrix that promises more than there is."""
    own, common = np.array([[5.0, 2.0 * change], [2.0 * change, 4.0]]) * (change > 0), np.array([[1.0, 2.0 * change]])
    held = likelihood.share_beside(own, common, 2.0 * change * np.ones(1))
    assert held.sd == np.inf and not held.value < min(0.5, 1 - 3 * held.sd)


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
    windows = drawing.plan_windows(problem.library, problem.series, np.asarray(parameters["depth"]))
    sums = local.evaluate(parameters, problem, windows)
    dense = likelihood.rates(parameters, problem)
    # tails beyond the windows: under FAINT of a column's peak each, and a few of them meet
    np.testing.assert_allclose(sums.rate, dense, atol=4 * drawing.FAINT * dense.max())
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


def test_a_few_columns_more_and_depths_a_little_different_compile_nothing_anew(library, monkeypatch):
    monkeypatch.setattr(drawing, "COLUMNS_A_CLASS", 700)  # few of them
    defocus, flat = np.array([-60.0, 60.0]), np.ones(2)
    series = FocalSeries(defocus, 0.4, 9612.0 * flat, (20, 450), False)

    def compiled(columns: int, depth: float):
        positions = np.stack([2.5 + 2.7 * np.arange(columns), np.full(columns, 4.0)], 1)
        field = Field(positions, np.full(columns, 5), np.linspace(-depth, depth, columns), 2e-3 * flat, flat, np.zeros((2, 2)))
        problem = make_problem(np.ones((2, 20, 450)), field, library, series, ("positions",), dense=False)
        local.evaluate(problem.start, problem)
        narrow = drawing.plan_windows(library, series, np.asarray(field.depths), local.DIM)
        return [f._cache_size() for f in (drawing._paint_spread, drawing._overlap_spread)], [a.shape for w in narrow for a in w.draw]

    of_50, of_57, of_65 = compiled(50, 4.0), compiled(57, 3.0), compiled(65, 3.0)
    assert of_57 == of_50
    assert of_65[0] > of_50[0]  # two batches


def test_information_does_not_depend_on_the_bands(problem, monkeypatch):
    windows = drawing.plan_windows(problem.library, problem.series, np.asarray(problem.start["depth"]))
    rate = local.rates(problem.start, problem, windows)
    found = []
    for memory in (1e12, 1e7):
        monkeypatch.setattr(tiles, "BAND", memory)
        found.append(tiles.column_information(problem.start, problem, rate, windows).dense())
    whole, cut = found
    np.testing.assert_allclose(cut, whole, atol=1e-6 * abs(whole).max())


def test_maximum_amplitudes_and_bounds_agree_with_the_dense_fit(problem, monkeypatch):
    wide, near = likelihood.maximum(problem), local.maximum(problem)
    assert near.converged
    for name in ("depth", "x", "y", "shift_x", "focus_step"):
        sd = wide.sd(name)
        assert (abs(np.asarray(near.parameters[name]) - np.asarray(wide.parameters[name])) < 0.15 * sd).all(), name
        np.testing.assert_allclose(near.sd(name), sd, rtol=0.004 if name == "depth" else 0.02)  # derivatives stop at `DIM`; at 0.3 %, all agree to 0.2 %
    amplitude, sd, _ = likelihood.column_amplitudes(wide.parameters, problem)
    of_sharp = local.column_amplitudes(near.parameters, problem)
    assert (of_sharp.sd > 0.95 * sd).all() and np.median(of_sharp.sd / sd) < 1.5  # five of nine images
    monkeypatch.setattr(local, "SHARP", 1.0)
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


def test_density_and_its_gradient_are_those_of_the_dense_likelihood(problem, monkeypatch):
    """Near a mode, and with all columns further from there than their windows stay behind."""
    monkeypatch.setattr(drawing, "CLASSES", 1)  # quick to compile
    field = density.windowed(problem.start, problem)
    covariance = np.linalg.inv(fisher_and_score(problem.start, problem)[0] + prior_precision(problem))
    shift = np.concatenate([np.full(problem.start[name].size, 0.3 * (name == "x")) for name in problem.free])
    assert shift.max() > density.ROOM * problem.series.pixel_size
    columns = slice(0, 3 * len(problem.n_atoms))
    near = to_vector(problem.start, problem) + np.linalg.cholesky(covariance) @ np.random.default_rng(3).normal(size=len(shift))
    value_and_slope = jax.jit(jax.value_and_grad(density.log_posterior))
    for vector in (jnp.asarray(near), jnp.asarray(near + shift)):
        value, slope = value_and_slope(vector, field)
        expected = fisher_and_score(from_vector(vector, problem), problem)[1] + np.asarray(prior_slope(vector, problem))
        step = covariance @ (np.asarray(slope) - expected) / np.sqrt(np.diag(covariance))
        assert abs(step[columns]).max() < 0.03 and abs(step).max() < 0.06  # standard deviations: what windows cut off moves the backgrounds
        assert value == pytest.approx(float(objective(vector, problem)), abs=3.0)


@pytest.mark.slow
def test_nuts_of_a_windowed_field_agrees_with_its_normal_and_resumes(library, monkeypatch, tmp_path):
    monkeypatch.setattr(drawing, "CLASSES", 1)
    rng = np.random.default_rng(1)
    positions, foci = np.array([[4.0, 4.0], [6.04, 4.0], [4.0, 6.04], [6.04, 6.04]]), np.linspace(-60.0, 60.0, 5)
    field = Field(positions, np.array([3, 7, 5, 10]), rng.normal(0, 5, 4), np.full(5, 2e-3), np.ones(5), np.zeros((5, 2)))
    series = FocalSeries(foci, 0.4, np.full(5, 2e4), (26, 26))
    counts = rng.poisson(np.asarray(expected_counts(field, library, series), float))
    problem = make_problem(counts, field, library, series, dense=False)
    estimate = local.maximum(problem)
    run = lambda: infer(problem, "nuts", jax.random.key(2), 200, 2, estimate=estimate, progress_bar=False, checkpoint=tmp_path / "state.npz")
    chains = run()
    assert chains.diagnostics["divergences"] == 0
    z = (chains.draws - to_vector(estimate.parameters, problem)) / np.sqrt(estimate.variances)
    squares = (z - z.mean((0, 1))) ** 2
    effective, of_squares = effective_sample_size(z), effective_sample_size(squares)
    assert (abs(z.mean((0, 1))) < 0.05 + 4 / np.sqrt(effective)).all()  # 0.05: the mean is not the mode, where the posterior leans
    assert abs(squares.mean() - 1) < 0.02 + 4 * np.sqrt(2 / np.median(of_squares) / len(of_squares))
    again = run()
    assert again.diagnostics["resumed_at_draw"] == 2 * (200 + chains.diagnostics["warmup"])
    np.testing.assert_array_equal(again.draws, chains.draws)
    each = to_arviz(chains, problem)["log_likelihood"]["mean_counts"][1, 7]
    whole = make_problem(counts, field, library, series)
    rate = likelihood.rates(from_vector(jnp.asarray(chains.draws[1, 7]), whole), whole)
    np.testing.assert_allclose(each, poisson.logpmf(counts, np.asarray(rate, float)).sum((1, 2)), atol=0.02)


def test_the_best_normal_of_a_large_field_is_refused(problem):
    estimate = likelihood.Estimate(problem.start, np.ones(3), ArrowFactor(arrow_matrix(np.random.default_rng(0))), None, [], 0.0, 1, True)
    with pytest.raises(InputError, match="'svi' fits fields of up to 200 columns; this one has 72"):
        infer(problem, "svi", estimate=estimate)
