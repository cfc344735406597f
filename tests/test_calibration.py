"""Posteriors' error bars: calibration by simulation for every method, and what it catches; the samplers behind them."""

import arviz as az
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpyro.diagnostics import effective_sample_size
from scipy.stats import poisson

from depthprob.inference.calibration import calibrate, draw_truth, uniformity
from depthprob.inference.goodness import dispersion_of, goodness_of_fit, over_dispersed
from depthprob.inference.likelihood import column_bounds, find_mode, maximum, rates
from depthprob.inference.posterior import infer, to_arviz
from depthprob.inference.problem import field_of, from_vector, make_problem, prior_precision, to_vector
from depthprob.inference.sampling import WARMUP, Whitened, best_normal, nuts
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts
from depthprob.plotting import plot_ranks

pytestmark = pytest.mark.usefixtures("double_precision")

NUISANCES = ("positions", "background", "gain", "image_shifts")
PRIOR_SD = {"depth": 8.0, "x": 0.1, "y": 0.1, "log_gain": 0.03, "log_background": 0.3, "shift_x": 0.2, "shift_y": 0.2}
RARELY = 1e-4  # share of right posteriors that the checks below may reject, each; keys are fixed


def problem_of(library, images=7, dose=9612.0, **options):
    """Four columns of a periodic crystal, 2.9 Å apart and overlapping, everything free."""
    series = FocalSeries(np.linspace(-150, 150, images), 0.34, np.full(images, dose), (24, 12), True)
    positions = np.array([[0.0, 0.0], [2.04, 2.04], [0.0, 4.08], [2.04, 6.12]]) + 0.7
    field = Field(positions, np.array([4, 7, 5, 9]), np.zeros(4), np.full(images, 2e-3), np.ones(images), np.zeros((images, 2)))
    return make_problem(np.zeros((images, 24, 12)), field, library, series, NUISANCES, prior_sd=PRIOR_SD, **options)


@pytest.fixture(scope="module")
def problem(library):
    return problem_of(library)


def sampled(problem, key):
    """The problem with a Poisson series of a truth from its prior."""
    truth = draw_truth(jax.random.key(key), problem)
    rate = np.maximum(np.asarray(expected_counts(field_of(truth, problem.n_atoms), problem.library, problem.series, problem.draw), float), 0)
    return eqx.tree_at(lambda p: p.counts, problem, jnp.asarray(np.random.default_rng(key).poisson(rate), jnp.float32))


def gain_of_four_forgotten(problem):
    """Four raw units an electron pass for four electrons: intervals half as wide as they should be."""
    return eqx.tree_at(lambda p: (p.counts, p.series.dose), problem, (4 * problem.counts, 4 * problem.series.dose))


def test_the_check_rejects_no_more_right_posteriors_than_it_says():
    rng = np.random.default_rng(0)
    p = np.array([uniformity(rng.uniform(size=(12, 4))) for _ in range(500)])
    for alpha in (0.2, 0.05, 0.01):
        assert np.mean(p < alpha) < alpha + 3.5 * np.sqrt(alpha * (1 - alpha) / 500)


@pytest.mark.parametrize(("method", "fits"), [("laplace", 30), ("svi", 12), ("nuts", 12)])
def test_ranks_of_the_truth_are_uniform_with_all_nuisances_free(problem, method, fits):
    found = calibrate(problem, method, jax.random.key(5), fits, draws=49)
    assert found.failed == 0
    for name in problem.free:
        assert uniformity(found.places[name]) > RARELY, name
    for level in (0.5, 0.8, 0.95):
        share, error = found.coverage("depth", level)
        assert abs(share - level) < 4 * max(error, np.sqrt(level * (1 - level) / (4 * fits)))


@pytest.mark.parametrize(("method", "fits"), [("laplace", 30), pytest.param("nuts", 20, marks=pytest.mark.slow)])
def test_an_overconfident_model_is_caught_by_the_same_check(problem, method, fits):
    found = calibrate(problem, method, jax.random.key(6), fits, draws=49, mistake=gain_of_four_forgotten)
    assert uniformity(found.places["depth"]) < 1e-3
    assert found.coverage("depth", 0.95)[0] < 0.85


