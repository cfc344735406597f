"""Detectors: what they record is the sum over their annuli, in every model of the column."""

import jax.numpy as jnp
import numpy as np
import pytest

from depthprob.errors import InputError
from depthprob.physics.column_images import column_images
from depthprob.physics.detector import AnnularDetector, require_out_of_beam
from depthprob.physics.electron import wavelength
from depthprob.physics.frozen_phonon import build_gram
from depthprob.physics.gram import laguerre_gauss_modes, prepare_sweep, sweep_column
from depthprob.physics.library import load_gram, save_gram
from depthprob.physics.optics import Microscope
from depthprob.physics.particle import particle_gram
from depthprob.physics.rings import ring_grams
from depthprob.physics.specimen import Column
from depthprob.physics.thermal import gram_of_depths, incident_disc, prepare_channel, thermal_gram
from depthprob.reconstruction import libraries

COLUMN = Column("Cu", 2, 3.6, 0.5)
ENERGY, ANGLE = 200e3, 15.0
LOW, HIGH, BOTH = AnnularDetector(30.0, 45.0), AnnularDetector(60.0, 80.0), AnnularDetector((60.0, 30.0), (80.0, 45.0))


def sums_up(signal):
    """Whether the signal of two annuli is that of the one and of the other."""
    low, high, both = (np.asarray(signal(detector)) for detector in (LOW, HIGH, BOTH))
    assert abs(low).max() > 0.01 * abs(both).max() < 100 * abs(high).max()
    np.testing.assert_allclose(both, low + high, atol=2e-5 * abs(both).max())  # complex64 sums


def test_annuli_add_up_in_a_thermal_configuration_of_a_column():
    aperture = ANGLE * 1e-3 / wavelength(ENERGY)
    modes = laguerre_gauss_modes(1.0, aperture)

    def signal(detector):
        sweep = prepare_sweep(COLUMN, ENERGY, aperture, detector, 1.0, sampling=0.09, cell=9.0)
        return sweep_column(jnp.array([[0.1, -0.05], [0.0, 0.07]], jnp.float32), sweep, modes)

    sums_up(signal)


def test_annuli_add_up_in_a_particle():
    atoms = np.array([[2.0, 3.0, -3.0], [2.0, 3.1, 0.6], [4.5, 5.0, 1.2]])
    sums_up(lambda detector: particle_gram(atoms, "Cu", (7.0, 6.0), Microscope(ENERGY, ANGLE), detector, 0.09)[0])


def test_the_closed_form_takes_the_rings_that_its_detector_has():
    aperture = ANGLE * 1e-3 / float(wavelength(ENERGY))
    rings, disc = ring_grams(COLUMN, ENERGY, aperture, (30.0, 45.0, 60.0, 80.0))
    both = gram_of_depths(np.array([-1.8, 1.8]), prepare_channel(COLUMN, ENERGY, aperture, BOTH), disc)
    at = lambda gram: column_images(gram[None], disc, Microscope(ENERGY, ANGLE, source_fwhm=0.7), np.array([-40.0, 0.0]), 14.0, 100)
    np.testing.assert_allclose(at(rings[0, -1] + rings[2, -1]), at(both), atol=1e-3 * at(both).max())  # that one's absorbing edge


def test_annuli_that_touch_are_one():
    halves = AnnularDetector((90.0, 48.0), (180.0, 90.0))
    assert halves.record == AnnularDetector(48, 180).record == {"inner": 48.0, "outer": 180.0, "sensitivity": ""}
    angle = np.linspace(0, 200, 2001)
    np.testing.assert_allclose(halves.sensitivity(angle, 0.0, 2.0), AnnularDetector(48.0, 180.0).sensitivity(angle, 0.0, 2.0), atol=1e-12)


@pytest.mark.parametrize("inner, outer", [((48.0, 80.0), (90.0, 180.0)), (50.0, 50.0), ((20.0, 50.0), (40.0,)), (-1.0, 20.0)])
def test_no_electron_is_recorded_twice_and_no_annulus_is_empty(inner, outer):
    with pytest.raises(InputError, match="mrad"):
        AnnularDetector(inner, outer)


def test_a_gram_matrix_remembers_its_detector(tmp_path, monkeypatch):
    """Saved and loaded, and found again in the cache for that detector alone."""
    monkeypatch.setenv("DEPTHPROB_CACHE", str(tmp_path))
    column, built = Column("C", 1, 2.5, 0.5), []

    def build(column, energy, angle, detector, *more):
        built.append(detector)
        return build_gram(column, energy, angle, detector, 1, 1, sampling=0.15)

    monkeypatch.setattr(libraries, "thermal_gram", build)
    gram_of = lambda detector: libraries.gram_of(column, Microscope(100e3, 10.0), detector, 1, 0, "frozen_phonon", "lobato", None, lambda items, **_: items)
    two, swapped = AnnularDetector((20.0, 40.0), (30.0, 50.0)), AnnularDetector((40.0, 20.0), (50.0, 30.0))
    first, again = gram_of(two), gram_of(swapped)
    np.testing.assert_array_equal(first.blocks, again.blocks)
    assert again.inner == (20.0, 40.0) and again.outer == (30.0, 50.0)
    gram_of(AnnularDetector(20.0, 50.0))
    assert len(built) == 2
    save_gram(tmp_path / "gram.npz", first)
    assert load_gram(tmp_path / "gram.npz").outer == (30.0, 50.0)


