"""What a detector can see of an isolated column: its Gram matrix in Laguerre-Gauss modes.

A probe inside the aperture is a sum of plane waves, and all a detector records of them is a quadratic form a^H G a. High-angle
scattering happens within about 2 Å of the column, so G is a smooth function of the incident wave vector and needs far fewer waves
than the plane waves of a cell that holds the defocused probe: the Laguerre-Gauss modes chi_pl, 2 p + |l| <= order, that cover the
column's neighbourhood in position and in angle (150 instead of 950 waves, on a cell a third as large for the paper's settings).
The mean over thermal motion of an isolated column with an annular detector has the full rotation and mirror symmetry, so G is block
diagonal in l with equal blocks for l and -l: averaging over that group is a matter of keeping those blocks. A tilted column under a round
detector keeps one mirror of it, a detector with a measured map nothing: their matrices are kept whole. Means in closed form (`thermal`) come
in `DiscModes`, which need no taper.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float
from scipy.fft import next_fast_len
from scipy.special import eval_genlaguerre, gammaln, jv

from ..errors import InputError
from .detector import AnnularDetector
from .electron import wavelength
from .multislice import transmission
from .specimen import Column


class Modes(NamedTuple):
    """Laguerre-Gauss modes up to an order, sorted by |l|, then l, then p, with the taper that makes their sum a smooth window."""

    p: np.ndarray
    l: np.ndarray
    taper: np.ndarray
    order: int
    scale: float

    @property
    def block_size(self) -> int:
        """Most modes of one angular momentum."""
        return self.order // 2 + 1


class DiscModes(NamedTuple):
    """Incident waves within a sharp aperture, sorted as `Modes`: radial(k) exp(i l phi), radial a polynomial through values at Legendre nodes.

    Attributes
    ----------
    p, l, taper : (mode,)
        As in `Modes`; the taper is one.
    aperture : float
        Largest frequency [1/Å].
    radial : (l, P, node)
        Values at the Gauss-Legendre nodes of (0, aperture), for l >= 0; rows of zeros where there are fewer modes [Å].
    """

    p: np.ndarray
    l: np.ndarray
    taper: np.ndarray
    aperture: float
    radial: np.ndarray

    @property
    def order(self) -> int:
        return len(self.radial) - 1

    @property
    def block_size(self) -> int:
        """Most modes of one angular momentum."""
        return self.radial.shape[1]


def disc_modes(radial: np.ndarray, aperture: float) -> DiscModes:
    """Modes of both signs of l from their radial parts, as `DiscModes` holds them."""
    each = [(p, sign * l) for l, rows in enumerate(radial) for sign in ((-1, 1) if l else (1,)) for p in range(int(abs(rows).any(1).sum()))]
    p, l = np.array(each).T
    return DiscModes(p, l, np.ones(len(p)), aperture, radial)


def complete_disc_modes(radius: float, aperture: float) -> DiscModes:
    """One mode for each Legendre node and l: all waves |k| <= aperture within |r| <= radius [Å], none of them damped."""
    nodes, w = legendre_nodes(aperture, math.ceil(2 * aperture * radius) + 8)
    order = math.ceil(2 * math.pi * aperture * radius)
    return disc_modes(np.tile(np.diag((2 * np.pi * nodes * w) ** -0.5), (order + 1, 1, 1)), aperture)


def legendre_nodes(end: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on (0, end)."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2 * end, w / 2 * end


def laguerre_gauss_modes(reach: float, aperture: float, margin: int = 12) -> Modes:
    """Modes that represent plane waves |k| <= aperture within |r| <= reach.

    Shells n = 2 p + |l| fill the ellipse (r / s)^2 + (2 pi k s)^2 <= 2 n + 2 of phase space. Breaking the sum off at a shell rings
    like any sharp edge (0.5 % of the peak for gold), so `margin` shells follow whose weight falls to zero as cos^2: then 2e-4.

    Parameters
    ----------
    reach : float
        Radius [Å] around the column within which incident waves must be right.
    aperture : float
        Largest incident frequency [1/Å].
    """
    wave_number = 2 * math.pi * aperture
    scale = math.sqrt(1.11 * reach / wave_number)
    full = math.ceil(((reach / scale) ** 2 + (wave_number * scale) ** 2) / 2 - 1)
    order = full + margin
    pairs = [(p, l) for l in range(-order, order + 1) for p in range((order - abs(l)) // 2 + 1)]
    p, l = np.array(sorted(pairs, key=lambda m: (abs(m[1]), m[1], m[0]))).T
    taper = np.cos(np.pi / 2 * np.clip((2 * p + abs(l) - full + 1) / (margin + 2), 0, 1)) ** 2
    return Modes(p, l, taper, order, scale)


def mode_spectra(modes: Modes | DiscModes, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
    """Fourier transforms of the modes, orthonormal over d^2k [Å]; kx, ky in 1/Å of any common shape.

    Laguerre-Gauss modes are their own transforms up to (-i)^(2p+|l|), with width 1 / (2 pi scale); disc modes are polynomials up to the aperture.
    """
    if isinstance(modes, DiscModes):
        k, phi = np.hypot(kx, ky), np.arctan2(ky, kx)
        inside = k <= modes.aperture
        radial = modes.radial[abs(modes.l), modes.p] @ _interpolation(modes, k[inside])
        spectra = np.zeros((len(modes.l), *k.shape), complex)
        spectra[:, inside] = radial * np.exp(1j * np.outer(modes.l, phi[inside]))
        return spectra
    width = 1 / (2 * math.pi * modes.scale)
    rho, where = np.unique(np.hypot(kx, ky) / width, return_inverse=True)  # an eighth of a square grid's frequencies
    decay, where = np.exp(-(rho**2) / 2), where.reshape(np.shape(kx))
    phi = np.arctan2(ky, kx)
    spectra = np.empty((len(modes.p), *where.shape), np.complex64)
    for m in np.unique(abs(modes.l)):
        turns = np.exp(1j * m * phi).astype(np.complex64)
        for p in np.unique(modes.p[abs(modes.l) == m]):
            norm = math.exp(0.5 * (gammaln(p + 1) - gammaln(p + m + 1))) / math.sqrt(math.pi) / width
            radial = ((-1j) ** int(2 * p + m) * norm * rho**m * eval_genlaguerre(p, m, rho**2) * decay).astype(np.complex64)[where]
            for i in np.flatnonzero((modes.p == p) & (abs(modes.l) == m)):
                spectra[i] = radial * (turns if modes.l[i] > 0 else turns.conj())
    return spectra


def radial_modes(modes: Modes | DiscModes, l: int, k: np.ndarray) -> Complex[np.ndarray, "p k"]:
    """Radial part of the transforms of the modes of angular momentum l >= 0 at frequencies k [1/Å] (`mode_spectra` along x)."""
    at = np.flatnonzero(modes.l == l)
    return mode_spectra(modes._replace(p=modes.p[at], l=modes.l[at]), k, np.zeros_like(k))


def _interpolation(modes: DiscModes, k: np.ndarray) -> Float[np.ndarray, "node k"]:
    """Polynomials that are one at one Legendre node of the aperture and zero at the others, from sums of Legendre polynomials."""
    x, w = np.polynomial.legendre.leggauss(modes.radial.shape[2])
    degree = np.arange(len(x))
    at_nodes, at_k = (np.polynomial.legendre.legvander(v, len(x) - 1) for v in (x, 2 * k / modes.aperture - 1))
    return w[:, None] * at_nodes * (degree + 0.5) @ at_k.T


def bessel(order: int, x: np.ndarray) -> np.ndarray:
    """J_0 ... J_order of x >= 0 (order + 1, *x.shape) by downward recurrence from scipy's values of the two highest.

    Where the highest order underflows (x far below it) every order is scipy's.
    """
    out = np.empty((order + 1, *x.shape))
    for n in range(order, max(order - 2, -1), -1):
        out[n] = jv(n, x)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for n in range(order - 1, 0, -1):
            out[n - 1] = 2 * n / x * out[n] - out[n + 1]
    small = abs(out[order]) < 1e-280
    small &= x < order
    for n in range(order + 1):
        out[n][small] = jv(n, x[small])
    return out


class ColumnGram(eqx.Module):
    """Gram matrices of isolated columns of 1 to n_max atoms, one per independent scrambling.

    Attributes
    ----------
    blocks : (scrambling, n_max, order + 1, P, P) complex
        <chi_pl| G |chi_p'l> of the column of n atoms for |l| = 0 ... order, zero-padded; each scrambling a mean over `configurations`
        thermal configurations, infinitely many of them in closed form. Whole matrices (scrambling, n_max, mode, mode) of a tilted column or a detector that is not round.
    energy, spacing, debye_waller_b, aperture, reach : float
        What it was built for: eV, Å, Å^2, largest incident frequency 1/Å, and Å.
    inner, outer, sensitivity
        The detector's `record`.
    tilt : (x, y)
        Of the column [mrad].
    radial : (order + 1, P, node) complex
        The modes, if they are `DiscModes`; empty for Laguerre-Gauss modes.
    longest : int
        Atoms of the column that the modes' plane halves; 0 for n_max.
    """

    blocks: np.ndarray
    element: str = eqx.field(static=True)
    energy: float = eqx.field(static=True)
    spacing: float = eqx.field(static=True)
    debye_waller_b: float = eqx.field(static=True)
    inner: float | tuple[float, ...] = eqx.field(static=True)
    outer: float | tuple[float, ...] = eqx.field(static=True)
    aperture: float = eqx.field(static=True)
    reach: float = eqx.field(static=True)
    configurations: float = eqx.field(static=True)
    parametrization: str = eqx.field(static=True)
    radial: np.ndarray = eqx.field(default_factory=lambda: np.zeros((0, 0, 0)))
    sensitivity: str = eqx.field(static=True, default="")
    tilt: tuple[float, float] = eqx.field(static=True, default=(0.0, 0.0))
    longest: int = eqx.field(static=True, default=0)

    @classmethod
    def of(cls, blocks, column: Column, energy, aperture, detector: AnnularDetector, reach, configurations: float, parametrization: str, **modes) -> "ColumnGram":
        """From blocks of any precision, kept as complex64, and what they were built for."""
        return cls(
            blocks=np.asarray(blocks, np.complex64),
            element=column.element,
            energy=float(energy),
            spacing=float(column.spacing),
            debye_waller_b=float(column.debye_waller_b),
            aperture=float(aperture),
            reach=float(reach),
            configurations=configurations,
            parametrization=parametrization,
            tilt=column.tilt,
            **detector.record,
            **modes,
        )

    @property
    def n_max(self) -> int:
        return self.blocks.shape[1]

    @property
    def modes(self) -> Modes | DiscModes:
        return disc_modes(self.radial, self.aperture) if self.radial.size else laguerre_gauss_modes(self.reach, self.aperture)

    @property
    def centre_of_mass(self) -> np.ndarray:
        """Centre of mass of each column below the modes' plane, which halves the longest column (n_max,) [Å]."""
        return (np.arange(self.n_max) - ((self.longest or self.n_max) - 1)) / 2 * self.spacing

    def first(self, n_max: int) -> "ColumnGram":
        """Of the columns of up to n_max atoms alone."""
        return dataclasses.replace(self, blocks=self.blocks[:, :n_max], longest=self.longest or self.n_max)

    @property
    def leaning(self) -> np.ndarray:
        """Lateral position of each column's centre of mass, since the axis goes through that of the longest (n_max, 2) [Å]."""
        return np.outer(self.centre_of_mass, self.tilt) * 1e-3

    @property
    def is_whole(self) -> bool:
        """Whether it holds whole matrices instead of blocks."""
        return self.blocks.ndim == 4


