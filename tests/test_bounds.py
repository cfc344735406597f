"""Bounds of a column with more unknown than the library itself can move, and with something known beforehand; and of the columns of a structure file."""

import re
from dataclasses import replace

import ase
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthprob.config import Config, config_from_dict
from depthprob.errors import InputError
from depthprob.inference.crlb import crlb
from depthprob.physics.detector import AnnularDetector
from depthprob.physics.focal_series import Field, FocalSeries, counts_by_focal_variance, expected_counts
from depthprob.physics.library import library_from_gram
from depthprob.physics.optics import Microscope
from depthprob.physics.specimen import Column
from depthprob.physics.thermal import thermal_gram
from depthprob.reconstruction import libraries
from depthprob.reconstruction.bounds import _grams_about, column_crlb, config_crlb

DEFOCUS = np.arange(-40.0, 121.0, 20.0)  # not even about the column: else depth and width would have nothing in common
SERIES = FocalSeries(DEFOCUS, 0.3, np.full(len(DEFOCUS), 9612.0), (21, 21))
LENS, NARROW = Microscope(3e5, 21.0, source_fwhm=0.7), AnnularDetector(48.0, 90.0)

pytestmark = pytest.mark.usefixtures("double_precision")


def column_of(n):
    return Field(np.array([[3.0, 3.0]]), np.array([n]), np.zeros(1), np.full(len(DEFOCUS), 1e-3), np.ones(len(DEFOCUS)), np.zeros((len(DEFOCUS), 2)))


def settings(n_atoms, **crlb):
    return config_from_dict({
        "focal_series": {"defocus_start_A": -40.0, "defocus_stop_A": 120.0, "defocus_step_A": 20.0, "pixel_size_A": 0.3, "field_of_view_A": 6.0},
        "detector": {"inner_mrad": 48.0, "outer_mrad": 90.0},
        "specimen": {"n_atoms": n_atoms},
        "thermal": {"model": "absorptive"},
        "crlb": {"atoms": False} | crlb,
    })  # fmt: skip


def by_source_variance(field, library):
    """Derivative of the expected counts by the variance of the source image."""
    counts = lambda v: expected_counts(replace(field, source_variance=v), library, SERIES)
    return np.asarray(jax.jvp(counts, (jnp.array(0.0),), (jnp.array(1.0),))[1])


@pytest.fixture(scope="module")
def gram():
    return thermal_gram(Column("Au", 2, 4.08, 0.63), 3e5, 21.0, NARROW)


def test_information_known_beforehand_adds(library):
    alone = crlb(column_of(6), library, SERIES, ())[0]
    np.testing.assert_allclose(crlb(column_of(6), library, SERIES, (), prior_sd={"depth": 0.3})[0], (alone**-2 + 0.3**-2) ** -0.5, rtol=1e-9)
    unknown = crlb(column_of(6), library, SERIES, ("focus_step",))[0]
    known = [crlb(column_of(6), library, SERIES, ("focus_step",), prior_sd={"focus_step": sd})[0] for sd in (1e-7, 0.02, 1e4)]
    np.testing.assert_allclose([known[0], known[2]], [alone, unknown], rtol=1e-6)
    assert alone < known[1] < unknown


def test_a_prior_on_the_focus_offset_bounds_an_isolated_column(library):
    # offset and depth are one and the same shift, so that their variances add
    alone = crlb(column_of(6), library, SERIES, ())[0]
    np.testing.assert_allclose(crlb(column_of(6), library, SERIES, ("focus_offset",), prior_sd={"focus_offset": 2.0})[0], np.hypot(alone, 2.0), rtol=1e-6)
    with pytest.raises(InputError, match="prior_sd"):
        crlb(column_of(6), library, SERIES, ("focus_offset",), prior_sd={"depth": 2.0})


def test_an_unknown_given_by_its_derivative_costs_what_the_parameter_costs(library):
    field = column_of(6)
    expected = crlb(field, library, SERIES, ("background", "source_size"), 0.5, {"source_variance": 0.02})
    found = crlb(field, library, SERIES, ("background",), 0.5, {"width": 0.02}, {"width": by_source_variance(field, library)})
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # derivatives in float32
    assert expected > crlb(field, library, SERIES, ("background",), 0.5) * 1.001


