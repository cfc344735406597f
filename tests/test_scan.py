"""Distorted scans and displaced lines from residuals, on Gaussian columns seen at places worked out by hand."""

import numpy as np
import pytest
from scipy.stats import chi2

from depthprob.reconstruction.lattice import crystal_columns, lattice_stretch, unit_cell
from depthprob.reconstruction.quality import doubts_of_lattice, doubts_of_scan
from depthprob.reconstruction.scan import scan_residuals

PIXEL, SHAPE, IMAGES = 0.3, (60, 72), 9
COLUMNS = 4.0 + 2.04 * np.stack([a.ravel() for a in np.mgrid[:6, :5]], 1)
WIDTHS = np.linspace(0.45, 1.5, IMAGES)  # in focus and out of it


def images(distortion=None, lines=None, widths=WIDTHS):
    """Expected counts (F, y, x): columns at r displaced by E (r - middle), rows by `lines` (F, y) along x."""
    x, y = np.arange(SHAPE[1]) * PIXEL, np.arange(SHAPE[0])[:, None] * PIXEL
    middle = (np.array(SHAPE[::-1]) - 1) * PIXEL / 2
    out = []
    for i, width in enumerate(widths):
        places = COLUMNS if distortion is None else COLUMNS + (COLUMNS - middle) @ distortion[i].T
        moved = x if lines is None else x - lines[i][:, None]
        out.append(2.0 + sum(20 / width**2 * np.exp(-((moved - px) ** 2 + (y - py) ** 2) / (2 * width**2)) for px, py in places))
    return np.array(out)


def found(counts, rate=None):
    rate = images() if rate is None else rate
    return scan_residuals(counts, rate, np.ones(rate.shape, bool), PIXEL)


def test_a_sound_scan_raises_no_doubts_nor_does_a_fit_of_wrong_width():
    rng = np.random.default_rng(0)
    counts = rng.poisson(images())
    assert doubts_of_scan(found(counts), SHAPE, PIXEL) == []
    assert doubts_of_scan(found(counts, images(widths=1.1 * WIDTHS)), SHAPE, PIXEL) == []
    assert (found(counts).lines < 2.3 * found(counts).lines_noise).all()  # five standard deviations of the mean square


def test_distortions_of_images_are_found_to_their_error_bars_and_told():
    rng = np.random.default_rng(1)
    distortion = rng.normal(0, 0.01, (IMAGES, 2, 2))
    truth = np.stack([(distortion[:, 0, 0] - distortion[:, 1, 1]) / 2, distortion[:, 0, 1], distortion[:, 1, 0]], 1)
    scan = found(rng.poisson(images(distortion)))
    weight = scan.images_sd**-2
    error = scan.images - (truth - (weight * truth).sum(0) / weight.sum(0))
    # chi-square of 3 (F - 1) degrees of freedom: false alarm 1e-3; second order in the displacement, some 5 % of it, is not in the error bars
    assert np.sum((error / np.hypot(scan.images_sd, 0.05 * 0.01)) ** 2) < chi2.isf(1e-3, 3 * (IMAGES - 1))
    assert scan.distortion == pytest.approx(np.sqrt(np.mean((truth - truth.mean(0)) ** 2)), rel=0.4)  # three standard deviations of such a root mean square of 24
    (doubt,) = doubts_of_scan(scan, SHAPE, PIXEL)
    assert "image_distortions" in doubt


@pytest.mark.parametrize("axis", [0, 1])
def test_lines_that_jitter_are_told_with_their_direction(axis):
    rng = np.random.default_rng(2)
    rate, lines = images(), rng.normal(0, 0.08, (IMAGES, SHAPE[0]))
    counts = rng.poisson(images(lines=lines))
    if axis:
        rate, counts = rate.swapaxes(1, 2), counts.swapaxes(1, 2)
    scan = found(counts, rate)
    assert scan.lines[axis] == pytest.approx(0.08, rel=0.15)
    assert scan.lines[1 - axis] < 0.03
    (doubt,) = doubts_of_scan(scan, rate.shape[1:], PIXEL)
    assert f"Lines along {'xy'[axis]} are displaced" in doubt


def test_images_without_pixels_in_use_say_nothing():
    rate = images()
    mask = np.ones(rate.shape, bool)
    mask[0] = False
    scan = scan_residuals(rate, rate, mask, PIXEL)
    assert np.isinf(scan.images_sd[0]).all() and np.isfinite(scan.distortion) and scan.distortion == 0


@pytest.mark.parametrize("zone", [(0, 0, 1), (1, 1, 0)])
def test_a_lattice_that_all_images_distort_alike_is_told_by_how_much_and_along_what(zone):
    """Stretched by 3 % at 60° and shrunk by 2 % across, its columns off their places by 0.03 Å and the crystal turned by 20°."""
    rng = np.random.default_rng(3)
    geometry = crystal_columns(unit_cell("fcc", 4.08), zone)
    cells = np.stack([a.ravel() for a in np.mgrid[-4:5, -4:5]], 1)
    turn = lambda degrees: np.array([[np.cos(a := np.radians(degrees)), np.sin(a)], [-np.sin(a), np.cos(a)]])  # of rows
    sound = cells @ geometry.basis @ turn(20) + 20 + rng.normal(0, 0.03, cells.shape)
    stretch = lattice_stretch(sound, geometry)
    assert abs(stretch.most - 1) < 4 * stretch.sd and abs(stretch.least - 1) < 4 * stretch.sd
    assert doubts_of_lattice(stretch, 4.08) == []
    stretched = sound @ turn(-60) @ np.diag([1.03, 0.98]) @ turn(60)
    stretch = lattice_stretch(stretched, geometry)
    assert (stretch.most, stretch.least) == pytest.approx((1.03, 0.98), abs=4 * stretch.sd)
    assert stretch.sd < 1e-3 and stretch.direction == pytest.approx(60, abs=3)
    (doubt,) = doubts_of_lattice(stretch, 4.08)
    assert "1.05" in doubt and "60°" in doubt
    (doubt,) = doubts_of_lattice(lattice_stretch(1.02 * sound, geometry), 4.08)
    assert "1.02" in doubt and "pixel_size_A" in doubt


def test_a_row_of_columns_has_no_stretch():
    geometry = crystal_columns(unit_cell("fcc", 4.08), (0, 0, 1))
    assert lattice_stretch(np.stack([2.04 * np.arange(8), np.zeros(8)], 1), geometry) is None
