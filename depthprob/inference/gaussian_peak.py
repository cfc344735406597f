"""The paper's estimator, kept as the yardstick: a Gaussian fitted to each column's intensity against defocus.

Alania et al. (2017), section 3.1, step 4: intensity averaged around the column, a 1D Gaussian by Gauss-Newton least squares, and a
correction from the peak to the centre of mass from the simulated series of that number of atoms.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..physics.focal_series import FocalSeries
from ..physics.library import ColumnLibrary

LEAST = 1e-12  # square of a bell less its mean, summed over the foci, below which nothing is seen of it


class PeakFit(NamedTuple):
    """Gaussian a exp(-(f - peak)^2 / (2 width^2)) + background for every column (C,).

    Attributes
    ----------
    depth : (C,)
        Peak minus correction: centre of mass [Å]; nan where the fit failed.
    sd : (C,)
        Standard deviation from the fit's covariance and residuals [Å]; nan where there is none.
    peak, correction, amplitude, width, background : (C,)
    intensity, model : (C, F)
        Averages around the columns and the fitted curves, fraction of the beam.
    """

    depth: np.ndarray
    sd: np.ndarray
    peak: np.ndarray
    correction: np.ndarray
    amplitude: np.ndarray
    width: np.ndarray
    background: np.ndarray
    intensity: np.ndarray
    model: np.ndarray


def disc_averages(stack: np.ndarray, positions: np.ndarray, shifts: np.ndarray, pixel_size: float, radius: float, periodic: bool) -> np.ndarray:
    """Mean of every image in a disc around every column (C, F); the disc's edge is one pixel soft, so sub-pixel positions count.

    Parameters
    ----------
    positions : (C, 2) [Å]
    shifts : (F, 2) or (F, C, 2)
        Displacement of the object, or of each column, in each image [Å].
    radius : float
        [Å].
    """
    ny, nx = stack.shape[1:]
    m = int(np.ceil(radius / pixel_size)) + 1
    oy, ox = (o.ravel() for o in np.mgrid[-m : m + 1, -m : m + 1])
    out = np.empty((len(positions), len(stack)))
    for f, image in enumerate(stack):
        at = (positions + shifts[f]) / pixel_size
        base = np.rint(at).astype(int)
        ix, iy = base[:, :1] + ox, base[:, 1:] + oy
        distance = np.hypot(ix - at[:, :1], iy - at[:, 1:]) * pixel_size
        weight = np.clip((radius - distance) / pixel_size + 0.5, 0, 1)
        if periodic:
            ix, iy = ix % nx, iy % ny
        else:
            weight = weight * ((ix >= 0) & (ix < nx) & (iy >= 0) & (iy < ny))
            ix, iy = np.clip(ix, 0, nx - 1), np.clip(iy, 0, ny - 1)
        out[:, f] = (weight * image[iy, ix]).sum(1) / np.maximum(weight.sum(1), 1e-12)
    return out


def fit_gaussians(defocus: np.ndarray, intensity: np.ndarray, iterations: int = 60, together: int = 1024):
    """Least-squares Gaussians through rows of intensity (C, F), `together` at a time: parameters (C, 4) and covariances (C, 4, 4).

    Parameters are amplitude, peak, width, background. Amplitude and background, in which the model is linear, are always the best for their peak and width;
    Gauss-Newton in these two (variable projection, L. Kaufman, BIT 15, 49 (1975)), with a damping that rises where a step makes a row worse.
    """
    one = lambda rows: _fit_gaussians(np.asarray(defocus, float), np.asarray(rows, float), iterations)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy's loops run side by side
        parts = list(pool.map(one, np.split(intensity, range(together, len(intensity), together))))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _fit_gaussians(defocus: np.ndarray, intensity: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    span, along = np.ptp(defocus), np.ascontiguousarray(intensity.T)  # foci first: sums over them run along whole rows of columns
    floor, height = along.min(0), np.ptp(along, axis=0)
    weight = (along - floor) ** 2
    total = np.maximum(weight.sum(0), 1e-30)
    peak = defocus @ weight / total
    width = np.sqrt(np.maximum(2 * (defocus**2 @ weight / total - peak**2), 0))  # the square of a Gaussian is narrower by a root of two
    width = np.clip(width, span / 50, span / 2)
    mean = along.mean(0)
    varied = along - mean
    square = np.einsum("fc,fc->c", varied, varied)
    least = 1e-12 * np.maximum(height, 1e-30) ** 2  # on diagonals, where the data tell nothing

    rows, damping = np.arange(len(intensity)), np.full(len(intensity), 1e-6)  # not yet at their minimum
    left, sums = varied, _gaussian_sums(defocus, varied, peak, width)
    final, move = np.empty_like(sums), np.zeros((2, len(peak)))  # sums before the last step, and that step along peak and width
    for _ in range(iterations):
        _, explained, slope_p, slope_w, pp, pw, ww = _projected(sums, len(defocus))
        pp, ww = (a * (1 + damping[rows]) + least[rows] for a in (pp, ww))
        determinant = pp * ww - pw**2
        to_p, to_w = (ww * slope_p - pw * slope_w) / determinant, (pp * slope_w - pw * slope_p) / determinant
        moves = np.stack([np.clip(width[rows] * to_p, -span / 4, span / 4), np.clip(abs(width[rows] * (1 + to_w)), span / 200, 2 * span) - width[rows]])
        cost = square[rows] - explained
        last = slope_p * to_p + slope_w * to_w <= 1e-7 * cost  # what the step can gain
        if last.any():
            final[:, rows[last]], move[:, rows[last]] = sums[:, last], moves[:, last]
            more = ~last
            rows, left, sums, moves, explained = rows[more], left[:, more], sums[:, more], moves[:, more], explained[more]
        if not len(rows):
            break
        trial_p, trial_w = peak[rows] + moves[0], width[rows] + moves[1]
        moved = _gaussian_sums(defocus, left, trial_p, trial_w)
        better = _projected(moved, len(defocus))[1] >= explained
        peak[rows[better]], width[rows[better]] = trial_p[better], trial_w[better]
        sums = moved if better.all() else np.where(better, moved, sums)
        damping[rows] = np.where(better, damping[rows] / 5, np.maximum(damping[rows] * 25, 1e-3))
    final[:, rows] = sums
    return _with_covariance(final, peak, width, move, mean, square, least, len(defocus))


def _with_covariance(sums, peak, width, move, mean, square, least, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters (C, 4) after the last step, which takes amplitude and background along to first order, and covariances (C, 4, 4) at the point before it."""
    amplitude, explained, _, _, pp, pw, ww = _projected(sums, n)
    sum_b, sum_p, sum_w, bb, bp, wb = sums[:6]
    spread = np.maximum(bb - sum_b**2 / n, LEAST)
    pp, ww = pp + least, ww + least
    bent = np.array([[ww, -pw], [-pw, pp]]) * (width**2 / (pp * ww - pw**2))  # inverse of the information on peak and width
    straight = np.array([[np.ones_like(bb), -sum_b / n], [-sum_b / n, bb / n]]) / spread  # on amplitude and background, peak and width known
    by_move = amplitude / width * np.array([[bp, wb], [sum_p, sum_w]])
    follow = -np.einsum("ijc,jkc->ikc", straight, by_move)  # of amplitude and background, by peak and width
    beside = np.einsum("ijc,jkc->ikc", follow, bent)
    covariance = np.empty((4, 4, len(peak)))
    linear, other = np.ix_((0, 3), (0, 3)), np.ix_((0, 3), (1, 2))
    covariance[1:3, 1:3], covariance[other] = bent, beside
    covariance[np.ix_((1, 2), (0, 3))] = beside.swapaxes(0, 1)
    covariance[linear] = straight + np.einsum("ijc,kjc->ikc", beside, follow)
    covariance *= (square - explained) / max(1, n - 4)
    more = np.einsum("ijc,jc->ic", follow, move)
    theta = np.stack([amplitude + more[0], peak + move[0], width + move[1], mean - amplitude * sum_b / n + more[1]], 1)
    return theta, np.moveaxis(covariance, 2, 0)


