"""Signs of the aberration function and names of its coefficients."""

import jax
import numpy as np
import pytest

from depthprob.errors import InputError
from depthprob.physics.electron import wavelength
from depthprob.physics.optics import Microscope, aberration_phase


def test_defocus_undoes_free_flight():
    # exp(-i chi) at defocus f times exp(-i pi wavelength k^2 z) is flat at z = f: the crossover lies in that plane
    k = np.linspace(0, 1, 11)
    chi = aberration_phase(Microscope(300e3, 21.0), k, 0 * k, 80.0)
    np.testing.assert_allclose(-chi, np.pi * wavelength(300e3) * 80.0 * k**2, rtol=1e-5, atol=1e-6)


def test_spherical_aberration_opposes_underfocus():
    # C10 = -f: at Scherzer-like focus both terms cancel where f = C30 theta^2 / 2
    lam, theta = wavelength(300e3), 10e-3
    f = 1e7 * theta**2 / 2
    chi = aberration_phase(Microscope(300e3, 21.0, spherical_aberration=1e7), theta / lam, 0.0, f)
    assert abs(float(chi)) < 1e-3


def test_astigmatism_is_defocus_along_its_azimuth():
    k, azimuth = 0.7, np.radians(25.0)
    stigmatic = Microscope(300e3, 21.0, aberrations={"C12_A": 30.0, "phi12_deg": 25.0})
    along = aberration_phase(stigmatic, k * np.cos(azimuth), k * np.sin(azimuth), 0.0)
    across = aberration_phase(stigmatic, -k * np.sin(azimuth), k * np.cos(azimuth), 0.0)
    overfocus = aberration_phase(Microscope(300e3, 21.0), k, 0.0, -30.0)
    assert float(along) == pytest.approx(float(overfocus), rel=1e-4)
    assert float(across) == pytest.approx(-float(overfocus), rel=1e-4)


def test_units_in_the_names_may_be_left_out():
    short = Microscope(300e3, 21.0, aberrations={"C21": 300.0, "phi21": 40.0})
    long = Microscope(300e3, 21.0, aberrations={"C21_A": 300.0, "phi21_deg": 40.0})
    assert aberration_phase(short, 0.3, 0.8, 0.0) == aberration_phase(long, 0.3, 0.8, 0.0)


@pytest.mark.parametrize("name", ["C10_A", "C30", "c12_A", "C13_A", "C12_deg", "phi50_deg", "Cs"])
def test_unknown_aberration_is_named(name):
    with pytest.raises(InputError, match=name):
        Microscope(300e3, 21.0, aberrations={name: 1.0})


def test_one_aberration_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        Microscope(300e3, 21.0, aberrations={"C12": 1.0, "C12_A": 2.0})


def test_aberrations_are_differentiable():
    def chi(m):
        return aberration_phase(m, 0.5, 0.5, 0.0)

    slope = jax.grad(chi)(
        Microscope(300e3, 21.0, 0.7, aberrations={"C12_A": 30.0, "phi12_deg": 10.0})
    )
    assert (
        slope.aberrations["C12_A"] != 0
        and slope.aberrations["phi12_deg"] != 0
        and slope.spherical_aberration != 0
    )
