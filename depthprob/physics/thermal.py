"""The mean over thermal motion of an isolated column, in closed form: all frozen-phonon configurations at once.

What a detector records is a quadratic form of the wave, <psi| G |psi>. Behind the column G is the detector itself, diagonal in
frequency. Seen from above, free flight turns it into P* G P, and an atom displaced by u into t(u)* G t(u), whose mean over u is the
product of G, point by point in (r, r'), with the atom's mutual coherence <t*(r - u) t(r' - u)>. Atoms move independently (Einstein),
so the mean over all their displacements is these steps one after the other: one pass from the detector up the column gives every atom
number, with elastic and diffuse scattering of diffuse electrons, and no random number.

Mean and detector are round, so G is a matrix over one radius, or one frequency, for each angular momentum l, and the point-by-point
product acts at each angle between r and r'. Coherence differs from the product of mean transmissions only within `CORE` of the atom.
What G gains beyond the bare detector is kept within a disc: waves that come in from further out than the incident ones do not exist.

Everything is float64 and complex128: bounds on single atoms rest on differences between almost equal images.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float
from scipy.fft import dct
from scipy.interpolate import CubicSpline
from scipy.special import j0, ndtr

from .detector import AnnularDetector
from .electron import interaction_parameter, wavelength
from .gram import ColumnGram, DiscModes, Modes, bessel, complete_disc_modes, default_reach, disc_modes, legendre_nodes, radial_modes, require_full_symmetry
from .scattering import panels, projected_potential
from .specimen import Column, rms_from_debye_waller_b

FAINTEST = 1e-8  # of the strongest incident wave's signal, below which waves are left out of a library
CORE = 1.2  # Å; the diffuse scattering of gold from further out is 3e-5 of an image's peak
POTENTIAL = 4.0  # Å; an atom is neglected beyond
REACH = 1.0  # Å beyond `default_reach` at which incident waves matter: the potential's tail
MARGIN = 1.2  # times the probe's width, 1 / aperture, from the outermost incident ray to the absorbing edge of the disc
EDGE = 5.0  # width of that edge times the frequency between aperture and detector: a sharper one scatters incident waves into the detector


class AtomChannel(NamedTuple):
    """What one vibrating atom does to a quadratic form of the wave. Waves carry the root of their quadrature weight.

    Attributes
    ----------
    k, weight : (k,)
        Frequencies [1/Å], and the roots of their areas [1/Å].
    detected : (k,)
        The detector's form: its sensitivity at each frequency.
    transmitted : (l, k, k) complex
        Edge of the disc, then mean transmission of the atom.
    gained : (l, k, k) complex
        What an atom above the bare detector adds to its form.
    core : (l, r, k)
        Hankel transforms to radii within `CORE`.
    coherence : (angle, r, r) complex
        Mutual coherence of the transmission, less the product of its means, at angles between the two points.
    cosine : (angle, l)
        From angular momenta (both signs together) to these angles.
    rate : (k,)
        Phase that a wave gains per Å of flight, -pi wavelength k^2 [1/Å].
    """

    k: np.ndarray
    weight: np.ndarray
    detected: np.ndarray
    transmitted: np.ndarray
    gained: np.ndarray
    core: np.ndarray
    coherence: np.ndarray
    cosine: np.ndarray
    rate: np.ndarray


def prepare_channel(
    column: Column,
    energy: float,
    aperture: float,
    detector: AnnularDetector,
    parametrization: str = "lobato",
    oversampling: float = 1.0,
    thermal_nodes: int = 12,
    margin: float = MARGIN,
    edge_turns: float = EDGE,
    core: float = CORE,
) -> AtomChannel:
    """Grids and operators for columns up to `column`, under a round detector.

    Parameters
    ----------
    aperture : float
        Largest incident frequency [1/Å].
    oversampling : float
        Nodes in frequency and radius over Nyquist's number.
    thermal_nodes : int
        Gauss-Laguerre nodes of the radius of the thermal displacement.
    margin, edge_turns, core : float
        As `MARGIN`, `EDGE` and `CORE`.

    Raises
    ------
    InputError
        For a tilted column, or a detector that is not round.
    """
    require_full_symmetry(column, detector, "the closed thermal average")
    lam = float(wavelength(energy))
    angles = np.unique([0.0, aperture, *(np.array(detector.edges) * 1e-3 / lam)])
    k_max = 1.3 * (angles[-1] + aperture)  # as far as an atom must scatter for 0.1 % of the signal
    angles = np.append(angles, k_max)
    edge = max(default_reach(column, 1e3 * lam * aperture) + lam * aperture * column.spacing * (column.n_atoms - 1) / 2, POTENTIAL) + margin / aperture
    disc = edge + float(np.clip(edge_turns / abs(min(detector.edges) * 1e-3 / lam - aperture + 1e-9), 3.0, 16.0))
    k, w_k = panels(angles, np.ceil(np.diff(angles) * 2 * (disc + 1.0) * oversampling) + 10)
    weight = np.sqrt(2 * np.pi * k * w_k)

    orders = max(incident_disc(column, energy, aperture).order, highest_order(k_max, core))
    atom = vibrating_atom(column, energy, k, weight, orders, parametrization, oversampling, thermal_nodes, core)
    within, to_disc = _to_radii(k, weight, np.array([0.0, edge, disc]), orders, oversampling)
    channel = AtomChannel(
        k=k,
        weight=weight,
        detected=detector.sensitivity(k * 1e3 * lam, np.zeros_like(k)),
        transmitted=np.zeros(0),
        gained=np.zeros(0),
        core=atom.hankel[:, : atom.coherence.shape[1]],
        coherence=atom.coherence,
        cosine=atom.cosine,
        rate=-np.pi * lam * k**2,
    )
    kept = _contraction((to_disc.swapaxes(1, 2) * ndtr(8 * (0.5 - (within - edge) / (disc - edge)))) @ to_disc)
    lift = atom.hankel.swapaxes(1, 2)
    through = np.eye(len(k)) + (lift * atom.mean.real) @ atom.hankel + 1j * ((lift * atom.mean.imag) @ atom.hankel)
    bare, seen = np.diag(channel.detected), channel.detected > 0
    recorded = through[:, seen]
    gained = recorded.conj().swapaxes(1, 2) @ (channel.detected[seen, None] * recorded) - bare + _diffuse(np.broadcast_to(bare, through.shape), channel)
    inside = real_times(kept, real_times(kept, gained).conj().swapaxes(1, 2))  # forms are Hermitian, and both operators symmetric
    return channel._replace(transmitted=real_times(kept, through).swapaxes(1, 2), gained=inside)


def _contraction(operators: Float[np.ndarray, "l k k"]) -> Float[np.ndarray, "l k k"]:
    """Symmetric operators whose eigenvalues v above one are made 2 - v.

    Nodes too few for the rim of the disc see there what lies beyond it as well, and that more than once: with v, up to 1.8, forty atoms on top of each
    other would amplify it. Taken for one, a column of 45 atoms still came out wrong by 0.5 % of its peak, and by 0.1 Å.
    """
    values, vectors = np.linalg.eigh(operators)
    return (vectors * np.minimum(values, np.maximum(2 - values, 0.0))[:, None]) @ vectors.swapaxes(1, 2)


class VibratingAtom(NamedTuple):
    """Mean transmission and mutual coherence of an atom, and the transforms to it from waves that carry the root of their quadrature weight.

    Attributes
    ----------
    hankel : (l, r, k)
        Transforms to radii within the potential, those within `CORE` first.
    mean : (r,) complex
        Mean of exp(i sigma V) - 1.
    coherence, cosine
        As in `AtomChannel`.
    """

    hankel: np.ndarray
    mean: np.ndarray
    coherence: np.ndarray
    cosine: np.ndarray


def highest_order(k_max: float, core: float = CORE) -> int:
    """Angular momentum beyond which waves up to k_max [1/Å] do not reach the outer tenth of the core."""
    return math.ceil(2 * np.pi * k_max * core * 0.9)


def vibrating_atom(
    column: Column,
    energy: float,
    k: np.ndarray,
    weight: np.ndarray,
    orders: int,
    parametrization: str = "lobato",
    oversampling: float = 1.0,
    thermal_nodes: int = 12,
    core: float = CORE,
) -> VibratingAtom:
    """An atom of the column for waves at nodes k [1/Å] of angular momenta 0 to `orders`; the rest as in `prepare_channel`."""
    r, hankel = _to_radii(k, weight, np.array([0, core, POTENTIAL]), orders, oversampling)
    harmonics, share = thermal_scattering(column, energy, r, 2 * float(k.max()), parametrization, thermal_nodes)
    mean = np.tensordot(share, harmonics[:, 0], 1)
    inside = r < core
    near = harmonics[:, :, inside]
    correlated = np.einsum("s,smr,smq->mrq", share, near.conj(), near, optimize=True)
    correlated[0] -= np.outer(mean[inside].conj(), mean[inside])
    angle = np.pi * (np.arange(2 * orders + 20) + 0.5) / (2 * orders + 20)
    both_signs = lambda m: np.where(m > 0, 2.0, 1.0) * np.cos(np.outer(angle, m))
    return VibratingAtom(hankel, mean, np.tensordot(both_signs(np.arange(near.shape[1])), correlated, 1), both_signs(np.arange(orders + 1)))


def _to_radii(k, weight, edges, orders, oversampling) -> tuple[np.ndarray, np.ndarray]:
    """Radii [Å] in panels between edges, and Hankel transforms to them (l, r, k)."""
    r, w = panels(edges, np.ceil(np.diff(edges) * 4 * k.max() * oversampling) + 10)
    return r, bessel(orders, 2 * np.pi * np.outer(r, k)) * np.outer(np.sqrt(2 * np.pi * r * w), weight)


def thermal_scattering(column: Column, energy: float, r: np.ndarray, limit: float, parametrization: str, nodes: int, angles: int = 256):
    """Angular harmonics (s, m, r) of exp(i sigma V) - 1 of an atom displaced by radius s, to frequencies of `limit` [1/Å], and the probability of each s (s,)."""
    u = float(rms_from_debye_waller_b(column.debye_waller_b))
    x, share = np.polynomial.laguerre.laggauss(nodes)
    displacement = u * np.sqrt(2 * x)
    alpha = np.pi * (np.arange(angles) + 0.5) / angles
    scattered = smooth_scattering(column.element, energy, float(r.max() + displacement.max()), limit, parametrization)
    harmonics = []
    for s in displacement:
        distance = np.sqrt(np.maximum(r[:, None] ** 2 + s**2 - 2 * r[:, None] * s * np.cos(alpha), 0))
        harmonics.append(dct(scattered(distance), axis=1).T / (2 * angles))  # even in the angle
    return np.array(harmonics), share


def smooth_scattering(element: str, energy: float, farthest: float, limit: float, parametrization: str) -> Callable[[np.ndarray], np.ndarray]:
    """exp(i sigma V) - 1 of an atom against the distance from it, up to `farthest` [Å], without frequencies that no two waves differ by: beyond `limit` [1/Å] they fade out.

    At the nucleus it turns without end, and points on a grid would take what it holds beyond their own frequencies for less: intensities come out wrong by 0.1 %, by another
    0.1 % for every B, whose slope is then off by a fifth.
    """
    beyond, end = farthest + 1.0, 1.5 * limit
    edges = np.array([0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.12, 0.4, 0.9, beyond])
    d, w = panels(edges, np.ceil(np.diff(edges) * 2.5 * end) + 16)
    q, v = legendre_nodes(end, int(2.5 * end * beyond) + 60)
    sharp = np.exp(1j * float(interaction_parameter(energy)) * projected_potential(element, d, parametrization)) - 1
    spectrum = 2 * np.pi * j0(2 * np.pi * np.outer(q, d)) @ (sharp * d * w) * np.cos(np.pi / 2 * np.clip((q - limit) / (end - limit), 0, 1)) ** 2
    at = np.linspace(0, farthest, int(16 * end * farthest) + 2)
    return CubicSpline(at, 2 * np.pi * j0(2 * np.pi * np.outer(at, q)) @ (spectrum * q * v), bc_type=((1, 0.0), "not-a-knot"))


def incident_disc(column: Column, energy: float, aperture: float, reach: float = REACH) -> DiscModes:
    """All incident waves that can meet an atom, in the plane of the middle of the column."""
    angle = 1e3 * aperture * float(wavelength(energy))
    return complete_disc_modes(default_reach(column, angle) + reach, aperture)


def real_times(real: np.ndarray, waves: np.ndarray) -> np.ndarray:
    """Matrix product of real and complex, by real ones."""
    return (real @ np.ascontiguousarray(waves, complex).view(float)).view(complex)


def _conjugate(form: np.ndarray, operator: np.ndarray) -> np.ndarray:
    return operator.conj().swapaxes(1, 2) @ (form @ operator)


def _diffuse(form: np.ndarray, channel: AtomChannel) -> np.ndarray:
    """Point-by-point product of a form with the atom's coherence."""
    lift = channel.core.swapaxes(1, 2)
    here = real_times(channel.core, real_times(channel.core, form).conj().swapaxes(1, 2))  # all are Hermitian
    return real_times(lift, real_times(lift, times_coherence(here, channel.coherence, channel.cosine)).conj().swapaxes(1, 2))