@pytest.mark.parametrize("n", [0, 13])
def test_columns_that_the_library_does_not_know(library, n):
    with pytest.raises(InputError, match=f"have {n} to {n} atoms; allowed are 1 to 12"):
        crlb(column_of(n), library, SERIES)


def test_bounds_of_many_columns_are_those_of_few(library, monkeypatch):
    # a field taken for a large one: only columns that overlap share rows
    where = 3.0 + 2.04 * np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).reshape(-1, 2)
    series = FocalSeries(DEFOCUS, 0.4, np.full(len(DEFOCUS), 9612.0), (26, 32))
    field = replace(column_of(1), positions=where, n_atoms=np.arange(1, 13), depths=np.linspace(-4, 4, 12))
    beside = {"width": np.asarray(counts_by_focal_variance(field, library, series))}
    for free, told in ((("positions", "background", "image_shifts", "focus_offset"), {"width": 30.0}), (("gain", "focus_step"), {"depth": 0.4, "focus_step": 0.01})):
        monkeypatch.setattr("depthprob.inference.crlb.LARGE", 200)
        expected = crlb(field, library, series, free, 0.5, told, beside)
        monkeypatch.setattr("depthprob.inference.crlb.LARGE", 3)
        np.testing.assert_allclose(crlb(field, library, series, free, 0.5, told, beside), expected, rtol=0.02)


def test_focal_spread_is_diffusion_along_the_focus(gram):
    # beside the images of two lenses of other spread, whose waves are damped by exp(-(pi lambda s)^2 (k^2 - k'^2)^2 / 2)
    lens = lambda variance: replace(LENS, focal_spread=variance**0.5)
    below, middle, above = (library_from_gram(gram, lens(v), (-60.0, 140.0)) for v in (0.0, 50.0, 100.0))
    field = column_of(2)
    counts = lambda library: np.asarray(expected_counts(field, library, SERIES), float)
    found = np.asarray(counts_by_focal_variance(field, middle, SERIES))
    # differences are off by (50 Å^2)^2 / 6 of the third derivative, splines by a part of their step squared
    np.testing.assert_allclose(found, (counts(above) - counts(below)) / 100, atol=0.02 * abs(found).max())


def test_the_config_says_what_is_known_beforehand():
    def bounds(**known):
        return column_crlb(settings(1, nuisances=["focus_offset", "focal_spread"], prior_sd=known))

    vague, told = bounds(), bounds(focus_offset_A=2.0, focal_variance_A2=1e-4)
    each = told["column_depth_sd_with_nuisances_A"]
    assert vague["column_depth_sd_with_nuisances_A"]["focus_offset"] is None and vague["undefined"]
    assert told["undefined"] is None and told["prior_sd"] == {"focus_offset_A": 2.0, "focal_variance_A2": 1e-4}
    np.testing.assert_allclose(each["focus_offset"], np.hypot(told["column_depth_sd_A"], 2.0), rtol=1e-5)
    np.testing.assert_allclose(each["focal_spread"], told["column_depth_sd_A"], rtol=1e-5)  # as good as known
    assert vague["column_depth_sd_with_nuisances_A"]["focal_spread"] > 1.001 * each["focal_spread"]


