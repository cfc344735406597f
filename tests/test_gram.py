"""The Gram matrix of a column against probes carried through the same atoms one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprob.physics.column_images import column_images, plane_wave_images
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.electron import wavelength
from depthprob.physics.frozen_phonon import build_gram
from depthprob.physics.gram import (
    ColumnGram,
    default_reach,
    laguerre_gauss_modes,
    mirrored,
    mode_spectra,
    prepare_sweep,
    sweep_atoms,
    sweep_column,
    sweep_whole,
)
from depthprob.physics.library import library_from_gram, load_gram, save_gram
from depthprob.physics.multislice import multislice, transmission
from depthprob.physics.optics import Microscope
from depthprob.physics.specimen import Column

# a light column, a small angle and a coarse grid keep the suite quick; the physics is the same
COLUMN = Column("Cu", 3, 3.6, 0.5)
DETECTOR = AnnularDetector(40.0, 100.0)
MICROSCOPE = Microscope(200e3, 20.0, source_fwhm=0.0)
CELL = 13.0


@pytest.fixture(scope="module")
def still_column():
    """Gram matrices of 1 to 3 atoms at rest."""
    lam = wavelength(MICROSCOPE.energy)
    aperture = 20e-3 / lam
    reach = default_reach(COLUMN, 20.0)
    sweep = prepare_sweep(COLUMN, MICROSCOPE.energy, aperture, DETECTOR, reach, sampling=0.05, cell=CELL)  # the probes' grid
    blocks = sweep_column(jnp.zeros((3, 2), jnp.float32), sweep, laguerre_gauss_modes(reach, aperture))
    return ColumnGram(np.asarray(blocks)[None], "Cu", 200e3, 3.6, 0.5, 40.0, 100.0, aperture, reach, 1, "lobato")


def probe_signal(n_atoms, position, defocus, cell=CELL, displacements=0.0, lower=0.0, share=lambda qx, qy: 1.0):
    """Fraction of the beam detected from one probe, wave by wave; atoms displaced laterally, and moved `lower` [Å]; `share` of each electron counts."""
    lam = wavelength(MICROSCOPE.energy)
    n = 270
    q = np.fft.fftfreq(n, cell / n)
    radius = np.hypot(q, q[:, None])
    limit = n / cell / 3
    aperture = np.clip((20e-3 / lam - radius) * cell + 0.5, 0, 1)
    centre = (n_atoms - 1) / 2 * 3.6
    ramp = np.exp(-2j * np.pi * (q * (cell / 2 + position[0]) + (q * (cell / 2 + position[1]))[:, None]))
    wave = aperture / np.sqrt((aperture**2).sum()) * ramp * np.exp(1j * np.pi * lam * radius**2 * (defocus + centre))
    places = cell / 2 + np.zeros((n_atoms, 2)) + displacements
    atoms = [transmission(place[None], "Cu", (cell, cell), (n, n), 200e3, limit) for place in places]
    out = multislice(jnp.asarray(wave), jnp.stack(atoms), jnp.arange(n_atoms) * 3.6 + lower, (cell, cell), lam, limit)
    inner, outer = (np.clip((radius - a * 1e-3 / lam) * cell + 0.5, 0, 1) for a in (40, 100))
    return float((np.abs(out) ** 2 * (inner - outer) * share(q, q[:, None])).sum())


def test_gram_gives_the_signal_of_every_probe_and_focus(still_column):
    defocus = np.array([-120.0, 0.0, 45.0])
    size = 80
    for n in (1, 3):
        plane = defocus + still_column.centre_of_mass[n - 1]
        images = plane_wave_images(still_column.blocks[0], still_column.modes, MICROSCOPE, plane, CELL, size)
        peak = float(images[n - 1].max())
        for i, f in enumerate(defocus):
            for y, x in ((0, 0), (2, 3), (0, 12), (20, 20)):
                expected = probe_signal(n, (x * CELL / size, y * CELL / size), f)
                # the modes' tapered edge: 4e-4 of the peak for gold at 48-180 mrad, 0.5 % for this small detector angle
                assert images[n - 1, i, y, x] == pytest.approx(expected, abs=8e-3 * peak)


def library_signals_are_those_of_probes(gram, n_atoms, **of_probe):
    library = library_from_gram(gram, MICROSCOPE, (-70.0, 60.0), image_cell=CELL)
    for f, x, y in ((0.0, 0.1, 0.0), (45.0, 0.3, -0.2), (-60.0, -0.5, 0.6), (-60.0, 0.9, 0.4)):
        expected = probe_signal(n_atoms, (x, y), f, **of_probe)
        # the modes' tapered edge, as above, and the library's own low rank
        assert library.series(n_atoms, f, np.array([x]), np.array([y]))[0, 0, 0] == pytest.approx(expected, abs=9e-3 * library.series(n_atoms, 0.0, np.zeros(1), np.zeros(1)).max())


@pytest.fixture(scope="module")
def tilted():
    still = Column("Cu", 3, 3.6, 0.0, tilt=(35.0, -20.0))
    return build_gram(still, MICROSCOPE.energy, 20.0, DETECTOR, 1, 1, sampling=0.05, cell=CELL)


@pytest.mark.parametrize("n_atoms", [2, 3])
def test_a_tilted_column_is_seen_as_probes_see_its_displaced_atoms(tilted, n_atoms):
    lean = np.outer((np.arange(n_atoms) - (n_atoms - 1) / 2) * 3.6, [0.035, -0.020])
    library_signals_are_those_of_probes(tilted, n_atoms, displacements=lean)
    upright, there = (probe_signal(n_atoms, (0.3, -0.2), 45.0, displacements=u) for u in (0.0, lean))
    assert abs(upright - there) > 0.02 * there


def test_a_tilted_column_is_its_own_mirror_image_across_its_tilt_alone():
    column = Column("Cu", 3, 3.6, 0.0, tilt=(30.0, 30.0))  # across whose diagonal the square grid is symmetric too
    aperture = 20e-3 / wavelength(MICROSCOPE.energy)
    sweep = prepare_sweep(column, MICROSCOPE.energy, aperture, DETECTOR, 1.5, sampling=0.05, cell=CELL)
    raw = np.asarray(sweep_whole(jnp.asarray(column.leaning, jnp.float32), sweep))
    changed = lambda direction: abs(mirrored(raw, laguerre_gauss_modes(1.5, aperture), direction) - raw).max() / abs(raw).max()
    assert changed((1.0, 1.0)) < 1e-4
    assert changed((1.0, -1.0)) > 0.03 and changed((1.0, 0.0)) > 0.03


def test_a_tilted_gram_matrix_is_read_back(tilted, tmp_path):
    save_gram(tmp_path / "gram.npz", tilted)
    read = load_gram(tmp_path / "gram.npz")
    assert read.tilt == (35.0, -20.0) and read.is_whole
    np.testing.assert_array_equal(read.leaning, tilted.leaning)


def test_a_detector_blind_on_one_side_is_seen_as_single_probes_see_it():
    """Sensitivity rising along x, lower for y < 0: no mirror maps it onto itself."""
    mrad = 1e3 * wavelength(200e3)
    at = lambda x, y: 0.8 + 0.005 * x - 0.3 * np.clip(-y / 40, 0, 1)  # kinks on the axis and at 40 mrad, where pixels are
    along = np.arange(-120.0, 121.0, 4.0)
    measured = np.maximum(at(along, along[:, None]), 0)
    detector = AnnularDetector(40.0, 100.0, measured, 4.0)
    gram = build_gram(Column("Cu", 2, 3.6, 0.0), MICROSCOPE.energy, 20.0, detector, 1, 1, sampling=0.05, cell=CELL)
    library_signals_are_those_of_probes(gram, 2, share=lambda qx, qy: np.maximum(at(qx * mrad, qy * mrad), 0))


def test_mode_spectra_are_orthonormal():
    modes = laguerre_gauss_modes(1.0, 1.0, margin=2)
    k = np.linspace(-4, 4, 161)
    kx, ky = np.meshgrid(k, k)
    flat = mode_spectra(modes, kx, ky).reshape(len(modes.p), -1)
    overlap = flat.conj() @ flat.T * (k[1] - k[0]) ** 2
    np.testing.assert_allclose(overlap, np.eye(len(overlap)), atol=2e-4)  # complex64 sums


def test_library_reproduces_its_own_images_and_their_depth_rule(still_column):
    library = library_from_gram(still_column, MICROSCOPE, (-150.0, 150.0), z_step=5.0)
    x = np.array([0.0, 0.31, 1.7])
    z = np.array([-93.0, 2.5, 40.0])  # between the knots
    cell, size = library.pixel * library.images.shape[1], library.images.shape[1]
    exact = column_images(still_column.blocks[0], still_column.modes, MICROSCOPE, z + still_column.centre_of_mass[2], cell, size)
    at_pixels = library.series(3, z, np.arange(4) * library.pixel, np.zeros(1))
    np.testing.assert_allclose(at_pixels[:, 0], exact[2, :, 0, :4], atol=1e-4 * exact[2].max())
    assert library.series(2, z, x, x).shape == (3, 3, 3)


def test_cross_section_does_not_depend_on_defocus(still_column):
    # incoherent scattering of a thin column: what the beam puts on it is conserved
    images = plane_wave_images(still_column.blocks[0], still_column.modes, MICROSCOPE, np.array([0.0, 80.0]), CELL, 80)
    total = images[0].sum((-2, -1))
    assert total[1] == pytest.approx(total[0], rel=5e-3)


def test_gradient_by_atom_position_is_exact():
    """One atom's plane moved along the beam: autodiff of the exit intensity against a difference of 10 pm, as in the paper."""
    lam, limit, cell, n = wavelength(200e3), 4.0, 8.0, 96
    atom = transmission(np.array([[4.0, 4.0]]), "Cu", (cell, cell), (n, n), 200e3, limit)
    wave = jnp.zeros((n, n), jnp.complex64).at[0, 0].set(1.0)
    ring = np.hypot(*np.meshgrid(np.fft.fftfreq(n, cell / n), np.fft.fftfreq(n, cell / n))) > 1.5

    def signal(z):
        out = multislice(wave, jnp.stack([atom, atom]), jnp.array([0.0, z]), (cell, cell), lam, limit)
        return jnp.sum(jnp.abs(out) ** 2 * ring) * 1e3

    derivative = jax.grad(signal)(3.6)
    difference = (signal(3.7) - signal(3.5)) / 0.2
    assert derivative != 0
    assert float(derivative) == pytest.approx(float(difference), rel=0.02)


