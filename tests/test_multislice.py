"""Waves through atoms: conservation, free flight, and the grid."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import j0

from depthprob.physics.electron import interaction_parameter, wavelength
from depthprob.physics.gram import default_sampling
from depthprob.physics.multislice import exit_waves, multislice, propagator, transmission
from depthprob.physics.scattering import POTENTIAL_PER_SCATTERING_FACTOR, panels, projected_potential, scattering_factor

ENERGY, CELL, SHAPE = 300e3, (6.0, 7.5), (210, 180)
LAM = wavelength(ENERGY)
LIMIT = 180 / 6.0 / 3
WAVES = np.array([[0, 0], [3, -4], [-5, 2]])


def gold(*positions):
    return transmission(np.array(positions), "Au", CELL, SHAPE, ENERGY, LIMIT)


def test_vacuum_only_turns_the_phase():
    vacuum = jnp.ones((3, *SHAPE), jnp.complex64)
    spectra = np.asarray(exit_waves(WAVES, vacuum, jnp.array([5.0, 9.0, 30.0]), CELL, LAM, LIMIT))
    k2 = ((WAVES / np.array(CELL)) ** 2).sum(1)
    beams = spectra[np.arange(3), WAVES[:, 1], WAVES[:, 0]]
    np.testing.assert_allclose(beams, np.exp(-1j * np.pi * LAM * k2 * 30.0), atol=1e-5)
    np.testing.assert_allclose((np.abs(spectra) ** 2).sum((1, 2)), 1, rtol=1e-5)


def test_probe_crosses_over_at_its_defocus():
    qx, qy = np.fft.fftfreq(180, 6.0 / 180), np.fft.fftfreq(210, 7.5 / 210)
    k2 = qx**2 + qy[:, None] ** 2
    probe = np.where(
        k2 < (21e-3 / LAM) ** 2, np.exp(1j * np.pi * LAM * k2 * 40.0), 0
    )  # exp(-i chi) at defocus +40 Å
    peak = [
        float(jnp.abs(jnp.fft.ifft2(probe * propagator(CELL, SHAPE, LAM, z, LIMIT))[0, 0]))
        for z in (-40.0, 0.0, 40.0, 80.0)
    ]
    assert np.argmax(peak) == 2


def test_atoms_keep_the_electrons_but_for_the_band_limit():
    spectra = exit_waves(
        WAVES,
        jnp.stack([gold([1.0, 2.0], [4.0, 5.0])] * 2),
        jnp.array([0.0, 4.08]),
        CELL,
        LAM,
        LIMIT,
    )
    norm = (np.abs(np.asarray(spectra)) ** 2).sum((1, 2))
    assert np.all(norm < 1) and np.all(norm > 0.995)


def test_transmission_moves_with_its_atom():
    def spectrum(x, y):
        return np.fft.fft2(gold([x, y]))

    qx, qy = np.fft.fftfreq(180, 6.0 / 180), np.fft.fftfreq(210, 7.5 / 210)
    ramp = np.exp(-2j * np.pi * (0.113 * qx - 0.27 * qy[:, None]))
    moved, reference = spectrum(2.113, 2.73), spectrum(2.0, 3.0)
    scattered = np.abs(reference).ravel()[1:].max()
    assert np.abs(moved - reference * ramp).max() < 3e-4 * scattered  # single precision of phases of 200 turns


@pytest.mark.parametrize("n", [150, 300])
def test_one_atom_scatters_as_its_radial_integral(n):
    """int (exp(i sigma V) - 1) J0(2 pi q r) d^2r by quadrature of the closed-form potential, on coarse and fine grids, off the grid's points."""
    cell, sigma = (6.0, 6.0), interaction_parameter(ENERGY)
    spectrum = np.fft.fft2(transmission(np.array([[0.0, 0.0113]]), "Au", cell, (n, n), ENERGY, n / 18)) * (36 / n**2)
    for j in (12, 30, 48):  # 2, 5 and 8 / A
        r, w = panels(np.array([0, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1, 4]), [40] * 7 + [150] * 2)
        exact = np.sum(2 * np.pi * r * w * (np.exp(1j * sigma * projected_potential("Au", r)) - 1) * j0(2 * np.pi * j / 6 * r))
        assert abs(spectrum[0, j] - exact) < 1e-3 * abs(exact)


def test_atoms_of_one_plane_multiply_their_transmissions():
    """Two gold atoms 1.2 A apart, refined: a neighbour turns the phase of a nucleus (or the high-angle signal is 0.17 % too large)."""

    def signal(n):
        spectrum = np.fft.fft2(transmission(np.array([[3.0, 3.0], [4.2, 3.1]]), "Au", (6.0, 6.0), (n, n), ENERGY, 10.0)) / n**2
        q = np.hypot(*np.meshgrid(*[np.fft.fftfreq(n, 6.0 / n)] * 2))
        return float((np.abs(spectrum) ** 2)[q > 2.4].sum())

    assert signal(180) == pytest.approx(signal(540), rel=1e-4)


