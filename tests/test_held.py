"""Score tests of held settings: standard normal where all is right, the free fit's answer where not."""

import dataclasses

import equinox as eqx
import numpy as np
import pytest
from scipy.stats import chi2

from depthprob.config import Config
from depthprob.inference import local
from depthprob.inference.held import Asked, asked
from depthprob.inference.likelihood import maximum
from depthprob.inference.problem import make_problem
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts
from depthprob.reconstruction.quality import doubts_of_settings

pytestmark = pytest.mark.usefixtures("double_precision")

FOCI = np.linspace(-150, 150, 9)
FIELD = Field(
    np.array([[2.7, 0.7], [4.74, 2.74], [2.7, 4.78], [4.74, 6.82]]), np.array([4, 7, 5, 9]), np.array([-3.0, 1.0, 4.0, 0.0]), np.full(9, 2e-3), np.ones(9), np.zeros((9, 2))
)


def series(foci):
    return FocalSeries(foci, 0.34, np.full(len(foci), 9612.0), (24, 22), True)


def fitted(library, key, foci=FOCI, free=(), source_variance=0.0, dense=True, told=FOCI):
    """Counts of the field recorded at `foci` and with a wider source, fitted as if recorded at the foci `told`; with next to no priors, as the tests are without."""
    truth = dataclasses.replace(FIELD, source_variance=source_variance)
    counts = np.random.default_rng(key).poisson(np.asarray(expected_counts(truth, library, series(foci)), float))
    problem = make_problem(counts, FIELD, library, series(told), ("positions", "background", "gain", "image_shifts", *free), dense=dense, prior_sd={"log_background": 10.0})
    return (maximum if dense else local.maximum)(problem), problem


@pytest.mark.slow
def test_statistics_are_standard_normal_where_all_settings_are_right(library):
    results = [asked(*fitted(library, key), {}) for key in range(40)]
    for name in ("focus_step", "source_variance"):
        squares = sum(r[name].significance ** 2 for r in results)
        assert 1e-4 < chi2.sf(squares, 40) < 1 - 1e-4  # the share of right statistics that this rejects, twice


def test_a_library_of_another_setting_is_asked_as_the_setting_itself(library):
    estimate, problem = fitted(library, 2, source_variance=0.02)
    frequency = np.fft.fftfreq(library.images.shape[1], library.pixel)
    damping = np.exp(-2 * np.pi**2 * 1e-3 * (frequency[:, None] ** 2 + frequency**2))
    wider = eqx.tree_at(lambda l: l.images, library, np.fft.ifft2(np.fft.fft2(library.images) * damping).real.astype(np.float32))
    results = asked(estimate, problem, {"wider": (wider, 1e-3)})
    assert results["wider"].significance > 3
    assert results["wider"].change == pytest.approx(results["source_variance"].change, rel=0.02)
    np.testing.assert_allclose(results["wider"].depth_moves, results["source_variance"].depth_moves, atol=0.02)


@pytest.mark.parametrize("name, word, wrong", [("focus_step", "focus_step", {"foci": FOCI * 1.01}), ("source_variance", "source_size", {"source_variance": 0.004})])
def test_a_wrong_setting_is_asked_for_as_a_fit_that_frees_it_finds_it(library, name, word, wrong):
    held, problem = fitted(library, 3, **wrong)
    free, _ = fitted(library, 3, free=(word,), **wrong)
    result = asked(held, problem, {})[name]
    assert result.sd == pytest.approx(free.sd(name)[0], rel=0.05)
    assert result.change == pytest.approx(float(free.parameters[name] - held.parameters[name]), abs=0.3 * result.sd)
    moved = np.asarray(free.parameters["depth"] - held.parameters["depth"])
    np.testing.assert_allclose(result.depth_moves, moved, atol=0.1 * held.sd("depth").max())
    assert word not in asked(free, dataclasses.replace(problem, free=(*problem.free, name)), {})


def test_a_film_under_part_of_the_field_is_asked_for_as_a_fit_with_a_smooth_background_finds_it(library):
    told = series(FOCI)
    along = np.linspace(-1, 1, 22)
    film = 0.02 * np.exp(0.15 * along)  # fraction of the beam
    counts = np.asarray(expected_counts(dataclasses.replace(FIELD, background=np.zeros(9)), library, told), float) + film * float(np.ravel(told.dose)[0]) * told.pixel_size**2
    fit = lambda counts, *free: (problem := make_problem(counts, FIELD, library, told, ("positions", "background", "gain", "image_shifts", *free), prior_sd={"log_background": 10.0})) and (maximum(problem), problem)
    held, problem = fit(counts)  # free of noise, which would scatter over the smooth background of every image
    free, with_film = fit(np.asarray(problem.counts), "smooth_background")
    result = asked(held, problem, {})["background"]
    assert result.change == pytest.approx(0.15 * along.std(), abs=0.01) and result.significance > 10
    moved = np.asarray(free.parameters["depth"] - held.parameters["depth"])
    np.testing.assert_allclose(result.depth_moves, moved, atol=0.1 * held.sd("depth").max())
    assert "background" not in asked(free, with_film, {})
    even = [asked(*fitted(library, key), {})["background"].significance for key in range(4)]
    assert 1 < np.mean(even) < 3.5  # 2.1 +- 0.35
    (warning,) = doubts_of_settings({"background": result}, Config(), 0.5, 40.0)
    assert "a background that varies by 9 % over the field" in warning and 'inference.background = "smooth"' in warning


