"""Depths under uncertain counts, against whole fits with the wrong count."""

import dataclasses

import numpy as np
import pytest

from depthprob.inference.counts import REACH, depth_shifts, growth, marginal_draws, mean_square_shift
from depthprob.inference.likelihood import maximum
from depthprob.inference.problem import make_problem
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts

DEFOCUS = np.arange(-160.0, 161.0, 20.0)


pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(scope="module")
def shifts(library):
    return depth_shifts(library, DEFOCUS, np.full(len(DEFOCUS), 9612.0), np.full(len(DEFOCUS), 1e-3))


def test_shifts_are_those_of_a_joint_fit_with_the_wrong_count(library, shifts):
    n = np.array([6, 9, 4, 7])
    positions = np.array([[8.0, 8.0], [8.0, 12.08], [12.08, 8.0], [12.08, 12.08]])
    images = len(DEFOCUS)
    field = Field(positions, n, np.array([0.0, 3.0, -4.0, 1.0]), np.full(images, 1e-3), np.ones(images), np.zeros((images, 2)))
    series = FocalSeries(DEFOCUS, 0.4, np.full(images, 9612.0), (50, 50), False)
    counts = np.asarray(expected_counts(field, library, series))
    fit = lambda numbers: np.asarray(maximum(make_problem(counts, dataclasses.replace(field, n_atoms=numbers), library, series, ("positions",))).parameters["depth"])
    right = fit(n)
    np.testing.assert_allclose(right, field.depths, atol=0.02)
    for change in (-1, 1):
        wrong = fit(n + np.array([change, 0, 0, 0]))
        np.testing.assert_allclose(wrong[0] - right[0], shifts[5, REACH + change], atol=0.15)


def test_growth_is_the_difference_between_columns_an_atom_apart(library):
    grown, z, along = growth(library), np.array([-70.0, -3.0, 40.0]), np.arange(-3, 4) * 0.5
    images = lambda of, n: of.series(n, z, along, along)
    peak = images(library, 12).max()
    sigma = library.cross_section
    for n in (1, 2, 7, 12):
        more, less = min(n + 1, 12), n - 1
        change = images(library, more) - (images(library, less) if less else 0.0)
        expected = change * sigma[n - 1] / (sigma[more - 1] - (sigma[less - 1] if less else 0.0))
        np.testing.assert_allclose(images(grown, n), expected, atol=1e-3 * peak)


def test_the_same_count_moves_nothing_and_ends_are_unknown(library, shifts):
    np.testing.assert_allclose(shifts[:, REACH], 0, atol=1e-6)
    assert np.isnan(shifts[0, :REACH]).all() and np.isnan(shifts[-1, REACH + 1 :]).all()
    assert np.isfinite(shifts).sum() == library.n_max * 5 - 6


def test_draws_have_the_mixtures_mean_and_variance(shifts):
    rng = np.random.default_rng(0)
    n = np.array([6, 6])
    probability = np.zeros((2, 12))
    probability[0, 5] = 1
    probability[1, 5:7] = 0.6, 0.4
    draws = marginal_draws(rng.normal(0, 0.5, (200_000, 2)), n, probability, shifts[n - 1], rng)
    move = shifts[5, REACH + 1]
    np.testing.assert_allclose(draws.mean(0), [0, 0.4 * move], atol=0.01)
    np.testing.assert_allclose(draws.var(0), [0.25, 0.25 + 0.24 * move**2], rtol=0.02)
    np.testing.assert_allclose(mean_square_shift(n, probability, shifts[n - 1]), [0, 0.4 * move**2])


def test_a_depth_far_from_all_foci_is_not_moved_by_its_count(library):
    images = len(DEFOCUS)
    unseen = depth_shifts(library, DEFOCUS, np.full(images, 9612.0), np.full(images, 1e-3), depth=-1000.0)
    certain, doubtful = np.eye(library.n_max)[[4]], np.full((1, library.n_max), 1 / library.n_max)
    for probability in (certain, doubtful):
        draws = marginal_draws(np.zeros((20, 1)), np.array([5]), probability, unseen[[4]], np.random.default_rng(0))
        assert np.all(np.isfinite(draws))
    assert np.all(unseen[:, REACH] == 0)
