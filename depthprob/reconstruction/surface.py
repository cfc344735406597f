"""The surface of a particle: where its columns begin and end, which atoms lie on it, its facets, and the volume within."""

from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, QhullError, cKDTree
from scipy.spatial.transform import Rotation

from .lattice import SAME, UnitCell

# in nearest-neighbour distances
COPLANAR = 0.25  # atoms of one plane are this close to it; half the distance of fcc's {110} planes
TOUCHING = 1.7  # atoms of one facet that are next to each other; the diagonal of {100} is 1.41, the third shell 1.73
STEEP = 0.2  # cosine to the beam below which a facet is seen from the side alone
LEAST = 4  # atoms that make a facet
HIGHEST = 3  # index of a facet
ROWS = 3  # of atoms, along each vector of its mesh, that make a facet of higher index than one: two are the edges of a terrace or of two other facets


class ColumnEnds(NamedTuple):
    """First and last atom of each column, by its measured depth.

    Attributes
    ----------
    top, bottom : (C,)
        z of the first and last atom [Å].
    top_sd, bottom_sd : (C,)
        From the depth's sd and the count's probabilities, taken as independent [Å].
    thickness, thickness_sd : (C,)
        From first to last atom [Å].
    """

    top: np.ndarray
    top_sd: np.ndarray
    bottom: np.ndarray
    bottom_sd: np.ndarray
    thickness: np.ndarray
    thickness_sd: np.ndarray


class Facet(NamedTuple):
    """A plane of atoms of indices up to `HIGHEST` at the top or the bottom of the particle.

    Attributes
    ----------
    hkl : tuple of int
        Outward, in the crystal's axes; which of the equivalent ones is a matter of how the crystal was laid on the image.
    is_top : bool
    columns : (M,) int
        That end on it.
    area : float
        Of the convex hull of its atoms' centres [Å^2].
    normal : (3,)
        Outward, of the plane fitted to the measured ends of its columns.
    normal_sd : float
        Root mean square angle by which their errors turn it [degrees].
    misfit : float
        Angle between it and the crystal's plane [degrees].
    """

    hkl: tuple[int, int, int]
    is_top: bool
    columns: np.ndarray
    area: float
    normal: np.ndarray
    normal_sd: float
    misfit: float


class Surface(NamedTuple):
    """What bounds the particle.

    Attributes
    ----------
    coordination : (N,) int
        Atoms in the nearest-neighbour shell of each atom.
    bulk_coordination : int
        Of an atom within the crystal; atoms with less lie on the surface.
    volume, volume_sd : float
        Number of atoms times the crystal's volume for each, with the counts' uncertainty [Å^3].
    hull_volume : float
        Of the convex hull of all centres, for comparison: without the outer half of the surface's atoms, but with every hollow [Å^3];
        nan where all atoms lie in one plane.
    facets : tuple of Facet
        Largest first.
    """

    coordination: np.ndarray
    bulk_coordination: int
    volume: float
    volume_sd: float
    hull_volume: float
    facets: tuple[Facet, ...]