def _gaussian_sums(defocus: np.ndarray, varied: np.ndarray, peak: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Sums over the foci (11, C) of b, p, w; b b, b p, p p, p w, w w; y b, y p, y w.

    b = exp(-t^2 / 2), p = b t, w = b t^2 with t = (defocus - peak) / width, so that p p = b w; y is `varied` (F, C), the intensity less its mean.
    """
    t = (defocus[:, None] - peak) * (1 / width)
    b = t * t
    b *= -0.5
    np.exp(b, out=b)
    p = b * t
    w = p * t
    pairs = ((b, b), (b, p), (p, p), (p, w), (w, w), (varied, b), (varied, p), (varied, w))
    return np.stack([b.sum(0), p.sum(0), w.sum(0), *(np.einsum("fc,fc->c", one, other) for one, other in pairs)])


def _projected(sums: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
    """What is left of `_gaussian_sums` over n foci once background and amplitude are the best there are (C,).

    The amplitude; the sum of squares that the Gaussian explains; half the slope of that sum along peak and width, each in units of the width; and the
    inner products peak with peak, peak with width and width with width of the derivatives, less what amplitude and background take of them.
    """
    sum_b, sum_p, sum_w, bb, bp, pp, pw, ww, yb, yp, yw = sums
    bb = np.maximum(bb - sum_b**2 / n, LEAST)
    p_b, w_b = bp - sum_p * sum_b / n, pp - sum_w * sum_b / n
    a = yb / bb
    inner = pp - sum_p**2 / n - p_b**2 / bb, pw - sum_p * sum_w / n - p_b * w_b / bb, ww - sum_w**2 / n - w_b**2 / bb
    return a, a * yb, a * (yp - a * p_b), a * (yw - a * w_b), *(a**2 * product for product in inner)


def correction_curve(library: ColumnLibrary, defocus: np.ndarray, radius: float, pixel_size: float = 0.1) -> np.ndarray:
    """Peak of the same fit to the simulated series of every atom number with its centre of mass at zero (n_max,) [Å]."""
    m = int(np.ceil(radius / pixel_size)) + 1
    along = np.arange(-m, m + 1) * pixel_size
    weight = np.clip((radius - np.hypot(along, along[:, None])) / pixel_size + 0.5, 0, 1)
    rows = [(library.series(n, defocus, along, along) * weight).sum((1, 2)) / weight.sum() for n in range(1, library.n_max + 1)]
    theta, _ = fit_gaussians(defocus, np.array(rows))
    return theta[:, 1]


def fit_gaussian_peaks(
    stack: np.ndarray,
    positions: np.ndarray,
    n_atoms: np.ndarray,
    library: ColumnLibrary,
    series: FocalSeries,
    image_shifts: np.ndarray,
    radius: float | None = None,
) -> PeakFit:
    """Depths of all columns by the paper's method.

    Parameters
    ----------
    stack : (F, ny, nx)
        Fraction of the beam.
    image_shifts : (F, 2) or (F, C, 2)
        Displacement of the object, or of each column, in each image [Å].
    radius : float, optional
        Of the disc averaged over [Å]; by default `disc_radius`.
    """
    defocus = np.asarray(series.defocus, float)
    radius = radius or disc_radius(positions)
    intensity = disc_averages(stack, positions, image_shifts, series.pixel_size, radius, series.periodic)
    theta, covariance = fit_gaussians(defocus, intensity)
    correction = correction_curve(library, defocus, radius)[np.asarray(n_atoms) - 1]
    amplitude, peak, width, background = theta.T
    failed = (amplitude <= 0) | (peak < defocus.min()) | (peak > defocus.max())
    model = amplitude[:, None] * np.exp(-(((defocus - peak[:, None]) / width[:, None]) ** 2) / 2) + background[:, None]
    depth = np.where(failed, np.nan, peak - correction)
    variance = covariance[:, 1, 1]
    return PeakFit(depth, np.sqrt(np.where(variance > 0, variance, np.nan)), peak, correction, amplitude, width, background, intensity, model)


def disc_radius(positions: np.ndarray) -> float:
    """0.3 of the median distance of nearest columns, at most 1 Å.

    A wider disc takes in the neighbours' defocused tails: for gold along [001], 0.6 Å instead of 1.0 Å makes the method's error a third.
    """
    if len(positions) < 2:
        return 1.0
    from scipy.spatial import cKDTree

    nearest = cKDTree(positions).query(positions, k=2)[0][:, 1]
    return min(1.0, 0.3 * float(np.median(nearest)))
