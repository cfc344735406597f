"""Surfaces of crystals that ASE builds, of known coordination, facets and volume."""

import numpy as np
import pytest
from ase.build import bulk
from ase.cluster import Octahedron
from ase.cluster.cubic import FaceCenteredCubic
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation

from depthprob.plotting import plot_surfaces
from depthprob.reconstruction.lattice import UnitCell, unit_cell
from depthprob.reconstruction.surface import column_ends, coordination_numbers, count_variance, find_surface, fit_plane, nearest_shell

A = 4.08
NEIGHBOUR = A / np.sqrt(2)
GOLD = unit_cell("fcc", A)


def seen(cluster, beam=(0, 0, 1), angle=0.0, sd=0.0, rng=None):
    """Atoms of a cluster seen along `beam`, turned about it, in columns from the top; and the ends measured with errors `sd`."""
    upright = Rotation.align_vectors([[0, 0, 1]], [np.array(beam) / np.linalg.norm(beam)])[0]
    atoms = (Rotation.from_euler("z", angle, degrees=True) * upright).apply(cluster.positions - cluster.positions.mean(0))
    _, column = np.unique(atoms[:, :2].round(3) + 0.0, axis=0, return_inverse=True)
    column = column.ravel()
    order = np.lexsort((atoms[:, 2], column))
    atoms, column = atoms[order], column[order]
    n = np.bincount(column)
    spacing = np.diff(atoms[:, 2])[np.diff(column) == 0].min()
    depth = np.bincount(column, atoms[:, 2]) / n
    error = sd * rng.standard_normal(len(n)) if sd else 0.0
    ends = column_ends(depth + error, np.full(len(n), sd or 0.3), n, np.eye(n.max())[n - 1], spacing)
    xy = np.stack([np.bincount(column, a) / n for a in atoms[:, :2].T], 1)
    return atoms, column, ends, xy


def surface_of(cluster, beam=(0, 0, 1), angle=0.0, crystal=GOLD, **k):
    atoms, column, ends, xy = seen(cluster, beam, angle, **k)
    return find_surface(atoms, column, ends, np.zeros(len(xy)), xy, crystal, beam)


def cuboctahedron(shells):
    """Magic-number particle bounded by six squares and eight triangles, both of `shells` bonds a side."""
    return Octahedron("Au", 2 * shells + 1, shells, A)


@pytest.mark.parametrize(
    ("structure", "neighbours", "first", "second"),
    [("fcc", 12, A / np.sqrt(2), A), ("bcc", 8, A * np.sqrt(0.75), A), ("diamond", 4, A * np.sqrt(3) / 4, A / np.sqrt(2))],
)
def test_the_nearest_shell_of_cubic_crystals(structure, neighbours, first, second):
    shell, reach = nearest_shell(unit_cell(structure, A))
    assert len(shell) == neighbours
    np.testing.assert_allclose(np.linalg.norm(shell, axis=1), first)
    assert reach == pytest.approx((first + second) / 2)


def test_an_hcp_crystal_of_any_length_has_twelve_neighbours():
    for c in (4.50, 4.68, 4.82):
        shell, reach = nearest_shell(unit_cell("hcp", 2.95, c))
        assert len(shell) == 12
        titanium = bulk("Ti", "hcp", a=2.95, c=c).repeat((7, 7, 7))
        middle = np.argmin(np.linalg.norm(titanium.positions - titanium.positions.mean(0), axis=1))
        assert coordination_numbers(titanium.positions, reach)[middle] == 12


