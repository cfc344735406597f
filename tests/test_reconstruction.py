"""Stages of the pipeline, and the whole of it on a particle simulated by an independent program where that is at hand."""

from pathlib import Path

import jax
import numpy as np
import pytest
from ase.build import bulk
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from depthprob.errors import InputError
from depthprob.reconstruction.columns import central_average, find_columns, fit_columns
from depthprob.reconstruction.counting import count_by_library, gaussian_mixture_counts
from depthprob.reconstruction.drift import estimate_drift, shift_images
from depthprob.reconstruction.lattice import UnitCell, crystal_columns, snap, unit_cell
from depthprob.statstem import read_statstem

PARTICLE = Path(__file__).parents[2] / "shared" / "data" / "particle_D.npz"
needs_particle = pytest.mark.skipif(not PARTICLE.exists(), reason="particle_D.npz is not at hand")


@pytest.mark.parametrize(
    ("structure", "zone", "spacing", "nearest"),
    [
        ("fcc", (0, 0, 1), 4.08, 2.04),
        ("fcc", (1, 1, 0), 4.08 / np.sqrt(2), 4.08 * np.sqrt(6) / 4),
        ("fcc", (1, 1, 1), 4.08 * np.sqrt(3), 4.08 / np.sqrt(6)),
        ("bcc", (0, 0, 1), 4.08, 4.08 / np.sqrt(2)),
        ("bcc", (1, 1, 1), 4.08 * np.sqrt(3) / 2, 4.08 * np.sqrt(2 / 3)),
    ],
)
def test_columns_of_cubic_crystals(structure, zone, spacing, nearest):
    geometry = crystal_columns(unit_cell(structure, 4.08), zone)
    assert geometry.spacing == pytest.approx(spacing)
    if zone != (1, 1, 0):
        assert np.linalg.norm(geometry.basis[0]) == pytest.approx(nearest)
    # a column a repeat length of the crystal holds: density of atoms is kept
    per_cell = {"fcc": 4, "bcc": 2}[structure]
    assert abs(np.linalg.det(geometry.basis)) * geometry.spacing == pytest.approx(4.08**3 / per_cell)


def test_columns_of_uneven_spacing_are_refused():
    with pytest.raises(InputError, match="evenly spaced"):
        crystal_columns(unit_cell("diamond", 3.57), (1, 1, 1))


@pytest.mark.parametrize(
    ("structure", "zone", "columns_in_cell"),
    [("fcc", (0, 0, 1), 1), ("fcc", (1, 1, 0), 1), ("bcc", (1, 1, 1), 1), ("diamond", (0, 0, 1), 2), ("diamond", (1, 1, 0), 2), ("hcp", (0, 0, 1), 2), ("hcp", (1, 0, 0), 2), ("cell", (1, 1, 0), 2)],
)
def test_columns_of_a_crystal_built_elsewhere_snap_to_their_planes(structure, zone, columns_in_cell):
    """Runs of atoms of a crystal that ASE built and turned, in any rotation about the beam, from depths with small errors."""
    rng = np.random.default_rng(7)
    if structure == "hcp":
        cell = bulk("Ti", "hcp", a=2.95, c=4.68)
        crystal = unit_cell("hcp", 2.95, 4.68)
    else:
        cell = bulk("Si", "diamond" if structure == "cell" else structure, a=4.3, cubic=True)
        crystal = UnitCell(cell.cell.array, cell.cell.array, cell.positions) if structure == "cell" else unit_cell(structure, 4.3)
    beam = np.array(zone) @ cell.cell.array
    geometry = crystal_columns(crystal, zone)
    if structure != "cell":  # whose cubic cell repeats more often than it says
        assert len(geometry.sites) == columns_in_cell
    atoms = cell.repeat((16, 16, 16)).positions
    atoms = atoms - atoms.mean(0)
    turn = Rotation.align_vectors([[0, 0, 1]], [beam / np.linalg.norm(beam)])[0]
    atoms = Rotation.from_euler("z", 0.4).apply(turn.apply(atoms))
    atoms = atoms[(np.hypot(*atoms.T[:2]) < 8) & (abs(atoms[:, 2]) < 20)]
    _, column = np.unique(atoms[:, :2].round(3) + 0.0, axis=0, return_inverse=True)
    xy, z, n = [], [], []
    for c in range(column.max() + 1):
        own = np.sort(atoms[column == c, 2])
        number = rng.integers(3, 6)
        first = rng.integers(0, len(own) - number + 1)
        xy.append(atoms[column == c][0, :2])
        z.append(own[first : first + number].mean())
        n.append(number)
    xy, z, n = np.array(xy) + rng.normal(0, 0.02, (len(xy), 2)), np.array(z), np.array(n)
    fit = snap(xy, z + rng.normal(0, 0.15, len(z)), np.full(len(z), 0.15), n, geometry)
    assert np.all(abs(fit.depth - z) < 0.2 + 3 * fit.offset_sd)
    assert fit.probability.min() > 0.9