def test_large_fields_are_asked_the_same(library):
    far = np.array([-80.0, -76.0, -72.0, -68.0, 64.0, 68.0, 72.0, 76.0, 80.0])  # windows of one size, which compile sooner
    dense, windows = (asked(*fitted(library, 5, foci=far * 1.01, dense=d, told=far), {}) for d in (True, False))
    for name in dense:
        # windows leave out faint tails, which to a background are what it is asked of: 0.10 apart, 0.03 with windows to a seventh of that
        assert windows[name].significance == pytest.approx(dense[name].significance, abs=0.15 if name == "background" else 0.1)


def test_a_setting_that_the_fit_can_take_over_is_not_asked(library):
    estimate, problem = fitted(library, 1)
    brighter = eqx.tree_at(lambda l: l.images, library, library.images * 1.01)  # what the gains of all images do
    result = asked(estimate, problem, {"brightness": (brighter, 0.01)})["brightness"]
    assert np.isinf(result.sd) and not result.depth_moves.any()
    miscounted = eqx.tree_at(lambda l: l.coefficients, library, library.coefficients * (1 + 0.01 * np.arange(1, library.n_max + 1) ** 2)[:, None, None])
    assert asked(estimate, problem, {"counts": (miscounted, 0.01)})["counts"].sd > 0.1  # thick columns brighter, as by wrong counts: not known within 0.1 n^2 times


def test_the_warning_names_what_is_given_and_what_is_asked_strongest_first():
    moves = np.array([0.3, -0.6])
    tested = {
        "focus_step": Asked(-0.03, 0.001, moves),
        "convergence_angle": Asked(-0.2, 0.02, 2 * moves),
        "source_variance": Asked(0.01, 0.0001, moves / 100),  # certain, but depths do not care
        "spherical_aberration": Asked(1e3, 1e3, moves * 10),  # uncertain
        "focal_variance": Asked(-90.0, 1.0, moves),  # not possible
    }
    (warning,) = doubts_of_settings(tested, Config(), 0.5, 40.0)
    assert warning.startswith("The residuals ask for focus steps 0.970 ± 0.001 times those given (30 standard deviations; depths would move by up to 0.6 Å); or")
    assert "less well, for a convergence angle of 20.80 ± 0.02 mrad where 21 is given (10 standard deviations; depths would move by up to 1.2 Å)." in warning
    assert warning.endswith("Until it is known which of them is wrong, depths are not to be trusted within 1.2 Å.")
    assert doubts_of_settings({"focal_variance": Asked(0.0, np.inf, np.zeros(2))}, Config(), 0.5, 40.0) == []


def test_a_setting_that_explains_little_of_the_misfit_is_not_passed_off_as_its_cause(library):
    fault = lambda counts: np.random.default_rng(0).permuted(counts.reshape(len(counts), -1), axis=1).reshape(counts.shape)
    estimate, problem = fitted(library, 3, foci=FOCI * 1.01)
    assert asked(estimate, problem, {})["focus_step"].explained > 0.5
    scrambled = dataclasses.replace(problem, counts=fault(np.asarray(problem.counts)))
    assert asked(estimate, scrambled, {})["focus_step"].explained < 0.1
    (warning,) = doubts_of_settings({"focus_step": Asked(-0.03, 0.001, np.ones(2), 0.2)}, Config(), 0.5, 40.0)
    assert "explains 20% of the misfit alone" in warning


def test_what_is_not_round_is_named_by_size_and_azimuth_where_its_phase_matters():
    parts = lambda a, b, sd: (Asked(a, sd, np.zeros(2)), Asked(b, sd, np.zeros(2)))
    tested = dict(zip(("C12_a", "C12_b"), parts(10.0, 10 * 3**0.5, 0.5), strict=True)) | dict(zip(("C21_a", "C21_b"), parts(0.0, -600.0, 100.0), strict=True))
    (warning,) = doubts_of_settings(tested, Config(), 0.5, 40.0)
    assert warning.startswith("The residuals ask for C12 = 20.0 ± 0.5 Å at 30° where none is given (40 standard deviations; depths would move by up to 0.0 Å); or")
    assert "; or, less well, for C21 = 600.0 ± 100.0 Å at -90° where none is given (6 " in warning
    few = dict(zip(("C12_a", "C12_b"), parts(2.0, 0.0, 0.1), strict=True))  # 20 standard deviations of pi 2 Å (21 mrad)^2 / 0.0197 Å = 0.14 rad
    assert doubts_of_settings(few, Config(), 0.5, 40.0) == []
    (warning,) = doubts_of_settings(few | {"C12_a": Asked(2.0, 0.1, np.array([0.0, 0.2]))}, Config(), 0.5, 40.0)
    assert "up to 0.2 Å" in warning


def test_a_tilt_is_named_by_its_components_where_ends_of_columns_lie_aside():
    parts = lambda a, b: {"tilt_a": Asked(a, 0.1, np.zeros(2)), "tilt_b": Asked(b, 0.1, np.zeros(2))}
    (warning,) = doubts_of_settings(parts(4.0, -3.0), Config(), 0.5, 45.0)
    assert warning.startswith("The residuals ask for a crystal tilted by 4.0 ± 0.1 mrad along x and -3.0 ± 0.1 along y where none is given (50 standard deviations;")
    assert doubts_of_settings(parts(4.0, -3.0), Config(), 0.5, 30.0) == []  # 15 Å x 5 mrad = 0.075 Å
