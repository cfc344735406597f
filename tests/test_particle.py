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
    particle_gram,
    simulate_particle,
    thermal_displacements,
)

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


def test_too_coarse_a_sampling_says_what_is_needed():
    with pytest.raises(InputError, match=r"0\.0836 Å or finer"):
        particle_gram(ATOMS, "Cu", CELL, MICROSCOPE, DETECTOR, 0.1)