def test_radial_images_are_the_limit_of_plane_waves_on_large_cells(still_column):
    """A cell's waves blur the aperture's edge by 1 / cell, and brighten the probe by a third of that over its radius."""
    n = 2
    plane = np.array([-60.0, 0.0, 45.0]) + still_column.centre_of_mass[n - 1]
    errors = []
    for cell in (16.0, 32.0, 64.0):
        size = int(cell * 5)
        radial, waves = (f(still_column.blocks[0, n - 1 : n], still_column.modes, MICROSCOPE, plane, cell, size)[0] for f in (column_images, plane_wave_images))
        excess = waves[:, 0, 0] / radial[:, 0, 0] - 1
        errors.append(abs(excess).max())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.012
    np.testing.assert_allclose(errors[1] / errors[2], 2.0, rtol=0.25)


def test_aberrations_that_are_not_round_go_by_plane_waves(still_column):
    lens = Microscope(energy=3e5, convergence_angle=20.0, aberrations={"C12_A": 30.0, "phi12_deg": 0.0})
    images = column_images(still_column.blocks[0, :1], still_column.modes, lens, np.array([80.0]), 16.0, 80)[0, 0]
    assert abs(images - images.T).max() > 0.05 * images.max()


def test_atoms_of_one_configuration_and_their_depths():
    """Displaced atoms, no symmetry: value and derivatives by each depth against single probes and their differences."""
    aperture = 20e-3 / wavelength(MICROSCOPE.energy)
    reach = default_reach(COLUMN, 20.0)
    sweep = prepare_sweep(COLUMN, MICROSCOPE.energy, aperture, DETECTOR, reach, sampling=0.05, cell=CELL)
    u = np.array([[0.1, -0.05], [0.0, 0.12], [-0.08, 0.03]])
    grams = sweep_atoms(jnp.asarray(u, jnp.float32), sweep)
    size, f = 80, 45.0
    images = plane_wave_images(grams, laguerre_gauss_modes(reach, aperture), MICROSCOPE, np.array([f]), CELL, size)[:, 0]
    with jax.enable_x64(True):
        for y, x in ((0, 0), (2, -3), (0, 9)):
            probe = partial(probe_signal, 3, (x * CELL / size, y * CELL / size), f, CELL, u)
            assert abs(images[0, y, x] - probe(0.0)) < 0.01 * images[0].max()  # the modes' tapered edge, as above
            for a in range(3):
                way = 0.05 * np.eye(3)[a]
                difference = (probe(way) - probe(-way)) / 0.1
                assert abs(images[1 + a, y, x] - difference) < 0.02 * abs(images[1:]).max(), (y, x, a)