class Sweep(NamedTuple):
    """Everything one pass through the column needs, for `sweep`."""

    incident: jax.Array  # (mode, y, x) spectra at atom 1
    atom: jax.Array  # (y, x) low-passed transmission of one atom at the origin, Fourier
    propagator: jax.Array  # (y, x) to the next atom, band-limited
    rate: jax.Array  # (y, x) phase that a wave gains per Å of propagation
    qx: jax.Array
    qy: jax.Array
    detected: np.ndarray  # flat indices of detector pixels
    weight: jax.Array  # (detected,) sqrt of the sensitivity


def required_sampling(energy: float, outer: float) -> float:
    """Coarsest sampling [Å] whose 2/3 band limit reaches the detector's outer angle [mrad]."""
    return wavelength(energy) / (3 * outer * 1e-3)


def default_sampling(energy: float, outer: float, convergence_angle: float) -> float:
    """Sampling [Å] that leaves 0.1 % of the signal at most: gold, platinum and copper, six atoms, against half of it.

    The 2/3 band limit reaches 1.3 times the outer plus the convergence angle, since an atom must be able to scatter any incident wave to
    any detected angle and back (stopping at the outer angle lost 1 % of the signal at 100 mrad); 0.04 Å resolve an atom's core
    whatever the detector.
    """
    return min(required_sampling(energy, 1.3 * (outer + convergence_angle)), 0.04)