def test_lattice_probabilities_are_calibrated():
    geometry = crystal_columns(unit_cell("fcc", 4.08), (0, 0, 1))
    rng = np.random.default_rng(5)
    i, j = (a.ravel() for a in np.mgrid[:6, :6])
    right, stated = 0, 0.0
    for _ in range(30):
        n = rng.integers(3, 8, i.size)
        site = (i + j) % 2 * 2.04 + (n - 1) / 2 * 4.08 + rng.integers(-2, 2, i.size) * 4.08 + 0.7
        noise = rng.normal(0, 1.2, i.size)
        fit = snap(np.stack([i, j], 1) * 2.04 + rng.normal(0, 0.02, (i.size, 2)), site + noise, np.full(i.size, 1.2), n, geometry)
        right += (abs(fit.depth - site) < 2.04).sum()
        stated += fit.probability.sum()
    assert right == pytest.approx(stated, abs=4 * np.sqrt(30 * 36 * 0.1))  # binomial, four sigma
    assert len(fit.atoms) == n.sum() and np.all(fit.site_probability <= 1 + 1e-9)


def test_columns_without_a_depth_leave_the_others_on_their_planes():
    geometry = crystal_columns(unit_cell("fcc", 4.08), (0, 0, 1))
    rng = np.random.default_rng(6)
    i, j = (a.ravel() for a in np.mgrid[:4, :4])
    n, xy = np.full(16, 3), np.stack([i, j], 1) * 2.04
    depths = (i + j) % 2 * 2.04 + rng.normal(0, 0.2, 16)
    unknown = np.arange(16) == 5
    fit = snap(xy, np.where(unknown, np.nan, depths), np.where(unknown, np.nan, 0.2), n, geometry)
    rest = snap(xy[~unknown], depths[~unknown], np.full(15, 0.2), n[~unknown], geometry)
    assert np.isnan(fit.depth[unknown]).all() and np.isnan(fit.atoms[fit.column_of_atom == 5, 2]).all()
    np.testing.assert_allclose(fit.depth[~unknown], rest.depth)
    np.testing.assert_allclose(fit.probability[~unknown], rest.probability)


def test_mixture_finds_the_number_of_thicknesses():
    rng = np.random.default_rng(2)
    n = rng.integers(2, 6, 200)
    measured = 0.02 * n + rng.normal(0, 0.0015, 200)
    mixture = gaussian_mixture_counts(measured, 8)
    assert mixture.components == 4
    assert np.mean(mixture.n + 1 == n) > 0.99
    counts = count_by_library(measured, np.full(200, 0.0015), 0.02 * np.arange(1, 10))
    assert np.mean(counts.n == n) > 0.99
    np.testing.assert_allclose(counts.probability.sum(1), 1)


