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
        Rows: shortest vectors of the image plane's lattice [Å].
    heights : (2,)
        Difference in z of the atoms between columns one basis vector apart [Å], modulo `spacing`.
    spacing : float
        Distance between atoms along the beam [Å].
    sites : (S, 2)
        Places of the columns within a cell of the image plane, in parts of the basis vectors; one of them at zero.
    site_heights : (S,)
        z of their atoms [Å], modulo `spacing`.
    """

    basis: np.ndarray
    heights: np.ndarray
    spacing: float
    sites: np.ndarray
    site_heights: np.ndarray


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
SAME = 1e-3  # Å; places closer than this are one


class UnitCell(NamedTuple):
    """A crystal of one element.

    Attributes
    ----------
    axes : (3, 3)
        Rows: the vectors that a zone axis [u v w] counts along [Å].
    lattice : (3, 3)
        Rows: vectors by which the crystal repeats [Å].
    atoms : (M, 3)
        Atoms of one cell of the lattice [Å].
    """

    axes: np.ndarray
    lattice: np.ndarray
    atoms: np.ndarray


def unit_cell(structure: str, lattice_constant: float, lattice_constant_c: float | None = None) -> UnitCell:
    """Cell of an element's fcc, bcc, diamond or hcp crystal [Å]; of hcp the axes are a1, a2 (120° apart) and c, ideally long by default."""
    if structure == "hcp":
        c = lattice_constant_c or np.sqrt(8 / 3) * lattice_constant
        cell = np.array([[1, 0, 0], [-0.5, np.sqrt(0.75), 0], [0, 0, c / lattice_constant]]) * lattice_constant
        return UnitCell(cell, cell, np.array([[0, 0, 0], [1 / 3, 2 / 3, 1 / 2]]) @ cell)
    atoms = np.array([[0.0, 0, 0], [0.25, 0.25, 0.25]]) if structure == "diamond" else np.zeros((1, 3))
    primitive = PRIMITIVE["fcc" if structure == "diamond" else structure]
    return UnitCell(np.eye(3) * lattice_constant, primitive * lattice_constant, atoms * lattice_constant)


def crystal_columns(crystal: UnitCell, zone_axis) -> CrystalColumns:
    """Geometry of the columns of an element's crystal along a zone axis [u v w].

    Raises
    ------
    InputError
        For a zone axis whose columns are not all alike and evenly spaced.
    """
    z = np.asarray(zone_axis, float) @ crystal.axes
    z = z / np.linalg.norm(z)
    helper = np.eye(3)[np.argmin(abs(z))]
    x = np.cross(helper, z)
    x /= np.linalg.norm(x)
    frame = np.stack([x, np.cross(z, x), z])
    reach = 3 + 2 * int(max(abs(np.asarray(zone_axis))))
    steps = np.array(list(product(range(-reach, reach + 1), repeat=3)))
    points = steps @ crystal.lattice @ frame.T
    flat = np.hypot(points[:, 0], points[:, 1])
    along = points[(flat < SAME) & (points[:, 2] > SAME), 2]
    if len(along) == 0:
        raise InputError(f"specimen.zone_axis is {list(zone_axis)}: no atoms of this cell lie behind one another along it. Choose a zone axis of lower indices.")
    period = float(along.min())
    atoms = np.concatenate([points + atom for atom in crystal.atoms @ frame.T])
    tree = cKDTree(atoms[:, :2])
    basis, basis_heights = _shortest(points[flat > SAME])
    sites, heights, spacing = [], [], period
    own = crystal.atoms @ frame.T
    for atom in own:
        parts = (atom - own[0])[:2] @ np.linalg.inv(basis)
        cell = np.floor(parts + 1e-6)
        if any(np.linalg.norm((parts - other - np.rint(parts - other)) @ basis) < SAME for other in sites):
            continue
        along = np.mod(atoms[tree.query_ball_point(atom[:2], SAME), 2] - atom[2] + SAME, period)
        along = np.unique(along.round(3))
        distance = period / len(along)
        if np.any(abs(np.diff(np.append(along, along[0] + period)) - distance) > 10 * SAME) or (sites and abs(distance - spacing) > 10 * SAME):
            raise InputError(
                f"along specimen.zone_axis = {list(zone_axis)} the columns of this crystal are not all alike or not evenly spaced, which a column's depth "
                "presumes. Choose another zone axis."
            )
        spacing = distance
        sites.append(parts - cell)
        heights.append(atom[2] - own[0, 2] - cell @ basis_heights)
    folded = lambda h: np.where(np.mod(h, spacing) > spacing - SAME, 0.0, np.mod(h, spacing))
    return CrystalColumns(basis, folded(basis_heights), spacing, np.array(sites), folded(np.array(heights)))


