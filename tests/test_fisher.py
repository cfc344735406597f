"""Fisher information of counts, and the functions its images stand on, against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize._numdiff import approx_derivative
from scipy.special import jv
from scipy.stats import norm, poisson

from depthprob.errors import InputError
from depthprob.inference import fisher
from depthprob.inference.atoms import atom_counts, atom_information, information_of, phonon_information
from depthprob.inference.crlb import crlb
from depthprob.inference.fisher import Information, fisher_information, poisson_fisher
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts
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


GRID = jnp.arange(-12.0, 12.01, 0.5)


def blob(p):
    """A Gaussian spot of so many counts."""
    x, y = GRID - p["centre"][0], GRID[:, None] - p["centre"][1]
    return p["counts"] * 0.5**2 / (2 * np.pi * p["width"] ** 2) * jnp.exp(-(x**2 + y**2) / (2 * p["width"] ** 2))


SPOT = {"counts": 9e5, "width": 1.5, "centre": np.array([0.3, -0.2])}


def test_information_on_a_spot_is_that_of_the_normal_distribution():
    # N draws of a normal distribution in two dimensions: N / s^2 on either coordinate, 4 N / s^2 on s; and 1 / N on N
    found = fisher_information(blob, SPOT, units={"centre": "Å", "width": "Å"})
    assert found.names == ("centre[0]", "centre[1]", "counts", "width") and found.units == ("Å", "Å", "", "Å")
    np.testing.assert_allclose(found.matrix, np.diag([9e5 / 1.5**2, 9e5 / 1.5**2, 1 / 9e5, 4 * 9e5 / 1.5**2]), rtol=1e-6, atol=0.1)  # means below 1e-6 count as that
    np.testing.assert_allclose(found.sd("counts"), 9e5**0.5, rtol=1e-6)


def test_the_centroid_of_simulated_spots_scatters_by_the_bound():
    # the centroid is the maximum of the likelihood for a normal spot on a dark ground
    rng, expected = np.random.default_rng(5), np.asarray(blob(SPOT))
    counts = rng.poisson(expected, (10000, *expected.shape))
    centroids = (counts * np.asarray(GRID)).sum((1, 2)) / counts.sum((1, 2))
    np.testing.assert_allclose(centroids.std(), fisher_information(blob, SPOT).sd("centre")[0], rtol=0.03)


def test_information_does_not_depend_on_how_it_is_added_up():
    whole = fisher_information(blob, SPOT)
    rows = fisher_information(lambda p, row: blob(p)[row], SPOT, parts=range(len(GRID)))
    np.testing.assert_allclose(rows.matrix, whole.matrix, rtol=1e-10, atol=1e-6)
    twice = fisher_information(lambda p: 2 * blob(p), SPOT)
    np.testing.assert_allclose(twice.matrix, (whole + whole).matrix, rtol=1e-6, atol=1e-3)


MANY = {"counts": np.full(9, 1e5), "centre": np.stack(np.meshgrid(*[np.arange(8.0, 48.0, 16.0)] * 2), -1).reshape(-1, 2) + 0.3}


def through_fourier_space(p):
    """Nine spots 16 pixels apart and 1.5 wide, drawn as a microscopist's forward model may: with far more numbers on the way than come out."""
    q = jnp.fft.fftfreq(48)
    along_x, along_y = (jnp.exp(-2j * jnp.pi * q * p["centre"][:, i, None] - 2 * (jnp.pi * 1.5 * q) ** 2) for i in (0, 1))
    return jnp.fft.ifft2(jnp.einsum("c,cy,cx->cyx", p["counts"], along_y, along_x)).real.sum(0)


