"""Full multislice of a particle: the Gram route against single probes, its symmetries, and resuming."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from depthprob.errors import InputError
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.electron import wavelength
from depthprob.physics.multislice import exit_waves, multislice, transmission
from depthprob.physics.optics import Microscope, aberration_phase
from depthprob.physics.particle import (
    hermitian_product,
    images_from_gram,
    occupied,
    particle_gram,
    simulate_particle,
    thermal_displacements,
)
from depthprob.physics.specimen import rms_from_debye_waller_b

# an oblong cell without symmetry, and aberrations that break the remaining ones, so that no wrong sign goes unnoticed
MICROSCOPE = Microscope(
    200e3, 20.0, aberrations={"C12_A": 40.0, "phi12_deg": 20.0, "C21_A": 300.0, "phi21_deg": 70.0}
)
DETECTOR = AnnularDetector(40.0, 100.0)
CELL, SAMPLING = (7.0, 9.0), 0.075
ATOMS = np.array([[2.0, 3.0, -3.0], [2.0, 3.0, 0.6], [4.5, 6.0, 1.2]])
LAM = wavelength(200e3)
NX, NY = (scipy.fft.next_fast_len(int(np.ceil(side / SAMPLING))) for side in CELL)
LIMIT = min(NX / CELL[0], NY / CELL[1]) / 3
QX, QY = np.fft.fftfreq(NX, CELL[0] / NX), np.fft.fftfreq(NY, CELL[1] / NY)
RADIUS = np.hypot(QX, QY[:, None])


def soft(limit):
    """A disc with the rim of a cell's sampling in frequency."""
    return np.clip((limit - RADIUS) * np.sqrt(CELL[0] * CELL[1]) + 0.5, 0, 1)


SENSITIVITY = soft(100e-3 / LAM) - soft(40e-3 / LAM)


def planes(atoms):
    heights = np.unique(atoms[:, 2])
    return jnp.stack(
        [
            transmission(atoms[atoms[:, 2] == z, :2], "Cu", CELL, (NY, NX), 200e3, LIMIT)
            for z in heights
        ]
    ), jnp.array(heights)


@pytest.fixture(scope="module")
def gram():
    return particle_gram(ATOMS, "Cu", CELL, MICROSCOPE, DETECTOR, SAMPLING)


def test_images_are_those_of_single_probes(gram):
    shape, foci = (36, 28), np.array([-60.0, 25.0])
    images = images_from_gram(*gram, CELL, MICROSCOPE, foci, shape)
    amplitude = soft(20e-3 / LAM)
    amplitude = amplitude / np.sqrt((amplitude**2).sum())
    for i, f in enumerate(foci):
        chi = aberration_phase(MICROSCOPE, QX[None], QY[:, None], f)
        for y, x in ((12, 8), (14, 10), (20, 20)):
            ramp = np.exp(-2j * np.pi * (QX * x * CELL[0] / 28 + (QY * y * CELL[1] / 36)[:, None]))
            out = multislice(amplitude * np.exp(-1j * chi) * ramp, *planes(ATOMS), CELL, LAM, LIMIT)
            expected = float((np.abs(np.asarray(out)) ** 2 * SENSITIVITY).sum())
            assert images[i, y, x] == pytest.approx(expected, rel=1e-3)


def test_jax_and_scipy_agree(gram):
    matrix, waves = gram
    some = np.arange(0, len(waves), 7)
    spectra = np.asarray(exit_waves(waves[some], *planes(ATOMS), CELL, LAM, LIMIT)).reshape(
        len(some), -1
    )
    reference = (spectra.conj() * SENSITIVITY.ravel()) @ spectra.T
    np.testing.assert_allclose(
        matrix[np.ix_(some, some)], reference, atol=1e-5 * np.abs(matrix).max()
    )


def test_moving_the_particle_is_moving_the_focus(gram):
    moved = particle_gram(
        ATOMS + np.array([0, 0, 17.0]), "Cu", CELL, MICROSCOPE, DETECTOR, SAMPLING
    )
    here = images_from_gram(*gram, CELL, MICROSCOPE, np.array([10.0]), (24, 20))
    there = images_from_gram(*moved, CELL, MICROSCOPE, np.array([27.0]), (24, 20))
    np.testing.assert_allclose(there, here, atol=1e-4 * here.max())


def test_focal_spread_is_the_gaussian_mean_over_defocus(gram):
    spread = 15.0
    offsets = np.linspace(-5, 5, 61) * spread
    weights = np.exp(-((offsets / spread) ** 2) / 2)
    mean = np.tensordot(
        weights / weights.sum(), images_from_gram(*gram, CELL, MICROSCOPE, offsets, (12, 10)), 1
    )
    blurred = eqx.tree_at(lambda m: m.focal_spread, MICROSCOPE, spread)
    np.testing.assert_allclose(
        images_from_gram(*gram, CELL, blurred, np.zeros(1), (12, 10))[0], mean, rtol=1e-4
    )