@pytest.mark.parametrize("angle", [0.0, 33.0])
@pytest.mark.parametrize("beam", [(0, 0, 1), (1, 1, 0)])
def test_coordination_facets_and_volume_of_a_cuboctahedron(beam, angle):
    """Of m bonds a side: m + 1 by m + 1 atoms on {100}, (m + 1)(m + 2) / 2 on {111}; volume 5 sqrt(2) / 3 m^3 d^3."""
    m = 4
    surface = surface_of(cuboctahedron(m), beam, angle)
    total = (10 * m**3 + 15 * m**2 + 11 * m + 3) // 3
    numbers = dict(zip(*np.unique(surface.coordination, return_counts=True), strict=True))
    # vertices 5; edges 7; within {100} 8; within {111} 9; bulk 12
    assert numbers == {5: 12, 7: 24 * (m - 1), 8: 6 * (m - 1) ** 2, 9: 8 * (m - 1) * (m - 2) // 2, 12: total - (10 * m**2 + 2)}
    assert surface.bulk_coordination == 12
    assert surface.volume == pytest.approx(total * A**3 / 4)
    assert surface.hull_volume == pytest.approx(5 * np.sqrt(2) / 3 * (m * NEIGHBOUR) ** 3)
    families = {(0, 0, 1): {"100": 2, "111": 8}, (1, 1, 0): {"100": 4, "111": 4}}[beam]  # the rest lie along the beam
    names = ["".join(str(i) for i in sorted(map(abs, f.hkl), reverse=True)) for f in surface.facets]
    assert {name: names.count(name) for name in names} == families
    for name, facet in zip(names, surface.facets, strict=True):
        square = name == "100"
        assert len(facet.columns) == ((m + 1) ** 2 if square else (m + 1) * (m + 2) // 2)
        assert facet.area == pytest.approx((1 if square else np.sqrt(3) / 4) * (m * NEIGHBOUR) ** 2)
        assert facet.misfit < 1e-3
        assert facet.is_top == (facet.normal[2] < 0)


def test_facets_of_a_wulff_particle_are_those_it_was_cut_with():
    """Five layers of {100} and of {111} about the middle: squares and hexagons, seen along a cube axis and turned."""
    cluster = FaceCenteredCubic("Au", [(1, 0, 0), (1, 1, 1)], [5, 5], A)
    surface = surface_of(cluster, angle=17.0)
    top = [f for f in surface.facets if f.is_top]
    assert sorted(sorted(map(abs, f.hkl)) for f in top) == [[0, 0, 1]] + 4 * [[1, 1, 1]]
    assert surface.bulk_coordination == 12 and surface.coordination.max() == 12
    hexagons = {round(f.area, 6) for f in surface.facets if sum(map(abs, f.hkl)) == 3}
    assert len(hexagons) == 1  # all alike
    assert len(surface.facets) == 10


@pytest.mark.parametrize(
    ("planes", "layers", "angle", "named", "faces"),
    [([(3, 1, 1)], [13], 0.0, "311", 24), ([(3, 1, 1)], [13], 21.0, "311", 24), ([(2, 1, 0)], [22], 0.0, "210", 16), ([(3, 1, 0)], [34], 0.0, "310", 16)],
)
def test_facets_of_higher_index_are_those_it_was_cut_with(planes, layers, angle, named, faces):
    """The eight of the {210} and {310} that hold the beam are seen from the side alone."""
    surface = surface_of(FaceCenteredCubic("Au", planes, layers, A), angle=angle)
    names = ["".join(str(i) for i in sorted(map(abs, f.hkl), reverse=True)) for f in surface.facets]
    assert names.count(named) == faces
    assert max(f.misfit for f, name in zip(surface.facets, names, strict=True) if name == named) < 1e-3
    assert sum(names.count(other) for other in {"210", "310", "320", "221", "322", "332", "321", "211", "331"} - {named}) == 0


def test_ends_that_are_off_by_a_layer_are_not_named_facets_of_higher_index():
    """Every third end of a column one atom short, at random."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        atoms, column, _, xy = seen(FaceCenteredCubic("Au", [(1, 0, 0), (1, 1, 1)], [6, 6], A))
        ends = np.flatnonzero(np.diff(np.concatenate([[-1], column, [column[-1] + 1]])))
        first, last = ends[:-1], ends[1:] - 1
        lost = np.concatenate([first[(last - first > 3) & (rng.random(len(first)) < 1 / 3)], last[(last - first > 3) & (rng.random(len(first)) < 1 / 3)]])
        atoms, column = np.delete(atoms, lost, 0), np.delete(column, lost)
        n = np.bincount(column)
        ends = column_ends(np.bincount(column, atoms[:, 2]) / n, np.full(len(n), 0.3), n, np.eye(n.max())[n - 1], A)
        facets = find_surface(atoms, column, ends, np.zeros(len(n)), xy, GOLD, (0, 0, 1)).facets
        assert len(facets) > 8 and max(max(map(abs, f.hkl)) for f in facets) == 1


def test_a_step_parts_two_terraces():
    """A {100} slab of 8 x 8 columns, half of it one layer higher."""
    slab = bulk("Au", "fcc", A, cubic=True).repeat((4, 4, 2))
    low = slab[[i for i, p in enumerate(slab.positions) if p[2] > 0.1 or p[0] > 7.9]]
    surface = surface_of(low)
    flat = [f for f in surface.facets if sorted(map(abs, f.hkl)) == [0, 0, 1]]
    assert sorted(f.is_top for f in flat) == [False, True, True]
    assert flat[0].area == pytest.approx(max(f.area for f in flat if not f.is_top))


def test_the_normal_turns_as_much_as_stated():
    rng = np.random.default_rng(0)
    positions = rng.uniform(-10, 10, (30, 2))
    sd = rng.uniform(0.3, 1.0, 30)
    slope = np.array([1.2, -0.7])
    truth = np.array([*slope, -1]) / np.sqrt(1 + slope @ slope)
    angles, stated = [], 0.0
    for _ in range(2000):
        normal, stated = fit_plane(positions, positions @ slope + 5 + sd * rng.standard_normal(30), sd)
        angles.append(np.degrees(np.arccos(np.clip(normal @ truth, -1, 1))))
    # an rms of 2000 squared angles of one or two degrees of freedom: 1 / sqrt(2000), four times
    assert np.sqrt(np.mean(np.square(angles))) == pytest.approx(stated, rel=4 / np.sqrt(2000))


def test_a_facets_measured_normal_is_off_by_its_sd():
    rng = np.random.default_rng(1)
    pulls = [f.misfit / f.normal_sd for _ in range(8) for f in surface_of(cuboctahedron(3), sd=0.5, rng=rng).facets]
    assert np.sqrt(np.mean(np.square(pulls))) == pytest.approx(1, abs=4 / np.sqrt(len(pulls)))


def test_ends_carry_depth_and_count_uncertainty():
    """Drawn: counts by their probabilities, depths by their sd; an atom more moves both ends half a spacing."""
    rng = np.random.default_rng(0)
    n, probability = np.array([3, 5]), np.array([[0, 0.1, 0.8, 0.1, 0, 0], [0, 0, 0, 0, 0.7, 0.3]])
    depth, sd, spacing = np.array([1.0, -2.0]), np.array([0.4, 0.6]), 4.08
    ends = column_ends(depth, sd, n, probability, spacing)
    np.testing.assert_allclose(ends.top, [1 - 4.08, -2 - 8.16])
    np.testing.assert_allclose(ends.bottom, [1 + 4.08, -2 + 8.16])
    for c in range(2):
        number = rng.choice(6, 100_000, p=probability[c]) + 1
        top = depth[c] + sd[c] * rng.standard_normal(100_000) - (number - 1) / 2 * spacing
        assert np.sqrt(np.mean((top - ends.top[c]) ** 2)) == pytest.approx(ends.top_sd[c], rel=0.02)
        assert np.sqrt(np.mean((number - n[c]) ** 2.0)) * spacing == pytest.approx(ends.thickness_sd[c], rel=0.02)
    np.testing.assert_allclose(count_variance(n, probability), [0.2, 0.3])


def test_too_little_for_a_surface_has_none():
    atoms = np.array([[0, 0, 0], [0, 0, A], [2.04, 2.04, 0.0]])
    ends = column_ends(np.array([A / 2, 0.0]), np.ones(2), np.array([2, 1]), np.eye(2)[[1, 0]], A)
    surface = find_surface(atoms, np.array([0, 0, 1]), ends, np.ones(2), atoms[1:, :2], UnitCell(*GOLD), (0, 0, 1))
    assert surface.facets == () and np.isnan(surface.hull_volume)
    assert surface.coordination.tolist() == [1, 0, 1]
    assert surface.volume == pytest.approx(3 * A**3 / 4) and surface.volume_sd == pytest.approx(np.sqrt(2) * A**3 / 4)


@pytest.mark.parametrize("columns", [1, 2, 5, 81])
def test_bars_of_both_surfaces_are_drawn_even_where_columns_span_none(columns):
    _, _, ends, xy = seen(cuboctahedron(4))
    ax = Figure().add_subplot(projection="3d")
    first = type(ends)(*(e[:columns] for e in ends))
    positions = xy[:columns] if columns > 5 else np.arange(columns)[:, None] * [2.0, 0.0]  # in a row
    drawn = plot_surfaces(ax, positions[: len(first.top)], first)
    assert (drawn is None) == (columns <= 5)
    low, high = sorted(ax.get_zlim())
    assert low <= (first.top - 0.3).min() and high >= (first.bottom + 0.3).max()
    assert ax.get_zlim()[0] > ax.get_zlim()[1]  # the beam runs down
