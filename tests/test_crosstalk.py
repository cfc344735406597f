"""What two columns record beyond the sum of each alone, against sums over all displacements of two atoms, and closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import next_fast_len

from depthprob.physics import crosstalk
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.electron import interaction_parameter, wavelength
from depthprob.physics.multislice import multislice, transmission
from depthprob.physics.optics import Microscope
from depthprob.physics.particle import images_from_gram
from depthprob.physics.scattering import POTENTIAL_PER_SCATTERING_FACTOR, scattering_factor
from depthprob.physics.specimen import Column, rms_from_debye_waller_b

ENERGY, ANGLE, B, SPACING = 300e3, 21.0, 0.63, 4.08
DETECTOR, LAM = AnnularDetector(48.0, 180.0), float(wavelength(ENERGY))


@functools.cache
def prepared(element, separation, spacing):
    return crosstalk.prepare_pair(Column(element, 1, spacing, B), ENERGY, ANGLE, DETECTOR, separation)


def lacking(element, separation, below, numbers=(1, 1)):
    """The pair, and the matrices of what it lacks and of one column alone; atoms of a column stand `below` apart, as its two tops do."""
    pair = prepared(element, separation, below)
    within = crosstalk.between(pair, below, max(numbers) + 1)
    alone = crosstalk.grams(pair, within, [(0.0, 0.0)], {(n,) for n in numbers})
    return pair, (crosstalk.crosstalk(pair, within, below, [numbers], alone)[numbers], alone[numbers[:1]])


def test_two_atoms_lack_what_the_sum_over_all_their_displacements_says():
    """A probe in focus on the upper atom, half an ångström beside it; the other is 82 Å below. Nine nodes a displacement are exact for polynomials of degree five.

    What is lacking is 6 % of the signal; waves beyond `LIMIT` change it by a tenth of that.
    """
    below = 20 * SPACING
    pair, (found, _) = lacking("Au", 2.04, below)
    n = next_fast_len(math.ceil(pair.cell / 0.0365))
    spectrum = np.zeros((n, n), np.complex64)
    probe = np.exp(2j * np.pi * pair.waves[:, 0] * 0.5 / pair.cell)
    spectrum[pair.waves[:, 1], pair.waves[:, 0]] = probe
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights, u = np.outer(weights, weights).ravel() / weights.sum() ** 2, float(rms_from_debye_waller_b(B))
    moves = jnp.asarray(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 1, 2) * u)
    first, second = (jax.lax.map(lambda by, x=x: transmission(jnp.array([[x, 0.0]]) + by, "Au", (pair.cell,) * 2, (n, n), ENERGY, n / pair.cell / 3), moves) for x in (-1.02, 1.02))
    q = np.fft.fftfreq(n, pair.cell / n) * LAM * 1e3
    sensitivity = jnp.asarray(DETECTOR.sensitivity(q, q[:, None], LAM * 1e3 / pair.cell))
    signal = lambda depths, *planes: (jnp.abs(multislice(jnp.asarray(spectrum), jnp.stack(planes), jnp.array(depths), (pair.cell,) * 2, LAM, n / pair.cell / 3)) ** 2 * sensitivity).sum()
    over = jax.jit(lambda depths, *stacks: jax.lax.map(lambda planes: signal(depths, *planes), stacks))
    i, j = np.indices((9, 9)).reshape(2, -1)
    both = weights[i] * weights[j] @ over([0.0, below], first[i], second[j])
    apart = weights @ over([0.0], first) + weights @ over([below], second)
    assert both - apart < -0.05 * apart
    assert float((probe.conj() @ found @ probe).real) == pytest.approx(float(both - apart), rel=0.1)


def test_of_weak_atoms_it_is_the_shadow_of_the_upper_and_the_fringes_between_them():
    """Two helium atoms under a plane wave, to lowest order in their potential V, mean transmission 1 + i sigma <V>, at a distance d and heights z apart.

    The upper changes the intensity upon the lower to 1 + 2 sigma int <V>(q) sin(pi lambda q^2 z) exp(2 pi i q.d) d^2q, and with it what motion scatters of
    it. And their elastic waves interfere on the detector: 2 int D |sigma <V>|^2 cos(pi lambda q^2 z) exp(2 pi i q.d) d^2q; beyond `LIMIT` they are left out, 5 % here.
    """
    separation, below = 1.5, 3 * SPACING
    pair, (found, alone) = lacking("He", separation, below)
    straight = int(np.flatnonzero((pair.waves == 0).all(1))[0])
    x, y = np.meshgrid(np.arange(-60, 61) / pair.cell, np.arange(-60, 61) / pair.cell)
    q2, to_mrad = x**2 + y**2, 1e3 * LAM
    factor = np.asarray(scattering_factor("He", np.sqrt(q2))) * np.exp(-B * q2 / 4)
    born = float(interaction_parameter(ENERGY)) * POTENTIAL_PER_SCATTERING_FACTOR * factor / pair.cell**2
    sensitivity = DETECTOR.sensitivity(x * to_mrad, y * to_mrad, to_mrad / pair.cell) * (q2 < crosstalk.LIMIT**2)
    along, flight = np.cos(2 * np.pi * x * separation), np.pi * LAM * q2 * below
    elastic = sensitivity * born**2
    shadow = 2 * (born * np.sin(flight) * along).sum() * (float(alone[straight, straight].real) - elastic.sum())
    fringes = 2 * (elastic * np.cos(flight) * along).sum()
    assert float(found[straight, straight].real) == pytest.approx(shadow + fringes, rel=0.02)


def test_what_pairs_share_is_worked_out_once_and_changes_nothing():
    """Second columns that begin higher, lower, and end higher or lower than the first."""
    pair = prepared("He", 1.5, 3 * SPACING)
    within = crosstalk.between(pair, 0.0, 5)
    for below in (0.0, 2 * pair.spacing):
        of = lambda wanted, below=below: crosstalk.grams(pair, within, [(-0.75, 0.0), (0.75, below)], wanted)
        together = of([(3, 1), (1, 3), (3, 3), (2, 0)])
        assert all(abs(of([numbers])[numbers] - gram).max() < 1e-6 * abs(gram).max() for numbers, gram in together.items())  # single precision


def test_still_atoms_lack_a_finite_image():
    pair = crosstalk.prepare_pair(Column("He", 1, SPACING, 0.0), ENERGY, ANGLE, DETECTOR, 1.5)
    within = crosstalk.between(pair, 0.0, 2)
    alone = crosstalk.grams(pair, within, [(0.0, 0.0)], {(1,)})
    assert np.isfinite(crosstalk.crosstalk(pair, within, 0.0, [(1, 1)], alone)[1, 1]).all()


def test_many_pairs_lack_what_each_lacks_alone():
    """Through the few waves that the longest and the shortest lack, and through those that others are known to; where those are of no use, for all waves."""
    pair = prepared("Au", 2.04, 20 * SPACING)
    within, wanted = crosstalk.between(pair, 20 * SPACING, 6), {(a, b) for a in range(1, 6) for b in range(1, 6) if abs(a - b) < 2}
    alone = crosstalk.grams(pair, within, [(0.0, 0.0)], {(n,) for n in range(1, 6)})
    exact = crosstalk.crosstalk(pair, within, 20 * SPACING, wanted, alone)
    many = lambda some, known=(): crosstalk.crosstalk_of_many(pair, within, 20 * SPACING, some, alone, known)
    matrix = lambda lacked: (lacked.vectors * lacked.values) @ lacked.vectors.conj().T
    found = many(wanted)
    again = many({(3, 3)}, [found[5, 5], found[2, 2]])
    of_no_use = many({(3, 3)}, [crosstalk.PairGram(np.array([1.0]), np.eye(len(pair.waves), 1).astype(np.complex64), pair.waves, pair.cell)])
    assert set(found) == wanted
    for numbers, lacked in (*found.items(), *again.items()):
        assert np.linalg.norm(matrix(lacked) - exact[numbers]) < crosstalk.MISSED * np.linalg.norm(exact[numbers]), numbers
    assert np.linalg.norm(matrix(of_no_use[3, 3]) - exact[3, 3]) < 1e-3 * np.linalg.norm(exact[3, 3])


def test_columns_far_apart_lack_nothing():
    largest = {}
    for separation in (2.04, 5.0):
        pair, (found, _) = lacking("Au", separation, 20 * SPACING)
        largest[separation] = abs(images_from_gram(found, pair.waves, (pair.cell,) * 2, Microscope(ENERGY, ANGLE), np.array([0.0, 40.0, 80.0]), (40, 40))).max()
    assert largest[5.0] < 0.02 * largest[2.04]
