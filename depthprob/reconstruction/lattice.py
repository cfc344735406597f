"""Depths to crystal planes, and columns to atoms."""

from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import logsumexp

from ..errors import InputError


class CrystalColumns(NamedTuple):
    """A crystal of equal columns seen along a zone axis.

    Attributes
    ----------
    basis : (2, 2)
        Rows: shortest vectors between columns in the image plane [Å].
    heights : (2,)
        Difference in z of the atoms between columns one basis vector apart [Å], modulo `spacing`.
    spacing : float
        Distance between atoms along the beam [Å].
    """

    basis: np.ndarray
    heights: np.ndarray
    spacing: float


class LatticeFit(NamedTuple):
    """Columns on planes of the crystal.

    Attributes
    ----------
    depth : (C,)
        Centre of mass on the chosen plane [Å]; nan for a column that is on no lattice site of the image plane.
    plane : (C,) int
    probability : (C,)
        Of the chosen plane.
    second : (C,)
        Of the next best.
    offset, offset_sd : float
        z of the crystal's origin [Å].
    atoms, atom_sd : (N, 3)
        x, y, z, top atom of each column first, and standard deviations.
    site_probability : (N,)
        Probability that an atom sits there, over the planes its column may be on.
    column_of_atom : (N,) int
    ambiguity : float
        Log-likelihood by which the chosen orientation beats the next distinct one; zero when symmetry leaves no other.
    """

    depth: np.ndarray
    plane: np.ndarray
    probability: np.ndarray
    second: np.ndarray
    offset: float
    offset_sd: float
    atoms: np.ndarray
    atom_sd: np.ndarray
    site_probability: np.ndarray
    column_of_atom: np.ndarray
    ambiguity: float


PRIMITIVE = {
    "fcc": np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2,
    "bcc": np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) / 2,
}


def crystal_columns(structure: str, lattice_constant: float, zone_axis) -> CrystalColumns:
    """Geometry of the columns of an element's crystal along a zone axis [u v w].

    Raises
    ------
    InputError
        For a structure whose columns are not all alike and evenly spaced.
    """
    if structure not in PRIMITIVE:
        raise InputError(
            f"specimen.structure is {structure!r}; columns of equal, evenly spaced atoms are known for {', '.join(PRIMITIVE)}. "
            "Other crystals cannot be reconstructed yet."
        )
    cell = PRIMITIVE[structure] * lattice_constant
    z = np.asarray(zone_axis, float)
    z = z / np.linalg.norm(z)
    helper = np.eye(3)[np.argmin(abs(z))]
    x = np.cross(helper, z)
    x /= np.linalg.norm(x)
    frame = np.stack([x, np.cross(z, x), z])
    reach = 3 + 2 * int(max(abs(np.asarray(zone_axis))))
    points = np.array(list(product(range(-reach, reach + 1), repeat=3))) @ cell @ frame.T
    flat = np.hypot(points[:, 0], points[:, 1])
    along = points[(flat < 1e-6) & (points[:, 2] > 1e-6), 2]
    spacing = float(along.min())
    others = points[flat > 1e-6]
    order = np.argsort(np.hypot(others[:, 0], others[:, 1]))
    first = others[order[0]]
    cross = abs(first[0] * others[order, 1] - first[1] * others[order, 0])
    second = others[order[np.argmax(cross > 1e-6)]]
    heights = np.mod([first[2], second[2]], spacing)
    heights[heights > spacing - 1e-6] = 0.0
    return CrystalColumns(np.stack([first[:2], second[:2]]), heights, spacing)