def test_fewer_derivatives_are_taken_together_where_memory_is_short(monkeypatch):
    seen, compiled_within = [], fisher._compiled_within
    monkeypatch.setattr(fisher, "_compiled_within", lambda *a: seen.append(compiled_within(*a)) or seen[-1])
    generous, narrow = (fisher_information(through_fourier_space, MANY, memory_limit=limit) for limit in (1.0, 4e-3))
    (at_once, _), (fewer, compiled) = seen
    assert at_once == 27 and fewer < 14 and compiled.memory_analysis().temp_size_in_bytes <= 4e6
    np.testing.assert_allclose(narrow.matrix, generous.matrix, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(narrow.sd("centre"), 1.5 / 1e5**0.5, rtol=1e-3)


def test_bounds_do_not_depend_on_the_parameters_that_others_are_told_by():
    whole = fisher_information(blob, SPOT)
    log = fisher_information(lambda p: blob(p | {"counts": jnp.exp(p["log_counts"])}), {k: v for k, v in SPOT.items() if k != "counts"} | {"log_counts": np.log(9e5)})
    jacobian = np.eye(4)
    jacobian[2, 2] = 9e5  # d counts / d log counts
    np.testing.assert_allclose(whole.in_terms_of(("centre[0]", "centre[1]", "log_counts", "width"), ("",) * 4, jacobian).sd("log_counts"), log.sd("log_counts"), rtol=1e-9)
    np.testing.assert_allclose(log.sd("width"), whole.sd("width"), rtol=1e-9)


def test_read_noise_as_a_shifted_poisson_distribution():
    # beside the information of a Poisson number read with normal noise, by sums and integrals
    mean, sd = 5.0, 1.2
    n, x = np.arange(60), np.linspace(-10, 40, 20001)
    read = norm.pdf(x[:, None], n, sd)
    density, slope = read @ poisson.pmf(n, mean), read @ (poisson.pmf(n, mean) * (n / mean - 1))
    exact = np.trapezoid(slope**2 / density, x)
    found = fisher_information(lambda p: p["mean"][None], {"mean": mean}, read_variance=sd**2).matrix[0, 0]
    assert found == pytest.approx(1 / (mean + sd**2)) and found == pytest.approx(exact, rel=0.03) and found < exact


def test_a_field_of_columns_is_one_model_of_many(library):
    foci = np.arange(-60.0, 61.0, 30.0)
    series = FocalSeries(foci, 0.4, np.full(5, 9612.0), (14, 17))
    field = Field(np.array([[2.4, 2.6], [4.4, 2.7]]), np.array([8, 5]), np.array([1.0, -9.0]), np.full(5, 2e-3), np.ones(5), np.zeros((5, 2)))
    model = lambda field: expected_counts(field, library, series)
    found = fisher_information(model, field, units={"depths": "Å"})
    held = found.known("image_shifts", "focus_offset", "focus_step", "source_variance")
    # beside derivatives written out by hand, and differences by scipy
    np.testing.assert_allclose(held.sd("depths"), crlb(field, library, series, ("positions", "background", "gain")), rtol=1e-5)
    of_depths = lambda z: np.asarray(model(dataclasses.replace(field, depths=z)), float).ravel()
    slopes = approx_derivative(of_depths, field.depths, abs_step=0.05, method="3-point").T
    np.testing.assert_allclose(held.known("positions", "gain", "background").matrix, poisson_fisher(of_depths(field.depths), slopes), rtol=2e-3)
    np.testing.assert_allclose(held.profiled("depths").sd(), held.sd("depths"), rtol=1e-9)
    # all foci and all depths alike: nobody can tell, and it is said; of the depths' difference much is known
    lost = found.profiled("depths")
    assert np.isinf(lost.sd()).all() and lost.in_words()[-1] == "depths 0 1: nothing is known"
    assert 0.1 < lost.in_terms_of(("difference",), ("Å",), np.array([[0.5], [-0.5]])).sd()[0] < 3
    rest = found.known("image_shifts", "focus_step")
    np.testing.assert_allclose(rest.with_prior({"focus_offset": 2.0}).sd("depths"), np.hypot(2.0, rest.known("focus_offset").sd("depths")), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fisher_information(blob, SPOT, units={"centres": "Å"}), "'centres'.*Did you mean 'centre'"),
        (lambda: fisher_information(lambda p: -blob(p), SPOT), "as low as -1.56e"),
        (lambda: fisher_information(lambda p: blob(p) + jnp.sqrt(p["width"] - 1.5), SPOT), r"not finite, by centre\[0\] and 3 more"),
        (lambda: fisher_information(lambda p: p["n"][None], {"n": 3}), "no floating-point number"),
        (lambda: fisher_information(blob, SPOT, parts=[]), "there are no parts"),
        (lambda: fisher_information(blob, SPOT, read_variance=-1.0), "read_variance is -1.0"),
        (lambda: fisher_information(blob, SPOT, memory_limit=0.0), "memory_limit 0.0"),
        (lambda: fisher_information(blob, SPOT, memory_limit=1e-6), "4 derivatives of 2401 counts and their matrix take 0.00015"),
        (lambda: fisher_information(lambda p: through_fourier_space(MANY | {"counts": jnp.full(9, p)}), 1e5, memory_limit=3e-4), "what the model makes on the way to one derivative take 0.0"),
        (lambda: fisher_information(blob, SPOT).sd("depth"), "no parameter 'depth'"),
        (lambda: fisher_information(blob, SPOT).known(), "no parameter was named"),
        (lambda: fisher_information(blob, SPOT).with_prior({"width": 0.0}), "width is 0.0; allowed are numbers above 0"),
        (lambda: fisher_information(blob, SPOT) + information_of(np.eye(2)), "cannot be added"),
        (lambda: Information(np.eye(2), ("a",), ("",)), "has 1 names"),
    ],
)
def test_what_cannot_be_asked(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_poisson_fisher_of_an_exponential():
    # n = A exp(-t / T): information on log A is the total number of counts
    t = np.linspace(0, 5, 100)
    n = 30 * np.exp(-t)
    np.testing.assert_allclose(poisson_fisher(n, [n]), [[n.sum()]])


def test_bound_halves_when_dose_is_fourfold_and_moves_as_a_column():
    column = Column("Au", 2, 4.08, 0.63)
    series = lambda dose: FocalSeries(np.arange(-100.0, 101, 20), 0.2, dose, (31, 31))
    once, fourfold = (atom_information(column, MICROSCOPE, NARROW, series(d)) for d in (9612.0, 4 * 9612.0))
    np.testing.assert_allclose(once.sd(), 2 * fourfold.sd(), rtol=1e-6)
    assert once.sd_together() < once.sd().min()
    assert sorted(line.split(":")[0] for line in once.in_words()) in (["atom 1 2", "atom 1 against atom 2"], ["atom 1 2", "atom 2 against atom 1"])


@pytest.mark.parametrize("detector", [AnnularDetector(48.0, 90.0), AnnularDetector((48.0, 80.0), (60.0, 90.0))], ids=["annulus", "two annuli"])
def test_bounds_on_single_atoms_are_those_of_whole_forms(detector):
    column, series = Column("Au", 3, 4.08, 0.63), FocalSeries(np.arange(-100.0, 101, 20), 0.2, 9612.0, (31, 31))
    counts = atom_counts(column, MICROSCOPE, detector, series)
    expected = information_of(poisson_fisher(counts[0], counts[1:]))
    found = atom_information(column, MICROSCOPE, detector, series)
    np.testing.assert_allclose(found.sd_together(), expected.sd_together(), rtol=2e-3)
    np.testing.assert_allclose(found.sd(), expected.sd(), rtol=0.02)


def test_bounds_are_in_double_precision_whatever_the_setting():
    arguments = (Column("Au", 2, 4.08, 0.63), MICROSCOPE, NARROW, FocalSeries(np.linspace(-60, 60, 5), 0.4, 1.0, (9, 9)))
    double = atom_information(*arguments).matrix
    with jax.enable_x64(False):
        np.testing.assert_allclose(atom_information(*arguments).matrix, double, rtol=1e-12)


def test_an_unknown_direction_leaves_the_atoms_it_does_not_move_bounded():
    # atoms 1 and 2 enter only through their difference, atom 3 alone
    found = information_of(np.array([[1.0, -1, 0], [-1, 1, 0], [0, 0, 4]]))
    assert np.isinf(found.sd()[:2]).all()
    np.testing.assert_allclose(found.sd()[2], 0.5)


def test_directions_are_named():
    assert information_of(np.array([[0.5, 0.5], [0.5, 0.5]])).in_words()[-1] in ("atom 1 against atom 2: nothing is known", "atom 2 against atom 1: nothing is known")
    mixed = Information(np.array([[4.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]), ("z[0]", "z[1]", "gain"), ("Å", "Å", ""))
    assert mixed.in_words()[-1] in ("gain against z 0: sd 1.41 times what each has alone", "z 0 against gain: sd 1.41 times what each has alone")
    np.testing.assert_allclose(mixed.sd(), np.diag(np.linalg.inv(mixed.matrix)) ** 0.5)
    np.testing.assert_allclose(mixed.sd_alone("gain"), 1.0)


@pytest.mark.parametrize("bounds", [atom_information, atom_counts, phonon_information])
def test_atoms_are_refused_a_detector_in_the_direct_beam(bounds):
    with pytest.raises(InputError, match="of the direct beam falls on the detector"):
        bounds(Column("Au", 2, 4.08, 0.63), MICROSCOPE, AnnularDetector(0.0, 90.0), FocalSeries(np.zeros(1), 0.4, np.ones(1), (5, 5)))
