"""Counting by mixture, library and their hybrid: against truth, the best possible rule, and StatSTEM's stored mixtures."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat
from scipy.stats import norm

from depthprob.reconstruction.counting import (
    Components,
    count_by_hybrid,
    count_by_library,
    expected_confusion,
    gaussian_mixture_counts,
    integrated_classification_likelihood,
)

STATSTEM = Path(__file__).parents[2] / "shared" / "data" / "statstem" / "ExamplePtIr.mat"
GOLD = np.array([0.0147, 0.0318, 0.0521, 0.0759, 0.101, 0.1253, 0.1485, 0.1707, 0.1923, 0.2136, 0.2349, 0.256])  # Å², of 1 to 12 atoms
WIDTH = 0.003


def simulated(dose, seed, columns=80):
    """Cross-sections [Å²] of columns of unequal shares with Poisson's noise and a width of their own; and what the best rule, knowing all but n, gets right."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(12))
    scale = np.exp(rng.normal(0, 0.05))
    n = rng.choice(12, columns, p=shares) + 1
    sd = np.sqrt(WIDTH**2 + scale * GOLD / dose)
    x = scale * GOLD[n - 1] + sd[n - 1] * rng.standard_normal(columns)
    best = (shares * norm.pdf(x[:, None], scale * GOLD, sd)).argmax(1) + 1
    return x, n, np.mean(best == n)


@pytest.mark.parametrize("dose", [1e2, 1e3, 1e4])
def test_confusion_of_the_hybrid_is_what_it_says_at_every_dose(dose):
    """Four standard errors of the mean over fields: false alarms of 1 in 10,000, were the model exact."""
    fields, wrong, stated = 24, [], []
    for seed in range(fields):
        x, n, _ = simulated(dose, seed)
        counts = count_by_hybrid(x, GOLD, dose)
        confusion = expected_confusion(counts.n, counts.probability)
        assert confusion.sum() == pytest.approx(len(n))
        np.testing.assert_allclose(confusion.sum(1), np.bincount(counts.n, minlength=13)[1:], atol=1e-9)
        wrong.append(np.mean(counts.n != n))
        stated.append(1 - np.trace(confusion) / len(n))
    difference = np.subtract(stated, wrong)
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(fields)


def test_the_hybrid_counts_almost_as_well_as_whoever_knows_shares_scale_and_width():
    right, best = np.mean([(np.mean(count_by_hybrid(x, GOLD, 1e4).n == n), known) for x, n, known in (simulated(1e4, seed, 300) for seed in range(6))], axis=0)
    assert right > best - 0.02


def test_the_hybrid_finds_the_scale_of_an_experiment_and_the_spread_that_is_not_poissons():
    x, n, _ = simulated(1e4, 3, 600)
    counts = count_by_hybrid(1.04 * x, GOLD, 1e4)
    scale = np.median(1.04 * x / GOLD[n - 1])
    assert counts.scale == pytest.approx(scale, abs=0.005)  # the grid of factors
    assert counts.components.width == pytest.approx(1.04 * WIDTH, rel=0.15)


@pytest.mark.parametrize("brighter", [1.0, 1.0004, 1.0013, 1.0031, 1.07])
def test_the_librarys_scale_follows_the_columns_smoothly(brighter):
    """Not from one tried factor, 0.25 % apart, to the next, at which hundreds of columns of a large field change their counts; and where no higher one was tried."""
    rng = np.random.default_rng(3)
    n = rng.choice(12, 3000) + 1
    x = GOLD[n - 1] * (1 + 0.01 * rng.standard_normal(3000))
    scale = [count_by_library(factor * x, factor * 0.01 * x, GOLD, scale_sd=0.05).scale for factor in (1.0, brighter)]
    assert scale[0] == pytest.approx(1.0, abs=0.001)  # 0.01 / 3000^(1/2) = 0.0002
    assert scale[1] / scale[0] == pytest.approx(brighter, abs=3e-4 + 2e-3 * (brighter > 1.05))  # the prior holds back


