"""What two columns record beyond the sum of each alone: the Gram matrix of the pair less those of its columns.

A column meets the beam that spreads from its neighbours, elastically and by thermal motion, and a sum of isolated columns lacks that. Here two columns are averaged over
their thermal motion together, in closed form as in `rings`, on a square grid. With W the waves of a core and M the mutual coherence of an atom's transmission less the product of its
means, what an atom scatters diffusely is recorded as the form D(h) = M . h, point by point, of the waves that leave its core, and

    h = E + sum_b T_b* D(h_b) T_b

over the atoms b of both columns further down: T_b the path past mean atoms onto the core of b, E what the detector records behind the pair. Incident waves see the same
sum. Waves up to `LIMIT` are followed; what an atom scatters further out goes straight to the detector. That makes an isolated column of twelve atoms of gold 2 % too bright; but
isolated columns have libraries that are exact, and this serves the difference alone.

Paths between atoms are those in two columns without ends, mixed with those in one where the other column is absent for a part of the way. Incident waves meet
the columns as they are.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import scipy.fft
from jaxtyping import Complex
from scipy.interpolate import CubicSpline

from .detector import AnnularDetector
from .electron import wavelength
from .gram import default_sampling
from .multislice import transmission
from .rings import prepare_scatterer, recorded_at_once
from .specimen import Column, rms_from_debye_waller_b

LIMIT = 3.4  # 1/Å; of the waves that are followed
VACUUM = 8.0  # Å between a pair and its image in the next cell
CORE = 0.7  # Å about an atom, within which it scatters diffusely
FAINTEST = 0.05  # of the strongest combination of waves in the core, weighted by how much scatters where, below which others are left out: 0.7 to 3 % of what a pair lacks
THERMAL_NODES = 7  # of each component of a displacement
AT_ONCE = 32  # waves
STRONG = 1e-4  # of the largest eigenvalue of what a pair lacks, below which others are left out
RANGE = 1e-3  # of the strongest of the waves that some pairs are known to lack, below which others are taken not to lack one
PROBES = 4  # waves outside, by which that is tested
MISSED = 0.05  # of what a pair lacks, beyond which it is worked out for all waves

Numbers = tuple[int, ...]


class Pair(NamedTuple):
    """Two columns of the same crystal, along x about the middle of a square cell's corner, and what waves through them need.

    Attributes
    ----------
    separation, spacing, wavelength, cell : float
        [Å].
    waves : (K, 2)
        Incident plane waves, in units of 1 / cell.
    jx, jy : (q,) int
        Frequencies that are followed, in units of 1 / cell.
    size : int
        Pixels of the grid along each side: as many as carry an atom's transmission between any two of these.
    atom : (y, x) complex64
        Fourier transform of the mean transmission of an atom at the origin, less one.
    core : (c, q) complex64
        What waves amount to within the core of an atom at the origin, in few functions.
    lift : (p, c)
        These at the core's pixels.
    coherence : (p, p)
        Of the transmission, less the product of its means.
    beyond : (c, c)
        Form of what the atom scatters beyond `LIMIT` and the detector records.
    detected : (q,)
        Sensitivity.
    """

    separation: float
    spacing: float
    wavelength: float
    cell: float
    waves: np.ndarray
    jx: np.ndarray
    jy: np.ndarray
    size: int
    atom: np.ndarray
    core: np.ndarray
    lift: np.ndarray
    coherence: np.ndarray
    beyond: np.ndarray
    detected: np.ndarray


def prepare_pair(column: Column, energy: float, convergence_angle: float, detector: AnnularDetector, separation: float, parametrization: str = "lobato") -> Pair:
    """Grids and operators for two columns at a distance [Å], of any number of atoms spaced as in `column`.

    Parameters
    ----------
    energy, convergence_angle : float
        [eV], [mrad].

    Raises
    ------
    InputError
        For a tilted column, or a detector that is not round.
    """
    lam = float(wavelength(energy))
    aperture = convergence_angle * 1e-3 / lam
    cell, limit = separation + VACUUM, max(LIMIT, 2 * aperture)
    n = 2 * scipy.fft.next_fast_len(math.ceil(2 * limit * cell))
    j = np.fft.fftfreq(n, 1 / n).round().astype(int)
    radius = np.hypot(j, j[:, None]) / cell
    jx, jy = (grid[radius < limit] for grid in np.meshgrid(j, j))
    fine = scipy.fft.next_fast_len(math.ceil(cell / default_sampling(energy, detector.outermost, convergence_angle)))
    still = np.asarray(transmission(np.zeros((1, 2)), column.element, (cell, cell), (fine, fine), energy, fine / cell / 3, parametrization))
    spectrum = scipy.fft.fft2(still - 1, norm="forward")[np.ix_(j, j)] * (radius < 2 * limit)

    x, y = (a.ravel() for a in np.meshgrid(np.arange(-n // 2, n // 2), np.arange(-n // 2, n // 2)))
    near = np.hypot(x, y) * cell / n < CORE
    x, y = x[near], y[near]
    coherence = _coherence(spectrum, x, y, float(rms_from_debye_waller_b(column.debye_waller_b)) / cell)
    power = np.diag(coherence).real
    scattered = np.sqrt(np.maximum(power, max(1e-6 * power.max(), 1e-30)))[:, None]  # still atoms scatter nothing diffusely
    functions, sizes, rows = np.linalg.svd(scattered * np.exp(2j * np.pi / n * (np.outer(x, jx) + np.outer(y, jy))), full_matrices=False)
    kept = sizes > FAINTEST * sizes[0]
    core = (sizes[:, None] * rows)[kept]
    near = np.hypot(jx, jy) / cell < aperture + 0.5 / cell
    to_mrad = 1e3 * lam / cell
    return Pair(
        separation, float(column.spacing), lam, cell, np.stack([jx[near], jy[near]], 1), jx, jy, n,
        (spectrum * np.exp(-float(column.debye_waller_b) * radius**2 / 4)).astype(np.complex64), core.astype(np.complex64), (functions / scattered)[:, kept],
        coherence, _beyond(column, energy, aperture, detector, parametrization, jx / cell, jy / cell, limit, core) / cell**2,
        detector.sensitivity(jx * to_mrad, jy * to_mrad, to_mrad),
    )  # fmt: skip


def _coherence(spectrum: np.ndarray, x: np.ndarray, y: np.ndarray, rms: float) -> Complex[np.ndarray, "p p"]:
    """Mutual coherence of an atom's transmission, from the spectrum of the still atom, at pixels x, y, less the product of its means; `rms` displacement over the cell."""
    n = len(spectrum)
    j = np.fft.fftfreq(n, 1 / n)
    nodes, weights = np.polynomial.hermite_e.hermegauss(THERMAL_NODES)
    weights = weights / weights.sum()
    wave = lambda place, node: np.exp(2j * np.pi * np.outer(place / n - rms * node, j))
    across = [wave(x, node) for node in nodes]
    rows = [wave(y, node) @ spectrum for node in nodes]
    seen = np.array([(a * b).sum(1) for a in across for b in rows])
    share = np.outer(weights, weights).ravel()
    mean = share @ seen
    return (seen.conj().T * share) @ seen - np.outer(mean.conj(), mean)