def test_thousands_of_columns_are_fitted_jointly():
    rng = np.random.default_rng(0)
    truth = np.stack([a.ravel() for a in np.mgrid[2:82:2.04, 2:82:2.04]], 1) + rng.normal(0, 0.05, (40 * 40, 2))
    x = np.arange(168) * 0.5
    ex, ey = (np.exp(-((x - t[:, None]) ** 2) / (2 * 0.5**2)) for t in truth.T)
    image = 0.1 * ey.T @ ex + 0.01 + rng.normal(0, 1e-3, (168, 168))
    found = find_columns(image, 0.5)
    assert len(found) == len(truth)
    fit = fit_columns(image, found, 0.5)
    order = np.argmin(np.hypot(*(fit.positions[:, None] - truth[None]).transpose(2, 0, 1)), 1)
    error = fit.positions - truth[order]
    assert np.sqrt(np.mean(error**2)) < 0.02
    assert fit.width == pytest.approx(0.5, abs=0.01)
    assert np.std((fit.volume - 0.1 * 2 * np.pi * 0.25) / fit.volume_sd) == pytest.approx(1.0, abs=0.06)  # of 1600


def test_the_sharpest_images_are_the_same_in_whatever_order_they_come():
    defocus = np.arange(-100.0, 101.0, 10.0)
    stack = np.exp(-((defocus - 17.0) ** 2) / 8000)[:, None, None] * np.random.default_rng(0).random((4, 4))
    average, chosen = central_average(stack, defocus)
    assert sorted(defocus[chosen]) == list(np.arange(-20.0, 51.0, 10.0))
    order = np.random.default_rng(1).permutation(len(defocus))
    again, others = central_average(stack[order], defocus[order])
    np.testing.assert_allclose(again, average)
    assert sorted(order[others]) == sorted(chosen)
    coarse = central_average(stack[::4], defocus[::4])[1]  # 40 Å apart: beyond the neighbours of the sharpest contrast is under half
    assert sorted(defocus[::4][coarse]) == [-20.0, 20.0, 60.0]


def test_columns_of_a_dumbbell_are_two_where_the_crystal_says_how_near_columns_are():
    x = np.arange(100) * 0.2
    bell = lambda cx, cy: np.exp(-((x - cx) ** 2 + (x[:, None] - cy) ** 2) / (2 * 0.45**2))
    image = sum(height * bell(cx, cy) for cy in (6.0, 12.0) for cx, height in ((6.0, 1.0), (7.36, 0.8))) + np.random.default_rng(0).normal(0, 3e-3, (100, 100))
    assert len(find_columns(image, 0.2, nearest=1.36)) == 4
    assert len(find_columns(image, 0.2)) == 2


@pytest.mark.parametrize("periodic", [False, True])
def test_of_two_columns_at_one_place_the_thinner_goes(periodic):
    from depthprob.physics.focal_series import Field, FocalSeries
    from depthprob.reconstruction.joint import doubled_columns, without_columns

    series = FocalSeries(np.zeros(3), 0.5, np.ones(3), (40, 40), periodic)
    positions = np.array([[5.0, 5.0], [7.0, 5.0], [7.3, 5.2], [0.1, 9.0], [19.9, 9.2]])
    field = Field(positions, np.array([4, 3, 9, 6, 2]), np.arange(5.0), np.zeros(3), np.ones(3), np.zeros((3, 2)))
    which = doubled_columns(field, series, 1.36)
    assert which.tolist() == [1, 4] if periodic else [1]
    left = without_columns(field, which)
    assert left.n_atoms.tolist() == ([4, 9, 6] if periodic else [4, 9, 6, 2]) and left.depths.tolist() == ([0, 2, 3] if periodic else [0, 2, 3, 4])


def test_drift_of_images_too_far_apart_in_focus_to_compare_lattices_is_that_of_their_outlines():
    x = np.arange(64) * 0.4
    image = np.exp(-((x - 12) ** 2 + (x[:, None] - 11) ** 2) / 40) * (1.2 + np.cos(np.pi * x) * np.cos(np.pi * x[:, None]))
    moved = np.array([[-2.0, 1.0], [0.0, 0.0], [2.0, -1.0]])
    found = estimate_drift(shift_images(np.stack([image] * 3), moved, True), 0.4, np.array([-80.0, 0.0, 80.0]), True)
    assert abs(found - moved).max() < 0.2