def default_cell(column: Column, energy: float, aperture: float, reach: float) -> float:
    """Side of the cell [Å] in which the modes, spread over half the column, keep clear of each other's periodic images.

    3 Å are added because the neighbouring image's scattering moves the signal: 0.5 % at 9 Å, under 0.1 % at 11 Å for gold.
    """
    modes = laguerre_gauss_modes(reach, aperture)
    turning = math.sqrt(2 * modes.order + 2)
    angle = float(wavelength(energy)) * turning / (2 * math.pi * modes.scale)
    return 2 * (modes.scale * turning + angle * column.spacing * (column.n_atoms - 1) / 2) + 3.0


def default_reach(column: Column, convergence_angle: float) -> float:
    """Radius [Å] at mid-column within which a ray inside the aperture can still meet an atom's core.

    With 1.16 Å instead of 1.4 Å the images change by 0.1 % (gold) to 0.2 % (copper, 40 mrad) of their peak. A tilted column's ends lie aside.
    """
    return 1.4 + 1e-3 * (convergence_angle + math.hypot(*column.tilt)) * column.spacing * (column.n_atoms - 1) / 2


def prepare_sweep(
    column: Column,
    energy: float,
    aperture: float,
    detector: AnnularDetector,
    reach: float,
    parametrization: str = "lobato",
    sampling: float | None = None,
    cell: float | None = None,
) -> Sweep:
    """Incident modes, transmission of an atom and propagator on a grid chosen for the detector.

    Sampling, cell and reach default to `default_sampling`, `default_cell` and `default_reach`.
    """
    lam = float(wavelength(energy))
    sampling = sampling or default_sampling(energy, detector.outermost, 1e3 * aperture * lam)
    cell = cell or default_cell(column, energy, aperture, reach)
    n = next_fast_len(math.ceil(cell / sampling))
    n += n % 2
    band_limit = n / cell / 3
    q = np.fft.fftfreq(n, cell / n)
    qx, qy = np.meshgrid(q, q)
    q2 = qx**2 + qy**2
    mask = q2 < band_limit**2
    atom = transmission(np.zeros((1, 2)), column.element, (cell, cell), (n, n), energy, band_limit, parametrization)
    middle = (column.n_atoms - 1) / 2 * column.spacing
    incident = mode_spectra(laguerre_gauss_modes(reach, aperture), qx, qy) / cell * np.exp(1j * np.pi * lam * q2 * middle)
    to_mrad = 1e3 * lam
    sensitivity = detector.sensitivity(qx * to_mrad, qy * to_mrad, to_mrad / cell) * mask
    detected = np.flatnonzero(sensitivity)
    return Sweep(
        incident=jnp.asarray(incident * mask, jnp.complex64),
        atom=jnp.fft.fft2(jnp.asarray(atom, jnp.complex64)),
        propagator=jnp.asarray(mask * np.exp(-1j * np.pi * lam * q2 * column.spacing), jnp.complex64),
        rate=jnp.asarray(-np.pi * lam * q2 * mask, jnp.float32),
        qx=jnp.asarray(q, jnp.float32),
        qy=jnp.asarray(q, jnp.float32),
        detected=detected,
        weight=jnp.asarray(np.sqrt(sensitivity.ravel()[detected]), jnp.float32),
    )