def _beyond(column, energy, aperture, detector, parametrization, qx, qy, limit, core) -> Complex[np.ndarray, "c c"]:
    """Form of the core's functions that the detector records of what one atom at the origin scatters diffusely beyond `limit` [1/Å]; its mean scatters little there.

    About the atom exp(2 pi i q.r) holds i^l exp(-i l phi_q) of what a wave along x holds of angular momentum l.
    """
    far = 1e3 * float(wavelength(energy)) * limit
    edges = [(max(low, far), high) for low, high in detector.annuli if high > far]
    if not edges:
        return np.zeros((len(core), len(core)), complex)
    outer = AnnularDetector(*zip(*edges, strict=True), detector.measured, detector.pixel_size)
    atom = prepare_scatterer(column, energy, aperture, outer.edges, parametrization)
    q, where = np.unique(np.round(np.hypot(qx, qy), 9), return_inverse=True)
    phi, into_core = np.arctan2(qy, qx), np.linalg.pinv(core)
    total = np.zeros((len(core), len(core)), complex)
    cores = CubicSpline(atom.k, atom.core / atom.weight, axis=2)(q)
    for l, (form, waves) in enumerate(zip(recorded_at_once(atom, outer, energy), cores, strict=True)):
        if abs(waves).max() < 1e-4 * abs(cores).max():
            continue  # these waves pass the core by
        for sign in (1, -1) if l else (1,):
            of_core = (waves[:, where] * (1j**l * np.exp(-1j * sign * l * phi))) @ into_core
            total += of_core.conj().T @ form @ of_core
    return total