@needs_particle
def test_drift_never_hops_a_lattice_period():
    data = np.load(PARTICLE)
    true = data["drift_A"] / 0.204
    true = true - true.mean(0)
    for periodic, part in ((True, np.s_[:]), (False, np.s_[:, 10:90, 25:])):
        found = estimate_drift(data["stack"][part], 0.204, data["defocus_A"], periodic)
        assert np.hypot(*(found - true).T).max() < 4.0  # a period is 10 px; the likelihood refines the rest
    average, chosen = central_average(shift_images(data["stack"] / 400.0, -true, True), data["defocus_A"])
    assert len(find_columns(average, 0.204, True)) == 29 and len(chosen) == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_shifts_found_elsewhere_are_where_the_fit_starts_from_and_are_refined(library, tmp_path, monkeypatch):
    """Images that jump by whole lattice periods, and a file that knows of them but for a fifth of a pixel."""
    from depthprob.config import config_from_dict
    from depthprob.io import write_drift_csv
    from depthprob.physics.focal_series import Field, FocalSeries, expected_counts
    from depthprob.reconstruction import pipeline
    from depthprob.stack import Stack

    rng = np.random.default_rng(4)
    pixel, defocus, shape = 0.34, np.arange(-60.0, 61.0, 20.0), (34, 34)
    shifts = 2.04 * rng.integers(-1, 2, (7, 2)) / pixel
    shifts -= shifts.mean(0)
    positions = 4.75 + 2.04 * np.stack([a.ravel() for a in np.mgrid[:2, :2]], 1)
    field = Field(positions, np.array([3, 4, 4, 5]), np.zeros(4), np.full(7, 1e-3), np.ones(7), pixel * shifts)
    write_drift_csv(tmp_path / "found.csv", defocus, shifts + rng.choice([-0.2, 0.2], (7, 2)), np.full(7, 0.2))
    config = config_from_dict({"focal_series": {"defocus_A": defocus.tolist(), "pixel_size_A": pixel, "dose_e_per_A2": 1e6, "drift_file": "found.csv"}}, tmp_path)
    monkeypatch.delattr(pipeline, "estimate_drift")
    with jax.enable_x64(True):
        counts = np.asarray(expected_counts(field, library, FocalSeries(defocus, pixel, np.full(7, 1e6), shape)))
        found = pipeline.reconstruct(Stack(counts, defocus, pixel, {}), config, library, method="mle", quiet=True)
    assert abs(found.drift_start_px - shifts).max() > 0.1
    np.testing.assert_allclose(found.drift_px, shifts, atol=0.01)


def test_a_large_field_above_the_memory_limit_is_refused_before_its_fit(library, monkeypatch):
    from depthprob.config import config_from_dict
    from depthprob.errors import InputError
    from depthprob.reconstruction import joint, pipeline
    from depthprob.stack import Stack

    monkeypatch.setattr(joint, "LARGE", 3)
    monkeypatch.delattr(pipeline, "fit_jointly")
    pixel, defocus = 0.4, np.arange(-40.0, 41.0, 20.0)
    side, here = np.arange(24) * pixel, 3.6 + 2.04 * np.arange(2)
    counts = 400.0 * (sum(library.series(4, defocus, side - x, side - y) for x in here for y in here) + 1e-3)
    config = config_from_dict({"focal_series": {"defocus_A": defocus.tolist(), "pixel_size_A": pixel, "dose_e_per_A2": 2500.0}, "simulation": {"memory_limit_GB": 1.2}})
    with jax.enable_x64(True), pytest.raises(InputError, match=r"memory_limit_GB .* is 1.2; 4 columns in 5 images of 24 x 24 pixels need about 1.6 GB"):
        pipeline.reconstruct(Stack(counts, defocus, pixel, {}), config, library, method="mle", quiet=True)