def has_full_symmetry(column: Column, detector: AnnularDetector) -> bool:
    """Whether turns and mirrors about the column change nothing of what the detector records, averaged over thermal motion."""
    return detector.is_round and not any(column.tilt)


def require_full_symmetry(column: Column, detector: AnnularDetector, what: str) -> None:
    """Refuse a tilted column or a detector that is not round for `what`."""
    if not has_full_symmetry(column, detector):
        given = f"the tilt is {list(column.tilt)} mrad" if any(column.tilt) else "the detector's sensitivity is a map"
        raise InputError(f"{given}, but {what} takes columns and detectors with full rotational symmetry alone: tilt [0, 0], and a sensitivity that is a profile of the angle, or none.")


def sweep_column(
    displacements: Float[Array, "atom xy"], sweep: Sweep, modes: Modes
) -> Complex[Array, "atom l p p"]:
    """Symmetrised Gram blocks after every atom of one thermal configuration (complex64, sums over pixels in matmul).

    Parameters
    ----------
    displacements : (atom, 2)
        Lateral displacement of each atom [Å], top atom first. One pass serves all atom numbers: the wave after atom n is the exit
        wave of the n-atom column.
    """
    return _swept(displacements, sweep, lambda seen: _blocks(lambda g: seen[g].conj() @ seen[g].T, modes))


def sweep_whole(displacements: Float[Array, "atom xy"], sweep: Sweep) -> Complex[Array, "atom mode mode"]:
    """Whole Gram matrices, not symmetrised, where `sweep_column` gives blocks."""
    return _swept(displacements, sweep, lambda seen: seen.conj() @ seen.T)