def test_source_size_keeps_the_total(gram):
    blurred = eqx.tree_at(lambda m: m.source_fwhm, MICROSCOPE, 0.8)
    sharp, soft_ = (
        images_from_gram(*gram, CELL, m, np.zeros(1), (40, 32)) for m in (MICROSCOPE, blurred)
    )
    assert soft_.sum() == pytest.approx(sharp.sum(), rel=1e-9)
    assert soft_.max() < sharp.max()


def test_hermitian_product_is_the_plain_one():
    rng = np.random.default_rng(0)
    seen = (rng.normal(size=(9, 70)) + 1j * rng.normal(size=(9, 70))).astype(np.complex64)
    np.testing.assert_allclose(
        hermitian_product(seen, chunk=32), seen.conj() @ seen.T, rtol=1e-5, atol=1e-4
    )


def test_displacements_have_the_asked_size_and_extend():
    column = np.repeat([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0]], 4, axis=0) + np.outer(
        np.arange(8) % 4, [0, 0, 4.0]
    )
    few, many = (thermal_displacements(column, 0.63, m, seed=3) for m in (100, 512))
    np.testing.assert_array_equal(few, many[:100])
    np.testing.assert_allclose(many.std(0), 0.0893, rtol=0.03)
    correlation = np.corrcoef(many.reshape(512, -1).T) - np.eye(16)
    assert (
        np.abs(correlation).max() < 0.2
    )  # scrambling without shuffling leaves 0.85 between the columns


def test_resuming_gives_the_same_and_other_settings_are_refused(tmp_path):
    settings = dict(
        element="C",
        debye_waller_b=0.5,
        cell=(5.0, 5.0),
        microscope=Microscope(100e3, 15.0),
        detector=AnnularDetector(30.0, 60.0),
    )
    settings |= dict(seed=1, sampling=0.15)
    atoms = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 2.5]])
    checkpoint = tmp_path / "sums.npz"
    whole, waves = simulate_particle(atoms, configurations=3, **settings)
    simulate_particle(atoms, configurations=2, checkpoint=checkpoint, **settings)
    resumed, _ = simulate_particle(atoms, configurations=3, checkpoint=checkpoint, **settings)
    np.testing.assert_array_equal(resumed, whole)
    assert whole.shape == (2, len(waves), len(waves))
    assert [path.name for path in tmp_path.iterdir()] == ["sums.npz"]
    with pytest.raises(InputError, match="other settings"):
        simulate_particle(atoms + 0.1, configurations=3, checkpoint=checkpoint, **settings)


MIXED = np.array([[1.0, 2.0, 0.0], [3.0, 2.5, 0.0], [1.0, 2.0, 2.5], [3.0, 2.5, 1.25], [3.0, 2.5, 1.25]])
OF_MIXED = dict(element=["O", "Ti", "O", "Ti", "Sr"], debye_waller_b=np.array([0.9, 0.4, 0.9, 0.4, 0.6]), occupancy=np.array([1.0, 1.0, 0.8, 0.3, 0.7]))
SMALL = dict(cell=(5.0, 5.0), microscope=Microscope(100e3, 15.0), detector=AnnularDetector(30.0, 60.0), seed=1, sampling=0.15)


def test_the_order_of_atoms_of_several_elements_plays_no_part():
    shuffled = np.array([3, 0, 4, 2, 1])
    one, _ = simulate_particle(MIXED, configurations=3, **OF_MIXED, **SMALL)
    other, _ = simulate_particle(MIXED[shuffled], configurations=3, **{k: np.asarray(v)[shuffled] for k, v in OF_MIXED.items()}, **SMALL)
    np.testing.assert_array_equal(one, other)
    plain, _ = simulate_particle(MIXED, configurations=3, **(OF_MIXED | {"element": "O"}), **SMALL)
    assert np.abs(one - plain).max() > 0.1 * np.abs(one).max()


def test_a_tilt_moves_every_plane_aside_by_its_depth():
    atoms, elements = MIXED[:4], OF_MIXED["element"][:4]
    tilted, _ = simulate_particle(atoms, elements, 0.0, configurations=1, tilt=(40.0, -30.0), **SMALL)
    aside = atoms + np.outer(atoms[:, 2], [0.040, -0.030, 0.0])
    expected, _ = particle_gram(aside, elements, SMALL["cell"], SMALL["microscope"], SMALL["detector"], SMALL["sampling"])
    np.testing.assert_allclose(tilted[0], expected, atol=1e-6 * np.abs(expected).max())