def count_variance(n_atoms: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Mean square of the error of each count (C,), by its probabilities (C, n_max) of 1 ... n_max atoms."""
    return (probability * (np.arange(1, probability.shape[1] + 1) - np.asarray(n_atoms)[:, None]) ** 2).sum(1)


def column_ends(depth: np.ndarray, depth_sd: np.ndarray, n_atoms: np.ndarray, probability: np.ndarray, spacing: float) -> ColumnEnds:
    """Depth, less and plus half the distance between the outermost of n atoms `spacing` apart.

    An atom more or less moves each end by half a spacing: var(end) = depth_sd^2 + (spacing / 2)^2 var(n).
    """
    thickness = (np.asarray(n_atoms) - 1) * spacing
    thickness_sd = spacing * np.sqrt(count_variance(n_atoms, probability))
    end_sd = np.hypot(depth_sd, thickness_sd / 2)
    return ColumnEnds(depth - thickness / 2, end_sd, depth + thickness / 2, end_sd, thickness, thickness_sd)


def nearest_shell(crystal: UnitCell) -> tuple[np.ndarray, float]:
    """Vectors (Z, 3) from the cell's first atom to its nearest neighbours, and the distance that parts them from the next [Å].

    The shell ends at the first gap wider than a tenth: it holds both distances of an hcp crystal that is not ideally long.
    """
    steps = np.array(list(product(range(-3, 4), repeat=3))) @ crystal.lattice
    vectors = (steps[:, None] + crystal.atoms - crystal.atoms[0]).reshape(-1, 3)
    distance = np.linalg.norm(vectors, axis=1)
    order = np.argsort(distance)
    order = order[distance[order] > SAME]
    last = int(np.argmax(distance[order][1:] > 1.1 * distance[order][:-1]))
    return vectors[order[: last + 1]], float(distance[order[last : last + 2]].mean())


def coordination_numbers(atoms: np.ndarray, reach: float) -> np.ndarray:
    """Atoms within `reach` [Å] of each of `atoms` (N, 3), without itself: (N,) int."""
    return cKDTree(atoms).query_ball_point(atoms, reach, return_length=True) - 1


def orientation(bonds: np.ndarray, shell: np.ndarray, beam: np.ndarray, most: int = 200) -> np.ndarray:
    """Rotation (3, 3) from the crystal's frame to the image's, from bonds (B, 3) between atoms seen along `beam` (in the crystal's frame).

    Turns about the beam are tried by two degrees, upright and upside down; the best is refined on all axes.
    """
    bonds = bonds[:: -(-len(bonds) // most)]
    shell = np.concatenate([shell, -shell])
    upright = Rotation.align_vectors([[0, 0, 1.0]], [beam / np.linalg.norm(beam)])[0]

    def matched(turn):
        return cKDTree(turn.apply(shell)).query(bonds)

    starts = [Rotation.from_euler("zx", [angle, flip], degrees=True) * upright for flip in (0, 180) for angle in range(0, 360, 2)]
    turn = min(starts, key=lambda t: float(np.sum(matched(t)[0] ** 2).round(6)))
    for _ in range(3):
        turn = Rotation.align_vectors(bonds, shell[matched(turn)[1]])[0]
    return turn.as_matrix()


def find_surface(
    atoms: np.ndarray, column_of_atom: np.ndarray, ends: ColumnEnds, n_variance: np.ndarray, positions: np.ndarray, crystal: UnitCell, zone_axis
) -> Surface:
    """Coordination, volume and facets of atoms (N, 3) on crystal planes, columns in order and the top atom of each first.

    Parameters
    ----------
    ends : ColumnEnds
        As measured, to which the planes of the facets are fitted.
    n_variance : (C,)
        Variance of each column's number of atoms.
    positions : (C, 2)
        x, y of the columns [Å].
    zone_axis : (3,)
        Along the beam, in the crystal's axes.
    """
    shell, reach = nearest_shell(crystal)
    each = abs(np.linalg.det(crystal.lattice)) / len(crystal.atoms)
    try:
        hull = float(ConvexHull(atoms).volume)
    except (QhullError, ValueError):  # flat, or too few
        hull = np.nan
    pairs = cKDTree(atoms).query_pairs(reach, output_type="ndarray")
    facets: list[Facet] = []
    if len(pairs) > 2 * LEAST:
        bonds, steps = atoms[pairs[:, 1]] - atoms[pairs[:, 0]], short_vectors(crystal)
        turn = orientation(bonds, shell, np.asarray(zone_axis, float) @ crystal.axes)
        reciprocal = np.linalg.inv(crystal.axes).T
        for hkl in product(range(-HIGHEST, HIGHEST + 1), repeat=3):
            normal = turn @ (np.array(hkl) @ reciprocal)
            if np.gcd.reduce(hkl) == 1 and abs(normal[2]) > STEEP * np.linalg.norm(normal):
                mesh, neighbour = plane_mesh(crystal, hkl, steps) @ turn.T, float(np.linalg.norm(shell[0]))
                spacing = abs(np.linalg.det(crystal.lattice)) / np.linalg.norm(np.cross(*mesh))
                facets += _facets(atoms, column_of_atom, pairs, bonds, ends, positions, hkl, normal / np.linalg.norm(normal), mesh, spacing, neighbour)
    return Surface(
        coordination_numbers(atoms, reach),
        len(shell),
        len(atoms) * each,
        float(each * np.sqrt(n_variance.sum())),
        hull,
        tuple(sorted(facets, key=lambda f: -f.area)),
    )


def short_vectors(crystal: UnitCell) -> np.ndarray:
    """Vectors (V, 3) of the lattice, shortest first, that hold the mesh of every plane of indices up to `HIGHEST` [Å]."""
    steps = np.array(list(product(range(-2 * HIGHEST, 2 * HIGHEST + 1), repeat=3))) @ crystal.lattice
    return steps[np.argsort(np.linalg.norm(steps, axis=1).round(6), kind="stable")][1:]


def plane_mesh(crystal: UnitCell, hkl: tuple[int, int, int], vectors: np.ndarray) -> np.ndarray:
    """Two shortest vectors (2, 3) of the lattice within its plane (hkl), of those given (`short_vectors`) [Å]."""
    steps = vectors[abs(vectors @ (np.linalg.inv(crystal.axes) @ np.array(hkl))) < SAME]
    return np.stack([steps[0], steps[np.argmax(np.linalg.norm(np.cross(steps[0], steps), axis=1) > SAME)]])


def _facets(atoms, column_of_atom, pairs, bonds, ends, positions, hkl, normal, mesh, spacing, neighbour) -> list[Facet]:
    """Facets towards `normal`: ends of columns that touch one another in one plane of this mesh (2, 3), `spacing` above the next, with no neighbour of theirs above it."""
    coplanar = min(COPLANAR * neighbour, spacing / 2)
    touching = max(TOUCHING * neighbour, 1.05 * np.linalg.norm(mesh[1]))
    is_top = bool(normal[2] < 0)
    lift = bonds @ normal
    covered = np.zeros(len(atoms), bool)
    covered[pairs[lift > coplanar, 0]] = True
    covered[pairs[lift < -coplanar, 1]] = True
    change = np.flatnonzero(np.diff(column_of_atom))
    outer = np.concatenate([[0], change + 1]) if is_top else np.append(change, len(atoms) - 1)
    outer = outer[~covered[outer]]
    if len(outer) < LEAST:
        return []
    near = cKDTree(atoms[outer]).query_pairs(touching, output_type="ndarray")
    near = near[abs((atoms[outer[near[:, 1]]] - atoms[outer[near[:, 0]]]) @ normal) < coplanar]
    graph = coo_matrix((np.ones(len(near)), near.T), shape=(len(outer), len(outer)))
    label = connected_components(graph, directed=False)[1]
    along = np.linalg.svd(normal[None])[2][1:]
    found = []
    for group in np.flatnonzero(np.bincount(label) >= LEAST):
        own = outer[label == group]
        flat = (atoms[own] - atoms[own].mean(0)) @ along.T
        if np.linalg.svd(flat, compute_uv=False)[1] < 0.5 * neighbour:  # a row
            continue
        if max(map(abs, hkl)) > 1:
            i, j = np.rint(np.linalg.lstsq(mesh.T, (atoms[own] - atoms[own[0]]).T, rcond=None)[0]).astype(int)
            if min(len(np.unique(row)) for row in (i, j, i + j, i - j)) < ROWS:
                continue
        columns = column_of_atom[own]
        z, sd = (ends.top, ends.top_sd) if is_top else (ends.bottom, ends.bottom_sd)
        fitted, normal_sd = fit_plane(positions[columns], z[columns], sd[columns])
        fitted = fitted if is_top else -fitted
        misfit = float(np.degrees(np.arctan2(np.linalg.norm(np.cross(fitted, normal)), fitted @ normal)))
        found.append(Facet(hkl, is_top, columns, float(ConvexHull(flat).volume), fitted, normal_sd, misfit))
    return found


def fit_plane(positions: np.ndarray, z: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, float]:
    """Unit normal (3,) of the plane through points of known x, y (M, 2), its z below zero, and the rms angle by which errors `sd` of z turn it [degrees].

    Weighted least squares for the slopes g of z; the normal (g, -1) / sqrt(1 + g^2) turns by (1 - n n^T) dg / sqrt(1 + g^2).
    """
    design = np.column_stack([np.ones(len(z)), positions - positions.mean(0)]) / sd[:, None]
    covariance = np.linalg.inv(design.T @ design)
    slopes = (covariance @ design.T @ (z / sd))[1:]
    steepness = np.sqrt(1 + slopes @ slopes)
    normal = np.array([*slopes, -1.0]) / steepness
    turns = (np.eye(3) - np.outer(normal, normal))[:, :2] / steepness
    return normal, float(np.degrees(np.sqrt(np.trace(turns @ covariance[1:, 1:] @ turns.T))))


def surface_as_dict(surface: Surface) -> dict:
    """What surface.json holds: numbers by names that carry their units."""
    numbers, atoms = np.unique(surface.coordination, return_counts=True)
    return {
        "atoms": len(surface.coordination),
        "surface_atoms": int(np.sum(surface.coordination < surface.bulk_coordination)),
        "bulk_coordination": surface.bulk_coordination,
        "atoms_by_coordination": {int(number): int(count) for number, count in zip(numbers, atoms, strict=True)},
        "volume_A3": surface.volume,
        "volume_sd_A3": surface.volume_sd,
        "convex_hull_of_centres_A3": surface.hull_volume,
        "facets": [
            {
                "hkl": f.hkl,
                "side": "top" if f.is_top else "bottom",
                "columns": f.columns,
                "area_A2": f.area,
                "fitted_normal": f.normal,
                "fitted_normal_sd_deg": f.normal_sd,
                "angle_to_crystal_plane_deg": f.misfit,
            }
            for f in surface.facets
        ],
    }
