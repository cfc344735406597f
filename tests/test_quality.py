"""Each fault of a series is said, and a sound one is not called in question."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from depthprob.config import Config
from depthprob.inference.goodness import Dispersion
from depthprob.inference.held import Asked
from depthprob.inference.likelihood import Amplitudes, Share
from depthprob.reconstruction import quality
from depthprob.reconstruction.joint import JointFit
from depthprob.reconstruction.superposition import Owed

PIXEL, WIDTH, SHAPE = 0.34, 0.45, (40, 44)
FOCI = np.arange(-60.0, 61.0, 15.0)


def expected(dose, pixel=PIXEL, background=1e-4):
    """Twenty columns in a vacuum (F, ny, nx) [e/pixel], as wide as a beam of 21 mrad and `WIDTH` together."""
    y, x = np.indices(SHAPE) * pixel
    middle = np.array(SHAPE) * pixel / 2
    places = [(middle[1] + 2.04 * (i - 2), middle[0] + 2.04 * (j - 1.5)) for i in range(5) for j in range(4)]
    width2 = WIDTH**2 + (0.01 * FOCI[:, None, None]) ** 2
    bells = sum(0.02 * (1 + k % 4) * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * width2)) for k, (a, b) in enumerate(places))
    return dose * pixel**2 * (bells * WIDTH**2 / width2 + background)


def doubts(counts, dose, pixel=PIXEL, **options):
    return quality.doubts_of_counts(counts, np.full(len(FOCI), float(dose)), pixel, WIDTH, **options)


@pytest.mark.parametrize("dose", [10.0, 300.0, 1e4, 1e6])
@pytest.mark.parametrize("pixel", [0.1, 0.34, 0.51])
@pytest.mark.parametrize("background", [0.0, 1e-4, 0.02])
def test_sound_counts_are_not_doubted(dose, pixel, background):
    rng = np.random.default_rng(1)
    rate = expected(dose, pixel, background)
    for _ in range(3):
        assert doubts(rng.poisson(rate).astype(float), dose, pixel) == []
    noisy = rng.poisson(rate) + rng.normal(0, 8, rate.shape)
    assert doubts(noisy, dose, pixel, read_variance=64.0) == []
    assert doubts(rate, dose, pixel) == []


def put(where, value):
    def change(counts):
        counts[where] = value
        return counts

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda counts: np.minimum(counts, 60), r"pixels hold the largest value, 60 e, .* saturates"),
        (lambda counts: np.minimum(counts, 80), "saturates"),
        (put((slice(None), 20), 0), r"^1 lines of pixels are dark .* the first y = 20 of every image"),
        (put((4, 23), 0), r"^1 lines of pixels are dark .* the first y = 23 of image 4"),
        (put((slice(None), slice(None), slice(18, 21)), 0), r"^3 lines of pixels are dark .* x = 18 of every image"),
        (put((3, slice(24, None)), 0), r"^16 lines of pixels are dark .* y = 24 of image 3"),
        (put((5, 20, 22), 400), r"^1 pixels stand out .* image 5 at \(y, x\) = \(20, 22\) with 400 e"),
        (put((slice(None), 2, 3), 30), r"^9 pixels stand out"),
        (lambda counts: np.random.default_rng(5).poisson(expected(4e5)), "times the electrons that the dose sends there"),
        (lambda counts: counts[[0, 1, 2, 2, 4, 5, 6, 7, 0]], r"^2 images are copies of others, the first image 3 of image 2"),
    ],
)
def test_what_no_series_of_a_particle_holds_is_said(change, said):
    (doubt,) = doubts(change(np.random.default_rng(2).poisson(expected(1e4)).astype(float)), 1e4)
    assert re.search(said, doubt), doubt


def test_a_saturated_detector_is_found_whatever_its_unit():
    """Steps of four electrons, as of a converter with a gain of a quarter."""
    counts = 4 * np.floor(np.random.default_rng(3).poisson(expected(1e5)) / 4)
    assert doubts(counts, 1e5) == []
    (doubt,) = doubts(np.minimum(counts, 700), 1e5)
    assert "700 e" in doubt


def judged(values, sd=0.02, gain=None, defocus=FOCI):
    many = len(defocus)
    gain = np.ones(many) if gain is None else gain
    return quality.doubts_of_images(Dispersion(np.asarray(values, float), np.full(many, sd)), np.log(gain), defocus, Config())


def test_an_image_unlike_those_next_to_it_in_focus_is_named():
    values = np.ones(len(FOCI))
    assert judged(values) == []
    values[[2, 6]] = 1.3, 2.5
    (doubt,) = judged(values)
    assert doubt.startswith("Image 6 does not belong") and "2.50 times" in doubt and "likewise image 2" in doubt


def test_a_model_that_fits_badly_in_focus_is_no_image_of_another_field():
    assert judged(1 + 4 * np.exp(-((FOCI / 40) ** 2))) == []  # smooth in focus
    far = 100.0 * np.arange(5)
    assert judged([1, 1, 9, 1, 1], defocus=far) == []  # beyond the depth of focus nothing is known of neighbours
    noise = np.random.default_rng(4).normal(1, 0.02, (300, len(FOCI)))
    assert all(judged(row) == [] for row in noise)


def test_images_in_which_columns_are_faint_are_named():
    gain = np.linspace(1.1, 0.9, len(FOCI))
    assert judged(np.ones(len(FOCI)), gain=gain) == []
    gain[[3, 4]] = 0.02, 0.4
    (doubt,) = judged(np.ones(len(FOCI)), gain=gain)
    assert "images 3, 4 are 0.02 times as bright" in doubt


def test_columns_that_drift_out_of_the_images_are_counted():
    places, shifts = np.array([[1.0, 5.0], [5.0, 5.0]]), np.array([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0], [-1.5, 0.0]])
    (doubt,) = quality.doubts_of_field(places, shifts, (30, 30), 0.34, False)
    assert "carries 1 of 2 columns out of the field, in up to 2 of 4 images" in doubt
    assert quality.doubts_of_field(places, shifts, (30, 30), 0.34, True) == []
    assert quality.doubts_of_field(places, 0.4 * shifts, (30, 30), 0.34, False) == []


def test_depths_beyond_the_foci_and_at_their_ends_are_said():
    assert quality.doubts_of_depths(np.array([-30.0, 30.0]), FOCI) == []
    beyond, edge = quality.doubts_of_depths(np.array([75.0, 64.0, 55.0, 0.0]), FOCI[::-1])
    assert beyond.startswith("2 of 4 columns lie beyond the foci") and edge.startswith("1 of 4 columns lie within 20 Å")


def owing(depth, pairs=0, seconds=100.0):
    return Owed(np.float32(0), np.array(depth), 0.15 * abs(np.array(depth)), pairs, seconds)


def test_columns_too_thick_for_superposition_are_counted():
    places = 2.04 * np.stack(np.mgrid[:3, :3], -1).reshape(-1, 2)
    n = np.arange(3, 12)
    doubts = lambda n, places: quality.doubts_of_thickness(n, places, 4.08, 21.0, owing([0.0]))
    assert doubts(n, places) == []
    (doubt,) = doubts(2 * n, places)
    assert doubt.startswith("6 of 9 columns are 49 Å thick or more (up to 90 Å)") and "\"corrected\", which may take 2 minutes" in doubt.replace("'", '"')
    assert "cannot be corrected" in quality.doubts_of_thickness(2 * n, places, 4.08, 21.0, owing([0.0], seconds=np.inf))[0]
    assert doubts(2 * n, 2 * places) == []
    assert doubts(np.array([40]), places[:1]) == []


def test_corrected_columns_are_told_by_how_much_and_small_corrections_are_not():
    places, n = 2.04 * np.stack(np.mgrid[:3, :3], -1).reshape(-1, 2), np.full(9, 20)
    (doubt,) = quality.doubts_of_thickness(n, places, 4.08, 21.0, owing([-0.3, -0.9], 20))
    assert "by up to 0.90 Å" in doubt and "hold 0.14 Å" in doubt and "counted" not in doubt
    (thicker,) = quality.doubts_of_thickness(n + 10 * (np.arange(9) == 4), places, 4.08, 21.0, owing([-0.3, -0.9], 20))
    assert "1 columns are so thick that they scatter" in thicker
    assert quality.doubts_of_thickness(n, places, 4.08, 21.0, owing([-0.3, -0.4], 20)) == []
    (refused,) = quality.doubts_of_thickness(n, places, 4.08, 21.0, owing([0.0]), Share(-0.34, 0.012))
    assert "hold 0.0 of what" in refused and "nothing was corrected" in refused


def fitted(n_atoms=(3, 12), amplitude=(1.0, 1.0), sd=(0.02, 0.02)):
    library = SimpleNamespace(n_max=12, depth_error=np.zeros(12))
    problem = SimpleNamespace(n_atoms=np.array(n_atoms), library=library)
    estimate = SimpleNamespace(parameters={"log_gain": np.zeros(3)}, converged=True)
    return JointFit(problem, estimate, None, Amplitudes(np.array(amplitude), np.array(sd)), True)


@pytest.mark.parametrize(
    ("options", "spread", "said"),
    [
        ({}, 1.0, None),
        ({}, 0.9, None),
        ({}, 0.5, "only 0.50 times Poisson's variance"),
        ({}, 0.0, "free of noise"),
        ({"amplitude": (0.98, 1.02)}, 1.0, None),
        ({"amplitude": (0.98, 1.06)}, 1.0, "1 columns are brighter than the library's longest, of 12 atoms"),
        ({"sd": (0.02, 0.3)}, 1.0, "1 of 2 columns are not five standard deviations brighter than nothing"),
    ],
)
def test_a_fit_that_its_own_numbers_contradict_is_doubted(options, spread, said):
    found = quality.doubts_of_fit(fitted(**options), np.zeros(2), Dispersion(spread, 0.004), Config())
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


@pytest.mark.parametrize(
    ("tilt", "sd", "moves", "said"),
    [
        (8.6, 0.3, 2.0, r"^The residuals ask for a crystal tilted by 8\.6 ± 0\.3 mrad along x and -0\.4 ± 0\.3 along y where none is given \(29 standard .* up to 2\.0 Å\)\.$"),
        (12.9, 0.3, 2.6, r"-0\.4 ± 0\.3 along y \(and more: .* understates a tilt so large, and what it does to depths\) where none"),
        (3.5, 0.3, 0.1, None),  # depths would stay, and the ends of the columns lie 0.06 Å aside
        (1.4, 0.3, 0.3, None),  # within five standard deviations
    ],
)
def test_a_tilt_is_said_where_it_matters_and_understated_where_it_is_large(tilt, sd, moves, said):
    depths = np.array([moves, -moves / 2])
    tested = {"tilt_a": Asked(tilt, sd, depths), "tilt_b": Asked(-0.4, sd, 0 * depths)}
    found = quality.doubts_of_settings(tested, Config(), 0.57, 36.72)
    assert (found == []) if said is None else (len(found) == 1 and re.search(said, found[0]))


@pytest.mark.parametrize(
    "diagnostics, said",
    [
        ({"method": "laplace"}, None),
        ({"chains": 2, "samples": 500, "divergences": 0, "r_hat_max": 1.01, "ess_min": 400.0}, None),
        ({"chains": 2, "samples": 3, "divergences": 0, "r_hat_max": np.nan, "ess_min": 300.0}, None),
        ({"chains": 2, "samples": 3, "divergences": 0, "r_hat_max": np.nan, "ess_min": 6.0}, "worth 6 independent ones for the parameter that mixes worst: its error"),
        ({"chains": 2, "samples": 100, "divergences": 0, "r_hat_max": 2.44, "ess_min": 3.0}, "worth 3 independent ones.*up to 2.44.*41 % at best"),
        ({"chains": 2, "samples": 500, "divergences": 7, "r_hat_max": 1.01, "ess_min": 400.0}, "7 draws of NUTS diverged"),
    ],
)
def test_chains_that_do_not_mix_are_said(diagnostics, said):
    found = quality.doubts_of_chains(diagnostics)
    assert (not found) if said is None else len(found) == 1 and re.search(said, found[0])
