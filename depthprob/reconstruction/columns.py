"""Columns on the average of the central images: found, and fitted with 2D Gaussians as in StatSTEM."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter
from scipy.sparse import coo_array, coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from ..inference.arrow import ArrowFactor, ArrowMatrix, plus_diagonal, strips

EDGE = 0.5  # Å from an edge within which columns are not looked for,
RIM = EDGE + 0.1  # and may not be found, since the drift moves them
NEAR = 3.0  # Å from an edge up to which a crystal is taken to go on beyond it


class ColumnFit(NamedTuple):
    """Jointly fitted Gaussians.

    Attributes
    ----------
    positions : (C, 2)
        x, y [Å].
    amplitude : (C,)
        Height, fraction of the beam.
    width : float
        Common standard deviation [Å].
    volume, volume_sd : (C,)
        Scattering cross-section 2 pi amplitude width^2 and its standard deviation from the residuals, all else free [Å^2].
    background : float
    model_image : (ny, nx)
    """

    positions: np.ndarray
    amplitude: np.ndarray
    width: float
    volume: np.ndarray
    volume_sd: np.ndarray
    background: float
    model_image: np.ndarray


def central_average(stack: np.ndarray, defocus: np.ndarray, n_images: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the n aligned images, consecutive in focus, of highest contrast, and their indices; of fewer where their variance falls below half the highest.

    For a series centred on the particle these are the central images, as in the paper. Of coarse steps of focus eight images show neighbours as one.
    """
    n = min(n_images, len(stack))
    order = np.argsort(defocus)
    variance = stack.var((1, 2))[order]
    chosen = np.argmax(np.convolve(variance, np.ones(n), "valid")) + np.arange(n)
    chosen = order[chosen[variance[chosen] >= variance[chosen].max() / 2]]
    return stack[chosen].mean(0), chosen


def find_columns(image: np.ndarray, pixel_size: float, periodic: bool = False, nearest: float = 2.0, significance: float = 0.15) -> np.ndarray:
    """Positions (C, 2) [Å] of columns, of a crystal whose nearest are `nearest` [Å] apart: maxima of the softened image, standing clear of what surrounds them.

    The image is softened by 0.35 Å, under the width of any column that an aperture resolves, or less where columns are nearer than 2 Å; a maximum counts when it is the
    highest within 0.7 Å, or half of `nearest`, and rises above the lowest point within 1.6 Å by `significance` of the typical maximum.
    Columns closer than `EDGE` to an edge that does not wrap are left out.
    """
    mode = "wrap" if periodic else "nearest"
    soft = gaussian_filter(np.asarray(image, float), 0.35 * min(1.0, nearest / 2) / pixel_size, mode=mode)
    disc = lambda radius: np.hypot(*np.mgrid[[slice(-int(radius / pixel_size), int(radius / pixel_size) + 1)] * 2]) <= radius / pixel_size
    peaks = soft == maximum_filter(soft, footprint=disc(max(min(0.7, nearest / 2), 1.5 * pixel_size)), mode=mode)
    lowest = -maximum_filter(-soft, footprint=disc(max(1.6, 2 * pixel_size)), mode=mode)
    floor = np.quantile(soft, 0.02)
    rise = soft - lowest
    peaks &= rise > 0
    # the median weighted by squared height: however wide the vacuum, its thousands of small maxima weigh little
    heights = np.sort(soft[peaks] - floor)
    weight = np.cumsum(heights**2)
    tall = floor + (heights[np.searchsorted(weight, weight[-1] / 2)] if len(heights) else 0.0)
    peaks &= (rise > significance * (tall - floor) * 0.4) & (soft - floor > significance * (tall - floor))
    iy, ix = np.nonzero(peaks)
    if not periodic:
        ny, nx = image.shape
        edge = EDGE / pixel_size
        inside = (ix >= edge) & (ix <= nx - 1 - edge) & (iy >= edge) & (iy <= ny - 1 - edge)
        iy, ix = iy[inside], ix[inside]
    return (np.stack([ix, iy], 1) + peak_offsets(soft, iy, ix)) * pixel_size


