"""Fields that the crystal fills from edge to edge: what unseen columns reach, and atoms counted where no vacuum shows the background."""

import jax
import numpy as np
import pytest
from scipy.spatial import cKDTree

from depthprob.config import Config, config_from_dict
from depthprob.errors import InputError
from depthprob.inference import likelihood
from depthprob.inference.problem import make_problem
from depthprob.physics.focal_series import Field, FocalSeries, expected_counts
from depthprob.reconstruction import pipeline
from depthprob.reconstruction.columns import RIM, columns_beyond
from depthprob.reconstruction.joint import common_gain, fit_jointly, likelier_shifts
from depthprob.reconstruction.pipeline import edge_mask
from depthprob.stack import Stack


def crystal_in_view(dumbbells, extent):
    """Columns of a turned crystal, 2.88 Å apart, or pairs of them, about an image; those that it shows, and those it does not, up to 5.5 Å beyond."""
    rng = np.random.default_rng(4)
    sites = 2.88 * np.stack(np.meshgrid(np.arange(-20, 20), np.arange(-20, 20)), -1).reshape(-1, 2) * [1.0, 1.0 + 0.5 * dumbbells]
    sites = np.concatenate([sites, sites + np.array([0.0, 1.4])]) if dumbbells else sites
    turn = np.radians(11.0)
    sites = sites @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) + extent / 2 + [0.4, -0.3]
    beyond = np.maximum(-sites, sites - extent).max(1)
    shown = beyond < -0.6
    return sites[shown] + rng.normal(0, 0.03, (shown.sum(), 2)), sites[~shown & (beyond < 5.5)]


@pytest.mark.parametrize("dumbbells", [False, True])
def test_a_crystal_goes_on_beyond_the_image_where_its_columns_ask_for_neighbours(dumbbells):
    extent = np.array([24.0, 19.0])
    shown, unseen = crystal_in_view(dumbbells, extent)
    found = columns_beyond(shown, extent, 5.0)
    beyond = lambda at: np.maximum(-at, at - extent).max(1)
    assert cKDTree(found).query(unseen[beyond(unseen) < 4.5])[0].max() < 0.5
    assert dumbbells or cKDTree(unseen).query(found)[0].max() < 0.5  # two kinds of column ask for each other's neighbours, too
    # of a piece that enters from the left, with a hole in it, those on the left alone; of one in vacuum none
    left = shown[(shown[:, 0] < 12) & (abs(shown[:, 1] - 9.5) < 6) & (np.hypot(*(shown - [8.0, 9.5]).T) > 2.0)]
    asked = columns_beyond(left, extent, 5.0)
    assert len(asked) and asked[:, 0].max() < RIM + 1e-9 and cKDTree(found).query(asked)[0].max() < 0.5 and beyond(asked).min() > -RIM
    assert not len(columns_beyond(shown[beyond(shown) < -3], extent, 5.0)) and not len(columns_beyond(shown[:2], extent, 5.0))


def test_pixels_that_unseen_columns_reach_are_left_out_wider_the_farther_from_focus():
    extent, foci = np.array([24.0, 19.0]), np.array([-150.0, 0.0, 50.0])
    shown, unseen = crystal_in_view(False, extent)
    series = FocalSeries(foci, 0.2, np.full(3, 1e3), (96, 121))
    used = edge_mask(series, shown, 0.0, 20.0)
    away = cKDTree(unseen).query(np.stack(np.meshgrid(np.arange(121), np.arange(96)), -1) * 0.2)[0]
    for mask, reach in zip(used, (4.2, 1.2, 2.2), strict=True):
        assert not mask[away < reach - 0.3].any() and mask[(away > reach + 0.3)].all()
    assert edge_mask(FocalSeries(foci, 0.2, np.full(3, 1e3), (96, 121), True), shown, 0.0, 20.0).all()


def filled_field(library, foci, pixels=32):
    """Counts of a crystal of columns 2.04 Å apart of 2 to 4 atoms that goes on beyond the image, the columns more than 0.6 Å inside it, the series and which of its pixels unseen ones leave."""
    rng, ones, pixel = np.random.default_rng(1), np.ones(len(foci)), 0.34
    at = 0.9 + 2.04 * np.stack(np.meshgrid(np.arange(-5, 10), np.arange(-5, 10)), -1).reshape(-1, 2)
    n, depths, series = rng.integers(2, 5, len(at)), rng.normal(0, 4, len(at)), FocalSeries(foci, pixel, 9612 * ones, (pixels, pixels))
    field = lambda kept: Field(at[kept], n[kept], depths[kept], 1e-4 * ones, ones, np.zeros((len(foci), 2)))
    counts = rng.poisson(np.asarray(expected_counts(field(slice(None)), library, series))).astype(float)
    inside = field(((at > 0.6) & (at < (pixels - 1) * pixel - 0.6)).all(1))
    return counts, inside, series, edge_mask(series, inside.positions, 0.0, 21.0)