def times_coherence(form: Complex[np.ndarray, "l r r"], coherence: Complex[np.ndarray, "angle r r"], waves: Float[np.ndarray, "angle l"]) -> Complex[np.ndarray, "l r r"]:
    """Point-by-point product of a Hermitian form at the core's radii with the atom's coherence: to the angles between two points, by orthogonal `waves`, and back."""
    upper = np.triu_indices(form.shape[1])
    back = waves.T / (waves**2).sum(0)[:, None]
    product = real_times(back, real_times(waves, form[:, *upper]) * coherence[:, *upper])
    whole = np.empty_like(form)
    whole[:, *upper[::-1]] = product.conj()
    whole[:, *upper] = product
    return whole


def scattered(form: Complex[np.ndarray, "l k k"], channel: AtomChannel) -> Complex[np.ndarray, "l k k"]:
    """A form as seen from above an atom; linear: what the atom makes of the bare detector is `channel.gained`."""
    return _conjugate(form, channel.transmitted) + _diffuse(form, channel)


def flown(form: Complex[np.ndarray, "l k k"], distance: float, channel: AtomChannel) -> Complex[np.ndarray, "l k k"]:
    """A form as seen from `distance` [Å] above."""
    phase = np.exp(1j * channel.rate * distance)
    return phase.conj()[:, None] * form * phase


