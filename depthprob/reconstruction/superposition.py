"""What a sum of isolated columns lacks at an estimate, pair by pair of neighbours, and how far all parameters follow."""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial import cKDTree

from ..config import Config
from ..inference.arrow import ArrowFactor
from ..inference.likelihood import field_of, from_vector, to_vector
from ..physics import crosstalk
from ..physics.focal_series import Field, FocalSeries, counts_per_fraction, defocus_minus_depth
from ..physics.gram import has_full_symmetry
from ..physics.library import is_round
from ..physics.optics import Microscope
from ..physics.particle import focal_spectra
from ..storage import load_checkpoint, save_arrays
from .joint import JointFit, recount
from .lattice import SAME, CrystalColumns
from .libraries import FORMAT, cache_folder, column_geometry, column_of, detector_of, microscope_of

THICK = 0.25  # of the way to its neighbours that the beam spreads within a column, from where a pair matters
BEYOND = 2.5  # Å beyond the beam's spread that a neighbour still matters: columns 2.9 Å apart do a tenth of what those 2.0 Å apart do, those 4.1 Å apart nothing
FAINTEST = 1e-4  # of the largest eigenvalue of a pair's matrix, below which others are left out
PATIENCE = 900.0  # s of processor time, beyond which pairs are found only where the config asks for it
GIGABYTES = 1.5  # that pairs take beside a fit
PLANES = 10.0  # Å between planes that images of pairs are interpolated from
UNSURE = 0.15  # of a depth's shift, as a standard deviation: what frozen phonons leave open, from 8 to 30 atoms of gold


class Owed(NamedTuple):
    """What the sum of isolated columns lacks, and what has come of it.

    Attributes
    ----------
    change : (F, ny, nx) float32, or zero
        Expected counts.
    shift : (P,)
        Of the free parameters that it has caused.
    depth, depth_sd : (C,)
        The part of it that is depths, and what is not known of it [Å].
    pairs : int
    seconds : float
        Processor time that the pairs take, infinite where they cannot be had.
    """

    change: np.ndarray
    shift: np.ndarray
    depth: np.ndarray
    depth_sd: np.ndarray
    pairs: int
    seconds: float


class Neighbours(NamedTuple):
    """Pairs of columns alike but for their place and numbers of atoms: the first of each has the higher top.

    Attributes
    ----------
    separation, below : float
        [Å]; the second's top is `below` the first's.
    members : (m, 2) int
    """

    separation: float
    below: float
    members: np.ndarray


def spread(n_atoms: np.ndarray, spacing: float, angle: float) -> np.ndarray:
    """How far [Å] a beam of semi-angle `angle` [mrad] that is in focus in the middle of a column spreads to its ends."""
    return 1e-3 * angle * n_atoms * spacing / 2


def neighbours(positions: np.ndarray, tops: np.ndarray, n_atoms: np.ndarray, geometry: CrystalColumns, angle: float, box: np.ndarray | None = None) -> list[Neighbours]:
    """Pairs near enough to matter, by the crystal's distance next to theirs, and by the difference in height next to theirs that it allows at this distance.

    Parameters
    ----------
    positions : (C, 2), tops : (C,)
        [Å].
    box : (Lx, Ly), optional
        Of a periodic field.
    """
    wide = spread(n_atoms, geometry.spacing, angle)
    tree = cKDTree(positions if box is None else np.mod(positions, box), boxsize=box)
    pairs = tree.query_pairs(BEYOND + wide.max(), output_type="ndarray").reshape(-1, 2)
    distance = np.hypot(*_across(positions, pairs, box).T)
    near = distance < BEYOND + wide[pairs].min(1)
    pairs, distance = pairs[near], distance[near, None]
    apart, height = relations(geometry).T
    below = tops[pairs[:, 1], None] - tops[pairs[:, 0], None]
    allowed = height + np.round((below - height) / geometry.spacing) * geometry.spacing
    off = abs(distance - apart)
    which = np.argmin(np.where(off < off.min(1, keepdims=True) + SAME, abs(below - allowed), np.inf), 1)
    separation, below = apart[which], np.take_along_axis(allowed, which[:, None], 1)[:, 0].round(3)
    turned = (below < 0) | ((below == 0) & (n_atoms[pairs[:, 0]] < n_atoms[pairs[:, 1]]))
    pairs = np.where(turned[:, None], pairs[:, ::-1], pairs)
    kind, of_kind = np.unique(np.stack([separation, abs(below)], 1), axis=0, return_inverse=True)
    return [Neighbours(float(s), float(b), pairs[of_kind.ravel() == k]) for k, (s, b) in enumerate(kind)]


