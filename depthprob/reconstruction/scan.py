"""What a fit's residuals tell of the scan: images stretched and sheared against each other, and lines displaced by themselves."""

from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline

from ..inference.problem import DARKEST

TINY = 1e-30


class ScanResiduals(NamedTuple):
    """Root mean squares of what is left in the data, less what noise makes; zero where noise makes it all.

    Attributes
    ----------
    distortion : float
        Of `images`, less their mean over the images.
    distortion_noise : float
        Below which it is not told from none; its square is the standard deviation of the mean square.
    lines : (2,)
        Displacement [Å] of rows along x, and of pixel columns along y, against their image.
    lines_noise : (2,)
    images, images_sd : (F, 3)
        Of the distortion E of each image, by which a column stands E times its distance from the middle of the field farther aside: (E_xx - E_yy) / 2, E_xy and
        E_yx. What is left, a magnification of its own, is also what columns of a wrong width do at the edge of a particle.
    """

    distortion: float
    distortion_noise: float
    lines: np.ndarray
    lines_noise: np.ndarray
    images: np.ndarray
    images_sd: np.ndarray


def scan_residuals(counts: np.ndarray, rate: np.ndarray, mask: np.ndarray, pixel_size: float, read_variance: float = 0.0, dispersion: float = 1.0) -> ScanResiduals:
    """From counts and a fit's expected counts (F, ny, nx) [e/pixel], where `mask`, by one step of scoring for each image and each line.

    An object displaced by u(r) lowers the expected counts by u . grad. Shift, gain and background of each image are free beside its distortion, and all of
    them are before its lines.
    """
    n_foci, ny, nx = rate.shape
    x, y = ((np.arange(n) - (n - 1) / 2) * pixel_size for n in (nx, ny))
    images, images_sd, moments = np.zeros((n_foci, 3)), np.full((n_foci, 3), np.inf), np.zeros((2, 2))
    elements = np.zeros((3, 8))
    elements[0, [0, 3]], elements[1, 1], elements[2, 2] = (0.5, -0.5), 1.0, 1.0
    for i, (own, seen) in enumerate(zip(np.asarray(rate, float), mask, strict=True)):
        if seen.sum() <= 8:
            continue
        by_x, by_y = (-CubicSpline(along, own, axis=axis)(along, 1) for along, axis in ((x, 1), (y, 0)))
        weight = seen / (np.maximum(own, DARKEST) + read_variance) / dispersion
        rows = np.stack([by_x * x, by_x * y[:, None], by_y * x, by_y * y[:, None], by_x, by_y, own, np.ones_like(own)])
        residual = counts[i] - own
        normal = np.tensordot(rows * weight, rows, ([1, 2], [1, 2]))
        covariance = np.linalg.pinv(normal, 1e-12, hermitian=True)
        found = covariance @ np.tensordot(rows, weight * residual, ([1, 2], [0, 1]))
        images[i], images_sd[i] = elements @ found, np.sqrt(np.diag(elements @ covariance @ elements.T))
        residual = residual - np.tensordot(found, rows, 1)
        for axis, slope in enumerate((by_x, by_y)):
            score, information = (weight * slope * residual).sum(1 - axis), (weight * slope**2).sum(1 - axis)
            moments[axis] += (score**2 - information).sum(), (information**2).sum()
    weight = images_sd**-2
    images -= (weight * images).sum(0) / np.maximum(weight.sum(0), TINY)
    # the variance between images by moments, whatever their errors: DerSimonian and Laird, Controlled Clinical Trials 7, 177 (1986)
    freedom = np.maximum((weight > 0).sum(0) - 1, 0)
    share = np.maximum((weight.sum(0) - (weight**2).sum(0) / np.maximum(weight.sum(0), TINY)).sum(), TINY)
    between = ((weight * images**2).sum(0) - freedom).sum() / share
    excess, information = np.maximum(moments.T, TINY)
    return ScanResiduals(
        float(np.sqrt(max(between, 0.0))), float(np.sqrt(np.sqrt(2 * freedom.sum()) / share)),
        np.sqrt(excess / information), (2 / information) ** 0.25, images, images_sd,
    )  # fmt: skip
