"""What a sum of isolated columns lacks at an estimate, pair by pair of neighbours, and how far all parameters follow."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree

from ..config import Config
from ..devices import rounded
from ..inference import local
from ..inference.arrow import ArrowFactor
from ..inference.drawing import Window
from ..inference.problem import Problem, field_of, from_vector, to_vector
from ..physics import crosstalk
from ..physics.column_images import is_round
from ..physics.crosstalk import PairGram
from ..physics.focal_series import Field, FocalSeries, defocus_minus_depth
from ..physics.gram import has_full_symmetry
from ..physics.optics import Microscope
from ..physics.pair_images import pair_images, pair_library
from ..physics.windows import window_renderer
from ..storage import load_checkpoint, save_arrays
from .joint import JointFit
from .lattice import SAME, CrystalColumns, relations
from .libraries import FORMAT, cache_folder, column_geometry, column_of, detector_of, microscope_of

THICK = 0.25  # of the way to its neighbours that the beam spreads within a column, from where a pair matters
BEYOND = 2.5  # Å beyond the beam's spread that a neighbour still matters: columns 2.9 Å apart do a tenth of what those 2.0 Å apart do, those 4.1 Å apart nothing
PATIENCE = 900.0  # s of processor time, beyond which pairs are found only where the config asks for it
GIGABYTES = 1.5  # that pairs take beside a fit
TOGETHER = 0.2  # rad; pairs whose directions differ by no more are drawn alike
LONGER = 4  # atoms that the next estimate's columns may have more before their paths are followed anew
COARSE = 1e-3  # largest error of an image of what a pair lacks, of its peak
SAMPLE, APART = 20, 10.0  # columns whose counts are changed to see how depths follow, at most, and how far from each other [Å]
UNSURE = 0.15  # of a depth's shift, as a standard deviation: what frozen phonons leave open, from 8 to 30 atoms of gold


class Owed(NamedTuple):
    """What the sum of isolated columns lacks, and what has come of it.

    Attributes
    ----------
    change : (F, ny, nx) float32, or zero
        Expected counts.
    depth, depth_sd : (C,)
        What it has done to the depths, and what is not known of that [Å].
    pairs : int
    seconds : float
        Processor time that the pairs take, infinite where they cannot be had.
    """

    change: np.ndarray
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


def _across(positions: np.ndarray, pairs: np.ndarray, box: np.ndarray | None) -> np.ndarray:
    """From the first to the second of each pair, the short way (m, 2) [Å]."""
    steps = positions[pairs[:, 1]] - positions[pairs[:, 0]]
    return steps if box is None else steps - np.round(steps / box) * box


def pair_grams(config: Config, group: Neighbours, numbers: set[tuple[int, int]], steps: int, shared: dict) -> dict[tuple[int, int], PairGram]:
    """What pairs of these numbers of atoms lack, from the cache or found now and kept there; paths are followed past `steps` atoms.

    `shared` holds what groups of one separation have in common.
    """
    column, detector, lens = column_of(config, 1), detector_of(config), microscope_of(config)
    settings = {"crosstalk": FORMAT, "core": crosstalk.FAINTEST, "element": column.element, "parametrization": config.simulation.parametrization, **detector.record} | {
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
        if (stagger, steps) not in betweens:
            betweens[stagger, steps] = crosstalk.between(model, group.below, steps, next((b.alone for (_, s), b in betweens.items() if s == steps), None))
        within = betweens[stagger, steps]
        alone |= crosstalk.grams(model, within, [(0.0, 0.0)], {(n,) for pair in missing for n in pair} - set(alone))
        known = [PairGram(kept[key], kept[key.replace("values", "vectors")], model.waves, model.cell) for key in kept if key.startswith("values_")]
        for pair, lacked in crosstalk.crosstalk_of_many(model, within, group.below, missing, alone, known).items():
            kept |= {f"values_{name(pair)}": lacked.values, f"vectors_{name(pair)}": lacked.vectors}
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


def _kinds(group: Neighbours, n_atoms: np.ndarray) -> set[tuple[int, int]]:
    """Numbers of atoms of its pairs."""
    return set(map(tuple, n_atoms[group.members].tolist()))


def nodes(n: int) -> list[tuple[int, float]]:
    """Numbers of atoms and their weights, between which what a pair lacks is interpolated in the number of one column: every one up to 16, every fourth from 24 on."""
    step = 1 if n < 16 else 2 if n < 24 else 4
    share = n % step / step
    return [(n - n % step, 1 - share), (n - n % step + step, share)][: 1 + (share > 0)]


def grown(share: dict[tuple[int, int], float], sizes: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """Weights of pairs whose sum is interpolated in shape by these shares, and in size by their logarithms: what a pair lacks grows as a power of its atoms."""
    size = np.exp(sum(u * np.log(sizes[pair]) for pair, u in share.items()))
    return {pair: u * size / sizes[pair] for pair, u in share.items()}


def shares_of(kinds: set[tuple[int, int]]) -> dict[tuple[int, int], dict[tuple[int, int], float]]:
    """For each two numbers of atoms the pairs to work out and their weights: itself, or where that makes fewer pairs the `nodes` of both, to 16 % of what is lacking, halfway between numbers four apart."""
    between = {pair: {(a, b): u * v for a, u in nodes(pair[0]) for b, v in nodes(pair[1])} for pair in kinds}
    return between if len(set().union(*between.values())) < len(kinds) else {pair: {pair: 1.0} for pair in kinds}


def seconds_for(groups: list[Neighbours], n_atoms: np.ndarray, images: int) -> float:
    """Processor time [s] that pairs take of which the cache holds none, gold under 21 mrad: paths for each distance, waves down each group's longest columns, every two numbers of atoms, and images."""
    kinds = [set().union(*shares_of(_kinds(g, n_atoms)).values()) for g in groups]
    grams = sum(0.1 * max(map(max, kind)) + 0.4 * len(kind) for kind in kinds) + 15 * len({g.separation for g in groups})
    return grams + 4e-5 * images * sum(len(g.members) for g in groups)


