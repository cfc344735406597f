"""Published numbers of the fast electron and of gold's scattering."""

import jax.numpy as jnp
import numpy as np
import pytest

from depthprob.errors import InputError
from depthprob.physics.electron import interaction_parameter, wavelength
from depthprob.physics.scattering import POTENTIAL_PER_SCATTERING_FACTOR, parameters, scattering_factor


@pytest.mark.parametrize(("energy", "expected"), [(100e3, 0.03701), (200e3, 0.02508), (300e3, 0.01969)])
def test_wavelength_is_kirklands(energy, expected):
    assert wavelength(energy) == pytest.approx(expected, abs=6e-6)  # Kirkland (2010), table 2.2, as printed


def test_interaction_parameter_is_the_relativistic_mass_times_wavelength():
    # sigma = 2 pi m e wavelength / h^2 with m = gamma m_e; the potential of f_e is h^2 / (2 pi m_e e) f_e, so the
    # phase of a scattering factor is gamma * wavelength * f_e
    for energy in (80e3, 300e3):
        gamma = 1 + energy / 510998.95
        expected = gamma * wavelength(energy) / POTENTIAL_PER_SCATTERING_FACTOR
        assert interaction_parameter(energy) == pytest.approx(expected, rel=1e-5)


def test_high_angle_limit_is_rutherford():
    # Mott-Bethe: f_e -> Z / (2 pi^2 a0 q^2) with a0 = 0.529177 Å once the electrons scatter no more
    q = 12.0
    for element, z in (("Si", 14), ("Au", 79)):
        rutherford = z / (2 * np.pi**2 * 0.529177 * q**2)
        assert float(scattering_factor(element, jnp.asarray(q))) == pytest.approx(rutherford, rel=0.12)


def test_both_parametrizations_agree_for_gold():
    q = jnp.linspace(0.3, 6, 30)
    lobato, kirkland = (scattering_factor("Au", q, p) for p in ("lobato", "kirkland"))
    assert float(jnp.max(jnp.abs(lobato / kirkland - 1))) < 0.03  # independent fits to the same Dirac-Fock atoms


def test_every_element_agrees_with_abtem():
    parametrization = pytest.importorskip("abtem.parametrizations")
    q = np.linspace(0.05, 5, 40)
    for name, theirs in (("lobato", parametrization.LobatoParametrization()), ("kirkland", parametrization.KirklandParametrization())):
        for element in ("H", "C", "Si", "Fe", "Pt", "Au", "U"):
            expected = theirs.scattering_factor(element)(q**2)
            np.testing.assert_allclose(scattering_factor(element, q, name), expected, rtol=1e-4)


def test_unknown_element_is_named():
    with pytest.raises(InputError, match="Xx"):
        parameters("Xx")