@pytest.mark.parametrize("large", [False, True])
def test_bounds_of_one_column_with_the_others_known(library, monkeypatch, large):
    # beside derivatives by what that column alone has, and by what all images share
    monkeypatch.setattr("depthprob.inference.crlb.LARGE", 1 if large else 200)
    where = np.array([[3.0, 3.0], [4.6, 3.6], [7.5, 5.0]])
    series = FocalSeries(DEFOCUS, 0.4, np.full(len(DEFOCUS), 9612.0), (20, 24))
    field = replace(column_of(1), positions=where, n_atoms=np.array([4, 9, 6]), depths=np.array([-3.0, 0.0, 5.0]))

    def counts(depth, place, log_gain, offset):
        moved = replace(field, depths=jnp.asarray(field.depths).at[1].add(depth), positions=jnp.asarray(where).at[1].add(place), gain=jnp.exp(log_gain), focus_offset=offset)
        return expected_counts(moved, library, series).astype(float)

    slopes = jax.jacfwd(counts, (0, 1, 2, 3))(jnp.zeros(()), jnp.zeros(2), jnp.zeros(len(DEFOCUS)), jnp.zeros(()))
    slopes = np.concatenate([np.asarray(s).reshape(*s.shape[:3], -1) for s in slopes], -1).reshape(-1, 13)
    fisher = slopes.T @ (slopes / np.asarray(counts(0.0, jnp.zeros(2), jnp.zeros(len(DEFOCUS)), 0.0)).reshape(-1, 1))
    for nuisances, free in (((), [0]), (("positions",), [0, 1, 2]), (("positions", "gain"), range(12)), (("gain", "focus_offset"), [0, *range(3, 13)])):
        expected = np.linalg.inv(fisher[np.ix_(free, free)])[0, 0] ** 0.5
        found = crlb(field, library, series, nuisances, others_known=True)
        assert found[1] == pytest.approx(expected, rel=0.02 if large else 1e-4)
        assert np.all(found <= crlb(field, library, series, nuisances) * (1 + 1e-9)) or "focus_offset" in nuisances


def of_structure(folder, atoms, **sections):
    atoms.write(folder / "particle.xyz", format="extxyz")
    given = {"focal_series": {"defocus_start_A": -40.0, "defocus_stop_A": 120.0, "defocus_step_A": 20.0, "pixel_size_A": 0.4}, "specimen": {"structure_file": "particle.xyz"}}
    return config_from_dict(given | sections, folder)


def columns_of_gold(numbers, side, spread=0.0):
    """Columns 4.08 Å apart of so many atoms, centred on z = 0, that lean by `spread` [Å] from one atom to the next."""
    z = np.concatenate([4.08 * (np.arange(n) - (n - 1) / 2) for n in numbers])
    x = np.repeat(side - 4.08 * (1 + np.arange(len(numbers))), numbers)
    return ase.Atoms(["Au"] * len(z), np.stack([(x + spread * z / 4.08) % side, np.full(len(z), side / 2), z], 1), cell=[side, side, 60.0])


def test_bounds_on_the_columns_of_a_structure_file(tmp_path, library):
    config = of_structure(tmp_path, columns_of_gold([2, 6, 4], 20.0, 0.05), crlb={"nuisances": ["positions", "focus_offset"]})
    told = config_crlb(config)
    columns, rest = told["columns"], told["columns"]["depth_sd_with_nuisances_A"]
    assert list(columns["n_atoms"]) == [2, 6, 4] and told["warning"] is None and told["field_of_view_A"] == [20.0, 20.0]
    np.testing.assert_allclose(columns["x_A"], 20 - 4.08 * np.arange(1, 4), atol=1e-6)
    # beside the field given by hand, from a library of another range
    places = np.stack([20 - 4.08 * np.arange(1, 4), np.full(3, 10.0)], 1)
    field = replace(column_of(1), positions=places, n_atoms=np.array([2, 6, 4]), depths=np.zeros(3), background=np.full(len(DEFOCUS), 1e-7))
    series = replace(SERIES, pixel_size=0.4, shape=(50, 50))
    np.testing.assert_allclose(columns["depth_sd_A"], crlb(field, library, series, (), others_known=True), rtol=5e-3)
    np.testing.assert_allclose(rest["positions+focus_offset"], crlb(field, library, series, ("positions", "focus_offset")), rtol=5e-3)
    assert told["column_depth_sd_A"] == np.median(columns["depth_sd_A"]) and told["column_depth_sd_with_nuisances_A"]["positions"] == np.median(rest["positions"])
    assert np.all(columns["depth_sd_A"] <= rest["others"]) and np.all(rest["others"] <= rest["positions"]) and "relative" in told["gauge"]