@pytest.mark.slow
@pytest.mark.parametrize("dose", [9612.0, 1000.0])
@pytest.mark.parametrize("method", ["laplace", "svi", "nuts"])
def test_intervals_cover_at_their_rate_within_binomial_error(library, method, dose):
    fits = {"laplace": 1000, "svi": 200, "nuts": 200}[method]
    found = calibrate(problem_of(library, 9, dose), method, jax.random.key(7), fits)
    assert found.failed <= fits // 50
    for name, places in found.places.items():
        if (method, name) == ("laplace", "log_background"):  # a normal at the mode of a skew density: its mean is 0.07 sd from there
            assert abs(places.mean() - 0.5) < 0.04
        else:
            assert uniformity(places) > RARELY, name
    for level in (0.5, 0.8, 0.95):
        share, error = found.coverage("depth", level)
        assert abs(share - level) < 3.5 * max(error, np.sqrt(level * (1 - level) / (4 * fits)))


def noise_inferred(problem):
    return over_dispersed(problem, rates(find_mode(problem).parameters, problem))


def test_inferred_dispersion_widens_error_bars_of_poisson_counts_by_no_more_than_its_own_error(problem):
    for key in range(2):
        own = sampled(problem, key)
        estimate = maximum(own)
        value, sd = dispersion_of(own, rates(estimate.parameters, own))
        assert abs(value - 1) < 4 * sd < 0.2
        growth = maximum(noise_inferred(own)).sd("depth") / estimate.sd("depth") - 1
        assert np.all(growth < 4 * sd / 2) and np.all(growth > -1e-3)  # a root of the dispersion, which is never below one


def test_inferred_dispersion_makes_twice_the_variance_covered_and_without_it_is_caught(problem):
    held = calibrate(problem, "laplace", jax.random.key(8), 30, draws=49, overdispersion=2.0, mistake=noise_inferred)
    for name in problem.free:
        assert uniformity(held.places[name]) > RARELY, name
    share, error = held.coverage("depth", 0.8)
    assert abs(share - 0.8) < 4 * error
    assert uniformity(calibrate(problem, "laplace", jax.random.key(8), 30, draws=49, overdispersion=2.0).places["depth"]) < 1e-3


def test_dispersion_of_poisson_counts_is_one_with_read_noise_masks_and_a_vacuum_of_wrong_rate(problem):
    rng = np.random.default_rng(2)
    rate = np.full((7, 24, 12), 30.0)
    rate[:, 12:] = 0.1
    counts = rng.poisson(rate) + rng.normal(0, 2.0, rate.shape)
    mask = np.ones(rate.shape, bool)
    mask[:, 3] = False
    counts[:, 3] = 1e4
    posed = eqx.tree_at(lambda p: (p.counts, p.mask, p.read_variance), problem, (jnp.asarray(counts), jnp.asarray(mask), jnp.asarray(4.0)))
    value, sd = dispersion_of(posed, rate)
    assert abs(value - 1) < 4 * sd + 0.05  # its correction for the problem's 40 parameters, none of them fitted here
    vacuum = eqx.tree_at(lambda p: p.counts, problem, jnp.asarray(rng.poisson(rate / 2) * (rate < 1) + rng.poisson(rate) * (rate > 1)))
    value, sd = dispersion_of(vacuum, rate)
    assert abs(value - 1) < 4 * sd + 0.05


