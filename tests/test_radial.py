"""The cylindrical column against closed forms, frozen phonons and finite differences."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import jv

from depthprob.inference.fisher import AtomInformation, atom_information, information_of, poisson_fisher
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.focal_series import FocalSeries
from depthprob.physics.gram import bessel
from depthprob.physics.library import column_images, load_gram
from depthprob.physics.optics import Microscope
from depthprob.physics.radial import prepare_radial, projected_potential, radial_gram
from depthprob.physics.scattering import POTENTIAL_PER_SCATTERING_FACTOR, scattering_factor
from depthprob.physics.specimen import Column

MICROSCOPE = Microscope(energy=3e5, convergence_angle=21.0, source_fwhm=0.7)
DETECTOR = AnnularDetector(48.0, 180.0)
NARROW = AnnularDetector(48.0, 90.0)  # for what holds with any, since it is quick
FROZEN_PHONONS = Path(__file__).parent / "data" / "frozen_phonons_Au_001.npz"


@pytest.fixture(scope="module")
def phonons():
    """512 frozen-phonon configurations of gold columns of 1 to 12 atoms, by `build_gram` with seed 0, 32 of them at full accuracy."""
    return load_gram(FROZEN_PHONONS)


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


def series_of(gram, phonons, foci):
    return column_images(np.asarray(gram)[None], phonons.modes, MICROSCOPE, foci, 24.0, 120)[0]


def radial_column(phonons, n):
    return prepare_radial(Column("Au", n, 4.08, 0.63), 3e5, phonons.aperture, DETECTOR, phonons.modes)


@pytest.fixture(scope="module")
def three_atoms(phonons):
    with jax.enable_x64(True):
        return radial_column(phonons, 3)


def both_series(phonons, column, n):
    foci = np.array([-100.0, 0.0, 60.0])
    depths = (jnp.arange(n) - (n - 1) / 2) * 4.08
    ours = series_of(radial_gram(depths, column), phonons, foci)
    return ours, series_of(phonons.blocks.mean(0)[n - 1], phonons, foci + phonons.centre_of_mass[n - 1])


def test_one_atom_agrees_with_frozen_phonons(phonons):
    # for one atom the model is exact; 512 configurations leave 0.3 %
    ours, theirs = both_series(phonons, radial_column(phonons, 1), 1)
    assert abs(ours - theirs).max() < 0.006 * theirs.max()


def test_three_atoms_within_the_stated_error(phonons, three_atoms):
    # diffuse electrons that meet a second atom are the difference
    ours, theirs = both_series(phonons, three_atoms, 3)
    assert 0.02 < ours.max() / theirs.max() - 1 < 0.09


def test_derivative_by_depth_is_exact(three_atoms):
    depths = jnp.array([-4.1, 0.1, 4.0])
    way = jnp.array([0.3, -1.0, 0.5])
    _, tangent = jax.jvp(lambda z: radial_gram(z, three_atoms), (depths,), (way,))
    h = 1e-4
    difference = (radial_gram(depths + h * way, three_atoms) - radial_gram(depths - h * way, three_atoms)) / (2 * h)
    np.testing.assert_allclose(tangent, difference, atol=1e-6 * float(abs(tangent).max()))


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