def test_the_packaged_gram_matrix_serves_its_detector_cut_in_two():
    paper, gold = Microscope(3e5, 21.0), Column("Au", 12, 4.08, 0.63)
    gram = libraries.gram_of(gold, paper, AnnularDetector((48.0, 90.0), (90.0, 180.0)), 8, 0, "frozen_phonon", "lobato", None, pytest.fail)
    assert gram.n_max == 12 and (gram.inner, gram.outer, gram.sensitivity) == (48.0, 180.0, "")


MRAD = np.arange(-90.0, 91.0)


def test_a_map_lies_about_the_axis_with_rows_along_y():
    measured = np.zeros((5, 7))
    measured[3, 5] = 0.8  # one pixel below the middle row, two to the right of the middle column
    detector = AnnularDetector(0.0, 100.0, measured, 10.0)
    x, y = np.array([20.0, 20.0, -20.0, 10.0]), np.array([10.0, 12.5, 10.0, 20.0])
    np.testing.assert_allclose(detector.sensitivity(x, y), [0.8, 0.6, 0, 0])
    assert not detector.is_round


def test_a_profile_is_linear_between_its_angles_and_cut_by_the_annulus():
    profile = np.array([0.0, 0.2, 1.0, 0.9, 0.0])
    detector = AnnularDetector(25.0, 70.0, profile, 20.0)
    angle = np.array([10.0, 26.0, 33.0, 58.0, 69.0, 71.0, 95.0])
    expected = np.where((angle > 25) & (angle < 70), np.interp(angle, 20.0 * np.arange(5), profile), 0)
    np.testing.assert_allclose(detector.sensitivity(angle * 0.6, angle * 0.8), expected, atol=1e-9)
    assert detector.is_round


def test_a_map_of_an_annulus_is_the_annulus():
    inside = np.hypot(MRAD, MRAD[:, None])
    measured = ((inside > 30) & (inside < 80)).astype(float)
    atoms = np.array([[2.0, 3.0, -3.0], [2.0, 3.1, 0.6], [4.5, 5.0, 1.2]])
    of_map, of_annulus = (
        particle_gram(atoms, "Cu", (7.0, 6.0), Microscope(ENERGY, ANGLE), detector, 0.09)[0]
        for detector in (AnnularDetector(0.0, 85.0, measured, 1.0), AnnularDetector(30.0, 80.0))
    )
    # the two edges are cut at pixels of the map, or with a rim of the cell's 4 mrad: a few beams of hundreds
    assert abs(of_map - of_annulus).max() < 0.02 * abs(of_annulus).max()


def test_half_the_sensitivity_is_half_the_signal_of_the_closed_form():
    aperture = ANGLE * 1e-3 / wavelength(ENERGY)
    gram = lambda d: gram_of_depths(np.array([-1.8, 1.8]), prepare_channel(COLUMN, ENERGY, aperture, d), incident_disc(COLUMN, ENERGY, aperture))
    whole, half = (gram(d) for d in (AnnularDetector(30.0, 60.0), AnnularDetector(30.0, 60.0, np.full(40, 0.5), 2.0)))
    np.testing.assert_allclose(half, whole / 2, atol=1e-12 * abs(whole).max())


def test_models_that_need_symmetry_refuse_a_map_and_a_tilt():
    with pytest.raises(InputError, match="is a map"):
        thermal_gram(COLUMN, ENERGY, ANGLE, AnnularDetector(30.0, 60.0, np.ones((9, 9)), 20.0))
    with pytest.raises(InputError, match="tilt"):
        thermal_gram(Column("Cu", 2, 3.6, 0.5, tilt=(1.0, 0.0)), ENERGY, ANGLE, LOW)


@pytest.mark.parametrize("measured, pixel, word", [(np.ones((3, 3)), None, "pixel size"), (np.ones((3, 3, 3)), 1.0, "shape"), (np.full(5, np.nan), 1.0, "nan"), (-np.ones(5), 1.0, "-1"), (np.zeros(5), 1.0, "all 0"), (np.full((3, 3), 255), 1.0, "255"), (np.ones((9, 9)), 1e-3, "everywhere")])
def test_a_sensitivity_that_is_none_is_refused(measured, pixel, word):
    with pytest.raises(InputError, match=word):
        AnnularDetector(30.0, 60.0, measured, pixel)


@pytest.mark.parametrize(
    "detector",
    [AnnularDetector(0.0, 10.0), AnnularDetector((15.0, 60.0), (25.0, 80.0)), AnnularDetector(0.0, 80.0, np.ones(41), 4.0)],
    ids=["bright field", "annular bright field", "profile"],
)
def test_libraries_are_of_detectors_out_of_the_direct_beam(detector):
    with pytest.raises(InputError, match="of the direct beam falls on the detector"):
        require_out_of_beam(detector, 21.0)
    with pytest.raises(InputError, match="Allowed is an inner angle from 21 mrad on"):
        libraries.build_library(COLUMN, Microscope(ENERGY, 21.0), detector)


def test_a_detector_may_begin_where_the_beam_ends_or_leave_a_hole_for_it():
    hole = np.where(np.arange(41) * 4.0 < 28.0, 0.0005, 1.0)  # as measured
    for detector in (AnnularDetector(21.0, 80.0), AnnularDetector(0.0, 80.0, hole, 4.0)):
        require_out_of_beam(detector, 21.0)
