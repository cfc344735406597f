"""Tomography: projections, SIRT, and the comparison with an atomic model."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from depthprob.errors import InputError
from depthprob.plotting import plot_tilted_atoms, plot_tomogram
from depthprob.reconstruction.tomography import TILTS, align, model_density, overlap, project, sirt, surface_distance
from depthprob.stack import read_tilt_series

PIXEL = 2.0
SD = 10.0 / np.sqrt(8 * np.log(2))  # of the default resolution
# a rod with an arm: no turn and no mirror maps it on itself
L_SHAPE = np.array([[x, 0.0, 0.0] for x in range(-24, 25, 4)] + [[24.0, y, 0.0] for y in range(4, 17, 4)] + [[-24.0, 0.0, z] for z in range(4, 21, 4)])


def ball(radius, spacing=2.0):
    grid = np.stack(np.meshgrid(*[np.arange(-radius, radius + spacing, spacing)] * 3), -1).reshape(-1, 3) + 0.37
    return grid[(grid**2).sum(1) < radius**2]


def test_a_projected_atom_is_the_gaussian_at_its_turned_place():
    atom, tilt = np.array([[6.0, 10.0, -14.0]]), 30.0
    (image,) = project(atom, [tilt], (60, 50), PIXEL)
    at_y = 10.0 * np.cos(np.pi / 6) + 14.0 * np.sin(np.pi / 6)  # turned right-handedly about x
    fine = (np.arange(60 * 8) + 0.5 - 240) * PIXEL / 8, (np.arange(50 * 8) + 0.5 - 200) * PIXEL / 8
    bell = np.exp(-((fine[0][:, None] - at_y) ** 2 + (fine[1] - 6.0) ** 2) / (2 * SD**2)) / (2 * np.pi * SD**2)
    np.testing.assert_allclose(image, bell.reshape(60, 8, 50, 8).mean((1, 3)), atol=(PIXEL / 8 / SD) ** 2 / 12 * bell.max())  # of midpoints an eighth of a pixel apart: h^2 / 24 times both curvatures


def test_every_projection_of_a_structure_holds_its_atoms():
    np.testing.assert_allclose(project(L_SHAPE, TILTS, (70, 70), PIXEL).sum((1, 2)) * PIXEL**2, len(L_SHAPE), rtol=1e-6)


def test_a_ball_projects_to_its_chords():
    radius, spacing = 40.0, 2.0
    (image,) = project(ball(radius, spacing), [37.0], (61, 61), PIXEL, resolution=6.0)
    y = (np.arange(61) - 30) * PIXEL
    r = np.hypot(y, y[:, None])
    inner = r < 30  # the blur of an edge 10 Å away is below a thousandth
    chord = 2 * np.sqrt(radius**2 - r[inner] ** 2) / spacing**3
    curvature = 0.5 * (6.0**2 / 8 / np.log(2)) * 2 * (1 / np.sqrt(radius**2 - r[inner] ** 2) + 0.5 * r[inner] ** 2 / (radius**2 - r[inner] ** 2) ** 1.5) / spacing**3
    np.testing.assert_allclose(image[inner], chord - curvature, rtol=0.02)  # the ball is made of points


def test_sirt_restores_an_analytic_cylinder_its_volume_and_place():
    """A homogeneous cylinder along the tilt axis has the chord 2 sqrt(R^2 - (v - v0)^2) as its Radon transform."""
    pytest.importorskip("astra")
    radius, y0, z0, n = 20.0, 8.0, -6.0, 40
    edges = (np.arange(8 * n) + 0.5 - 4 * n) * PIXEL / 8
    angles = np.radians(np.arange(-90, 90, 3.0))
    chord = lambda v: 2 * np.sqrt(np.maximum(radius**2 - v**2, 0))
    series = np.array([chord(edges - y0 * np.cos(t) + z0 * np.sin(t)).reshape(n, 8).mean(1) for t in angles])[:, :, None]
    volume = sirt(series, np.degrees(angles), PIXEL, 100)
    axis = (np.arange(n) - (n - 1) / 2) * PIXEL
    z, y = axis[:, None, None], axis[:, None]
    assert abs(volume.sum() * PIXEL**3 / (np.pi * radius**2 * PIXEL) - 1) < 0.005
    inside = np.broadcast_to(np.hypot(y - y0, z - z0) < radius - 6, volume.shape)
    assert abs(volume[inside].mean() - 1) < 0.01
    assert abs(np.sum(volume > 0.5) * PIXEL**3 / (np.pi * radius**2 * PIXEL) - 1) < 0.02
    assert abs((volume * y).sum() / volume.sum() - y0) < 0.05
    assert abs((volume * z).sum() / volume.sum() - z0) < 0.05


def test_what_the_tilts_miss_is_smeared_along_the_beam():
    pytest.importorskip("astra")
    atoms, tilts = ball(14.0), np.arange(-40.0, 41.0, 4.0)
    volume = sirt(project(atoms, tilts, (28, 28), PIXEL, 6.0), tilts, PIXEL, 60)
    axis = (np.arange(28) - 13.5) * PIXEL
    spread = np.array([volume.sum(tuple({0, 1, 2} - {k})) @ axis**2 for k in (2, 1, 0)]) / volume.sum()  # x, y, z
    true = (atoms**2).mean(0) + 6.0**2 / (8 * np.log(2)) + PIXEL**2 / 12
    assert abs(spread[0] / true[0] - 1) < 0.01  # along the tilt axis nothing is missed
    assert spread[2] > 1.3 * spread[1]  # alike in truth


def test_an_asymmetric_object_comes_back_in_its_own_handedness():
    pytest.importorskip("astra")
    volume = sirt(project(L_SHAPE, TILTS[::2], (26, 26), 3.0, 9.0), TILTS[::2], 3.0, 30)
    alike = lambda model: np.corrcoef(volume.ravel(), model_density(model, volume.shape, 3.0, 9.0).ravel())[0, 1]
    assert alike(L_SHAPE) > 0.9
    for mirror in ([1, 1, -1], [1, -1, 1], [-1, 1, 1], [1, -1, -1]):
        assert alike(L_SHAPE * mirror) < alike(L_SHAPE) - 0.1


@pytest.mark.parametrize("rotation", [0.0, 37.3, 200.0])
def test_align_finds_how_a_model_was_turned_and_shifted(rotation):
    c, s = np.cos(np.radians(rotation)), np.sin(np.radians(rotation))
    x, y, z = L_SHAPE.T
    moved = np.stack([c * x - s * y + 3.3, s * x + c * y - 5.1, z + 2.2], 1)
    tomogram = 7.0 * model_density(moved, (38, 44, 44), PIXEL)
    found = align(tomogram, L_SHAPE, PIXEL, step=15.0)
    assert abs((found.rotation - rotation + 180) % 360 - 180) < 0.1
    np.testing.assert_allclose(found.shift, [3.3, -5.1, 2.2], atol=0.02)
    np.testing.assert_allclose(found(L_SHAPE), moved, atol=0.06)
    assert abs(found.scale / 7.0 - 1) < 0.01 and found.correlation > 0.999
    model = model_density(L_SHAPE, tomogram.shape, PIXEL)
    np.testing.assert_allclose(found.in_model_frame(tomogram, PIXEL), model, atol=0.02 * model.max())


def test_volume_and_atoms_are_drawn_as_a_tilted_specimen_is_imaged():
    tilt, half = 45.0, (40 - 1) / 2 * PIXEL
    axes = Figure().subplots(2)
    plot_tomogram(axes[0], model_density(L_SHAPE, (40, 40, 40), PIXEL), PIXEL, 0.001, tilt)
    drawn, (image,) = np.asarray(axes[0].images[0].get_array()) * PIXEL, project(L_SHAPE, [tilt], (40, 40), PIXEL)
    assert np.corrcoef(drawn.ravel(), image.ravel())[0, 1] > 0.999
    assert axes[0].images[0].get_extent() == [-half - PIXEL / 2, half + PIXEL / 2, half + PIXEL / 2, -half - PIXEL / 2]
    plot_tilted_atoms(axes[1], L_SHAPE, np.ones_like(L_SHAPE), tilt)
    places = axes[1].collections[-1].get_offsets()
    one_by_one = [project(L_SHAPE[i : i + 1], [tilt], (40, 40), PIXEL)[0] for i in range(len(L_SHAPE))]
    means = [[(a.sum(k) @ (np.arange(40) * PIXEL - half)) / a.sum() for k in (0, 1)] for a in one_by_one]
    assert {tuple(p) for p in np.round(places, 2)} == {tuple(p) for p in np.round(means, 2)}


def test_overlap_and_surface_distance_of_two_boxes():
    solid, reference = np.zeros((2, 20, 20, 20), bool)
    reference[5:15, 5:15, 5:15] = True
    solid[5:15, 5:15, 7:17] = True
    assert overlap(solid, reference) == (2 * 800 / 2000, 800 / 1200)
    assert overlap(reference, reference) == (1.0, 1.0)
    assert np.all(surface_distance(reference, reference, PIXEL)[1] == 0)
    points, distance = surface_distance(solid, reference, PIXEL)
    front, back = points[:, 0] == (16 - 9.5) * PIXEL, (points[:, 0] == (7 - 9.5) * PIXEL) & (abs(points[:, 1:]) < 4).all(1)
    assert np.all(distance[front] == 2 * PIXEL)  # two voxels out
    assert np.all(distance[back] == -2 * PIXEL)  # and two within


@pytest.mark.parametrize(
    ("series", "tilts", "message"),
    [(np.zeros((3, 4, 4)), [0, 1], "2 tilts"), (np.zeros((4, 4)), [0, 1, 2, 3], "tilt for each"), (np.full((2, 4, 4), np.nan), [0, 1], "32 values"), (np.zeros((2, 4, 4)), [0, 95], "95°")],
)
def test_sirt_names_what_is_wrong_with_a_tilt_series(series, tilts, message):
    with pytest.raises(InputError, match=message):
        sirt(series, tilts, PIXEL)


def test_without_astra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "astra", None)
    with pytest.raises(InputError, match=r"pip install depthprob\[tomo\]"):
        sirt(np.zeros((2, 4, 4)), [0, 10], PIXEL)


def test_a_measured_tilt_series_is_read_with_the_tilts_of_a_table(tmp_path):
    images = project(L_SHAPE, [-20.0, 0.0, 20.0], (12, 14), PIXEL)
    np.savez(tmp_path / "tilts.npz", stack=images, pixel_size_A=PIXEL)
    np.savez(tmp_path / "bare.npz", stack=np.where(images > images.mean(), np.nan, images))
    (tmp_path / "tilts.csv").write_text("tilt_deg\n-20\n0\n20\n")
    (tmp_path / "few.csv").write_text("tilt_deg\n-20\n0\n")
    read = read_tilt_series(tmp_path / "tilts.npz", tmp_path / "tilts.csv")
    np.testing.assert_array_equal(read.data, images)
    assert read.tilts_deg.tolist() == [-20, 0, 20] and read.pixel_size_A == PIXEL
    for file, table, pixel, message in (
        ("tilts.npz", "few.csv", None, "3 images, but .* has 2 tilts"),
        ("tilts.npz", "tilts.csv", 3.0, "2 in the file and 3 as given"),
        ("bare.npz", "tilts.csv", None, "Give pixel_size_A"),
        ("bare.npz", "tilts.csv", 2.0, "NaN or infinity"),
        ("none.npz", "tilts.csv", None, "no tilt series"),
        ("tilts.npz", "none.csv", None, "cannot read table of tilts"),
    ):
        with pytest.raises(InputError, match=message):
            read_tilt_series(tmp_path / file, tmp_path / table, pixel)