def by_distance(form: Complex[np.ndarray, "l k k"], channel: AtomChannel) -> Complex[np.ndarray, "l k k"]:
    """Derivative of `flown` by distance at zero [1/Å]."""
    return 1j * (channel.rate - channel.rate[:, None]) * form


def incident_modes(modes: Modes | DiscModes, channel: AtomChannel) -> Complex[np.ndarray, "l p k"]:
    """The modes in their own plane, zero-padded to blocks."""
    waves = np.zeros((modes.order + 1, modes.block_size, len(channel.k)), complex)
    for l in range(modes.order + 1):
        radial = radial_modes(modes, l, channel.k)
        waves[l, : len(radial)] = radial * channel.weight
    return waves


def in_modes(form: Complex[np.ndarray, "l k k"], waves: Complex[np.ndarray, "l p k"]) -> Complex[np.ndarray, "l p p"]:
    """Gram blocks of incident waves."""
    return waves.conj() @ form[: len(waves)] @ waves.swapaxes(1, 2)


def thermal_gram(
    column: Column,
    energy: float,
    convergence_angle: float,
    detector: AnnularDetector,
    parametrization: str = "lobato",
    progress: Callable = lambda items, **_: items,
    **accuracy,
) -> ColumnGram:
    """Gram matrices of isolated columns of 1 to column.n_atoms atoms, thermal motion averaged in closed form, one scrambling.

    Parameters
    ----------
    energy, convergence_angle : float
        [eV], [mrad].
    accuracy
        As for `prepare_channel`.
    """
    return _grams(scattered, math.inf, column, energy, convergence_angle, detector, parametrization, progress, **accuracy)