def test_bounds_stay_those_of_poisson_counts_and_the_fit_of_twice_the_variance_is_good(problem):
    own = sampled(problem, 3)
    rate = np.asarray(rates(maximum(own).parameters, own))
    twice = eqx.tree_at(lambda p: p.counts, own, jnp.asarray(2 * np.random.default_rng(1).poisson(np.maximum(rate, 0) / 2), jnp.float32))
    plain, wide = maximum(twice), maximum(over_dispersed(twice, rate))
    inferred = over_dispersed(twice, rate)
    np.testing.assert_allclose(inferred.dispersion, 2.0, rtol=0.15)
    np.testing.assert_allclose(column_bounds(wide, inferred), column_bounds(plain, twice), rtol=0.01)
    expected = np.linalg.inv(plain.information / inferred.dispersion + prior_precision(twice))  # priors do not widen with the noise
    np.testing.assert_allclose(wide.sd("depth"), np.sqrt(np.diag(expected))[:4], rtol=0.01)
    assert np.all(goodness_of_fit(plain.parameters, twice, rates(plain.parameters, twice)) > 5)
    assert np.all(abs(goodness_of_fit(wide.parameters, inferred, rates(wide.parameters, inferred))) < 4)


def test_an_improper_prior_cannot_be_drawn_from(library, problem):
    improper = eqx.tree_at(lambda p: p.prior_sd, problem, {k: v for k, v in PRIOR_SD.items() if k != "log_background"})
    with pytest.raises(ValueError, match="log_background"):
        draw_truth(jax.random.key(0), improper)


def test_the_best_normal_is_found_again_from_a_wrong_start(problem):
    """Twice too wide and a standard deviation off, it comes back to where Fisher's matrix has it: at this dose the posterior is nearly normal."""
    own = sampled(problem, 1)
    estimate = maximum(own)
    mode, factor = to_vector(estimate.parameters, own), estimate.factor
    z = np.where(np.arange(len(mode)) % 2, 0.5, -0.5)
    target = Whitened(own, jnp.asarray(mode + 2 * factor @ z), jnp.asarray(2 * factor))
    mean, shape, told = best_normal(target, jax.random.key(0))
    assert told["svi_converged"]
    assert np.all(abs(2 * (mean + z)) < 0.25)  # the mean is not the mode, where the posterior leans
    np.testing.assert_allclose(2 * np.sqrt((shape**2).sum(1)), 1.0, rtol=0.08)
    correlation = 4 * shape @ shape.T
    assert abs(correlation - np.eye(len(mode))).max() < 0.15


def test_svi_and_nuts_agree_in_mean_and_spread(problem):
    own = sampled(problem, 2)
    estimate = maximum(own)
    normal = infer(own, "svi", jax.random.key(1), 2000, 1, estimate=estimate, progress_bar=False)
    chain = infer(own, "nuts", jax.random.key(2), 600, 2, estimate=estimate, progress_bar=False)
    assert normal.diagnostics["converged"] and chain.diagnostics["divergences"] == 0
    a, b = (np.linalg.solve(estimate.factor, r.draws.reshape(-1, len(estimate.names)).T) for r in (normal, chain))
    squares = (b - b.mean(1)[:, None]) ** 2  # these mix more slowly than the draws
    effective = effective_sample_size(squares.T.reshape(chain.draws.shape))
    assert np.all(abs(a.mean(1) - b.mean(1)) < 5 * np.sqrt(1 / 2000 + 1 / effective))
    assert np.all(abs(a.std(1) / b.std(1) - 1) < 0.02 + 5 * np.sqrt((1 / 2000 + 1 / effective) / 2))  # 2 %: where the normal's fit stops


@pytest.mark.parametrize("size", [20, 300])
def test_every_chain_finds_its_step_within_the_default_warmup(size):
    normal = Whitened(None, jnp.zeros(size), jnp.eye(size), lambda theta, _: -theta @ theta / 2)
    accepted = nuts(normal, jax.random.key(0), 40, 6, WARMUP)[1]["acceptance_rate"].mean(1)
    assert (accepted > 0.5).all() and (accepted < 0.97).all()


class Interrupted(Exception):
    pass