def _at(pair: Pair, x: float) -> Complex[np.ndarray, " q"]:
    """Phases exp(-2 pi i q.r) that move what stands at the origin along x [Å]."""
    return np.exp(-2j * np.pi * pair.jx * x / pair.cell).astype(np.complex64)


def _transmitted(pair: Pair, places: Iterable[float]) -> Complex[np.ndarray, "y x"]:
    """Mean transmission of a plane of atoms at these x [Å]."""
    j = np.fft.fftfreq(pair.size, 1 / pair.size)
    total = np.ones((pair.size, pair.size), np.complex64)
    for x in places:
        total = total * (1 + scipy.fft.ifft2(pair.atom * np.exp(-2j * np.pi * j * x / pair.cell).astype(np.complex64), norm="forward"))
    return total


def _flown(pair: Pair, waves: np.ndarray, distance: float) -> np.ndarray:
    """Waves (q, w) after a flight [Å]."""
    return waves * np.exp(-1j * np.pi * pair.wavelength * distance * (pair.jx**2 + pair.jy**2) / pair.cell**2).astype(np.complex64)[:, None]


def _through(pair: Pair, waves: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """Waves (q, w) behind a plane (y, x), few at a time, shared out to all cores."""
    n, limit = pair.size, int(pair.jy.max())
    rows = 2 * limit + 1  # that hold waves; of the others no transform along x is needed
    inside = (pair.jy % rows) * n + pair.jx % n
    out, grid = np.empty_like(waves), np.zeros((AT_ONCE, n, n), np.complex64)
    for first in range(0, waves.shape[1], AT_ONCE):
        some = slice(first, first + AT_ONCE)
        count = waves[0, some].size
        few = np.zeros((count, rows * n), np.complex64)
        few[:, inside] = waves[:, some].T
        few = scipy.fft.ifft(few.reshape(count, rows, n), axis=2, norm="forward", overwrite_x=True, workers=-1)
        part = grid[:count]
        part[:, : limit + 1], part[:, limit + 1 : n - limit], part[:, n - limit :] = few[:, : limit + 1], 0, few[:, limit + 1 :]
        wave = scipy.fft.ifft(part, axis=1, norm="forward", workers=-1)
        wave *= plane
        wave = scipy.fft.fft(wave, axis=1, norm="forward", overwrite_x=True, workers=-1)
        few = np.concatenate([wave[:, : limit + 1], wave[:, n - limit :]], 1)
        out[:, some] = scipy.fft.fft(few, axis=2, norm="forward", overwrite_x=True, workers=-1).reshape(count, -1)[:, inside].T
    return out


def _recorded(pair: Pair, waves: np.ndarray) -> np.ndarray:
    """Form (w, w) that the detector records of waves (q, w)."""
    lit = pair.detected > 0
    seen = np.sqrt(pair.detected[lit]).astype(np.float32)[:, None] * waves[lit]
    return seen.conj().T @ seen


class Paths(NamedTuple):
    """Where waves of a core go in columns without ends.

    Attributes
    ----------
    onto : list of (step, c, c)
        For each column, amplitudes of the waves in the cores of its next atoms.
    recorded : (step + 1, c, c)
        By the detector, behind 0, 1, ... atoms of the core's own column.
    """

    onto: list
    recorded: np.ndarray


def paths(pair: Pair, columns: list[float], first: list[float], own: int, steps: int) -> Paths:
    """Of a core of column `own`, for as many atoms of each column.

    Parameters
    ----------
    columns, first : x of each column [Å], and how far below the core its next atom lies
    """
    cores = [pair.core * _at(pair, -x) for x in columns]
    waves = cores[own].conj().T / np.float32(pair.size**2)
    planes = sorted({round(z + i * pair.spacing, 3) for z in first for i in range(steps)})
    onto, recorded, depth = [[] for _ in columns], [_recorded(pair, waves)], 0.0
    for z in planes:
        here = [c for c, start in enumerate(first) if abs((z - start) / pair.spacing - round((z - start) / pair.spacing)) < 1e-3 and start - 1e-3 < z < start + (steps - 0.5) * pair.spacing]
        waves = _flown(pair, waves, z - depth)
        for c in here:
            onto[c].append(cores[c] @ waves)
        waves, depth = _through(pair, waves, _transmitted(pair, [columns[c] for c in here])), z
        if own in here:
            recorded.append(_recorded(pair, waves))
    return Paths([np.array(o) for o in onto], np.array(recorded))


class Between(NamedTuple):
    """All paths within a pair: of each column alone, and of both, whose heights differ by `below` and any number of spacings."""

    alone: Paths
    both: list[Paths]


def between(pair: Pair, below: float, steps: int, alone: Paths | None = None) -> Between:
    """Paths within a pair whose second column is `below` the first [Å], over as many atoms; those of one `alone` may be given."""
    half, gap = pair.separation / 2, below % pair.spacing
    gap = gap if gap > 1e-3 else pair.spacing
    rest = pair.spacing - gap if gap < pair.spacing - 1e-3 else pair.spacing
    alone = paths(pair, [0.0], [pair.spacing], 0, steps) if alone is None else alone
    return Between(alone, [paths(pair, [-half, half], [pair.spacing, gap], 0, steps), paths(pair, [-half, half], [rest, pair.spacing], 1, steps)])


def forms(pair: Pair, within: Between, tops: list[float], numbers: Numbers, known: dict | None = None) -> list[list[np.ndarray]]:
    """Form (c, c) complex64 of every atom's diffuse scattering, for each column from the top down; of one column, or of two whose tops are given [Å].

    A form depends on what lies below its atom alone; those in `known` are taken from there, and the others put there.
    """
    known = {} if known is None else known
    atoms = sorted([(top + i * pair.spacing, c, i) for c, (top, n) in enumerate(zip(tops, numbers, strict=True)) for i in range(n)], reverse=True)
    ends = [(top, top + (n - 1) * pair.spacing) for top, n in zip(tops, numbers, strict=True)]
    found = [[np.zeros(0)] * n for n in numbers]
    for z, c, i in atoms:
        left, other = numbers[c] - 1 - i, 1 - c
        both, alone = within.both[c], within.alone
        beside = len(numbers) == 2 and numbers[other] > 0 and ends[other][1] > z - pair.spacing
        below = (c, left, *(round(max(end - z, -pair.spacing), 3) for end in ends[other])) if beside else left
        if below in known:
            found[c][i] = known[below]
            continue

        def shared(end, z=z, other=other, beside=beside):
            """Share of the way down to `end` along which the other column goes."""
            if not beside:
                return 0.0
            low, high = ends[other][0] - pair.spacing / 2, ends[other][1] + pair.spacing / 2
            return max(0.0, min(end, high) - max(z, low)) / (end - z) if end > z else 0.0

        mixed = lambda one, two, share: one + np.float32(share) * (two - one) if share else one
        form = mixed(alone.recorded[left], both.recorded[left], shared(z + left * pair.spacing))
        for s in range(1, left + 1):
            path = mixed(alone.onto[0][s - 1], both.onto[c][s - 1], shared(z + s * pair.spacing))
            form = form + path.conj().T @ found[c][i + s] @ path
        if len(numbers) == 2:
            lower = [k for k in range(numbers[other]) if tops[other] + k * pair.spacing > z + 1e-3]
            first = both.onto[other]
            skipped = 0 if not lower else max(0, round((tops[other] + lower[0] * pair.spacing - z) / pair.spacing - 0.51))
            for s, k in enumerate(lower, skipped):
                form = form + first[s].conj().T @ found[other][k] @ first[s]
        diffuse = pair.coherence * (pair.lift @ form @ pair.lift.conj().T)
        found[c][i] = known[below] = (pair.lift.conj().T @ diffuse @ pair.lift + pair.beyond).astype(np.complex64)
    return found


def grams(pair: Pair, within: Between, columns: list[tuple[float, float]], wanted: Iterable[Numbers], incident: np.ndarray | None = None) -> dict[Numbers, Complex[np.ndarray, "K K"]]:
    """Gram matrices, as `particle.particle_gram`, of columns side by side, by their numbers of atoms.

    Parameters
    ----------
    columns : list of (x, z)
        Of the top atom of each [Å].
    wanted : iterable of tuples
        How many atoms each column has; what they share from the top is done once.
    incident : (K, w), optional
        Between these combinations of the pair's waves, (w, w), instead of all.
    """
    planes = {numbers: _planes(pair, columns, numbers) for numbers in wanted}
    known: dict = {}
    of_atoms = {numbers: forms(pair, within, [z for _, z in columns], numbers, known) for numbers in planes}
    slices = {here: _transmitted(pair, [columns[c][0] for c in here]) for here in {tuple(c for c, _ in here) for p in planes.values() for _, here in p}}
    cores = [pair.core * _at(pair, -x) for x, _ in columns]
    above, whole = _mirror(pair) if incident is None else (incident, lambda waves: waves)
    found = {}

    def recorded(waves, amplitudes, numbers):
        total = _recorded(pair, whole(waves))
        for (_, here), seen in zip(planes[numbers], amplitudes, strict=True):
            for (c, i), amplitude in zip(here, seen, strict=True):
                total += amplitude.conj().T @ (of_atoms[numbers][c][i] @ amplitude)
        return total

    def descend(waves, amplitudes, z, some):
        """`waves` (q, w) behind the planes of the atoms in `amplitudes`, which `some` of those wanted share."""
        while some:
            following = defaultdict(list)
            for numbers in some:
                if len(planes[numbers]) == len(amplitudes):
                    found[numbers] = recorded(waves, amplitudes, numbers)
                else:
                    following[planes[numbers][len(amplitudes)]].append(numbers)
            *branches, last = following.items() or [((z, ()), [])]
            for (depth, here), others in branches:
                descend(*step(waves, amplitudes, depth - z, here), depth, others)
            (depth, here), some = last
            if some:
                waves, amplitudes = step(waves, amplitudes, depth - z, here)
            z = depth

    def step(waves, amplitudes, distance, here):
        arrived = _flown(pair, waves, distance)
        every = whole(arrived)
        return _through(pair, arrived, slices[tuple(c for c, _ in here)]), [*amplitudes, [cores[c] @ every for c, _ in here]]

    start = np.zeros((len(pair.jx), above.shape[1]), np.complex64)
    start[np.hypot(pair.jx, pair.jy) < np.hypot(*pair.waves.T).max() + 1e-6] = above
    descend(start, [], 0.0, list(planes))
    return found


def _mirror(pair: Pair) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """The incident waves with y >= 0 (K, k), and from what becomes of them (q, k) to that of all (q, K): columns along x are their own mirror image."""
    place = {wave: i for i, wave in enumerate(zip(pair.jx.tolist(), pair.jy.tolist(), strict=True))}
    turned = np.array([place[x, -y] for x, y in place])
    below = pair.waves[:, 1] < 0
    above = [tuple(wave) for wave in pair.waves[~below].tolist()]
    source = np.array([above.index((x, abs(y))) for x, y in pair.waves.tolist()])

    def whole(waves):
        every = waves[:, source]
        every[:, below] = every[:, below][turned]
        return every

    return np.eye(len(below), dtype=np.complex64)[:, ~below], whole


def _planes(pair: Pair, columns: list[tuple[float, float]], numbers: Numbers) -> list:
    """Depth of each plane, and the (column, atom) in it."""
    held: dict[float, list] = {}
    for c, ((_, top), n) in enumerate(zip(columns, numbers, strict=True)):
        for i in range(n):
            held.setdefault(round(top + i * pair.spacing, 3), []).append((c, i))
    return [(depth, tuple(held[depth])) for depth in sorted(held)]


def moved(gram: Complex[np.ndarray, "K K"], pair: Pair, x: float, z: float) -> Complex[np.ndarray, "K K"]:
    """The Gram matrix of what is moved along x and down by z [Å]."""
    phase = np.exp(2j * np.pi * pair.waves[:, 0] * x / pair.cell - 1j * np.pi * pair.wavelength * (pair.waves**2).sum(1) / pair.cell**2 * z)
    return phase.conj()[:, None] * gram * phase


def crosstalk(
    pair: Pair, within: Between, below: float, wanted: Iterable[Numbers], alone: dict[Numbers, np.ndarray], incident: np.ndarray | None = None
) -> dict[Numbers, Complex[np.ndarray, "K K"]]:
    """Gram matrices of pairs less those of their columns, by the numbers of atoms.

    The first column stands at x = -separation / 2 with its top atom at z = 0, the second at +separation / 2 with its top `below` [Å].

    Parameters
    ----------
    alone : dict
        `grams` of one column at x = 0 and z = 0, of all numbers of atoms that occur.
    incident : (K, w), optional
        Between these combinations of the pair's waves, (w, w), instead of all.
    """
    half = pair.separation / 2
    both = grams(pair, within, [(-half, 0.0), (half, below)], wanted, incident)
    between = lambda gram: gram if incident is None else incident.conj().T @ gram @ incident
    return {n: whole - between(moved(alone[n[:1]], pair, -half, 0.0) + moved(alone[n[1:]], pair, half, below)) for n, whole in both.items()}


class PairGram(NamedTuple):
    """What a pair lacks: sum of values (r,) times vectors (K, r), for waves (K, 2) in units of 1 / cell."""

    values: np.ndarray
    vectors: np.ndarray
    waves: np.ndarray
    cell: float

    @property
    def matrix(self) -> Complex[np.ndarray, "K K"]:
        return (self.vectors * self.values) @ self.vectors.conj().T


def crosstalk_of_many(pair: Pair, within: Between, below: float, wanted: set[Numbers], alone: dict[Numbers, np.ndarray], known: Iterable[PairGram] = ()) -> dict[Numbers, PairGram]:
    """`crosstalk` of pairs that lack much the same: most of them for the few waves that `known` ones lack, the longest and the shortest of others for all waves.

    How much they lack of other waves is estimated from a few random ones (Halko, Martinsson & Tropp, SIAM Review 53, 217 (2011), section 4.3); pairs that lack
    more than `MISSED` of it are left for the next round.
    """
    known, found = list(known), {}
    if known:
        found |= _within_range(pair, within, below, wanted, alone, known)
    while rest := wanted - set(found):
        ends = {min(rest, key=sum), max(rest, key=sum)}
        found |= {n: _strongest(pair, gram, np.eye(len(gram))) for n, gram in crosstalk(pair, within, below, ends, alone).items()}
        known += [found[n] for n in ends]
        if rest - ends:
            found |= _within_range(pair, within, below, rest - ends, alone, known)
    return found


def _within_range(pair: Pair, within: Between, below: float, wanted: set[Numbers], alone: dict[Numbers, np.ndarray], known: list[PairGram]) -> dict[Numbers, PairGram]:
    """Those of the pairs `wanted` that lack hardly more waves than the `known` ones do."""
    left, sizes, _ = np.linalg.svd(np.concatenate([some.vectors * (some.values / abs(some.values).max()) for some in known], 1), full_matrices=False)
    waves = left[:, sizes > RANGE * sizes[0]]
    total, k = waves.shape
    others = np.random.default_rng(0).normal(size=(total, PROBES, 2)) @ (1, 1j)
    others = np.linalg.qr(others - waves @ (waves.conj().T @ others))[0]
    lacking = crosstalk(pair, within, below, wanted, alone, np.concatenate([waves, others], 1).astype(np.complex64))
    missed = {n: np.sqrt(2 * (total - k) / PROBES) * np.linalg.norm(gram[k:, :k]) / np.linalg.norm(gram[:k, :k]) for n, gram in lacking.items()}
    return {n: _strongest(pair, gram[:k, :k], waves) for n, gram in lacking.items() if missed[n] < MISSED}


def _strongest(pair: Pair, gram: np.ndarray, waves: np.ndarray) -> PairGram:
    """Of a Hermitian matrix between these combinations (K, w) of the pair's waves."""
    values, vectors = np.linalg.eigh(gram)
    strong = abs(values) > STRONG * abs(values).max()
    return PairGram(values[strong], (waves @ vectors[:, strong]).astype(np.complex64), pair.waves, pair.cell)