def _swept(displacements, sweep: Sweep, gram: Callable) -> Array:
    """What `gram` makes of the detected waves (mode, pixel) after every atom."""

    def atom(waves, displacement):
        waves = _scatter(waves, displacement, sweep)
        return waves * sweep.propagator, gram(waves.reshape(len(waves), -1)[:, sweep.detected] * sweep.weight)

    return jax.lax.scan(atom, sweep.incident, displacements)[1]


def mirrored(grams: Complex[np.ndarray, "... mode mode"], modes: Modes, direction: tuple[float, float]) -> Complex[np.ndarray, "... mode mode"]:
    """Whole matrices averaged with their mirror images in the plane of the beam and `direction`.

    The mirror takes azimuth phi to 2 a - phi, so chi_pl to exp(2 i l a) chi_p-l, a the azimuth of the direction.
    """
    place = {pair: i for i, pair in enumerate(zip(modes.p.tolist(), modes.l.tolist(), strict=True))}
    other = np.array([place[p, -l] for p, l in place])
    turn = np.exp(2j * modes.l * math.atan2(direction[1], direction[0]))
    return (grams + turn.conj()[:, None] * grams[..., other[:, None], other] * turn) / 2


def symmetrised(grams: Complex[Array, "... mode mode"], modes: Modes) -> Complex[Array, "... l p p"]:
    """Gram blocks of whole matrices averaged over all turns and mirrors about the column."""
    return _blocks(lambda g: grams[..., g[:, None], g], modes)


def _blocks(block_of: Callable, modes: Modes) -> Array:
    """Zero-padded blocks of |l| = 0 ... order, the mean over both signs, from what `block_of` some modes."""
    size = modes.block_size
    blocks = []
    for l in range(modes.order + 1):
        both = [block_of(np.flatnonzero(modes.l == sign * l)) for sign in ((1, -1) if l else (1,))]
        block = sum(both) / len(both)
        spare = size - block.shape[-1]
        blocks.append(jnp.pad(block, [(0, 0)] * (block.ndim - 2) + [(0, spare)] * 2))
    return jnp.stack(blocks, -3)


def _scatter(waves: Complex[Array, "wave y x"], displacement: Float[Array, "2"], sweep: Sweep) -> Complex[Array, "wave y x"]:
    """Spectra after one atom displaced laterally [Å]."""
    shift_x = jnp.exp(-2j * jnp.pi * sweep.qx * displacement[0])
    shift_y = jnp.exp(-2j * jnp.pi * sweep.qy * displacement[1])
    transmitted = jnp.fft.ifft2(sweep.atom * shift_y[:, None] * shift_x).astype(jnp.complex64)
    return jax.lax.map(lambda wave: jnp.fft.fft2(transmitted * jnp.fft.ifft2(wave)), waves, batch_size=8)


def sweep_atoms(displacements: Float[Array, "atom xy"], sweep: Sweep, batch: int = 65) -> Complex[np.ndarray, "entry mode mode"]:
    """Gram matrix of the whole column in one thermal configuration, then its derivative by the depth of each atom [1/Å], top atom first.

    All pairs of modes, not symmetrised. Tangents travel with the waves, each from its own atom on; complex64.
    """
    step = jax.jit(_with_tangents)
    seen = []
    for at in range(0, len(sweep.incident), batch):
        waves = sweep.incident[at : at + batch][None]
        for displacement in displacements:
            waves = step(waves, displacement, sweep)
        seen.append(np.asarray(waves.reshape(*waves.shape[:2], -1)[..., sweep.detected] * sweep.weight))
    value, *tangents = np.concatenate(seen, 1)
    gram = value.conj() @ value.T
    derivatives = [tangent.conj() @ value.T for tangent in tangents]
    return np.stack([gram, *(d + d.conj().T for d in derivatives)])


def _with_tangents(waves: Complex[Array, "entry wave y x"], displacement: Float[Array, "2"], sweep: Sweep) -> Complex[Array, "entry+1 wave y x"]:
    """Waves and tangents at the next atom; its own tangent, last: moved down, it is met after a longer and left for a shorter way."""
    entries, n, *grid = waves.shape
    longer = 1j * sweep.rate
    met = jnp.concatenate([waves, (longer * waves[0])[None]]).reshape(-1, *grid)
    left = _scatter(met, displacement, sweep).reshape(entries + 1, n, *grid)
    return left.at[-1].add(-longer * left[0]) * sweep.propagator