def test_interrupted_sampling_ends_bit_by_bit_where_an_undisturbed_run_ends(problem, tmp_path):
    own = sampled(problem, 4)
    estimate = maximum(own)
    target = Whitened(own, jnp.asarray(to_vector(estimate.parameters, own)), jnp.asarray(estimate.factor))
    run = lambda **options: nuts(target, jax.random.key(9), 35, 2, 20, **options)
    whole, statistics, _ = run()

    def stop_after(blocks):
        def progress(items, **_):
            for k, item in enumerate(items):
                if k == blocks:
                    raise Interrupted
                yield item

        return progress

    path = tmp_path / "state.npz"
    for blocks, already in ((4, 0), (3, 4)):  # within the first chain; then in the second, of 6 blocks each
        with pytest.raises(Interrupted):
            run(checkpoint=path, progress=stop_after(blocks))
        with np.load(path) as saved:
            assert saved["done"].sum() == already + blocks
    resumed, again, told = run(checkpoint=path)
    assert told["resumed_at_draw"] == 70
    np.testing.assert_array_equal(resumed, whole)
    for name in statistics:
        np.testing.assert_array_equal(again[name], statistics[name])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", ["other key", "damaged"])
def test_a_state_of_another_run_or_a_damaged_one_is_not_gone_on_from(problem, tmp_path, fault):
    own = sampled(problem, 4)
    estimate = maximum(own)
    target = Whitened(own, jnp.asarray(to_vector(estimate.parameters, own)), jnp.asarray(estimate.factor))
    path = tmp_path / "state.npz"
    nuts(target, jax.random.key(9 + (fault == "other key")), 20, 1, 80, path)
    if fault == "damaged":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    draws, _, told = nuts(target, jax.random.key(9), 20, 1, 80, path)
    assert told["resumed_at_draw"] == 0
    np.testing.assert_array_equal(draws, nuts(target, jax.random.key(9), 20, 1, 80)[0])


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # four parameters belong to each image alone
def test_arviz_holds_the_log_likelihood_of_each_image_and_loo_reads_it(problem):
    own = sampled(problem, 5)
    posterior = infer(own, "laplace", jax.random.key(0), 80, 2, progress_bar=False)
    tree = to_arviz(posterior, own)
    each = tree["log_likelihood"]["mean_counts"]
    assert each.dims == ("chain", "draw", "image") and each.sizes["draw"] == 50  # a hundred of both chains
    assert tree["posterior"].sizes["draw"] == 80
    draw = int(each["draw"][7])
    assert draw > 7
    rate = np.asarray(expected_counts(field_of(from_vector(jnp.asarray(posterior.draws[1, draw]), own), own.n_atoms), own.library, own.series, own.draw), float)
    expected = poisson.logpmf(np.asarray(own.counts), np.maximum(rate, 1e-6)).sum((1, 2))
    np.testing.assert_allclose(each[1, 7], expected, rtol=1e-6)
    assert np.isfinite(float(az.loo(tree, reff=1.0).elpd_loo))


def test_predicted_counts_carry_read_noise_and_dispersion(problem):
    own = sampled(problem, 5)
    noisy = eqx.tree_at(lambda p: (p.read_variance, p.dispersion), own, (jnp.asarray(400.0), 3.0))
    estimate = maximum(own)
    spread = []
    for posed in (own, noisy):
        tree = to_arviz(infer(posed, "laplace", jax.random.key(0), 100, 1, estimate=estimate, progress_bar=False), posed)
        spread.append(tree["posterior_predictive"]["mean_counts"].values.var((0, 1)))
    mean = np.asarray(own.counts).mean((1, 2))
    pixels = 24 * 12
    added = (3 * (mean + 400) - mean) / pixels
    np.testing.assert_allclose((spread[1] - spread[0]).mean(), added.mean(), rtol=0.25)  # 700 variances' mean, sd 6 %, of added noise


def test_plotted_ranks_stand_beside_the_band_of_a_right_posterior():
    ax = Figure().subplots()
    plot_ranks(ax, np.arange(100).reshape(20, 5), 99)
    assert [bar.get_height() for bar in ax.patches[:10]] == [10] * 10