def relations(geometry: CrystalColumns) -> np.ndarray:
    """Distances between columns of a crystal, as far as a few columns, and the second's height above the first, modulo their spacing (R, 2) [Å], sorted."""
    steps = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 2), -1).reshape(-1, 1, 1, 2)
    place = geometry.sites - geometry.sites[:, None]
    apart = np.hypot(*np.moveaxis((steps + place) @ geometry.basis, -1, 0))
    height = (steps @ geometry.heights + geometry.site_heights - geometry.site_heights[:, None]) / geometry.spacing
    height = np.mod(height + SAME, 1.0) - SAME
    found = np.unique(np.stack([apart, height * geometry.spacing], -1).reshape(-1, 2).round(3), axis=0)
    return abs(found[found[:, 0] > 0.1])


def _across(positions: np.ndarray, pairs: np.ndarray, box: np.ndarray | None) -> np.ndarray:
    """From the first to the second of each pair, the short way (m, 2) [Å]."""
    steps = positions[pairs[:, 1]] - positions[pairs[:, 0]]
    return steps if box is None else steps - np.round(steps / box) * box


class PairGram(NamedTuple):
    """What a pair lacks: sum of values times vectors, for waves in units of 1 / cell."""

    values: np.ndarray
    vectors: np.ndarray
    waves: np.ndarray
    cell: float

    @property
    def matrix(self) -> np.ndarray:
        return (self.vectors * self.values) @ self.vectors.conj().T


def pair_grams(config: Config, group: Neighbours, numbers: set[tuple[int, int]], steps: int, shared: dict) -> dict[tuple[int, int], PairGram]:
    """What pairs of these numbers of atoms lack, from the cache or found now and kept there; paths are followed past `steps` atoms.

    `shared` holds what groups of one separation have in common.
    """
    column, detector, lens = column_of(config, 1), detector_of(config), microscope_of(config)
    settings = {"crosstalk": FORMAT, "element": column.element, "parametrization": config.simulation.parametrization, **detector.record} | {
        name: round(float(value), 6)
        for name, value in (("energy", lens.energy), ("angle", lens.convergence_angle), ("spacing", column.spacing), ("b", column.debye_waller_b), ("separation", group.separation), ("below", group.below))
    }
    path = cache_folder() / f"pairs_{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}.npz"
    kept = load_checkpoint(path)
    name = lambda pair: f"{pair[0]}_{pair[1]}"
    missing = {pair for pair in numbers if f"values_{name(pair)}" not in kept}
    if missing:
        if group.separation not in shared:
            model = crosstalk.prepare_pair(column, float(lens.energy), float(lens.convergence_angle), detector, group.separation, config.simulation.parametrization)
            shared[group.separation] = (model, {}, {})
        model, betweens, alone = shared[group.separation]
        stagger = round(group.below % float(column.spacing), 3)
        if stagger not in betweens:
            betweens[stagger] = crosstalk.between(model, group.below, steps, next((b.alone for b in betweens.values()), None))
        alone |= crosstalk.grams(model, betweens[stagger], [(0.0, 0.0)], {(n,) for pair in missing for n in pair} - set(alone))
        for pair, gram in crosstalk.crosstalk(model, betweens[stagger], group.below, missing, alone).items():
            values, vectors = np.linalg.eigh(gram)
            strong = abs(values) > FAINTEST * abs(values).max()
            kept |= {f"values_{name(pair)}": values[strong], f"vectors_{name(pair)}": vectors[:, strong].astype(np.complex64)}
        kept |= {"waves": model.waves, "cell": model.cell}
        save_arrays(path, **kept)
    return {pair: PairGram(kept[f"values_{name(pair)}"], kept[f"vectors_{name(pair)}"], kept["waves"], float(kept["cell"])) for pair in numbers}