def asked_for(field: Field, series: FocalSeries, config: Config) -> tuple[bool, float]:
    """Whether config and field ask for the correction, and the processor time [s] that its pairs take, infinite where they cannot be had."""
    n, wanted = np.asarray(field.n_atoms), config.inference.superposition
    if len(n) < 2 or not has_full_symmetry(column_of(config, 1), detector_of(config)):
        return False, np.inf
    seconds = seconds_for(neighbours_of(field, series, config), n, len(series.defocus))
    thick = is_thick(n, np.asarray(field.positions), column_geometry(config).spacing, config.microscope.convergence_angle_mrad).any()
    return wanted == "corrected" or (wanted == "auto" and thick and seconds < PATIENCE), seconds


def lacking(
    parameters: dict, problem: Problem, config: Config, progress: Callable = lambda items, **_: items, shared: dict | None = None, of: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """What the sum of isolated columns lacks of the expected counts (F, ny, nx) float32 at an estimate, and the number of pairs that it comes of: all, or those `of` some columns (C,).

    `shared` keeps what all pairs of a crystal need for the next estimate.
    """
    series, lens = problem.series, microscope_of(config)
    field = field_of(parameters, problem.n_atoms)
    n, foci = np.asarray(field.n_atoms), np.asarray(defocus_minus_depth(field, series)[0] + field.depths[0])
    groups = neighbours_of(field, series, config)
    shares = [shares_of(_kinds(g, n)) for g in groups]
    if of is not None:
        groups = [g._replace(members=g.members[of[g.members].any(1)]) for g in groups]
        shares = [{kind: share[kind] for kind in _kinds(g, n)} for g, share in zip(groups, shares, strict=True)]
        groups, shares = [g for g in groups if len(g.members)], [share for share in shares if share]
    shared = {} if shared is None else shared
    longest = int(n.max() + max((g.below for g in groups), default=0.0) / problem.library.spacing) + 5
    if shared.get("steps", 0) < longest:
        shared["steps"] = longest + LONGER
    grams = [
        pair_grams(config, group, set().union(*of.values()), shared["steps"], shared)
        for group, of in progress(list(zip(groups, shares, strict=True)), desc="pairs of neighbours", unit="kind")
    ]
    change = np.zeros((len(foci), *series.shape), np.float32)
    for separation in progress(sorted({g.separation for g in groups}), desc="images of pairs", unit="distance"):
        own = [k for k, g in enumerate(groups) if g.separation == separation]
        change += _drawn(parameters, problem, [groups[k] for k in own], [shares[k] for k in own], [grams[k] for k in own], lens, foci)
    return change, sum(len(g.members) for g in groups)


def _drawn(parameters: dict, problem: Problem, groups: list[Neighbours], shares: list[dict], grams: list[dict], lens: Microscope, foci: np.ndarray) -> np.ndarray:
    """Counts (F, ny, nx) that pairs of one separation lack."""
    positions, n = np.stack([parameters["x"], parameters["y"]], 1), np.asarray(problem.n_atoms)
    tops = np.asarray(parameters["depth"]) - (n - 1) / 2 * problem.library.spacing
    pairs = np.concatenate([g.members for g in groups])
    highest = np.concatenate([(tops[g.members[:, 0]] + tops[g.members[:, 1]] - g.below) / 2 for g in groups])
    nodes = {(k, pair): i for i, (k, pair) in enumerate((k, pair) for k, of in enumerate(grams) for pair in of)}
    kinds = {(k, pair): i for i, (k, pair) in enumerate((k, pair) for k, of in enumerate(shares) for pair in of)}
    kind = np.array([kinds[k, tuple(pair)] for k, g in enumerate(groups) for pair in n[g.members].tolist()])
    sizes = [{pair: float(np.linalg.norm(gram.values)) or 1.0 for pair, gram in of.items()} for of in grams]
    of_kind = [{nodes[k, node]: share for node, share in grown(of[pair], sizes[k]).items()} for k, of in enumerate(shares) for pair in of]
    every = [gram for of in grams for gram in of.values()]
    step = _across(positions, pairs, _box(problem.series))
    low, high = 20 * np.floor((foci.min() - highest.max()) / 20), 20 * np.ceil((foci.max() - highest.min()) / 20)
    look = lambda turn: pair_images(every, lens, low, high, turn)
    from_above = look(0.0) if is_round(lens) else None
    half = int(np.ceil(every[0].cell / 2 / problem.series.pixel_size)) + 1
    change = np.zeros((len(foci), *problem.series.shape), np.float32)
    of_kind += [of_kind[0]] * (rounded(len(of_kind)) - len(of_kind))  # as many as another time, which spares compiling anew
    middle, turned = positions[pairs[:, 0]] + step / 2, directions(np.arctan2(*step.T[::-1]))
    most = max(len(members) for _, members in turned)
    for turn, members in turned:
        library = pair_library(look(turn) if from_above is None else from_above, of_kind, every[0].cell, lens, turn)
        more = (0, most - len(members))  # pairs of no kind, which are not drawn
        there = parameters | {name: np.pad(of[members], more) for name, of in (("x", middle[:, 0]), ("y", middle[:, 1]), ("depth", highest))}
        windows = [Window(np.arange(len(foci)), half, window_renderer(library, problem.series.pixel_size, half, float(max(-low, high)), tolerance=COARSE))]
        change += local.signals(there, eqx.tree_at(lambda p: (p.library, p.n_atoms), problem, (library, np.pad(kind[members] + 1, more))), windows)
    return change


def directions(angles: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Angles [rad] that lie together, in parts of `TOGETHER`: the mean of each and which they are."""
    order = np.argsort(angles)
    gaps = np.diff(angles[order], append=angles[order[0]] + 2 * np.pi)
    order = np.roll(order, -1 - int(np.argmax(gaps)))  # begin behind the widest gap
    along = np.mod(angles[order] - angles[order[0]], 2 * np.pi)
    found = []
    for cluster in np.split(np.arange(len(order)), np.flatnonzero(np.diff(along) > TOGETHER / 2) + 1):
        part = ((along[cluster] - along[cluster[0]]) / TOGETHER).astype(int)
        for k in np.unique(part):
            members = order[cluster[part == k]]
            found.append((float(np.angle(np.exp(1j * angles[members]).mean())), members))
    return found


def settled(joint: JointFit, config: Config, wanted: bool, seconds: float, progress: Callable = lambda items, **_: items, shared: dict | None = None) -> tuple[JointFit, Owed]:
    """A fit to counts less what superposition lacked on the way there, less what more it lacks at the end, and what that is; nothing where it is not `wanted`.

    To first order: with c what expected counts lack, J their derivatives by the parameters, W their precision and C the parameters' covariance, a fit to counts that
    hold c is off by C J^T W c. Pairs take `seconds` of processor time; `shared` as for `lacking`.
    """
    n = len(joint.problem.n_atoms)
    if not wanted:
        return joint, Owed(np.float32(0.0), np.zeros(n), np.zeros(n), 0, seconds)
    estimate, problem = joint.estimate, joint.problem
    change, pairs = lacking(estimate.parameters, problem, config, progress, shared)
    rest = change - joint.lacking
    shift, more = _follows(joint, np.stack([change, rest])).T
    problem = dataclasses.replace(problem, counts=problem.counts - rest)
    moved = from_vector(to_vector(estimate.parameters, problem) - more, problem)
    parameters = estimate.parameters | {name: value for name, value in moved.items() if name in problem.free}
    return joint._replace(problem=problem, estimate=estimate._replace(parameters=parameters), lacking=change), Owed(change, shift[:n], UNSURE * abs(shift[:n]), pairs, seconds)


def per_atom(
    joint: JointFit, owed: Owed, isolated: np.ndarray, config: Config, progress: Callable = lambda items, **_: items, shared: dict | None = None
) -> np.ndarray:
    """How much farther depths (C,) [Å] go than those of `isolated` columns (C,) for each atom that a column is counted more, when what its pairs lack follows its count.

    Some columns, far from each other, grow at their lower ends, and the fit's answer is followed from there: the thickest stay nearly there, for what they scatter is
    mostly from above. What they go farther is proportional to what `owed` has moved them by: 0.26 of it on average over columns of 26 to 43 atoms of gold, 0.20 to 0.42 in single ones of them.
    """
    problem, parameters = joint.problem, {name: np.asarray(value, float) for name, value in joint.estimate.parameters.items()}
    n = np.asarray(problem.n_atoms)
    thickest = np.argsort(-abs(owed.depth) * np.isfinite(isolated))
    chosen = np.zeros(len(n), bool)
    chosen[_far_apart(np.stack([parameters["x"], parameters["y"]], 1), thickest, _box(problem.series))] = True
    chosen &= np.isfinite(isolated)  # the library's longest cannot grow
    if not np.any(owed.depth[chosen]):
        return np.zeros(len(n))
    more = dataclasses.replace(problem, n_atoms=problem.n_atoms + jnp.asarray(chosen))
    before = joint.reader.rates(parameters, problem) + lacking(parameters, problem, config, progress, shared, chosen)[0]
    shift = np.where(chosen, problem.library.spacing / 2, 0.0)
    for _ in range(2):  # thin columns go back more than first order can follow
        there = parameters | {"depth": parameters["depth"] + shift}
        change = joint.reader.rates(there, more) + lacking(there, more, config, progress, shared, chosen)[0] - before
        shift = np.where(chosen, shift - _follows(joint, change[None])[: len(n), 0], 0.0)
    moved = owed.depth[chosen]
    return owed.depth * float((shift - isolated)[chosen] @ moved / (moved @ moved))


def _far_apart(positions: np.ndarray, order: np.ndarray, box: np.ndarray | None) -> list[int]:
    """The first `SAMPLE` positions (C, 2) in this order that lie `APART` from each other."""
    tree = cKDTree(positions if box is None else np.mod(positions, box), boxsize=box)
    found: list[int] = []
    free = np.ones(len(positions), bool)
    for c in order.tolist():
        if free[c] and len(found) < SAMPLE:
            found.append(c)
            free[tree.query_ball_point(tree.data[c], APART)] = False
    return found


def _follows(joint: JointFit, changes: np.ndarray) -> np.ndarray:
    """What changes (K, F, ny, nx) of all counts do to the free parameters (P, K), to first order."""
    factor, information = joint.estimate.factor, joint.reader.information_along(joint.estimate.parameters, joint.problem, changes)
    return factor.solve(information) if isinstance(factor, ArrowFactor) else factor @ (factor.T @ information)


def is_thick(n_atoms: np.ndarray, positions: np.ndarray, spacing: float, angle: float) -> np.ndarray:
    """Columns (C,) in which the beam spreads by a quarter of the way to the nearest neighbour."""
    if len(positions) < 2:
        return np.zeros(len(positions), bool)
    nearest = cKDTree(positions).query(positions, 2)[0][:, 1]
    return spread(n_atoms, spacing, angle) > THICK * nearest
