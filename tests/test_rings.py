"""The closed thermal average between cores against that of whole forms, and against a probe's plain multislice."""

from importlib import resources

import numpy as np
import pytest

from depthprob.physics.column_images import column_images, column_profiles
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.electron import wavelength
from depthprob.physics.library import load_gram
from depthprob.physics.multislice import transmission
from depthprob.physics.optics import Microscope
from depthprob.physics.rings import quick_gram, ring_grams
from depthprob.physics.specimen import Column
from depthprob.physics.thermal import depth_derivatives, gram_of_depths, incident_disc, prepare_channel

ENERGY, ANGLE, EDGES = 200e3, 20.0, (40.0, 60.0, 90.0)
APERTURE = ANGLE * 1e-3 / float(wavelength(ENERGY))
COLUMN = Column("Cu", 3, 2.55, 0.55)
DEPTHS = np.array([-2.55, 0.0, 2.55])
DISC = incident_disc(COLUMN, ENERGY, APERTURE)


@pytest.fixture(scope="module")
def whole_forms():
    """The other derivation, its absorbing edge far out: nearer, it alone moves images by 1e-4."""
    return prepare_channel(COLUMN, ENERGY, APERTURE, AnnularDetector(40.0, 90.0), margin=4.0, edge_turns=16.0)


def images(gram):
    return column_images(gram[None], DISC, Microscope(ENERGY, ANGLE, source_fwhm=0.7), np.array([-60.0, -30.0, 0.0, 30.0, 60.0]), 14.0, 120)


def test_rings_add_up_to_the_form_of_the_whole_detector(whole_forms):
    grams = ring_grams(COLUMN, ENERGY, APERTURE, EDGES)[0].sum(0)
    for n in (1, 3):
        expected = images(gram_of_depths(DEPTHS[:n], whole_forms, DISC))
        np.testing.assert_allclose(images(grams[n - 1]), expected, atol=1e-4 * expected.max())


def test_derivatives_by_depth_are_those_of_whole_forms(whole_forms):
    ours = ring_grams(COLUMN, ENERGY, APERTURE, EDGES, derivatives=True)[0].sum(0)
    for mine, theirs in zip(ours, depth_derivatives(DEPTHS, whole_forms, DISC), strict=True):
        expected = images(theirs)
        np.testing.assert_allclose(images(mine), expected, atol=1e-3 * abs(expected).max())


def test_a_wide_probe_on_still_atoms_is_that_of_plain_multislice():
    # 60 mrad: a probe's wave on a grid, through each atom and on, no modes. Rims of the detector's pixels, the cell's neighbours and its grid leave 0.5 %
    angle, inner, outer, n, cell = 60.0, 90.0, 130.0, 640, 16.0
    lam = float(wavelength(ENERGY))
    still = Column("Cu", 2, 2.55, 1e-9)
    q = np.fft.fftfreq(n, cell / n)
    qx, qy = np.meshgrid(q, q)
    k = np.hypot(qx, qy)
    limit = n / cell / 3
    atom = np.asarray(transmission(np.zeros((1, 2)), "Cu", (cell, cell), (n, n), ENERGY, limit))
    fly = np.exp(-1j * np.pi * lam * 2.55 * k**2) * (k < limit)
    rim = 1e3 * lam / cell
    detected = AnnularDetector(inner, outer).sensitivity(1e3 * lam * qx, 1e3 * lam * qy, rim)
    places, planes = np.array([0.0, 0.4, 0.8]), np.array([-40.0, 0.0, 25.0])
    aperture = angle * 1e-3 / lam
    soft = np.clip((aperture - k) * cell + 0.5, 0, 1)

    def signal(x, plane):
        wave = soft * np.exp(1j * np.pi * lam * (plane + 1.275) * k**2 - 2j * np.pi * qx * x)  # at the upper atom, 1.275 above the middle
        wave /= np.sqrt((abs(wave) ** 2).sum())
        lower = fly * np.fft.fft2(atom * np.fft.ifft2(wave))
        return (detected * abs(np.fft.fft2(atom * np.fft.ifft2(lower))) ** 2).sum()

    brighter = 1 + 1 / (3 * aperture * cell)  # the rim of a cell's aperture takes intensity of the normalisation
    expected = np.array([[signal(x, plane) for x in places] for plane in planes]) / brighter
    grams, disc = ring_grams(still, ENERGY, aperture, (inner, outer))
    size = 320
    ours = column_images(grams[:, -1], disc, Microscope(ENERGY, angle), planes, 16.0, size)[0][:, 0, np.round(places * size / 16.0).astype(int)]
    np.testing.assert_allclose(ours, expected, atol=0.01 * expected.max())


def test_quick_grams_are_those_of_the_full_pass():
    with resources.as_file(resources.files("depthprob.data") / "gram_Au_001.npz") as path:
        full = load_gram(path).first(3)
    quick = quick_gram(Column("Au", 3, 4.08, 0.63), 300e3, 21.0, AnnularDetector(48.0, 180.0))
    lens, plane = Microscope(300e3, 21.0), np.array([-40.0, 10.0])
    for n in (1, 3):
        ours, theirs = (column_profiles(g.blocks[0, n - 1 : n], g.modes, lens, plane + g.centre_of_mass[n - 1], 12.0).values for g in (quick, full))
        np.testing.assert_allclose(ours, theirs, atol=5e-4 * theirs.max())  # the other's absorbing edge
