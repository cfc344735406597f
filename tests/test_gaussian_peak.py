"""Gaussians through focus: against scipy, to a small part of their error bars."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from depthprob.inference.gaussian_peak import fit_gaussians

DEFOCUS = np.concatenate([np.arange(-200.0, 0.0, 10.0), np.arange(0.0, 201.0, 15.0)])


def bell(f, amplitude, peak, width, background):
    return amplitude * np.exp(-(((f - peak) / width) ** 2) / 2) + background


def rows(count, noise):
    rng = np.random.default_rng(4)
    truth = np.stack([rng.uniform(20, 100, count), rng.uniform(-120, 120, count), rng.uniform(30, 90, count), rng.uniform(0, 30, count)], 1)
    return np.array([bell(DEFOCUS, *t) for t in truth]) + rng.normal(0, noise, (count, len(DEFOCUS))), truth


def test_parameters_and_covariances_are_those_of_scipy():
    intensity, truth = rows(30, 2.0)
    found, covariance = fit_gaussians(DEFOCUS, intensity)
    for row, start, own, spread in zip(intensity, truth, found, covariance, strict=True):
        best, theirs = curve_fit(bell, DEFOCUS, row, start, xtol=1e-13, ftol=1e-13, gtol=1e-13)
        sd = np.sqrt(np.diag(theirs))
        assert np.all(abs(own - best) < 1e-3 * sd)  # the last step is to gain less than 1e-7 of what is left
        np.testing.assert_allclose(spread / np.outer(sd, sd), theirs / np.outer(sd, sd), atol=1e-3)


def test_a_gaussian_without_noise_is_found_as_it_is():
    intensity, truth = rows(50, 0.0)
    np.testing.assert_allclose(fit_gaussians(DEFOCUS, intensity)[0], truth, rtol=1e-6)


def test_rows_are_fitted_one_by_one_however_many_together():
    intensity, _ = rows(50, 2.0)
    alone = fit_gaussians(DEFOCUS, intensity, together=1)
    for one, all_at_once in zip(alone, fit_gaussians(DEFOCUS, intensity), strict=True):
        np.testing.assert_allclose(one, all_at_once, rtol=1e-6)


@pytest.mark.parametrize("intensity", [np.full((2, len(DEFOCUS)), 3.0), np.eye(len(DEFOCUS)), -rows(5, 0.1)[0]], ids=["flat", "spikes", "dark"])
def test_what_is_no_peak_gives_numbers_all_the_same(intensity):
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        assert all(np.isfinite(a).all() for a in fit_gaussians(DEFOCUS, intensity))