def test_every_atom_shakes_by_its_own_b():
    # u = sqrt(B / 8 pi^2): 0.0893 Å for 0.63 Å^2
    atoms = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 4.0], [3.0, 1.0, 0.0]])
    draws = thermal_displacements(atoms, np.array([0.63, 4 * 0.63, 0.0]), 512, seed=3)
    np.testing.assert_allclose(draws.std((0, 2)), [0.0893, 0.1786, 0.0], rtol=0.03)


def test_sites_are_filled_as_often_as_asked_and_by_one_atom():
    rng = np.random.default_rng(0)
    there = np.array([occupied(MIXED, OF_MIXED["occupancy"], rng) for _ in range(2000)])
    np.testing.assert_allclose(there.mean(0), OF_MIXED["occupancy"], atol=0.04)  # four standard deviations
    assert np.all(there[:, 3] ^ there[:, 4])


def test_an_empty_cell_scatters_nothing():
    gram, waves = particle_gram(MIXED[:0], "Au", (5.0, 5.0), Microscope(100e3, 15.0), AnnularDetector(30.0, 60.0), 0.15)
    assert gram.shape == (len(waves),) * 2 and np.abs(gram).max() < 1e-9


def test_one_atom_is_as_bright_as_its_library_says_but_for_the_soft_edge_of_the_aperture(library):
    """A thermal atom is a still one, blurred. Amplitudes f of a rim one pixel 1 / L wide, of a probe of one electron, peak at (sum f)^2 / sum f^2: higher by 1 / (3 k0 L)."""
    lens, detector, cell = Microscope(300e3, 21.0), AnnularDetector(48.0, 180.0), 12.0
    gram, waves = particle_gram(np.zeros((1, 3)), "Au", (cell, cell), lens, detector, 0.035)
    fwhm = np.sqrt(library.source_fwhm**2 + 8 * np.log(2) * rms_from_debye_waller_b(0.63) ** 2)
    seen = images_from_gram(gram, waves, (cell, cell), eqx.tree_at(lambda m: m.source_fwhm, lens, fwhm), np.zeros(1), (48, 48))[0]
    rim = 1 / (3 * 21e-3 / float(wavelength(300e3)) * cell)
    assert rim == pytest.approx(0.026, abs=1e-3)
    assert seen[0, 0] / library.series(1, 0.0, np.zeros(1), np.zeros(1))[0, 0, 0] == pytest.approx(1 + rim, abs=0.004)  # second order; a wider cell comes nearer
    assert seen.mean() * cell**2 == pytest.approx(float(library.cross_section[0]), rel=2e-3)


def test_a_plane_of_two_elements_scatters_as_in_abtem():
    """Plane wave through copper and oxygen, two planes with both in each: what falls on the annulus, beside an independent program."""
    abtem, ase = pytest.importorskip("abtem"), pytest.importorskip("ase")
    cell, n, energy = (4.0, 4.4), (400, 440), 200e3
    atoms = np.array([[1.0, 1.0, 1.0], [3.1, 2.0, 1.0], [1.3, 3.2, 3.0], [2.9, 0.7, 3.0]])
    symbols = ["Cu", "O", "O", "Cu"]
    crystal = ase.Atoms(symbols, positions=atoms, cell=[*cell, 4.0])
    potential = abtem.Potential(crystal, gpts=n, slice_thickness=2.0, parametrization="lobato", projection="infinite", device="cpu")
    wave = np.asarray(abtem.PlaneWave(energy=energy, device="cpu").multislice(potential, lazy=False).array)  # (x, y), mean intensity one
    radius = np.hypot(np.fft.fftfreq(n[0], cell[0] / n[0])[:, None], np.fft.fftfreq(n[1], cell[1] / n[1]))
    rim = np.sqrt(cell[0] * cell[1])
    ring = np.clip((100e-3 / LAM - radius) * rim + 0.5, 0, 1) - np.clip((40e-3 / LAM - radius) * rim + 0.5, 0, 1)
    expected = (np.abs(np.fft.fft2(wave) / wave.size) ** 2 * ring).sum()
    gram, waves = particle_gram(atoms[[2, 0, 3, 1]], [symbols[i] for i in (2, 0, 3, 1)], cell, Microscope(energy, 3.0), AnnularDetector(40.0, 100.0), 0.02)
    axis = int(np.flatnonzero((waves == 0).all(1))[0])
    assert gram[axis, axis].real == pytest.approx(expected, rel=1e-3)  # abtem at 0.02 Å is itself 0.2 % from this


def test_too_coarse_a_sampling_says_what_is_needed():
    with pytest.raises(InputError, match=r"0\.0836 Å or finer"):
        particle_gram(ATOMS, "Cu", CELL, MICROSCOPE, DETECTOR, 0.1)