@needs_particle
@pytest.mark.filterwarnings("ignore")
def test_whole_pipeline_on_an_independent_particle(tmp_path):
    import subprocess
    import sys

    config = tmp_path / "config.toml"
    config.write_text("[focal_series]\npixel_size_A = 0.204\nperiodic = true\n[inference]\nmax_atoms = 12\n")
    command = [sys.executable, "-c", "from depthprob.cli import main; main()", "reconstruct", str(PARTICLE), "--config", str(config), "-o", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    table = np.genfromtxt(tmp_path / "out" / "columns.csv", delimiter=",", names=True)
    truth = np.load(PARTICLE)["columns"]
    xy = np.stack([table["x_A"], table["y_A"]], 1)
    xy = xy - (xy.mean(0) - truth[:, :2].mean(0))
    match = np.argmin(np.hypot(*(xy[:, None] - truth[None, :, :2]).transpose(2, 0, 1)), 1)
    assert np.sum(table["n_atoms"] == truth[match, 2]) >= 27
    error = table["depth_A"] - truth[match, 3]
    rms = np.sqrt(np.mean((error - np.median(error)) ** 2))
    assert rms < 1.0
    assert rms < 1.3 * np.sqrt(np.mean(table["crlb_A"] ** 2))
    for name in ("columns.mat", "drift.csv", "posterior.nc", "structure.xyz", "surface.json", "report.html", "provenance.json"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    import arviz

    assert "depth" in arviz.from_netcdf(str(tmp_path / "out" / "posterior.nc"))["posterior"]


STATSTEM = Path(__file__).parents[2] / "shared" / "data" / "statstem" / "ExamplePtIr.mat"


@pytest.mark.skipif(not STATSTEM.exists(), reason="ExamplePtIr.mat is not at hand")
def test_columns_of_an_experimental_image_are_those_of_statstem():
    stored = read_statstem(STATSTEM)
    image, pixel, theirs, volumes = stored.image, stored.pixel_size, stored.positions, stored.cross_section
    found = find_columns(image, pixel)
    away, which = cKDTree(theirs).query(found)
    assert away.max() < 0.5  # nothing in the vacuum
    assert len(set(which)) == len(found) > 0.85 * len(theirs)  # the rest are single atoms about the rim, which their operator added
    fit = fit_columns(image, theirs, pixel)
    assert np.median(np.linalg.norm(fit.positions - theirs, axis=1)) < 0.03
    assert abs(np.median(fit.volume / volumes) - 1) < 0.01
    nearest = 1 + np.argmin(abs(volumes[:, None] - stored.library), axis=1)
    ours = count_by_library(fit.volume, fit.volume_sd, stored.library, scale_sd=0.05).n
    assert np.mean(ours == nearest) >= 0.93 and abs(ours - nearest).max() <= 1


def test_a_wide_noisy_vacuum_hides_no_columns_and_makes_none():
    rng = np.random.default_rng(3)
    truth = 20 + np.stack([a.ravel() for a in np.mgrid[0:12:2.04, 0:12:2.04]], 1)
    x = np.arange(512) * 0.2
    ex, ey = (np.exp(-((x - t[:, None]) ** 2) / (2 * 0.5**2)) for t in truth.T)
    image = 0.1 * ey.T @ ex + 0.003 + rng.normal(0, 2e-3, (512, 512))
    assert len(find_columns(image, 0.2)) == len(truth)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_atoms_of_a_tilted_crystal_are_found_leaning_on_their_planes():
    """Nine copper columns on one plane but for one: z * tilt aside of an upright lattice, columns and their atoms."""
    import jax

    from depthprob.config import config_from_dict
    from depthprob.physics.focal_series import Field, FocalSeries, expected_counts
    from depthprob.physics.frozen_phonon import build_gram
    from depthprob.physics.library import library_from_gram
    from depthprob.physics.optics import Microscope
    from depthprob.reconstruction.libraries import column_of, detector_of
    from depthprob.reconstruction.pipeline import reconstruct
    from depthprob.stack import Stack

    tilt, pixel, shape = np.array([0.03, -0.02]), 0.25, (44, 44)
    defocus = np.arange(-120.0, 121.0, 20.0)
    config = config_from_dict({
        "microscope": {"energy_keV": 200.0, "convergence_angle_mrad": 20.0, "source_fwhm_A": 0.7},
        "detector": {"inner_mrad": 40.0, "outer_mrad": 100.0},
        "focal_series": {"defocus_A": defocus.tolist(), "pixel_size_A": pixel, "dose_e_per_A2": 1e6},
        "specimen": {"element": "Cu", "lattice_constant_A": 3.6, "debye_waller_B_A2": 0.0, "tilt_mrad": (1e3 * tilt).tolist()},
    })
    with jax.enable_x64(True):
        gram = build_gram(column_of(config, 4), 200e3, 20.0, detector_of(config), 1, 1, sampling=0.05, cell=13.0)
        library = library_from_gram(gram, Microscope(200e3, 20.0, source_fwhm=0.7), (-160.0, 160.0))
        i, j = (a.ravel() for a in np.mgrid[:3, :3])
        depths = (i + j) % 2 * 1.8 + np.where((i == 0) & (j == 2), 10.8, 0.0)  # fcc: neighbours half a spacing apart
        upright = 3.6 + 1.8 * np.stack([i, j], 1)
        places, many = upright + np.outer(depths, tilt), len(defocus)
        field = Field(places, np.full(9, 3), depths, np.full(many, 1e-4), np.ones(many), np.zeros((many, 2)))
        data = np.asarray(expected_counts(field, library, FocalSeries(defocus, pixel, np.full(many, 1e6), shape)))
        found = reconstruct(Stack(data, defocus, pixel, {}), config, library, quiet=True)
    at = np.argmin(np.hypot(*(found.positions[:, None] - places).transpose(2, 0, 1)), 1)
    assert sorted(at) == list(range(9)) and np.all(found.n_atoms == 3)
    np.testing.assert_allclose(found.positions, places[at], atol=0.02)
    np.testing.assert_allclose(found.depth, depths[at], atol=0.3)
    z = depths[at][found.column_of_atom] + np.tile([-3.6, 0.0, 3.6], 9)
    np.testing.assert_allclose(found.atoms[:, 2], z, atol=0.3)
    np.testing.assert_allclose(found.atoms[:, :2], upright[at][found.column_of_atom] + np.outer(z, tilt), atol=0.03)


def test_a_thin_column_among_thick_ones_is_found_by_the_fits_residuals(library, double_precision):
    """Two atoms between columns of twelve, as at the rim of a thick rod; the fit knows the others. Nothing is found where nothing is missing."""
    import jax

    from depthprob.inference.likelihood import rates as expected_rates
    from depthprob.inference.problem import make_problem
    from depthprob.physics.focal_series import Field, FocalSeries, sample_counts
    from depthprob.reconstruction.joint import hidden_columns, with_columns

    defocus, pixel = np.arange(-60.0, 61.0, 20.0), 0.4
    positions = 5.0 + 2.04 * np.stack([a.ravel() for a in np.mgrid[:4, :4]], 1)
    n = np.full(16, 12)
    n[5] = 2
    series = FocalSeries(defocus, pixel, np.full(7, 9612.0), (42, 42))
    whole = Field(positions, n, np.zeros(16), np.full(7, 1e-3), np.ones(7), np.zeros((7, 2)))
    counts = np.asarray(sample_counts(jax.random.key(0), whole, library, series))
    known = np.arange(16) != 5
    part = Field(positions[known], n[known], np.zeros(15), np.full(7, 1e-3), np.ones(7), np.zeros((7, 2)))
    found = []
    for field in (part, whole):
        problem = make_problem(counts, field, library, series)
        found.append(hidden_columns({k: np.asarray(v) for k, v in problem.start.items()}, problem, expected_rates(problem.start, problem)))
    assert len(found[1]) == 0
    (site,) = found[0]
    assert np.hypot(*(site - positions[5])) < 0.1  # where it stays if positions are held; the nearest pixel is 0.23 Å off
    grown = with_columns(part, found[0])
    assert grown.positions.shape == (16, 2) and grown.n_atoms[-1] == 1