def relations(geometry: CrystalColumns) -> np.ndarray:
    """Distances between columns of a crystal, as far as a few columns, and the second's height above the first, modulo their spacing (R, 2) [Å], sorted."""
    steps = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 2), -1).reshape(-1, 1, 1, 2)
    place = geometry.sites - geometry.sites[:, None]
    apart = np.hypot(*np.moveaxis((steps + place) @ geometry.basis, -1, 0))
    height = (steps @ geometry.heights + geometry.site_heights - geometry.site_heights[:, None]) / geometry.spacing
    height = np.mod(height + SAME, 1.0) - SAME
    found = np.unique(np.stack([apart, height * geometry.spacing], -1).reshape(-1, 2).round(3), axis=0)
    return abs(found[found[:, 0] > 0.1])


def nearest_distance(geometry: CrystalColumns) -> float:
    """Between columns [Å]."""
    return float(relations(geometry)[0, 0])


def _shortest(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two shortest independent vectors (2, 2) of the projected lattice, and their heights (2,)."""
    order = np.argsort(np.hypot(points[:, 0], points[:, 1]).round(6), kind="stable")
    first = points[order[0]]
    cross = abs(first[0] * points[order, 1] - first[1] * points[order, 0])
    second = points[order[np.argmax(cross > 1e-3)]]
    return np.stack([first[:2], second[:2]]), np.array([first[2], second[2]])


def index_columns(positions: np.ndarray, geometry: CrystalColumns, tolerance: float = 0.1):
    """Places (C, 2) of columns in parts of the image-plane lattice (whole numbers plus a site), and the fitted basis (2, 2) and origin (2,).

    The direction of the first basis vector is read off the vectors between columns about as far apart; the rest follows outward from
    the densest column, and a least-squares fit of basis and origin (strain allowed) is repeated until the places stay.
    """
    tree = cKDTree(positions)
    a, b = geometry.basis
    pairs = tree.query_pairs(1.15 * np.linalg.norm(a), output_type="ndarray")
    vectors = positions[pairs[:, 1]] - positions[pairs[:, 0]]
    vectors = np.concatenate([vectors, -vectors])
    vectors = vectors[abs(np.linalg.norm(vectors, axis=1) / np.linalg.norm(a) - 1) < tolerance + 0.05]
    start = positions[np.argmin(np.linalg.norm(positions - np.median(positions, axis=0), axis=1))]
    best = None
    for v, mirror, site in product(vectors[:: max(1, len(vectors) // 24)], (1, -1), geometry.sites):
        turn = np.arctan2(v[1], v[0]) - np.arctan2(a[1], a[0])
        c, s = np.cos(turn), np.sin(turn)
        first = np.array([c * a[0] - s * a[1], s * a[0] + c * a[1]])
        angle = np.arctan2(a[0] * b[1] - a[1] * b[0], a @ b) * mirror
        unit = first / np.linalg.norm(first) * np.linalg.norm(b)
        second = np.array([np.cos(angle) * unit[0] - np.sin(angle) * unit[1], np.sin(angle) * unit[0] + np.cos(angle) * unit[1]])
        basis = np.stack([first, second])
        origin = start - site @ basis
        for _ in range(6):
            place, _ = nearest_places((positions - origin) @ np.linalg.inv(basis), geometry.sites)
            design = np.column_stack([place, np.ones(len(place))])
            solution = np.linalg.lstsq(design, positions, rcond=None)[0]
            basis, origin = solution[:2], solution[2]
            if np.linalg.matrix_rank(design) < 3 or abs(np.linalg.det(basis)) < 0.5 * abs(np.linalg.det(geometry.basis)):
                break
        else:
            error = np.sqrt(np.mean((positions - place @ basis - origin) ** 2))
            if best is None or error < best[0] - 1e-6:
                best = (error, place, basis, origin)
    if best is None:
        return np.zeros((len(positions), 2)), geometry.basis, positions[0]
    return best[1:]


class Stretch(NamedTuple):
    """How the lattice on an image differs from the crystal's.

    Attributes
    ----------
    most, least : float
        Its length over the crystal's along the direction of largest, and across it of smallest, stretch.
    direction : float
        Of the largest, from x towards y [degrees].
    sd : float
        Of either, from how far columns stand off their places.
    """

    most: float
    least: float
    direction: float
    sd: float


def lattice_stretch(positions: np.ndarray, geometry: CrystalColumns) -> Stretch | None:
    """Of columns (C, 2) [Å], by the lattice fitted to those that stand on it; None for fewer than six, or a row.

    Rows r of the crystal's frame appear at r M + origin; the singular values of M are its principal stretches, whatever the rotation.
    """
    place, basis, origin = index_columns(positions, geometry)
    on = np.linalg.norm(positions - place @ basis - origin, axis=1) < 0.3 * nearest_neighbours(geometry)
    design = np.column_stack([place, np.ones(len(place))])[on]
    if on.sum() < 6 or np.linalg.matrix_rank(design) < 3:
        return None
    fitted = np.linalg.lstsq(design, positions[on], rcond=None)[0]
    variance = np.sum((positions[on] - design @ fitted) ** 2) / (2 * on.sum() - 6)
    to_lengths = np.linalg.inv(geometry.basis)
    _, stretch, directions = np.linalg.svd(to_lengths @ fitted[:2])
    covariance = to_lengths @ np.linalg.inv(design.T @ design)[:2, :2] @ to_lengths.T * variance
    angle = np.degrees(np.arctan2(directions[0, 1], directions[0, 0])) % 180
    return Stretch(float(stretch[0]), float(stretch[1]), float(angle), float(np.sqrt(np.linalg.eigvalsh(covariance)[-1])))


def nearest_places(parts: np.ndarray, sites: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest sites (C, 2) to points in parts of the basis vectors, and which site of the cell each is (C,)."""
    candidates = np.rint(parts[:, None] - sites) + sites
    which = np.argmin(np.linalg.norm(candidates - parts[:, None], axis=2), axis=1)
    return candidates[np.arange(len(parts)), which], which


def _orientations(geometry: CrystalColumns) -> list[np.ndarray]:
    """Whole-number matrices that map the image-plane lattice onto itself: the choices of which basis vector is which."""
    metric = geometry.basis @ geometry.basis.T
    found = []
    for entries in product((-1, 0, 1), repeat=4):
        m = np.array(entries).reshape(2, 2)
        if abs(round(np.linalg.det(m))) == 1 and np.allclose(m @ metric @ m.T, metric, rtol=0.05):
            found.append(m)
    return found


def _heights(place: np.ndarray, geometry: CrystalColumns):
    """Heights (C,) of columns at these places, for every way to lay the crystal on them: each orientation, each site at the first column."""
    for matrix in _orientations(geometry):
        turned = place @ np.linalg.inv(matrix)
        for site in geometry.sites:
            moved = turned - turned[0] + site
            whole, which = nearest_places(moved, geometry.sites)
            if abs(whole - moved).max() < 0.02:
                yield (whole - geometry.sites[which]) @ geometry.heights + geometry.site_heights[which]


def nearest_neighbours(geometry: CrystalColumns) -> float:
    """Smallest distance between columns in the image plane [Å]."""
    cells = np.array(list(product((-1, 0, 1), repeat=2)))
    apart = (geometry.sites[:, None, None] - geometry.sites[None, :, None] + cells) @ geometry.basis
    distances = np.linalg.norm(apart, axis=-1)
    return float(distances[distances > SAME].min())


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
    place, basis, origin = index_columns(positions, geometry)
    off = np.linalg.norm(positions - place @ basis - origin, axis=1) > 0.3 * nearest_neighbours(geometry)
    sd = np.hypot(depth_sd, model_sd)
    usable, known = ~off & np.isfinite(depths), np.nan_to_num(depths)
    grid = np.linspace(0, spacing, 256, endpoint=False)
    k = np.arange(-3, 4)

    def evaluate(heights):
        phase = heights + (n_atoms - 1) / 2 * spacing
        nearest = np.rint((known[:, None] - phase[:, None] - grid) / spacing)
        sites = phase[:, None, None] + grid[:, None] + (nearest[..., None] + k) * spacing
        log_p = -0.5 * ((known[:, None, None] - sites) / sd[:, None, None]) ** 2
        return sites, log_p, np.where(usable, logsumexp(log_p, axis=2).T, 0.0).sum(1)

    choices = []
    for heights in _heights(place, geometry):
        sites, log_p, by_offset = evaluate(heights)
        choices.append((logsumexp(by_offset), heights, by_offset))
    choices.sort(key=lambda c: -c[0])
    total, heights, by_offset = choices[0]
    distinct = [c[0] for c in choices if total - c[0] > 1e-6]
    sites, log_p, _ = evaluate(heights)
    weight = np.exp(by_offset - logsumexp(by_offset))
    turn = np.angle((weight * np.exp(2j * np.pi * grid / spacing)).sum())
    offset = float(np.mod(turn / (2 * np.pi) * spacing, spacing))
    resultant = abs((weight * np.exp(2j * np.pi * grid / spacing)).sum())
    offset_sd = float(spacing / (2 * np.pi) * np.sqrt(max(0.0, -2 * np.log(max(resultant, 1e-12)))))

    # planes by whole number relative to the most probable offset; sum their probabilities over offsets
    phase = heights + (n_atoms - 1) / 2 * spacing + offset
    number = np.rint((sites - phase[:, None, None]) / spacing).astype(int)
    p = np.exp(log_p - logsumexp(log_p, axis=2, keepdims=True)) * weight[:, None]
    base = np.rint((known - phase) / spacing).astype(int)
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