def test_the_hybrid_counts_columns_that_make_one_broad_hill():
    """Where no mixture sees components, the library still tells how many atoms most columns hold."""
    rng = np.random.default_rng(0)
    n = np.minimum(rng.poisson(4, 200) + 1, 12)
    x = GOLD[n - 1] + rng.normal(0, 0.009, 200)
    assert gaussian_mixture_counts(x, 12).components < len(np.unique(n)) - 2
    counts = count_by_hybrid(x, GOLD)
    assert np.mean(counts.n == n) > 0.7 and np.mean(abs(counts.n - n) <= 1) > 0.98


def test_widths_grow_with_the_dose_given_as_the_columns_scatter():
    rng = np.random.default_rng(1)
    n = rng.integers(1, 5, 3000)
    dose = 4000.0
    truth = np.sqrt(0.002**2 + 0.03 * np.arange(1, 5) / dose)
    x = 0.03 * n + truth[n - 1] * rng.standard_normal(3000)
    mixture = gaussian_mixture_counts(x, 6, dose)
    assert mixture.components == 4
    fit = mixture.fits[3]
    error = 1 / np.sqrt(2 * 3000 / 4)  # of a sample's standard deviation
    np.testing.assert_allclose(fit.widths, truth, rtol=4 * error)
    assert fit.log_likelihood == pytest.approx(np.log(norm.pdf(x[:, None], fit.means, fit.widths) @ fit.weights).sum(), abs=1e-6)
    assert fit.log_likelihood > gaussian_mixture_counts(x, 4).fits[3].log_likelihood


def test_a_confusion_of_certain_counts_is_diagonal():
    probability = np.eye(5)[[0, 1, 1, 4]]
    np.testing.assert_array_equal(expected_confusion(np.array([1, 2, 2, 5]), probability), np.diag([1, 2, 0, 0, 1]))


@pytest.mark.skipif(not STATSTEM.exists(), reason="ExamplePtIr.mat is not at hand")
def test_mixtures_are_as_likely_as_statstems_and_the_criterion_is_its_own():
    stored = loadmat(STATSTEM, struct_as_record=False, squeeze_me=True)["atomcounting"]
    theirs = [
        Components(np.atleast_1d(e.mu), np.atleast_1d(e.PComponents), float(np.sqrt(e.Sigma)), np.inf, -value)
        for e, value in zip(stored.estimatedDistributions, stored.mLogLik, strict=True)
    ]
    np.testing.assert_allclose([integrated_classification_likelihood(stored.volumes, fit) for fit in theirs], stored.ICL, rtol=1e-10)
    ours = gaussian_mixture_counts(stored.volumes, 20)
    behind = np.array([a.log_likelihood - b.log_likelihood for a, b in zip(theirs, ours.fits, strict=True)])
    assert behind[:11].max() < 0.05 and behind.max() < 1.1  # its best of many more starts
    by_ten = ours.fits[9]
    np.testing.assert_allclose(by_ten.means, stored.estimatedLocations, atol=5e-4)
    np.testing.assert_allclose(by_ten.width, stored.estimatedWidth, rtol=0.02)


def test_curves_over_the_histogram_hold_as_many_columns_as_its_bars():
    from matplotlib.figure import Figure

    from depthprob.plotting import plot_cross_sections

    x, _, _ = simulated(1e4, 1)
    ax = Figure().subplots()
    plot_cross_sections(ax, x, GOLD, count_by_hybrid(x, GOLD, 1e4).components)
    total = next(line for line in ax.lines if line.get_label() == "fitted mixture")
    bars = sum(bar.get_height() * bar.get_width() for bar in ax.patches)
    assert np.trapezoid(total.get_ydata(), total.get_xdata()) == pytest.approx(bars, rel=0.02)  # tails beyond the axis


def test_thousands_of_columns_taken_together_in_bins_are_fitted_as_each_for_itself(monkeypatch):
    rng = np.random.default_rng(3)
    n = rng.choice([3, 4, 5, 6], 3000, p=[0.1, 0.4, 0.3, 0.2])
    cross_section = 0.02 * n * (1 + 0.04 * rng.normal(size=len(n)))
    together = gaussian_mixture_counts(cross_section, 5)
    monkeypatch.setattr("depthprob.reconstruction.counting.BINS", len(n))
    alone = gaussian_mixture_counts(cross_section, 5)
    assert np.array_equal(together.n, alone.n) and together.components == alone.components == 4
    assert np.allclose(together.icl, alone.icl, atol=0.5)