def neighbours_of(field: Field, series: FocalSeries, config: Config) -> list[Neighbours]:
    """`neighbours` in a field."""
    n, geometry = np.asarray(field.n_atoms), column_geometry(config)
    tops = np.asarray(field.depths) - (n - 1) / 2 * geometry.spacing
    return neighbours(np.asarray(field.positions), tops, n, geometry, config.microscope.convergence_angle_mrad, _box(series))


def _box(series: FocalSeries) -> np.ndarray | None:
    """Sides of a periodic field (x, y) [Å]."""
    return np.array(series.shape[::-1]) * series.pixel_size if series.periodic else None


def nodes(n: int) -> list[tuple[int, float]]:
    """Numbers of atoms and their weights, between which what a pair lacks is interpolated in the number of one column: every one up to 16, every fourth from 24 on."""
    step = 1 if n < 16 else 2 if n < 24 else 4
    share = n % step / step
    return [(n - n % step, 1 - share), (n - n % step + step, share)][: 1 + (share > 0)]


def shares_of(kinds: set[tuple[int, int]]) -> dict[tuple[int, int], dict[tuple[int, int], float]]:
    """For each two numbers of atoms the pairs to work out and their weights: itself, or where that makes fewer pairs the `nodes` of both, to 5 % of what is lacking."""
    between = {pair: {(a, b): u * v for a, u in nodes(pair[0]) for b, v in nodes(pair[1])} for pair in kinds}
    return between if len(set().union(*between.values())) < len(kinds) else {pair: {pair: 1.0} for pair in kinds}


def seconds_for(groups: list[Neighbours], n_atoms: np.ndarray, images: int) -> float:
    """Processor time [s] that pairs take of which the cache holds none, gold under 21 mrad: paths for each distance, waves down each group's longest columns, every two numbers of atoms, and images."""
    kinds = [set().union(*shares_of(set(map(tuple, n_atoms[g.members].tolist()))).values()) for g in groups]
    grams = sum(0.1 * max(map(max, kind)) + 0.5 * len(kind) for kind in kinds) + 15 * len({g.separation for g in groups})
    return grams + 1.5e-4 * images * sum(len(g.members) for g in groups)


def asked_for(field: Field, series: FocalSeries, config: Config) -> tuple[bool, float]:
    """Whether config and field ask for the correction, and the processor time [s] that its pairs take, infinite where they cannot be had."""
    n, wanted = np.asarray(field.n_atoms), config.inference.superposition
    if len(n) < 2 or not has_full_symmetry(column_of(config, 1), detector_of(config)):
        return False, np.inf
    seconds = seconds_for(neighbours_of(field, series, config), n, len(series.defocus))
    thick = is_thick(n, np.asarray(field.positions), column_geometry(config).spacing, config.microscope.convergence_angle_mrad).any()
    return wanted == "corrected" or (wanted == "auto" and thick and seconds < PATIENCE), seconds