def test_images_that_tell_no_gain_from_background_do_not_say_how_bright_columns_are(library):
    """All columns start an atom short; ten of thirteen images are nearly even, where gain is the prior's and background what is left over."""
    with jax.enable_x64(True):
        counts, truth, series, mask = filled_field(library, np.array([-20.0, 0.0, 20.0, *np.arange(100.0, 180.0, 8.0)]))
        start = Field(truth.positions, truth.n_atoms - 1, truth.depths, 50 * truth.background, truth.gain, truth.image_shifts)
        joint = fit_jointly(counts, start, library, series, mask, Config())
    assert np.array_equal(joint.problem.n_atoms, truth.n_atoms)
    assert np.std((np.asarray(joint.estimate.parameters["depth"]) - truth.depths) / joint.estimate.sd("depth")) < 1.3


def test_weights_of_gains_are_their_information_beside_the_background(library):
    with jax.enable_x64(True):
        counts, field, series, mask = filled_field(library, np.array([-150.0, -60.0, 0.0, 90.0]))
        problem = make_problem(counts, field, library, series, ("background", "gain"), mask)
        parameters = problem.start | {"log_gain": np.array([0.3, -0.2, 0.1, 0.5])}
        fisher, _ = likelihood.fisher_and_score(parameters, problem)
        kept = [i for i, (name, _) in enumerate(likelihood.parameter_names(problem)) if name != "depth"]  # which are held
        information = 1 / np.diag(np.linalg.inv(fisher[np.ix_(kept, kept)]))[:4]
        found = common_gain(parameters, problem, likelihood.rates(parameters, problem))
    assert np.log(found) == pytest.approx(np.average(parameters["log_gain"], weights=information), rel=1e-4)
    assert information[2] > 20 * information[0]


def test_an_image_that_starts_beside_the_wrong_columns_is_found(library):
    with jax.enable_x64(True):
        counts, field, series, mask = filled_field(library, np.array([-150.0, -60.0, 0.0, 90.0]))
        pixels = np.array([[0, 0], [2, 0], [0, 0], [3, -3]])  # one near focus, which is not looked at, and one far from it
        start = Field(field.positions, field.n_atoms, field.depths, field.background, field.gain, pixels * series.pixel_size)
        problem = make_problem(counts, start, library, series, mask=mask)
        found = likelier_shifts(problem.start, problem, likelihood.rates(problem.start, problem))
    moved = np.stack([found[name] - problem.start[name] for name in ("shift_x", "shift_y")], 1)
    assert np.allclose(moved / series.pixel_size, [[0, 0], [0, 0], [0, 0], [-3, 3]])
    assert all(found[name] is problem.start[name] for name in found if not name.startswith("shift"))


def test_images_that_unseen_columns_cover_are_left_out_and_named(library):
    foci = np.array([-180.0, -60.0, -20.0, 20.0, 60.0, 180.0])
    with jax.enable_x64(True):
        counts, truth, series, mask = filled_field(library, foci)

        def reconstruct(kept):
            config = config_from_dict({"focal_series": {"defocus_A": foci[kept].tolist(), "pixel_size_A": 0.34, "dose_e_per_A2": 9612.0}})
            return pipeline.reconstruct(Stack(counts[kept], foci[kept], series.pixel_size, {}), config, library, method="mle", quiet=True)

        found = reconstruct(np.arange(6))
        with pytest.raises(InputError, match=r"2 of 4 images, at defocus -180, 180 Å, were left out: .* Take a wider field. A depth needs three images at least."):
            reconstruct([0, 2, 3, 5])
    assert mask[[0, -1]].mean() < pipeline.LEAST_SEEN < mask[1:-1].mean((1, 2)).min()
    assert np.array_equal(found.images, [1, 2, 3, 4]) and np.array_equal(found.defocus, foci[1:-1]) and len(found.stack) == len(found.drift_px) == 4
    assert any("2 of 6 images, at defocus -180, 180 Å, were left out" in warning for warning in found.warnings)
    own = cKDTree(truth.positions).query(found.positions)[1]
    assert len(own) == 25 and np.array_equal(found.n_atoms, truth.n_atoms[own])
    assert np.std((found.depth - truth.depths[own]) / found.depth_sd) < 1.3
