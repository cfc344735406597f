"""Derivatives of a round column's images by what is not round, against differences of plane-wave sums, shifted images and full multislice."""

import dataclasses
from importlib import resources

import numpy as np
import pytest

from depthprob.physics.asymmetry import beside, by_aberration, by_tilt
from depthprob.physics.column_images import at_points, images_of_profiles
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.electron import wavelength
from depthprob.physics.gram import disc_modes, legendre_nodes, mode_spectra
from depthprob.physics.library import library_from_gram, load_gram
from depthprob.physics.optics import Microscope, aberration_phase
from depthprob.physics.particle import images_from_gram, particle_gram
from depthprob.physics.rings import leaning_grams
from depthprob.physics.specimen import Column, rms_from_debye_waller_b

LENS = Microscope(300e3, 21.0, spherical_aberration=4e3)
APERTURE = 21e-3 / float(wavelength(300e3))
PLANE = np.array([-35.0, 20.0])

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(scope="module")
def gram():
    with resources.as_file(resources.files("depthprob.data") / "gram_Au_001.npz") as path:
        return load_gram(path).first(3)


def few_waves(seed=0, orders=4, per_order=2):
    """Hermitian blocks of any numbers and modes for them, all that a round detector and column ask for."""
    rng = np.random.default_rng(seed)
    blocks = rng.normal(size=(orders, per_order, per_order)) + 1j * rng.normal(size=(orders, per_order, per_order))
    radial = rng.normal(size=(orders, per_order, 8)) + 1j * rng.normal(size=(orders, per_order, 8))
    return (blocks + blocks.conj().swapaxes(1, 2))[None], disc_modes(radial, APERTURE)


def images_at(blocks, modes, lens, x, y):
    """sum over both signs of l of A* G A at points (plane, point), A a sum of plane waves on a polar grid of the aperture."""
    amplitude = waves_at(modes, lens, x, y)
    whole = np.array([[blocks[0, abs(a), p, q] if a == b else 0 for b, q in zip(modes.l, modes.p, strict=True)] for a, p in zip(modes.l, modes.p, strict=True)])
    return np.einsum("zmr,mn,znr->zr", amplitude.conj(), whole, amplitude, optimize=True).real


def waves_at(modes, lens, x, y):
    """A (plane, mode, point)."""
    k, w = legendre_nodes(modes.aperture, 60)
    phi = 2 * np.pi * np.arange(128) / 128
    kx, ky = np.outer(k, np.cos(phi)).ravel(), np.outer(k, np.sin(phi)).ravel()
    area = np.repeat(k * w * 2 * np.pi / 128, 128)
    chi = np.asarray(aberration_phase(lens, kx, ky, 0.0)) - np.pi * float(wavelength(lens.energy)) * (kx**2 + ky**2) * PLANE[:, None]
    probe = np.exp(-1j * chi) * area / area.sum() ** 0.5
    return np.einsum("zk,mk,rk->zmr", probe, mode_spectra(modes, kx, ky).conj(), np.exp(-2j * np.pi * (np.outer(x, kx) + np.outer(y, ky))), optimize=True)


@pytest.mark.parametrize(("n", "m", "step"), [(1, 2, 0.02), (2, 1, 0.5), (2, 3, 0.5), (3, 4, 10.0), (5, 6, 1e3)])
def test_slopes_by_aberrations_are_limits_of_differences(n, m, step):
    blocks, modes = few_waves()
    slopes = by_aberration(blocks, modes, LENS, PLANE, 6.0, n, m)
    chosen = slice(None, None, 5)
    r = slopes.r[chosen]
    for azimuth, phi in ((0.0, 0.4), (np.pi / (2 * m), 1.1)):
        lenses = [dataclasses.replace(LENS, aberrations={f"C{n}{m}": c, f"phi{n}{m}": np.degrees(azimuth)}) for c in (step, -step)]
        up, down = (images_at(blocks, modes, lens, r * np.cos(phi), r * np.sin(phi)) for lens in lenses)
        expected = (up - down) / (2 * step)
        np.testing.assert_allclose(slopes.values[0][:, chosen] * np.cos(m * (phi - azimuth)), expected, atol=1e-4 * abs(expected).max())  # the step's square


def test_slopes_are_means_over_the_focal_spread():
    blocks, modes = few_waves(1)
    spread = by_aberration(blocks, modes, dataclasses.replace(LENS, focal_spread=10.0), PLANE, 6.0, 1, 2)
    fine = PLANE[:, None] + np.linspace(-60, 60, 121)
    weight = np.exp(-((np.linspace(-60, 60, 121) / 10) ** 2) / 2)
    each = by_aberration(blocks, modes, LENS, fine.ravel(), 6.0, 1, 2)
    expected = np.array([[np.interp(spread.r, each.r, row) for row in rows] for rows in each.values[0].reshape(2, 121, -1)])
    expected = np.einsum("zfr,f->zr", expected, weight / weight.sum())
    np.testing.assert_allclose(spread.values[0], expected, atol=0.01 * abs(expected).max())  # linear between radii


