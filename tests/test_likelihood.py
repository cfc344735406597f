"""The joint fit on the packaged library: exact derivatives, recovery within its own bounds, a posterior that agrees."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprob.errors import InputError
from depthprob.inference import likelihood, local
from depthprob.inference.crlb import crlb
from depthprob.inference.gaussian_peak import fit_gaussian_peaks
from depthprob.inference.goodness import goodness_of_fit
from depthprob.inference.likelihood import (
    column_amplitudes,
    column_bounds,
    depth_bounds,
    depth_sd,
    fisher_and_score,
    log_likelihood,
    maximum,
    rates,
)
from depthprob.inference.posterior import infer, to_arviz
from depthprob.inference.problem import AFFINE, field_of, from_vector, make_problem, to_vector
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts

DEFOCUS = np.arange(-180.0, 181.0, 20.0)
SERIES = FocalSeries(DEFOCUS, 0.4, np.full(len(DEFOCUS), 9612.0), (30, 34), False)


pytestmark = pytest.mark.usefixtures("double_precision")


def field(depths=(-6.0, 3.0, 9.0)):
    n = len(DEFOCUS)
    return Field(
        positions=np.array([[4.0, 5.1], [6.1, 5.0], [9.0, 7.7]]),
        n_atoms=np.array([4, 6, 3]),
        depths=np.array(depths),
        background=np.full(n, 2e-4),
        gain=np.ones(n),
        image_shifts=np.zeros((n, 2)),
    )


@pytest.fixture(scope="module")
def problem(library):
    mean = np.asarray(expected_counts(field(), library, SERIES), float)
    return make_problem(np.random.default_rng(1).poisson(mean), field(), library, SERIES)


def test_expected_counts_are_the_sum_of_the_columns_images(library):
    counts = np.asarray(expected_counts(field(), library, SERIES))
    x, y = np.arange(34) * 0.4, np.arange(30) * 0.4
    direct = 2e-4 + sum(
        library.series(n, DEFOCUS - d, x - px, y - py)
        for (px, py), n, d in zip(field().positions, field().n_atoms, field().depths, strict=True)
    )
    # frequencies under 1e-4 of the largest are left out
    np.testing.assert_allclose(counts / (9612 * 0.16), direct, atol=2e-3 * direct.max())


def test_a_distorted_scan_moves_columns_away_from_the_middle_of_the_field(library):
    scan = np.random.default_rng(0).normal(0, 0.03, (len(DEFOCUS), 2, 2))
    distorted = dataclasses.replace(field(), image_shifts=np.full((len(DEFOCUS), 2), 0.1), image_distortions=scan)
    counts = np.asarray(expected_counts(distorted, library, SERIES))
    x, y = np.arange(34) * 0.4, np.arange(30) * 0.4
    direct = np.full(counts.shape, 2e-4)
    for (px, py), n, d in zip(field().positions, field().n_atoms, field().depths, strict=True):
        u, v = px - 16.5 * 0.4, py - 14.5 * 0.4
        for i, ((xx, xy), (yx, yy)) in enumerate(scan):
            direct[i] += library.series(n, DEFOCUS[i : i + 1] - d, x - px - 0.1 - xx * u - xy * v, y - py - 0.1 - yx * u - yy * v)[0]
    # frequencies under 1e-4 of the largest are left out
    np.testing.assert_allclose(counts / (9612 * 0.16), direct, atol=2e-3 * direct.max())
    posed = make_problem(counts, distorted, library, SERIES)  # what all distortions have in common goes to the positions
    assert abs(np.mean([posed.start[name] for name in AFFINE], 1)).max() < 1e-12
    np.testing.assert_allclose(rates(posed.start, posed), counts, atol=1e-5 * counts.max())


def test_moving_a_column_in_depth_is_moving_the_focus(library):
    moved = FocalSeries(DEFOCUS + 4.0, 0.4, SERIES.dose, (30, 34), False)
    a = expected_counts(field((-6.0, 3.0, 9.0)), library, SERIES)
    b = expected_counts(field((-2.0, 7.0, 13.0)), library, moved)
    np.testing.assert_allclose(a, b, atol=2e-4 * float(np.max(a)))  # float32 sums


def test_score_is_the_gradient_of_the_log_likelihood(problem):
    vector = jnp.asarray(to_vector(problem.start, problem)) + 0.01
    _, score = fisher_and_score(from_vector(vector, problem), problem)
    gradient = np.asarray(jax.grad(lambda v: log_likelihood(from_vector(v, problem), problem))(vector))
    np.testing.assert_allclose(score, gradient, atol=2e-4 * abs(gradient).max())  # rates in float32


def test_score_holds_with_focus_and_source_size_free(problem, library):
    free = ("positions", "gain", "background", "focus_step", "source_size")
    wide = make_problem(np.asarray(problem.counts), field(), library, SERIES, free)
    vector = jnp.asarray(to_vector(wide.start, wide)) + 0.003
    _, score = fisher_and_score(from_vector(vector, wide), wide)
    gradient = np.asarray(jax.grad(lambda v: log_likelihood(from_vector(v, wide), wide))(vector))
    np.testing.assert_allclose(score[-2:], gradient[-2:], rtol=2e-3)  # rates in float32


def test_score_holds_with_distorted_scans(problem, library):
    free = ("positions", "gain", "background", "image_shifts", "image_distortions")
    wide = make_problem(np.asarray(problem.counts), field(), library, SERIES, free)
    vector = jnp.asarray(to_vector(wide.start, wide)) + 0.02 * np.random.default_rng(0).uniform(size=len(to_vector(wide.start, wide)))
    fisher, score = fisher_and_score(from_vector(vector, wide), wide)
    gradient = np.asarray(jax.grad(lambda v: log_likelihood(from_vector(v, wide), wide))(vector))
    np.testing.assert_allclose(score, gradient, atol=2e-4 * abs(gradient).max())  # rates in float32
    assert len(fisher) == len(vector) == 3 * 3 + 8 * len(DEFOCUS)


def film(tilt):
    """The field on a support film thicker towards one side and in one corner: background b (1 + tilt x + tilt x y / 2), no exponential of a polynomial."""
    y, x = np.linspace(-1, 1, 30)[:, None], np.linspace(-1, 1, 34)
    return 9612 * 0.16 * 4e-3 * (1 + tilt * x + tilt * x * y / 2)


def test_score_holds_with_a_smooth_background(problem, library):
    free = ("positions", "gain", "background", "smooth_background", "image_shifts", "focus_step")
    wide = make_problem(np.asarray(problem.counts), field(), library, SERIES, free)
    vector = jnp.asarray(to_vector(wide.start, wide)) + 0.1 * np.random.default_rng(0).uniform(size=len(to_vector(wide.start, wide)))
    fisher, score = fisher_and_score(from_vector(vector, wide), wide)
    gradient = np.asarray(jax.grad(lambda v: log_likelihood(from_vector(v, wide), wide))(vector))
    np.testing.assert_allclose(score, gradient, atol=2e-4 * abs(gradient).max())  # rates in float32
    assert len(fisher) == len(vector) == 3 * 3 + 9 * len(DEFOCUS) + 1


def test_a_smooth_background_takes_up_a_support_film_that_a_constant_one_does_not(library):
    lit = eqx.tree_at(lambda f: f.background, field(), np.full(len(DEFOCUS), 0.0))
    mean = np.asarray(expected_counts(lit, library, SERIES), float) + film(0.3)
    counts = np.random.default_rng(4).poisson(mean)
    free = ("positions", "background", "gain", "image_shifts")
    start = eqx.tree_at(lambda f: f.background, field(), np.full(len(DEFOCUS), 4e-3))
    fits = {}
    for words in (free, (*free, "smooth_background")):
        posed = make_problem(counts, start, library, SERIES, words)
        estimate = maximum(posed)
        assert estimate.converged
        fits[words] = estimate
        rate = rates(estimate.parameters, posed)
        quality = goodness_of_fit(estimate.parameters, posed, rate)
    constant, smooth = fits.values()
    tree = to_arviz(infer(posed, "laplace", samples=5, chains=1, estimate=smooth), posed)
    assert tree["posterior"]["background_xy"].dims == ("chain", "draw", "image")
    assert smooth.log_posterior > constant.log_posterior + 500
    assert np.all(abs(quality) < 5)
    assert np.all(abs(np.asarray(smooth.parameters["depth"]) - field().depths) < 4 * smooth.sd("depth"))
    background = rate - np.asarray(expected_counts(eqx.tree_at(lambda f: f.background, field_of(smooth.parameters, posed.n_atoms), np.zeros(len(DEFOCUS))), library, SERIES))
    # log(1 + t) past second order, t to 0.45 in a corner, is 3 %; the rest is noise
    np.testing.assert_allclose(background.mean(0), film(0.3), rtol=0.1)


def test_source_size_is_recovered(library):
    true = 0.02  # A^2
    mean = np.asarray(expected_counts(eqx.tree_at(lambda f: f.source_variance, field(), true), library, SERIES), float)
    counts = np.random.default_rng(3).poisson(mean)
    estimate = maximum(make_problem(counts, field(), library, SERIES, ("positions", "gain", "background", "source_size")))
    found, sd = float(estimate.parameters["source_variance"]), float(estimate.sd("source_variance")[0])
    assert estimate.converged
    assert sd < true / 4
    assert abs(found - true) < 4 * sd


def test_read_noise_costs_what_a_known_background_of_its_variance_costs(problem, library):
    variance = 0.5
    noisy = make_problem(np.asarray(problem.counts), field(), library, SERIES, ("positions",), read_variance=variance)
    lit = eqx.tree_at(lambda f: f.background, field(), field().background + variance / (9612.0 * 0.16))
    background = make_problem(np.asarray(problem.counts), lit, library, SERIES, ("positions",))
    np.testing.assert_allclose(depth_bounds(fisher_and_score(noisy.start, noisy)[0], noisy), depth_bounds(fisher_and_score(background.start, background)[0], background), rtol=1e-5)


@pytest.mark.parametrize("read_noise", [0.2, 0.8])
def test_fit_under_read_noise_is_unbiased(library, read_noise):
    # most pixels hold no electron, so at 0.2 e half of them are negative: clipping those would raise the background many sd
    rng = np.random.default_rng(5)
    mean = np.asarray(expected_counts(field(), library, SERIES), float)
    counts = rng.poisson(mean) + rng.normal(0, read_noise, mean.shape)
    problem = make_problem(counts, field(), library, SERIES, ("positions", "background", "gain"), read_variance=read_noise**2)
    estimate = maximum(problem)
    assert estimate.converged
    pull = (np.asarray(estimate.parameters["depth"]) - field().depths) / estimate.sd("depth")
    assert np.all(abs(pull) < 4)
    assert np.all(abs(goodness_of_fit(estimate.parameters, problem, rates(estimate.parameters, problem))) < 5)
    truth = make_problem(counts, field(), library, SERIES, ("background",), read_variance=read_noise**2)
    fisher, score = fisher_and_score(truth.start, truth)
    information, score = np.diag(fisher)[3:], score[3:]
    assert abs(score.sum()) < 4 * np.sqrt(information.sum())  # at the truth the score is noise of variance = information


def test_double_dose_doubles_the_information(problem, library):
    doubled = FocalSeries(DEFOCUS, 0.4, 2 * SERIES.dose, (30, 34), False)
    more = make_problem(np.asarray(problem.counts), field(), library, doubled)
    a, b = depth_bounds(fisher_and_score(problem.start, problem)[0], problem), depth_bounds(fisher_and_score(more.start, more)[0], more)
    np.testing.assert_allclose(a / b, np.sqrt(2), rtol=1e-4)


def test_joint_fit_recovers_depths_and_counts_within_its_error_bars(problem, library):
    estimate = maximum(problem)
    assert estimate.converged
    pull = (np.asarray(estimate.parameters["depth"]) - field().depths) / estimate.sd("depth")
    assert np.all(abs(pull) < 4.0)  # three columns: false alarm 2e-4
    amplitude, sd, _ = column_amplitudes(estimate.parameters, problem)
    assert np.all(abs(amplitude - 1) < 4 * sd + 0.01)
    assert np.all(abs(goodness_of_fit(estimate.parameters, problem, rates(estimate.parameters, problem))) < 5)


def test_wrong_count_is_seen_in_amplitude_and_fit(library, problem):
    wrong = make_problem(np.asarray(problem.counts), Field(field().positions, np.array([5, 6, 3]), *[getattr(field(), k) for k in ("depths", "background", "gain", "image_shifts")]), library, SERIES)
    estimate = maximum(wrong)
    amplitude, sd, _ = column_amplitudes(estimate.parameters, wrong)
    assert amplitude[0] < 1 - 4 * sd[0]
    assert goodness_of_fit(estimate.parameters, wrong, rates(estimate.parameters, wrong))[0] > 3  # one in a thousand by chance


@pytest.mark.parametrize("reader", [likelihood, local])
def test_a_wrong_count_among_close_columns_shows_whole(library, reader):
    """Of 25 columns 2.04 Å apart one is taken an atom short, and one an atom more: what the fit then asks for is what their cross-sections lack, although depths and positions around have moved."""
    n = np.full(25, 11)
    wrong = n + 1 * (np.arange(25) == 6) - 1 * (np.arange(25) == 17)
    places = 2.04 * np.stack(np.mgrid[:5, :5], -1).reshape(-1, 2)
    series, images = FocalSeries(DEFOCUS, 0.4, np.full(len(DEFOCUS), 9612.0), (40, 40), False), len(DEFOCUS)
    of = lambda n: Field(places + 4.0, n, places.sum(1) % 4.08, np.full(images, 1e-3), np.ones(images), np.zeros((images, 2)))
    counts = np.asarray(expected_counts(of(n), library, series))
    problem = make_problem(counts, of(wrong), library, series, dense=reader is likelihood)
    parameters = reader.find_mode(problem, close=1e-3).parameters
    found = reader.column_amplitudes(parameters, problem).value * np.exp(np.asarray(parameters["log_gain"]).mean())
    lacks = library.cross_section[n - 1] / library.cross_section[wrong - 1]
    at = wrong != n
    assert abs((found - 1)[at] / (lacks - 1)[at] - 1).max() < 0.1  # 0.80 if the column as it is is scaled and nothing moves
    assert abs(found - 1)[~at].max() < 0.03 * abs(lacks - 1).max()


def test_sampler_agrees_with_laplace(problem):
    estimate = maximum(problem)
    result = infer(problem, "nuts", jax.random.key(3), samples=150, chains=1, warmup=60, estimate=estimate, progress_bar=False)
    assert result.diagnostics["divergences"] == 0
    draws = result.of("depth").reshape(-1, 3)
    sd = estimate.sd("depth")
    assert np.all(abs(draws.mean(0) - np.asarray(estimate.parameters["depth"])) < 0.5 * sd)
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.35)  # 150 correlated draws
    tree = to_arviz(result, problem)
    assert tree["posterior"]["depth"].dims == ("chain", "draw", "column")


def test_gaussian_peak_finds_an_isolated_column(library):
    one = Field(np.array([[6.0, 6.0]]), np.array([8]), np.array([5.0]), np.full(len(DEFOCUS), 1e-4), np.ones(len(DEFOCUS)), np.zeros((len(DEFOCUS), 2)))
    fraction = np.asarray(expected_counts(one, library, SERIES)) / (9612 * 0.16)
    fit = fit_gaussian_peaks(fraction, one.positions, one.n_atoms, library, SERIES, one.image_shifts, radius=0.6)
    # no noise: what is left is the pixels of the disc, 0.4 Å against the correction's 0.1 Å
    assert fit.depth[0] == pytest.approx(5.0, abs=0.5)
    assert abs(fit.correction[0]) > 0.5  # the peak is not the centre of mass
    for order in (slice(None, None, -1), np.random.default_rng(0).permutation(len(DEFOCUS))):
        series = dataclasses.replace(SERIES, defocus=np.asarray(SERIES.defocus)[order])
        again = fit_gaussian_peaks(fraction[order], one.positions, one.n_atoms, library, series, one.image_shifts, radius=0.6)
        assert again.depth[0] == pytest.approx(fit.depth[0], abs=1e-3)  # the fit stops there


def test_a_free_focus_offset_leaves_differences_of_depth(library):
    """Against explicit inversion with the offset among the parameters: the bound of d_i - mean(d) is the same whatever holds the gauge."""
    free = ("positions", "background", "gain")
    mean = np.zeros((len(DEFOCUS), *SERIES.shape))
    problem = make_problem(mean, field(), library, SERIES, (*free, "focus_offset"))
    fisher = fisher_and_score(problem.start, problem)[0]
    held = fisher + np.diag(np.where(np.arange(len(fisher)) == len(fisher) - 1, 1e4, 0))  # offset known to 0.01 Å, no matter
    covariance = np.linalg.inv(held)[:3, :3]
    differ = np.eye(3) - 1 / 3
    expected = np.sqrt(np.diag(differ @ covariance @ differ))
    np.testing.assert_allclose(crlb(field(), library, SERIES, (*free, "focus_offset")), expected, rtol=1e-5)
    assert np.all(expected < 1.0)
    with pytest.raises(InputError, match="focus offset"):
        crlb(Field(np.array([[5.0, 5.0]]), np.array([4]), np.zeros(1), np.full(len(DEFOCUS), 1e-4), np.ones(len(DEFOCUS)), np.zeros((len(DEFOCUS), 2))), library, SERIES, ("focus_offset",))


def test_relative_depths_have_the_same_sd_by_both_solvers(library):
    foci = np.concatenate([np.linspace(-80, -64, 10), np.linspace(64, 80, 9)])  # windows of one size, which compile sooner
    series = dataclasses.replace(SERIES, defocus=foci)
    mean = np.asarray(expected_counts(field(), library, series), float)
    problem = make_problem(np.random.default_rng(1).poisson(mean), field(), library, series)
    dense, sparse = maximum(problem), local.maximum(problem)
    np.testing.assert_allclose(depth_sd(dense, problem, True), local.depth_sd(sparse, problem, True), rtol=0.01)
    np.testing.assert_allclose(column_bounds(dense, problem, True), local.column_bounds(sparse, problem, True), rtol=0.01)


def test_a_prior_set_by_the_user_adds_its_information_and_pulls_to_its_centre(library, problem):
    at = np.array([-5.0, 2.5, 9.0])
    centre = dict(problem.centre, depth=jnp.asarray(at))
    told = make_problem(problem.counts, field(), library, SERIES, prior_sd={"depth": 0.5}, centre=centre)
    wide, narrow = maximum(problem), maximum(told)
    # of normal information the precisions add, and the mean is weighted by them: neighbours' depths included
    inside = [i for i, (name, _) in enumerate(wide.names) if name == "depth"]
    covariance = (wide.factor @ wide.factor.T)[np.ix_(inside, inside)]
    precision = np.linalg.inv(covariance) - np.eye(3) / 100.0**2
    expected = np.linalg.inv(precision + np.eye(3) / 0.5**2)
    np.testing.assert_allclose(narrow.sd("depth"), np.sqrt(np.diag(expected)), rtol=0.02)
    mean = expected @ (precision @ np.asarray(wide.parameters["depth"]) + at / 0.5**2)
    np.testing.assert_allclose(narrow.parameters["depth"], mean, atol=0.1 * narrow.sd("depth").min())