def absorptive_gram(
    column: Column,
    energy: float,
    convergence_angle: float,
    detector: AnnularDetector,
    parametrization: str = "lobato",
    progress: Callable = lambda items, **_: items,
) -> ColumnGram:
    """As `thermal_gram`, but that diffuse electrons go straight to the detector: a single inelastic event.

    Exact for one atom and brighter than the full average for more, by 3 to 9 % from two to six atoms of gold.
    """
    straight = lambda form, channel: _conjugate(form, channel.transmitted)
    return _grams(straight, 0, column, energy, convergence_angle, detector, parametrization, progress)


def _grams(step, configurations, column, energy, convergence_angle, detector, parametrization, progress, **accuracy) -> ColumnGram:
    aperture = convergence_angle * 1e-3 / float(wavelength(energy))
    modes = incident_disc(column, energy, aperture)
    channel = prepare_channel(column, energy, aperture, detector, parametrization, **accuracy)
    top = -(column.n_atoms - 1) / 2 * float(column.spacing)
    waves = incident_modes(modes, channel) * np.exp(1j * channel.rate * top)
    bare = np.diag(channel.detected)
    gain, blocks = channel.gained, []
    for others in progress(range(column.n_atoms), desc="column library", unit="atom"):  # one on top of the others
        if others:
            gain = channel.gained + step(flown(gain, float(column.spacing), channel), channel)
        blocks.append(in_modes(gain + bare, waves))
    blocks, modes = principal_modes(np.stack(blocks), modes)
    reach = default_reach(column, convergence_angle)
    return ColumnGram.of(blocks[None], column, energy, aperture, detector, reach, configurations, parametrization, radial=modes.radial)