@pytest.mark.parametrize("m", [1, 2, 3])
def test_turned_images_hold_the_radial_function(m):
    """exp(-a r^2) r^m cos(m phi) is a Gaussian's derivative, band-limited enough to be seen at the pixels."""
    blocks, modes = few_waves()
    profiles = by_aberration(blocks, modes, LENS, PLANE, 10.0, 1, 2)
    f = lambda r: (r**m * np.exp(-(r**2) * 2))[None]
    images = images_of_profiles(f(profiles.r), profiles, LENS, 10.0, 46, m, 0.3)
    x = np.fft.fftfreq(46, 1 / 46) * 10.0 / 46
    r, phi = np.hypot(x, x[:, None]), np.arctan2(x[:, None], x + 0 * x[:, None])
    np.testing.assert_allclose(images[0], f(r)[0] * np.cos(m * (phi - 0.3)), atol=2e-3)  # what lies beyond the band limit


def test_a_library_beside_the_round_one_differs_by_the_slope(gram):
    lens = dataclasses.replace(LENS, source_fwhm=0.7)
    library = library_from_gram(gram, lens, (-40.0, 40.0))
    slopes = by_aberration(gram.blocks.mean(0), gram.modes, lens, library.planes, library.pixel * library.images.shape[1], 1, 2)
    along, across = beside(library, slopes, lens, 2, 3.0)
    x = np.arange(-4, 4.1, 0.4)
    z = float(library.planes[6] - library.centre[1])
    change = (along.series(2, z, x, x) - library.series(2, z, x, x))[0]
    wide = images_of_profiles(slopes.values[1, 6], slopes, lens, library.pixel * library.images.shape[1], library.images.shape[1], 2)
    expected = 3.0 * at_points(wide[None], library.pixel, x, x)[0]
    np.testing.assert_allclose(change, expected, atol=2e-3 * abs(expected).max())
    turned = (across.series(2, z, x, x) - library.series(2, z, x, x))[0]
    assert abs(turned[np.diag_indices(21)]).max() > 100 * abs(change[np.diag_indices(21)]).max()  # sin(2 phi) on the diagonal, where cos vanishes


def whole_of(blocks, modes):
    """Matrix (mode, mode) of a form between l + 1 and l, its Hermitian conjugate and both mirror images."""
    of_l = lambda l: np.flatnonzero(modes.l == l)
    whole = np.zeros((len(modes.l),) * 2, complex)
    for l, block in enumerate(blocks):
        for sign in (1, -1):
            whole[np.ix_(of_l(sign * (l + 1)), of_l(sign * l))] = block
    return whole + whole.conj().T


@pytest.fixture(scope="module")
def leaning():
    return leaning_grams(Column("Au", 2, 6.0, 1.0), 200e3, 13.5, AnnularDetector(40.0, 80.0))


def test_leaning_grams_are_those_of_two_vibrating_atoms_by_full_multislice(leaning):
    """All displacements of two atoms: their mean moves the image, a Gaussian blur, and the lean s t moves the centre of their difference d, a Gaussian of variance 2 u^2.

    So the slope is the mean of s d_x / 2 u^2 times the image, and of atoms d apart along x the part cos(phi) of the image counts half.
    """
    spacing, cell, size, foci = 6.0, 12.0, 50, np.array([-40.0, 0.0, 40.0])
    lens, u = Microscope(200e3, 12.0), float(rms_from_debye_waller_b(1.0))
    r, phi = np.linspace(0.05, 3, 40), 2 * np.pi * np.arange(16) / 16
    q = np.fft.fftfreq(size, cell / size)
    to_x, to_y = (np.exp(2j * np.pi * np.multiply.outer(np.outer(r, turn), q)) for turn in (np.cos(phi), np.sin(phi)))

    def around(gram, waves, blur):
        images = images_from_gram(gram, waves, (cell, cell), lens, foci, (size, size))
        spectra = np.fft.fft2(images) / size**2 * np.exp(-2 * np.pi**2 * blur * (q**2 + q[:, None] ** 2))
        return 2 * (np.einsum("fab,rpa,rpb->frp", spectra, to_y, to_x, optimize=True).real * np.cos(phi)).mean(2)

    x, share = np.polynomial.laguerre.laggauss(6)
    expected = np.zeros((3, 40))
    for d, weight in zip(2 * u * np.sqrt(x[:5]), share, strict=False):
        gram, waves = particle_gram(np.array([[-d / 2, 0, -spacing / 2], [d / 2, 0, spacing / 2]]), "Au", (cell, cell), lens, AnnularDetector(40.0, 80.0), 0.04)
        expected += weight * 1e-3 * spacing * d / (4 * u**2) * around(gram, waves, u**2 / 2)
    blocks, modes = leaning
    spectra = mode_spectra(modes, *waves.T / cell)
    found = around(spectra.T @ whole_of(blocks[1], modes) @ spectra.conj() / cell**2, waves, 0.0)
    np.testing.assert_allclose(found, expected, atol=0.02 * abs(expected).max())  # atoms in the next cells


def test_slopes_by_tilt_hold_the_part_between_neighbouring_angular_momenta(leaning):
    blocks, modes = leaning
    lens = Microscope(200e3, 13.5)
    slopes = by_tilt(blocks[1:], modes, lens, PLANE, 6.0)
    r = slopes.r[::4]
    amplitude = waves_at(modes, lens, r * np.cos(0.4), r * np.sin(0.4))
    expected = np.einsum("zmr,mn,znr->zr", amplitude.conj(), whole_of(blocks[1], modes), amplitude, optimize=True).real
    np.testing.assert_allclose(slopes.values[0][:, ::4] * np.cos(0.4), expected, atol=1e-5 * abs(expected).max())