def test_one_column_of_a_structure_file_is_an_isolated_one(tmp_path):
    gold = columns_of_gold([5], 8.4)  # in the middle of a pixel of 0.4 Å, as isolated columns are
    gold.positions[:, :2] = 4.0
    one = config_crlb(of_structure(tmp_path, gold, crlb={"nuisances": ["positions", "focus_offset"]}))
    series = {"defocus_start_A": -40.0, "defocus_stop_A": 120.0, "defocus_step_A": 20.0, "pixel_size_A": 0.4, "field_of_view_A": 8.4}
    other = config_crlb(config_from_dict({"focal_series": series, "specimen": {"n_atoms": 5}, "crlb": {"nuisances": ["positions", "focus_offset"], "atoms": False}}))
    assert one["column_depth_sd_A"] == pytest.approx(other["column_depth_sd_A"], rel=1e-5)
    assert one["column_depth_sd_with_nuisances_A"]["positions"] == pytest.approx(other["column_depth_sd_with_nuisances_A"]["positions"], rel=1e-5)
    assert one["column_depth_sd_with_nuisances_A"]["focus_offset"] is None and one["undefined"] == other["undefined"] is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.set_chemical_symbols(["Au"] * 4 + ["Cu"] * 2), "holds Au, Cu"),
        (lambda a: a.set_positions(a.positions * [1, 1, 1.2]), "4.896 Å apart, and those of the config's crystal along specimen.zone_axis [0, 0, 1] 4.080 Å"),
        (lambda a: a.translate([0, 0, 190.0]), "centred at z = 190.0 to 190.0 Å, and the foci reach from -40 to 120 Å"),
        (lambda a: a.set_cell([20.1, 20.0, 60.0]), "no whole number of pixels"),
        (lambda a: a.set_array("occupancy", np.full(6, 0.5)), "array occupancy"),
    ],
)
def test_structures_that_have_no_columns_of_the_crystal_are_refused(tmp_path, change, said):
    gold = columns_of_gold([2, 4], 20.0)
    change(gold)
    with pytest.raises(InputError, match=re.escape(said)):
        config_crlb(of_structure(tmp_path, gold))


def test_a_column_with_a_vacancy_is_told(tmp_path):
    gold = columns_of_gold([2, 5, 4], 20.0)
    del gold[4]
    told = config_crlb(of_structure(tmp_path, gold, crlb={"nuisances": []}))
    assert told["warning"].startswith("1 of 3 columns") and list(told["columns"]["n_atoms"]) == [2, 4, 4]


def test_atoms_that_need_more_memory_than_allowed_are_refused_before_the_work():
    with pytest.raises(InputError, match=r"the 30 atoms of the column need about \d.* GB. Raise the limit or leave the atoms out"):
        column_crlb(replace(settings(30, atoms=True), simulation=replace(Config().simulation, memory_limit_GB=2.0)))


def test_a_single_atom_that_shakes_more_looks_like_a_wider_source(monkeypatch):
    """Blurred by u^2 = B / (8 pi^2) along each axis, whatever the atom: two unknowns that cost the same, to 2e-5 of a peak that libraries are true to. For a column that is no longer so."""
    monkeypatch.setattr(libraries, "LENGTHS", (2,))
    closed = lambda n: replace(settings(n, nuisances=["source_size", "debye_waller_B"]), thermal=Config().thermal)
    bounds = lambda n: column_crlb(closed(n))["column_depth_sd_with_nuisances_A"]
    one, two = bounds(1), bounds(2)
    assert one["debye_waller_B"] == pytest.approx(one["source_size"], rel=5e-4) and one["source_size"] > 1.005 * column_crlb(closed(1))["column_depth_sd_A"]
    assert two["debye_waller_B"] != pytest.approx(two["source_size"], rel=2e-3)


@pytest.mark.parametrize("section", [{"specimen": {"tilt_mrad": [5.0, 0.0]}}, {"thermal": {"model": "absorptive"}}, {"specimen": {"debye_waller_B_A2": 0.01}}])
def test_b_is_a_nuisance_where_its_derivative_can_be_had(section):
    config = config_from_dict({"crlb": {"nuisances": ["debye_waller_B"]}, **section})
    with pytest.raises(InputError, match=r"debye_waller_B.*Leave it out"):
        _grams_about(config, 2, lambda items, **_: items)