def columns_beyond(positions: np.ndarray, extent: np.ndarray, reach: float) -> np.ndarray:
    """Where columns (m, 2) [Å] may stand that an image from (0, 0) to `extent` (x, y) does not show, up to `reach` Å beyond its edges.

    Those are places of neighbours that columns within `NEAR` of an edge lack beyond it, and the ones behind them in the same direction, which lie beyond an edge, or within `RIM` of it,
    where columns are not looked for; a place well inside where none was found is taken for empty, and nothing asked for behind it.
    """
    if len(positions) < 5:
        return np.empty((0, 2))
    tree = cKDTree(positions)
    nearest, fourth = np.median(tree.query(positions, 5)[0][:, [1, 4]], 0)  # of a pair of columns that is repeated, one is not enough
    pairs = tree.query_pairs(1.5 * fourth, output_type="ndarray")
    every = 1 + len(pairs) // 2000  # so many tell; all pairs of thousands of alike vectors would be gigabytes
    apart = (positions[pairs[:, 1]] - positions[pairs[:, 0]])[::every]
    apart = np.concatenate([apart, -apart])
    alike = cKDTree(apart).query_pairs(0.15 * nearest, output_type="ndarray")
    count, kind = connected_components(coo_array((np.ones(len(alike)), alike.T), shape=(len(apart),) * 2), directed=False)
    often = every * np.bincount(kind, minlength=count) >= 0.15 * len(positions)
    sides = lambda at: np.concatenate([-at, at - extent], 1)  # how far beyond each edge
    places = [np.empty((0, 2))]
    for v in np.stack([np.bincount(kind, part) for part in apart.T], 1)[often] / np.bincount(kind)[often, None]:
        ahead = positions[((sides(positions + v) <= -RIM) | (sides(positions) > -NEAR)).all(1)]
        while len(ahead):
            ahead = ahead + v
            away = sides(ahead).max(1)
            ahead = ahead[(away > -RIM) & (away < reach)]
            ahead = ahead[tree.query(ahead)[0] > 0.4 * nearest] if len(ahead) else ahead
            places.append(ahead)
    return np.concatenate(places)


def peak_offsets(image: np.ndarray, iy: np.ndarray, ix: np.ndarray) -> np.ndarray:
    """x, y (C, 2) [pixels] of maxima from their highest pixels, by the parabola through the neighbours along each axis."""
    ny, nx = image.shape
    take = lambda dy, dx: image[(iy + dy) % ny, (ix + dx) % nx]
    refine = lambda low, high: np.clip((low - high) / (2 * (low - 2 * take(0, 0) + high) - 1e-12), -0.5, 0.5)
    return np.stack([refine(take(0, -1), take(0, 1)), refine(take(-1, 0), take(1, 0))], 1)