def lacking(joint: JointFit, config: Config, progress: Callable = lambda items, **_: items) -> tuple[np.ndarray, int]:
    """What the sum of isolated columns lacks of the expected counts (F, ny, nx) float32 at an estimate, and the number of pairs that it comes of."""
    problem, series, lens = joint.problem, joint.problem.series, microscope_of(config)
    field = field_of(joint.estimate.parameters, problem.n_atoms)
    positions, depths, n = np.asarray(field.positions), np.asarray(field.depths), np.asarray(field.n_atoms)
    spacing, foci, box = problem.library.spacing, np.asarray(defocus_minus_depth(field, series))[0] + depths[0], _box(series)
    tops, groups = depths - (n - 1) / 2 * spacing, neighbours_of(field, series, config)
    steps = int(n.max() + max((g.below for g in groups), default=0.0) / spacing) + 5
    change, shared = np.zeros((len(foci), *series.shape), np.float32), {}
    for group in progress(groups, desc="pairs of neighbours", unit="kind"):
        alike = defaultdict(list)
        for i, j in group.members:
            alike[int(n[i]), int(n[j])].append((i, j))
        shares = shares_of(set(alike))
        grams = pair_grams(config, group, set().union(*shares.values()), steps, shared)
        highest = lambda pairs, below=group.below: (tops[pairs[:, 0]] + tops[pairs[:, 1]] - below) / 2
        planes = foci - highest(group.members)[:, None]
        of, some = viewer(grams, lens, planes.min(), planes.max()), next(iter(grams.values()))
        _, qx, qy = focal_spectra(some.matrix, some.waves, (some.cell,) * 2, lens, planes[0, :0])
        for numbers, members in alike.items():
            pairs, look = np.array(members), of(shares[numbers])
            for pair, step, own in zip(pairs, _across(positions, pairs, box), foci - highest(pairs)[:, None], strict=True):
                spectra = look(own, float(np.arctan2(step[1], step[0])))
                _paint(change, spectra, qx, qy, step, positions[pair[0]] + step / 2 + np.asarray(field.image_shifts), some.cell / 2, series.pixel_size, series.periodic)
    change *= (np.asarray(counts_per_fraction(series)) * np.asarray(field.gain)[:, None, None]).astype(np.float32)
    return change, sum(len(g.members) for g in groups)


def viewer(grams: dict[tuple[int, int], PairGram], lens: Microscope, lowest: float, highest: float) -> Callable[[dict], Callable[[np.ndarray, float], np.ndarray]]:
    """How pairs of one kind look: from the weights of their Gram matrices, a function of planes (F,) [Å] below its top and an angle [rad].

    It gives Fourier coefficients (F, y, x) of the pair, turned by the angle, seen with the crossover in each plane. Under a round lens they are interpolated between
    planes `PLANES` apart from `lowest` to `highest` [Å], to 1e-4 of the largest pixel.
    """
    at = lambda gram, planes, turn: focal_spectra(gram.matrix, gram.waves, (gram.cell,) * 2, lens, planes, turn)[0]
    if not is_round(lens):
        return lambda shares: lambda planes, turn: sum(share * at(grams[node], planes, turn) for node, share in shares.items())
    grid = np.arange(lowest - PLANES, highest + 2 * PLANES, PLANES)
    seen = {node: at(gram, grid, 0.0).astype(np.complex64) for node, gram in grams.items()}

    def of(shares):
        spline = CubicSpline(grid, sum(share * seen[node] for node, share in shares.items()))
        return lambda planes, turn: spline(planes)

    return of


def _paint(change: np.ndarray, spectra: np.ndarray, qx: np.ndarray, qy: np.ndarray, along: np.ndarray, middle: np.ndarray, radius: float, pixel: float, periodic: bool) -> None:
    """Add images of these spectra, their x turned `along` a direction (2,), about the middle (F, 2) of each image [Å]."""
    qx, qy = np.meshgrid(qx, qy)
    half = (qx > 0) | ((qx == 0) & (qy >= 0))
    c, s = along / np.hypot(*along)
    qx, qy, part = (c * qx - s * qy)[half], (s * qx + c * qy)[half], spectra[:, half] * np.where((qx == 0) & (qy == 0), 1.0, 2.0)[half]
    seen = abs(part).max(0) > 1e-4 * abs(part).max()
    qx, qy, part = qx[seen], qy[seen], part[:, seen]
    centre = middle.mean(0)
    first = np.floor((centre - radius) / pixel).astype(int)
    at = first + np.arange(int(2 * radius / pixel) + 2)[:, None]
    x, y = (at * pixel - centre).T
    disc = np.hypot(x, y[:, None]) < radius
    across, down = (np.exp(2j * np.pi * np.outer(q, r)).astype(np.complex64) for q, r in ((qx, x), (qy, y)))
    size = np.array(change.shape[:0:-1])
    inside = np.ones_like(at, bool) if periodic else (at >= 0) & (at < size)
    columns, rows = (np.mod(at[:, k], size[k])[inside[:, k]] for k in (0, 1))
    for image, spectrum, place in zip(change, part, middle - centre, strict=True):
        moved = (spectrum * np.exp(-2j * np.pi * (qx * place[0] + qy * place[1]))).astype(np.complex64)
        drawn = ((down * moved[:, None]).T @ across).real * disc
        np.add.at(image, np.ix_(rows, columns), drawn[np.ix_(inside[:, 1], inside[:, 0])])