def principal_modes(blocks: Complex[np.ndarray, "n l p p"], modes: DiscModes, faintest: float = FAINTEST) -> tuple[np.ndarray, DiscModes]:
    """The few combinations of modes that are seen at all, and the blocks between them: eigenvectors of the mean of all blocks, each by its trace.

    Those with less than `faintest` of the largest eigenvalue are left out.
    """
    strength = np.einsum("nlpp->n", blocks).real
    values, vectors = np.linalg.eigh((blocks / strength[:, None, None, None]).mean(0))
    order = np.argsort(-abs(values), axis=1)
    values, vectors = np.take_along_axis(values, order, 1), np.take_along_axis(vectors, order[:, None], 2)
    seen = abs(values) > faintest * values.max()
    kept = vectors[seen.any(1), :, : seen.sum(1).max()] * seen[seen.any(1), None, : seen.sum(1).max()]
    few = kept.conj().swapaxes(1, 2) @ blocks[:, seen.any(1)] @ kept
    return few, disc_modes(kept.swapaxes(1, 2) @ modes.radial[seen.any(1)], modes.aperture)


def gram_of_depths(depths: Float[np.ndarray, " atom"], channel: AtomChannel, modes: Modes | DiscModes) -> Complex[np.ndarray, "l p p"]:
    """Gram blocks of one column with atoms at these depths, as in `ColumnGram.blocks`.

    Parameters
    ----------
    depths : (atom,)
        z of each atom [Å] in increasing order; z = 0 is the plane of the modes.
    """
    gain = channel.gained
    for below in np.diff(depths)[::-1]:
        gain = channel.gained + scattered(flown(gain, float(below), channel), channel)
    return _of_top(gain + np.diag(channel.detected), depths[0], channel, modes)


def _of_top(form: np.ndarray, top: float, channel: AtomChannel, modes: Modes | DiscModes) -> np.ndarray:
    """Gram blocks of a form seen from the plane z = top [Å] of the first atom."""
    return in_modes(form, incident_modes(modes, channel) * np.exp(1j * channel.rate * top))


def depth_derivatives(
    depths: Float[np.ndarray, " atom"], channel: AtomChannel, modes: Modes | DiscModes, progress: Callable = lambda items, **_: items
) -> Complex[np.ndarray, "entry l p p"]:
    """`gram_of_depths`, then its derivatives by the depth of each atom [1/Å], top atom first; exact.

    An atom moved down is met after a longer and left for a shorter flight: its tangent starts with the derivative of both and goes up the
    column as the form itself does.
    """
    depths = np.asarray(depths, float)
    forms = [channel.gained, by_distance(channel.gained, channel)]  # seen from the last atom's plane, then its tangents by the lower atoms, last atom first
    for below in progress(np.diff(depths)[::-1], desc="atoms", unit="atom"):
        arriving = [flown(form, below, channel) for form in forms]
        own = -scattered(by_distance(arriving[0], channel), channel)
        seen = channel.gained + scattered(arriving[0], channel)
        forms = [seen, *(scattered(tangent, channel) for tangent in arriving[1:]), own + by_distance(seen, channel)]
    value, *tangents = forms
    return np.stack([_of_top(form, depths[0], channel, modes) for form in (value + np.diag(channel.detected), *tangents[::-1])])