def fit_columns(
    image: np.ndarray, positions: np.ndarray, pixel_size: float, periodic: bool = False, width: float = 0.5, iterations: int = 25
) -> ColumnFit:
    """Joint least-squares fit of overlapping Gaussians of common width, with a constant background.

    Gauss-Newton; each Gaussian reaches four widths, so the cost is linear in columns.
    """
    ny, nx = image.shape
    data = np.asarray(image, float).ravel()
    n = len(positions)
    xy = np.array(positions, float)
    background = float(np.quantile(data, 0.05))
    height = np.maximum(_sample(image, xy, pixel_size) - background, 1e-9)
    axis = int(ny > nx)
    period = (nx, ny)[axis] * pixel_size if periodic else None
    for _ in range(iterations):
        reach = 4 * width + pixel_size
        rows, cols, dx, dy = _near(xy, reach, pixel_size, image.shape, periodic)
        r2 = dx**2 + dy**2
        bell = np.exp(-r2 / (2 * width**2))
        value = height[cols] * bell
        model = np.bincount(rows, value, len(data)) + background
        residual = data - model
        entries = [bell, value * dx / width**2, value * dy / width**2]
        jacobian = coo_matrix((np.concatenate(entries), (np.tile(rows, 3), np.concatenate([cols, cols + n, cols + 2 * n]))), shape=(len(data), 3 * n)).tocsr()
        by_width = np.bincount(rows, value * r2 / width**3, len(data))
        common = np.stack([by_width, np.ones(len(data))], 1)
        squares = np.concatenate([jacobian.multiply(jacobian).sum(0).A1, (common**2).sum(0)])
        factor = ArrowFactor(plus_diagonal(_normal_matrix(jacobian, common, strips(xy[:, axis], 2 * reach, period)), 1e-6 * squares + 1e-15))
        slope = np.concatenate([jacobian.T @ residual, common.T @ residual])
        step = factor.solve(slope)
        move = np.clip(step[n : 3 * n].reshape(2, n).T, -0.15, 0.15)
        height = np.maximum(height + step[:n], 0.05 * height)
        xy = xy + move
        width = float(np.clip(width + np.clip(step[-2], -0.05, 0.05), 0.5 * pixel_size, 1.2))
        background += step[-1]
        # within a hundredth of a standard deviation, root mean square over parameters: columns lost in their neighbours' flanks may creep for ever
        near = step @ slope < 1e-4 * len(step) * (residual**2).mean()
        if near or (abs(move).max() < 1e-4 and abs(step[-2]) < 1e-4):
            break
    only_width = np.zeros(3 * n + 2)
    only_width[-2] = 1.0
    by_width = factor.solve(only_width)  # covariances with it
    variance = width**2 * factor.variances()[:n] + 4 * height * width * by_width[:n] + 4 * height**2 * by_width[-2]
    noise = (residual**2).sum() / max(1, len(data) - 3 * n - 2)
    return ColumnFit(xy, height, width, 2 * np.pi * width**2 * height, 2 * np.pi * width * np.sqrt(noise * variance), background, model.reshape(ny, nx))


def _normal_matrix(jacobian: csr_matrix, common: np.ndarray, parts: list[np.ndarray]) -> ArrowMatrix:
    """J^T J of the columns' heights, x and y, pixels by 3 C, and of the two `common` parameters, with columns in strips."""
    n = jacobian.shape[1] // 3
    of_strip = [(np.arange(3) * n + part[:, None]).ravel() for part in parts]
    normal = (jacobian.T @ jacobian).tocsr()
    diagonal = [normal[own][:, own].toarray() for own in of_strip]
    lower = [normal[below][:, own].toarray() for own, below in pairwise(of_strip)]
    order = np.concatenate(of_strip)
    return ArrowMatrix(order, diagonal, lower, (jacobian.T @ common)[order], common.T @ common)


def _near(xy, reach, pixel_size, shape, periodic):
    """Pixels within reach of each column: flat pixel, column, x - x_c, y - y_c [Å]."""
    ny, nx = shape
    m = int(np.ceil(reach / pixel_size))
    offset = np.arange(-m, m + 1)
    oy, ox = (o.ravel() for o in np.meshgrid(offset, offset, indexing="ij"))
    base = np.rint(xy / pixel_size).astype(int)
    ix, iy = base[:, :1] + ox, base[:, 1:] + oy
    dx, dy = ix * pixel_size - xy[:, :1], iy * pixel_size - xy[:, 1:]
    keep = dx**2 + dy**2 <= reach**2
    if periodic:
        ix, iy = ix % nx, iy % ny
    else:
        keep &= (ix >= 0) & (ix < nx) & (iy >= 0) & (iy < ny)
    columns = np.broadcast_to(np.arange(len(xy))[:, None], keep.shape)
    return (iy * nx + ix)[keep], columns[keep], dx[keep], dy[keep]


def _sample(image, xy, pixel_size):
    ny, nx = image.shape
    i = np.rint(xy / pixel_size).astype(int)
    return image[i[:, 1] % ny, i[:, 0] % nx]