def index_columns(positions: np.ndarray, geometry: CrystalColumns, tolerance: float = 0.1):
    """Whole-number indices (C, 2) of columns on the crystal's image-plane lattice, and the fitted basis (2, 2) and origin (2,).

    The direction of the first basis vector is read off the nearest-neighbour vectors; the rest follows outward from the densest
    column, and a least-squares fit of basis and origin (strain allowed) is repeated until the indices stay.
    """
    tree = cKDTree(positions)
    a, b = geometry.basis
    pairs = tree.query_pairs(1.15 * np.linalg.norm(a), output_type="ndarray")
    if len(pairs) == 0:
        return np.zeros((len(positions), 2), int), geometry.basis, positions[0]
    vectors = positions[pairs[:, 1]] - positions[pairs[:, 0]]
    vectors = np.concatenate([vectors, -vectors])
    vectors = vectors[abs(np.linalg.norm(vectors, axis=1) / np.linalg.norm(a) - 1) < tolerance + 0.05]
    start = positions[np.argmin(np.linalg.norm(positions - np.median(positions, axis=0), axis=1))]
    best = None
    for v in vectors[:: max(1, len(vectors) // 24)]:
        turn = np.arctan2(v[1], v[0]) - np.arctan2(a[1], a[0])
        c, s = np.cos(turn), np.sin(turn)
        for mirror in (1, -1):
            first = np.array([c * a[0] - s * a[1], s * a[0] + c * a[1]])
            angle = np.arctan2(a[0] * b[1] - a[1] * b[0], a @ b) * mirror
            unit = first / np.linalg.norm(first) * np.linalg.norm(b)
            second = np.array([np.cos(angle) * unit[0] - np.sin(angle) * unit[1], np.sin(angle) * unit[0] + np.cos(angle) * unit[1]])
            basis, origin = np.stack([first, second]), start
            for _ in range(6):
                index = np.rint((positions - origin) @ np.linalg.inv(basis))
                design = np.column_stack([index, np.ones(len(index))])
                solution = np.linalg.lstsq(design, positions, rcond=None)[0]
                basis, origin = solution[:2], solution[2]
                if np.linalg.matrix_rank(design) < 3 or abs(np.linalg.det(basis)) < 0.5 * abs(np.linalg.det(geometry.basis)):
                    break
            else:
                error = np.sqrt(np.mean((positions - index @ basis - origin) ** 2))
                if best is None or error < best[0] - 1e-6:
                    best = (error, index.astype(int), basis, origin)
    if best is None:
        return np.zeros((len(positions), 2), int), geometry.basis, positions[0]
    return best[1:]


def _orientations(geometry: CrystalColumns) -> list[np.ndarray]:
    """Whole-number matrices that map the image-plane lattice onto itself: the choices of which basis vector is which."""
    metric = geometry.basis @ geometry.basis.T
    found = []
    for entries in product((-1, 0, 1), repeat=4):
        m = np.array(entries).reshape(2, 2)
        if abs(round(np.linalg.det(m))) == 1 and np.allclose(m @ metric @ m.T, metric, rtol=0.05):
            found.append(m)
    return found


def snap(
    positions: np.ndarray,
    depths: np.ndarray,
    depth_sd: np.ndarray,
    n_atoms: np.ndarray,
    geometry: CrystalColumns,
    position_sd: np.ndarray | None = None,
    model_sd: float = 0.1,
) -> LatticeFit:
    """Probability of every plane for every column, given normal depths and one unknown offset of the crystal.

    A column of n atoms may have its centre of mass at z0 + h + (n - 1) / 2 * spacing + k * spacing, h by its place in the image plane.
    z0 is marginalised on a fine grid over one spacing; the orientation (which basis vector is which) is that of highest likelihood.
    """
    spacing = geometry.spacing
    n_atoms = np.asarray(n_atoms)
    index, basis, origin = index_columns(positions, geometry)
    off = np.linalg.norm(positions - index @ basis - origin, axis=1) > 0.3 * np.linalg.norm(geometry.basis[0])
    sd = np.hypot(depth_sd, model_sd)
    usable = ~off & np.isfinite(depths)
    grid = np.linspace(0, spacing, 256, endpoint=False)
    k = np.arange(-3, 4)

    def evaluate(matrix):
        heights = (index @ np.linalg.inv(matrix)) @ geometry.heights
        phase = heights + (n_atoms - 1) / 2 * spacing
        nearest = np.rint((depths[:, None] - phase[:, None] - grid) / spacing)
        sites = phase[:, None, None] + grid[:, None] + (nearest[..., None] + k) * spacing
        log_p = -0.5 * ((depths[:, None, None] - sites) / sd[:, None, None]) ** 2
        return sites, log_p, np.where(usable, logsumexp(log_p, axis=2).T, 0.0).sum(1)

    choices = []
    for matrix in _orientations(geometry):
        sites, log_p, by_offset = evaluate(matrix)
        choices.append((logsumexp(by_offset), matrix, by_offset))
    choices.sort(key=lambda c: -c[0])
    total, matrix, by_offset = choices[0]
    distinct = [c[0] for c in choices if total - c[0] > 1e-6]
    sites, log_p, _ = evaluate(matrix)
    weight = np.exp(by_offset - logsumexp(by_offset))
    turn = np.angle((weight * np.exp(2j * np.pi * grid / spacing)).sum())
    offset = float(np.mod(turn / (2 * np.pi) * spacing, spacing))
    resultant = abs((weight * np.exp(2j * np.pi * grid / spacing)).sum())
    offset_sd = float(spacing / (2 * np.pi) * np.sqrt(max(0.0, -2 * np.log(max(resultant, 1e-12)))))

    # planes by whole number relative to the most probable offset; sum their probabilities over offsets
    heights = (index @ np.linalg.inv(matrix)) @ geometry.heights
    phase = heights + (n_atoms - 1) / 2 * spacing + offset
    number = np.rint((sites - phase[:, None, None]) / spacing).astype(int)
    p = np.exp(log_p - logsumexp(log_p, axis=2, keepdims=True)) * weight[:, None]
    base = np.rint((np.nan_to_num(depths) - phase) / spacing).astype(int)
    planes = base[:, None] + np.arange(-4, 5)
    probability = np.stack([(p * (number == planes[:, j, None, None])).sum((1, 2)) for j in range(planes.shape[1])], 1)
    ranked = np.argsort(-probability, 1)
    rows = np.arange(len(positions))
    best = ranked[:, 0]
    plane = planes[rows, best]
    depth = np.where(usable, phase + plane * spacing, np.nan)

    atoms, atom_sd, site, column = [], [], [], []
    xy_sd = np.zeros((len(positions), 2)) if position_sd is None else position_sd
    for c in rows:
        n = int(n_atoms[c])
        centre = depth[c] if usable[c] else depths[c]
        for i in range(n):
            atoms.append((*positions[c], centre + (i - (n - 1) / 2) * spacing))
            atom_sd.append((*xy_sd[c], offset_sd if usable[c] else depth_sd[c]))
            shift = np.arange(-4, 5) - (best[c] - 4)  # planes apart from the chosen one
            covered = (i - shift >= 0) & (i - shift < n)
            site.append(float(probability[c][covered].sum()) if usable[c] else 1.0)
            column.append(c)
    return LatticeFit(
        depth,
        plane,
        np.where(usable, probability[rows, best], np.nan),
        np.where(usable, probability[rows, ranked[:, 1]], np.nan),
        offset,
        offset_sd,
        np.array(atoms),
        np.array(atom_sd),
        np.array(site),
        np.array(column),
        float(total - distinct[0]) if distinct else 0.0,
    )