def owed(joint: JointFit, config: Config, progress: Callable = lambda items, **_: items) -> Owed:
    """What the estimate owes to superposition, to first order; nothing where the config or the field does not ask for it.

    With c what the expected counts lack, J their derivatives by the parameters, W their precision and C the parameters' covariance, the fit has put C J^T W c
    too much into the parameters.
    """
    n = len(joint.problem.n_atoms)
    wanted, seconds = asked_for(field_of(joint.estimate.parameters, joint.problem.n_atoms), joint.problem.series, config)
    if not wanted:
        return Owed(np.float32(0.0), np.zeros(len(joint.estimate.names)), np.zeros(n), np.zeros(n), 0, seconds)
    change, pairs = lacking(joint, config, progress)
    shift = _follows(joint, change)
    return Owed(change, shift, shift[:n], UNSURE * abs(shift[:n]), pairs, seconds)


def _follows(joint: JointFit, change: np.ndarray) -> np.ndarray:
    """What a change (F, ny, nx) of all counts does to the free parameters (P,), to first order."""
    factor, information = joint.estimate.factor, joint.reader.information_along(joint.estimate.parameters, joint.problem, change[None])[:, 0]
    return factor.solve(information) if isinstance(factor, ArrowFactor) else factor @ (factor.T @ information)


def paid(joint: JointFit, owed: Owed, advance: np.ndarray | None = None) -> JointFit:
    """The fit less what superposition has put into its parameters, and the counts less what it lacks: for them the same model is right.

    `advance` (F, ny, nx) is what the fitted counts were less already.
    """
    estimate, rest = joint.estimate, owed.change if advance is None else owed.change - advance
    shift = owed.shift if advance is None else _follows(joint, rest)
    problem = dataclasses.replace(joint.problem, counts=joint.problem.counts - rest)
    moved = estimate.parameters | {name: value for name, value in from_vector(to_vector(estimate.parameters, problem) - shift, problem).items() if name in problem.free}
    return joint._replace(problem=problem, estimate=estimate._replace(parameters=moved))


def corrected(joint: JointFit, refit: Callable, config: Config, progress: Callable = lambda items, **_: items) -> tuple[JointFit, Owed]:
    """The fit without what superposition has put into its parameters and atom counts, and what that was.

    Where columns without it have other counts, `refit` fits the field anew, once, given what the counts lack (F, ny, nx), the field to start from and the priors'
    centre, and what is lacking is found again.
    """
    debt = owed(joint, config, progress)
    settled = paid(joint, debt)
    if not debt.pairs:
        return settled, debt
    parameters, problem = settled.estimate.parameters, settled.problem
    counts, amplitudes = recount(parameters, problem, config.inference.noise == "over_dispersed", joint.amplitudes)
    if np.array_equal(counts.n, problem.n_atoms):
        return settled._replace(counts=counts, amplitudes=amplitudes), debt
    again = refit(debt.change, field_of(parameters, jnp.asarray(counts.n)), problem.centre)
    rest = owed(again, config, progress)
    return paid(again, rest, debt.change), rest


def is_thick(n_atoms: np.ndarray, positions: np.ndarray, spacing: float, angle: float) -> np.ndarray:
    """Columns (C,) in which the beam spreads by a quarter of the way to the nearest neighbour."""
    if len(positions) < 2:
        return np.zeros(len(positions), bool)
    nearest = cKDTree(positions).query(positions, 2)[0][:, 1]
    return spread(n_atoms, spacing, angle) > THICK * nearest
