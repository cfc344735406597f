"""The design of experiments against the library's image path, finite differences, and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprob.config import config_from_dict
from depthprob.errors import InputError
from depthprob.inference.atoms import atom_counts, information_of
from depthprob.inference.design import (
    Columns,
    Plan,
    Space,
    atom_bounds_by_angle,
    depth_variances,
    further_gain,
    merge_images,
    optimise,
    radial_signals,
    ring_images,
    ring_sensitivity,
)
from depthprob.inference.fisher import poisson_fisher
from depthprob.physics.column_images import at_points, column_images
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.focal_series import FocalSeries
from depthprob.physics.optics import Microscope
from depthprob.physics.specimen import Column
from depthprob.physics.thermal import thermal_gram
from depthprob.reconstruction.bounds import column_crlb
from depthprob.reconstruction.planning import design_series

MICROSCOPE = Microscope(energy=3e5, convergence_angle=20.0, source_fwhm=0.7)
FOCI = np.arange(-120, 121, 20.0)
Z_GRID = np.arange(-150, 151, 8.0)
ONE = Columns(np.array([0]), np.array([0.0]))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def signals():
    with jax.enable_x64(True):
        return radial_signals("Au", 4.08, 0.63, (2,), MICROSCOPE, 24.0, (40.0, 60.0, 90.0), 140.0, 8.0)


def plan(**changes):
    given = {"defocus": FOCI, "dose": np.full(len(FOCI), 9612.0), "angle": 20.0, "annuli": np.array([40.0, 90.0])} | changes
    return Plan(*(jnp.asarray(v, float) for v in given.values()))


def test_radial_images_are_those_of_the_library(signals):
    gram = thermal_gram(Column("Au", 2, 4.08, 0.63), 3e5, 24.0, AnnularDetector(40.0, 90.0))
    z = np.array([-60.0, 0.0, 35.0])
    cell, size = 24.0, 140
    theirs = column_images(gram.blocks[0, 1:].astype(complex), gram.modes, MICROSCOPE, z, cell, size)[0]
    r = np.asarray(signals.r)
    near = r < 5
    # several directions, since the square lattice of their waves is not round
    rows = np.array([[at_points(theirs, cell / size, [x * np.cos(t)], [x * np.sin(t)])[:, 0, 0] for x in r[near]] for t in np.arange(4) * 0.7])
    along = rows.mean(0).T
    variance = 0.7**2 / (8 * np.log(2))
    ours = np.stack([np.asarray(ring_images(signals, jnp.asarray(20.0), jnp.asarray(f), variance))[0].sum(0) for f in z])
    np.testing.assert_allclose(ours[:, near], along, atol=0.01 * along.max())


def test_a_detector_that_only_wider_probes_would_hit_sees_no_beam_of_a_narrow_one():
    at, narrow = np.linspace(1.0, 6.0, 50), Microscope(energy=3e5, convergence_angle=15.0, source_fwhm=0.7)
    alone, of_wider = (radial_signals("Au", 4.08, 0.63, (1,), narrow, largest, (30.0, 90.0), 140.0, 8.0) for largest in (15.0, 40.0))
    profile = lambda signals: np.interp(at, signals.r, ring_images(signals, jnp.asarray(15.0), jnp.asarray(0.0), 0.0)[0].sum(0))
    peak = ring_images(alone, jnp.asarray(15.0), jnp.asarray(0.0), 0.0).sum(1).max()
    np.testing.assert_allclose(profile(of_wider), profile(alone), atol=4e-3 * peak)  # modes of the wider aperture blur the rim of the narrow one: 0.003; with the beam they record it is 0.19


def test_bounds_of_atoms_at_an_angle_do_not_depend_on_wider_ones_beside_it():
    bounds = lambda angles, annuli: atom_bounds_by_angle(Column("Au", 2, 4.08, 0.63), (MICROSCOPE,), angles, annuli, FOCI, 9612.0, 8.0)[0]
    (alone,), (_, beside) = bounds([15.0], [[30.0, 90.0]]), bounds([40.0, 15.0], [[60.0, 90.0], [30.0, 90.0]])
    np.testing.assert_allclose(beside.sd(), alone.sd(), rtol=1e-9)


def test_bounds_of_atoms_by_angle_are_those_of_images():
    # images of pixels, by the other closed form and with a sharp aperture; here a disc of the square's area, and an aperture soft by 2 %
    column, detector = Column("Au", 2, 4.08, 0.63), AnnularDetector(48.0, 90.0)
    lenses = (MICROSCOPE, Microscope(energy=3e5, convergence_angle=20.0, source_fwhm=0.7, focal_spread=20.0, spherical_aberration=1e5))
    for lens, (found,) in zip(lenses, atom_bounds_by_angle(column, lenses, [20.0], [[48.0, 90.0]], FOCI, 9612.0, 12.0), strict=True):
        counts = atom_counts(column, lens, detector, FocalSeries(FOCI, 0.2, 9612.0, (61, 61)))
        expected = information_of(poisson_fisher(counts[0], counts[1:]))
        np.testing.assert_allclose(found.sd_together(), expected.sd_together(), rtol=0.02)
        np.testing.assert_allclose(found.sd(), expected.sd(), rtol=0.03)


def test_the_direct_beam_on_the_detector_is_refused():
    with pytest.raises(InputError, match="direct beam"):
        atom_bounds_by_angle(Column("Au", 2, 4.08, 0.63), (MICROSCOPE,), [20.0, 50.0], [[48.0, 90.0]] * 2, FOCI, 9612.0, 12.0)


def test_gradient_is_the_finite_difference(signals):
    goal = jax.jit(lambda p: depth_variances(p, signals, ONE, ("gain", "background", "focus_step", "source_size"), jnp.asarray(Z_GRID))[0])
    base = plan(angle=21.0, annuli=np.array([43.0, 85.0]))
    gradient = jax.jit(jax.grad(goal))(base)
    for name, index, step in (("defocus", 3, 0.05), ("dose", 5, 1.0), ("angle", (), 0.01), ("annuli", 0, 0.02)):
        value = np.asarray(getattr(base, name))
        moved = []
        for sign in (1, -1):
            there = value.copy()
            there[index] += sign * step
            moved.append(float(goal(base._replace(**{name: jnp.asarray(there)}))))
        np.testing.assert_allclose(np.asarray(getattr(gradient, name))[index], (moved[0] - moved[1]) / (2 * step), rtol=2e-3)


def test_doubling_the_dose_halves_the_variance_and_images_add(signals):
    variance = lambda p: float(depth_variances(p, signals, ONE, ("background",), jnp.asarray(Z_GRID))[0])
    all_of_it = variance(plan())
    np.testing.assert_allclose(variance(plan(dose=np.full(len(FOCI), 2 * 9612.0))), all_of_it / 2, rtol=1e-9)
    halves = [plan(defocus=FOCI[part], dose=np.full(len(FOCI[part]), 9612.0)) for part in (slice(0, 6), slice(6, None))]
    np.testing.assert_allclose(1 / all_of_it, sum(1 / variance(h) for h in halves), rtol=1e-9)


def test_best_foci_are_those_of_brute_force_and_certified(signals):
    columns = Columns(np.array([0, 0, 0]), np.array([-10.0, 0.0, 10.0]))
    free = ("gain", "background")
    space = Space(("defocus", "dose"), (-120.0, 120.0), (20.0, 20.0), (40.0, 90.0), np.zeros(0), np.zeros(0))
    found, history = optimise(plan(), space, signals, columns, free, "mean", Z_GRID, steps=1500)
    total = 9612.0 * len(FOCI)
    assert np.isclose(found.dose.sum(), total)
    mean = lambda p: jnp.mean(depth_variances(p, signals, columns, free, jnp.asarray(Z_GRID)))
    singles = jax.jit(jax.vmap(lambda f: mean(plan(defocus=f[None], dose=np.array([total])))))(np.arange(-120, 121, 2.0))
    assert mean(merge_images(found, 5.0, 1e-3)) <= 1.002 * singles.min()
    assert history[-1] <= history[0]
    gain = further_gain(found, signals, columns, free, Z_GRID, np.arange(-120, 121, 2.0))
    assert 1 - 1e-6 < gain < 1.01
    assert further_gain(plan(), signals, columns, free, Z_GRID, np.arange(-120, 121, 2.0)) > 1.2  # the same check sees a plan that can be bettered


def test_rings_are_shared_between_annuli():
    shares = np.asarray(ring_sensitivity(jnp.array([45.0, 70.0, 90.0]), jnp.array([40.0, 60.0, 90.0])))
    np.testing.assert_allclose(shares, [[0.75, 1 / 3], [0.0, 2 / 3]])


def test_aberrations_that_are_not_round_are_refused():
    astigmatic = Microscope(energy=3e5, convergence_angle=20.0, aberrations={"C12_A": 20.0})
    with pytest.raises(InputError, match="round"):
        radial_signals("Au", 4.08, 0.63, (2,), astigmatic, 24.0, (40.0, 90.0), 140.0, 8.0)
    with pytest.raises(InputError, match="round"):
        atom_bounds_by_angle(Column("Au", 2, 4.08, 0.63), (MICROSCOPE, astigmatic), [20.0], [[48.0, 90.0]], FOCI, 9612.0, 12.0)


def test_command_writes_plan_and_figure(tmp_path):
    import json

    from typer.testing import CliRunner

    from depthprob.cli import app

    config = tmp_path / "c.toml"
    config.write_text(
        "[focal_series]\ndefocus_start_A=-60.0\ndefocus_stop_A=60.0\ndefocus_step_A=20.0\nfield_of_view_A=8.0\n[detector]\nouter_mrad=90.0\n"
        '[specimen]\nn_atoms=2\n[design]\nsteps=10\nvary=["defocus","dose"]\n'
    )
    result = CliRunner().invoke(app, ["design", str(config), "-o", str(tmp_path / "d.json"), "--quiet"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["gain_in_dose"] > 1
    np.testing.assert_allclose(sum(found["best"]["dose_e_per_A2"]), 7 * 9612.0)
    assert (tmp_path / "d.png").stat().st_size > 10_000
    config.write_text("[design]\nconvergence_angle_range_mrad=[30.0, 20.0]\n")
    refused = CliRunner().invoke(app, ["design", str(config)])
    assert refused.exit_code == 2 and "convergence_angle_range_mrad" in refused.output


def planned(detector, **wishes):
    focal_series = {"defocus_start_A": -60.0, "defocus_stop_A": 60.0, "defocus_step_A": 30.0, "field_of_view_A": 8.0}
    settings = {"focal_series": focal_series, "specimen": {"n_atoms": 1}, "detector": {"inner_mrad": 30.0, "outer_mrad": 90.0} | detector, "design": {"steps": 3} | wishes}
    return design_series(config_from_dict(settings))


def test_angles_stay_clear_of_a_detector_that_is_held():
    landscape = planned({}, vary=["convergence_angle"], convergence_angle_range_mrad=[20.0, 34.0])["landscape"]["convergence_angle"]
    assert landscape["angle_mrad"].max() == pytest.approx(30 / 1.05) and np.isfinite(landscape["depth_sd_of_given_foci_A"]).all()
    with pytest.raises(InputError, match="begins at 35"):
        planned({}, vary=["convergence_angle"], convergence_angle_range_mrad=[35.0, 50.0])
    with pytest.raises(InputError, match=r"Allowed is an inner angle from 22\.05 mrad on"):
        planned({"inner_mrad": 10.0})


def test_a_plan_is_worth_what_the_bound_of_its_library_says():
    # by the library in a square field, where design has a disc: 1.7 % apart. A ring that holds part of the beam's disc, cut by the detector's edge, would take 6 % off
    found = planned({}, vary=["detector"], detector_range_mrad=[15.0, 90.0], steps=60)["best"]
    inner, outer = found["detector_edges_mrad"]
    assert 24 < inner < 26
    config = config_from_dict({
        "focal_series": {"defocus_start_A": -60.0, "defocus_stop_A": 60.0, "defocus_step_A": 30.0, "field_of_view_A": 8.0, "pixel_size_A": 0.2},
        "specimen": {"n_atoms": 1}, "detector": {"inner_mrad": inner, "outer_mrad": outer}, "crlb": {"atoms": False},
    })  # fmt: skip
    assert found["depth_sd_A"] == pytest.approx(column_crlb(config)["column_depth_sd_A"], rel=0.025)


@pytest.mark.slow
def test_nothing_is_told_of_angles_at_which_the_beam_would_hit():
    free, held = (
        planned({}, vary=["convergence_angle", *more], convergence_angle_range_mrad=[20.0, 34.0], detector_range_mrad=[24.0, 90.0])["landscape"]["convergence_angle"]
        for more in (["detector"], [])
    )
    hit = free["angle_mrad"] > 30 / 1.05
    assert np.isnan(np.array(free["depth_sd_of_given_foci_A"])[hit]).all()
    np.testing.assert_allclose(np.array(free["depth_sd_of_given_foci_A"])[0], held["depth_sd_of_given_foci_A"][0], rtol=0.01)  # 20 mrad under modes of 34, and of 29


def test_ranges_without_anything_better_are_told():
    with pytest.raises(InputError, match="nothing was found that is better"):
        planned({"outer_mrad": 180.0}, vary=["detector"], detector_range_mrad=[60.0, 90.0])