def test_weak_potential_is_the_scattering_factor():
    """One light atom at high energy: the scattered wave is i sigma V, the first Born approximation."""
    spectrum = np.fft.fft2(transmission(np.zeros((1, 2)), "H", CELL, SHAPE, ENERGY, LIMIT)) / (
        180 * 210
    )
    q = 3 / CELL[0]
    born = (
        interaction_parameter(ENERGY)
        * POTENTIAL_PER_SCATTERING_FACTOR
        * float(scattering_factor("H", jnp.asarray(q)))
        / (6.0 * 7.5)
    )
    assert spectrum[0, 3].imag == pytest.approx(born, rel=2e-3)


def test_weak_potentials_of_two_elements_add_with_the_phases_of_their_places():
    places, kinds = np.array([[1.0, 2.0], [4.3, 5.1], [2.2, 6.0]]), ["He", "H", "He"]
    spectrum = np.fft.fft2(transmission(places, kinds, CELL, SHAPE, ENERGY, LIMIT)) / (180 * 210)
    for jx, jy in ((3, 0), (2, -4), (0, 1)):
        q = np.array([jx / CELL[0], jy / CELL[1]])
        factors = np.array([float(scattering_factor(kind, jnp.asarray(np.hypot(*q)))) for kind in kinds])
        born = 1j * interaction_parameter(ENERGY) * POTENTIAL_PER_SCATTERING_FACTOR / (6.0 * 7.5) * (factors * np.exp(-2j * np.pi * places @ q)).sum()
        # to second order in a phase of 0.1 rad at the nuclei
        assert abs(spectrum[jy, jx] - born) < 0.02 * abs(born)


def test_high_angle_signal_is_converged_in_the_grid():
    """Cutting the potential before the exponential changes this by 16 %, and only refinement sees it."""

    def signal(n):
        cell, limit = (6.0, 6.0), n / 6.0 / 3
        atom = transmission(np.array([[3.0, 3.0]]), "Au", cell, (n, n), ENERGY, limit)
        out = multislice(
            jnp.zeros((n, n)).at[0, 0].set(1.0), atom[None], jnp.zeros(1), cell, LAM, limit
        )
        q = np.hypot(*np.meshgrid(*[np.fft.fftfreq(n, 6.0 / n)] * 2)) * LAM * 1e3
        return float((np.abs(np.asarray(out)) ** 2)[(q > 48) & (q < 180)].sum())

    assert signal(176) == pytest.approx(signal(352), rel=1e-3)


@pytest.mark.parametrize(("element", "energy", "angle", "inner", "outer"), [("Au", 300e3, 21.0, 48.0, 180.0), ("Cu", 200e3, 20.0, 40.0, 100.0), ("C", 80e3, 25.0, 60.0, 200.0)])
def test_default_sampling_is_within_a_thousandth_of_the_limit(element, energy, angle, inner, outer):
    """Absolute intensity of a focused probe on three atoms, half an angstrom apart laterally; the working pixel halved."""
    side, lam = 5.0, wavelength(energy)
    places = np.array([[2.5, 2.5], [2.9, 2.4], [2.5, 2.4]])

    def signal(n):
        limit = n / side / 3
        q = np.hypot(*np.meshgrid(*[np.fft.fftfreq(n, side / n)] * 2))
        ramp = np.exp(-2j * np.pi * 2.5 * np.add.outer(*[np.fft.fftfreq(n, side / n)] * 2))
        disc = lambda a: np.clip((a * 1e-3 / lam - q) * side + 0.5, 0, 1)
        planes = jnp.stack([transmission(place[None], element, (side, side), (n, n), energy, limit) for place in places])
        out = multislice(jnp.asarray(disc(angle) / np.sqrt((disc(angle) ** 2).sum()) * ramp), planes, jnp.array([-4.0, 0.0, 4.0]), (side, side), lam, limit)
        return float((np.abs(np.asarray(out)) ** 2 * (disc(outer) - disc(inner))).sum())

    n = int(np.ceil(side / default_sampling(energy, outer, angle)))
    assert signal(n) == pytest.approx(signal(2 * n), rel=1e-3)  # signal(2 n) is within 7e-5 of signal(4 n)


def test_empty_planes_change_nothing():
    """Refining the slices: free flight in one step or in many."""
    atom, empty = gold([3.0, 3.7]), jnp.ones(SHAPE, jnp.complex64)
    one = exit_waves(WAVES, jnp.stack([atom, atom]), jnp.array([0.0, 4.08]), CELL, LAM, LIMIT)
    many = exit_waves(WAVES, jnp.stack([empty, atom, empty, empty, atom]), jnp.array([-2.0, 0.0, 1.1, 3.9, 4.08]), CELL, LAM, LIMIT)
    np.testing.assert_allclose(many, one, atol=2e-5)
