"""Fisher information of counts, and the functions its images stand on, against closed forms."""

import jax
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import jv

from depthprob.inference.fisher import AtomInformation, atom_information, information_of, poisson_fisher
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.focal_series import FocalSeries
from depthprob.physics.gram import bessel
from depthprob.physics.optics import Microscope
from depthprob.physics.scattering import POTENTIAL_PER_SCATTERING_FACTOR, projected_potential, scattering_factor
from depthprob.physics.specimen import Column

MICROSCOPE = Microscope(energy=3e5, convergence_angle=21.0, source_fwhm=0.7)
NARROW = AnnularDetector(48.0, 90.0)  # for what holds with any, since it is quick


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def test_bessel_matches_scipy():
    x = np.concatenate([[0.0], np.geomspace(1e-6, 300, 400)])
    ours = bessel(60, x)
    for n in (0, 1, 7, 35, 60):
        np.testing.assert_allclose(ours[n], jv(n, x), atol=1e-11)


@pytest.mark.parametrize("parametrization", ["lobato", "kirkland"])
def test_potential_is_the_transform_of_the_scattering_factor(parametrization):
    # smeared with a Gaussian of 0.1 A, since the bare transform converges slowly
    s = 0.1
    potential = lambda r: float(projected_potential("Au", np.array(r), parametrization))
    damped = lambda q: 2 * np.pi * q * float(scattering_factor("Au", q, parametrization)) * np.exp(-2 * (np.pi * s * q) ** 2)
    there, _ = quad(lambda q: damped(q), 0, 12, limit=400)
    here, _ = quad(lambda r: r / s**2 * np.exp(-((r / s) ** 2) / 2) * potential(r), 1e-9, 3, limit=400, points=[0.05, 0.3])
    np.testing.assert_allclose(here, POTENTIAL_PER_SCATTERING_FACTOR * there, rtol=2e-4)


def test_poisson_fisher_of_an_exponential():
    # n = A exp(-t / T): information on log A is the total number of counts
    t = np.linspace(0, 5, 100)
    n = 30 * np.exp(-t)
    np.testing.assert_allclose(poisson_fisher(n, [n]), [[n.sum()]])


def test_bound_halves_when_dose_is_fourfold_and_moves_as_a_column():
    column = Column("Au", 2, 4.08, 0.63)
    series = lambda dose: FocalSeries(np.arange(-100.0, 101, 20), 0.2, dose, (31, 31))
    once, fourfold = (atom_information(column, MICROSCOPE, NARROW, series(d)) for d in (9612.0, 4 * 9612.0))
    np.testing.assert_allclose(once.atom_sd, 2 * fourfold.atom_sd, rtol=1e-6)
    assert once.column_sd < once.atom_sd.min()
    assert sorted(line.split(":")[0] for line in once.in_words()) in (["atom 1 against 2", "atoms 1 2"], ["atom 2 against 1", "atoms 1 2"])


def test_bounds_are_in_double_precision_whatever_the_setting():
    arguments = (Column("Au", 2, 4.08, 0.63), MICROSCOPE, NARROW, FocalSeries(np.linspace(-60, 60, 5), 0.4, 1.0, (9, 9)))
    double = atom_information(*arguments).fisher
    with jax.enable_x64(False):
        np.testing.assert_allclose(atom_information(*arguments).fisher, double, rtol=1e-12)


def test_an_unknown_direction_leaves_the_atoms_it_does_not_move_bounded():
    # atoms 1 and 2 enter only through their difference, atom 3 alone
    found = information_of(np.array([[1.0, -1, 0], [-1, 1, 0], [0, 0, 4]]))
    assert np.isinf(found.atom_sd[:2]).all()
    np.testing.assert_allclose(found.atom_sd[2], 0.5)


def test_unknown_directions_are_named():
    nothing = AtomInformation(np.zeros((2, 2)), np.full(2, np.inf), np.inf, np.array([1.0, 0.0]), np.array([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5)
    assert nothing.in_words() == ["atoms 1 2: sd 1 A", "atom 1 against 2: nothing is known"]
